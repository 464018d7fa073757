"""Normalisation, pooling and reduction: per-channel parameters, windows over space, dimensions that end."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_prune.graph.labels import Dims
from lightning_prune.graph.rules.table import Call, rule

aten = torch.ops.aten


@rule(aten.native_batch_norm, aten._native_batch_norm_legit, aten._native_batch_norm_legit_no_training,
      aten._batch_norm_with_update, aten._batch_norm_no_update, aten.cudnn_batch_norm)  # fmt: skip
def batch_norm(call: Call) -> list[Dims]:
    """Weight, bias and running statistics belong to the channel; no channel sees another."""
    x = call.args[0]
    dims = list(call.dims(x))
    for tensor in call.args[1:5]:
        if isinstance(tensor, Tensor):
            dims[1] = call.book.unify(dims[1], call.dims(tensor)[0], f"normalises a dimension of fixed size ({call})")
    weight = call.args[1]
    if isinstance(weight, Tensor) and dims[1] is not None:
        dims[1] = call.dims(weight)[0]  # a masked scale makes zero of whatever comes in
    return [tuple(dims), (dims[1],), (dims[1],)]


_POOLED_DIMS = {
    aten._adaptive_avg_pool2d: 2,
    aten._adaptive_avg_pool3d: 3,
    aten.adaptive_max_pool2d: 2,
    aten.adaptive_max_pool3d: 3,
    aten.avg_pool2d: 2,
    aten.avg_pool3d: 3,
    aten.max_pool2d_with_indices: 2,
    aten.max_pool3d_with_indices: 3,
}


@rule(*_POOLED_DIMS)
def pool(call: Call) -> list[Dims]:
    """Windows over the trailing dimensions: batch and channels pass, positions are new."""
    dims = call.dims(call.args[0])
    windows = _POOLED_DIMS[call.func.overloadpacket]
    for labels in dims[-windows:]:
        call.book.freeze(labels, f"pools over it ({call})")
    return [(*dims[:-windows], *(None,) * windows)] * 2  # values and, for max pooling, their indices


@rule(aten.sum, aten.mean, aten.amax, aten.amin, aten.max.dim, aten.min.dim, aten.var, aten.std,
      aten.var_mean, aten.std_mean, aten.prod, aten.logsumexp, aten.linalg_vector_norm)  # fmt: skip
def reduce(call: Call) -> list[Dims]:
    """Dimensions that end. A sum over removed zeros is the same sum; the others mix."""
    x = call.args[0]
    ended = _ended_dims(call, x)
    dims = call.dims(x)
    for dim in ended:
        labels = dims[dim]
        if labels is not None and (call.func.overloadpacket is not aten.sum or call.book.is_filled(labels)):
            call.book.mix(labels, f"{call}")
    if call.func.overloadpacket is aten.logsumexp:  # of zeros it is not zero
        dims = tuple(call.book.fill(labels) for labels in dims)
    keepdim = call.out.dim() if isinstance(call.out, Tensor) else call.out[0].dim()
    if keepdim == x.dim():
        return [tuple(None if i in ended else labels for i, labels in enumerate(dims))] * 2
    return [tuple(labels for i, labels in enumerate(dims) if i not in ended)] * 2


def _ended_dims(call: Call, x: Tensor) -> set[int]:
    names = [argument.name for argument in call.func._schema.arguments]
    dims = call.arg(names.index("dim"), "dim") if "dim" in names else None
    if dims is None or dims == []:
        return set(range(x.dim()))
    return {dim % x.dim() for dim in ([dims] if isinstance(dims, int) else dims)} if x.dim() else set()


@rule(aten._softmax, aten._log_softmax)
def softmax(call: Call) -> Dims:
    """Divides by a sum over the dimension: removing an entry changes all the others."""
    x, dim = call.args[0], call.args[1]
    labels = call.dims(x)
    if x.dim():
        call.book.mix(labels[dim], f"{call}")
    return tuple(map(call.book.fill, labels))
