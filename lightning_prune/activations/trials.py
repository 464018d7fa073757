"""Which activations a model is to have, by what short runs tell; how runs are made is known elsewhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol, TypeVar

from lightning_prune.activations.mixture import Unit
from lightning_prune.errors import PruningError

__all__ = ["Found", "Picks", "Runs", "compare", "import_optuna", "rungs", "sample", "search", "whole_models"]

Picks = tuple[int, ...]
"""The option of each unit; 0 is what the user has."""

T = TypeVar("T")

KEPT = 3
"""One candidate of this many goes on to longer runs, and so many are compared in the longest."""

WHOLE = 2 / 3
"""The part of the steps that compares whole models; the rest is for single places."""

SHORT = 16
"""A try at a single place has at least this part (1 / 16) of the steps of a whole model's run."""


class Runs(Protocol):
    """Short runs from the same weights."""

    def loss(self, picks: Picks, steps: int) -> float:
        """Held-out loss after a run; infinite where it is not finite."""

    def after(self, picks: Picks, steps: int) -> AbstractContextManager[None]:
        """Inside, runs start from where such a run has come to."""


@dataclass(frozen=True)
class Found:
    """What a search ends with.

    Attributes:
        picks: The options to take.
        loss: With them.
        without: With what the user has, after as many steps; None: there was no such run.
    """

    picks: Picks
    loss: float
    without: float | None


def whole_models(units: Sequence[Unit]) -> list[Picks]:
    """The user's own model, and those that have one function at all places; units that lack it keep theirs."""
    kinds = [_kinds(unit) for unit in units]
    names = dict.fromkeys(kind for each in kinds for kind in each)
    return list(dict.fromkeys([(0,) * len(units), *(tuple(each.get(k, 0) for each in kinds) for k in names)]))


def _kinds(unit: Unit) -> dict[tuple[str, int], int]:
    """(name, how many of the name came before) -> place: thresholds differ in value from unit to unit."""
    found: dict[tuple[str, int], int] = {}
    for place, option in enumerate(unit.options):
        if option is not None:
            found[option.name, sum(name == option.name for name, _ in found)] = place
    return found


def rungs(candidates: int, steps: float) -> list[tuple[int, int]]:
    """How many candidates run for how many steps each, rung by rung; each rung may cost twice the one before.

    What the user has is in the last rung whatever it did before, for which there is one place more.
    """
    sizes = [candidates]
    while sizes[-1] > KEPT:
        sizes.append(math.ceil(sizes[-1] / KEPT))
    shares = [2**number for number in range(len(sizes))]
    places = [size + (number > 0 and number == len(sizes) - 1) for number, size in enumerate(sizes)]
    return [
        (size, max(int(steps * share / sum(shares) / among), 1))
        for size, share, among in zip(sizes, shares, places, strict=True)
    ]


def compare(
    candidates: Sequence[T], loss: Callable[[T, int], float], *, steps: int | None, total: float
) -> tuple[list[tuple[float, T]], int]:
    """The best after runs that get longer while candidates get fewer.

    Args:
        candidates: The first one is the user's own, which stays to the end.
        loss: Held-out loss of a candidate after so many steps.
        steps: The length of all runs, of all candidates; None: it follows from ``total``.
        total: Steps of all runs together, if that leaves one for each.

    Returns:
        Losses and candidates of the last runs, best first, and the length of these.

    Source: Jamieson & Talwalkar, 2016, arXiv:1502.07943; Li et al., 2018, arXiv:1603.06560.
    """
    own, *_ = remaining = list(candidates)
    ranked: list[tuple[float, T]] = []
    length = 0
    for size, length in rungs(len(candidates), total) if steps is None else [(len(candidates), steps)]:
        entering = remaining[:size]
        if own not in entering:
            entering.append(own)
        ranked = sorted(((loss(each, length), each) for each in entering), key=lambda pair: pair[0])
        remaining = [each for _, each in ranked]
    return ranked, length


def search(units: Sequence[Unit], runs: Runs, *, steps: int | None, total: float, budget: int | None = None) -> Found:
    """The best whole model, and what is better than it at single places.

    Args:
        units: What has one choice each.
        runs: Makes them.
        steps: The length of all runs; every option is tried at every place then. None: it follows from ``total``.
        total: Steps of all runs together, if that leaves one for each.
        budget: How many units may change at most; None: all.
    """
    if steps is not None:
        return _exhaust(units, runs, steps, budget)
    several = len(units) > 1
    ranked, length = compare(whole_models(units), runs.loss, steps=None, total=total * WHOLE if several else total)
    own = (0,) * len(units)
    without = next(loss for loss, picks in ranked if picks == own)
    loss, best = next((loss, picks) for loss, picks in ranked if _allowed(picks, budget))
    others = [picks for _, picks in ranked if picks != best]
    if several and others:
        changed = _vary(best, others, runs, total * (1 - WHOLE) - length, length, budget)
        # From the start and as long as the others: what is better at once need not be better in the end.
        again = runs.loss(changed, length) if changed != best else loss
        if again < loss:
            loss, best = again, changed
    return Found(best, loss, without)


def _allowed(picks: Picks, budget: int | None) -> bool:
    return budget is None or sum(map(bool, picks)) <= budget


def _exhaust(units: Sequence[Unit], runs: Runs, steps: int, budget: int | None) -> Found:
    """Every option at every place, what is better together, and every whole model."""
    own = (0,) * len(units)
    losses: dict[Picks, float] = {}

    def loss(picks: Picks) -> float:
        if picks not in losses:
            losses[picks] = runs.loss(picks, steps)
        return losses[picks]

    others = [(place,) for place in range(1, max(len(each.options) for each in units))]
    parts = [(unit, [o for o in others if o[0] < len(each.options)]) for unit, each in enumerate(units)]
    _improve(own, parts, loss, budget)
    for picks in whole_models(units):
        if _allowed(picks, budget):
            loss(picks)
    best = min(losses, key=lambda picks: losses[picks])
    return Found(best, losses[best], losses[own])


def _improve(
    best: Picks, parts: Sequence[tuple[int, Sequence[Picks]]], loss: Callable[[Picks], float], budget: int | None
) -> Picks:
    """``best`` with other options in those parts where they help, and help beside those that help more.

    Args:
        best: What is changed.
        parts: The first unit of each, and the options to try there.
        loss: Of a run.
        budget: How many units may change at most; None: all.
    """

    def having(start: int, options: Picks) -> Picks:
        return (*best[:start], *options, *best[start + len(options) :])

    lowest = before = loss(best)
    helping = []
    for start, several in parts:
        tries = [tried for tried in dict.fromkeys(having(start, options) for options in several) if tried != best]
        found = [(loss(tried), start, tried) for tried in tries if _allowed(tried, budget)]
        if found and min(found)[0] < before:
            _, _, tried = min(found)
            helping.append((min(found)[0], start, tried[start : start + len(several[0])]))
    for _, start, options in sorted(helping):
        tried = having(start, options)
        if _allowed(tried, budget) and (found_loss := loss(tried)) < lowest:
            lowest, best = found_loss, tried
    return best


def _vary(best: Picks, others: Sequence[Picks], runs: Runs, steps: float, length: int, budget: int | None) -> Picks:
    """``best`` with what some of ``others`` have at single places, where that helps a model that has learned with it.

    One training for all tries, which are short then; and weights that are used to ``best`` speak for it, so that what
    is better all the same is.

    Args:
        best: The best whole model.
        others: Those that came next.
        runs: Makes them.
        steps: Of all runs together.
        length: Of the runs that found them.
        budget: How many units may change at most; None: all.
    """
    half = steps / 2
    count = min(int(half / max(length / SHORT, 1) / (len(others) + 1)), len(best))
    if count < 1:
        return best
    each = max(int(half / (count * (len(others) + 1))), 1)
    ends = [round(part * len(best) / count) for part in range(count + 1)]
    parts = [(start, [other[start:end] for other in others]) for start, end in pairwise(ends)]
    losses: dict[Picks, float] = {}

    def loss(picks: Picks) -> float:
        if picks not in losses:
            losses[picks] = runs.loss(picks, each)
        return losses[picks]

    with runs.after(best, max(int(half), 1)):
        return _improve(best, parts, loss, budget)


def sample(
    units: Sequence[Unit], runs: Runs, *, steps: int | None, total: float, budget: int | None = None, trials: int = 50
) -> Found:
    """The best of what optuna samples (TPE), whole models first.

    Args:
        units: What has one choice each.
        runs: Makes them.
        steps: The length of all runs; None: it follows from ``total``.
        total: Steps of all runs together.
        budget: How many units may change at most; None: all.
        trials: How many runs.

    Raises:
        PruningError: optuna isn't installed.
    """
    optuna = import_optuna()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    length = max(int(total / trials), 1) if steps is None else steps
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0))
    for picks in whole_models(units)[:trials]:
        study.enqueue_trial({f"{number}": place for number, place in enumerate(picks)})
    losses: dict[Picks, float] = {}

    def objective(trial: Any) -> float:
        places = (trial.suggest_categorical(f"{n}", list(range(len(u.options)))) for n, u in enumerate(units))
        picks = tuple(places)
        if not _allowed(picks, budget):
            return _BAD
        if picks not in losses:
            losses[picks] = runs.loss(picks, length)
        return losses[picks] if math.isfinite(losses[picks]) else _BAD

    study.optimize(objective, n_trials=trials)
    best = min(losses, key=lambda picks: losses[picks])
    return Found(best, losses[best], losses[(0,) * len(units)])


_BAD = 1e30
"""To optuna: an infinite loss would end the study."""


def import_optuna() -> Any:
    """The package, imported only where it is used.

    Raises:
        PruningError: It isn't installed; the message names the extra.
    """
    try:
        import optuna
    except ImportError:
        raise PruningError(
            "strategy='optuna' needs the package optuna: pip install 'lightning-prune[search]'"
        ) from None
    return optuna
