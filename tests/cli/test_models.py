"""Models by name and from files; what is wrong with them is one line, and nothing in a file is ever run."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lightning_prune import PruningError, prune_neurons, save_pruned
from lightning_prune.cli import main
from lightning_prune.cli.models import load_weights, open_model

NETS = str(Path(__file__).with_name("nets.py"))


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line of a command that fails."""
    assert main(arguments) == 2
    written = capsys.readouterr()
    assert written.out == ""
    (line,) = [line for line in written.err.splitlines() if not line.startswith("input: ")]
    assert line.startswith("lightning-prune")
    return line


def test_a_model_is_a_class_a_function_or_an_object() -> None:
    assert open_model(f"{NETS}:Net").model.first.out_features == 8
    assert open_model(f"{NETS}:Net", init={"width": 5, "depth": 2}).model.hidden[1].in_features == 5
    assert open_model(f"{NETS}:build", init={"width": 3}).model.first.out_features == 3
    assert open_model(f"{NETS}:build", init={"depth": 2}).model.hidden[1].in_features == 4
    assert open_model(f"{NETS}:ready").model.first.out_features == 5
    assert isinstance(open_model("torch.nn:Linear", init={"in_features": 2, "out_features": 3}).model, nn.Linear)


def test_arguments_that_are_modules_are_built() -> None:
    init = {"network": {"class_path": "lightning_prune.models.LeNet", "init_args": {"hidden": [7]}}, "lr": 0.5}
    model: Any = open_model(f"{NETS}:Lit", init=init).model
    assert model.network.fc1.out_features == 7
    assert model.hparams["lr"] == 0.5


def test_zoos() -> None:
    pytest.importorskip("torchvision")
    found = open_model("torchvision:squeezenet1_1", init={"num_classes": 4})
    assert found.model(found.inputs).shape == (1, 4)
    timm = pytest.importorskip("timm")
    found = open_model("timm:test_resnet", init={"num_classes": 4, "in_chans": 1})
    assert found.inputs.shape[1] == 1
    assert found.model(found.inputs).shape == (1, 4)
    assert timm


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("torchvision:resnet19", "did you mean resnet18"),
        ("timm:resnet19", "did you mean resnet18"),
        ("resnet18", "torchvision:resnet18"),
        ("lightning_prune.models:LeNett", "lightning_prune.models has no 'LeNett'; did you mean LeNet?"),
        ("lightning_prune.modles:LeNet", "no module 'lightning_prune.modles'"),
        (f"{NETS}:Nett", "did you mean Net"),
        (f"{NETS}:number", "neither a class nor a function"),
        (f"{NETS}:broken", "raised RuntimeError: no such luck"),
        (f"{NETS}:leaves", "raised SystemExit: 7"),
        (f"{NETS}:offline", "error: no connection"),
        (f"{NETS}:data", "gives no nn.Module but TensorDataset"),
        ("nowhere.py:Net", "there is no file nowhere.py"),
        ("nowhere.ckpt", "there is no file nowhere.ckpt"),
        (":Net", "an import path is"),
    ],
)
def test_an_unknown_model_is_told_with_its_like(spec: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert said in error_of(capsys, "inspect", spec)


@pytest.mark.parametrize(
    ("init", "said"),
    [
        (("--init.wdth", "3"), "takes no argument 'wdth'; did you mean width"),
        (("--init.width", "wide"), "width: expected an int, got wide"),
        (("--init", "[1]"), "init: expected"),
    ],
)
def test_a_wrong_argument_is_told(init: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert said in error_of(capsys, "inspect", f"{NETS}:Net", *init)


def test_a_file_whose_import_fails_is_told_and_forgotten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "half_written_net.py").write_text("import torch\nraise KeyError('oh')\n")
    spec = f"{tmp_path / 'half_written_net.py'}:Net"
    assert "importing half_written_net.py raised KeyError" in error_of(capsys, "inspect", spec)
    (tmp_path / "half_written_net.py").write_text("import torch\nNet = lambda: torch.nn.Linear(4, 2)\n")
    assert isinstance(open_model(spec).model, nn.Linear)


def test_a_file_that_exits_when_it_is_imported_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "script_without_guard.py").write_text("import sys\nsys.exit('usage: none')\n")
    line = error_of(capsys, "inspect", f"{tmp_path / 'script_without_guard.py'}:Net")
    assert "importing script_without_guard.py raised SystemExit: usage: none" in line


# -- weights -----------------------------------------------------------------------------------------------------------


def same(one: nn.Module, other: nn.Module) -> bool:
    state = other.state_dict()
    return all(torch.equal(value, state[name]) for name, value in one.state_dict().items())


def test_weights_come_from_every_kind_of_file(tmp_path: Path) -> None:
    dense = open_model(f"{NETS}:Net").model
    save_file(dense.state_dict(), tmp_path / "plain.safetensors")
    save_pruned(dense, tmp_path / "ours.safetensors")
    torch.save(dense.state_dict(), tmp_path / "bare.pt")
    state = {f"module.network.{name}": value for name, value in dense.state_dict().items()}
    torch.save({"state_dict": state | {"module.metric": torch.ones(1)}, "epoch": 3}, tmp_path / "wrapped.ckpt")
    torch.save(dense.state_dict(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for path in sorted(tmp_path.iterdir()):
        fresh = open_model(f"{NETS}:Net").model
        assert not same(fresh, dense)
        load_weights(fresh, path)
        assert same(fresh, dense), path.name
        assert same(open_model(str(path), cls=f"{NETS}:Net").model, dense), path.name


def test_weights_of_a_pruned_file_give_the_pruned_model(tmp_path: Path) -> None:
    pruned = open_model(f"{NETS}:Net").model
    prune_neurons(pruned, torch.zeros(1, 6), 0.5)
    save_pruned(pruned, tmp_path / "small.safetensors")
    found = open_model(str(tmp_path / "small.safetensors"), cls=f"{NETS}:Net")
    x = torch.randn(4, 6)
    assert torch.equal(found.model(x), pruned(x))
    assert found.dense is not None
    assert found.dense.first.out_features == 8


def test_weights_of_another_model_leave_it_untouched(tmp_path: Path) -> None:
    model = open_model(f"{NETS}:Net").model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for number, other in enumerate((open_model(f"{NETS}:Net", init={"width": 9}), open_model(f"{NETS}:Tokens"))):
        torch.save(other.model.state_dict(), tmp_path / f"{number}.pt")
        save_file(other.model.state_dict(), tmp_path / f"{number}.safetensors")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"state_dict": {"first.weight": "text"}}, tmp_path / "text.pt")
    for path in sorted(tmp_path.iterdir()):
        with pytest.raises(PruningError, match=path.stem) as caught:
            load_weights(model, path)
        assert "\n" not in str(caught.value)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# -- files that are not what they should be ----------------------------------------------------------------------------


class Bomb:
    """Unpickling it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


FORMS = {
    "zip": lambda thing, path: torch.save(thing, path),
    "legacy": lambda thing, path: torch.save(thing, path, _use_new_zipfile_serialization=False),
    "pickle": lambda thing, path: path.write_bytes(pickle.dumps(thing)),
}

COMMANDS = {
    "inspect": ("inspect", "{}", "--class", f"{NETS}:Net"),
    "inspect a LightningModule": ("inspect", "{}", "--class", f"{NETS}:Lit"),
    "weights": ("prune", f"{NETS}:Net", "--weights", "{}", "--amount", "0.5", "--out", "out.safetensors"),
    "compare": ("compare", f"{NETS}:Net", "{}"),
    "report": ("report", "{}", "--class", f"{NETS}:Net", "--out", "out.md"),
    "sensitivity": ("sensitivity", "{}", "--class", f"{NETS}:Net"),
    "export": ("export", "{}", "--class", f"{NETS}:Net", "--out", "out.onnx"),
}


def in_folder(command: str, path: Path, folder: Path) -> list[str]:
    words = [word.replace("{}", str(path)) for word in COMMANDS[command]]
    return [str(folder / word) if word.startswith("out.") else word for word in words]


@pytest.mark.parametrize("form", FORMS)
def test_a_bomb_goes_off_where_it_is_unpickled(form: str, tmp_path: Path) -> None:
    """So that the next test can fail."""
    FORMS[form]({"state_dict": Bomb(tmp_path / "ran")}, tmp_path / "bomb.ckpt")
    if form == "pickle":
        pickle.loads((tmp_path / "bomb.ckpt").read_bytes())
    else:
        torch.load(tmp_path / "bomb.ckpt", weights_only=False)
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("command", COMMANDS)
def test_nothing_of_a_pickle_bomb_runs(
    command: str, form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = open_model(f"{NETS}:Net").model.state_dict()
    for place in ("state_dict", "hyper_parameters", "callbacks"):
        thing = {"state_dict": weights, place: {"a": Bomb(tmp_path / "ran")}}
        FORMS[form](thing, tmp_path / "bomb.ckpt")
        line = error_of(capsys, *in_folder(command, tmp_path / "bomb.ckpt", tmp_path))
        assert "bomb.ckpt" in line
        assert "mkdir" in line or form != "zip"
        assert sorted(each.name for each in tmp_path.iterdir()) == ["bomb.ckpt"]


def test_a_function_that_a_checkpoint_names_is_not_called(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning imports and calls what ``_instantiator`` names; before 2.6 whatever it is."""
    (tmp_path / "evil.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    lit = open_model(f"{NETS}:Lit", init={"network": f"{NETS}:ready"} | {"network": _network()}).model
    content = {
        "state_dict": lit.state_dict(),
        "hyper_parameters": {"lr": 0.25, "_instantiator": "evil.make", "_class_path": "evil.Net"},
        "pytorch-lightning_version": "2.5.0",
    }
    torch.save(content, tmp_path / "a.ckpt")
    found: Any = open_model(str(tmp_path / "a.ckpt"), cls=f"{NETS}:Lit", init={"network": _network()}).model
    assert found.hparams["lr"] == 0.25
    assert same(found, lit)
    assert not (tmp_path / "ran").exists()


def _network() -> dict[str, Any]:
    return {"class_path": "torch.nn.Linear", "init_args": {"in_features": 6, "out_features": 3}}


def _checkpoint(path: Path) -> tuple[bytes, int]:
    """A checkpoint, and where in it a weight stands."""
    state = open_model(f"{NETS}:Net").model.state_dict()
    torch.save({"state_dict": state}, path)
    return path.read_bytes(), path.read_bytes().index(state["first.weight"].numpy().tobytes())


@pytest.mark.parametrize("command", COMMANDS)
def test_a_file_that_is_none_is_told(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole, place = _checkpoint(tmp_path / "whole.ckpt")
    cases = {
        "empty.ckpt": b"",
        "text.ckpt": b"epoch: 3\n" * 50,
        "cut.ckpt": whole[: len(whole) // 2],
        "altered.ckpt": whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :],
        "noise.safetensors": bytes(range(256)) * 9,
        "empty.safetensors": b"",
        "checkpoint.safetensors": whole,
    }
    (tmp_path / "whole.ckpt").unlink()
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        line = error_of(capsys, *in_folder(command, tmp_path / name, tmp_path))
        assert name in line
    (tmp_path / "folder.ckpt").mkdir()
    assert "folder.ckpt" in error_of(capsys, *in_folder(command, tmp_path / "folder.ckpt", tmp_path))
    assert {each.name for each in tmp_path.iterdir()} == {*cases, "folder.ckpt"}


@pytest.mark.parametrize(
    ("callbacks", "said"),
    [
        (3, "'int' object"),
        ({"a": {"timeline": 3}}, "the timeline can't be read"),
        ({"a": {"timeline": [{"epoch": "one"}]}}, "'epoch' of a Moment can't be 'one'"),
        ({"a": {"before": {"first.weight": [1]}}}, "the histograms of weights can't be read"),
        ({"a": {"thresholds": {"first.weight": "low"}}}, "the thresholds of weights can't be read"),
        ({"a": {"plan": {"kept": 3}, "macs_left": 1.0}}, "a.ckpt: not a plan"),
    ],
)
def test_what_callbacks_never_wrote_is_told(
    callbacks: Any, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    init = {"network": _network()}
    lit = open_model(f"{NETS}:Lit", init=init).model
    content = {"state_dict": lit.state_dict(), "callbacks": callbacks, "pytorch-lightning_version": "2.5.0"}
    torch.save(content, tmp_path / "a.ckpt")
    words = ("--class", f"{NETS}:Lit", "--init", json.dumps(init), "--out", str(tmp_path / "a.html"))
    assert said in error_of(capsys, "report", str(tmp_path / "a.ckpt"), *words)
    assert [each.name for each in tmp_path.iterdir()] == ["a.ckpt"]


def test_a_checkpoint_of_another_class_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _checkpoint(tmp_path / "a.ckpt")
    path = str(tmp_path / "a.ckpt")
    assert "is not of Tokens" in error_of(capsys, "inspect", path, "--class", f"{NETS}:Tokens")
    lit = error_of(capsys, "inspect", path, "--class", f"{NETS}:Lit", "--init.network", "lightning_prune.models.LeNet")
    assert f"{path} is no checkpoint of Lit" in lit
    assert "it has no 'pytorch-lightning_version'" in lit
    torch.save(torch.load(path, weights_only=True) | {"pytorch-lightning_version": "2.5.0"}, tmp_path / "b.ckpt")
    words = ("--class", f"{NETS}:Lit", "--init.network", "lightning_prune.models.LeNet")
    assert "Missing key(s) in state_dict" in error_of(capsys, "inspect", str(tmp_path / "b.ckpt"), *words)
    assert "--class" in error_of(capsys, "inspect", path)
    assert "names a class of modules" in error_of(capsys, "inspect", path, "--class", f"{NETS}:number")
    assert "goes with a file" in error_of(capsys, "inspect", f"{NETS}:Net", "--class", f"{NETS}:Net")
