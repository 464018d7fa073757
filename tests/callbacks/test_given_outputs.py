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
        self.loss = loss

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(self, batch[0])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.net(batch[0]).square().mean())


def contrast(module: Any, x: Tensor) -> Tensor:
    z = F.normalize(module.net(x), dim=1)
    return F.cross_entropy(z @ z.T, torch.arange(len(x)))


BY_LOSS: dict[str, Loss] = {
    "mse": lambda m, x: F.mse_loss(m.net(x), m.teacher(x)),
    "smooth_l1": lambda m, x: F.smooth_l1_loss(m.net(x), m.teacher(x)),
    "square": lambda m, x: (m.net(x) - m.teacher(x)).square().mean(),
    "cosine": lambda m, x: 1 - F.cosine_similarity(m.net(x), m.teacher(x)).mean(),
    "divergence": lambda m, x: F.kl_div(m.net(x).log_softmax(1), m.teacher(x).softmax(1), reduction="batchmean"),
    "contrast": contrast,
    "predicted": lambda m, x: F.mse_loss(m.head(m.net(x)), m.teacher(x)),
}


@pytest.mark.parametrize("name", BY_LOSS)
def test_what_only_the_loss_reads_keeps_its_width(name: str) -> None:
    module = seeded(lambda: Given(BY_LOSS[name]))
    pruning = NeuronPruning(0.5, scope="layer", report=False)
    fit(module, pruning, max_epochs=2)
    assert (module.net[0].out_features, module.net[2].out_features) == (8, 8)
    assert module.teacher[2].out_features == module.head[2].out_features == 8
    assert "is given to the training step, and to no layer from there" in pruning.plan_.frozen.values()


READ_ON: dict[str, Loss] = {
    "layer": lambda m, x: m.head(m.net(x)).square().mean(),
    "flattened": lambda m, x: m.head(m.net(x).unsqueeze(-1).flatten(1)).square().mean(),
    "parameter": lambda m, x: (m.net(x) @ m.table).square().mean(),
    "function": lambda m, x: F.linear(m.net(x), m.table.T).square().mean(),
}


@pytest.mark.parametrize("name", READ_ON)
def test_what_the_training_step_hands_on_to_a_layer_shrinks(name: str) -> None:
    module = seeded(lambda: Given(READ_ON[name]))
    fit(module, NeuronPruning(0.5, scope="layer", report=False), max_epochs=2)
    assert (module.net[0].out_features, module.net[2].out_features) == (8, 4)
    assert len(module.table) == (8 if name in ("layer", "flattened") else 4)
    assert module.head[2].out_features == 8
