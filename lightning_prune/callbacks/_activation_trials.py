"""Short runs of a module with other activations, as a search among them asks for them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from lightning_prune.activations.candidates import Choice
from lightning_prune.activations.mixture import Mixture
from lightning_prune.activations.trials import Picks
from lightning_prune.callbacks._trials import ShortRuns

__all__ = ["Trials"]


class Trials:
    """Makes the runs that `lightning_prune.activations.trials` asks for, and keeps account of them.

    Attributes:
        history: Choices, steps and loss of each run, and the steps of the run that it started from (0: from none).
    """

    def __init__(
        self, short: ShortRuns, mixture: Mixture, having: Callable[[Mapping[str, Choice]], AbstractContextManager[None]]
    ) -> None:
        """``having``: gives a context in which the model has these choices."""
        self.short, self.mixture, self.having = short, mixture, having
        self.history: list[dict[str, Any]] = []
        self._after = 0
        self._finite: dict[tuple[int, int], bool] = {}

    def loss(self, picks: Picks, steps: int) -> float:
        """Held-out loss after a run; infinite where it is not finite."""
        choices = self.mixture.choices(picks)
        found = self.short.loss(partial(self.having, choices), steps)
        told = {name: str(choice) for name, choice in choices.items()}
        self.history.append({"choices": told, "steps": steps, "after": self._after, "loss": found})
        for place in enumerate(picks):
            self._finite[place] = self._finite.get(place, False) or math.isfinite(found)
        return found

    @contextmanager
    def after(self, picks: Picks, steps: int) -> Iterator[None]:
        """Inside, runs start from where such a run has come to."""
        with self.short.after(partial(self.having, self.mixture.choices(picks)), steps):
            self._after = steps
            try:
                yield
            finally:
                self._after = 0

    def warn(self) -> None:
        """Name what never gave a finite loss."""
        for unit, place in sorted(place for place, well in self._finite.items() if place[1] and not well):
            rank_zero_warn(
                f"ActivationSearch: {self.mixture.units[unit].labels()[place]} gave a loss that is not finite at "
                f"{self.mixture.units[unit].name} and is dropped there"
            )
