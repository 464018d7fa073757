"""Sizes written in calls: which integers of a torch function count indices, of what, and how to write others there.

`x.view(-1, 16 * 5 * 5)`, `x[:, :32]`, `x.split([64, 32], 1)`, `F.pad(x, (0, 0, 0, 8))` and `torch.zeros(n, 64)` all
hold numbers that a removal changes. One entry of the table per kind of function says how to read and write them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_prune.graph.labels import FIXED, Dims

__all__ = ["COUNTED_AS", "SHAPES", "SIZED_FUNCTIONS", "SizedFunction", "input_of", "kind_of", "shape_of_input"]

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
Sizes = list[Any]
"""The integers of a call in order; None where a place holds none that counts."""


@dataclass(frozen=True)
class SizedFunction:
    """How to read and write the sizes in calls of one kind of function.

    Attributes:
        functions: What Python calls.
        read: The sizes that a call asks for.
        write: The function and arguments that ask for others, by place.
        extents: What each size counts: labels of the result or of part of the input, by place. None if the rule of
            the operation says so itself.
        picks: Whether the result may hold part of the input's indices, between bounds that are among the sizes.
        together: Whether one wrong size means that all are written.
        infers: Whether one size may be left to torch, as -1: it may be a multiple of the batch.
        picked: Lists of indices that the call picks, by place: of which dimension, and which. Such a list is written
            like a size; ``read`` gives a tuple for a list and the tensor itself for a tensor.
        computes: Whether the call asks for a number of equal pieces, so that no size is written in it.
    """

    functions: tuple[Callable[..., Any], ...]
    read: Callable[[tuple[Any, ...], dict[str, Any]], Sizes]
    write: Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any], Mapping[int, Any]], Any]
    extents: Callable[[Callable[[Tensor], Dims], tuple[Any, ...], dict[str, Any], Any], dict[int, Tensor]] | None = None
    picks: bool = False
    together: bool = False
    infers: bool = False
    picked: Callable[[tuple[Any, ...], dict[str, Any]], dict[int, tuple[int, Tensor]]] | None = None
    computes: bool = False


def _is_size(item: Any) -> bool:
    return isinstance(item, (int, torch.SymInt)) and not isinstance(item, bool)


def _argument(args: tuple[Any, ...], kwargs: Mapping[str, Any], place: int, *names: str, default: Any = None) -> Any:
    if len(args) > place:
        return args[place]
    return next((kwargs[name] for name in names if name in kwargs), default)


def _with_argument(args: tuple[Any, ...], kwargs: dict[str, Any], place: int, name: str, value: Any) -> Arguments:
    if len(args) > place:
        return (*args[:place], value, *args[place + 1 :]), kwargs
    return args, {**kwargs, name: value}


def input_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The tensor that a call takes its sizes of; something else where it takes none."""
    return _argument(args, kwargs, 0, "input", "self")


def shape_of_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int, ...]:
    """Shape of the tensor that a call takes its sizes of; empty where it takes none."""
    source = input_of(args, kwargs)
    return tuple(source.shape) if isinstance(source, Tensor) else ()


# -- functions whose integers are the shape of the result --------------------------------------------------------------


def _shape_at(place: int) -> SizedFunction:
    """``(x, 2, -1)``, ``(x, (2, -1))`` and ``(x, shape=(2, -1))`` alike; the sizes start at an argument."""
    names = ("shape", "size", "sizes", "repeats", "dims")

    def find(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Sizes:
        if len(args) > place and isinstance(args[place], (list, tuple)):
            return list(args[place])
        if len(args) > place:
            return [size for size in args[place:] if _is_size(size)]
        given = next((kwargs[name] for name in names if name in kwargs), ())
        return [given] if _is_size(given) else list(given)

    def write(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], sizes: Mapping[int, int]) -> Any:
        shape = tuple(sizes.get(at, size) for at, size in enumerate(find(args, kwargs)))
        kwargs = {name: value for name, value in kwargs.items() if name not in names}
        nested = len(args) > place and isinstance(args[place], (list, tuple))
        if place and not args:  # the tensor is given by name
            return func, (input_of(args, kwargs), shape), {}
        return func, (*args[:place], shape, *(args[place + 1 :] if nested else ())), kwargs

    def extents(dims: Any, args: Any, kwargs: Any, result: Any) -> dict[int, Tensor]:
        sizes, labels = find(args, kwargs), dims(result)
        if len(sizes) != len(labels):
            return {}
        return {at: each for at, each in enumerate(labels) if each is not None and sizes[at] != -1}

    return SizedFunction((), find, write, extents)


def _kind(kind: SizedFunction, *functions: Callable[..., Any], infers: bool = False) -> SizedFunction:
    return replace(kind, functions=functions, infers=infers)


def _unflatten_sizes(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Sizes:
    return list(_argument(args, kwargs, 2, "sizes"))


def _unflatten_write(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], sizes: Mapping[int, int]) -> Any:
    shape = tuple(sizes.get(at, size) for at, size in enumerate(_unflatten_sizes(args, kwargs)))
    return func, *_with_argument(args, kwargs, 2, "sizes", shape)


def _unflatten_extents(dims: Any, args: Any, kwargs: Any, result: Any) -> dict[int, Tensor]:
    first = _argument(args, kwargs, 1, "dim") % input_of(args, kwargs).dim()
    labels = dims(result)[first:]
    sizes = _unflatten_sizes(args, kwargs)
    return {at: labels[at] for at, size in enumerate(sizes) if size != -1 and labels[at] is not None}


# -- functions that cut a dimension into pieces ------------------------------------------------------------------------


def _piece_sizes(args: tuple[Any, ...], kwargs: Mapping[str, Any], chunks: bool) -> Sizes:
    given = _argument(args, kwargs, 1, "chunks", "split_size", "split_size_or_sections", "split_sizes", "indices")
    given = _argument(args, kwargs, 1, "sections", default=given) if given is None else given
    if isinstance(given, (list, tuple)):
        return list(given)
    if not _is_size(given):
        return []
    size = input_of(args, kwargs).size(_argument(args, kwargs, 2, "dim", default=0))
    each = max(-(-size // given), 1) if chunks else given
    whole = size // each if each else 0
    return [each] * whole + ([size - whole * each] if whole * each < size else [])


def _points(args: tuple[Any, ...], kwargs: Mapping[str, Any], dim: int) -> Sizes:
    """Sizes of the pieces between given points, or of a given number of nearly equal pieces."""
    given = _argument(args, kwargs, 1, "indices_or_sections", "indices", "sections")
    size = input_of(args, kwargs).size(dim)
    if _is_size(given):
        return [size // given + (at < size % given) for at in range(given)]
    if isinstance(given, Tensor):
        return []
    ends = [min(max(point + size if point < 0 else point, 0), size) for point in (*given, size)]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def _pieces(
    kind: Literal["sizes", "chunks", "points"], *functions: Callable[..., Any], along: int = 0
) -> SizedFunction:
    """``along``: the dimension, where the call names none."""

    def dim_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
        dim: int = _argument(args, kwargs, 2, "dim", default=min(along, input_of(args, kwargs).dim() - 1))
        return dim

    def read(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Sizes:
        if kind == "points":
            return _points(args, kwargs, dim_of(args, kwargs))
        return _piece_sizes(args, kwargs, kind == "chunks")

    def write(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], sizes: Mapping[int, int]) -> Any:
        pieces = [sizes[at] for at in range(len(sizes))]
        return torch.split, (input_of(args, kwargs), pieces, dim_of(args, kwargs)), {}

    def extents(dims: Any, args: Any, kwargs: Any, result: Any) -> dict[int, Tensor]:
        dim = dim_of(args, kwargs)
        found = [dims(piece)[dim] for piece in result]
        if all(labels is None for labels in found):
            return {}
        sized = ((labels, piece.size(dim)) for labels, piece in zip(found, result, strict=True))
        return {at: torch.full((size,), FIXED) if labels is None else labels for at, (labels, size) in enumerate(sized)}

    return SizedFunction(functions, read, write, extents, picks=True, together=True, computes=kind == "chunks")


# -- functions with bounds ---------------------------------------------------------------------------------------------


def _parts(args: tuple[Any, ...]) -> Iterator[tuple[int, Any, int]]:
    """The parts of an index: place, the part, the dimension it is of."""
    given = args[1] if isinstance(args[1], tuple) else (args[1],)
    dim = 0
    for place, part in enumerate(given):
        if part is Ellipsis:
            dim = args[0].dim() - sum(map(_consumes, given[place + 1 :]))
        else:
            yield place, part, dim
            dim += _consumes(part)


def _elements(args: tuple[Any, ...]) -> Iterator[tuple[int, Any, int]]:
    """Those that are slices and numbers."""
    return (each for each in _parts(args) if isinstance(each[1], slice) or _is_size(each[1]))


def _consumes(part: Any) -> int:
    """How many dimensions a part of an index is about."""
    if part is None or isinstance(part, bool):
        return 0
    return part.dim() if isinstance(part, Tensor) and part.dtype in (torch.bool, torch.uint8) else 1


def _lists(args: tuple[Any, ...]) -> Iterator[tuple[int, Any, int]]:
    """Those that are lists of indices, as tuples or tensors."""
    for place, part, dim in _parts(args):
        if isinstance(part, Tensor) and part.dim() == 1:
            yield place, part, dim
        elif isinstance(part, (list, range)) and part and all(isinstance(item, int) for item in part):
            yield place, tuple(int(item) if _is_size(item) else item for item in part), dim


def _as_indices(given: Any, size: int) -> Tensor:
    """Indices or a mask, given in any way, as indices from the front: int64, shape (picked,)."""
    part: Tensor = given.detach().cpu() if isinstance(given, Tensor) else torch.tensor(given)
    if part.dtype in (torch.bool, torch.uint8):
        return part.nonzero().squeeze(1)
    part = part.long()
    return torch.where(part < 0, part + size, part)


def _bound(bound: Any, size: int) -> Any:
    """A bound as a number of indices before it, which may be more than there are; None where it is no plain integer."""
    if not _is_size(bound):
        return None
    return max(bound + size, 0) if bound < 0 else bound


def _item_sizes(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Sizes:
    sizes: Sizes = []
    if not isinstance(args[0], Tensor):
        return sizes
    for _, part, dim in _elements(args):
        size = args[0].size(dim)
        if isinstance(part, slice):
            plain = part.step in (None, 1)
            sizes += [_bound(part.start, size) if plain else None, _bound(part.stop, size) if plain else None]
        else:
            sizes += [_bound(part, size), None]
    return sizes + [part for _, part, _ in _lists(args)]


def _item_picked(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[int, tuple[int, Tensor]]:
    if not isinstance(args[0], Tensor):
        return {}
    first = 2 * sum(1 for _ in _elements(args))
    lists = enumerate(_lists(args))
    return {first + at: (dim, _as_indices(part, args[0].size(dim))) for at, (_, part, dim) in lists}


def _item_write(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], sizes: Mapping[int, Any]) -> Any:
    parts = list(args[1]) if isinstance(args[1], tuple) else [args[1]]
    first = 2 * sum(1 for _ in _elements(args))
    for number, (place, _, _) in enumerate(_lists(args)):
        if first + number in sizes:
            parts[place] = list(sizes[first + number])
    for number, (place, part, _) in enumerate(_elements(args)):
        if isinstance(part, slice):
            start, stop = sizes.get(2 * number, part.start), sizes.get(2 * number + 1, part.stop)
            parts[place] = slice(start, stop, part.step)
        else:
            parts[place] = sizes.get(2 * number, part)
    return func, (args[0], tuple(parts), *args[2:]), kwargs


def _item_extents(dims: Any, args: Any, kwargs: Any, result: Any) -> dict[int, Tensor]:
    found = {}
    sizes = _item_sizes(args, kwargs)
    for number, (_, _, dim) in enumerate(_elements(args)):
        labels = dims(args[0])[dim]
        for place in (2 * number, 2 * number + 1):
            if labels is not None and sizes[place] and sizes[place] < len(labels):
                found[place] = labels[: sizes[place]]
    return found


def _range_sizes(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Sizes:
    start, length = _argument(args, kwargs, 2, "start"), _argument(args, kwargs, 3, "length")
    size = input_of(args, kwargs).size(_argument(args, kwargs, 1, "dim"))
    return [start + size if _is_size(start) and start < 0 else start, length]


def _range_write(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], sizes: Mapping[int, int]) -> Any:
    start, length = (sizes.get(at, size) for at, size in enumerate(_range_sizes(args, kwargs)))
    return func, (input_of(args, kwargs), _argument(args, kwargs, 1, "dim"), start, length), {}


def _range_extents(dims: Any, args: Any, kwargs: Any, result: Any) -> dict[int, Tensor]:
    dim = _argument(args, kwargs, 1, "dim")
    labels = dims(input_of(args, kwargs))[dim]
    start, length = _range_sizes(args, kwargs)
    if labels is None or not (_is_size(start) and _is_size(length)):
        return {}
    found = {0: labels[:start], 1: labels[start : start + length]}
    return {at: each for at, each in found.items() if len(each)}


def _select_sizes(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Sizes:
    return [_bound(_argument(args, kwargs, 2, "index"), input_of(args, kwargs).size(_argument(args, kwargs, 1, "dim")))]


def _select_write(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], sizes: Mapping[int, int]) -> Any:
    index = sizes.get(0, _argument(args, kwargs, 2, "index"))
    return func, (input_of(args, kwargs), _argument(args, kwargs, 1, "dim"), index), {}


def _select_extents(dims: Any, args: Any, kwargs: Any, result: Any) -> dict[int, Tensor]:
    labels = dims(input_of(args, kwargs))[_argument(args, kwargs, 1, "dim")]
    (index,) = _select_sizes(args, kwargs)
    return {0: labels[:index]} if labels is not None and index else {}


# -- functions that pick by a tensor of indices, which are the same along a dimension wherever in the others -----------


def _picks(place: int, dim_place: int, *functions: Callable[..., Any], repeats: bool = False) -> SizedFunction:
    """``place``: of the tensor among the arguments; ``repeats``: it says how often each index is picked."""
    names = ("index", "indices", "repeats")

    def given(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, int | None]:
        return _argument(args, kwargs, place, *names), _argument(args, kwargs, dim_place, "dim")

    def read(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Sizes:
        places, dim = given(args, kwargs)
        return [places if isinstance(places, Tensor) and dim is not None else None]

    def row(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        places, dim = given(args, kwargs)
        if not isinstance(places, Tensor) or dim is None or not places.dim():
            return None
        if places.dim() == 1:
            return places
        one = places[tuple(slice(None) if at == dim % places.dim() else slice(0, 1) for at in range(places.dim()))]
        return one.flatten() if torch.equal(one.expand_as(places), places) else None

    def picked(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[int, tuple[int, Tensor]]:
        places, (_, dim) = row(args, kwargs), given(args, kwargs)
        source = input_of(args, kwargs)
        if places is None or dim is None or not isinstance(source, Tensor) or not source.dim():
            return {}
        if repeats:
            if len(places) not in (1, source.size(dim)):  # the source has been pruned already
                return {}
            index = torch.arange(source.size(dim)).repeat_interleave(places.detach().cpu().expand(source.size(dim)))
        else:
            index = _as_indices(places, source.size(dim))
        return {0: (dim, index)}

    def write(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], sizes: Mapping[int, Any]) -> Any:
        if 0 not in sizes:
            return func, args, kwargs
        places, dim = given(args, kwargs)
        index = places.new_tensor(list(sizes[0]), dtype=torch.long)
        if repeats:
            return torch.index_select, (input_of(args, kwargs), dim, index), {}
        shape = [-1 if at == dim % places.dim() else 1 for at in range(places.dim())]
        whole = [len(index) if at == dim % places.dim() else size for at, size in enumerate(places.shape)]
        index = index.view(shape).expand(whole)
        return func, *_with_argument(args, kwargs, place, next((n for n in names if n in kwargs), names[0]), index)

    return SizedFunction(functions, read, write, lambda *_: {}, picks=True, picked=picked)


# -- functions that repeat ---------------------------------------------------------------------------------------------


def _repeats_extents(dims: Any, args: Any, kwargs: Any, result: Any) -> dict[int, Tensor]:
    """Where there was one index, the number of times is the size."""
    sizes = _repeats.read(args, kwargs)
    first = result.dim() - len(sizes)
    source = input_of(args, kwargs)
    had = [1] * (result.dim() - source.dim()) + list(source.shape)
    labels = dims(result)
    places = range(len(sizes))
    return {at: each for at in places if had[first + at] == 1 and (each := labels[first + at]) is not None}


_repeats = _shape_at(1)


# -- functions with sizes in an argument of their own; the rule of the operation says what these count -----------------


def _shift_extents(dims: Any, args: Any, kwargs: Any, result: Any) -> dict[int, Tensor]:
    """A shift along a dimension is the number of indices that come round from its end."""
    source, along = input_of(args, kwargs), _argument(args, kwargs, 2, "dims")
    if along is None:
        return {}
    found = {}
    for at, (shift, dim) in enumerate(zip(_shifts.read(args, kwargs), _listed(along), strict=False)):
        labels = dims(source)[dim]
        if labels is not None and shift % len(labels):
            found[at] = labels[-(shift % len(labels)) :]
    return found


def _shift_sizes(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Sizes:
    shifts, along = _shifts.read(args, kwargs), _argument(args, kwargs, 2, "dims")
    if along is None:
        return []
    sizes = [input_of(args, kwargs).size(dim) for dim in _listed(along)]
    return [shift + size if shift < 0 else shift for shift, size in zip(shifts, sizes, strict=False)]


def _listed(value: Any) -> Sizes:
    return [value] if _is_size(value) else list(value)


def _numbers(place: int, name: str, *functions: Callable[..., Any], picks: bool = False) -> SizedFunction:
    def read(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Sizes:
        given = _argument(args, kwargs, place, name)
        return [given] if _is_size(given) else list(given) if isinstance(given, (list, tuple)) else []

    def write(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], sizes: Mapping[int, int]) -> Any:
        given = _argument(args, kwargs, place, name, default=1)
        numbers = tuple(sizes.get(at, size) for at, size in enumerate([given] if _is_size(given) else given))
        return func, *_with_argument(args, kwargs, place, name, numbers[0] if _is_size(given) else numbers)

    return SizedFunction(functions, read, write, None, picks)


def _eye_sizes(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Sizes:
    sizes = [_argument(args, kwargs, 0, "n"), _argument(args, kwargs, 1, "m")]
    return sizes if sizes[1] is not None else sizes[:1]


def _eye_write(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], sizes: Mapping[int, int]) -> Any:
    shape = tuple(sizes.get(at, size) for at, size in enumerate(_eye_sizes(args, kwargs)))
    return func, shape, {name: value for name, value in kwargs.items() if name not in ("n", "m")}


_shifts = _numbers(1, "shifts")
_item = SizedFunction((), _item_sizes, _item_write, _item_extents, picks=True, picked=_item_picked)

SIZED_FUNCTIONS: dict[str, SizedFunction] = {
    "view": _kind(_shape_at(1), Tensor.view, infers=True),
    "reshape": _kind(_shape_at(1), Tensor.reshape, torch.reshape, infers=True),
    "expand": _kind(_shape_at(1), Tensor.expand, torch.broadcast_to, Tensor.broadcast_to),
    "repeat": SizedFunction((Tensor.repeat, torch.tile, Tensor.tile), _repeats.read, _repeats.write, _repeats_extents),
    "unflatten": SizedFunction(
        (Tensor.unflatten, torch.unflatten), _unflatten_sizes, _unflatten_write, _unflatten_extents
    ),
    "zeros": _kind(_shape_at(0), torch.zeros, torch.ones, torch.empty, torch.rand, torch.randn, torch.full),
    "eye": SizedFunction((torch.eye,), _eye_sizes, _eye_write),
    "new_zeros": _kind(_shape_at(1), Tensor.new_zeros, Tensor.new_ones, Tensor.new_empty, Tensor.new_full),
    "split": _pieces(
        "sizes", torch.split, Tensor.split, torch.split_with_sizes, Tensor.split_with_sizes, torch.unsafe_split
    ),
    "chunk": _pieces("chunks", torch.chunk, Tensor.chunk, torch.unsafe_chunk),
    "tensor_split": _pieces("points", torch.tensor_split, Tensor.tensor_split),
    "hsplit": _pieces("points", torch.hsplit, Tensor.hsplit, along=1),
    "dsplit": _pieces("points", torch.dsplit, Tensor.dsplit, along=2),
    "vsplit": _pieces("points", torch.vsplit, Tensor.vsplit),
    "getitem": _kind(_item, Tensor.__getitem__, Tensor.__setitem__),
    "narrow": SizedFunction((torch.narrow, Tensor.narrow), _range_sizes, _range_write, _range_extents, picks=True),
    "select": SizedFunction((torch.select, Tensor.select), _select_sizes, _select_write, _select_extents, picks=True),
    "index_select": _picks(2, 1, torch.index_select, Tensor.index_select),
    "gather": _picks(2, 1, torch.gather, Tensor.gather),
    "take_along_dim": _picks(1, 2, torch.take_along_dim, Tensor.take_along_dim),
    "repeat_interleave": _picks(1, 2, torch.repeat_interleave, Tensor.repeat_interleave, repeats=True),
    "roll": SizedFunction((torch.roll, Tensor.roll), _shift_sizes, _shifts.write, _shift_extents),
    "pad": _numbers(1, "pad", F.pad, picks=True),
    "layer_norm": _numbers(1, "normalized_shape", F.layer_norm, torch.layer_norm, F.rms_norm, torch.rms_norm),
    "group_norm": _numbers(1, "num_groups", F.group_norm, torch.group_norm),
    "conv": _numbers(6, "groups", F.conv1d, F.conv2d, F.conv3d),
    "conv_transpose": _numbers(6, "groups", F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d),
    "channel_shuffle": _numbers(1, "groups", F.channel_shuffle, F.native_channel_shuffle),
    # Its own sizes follow from those of the module that calls it (pruning/attention.py).
    "attention": SizedFunction(
        (F.multi_head_attention_forward,),
        read=lambda args, kwargs: [],
        write=lambda func, args, kwargs, sizes: (func, args, kwargs),
        extents=lambda dims, args, kwargs, result: {},
        picks=True,
    ),
}
"""The one table, by the name that a `CallSite` carries."""

SHAPES = frozenset({"view", "reshape", "expand", "repeat", "unflatten", "zeros", "new_zeros"})
"""Those whose sizes are the shape of the result, so that they may depend on the size of an image."""

COUNTED_AS = {name: "split" if kind.together else name for name, kind in SIZED_FUNCTIONS.items()}
COUNTED_AS["repeat_interleave"] = "index_select"
"""What calls are counted as: a call that is rewritten becomes one of another name, which must not change the count."""

_NAME_OF = {function: name for name, kind in SIZED_FUNCTIONS.items() for function in kind.functions}


def kind_of(function: Callable[..., Any]) -> str | None:
    """Name of the entry that a torch function belongs to."""
    try:
        return _NAME_OF.get(function)
    except TypeError:  # unhashable: none of ours
        return None
