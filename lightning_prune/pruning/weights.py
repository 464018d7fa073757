"""Weight pruning without Lightning: choose single weights and set them to zero."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrizations import _WeightNorm
from torch.nn.utils.parametrize import ParametrizationList

from lightning_prune.errors import NoEffectWarning, PruningError
from lightning_prune.graph.callsites import ModuleCall
from lightning_prune.graph.run import as_calls
from lightning_prune.pruning.masks import Masks, apply_masks, whole
from lightning_prune.pruning.patterns import Pattern, get_pattern
from lightning_prune.pruning.select import check_amount, check_choice, globs, matching
from lightning_prune.pruning.weight_criteria import Criterion, Synflow, collect, get_weight_criterion, in_dim

__all__ = [
    "WEIGHT_SCOPES",
    "Scope",
    "check_finite",
    "check_pattern",
    "check_scope",
    "choose_masks",
    "input_dims",
    "prunable_weights",
    "prune_weights",
    "select_weights",
]

WEIGHT_SCOPES = ("erk", "global", "lamp", "layer")

Scope = str | Mapping[str, float]
"""One of `WEIGHT_SCOPES`, or globs on module names and the amounts of what they match."""


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
    owners = list(dict.fromkeys(map(_owner, found)))
    chosen = matching(owners, include, exclude)
    found = {name: parameter for name, parameter in found.items() if _owner(name) in chosen}
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


def _owner(name: str) -> str:
    return name.rpartition(".")[0] or name


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


# -- how much of each weight -------------------------------------------------------------------------------------------


def _erk(shapes: Mapping[str, Sequence[int]], amount: float) -> dict[str, float]:
    """Densities proportional to the sum of a weight's dimensions over their product; the mean is the amount.

    Source: Evci et al., 2020, "Rigging the lottery", arXiv:1911.11134; Mocanu et al., 2018, arXiv:1707.04780.
    """
    raw = {name: sum(shape) / prod(shape) for name, shape in shapes.items()}
    dense: set[str] = set()
    total = sum(prod(shape) for shape in shapes.values())
    while True:
        left = (1 - amount) * total - sum(prod(shapes[name]) for name in dense)
        share = sum(raw[name] * prod(shapes[name]) for name in shapes if name not in dense)
        scale = left / share if share else 0.0
        over = {name for name in shapes if name not in dense and scale * raw[name] > 1}
        if not over:
            return {name: 0.0 if name in dense else 1 - scale * raw[name] for name in shapes}
        dense |= over


def _amounts_of(scope: Mapping[str, float], names: Sequence[str], amount: float, part: float = 1.0) -> dict[str, float]:
    """Each weight's own amount, ``part`` of it on the way there; what no glob matches takes ``amount``."""
    amounts = dict.fromkeys(names, amount)
    owners = list(dict.fromkeys(map(_owner, names)))
    for pattern, own in scope.items():
        chosen = matching(owners, (pattern,), None)
        amounts.update({name: own * part for name in names if _owner(name) in chosen})
    return amounts


def _lamp(score: Tensor) -> Tensor:
    """Each score relative to the sum of those that are not smaller in the same layer, all squared.

    What is gone (-inf) stays so and counts nowhere; so does what is no finite number, which stays. Scores below zero
    are counted from the lowest.

    Source: Lee et al., 2021, "Layer-adaptive sparsity for the magnitude-based pruning", arXiv:2010.07611.
    """
    kept = score.flatten() >= torch.finfo(score.dtype).max
    flat = score.double().flatten()
    here = ~flat.isneginf() & ~kept
    if not bool(here.any()):
        return score.double()
    flat = flat - flat[here].min().clamp(max=0)
    order = flat.argsort(stable=True)
    squares = torch.where(here, flat / flat[here].max().clamp(min=1e-300), 0.0)[order].square()
    rest = squares.flip(0).cumsum(0).flip(0)
    relative = torch.empty_like(flat)
    relative[order] = squares / rest.clamp(min=1e-300)
    return torch.where(here, relative, torch.where(kept, torch.inf, -torch.inf)).view(score.shape)


# -- the selection -----------------------------------------------------------------------------------------------------


class _Units(Mapping[str, Tensor]):
    """Scores of what can go, made when asked for: several copies of a model's weights would be too much memory."""

    def __init__(
        self,
        scores: Mapping[str, Tensor],
        masks: Mapping[str, Tensor] | None,
        pattern: Pattern | None,
        dims: Mapping[str, int],
        *,
        lamp: bool,
    ) -> None:
        self.lamp = lamp
        self.scores = scores
        self.masks = masks
        self.pattern = pattern
        self.dims = dims

    def __getitem__(self, name: str) -> Tensor:
        score = self.scores[name]
        score = score if score.is_floating_point() else score.double()
        score = score.nan_to_num(nan=torch.finfo(score.dtype).max)  # what is not a number stays, if it may
        if self.masks is not None:
            score = torch.where(self.masks[name].to(score.device), score, -torch.inf)
        if self.lamp:
            score = _lamp(score)
        return score if self.pattern is None else self.pattern.units(score, self.dims.get(name, 1))

    def __iter__(self) -> Iterator[str]:
        return iter(self.scores)

    def __len__(self) -> int:
        return len(self.scores)


@torch.no_grad()
def select_weights(
    scores: Mapping[str, Tensor],
    amount: float,
    *,
    scope: Scope = "global",
    masks: Mapping[str, Tensor] | None = None,
    pattern: Pattern | None = None,
    dims: Mapping[str, int] | None = None,
    part: float = 1.0,
) -> Masks:
    """Choose which weights stay: exactly ``round(amount * n)`` of n go, those that are gone already first.

    Args:
        scores: By parameter name; higher means keep. Each is asked for several times.
        amount: Fraction that is gone afterwards, [0, 1).
        scope: ``"global"`` and ``"lamp"`` count n over all parameters, ``"layer"``, ``"erk"`` and amounts by glob over
            each.
        masks: Those of an earlier selection.
        pattern: What may go together; with blocks, as many as come nearest to the amount.
        dims: The dimension of each weight that runs over inputs (1 where it is not given).
        part: The part of the amounts in ``scope`` that is gone.

    Returns:
        Masks by parameter name. Among equal scores those of the lower index go.
    """
    units = _Units(scores, masks, pattern, dims or {}, lamp=scope == "lamp")
    names = list(scores)
    kept: dict[str, Tensor] = {}
    if scope in ("global", "lamp"):
        kept = _keep(units, names, amount)
    else:
        shapes = {name: tuple(scores[name].shape) for name in names}
        if isinstance(scope, Mapping):
            amounts = _amounts_of(scope, names, amount, part)
        else:
            amounts = _erk(shapes, amount) if scope == "erk" else dict.fromkeys(names, amount)
        for name in names:
            kept |= _keep(units, [name], amounts[name])
    if pattern is None:
        return {name: kept[name] for name in names}
    return {
        name: pattern.spread(mask, tuple(scores[name].shape), (dims or {}).get(name, 1)) for name, mask in kept.items()
    }


FEW = 1 << 19
"""So many scores are simply sorted."""
STRIDE = 128
"""Of more, one in so many is, to find out about where the threshold is."""
CHUNK = 1 << 20
"""How many are compared at a time."""


def _keep(units: Mapping[str, Tensor], names: Sequence[str], amount: float) -> dict[str, Tensor]:
    """Masks of the units of some weights together: all but the lowest, those of the lower index first."""
    survey = _survey(units, names)
    count = round(amount * survey.total)
    threshold, lower = _threshold(units, names, survey, count) if count else (-torch.inf, 0)
    masks = {}
    ties = count - lower  # so many of those that equal the threshold go too
    for name in names:
        keep = torch.empty(survey.shapes[name], dtype=torch.bool, device=survey.devices[name])
        rows = keep.view(-1).split(CHUNK)
        for mask, part in zip(rows, units[name].flatten().split(CHUNK), strict=True):
            part = part.to(survey.dtype)
            torch.lt(part, threshold, out=mask).logical_not_()  # not >=: what is not a number stays
            if ties:
                equal = (part == threshold).nonzero().squeeze(1)[:ties]
                mask[equal] = False
                ties -= len(equal)
        masks[name] = keep
    return masks


@dataclass(frozen=True)
class _Survey:
    """What a first look at some scores tells: shapes and devices by name, a dtype that holds them all, a sample."""

    shapes: dict[str, tuple[int, ...]]
    devices: dict[str, torch.device]
    dtype: torch.dtype
    sample: Tensor

    @property
    def total(self) -> int:
        """Number of scores."""
        return sum(map(prod, self.shapes.values()))


def _survey(units: Mapping[str, Tensor], names: Sequence[str]) -> _Survey:
    shapes, devices, samples = {}, {}, []
    for name in names:
        score = units[name]
        shapes[name], devices[name] = tuple(score.shape), score.device
        samples.append(score.flatten()[::STRIDE].clone())
        del score
    home = samples[0].device
    sample = torch.cat([each.to(home) for each in samples])  # in a dtype that holds them all
    return _Survey(shapes, devices, sample.dtype, sample)


def _threshold(units: Mapping[str, Tensor], names: Sequence[str], survey: _Survey, count: int) -> tuple[float, int]:
    """The ``count``-th lowest score, and how many are lower; exact, without a copy of all scores.

    A sample tells between which two values it is; only what lies between is sorted.
    """
    low, high = -torch.inf, torch.inf
    if survey.total > FEW:
        sample = survey.sample.sort().values
        place, margin = count / survey.total * len(sample), 4 * len(sample) ** 0.5
        if (at := int(place - margin)) > 0:
            low = float(sample[at])
        if (at := int(place + margin)) < len(sample):
            high = float(sample[at])
    below, found = _between(units, names, survey, low, high)
    if not below < count <= below + len(found):  # an odd sample
        below, found = _between(units, names, survey, -torch.inf, torch.inf)
    threshold = found.sort().values[count - below - 1]  # kthvalue is quadratic where scores descend
    return float(threshold), below + int((found < threshold).sum())


def _between(
    units: Mapping[str, Tensor], names: Sequence[str], survey: _Survey, low: float, high: float
) -> tuple[int, Tensor]:
    """How many scores are below ``low``, and those from ``low`` to ``high``; all if these are infinite."""
    below, found = 0, []
    everything = low == -torch.inf and high == torch.inf
    for name in names:
        for part in units[name].flatten().split(CHUNK):
            part = part.to(survey.dtype)
            below += 0 if everything else int((part < low).count_nonzero())
            inside = part if everything else part[(part >= low) & (part <= high)]
            found.append(inside.to(survey.sample.device))
    return below, torch.cat(found)


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
        amounts = _amounts_of(scope, list(weights), amount)
    elif scope == "erk":
        amounts = _erk(shapes, amount)
    dims = input_dims(model, list(weights))
    for name, own in amounts.items():
        if own:
            check_pattern(pattern, own, {name: shapes[name]}, dims)
