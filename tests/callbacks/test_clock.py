"""When pruning happens: schedules placed in trainings of every length, and the order of Lightning's hooks."""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping
from lightning_modules import (
    LIGHTNING_WARNINGS,
    Spy,
    Task,
    TwoOptimizers,
    fit,
    neurons,
    prunable,
    seeded,
    weights,
    zeros,
)

from lightning_prune import NoEffectWarning, PruningError
from lightning_prune.callbacks._clock import Clock

pytestmark = LIGHTNING_WARNINGS


def trainer(max_epochs: int = -1, max_steps: int = -1, batches: float = 10, accumulate: int = 1) -> Any:
    return SimpleNamespace(
        max_epochs=max_epochs, max_steps=max_steps, num_training_batches=batches, accumulate_grad_batches=accumulate
    )


@pytest.mark.parametrize(
    ("of", "start", "end", "epochs", "steps", "progress"),
    [
        (trainer(8), 0.0, 0.5, 2, 20, 0.5),  # two of the four epochs of the window
        (trainer(8), 0.25, 0.75, 2, 20, 0.0),
        (trainer(8), 0.25, 0.75, 5, 50, 0.75),
        (trainer(8), 2, 4, 3, 30, 0.5),
        (trainer(8), 2, 0.5, 3, 30, 0.5),  # int start, float end
        (trainer(8), 0.25, 4, 3.5, 35, 0.75),  # float start, int end, mid-epoch
        (trainer(8), 0, 8, 9, 90, 1.0),  # never past the end
        (trainer(8), 4, 8, 1, 10, 0.0),  # never before the start
        (trainer(-1, 40), 0.0, 0.5, 1, 10, 0.5),
        (trainer(-1, 40), 1, 3, 2, 20, 0.5),  # epochs become steps: 10 a piece
        (trainer(-1, 12, accumulate=3), 1, 3, 1.5, 8, 0.5),  # ceil(10 / 3) = 4 steps a piece
        (trainer(4, 20), 0.0, 1.0, 1, 10, 0.5),  # max_steps ends it first
        (trainer(2, 1000), 0.0, 1.0, 1, 10, 0.5),  # max_epochs does
        (trainer(), 2, 6, 3, 30, 0.25),  # no end at all: epochs
        (trainer(4, batches=float("inf")), 0.0, 1.0, 1, 10, 0.25),
        (trainer(4, batches=float("inf")), 1, 3, 2, 20, 0.5),
        (trainer(-1, 40, batches=float("inf")), 0.0, 0.5, 0, 10, 0.5),
    ],
)
def test_progress_is_worked_out_by_hand(
    of: Any, start: float, end: float, epochs: float, steps: int, progress: float
) -> None:
    assert Clock.of(of, start, end).progress(epochs, steps) == pytest.approx(progress, abs=1e-12)


@pytest.mark.parametrize(
    ("of", "start", "end", "words"),
    [
        (trainer(), 0.0, 0.75, ["end=0.75", "max_epochs=-1", "give start and end as epochs"]),
        (trainer(), 0.5, 4, ["start=0.5", "no end"]),
        (trainer(4), 0, 5, ["end=5", "max_epochs=4", "never be reached"]),
        (trainer(-1, 40), 0, 5, ["end=5", "max_steps=40"]),
        (trainer(4), 3, 0.5, ["start=3", "end=0.5"]),
        (trainer(-1, 40, batches=float("inf")), 0, 5, ["end=5", "no length", "fractions"]),
    ],
)
def test_a_window_outside_training_is_refused(of: Any, start: float, end: float, words: list[str]) -> None:
    with pytest.raises(PruningError) as caught:
        Clock.of(of, start, end)
    assert all(word in str(caught.value) for word in words)


CUBIC, LINEAR, ONE_SHOT = [37 / 64, 7 / 8, 63 / 64, 1], [0.25, 0.5, 0.75, 1], [1, 1, 1, 1]
"""What is gone of the amount after each quarter of the window, by hand: 1 - (3/4)**3 = 37/64 and so on."""


@pytest.mark.parametrize(("schedule", "curve"), [("cubic", CUBIC), ("linear", LINEAR), ("one_shot", ONE_SHOT)])
@pytest.mark.parametrize(
    ("window", "expected"),
    [
        ((0.0, 1.0), [0.25, 0.5, 0.75, 1]),
        ((0, 4), [0.25, 0.5, 0.75, 1]),
        ((0.0, 0.5), [0.5, 1, 1, 1]),
        ((0.5, 1.0), [0, 0, 0.5, 1]),
        ((2, 4), [0, 0, 0.5, 1]),
        ((1, 3), [0, 0.5, 1, 1]),
    ],
)
def test_every_epoch_ends_at_the_schedules_amount(
    schedule: str, curve: list[float], window: tuple[float, float], expected: list[float]
) -> None:
    at = {0: 0.0, **dict(zip([0.25, 0.5, 0.75, 1], curve, strict=True))}
    seen: list[int] = []
    spy = Spy(on_validation_start=lambda _, module: seen.append(zeros(prunable(module))[0]))
    module = seeded(Task)
    pruning = weights(0.8, schedule=schedule, start=window[0], end=window[1])
    fit(module, pruning, spy, max_epochs=4)
    total = zeros(prunable(module))[1]
    assert seen == [round(0.8 * at[quarter] * total) for quarter in expected]


class Order(Callback):
    """Writes down, at every hook, whether the weights have changed since the hook before."""

    HOOKS = [
        "on_train_epoch_start",
        "on_train_batch_start",
        "on_before_backward",
        "on_after_backward",
        "on_before_optimizer_step",
        "on_before_zero_grad",
        "on_train_batch_end",
        "on_validation_start",
        "on_validation_end",
        "on_train_epoch_end",
    ]

    def __init__(self) -> None:
        self.events: list[tuple[str, int, int]] = []
        for hook in self.HOOKS:
            setattr(self, hook, self._listener(hook))

    def _listener(self, hook: str) -> Any:
        def listen(trainer: Any, module: Any, *args: Any) -> None:
            total = sum(p.numel() for p in module.parameters())
            gone = total - sum(int((p != 0).sum()) for p in module.parameters() if p.dim() > 1)
            self.events.append((hook, total, gone))

        return listen


@pytest.mark.parametrize("cls", [weights, neurons])
@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 3}], ids=["plain", "accumulate"])
def test_pruning_comes_after_the_last_batch_and_before_validation(cls: Any, options: dict[str, Any]) -> None:
    before, after = Order(), Order()
    # The spies stand around the callback, so a change between them within one hook was made by it.
    pruning = cls(0.5, end=1.0, schedule="linear")
    fit(seeded(lambda: Task(batches=4)), before, pruning, after, max_epochs=3, **options)
    assert [e[0] for e in before.events] == [e[0] for e in after.events]
    acted = [i for i, (a, b) in enumerate(zip(before.events, after.events, strict=True)) if a != b]
    ends = [i for i, event in enumerate(after.events) if event[0] == "on_validation_start"]
    assert acted == [i - 1 for i in ends], "each pruning stands right before its validation"
    assert all(after.events[i][0] == "on_train_batch_end" for i in acted)
    for i in range(1, len(after.events)):  # and between two hooks nothing is pruned either, nothing comes back
        assert before.events[i][1:] == after.events[i - 1][1:]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_every_n_steps_prunes_between_a_step_and_the_next_backward(accumulate: int) -> None:
    gone: list[int] = []
    spy = Spy(on_train_batch_end=lambda _, module: gone.append(zeros(prunable(module))[0]))
    module = seeded(lambda: Task(batches=8))
    pruning = weights(0.5, schedule="linear", end=1.0, every=2)
    fit(module, pruning, spy, max_epochs=1, accumulate_grad_batches=accumulate)
    total = zeros(prunable(module))[1]
    period = 2 * accumulate
    expected = [round(0.5 * (batch - batch % period) / 8 * total) for batch in range(1, 9)]
    assert gone == expected


def test_every_n_steps_counts_the_steps_of_all_optimizers() -> None:
    """Two optimizers make two steps a batch: multiples of 3 are passed, not always hit."""
    gone: list[int] = []
    spy = Spy(on_train_batch_end=lambda _, module: gone.append(zeros(prunable(module))[0]))
    module = seeded(lambda: TwoOptimizers(batches=6))
    fit(module, weights(0.5, schedule="linear", end=1.0, every=3), spy, max_epochs=1)
    total = zeros(prunable(module))[1]
    fraction = [0, 2, 3, 3, 5, 6]  # steps 2 4 6 8 10 12: due where 3, 6, 9, 12 has been reached since
    assert gone == [round(0.5 * sixth / 6 * total) for sixth in fraction]


@pytest.mark.parametrize("cls", [weights, neurons])
@pytest.mark.parametrize("stop", ["early stopping", "should_stop", "max_time"])
def test_a_schedule_that_training_cuts_off_warns(cls: Any, stop: str) -> None:
    def halt(trainer: Any, module: Any) -> None:
        trainer.should_stop = True

    pruning = cls(0.5, start=2, end=4)
    extra: list[Callback] = []
    options: dict[str, Any] = {"max_epochs": 4}
    if stop == "early stopping":
        extra = [EarlyStopping("val_loss", stopping_threshold=1e9)]
    elif stop == "should_stop":
        extra = [Spy(on_train_epoch_end=halt)]
    else:
        options = {"max_time": {"seconds": 0}, "max_epochs": -1}
    module = seeded(Task)
    with pytest.warns(NoEffectWarning, match=r"training ended before the schedule.*end=4.*amount=0\.5"):
        fit(module, pruning, *extra, **options)
    assert zeros(prunable(module))[0] == 0
    assert pruning.amount_ == 0


@pytest.mark.parametrize("cls", [weights, neurons])
def test_an_amount_that_rounds_to_nothing_warns(cls: Any) -> None:
    with pytest.warns(NoEffectWarning, match=r"amount=0\.001"):
        fit(seeded(Task), cls(0.001))


def test_a_schedule_that_finishes_is_silent() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", NoEffectWarning)
        fit(seeded(Task), weights(0.5, end=2), max_epochs=3)


@pytest.mark.parametrize(
    "make", [lambda: weights(0.5, end=2), lambda: neurons(0.5, start=1, end=2)], ids=["weights", "neurons"]
)
def test_int_epochs_work_where_training_has_no_end(make: Any) -> None:
    def halt(trainer: Any, module: Any) -> None:
        trainer.should_stop = trainer.current_epoch == 2

    pruning = make()
    fit(seeded(Task), pruning, Spy(on_train_epoch_end=halt), max_epochs=-1)
    assert pruning.amount_ == 0.5


@pytest.mark.parametrize("cls", [weights, neurons])
def test_constructor_arguments_never_change(cls: Any) -> None:
    pruning = cls(0.5, end=1)
    names = [name for name in vars(pruning) if not name.startswith("_") and not name.endswith("_")]
    before = {name: getattr(pruning, name) for name in names}
    fit(seeded(Task), pruning, max_epochs=2)
    assert before == {name: getattr(pruning, name) for name in names}
    assert len(names) > 9
