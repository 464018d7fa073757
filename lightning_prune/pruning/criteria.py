"""Criteria: how much a neuron matters. Pure functions; higher means keep."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from lightning_prune.errors import PruningError
from lightning_prune.graph.groups import NO_UNIT, Groups

__all__ = ["NEURON_CRITERIA", "get_criterion"]

NeuronCriterion = Callable[[Groups, Mapping[str, Tensor]], Tensor]


def neuron_l1(groups: Groups, parameters: Mapping[str, Tensor]) -> Tensor:
    """L1 norm of each neuron over every slice of its group, relative to its group's mean.

    The mean makes layers of different fan-in comparable: without it a global ranking empties the small
    layers first. Inside a group the order is that of the plain L1 norm.

    Args:
        groups: The model's groups.
        parameters: Tensors by name, those of the groups among them.

    Returns:
        Shape (neurons,), float64, non-negative.

    Source: Li et al., 2017, "Pruning filters for efficient ConvNets", arXiv:1608.08710 (they score the filter
    alone).
    """
    scores = torch.zeros(groups.neurons, dtype=torch.float64)
    wanted: dict[str, list[int]] = {}
    for (name, dim), extent in groups.extents.items():
        if name in groups.parameters and not extent.fixed:
            wanted.setdefault(name, []).append(dim)
    for name, dims in wanted.items():
        weight = parameters[name].detach()
        for dim, norm in zip(dims, _norms(weight, dims), strict=True):
            unit_of = groups.extents[name, dim].unit_of
            inside = unit_of != NO_UNIT
            scores.index_add_(0, unit_of[inside], norm[inside])
    for numbers in groups.ranges:
        part = scores[numbers.start : numbers.stop]
        part /= part.mean().clamp(min=torch.finfo(torch.float64).tiny)
    return scores


CHUNK = 1 << 21
"""Elements whose magnitudes are held at a time: a copy of a large weight costs more than reading it."""


def _norms(weight: Tensor, dims: list[int]) -> list[Tensor]:
    """L1 norm of each slice along each of some dimensions, float64."""
    rows = max(CHUNK * weight.size(0) // weight.numel(), 1) if weight.numel() else 1
    found: list[list[Tensor]] = [[] for _ in dims]
    for part in weight.split(rows):
        sizes = part.abs()
        if sizes.dtype not in (torch.float32, torch.float64):
            sizes = sizes.float()
        others = [dim for dim in range(sizes.dim()) if dim not in dims]
        sizes = sizes.sum(others) if others else sizes
        for norms, at in zip(found, range(len(dims)), strict=True):
            rest = [dim for dim in range(sizes.dim()) if dim != at]
            norms.append((sizes.sum(rest) if rest else sizes).double().cpu())
    return [torch.cat(norms) if dim == 0 else sum(norms[1:], norms[0]) for dim, norms in zip(dims, found, strict=True)]


NEURON_CRITERIA: dict[str, NeuronCriterion] = {"l1": neuron_l1}


def get_criterion(name: str, table: Mapping[str, Callable[..., Tensor]]) -> Callable[..., Tensor]:
    """Look a criterion up.

    Raises:
        PruningError: The table has none of this name; the message lists those that exist.
    """
    if name not in table:
        raise PruningError(f"unknown criterion {name!r}; choose from {', '.join(sorted(table))}")
    return table[name]
