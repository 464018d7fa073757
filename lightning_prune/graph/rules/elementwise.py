"""Operations that work index by index: pointwise arithmetic, activations, dropout, fresh tensors of a like shape."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lightning_prune.graph.labels import Dims
from lightning_prune.graph.rules.table import Call, family, rule

aten = torch.ops.aten


@rule(
    aten.add,
    aten._prelu_kernel,
    aten.elu,
    aten.elu_,
    aten.hardswish,
    aten.hardtanh,
    aten.hardtanh_,
    aten.leaky_relu,
    aten.leaky_relu_,
    aten.log_sigmoid_forward,
    aten.native_dropout,
    aten.rrelu_with_noise,
    aten.copy_,
    aten.where,
)
def pointwise(call: Call) -> list[Dims]:
    """Equal indices meet; a broadcast dimension takes the labels of those that have it in full.

    Every operation that torch tags as pointwise comes here too.
    """
    inputs = list(call.tensors())
    outs = [leaf for leaf in pytree.tree_leaves(call.out) if isinstance(leaf, Tensor)]
    if not outs:  # torch.equal gives a bool
        return []
    rank = max((tensor.dim() for tensor in inputs), default=0)
    result: list[Tensor | None] = []
    for back in range(rank, 0, -1):
        full = [t for t in inputs if t.dim() >= back and t.size(-back) > 1]
        labels = [call.dims(tensor)[-back] for tensor in full]
        if not labels or all(item is None for item in labels):
            result.append(None)
            continue
        common = labels[0]
        for other in labels[1:]:
            common = call.book.unify(common, other, f"meets a dimension of fixed size ({call})")
        if common is not None:
            known = [(t, item) for t, item in zip(full, labels, strict=True) if item is not None]
            blank = [(t, item) for t, item in known if not call.book.is_filled(item)]
            common = _values_at_zero(call, blank[0][1] if blank else common, [t for t, _ in blank])
        result.append(common)
    return [tuple(result) if out.dim() == rank else (None,) * out.dim() for out in outs]


def _values_at_zero(call: Call, labels: Tensor, blank: list[Tensor]) -> Tensor | None:
    """What the operation makes of zeros in some of its inputs: run it and see."""
    if torch.Tag.nondeterministic_seeded in call.func.tags:  # dropouts keep zeros; a run would draw random numbers
        return labels if blank else call.book.fill(labels)
    zeros = {id(tensor) for tensor in blank}
    in_place = call.func._schema.is_mutable

    def stand_in(leaf: Any) -> Any:
        if id(leaf) in zeros:
            return torch.zeros_like(leaf)
        return leaf.clone() if in_place and isinstance(leaf, Tensor) else leaf

    args, kwargs = pytree.tree_map(stand_in, (call.args, call.kwargs))
    values = pytree.tree_leaves(call.func(*args, **kwargs))[0]
    if blank and not bool(values.isfinite().all()):  # zero times infinity: the masked model gives no number
        call.book.mix(labels, f"{call}")
    return call.book.fill(labels) if bool(values.any()) else labels


def like(call: Call) -> Dims:
    """A fresh tensor of the first argument's shape: it shrinks with it and holds nothing of its own."""
    source: Tensor = call.args[0]
    return tuple(map(call.book.fill, call.dims(source)))


family(
    like,
    aten.bernoulli,
    aten.bernoulli_,
    aten.empty_like,
    aten.fill_,
    aten.full_like,
    aten.normal_,
    aten.ones_like,
    aten.rand_like,
    aten.randn_like,
    aten.uniform_,
    aten.zero_,
    aten.zeros_like,
)


@rule(aten.new_empty, aten.new_zeros, aten.new_ones, aten.new_full)
def new_like(call: Call) -> Dims:
    """A fresh tensor whose sizes were read from another: a size that equals the other's follows it."""
    source: Tensor = call.args[0]
    if source.dim() != call.out.dim():
        return (None,) * int(call.out.dim())
    pairs = zip(call.dims(source), source.shape, call.out.shape, strict=True)
    return tuple(call.book.fill(labels) if size == wanted else None for labels, size, wanted in pairs)


@rule(
    aten.empty, aten.zeros, aten.ones, aten.full, aten.arange, aten.rand, aten.randn, aten.scalar_tensor,
    aten._local_scalar_dense, aten.is_same_size, aten.sym_size, aten.sym_numel,
)  # fmt: skip
def fresh(call: Call) -> None:
    """Creates a tensor, or reads a number: no labels, and none are touched."""
