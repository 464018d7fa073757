"""Operations that only move elements: follow each label to where its element went."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from lightning_prune.graph.labels import FIXED, Dims, distinct
from lightning_prune.graph.rules.table import Call, aten_family, family, rule

aten = torch.ops.aten

PICKS_ONE = "picks one index of a prunable dimension"
PICKS_PART = "picks part of a prunable dimension"


@rule(aten.flip, aten.roll, aten.rot90)
def move(call: Call) -> list[Dims]:
    """Movement of one tensor by constant arguments: run the very operation on labels and read off where each went.

    Every view that torch declares as such and that has no rule of its own comes here too.
    """
    source = call.args[0]
    outs: list[Tensor] = [call.out] if isinstance(call.out, Tensor) else list(call.out)
    landed: list[list[Tensor | None]] = [[None] * out.dim() for out in outs]
    for dim, labels in enumerate(call.dims(source)):
        if labels is None:
            continue
        shape = [1] * source.dim()
        shape[dim] = -1
        # Labels lie like the elements would, so that no view is refused.
        moved: Any = call.func(labels.view(shape).expand(source.shape), *call.args[1:], **call.kwargs)
        for each, dims in zip([moved] if isinstance(moved, Tensor) else moved, landed, strict=True):
            _land(call, each, labels, dims)
    return [tuple(dims) for dims in landed]


def _land(call: Call, moved: Tensor, labels: Tensor, dims: list[Tensor | None]) -> None:
    """Enter moved labels into the dimensions along which they vary; freeze them where they can't be followed."""
    varying = [dim for dim in range(moved.dim()) if _varies_along(moved, dim)]
    if not varying:
        call.freeze(labels, PICKS_ONE)
        return
    cells = moved[tuple(slice(None) if dim in varying else 0 for dim in range(moved.dim()))].clone()
    if _number_of(cells) < _number_of(labels):
        call.freeze(labels, PICKS_PART)
        return
    parts = [cells] if len(varying) == 1 else call.book.split(cells, str(call))
    for along, arrived in zip(varying, parts, strict=True):
        known = dims[along]
        dims[along] = arrived if known is None else _merged(call, known, arrived)


def _number_of(labels: Tensor) -> int:
    """How many indices that can go these are."""
    return int((distinct(labels)[0] != FIXED).sum())


def _merged(call: Call, first: Tensor, second: Tensor) -> Tensor:
    """The labels of a dimension that two become: a cell for each pair of theirs."""
    rows, row = distinct(first)
    columns, column = distinct(second)
    # the outer part first, whichever dimension it came from
    if int((row.diff() != 0).sum()) > int((column.diff() != 0).sum()):
        rows, row, columns, column = columns, column, rows, row
    cells = call.book.merge((rows, columns), str(call))
    return cells[row, column]


def _varies_along(moved: Tensor, dim: int) -> bool:
    if moved.stride(dim) == 0 or moved.size(dim) < 2:
        return False
    return not torch.equal(moved, moved.narrow(dim, 0, 1).expand_as(moved))


@rule(aten.view, aten._unsafe_view, aten._reshape_alias, aten.reshape)
def view(call: Call) -> Dims:
    """Dimensions are merged and split; those that do neither pass. Only runs of sizes that change are looked into."""
    source: Tensor = call.args[0]
    dims = call.dims(source)
    result: list[Tensor | None] = [None] * call.out.dim()
    if not source.numel() or not any(labels is not None for labels in dims):
        return tuple(result)
    for inside, outside in _blocks(source.shape, call.out.shape):
        sizes = [source.size(dim) for dim in inside]
        wanted = [call.out.size(dim) for dim in outside]
        landed: list[Tensor | None] = [None] * len(outside)
        for place, dim in enumerate(inside):
            labels = dims[dim]
            if labels is None:
                continue
            if len(inside) == len(outside) == 1:
                landed[0] = labels
                continue
            _land(call, _laid_out(labels, prod(sizes[place + 1 :]), wanted), labels, landed)
        for dim, arrived in zip(outside, landed, strict=True):
            result[dim] = arrived
    return tuple(result)


def _laid_out(labels: Tensor, inner: int, sizes: Sequence[int]) -> Tensor:
    """The labels of a dimension, each ``inner`` times in a row, over and over, in dimensions of other sizes.

    A dimension along which they don't vary, as the numbers alone tell, has a size of 1.
    """
    flat = torch.zeros([1] * len(sizes), dtype=torch.long)
    stride = prod(sizes)
    for dim, size in enumerate(sizes):
        stride //= size
        if stride % (inner * len(labels)) and inner % (stride * size):
            shape = [1] * len(sizes)
            shape[dim] = size
            flat = flat + torch.arange(size).view(shape) * stride
    return labels[flat.div(inner, rounding_mode="floor") % len(labels)]


def _blocks(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Runs of dimensions of two shapes that hold the same elements, as short as they can be; sizes of 1 left out."""
    first = [(dim, size) for dim, size in enumerate(before) if size != 1]
    second = [(dim, size) for dim, size in enumerate(after) if size != 1]
    found = []
    while first and second:
        inside, outside = [first[0][0]], [second[0][0]]
        (_, a), (_, b) = first.pop(0), second.pop(0)
        while a != b:
            if a < b:
                dim, size = first.pop(0)
                inside.append(dim)
                a *= size
            else:
                dim, size = second.pop(0)
                outside.append(dim)
                b *= size
        found.append((inside, outside))
    return found


@rule(aten.permute)
def permute(call: Call) -> Dims:
    """Dimensions in another order."""
    dims = call.dims(call.args[0])
    return tuple(dims[dim] for dim in call.args[1])


@rule(aten.transpose, aten.transpose_, aten.t, aten.t_, aten.numpy_T, aten.mT)
def transpose(call: Call) -> Dims:
    """Two dimensions change places."""
    dims = list(call.dims(call.args[0]))
    if dims:
        one, other = call.args[1:] or (0, len(dims) - 1)
        dims[one], dims[other] = dims[other], dims[one]
    return tuple(dims)


@rule(aten.unsqueeze, aten.unsqueeze_)
def unsqueeze(call: Call) -> Dims:
    """A new dimension of one index."""
    dims = list(call.dims(call.args[0]))
    dims.insert(call.args[1] % call.out.dim(), None)
    return tuple(dims)


@rule(aten.squeeze_)
def squeeze_(call: Call) -> Dims | None:
    """The same in place: the tensor has its new shape already."""
    dims = call.dims(call.args[0])
    given = call.arg(1, "dim", range(len(dims)))
    chosen = {dim % len(dims) for dim in ([given] if isinstance(given, int) else given) if dims}
    gone = {dim for dim in chosen if dims[dim] is None}
    if call.out.dim() == len(dims):
        return dims
    if call.out.dim() != len(dims) - len(gone):  # which of them had one index can't be told any more
        call.freeze_all(f"drops dimensions in place ({call})")
        return None
    return tuple(labels for dim, labels in enumerate(dims) if dim not in gone)


@rule(aten.squeeze)
def squeeze(call: Call) -> Dims:
    """Dimensions of one index, which have no labels, go."""
    source: Tensor = call.args[0]
    given = call.arg(1, "dim", range(source.dim()))
    chosen = {dim % source.dim() for dim in ([given] if isinstance(given, int) else given)} if source.dim() else set()
    return tuple(
        labels for dim, labels in enumerate(call.dims(source)) if not (dim in chosen and source.size(dim) == 1)
    )


@rule(aten.expand)
def expand(call: Call) -> Dims:
    """Leading dimensions and those of one index are repeated without copying: any of the copies may go."""
    source: Tensor = call.args[0]
    more = call.out.dim() - source.dim()
    dims = call.dims(source)
    sizes = [1] * more + list(source.shape)
    own = [None] * more + list(dims)
    return tuple(
        _copies(call, size) if size > 1 and had == 1 else labels
        for labels, had, size in zip(own, sizes, call.out.shape, strict=True)
    )


@rule(aten.repeat)
def repeat(call: Call) -> Dims:
    """Copies behind each other: any may go where there was one index, else the indices come again."""
    source: Tensor = call.args[0]
    more = call.out.dim() - source.dim()
    dims = [None] * more + list(call.dims(source))
    sizes = [1] * more + list(source.shape)
    return tuple(
        _copies(call, times) if had == 1 and times > 1 else None if labels is None else labels.repeat(times)
        for labels, had, times in zip(dims, sizes, call.args[1], strict=True)
    )


def _copies(call: Call, size: int) -> Tensor | None:
    return call.book.fill(call.book.new(size))


@rule(aten.select)
def select(call: Call) -> Dims:
    """One index of a dimension: that one stays, and so do all where its number can't be rewritten."""
    dims = list(call.dims(call.args[0]))
    dim, index = call.args[1], call.args[2]
    labels = dims.pop(dim % len(dims))
    if labels is not None:
        call.freeze(labels[index][None] if call.patchable else labels, PICKS_ONE)
    return tuple(dims)


@rule(aten.slice)
def cut(call: Call) -> Dims:
    """A range of a dimension. Where Python wrote the bounds they can be rewritten; else a part can't be picked."""
    source: Tensor = call.args[0]
    dims = list(call.dims(source))
    dim = call.arg(1, "dim", 0) % source.dim()
    labels = dims[dim]
    if labels is None:
        return tuple(dims)
    start, stop, step = (call.arg(at, name, default) for at, name, default in _BOUNDS)
    picked = labels[start:stop:step]
    if len(picked) < len(labels):
        if step > 1:
            _keep_parity(call, labels, start or 0, stop, step)
        elif not call.patchable:
            call.freeze(labels, PICKS_PART)
    dims[dim] = _alone(call, picked)
    return tuple(dims)


_BOUNDS = ((2, "start", None), (3, "end", None), (4, "step", 1))


def _keep_parity(call: Call, labels: Tensor, start: int, stop: int | None, step: int) -> None:
    """Every second index stays every second one only if pairs go together."""
    if start >= step or (stop is not None and stop < len(labels)):
        call.freeze(labels, PICKS_PART)
        return
    whole = len(labels) // step * step
    call.book.tie(*labels[:whole].view(-1, step).unbind(1))
    for last in labels[whole:]:
        call.freeze(last[None], PICKS_PART)


def _alone(call: Call, labels: Tensor) -> Tensor | None:
    """A dimension of one index broadcasts, so it can't be followed on."""
    if len(labels) > 1:
        return labels
    call.freeze(labels, PICKS_ONE)
    return None


@rule(
    aten.split, aten.split_with_sizes, aten.unsafe_split, aten.unsafe_split_with_sizes, aten.chunk, aten.unsafe_chunk,
    aten.tensor_split, aten.split_copy, aten.split_with_sizes_copy,
)  # fmt: skip
def split(call: Call) -> list[Dims]:
    """Ranges of a dimension, one after the other.

    Where Python wrote the sizes they can be rewritten; else the pieces are equal, and stay so.
    """
    source: Tensor = call.args[0]
    dims = call.dims(source)
    dim = call.arg(2, "dim", 0) % source.dim()
    labels = dims[dim]
    sizes = [out.size(dim) for out in call.out]
    if labels is None:
        return [dims] * len(sizes)
    pieces = list(labels.split(sizes))
    if not call.patchable and len(pieces) > 1:
        if len(set(sizes)) > 1 or call.func.overloadpacket in (aten.split_with_sizes, aten.unsafe_split_with_sizes):
            call.freeze(labels, PICKS_PART)
        else:
            call.book.tie(*pieces)
    return [(*dims[:dim], _alone(call, piece), *dims[dim + 1 :]) for piece in pieces]


@rule(aten.unbind)
def unbind(call: Call) -> list[Dims]:
    """Each index of a dimension by itself: as many as there are."""
    dims = list(call.dims(call.args[0]))
    call.freeze(dims.pop(call.arg(1, "dim", 0)), PICKS_ONE)
    return [tuple(dims)] * len(call.out)


@rule(aten.constant_pad_nd)
def pad(call: Call) -> Dims:
    """Padding with a constant: along labelled dimensions there are new indices, as many as the widths say."""
    source: Tensor = call.args[0]
    widths: list[int] = call.args[1]  # before and after, last dimension first
    blank = call.arg(2, "value", 0) == 0
    result: list[Tensor | None] = []
    for dim, labels in enumerate(call.dims(source)):
        place = 2 * (source.dim() - 1 - dim)
        around = widths[place : place + 2] or [0, 0]
        if not blank and (any(widths[:place]) or any(widths[place + 2 :])):
            labels = call.book.fill(labels)
        if labels is None or not any(around):
            result.append(labels)
        elif min(around) < 0:
            call.freeze(labels, PICKS_PART)
            result.append(None)
        else:
            result.append(torch.cat([_padding(call, place, blank), labels, _padding(call, place + 1, blank)]))
    return tuple(result)


def _padding(call: Call, place: int, blank: bool) -> Tensor:
    width = call.args[1][place]
    if not call.patchable or not width:
        return torch.full((width,), FIXED)
    labels = call.book.new(width)
    call.sizes[place] = labels
    filled = labels if blank else call.book.fill(labels)
    assert filled is not None
    return filled


@rule(
    aten.reflection_pad1d, aten.reflection_pad2d, aten.reflection_pad3d,
    aten.replication_pad1d, aten.replication_pad2d, aten.replication_pad3d,
)  # fmt: skip
def pad_with_own(call: Call) -> Dims:
    """Padding with elements from inside: those dimensions stay."""
    dims = call.dims(call.args[0])
    padded = len(call.args[1]) // 2
    for labels in dims[-padded:]:
        call.freeze(labels, "pads it with its own indices")
    return (*dims[:-padded], *(None,) * padded)


@rule(aten.as_strided, aten.as_strided_, aten.view.dtype, aten.view_as_real, aten.view_as_complex)
def reinterpret(call: Call) -> Dims | None:
    """Memory read under another shape or type: no index can be followed, but where the shape stays they all can."""
    source: Tensor = call.args[0]
    if call.func.overloadpacket in (aten.as_strided, aten.as_strided_) and call.out.shape == source.shape:
        return call.dims(source)
    if call.func.overloadpacket in (aten.view_as_real, aten.view_as_complex):
        dims = call.dims(source)
        if call.func.overloadpacket is aten.view_as_real:
            return (*dims, None)
        call.freeze(dims[-1], "reads pairs as complex numbers")
        return dims[:-1]
    call.freeze_all(f"reads memory under another shape or type ({call})")
    return None


@rule(aten.cat)
def cat(call: Call) -> Dims:
    """Concatenation: labels follow each other along the dimension, the others are common to all."""
    tensors: list[Tensor] = [t for t in call.args[0] if t.numel() or t.dim() > 1]
    if not tensors:  # a detector without a box
        return (None,)
    along: int = call.arg(1, "dim", 0) % tensors[0].dim()
    every = [call.dims(tensor) for tensor in tensors]
    result: list[Tensor | None] = []
    for dim, common in enumerate(every[0]):
        if dim == along:
            if all(dims[dim] is None for dims in every):
                result.append(None)
            else:
                parts = zip(tensors, every, strict=True)
                result.append(torch.cat([_or_fixed(dims[dim], t.size(dim)) for t, dims in parts]))
            continue
        result.append(_common(call, [dims[dim] for dims in every], common))
    return tuple(result)


@rule(aten.stack)
def stack(call: Call) -> Dims:
    """Tensors side by side along a new dimension."""
    every = [call.dims(tensor) for tensor in call.args[0]]
    result = [_common(call, [dims[dim] for dims in every], common) for dim, common in enumerate(every[0])]
    result.insert(call.arg(1, "dim", 0) % call.out.dim(), None)
    return tuple(result)


def _common(call: Call, every: Sequence[Tensor | None], common: Tensor | None) -> Tensor | None:
    for labels in every[1:]:
        common = call.unify(common, labels)
    if common is not None:
        filled = [labels for labels in every if labels is not None and call.book.is_filled(labels)]
        return filled[0] if filled else common
    return None


def _or_fixed(labels: Tensor | None, size: int) -> Tensor:
    return torch.full((size,), FIXED) if labels is None else labels


@rule(aten.pixel_shuffle)
def pixel_shuffle(call: Call) -> Dims:
    """Channels become pixels, r x r of each: they go together."""
    return _channels_to_space(call, call.args[1] ** 2, 2)


@rule(aten.pixel_unshuffle)
def pixel_unshuffle(call: Call) -> Dims:
    """Pixels become channels, r x r of each."""
    return _space_to_channels(call, call.args[1] ** 2, call.out.dim() - 3)


@rule(aten.im2col)
def im2col(call: Call) -> Dims:
    """Windows as columns: every channel once per place in the window."""
    height, width = call.args[1]
    return _space_to_channels(call, height * width, call.out.dim() - 2)


@rule(aten.col2im)
def col2im(call: Call) -> Dims:
    """The way back: places in the window are summed up."""
    height, width = call.args[2]
    return _channels_to_space(call, height * width, 1)


def _channels_to_space(call: Call, times: int, spatial: int) -> Dims:
    dims = call.dims(call.args[0])
    *before, channels = dims[:-spatial]
    for labels in dims[-spatial:]:
        call.freeze(labels, "moves channels into it")
    if channels is not None and len(channels) > times:
        outer, inner = call.book.split(channels.view(-1, times), str(call))
        call.book.freeze(inner, "")
        channels = outer
    elif channels is not None:
        call.freeze(channels, "moves channels into space")
        channels = None
    return (*before, channels, *(None,) * (call.out.dim() - len(before) - 1))


def _space_to_channels(call: Call, times: int, channel: int) -> Dims:
    dims = call.dims(call.args[0])
    for labels in dims[channel + 1 :]:
        call.freeze(labels, "moves it into channels")
    channels = dims[channel]
    repeated = None if channels is None else channels.repeat_interleave(times)
    return (*dims[:channel], repeated, *(None,) * (call.out.dim() - channel - 1))


@rule(aten.channel_shuffle, aten.native_channel_shuffle)
def channel_shuffle(call: Call) -> Dims:
    """Channels as groups x members become members x groups."""
    dims = list(call.dims(call.args[0]))
    labels, groups = dims[1], call.args[1]
    if labels is not None:
        if 1 < groups < len(labels):
            outer, inner = call.book.split(labels.view(groups, -1), str(call))
            call.sizes[0] = outer
            labels = call.book.merge((inner, outer), str(call)).flatten()
        dims[1] = labels
    return tuple(dims)


def keep(call: Call) -> Dims:
    """The output holds the first argument's indices unchanged."""
    return call.dims(call.args[0])


aten_family(
    keep, ["detach", "detach_", "alias", "clone", "_to_copy", "contiguous", "lift", "lift_fresh", "to", "_conj",
           "resolve_conj", "resolve_neg", "requires_grad_", "set_"],
)  # fmt: skip


@rule(aten.tril, aten.triu, aten.tril_, aten.triu_)
def triangle(call: Call) -> Dims:
    """What is on one side of the diagonal stays there if the same rows and columns go."""
    *before, rows, columns = call.dims(call.args[0])
    lower = call.func.overloadpacket in (aten.tril, aten.tril_)
    same = call.arg(1, "diagonal", 0) in ((0, -1) if lower else (0, 1)) and call.out.size(-2) == call.out.size(-1)
    if rows is None or columns is None or not same:
        for labels in (rows, columns):
            call.freeze(labels, "compares rows with columns")
        return (*before, None, None)
    call.unify(rows, columns)
    return (*before, rows, columns)


@rule(aten.diag_embed)
def diag_embed(call: Call) -> Dims:
    """A diagonal of the last dimension, zero elsewhere: an index goes as row and column."""
    *dims, labels = call.dims(call.args[0])
    ends = (call.arg(2, "dim1", -2) % call.out.dim(), call.arg(3, "dim2", -1) % call.out.dim())
    if call.arg(1, "offset", 0):
        call.freeze(labels, "moves it off the diagonal")
        labels = None
    for end in sorted(ends):
        dims.insert(end, labels)
    return tuple(dims)


@rule(aten.block_diag)
def block_diag(call: Call) -> Dims:
    """Matrices along a diagonal: their rows follow each other, and their columns."""
    blocks = call.args[0]
    if any(block.dim() != 2 for block in blocks):
        call.freeze_all(f"makes a matrix of it ({call})")
        return (None, None)
    rows, columns = ([_or_fixed(call.dims(block)[dim], block.size(dim)) for block in blocks] for dim in (0, 1))
    return (torch.cat(rows), torch.cat(columns))


@rule(aten.diagonal, aten.unfold)
def windows(call: Call) -> Dims:
    """Views that show an index several times or pair dimensions: those stay, the others pass.

    On the diagonal of a square an index is both its row and its column.
    """
    dims = list(call.dims(call.args[0]))
    rank = len(dims)
    if call.func.overloadpacket is aten.unfold:
        along = {call.args[1] % rank}
    else:
        one, other = call.arg(2, "dim1", 0) % rank, call.arg(3, "dim2", 1) % rank
        along = {one, other}
        if not call.arg(1, "offset", 0) and call.args[0].size(one) == call.args[0].size(other):
            common = call.unify(dims[one], dims[other])
            return (*(labels for at, labels in enumerate(dims) if at not in along), common)
    for dim in along:
        call.freeze(dims[dim], "reads it in windows or along a diagonal")
    if call.func.overloadpacket is aten.unfold:
        (dim,) = along
        return (*(None if at == dim else labels for at, labels in enumerate(dims)), None)
    return (*(labels for at, labels in enumerate(dims) if at not in along), None)


# -- indices that are tensors -----------------------------------------------------------------------------------------


@rule(aten.index, aten._unsafe_index)
def index(call: Call) -> Dims:
    """Picks by tensors of indices; the dimensions that it does not pick from pass."""
    source: Tensor = call.args[0]
    dims = call.dims(source)
    given: list[Tensor | None] = list(call.args[1]) + [None] * (source.dim() - len(call.args[1]))
    if any(each is not None and each.dtype in (torch.bool, torch.uint8) for each in given):
        return _mask(call, dims, given)
    places = [dim for dim, each in enumerate(given) if each is not None]
    shape = torch.broadcast_shapes(*(each.shape for each in given if each is not None))
    together = places == list(range(places[0], places[-1] + 1))
    rest = [labels for dim, labels in enumerate(dims) if dim not in places]
    if call.static(source) and not all(call.static(each) for each in given if each is not None):  # as an embedding does
        for labels in rest:
            call.book.produce(labels)
    front = places[0] if together else 0
    picked: list[Tensor | None] = [None] * len(shape)
    for dim in places:
        labels, each = dims[dim], given[dim]
        if each is not None:
            _follow_index(call, labels, each, call.dims(each), picked, constant=len(places) == 1 and call.static(each))
    return (*rest[:front], *picked, *rest[front:])


def _follow_index(
    call: Call, labels: Tensor | None, each: Tensor, own: Dims, picked: list[Tensor | None], *, constant: bool
) -> None:
    """Picking along one dimension: a buffer of numbers can be made to count anew, and so can numbers in the call."""
    if constant and labels is not None and each.dim() == 1 and own[0] is None:
        each = each.detach().cpu().long()
        each = torch.where(each < 0, each + len(labels), each)
        if call.is_literal(each):
            picked[0] = _alone(call, labels[each])
            return
    if labels is None or not constant or each.dim() != 1 or own[0] is None:
        call.freeze(labels, "picks indices of")
        for other in own:
            call.freeze(other, "picks with it")
        return
    picked[0] = call.book.unify(labels[each.cpu()], own[0], "")
    call.constants.append((each, own[0], labels))


def _mask(call: Call, dims: Dims, given: Sequence[Tensor | None]) -> Dims:
    if sum(each is not None for each in given) > 1:
        call.freeze_all(f"picks by several masks ({call})")
        return (None,) * int(call.out.dim())
    at = next(dim for dim, each in enumerate(given) if each is not None)
    mask = given[at]
    assert mask is not None
    own, picked = call.dims(mask), dims[at]
    if mask.dim() == 1 and call.static(mask) and picked is not None:
        if own[0] is not None:  # a buffer that shrinks
            call.unify(picked, own[0])
        if own[0] is not None or call.is_literal(mask.nonzero().squeeze(1)):
            return (*dims[:at], _alone(call, picked[mask.bool().cpu()]), *dims[at + 1 :])
    for labels in (*dims[at : at + mask.dim()], *call.dims(mask)):
        call.freeze(labels, "picks by a mask from")
    return (*dims[:at], None, *dims[at + mask.dim() :])


@rule(aten.index_put, aten.index_put_, aten._unsafe_index_put)
def index_put(call: Call) -> Dims:
    """Writes at tensors of indices: the dimensions that it writes along stay, those behind are common to both."""
    target, values = call.args[0], call.args[2]
    dims, own = list(call.dims(target)), call.dims(values)
    mask = call.args[1][0]
    if mask is not None and mask.shape == target.shape and values.numel() == 1:  # it is masked_fill
        return tuple(map(call.book.fill, map(call.unify, dims, call.dims(mask))))
    places = [(dim, each) for dim, each in _indexed(call.args[1]) if each is not None]
    if len(places) == 1 and places[0][1].dtype == torch.bool and call.static(places[0][1]):
        return _put_by_mask(call, dims, *places[0])
    written = [dim for dim, each in _indexed(call.args[1]) if each is not None]
    behind = written[-1] + 1
    if written != list(range(behind)):  # the written ones come first in the values then
        behind = len(dims)
    for labels in (*dims[:behind], *own[: max(values.dim() - (len(dims) - behind), 0)]):
        call.freeze(labels, "writes at indices of")
    dims[:behind] = [None] * behind
    for dim in range(behind, len(dims)):
        back = len(dims) - dim
        varies = values.dim() >= back and values.size(-back) > 1
        dims[dim] = call.unify(dims[dim], own[-back]) if varies else call.book.fill(dims[dim])
    return tuple(dims)


def _put_by_mask(call: Call, dims: list[Tensor | None], at: int, mask: Tensor) -> Dims:
    """Writes where a constant mask of one dimension says; a buffer shrinks with that dimension."""
    values, labels = call.args[2], dims[at]
    dims[at] = call.unify(labels, call.dims(mask)[0])
    for dim, each in enumerate(dims):
        back = len(dims) - dim
        if values.dim() < back or values.size(-back) == 1:
            dims[dim] = call.book.fill(each)
            continue
        own = call.dims(values)[-back]
        if dim != at:
            dims[dim] = call.unify(each, own)
        elif labels is None or own is None:
            call.freeze(labels, "writes at indices of")
            call.freeze(own, "is written at indices")
        else:
            call.unify(labels[mask.cpu()], own)
    return tuple(dims)


def _indexed(given: Sequence[Tensor | None]) -> Iterator[tuple[int, Tensor | None]]:
    """Which dimensions the parts of an index are about: a mask is about as many as it has."""
    dim = 0
    for each in given:
        mask = each is not None and each.dtype in (torch.bool, torch.uint8)
        for _ in range(each.dim() if mask and each is not None else 1):
            yield dim, each
            dim += 1


def write_along(call: Call) -> Dims:
    """Adds, copies or fills at places along one dimension, which stays; the others are common to all."""
    target, dim, places, source = call.args[0], call.args[1], call.args[2], call.args[3]
    dims = list(call.dims(target))
    if _writes_constants(call, dims[dim]):
        return tuple(dims)
    for at, labels in enumerate(dims):
        if at == dim % len(dims):
            call.freeze(labels, "writes at indices of")
            dims[at] = None
        elif isinstance(source, Tensor) and source.dim() == len(dims):
            dims[at] = call.unify(labels, call.dims(source)[at])
        else:
            dims[at] = call.book.fill(labels)
    if isinstance(source, Tensor) and source.dim() == len(dims):
        call.freeze(call.dims(source)[dim], "is written at indices")
    if places.dim() == len(dims):  # scatter has an index for each element
        for at, labels in enumerate(call.dims(places)):
            call.unify(labels, dims[at])
    return tuple(dims)


def _writes_constants(call: Call, labels: Tensor | None) -> bool:
    """Rows put in the places that a buffer names: it can be made to count anew."""
    target, dim, places, source = call.args[:4]
    own = call.dims(places)
    if labels is None or not isinstance(source, Tensor) or source.dim() != target.dim() or places.dim() != 1:
        return False
    read = call.dims(source)
    if own[0] is None or read[dim] is None or not call.static(places):
        return False
    call.unify(own[0], read[dim])
    call.unify(labels[places.cpu()], read[dim])
    call.constants.append((places, own[0], labels))
    for at, other in enumerate(call.dims(target)):
        if at != dim % target.dim():
            call.unify(other, read[at])
    return True


aten_family(write_along, ["index_add", "index_add_", "index_copy", "index_copy_", "index_fill", "index_fill_",
                          "scatter", "scatter_", "scatter_add", "scatter_add_", "scatter_reduce", "scatter_reduce_",
                          "index_reduce", "index_reduce_"])  # fmt: skip


@rule(aten.index_select)
def index_select(call: Call) -> Dims:
    """Picks along one dimension."""
    dims = list(call.dims(call.args[0]))
    dim = call.args[1] % len(dims)
    picked: list[Tensor | None] = [None]
    places = call.args[2]
    _follow_index(call, dims[dim], places, call.dims(places), picked, constant=call.static(places))
    dims[dim] = picked[0]
    return tuple(dims)


@rule(aten.gather)
def gather(call: Call) -> Dims:
    """Picks along one dimension, differently at each place of the others."""
    source, dim, places = call.args[0], call.args[1], call.args[2]
    if not source.dim():
        return ()
    dims, own = list(call.dims(source)), call.dims(places)
    for at, labels in enumerate(dims):
        if at == dim % len(dims):
            picked: list[Tensor | None] = [None]
            row = _row(places, at) if call.static(places) else None
            _follow_index(call, labels, places if row is None else row, (own[at],), picked, constant=row is not None)
            dims[at] = picked[0]
        elif places.size(at) == source.size(at):
            dims[at] = call.unify(labels, own[at])
        else:
            call.freeze(labels, PICKS_PART)
            call.freeze(own[at], PICKS_PART)
            dims[at] = None
    return tuple(dims)


def _row(places: Tensor, dim: int) -> Tensor | None:
    """The indices along a dimension, if they are the same wherever in the others."""
    row = places[tuple(slice(None) if at == dim else slice(0, 1) for at in range(places.dim()))]
    return row.flatten() if torch.equal(row.expand_as(places), places) else None


@rule(aten.bucketize, aten.searchsorted)
def bucketize(call: Call) -> Dims:
    """Where each value lies between bounds, which stay."""
    values, bounds = call.args[:2] if call.func.overloadpacket is aten.bucketize else reversed(call.args[:2])
    if not isinstance(values, Tensor):
        return ()
    for labels in call.dims(bounds):
        call.freeze(labels, "orders or searches")
    if bounds.dim() > 1:  # each row has bounds of its own
        for labels in call.dims(values):
            call.freeze(labels, "orders or searches")
        return (None,) * values.dim()
    return tuple(map(call.book.fill, call.dims(values)))


def along_one(call: Call) -> list[Dims]:
    """Orders, picks or finds along one dimension, which stays; the others pass."""
    source: Tensor = call.args[0]
    names = [argument.name for argument in call.func._schema.arguments]
    given = call.arg(names.index("dim"), "dim", -1) if "dim" in names else None
    dims = call.dims(source)
    if given is None or not source.dim():
        call.freeze_all(f"orders all indices ({call})")
        return [(None,) * int(out.dim()) for out in (call.out if isinstance(call.out, tuple) else [call.out])]
    call.freeze(dims[given], "orders or searches")
    after = tuple(None if dim == given % source.dim() else labels for dim, labels in enumerate(dims))
    outs = [call.out] if isinstance(call.out, Tensor) else list(call.out)
    dropped = tuple(labels for dim, labels in enumerate(after) if dim != given % source.dim())
    same = [after if out.dim() == source.dim() else dropped for out in outs]
    return [tuple(map(call.book.fill, dims)) for dims in same]


aten_family(along_one, ["sort", "topk", "argsort", "argmax", "argmin", "kthvalue", "cummax", "cummin"])


@rule(aten._pack_padded_sequence)
def pack(call: Call) -> list[Dims]:
    """Steps of several sequences in one row; what a step holds passes."""
    dims = call.dims(call.args[0])
    for labels in dims[:2]:
        call.freeze(labels, "packs sequences")
    return [(None, *dims[2:])]


@rule(aten._pad_packed_sequence)
def unpack(call: Call) -> list[Dims]:
    """The way back."""
    dims = call.dims(call.args[0])
    call.freeze(dims[0], "packs sequences")
    return [(None, None, *(dims[1:] if not call.args[3] else map(call.book.fill, dims[1:])))]


def masks(call: Call) -> None:
    """Reads values to say where something holds: whatever comes of it has no labels, what went in stays."""
    call.freeze_all(f"makes a shape of values ({call})")


family(masks, aten.nonzero, aten.masked_select, aten.unique_dim, aten._unique2, aten.bincount)
