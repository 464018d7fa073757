"""The layers of a dense model and of what became of it, side by side."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.activations.apply import Change
from lightning_prune.activations.candidates import choice_of
from lightning_prune.errors import PruningError
from lightning_prune.graph.groups import Groups
from lightning_prune.pruning.plan import Plan
from lightning_prune.pruning.weights import prunable_weights
from lightning_prune.report.cost import Cost
from lightning_prune.report.report import Histogram, Layer

__all__ = [
    "counts_of",
    "histograms",
    "layers_of",
    "magnitudes",
    "statuses",
    "threshold_of",
    "thresholds_of",
    "weights_of",
]

WIDTHS = ("out_features", "out_channels", "num_features", "embedding_dim", "embed_dim", "hidden_size", "nf")
"""Attributes that hold how many neurons a layer makes, torch's and transformers'; the first that is there counts."""


def layers_of(
    dense: nn.Module,
    pruned: nn.Module,
    costs: Sequence[Cost],
    *,
    times: Sequence[Mapping[str, float]] | None = None,
    statuses: Mapping[str, tuple[str, str]] | None = None,
    activations: Mapping[str, Change] | None = None,
) -> tuple[Layer, ...]:
    """Set the layers of two models side by side, by their names in the dense one.

    Args:
        dense: The model before.
        pruned: The model now; layers may be missing in it.
        costs: What both cost.
        times: Seconds that each module spends in its own forward, in both.
        statuses: By layer: what can be said of the neurons that it makes, and why.
        activations: What a search has chosen, by site.
    """
    statuses, activations = statuses or {}, activations or {}
    names = _layer_names(dense, costs[0], times[0] if times else {}, activations)
    shares = [_shares(each, names) for each in times] if times else [None, None]
    now = dict(pruned.named_modules(remove_duplicate=False))
    found = []
    for name, module in dense.named_modules():
        if name not in names:
            continue
        twins = (module, now.get(name))
        here = [_facts(twin, name, cost) for twin, cost in zip(twins, costs, strict=True)]
        gone = twins[1] is None or (isinstance(twins[1], nn.Identity) and not isinstance(module, nn.Identity))
        status, reason = statuses.get(name, ("", ""))
        if gone:
            status, reason = "", "removed: its input is passed on"
            here[1] = {**dict.fromkeys(("params", "nonzero", "macs", "bytes"), 0)}
        before, after = _activations(name, twins, activations)
        share = [None if each is None else each.get(name, 0.0) for each in shares]
        found.append(
            Layer(
                name,
                type(module).__name__,
                latency_share=(share[0], share[1]),
                activation=(before, None if gone else after),
                status=status,
                reason=reason,
                **{key: (here[0].get(key), here[1].get(key)) for key in here[0]},
            )
        )
    return tuple(found)


def _layer_names(
    model: nn.Module, cost: Cost, times: Mapping[str, float], activations: Mapping[str, Change]
) -> set[str]:
    owners = {name if change.owner is None else change.owner for name, change in activations.items()}
    innermost = {name for name, module in model.named_modules() if not any(True for _ in module.children())}
    activated = {name for name, module in model.named_modules() if choice_of(module) is not None}
    ran = {name for name in times if name in innermost}
    return set(cost.layers) | {name for name, macs in cost.own.items() if macs} | ran | activated | owners


def _shares(times: Mapping[str, float], names: Iterable[str]) -> dict[str, float]:
    total = sum(times.get(name, 0.0) for name in names)
    return {name: times.get(name, 0.0) / total for name in names} if total else {}


def _facts(module: nn.Module | None, name: str, cost: Cost) -> dict[str, Any]:
    """What one side of a layer's line says."""
    if module is None:
        return {}
    own = dict(module.named_parameters(recurse=False))
    weight = own.get("weight") if own.get("weight") is not None else max(own.values(), key=Tensor.numel, default=None)
    known = cost.layers.get(name)
    params, nonzero = (known.params, known.nonzero) if known else (0, 0)
    held = known.bytes if known else sum(b.numel() * b.element_size() for b in module.buffers(recurse=False))
    return {
        "shape": None if weight is None else tuple(weight.shape),
        "params": params,
        "nonzero": nonzero,
        "macs": cost.own.get(name, 0),
        "bytes": held,
        "sparsity": 1 - nonzero / params if params else None,
        "width": _width(module, weight),
    }


def _width(module: nn.Module, weight: Tensor | None) -> int | None:
    sizes = (getattr(module, name, None) for name in WIDTHS)
    found = next((size for size in sizes if isinstance(size, int)), None)
    if found is not None or weight is None or not weight.dim():
        return found if weight is not None else None
    return weight.size(0)


def _activations(
    name: str, twins: tuple[nn.Module, nn.Module | None], changes: Mapping[str, Change]
) -> tuple[str | None, str | None]:
    """Before and after: of the module itself, or of the calls that its forward makes."""
    before, after = (None if twin is None else choice_of(twin) for twin in twins)
    own = changes.get(name)
    if own is not None and own.owner is None:
        return None if own.before is None else str(own.before), str(own.after)
    if before is not None or after is not None:
        return None if before is None else str(before), None if after is None else str(after)
    called = [change for change in changes.values() if change.owner == name]
    if not called:
        return None, None
    return (
        ", ".join(each.function if each.before is None else str(each.before) for each in called),
        ", ".join(str(each.after) for each in called),
    )


# -- what can go, and why not ------------------------------------------------------------------------------------------


def statuses(model: nn.Module, plan: Plan, groups: Groups | None = None) -> dict[str, tuple[str, str]]:
    """What is known of the neurons that layers make: exact, approximate or frozen, and why.

    Args:
        model: The dense model.
        plan: What was removed from it.
        groups: Its groups, or those of what is left of it.
    """
    found: dict[str, tuple[str, str]] = {}
    for name, module in model.named_modules():
        own = [f"{name}.{each}" if name else each for each, _ in module.named_parameters(recurse=False)]
        made = [f"{each}[{dim}]" for each in own for dim in [_made_dim(module, each.rpartition(".")[2])]]
        reasons = [reason for key, reason in plan.frozen.items() if key.partition(" ")[0] in made]
        lost = any(_made_dim(module, each.rpartition(".")[2]) in plan.kept.get(each, {}) for each in own)
        if lost:
            found[name] = ("exact", "")
        elif reasons:
            found[name] = ("frozen", reasons[0])
    for group in groups or ():
        makers = {part.name.rpartition(".")[0] for part in group.slices if part.role == "makes"}
        followers = {part.name.rpartition(".")[0] for part in group.slices if part.role == "follows"}
        told = ("frozen", group.frozen) if group.frozen else ("approximate", ", ".join(group.mixing))
        for name in makers | followers:
            if name in makers or name not in found:
                found[name] = ("exact", "") if group.exact else told
    for names, mixing in plan.approximate.items():
        found |= dict.fromkeys(names.split(" + "), ("approximate", mixing))
    # Why a whole layer or its kernel stays says nothing of its neurons: it is told where nothing is known of these.
    kept = {name.rpartition(".")[0] for name in plan.kept}
    told_of = [name for name, _ in model.named_modules() if name in plan.frozen and name not in kept]
    return {name: ("frozen", plan.frozen[name]) for name in told_of} | found


def _made_dim(module: nn.Module, parameter: str) -> int:
    """The dimension of a parameter along which a layer's neurons lie."""
    weight = module._parameters.get(parameter)
    if weight is None or weight.dim() < 2:
        return 0
    transposed = isinstance(module, nn.modules.conv._ConvTransposeNd | nn.Embedding | nn.EmbeddingBag)
    return 1 if transposed or getattr(module, "nf", None) == weight.size(1) != weight.size(0) else 0


# -- magnitudes --------------------------------------------------------------------------------------------------------


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """The weights whose magnitudes are told, by name."""
    try:
        return {name: weight.detach() for name, weight in prunable_weights(model).items()}
    except PruningError:  # there are none
        return {}


LOW, HIGH, WIDTH = -8.0, 3.0, 0.1
"""Decimal logarithms of magnitudes, and the width of a bin."""
BINS = round((HIGH - LOW) / WIDTH)


def magnitudes(weight: Tensor) -> list[int]:
    """How many of a weight's elements lie in each bin; zeros in none."""
    sizes = weight.detach().abs().flatten().float()
    sizes = sizes[(sizes > 0) & sizes.isfinite()]
    places = ((sizes.log10() - LOW) / WIDTH).long().clamp(0, BINS - 1)
    counts: list[int] = torch.bincount(places, minlength=BINS).tolist()
    return counts


def counts_of(data: Any) -> dict[str, list[int]]:
    """`magnitudes` by weight, from the plain data that checkpoints hold.

    Raises:
        PruningError: It is something else, or has other bins.
    """
    if not isinstance(data, Mapping) or not all(_are_counts(counts) for counts in data.values()):
        raise PruningError(f"the histograms of weights can't be read: they are not {BINS} counts by name")
    return {name: list(counts) for name, counts in data.items()}


def _are_counts(counts: Any) -> bool:
    return isinstance(counts, list) and len(counts) == BINS and all(type(count) is int for count in counts)


def thresholds_of(data: Any) -> dict[str, float]:
    """Thresholds by weight, from the plain data that checkpoints hold.

    Raises:
        PruningError: It is something else.
    """
    if not isinstance(data, Mapping) or not all(type(value) in (int, float) for value in data.values()):
        raise PruningError("the thresholds of weights can't be read: they are not numbers by name")
    return dict(data)


def histograms(
    now: Mapping[str, Tensor],
    before: Mapping[str, Sequence[int]] | None = None,
    thresholds: Mapping[str, float] | None = None,
) -> tuple[Histogram, ...]:
    """Histograms of weights by name.

    Args:
        now: The weights.
        before: `magnitudes` of before pruning, where they are known.
        thresholds: The magnitude below which weights went, where one tells.
    """
    before, thresholds = before or {}, thresholds or {}
    found = []
    for name, weight in now.items():
        dense, pruned = list(before.get(name, ())), magnitudes(weight)
        used = [place for place in range(BINS) if pruned[place] or (dense and dense[place])] or [0]
        first, last = used[0], used[-1] + 1
        low = round(LOW + WIDTH * first, 6)
        found.append(
            Histogram(name, low, WIDTH, tuple(dense[first:last]), tuple(pruned[first:last]), thresholds.get(name))
        )
    return tuple(found)


def threshold_of(gone: Tensor, kept: Tensor) -> float | None:
    """The magnitude below which weights went; None if not all of those that went lie below all of those that stay.

    Args:
        gone: Values, before they went, of the weights that are zero now.
        kept: Values, at the same time, of those that stay.
    """
    if not gone.numel() or not kept.numel():
        return None
    most = float(gone.detach().abs().max())
    return most if 0 < most <= float(kept.detach().abs().min()) and math.isfinite(most) else None
