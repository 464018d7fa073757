"""Averaged copies of the weights follow what the pruning callbacks do to the weights themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import callbacks
from lightning_modules import (
    LIGHTNING_WARNINGS,
    Spy,
    Task,
    assert_same,
    fit,
    neurons,
    prunable,
    snapshot,
    weights,
    zeros,
)

from lightning_prune.pruning.surgery import take

pytestmark = [
    *LIGHTNING_WARNINGS,
    pytest.mark.filterwarnings("ignore:Swapping scheduler.*"),
    pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*before.*optimizer.step.*"),
]

AVERAGES = [
    pytest.param(
        lambda: callbacks.EMAWeightAveraging(decay=0.9),
        marks=pytest.mark.skipif(not hasattr(callbacks, "EMAWeightAveraging"), reason="newer lightning"),
        id="ema",
    ),
    pytest.param(lambda: callbacks.StochasticWeightAveraging(0.05, swa_epoch_start=1), id="swa"),
]


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("ours_first", [True, False])
def test_zeros_survive_averaging(average: Any, ours_first: bool) -> None:
    module, pruning = Task(), weights(0.5, end=0.5)
    order = [pruning, average()]
    fit(module, *(order if ours_first else reversed(order)), max_epochs=4)
    gone, total = zeros(prunable(module))
    assert gone == round(0.5 * total)
    for name, mask in pruning.masks_.items():
        assert bool((dict(module.named_parameters())[name][~mask] == 0).all())


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("ours_first", [True, False])
def test_averages_shrink_with_the_model(average: Any, ours_first: bool) -> None:
    module, pruning = Task(), neurons(0.5, end=0.5)
    order = [pruning, average()]
    fit(module, *(order if ours_first else reversed(order)), max_epochs=4)
    assert sum(layer.out_features for layer in module.net if hasattr(layer, "out_features")) == 11 + 4
    assert bool(module.net(torch.randn(3, 6)).isfinite().all())


@pytest.mark.skipif(not hasattr(callbacks, "EMAWeightAveraging"), reason="newer lightning")
def test_average_keeps_the_values_of_the_kept_neurons() -> None:
    # An average with decay 1 stays what it was after the first step: the result must be just that, sliced.
    module, pruning, first = Task(), neurons(0.5, end=0.5), {}

    def remember(trainer: Any, pl_module: Any) -> None:
        if trainer.global_step == 1:
            first.update(snapshot(pl_module))

    fit(module, callbacks.EMAWeightAveraging(decay=1.0), Spy(on_train_batch_end=remember), pruning, max_epochs=4)
    expected = {name: take(tensor, pruning.plan_.kept.get(name, {})) for name, tensor in first.items()}
    assert_same(dict(module.state_dict()), expected)
