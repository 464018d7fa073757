"""Weight pruning without Lightning: choose single weights and set them to zero."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrizations import _WeightNorm
from torch.nn.utils.parametrize import ParametrizationList

from lightning_prune.errors import NoEffectWarning, PruningError
from lightning_prune.graph.callsites import ModuleCall
from lightning_prune.graph.groups import NO_UNIT, Groups
from lightning_prune.graph.run import as_calls
from lightning_prune.pruning.masks import Masks, apply_masks, whole
from lightning_prune.pruning.patterns import Pattern, get_pattern
from lightning_prune.pruning.select import check_amount, check_choice, globs, matching
from lightning_prune.pruning.weight_criteria import Criterion, Synflow, collect, get_weight_criterion, in_dim
from lightning_prune.pruning.weight_selection import WEIGHT_SCOPES, Scope, amounts_of, erk, owner_of, select_weights

__all__ = [
    "check_finite",
    "check_pattern",
    "check_scope",
    "choose_masks",
    "input_dims",
    "prunable_weights",
    "prune_weights",
]


def prunable_weights(
    model: nn.Module, include: Sequence[str] | None = None, exclude: Sequence[str] | None = None
) -> dict[str, nn.Parameter]:
    """The parameters that weight pruning considers: floating point, of two dimensions or more, not empty.

    Biases and the scales of norm layers have one and are left alone: they are few and cost accuracy.

    Raises:
        PruningError: There are none, or a pattern matches none of the modules that own them.
    """
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        if is_lazy(parameter):
            raise PruningError(
                f"{name!r} of a lazy module has no shape yet; run {type(model).__name__} on an input once"
            )
    norms = _norms_of(model)
    found = {
        name: parameter
        for name, parameter in parameters.items()
        if parameter.dim() >= 2 and parameter.numel() and parameter.is_floating_point() and id(parameter) not in norms
    }
    if not found:
        raise PruningError(
            f"{type(model).__name__} has no weights to prune: no floating-point parameter of two dimensions or more"
        )
    owners = list(dict.fromkeys(map(owner_of, found)))
    chosen = matching(owners, include, exclude)
    found = {name: parameter for name, parameter in found.items() if owner_of(name) in chosen}
    if not found:
        chosen_by = f"include={include and list(include)}, exclude={exclude and list(exclude)}"
        raise PruningError(f"{chosen_by} leaves no weights to prune of {', '.join(owners)}")
    return found


def _norms_of(model: nn.Module) -> set[int]:
    """The parameters that hold norms of weights (weight_norm), which look like weights with inputs of one."""
    found = {id(m.weight_g) for m in model.modules() if isinstance(m._parameters.get("weight_g"), nn.Parameter)}
    for module in model.modules():
        if isinstance(module, ParametrizationList) and any(isinstance(each, _WeightNorm) for each in module):
            found.add(id(module.original0))
    return found


@torch.no_grad()
def check_finite(weights: Mapping[str, Tensor]) -> None:
    """Raise a PruningError if a weight holds a NaN or an infinite value, which can't be ranked."""
    for name, weight in weights.items():
        values = whole(weight.detach())
        if bool(values.sum().isfinite()):  # one pass without a copy; a sum may overflow, so that is not the last word
            continue
        wrong = int((~values.isfinite()).sum())
        if wrong:
            raise PruningError(
                f"{name!r} holds {wrong} values of {values.numel()} that are NaN or infinite; nothing was pruned. Has "
                "training diverged? Lower the learning rate or clip gradients, and go on from an earlier checkpoint"
            )


def input_dims(model: nn.Module, names: Sequence[str]) -> dict[str, int]:
    """The dimension of each weight that runs over the inputs of its layer."""
    modules = dict(model.named_modules())
    return {name: in_dim(modules.get(name.rpartition(".")[0])) for name in names}


def check_scope(scope: Any) -> None:
    """Raise a PruningError unless ``scope`` is one of `WEIGHT_SCOPES` or amounts by glob."""
    if isinstance(scope, Mapping):
        globs("scope", list(scope))
        for pattern, amount in scope.items():
            try:
                check_amount(amount)
            except PruningError as error:
                raise PruningError(f"scope[{pattern!r}]: {error}") from None
    else:
        check_choice("scope", scope, WEIGHT_SCOPES)


def check_pattern(pattern: Pattern | None, amount: float, shapes: Mapping[str, Sequence[int]], dims: Any) -> None:
    """Check that weights can have a pattern.

    Raises:
        PruningError: A weight's shape doesn't allow it, or it doesn't allow the amount.
    """
    if pattern is None:
        return
    if amount > pattern.most + 1e-12:
        raise PruningError(
            f"the pattern {pattern} removes {pattern.most:g} of the weights at most, got amount={amount:g}"
        )
    for name, shape in shapes.items():
        pattern.check(name, tuple(shape), dims.get(name, 1))


def check_widths(
    model: nn.Module, names: Sequence[str], pattern: Pattern | None, groups: Groups, allowed: Tensor, round_to: int
) -> None:
    """Check that weights can still have a pattern when neurons go.

    Args:
        model: The model.
        names: Of the weights that have the pattern.
        pattern: The pattern.
        groups: The model's groups.
        allowed: Bool (neurons,): which may go.
        round_to: Groups shrink to multiples of this only.

    Raises:
        PruningError: Some may be left with inputs or outputs that it does not fit.
    """
    if pattern is None:
        return
    for name, inputs in input_dims(model, names).items():
        for dim, kind in ((inputs, "inputs"), (1 - inputs, "outputs")):
            extent, multiple = groups.extents.get((name, dim)), pattern.multiple(dim == inputs)
            if extent is None or extent.fixed or multiple == 1:
                continue
            counts = extent.unit_of[extent.unit_of != NO_UNIT].bincount(minlength=len(allowed))[allowed]
            each = math.gcd(*counts[counts > 0].tolist())  # indices that a neuron has
            if each and round_to * each % multiple:
                wanted = math.lcm(round_to, multiple // math.gcd(multiple, each))
                raise PruningError(
                    f"the pattern {pattern} needs the {kind} of {name!r} in groups of {multiple}, which NeuronPruning "
                    f"would break: give it round_to={wanted}, or leave that layer out of one of the two with exclude"
                )


class _Scores(Mapping[str, Tensor]):
    """What a criterion says of each weight, made when asked for."""

    def __init__(self, criterion: Criterion, weights: Mapping[str, Tensor]) -> None:
        self.criterion = criterion
        self.weights = weights

    def __getitem__(self, name: str) -> Tensor:
        return whole(self.criterion.score(name, self.weights[name]))

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)


def choose_masks(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    criterion: Criterion,
    amount: float,
    *,
    scope: Scope = "global",
    pattern: Pattern | None = None,
    masks: Mapping[str, Tensor] | None = None,
    calls: Sequence[ModuleCall] = (),
    part: float = 1.0,
    before: float = 0.0,
) -> Masks:
    """Masks that a criterion makes of what it has collected; the model is not changed.

    Args:
        model: The module that holds the weights.
        weights: By name.
        criterion: What judges them.
        amount: Fraction that is gone at the end.
        scope: What it is a fraction of.
        pattern: What may go together.
        masks: What is gone already.
        calls: Calls of the model, where a criterion needs to run it.
        part: The part of the amount that is gone afterwards.
        before: The part that is gone already.
    """
    options: dict[str, Any] = {"scope": scope, "pattern": pattern, "dims": input_dims(model, list(weights))}
    scores = _Scores(criterion, weights)
    if not isinstance(criterion, Synflow):
        criterion.ready(weights)
        return select_weights(scores, amount * part, masks=masks, part=part, **options)
    rounds = max(round(criterion.rounds * (part - before)), 1)
    for number in range(1, rounds + 1):
        criterion.flow(model, calls, weights, masks)
        share = number / rounds
        now = part
        if number < rounds and amount:  # each round the same fraction of what is left
            left = (1 - amount * before) * ((1 - amount * part) / (1 - amount * before)) ** share
            now = (1 - left) / amount
        elif number < rounds:
            now = before + (part - before) * share
        masks = select_weights(scores, amount * now, masks=masks, part=now, **options)
    return dict(masks or {})


def prune_weights(
    model: nn.Module,
    amount: float,
    *,
    criterion: str | Callable[[Tensor], Tensor] = "l1",
    scope: Scope = "global",
    pattern: str | None = None,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    example_inputs: Any = None,
) -> Masks:
    """Set the least important weights of a model to zero, in place.

    Args:
        model: Any module.
        amount: Fraction of the considered weights that goes, [0, 1).
        criterion: What makes a weight important: ``"l1"``, its magnitude; ``"random"``; from the gradients that the
            parameters hold ``"taylor"``, ``"snip"``, ``"movement"`` and ``"fisher"``; from a run on ``example_inputs``
            ``"wanda"`` and ``"synflow"``; or a function that maps a parameter to scores of its shape.
        scope: ``"global"`` ranks all weights together, ``"layer"`` takes the same fraction of each parameter, ``"erk"``
            more of large ones, ``"lamp"`` ranks all by their share in their layer; or amounts by glob on module names
            (what none matches takes ``amount``).
        pattern: ``"n:m"``: of m weights in a row along the input dimension n stay at least (``"2:4"``);
            ``"block:RxC"``: blocks of R outputs and C inputs go together; None: single weights.
        include: Globs on module names: only their weights (None: all).
        exclude: Globs on module names: not their weights.
        example_inputs: A tensor, a tuple of positional or a dict of keyword arguments of ``model``.

    Returns:
        Bool masks by parameter name, True = kept.

    Raises:
        PruningError: Bad arguments, nothing to prune, a weight that doesn't fit the pattern or is not finite, or a
            criterion that lacks what it needs; the model is untouched.

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
    check_scope(scope)
    judge, shape = get_weight_criterion(criterion), get_pattern(pattern)
    weights = prunable_weights(model, globs("include", include), globs("exclude", exclude))
    check_fit(model, weights, amount, scope, shape)
    check_finite(weights)
    calls = () if example_inputs is None else as_calls(example_inputs)
    collect(judge, model, weights, calls)
    masks = choose_masks(model, weights, judge, amount, scope=scope, pattern=shape, calls=calls)
    apply_masks(weights, masks)
    if all(bool(mask.all()) for mask in masks.values()):
        warnings.warn(f"amount={amount:g} rounds to no weight at all", NoEffectWarning, stacklevel=2)
    return masks


def check_fit(
    model: nn.Module, weights: Mapping[str, Tensor], amount: float, scope: Scope, pattern: Pattern | None
) -> None:
    """Check scope and pattern against a model.

    Raises:
        PruningError: A glob names no layer, a shape doesn't allow the pattern, or the pattern not the amount.
    """
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    amounts = dict.fromkeys(weights, amount)
    if isinstance(scope, Mapping):
        amounts = amounts_of(scope, list(weights), amount)
    elif scope == "erk":
        amounts = erk(shapes, amount)
    dims = input_dims(model, list(weights))
    for name, own in amounts.items():
        if own:
            check_pattern(pattern, own, {name: shapes[name]}, dims)
