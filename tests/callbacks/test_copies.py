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

from lightning_prune import NeuronPruning

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
