"""Selection: scores and a budget decide which neurons stay. Pure functions."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import accumulate
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_prune.errors import PruningError
from lightning_prune.graph.copies import copies_of_trained, trained_by
from lightning_prune.graph.groups import NO_UNIT, Groups

__all__ = [
    "BUDGETS",
    "NEURON_SCOPES",
    "Dense",
    "check_amount",
    "check_choice",
    "check_flag",
    "check_neuron_scope",
    "check_scores",
    "copies_to_tie",
    "globs",
    "is_named",
    "matching",
    "measure_dense",
    "pick",
    "select_neurons",
]

BUDGETS = ("neurons", "params", "macs", "latency")
NEURON_SCOPES = ("global", "layer", "sensitivity")

Curves = Mapping[str, Tensor]
"""By a group's key, how much the model suffers when 0, 1/n, 2/n, … of the whole group is gone; shape (n + 1,)."""


def check_amount(amount: Any) -> float:
    """An amount as a float.

    Raises:
        PruningError: It isn't a number in [0, 1).
    """
    if isinstance(amount, bool) or not isinstance(amount, int | float):
        raise PruningError(f"amount must be a fraction, a number in [0, 1), got {amount!r}")
    if not 0 <= amount < 1:  # NaN too
        hint = f" For {amount} % pass {amount / 100}." if 1 < amount <= 100 else ""
        raise PruningError(f"amount must be a fraction in [0, 1), got {amount!r}.{hint}")
    return float(amount)


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Raise a PruningError that lists the choices if ``value`` is none of them."""
    if value not in choices:
        raise PruningError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_flag(name: str, value: Any) -> None:
    """Raise a PruningError unless it is True or False."""
    if not isinstance(value, bool):
        raise PruningError(f"{name} must be True or False, got {value!r}")


def check_neuron_scope(scope: Any, of: str) -> None:
    """Raise a PruningError unless it is one of the scopes, or fractions of neurons by glob."""
    if not isinstance(scope, Mapping):
        check_choice("scope", scope, NEURON_SCOPES)
        return
    if of != "neurons":
        raise PruningError(f"amounts by glob are fractions of the neurons of layers: of={of!r} goes with other scopes")
    if not scope:
        raise PruningError("scope names no layer")
    for pattern, amount in scope.items():
        if not isinstance(pattern, str):
            raise PruningError(f"scope maps glob patterns on module names to amounts, got {pattern!r}")
        try:
            check_amount(amount)
        except PruningError as error:
            raise PruningError(f"scope: {pattern!r}: {error}") from None


def check_scores(groups: Groups, scores: Tensor, allowed: Tensor) -> None:
    """Raise a PruningError if a score of a neuron that may go is NaN or infinite, and can't be ranked."""
    wrong = allowed & ~scores.isfinite()
    for group, numbers in zip(groups.prunable, groups.ranges, strict=True):
        count = int(wrong[numbers.start : numbers.stop].sum())
        if count:
            raise PruningError(
                f"{count} of the {group.size} neurons of {group.name} have a score that is NaN or infinite; nothing "
                "was pruned. Has training diverged? Lower the learning rate or clip gradients, and go on from an "
                "earlier checkpoint"
            )


def globs(name: str, patterns: str | Sequence[str] | None) -> tuple[str, ...] | None:
    """Glob patterns as a tuple.

    Raises:
        PruningError: They are no strings.
    """
    if patterns is None:
        return None
    listed: tuple[Any, ...] = tuple(patterns) if isinstance(patterns, list | tuple) else (patterns,)
    if not all(isinstance(pattern, str) for pattern in listed):
        raise PruningError(f"{name} must be glob patterns on module names, got {patterns!r}")
    return listed


def matching(modules: Sequence[str], include: Sequence[str] | None, exclude: Sequence[str] | None) -> set[str]:
    """The module names that some ``include`` pattern matches (None: all) and no ``exclude`` pattern does.

    A pattern matches a module by its own name or by that of a module that contains it.

    Raises:
        PruningError: A pattern matches nothing; the message lists the names.
    """

    def hits(pattern: str) -> set[str]:
        found = {module for module in modules if is_named(module, (pattern,))}
        if not found:
            listed = ", ".join(modules[:20]) + (", …" if len(modules) > 20 else "")
            raise PruningError(f"the pattern {pattern!r} matches no module that can be pruned; there are: {listed}")
        return found

    chosen = set(modules) if include is None else set[str]().union(*map(hits, include))
    return chosen.difference(*map(hits, exclude or ()))


def is_named(module: str, patterns: Sequence[str]) -> bool:
    """Whether some pattern matches a module's name, or that of a module that contains it."""
    return any(fnmatchcase(name, pattern) for name in _with_parents(module) for pattern in patterns)


def copies_to_tie(model: nn.Module, optimizers: Iterable[Optimizer], exclude: Sequence[str] | None) -> dict[str, str]:
    """`copies_of_trained`, but for those that ``exclude`` names."""
    copies = copies_of_trained(model, trained_by(optimizers))
    return {copy: other for copy, other in copies.items() if not is_named(copy, exclude or ())}


def _with_parents(module: str) -> list[str]:
    parts = module.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]


def pick(groups: Groups, include: Sequence[str] | None, exclude: Sequence[str] | None, exact_only: bool) -> Tensor:
    """Which neurons may go (bool, one per neuron): a group may if all layers that make it were chosen.

    Raises:
        PruningError: A pattern matches nothing.
    """
    names = [_makers(group.slices) for group in groups.prunable]
    chosen = matching(sorted(set().union(*names)), include, exclude) if names else set()
    allowed = torch.zeros(groups.neurons, dtype=torch.bool)
    for group, makers, numbers in zip(groups.prunable, names, groups.ranges, strict=True):
        if makers <= chosen and (group.exact or not exact_only):
            allowed[numbers.start : numbers.stop] = True
    return allowed


def _makers(slices: Sequence[Any]) -> set[str]:
    return {s.name.rpartition(".")[0] or s.name for s in slices if s.role == "makes"}


@dataclass(frozen=True)
class Dense:
    """The whole that an amount is a fraction of: what the model was before any pruning.

    Attributes:
        neurons: Neurons that may go, in all groups.
        params: Elements of all parameters.
        macs: MACs of the traced run.
        sizes: Neurons per group that may shrink, by its key.
    """

    neurons: int
    params: int
    macs: float
    sizes: dict[str, int]


def measure_dense(groups: Groups, allowed: Tensor) -> Dense:
    """The dense whole of groups that nothing was removed from yet."""
    alive = torch.ones(groups.neurons, dtype=torch.bool)
    owned = zip(groups.keys, groups.prunable, groups.ranges, strict=True)
    sizes = {key: group.size for key, group, numbers in owned if bool(allowed[numbers.start])}
    return Dense(int(allowed.sum()), groups.params(alive), groups.macs(alive), sizes)


def select_neurons(
    groups: Groups,
    scores: Tensor,
    allowed: Tensor,
    amount: float,
    *,
    of: str = "neurons",
    scope: str | Mapping[str, float] = "global",
    round_to: int = 1,
    min_channels: int = 1,
    comparable: bool = False,
    curves: Curves | None = None,
    part: float = 1.0,
    dense: Dense,
    on_the_way: bool = False,
) -> Tensor:
    """Choose which neurons stay: the least important go until ``amount`` of ``dense`` is gone.

    Args:
        groups: The groups of the model as it is now.
        scores: Shape (neurons,); higher means keep.
        allowed: Bool (neurons,): which may go.
        amount: Fraction of ``dense`` that is to be gone, [0, 1).
        of: What the fraction is of: ``"neurons"`` (met to the nearest), ``"params"`` or ``"macs"`` (at or just
            past it).
        scope: ``"global"`` ranks all neurons together, by score, or where ``of`` is a cost by what saving it costs
            (share of the group's remaining score, times the layers whose weights it is of, per unit saved);
            ``"layer"`` takes the same fraction of each group;
            ``"sensitivity"`` takes from each what hurts the model as much; or the fraction of each group by glob on
            the layers that make it (the smallest where several match; ``amount`` where none does).
        round_to: Groups shrink to multiples of this only.
        min_channels: Groups keep at least so many neurons.
        comparable: Whether scores of different groups are on one scale.
        curves: For ``scope="sensitivity"``.
        part: Part of the amounts by glob that is to be gone.
        dense: What the model was before any pruning.
        on_the_way: A later step will remove more: stay just short of the budget, for what is gone can't come back.

    Returns:
        Bool (neurons,): which stay. Every group keeps at least ``round_to`` and ``min_channels`` neurons.

    Raises:
        PruningError: The budget can't be reached; the message says what can.
    """
    floor = round_to * math.ceil(max(min_channels, 1) / round_to)
    if isinstance(scope, Mapping):
        shares = _shares(groups, allowed, scope, amount)
        return _by_share(groups, scores, allowed, shares, part, round_to, floor, dense)
    measure, whole = _measure(groups, allowed, of, dense)
    cost = None if of == "neurons" else measure
    blocks = _blocks(groups, scores, allowed, round_to, floor, _placing(scope, dense, cost, groups, comparable, curves))
    goal = whole - round(amount * whole) if of == "neurons" else whole * (1 - amount) * (1 + 1e-9)
    everything = _without(groups, blocks)
    if measure(everything) > goal:
        reachable = 1 - measure(everything) / whole if whole else 0.0
        raise PruningError(
            f"amount={amount:g} of the {of} can't be reached: with every group down to {floor} neuron(s) "
            f"{math.floor(reachable * 1e4) / 1e4:g} is gone, the rest is frozen or excluded"
        )
    count = _fewest(groups, blocks, lambda left: measure(left) <= goal)
    if of != "neurons":
        if on_the_way:
            return _without(groups, blocks[: max(count - 1, 0)])
        return _just_past(groups, blocks, measure, goal, 0.01 * whole)
    fewer, enough = _without(groups, blocks[: max(count - 1, 0)]), _without(groups, blocks[:count])
    nearer = measure(fewer) - goal < goal - measure(enough)  # with blocks the nearer side counts
    return fewer if nearer else enough


@dataclass(frozen=True, eq=False)
class Blocks(Sequence[Tensor]):
    """Neurons that go at once, in the order in which they go.

    Attributes:
        order: The neurons, block after block.
        ends: Where each block ends.
    """

    order: Tensor
    ends: list[int]

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, at: int) -> Tensor: ...
    @overload
    def __getitem__(self, at: slice) -> Blocks: ...
    def __getitem__(self, at: int | slice) -> Tensor | Blocks:
        if isinstance(at, slice):
            ends = self.ends[at]
            start = at.start or 0
            first = self.ends[start - 1] if start else 0
            return Blocks(self.order[first : ends[-1] if ends else first], [end - first for end in ends])
        return self.order[self.ends[at - 1] if at else 0 : self.ends[at]]

    @classmethod
    def of(cls, parts: Sequence[Tensor]) -> Blocks:
        """From the blocks one by one."""
        order = torch.cat(list(parts)) if parts else torch.empty(0, dtype=torch.long)
        return cls(order, list(accumulate(map(len, parts))))


def _without(groups: Groups, blocks: Blocks) -> Tensor:
    left = torch.ones(groups.neurons, dtype=torch.bool)
    left[blocks.order] = False
    return left


def _fewest(groups: Groups, blocks: Blocks, enough: Callable[[Tensor], bool]) -> int:
    """How many of the blocks, in order, must go; all of them are enough."""
    return bisect_left(range(len(blocks)), True, key=lambda count: enough(_without(groups, blocks[:count])))


def _just_past(
    groups: Groups, blocks: Blocks, measure: Callable[[Tensor], float], goal: float, tolerance: float
) -> Tensor:
    """Reach a budget and overshoot it little.

    In a small network one channel may be a tenth of the budget. So what the last block made superfluous is given
    back, and if that leaves more than the tolerance, smaller blocks are tried in the last one's place.
    """
    owner = torch.cat([torch.full((len(numbers),), i) for i, numbers in enumerate(groups.ranges)])
    best: Tensor | None = None
    while best is None or measure(best) < goal - tolerance:
        if measure(_without(groups, blocks)) > goal:
            break
        count = _fewest(groups, blocks, lambda left: measure(left) <= goal)
        left = _give_back(_without(groups, blocks[:count]), blocks[:count], owner, lambda left: measure(left) <= goal)
        if best is None or measure(left) > measure(best):
            best = left
        if not count:
            break
        last = owner[blocks[count - 1][0]]
        others = [block for block in blocks[count:] if owner[block[0]] != last]
        blocks = Blocks.of([*blocks[: count - 1], *others])
    assert best is not None
    return best


def _measure(groups: Groups, allowed: Tensor, of: str, dense: Dense) -> tuple[Callable[[Tensor], float], float]:
    """How much of something is left, given which neurons stay; and its dense whole."""
    if of == "params":
        return groups.params, dense.params
    if of == "macs":
        return groups.macs, dense.macs
    last_ones = len(dense.sizes.keys() - set(groups.keys))  # a new trace has no group for a neuron that is alone
    return lambda left: int((left & allowed).sum()) + last_ones, dense.neurons


def _give_back(left: Tensor, gone: Sequence[Tensor], owner: Tensor, fits: Callable[[Tensor], bool]) -> Tensor:
    """Restore blocks that the budget does not need, the most important of each group first."""
    by_group: dict[int, list[Tensor]] = {}
    for block in reversed(gone):  # the most important first
        by_group.setdefault(int(owner[block[0]]), []).append(block)
    for blocks in by_group.values():
        left = _restored(left, blocks, fits)
    return left


def _restored(left: Tensor, blocks: Sequence[Tensor], fits: Callable[[Tensor], bool]) -> Tensor:
    """Restore as many blocks, in order, as still fit; found by bisection, since what is left only grows."""

    def with_first(count: int) -> Tensor:
        restored = left.clone()
        for block in blocks[:count]:
            restored[block] = True
        return restored

    return with_first(bisect_left(range(1, len(blocks) + 1), True, key=lambda count: not fits(with_first(count))))


@dataclass(frozen=True)
class _Ranked:
    """A group's neurons in the order in which they would go, and the blocks that go at once.

    Attributes:
        key: The group's key.
        size: How many it has now.
        scores: In that order, float64.
        starts: Where each block starts, shape (blocks,).
        ends: Where each block ends.
        order: The neurons.
    """

    key: str
    size: int
    scores: Tensor
    starts: Tensor
    ends: Tensor
    order: Tensor

    @property
    def sums(self) -> Tensor:
        """Scores of the blocks."""
        if len(self.ends) and bool((self.ends - self.starts == 1).all()):
            return self.scores[self.starts]  # equal scores stay equal
        totals = torch.cat([self.scores.new_zeros(1), self.scores.cumsum(0)])
        return totals[self.ends] - totals[self.starts]


def _ranked(groups: Groups, scores: Tensor, allowed: Tensor, round_to: int, floor: int) -> list[_Ranked]:
    found = []
    for key, group, numbers in zip(groups.keys, groups.prunable, groups.ranges, strict=True):
        first = group.size % round_to or round_to
        ends = torch.tensor(range(first, group.size - floor + 1, round_to), dtype=torch.long)
        if not bool(allowed[numbers.start]) or not len(ends):
            continue
        order = torch.argsort(scores[numbers.start : numbers.stop], stable=True) + numbers.start
        starts = torch.cat([ends.new_zeros(1), ends[:-1]])
        found.append(_Ranked(key, group.size, scores[order].double(), starts, ends, order))
    return found


def _layers(groups: Groups) -> dict[str, float]:
    """Of how many layers' weights each prunable group, by its key, is a dimension.

    A hidden layer's neurons are one of two, of the weights that make them and of those that read them; the channels of
    a residual stream one of each layer's that writes to it or reads it. A group that is a third of what a layer reads
    counts a third there.
    """
    dims = [
        extent.unit_of
        for (name, _), extent in groups.extents.items()
        if name in groups.parameters and len(groups.shapes[name]) > 1 and not extent.fixed
    ]
    if not dims:
        return dict.fromkeys(groups.keys, 0.0)
    units, sizes = torch.cat(dims), torch.tensor([len(each) for each in dims])
    parts = (1 / sizes.double()).repeat_interleave(sizes)[units != NO_UNIT]
    owner = torch.cat([torch.full((len(numbers),), i) for i, numbers in enumerate(groups.ranges)])
    layers = torch.bincount(owner[units[units != NO_UNIT]], parts, minlength=len(groups.prunable))
    return dict(zip(groups.keys, layers.tolist(), strict=True))


_Placing = Callable[[_Ranked], Tensor]
"""Gives each block of a group its place in the ranking of all."""


def _placing(
    scope: str,
    dense: Dense,
    cost: Callable[[Tensor], float] | None,
    groups: Groups,
    comparable: bool,
    curves: Curves | None,
) -> _Placing:
    layers = {} if cost is None or comparable else _layers(groups)

    def gone(group: _Ranked) -> Tensor:
        """Fraction of the whole group that is gone halfway through each block."""
        whole = dense.sizes.get(group.key, group.size)
        return (whole - group.size + (group.starts + group.ends) / 2) / whole

    def by_curve(group: _Ranked) -> Tensor:
        whole, curve = dense.sizes.get(group.key, group.size), (curves or {}).get(group.key)
        if curve is None:
            return torch.full(group.ends.shape, math.inf, dtype=torch.float64)
        at = (whole - group.size + group.ends).double() / whole * (len(curve) - 1)
        low = at.floor().long().clamp(max=len(curve) - 2)
        rising = curve.double().cummax(0).values  # what hurts less when more is gone is an accident
        damage = rising[low] + (at - low) * (rising[low + 1] - rising[low])
        return damage + gone(group) * 1e-9  # an order where nothing hurts

    def by_score(group: _Ranked) -> Tensor:
        lengths = group.ends - group.starts
        if cost is None:
            return group.sums / lengths
        everything, first = torch.ones(groups.neurons, dtype=torch.bool), group.order[: int(group.ends[0])]
        saved = (cost(everything) - cost(everything.index_fill(0, first, False))) * lengths / int(group.ends[0])
        if comparable:
            return torch.where(saved > 0, group.sums / saved, math.inf)
        mass = group.scores.flip(0).cumsum(0).flip(0)[group.starts]  # of this neuron and all that rank above it
        return _price(group.sums, mass, saved, layers[group.key])

    return {"layer": gone, "sensitivity": by_curve}.get(scope, by_score)


def _blocks(groups: Groups, scores: Tensor, allowed: Tensor, round_to: int, floor: int, place: _Placing) -> Blocks:
    """Neurons that go at once, in the order in which they go."""
    ranked = _ranked(groups, scores, allowed, round_to, floor)
    if not ranked:
        return Blocks.of([])
    chosen = torch.argsort(torch.cat([place(group).double() for group in ranked]), stable=True)
    orders = [group.order[: int(group.ends[-1])] for group in ranked]
    if round_to == 1:
        return Blocks(torch.cat(orders)[chosen], list(range(1, len(chosen) + 1)))
    sizes = [size for group in ranked for size in (group.ends - group.starts).tolist()]
    parts = torch.cat(orders).split(sizes)
    return Blocks.of([parts[number] for number in chosen.tolist()])


def _shares(groups: Groups, allowed: Tensor, scope: Mapping[str, float], amount: float) -> dict[str, float]:
    """The fraction that each group may lose, by its key.

    Raises:
        PruningError: A pattern matches no layer that makes neurons that may go.
    """
    makers = {
        key: _makers(group.slices)
        for key, group, numbers in zip(groups.keys, groups.prunable, groups.ranges, strict=True)
        if bool(allowed[numbers.start])
    }
    names = sorted(set[str]().union(*makers.values()))
    chosen = {pattern: matching(names, (pattern,), None) for pattern in scope}
    return {
        key: min((scope[pattern] for pattern in scope if made & chosen[pattern]), default=amount)
        for key, made in makers.items()
    }


def _by_share(
    groups: Groups,
    scores: Tensor,
    allowed: Tensor,
    shares: Mapping[str, float],
    part: float,
    round_to: int,
    floor: int,
    dense: Dense,
) -> Tensor:
    """A part of each group's own fraction goes, to the nearest block."""
    ranked = {group.key: group for group in _ranked(groups, scores, allowed, round_to, floor)}
    left = torch.ones(groups.neurons, dtype=torch.bool)
    for key, group in zip(groups.keys, groups.prunable, strict=True):
        whole = dense.sizes.get(key, group.size)
        asked = shares.get(key, 0.0) * part * whole
        goal = (round(asked) if round_to == 1 else asked) - (whole - group.size)
        if goal <= 0:
            continue
        ends = [0, *ranked[key].ends.tolist()] if key in ranked else [0]
        if goal > ends[-1] + (round_to - 1 if key in ranked else 0):
            raise PruningError(
                f"scope: {shares[key]:g} of the {whole} neurons of {group.name} can't go: at least {floor} must stay"
            )
        if key in ranked:
            left[ranked[key].order[: min(ends, key=lambda end: abs(end - goal))]] = False
    return left


def _price(score: Tensor, mass: Tensor, saved: Tensor, layers: float) -> Tensor:
    """What it costs to save one unit of the budget: the share of the group's remaining score that goes, of each layer.

    A share of what remains, not of what was, so that a group gets dearer the smaller it is; otherwise the layers
    with the most MACs would be emptied before any other is touched. And of each layer whose weights it is of, so that a
    residual stream, of which one channel saves MACs in many layers, isn't cheap for what all of these lose.

    Source: the same normalisation of weights: Lee et al., 2021, arXiv:2010.07611 (LAMP).
    """
    share = torch.where(mass > 0, score / mass, 0.0) * layers
    return torch.where(saved > 0, share / saved, math.inf)
