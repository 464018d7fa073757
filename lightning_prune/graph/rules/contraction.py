"""Operations that sum over a pair of dimensions: the pair is unified, the free dimensions pass."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_prune.graph.labels import Dims
from lightning_prune.graph.rules.table import Call, rule

aten = torch.ops.aten


def _contract(call: Call, first: Tensor | None, second: Tensor | None) -> None:
    if first is not None and second is not None and call.book.is_filled(first) and call.book.is_filled(second):
        call.book.mix(first, f"{call}")  # a masked neuron adds something to the sum, a removed one doesn't
    read = call.book.unify(first, second, f"reads a fixed input: the model's own or a constant ({call})")
    if read is not None:
        call.factors.append(read)


def _free(call: Call, *dims: Tensor | None) -> None:
    for labels in dims:
        if labels is not None:
            call.book.produce(labels)
            call.factors.append(labels)


@rule(aten.convolution)
def convolution(call: Call) -> Dims:
    """Convolution of any rank, transposed or not; depthwise ones keep each channel to itself."""
    x, weight, bias = call.args[:3]
    transposed, groups = call.args[6], call.args[8]
    x_dims, w_dims = call.dims(x), call.dims(weight)
    for kernel in w_dims[2:]:
        call.book.freeze(kernel, "")
    for position in x_dims[2:]:
        call.book.freeze(position, f"convolves over it ({call})")
    made, read = (w_dims[1], w_dims[0]) if transposed else (w_dims[0], w_dims[1])
    if groups == 1:
        _contract(call, x_dims[1], read)
        _free(call, made)
    elif groups == weight.size(0) and weight.size(1) == 1:
        made = call.book.unify(w_dims[0], x_dims[1], f"reads a fixed input ({call})")
        call.factors.extend([] if made is None else [made])
    else:
        for labels in (x_dims[1], *w_dims[:2]):
            call.book.freeze(labels, f"grouped convolution has no rule yet ({call})")
        made = None
    if bias is not None:
        made = call.book.unify(made, call.dims(bias)[0], f"meets a dimension of fixed size ({call})")
    batch = x_dims[0] if bias is None else call.book.fill(x_dims[0])
    call.factors.extend([] if batch is None else [batch])
    return (batch, made, *(None,) * (x.dim() - 2))


@rule(aten.mm)
def mm(call: Call) -> Dims:
    """Matrix product (n, k) @ (k, m)."""
    (n, k), (k2, m) = call.dims(call.args[0]), call.dims(call.args[1])
    _contract(call, k, k2)
    _free(call, n, m)
    return n, m


@rule(aten.addmm)
def addmm(call: Call) -> Dims:
    """Matrix product with an added bias that broadcasts."""
    bias = call.args[0]
    (n, k), (k2, m) = call.dims(call.args[1]), call.dims(call.args[2])
    _contract(call, k, k2)
    _free(call, n, m)
    result = [n, m]
    along = [bias.dim() >= back and bias.size(-back) > 1 for back in (2, 1)]
    for dim, (back, varies) in enumerate(zip((2, 1), along, strict=True)):
        if varies:
            labels = call.dims(bias)[-back]
            result[dim] = call.book.unify(result[dim], labels, f"meets a dimension of fixed size ({call})")
        else:
            result[dim] = call.book.fill(result[dim])  # the bias stays where a masked row was zero
    return tuple(result)


@rule(aten.bmm)
def bmm(call: Call) -> Dims:
    """Batched matrix product (b, n, k) @ (b, k, m)."""
    (b, n, k), (b2, k2, m) = call.dims(call.args[0]), call.dims(call.args[1])
    _contract(call, k, k2)
    _free(call, n, m)
    batch = call.book.unify(b, b2, f"meets a dimension of fixed size ({call})")
    if batch is not None and b2 is not None and call.book.is_filled(batch):
        batch = b2  # zero where either is
    return batch, n, m
