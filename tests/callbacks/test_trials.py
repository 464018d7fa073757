"""Short runs are the training in small: its batches, its accumulation, its clipping, its learning rates; no trace."""

from __future__ import annotations

import contextlib
import copy
import functools
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from lightning_modules import ADAMW, IMAGE, LIGHTNING_WARNINGS, SGD, Residual, Spy, Task, assert_same, fit, seeded
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from lightning_prune import create_lr_scheduler
from lightning_prune.callbacks._trials import Rates, ShortRuns, fetch
from lightning_prune.schedulers import SCHEDULERS

pytestmark = [*LIGHTNING_WARNINGS, pytest.mark.filterwarnings("ignore:A `OneCycleLR` scheduler is using")]

STEPS = 8
OPTIONS: dict[str, dict[str, Any]] = {
    "exponential": {"gamma": 0.7}, "step": {"step_size": 2}, "multistep": {"milestones": [1, 3]},
    "cosine": {"T_max": STEPS}, "polynomial": {"total_iters": STEPS}, "one_cycle": {"max_lr": 0.3, "total_steps": STEPS},
    "constant": {},
}  # fmt: skip


class Scheduled(Task):
    """Two epochs of four steps, with a schedule by name."""

    def __init__(self, name: str, interval: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.name, self.interval = name, interval

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer(self.parameters())
        options = OPTIONS[self.name] | ({} if self.name == "one_cycle" else {"warmup": 2})
        return {
            "optimizer": optimizer,
            "lr_scheduler": create_lr_scheduler(optimizer, self.name, interval=self.interval, **options),
        }


def settings(trainer: Any) -> list[Any]:
    return [{k: v for k, v in group.items() if k != "params"} for group in trainer.optimizers[0].param_groups]


@pytest.mark.parametrize("interval", ["step", "epoch"])
@pytest.mark.parametrize("name", sorted(set(SCHEDULERS) - {"plateau"}))
def test_learning_rates_are_foretold(name: str, interval: str) -> None:
    foretold: list[Rates] = []
    rates: list[Any] = []

    def foretell(trainer: Any, module: Any) -> None:
        before = copy.deepcopy((settings(trainer), trainer.lr_scheduler_configs[0].scheduler.state_dict()))
        foretold.append(Rates(trainer, module, STEPS, STEPS // 2))
        assert_same((settings(trainer), trainer.lr_scheduler_configs[0].scheduler.state_dict()), before)

    spy = Spy(on_train_start=foretell, on_train_batch_start=lambda t, _: rates.append(copy.deepcopy(settings(t))))
    trainer = fit(Scheduled(name, interval), spy, max_epochs=2)
    assert len(rates) == STEPS
    assert len({each[0]["lr"] for each in rates}) > 1 or name == "constant"
    for step, each in enumerate(rates):
        foretold[0].set(trainer.optimizers[0], step / STEPS)
        assert_same(settings(trainer), each)


@pytest.mark.parametrize("optimizer", [SGD, ADAMW], ids=["SGD", "AdamW"])
def test_a_short_run_is_the_training(optimizer: Any) -> None:
    """As long as all of it, it ends where the training does."""
    found: list[float] = []

    def run(trainer: Any, module: Any) -> None:
        runs = ShortRuns(
            trainer, module, trainer.fit_loop._combined_loader.flattened[0], batches, Rates(trainer, module, STEPS, 4)
        )
        found.append(runs.loss(contextlib.nullcontext, STEPS))
        assert runs.steps == STEPS

    @torch.no_grad()
    def loss(module: Any) -> float:
        module.eval()
        return float(torch.stack([F.cross_entropy(module.logits(x), y) for x, y in batches]).mean())

    module = seeded(lambda: Scheduled("cosine", "step", net=Residual(), shape=IMAGE, optimizer=optimizer, batches=8))
    batches = list(module.val_dataloader())
    start = copy.deepcopy(module)
    options = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.2, "max_epochs": 2}
    fit(module, Spy(on_train_start=run), **options)
    assert abs(found[0] - loss(module)) < 1e-6
    for other in ({"accumulate_grad_batches": 2}, {"gradient_clip_val": 0.2}):  # both were of consequence
        again = copy.deepcopy(start)
        fit(again, **({"max_epochs": 2, "max_steps": STEPS} | other))
        assert abs(found[0] - loss(again)) > 1e-4


def test_runs_may_go_on_from_another() -> None:
    def run(trainer: Any, module: Any) -> None:
        before = copy.deepcopy(module.state_dict())
        runs = ShortRuns(trainer, module, list(module.train_dataloader())[:1], list(module.val_dataloader()))
        plain = contextlib.nullcontext
        whole = runs.loss(plain, 5)
        with runs.after(plain, 3):
            assert runs.loss(plain, 2) == whole  # one batch again and again: five steps are three and two
            assert runs.loss(plain, 0) != whole
        assert_same(dict(module.state_dict()), dict(before))
        assert runs.loss(plain, 5) == whole

    fit(seeded(lambda: Task(Residual(), shape=IMAGE)), Spy(on_train_start=run), max_epochs=1)


class Noisy(Dataset[Any]):
    """Draws from Python's random state."""

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> Any:
        return torch.tensor([float(index), random.random()])


def loaders() -> dict[str, Any]:
    alone = {"batch_size": 4, "shuffle": True}
    return {
        "shuffled": functools.partial(DataLoader, Noisy(), **alone),
        "own generator": lambda: DataLoader(Noisy(), generator=torch.Generator().manual_seed(3), **alone),
        "workers that stay": functools.partial(DataLoader, Noisy(), num_workers=1, persistent_workers=True, **alone),
    }


@pytest.mark.parametrize("name", loaders())
def test_reading_a_loader_changes_nothing_for_the_training_that_reads_it(name: str) -> None:
    def epoch(disturb: bool) -> Iterator[Any]:
        loader = loaders()[name]()
        for _ in range(2):
            for number, batch in enumerate(loader):
                if disturb and number in (0, 3):
                    first, second = fetch(loader, 2, torch.nn.ReLU()), fetch(loader, 2, torch.nn.ReLU())
                    assert_same([b[:, 0] for b in first], [b[:, 0] for b in second])
                yield batch

    ends = []
    for disturb in (False, True):
        torch.manual_seed(0)
        random.seed(0)
        ends.append([*epoch(disturb), torch.rand(1), random.random()])
    assert_same(*ends)
