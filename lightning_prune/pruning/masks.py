"""Masks: keep pruned weights at zero without touching names, order or identity of the parameters."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.optim import Optimizer

__all__ = ["Masks", "apply_masks", "mask_optimizer"]

Masks = dict[str, Tensor]
"""Bool masks by parameter name, of the parameter's shape; True = kept."""


@torch.no_grad()
def apply_masks(parameters: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> None:
    """Set every masked weight to exactly zero, in place."""
    for name, mask in masks.items():
        parameters[name].masked_fill_(~mask, 0)


@torch.no_grad()
def mask_optimizer(optimizer: Optimizer, parameters: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> None:
    """Set an optimizer's state to zero in masked places: momentum would revive them."""
    for name, mask in masks.items():
        for value in optimizer.state.get(parameters[name], {}).values():
            if isinstance(value, Tensor) and value.shape == mask.shape:
                value.masked_fill_(~mask, 0)
