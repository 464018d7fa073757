"""NeuronPruning where the training step calls the parts of a model by itself: what only a loss reads keeps its width."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning_modules import LIGHTNING_WARNINGS, Task, fit, seeded
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_prune import NeuronPruning

pytestmark = LIGHTNING_WARNINGS

Loss = Callable[[Any, Tensor], Tensor]


class Given(Task):
    """A training step that calls the parts of the model by itself."""

    def __init__(self, loss: Loss) -> None:
        super().__init__(nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 8)))
        self.teacher = copy.deepcopy(self.net).requires_grad_(False)
        self.head = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8))
        self.table = nn.Parameter(torch.rand(8, 5))
        self.loss, self.criterion, self.dropout = loss, nn.MSELoss(), nn.Dropout(0.1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(self, batch[0])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.net(batch[0]).square().mean())


def contrast(module: Any, x: Tensor) -> Tensor:
    z = F.normalize(module.net(x), dim=1)
    return F.cross_entropy(z @ z.T, torch.arange(len(x)))


def probed_last(module: Any, x: Tensor) -> Tensor:
    z = module.net(x)
    with torch.no_grad():
        target = module.teacher(x)
    return F.mse_loss(z, target) + module.head(z).square().mean()


BY_LOSS: dict[str, Loss] = {
    "mse": lambda m, x: F.mse_loss(m.net(x), m.teacher(x)),
    "module": lambda m, x: m.criterion(m.net(x), m.teacher(x)),
    "module_behind_dropout": lambda m, x: m.criterion(m.dropout(m.net(x)), m.teacher(x)),
    "smooth_l1": lambda m, x: F.smooth_l1_loss(m.net(x), m.teacher(x)),
    "square": lambda m, x: (m.net(x) - m.teacher(x)).square().mean(),
    "cosine": lambda m, x: 1 - F.cosine_similarity(m.net(x), m.teacher(x)).mean(),
    "divergence": lambda m, x: F.kl_div(m.net(x).log_softmax(1), m.teacher(x).softmax(1), reduction="batchmean"),
    "contrast": contrast,
    "probed_first": lambda m, x: m.head(m.net(x)).square().mean() + F.mse_loss(m.net(x), m.teacher(x)),
    "probed_last": probed_last,
    "predicted": lambda m, x: F.mse_loss(m.head(m.net(x)), m.teacher(x)),
}


@pytest.mark.parametrize("name", BY_LOSS)
def test_what_only_the_loss_reads_keeps_its_width(name: str) -> None:
    module = seeded(lambda: Given(BY_LOSS[name]))
    pruning = NeuronPruning(0.5, scope="layer", report=False)
    fit(module, pruning, max_epochs=2)
    assert (module.net[0].out_features, module.net[2].out_features) == (8, 8)
    assert module.teacher[2].out_features == module.head[2].out_features == 8
    assert "is read by the training step, and by no layer from there" in pruning.plan_.frozen.values()


def unused(module: Any, x: Tensor) -> Tensor:
    """What comes out last is read by nobody, not even by the loss."""
    loss, z = torch.zeros(()), module.net(x)
    for _ in range(2):
        loss = loss + module.head(z).square().mean()
        z = module.net(x).tanh() + z
    return loss


def logged(module: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        module.last = module.net(x).norm()
    return module.head(module.net(x)).square().mean()  # type: ignore[no-any-return]


READ_ON: dict[str, Loss] = {
    "unused": unused,
    "logged": logged,
    "layer": lambda m, x: m.head(m.net(x)).square().mean(),
    "dropout": lambda m, x: m.head(m.dropout(m.net(x))).square().mean(),
    "flattened": lambda m, x: m.head(m.net(x).unsqueeze(-1).flatten(1)).square().mean(),
    "chunks": lambda m, x: m.head(torch.cat([each.tanh() for each in m.net(x).chunk(2, 1)], 1)).square().mean(),
    "parameter": lambda m, x: (m.net(x) @ m.table).square().mean(),
    "function": lambda m, x: F.linear(m.net(x), m.table.T).square().mean(),
}


@pytest.mark.parametrize("name", READ_ON)
def test_what_the_training_step_hands_on_to_a_layer_shrinks(name: str) -> None:
    module = seeded(lambda: Given(READ_ON[name]))
    fit(module, NeuronPruning(0.5, scope="layer", report=False), max_epochs=2)
    assert (module.net[0].out_features, module.net[2].out_features) == (8, 4)
    assert len(module.table) == (4 if name in ("parameter", "function") else 8)
    assert module.head[2].out_features == 8
