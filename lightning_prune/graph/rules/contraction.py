"""Operations that sum over a pair of dimensions: the pair is unified, the free dimensions pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_prune.graph.labels import Dims
from lightning_prune.graph.rules.table import Call, aten_family, rule

aten = torch.ops.aten


@rule(aten.convolution)
def convolution(call: Call) -> Dims:
    """Convolution of any rank, transposed or not, grouped or not; depthwise ones keep each channel to itself."""
    x, weight, bias = call.args[:3]
    transposed, groups = call.args[6], call.args[8]
    x_dims, w_dims = call.dims(x), call.dims(weight)
    for kernel in w_dims[2:]:
        call.book.freeze(kernel, "")
    positions = [_position(call, dim, labels) for dim, labels in enumerate(x_dims[2:])]
    if groups > 1:
        made = (_grouped_transposed if transposed else _grouped)(call, x_dims[1], w_dims[0], w_dims[1])
    else:
        made, read = (w_dims[1], w_dims[0]) if transposed else (w_dims[0], w_dims[1])
        call.contract(x_dims[1], read)
        call.book.produce(made)
    call.cost(w_dims[0], w_dims[1], x_dims[0])
    if bias is not None:
        made = call.unify(made, call.dims(bias)[0])
    batch = x_dims[0] if bias is None else call.book.fill(x_dims[0])
    if bias is not None:
        positions = [call.book.fill(labels) for labels in positions]
    return (batch, made, *positions)


def _position(call: Call, dim: int, labels: Tensor | None) -> Tensor | None:
    """A kernel of one place leaves positions to themselves; any other mixes them."""
    size, stride = call.args[1].size(2 + dim), call.args[3][dim % len(call.args[3])]
    if (size, stride, call.args[4][dim % len(call.args[4])]) == (1, 1, 0):
        return labels
    if labels is not None and stride == 1 and call.out.size(2 + dim) == len(labels):  # over channels as positions: ECA
        call.mix(labels)
        return call.book.fill(labels)
    call.freeze(labels, "convolves over it")
    return None


def _grouped(call: Call, read: Tensor | None, made: Tensor | None, inside: Tensor | None) -> Tensor | None:
    return _grouped_by(call, call.args[8], read, made, inside)


def _grouped_by(
    call: Call, groups: int, read: Tensor | None, made: Tensor | None, inside: Tensor | None
) -> Tensor | None:
    """Whole groups go, with what they read and make; or the same places in all groups."""
    group = _groups_of(call, read, inside, groups)
    if made is None:  # a weight from outside
        call.freeze(group, "reads a weight of fixed size")
        return None
    if group is not None:
        call.sizes[0] = group
    if len(made) == groups:
        result: Tensor | None = call.unify(made, group, "reads a fixed input")
        if inside is not None:
            call.book.produce(made)
        return result
    outer, _ = call.book.split(made.view(groups, -1), str(call))
    call.unify(outer, group, "reads a fixed input")
    call.book.produce(made)
    return made


def _groups_of(call: Call, read: Tensor | None, inside: Tensor | None, groups: int) -> Tensor | None:
    if read is None:
        call.contract(inside, None)
        return None
    if inside is None:
        return read
    outer, inner = call.book.split(read.view(groups, -1), str(call))
    call.contract(inner, inside)
    return outer


def _grouped_transposed(call: Call, read: Tensor | None, own: Tensor | None, made: Tensor | None) -> Tensor | None:
    """The same where the weight is laid out by input channel."""
    groups: int = call.args[8]
    call.contract(read, own)
    if made is not None:
        call.book.produce(made)
    if read is None:
        return None if made is None else made.repeat(groups)
    group = read if len(read) == groups else call.book.split(read.view(groups, -1), str(call))[0]
    call.sizes[0] = group
    return group if made is None else call.book.merge((group, made), str(call)).flatten()


def _passes(call: Call, first: Tensor, second: Tensor, sides: tuple[Tensor | None, ...]) -> None:
    """Which of the free and contracted dimensions of a product are a layer's neurons: those of its weight."""
    n, k, m = sides
    call.cost(n, k, m)
    if call.static(first) and call.static(second):  # a weight in two factors: the rank between them is made too
        call.book.produce(k)
        call.book.produce(m)
    elif call.static(second):
        call.book.produce(m)
    elif call.static(first):
        call.book.produce(n)


def _product(call: Call, first: Tensor, second: Tensor) -> list[Tensor | None]:
    """Matrix product of two or three dimensions."""
    (*b, n, k), (*b2, k2, m) = call.dims(first), call.dims(second)
    read = call.contract(k, k2)
    _passes(call, first, second, (n, read, m))
    batch = [call.unify(one, other) for one, other in zip(b, b2, strict=True)]
    call.cost(*batch)
    for at, (labels, other) in enumerate(zip(batch, b2, strict=True)):
        if labels is not None and other is not None and call.book.is_filled(labels):
            batch[at] = other  # zero where either is
    return [*batch, n, m]


def _plus(call: Call, bias: Tensor, result: Sequence[Tensor | None]) -> Dims:
    """An added term that broadcasts; where it does, it stays in a masked row."""
    dims = call.dims(bias)
    rank = len(result)
    found = []
    for dim, labels in enumerate(result):
        back = rank - dim
        varies = bias.dim() >= back and bias.size(-back) > 1
        if not varies:
            found.append(call.book.fill(labels))
            continue
        own = dims[-back]
        common = call.unify(labels, own)
        found.append(own if common is not None and own is not None and call.book.is_filled(own) else common)
    return tuple(found)


@rule("torchvision::deform_conv2d")
def deformable(call: Call) -> Dims:
    """A convolution that reads where the offsets say; these come in channels of a fixed number."""
    x, weight, offset, mask, bias = call.args[:5]
    groups, parts = call.args[11], call.args[12]
    (batch, read, *positions), w_dims = call.dims(x), call.dims(weight)
    for labels in positions:
        call.freeze(labels, "convolves over it")
    for kernel in w_dims[2:]:
        call.book.freeze(kernel, "")
    for tensor in (offset, mask):
        if tensor.numel():
            own = call.dims(tensor)
            batch = call.unify(batch, own[0])
            for labels in own[1:]:
                call.freeze(labels, "says where to read")
    if parts > 1 and read is not None:  # each part of the channels reads at places of its own
        call.book.freeze(call.book.split(read.view(parts, -1), str(call))[0], "")
    if groups > 1:
        made = _grouped_by(call, groups, read, w_dims[0], w_dims[1])
    else:
        call.contract(read, w_dims[1])
        made = w_dims[0]
        call.book.produce(made)
    call.cost(w_dims[0], w_dims[1], batch)
    return (call.book.fill(batch), call.unify(made, call.dims(bias)[0]), None, None)


@rule(aten.mm, aten.bmm)
def mm(call: Call) -> Dims:
    """Matrix product (n, k) @ (k, m), in batches or not."""
    return tuple(_product(call, call.args[0], call.args[1]))


def grouped_mm(call: Call) -> Dims:
    """Products of runs of rows with a matrix each, as a mixture of experts makes: the matrices stay."""
    first, second = call.args[:2]
    one, two = call.dims(first), call.dims(second)
    if first.dim() == second.dim() == 3:
        return tuple(_product(call, first, second))
    if first.dim() == second.dim() == 2:  # the runs are of what is summed over
        for labels in (one[1], two[0]):
            call.freeze(labels, "falls into groups")
        _passes(call, first, second, (one[0], None, two[1]))
        return (None, one[0], two[1])
    for labels in (*one[:-2], *two[:-2]):
        call.freeze(labels, "is a group by itself")
    rows, columns = one[-2], two[-1]
    read = call.contract(one[-1], two[-2])
    _passes(call, first, second, (rows, read, columns))
    bias = call.arg(3, "bias")
    return (rows, columns if bias is None else call.unify(columns, call.dims(bias)[-1]))


aten_family(grouped_mm, ["_grouped_mm"])


@rule(aten.addmm, aten.baddbmm)
def addmm(call: Call) -> Dims:
    """Matrix product with an added term that broadcasts."""
    result = _product(call, call.args[1], call.args[2])
    if call.kwargs.get("beta", 1) == 0:
        return tuple(result)
    return _plus(call, call.args[0], result)


aten_family(addmm, ["_sparse_addmm"])


@rule(aten.addbmm)
def addbmm(call: Call) -> Dims:
    """Sum of the products of a batch."""
    batch, *result = _product(call, call.args[1], call.args[2])
    if batch is not None and call.book.is_filled(batch):
        call.mix(batch)
    return _plus(call, call.args[0], result)


@rule(aten.mv)
def mv(call: Call) -> Dims:
    """Matrix times vector."""
    (n, k), (k2,) = call.dims(call.args[0]), call.dims(call.args[1])
    _passes(call, call.args[0], call.args[1], (n, call.contract(k, k2), None))
    return (n,)


@rule(aten.addmv)
def addmv(call: Call) -> Dims:
    """Matrix times vector, with an added term."""
    (n, k), (k2,) = call.dims(call.args[1]), call.dims(call.args[2])
    _passes(call, call.args[1], call.args[2], (n, call.contract(k, k2), None))
    return _plus(call, call.args[0], [n])


@rule(aten.dot, aten.vdot)
def dot(call: Call) -> Dims:
    """Product of two vectors."""
    call.cost(call.contract(call.dims(call.args[0])[0], call.dims(call.args[1])[0]))
    return ()


@rule(aten._trilinear)
def trilinear(call: Call) -> Dims:
    """Three tensors multiplied, some dimensions summed over; `nn.Bilinear` is one."""
    tensors, expanded, summed = call.args[:3], call.args[3:6], call.args[6]
    every = [_expanded(call.dims(tensor), dims) for tensor, dims in zip(tensors, expanded, strict=True)]
    sizes = [_expanded(tuple(tensor.shape), dims) for tensor, dims in zip(tensors, expanded, strict=True)]
    result = []
    for dim, column in enumerate(zip(*every, strict=True)):
        labels = [each for each, size in zip(column, (s[dim] for s in sizes), strict=True) if size is not None]
        common = labels[0] if labels else None
        for other in labels[1:]:
            common = call.contract(common, other) if dim in summed else call.unify(common, other)
        call.cost(common)
        if dim in summed:
            continue
        for tensor, own in zip(tensors, column, strict=True):
            if own is not None and call.static(tensor):
                call.book.produce(own)
        result.append(common)
    return tuple(result)


def _expanded(dims: Sequence[object], at: Sequence[int]) -> list[object]:
    result = list(dims)
    for dim in sorted(at):
        result.insert(dim, None)
    return result


@rule(aten._cdist_forward, aten._euclidean_dist)
def distance(call: Call) -> Dims:
    """Distances of all pairs of rows: a masked feature adds nothing."""
    (*b, n, k), (*b2, m, k2) = call.dims(call.args[0]), call.dims(call.args[1])
    call.contract(k, k2)
    _passes(call, call.args[0], call.args[1], (n, k, m))
    if len(b) == len(b2):
        batch = [call.unify(one, other) for one, other in zip(b, b2, strict=True)]
    else:
        for labels in (*b, *b2):
            call.freeze(labels, "pairs it with a dimension of another tensor")
        batch = [None] * (call.out.dim() - 2)
    return tuple(map(call.book.fill, (*batch, n, m)))


# -- attention --------------------------------------------------------------------------------------------------------


def attention(call: Call) -> list[Dims]:
    """Scaled dot-product attention over (batch, heads, tokens, features)."""
    query, key, value = call.args[:3]
    q, k, v = map(call.dims, (query, key, value))
    batch = _same(call, q[0], k[0], v[0])
    if query.size(1) == key.size(1):
        heads = _same(call, q[1], k[1], v[1])
    else:  # several heads of queries share one of keys and values
        shared = _same(call, k[1], v[1])
        times = query.size(1) // key.size(1)
        repeated = None if shared is None else shared.repeat_interleave(times)
        if key.size(1) == 1:
            call.freeze(q[1], "shares one head of keys and values")
            heads = None
        else:
            heads = call.unify(q[1], repeated)
    features = call.contract(q[3], k[3])
    if call.kwargs.get("scale") is None:
        call.mix(features)  # the scale is one over the root of their number
    same_tokens = call.unify(k[2], v[2])
    call.mix(same_tokens)
    mask = call.kwargs.get("attn_mask", call.args[3] if len(call.args) > 3 else None)
    if isinstance(mask, Tensor):
        for at, labels in ((-4, batch), (-3, heads), (-2, q[2]), (-1, same_tokens)):
            if mask.dim() >= -at and mask.size(at) > 1:
                call.unify(labels, call.dims(mask)[at])
    call.cost(batch, heads, features)
    out = (call.book.fill(batch), heads, call.book.fill(q[2]), v[3])
    return [out, (batch, heads, None)]


def _same(call: Call, first: Tensor | None, *others: Tensor | None) -> Tensor | None:
    for other in others:
        first = call.unify(first, other)
    return first


aten_family(
    attention,
    [
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_fused_attention_overrideable",
    ],
)


# -- recurrent layers -------------------------------------------------------------------------------------------------


def _gates(call: Call, hidden: Tensor | None, rows: Tensor | None, size: int) -> Tensor | None:
    """The rows of a gate matrix, or its bias: one per gate and neuron, which go together."""
    if rows is None:
        return hidden
    first, *others = rows.view(-1, size).unbind()
    call.book.tie(first, *others)
    return first if hidden is None else call.unify(hidden, first)


def _cell(call: Call, x: Tensor | None, weights: Sequence[Tensor], states: Sequence[Tensor], size: int) -> Tensor:
    """One layer in one direction: input and recurrent weights, biases."""
    matrices = [call.dims(weight) for weight in weights]
    call.contract(x, matrices[0][1])
    hidden = None
    for dims in matrices:
        hidden = _gates(call, hidden, dims[0], size)
    assert hidden is not None
    call.contract(hidden, matrices[1][1])
    for dims in matrices[:2]:
        call.book.produce(dims[0])
    call.cost(matrices[0][0], matrices[0][1])
    for state in states:
        call.unify(call.dims(state)[-1], hidden)
    return hidden


@rule(aten.mkldnn_rnn_layer)
def mkldnn_rnn_layer(call: Call) -> list[Dims]:
    """A whole layer of an LSTM, on the CPU without gradients."""
    x, *weights = call.args[:5]
    given = [state for state in call.args[5:7] if state.dim()]
    dims, size = call.dims(x), call.args[10]
    used = weights if call.args[12] else weights[:2]
    hidden = _cell(call, dims[2], used, given, size) if size > 1 else None
    states = [(*(None,) * (state.dim() - 1), hidden) for state in call.out[1:3]]
    return [(dims[0], dims[1], hidden), *states]


@rule(aten._thnn_fused_lstm_cell, aten._thnn_fused_gru_cell)
def fused_cell(call: Call) -> list[Dims]:
    """The gates of one step, on a GPU."""
    inputs, hidden_gates, state, *biases = [arg for arg in call.args if isinstance(arg, Tensor)]
    size = state.size(-1)
    hidden = None
    for tensor in (inputs, hidden_gates, *biases):
        hidden = _gates(call, hidden, call.dims(tensor)[-1], size)
    hidden = call.unify(hidden, call.dims(state)[-1])
    return [(call.dims(inputs)[0], hidden)] * 2


@rule(aten._cudnn_rnn)
def cudnn_rnn(call: Call) -> list[Dims]:
    """All layers and directions of a recurrent network, on a GPU."""
    x, weights, per_layer, hx, cx = call.args[0], call.args[1], call.args[2], call.args[4], call.args[5]
    size, projection, layers, both = call.args[7], call.args[8], call.args[9], 1 + bool(call.args[13])
    dims = call.dims(x)
    if projection or size < 2:
        call.freeze_all(f"projects its state ({call})")
        return []
    read, states = dims[2], [state for state in (hx, cx) if isinstance(state, Tensor)]
    for layer in range(layers):
        ends = []
        for direction in range(both):
            at = (layer * both + direction) * per_layer
            ends.append(_cell(call, read, weights[at : at + per_layer], [], size))
        read = torch.cat(ends)
        for end in ends:
            for state in states:
                call.unify(call.dims(state)[-1], end)
    return [(dims[0], dims[1], read)]
