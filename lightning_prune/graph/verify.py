"""Verification: a pruned model must give what the whole one gives with the removed slices set to zero."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightning_prune.errors import SurgeryError
from lightning_prune.graph.callsites import ModuleCall
from lightning_prune.graph.run import same_buffers
from lightning_prune.graph.tree import leaves

__all__ = ["TOLERANCE", "compare_outputs", "compare_shapes", "masked_outputs", "masked_tensors"]

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 5e-2}
"""Largest difference allowed, relative to the largest output, by dtype: rounding differs with the shapes."""


def masked_tensors(
    tensors: Mapping[str, Tensor],
    kept: Mapping[str, Mapping[int, Sequence[int]]],
    unmasked: Collection[tuple[str, int]] = (),
) -> dict[str, Tensor]:
    """Copies of the tensors that shrink, zero wherever one of the dimensions is not kept; indices stay what they are."""
    result = {}
    for name, dims in kept.items():
        if not (tensors[name].is_floating_point() or tensors[name].is_complex()):
            continue
        masked = tensors[name].detach().clone()
        for dim, index in dims.items():
            if (name, dim) in unmasked:
                continue
            gone = torch.ones(masked.size(dim), dtype=torch.bool)
            gone[torch.as_tensor(index)] = False
            masked.index_fill_(dim, gone.nonzero().squeeze(1).to(masked.device), 0)
        result[name] = masked
    return result


def masked_outputs(model: nn.Module, masked: Mapping[str, Tensor], calls: Sequence[ModuleCall]) -> list[Any]:
    """What the model's calls give with some tensors replaced; the model itself is not changed."""
    modules = dict(model.named_modules())
    outputs = []
    for call in calls:
        prefix = f"{call.path}." if call.path else ""
        inside = {name.removeprefix(prefix): t for name, t in masked.items() if name.startswith(prefix)}
        with torch.no_grad(), same_buffers(model):
            outputs.append(functional_call(modules[call.path], inside, call.args, call.kwargs))
    return outputs


def compare_shapes(expected: Any, actual: Any) -> None:
    """Check that two trees of outputs have the same shapes.

    Raises:
        SurgeryError: They differ in structure or shape; the message says where.
    """
    wanted, got = list(leaves(expected)), list(leaves(actual))
    if len(wanted) != len(got):
        raise SurgeryError(f"{len(got)} outputs after the removal, {len(wanted)} before")
    for number, (a, b) in enumerate(zip(wanted, got, strict=True)):
        if isinstance(a, Tensor) and a.shape != b.shape:
            raise SurgeryError(f"output {number} has shape {tuple(b.shape)} after, {tuple(a.shape)} before")


def compare_outputs(expected: Any, actual: Any) -> None:
    """Check that two trees of outputs agree up to rounding.

    Raises:
        SurgeryError: They differ in structure, shape or value; the message says where and how much.
    """
    compare_shapes(expected, actual)
    for number, (a, b) in enumerate(zip(leaves(expected), leaves(actual), strict=True)):
        if not isinstance(a, Tensor) or not a.is_floating_point():
            continue  # indices and counts jump where rounding differs
        finite = a.isfinite() & b.isfinite()
        largest = a[finite].abs().max().item() if bool(finite.any()) else 0.0
        worst = (a[finite] - b[finite]).abs().max().item() if bool(finite.any()) else 0.0
        if not torch.equal(a.isfinite(), b.isfinite()) or worst > TOLERANCE.get(a.dtype, 1e-3) * largest:
            raise SurgeryError(
                f"output {number} differs from the masked model's by {worst:.3g} (largest value {largest:.3g})"
            )
