"""Schedules: which part of the final amount is to be gone by now. Pure functions of progress."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from lightning_prune.errors import PruningError

__all__ = ["SCHEDULES", "Schedule", "get_schedule"]

Schedule = Callable[[float], float]
"""Maps progress from the schedule's start (0) to its end (1) to the part of the amount that is gone (0 to 1)."""


def cubic(amount: float) -> Schedule:
    """Fast first, then ever slower: most weights go while the network can still recover.

    Source: Zhu & Gupta, 2017, "To prune, or not to prune", arXiv:1710.01878.
    """
    return lambda progress: 1.0 - (1.0 - progress) ** 3


def linear(amount: float) -> Schedule:
    """The same share at each step.

    Source: Qureshi et al., 2026, "Finding sparse subnetworks in one training cycle", arXiv:2606.12278.
    """
    return lambda progress: progress


def one_shot(amount: float) -> Schedule:
    """All at the first step after the start."""
    return lambda progress: 1.0 if progress > 0 else 0.0


def exponential(amount: float) -> Schedule:
    """At each step the same fraction of what is left.

    Source: Han et al., 2015, arXiv:1506.02626, and Frankle & Carbin, 2019, arXiv:1803.03635 (iterative pruning).
    """
    if amount == 0:
        return linear(amount)
    rate = math.log1p(-amount)
    return lambda progress: 1.0 if progress == 1 else -math.expm1(progress * rate) / amount


def one_cycle(amount: float) -> Schedule:
    """Slow, then fast, then slow: a logistic curve, meant to span the whole of one training.

    Source: Hubens et al., 2021, "One-cycle pruning", arXiv:2107.02086, with its constants 14 and 5; shifted so that
    it starts at exactly nothing.
    """
    at_start = _logistic(0.0)
    return lambda progress: (_logistic(progress) - at_start) / (1.0 - at_start)


def _logistic(progress: float) -> float:
    return (1.0 + math.exp(-14.0 + 5.0)) / (1.0 + math.exp(-14.0 * progress + 5.0))


SCHEDULES: dict[str, Callable[[float], Schedule]] = {
    "cubic": cubic,
    "exponential": exponential,
    "linear": linear,
    "one_cycle": one_cycle,
    "one_shot": one_shot,
}


def get_schedule(schedule: str | Schedule, amount: float) -> Schedule:
    """Look a schedule up, or check each value of one of the user's own.

    Raises:
        PruningError: No schedule has this name; the message lists those that exist. When it is called: the user's
            own gives something else than a number from 0 to 1.
    """
    if callable(schedule):
        return _checked(schedule)
    if not isinstance(schedule, str) or schedule not in SCHEDULES:
        raise PruningError(f"unknown schedule {schedule!r}; choose from {', '.join(sorted(SCHEDULES))}, or a function")
    return SCHEDULES[schedule](amount)


def _checked(schedule: Callable[[float], Any]) -> Schedule:
    def part(progress: float) -> float:
        value = schedule(progress)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            raise PruningError(
                f"the schedule gave {value!r} at progress {progress:.3g}; it must give the part of the amount that "
                "is gone, a number from 0 to 1"
            )
        return float(value)

    return part
