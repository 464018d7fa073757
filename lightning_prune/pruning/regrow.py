"""Regrowing: masks that move at a constant sparsity. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_prune.errors import PruningError
from lightning_prune.pruning.masks import Masks, whole
from lightning_prune.pruning.weight_criteria import mix_seed

__all__ = ["REGROW", "moved", "share"]

REGROW = ("rigl", "set")


def share(kind: str, fraction: float, progress: float) -> float:
    """Which part of the kept weights moves now: ``"rigl"`` less and less until the end, ``"set"`` always the same."""
    if not 0 < progress < 1:
        return 0.0
    return fraction if kind == "set" else fraction / 2 * (1 + math.cos(math.pi * progress))


@torch.no_grad()
def moved(
    masks: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    kind: str,
    part: float,
    seed: int,
    gradients: Mapping[str, Tensor] | None = None,
) -> Masks:
    """In each weight the smallest of the kept go, and as many others come back, at zero.

    A weight that this step did not train, whose gradient is missing or zero throughout, stays as it is for ``"rigl"``.

    Args:
        masks: By parameter name, True = kept.
        weights: Their parameters.
        kind: ``"rigl"``: those with the largest gradients come back; ``"set"``: chance decides.
        part: The part of the kept weights that moves.
        seed: Makes chance's choice.
        gradients: What ``"rigl"`` goes by; those that the parameters hold where there are none here.

    Returns:
        New masks that keep as many.

    Raises:
        PruningError: There is no gradient at all.

    Source: Evci et al., 2020, "Rigging the lottery", arXiv:1911.11134; Mocanu et al., 2018, "Scalable training of
    artificial neural networks with adaptive sparse connectivity", arXiv:1707.04780.
    """
    result = {}
    found = {name: (gradients or {}).get(name, weights[name].grad) for name in masks}
    if kind == "rigl" and masks and all(gradient is None for gradient in found.values()):
        first = next(iter(masks))
        raise PruningError(f"regrow='rigl' needs gradients, but neither {first!r} nor another weight has one")
    for name, mask in masks.items():
        weight, gradient = weights[name], found[name]
        if kind == "rigl" and (gradient is None or not bool(whole((_dense(gradient) != 0).sum()))):
            result[name] = mask
            continue
        flat = mask.flatten()
        kept, gone = flat.nonzero().squeeze(1), (~flat).nonzero().squeeze(1)
        count = min(round(part * len(kept)), len(gone))
        if not count:
            result[name] = mask
            continue
        sizes = whole(weight.detach()).flatten().to(mask.device)[kept].abs()
        if kind == "rigl":
            assert gradient is not None
            wishes = whole(_dense(gradient)).flatten().to(mask.device)[gone].abs().nan_to_num(nan=0.0)
        else:
            generator = torch.Generator().manual_seed(mix_seed(seed, name))
            wishes = torch.rand(len(gone), generator=generator).to(mask.device)
        new = flat.clone()
        new[kept[sizes.argsort(stable=True)[:count]]] = False
        new[gone[wishes.argsort(descending=True, stable=True)[:count]]] = True
        result[name] = new.view(mask.shape)
    return result


def _dense(gradient: Tensor) -> Tensor:
    return (gradient if gradient.layout is torch.strided else gradient.to_dense()).detach()
