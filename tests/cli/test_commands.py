"""The commands do what the functions behind them do, write whole files or none, and fail in one line."""

from __future__ import annotations

import csv
import dataclasses
import functools
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_modules import LIGHTNING_WARNINGS
from torch import Tensor, nn

from lightning_prune import (
    ActivationSearch,
    LayerPruning,
    NeuronPruning,
    PruningError,
    WeightPruning,
    __version__,
    count_cost,
    find_groups,
    load_pruned,
    prune_neurons,
    prune_weights,
    remove_layers,
    sensitivity,
    shrink_kernels,
)
from lightning_prune.cli import commands, main, output
from lightning_prune.cli.models import import_object, open_model
from lightning_prune.models import LeNet
from lightning_prune.report.report import KINDS, Moment, Report, Row

NETS = str(Path(__file__).with_name("nets.py"))
LENET = "lightning_prune.models:LeNet"
IMAGE = torch.zeros(1, 3, 32, 32)


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a command that succeeds prints."""
    capsys.readouterr()
    code = main(arguments)
    written = capsys.readouterr()
    assert code == 0, written.err
    return written.out


def data_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    return json.loads(said(capsys, *arguments, "--json"))


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line of a command that fails."""
    capsys.readouterr()
    assert main(arguments) == 2
    written = capsys.readouterr()
    assert written.out == ""
    (line,) = [line for line in written.err.splitlines() if not line.startswith("input: ")]
    return line


# -- inspect -----------------------------------------------------------------------------------------------------------


def test_inspect_says_what_the_functions_say(capsys: pytest.CaptureFixture[str]) -> None:
    found = data_of(capsys, "inspect", LENET)
    cost, groups = count_cost(LeNet(), IMAGE), find_groups(LeNet(), IMAGE)
    assert (found["parameters"], found["macs"], found["bytes"]) == (cost.params, cost.macs, cost.bytes)
    assert {name: each["macs"] for name, each in found["layers"].items()} == {n: c.macs for n, c in cost.layers.items()}
    assert [(each["name"], each["neurons"]) for each in found["groups"]] == [(g.name, g.size) for g in groups.prunable]
    assert [each["reason"] for each in found["frozen"]] == [group.frozen for group in groups.frozen]


def test_what_can_go_is_what_goes(capsys: pytest.CaptureFixture[str]) -> None:
    """Of each group one neuron stays: the numbers are those of the model that is left."""
    found = data_of(capsys, "inspect", LENET)["removable"]
    model = LeNet()
    prune_neurons(model, IMAGE, 222 / 226)
    assert found["neurons"] == 226
    assert found["parameters"] == pytest.approx(1 - count_cost(model, IMAGE).params / 62006, abs=1e-6)
    assert found["macs"] == pytest.approx(1 - count_cost(model, IMAGE).macs / 651720, abs=1e-6)


def test_inspect_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, "inspect", LENET, "--input", "2,3,32,32")
    assert "62,006 parameters" in text
    assert "1,303,440 MACs" in text
    assert "4 prunable groups, 226 neurons" in text
    assert max(map(len, text.splitlines())) <= 160


def test_inputs_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("inspect", f"{NETS}:Tokens", "--input", "ids=1,5:int64:0-20", "--input", "mask=1,5")
    assert data_of(capsys, *words)["macs"] == 5 * (2 * 8 * 16 + 8 * 20)
    assert "--input" in error_of(capsys, "inspect", f"{NETS}:Tokens")
    assert "raised" in error_of(capsys, *words[:4])


# -- prune -------------------------------------------------------------------------------------------------------------

STEPS = {"": prune_neurons, "zeros": prune_weights, "kernels": shrink_kernels, "layers": remove_layers}


@pytest.mark.parametrize("group", STEPS)
def test_every_option_of_the_functions_is_one_of_prune(group: str) -> None:
    known, _ = commands._known(commands._parser())
    start = f"--{group}." if group else "--"
    names = {*inspect.signature(STEPS[group]).parameters} - {"model", "example_inputs", "optimizer"}
    assert {start + name for name in names} <= known
    assert len(names) > 4


def test_prune_is_prune_neurons(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "small.safetensors"
    words = ("--amount", "0.5", "--of", "macs", "--round-to", "2", "--exclude", "fc*", "--criterion", "l2")
    found = data_of(capsys, "prune", LENET, *words, "--seed", "3", "--out", str(out), "--latency", "false")
    torch.manual_seed(3)
    expected = LeNet()
    prune_neurons(expected, IMAGE, 0.5, of="macs", round_to=2, exclude="fc*", criterion="l2")
    small = load_pruned(out, LeNet())
    assert torch.equal(small(IMAGE), expected(IMAGE))
    assert {name: value.shape for name, value in small.state_dict().items()} == {
        name: value.shape for name, value in expected.state_dict().items()
    }
    assert (
        found["rows"]["parameters"]["pruned"] == count_cost(small, IMAGE).params < found["rows"]["parameters"]["dense"]
    )


def test_all_steps_in_one_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "small.safetensors"
    words = ("--layers.amount", "0.05", "--kernels.amount", "0.02", "--amount", "0.3", "--zeros.amount", "0.5")
    init = ("--init.hidden", "[120,84,84]")
    found = data_of(capsys, "prune", LENET, *init, *words, "--out", str(out), "--latency", "false")
    small: Any = load_pruned(out, LeNet(hidden=(120, 84, 84)))
    assert isinstance(small.fc3, nn.Identity)
    assert small.conv1.kernel_size == (3, 3) or small.conv2.kernel_size == (3, 3)
    weights = [value for value in small.state_dict().values() if value.dim() > 1]
    assert sum(int((w == 0).sum()) for w in weights) == pytest.approx(0.5 * sum(w.numel() for w in weights), abs=1)
    assert (
        sum(layer["width"][1] or 0 for layer in found["layers"] if layer["name"] in ("conv1", "conv2", "fc1", "fc2"))
        < 226
    )


def test_flags_need_no_value(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("prune", f"{NETS}:Net", "--amount", "0.5", "--out", str(tmp_path / "a.safetensors"), "--latency", "false")
    asked: list[bool] = []

    @functools.wraps(prune_neurons)
    def spy(*args: Any, **options: Any) -> Any:
        asked.append(options["exact_only"])
        return prune_neurons(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(commands, "prune_neurons", spy)
        for flag in ((), ("--exact-only",), ("--exact_only", "false"), ("--exact-only=true",)):
            said(capsys, *words, *flag)
    assert asked == [False, True, False, True]


def test_a_criterion_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "a.safetensors"
    said(capsys, "prune", f"{NETS}:Net", "--amount", "0.5", "--criterion", f"{NETS}:widest", "--out", str(out))
    torch.manual_seed(0)
    dense, small = open_model(f"{NETS}:Net").model, open_model(str(out), cls=f"{NETS}:Net").model
    assert torch.equal(small.first.weight, dense.first.weight[: len(small.first.weight)])


def test_prune_writes_a_report_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, report = tmp_path / "a.safetensors", tmp_path / "a.csv"
    said(capsys, "prune", LENET, "--amount", "0.5", "--out", str(out), "--report", str(report), "--latency", "false")
    assert {"conv1", "fc3"} <= {row["name"] for row in csv.DictReader(report.read_text().splitlines())}


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ((), "nothing is to go: say how much with --amount, --kernels.amount, --layers.amount, --zeros.amount"),
        (("--amount", "1.5"), "amount must be a fraction"),
        (("--amount", "half"), "amount: expected a float, got half"),
        (("--amount", "0.001"), "rounds to no neuron"),
        (("--amount", "0.5", "--of", "mac"), "of must be one of 'neurons', 'params', 'macs', 'latency'"),
        (("--amount", "0.5", "--criterion", "l3"), "criterion"),
        (("--amount", "0.5", "--criterion", "taylor"), "taylor"),
        (("--amount", "0.5", "--include", "nothing*"), "nothing*"),
        (("--amount", "0.5", "--input", "1,2,3"), "raised RuntimeError on inputs of shapes [(1, 2, 3)]"),
        (("--amuont", "0.5"), "unknown option --amuont; did you mean --amount"),
        (("--zeros.amount", "0.5", "--zeros.patern", "2:4"), "did you mean --zeros.pattern"),
        (("--amount", "0.5", "--round-to", "2.5"), "round_to: expected an int, got 2.5"),
        (("--amount", "0.5", "--exact-only", "perhaps"), "perhaps"),
        (("--amount", "0.5", "--input", "99999999999,3,32,32"), "an input of '99999999999,3,32,32' can't be made"),
        (("--amount", "0.5", "--seed", "9" * 30), "--seed is a whole number of 64 bits"),
        (("--amount", "0.5", "--criterio", "l1"), "did you mean --criterion or "),
        (("--amount", "0.5", "--weights", "nowhere.ckpt"), "there is no file nowhere.ckpt"),
    ],
)
def test_what_is_wrong_is_one_line_and_nothing_is_written(
    words: tuple[str, ...], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert text in error_of(capsys, "prune", LENET, *words, "--out", str(tmp_path / "a.safetensors"))
    assert not list(tmp_path.iterdir())


# -- files are written whole or not at all -----------------------------------------------------------------------------


def test_a_place_that_cannot_be_written_is_told_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("prune", "nowhere:Net", "--amount", "0.5", "--out")  # were the model looked for, that would be the error
    assert "there is no folder" in error_of(capsys, *words, str(tmp_path / "no" / "a.safetensors"))
    assert "is a folder" in error_of(capsys, *words, str(tmp_path))
    (tmp_path / "file").touch()
    assert "there is no folder" in error_of(capsys, *words, str(tmp_path / "file" / "a.safetensors"))
    if sys.platform == "linux":
        assert "/proc/a.safetensors can't be written" in error_of(capsys, *words, "/proc/a.safetensors")
    if hasattr(os, "geteuid") and os.geteuid():  # root may write anywhere
        tmp_path.chmod(0o500)
        assert "can't be written: Permission denied" in error_of(capsys, *words, str(tmp_path / "a.safetensors"))
        tmp_path.chmod(0o700)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), PruningError("no"), KeyboardInterrupt()])
def test_a_file_is_written_whole_or_not_at_all(error: BaseException, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"before")

    def fail(temporary: Path) -> None:
        temporary.write_bytes(b"half")
        raise error

    def write() -> None:
        with output.whole_file(path) as temporary:
            fail(temporary)

    with pytest.raises((PruningError, KeyboardInterrupt)):
        write()
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]
    with output.whole_file(path) as temporary:
        temporary.write_bytes(b"whole")
    assert path.read_bytes() == b"whole"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("before", [False, True], ids=["nothing there", "files there"])
def test_model_and_report_are_both_written_or_none(
    before: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, report = tmp_path / "a.safetensors", tmp_path / "a.md"
    for path in (out, report) if before else ():
        path.write_bytes(b"before")

    def fail(self: Any) -> str:
        raise PruningError("no report today")

    monkeypatch.setitem(KINDS, ".md", fail)
    words = (
        "prune",
        f"{NETS}:Net",
        "--amount",
        "0.5",
        "--latency",
        "false",
        "--out",
        str(out),
        "--report",
        str(report),
    )
    assert "no report today" in error_of(capsys, *words)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == (
        {"a.safetensors": b"before", "a.md": b"before"} if before else {}
    )


def test_what_cannot_be_written_so_is_told_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were the model looked for, that would be the error."""
    at = {end: str(tmp_path / f"a{end}") for end in (".safetensors", ".ckpt", ".docx", ".html", ".png")}
    prune = ("prune", "nowhere:Net", "--amount", "0.5", "--out")
    assert "a safetensors file: --out must end so, got 'a.ckpt'" in error_of(capsys, *prune, at[".ckpt"])
    for words in (
        (*prune, at[".safetensors"], "--report", at[".docx"]),
        ("compare", "nowhere:Net", "nowhere:Net", "--out", at[".docx"]),
        ("report", "nowhere.ckpt", "--out", at[".docx"]),
    ):
        assert "a report is saved as one of .html, .md, .json, .csv, .txt, got 'a.docx'" in error_of(capsys, *words)
    sensitivity = ("sensitivity", "nowhere:Net", "--out")
    pytest.importorskip("matplotlib")
    assert "a figure is saved as one of" in error_of(capsys, *sensitivity, at[".docx"])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for words in (
        (*prune, at[".safetensors"], "--report", at[".html"]),
        ("compare", "nowhere:Net", "nowhere:Net", "--out", at[".html"]),
        ("report", "nowhere.ckpt", "--out", at[".html"]),
        (*sensitivity, at[".png"]),
    ):
        assert 'pip install "lightning-prune[plots]"' in error_of(capsys, *words)
    assert not list(tmp_path.iterdir())


def test_writing_that_fails_leaves_what_was_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"before")

    def full(model: nn.Module, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(commands, "save_pruned", full)
    line = error_of(capsys, "prune", f"{NETS}:Net", "--amount", "0.5", "--out", str(path))
    assert "No space left" in line
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


# -- compare and report ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_lenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("small") / "small.safetensors"
    assert main(["prune", LENET, "--amount", "0.5", "--of", "macs", "--out", str(path), "--latency", "false"]) == 0
    return path


def test_compare_sets_two_models_side_by_side(small_lenet: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = data_of(capsys, "compare", LENET, str(small_lenet), "--latency", "false")
    small = load_pruned(small_lenet, LeNet())
    assert found["rows"]["parameters"]["dense"] == 62006
    assert found["rows"]["parameters"]["pruned"] == count_cost(small, IMAGE).params
    assert found["rows"]["MACs (batch 1)"]["pruned"] == count_cost(small, IMAGE).macs <= 651720 // 2
    both = data_of(capsys, "compare", str(small_lenet), str(small_lenet), "--class", LENET, "--latency", "false")
    assert both["rows"]["parameters"]["ratio"] == 1


def test_compare_refuses_models_that_do_not_fit(small_lenet: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "fit together" in error_of(capsys, "compare", LENET, f"{NETS}:Net")
    assert "first of the two" in error_of(capsys, "compare", str(small_lenet), LENET)


def trained(folder: Path) -> tuple[Path, Any]:
    """The checkpoint of a run with several callbacks, and the network that it left."""
    torch.manual_seed(0)
    nets: Any = {name: import_object(f"{NETS}:{name}") for name in ("Lit", "Net", "Data")}
    lit = nets["Lit"](nets["Net"](16, 2))
    callbacks = [
        ActivationSearch(("relu", "tanh"), search_until=1),
        LayerPruning(0.1, schedule="one_shot", start=1, end=2),
        NeuronPruning(0.5, start=2, end=3),
        WeightPruning(0.5, end=4),
        ModelCheckpoint(folder, filename="best", monitor="val_acc", mode="min", save_top_k=5),
        ModelCheckpoint(folder, filename="last"),
    ]
    trainer = Trainer(
        max_epochs=4,
        accelerator="cpu",
        callbacks=callbacks,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(lit, nets["Data"]())
    lit.timeline = max((getattr(each, "timeline_", []) for each in callbacks), key=len)
    lit.report = callbacks[3].report_.to_dict()
    return folder / "last.ckpt", lit


NETWORK = ("--init.network.class_path", "nets.Net", "--init.network.init_args.width", "16")


@pytest.mark.filterwarnings("ignore:The number of training batches")
class TestCheckpoint:
    pytestmark = LIGHTNING_WARNINGS

    @pytest.fixture
    def run(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Any, tuple[str, ...]]:
        monkeypatch.syspath_prepend(str(Path(NETS).parent))
        path, lit = trained(tmp_path)
        network = '{"class_path": "nets.Net", "init_args": {"width": 16, "depth": 2}}'
        return str(path), lit, ("--class", f"{NETS}:Lit", "--init", f'{{"network": {network}}}')

    def test_a_report_of_a_checkpoint_is_that_of_the_run(
        self, run: tuple[str, Any, tuple[str, ...]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path, lit, how = run
        out = tmp_path / "r.json"
        said(capsys, "report", path, *how, "--out", str(out))
        found = json.loads(out.read_text())
        dense = sum(p.numel() for p in import_object(f"{NETS}:Net")(16, 2).parameters())
        assert found["rows"]["parameters"]["dense"] == dense
        assert found["rows"]["parameters"]["pruned"] == sum(p.numel() for p in lit.parameters()) < dense
        assert found["rows"]["non-zero"]["pruned"] == sum(int(p.count_nonzero()) for p in lit.parameters())
        assert found["timeline"] == [dataclasses.asdict(moment) for moment in lit.timeline]
        assert found["timeline"][-1]["epoch"] == 4
        assert found["weights"] == lit.report["weights"]
        assert any(each["dense"] for each in found["weights"])
        layers = {layer["name"]: layer for layer in found["layers"]}
        assert any("removed" in layer["reason"] for layer in layers.values())
        for name, end in (("again.md", "again.md"), ("again.csv", "again.csv"), ("again.html", "again.html")):
            said(capsys, "report", str(out), "--out", str(tmp_path / name))
            assert "network.first" in (tmp_path / end).read_text()

    def test_the_metric_is_that_of_the_very_file(
        self, run: tuple[str, Any, tuple[str, ...]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path, _, how = run
        said(capsys, "report", path, *how, "--out", str(tmp_path / "last.json"))
        assert "val_acc" not in json.loads((tmp_path / "last.json").read_text())["rows"]
        best = next(Path(path).parent.glob("best*.ckpt"))
        said(capsys, "report", str(best), *how, "--out", str(tmp_path / "best.json"))
        row = json.loads((tmp_path / "best.json").read_text())["rows"]["val_acc"]
        model: Any = open_model(str(best), cls=f"{NETS}:Lit", init={"network": _net()}).model
        x, y = import_object(f"{NETS}:data")().tensors
        batches = [(model(a).argmax(1) == b).float().mean() for a, b in zip(x.split(16), y.split(16), strict=True)]
        assert row["pruned"] == pytest.approx(float(torch.stack(batches).mean()))

    def test_other_commands_take_a_checkpoint(
        self, run: tuple[str, Any, tuple[str, ...]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path, lit, how = run
        assert data_of(capsys, "inspect", path, *how)["parameters"] == sum(p.numel() for p in lit.parameters())
        said(capsys, "export", path, *how, "--out", str(tmp_path / "a.pt2"))
        x = torch.randn(2, 6)
        exported: Any = torch.export.load(tmp_path / "a.pt2").module()
        assert torch.allclose(exported(x), lit.eval()(x), atol=1e-6)


def _net() -> dict[str, Any]:
    return {"class_path": "nets.Net", "init_args": {"width": 16, "depth": 2}}


def test_a_report_of_a_file_shows_no_values_that_were_never_there(
    small_lenet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said(capsys, "report", str(small_lenet), "--class", LENET, "--out", str(tmp_path / "r.json"))
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["rows"]["parameters"]["dense"] == 62006
    assert found["weights"]
    assert all(each["dense"] == [] and each["threshold"] is None for each in found["weights"])


def test_a_report_needs_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "is of a file" in error_of(capsys, "report", LENET, "--out", str(tmp_path / "r.md"))
    (tmp_path / "bad.json").write_text("{")
    assert "is no JSON" in error_of(capsys, "report", str(tmp_path / "bad.json"), "--out", str(tmp_path / "r.md"))
    whole = json.loads(Report((Row("parameters", 4, 2),), timeline=(Moment(1, 2, 0.5, 0.5, 3),)).to_json())
    for place, value in (
        (("rows", "parameters", "dense"), "many"),
        (("timeline", 0, "amount"), None),
        (("layers",), [3]),
    ):
        broken: Any = json.loads(json.dumps(whole))
        inner = functools.reduce(lambda found, key: found[key], place[:-1], broken)
        inner[place[-1]] = value
        (tmp_path / "bad.json").write_text(json.dumps(broken))
        assert "not a report" in error_of(capsys, "report", str(tmp_path / "bad.json"), "--out", str(tmp_path / "r.md"))
    (tmp_path / "bad.json").write_text('{"format": 1}')
    assert "not a report" in error_of(capsys, "report", str(tmp_path / "bad.json"), "--out", str(tmp_path / "r.md"))
    assert not (tmp_path / "r.md").exists()


# -- sensitivity -------------------------------------------------------------------------------------------------------


def test_sensitivity_of_ones_own_predictions(capsys: pytest.CaptureFixture[str]) -> None:
    found = data_of(capsys, "sensitivity", f"{NETS}:Net", "--input", "16,6", "--ratios", "[0.25, 0.75]")
    assert (found["metric"], found["base"]) == ("agreement", 1.0)
    assert set(found["values"]) == {"first", "hidden.0"}
    assert all(0 <= value <= 1 for row in found["values"].values() for value in row.values())
    assert any(value < 1 for row in found["values"].values() for value in row.values())


@pytest.mark.parametrize("source", ["batches", "Data"])
@pytest.mark.parametrize("metric", ["accuracy", f"{NETS}:off"])
def test_sensitivity_on_data(source: str, metric: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--data", f"{NETS}:{source}", "--metric", metric, "--ratios", "[0.5]", "--batches", "2", "--seed", "4")
    found = data_of(capsys, "sensitivity", f"{NETS}:Net", *words)
    torch.manual_seed(4)
    model = open_model(f"{NETS}:Net").model
    batches = list(import_object(f"{NETS}:batches")())[:2]

    def right(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs.argmax(1) == targets).float().mean()

    function = right if metric == "accuracy" else nn.functional.cross_entropy
    expected = sensitivity(model, batches, function, ratios=[0.5])
    assert found["base"] == pytest.approx(expected.base)
    for name, row in expected.values.items():
        assert found["values"][name]["0.5"] == pytest.approx(row[0.5])


def test_sensitivity_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    text = said(capsys, "sensitivity", f"{NETS}:Net", "--ratios", "[0.5]", "--out", str(tmp_path / "a.svg"))
    assert "hidden.0" in text
    assert "<svg" in (tmp_path / "a.svg").read_text()
    words = ("sensitivity", f"{NETS}:Net", "--ratios", "[0.5]", "--out")
    assert "a.docx" in error_of(capsys, *words, str(tmp_path / "a.docx"))
    assert [each.name for each in tmp_path.iterdir()] == ["a.svg"]


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("--metric", "f2"), "--metric is one of agreement, accuracy or an import path"),
        (("--metric", f"{NETS}:nothing"), "has no 'nothing'"),
        (("--data", f"{NETS}:number"), "gives no batches but int"),
        (("--data", f"{NETS}:batches", "--batches", "-1"), "0 for all"),
        (("--data", f"{NETS}:broken"), "no such luck"),
        (("--ratios", "[2]"), "ratios must be fractions"),
        (("--criterion", "l3"), "criterion"),
    ],
)
def test_sensitivity_says_what_is_wrong(words: tuple[str, ...], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert text in error_of(capsys, "sensitivity", f"{NETS}:Net", *words)


def test_a_regression_needs_a_metric(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("sensitivity", "torch.nn:Linear", "--init.in_features", "3", "--init.out_features", "1")
    assert "name a metric with --metric" in error_of(capsys, *words)


def test_a_detector_needs_a_metric(capsys: pytest.CaptureFixture[str]) -> None:
    assert "name a metric with --metric" in error_of(capsys, "sensitivity", f"{NETS}:Boxes", "--input", "2,6")


# -- export ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("form", ["onnx", "torch-export"])
def test_an_export_computes_what_the_model_computes(
    form: str, dynamic: bool, small_lenet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if form == "onnx":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    path = tmp_path / "a.file"
    words = ("--format", form, "--out", str(path), *(("--dynamic-batch",) if dynamic else ()))
    said(capsys, "export", str(small_lenet), "--class", LENET, *words)
    model = load_pruned(small_lenet, LeNet()).eval()
    images = torch.randn(3 if dynamic else 1, 3, 32, 32)
    if form == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(str(path))
        found = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: images.numpy()})[0])
    else:
        found = torch.export.load(path).module()(images)
    assert torch.allclose(found, model(images), atol=1e-5)
    assert list(tmp_path.iterdir()) == [path]


def test_an_export_of_named_inputs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = (
        "--input",
        "mask=2,5",
        "--input",
        "ids=2,5:int64:0-20",
        "--dynamic-batch",
        "--out",
        str(tmp_path / "a.pt2"),
    )
    said(capsys, "export", f"{NETS}:Tokens", *words, "--seed", "1")
    torch.manual_seed(1)
    model = open_model(f"{NETS}:Tokens").model
    ids, mask = torch.randint(0, 20, (7, 5)), torch.randn(7, 5)
    exported: Any = torch.export.load(tmp_path / "a.pt2").module()
    assert torch.allclose(exported(mask=mask, ids=ids), model(ids=ids, mask=mask), atol=1e-6)


def test_an_export_of_safetensors_is_save_pruned(
    small_lenet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said(capsys, "export", str(small_lenet), "--class", LENET, "--out", str(tmp_path / "b.safetensors"))
    again, model = (load_pruned(path, LeNet()).state_dict() for path in (tmp_path / "b.safetensors", small_lenet))
    assert all(torch.equal(value, model[name]) for name, value in again.items())


def test_an_export_that_computes_something_else_is_not_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_prune.cli.export.FAR", -1.0)
    line = error_of(capsys, "export", f"{NETS}:Net", "--out", str(tmp_path / "a.pt2"))
    assert "computes something else" in line
    assert not list(tmp_path.iterdir())


def test_an_export_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("export", f"{NETS}:Net", "--out")
    assert "the ending of a.zip says none" in error_of(capsys, *words, str(tmp_path / "a.zip"))
    assert "invalid choice: 'onxn'" in error_of(capsys, *words, str(tmp_path / "a.zip"), "--format", "onxn")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("form", ["onnx", "torch-export"])
def test_a_model_that_cannot_be_exported_is_told_in_one_line(
    form: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """torch says more: warnings, logs, the whole graph."""
    if form == "onnx":
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")
    capfd.readouterr()
    words = ("export", f"{NETS}:ByValue", "--input", "2,6", "--format", form, "--out", str(tmp_path / "a.file"))
    assert main(words) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert f"ByValue can't be exported to {form}" in line
    assert "data-dependent" in line
    assert not list(tmp_path.iterdir())


def test_an_export_of_what_is_no_number_is_equal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said(capsys, "export", f"{NETS}:Infinite", "--input", "2,6", "--out", str(tmp_path / "a.pt2"))


@pytest.mark.parametrize(
    "words",
    [
        ("inspect",),
        ("sensitivity",),
        ("export", "--out", "{}/a.pt2"),
        ("prune", "--amount", "0.5", "--out", "{}/a.safetensors"),
    ],
    ids=lambda words: words[0],
)
def test_inputs_that_a_model_does_not_take_are_told(
    words: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command, *rest = (word.format(tmp_path) for word in words)
    line = error_of(capsys, command, f"{NETS}:Net", *rest, "--input", "2,7")
    assert "Net" in line
    assert "raised RuntimeError" in line
    assert not list(tmp_path.iterdir())


# -- the command itself ------------------------------------------------------------------------------------------------


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, "--help")
    assert all(name in text for name in commands.COMMANDS)
    for name in commands.COMMANDS:
        assert "--input" in said(capsys, name, "--help")


@pytest.mark.filterwarnings("default")
def test_warnings_are_one_line_each_and_none_beside_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", f"{NETS}:talks"]) == 0
    assert "warning: a word of caution\n" in capsys.readouterr().err
    assert "raised" in error_of(capsys, "inspect", f"{NETS}:talks", "--input", "2,7")


def test_an_interrupted_command_leaves_files_as_they_were(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "a.safetensors"
    out.write_bytes(b"before")
    assert main(["prune", f"{NETS}:stopped", "--amount", "0.5", "--out", str(out)]) == 130
    assert capsys.readouterr() == ("", "lightning-prune: interrupted; files are as they were\n")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a.safetensors": b"before"}


def test_it_tells_its_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert said(capsys, "--version").strip() == f"lightning-prune {__version__}"


def test_no_command_and_a_wrong_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert "command" in error_of(capsys)
    assert "'prun'" in error_of(capsys, "prun", LENET)


@pytest.mark.parametrize("missing", ["jsonargparse", "rich"])
def test_without_the_extra_it_is_named(
    missing: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    assert main(["--help"]) == 2
    written = capsys.readouterr()
    assert written.out == ""
    assert written.err.count("\n") == 1
    assert 'pip install "lightning-prune[cli]"' in written.err
    assert missing in written.err


@pytest.mark.parametrize(
    ("missing", "extra", "spec"),
    [("torchvision", "examples", "torchvision:alexnet"), ("timm", "examples", "timm:resnet18")],
)
def test_without_a_zoo_its_extra_is_named(
    missing: str, extra: str, spec: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    assert f'pip install "lightning-prune[{extra}]"' in error_of(capsys, "inspect", spec)


def test_it_runs_as_a_module(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lightning_prune", "inspect", "nowhere.ckpt"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, timeout=300)
    assert done.returncode == 2
    assert done.stderr.splitlines() == ["lightning-prune: error: there is no file nowhere.ckpt"]
    assert done.stdout == ""
