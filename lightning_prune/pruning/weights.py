"""Weight pruning without Lightning: choose single weights and set them to zero."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_prune.errors import NoEffectWarning, PruningError
from lightning_prune.pruning.criteria import WEIGHT_CRITERIA, get_criterion
from lightning_prune.pruning.masks import Masks, apply_masks
from lightning_prune.pruning.select import check_amount, check_choice, globs, matching

__all__ = ["WEIGHT_SCOPES", "prunable_weights", "prune_weights", "select_weights"]

WEIGHT_SCOPES = ("global", "layer")


def prunable_weights(
    model: nn.Module, include: Sequence[str] | None = None, exclude: Sequence[str] | None = None
) -> dict[str, nn.Parameter]:
    """The parameters that weight pruning considers: floating point, of two dimensions or more.

    Biases and the scales of norm layers have one and are left alone: they are few and cost accuracy.

    Raises:
        PruningError: There are none, or a pattern matches none of the modules that own them.
    """
    found = {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.dim() >= 2 and parameter.is_floating_point()
    }
    if not found:
        raise PruningError(
            f"{type(model).__name__} has no weights to prune: no floating-point parameter of two dimensions or more"
        )
    owners = list(dict.fromkeys(map(_owner, found)))
    chosen = matching(owners, include, exclude)
    found = {name: parameter for name, parameter in found.items() if _owner(name) in chosen}
    if not found:
        chosen_by = f"include={include and list(include)}, exclude={exclude and list(exclude)}"
        raise PruningError(f"{chosen_by} leaves no weights to prune of {', '.join(owners)}")
    return found


def _owner(name: str) -> str:
    return name.rpartition(".")[0] or name


@torch.no_grad()
def select_weights(
    scores: Mapping[str, Tensor],
    amount: float,
    *,
    scope: str = "global",
    masks: Mapping[str, Tensor] | None = None,
) -> Masks:
    """Choose which weights stay: exactly ``round(amount * n)`` of n go, those that are gone already first.

    Args:
        scores: By parameter name; higher means keep.
        amount: Fraction that is gone afterwards, [0, 1).
        scope: ``"global"`` counts n over all parameters, ``"layer"`` over each.
        masks: Those of an earlier selection.

    Returns:
        Masks by parameter name. Among equal scores those of the lower index go.
    """
    ranked = {
        name: score if masks is None else score.masked_fill(~masks[name], -torch.inf) for name, score in scores.items()
    }
    if scope == "layer":
        return {name: _keep_all_but_lowest([score], amount)[0] for name, score in ranked.items()}
    return dict(zip(ranked, _keep_all_but_lowest(list(ranked.values()), amount), strict=True))


def _keep_all_but_lowest(scores: list[Tensor], amount: float) -> list[Tensor]:
    flat = torch.cat([score.flatten() for score in scores])
    count = round(amount * flat.numel())
    keep = torch.ones_like(flat, dtype=torch.bool)
    if count:
        threshold = flat.kthvalue(count).values
        torch.lt(flat, threshold, out=keep).logical_not_()  # not >=: what is not a number stays
        ties = (flat == threshold).nonzero().squeeze(1)
        keep[ties[: count - int((~keep).sum())]] = False
    return [part.view(score.shape) for part, score in zip(keep.split([s.numel() for s in scores]), scores, strict=True)]


def prune_weights(
    model: nn.Module,
    amount: float,
    *,
    criterion: str = "l1",
    scope: str = "global",
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
) -> Masks:
    """Set the least important weights of a model to zero, in place.

    Args:
        model: Any module.
        amount: Fraction of the considered weights that goes, [0, 1).
        criterion: What makes a weight important: ``"l1"``, its magnitude.
        scope: ``"global"`` ranks all weights together, ``"layer"`` takes the same fraction of each parameter.
        include: Globs on module names: only their weights (None: all).
        exclude: Globs on module names: not their weights.

    Returns:
        Bool masks by parameter name, True = kept.

    Raises:
        PruningError: Bad arguments or nothing to prune; the model is untouched.

    Warns:
        NoEffectWarning: Nothing was pruned.

    Example:
        >>> layer = nn.Linear(10, 2)
        >>> masks = prune_weights(layer, 0.3)
        >>> int((layer.weight == 0).sum()), int((~masks["weight"]).sum())
        (6, 6)
    """
    if not isinstance(model, nn.Module):
        raise PruningError(f"model must be an nn.Module, got {type(model).__name__}")
    amount = check_amount(amount)
    check_choice("scope", scope, WEIGHT_SCOPES)
    score = get_criterion(criterion, WEIGHT_CRITERIA)
    weights = prunable_weights(model, globs("include", include), globs("exclude", exclude))
    masks = select_weights({name: score(w) for name, w in weights.items()}, amount, scope=scope)
    apply_masks(weights, masks)
    if all(bool(mask.all()) for mask in masks.values()):
        warnings.warn(f"amount={amount:g} rounds to no weight at all", NoEffectWarning, stacklevel=2)
    return masks
