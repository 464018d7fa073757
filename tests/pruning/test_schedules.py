"""Schedules: laws of the curves, the formulas of their papers, and what `preview` promises."""

import itertools
import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_prune import PruningError, WeightPruning
from lightning_prune.pruning.schedules import SCHEDULES, get_schedule

NAMES = sorted(SCHEDULES)
amounts = st.floats(0, 1, exclude_max=True)


@pytest.mark.parametrize("name", NAMES)
@given(amount=amounts, points=st.lists(st.floats(0, 1), min_size=2, max_size=20))
def test_a_schedule_rises_from_nothing_to_all(name: str, amount: float, points: list[float]) -> None:
    part = get_schedule(name, amount)
    values = [part(progress) for progress in (0.0, *sorted(points), 1.0)]
    assert values[0] == pytest.approx(0, abs=1e-12)
    assert all(a <= b + 1e-12 for a, b in itertools.pairwise(values))
    assert values[0] >= 0
    if amount > 1e-3 or name != "exponential":
        assert values[-1] == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("name", list(NAMES))
def test_a_schedule_ends_at_exactly_all(name: str) -> None:
    """Else the callback takes it that training ended before the schedule did."""
    assert {a: get_schedule(name, a)(1.0) for a in (0.1, 0.2, 0.3, 0.9, 1e-10)} == dict.fromkeys(
        (0.1, 0.2, 0.3, 0.9, 1e-10), 1.0
    )


@given(amounts, st.floats(0, 1))
def test_formulas(amount: float, t: float) -> None:
    """Zhu & Gupta's polynomial from 0, Hubens' logistic curve with its start taken off."""
    assert get_schedule("linear", amount)(t) == t
    assert get_schedule("one_shot", amount)(t) == (t > 0)
    assert amount * get_schedule("cubic", amount)(t) == pytest.approx(amount + (0 - amount) * (1 - t) ** 3, abs=1e-12)
    hubens = [(1 + math.exp(-14 + 5)) / (1 + math.exp(-14 * x + 5)) for x in (0, t, 1)]
    shifted = (hubens[1] - hubens[0]) / (hubens[2] - hubens[0])
    assert get_schedule("one_cycle", amount)(t) == pytest.approx(shifted, abs=1e-12)


@given(st.floats(0.01, 0.999), st.integers(1, 30))
def test_exponential_takes_the_same_fraction_of_what_is_left_each_time(amount: float, steps: int) -> None:
    part = get_schedule("exponential", amount)
    left = [1 - amount * part(step / steps) for step in range(steps + 1)]
    fractions = [1 - b / a for a, b in itertools.pairwise(left)]
    assert fractions == pytest.approx([fractions[0]] * steps, abs=1e-9)
    assert left[-1] == pytest.approx(1 - amount)


@pytest.mark.parametrize(
    "value", [-0.1, 1.1, 2, -1, float("nan"), float("inf"), None, "0.5", True, False, torch.tensor(0.5), 0.5j, [0.5]]
)
def test_a_function_that_gives_something_else_is_an_error(value: Any) -> None:
    part = get_schedule(lambda progress: value, 0.5)
    with pytest.raises(PruningError, match=re.escape("at progress 0.25; it must give the part of the amount")):
        part(0.25)
    with pytest.raises(PruningError, match="at progress"):
        WeightPruning(0.5, schedule=lambda progress: value).preview(4)


@pytest.mark.parametrize("value", [0, 1, 0.3, np.float64(0.3)])
def test_a_function_gives_any_number_from_0_to_1(value: Any) -> None:
    found = get_schedule(lambda progress: value, 0.5)(0.7)
    assert found == value
    assert type(found) is float


@pytest.mark.parametrize("schedule", ["", "step", None, 3, ["linear"]])
def test_an_unknown_schedule_lists_those_that_exist(schedule: Any) -> None:
    with pytest.raises(PruningError, match="choose from cubic, exponential, linear, one_cycle, one_shot"):
        WeightPruning(0.5, schedule=schedule)


# preview


@pytest.mark.parametrize("name", NAMES)
@given(
    amount=st.floats(1e-6, 1, exclude_max=True),
    epochs=st.integers(1, 40),
    start=st.floats(0, 0.99),
    width=st.floats(0.01, 1),
)
def test_preview_is_the_curve_at_the_ends_of_epochs(
    name: str, amount: float, epochs: int, start: float, width: float
) -> None:
    end = min(start + width, 1.0)
    found = WeightPruning(amount, schedule=name, start=start, end=end).preview(epochs)
    assert len(found) == epochs
    part = SCHEDULES[name](amount)
    for epoch, value in enumerate(found, 1):
        progress = min(max((epoch / epochs - start) / (end - start), 0), 1)
        assert value == pytest.approx(amount * part(progress), abs=1e-9)
    assert found == sorted(found)
    assert found[-1] == pytest.approx(amount)
    assert found[-1] == amount or name == "exponential"


@pytest.mark.parametrize(
    ("window", "expected"),
    [
        ({"start": 0, "end": 4}, [0.2, 0.4, 0.6, 0.8, 0.8, 0.8, 0.8, 0.8]),
        ({"start": 2, "end": 4}, [0, 0, 0.4, 0.8, 0.8, 0.8, 0.8, 0.8]),
        ({"start": 0, "end": 8}, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]),
        ({"start": 0.0, "end": 1.0}, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]),
        ({"start": 0.5, "end": 1.0}, [0, 0, 0, 0, 0.2, 0.4, 0.6, 0.8]),
        ({"start": 4, "end": 1.0}, [0, 0, 0, 0, 0.2, 0.4, 0.6, 0.8]),
        ({"start": 0.25, "end": 4}, [0, 0, 0.4, 0.8, 0.8, 0.8, 0.8, 0.8]),
        ({}, [0.8 * e / 6 for e in range(1, 7)] + [0.8, 0.8]),
    ],
)
def test_windows_of_epochs_and_of_fractions(window: dict[str, Any], expected: list[float]) -> None:
    assert WeightPruning(0.8, schedule="linear", **window).preview(8) == pytest.approx(expected)


def test_preview_never_takes_back_and_knows_half_schedules() -> None:
    wave = lambda progress: 0.5 if progress < 0.5 else 0.2  # noqa: E731
    assert WeightPruning(0.8, schedule=wave, end=1.0).preview(4) == pytest.approx([0.4] * 4)
    assert WeightPruning(0.0).preview(3) == [0, 0, 0]
    assert WeightPruning(0.3, schedule="one_shot", start=2, end=3).preview(4) == [0, 0, 0.3, 0.3]


@pytest.mark.parametrize("epochs", [0, -1, 2.0, True, None, "3"])
def test_preview_wants_a_number_of_epochs(epochs: Any) -> None:
    with pytest.raises(PruningError, match="whole number of at least 1"):
        WeightPruning(0.5).preview(epochs)


@pytest.mark.parametrize(
    ("window", "epochs", "message"),
    [
        ({"start": 0, "end": 9}, 8, "after the end of training"),
        ({"start": 4, "end": 0.5}, 8, "start must be before end"),
        ({"start": 0.5, "end": 3}, 4, "after|before"),
        ({"start": 8, "end": 1.0}, 8, "start must be before end"),
    ],
)
def test_preview_refuses_a_window_outside_the_training(window: dict[str, Any], epochs: int, message: str) -> None:
    callback = WeightPruning(0.5, **window)
    if (window, epochs) == ({"start": 0.5, "end": 3}, 4):
        assert callback.preview(epochs)[-1] == 0.5
        epochs = 6
    with pytest.raises(PruningError, match=message):
        callback.preview(epochs)
