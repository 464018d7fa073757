"""Pruned modules that load themselves: `Prunable`, and `load_from_checkpoint` without it."""

from __future__ import annotations

import copy
import os
import pickle
import warnings
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZipFile

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_modules import (
    IMAGE,
    LIGHTNING_WARNINGS,
    SmallLiteralView,
    Task,
    assert_same,
    conv_net,
    fit,
    mlp,
    neurons,
    seeded,
    snapshot,
    trainer_of,
)
from networks import Snapshot
from torch import Tensor, nn

from lightning_prune import Plan, Prunable, PruningError, load_from_checkpoint, prune_neurons
from lightning_prune.graph.callsites import installed_patches
from lightning_prune.pruning.prunable import METADATA, UntrustedError, read_checkpoint

pytestmark = LIGHTNING_WARNINGS


class Plain(Task):
    """Built from what it saves of itself."""

    def __init__(self, width: int = 12, depth: int = 1) -> None:
        super().__init__(mlp(6, *[width] * depth, 10, 4))
        self.save_hyperparameters()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)  # type: ignore[no-any-return]


class Loadable(Prunable, Plain):
    """The same, that loads itself."""


class Literal(Prunable, Task):
    """A size written in the forward."""

    def __init__(self) -> None:
        super().__init__(SmallLiteralView(), shape=IMAGE)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)  # type: ignore[no-any-return]


class PlainLiteral(Task):
    """The same without the mixin."""

    def __init__(self) -> None:
        super().__init__(SmallLiteralView(), shape=IMAGE)
        self.save_hyperparameters()


MAKERS = {"mlp": (Loadable, (6,)), "literal": (Literal, IMAGE)}


def pruned(name: str = "mlp", amount: float = 0.5, seed: int = 0) -> tuple[Any, Tensor]:
    maker, shape = MAKERS[name]
    module = seeded(maker, seed).eval()
    x = torch.randn(3, *shape)
    assert prune_neurons(module, x, amount)
    return module, x


def same_function(first: Any, second: Any, x: Tensor) -> None:
    with torch.no_grad():
        assert torch.equal(first.eval()(x), second.eval()(x))


# State dicts


@pytest.mark.parametrize("name", MAKERS)
def test_a_state_dict_goes_into_a_dense_module(name: str) -> None:
    module, x = pruned(name)
    other = seeded(MAKERS[name][0], 3)
    assert str(other.load_state_dict(module.state_dict())) == "<All keys matched successfully>"
    assert other.pruning_plan == module.pruning_plan
    assert [p.shape for p in other.parameters()] == [p.shape for p in module.parameters()]
    same_function(other, module, x)
    assert_same(snapshot(other), snapshot(module))


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("amounts", [(0.5, 0.25), (0.25, 0.5), (0.5, 0.5), (0.7, 0.3)])
def test_a_state_dict_goes_into_one_pruned_by_another_plan(name: str, amounts: tuple[float, float]) -> None:
    """Further, less far, or the same number of other neurons."""
    module, x = pruned(name, amounts[0])
    other, _ = pruned(name, amounts[1], seed=7)
    assert other.pruning_plan.kept != module.pruning_plan.kept
    other.load_state_dict(module.state_dict())
    same_function(other, module, x)
    assert other.pruning_plan == module.pruning_plan
    same_function(copy.deepcopy(other), module, x)


@pytest.mark.parametrize("name", MAKERS)
def test_a_loaded_module_can_be_pruned_further_and_loaded_again(name: str) -> None:
    module, x = pruned(name, 0.3)
    other = seeded(MAKERS[name][0], 3)
    other.load_state_dict(module.state_dict())
    assert prune_neurons(other.eval(), x, 0.4)
    third = seeded(MAKERS[name][0], 4)
    third.load_state_dict(other.state_dict())
    same_function(third, other, x)
    assert module.load_state_dict(other.state_dict())
    same_function(module, other, x)


def test_the_plan_of_several_prunings_is_one() -> None:
    module = seeded(Loadable).eval()
    dense, x = copy.deepcopy(module), torch.randn(3, 6)
    plans = [prune_neurons(module, x, 0.3) for _ in range(2)]
    assert module.pruning_plan == plans[0].then(plans[1])
    module.pruning_plan.apply(dense)
    assert [p.shape for p in dense.parameters()] == [p.shape for p in module.parameters()]


def test_a_dense_module_says_nothing() -> None:
    module = seeded(Loadable)
    assert METADATA not in str(module.state_dict()._metadata)
    assert "pruning_plan" not in module.__dict__
    assert not module.pruning_plan
    other = seeded(Loadable, 2)
    other.load_state_dict(module.state_dict())
    assert_same(snapshot(other), snapshot(module))


def test_plans_of_objects_are_their_own() -> None:
    module, _ = pruned()
    assert module.pruning_plan
    assert not Loadable.pruning_plan
    assert not Loadable().pruning_plan


class Holder(LightningModule):
    """Two of them inside another module, one of them deeper."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Loadable()
        self.rest = nn.ModuleList([nn.Linear(2, 2), Loadable(8, 2)])


def test_inside_another_module() -> None:
    holder, x = seeded(Holder).eval(), torch.randn(3, 6)
    for number, module in enumerate((holder.first, holder.rest[1])):
        prune_neurons(module, x, 0.3 + 0.3 * number)
    other = seeded(Holder, 3)
    other.load_state_dict(holder.state_dict())
    same_function(other.first, holder.first, x)
    same_function(other.rest[1], holder.rest[1], x)
    assert other.rest[1].pruning_plan == holder.rest[1].pruning_plan
    assert_same(snapshot(other), snapshot(holder))


@pytest.mark.parametrize("name", MAKERS)
def test_a_file_of_weights_only(name: str, tmp_path: Path) -> None:
    module, x = pruned(name)
    torch.save(module.state_dict(), tmp_path / "weights.pt")
    other = seeded(MAKERS[name][0], 3)
    other.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    same_function(other, module, x)


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_are_pruned_and_load_too(name: str, copied: Any) -> None:
    module, x = pruned(name)
    twin = copied(module)
    same_function(twin, module, x)
    assert twin.pruning_plan == module.pruning_plan
    assert twin.state_dict()._metadata[""][METADATA] == module.state_dict()._metadata[""][METADATA]
    prune_neurons(twin, x, 0.3)
    assert twin.pruning_plan != module.pruning_plan
    module.load_state_dict(twin.state_dict())
    same_function(twin, module, x)


class Wider(Prunable, Task):
    """Other sizes under the same names."""

    def __init__(self) -> None:
        super().__init__(mlp(6, 14, 10, 4))


class Renamed(Prunable, Task):
    """Other names."""

    def __init__(self) -> None:
        super().__init__(nn.Sequential(mlp(6, 12, 10, 4)))


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (Wider, r"was pruned from 'net\.0\.\w+' of shape \(12.*\); Wider has shape \(14"),
        (Renamed, r"was pruned from 'net\.0\.\w+' of shape .*; Renamed has nothing of that name"),
    ],
)
@pytest.mark.parametrize("smaller", [False, True])
def test_a_state_dict_of_another_class_is_refused(cls: Any, message: str, smaller: bool) -> None:
    module, _ = pruned()
    other = seeded(cls)
    if smaller:
        other.net.eval()
        assert prune_neurons(other.net, torch.randn(2, 6), 0.3)
    before = Snapshot(other)
    with pytest.raises(PruningError, match=message if not smaller or cls is Renamed else "was pruned from"):
        other.load_state_dict(module.state_dict())
    before.assert_unchanged()
    assert not other.pruning_plan


def test_a_plan_that_is_none_is_refused() -> None:
    module, _ = pruned()
    state = module.state_dict()
    state._metadata[""][METADATA] = {"plan": {"kept": 3}}
    other = seeded(Loadable)
    before = Snapshot(other)
    with pytest.raises(PruningError, match="not a plan"):
        other.load_state_dict(state)
    before.assert_unchanged()


# Checkpoints of training


def train(module: Any, folder: Path, amount: float = 0.5, **options: Any) -> Path:
    saver = ModelCheckpoint(folder, "last", save_top_k=1, **options)
    fit(module, neurons(amount, end=0.5), saver, max_epochs=2)
    assert any(p.size(0) not in (12, 10, 4) for p in module.net.parameters()) or amount == 0
    return folder / "last.ckpt"


def nothing_left(module: Any, cls: type[Any]) -> None:
    """The object is of its class, and of nothing else."""
    assert type(module) is cls
    fresh = set(cls().__dict__)
    assert set(module.__dict__) <= fresh | {"_hparams_initial", "_hparams", "_hparams_name"}
    for each in module.modules():
        found = [*each.__dict__.values(), type(each)]
        assert not [v for v in found if "lightning_prune" in type(v).__module__ or "lightning_prune" in str(v)[:300]]


@pytest.mark.parametrize("weights_only", [False, True])
@pytest.mark.parametrize("cls", [Plain, Loadable])
def test_a_run_is_loaded_small(cls: Any, weights_only: bool, tmp_path: Path) -> None:
    module = seeded(lambda: cls(16, 2))
    path = train(module, tmp_path, save_weights_only=weights_only)
    loaded = load_from_checkpoint(cls, path)
    same_function(loaded, module, torch.randn(3, 6))
    assert loaded.hparams == {"width": 16, "depth": 2}
    assert_same(snapshot(loaded), snapshot(module))
    if cls is Plain:
        nothing_left(loaded, Plain)
        assert METADATA not in str(loaded.state_dict()._metadata)
    else:
        assert type(loaded) is Loadable
        assert loaded.pruning_plan == module.pruning_plan
        own = Loadable.load_from_checkpoint(path)
        assert type(own) is Loadable
        same_function(own, module, torch.randn(3, 6))


def test_a_loaded_module_trains_and_is_saved_and_loaded_again(tmp_path: Path) -> None:
    path = train(seeded(Plain), tmp_path / "a")
    loaded = load_from_checkpoint(Plain, path)
    sizes = [p.shape for p in loaded.parameters()]
    fit(loaded, ModelCheckpoint(tmp_path / "b", "last"), max_epochs=1)
    assert [p.shape for p in loaded.parameters()] == sizes
    pickle.loads(pickle.dumps(loaded.net))
    same_function(copy.deepcopy(loaded), loaded, torch.randn(3, 6))


def test_the_class_itself_cannot_load_it_without_help(tmp_path: Path) -> None:
    path = train(seeded(Plain), tmp_path)
    with pytest.raises(RuntimeError, match="size mismatch"):
        Plain.load_from_checkpoint(path)


def test_sizes_written_in_a_forward_follow(tmp_path: Path) -> None:
    module = seeded(PlainLiteral)
    path = train(module, tmp_path)
    loaded = load_from_checkpoint(PlainLiteral, path)
    assert type(loaded) is PlainLiteral
    assert installed_patches(loaded) == installed_patches(module) != ()
    with torch.no_grad():
        x = torch.randn(3, *IMAGE)
        assert torch.equal(loaded.eval().net(x), module.eval().net(x))


@pytest.mark.parametrize("cls", [Plain, Loadable])
def test_a_checkpoint_without_pruning_is_loaded_as_it_is(cls: Any, tmp_path: Path) -> None:
    module = seeded(cls)
    fit(module, ModelCheckpoint(tmp_path, "last"), max_epochs=1)
    loaded = load_from_checkpoint(cls, tmp_path / "last.ckpt")
    assert_same(snapshot(loaded), snapshot(module))
    assert type(loaded) is cls
    assert not getattr(loaded, "pruning_plan", None)
    if cls is Plain:
        nothing_left(loaded, Plain)


def test_arguments_reach_the_constructor(tmp_path: Path) -> None:
    """What was not saved is given, as to Lightning's own."""

    class Unsaved(Task):
        def __init__(self, net: nn.Module, note: str = "") -> None:
            super().__init__(net, shape=IMAGE)
            self.note = note

    module = seeded(lambda: Unsaved(conv_net()))
    saver = ModelCheckpoint(tmp_path, "last")
    fit(module, neurons(0.5, end=0.5), saver, max_epochs=2)
    loaded = load_from_checkpoint(Unsaved, tmp_path / "last.ckpt", net=conv_net(), note="here", map_location="cpu")
    assert loaded.note == "here"
    assert_same(snapshot(loaded), snapshot(module))
    by_text = load_from_checkpoint(Unsaved, str(tmp_path / "last.ckpt"), net=conv_net())
    assert_same(snapshot(by_text), snapshot(module))


def test_the_trainer_tests_a_checkpoint_without_the_callback(tmp_path: Path) -> None:
    module = seeded(Loadable)
    path = train(module, tmp_path)
    fresh = seeded(Loadable, 3)
    (metrics,) = trainer_of().test(fresh, ckpt_path=path, verbose=False)
    (expected,) = trainer_of().test(module, verbose=False)
    assert metrics == expected
    assert fresh.pruning_plan == module.pruning_plan


def test_a_checkpoint_of_another_architecture_is_refused(tmp_path: Path) -> None:
    path = train(seeded(Plain), tmp_path)
    for cls in (Wider, Renamed):
        with pytest.raises(PruningError, match=f"the checkpoint was pruned from .*{cls.__name__} has"):
            load_from_checkpoint(cls, path)
    with pytest.raises(PruningError, match=r"the checkpoint was pruned from .* Plain has"):
        load_from_checkpoint(Plain, path, width=30)


def test_what_is_no_module_class_is_refused(tmp_path: Path) -> None:
    for wrong in (nn.Linear, Plain(), "Plain", None):
        with pytest.raises(PruningError, match="cls must be a LightningModule class, got"):
            load_from_checkpoint(wrong, tmp_path / "any.ckpt")  # type: ignore[type-var]


def test_a_missing_file_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_from_checkpoint(Plain, tmp_path / "none.ckpt")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return train(seeded(Plain), tmp_path_factory.mktemp("run")).read_bytes()


def refused(path: Path, said: str = "is no checkpoint") -> None:
    with pytest.raises(PruningError, match=said) as error:
        load_from_checkpoint(Plain, path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_refused(share: float, checkpoint: bytes, tmp_path: Path) -> None:
    path = tmp_path / "cut.ckpt"
    path.write_bytes(checkpoint[: int(share * len(checkpoint))])
    refused(path)


def test_an_altered_file_is_refused_or_read_as_it_is(checkpoint: bytes, tmp_path: Path) -> None:
    """Whichever of its bytes: never another error."""
    path = tmp_path / "altered.ckpt"
    start = checkpoint.index(b"state_dict")
    places = [*range(start - 40, start + 400, 11), *range(0, len(checkpoint), len(checkpoint) // 60)]
    failed = 0
    for place in places:
        data = bytearray(checkpoint)
        data[place] ^= 0xFF
        path.write_bytes(data)
        try:
            load_from_checkpoint(Plain, path)
        except PruningError:
            failed += 1
        except Exception as error:
            raise AssertionError(f"byte {place}: {type(error).__name__}: {error}") from error
    assert failed > 5


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("every", [False, True], ids=["one member", "every member"])
def test_a_file_whose_checksums_fail_is_refused(every: bool, compressed: bool, tmp_path: Path) -> None:
    """Also where all of them do: a file without any sums has zeros for them."""
    path = tmp_path / "altered.ckpt"
    torch.save({"state_dict": Plain().state_dict(), "pytorch-lightning_version": "2.5.0"}, path)
    if compressed:
        with ZipFile(path) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        with ZipFile(path, "w", ZIP_DEFLATED) as archive:
            for name, content in members.items():
                archive.writestr(name, content)
    assert isinstance(load_from_checkpoint(Plain, path), Plain) or compressed
    data = bytearray(path.read_bytes())
    with ZipFile(path) as archive:
        for member in [each for each in archive.infolist() if each.file_size][: None if every else 1]:
            names = int.from_bytes(data[member.header_offset + 26 : member.header_offset + 28], "little")
            more = int.from_bytes(data[member.header_offset + 28 : member.header_offset + 30], "little")
            data[member.header_offset + 30 + names + more + member.compress_size // 2] ^= 0xFF
    path.write_bytes(data)
    refused(path, "was altered since it was written")


OBJECTS: dict[str, Any] = {
    "a tensor": torch.ones(3),
    "a list": [1, 2],
    "a number": 3,
    "nothing": None,
    "an empty dict": {},
    "a state dict": Plain().state_dict(),
    "no state dict": {"epoch": 3, "pytorch-lightning_version": "2.5.0"},
    "a state dict of nothing": {"state_dict": {}, "pytorch-lightning_version": "2.5.0"},
    "a state dict that is none": {"state_dict": 3, "pytorch-lightning_version": "2.5.0"},
}


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence for multidimensional indexing")
@pytest.mark.parametrize("name", OBJECTS)
def test_a_file_of_something_else_is_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / "else.ckpt"
    torch.save(OBJECTS[name], path)
    refused(path)


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


def test_a_file_is_not_unpickled_unless_it_is_trusted(checkpoint: bytes, tmp_path: Path) -> None:
    path, mark = tmp_path / "bomb.ckpt", tmp_path / "went off"
    path.write_bytes(checkpoint)
    torch.save({**torch.load(path, weights_only=True), "more": Bomb(mark)}, path)
    with pytest.raises(PruningError, match="pass weights_only=False if you trust it"):
        load_from_checkpoint(Plain, path)
    assert not mark.exists()
    with pytest.raises(UntrustedError, match=r"nothing was unpickled, .*mkdir"):
        read_checkpoint(path)
    assert not mark.exists()
    module = load_from_checkpoint(Plain, path, weights_only=False)
    assert mark.exists()
    assert isinstance(module, Plain)


@pytest.mark.parametrize("data", [b"", b"hello", b"\x00" * 1000, b"PK\x03\x04" + b"\x01" * 100, pickle.dumps([1], 2)])
def test_a_file_of_no_kind_is_refused(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "text.ckpt"
    path.write_bytes(data)
    refused(path)


@pytest.mark.parametrize("damage", [{"kept": 3}, {"shapes": 3}, {"patches": [1]}, {}])
def test_a_plan_in_a_checkpoint_that_is_damaged_is_refused(damage: Any, checkpoint: bytes, tmp_path: Path) -> None:
    path = tmp_path / "plan.ckpt"
    path.write_bytes(checkpoint)
    content = torch.load(path, weights_only=False)
    for state in content["callbacks"].values():
        if isinstance(state, dict) and "plan" in state:
            state["plan"] = {**state["plan"], **damage} if damage else 7
    torch.save(content, path)
    with pytest.raises(PruningError):
        load_from_checkpoint(Plain, path)


def test_a_plan_is_plain_data_in_a_checkpoint(checkpoint: bytes, tmp_path: Path) -> None:
    path = tmp_path / "whole.ckpt"
    path.write_bytes(checkpoint)
    content = torch.load(path, weights_only=False)
    plans = [state["plan"] for state in content["callbacks"].values() if isinstance(state, dict) and "plan" in state]
    assert len(plans) == 1
    assert Plan.from_dict(plans[0])


def test_the_mixin_stands_first() -> None:
    with pytest.raises(TypeError, match=r"Prunable must stand before Task: class Late\(Prunable, Task\)"):
        type("Late", (Task, Prunable), {})

    class Below(Loadable):
        pass

    assert Below().pruning_plan == Plan({}, {})
