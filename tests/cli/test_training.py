"""LightningCLI with a YAML file: every callback in one run; what is wrong in the file is one line that helps."""

from __future__ import annotations

import copy
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import LightningDataModule
from lightning.pytorch import callbacks as lightning_callbacks
from lightning_modules import LIGHTNING_WARNINGS
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import load_from_checkpoint
from lightning_prune.cli import main
from lightning_prune.cli.parser import near, short
from lightning_prune.cli.training import PruningCLI
from lightning_prune.models import ImageClassifier, LeNet

ROOT = Path(__file__).parents[2]
YAML = ROOT / "examples" / "lenet.yaml"

pytestmark = [
    *LIGHTNING_WARNINGS,
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),  # LightningCLI's
    pytest.mark.filterwarnings("ignore:LightningCLI's args parameter is intended to run from within Python"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:No seed found"),
    pytest.mark.skipif(not hasattr(lightning_callbacks, "EMAWeightAveraging"), reason="EMA came with Lightning 2.6"),
]


class Noise(LightningDataModule):
    """Images that can be learned, without a file.

    Args:
        batch_size: Images in a batch.
    """

    def __init__(self, batch_size: int = 16) -> None:
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self) -> DataLoader[Any]:
        generator = torch.Generator().manual_seed(0)
        labels = torch.arange(64) % 4
        images = torch.randn(64, 3, 32, 32, generator=generator) + labels.view(-1, 1, 1, 1)
        return DataLoader(TensorDataset(images, labels), batch_size=self.batch_size)

    val_dataloader = train_dataloader


def config() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(YAML.read_text())
    del found["data"]["dataset"]
    return found


def run(content: Any, folder: Path, *arguments: str) -> PruningCLI:
    path = folder / "config.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    words = ["fit", "--config", str(path), "--trainer.default_root_dir", str(folder), *arguments]
    return PruningCLI(ImageClassifier, Noise, args=words, save_config_callback=None)


SHORT = ("--trainer.max_epochs", "8", "--trainer.logger", "false", "--trainer.enable_progress_bar", "false")


def test_the_example_has_every_callback() -> None:
    used = {each["class_path"] for each in config()["trainer"]["callbacks"]}
    from lightning_prune import callbacks

    assert {f"lightning_prune.{name}" for name in callbacks.__all__} <= used
    assert {
        f"lightning.pytorch.callbacks.{n}" for n in ("EMAWeightAveraging", "ModelCheckpoint", "EarlyStopping")
    } <= used


def test_one_run_with_every_callback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli = run(config(), tmp_path, *SHORT, "--trainer.enable_model_summary", "false")
    found: Any = {type(each).__name__: each for each in cli.trainer.callbacks}
    network = cli.model.network
    assert cli.trainer.current_epoch == 8
    assert isinstance(network.fc3, torch.nn.Identity)
    report = found["NeuronPruning"].report_
    assert report["MACs (batch 1)"].ratio <= 0.71
    weights = [w for name, w in network.named_parameters() if w.dim() > 1 and name != "conv1.weight"]
    assert sum(int((w == 0).sum()) for w in weights) >= 0.49 * sum(w.numel() for w in weights)
    (path,) = tmp_path.rglob("last.ckpt")
    init = '{"network": {"class_path": "lightning_prune.models.LeNet", "init_args": {"hidden": [120, 84, 84]}}}'
    words = ("--class", "lightning_prune.models:ImageClassifier", "--init", init, "--input", "1,3,32,32")
    assert main(["report", str(path), *words, "--out", str(tmp_path / "report.html")]) == 0
    assert "network.fc3" in (tmp_path / "report.html").read_text()
    small = load_from_checkpoint(ImageClassifier, path, network=LeNet(hidden=(120, 84, 84)))
    assert sum(p.numel() for p in small.parameters()) == sum(p.numel() for p in cli.model.parameters())


def callback(content: dict[str, Any], name: str) -> dict[str, Any]:
    (found,) = [each for each in content["trainer"]["callbacks"] if each["class_path"].endswith(f".{name}")]
    return found


def wrong(place: str, **values: Any) -> Callable[[dict[str, Any]], None]:
    """Puts values where they don't belong: in a section, or among the arguments of a callback."""

    def change(content: dict[str, Any]) -> None:
        holder = callback(content, place)["init_args"] if place[:1].isupper() else content
        for part in place.split(".") if place and not place[:1].isupper() else ():
            holder = holder[part]
        holder.update(values)

    return change


def renamed(old: str, new: str) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        callback(content, old)["class_path"] = new

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (wrong("NeuronPruning", amuont=0.5), "lightning_prune.NeuronPruning takes no 'amuont'; did you mean amount"),
        (
            wrong("WeightPruning", critrion="l1"),
            "lightning_prune.WeightPruning takes no 'critrion'; did you mean criterion",
        ),
        (wrong("ActivationSearch", choises=["relu"]), "did you mean choices"),
        (wrong("KernelShrinking", strat=0.1), "did you mean start"),
        (wrong("LayerPruning", shedule="cubic"), "did you mean schedule"),
        (wrong("EarlyStopping", patienec=1), "EarlyStopping takes no 'patienec'; did you mean patience?"),
        (wrong("trainer", max_epoch=3), "trainer takes no 'max_epoch'; did you mean max_epochs"),
        (wrong("model", lrr=0.1), "model takes no 'lrr'; did you mean lr?"),
        (wrong("model.network.init_args", hiden=[8]), "LeNet takes no 'hiden'; did you mean hidden?"),
        (wrong("data", batchsize=8), "data takes no 'batchsize'; did you mean batch_size?"),
        (wrong("", trainr={"max_epochs": 3}), "the configuration takes no 'trainr'; did you mean trainer?"),
        (renamed("NeuronPruning", "lightning_prune.NeuronPrunning"), "did you mean NeuronPruning"),
        (renamed("NeuronPruning", "lightning_prun.NeuronPruning"), "No module named 'lightning_prun'"),
        (
            renamed("NeuronPruning", "lightning_prune.models.LeNet"),
            "LeNet does not correspond to a subclass of Callback",
        ),
        (
            wrong("NeuronPruning", amount="half"),
            "amount of lightning_prune.NeuronPruning of trainer.callbacks: expected a float",
        ),
        (
            wrong("NeuronPruning", round_to=[8]),
            "round_to of lightning_prune.NeuronPruning of trainer.callbacks: expected an int",
        ),
        (
            wrong("WeightPruning", exclude={"a": 1}),
            "exclude of lightning_prune.WeightPruning of trainer.callbacks: expected one of",
        ),
        (wrong("trainer", max_epochs="many"), "trainer.max_epochs: expected one of "),
        (wrong("trainer", callbacks=3), "trainer.callbacks: expected one of"),
        (wrong("model", lr="big"), "model.lr: expected a float, got big"),
        (wrong("NeuronPruning", of="mac"), "of must be one of 'neurons', 'params', 'macs', 'latency', got 'mac'"),
        (wrong("NeuronPruning", amount=1.5), "amount must be a fraction in [0, 1), got 1.5"),
    ],
)
def test_what_is_wrong_in_a_file_is_one_line_with_the_right_name(
    change: Callable[[dict[str, Any]], None], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = config()
    change(content)
    line = refused(content, tmp_path, capsys)
    assert said in line
    assert len(line) < 400


def refused(content: Any, folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as caught:
        run(content, folder, *SHORT)
    assert caught.value.code == 2
    written = capsys.readouterr()
    (line,) = [line for line in written.err.splitlines() if "eed set to" not in line]
    assert {each.name for each in folder.iterdir()} == {"config.yaml"}
    return line


def test_a_file_that_is_no_yaml_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "parsing" in refused("trainer: [1\n  : x", tmp_path, capsys)
    assert "refers to itself" in refused("trainer: &a [*a]\n", tmp_path, capsys)
    with pytest.raises(SystemExit) as caught:
        PruningCLI(ImageClassifier, Noise, args=["fit", "--config", str(tmp_path / "no.yaml")])
    assert caught.value.code == 2
    assert "no.yaml" in capsys.readouterr().err
    (tmp_path / "bytes.yaml").write_bytes(b"\x80\x81\x9c" * 20)
    with pytest.raises(SystemExit) as caught:
        PruningCLI(ImageClassifier, Noise, args=["fit", "--config", str(tmp_path / "bytes.yaml")])
    assert caught.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_right_file_is_taken_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """So that the tests above can fail."""
    content = copy.deepcopy(config())
    content["trainer"]["callbacks"] = [callback(content, "WeightPruning")]
    cli = run(content, tmp_path, *SHORT[2:], "--trainer.max_epochs", "1", "--trainer.enable_checkpointing", "false")
    assert cli.trainer.callbacks[0].amount == 0.5


# -- the example -------------------------------------------------------------------------------------------------------


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """``examples/cli.py`` as it is when it runs."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import importlib

    names = ("cli", "cifar_lenet")
    yield importlib.import_module("cli")
    for name in names:
        sys.modules.pop(name, None)


def test_the_example_runs(
    example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sklearn")
    words = ("--trainer.max_epochs", "2", "--trainer.limit_train_batches", "8", "--trainer.limit_val_batches", "2")
    monkeypatch.chdir(tmp_path)
    quiet = ("--trainer.enable_progress_bar", "false")
    monkeypatch.setattr(sys, "argv", ["cli.py", "fit", "--config", str(YAML), *words, *quiet])
    example.main()
    assert "parameters" in capsys.readouterr().out
    assert list(tmp_path.rglob("last.ckpt"))
    assert list(tmp_path.rglob("config.yaml"))


def test_an_error_of_the_run_is_one_line_too(
    example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sklearn")
    content = yaml.safe_load(YAML.read_text())
    content["trainer"]["logger"] = False
    content["model"]["lr_scheduler_options"] = {"warmpu": 1}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(content))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["cli.py", "fit", "--config", "c.yaml"])
    with pytest.raises(SystemExit) as caught:
        example.main()
    assert caught.value.code == 2
    assert "cli.py: error: Unknown option 'warmpu'" in capsys.readouterr().err.splitlines()[-1]


# -- shell completion --------------------------------------------------------------------------------------------------

TRY = """
source {script}
COMP_WORDS=({words}); COMP_CWORD=$(( ${{#COMP_WORDS[@]}} - 1 )); COMPREPLY=()
{function}
echo "${{COMPREPLY[*]}}"
"""


def completed(script: Path, function: str, words: str) -> set[str]:
    """What bash offers for the last of the words."""
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("no bash")
    program = TRY.format(script=script, words=words, function=function)
    done = subprocess.run([bash, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    return set(done.stdout.split())


@pytest.mark.skipif(sys.platform == "win32", reason="bash")
def test_bash_completes_commands_options_choices_and_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab")
    assert main(["--print_shtab=bash"]) == 0
    script = tmp_path / "script"
    script.write_text(capsys.readouterr().out)
    offers = {
        words: completed(script, "_shtab_lightning_prune", f"lightning-prune {words}")
        for words in (
            "''",
            "pr",
            "prune m --exa",
            "prune m --zeros.am",
            "export m --format ''",
            f"inspect {tmp_path}/s",
        )
    }
    assert offers["''"] == {"inspect", "prune", "compare", "report", "sensitivity", "export"}
    assert offers["pr"] == {"prune"}
    assert offers["prune m --exa"] == {"--exact_only"}
    assert offers["prune m --zeros.am"] == {"--zeros.amount"}
    assert offers["export m --format ''"] == {"onnx", "torch-export", "safetensors"}
    assert offers[f"inspect {tmp_path}/s"] == {str(script)}


@pytest.mark.skipif(sys.platform == "win32", reason="bash")
def test_bash_completes_the_options_of_a_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("shtab")
    monkeypatch.setattr(sys, "argv", ["train", "--print_shtab=bash"])
    with pytest.raises(SystemExit) as caught:
        PruningCLI(ImageClassifier, Noise)
    assert caught.value.code == 0
    (tmp_path / "script").write_text(capsys.readouterr().out)
    assert completed(tmp_path / "script", "_shtab_train", "train fit --trainer.max_e") == {"--trainer.max_epochs"}
    assert completed(tmp_path / "script", "_shtab_train", "train fit --model.lr_sched") == {
        "--model.lr_scheduler",
        "--model.lr_scheduler_options",
    }


def test_an_unknown_shell_and_a_missing_library_are_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("shtab")
    for words in (["--print_shtab=cmd"], ["--print_shtab"], ["--print-shtab", "cmd"]):
        assert main(words) == 2
        assert "--print_shtab is one of bash" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["--print_shtab=bash"]) == 2
    assert 'pip install "lightning-prune[cli]"' in capsys.readouterr().err


# -- the messages themselves -------------------------------------------------------------------------------------------


def test_nearest_names() -> None:
    assert near("amuont", ["amount", "criterion"]) == "; did you mean amount?"
    assert near("zzz", ["amount", "criterion"]) == ""


def test_what_no_pattern_fits_is_one_line_too() -> None:
    assert short("Something\n  else  is\nwrong") == "Something else is wrong"
    assert len(short("wrong " * 1000)) < 320


def test_importing_the_package_does_not_import_the_extra() -> None:
    """Lightning itself may import rich."""
    program = (
        "import sys, lightning.pytorch; before = {*sys.modules}; import lightning_prune; "
        "print(*({each.partition('.')[0] for each in {*sys.modules} - before} & {'jsonargparse', 'rich', 'shtab'}))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout.strip() == ""
