"""Criteria: how much a weight or a neuron matters. Pure functions; higher means keep."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from lightning_prune.errors import PruningError
from lightning_prune.graph.groups import NO_UNIT, Groups

__all__ = ["NEURON_CRITERIA", "WEIGHT_CRITERIA", "get_criterion"]

NeuronCriterion = Callable[[Groups, Mapping[str, Tensor]], Tensor]
WeightCriterion = Callable[[Tensor], Tensor]


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


def _norms(weight: Tensor, dims: list[int]) -> list[Tensor]:
    """L1 norm of each slice along each of some dimensions, float64; the rest is summed up once for all of them."""
    weight = weight.abs() if weight.is_complex() else weight
    accumulate = torch.promote_types(weight.dtype, torch.float32)
    others = [dim for dim in range(weight.dim()) if dim not in dims]
    sums = torch.linalg.vector_norm(weight, 1, others, dtype=accumulate) if others else weight.abs()
    sums = sums.double().cpu()
    return [sums.sum([d for d in range(sums.dim()) if d != at]) if sums.dim() > 1 else sums for at in range(len(dims))]


def weight_l1(weight: Tensor) -> Tensor:
    """Magnitude of each weight: shape and units of the weight.

    Source: Han et al., 2015, "Learning both weights and connections", arXiv:1506.02626.
    """
    return weight.detach().abs()


NEURON_CRITERIA: dict[str, NeuronCriterion] = {"l1": neuron_l1}
WEIGHT_CRITERIA: dict[str, WeightCriterion] = {"l1": weight_l1}


def get_criterion(name: str, table: Mapping[str, Callable[..., Tensor]]) -> Callable[..., Tensor]:
    """Look a criterion up.

    Raises:
        PruningError: The table has none of this name; the message lists those that exist.
    """
    if name not in table:
        raise PruningError(f"unknown criterion {name!r}; choose from {', '.join(sorted(table))}")
    return table[name]
