"""Labels: one integer per index of every dimension, and what is known about which of them go together.

Nothing here knows an operation; rules call `unify`, `freeze` and `mix`, `solve` draws the conclusion.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["FIXED", "Dims", "LabelBook", "Solution", "no_labels"]

FIXED = 0
"""The label of an index that no pruning can remove."""

Dims = tuple[Tensor | None, ...]
"""One entry per dimension of a tensor: its labels (int64, one per index), or None where none may go."""


def no_labels(tensor: Tensor) -> Dims:
    """The labels of a tensor about which nothing is known: every dimension keeps its size."""
    return (None,) * tensor.dim()


@dataclass(frozen=True)
class Solution:
    """Labels drawn together: ``root[label]`` names the component, the rest say what holds for a component."""

    root: Tensor
    frozen: dict[int, str]
    mixed: dict[int, tuple[str, ...]]


@dataclass
class LabelBook:
    """Allocates labels and collects the facts about them during one trace."""

    count: int = 1  # label 0 is FIXED
    equal: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    frozen: list[tuple[Tensor, str]] = field(default_factory=list)
    mixed: list[tuple[Tensor, str]] = field(default_factory=list)
    made: list[Tensor] = field(default_factory=list)
    filled: set[int] = field(default_factory=set)

    def new(self, size: int) -> Tensor:
        """Allocate ``size`` fresh labels in a row."""
        labels = torch.arange(self.count, self.count + size)
        self.count += size
        return labels

    def unify(self, first: Tensor | None, second: Tensor | None, reason: str) -> Tensor | None:
        """State that two dimensions share their indices; labels that meet a dimension without any are frozen.

        Args:
            first: Labels of one dimension, or None.
            second: Labels of the other, of the same size, or None.
            reason: What froze the labels where only one side has any.

        Returns:
            The labels of the common dimension, or None.
        """
        if first is None or second is None:
            self.freeze(first, reason)
            self.freeze(second, reason)
            return None
        if first is not second:
            self.equal.append((first, second))
        return first

    def freeze(self, labels: Tensor | None, reason: str) -> None:
        """State that these indices must stay. An empty reason marks a place that never holds neurons."""
        if labels is not None:
            self.frozen.append((labels, reason))

    def mix(self, labels: Tensor | None, reason: str) -> None:
        """State that an operation reads these indices together, so that masking one changes the others."""
        if labels is not None:
            self.mixed.append((labels, reason))

    def fill(self, labels: Tensor | None) -> Tensor | None:
        """The same indices, where an operation leaves other values than zero in masked places (``sigmoid``).

        They go together with those that came in, but have labels of their own: a sum over them isn't the same
        sum without them.
        """
        if labels is None or self.is_filled(labels):
            return labels
        known, places = labels.unique(return_inverse=True)
        fresh = self.new(len(known))
        self.filled.update(fresh.tolist())
        fresh = torch.where(labels == FIXED, FIXED, fresh[places])
        return self.unify(fresh, labels, "")

    def is_filled(self, labels: Tensor) -> bool:
        """Whether masked places may hold other values than zero."""
        return not self.filled.isdisjoint(labels.tolist())

    def produce(self, labels: Tensor | None) -> None:
        """State that a contraction makes these indices: they are a layer's neurons, not its inputs."""
        if labels is not None:
            self.made.append(labels)

    def solve(self) -> Solution:
        """Draw connected labels together (vectorised hooking and pointer jumping, cost near linear)."""
        root = torch.arange(self.count)
        if self.equal:
            first = torch.cat([pair[0] for pair in self.equal])
            second = torch.cat([pair[1] for pair in self.equal])
            while True:
                a, b = root[first], root[second]
                if bool((a == b).all()):
                    break
                least = torch.minimum(a, b)
                root.scatter_reduce_(0, a, least, "amin")
                root.scatter_reduce_(0, b, least, "amin")
                while not torch.equal(root, root[root]):
                    root = root[root]
        frozen: dict[int, str] = {int(root[FIXED]): "constant"}
        for labels, reason in self.frozen:
            for component in root[labels].unique().tolist():
                if not frozen.get(component):  # a real reason outranks the empty one
                    frozen[component] = reason
        mixed: dict[int, tuple[str, ...]] = {}
        for labels, reason in self.mixed:
            for component in root[labels].unique().tolist():
                known = mixed.get(component, ())
                mixed[component] = known if reason in known else (*known, reason)
        return Solution(root, frozen, mixed)
