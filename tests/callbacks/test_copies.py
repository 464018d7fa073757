"""Momentum encoders in a real training: wherever they are updated, they fit what they follow."""

import copy
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_modules import LIGHTNING_WARNINGS, Task, assert_same, fit, seeded
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_prune import KernelShrinking, LayerPruning, NeuronPruning

pytestmark = [*LIGHTNING_WARNINGS]

WHERE = ["step", "hook", "before_zero_grad", "callback"]


class Momentum(Task):
    """A student learns what its own average says; as in BYOL, the average gets no gradient."""

    def __init__(self, where: str, everything: bool = False) -> None:
        super().__init__(nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 6)))
        self.slow = copy.deepcopy(self.net).requires_grad_(False)
        self.predictor = nn.Linear(6, 6)
        self.where, self.everything = where, everything

    @torch.no_grad()
    def follow(self, where: str) -> None:
        if where == self.where:
            for slow, fast in zip(self.slow.parameters(), self.net.parameters(), strict=True):
                slow.mul_(0.9).add_(fast, alpha=0.1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.follow("step")
        x = batch[0]
        with torch.no_grad():
            target = self.slow(x)
        return F.mse_loss(self.predictor(self.net(x + 0.1)), target)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.net(batch[0]).square().mean())

    def on_train_batch_end(self, *_: Any) -> None:
        self.follow("hook")

    def on_before_zero_grad(self, optimizer: Any) -> None:
        self.follow("before_zero_grad")

    def configure_optimizers(self) -> Any:
        parameters = self.parameters() if self.everything else [p for p in self.parameters() if p.requires_grad]
        return torch.optim.Adam(parameters, 1e-2)


class Follow(Callback):
    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        pl_module.follow("callback")


@pytest.mark.parametrize("every", [1, "epoch"])
@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("everything", [False, True])
def test_a_momentum_encoder_stays_the_shape_of_what_it_follows(where: str, every: Any, everything: bool) -> None:
    module = seeded(lambda: Momentum(where, everything))
    pruning = NeuronPruning(0.5, every=every, report=False)
    fit(module, pruning, Follow(), max_epochs=3)
    assert module.net[0].out_features == 8
    assert [p.shape for p in module.slow.parameters()] == [p.shape for p in module.net.parameters()]
    kept = pruning.plan_.kept
    assert kept["net.0.weight"] == kept["slow.0.weight"]


def test_a_resumed_run_ties_them_again(tmp_path: Any) -> None:
    def run(**options: Any) -> Any:
        module = seeded(lambda: Momentum("hook"))
        save = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
        fit(module, NeuronPruning(0.5, end=4, report=False), save, max_epochs=6, **options)
        return module

    whole = run()
    resumed = run(ckpt_path=tmp_path / "epoch=1.ckpt")
    assert_same(dict(resumed.state_dict()), dict(whole.state_dict()))


class Blocks(Momentum):
    """The same with residual blocks of convolutions."""

    def __init__(self, where: str) -> None:
        super().__init__(where)
        self.net = nn.Sequential(nn.Unflatten(1, (1, 6)), *(Block() for _ in range(4)), nn.Flatten())
        self.slow = copy.deepcopy(self.net).requires_grad_(False)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 5, padding=2)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.conv(x))


@pytest.mark.parametrize("of", ["params", "macs"])
@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("kind", [KernelShrinking, LayerPruning])
def test_a_momentum_encoder_keeps_the_structure_of_what_it_follows(kind: Any, where: str, of: str) -> None:
    module = seeded(lambda: Blocks(where))
    fit(module, kind(0.25, of=of, report=False), Follow(), max_epochs=3)
    shapes = [p.shape for p in module.net.parameters()]
    assert [p.shape for p in module.slow.parameters()] == shapes
    assert shapes != [p.shape for p in Blocks(where).net.parameters()]
    whole = sum(p.numel() for p in Blocks(where).parameters())
    if of == "params":
        assert sum(p.numel() for p in module.parameters()) <= 0.75 * whole


def test_excluded_copies_keep_their_kernels_and_layers() -> None:
    for kind in (KernelShrinking, LayerPruning):
        module = seeded(lambda: Blocks("nowhere"))
        fit(module, kind(0.1, exclude="slow*", report=False), max_epochs=3)
        assert [p.shape for p in module.slow.parameters()] == [p.shape for p in Blocks("").slow.parameters()]
        assert [p.shape for p in module.net.parameters()] != [p.shape for p in module.slow.parameters()]
