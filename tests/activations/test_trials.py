"""Searching by short runs: what is chosen, what it costs, and that a good start alone does not win."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from lightning_prune.activations.candidates import DEFAULT_CHOICES, Choice
from lightning_prune.activations.mixture import Unit
from lightning_prune.activations.trials import KEPT, Picks, compare, rungs, search, whole_models

NAMES = ("gelu", "tanh", "sine")


def units(count: int, names: tuple[str, ...] = NAMES) -> list[Unit]:
    return [Unit(f"u{n}", (f"u{n}",), (None, *map(Choice, names))) for n in range(count)]


class Made:
    """Runs whose losses are known: ``of(picks, steps, steps of the run that they start from)``."""

    def __init__(self, of: Callable[[Picks, int, int], float]) -> None:
        self.of = of
        self.steps = 0
        self.seen: list[tuple[Picks, int, int]] = []
        self.before = 0

    def loss(self, picks: Picks, steps: int) -> float:
        self.seen.append((picks, steps, self.before))
        self.steps += steps
        return self.of(picks, steps, self.before)

    @contextmanager
    def after(self, picks: Picks, steps: int) -> Iterator[None]:
        self.steps += steps
        self.before = steps
        yield
        self.before = 0


@pytest.mark.parametrize("count", [1, 2, 3, 4, 9, 10, 27, 100])
def test_runs_get_longer_as_candidates_get_fewer_within_the_budget(count: int) -> None:
    found = rungs(count, 10_000)
    sizes, lengths = zip(*found, strict=True)
    assert sizes[0] == count
    assert sizes[-1] <= KEPT
    assert list(sizes) == sorted(set(sizes), reverse=True)
    assert list(lengths) == sorted(set(lengths))
    own = len(found) > 1  # one more place in the last rung
    assert sum(size * length for size, length in found) + own * lengths[-1] <= 10_000


def test_whole_models_have_one_function_at_all_places() -> None:
    own = [
        Unit("relu", ("a",), (None, Choice("gelu"), *(Choice("thresholded_relu", (("threshold", t),)) for t in (1, 2)))),
        Unit("gelu", ("b",), (None, Choice("relu"))),
    ]  # fmt: skip
    # What a unit has itself is no option of it; thresholds go by their number.
    assert whole_models(own) == [(0, 0), (1, 0), (2, 0), (3, 0), (0, 1)]


def test_what_learns_fast_at_first_does_not_win() -> None:
    def loss(each: int, steps: int) -> float:
        return 2 / (1 + steps) if each == 4 else 1 / (1 + steps) + each / 100 - 0.5 * (each == 7) * (steps > 200)

    ranked, length = compare(range(9), loss, steps=None, total=9_000)
    assert ranked[0][1] != 4
    assert 0 in [each for _, each in ranked]
    assert length > 1_000
    late, _ = compare(range(9), loss, steps=None, total=90)  # no run is long enough to see it
    assert late[0][1] != 7


def test_the_own_model_is_compared_however_it_starts() -> None:
    ranked, _ = compare(range(9), lambda each, steps: 10.0 - each if each else 99.0, steps=None, total=900)
    assert [each for _, each in ranked] == [8, 7, 6, 0]


@pytest.mark.parametrize("count", [1, 2, 4, 17, 120])
@pytest.mark.parametrize("total", [50, 5_000, 500_000])
def test_a_search_costs_what_it_may(count: int, total: int) -> None:
    runs = Made(lambda picks, steps, before: 1.0 + sum(picks) / 1000)
    found = search(units(count, DEFAULT_CHOICES), runs, steps=None, total=total)
    assert not any(found.picks)
    assert runs.steps <= max(total, len(runs.seen))
    if total == 500_000:
        assert runs.steps > 0.6 * total
    if total > 50 and 1 < count < 120:
        assert any(before for _, _, before in runs.seen)


def planted(picks: Picks, steps: int, before: int) -> float:
    """Sine is right in the second of three places; throughout, tanh is."""
    return 1.0 - 0.1 * sum(place == 2 for place in picks) - 0.3 * (picks[1] == 3) + 1 / (1 + steps + before)


def test_the_best_model_gets_what_is_better_at_single_places() -> None:
    runs = Made(planted)
    found = search(units(3), runs, steps=None, total=3_000)
    assert found.picks == (2, 3, 2)
    assert found.loss < found.without
    assert runs.steps <= 3_000
    *_, (last, length, before) = runs.seen
    assert (last, before) == ((2, 3, 2), 0)  # it was tried from the start, as long as the others
    assert length == max(steps for _, steps, _ in runs.seen)


def test_what_helps_a_trained_model_only_is_not_taken() -> None:
    def loss(picks: Picks, steps: int, before: int) -> float:
        return planted(picks, steps, before) + (1.0 if len(set(picks)) > 1 and not before else 0.0)

    assert search(units(3), Made(loss), steps=None, total=3_000).picks == (2, 2, 2)


def test_changes_that_help_alone_but_not_together_are_not_all_taken() -> None:
    def loss(picks: Picks, steps: int, before: int) -> float:
        both = picks[0] == 3 and picks[1] == 3
        each = 0.2 * (picks[0] == 3) + 0.3 * (picks[1] == 3)
        return 1.0 - 0.2 * (picks == (2, 2, 2)) - (0.0 if both else each) - 0.05 * (picks == (3, 3, 3))

    assert search(units(3), Made(loss), steps=None, total=3_000).picks in {(0, 3, 0), (2, 3, 2)}


@pytest.mark.parametrize("steps", [None, 10])
@pytest.mark.parametrize("budget", [1, 2])
def test_no_more_change_than_may(steps: int | None, budget: int) -> None:
    found = search(units(3), Made(planted), steps=steps, total=3_000, budget=budget)
    assert sum(map(bool, found.picks)) <= budget
    assert found.picks[1] == 3


def test_with_a_given_length_every_option_is_tried_at_every_place() -> None:
    runs = Made(planted)
    found = search(units(3), runs, steps=10, total=0)
    assert found.picks == (2, 3, 2)
    assert {steps for _, steps, _ in runs.seen} == {10}
    assert len(runs.seen) == len(set(runs.seen)) == 1 + 3 * 3 + 2 + 3  # and the two that help together, each throughout
