"""Budgets of structure: how much of a model's parameters or MACs is gone, and how much must go."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lightning_prune.errors import PruningError
from lightning_prune.graph.observe import Use
from lightning_prune.pruning.select import matching

__all__ = ["COSTS", "Budget", "add_copies", "among", "listed"]

COSTS = ("params", "macs")
"""What kernels and layers can be a fraction of."""


@dataclass(frozen=True)
class Budget:
    """The dense whole that an amount is a fraction of, and what is left of it.

    Attributes:
        of: ``"params"`` or ``"macs"``.
        whole: What there was before any pruning.
        now: What there is.
    """

    of: str
    whole: float
    now: float

    @property
    def gone(self) -> float:
        """The fraction of the whole that is gone already, whoever removed it."""
        return 1 - self.now / self.whole if self.whole else 0.0

    def within(self, amount: float, can_go: float) -> float:
        """How much more must go, or what can if that is less."""
        return min(self.needed(amount), can_go * (1 - 1e-9))

    def needed(self, amount: float) -> float:
        """How much more must go until ``amount`` of the whole is gone; zero or less: nothing."""
        return self.now - self.whole * (1 - amount) * (1 + 1e-9)

    def check(self, amount: float, can_go: float, what: str, reasons: Mapping[str, str]) -> None:
        """Check that an amount can be reached if so much can go.

        Raises:
            PruningError: It can't; the message says what can, and why the rest stays.
        """
        if self.needed(amount) <= can_go:
            return
        reachable = 1 - (self.now - can_go) / self.whole if self.whole else 0.0
        raise PruningError(
            f"amount={amount:g} of the {self.of} can't be reached: with {what} "
            f"{math.floor(max(reachable, 0.0) * 1e4) / 1e4:g} is gone{listed(reasons)}"
        )


def add_copies(costs: dict[str, float], copies: Mapping[str, str], uses: Mapping[str, Use], of: str) -> None:
    """Add to what each costs, in parameters or MACs, what the copies cost that go with it."""
    own = dict(costs)
    for copy, path in copies.items():
        if path in own:
            costs[path] += own[path] if of == "params" else uses[copy].macs if copy in uses else 0.0


def listed(reasons: Mapping[str, str]) -> str:
    """What stays and why, as the end of a message."""
    if not reasons:
        return ""
    lines = [f"  {name}: {reason}" for name, reason in list(reasons.items())[:20]]
    more = [f"  … and {len(reasons) - 20} more"] if len(reasons) > 20 else []
    return "\n".join(["; what stays:", *lines, *more])


def among(
    names: Sequence[str], include: Sequence[str] | None, exclude: Sequence[str] | None, *, strict: bool
) -> set[str]:
    """The names that the patterns choose; unless ``strict``, one may match nothing, for what it named may be gone.

    Raises:
        PruningError: ``strict``, and a pattern matches nothing.
    """

    def hits(pattern: str) -> bool:
        try:
            return bool(matching(names, [pattern], None))
        except PruningError:
            return False

    if not strict:
        if not names:
            return set()
        include = None if include is None else list(filter(hits, include))
        exclude = None if exclude is None else list(filter(hits, exclude))
    return matching(names, include, exclude)
