"""Normalisation, pooling, reduction, embedding: per-channel parameters, windows over space, dimensions that end."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_prune.graph.labels import Dims
from lightning_prune.graph.rules.table import Call, aten_family, rule

aten = torch.ops.aten


def batch_norm(call: Call) -> list[Dims]:
    """Weight, bias and running statistics belong to the channel; no channel sees another."""
    x = call.args[0]
    dims = list(call.dims(x))
    for tensor in call.args[1:5]:
        if isinstance(tensor, Tensor):
            dims[1] = call.unify(dims[1], call.dims(tensor)[0], "normalises a dimension of fixed size")
    weight = call.args[1]
    if isinstance(weight, Tensor) and dims[1] is not None:
        dims[1] = call.dims(weight)[0]  # a masked scale makes zero of whatever comes in
    if any(
        given is True for given in call.args[3:6]
    ):  # statistics over this very input, such as a weight that is standardised
        for dim in range(len(dims)):
            if dim != 1:
                call.mix(dims[dim])
                dims[dim] = call.book.fill(dims[dim])
    return [tuple(dims), (dims[1],), (dims[1],)]


aten_family(
    batch_norm,
    [
        "_batch_norm_no_update",
        "_batch_norm_with_update",
        "_native_batch_norm_legit",
        "_native_batch_norm_legit_no_training",
        "cudnn_batch_norm",
        "miopen_batch_norm",
        "native_batch_norm",
    ],
)


@rule(aten.native_layer_norm)
def layer_norm(call: Call) -> list[Dims]:
    """Statistics over the trailing dimensions: removing an index changes them."""
    return _trailing(call, call.args[2:4], keeps_zero=len(call.args) > 3 and call.args[2] is not None)


def rms_norm(call: Call) -> list[Dims]:
    """The same without a mean: zero stays zero."""
    return _trailing(call, call.args[2:3], keeps_zero=True)


aten_family(rms_norm, ["_fused_rms_norm"])


def _trailing(call: Call, parameters: tuple[Tensor | None, ...], *, keeps_zero: bool) -> list[Dims]:
    x, shape = call.args[0], call.args[1]
    dims = list(call.dims(x))
    first = len(dims) - len(shape)
    for place in range(len(shape)):
        labels = dims[first + place]
        for tensor in parameters:
            if tensor is not None:
                labels = call.unify(labels, call.dims(tensor)[place], "normalises a dimension of fixed size")
        if labels is not None:
            call.mix(labels)
            call.sizes[place] = labels
            weight = parameters[0]
            labels = labels if weight is None else call.dims(weight)[place]
        dims[first + place] = labels if keeps_zero else call.book.fill(labels)
    before = tuple(call.book.fill(labels) for labels in dims[:first])
    return [(*before, *dims[first:])]


@rule(aten.native_group_norm)
def group_norm(call: Call) -> list[Dims]:
    """Statistics over groups of channels: whole groups go and nothing mixes, or the same places of all, which do."""
    x, weight, bias, groups = call.args[0], call.args[1], call.args[2], call.args[6]
    dims = list(call.dims(x))
    labels = dims[1]
    for tensor in (weight, bias):
        if tensor is not None:
            labels = call.unify(labels, call.dims(tensor)[0], "normalises a dimension of fixed size")
    if labels is not None:
        if groups == len(labels):
            call.sizes[0] = labels
        elif groups == 1:
            call.mix(labels)
        else:
            outer, inner = call.book.split(labels.view(groups, -1), str(call))
            call.sizes[0] = outer
            call.mix(inner)
        if weight is not None:
            labels = call.dims(weight)[0]
        elif groups < len(labels):
            labels = call.book.fill(labels)
    for position in dims[2:]:
        call.freeze(position, "normalises over it")
    return [(dims[0] if weight is None else call.book.fill(dims[0]), labels, *(None,) * (x.dim() - 2))]


@rule(aten._weight_norm_interface)
def weight_norm(call: Call) -> list[Dims]:
    """A direction and a length per row. A row of length zero is zero, whatever its direction; 0 / 0 is not."""
    direction, length, dim = call.args[0], call.args[1], call.arg(2, "dim", 0)
    dims = list(call.dims(direction))
    dims[dim] = call.unify(dims[dim], call.dims(length)[dim])
    call.unmasked.append((direction, dim))
    return [tuple(dims), call.dims(length)]


# -- windows over space -----------------------------------------------------------------------------------------------

_SPATIAL_DIMS = {
    "_adaptive_avg_pool2d": 2,
    "_adaptive_avg_pool3d": 3,
    "_upsample_bicubic2d_aa": 2,
    "_upsample_bilinear2d_aa": 2,
    "_upsample_nearest_exact1d": 1,
    "_upsample_nearest_exact2d": 2,
    "_upsample_nearest_exact3d": 3,
    "adaptive_avg_pool1d": 1,
    "adaptive_max_pool1d": 1,
    "adaptive_max_pool2d": 2,
    "adaptive_max_pool3d": 3,
    "avg_pool1d": 1,
    "avg_pool2d": 2,
    "avg_pool3d": 3,
    "cudnn_grid_sampler": 2,
    "fractional_max_pool2d": 2,
    "fractional_max_pool3d": 3,
    "grid_sampler_2d": 2,
    "grid_sampler_3d": 3,
    "max_pool1d": 1,
    "max_pool2d": 2,
    "max_pool2d_with_indices": 2,
    "max_pool3d": 3,
    "max_pool3d_with_indices": 3,
    "max_unpool2d": 2,
    "max_unpool3d": 3,
    "mkldnn_max_pool2d": 2,
    "mkldnn_max_pool3d": 3,
    "upsample_bicubic2d": 2,
    "upsample_bilinear2d": 2,
    "upsample_linear1d": 1,
    "upsample_nearest1d": 1,
    "upsample_nearest2d": 2,
    "upsample_nearest3d": 3,
    "upsample_trilinear3d": 3,
}


def pool(call: Call) -> list[Dims]:
    """Windows over the trailing dimensions: batch and channels pass, positions are new."""
    dims = call.dims(call.args[0])
    windows = _SPATIAL_DIMS[call.func.overloadpacket.__name__]
    positions = [_window(call, dim, windows, labels) for dim, labels in enumerate(dims[-windows:])]
    after: Dims = (*dims[:-windows], *positions)
    name = call.func.overloadpacket.__name__
    if "grid_sampler" in name:  # the places to sample at belong to the same examples
        batch, *others = call.dims(call.args[1])
        for labels in others:
            call.freeze(labels, "samples at it")
        if call.args[1].size(0) > 1:
            after = (call.unify(after[0], batch), *after[1:])
    if name.startswith("max_unpool"):
        for one, other in zip(after, call.dims(call.args[1]), strict=True):
            call.unify(one, other)
    return [after] * 2  # values and, for max pooling, their indices


aten_family(pool, list(_SPATIAL_DIMS))

_SLIDES = ("avg_pool", "max_pool", "mkldnn_max_pool")


def _window(call: Call, at: int, windows: int, labels: Tensor | None) -> Tensor | None:
    """What a window makes of a labelled dimension: one of size 1 leaves it alone, one that slides by one mixes it."""
    name = call.func.overloadpacket.__name__
    if labels is None or not name.startswith(_SLIDES) or "unpool" in name:
        call.freeze(labels, "pools over it")
        return None
    size, stride, padding, dilation = (_of_window(call, place, at, default) for place, default in _GEOMETRY)
    stride = stride or size
    if (size, stride, padding) == (1, 1, 0):
        return labels
    dilation = 1 if name.startswith("avg_pool") else dilation
    count = (call.out if isinstance(call.out, Tensor) else call.out[0]).size(at - windows)
    if (stride, padding, dilation) == (size, 0, 1) and 1 < count <= len(labels) // size:  # side by side: maxout
        call.book.tie(*labels[: count * size].view(count, size).unbind(1))
        call.freeze(labels[count * size :], "is left over by windows")
        return labels[: count * size : size]
    start = size // 2 * dilation - padding
    left = labels[max(start, 0) :][:count]
    if stride > 1 or start < 0 or len(left) < count:
        call.freeze(labels, "pools over it")
        return None
    call.freeze(labels[:start], "is at the edge of a window")  # such as what pads it
    call.freeze(labels[start + len(left) :], "is at the edge of a window")
    call.mix(left)
    return call.book.fill(left)


_GEOMETRY = ((1, 1), (2, 0), (3, 0), (4, 1))
"""Arguments of pooling: size, stride, padding, dilation, and what they are where they are not given."""


def _of_window(call: Call, place: int, at: int, default: int) -> int:
    given = call.args[place] if len(call.args) > place else default
    if isinstance(given, (list, tuple)):
        return int(given[at % len(given)]) if given else 0
    return int(given)


@rule("torchvision::roi_align", "torchvision::roi_pool")
def regions(call: Call) -> list[Dims]:
    """Windows of an image, one per box: channels pass."""
    channels = call.dims(call.args[0])[1]
    return [(None, channels, None, None)] * 2


# -- dimensions that end ----------------------------------------------------------------------------------------------

_ADDS_UP = {aten.sum, aten.nansum, aten.linalg_vector_norm, aten.norm, aten.count_nonzero}


def reduce(call: Call) -> list[Dims]:
    """Dimensions that end. A sum over removed zeros is the same sum; the others mix."""
    x = call.args[0]
    ended = _ended_dims(call, x)
    dims = call.dims(x)
    packet = call.func.overloadpacket
    adds_up = packet in _ADDS_UP and (packet not in (aten.linalg_vector_norm, aten.norm) or call.arg(1, "ord", 2) > 0)
    for dim in ended:
        labels = dims[dim]
        if labels is not None and (not adds_up or call.book.is_filled(labels)):
            call.mix(labels)
    if packet is aten.logsumexp:  # of zeros it is not zero
        dims = tuple(call.book.fill(labels) for labels in dims)
    keepdim = call.out.dim() if isinstance(call.out, Tensor) else call.out[0].dim()
    if keepdim == x.dim():
        return [tuple(None if i in ended else labels for i, labels in enumerate(dims))] * 2
    return [tuple(labels for i, labels in enumerate(dims) if i not in ended)] * 2


aten_family(
    reduce,
    ["all", "amax", "amin", "any", "count_nonzero", "linalg_vector_norm", "logsumexp", "max", "mean", "min", "nansum",
     "median", "mode", "nanmedian", "norm", "prod", "std", "std_mean", "sum", "var", "var_mean", "aminmax"],
)  # fmt: skip


def _ended_dims(call: Call, x: Tensor) -> set[int]:
    names = [argument.name for argument in call.func._schema.arguments]
    dims = call.arg(names.index("dim"), "dim") if "dim" in names else None
    if dims is None or dims == []:
        return set(range(x.dim()))
    return {dim % x.dim() for dim in ([dims] if isinstance(dims, int) else dims)} if x.dim() else set()


def softmax(call: Call) -> Dims:
    """Divides by a sum over the dimension: removing an entry changes all the others."""
    x, dim = call.args[0], call.args[1]
    labels = call.dims(x)
    if x.dim():
        call.mix(labels[dim])
    return tuple(map(call.book.fill, labels))


aten_family(softmax, ["_log_softmax", "_safe_softmax", "_softmax", "softmax"])


def cumulate(call: Call) -> Dims:
    """Sums over all indices up to each: a masked one adds nothing, though its own place holds a sum."""
    x, dim = call.args[0], call.args[1]
    dims = list(call.dims(x))
    if x.dim() and dims[dim] is not None:
        if call.func.overloadpacket not in (aten.cumsum, aten.cumsum_) or call.book.is_filled(dims[dim]):
            call.mix(dims[dim])
        dims[dim] = call.book.fill(dims[dim])
    return tuple(dims)


aten_family(cumulate, ["cumprod", "cumsum", "cumsum_", "logcumsumexp"])


def transform(call: Call) -> Dims:
    """A transform over some dimensions: they stay, the others pass."""
    x, along = call.args[0], {dim % call.args[0].dim() for dim in call.args[1]}
    dims = call.dims(x)
    for dim in along:
        call.freeze(dims[dim], "transforms it")
    return tuple(None if dim in along else labels for dim, labels in enumerate(dims))


aten_family(transform, ["_fft_c2c", "_fft_c2r", "_fft_r2c"])


@rule(aten.renorm, aten.embedding_renorm_)
def renorm(call: Call) -> Dims:
    """Scales rows whose norm is too large: a sum of squares, to which a masked index adds nothing."""
    return call.dims(call.args[0])


@rule(aten.embedding)
def embedding(call: Call) -> Dims:
    """A row per index: the rows stay, their features are made here."""
    rows, features = call.dims(call.args[0])
    call.book.freeze(rows, "")
    call.book.produce(features)
    return (*call.dims(call.args[1]), features)


def embedding_bag(call: Call) -> list[Dims]:
    """Sums, means or maxima over bags of rows."""
    rows, features = call.dims(call.args[0])
    call.book.freeze(rows, "")
    call.book.produce(features)
    return [(None, features)]


aten_family(embedding_bag, ["_embedding_bag", "_embedding_bag_forward_only"])
