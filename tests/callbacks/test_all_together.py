"""All callbacks in one run, with Lightning's own beside them; stopped and resumed."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import callbacks as lightning_callbacks
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning_modules import (
    ADAMW,
    IMAGE,
    LIGHTNING_WARNINGS,
    Spy,
    Task,
    assert_same,
    fit,
    seeded,
    snapshot,
    trainer_of,
)
from torch import Tensor, nn

from lightning_prune import (
    ActivationSearch,
    KernelShrinking,
    LayerPruning,
    NeuronPruning,
    Prunable,
    WeightPruning,
    find_groups,
    load_from_checkpoint,
)

pytestmark = [*LIGHTNING_WARNINGS, pytest.mark.filterwarnings("ignore:The dirpath has changed")]

EPOCHS = 8


class Block(nn.Module):
    """Adds to its input, so that it can go."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.one = nn.Conv2d(width, inner, 3, padding=1)
        self.norm = nn.BatchNorm2d(inner)
        self.act = nn.ReLU()
        self.two = nn.Conv2d(inner, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.two(self.act(self.norm(self.one(x))))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 5, padding=2)
        self.blocks = nn.Sequential(*(Block(8, 12) for _ in range(3)))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        return self.head(self.blocks(x).mean((2, 3)))


def task(seed: int = 0) -> Task:
    return seeded(lambda: Task(Net(), shape=IMAGE, optimizer=ADAMW), seed)


def ours(remove: str = "progressive") -> list[Any]:
    return [
        ActivationSearch(("relu", "tanh", "identity"), search_until=0.25, held_out=1, trial_steps=1, report=False),
        NeuronPruning(0.3, end=0.75, remove=remove, report=False),
        KernelShrinking(0.4, start=0.25, end=0.75, report=False),
        LayerPruning(0.1, start=0.25, end=0.9, report=False),
        WeightPruning(0.4, end=0.9, report=False),
    ]


def theirs(folder: Path) -> list[Any]:
    averages = []
    if hasattr(lightning_callbacks, "EMAWeightAveraging"):  # from lightning 2.6 on
        averages.append(lightning_callbacks.EMAWeightAveraging(decay=0.8))
    return [
        *averages,
        EarlyStopping("val_loss", patience=EPOCHS),
        ModelCheckpoint(folder, "{epoch}", save_top_k=-1),
    ]


def train(folder: Path, *, seed: int = 0, ckpt_path: Path | None = None, before: tuple[Any, ...] = ()) -> Task:
    module = task(seed)
    fit(module, *before, *ours(), *theirs(folder), ckpt_path=ckpt_path, max_epochs=EPOCHS)
    return module


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Task, Path]:
    folder = tmp_path_factory.mktemp("whole")
    return train(folder), folder


@pytest.mark.filterwarnings("ignore:.*could be reached, nothing else can go.*")
def test_everything_is_smaller_in_its_own_way(whole: tuple[Task, Path]) -> None:
    module: Any = copy.deepcopy(whole[0].net).eval()
    dense = Net()
    assert sum(p.numel() for p in module.parameters()) < 0.8 * sum(p.numel() for p in dense.parameters())
    assert any(not isinstance(block, Block) for block in module.blocks)
    kernels = [layer.kernel_size for layer in module.modules() if isinstance(layer, nn.Conv2d)]
    assert (1, 1) in kernels or (3, 3) in kernels[:1]
    weights = [p for p in module.parameters() if p.dim() > 1]
    zero = sum(int((p == 0).sum()) for p in weights) / sum(p.numel() for p in weights)
    assert zero == pytest.approx(0.4, abs=0.02)
    assert module(torch.randn(2, *IMAGE)).shape == (2, 4)
    assert find_groups(module, torch.randn(2, *IMAGE)).neurons


@pytest.mark.filterwarnings("ignore:.*could be reached, nothing else can go.*")
@pytest.mark.parametrize("epoch", range(EPOCHS - 1))
def test_resumed_from_every_epoch(whole: tuple[Task, Path], epoch: int, tmp_path: Path) -> None:
    module, folder = whole
    resumed = train(tmp_path, seed=5, ckpt_path=folder / f"epoch={epoch}.ckpt")
    assert_same(snapshot(resumed), snapshot(module))
    x = torch.randn(2, *IMAGE)
    assert_same(resumed.net.eval()(x), module.net.eval()(x))


@pytest.mark.filterwarnings("ignore:.*could be reached, nothing else can go.*")
def test_masks_survive_what_other_callbacks_change(tmp_path: Path) -> None:
    def run(folder: Path, seed: int = 0, ckpt_path: Path | None = None) -> Task:
        module = task(seed)
        fit(
            module,
            *ours("end"),
            ModelCheckpoint(folder, "{epoch}", save_top_k=-1),
            ckpt_path=ckpt_path,
            max_epochs=EPOCHS,
        )
        return module

    module = run(tmp_path)
    for epoch in range(EPOCHS - 1):
        resumed = run(tmp_path / str(epoch), 5, tmp_path / f"epoch={epoch}.ckpt")
        assert_same(snapshot(resumed), snapshot(module))


def test_a_site_in_a_layer_that_goes_is_let_go(tmp_path: Path) -> None:
    """The search commits after a layer was removed that it looks into."""
    module = task()
    search = ActivationSearch(("tanh",), search_until=0.75, held_out=0, report=False)
    fit(module, LayerPruning(0.1, end=0.25, report=False), search, max_epochs=EPOCHS)
    assert any(not isinstance(block, Block) for block in module.net.blocks)
    assert search.plan_.activations
    assert module.net(torch.randn(2, *IMAGE)).shape == (2, 4)


def test_killed_and_resumed(whole: tuple[Task, Path], tmp_path: Path) -> None:
    """SIGKILL in the fifth epoch of another process; what it has saved until then is gone on with here."""
    run = [sys.executable, __file__, str(tmp_path)]
    paths = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    killed = subprocess.run(run, env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)}, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    resumed = train(tmp_path / "more", seed=5, ckpt_path=tmp_path / "epoch=3.ckpt")
    assert_same(snapshot(resumed), snapshot(whole[0]))


class Images(Task):
    """Can be built without arguments, as a checkpoint needs it."""

    def __init__(self) -> None:
        super().__init__(Net(), shape=IMAGE, optimizer=ADAMW)


class PrunableImages(Prunable, Images):
    pass


@pytest.mark.parametrize("cls", [Images, PrunableImages])
@pytest.mark.parametrize("weights_only", [False, True])
def test_loaded_without_any_callback(cls: Any, weights_only: bool, tmp_path: Path) -> None:
    """The architecture and the activations come from the checkpoint."""
    module = seeded(cls)
    search = ActivationSearch(("tanh", "identity"), mode="trial", trial_steps=0, report=False)
    callbacks = [search, *ours()[1:-1]]
    saver = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_weights_only=weights_only)
    fit(module, *callbacks, saver, max_epochs=EPOCHS)
    assert search.plan_.activations
    loaded = load_from_checkpoint(cls, tmp_path / f"epoch={EPOCHS - 1}.ckpt")
    x = torch.randn(2, *IMAGE)
    assert_same(loaded.net.eval()(x), module.net.eval()(x))
    assert type(loaded) is cls
    again = seeded(cls, 3)
    trainer_of(*callbacks).validate(again, ckpt_path=tmp_path / f"epoch={EPOCHS - 1}.ckpt", verbose=False)
    assert_same(again.net.eval()(x), module.net.eval()(x))
    if cls is PrunableImages:
        third = cls()
        third.load_state_dict(module.state_dict())
        assert_same(third.net.eval()(x), module.net.eval()(x))


if __name__ == "__main__":
    torch.set_num_threads(1)
    kill = Spy(on_train_batch_start=lambda t, _: os.kill(os.getpid(), 9) if t.current_epoch == 4 else None)
    train(Path(sys.argv[1]), before=(kill,))
