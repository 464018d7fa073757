"""Groups: which slices of which parameters live and die together, drawn from a trace."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from lightning_prune.graph.callsites import CallSite, ModuleCall, Size
from lightning_prune.graph.labels import CALCULATES, Solution
from lightning_prune.graph.run import as_calls, check_model, no_collection, traced
from lightning_prune.graph.trace import AttributeSite, Leaf, Trace

__all__ = ["Group", "Groups", "Slice", "draw_groups", "find_groups"]

NO_UNIT = -1

Role = Literal["makes", "reads", "follows"]

NOT_MADE = "no layer of the traced run makes it"


@dataclass(frozen=True, eq=False)
class Slice:
    """The indices of one dimension of one parameter or buffer that belong to a group's neurons.

    Attributes:
        name: Name of the parameter or buffer in the model.
        dim: The dimension.
        role: ``"makes"`` the neuron (a layer's output), ``"reads"`` it (a later layer's input) or ``"follows"``
            (bias, norm, anything else of its size).
        places: Which neuron stands at each index of the dimension, by a number of its own.
        units: The numbers of the group's neurons, ascending.
    """

    name: str
    dim: int
    role: Role
    places: Tensor
    units: Tensor

    @cached_property
    def index(self) -> Tensor:
        """Shape (neurons, k): row i holds the k indices along ``dim`` that go with neuron i."""
        inside = torch.isin(self.places, self.units).nonzero().squeeze(1)
        order = torch.argsort(self.places[inside], stable=True)
        return inside[order].view(len(self.units), -1) if len(self.units) else inside.view(0, 1)

    def __str__(self) -> str:
        times = f" x{self.index.size(1)}" if self.index.size(1) > 1 else ""
        return f"{self.name}[{self.dim}]{times}"


@dataclass(frozen=True, eq=False)
class Group:
    """Neurons (channels, features) of a kind: each owns the same slices, at its own indices.

    Attributes:
        size: Number of neurons.
        slices: What belongs to them.
        frozen: Why none of them can go, or None.
        mixing: The operations that read several of them together; empty if removal equals masking exactly.
    """

    size: int
    slices: tuple[Slice, ...]
    frozen: str | None = None
    mixing: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The layers that make the neurons (where none does: those that hold a slice)."""
        makers = [s for s in self.slices if s.role == "makes"] or list(self.slices)
        return " + ".join(dict.fromkeys(s.name.rpartition(".")[0] or s.name for s in makers))

    @property
    def exact(self) -> bool:
        """Whether removing neurons gives the very outputs that setting their slices to zero gives."""
        return self.frozen is None and not self.mixing

    def __str__(self) -> str:
        state = f"frozen: {self.frozen}" if self.frozen else "exact" if self.exact else "approximate: "
        return f"{self.name}: {self.size} neurons, {state}{', '.join(self.mixing)}"


@dataclass(frozen=True, eq=False)
class Extent:
    """A dimension as neurons: ``unit_of[i]`` is the number of the neuron at index i, or -1 for one that stays."""

    unit_of: Tensor

    @cached_property
    def fixed(self) -> bool:
        """Whether no index is a neuron."""
        return bool((self.unit_of == NO_UNIT).all())

    @cached_property
    def repeats(self) -> bool:
        """Whether a neuron has several indices, or an index is none."""
        return self.fixed or len(self.unit_of.unique()) < len(self.unit_of)

    def kept(self, alive: Tensor) -> Tensor:
        """The indices that remain, given which neurons are alive (bool, one per neuron)."""
        if self.fixed:
            return torch.arange(len(self.unit_of))
        # an index of no neuron reads any, and stays
        stays = (self.unit_of == NO_UNIT) | alive[self.unit_of.clamp(min=0)]
        return stays.nonzero().squeeze(1)

    def without(self, alive: Tensor, renumber: Tensor) -> Extent:
        """The same dimension after a removal."""
        if self.fixed:
            return self
        unit_of = self.unit_of[self.kept(alive)]
        return Extent(torch.where(unit_of == NO_UNIT, NO_UNIT, renumber[unit_of.clamp(min=0)]))


Extents = tuple[Tensor, Tensor]
"""Several extents in a row: the numbers of their neurons, and where each extent ends."""


def _join(extents: Sequence[Extent], neurons: int) -> Extents:
    sizes = torch.tensor([0, *(len(extent.unit_of) for extent in extents)])
    units = torch.cat([extent.unit_of for extent in extents]) if extents else torch.empty(0, dtype=torch.long)
    return torch.where(units == NO_UNIT, neurons, units), torch.cumsum(sizes, 0)


def _shares(extents: Extents, alive: Tensor) -> list[float]:
    """Which fraction of each extent stays when only ``alive`` neurons do."""
    units, ends = extents
    stays = torch.cat([alive, alive.new_ones(1)])[units]
    counts = torch.cat([stays.new_zeros(1, dtype=torch.long), torch.cumsum(stays, 0)])[ends].diff()
    shares: list[float] = (counts.double() / ends.diff()).tolist()
    return shares


@dataclass(frozen=True, eq=False)
class Origin:
    """Where groups come from: a trace, what was concluded from it, and the label that stands for each neuron."""

    trace: Trace
    solution: Solution
    roots: Tensor


@dataclass(frozen=True, eq=False)
class Groups(Sequence[Group]):
    """All groups of a model, those that can be pruned first; prints as a table.

    Neurons are numbered through all prunable groups: group ``i`` owns the numbers in ``ranges[i]``.

    Attributes:
        groups: The groups.
        extents: What stands where in each dimension of each parameter and buffer.
        shapes: Shapes of the parameters and buffers.
        parameters: Names of the parameters.
        sized: What the sizes in calls count.
        picked: Lists of indices in calls: what stands where in the dimension that they pick of, and the indices.
        inputs: The dimensions of the tensors that such calls take their sizes of, each time.
        attributes: What multiples of the integers that modules hold count, each time that one was used as a size.
        numeric: Modules and their attributes that the forward calculates with.
        divided: What multiples of such integers divided for a number that the forward calculates with.
        constants: Buffers that hold indices, and what they count along.
        unmasked: Dimensions that a masked model leaves as they are.
        own: Parameters that no other module than the one that holds them has read.
        costs: MACs of each contraction, and the dimensions they are linear in.
        calls: The calls of the model, or of its parts, that were traced.
        data_dependent: Whether shapes depended on values.
        origin: The trace that the groups were drawn from, until something is removed.
    """

    groups: tuple[Group, ...]
    extents: dict[tuple[str, int], Extent]
    shapes: dict[str, tuple[int, ...]]
    parameters: frozenset[str]
    sized: dict[tuple[CallSite, int], Extent]
    picked: dict[tuple[CallSite, int], tuple[Extent, tuple[int, ...]]]
    inputs: dict[CallSite, tuple[dict[int, Extent], ...]]
    attributes: dict[AttributeSite, tuple[tuple[Extent, int], ...]]
    numeric: frozenset[tuple[str, str]]
    divided: dict[AttributeSite, tuple[tuple[Extent, int], ...]]
    constants: dict[str, Extent]
    unmasked: frozenset[tuple[str, int]]
    own: frozenset[str]
    costs: tuple[tuple[int, tuple[Extent, ...]], ...]
    calls: tuple[ModuleCall, ...] = ()
    data_dependent: bool = False
    origin: Origin | None = None

    def __len__(self) -> int:
        return len(self.groups)

    @overload
    def __getitem__(self, index: int) -> Group: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Group]: ...
    def __getitem__(self, index: int | slice) -> Group | Sequence[Group]:
        return self.groups[index]

    @property
    def prunable(self) -> tuple[Group, ...]:
        """The groups whose neurons can go."""
        return tuple(group for group in self.groups if group.frozen is None)

    @property
    def frozen(self) -> tuple[Group, ...]:
        """The groups that must stay, each with its reason."""
        return tuple(group for group in self.groups if group.frozen is not None)

    @property
    def neurons(self) -> int:
        """Number of neurons in all prunable groups."""
        return sum(group.size for group in self.prunable)

    @property
    def ranges(self) -> list[range]:
        """The numbers of each prunable group's neurons."""
        ranges, start = [], 0
        for group in self.prunable:
            ranges.append(range(start, start + group.size))
            start += group.size
        return ranges

    @property
    def keys(self) -> list[str]:
        """A name of its own for each prunable group, also where one layer's neurons fall into several."""
        names = [group.name for group in self.prunable]
        return [f"{name}#{names[:i].count(name)}" for i, name in enumerate(names)]

    def numbers(self, alive: Tensor) -> dict[AttributeSite, int]:
        """What the integers that modules hold must be when only ``alive`` neurons stay.

        One that was used for several things whose sizes would differ is left out, and so is one that the forward
        calculates with: there the calls are rewritten. Of those that divide, see `same_quotients`.
        """
        result = {}
        for site, uses in self.attributes.items():
            if (site.module, site.name) in self.numeric:
                continue
            sizes = {divmod(len(extent.kept(alive)), times) for extent, times in uses}
            if len(sizes) == 1 and not next(iter(sizes))[1]:
                result[site] = sizes.pop()[0]
        return result

    def same_quotients(self, site: AttributeSite, before: int, after: int, alive: Tensor) -> bool:
        """Whether what the forward calculates with by dividing by an integer stays the same when that changes too."""
        return all(
            len(extent.unit_of) // (before * times) == len(extent.kept(alive)) // (after * times)
            for extent, times in self.divided.get(site, ())
        )

    def counts(self, alive: Tensor) -> dict[str, list[int]]:
        """Buffers of indices -> the indices that stay of what they count along, where some go."""
        kept = {name: extent.kept(alive) for name, extent in self.constants.items()}
        return {name: left.tolist() for name, left in kept.items() if len(left) < len(self.constants[name].unit_of)}

    def kept(self, alive: Tensor) -> dict[str, dict[int, Tensor]]:
        """Indices kept of every parameter and buffer that shrinks when only ``alive`` neurons stay."""
        units, ends = self._every
        stays = torch.cat([alive, alive.new_ones(1)])[units]
        index = stays.nonzero().squeeze(1)
        before = torch.searchsorted(index, ends)  # how many stay before each extent's end
        counts = before.diff()
        index -= ends[:-1].repeat_interleave(counts)
        result: dict[str, dict[int, Tensor]] = {}
        sizes = ends.diff().tolist()
        for (name, dim), size, kept in zip(self.extents, sizes, index.split(counts.tolist()), strict=True):
            if len(kept) < size:
                result.setdefault(name, {})[dim] = kept
        return result

    def sizes(self, alive: Tensor) -> dict[CallSite, dict[int, Size]]:
        """The size that each sized call is to ask for, per dimension, when only ``alive`` neurons stay."""
        result: dict[CallSite, dict[int, Size]] = {}
        # Where a padding is what is missing to a fixed width, it grows as the input shrinks.
        sites = {site for (site, _), extent in self.sized.items() if not extent.fixed or site.function == "pad"}
        for (site, dim), extent in self.sized.items():
            if site in sites:
                result.setdefault(site, {})[dim] = len(extent.kept(alive))
        for (site, place), (extent, index) in self.picked.items():
            if not extent.fixed:
                result.setdefault(site, {})[place] = _renumbered(index, extent.kept(alive))
        return result

    def read_of(self, site: CallSite, alive: Tensor) -> tuple[tuple[int, int], ...]:
        """Dimensions, and their sizes, that the tensor will always have that a sized call takes its sizes of.

        One that holds the same neuron several times may be larger for larger images or batches, unless the call writes
        its size.
        """
        written = [extent for (other, _), extent in self.sized.items() if other == site]
        found = [
            {
                (dim, len(extent.kept(alive)))
                for dim, extent in dims.items()
                if not extent.repeats or any(torch.equal(extent.unit_of, other.unit_of) for other in written)
            }
            for dims in self.inputs.get(site, ())
        ]
        return tuple(sorted(set.intersection(*found))) if found else ()

    def macs(self, alive: Tensor) -> float:
        """MACs of the traced run when only ``alive`` neurons stay."""
        left = iter(_shares(self._factors, alive))
        return sum(macs * prod(next(left) for _ in factors) for macs, factors in self.costs)

    @cached_property
    def _every(self) -> Extents:
        return _join(list(self.extents.values()), self.neurons)

    @cached_property
    def _factors(self) -> Extents:
        return _join([extent for _, factors in self.costs for extent in factors], self.neurons)

    @cached_property
    def _dims(self) -> Extents:
        return _join([self.extents[key] for key in self.extents if key[0] in self.parameters], self.neurons)

    def params(self, alive: Tensor) -> int:
        """Elements of all traced parameters when only ``alive`` neurons stay."""
        sizes = {name: float(prod(self.shapes[name])) for name in self.parameters}
        keys = [key for key in self.extents if key[0] in self.parameters]
        for (name, _), share in zip(keys, _shares(self._dims, alive), strict=True):
            sizes[name] *= share
        return round(sum(sizes.values()))

    def idle(self, alive: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """Those of the neurons that go whose layers have only zeros for them, biases aside: bool (neurons,)."""
        used = torch.zeros(self.neurons, dtype=torch.bool)
        made = torch.zeros_like(used)
        for group, numbers in zip(self.prunable, self.ranges, strict=True):
            if bool(alive[numbers.start : numbers.stop].all()):
                continue
            for part in group.slices:
                if part.role == "makes" and part.name in self.parameters:
                    found = _not_zero(tensors[part.name], part.dim)
                    used[numbers.start : numbers.stop] |= bool(found.all()) or found[part.index].any(1)
                    made[numbers.start : numbers.stop] = True
        return ~alive & made & ~used

    def without(self, alive: Tensor) -> Groups:
        """The groups after all but the ``alive`` neurons are gone, as a new trace would find them."""
        renumber = torch.cumsum(alive, 0) - 1
        extents = {key: extent.without(alive, renumber) for key, extent in self.extents.items()}
        shapes = {
            name: tuple(
                len(extents[name, dim].unit_of) if (name, dim) in extents else size for dim, size in enumerate(shape)
            )
            for name, shape in self.shapes.items()
        }
        prunable = []
        start = 0
        for group, numbers in zip(self.prunable, self.ranges, strict=True):
            size = int(alive[numbers.start : numbers.stop].sum())
            units = torch.arange(start, start + size)
            slices = tuple(replace(s, places=extents[s.name, s.dim].unit_of, units=units) for s in group.slices)
            prunable.append(replace(group, size=size, slices=slices))
            start += size
        changed = self._mapped(lambda extent: extent.without(alive, renumber))
        changed["picked"] = {
            key: (changed["picked"][key][0], _renumbered(index, extent.kept(alive)))
            for key, (extent, index) in self.picked.items()
        }
        return replace(
            self,
            groups=(*prunable, *(self._moved(group, alive) for group in self.frozen)),
            shapes=shapes,
            origin=None,
            **changed,
            costs=tuple(
                (
                    round(macs * prod(len(e.kept(alive)) / len(e.unit_of) for e in factors)),
                    tuple(e.without(alive, renumber) for e in factors),
                )
                for macs, factors in self.costs
            ),
        )

    def _mapped(self, change: Callable[[Extent], Extent]) -> dict[str, Any]:
        """All extents but those of costs, changed."""
        return {
            "extents": {key: change(extent) for key, extent in self.extents.items()},
            "sized": {key: change(extent) for key, extent in self.sized.items()},
            "picked": {key: (change(extent), index) for key, (extent, index) in self.picked.items()},
            "inputs": {
                site: tuple({dim: change(extent) for dim, extent in dims.items()} for dims in uses)
                for site, uses in self.inputs.items()
            },
            "attributes": {
                key: tuple((change(extent), times) for extent, times in uses) for key, uses in self.attributes.items()
            },
            "divided": {
                key: tuple((change(extent), times) for extent, times in uses) for key, uses in self.divided.items()
            },
            "constants": {key: change(extent) for key, extent in self.constants.items()},
        }

    def refuse(self, reasons: Mapping[int, str]) -> Groups:
        """The groups if some of the prunable ones can't go as they are: along another axis, or not at all.

        A reason that says that their number is calculated with makes them approximate.
        """
        if self.origin is None:
            mixed = {number: reason for number, reason in reasons.items() if reason.startswith(CALCULATES)}
            changed = (
                replace(group, mixing=(*group.mixing, mixed[number])) if number in mixed else group
                for number, group in enumerate(self.prunable)
            )
            groups = replace(self, groups=(*changed, *self.frozen))
            return groups._freeze({number: reason for number, reason in reasons.items() if number not in mixed})
        for number, reason in reasons.items():
            neurons = self.ranges[number]
            roots = self.origin.roots[neurons.start : neurons.stop]
            self.origin.trace.book.reconsider(self.origin.solution, roots, reason)
        return draw_groups(self.origin.trace)

    def _freeze(self, reasons: Mapping[int, str]) -> Groups:
        stays = torch.ones(self.neurons, dtype=torch.bool)
        for number in reasons:
            stays[self.ranges[number].start : self.ranges[number].stop] = False
        renumber = torch.where(stays, torch.cumsum(stays, 0) - 1, NO_UNIT)

        def change(extent: Extent) -> Extent:
            return Extent(torch.where(extent.unit_of == NO_UNIT, NO_UNIT, renumber[extent.unit_of.clamp(min=0)]))

        refused = [replace(self.prunable[number], frozen=reason, mixing=()) for number, reason in reasons.items()]
        left = [group for number, group in enumerate(self.prunable) if number not in reasons]
        return replace(
            self,
            groups=(*left, *self.frozen, *refused),
            **self._mapped(change),
            costs=tuple((macs, tuple(map(change, factors))) for macs, factors in self.costs),
        )

    def _moved(self, group: Group, alive: Tensor) -> Group:
        """A frozen group: its indices stay, but move up where others in the same dimension are gone."""
        slices = tuple(replace(s, places=s.places[self.extents[s.name, s.dim].kept(alive)]) for s in group.slices)
        return replace(group, slices=slices)

    def __str__(self) -> str:
        rows = []
        for group in self.prunable:
            state = "exact" if group.exact else f"approximate: {', '.join(group.mixing)}"
            rows.append((group.name, group.size, f"{_roles(group)} ({state})"))
        lines = [f"{len(self.prunable)} prunable groups, {self.neurons} neurons", *_columns(rows)]
        if self.frozen:
            rows = [(", ".join(map(str, g.slices)), g.size, g.frozen or "") for g in self.frozen]
            lines += [f"{len(self.frozen)} frozen", *_columns(rows)]
        return "\n".join(lines)


def _not_zero(tensor: Tensor, dim: int) -> Tensor:
    """Which slices along a dimension hold anything but zeros; most show it by their first element."""
    slices = tensor.detach().movedim(dim, 0)
    first = slices
    while first.dim() > 1:
        first = first[..., 0]
    found: Tensor = first != 0
    unsure = (~found).nonzero().squeeze(1)
    if len(unsure) and slices.dim() > 1:
        found[unsure] = (slices[unsure] != 0).flatten(1).any(1)
    return found.cpu()


def _renumbered(index: tuple[int, ...], kept: Tensor) -> tuple[int, ...]:
    """Those of the indices that are kept, as places among what is kept."""
    places = {old: new for new, old in enumerate(kept.tolist())}
    return tuple(places[each] for each in index if each in places)


def _roles(group: Group) -> str:
    """Who follows and who reads, by module, with the factor where one neuron owns several indices."""
    parts = []
    makers = {s.name.rpartition(".")[0] for s in group.slices if s.role == "makes"}
    for role, verb in (("follows", "with"), ("reads", "read by")):
        names: dict[str, int] = {}
        for part in group.slices:
            module = part.name.rpartition(".")[0] or part.name
            if part.role == role and module not in makers:
                names[module] = max(names.get(module, 1), part.index.size(1))
        if names:
            listed = [module if times == 1 else f"{module} ({times} each)" for module, times in names.items()]
            parts.append(f"{verb} {', '.join(listed)}")
    return "; ".join(parts)


def _columns(rows: list[tuple[str, int, str]]) -> list[str]:
    width = max((len(name) for name, _, _ in rows if len(name) <= 40), default=0)
    return [f"  {name:<{width}}  {size:>5}  {text}" for name, size, text in rows]


Family = tuple[list[int], str, tuple[str, ...], Tensor]
"""Numbers of the leaves that hold its slices, what froze it, what mixes it, its components in order."""


def draw_groups(trace: Trace) -> Groups:
    """Connected labels become groups; each index of a parameter belongs to one neuron or to none.

    Where the choice of an axis leaves neurons that are the only ones of their kind, so that none can go, another
    axis is tried.
    """
    while True:
        solution = _with_quotients(trace, trace.book.solve())
        made = _made(trace, solution)
        places = _at_leaves(trace, solution.root)
        families = _families(trace, solution, made, places)
        alone = [each for _, reason, _, each in families if not reason and len(each) == 1]
        lonely = solution.axes_within(trace.book.boxes, torch.cat(alone)) if alone else []
        if not lonely or not trace.book.avoid(lonely):
            return _draw(trace, solution, made, places, families)


def _with_quotients(trace: Trace, solution: Solution) -> Solution:
    """Mix what an integer divides that does not count it: a number that the forward calculates with changes with it."""
    found: dict[str, list[Tensor]] = {}
    for site, uses in trace.divided.items():
        counted = [] if (site.module, site.name) in trace.numeric else trace.attributes.get(site, [])
        follows = torch.cat([torch.empty(0, dtype=torch.long), *(solution.root[labels] for labels, _ in counted)])
        follows = follows[solution.reason[follows] == 0]
        for labels, _, reason in uses:
            roots = solution.root[labels]
            if not bool(torch.isin(roots, follows).any()):
                found.setdefault(reason, [solution.mixed.get(reason, roots[:0])]).append(roots)
    more = {reason: torch.cat(roots).unique() for reason, roots in found.items()}
    return replace(solution, mixed=solution.mixed | more)


def _at_leaves(trace: Trace, values: Tensor) -> tuple[Tensor, ...]:
    """What the labels of each leaf have in a table of all labels."""
    if not trace.leaves:
        return ()
    every = torch.cat([leaf.labels for leaf in trace.leaves])
    return torch.split(values[every], [len(leaf.labels) for leaf in trace.leaves])


def _made(trace: Trace, solution: Solution) -> Tensor:
    """Which labels a layer makes, bool (labels,)."""
    made = torch.zeros(trace.book.count, dtype=torch.bool)
    for labels in trace.book.made:
        made[labels] = True
    for box, choice in reversed(list(zip(trace.book.boxes, solution.chosen, strict=True))):
        axis = None if choice is None else box.axes[choice]
        if axis is not None:  # a weight that was split, or merged, before it made them: the older labels are its own
            cells = box.cells.flatten()
            older, newer = (cells, axis) if int(cells.min()) < int(axis.min()) else (axis, cells)
            if bool(made[newer].any()):
                made[older] = True
    return made


def _draw(
    trace: Trace, solution: Solution, made: Tensor, places: Sequence[Tensor], families: Sequence[Family]
) -> Groups:
    """The groups that the families are; ``places``: the components in each leaf."""
    follows = tuple(f"{path}." for path in trace.followers)
    own = [bool(each.any()) for each in _at_leaves(trace, made)]
    makers = [some and not leaf.name.startswith(follows) for some, leaf in zip(own, trace.leaves, strict=True)]

    given = torch.zeros(trace.book.count, dtype=torch.bool)
    for labels in trace.for_a_loss():
        given[solution.root[labels]] = True

    unit_of_root = torch.full((trace.book.count,), NO_UNIT)
    prunable, frozen, roots, start = [], [], [], 0
    for numbers, reason, mixing, components in families:
        size = len(components)
        slices = tuple(
            Slice(leaf.name, leaf.dim, _role(leaf, makers[number]), places[number], components)
            for number, leaf in ((number, trace.leaves[number]) for number in numbers)
        )
        if not reason and bool(given[components].any()):
            reason = "is read by the training step, and by no layer from there"
        if reason or size < 2:
            frozen.append(Group(size, slices, reason or "the only one of its kind"))
            continue
        prunable.append(Group(size, slices, None, mixing))
        unit_of_root[components] = torch.arange(start, start + size)
        roots.append(components)
        start += size
    origin = Origin(trace, solution, torch.cat(roots) if roots else torch.empty(0, dtype=torch.long))
    return _assemble(trace, solution, (*prunable, *frozen), unit_of_root, origin)


def _families(trace: Trace, solution: Solution, made: Tensor, roots: Sequence[Tensor]) -> list[Family]:
    """Components that own the same slices and share their fate; those that never hold neurons are left out.

    Components are told apart by sums of random numbers, one for each leaf that they have an index in, one for
    each operation that mixes them: two different sets have the same sum once in 2^64 times.
    """
    reasons = list(solution.mixed)
    generator = torch.Generator().manual_seed(0)
    keys = torch.randint(-(2**62), 2**62, (len(roots) + len(reasons) + 1,), generator=generator)
    every = torch.cat([*roots, torch.empty(0, dtype=torch.long)])
    leaf_of = torch.arange(len(roots)).repeat_interleave(torch.tensor([len(each) for each in roots], dtype=torch.long))
    signature = torch.zeros(trace.book.count, dtype=torch.long).index_add_(0, every, keys[leaf_of])
    owned = torch.zeros(trace.book.count, dtype=torch.bool)
    owned[every] = True
    for key, text in zip(keys[len(roots) :], reasons, strict=False):
        mixed = solution.mixed[text][solution.reason[solution.mixed[text]] == 0]
        signature.index_add_(0, mixed, key.expand(len(mixed)))

    reason = solution.reason.clone()
    texts = [*solution.reasons, NOT_MADE]
    has_maker = torch.zeros(trace.book.count, dtype=torch.bool)
    has_maker[solution.root[made]] = True
    reason[(reason == 0) & ~has_maker] = len(texts)
    blank = [number + 1 for number, text in enumerate(texts) if not text]
    owned &= ~torch.isin(reason, torch.tensor(blank, dtype=torch.long))
    components = owned.nonzero().squeeze(1)
    _, kind = signature[components].unique(return_inverse=True)
    _, kind = (kind * (len(texts) + 1) + reason[components]).unique(return_inverse=True)
    order = torch.argsort(kind, stable=True)
    sizes = torch.bincount(kind).tolist() if len(kind) else []
    members = sorted(components[order].split(sizes), key=lambda each: int(each[0]))

    first = torch.full((trace.book.count,), NO_UNIT)  # a family's first component -> its number
    first[[int(each[0]) for each in members]] = torch.arange(len(members))
    leaves_of: list[list[int]] = [[] for _ in members]
    held = first[every] != NO_UNIT
    pairs = (first[every[held]] * max(len(roots), 1) + leaf_of[held]).unique()
    for pair in pairs.tolist():
        family, number = divmod(pair, len(roots))
        leaves_of[family].append(number)
    mixing_of: list[list[str]] = [[] for _ in members]
    for text in reasons:
        for family in first[solution.mixed[text]].unique().tolist():
            if family != NO_UNIT and not reason[members[family][0]]:
                mixing_of[family].append(text)
    return [
        (leaves_of[number], texts[int(reason[each[0]]) - 1] if reason[each[0]] else "", tuple(mixing_of[number]), each)
        for number, each in enumerate(members)
    ]


def _role(leaf: Leaf, makes: bool) -> Role:
    return "makes" if makes else "reads" if leaf.rank > 1 else "follows"


def _assemble(
    trace: Trace, solution: Solution, groups: tuple[Group, ...], unit_of_root: Tensor, origin: Origin
) -> Groups:
    unit_of = unit_of_root[solution.root]
    held = _at_leaves(trace, unit_of)

    def extent(labels: Tensor) -> Extent:
        return Extent(unit_of[labels])

    return Groups(
        groups=groups,
        extents={(leaf.name, leaf.dim): Extent(units) for leaf, units in zip(trace.leaves, held, strict=True)},
        shapes=dict(trace.shapes),
        parameters=frozenset(trace.parameters),
        sized={key: extent(labels) for key, labels in trace.sized.items()},
        picked={key: (extent(labels), tuple(index.tolist())) for key, (labels, index) in trace.picked.items()},
        inputs={
            site: tuple({dim: extent(labels) for dim, labels in enumerate(dims) if labels is not None} for dims in uses)
            for site, uses in trace.inputs.items()
        },
        attributes={
            key: tuple((extent(labels), times) for labels, times in uses) for key, uses in trace.attributes.items()
        },
        numeric=frozenset(trace.numeric),
        divided={key: tuple((extent(labels), n) for labels, n, _ in uses) for key, uses in trace.divided.items()},
        constants={key: extent(labels) for key, labels in trace.constants.items()},
        unmasked=frozenset(trace.unmasked),
        own=frozenset(name for name, paths in trace.readers.items() if paths == {name.rpartition(".")[0]}),
        costs=tuple((c.macs, tuple(map(extent, c.factors))) for c in trace.contractions),
        calls=tuple(trace.calls),
        data_dependent=trace.data_dependent,
        origin=origin,
    )


def find_groups(model: nn.Module, example_inputs: Any) -> Groups:
    """Find which slices of which parameters of a model can only be removed together.

    The model is run once on the inputs (twice, in both modes, where some parameters are used in training only);
    its parameters, buffers, mode and the random state are afterwards what they were.

    Args:
        model: Any module; it is not changed.
        example_inputs: A tensor, a tuple of positional or a dict of keyword arguments of ``model``.

    Raises:
        TraceError: The model raised on the inputs.

    Example:
        >>> print(find_groups(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), torch.rand(1, 4)))
        1 prunable groups, 3 neurons
          0      3  read by 2 (exact)
        2 frozen
          0.weight[1]                 4  reads a fixed input: the model's own or a constant (addmm in 0)
          2.weight[0], 2.bias[0]      2  reaches the model's output
    """
    check_model(model)
    with torch.inference_mode(False), torch.no_grad(), no_collection():
        return draw_groups(traced(model, as_calls(example_inputs)))
