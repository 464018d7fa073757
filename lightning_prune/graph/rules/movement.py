"""Operations that only move elements: run the very op on labels and read off where each went."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_prune.graph.labels import FIXED, Dims
from lightning_prune.graph.rules.table import Call, family, rule

aten = torch.ops.aten


@rule(aten.view, aten._unsafe_view, aten._reshape_alias, aten.flip, aten.roll)
def move(call: Call) -> list[Dims]:
    """Movement of one tensor by constant arguments. Every view that torch declares as such comes here too."""
    source = call.args[0]
    outs: list[Tensor] = [call.out] if isinstance(call.out, Tensor) else list(call.out)
    landed: list[list[Tensor | None]] = [[None] * out.dim() for out in outs]
    for dim, labels in enumerate(call.dims(source)):
        if labels is None:
            continue
        shape = [1] * source.dim()
        shape[dim] = -1
        for moved, dims in zip(_run(call, labels.view(shape).expand(source.shape)), landed, strict=True):
            problem = _land(moved, labels, dims)
            if problem is not None:
                call.book.freeze(labels, f"{problem} ({call})")
    return [tuple(dims) for dims in landed]


def _run(call: Call, labels: Tensor) -> list[Tensor]:
    if call.func.overloadpacket in (aten.view, aten._unsafe_view, aten._reshape_alias):
        return [labels.reshape(call.args[1])]  # an expanded tensor has no view of every shape
    moved: Any = call.func(labels, *call.args[1:], **call.kwargs)
    return [moved] if isinstance(moved, Tensor) else list(moved)


def _land(moved: Tensor, labels: Tensor, dims: list[Tensor | None]) -> str | None:
    """Enter moved labels into the dimension along which they vary, or say why they can't be followed."""
    varying = [dim for dim in range(moved.dim()) if _varies_along(moved, dim)]
    if len(varying) > 1:
        return "splits a prunable dimension in two"
    if not varying:
        return "picks one index of a prunable dimension"
    along = varying[0]
    arrived = moved[tuple(slice(None) if dim == along else 0 for dim in range(moved.dim()))].clone()
    if not bool(torch.isin(labels[labels != FIXED], arrived).all()):
        return "picks part of a prunable dimension"
    if dims[along] is not None:
        return "merges two prunable dimensions into one"
    dims[along] = arrived
    return None


def _varies_along(moved: Tensor, dim: int) -> bool:
    if moved.stride(dim) == 0 or moved.size(dim) < 2:
        return False
    return not torch.equal(moved, moved.narrow(dim, 0, 1).expand_as(moved))


@rule(aten.constant_pad_nd)
def pad(call: Call) -> Dims:
    """Padding with a constant: new indices that stay, along a labelled dimension; others only get longer."""
    source: Tensor = call.args[0]
    widths: list[int] = call.args[1]  # before and after, last dimension first
    blank = call.arg(2, "value", 0) == 0
    result: list[Tensor | None] = []
    for dim, labels in enumerate(call.dims(source)):
        place = 2 * (source.dim() - 1 - dim)
        before, after = widths[place : place + 2] or (0, 0)
        if not blank and (any(widths[:place]) or any(widths[place + 2 :])):
            labels = call.book.fill(labels)
        if labels is None or before == after == 0:
            result.append(labels)
        elif min(before, after) < 0:
            call.book.freeze(labels, f"picks part of a prunable dimension ({call})")
            result.append(None)
        else:
            result.append(torch.nn.functional.pad(labels, (before, after), value=FIXED))
    return tuple(result)


@rule(aten.as_strided, aten.view.dtype, aten.view_as_real, aten.view_as_complex)
def reinterpret(call: Call) -> None:
    """Memory read under another shape or type: no index can be followed."""
    call.freeze_all(f"reads memory under another shape or type ({call})")


@rule(aten.cat)
def cat(call: Call) -> Dims:
    """Concatenation: labels follow each other along the dimension, the others are common to all."""
    tensors: list[Tensor] = [t for t in call.args[0] if t.numel() or t.dim() > 1]
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
        for dims in every[1:]:
            common = call.book.unify(common, dims[dim], f"meets a dimension of fixed size ({call})")
        result.append(common)
    return tuple(result)


def _or_fixed(labels: Tensor | None, size: int) -> Tensor:
    return torch.full((size,), FIXED) if labels is None else labels


def keep(call: Call) -> Dims:
    """The output holds the first argument's indices unchanged."""
    return call.dims(call.args[0])


family(keep, aten.detach, aten.alias, aten.clone, aten._to_copy, aten.contiguous, aten.lift_fresh, aten.to)
