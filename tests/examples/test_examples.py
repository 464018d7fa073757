"""Every example runs in a short form, in a process and a folder of its own, and does what it says."""

from __future__ import annotations

import math
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_prune import count_cost, load_pruned
from lightning_prune.models import LeNet

ROOT = Path(__file__).parents[2]
IMAGE = torch.zeros(1, 3, 32, 32)
DENSE = count_cost(LeNet(), IMAGE)


def environment() -> dict[str, str]:
    """One thread, no GPU, and nothing to be had from the network: the examples fall back on what is installed."""
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", ""))))
    return {**os.environ, **nowhere, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def command(name: str, *arguments: object) -> list[str]:
    return [sys.executable, str(ROOT / "examples" / name), *map(str, arguments)]


def run(folder: Path, name: str, *arguments: object) -> str:
    """What an example prints; it must succeed."""
    done = subprocess.run(
        command(name, *arguments), cwd=folder, env=environment(), capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run an example that must end at once, in this process; the line that it ends with."""
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "examples"))

    def refuse(name: str, *arguments: object, without: str = "") -> str:
        if without:
            monkeypatch.setitem(sys.modules, without, None)
        monkeypatch.setattr(sys, "argv", command(name, *arguments)[1:])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(sys.argv[0], run_name="__main__")
        told = capsys.readouterr().err.strip().splitlines()
        assert ended.value.code == 2 or isinstance(ended.value.code, str)  # Python prints it and exits with 1
        return ended.value.code if isinstance(ended.value.code, str) else told[-1]

    return refuse


def number(pattern: str, text: str) -> float:
    found = re.search(pattern, text)
    assert found, f"{pattern} not in {text}"
    return float(found[1].replace(",", ""))


def killed_once(process: subprocess.Popen[str], ready: Any) -> None:
    """Kill a process as soon as ``ready`` says so; it must not have ended before."""
    until = time.monotonic() + 120
    while not ready() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.02)
    assert process.poll() is None, "it ended before it was killed"
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_cifar_lenet_saves_half_of_the_network(tmp_path: Path) -> None:
    told = run(tmp_path, "cifar_lenet.py", "--epochs", 4, "--out", "small.safetensors")
    assert "using digits instead" in told or "digits test accuracy" in told
    cost = count_cost(load_pruned(tmp_path / "small.safetensors", LeNet()), IMAGE)
    assert cost.macs <= 0.5 * DENSE.macs
    assert cost.nonzero <= 0.5 * cost.params + 500  # biases are no weights
    assert number(r"digits test accuracy ([\d.]+)", told) > 0.3


def test_export_onnx_gives_a_file_that_computes_the_same(tmp_path: Path) -> None:
    told = run(tmp_path, "export_onnx.py", "--epochs", 1, "--out", "small.onnx")
    assert (tmp_path / "small.onnx").stat().st_size > 1000
    for what in (r"torch\.export", r"torch\.compile", "onnxruntime"):
        assert number(what + r" differs by ([\d.e+-]+)", told) < 1e-4


def test_resnet_that_was_killed_goes_on(tmp_path: Path) -> None:
    arguments = ("--width", 4, "--epochs", 4, "--round-to", 2, "--run", "run")
    process = subprocess.Popen(
        command("resnet_cifar.py", *arguments), cwd=tmp_path, env=environment(), text=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    last, pruned = tmp_path / "run" / "last.ckpt", tmp_path / "run" / "pruned.ckpt"
    killed_once(process, lambda: last.is_file())
    assert not pruned.is_file()
    told = run(tmp_path, "resnet_cifar.py", *arguments, "--resume")
    assert 1 <= number(r"Going on after (\d) of 4 epochs", told) <= 3
    dense, small = (
        [number(rf"{name} +after +\d epochs: digits test accuracy [\d.]+.*? ([\d,]+) {what}", told) for what in ("parameters", "MACs")]
        for name in ("dense", "pruned")
    )  # fmt: skip
    assert small[0] < dense[0]
    assert small[1] <= 0.5 * dense[1]
    assert (tmp_path / "run" / "pruned.safetensors").is_file()


def test_resnet_needs_something_to_resume(refused: Any) -> None:
    assert "there is no" in refused("resnet_cifar.py", "--resume", "--run", "nowhere")


GPT = ("--width", 24, "--heads", 4, "--depth", 2, "--context", 24, "--epochs", 2, "--batch-size", 64, "--letters", 40)


def test_gpt_loses_heads_mlps_and_embedding(tmp_path: Path) -> None:
    told = run(tmp_path, "gpt_shakespeare.py", *GPT, "--amount", 0.6)
    letters = number(r"shakespeare\.txt: [\d,]+ letters, (\d+) different", told)
    whole, pruned = (
        re.search(rf"{name}: +([\d.]+) bits per character; heads ([\d, ]+); MLPs ([\d, ]+); embedding (\d+); ([\d,]+) p", told)
        for name in ("whole", "pruned")
    )  # fmt: skip
    assert whole, told
    assert pruned, told
    # A model that has learned something does better than one that takes all letters for equally likely.
    assert max(float(whole[1]), float(pruned[1])) < math.log2(letters)
    assert (whole[2], whole[3], whole[4]) == ("4, 4", "96, 96", "24")
    sums = [[sum(map(int, found[part].split(", "))) for part in (2, 3, 4)] for found in (whole, pruned)]
    assert all(after < before for before, after in zip(*sums, strict=True)), told
    assert int(pruned[5].replace(",", "")) <= 0.4 * int(whole[5].replace(",", ""))
    assert len(told.rstrip("\n").partition("safetensors\n\n")[2]) == pytest.approx(
        41, abs=5
    )  # ends in white space, maybe


def test_gpt_reads_any_text(tmp_path: Path, refused: Any) -> None:
    (tmp_path / "mine.txt").write_text("abcdefgh" * 200)
    told = run(tmp_path, "gpt_shakespeare.py", *GPT, "--epochs", 1, "--text", "mine.txt")
    assert "mine.txt: 1,600 letters, 8 different ones" in told
    (tmp_path / "short.txt").write_text("too short")
    assert "9 letters" in refused("gpt_shakespeare.py", *GPT, "--text", "short.txt")
    assert "No such file" in refused("gpt_shakespeare.py", "--text", "none.txt")


def test_two_processes_agree_to_the_bit(tmp_path: Path) -> None:
    told = run(tmp_path, "ddp.py", "--epochs", 2, "--criterion", "random")
    assert "NOT the same" not in told
    for what in ("plan of removed neurons", "masks", "parameters", "optimizer state"):
        assert re.search(rf"{what} +[0-9a-f]{{16}}  the same on 2 processes", told), told


def test_timm_model_is_pruned_at_the_rate_that_was_found(tmp_path: Path) -> None:
    import timm

    told = run(
        tmp_path,
        "finetune_timm.py",
        "--model",
        "test_resnet",
        "--epochs",
        3,
        "--lr-steps",
        20,
        "--out",
        "small.safetensors",
    )
    assert 1e-8 < number(r"learning rate: ([\d.e+-]+), found in 20 steps", told) <= 0.1
    assert number(r"digits test accuracy ([\d.]+)", told) > 0.1
    assert "with a part of one group masked" in told
    whole = timm.create_model("test_resnet", num_classes=10)
    dense = count_cost(whole, IMAGE)
    small = load_pruned(tmp_path / "small.safetensors", timm.create_model("test_resnet", num_classes=10))
    assert count_cost(small, IMAGE).macs <= 0.5 * dense.macs


def test_timm_and_its_models_are_asked_for_by_name(refused: Any) -> None:
    assert "timm has no model 'resnet_of_mine'" in refused("finetune_timm.py", "--model", "resnet_of_mine")
    assert "lightning-prune[examples]" in refused("finetune_timm.py", without="timm")


def finished(folder: Path) -> list[Any]:
    import optuna
    from optuna.trial import TrialState

    study = optuna.load_study(study_name="structure", storage=f"sqlite:///{folder / 'study.db'}")
    return list(study.get_trials(states=(TrialState.COMPLETE, TrialState.PRUNED)))


def test_search_that_was_killed_goes_on(tmp_path: Path, refused: Any) -> None:
    arguments = ("--epochs", 2, "--out", "run", "--batch-size", 128)
    log = tmp_path / "log"
    with log.open("w") as file:
        process = subprocess.Popen(
            command("search_structure.py", *arguments),
            cwd=tmp_path,
            env=environment(),
            stdout=file,
            stderr=file,
            text=True,
        )
        killed_once(process, lambda: "trial 1:" in log.read_text())
    before = finished(tmp_path / "run")
    assert len(before) >= 2
    told = run(tmp_path, "search_structure.py", *arguments, "--trials", len(before) + 2, "--plot", "best.png")
    assert f"going on after {len(before)} trials" in told
    after = finished(tmp_path / "run")
    assert len(after) == len(before) + 2
    for old, new in zip(before, after, strict=False):
        assert (old.number, old.params, old.value) == (new.number, new.params, new.value)
    # A sampler that starts anew from its seed would propose what it has proposed.
    assert len({str(trial.params) for trial in after}) == len(after)
    best = max((trial for trial in after if trial.value is not None), key=lambda trial: trial.value)
    rows = told.partition("-----\n")[2].partition("\n\n")[0].splitlines()
    assert rows[0].split()[:2] == [str(best.number), f"{best.value:.4f}"]
    values = [float(row.split()[1]) for row in rows]
    assert values == sorted(values, reverse=True)
    assert number(r"digits test accuracy ([\d.]+)", told) > 0.1
    network = eval(told[told.index("LeNet(") :].splitlines()[0], {"LeNet": LeNet})
    assert f"{count_cost(network, IMAGE).params:,}" in rows[0]
    assert (tmp_path / "best.png").read_bytes().startswith(b"\x89PNG")
    # Trials of another length can't be compared with these.
    told = refused("search_structure.py", "--epochs", 3, "--out", "run")
    assert "give another --out" in told
    assert len(finished(tmp_path / "run")) == len(after)


def test_search_names_the_extras_it_needs(refused: Any) -> None:
    assert "--plot needs" in refused("search_structure.py", "--plot", "best.jpg.txt")
    assert "lightning-prune[plots]" in refused("search_structure.py", "--plot", "best.png", without="matplotlib")
    assert "lightning-prune[search]" in refused("search_structure.py", without="optuna")


NOTEBOOK = """
import sys, nbclient, nbformat
book = nbformat.read(sys.argv[1], 4)
nbclient.NotebookClient(book, timeout=200, resources={"metadata": {"path": "."}}).execute()
nbformat.write(book, "done.ipynb")
"""


def printed(book: Any) -> str:
    """What the code cells of a notebook print, in order."""
    outputs = [output for cell in book.cells for output in cell.get("outputs", [])]
    return "".join(output.get("text", "") for output in outputs)


def test_notebook_runs_top_to_bottom(tmp_path: Path) -> None:
    import nbformat

    path = ROOT / "examples" / "quickstart.ipynb"
    done = subprocess.run(
        [sys.executable, "-c", NOTEBOOK, str(path)],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    told, shown = printed(nbformat.read(tmp_path / "done.ipynb", 4)), printed(nbformat.read(path, 4))
    for text in (told, shown):  # what is committed is the output of a run
        assert "the same outputs: True" in text
        assert number(r"MACs were, ([\d,]+) are left", text) <= 0.5 * number(r"([\d,]+) MACs were", text)
    assert path.stat().st_size < 100_000
