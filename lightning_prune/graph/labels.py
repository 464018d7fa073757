"""Labels: one integer per index of every dimension, and what is known about which of them go together.

Nothing here knows an operation; rules state facts (`unify`, `split`, `freeze`, `mix`, …), `solve` draws the conclusion.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from math import prod

import torch
from torch import Tensor

__all__ = ["CALCULATES", "FIXED", "Box", "Dims", "LabelBook", "Solution", "distinct", "no_labels"]

FIXED = 0
"""The label of an index that no pruning can remove."""

CALCULATES = "calculates with its size in "
"""Starts the reason of what mixes neurons by their number alone; where it happens follows."""

Dims = tuple[Tensor | None, ...]
"""One entry per dimension of a tensor: its labels (int64, one per index), or None where none may go."""


def no_labels(tensor: Tensor) -> Dims:
    """The labels of a tensor about which nothing is known: every dimension keeps its size."""
    return (None,) * tensor.dim()


def distinct(labels: Tensor) -> tuple[Tensor, Tensor]:
    """The distinct labels, ascending, and which of them each one is; many labels mostly lie close together."""
    low, high = (int(each) for each in labels.aminmax()) if labels.numel() > 4096 else (0, 0)
    if not 0 < high - low < 8 * labels.numel():
        known, places = labels.unique(return_inverse=True)
        return known, places
    places = labels - low
    there = torch.zeros(high - low + 1, dtype=torch.bool)
    there[places] = True
    return there.nonzero().squeeze(1) + low, (there.cumsum(0) - 1)[places]


@dataclass(frozen=True)
class Box:
    """A dimension that is several at once, such as heads times head size: whole rows of it go, or whole columns.

    Attributes:
        cells: Labels of the one dimension, laid out with one axis per part.
        axes: Labels of each part.
        where: The call that splits or merges.
    """

    cells: Tensor
    axes: tuple[Tensor, ...]
    where: str


@dataclass(frozen=True)
class Solution:
    """Labels drawn together: ``root[label]`` names the component, the rest say what holds for a component.

    Attributes:
        root: Shape (labels,): the least label of each one's component.
        reason: Shape (labels,): for a root, 1 + the number of the reason that froze it, or 0.
        reasons: The reasons; an empty one marks a place that never holds neurons.
        mixed: Reason -> roots of the components that an operation reads together.
        chosen: Which axis of each box can go, or None.
    """

    root: Tensor
    reason: Tensor
    reasons: tuple[str, ...]
    mixed: dict[str, Tensor]
    chosen: tuple[int | None, ...]

    def axes_within(self, boxes: Sequence[Box], roots: Tensor) -> list[Tensor]:
        """The chosen axes of boxes all of whose indices belong to some of these components."""
        pairs = ((box.axes, choice) for box, choice in zip(boxes, self.chosen, strict=True))
        axes = [axes[choice] for axes, choice in pairs if choice is not None and len(axes) > 1]
        return [axis for axis in axes if bool(torch.isin(self.root[axis], roots).all())]


@dataclass
class LabelBook:
    """Allocates labels and collects the facts about them during one trace."""

    count: int = 1  # label 0 is FIXED
    equal: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    frozen: list[tuple[Tensor, str]] = field(default_factory=list)
    mixed: list[tuple[Tensor, str]] = field(default_factory=list)
    made: list[Tensor] = field(default_factory=list)
    boxes: list[Box] = field(default_factory=list)
    avoided: list[Tensor] = field(default_factory=list)
    _merged: dict[int, Box] = field(default_factory=dict)
    _filled: Tensor = field(default_factory=lambda: torch.zeros(1024, dtype=torch.bool))
    _any_filled: bool = False

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

    def tie(self, *rows: Tensor) -> None:
        """State that the i-th indices of all rows go together."""
        for row in rows[1:]:
            self.equal.append((rows[0], row))

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
        known, places = distinct(labels)
        fresh = self.new(len(known))
        self._mark_filled(fresh)
        fresh = torch.where(labels == FIXED, FIXED, fresh[places])
        return self.unify(fresh, labels, "")

    def _mark_filled(self, labels: Tensor) -> None:
        self._reach()
        self._filled[labels] = True
        self._any_filled = True

    def _reach(self) -> None:
        """Have a place for every label."""
        if self.count > len(self._filled):
            grown = torch.zeros(2 * self.count, dtype=torch.bool)
            grown[: len(self._filled)] = self._filled
            self._filled = grown

    def is_filled(self, *labels: Tensor) -> bool:
        """Whether masked places of any of these may hold other values than zero."""
        if not self._any_filled:
            return False
        self._reach()
        return any(bool(self._filled[each].any()) for each in labels)

    def split(self, cells: Tensor, where: str) -> tuple[Tensor, ...]:
        """State that a dimension falls apart into several; the labels of each.

        Args:
            cells: Labels of the dimension, laid out with one axis per part. Equal slices along an axis (a batch
                that was folded into the heads, say) get equal labels.
            where: The call, for messages.
        """
        axes = []
        repeated = len(distinct(cells)[0]) < cells.numel()
        for axis in range(cells.dim()):
            if repeated:
                _, kind = cells.unique(dim=axis, return_inverse=True)
                axes.append(self.new(int(kind.max()) + 1)[kind])
            else:
                axes.append(self.new(cells.size(axis)))
        if self.is_filled(cells):
            self._mark_filled(torch.cat(axes))
        self.boxes.append(Box(cells, tuple(axes), where))
        return tuple(axes)

    def merge(self, axes: Sequence[Tensor], where: str) -> Tensor:
        """State that several dimensions become one; its labels, laid out with one axis per part."""
        sizes = [len(axis) for axis in axes]
        cells = self.new(prod(sizes)).view(sizes)
        if self.is_filled(*axes):
            self._mark_filled(cells.flatten())
        parts = tuple(part for axis in axes for part in self._merged_into(axis))
        box = Box(cells.view([len(part) for part in parts]), parts, where)
        self.boxes.append(box)
        self._merged[int(cells.view(-1)[0])] = box
        return cells

    def _merged_into(self, labels: Tensor) -> tuple[Tensor, ...]:
        """The parts that were merged into this dimension; itself where none were."""
        box = self._merged.get(int(labels[0]))
        return box.axes if box is not None and torch.equal(box.cells.flatten(), labels) else (labels,)

    def produce(self, labels: Tensor | None) -> None:
        """State that a layer makes these indices: they are its neurons, not its inputs."""
        if labels is not None:
            self.made.append(labels)

    def solve(self) -> Solution:
        """Draw connected labels together, after choosing for every box which of its parts can go.

        A choice under which all that it lets go hangs together is of no use: then the box chooses anew.
        """
        base = _components(self.count, self.equal)
        stay, mix = self._among(labels for labels, _ in self.frozen), self._among(labels for labels, _ in self.mixed)
        useless = list(self.avoided)
        while True:
            chosen, others = self._choose(base, useless, stay, mix)
            equal, frozen = self._facts_of(base, chosen)
            root = _components(self.count, equal, base) if equal else base
            idle = self._idle(root, chosen, others, stay)
            if not idle:
                break
            useless += idle
        facts = sorted(
            [(torch.tensor([FIXED]), "constant"), *self.frozen, *frozen], key=lambda fact: not fact[1]
        )  # the first real reason wins
        reasons = {text: number for number, text in enumerate(dict.fromkeys(text for _, text in facts), start=1)}
        lengths = torch.tensor([labels.numel() for labels, _ in facts])
        ranks = torch.arange(len(facts)).repeat_interleave(lengths)
        roots = root[torch.cat([labels.flatten() for labels, _ in facts])]
        first = torch.full((self.count,), len(facts)).scatter_reduce_(0, roots, ranks, "amin")
        reason = torch.tensor([*(reasons[text] for _, text in facts), 0])[first]
        mixed: dict[str, list[Tensor]] = {}
        for labels, text in self.mixed:
            mixed.setdefault(text, []).append(labels.flatten())
        return Solution(
            root,
            reason,
            tuple(reasons),
            {text: root[torch.cat(parts)].unique() for text, parts in mixed.items()},
            tuple(chosen),
        )

    def _among(self, parts: Iterable[Tensor]) -> Tensor:
        """The labels that are in any of these, each once."""
        found = torch.zeros(self.count, dtype=torch.bool)
        for labels in parts:
            found[labels] = True
        return found.nonzero().squeeze(1)

    def _choose(
        self, root: Tensor, useless: Sequence[Tensor], stay: Tensor, mix: Tensor
    ) -> tuple[list[int | None], list[bool]]:
        """For every box the axis whose indices can go, and whether another could.

        ``stay`` and ``mix`` are labels that do.

        Axes that share labels (the heads of queries, keys and values) are one choice for all boxes, and so are those of
        boxes with the same cells (what was merged is split again). An axis that nothing mixes is preferred, then the
        outer one: heads before head size, whose removal would change the scale of attention.
        """
        if not self.boxes:
            return [], []
        stuck = torch.zeros(self.count, dtype=torch.bool)
        stuck[root[stay]] = True
        stuck[root[FIXED]] = True
        edges = []
        for box in self.boxes:  # all labels of an axis belong to one choice, by way of an edge to its first
            edges += [(root[axis], root[axis[:1]].expand_as(axis)) for axis in box.axes]
        edges += [(root[one[:1]], root[other[:1]]) for one, other in self._alike(root)]
        choice = _components(self.count, edges)
        ends = torch.tensor([int(axis[0]) for box in self.boxes for axis in box.axes])
        numbers = iter(choice[root[ends]].tolist())
        parts = [[next(numbers) for _ in box.axes] for box in self.boxes]
        blocked = {
            part
            for box, own in zip(self.boxes, parts, strict=True)
            for axis, part in zip(box.axes, own, strict=True)
            if bool(stuck[root[axis]].all()) or bool((root[axis] == root[axis[0]]).all()) or own.count(part) > 1
        }
        blocked.update(choice[root[labels[0]]].item() for labels in useless)
        boxes_of: dict[int, list[int]] = {}
        for number, own in enumerate(parts):
            for part in set(own):
                boxes_of.setdefault(part, []).append(number)
        mixed = torch.zeros(self.count, dtype=torch.bool)
        mixed[root[mix]] = True
        axes = (axis for box in self.boxes for axis in box.axes if bool(mixed[root[axis]].any()))
        mixing = {choice[root[axis[0]]].item() for axis in axes}
        first: dict[int, int] = {}  # part -> where it lies in the first box that has it
        for own in parts:
            for place, part in enumerate(own):
                first.setdefault(part, place)
        hopeless = set(blocked)
        taken: set[int] = set()
        for part in sorted(first, key=lambda part: (part in mixing, first[part])):
            if part not in blocked:
                taken.add(part)
                for other in boxes_of[part]:  # a part beside a chosen one stays
                    blocked.update(each for each in parts[other] if each != part)
        others = [any(part not in hopeless and part not in taken for part in own) for own in parts]
        return [next((axis for axis, part in enumerate(own) if part in taken), None) for own in parts], others

    def _alike(self, root: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """The axes, in pairs, of boxes that lay out the same cells alike."""
        seen: dict[tuple[tuple[int, ...], bytes], Box] = {}
        for box in self.boxes:
            key = (tuple(box.cells.shape), root[box.cells].numpy().tobytes())
            first = seen.setdefault(key, box)
            if first is not box:
                yield from zip(first.axes, box.axes, strict=True)

    def _facts_of(
        self, base: Tensor, chosen: Sequence[int | None]
    ) -> tuple[list[tuple[Tensor, Tensor]], list[tuple[Tensor, str]]]:
        """What follows from a choice: the cells go with the chosen axis, the other axes stay."""
        equal, frozen = [], []
        for box, choice in zip(self.boxes, chosen, strict=True):
            if choice is None:
                for one, other in combinations(box.axes, 2):
                    if bool(torch.isin(base[one], base[other]).any()):
                        frozen.append((one, f"pairs a prunable dimension with itself ({box.where})"))
            for axis, labels in enumerate(box.axes):
                if axis == choice:
                    shape = [-1 if dim == axis else 1 for dim in range(box.cells.dim())]
                    equal.append((box.cells.flatten(), labels.view(shape).expand_as(box.cells).flatten()))
                else:
                    frozen.append((labels, "" if choice is not None else f"is part of one dimension ({box.where})"))
            if choice is None:
                frozen.append((box.cells.flatten(), f"splits a prunable dimension ({box.where})"))
        return equal, frozen

    def _idle(self, root: Tensor, chosen: Sequence[int | None], others: Sequence[bool], stay: Tensor) -> list[Tensor]:
        """Chosen axes whose indices all hang together, or all stay, where the box has another axis to try.

        One bad choice makes others useless that are tied to it: first go those beside which another axis may do.
        """
        frozen = torch.zeros(self.count, dtype=torch.bool)
        frozen[root[stay]] = True
        found, instead = [], []
        for box, choice, other in zip(self.boxes, chosen, others, strict=True):
            if choice is not None and len(box.axes) > 1:
                roots = root[box.axes[choice]]
                if bool((roots == roots[0]).all()) or bool(frozen[roots].all()):
                    found.append(box.axes[choice])
                    if other:
                        instead.append(box.axes[choice])
        return instead or found

    def avoid(self, axes: Sequence[Tensor]) -> bool:
        """State that these axes of boxes are no good choice; False if that is known already."""
        known = {int(axis[0]) for axis in self.avoided}
        fresh = [axis for axis in axes if int(axis[0]) not in known]
        self.avoided += fresh
        return bool(fresh)

    def reconsider(self, solution: Solution, roots: Tensor, reason: str) -> None:
        """State that components can't go as they were drawn: their boxes take another axis, or they stay.

        Where all that is wrong is that their number is calculated with, they can go, but they mix.
        """
        if reason.startswith(CALCULATES):
            self.mix(roots, reason)
            return
        found = False
        for box, choice in zip(self.boxes, solution.chosen, strict=True):
            if choice is not None and bool(torch.isin(solution.root[box.axes[choice]], roots).any()):
                self.avoided.append(box.axes[choice])
                found = True
        if not found:
            self.freeze(roots, reason)


def _components(count: int, equal: Iterable[tuple[Tensor, Tensor]], start: Tensor | None = None) -> Tensor:
    """The least label of each connected component (vectorised hooking and pointer jumping, near linear)."""
    root = torch.arange(count) if start is None else start.clone()
    pairs = list(equal)
    if not pairs:
        return root
    first = torch.cat([pair[0] for pair in pairs])
    second = torch.cat([pair[1] for pair in pairs])
    while True:
        a, b = root.index_select(0, first), root.index_select(0, second)  # indexing takes several times as long
        apart = (a != b).nonzero().squeeze(1)
        if not len(apart):
            return root
        if len(apart) < len(first):
            first, second, a, b = (each.index_select(0, apart) for each in (first, second, a, b))
        least = torch.minimum(a, b)
        root.scatter_reduce_(0, a, least, "amin")
        root.scatter_reduce_(0, b, least, "amin")
        while not torch.equal(root, above := root.index_select(0, root)):
            root = above
