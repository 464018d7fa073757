"""Lightning's learning-rate finder trains aside from training; our callbacks neither act in it nor are disturbed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.tuner import Tuner
from lightning_modules import (
    ADAMW,
    IMAGE,
    LIGHTNING_WARNINGS,
    Residual,
    WithForward,
    assert_same,
    left_hooks,
    optimizer_states,
    quiet,
    seeded,
    snapshot,
    trainer_of,
)
from torch import nn

from lightning_prune import ActivationSearch, KernelShrinking, LayerPruning, NeuronPruning, WeightPruning

pytestmark = LIGHTNING_WARNINGS

EPOCHS, STEPS = 4, 12


class Net(Residual):
    """Has a layer that can go."""

    def __init__(self) -> None:
        super().__init__()
        self.norm0 = nn.Sequential(self.norm0, nn.Conv2d(8, 8, 3, padding=1))


class Learner(WithForward):
    """Images and batch norm; the finder looks for ``lr``."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(Net(), shape=IMAGE, optimizer=lambda params: ADAMW(params, lr=self.lr), **kwargs)
        self.lr = 0.01


def finder(**options: Any) -> LearningRateFinder:
    # No early stop: the loss of so few steps is noise.
    return LearningRateFinder(num_training_steps=STEPS, early_stop_threshold=None, update_attr=False, **options)


OURS: dict[str, Callable[[], list[Callback]]] = {
    "none": list,
    "neurons": lambda: [quiet(NeuronPruning, 0.5, end=0.75)],
    "neurons of examples": lambda: [quiet(NeuronPruning, 0.5, end=0.75, example_inputs=torch.zeros(1, *IMAGE))],
    "neurons by gradients": lambda: [quiet(NeuronPruning, 0.5, end=0.75, criterion="taylor")],
    "neurons by activation": lambda: [quiet(NeuronPruning, 0.5, end=0.75, criterion="activation")],
    "neurons at the end": lambda: [quiet(NeuronPruning, 0.5, end=0.75, remove="end")],
    "neurons, recalibrated": lambda: [quiet(NeuronPruning, 0.5, end=0.75, recalibrate=3)],
    "neurons, compensated": lambda: [quiet(NeuronPruning, 0.5, end=0.75, compensate="least_squares")],
    "weights": lambda: [quiet(WeightPruning, 0.5)],
    "weights by gradients": lambda: [quiet(WeightPruning, 0.5, criterion="snip")],
    "weights by inputs": lambda: [quiet(WeightPruning, 0.5, criterion="wanda")],
    "weights, regrown": lambda: [quiet(WeightPruning, 0.5, regrow="rigl")],
    "weights, rewound": lambda: [quiet(WeightPruning, 0.5, rewind_to=1, start=1)],
    "kernels": lambda: [quiet(KernelShrinking, 0.3)],
    "layers": lambda: [quiet(LayerPruning, 0.2)],
    "activations": lambda: [quiet(ActivationSearch, ("relu", "tanh"), search_until=0.75)],
    "activations, no validation": lambda: [quiet(ActivationSearch, ("relu", "tanh"), search_until=0.75, held_out=0)],
    "activations, trial": lambda: [quiet(ActivationSearch, ("relu", "tanh"), mode="trial", trial_steps=2)],
    "neurons and weights": lambda: [quiet(NeuronPruning, 0.5, end=0.5), quiet(WeightPruning, 0.5)],
}


def outcome(module: Learner, trainer: Any, ours: list[Any]) -> Any:
    """Everything that a run leaves behind."""
    return snapshot(module), optimizer_states(trainer), [callback.state_dict() for callback in ours]


def run(name: str, folder: Path, place: Callable[[list[Callback]], list[Callback]], tune: bool = False) -> Any:
    """Train two modules in turn with some of our callbacks, the first beside others that ``place`` puts there."""
    ours, outcomes = OURS[name](), []
    for seed, around in ((0, place), (1, list)):
        module = seeded(Learner, seed)
        trainer = trainer_of(*around(ours), max_epochs=EPOCHS, default_root_dir=folder)
        if tune and seed == 0:
            found = Tuner(trainer).lr_find(module, num_training=STEPS, early_stop_threshold=None, update_attr=False)
            assert len(found.results["loss"]) == STEPS
        torch.manual_seed(seed)
        trainer.fit(module)
        for callback in trainer.callbacks:
            if isinstance(callback, LearningRateFinder):
                assert callback.optimal_lr is not None
                assert len(callback.optimal_lr.results["loss"]) == STEPS
        assert left_hooks(trainer, module) == []
        outcomes.append(outcome(module, trainer, ours))
    return outcomes


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """What the runs without the finder leave behind."""
    folder = tmp_path_factory.mktemp("plain")
    return functools.cache(lambda name: run(name, folder, list))


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("how", ["callback", "tuner"])
def test_a_run_with_the_finder_is_the_run_without(name: str, how: str, tmp_path: Path, undisturbed: Any) -> None:
    # Lightning moves the finder in front of all other callbacks.
    found = run(name, tmp_path, (lambda ours: [*ours, finder()]) if how == "callback" else list, tune=how == "tuner")
    assert_same(found, undisturbed(name))


@pytest.mark.parametrize("name", [name for name in OURS if name != "none"])
def test_the_runs_that_are_compared_do_prune(name: str, undisturbed: Any) -> None:
    for _, _, (state, *_) in undisturbed(name):
        changed = state.get("plan", {}).get("kept") or state.get("plan", {}).get("removed") or state.get("masks")
        assert changed or state["history"], name
