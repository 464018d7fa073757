"""Schedules: which part of the final amount is to be gone by now. Pure functions of progress."""

from __future__ import annotations

from collections.abc import Callable

from lightning_prune.errors import PruningError

__all__ = ["SCHEDULES", "Schedule", "get_schedule"]

Schedule = Callable[[float], float]
"""Maps progress from the schedule's start (0) to its end (1) to the part of the amount that is gone (0 to 1)."""


def cubic(progress: float) -> float:
    """Fast first, then ever slower: most weights go while the network can still recover.

    Source: Zhu & Gupta, 2017, "To prune, or not to prune", arXiv:1710.01878.
    """
    return 1.0 - (1.0 - progress) ** 3


def linear(progress: float) -> float:
    """The same share at each step."""
    return progress


def one_shot(progress: float) -> float:
    """All at the first step after the start."""
    return 1.0 if progress > 0 else 0.0


SCHEDULES: dict[str, Schedule] = {"cubic": cubic, "linear": linear, "one_shot": one_shot}


def get_schedule(name: str) -> Schedule:
    """Look a schedule up.

    Raises:
        PruningError: No schedule has this name; the message lists those that exist.
    """
    if name not in SCHEDULES:
        raise PruningError(f"unknown schedule {name!r}; choose from {', '.join(sorted(SCHEDULES))}")
    return SCHEDULES[name]
