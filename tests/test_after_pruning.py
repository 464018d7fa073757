"""Learning rates that start anew, or warm up again, after a pruning."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_modules import (
    LIGHTNING_WARNINGS,
    Manual,
    Spy,
    Task,
    assert_same,
    fit,
    neurons,
    seeded,
    snapshot,
    weights,
)
from torch import nn

from lightning_prune import PruningError, create_lr_scheduler, plot_lr, preview_lr

pytestmark = LIGHTNING_WARNINGS

OPTIONS: dict[str, dict[str, Any]] = {
    "exponential": {"gamma": 0.8},
    "step": {"step_size": 2, "gamma": 0.5},
    "multistep": {"milestones": [1, 3]},
    "cosine": {"T_max": 12},
    "polynomial": {"total_iters": 12},
    "plateau": {"patience": 1, "factor": 0.5},
    "one_cycle": {"total_steps": 14},
    "constant": {},
}


def optimizer(**options: Any) -> Any:
    made: Any = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1, momentum=0.9)
    return made


def curve(name: str, events: dict[int, bool], after: str | None, warmup: int, steps: int = 10) -> list[float]:
    """Rates of each interval; events happen after an interval, before the scheduler's step (True) or after it."""
    sgd = optimizer()
    monitor = "loss" if name == "plateau" else None
    scheduler: Any = create_lr_scheduler(
        sgd, name, warmup=warmup, monitor=monitor, after_pruning=after, **OPTIONS[name]
    )["scheduler"]
    rates = []
    for interval in range(steps):
        rates.append(float(sgd.param_groups[0]["lr"]))
        sgd.step()
        if events.get(interval) is True:
            scheduler.pruned(before_step=True)
        scheduler.step(0.0) if name == "plateau" else scheduler.step()
        if events.get(interval) is False:
            scheduler.pruned(before_step=False)
    return rates


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("warmup", [0, 2])
def test_restart_begins_the_whole_curve_again(name: str, before: bool, warmup: int) -> None:
    plain = curve(name, {}, None, warmup)
    assert curve(name, {3: before, 6: before}, "restart", warmup) == pytest.approx(plain[:4] + plain[:3] + plain[:3])


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("before", [True, False])
def test_rewarm_climbs_to_the_curve_again(name: str, before: bool) -> None:
    plain = curve(name, {}, None, 3)
    factors = [1, 1, 1, 1, 1, 0.25, 0.5, 0.25, 0.5, 0.75]
    expected = [rate * factor for rate, factor in zip(plain, factors, strict=True)]
    assert curve(name, {4: before, 6: before}, "rewarm", 3) == pytest.approx(expected)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("after", ["restart", "rewarm"])
def test_without_a_pruning_nothing_changes(name: str, after: str) -> None:
    assert curve(name, {}, after, 2) == curve(name, {}, None, 2)


@pytest.mark.parametrize("name", ["cosine", "one_cycle", "step"])
@pytest.mark.parametrize("after", ["restart", "rewarm"])
def test_the_state_is_all_there_is(name: str, after: str) -> None:
    def make() -> Any:
        sgd = optimizer()
        return sgd, create_lr_scheduler(sgd, name, warmup=3, after_pruning=after, **OPTIONS[name])["scheduler"]

    (first, one), (second, two) = make(), make()
    for interval in range(9):
        first.step()
        if interval == 3:
            one.pruned(before_step=True)
        if interval in (3, 5):  # pending, and in the middle of the climb
            second.load_state_dict(copy.deepcopy(first.state_dict()))
            two.load_state_dict(copy.deepcopy(one.state_dict()))
        one.step()
        if interval >= 3:
            second.step()
            two.step()
            assert first.param_groups[0]["lr"] == second.param_groups[0]["lr"]


@pytest.mark.parametrize("interval", ["epoch", "step"])
@pytest.mark.parametrize("make", [Task, Manual])
def test_callbacks_tell_the_scheduler(interval: str, make: Any, tmp_path: Any) -> None:
    class Scheduled(make):  # type: ignore[misc]
        def configure_optimizers(self) -> Any:
            sgd = torch.optim.SGD(self.parameters(), lr=0.1)
            options = {"gamma": 0.5, "interval": interval, "after_pruning": "restart"}
            return {"optimizer": sgd, "lr_scheduler": create_lr_scheduler(sgd, "exponential", **options)}

    rates: list[float] = []
    note = Spy(on_train_batch_start=lambda t, _: rates.append(float(t.optimizers[0].param_groups[0]["lr"])))
    module = seeded(Scheduled)
    fit(module, note, neurons(0.5, schedule="one_shot", start=1, end=2), max_epochs=4)
    if make is Manual:  # steps its schedulers itself, or not at all
        assert rates == [0.1] * 16
    elif interval == "epoch":
        assert rates == [0.1] * 4 + [0.05] * 4 + [0.1] * 4 + [0.05] * 4
    else:
        falling = [0.1 * 0.5**k for k in range(8)]
        assert rates == pytest.approx(falling + falling)


def test_a_schedule_that_watches_a_metric_starts_anew_too() -> None:
    class Scheduled(Task):
        def configure_optimizers(self) -> Any:
            sgd = torch.optim.SGD(self.parameters(), lr=0.1)
            options = {"patience": 0, "factor": 0.5, "threshold": 10.0, "monitor": "val_loss", "mode": "max"}
            config = create_lr_scheduler(sgd, "plateau", after_pruning="restart", **options)
            return {"optimizer": sgd, "lr_scheduler": config}

    rates: list[float] = []
    note = Spy(on_train_epoch_start=lambda t, _: rates.append(float(t.optimizers[0].param_groups[0]["lr"])))
    fit(seeded(Scheduled), note, neurons(0.5, schedule="one_shot", start=2, end=3), max_epochs=6)
    # The metric never rises enough: half the rate after each epoch but the first; the pruning ends the third.
    assert rates == [0.1, 0.1, 0.05, 0.1, 0.1, 0.05]


def test_a_resumed_run_has_the_same_rates(tmp_path: Any) -> None:
    class Scheduled(Task):
        def configure_optimizers(self) -> Any:
            sgd = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
            options = {"T_max": 3, "warmup": 2, "after_pruning": "rewarm"}
            return {"optimizer": sgd, "lr_scheduler": create_lr_scheduler(sgd, "cosine", **options)}

    def callbacks() -> list[Any]:
        return [neurons(0.4, end=1.0), weights(0.3, end=1.0)]

    whole = seeded(Scheduled)
    fit(whole, *callbacks(), ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1), max_epochs=5)
    resumed = seeded(Scheduled, 3)
    fit(resumed, *callbacks(), ckpt_path=tmp_path / "epoch=2.ckpt", max_epochs=5)
    assert_same(snapshot(resumed), snapshot(whole))


def test_bad_requests() -> None:
    with pytest.raises(PruningError, match=r"Unknown after_pruning 'again'. Allowed: restart, rewarm, None"):
        create_lr_scheduler(optimizer(), "constant", after_pruning="again")
    with pytest.raises(PruningError, match="warmup must be 1 or more"):
        create_lr_scheduler(optimizer(), "constant", after_pruning="rewarm")


def test_plot(tmp_path: Any) -> None:
    figure = plot_lr("cosine", lr=0.1, steps=12, warmup=2, T_max=10, path=tmp_path / "lr.png")
    (line,) = figure.axes[0].lines
    assert line.get_ydata().tolist() == preview_lr("cosine", lr=0.1, steps=12, warmup=2, T_max=10)
    assert (tmp_path / "lr.png").stat().st_size > 1000
