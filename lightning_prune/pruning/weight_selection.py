"""Scores of single weights to masks: how much of each weight goes, and exactly which. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from lightning_prune.pruning.masks import Masks
from lightning_prune.pruning.patterns import Pattern
from lightning_prune.pruning.select import matching

__all__ = ["WEIGHT_SCOPES", "Scope", "amounts_of", "erk", "owner_of", "select_weights"]

WEIGHT_SCOPES = ("erk", "global", "lamp", "layer")

Scope = str | Mapping[str, float]
"""One of `WEIGHT_SCOPES`, or globs on module names and the amounts of what they match."""


def owner_of(name: str) -> str:
    """The path of the module that holds a parameter, by the parameter's name; its own name, if the root does."""
    return name.rpartition(".")[0] or name


# -- how much of each weight -------------------------------------------------------------------------------------------


def erk(shapes: Mapping[str, Sequence[int]], amount: float) -> dict[str, float]:
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


def amounts_of(scope: Mapping[str, float], names: Sequence[str], amount: float, part: float = 1.0) -> dict[str, float]:
    """Each weight's own amount, ``part`` of it on the way there; what no glob matches takes ``amount``."""
    amounts = dict.fromkeys(names, amount)
    owners = list(dict.fromkeys(map(owner_of, names)))
    for pattern, own in scope.items():
        chosen = matching(owners, (pattern,), None)
        amounts.update({name: own * part for name in names if owner_of(name) in chosen})
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
        if self.pattern is None:
            return score
        inputs = self.dims.get(name, 1)
        self.pattern.check(name, tuple(score.shape), inputs)  # neurons may have gone since it was found to fit
        return self.pattern.units(score, inputs)

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
            amounts = amounts_of(scope, names, amount, part)
        else:
            amounts = erk(shapes, amount) if scope == "erk" else dict.fromkeys(names, amount)
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
