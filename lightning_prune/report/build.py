"""Building reports: a pruned model measured beside the dense one."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lightning_prune.activations.apply import Change
from lightning_prune.errors import PruningError, TraceError
from lightning_prune.graph.callsites import ModuleCall
from lightning_prune.graph.groups import Groups, find_groups
from lightning_prune.graph.run import as_calls, check_model, plain_encoders, undisturbed
from lightning_prune.graph.tree import named_tensors
from lightning_prune.pruning.latency import latencies, layer_times
from lightning_prune.pruning.plan import Plan
from lightning_prune.pruning.sensitivity import Sensitivity
from lightning_prune.pruning.surgery import take
from lightning_prune.report.cost import Cost, cost_of_calls
from lightning_prune.report.layers import histograms, layers_of, magnitudes, statuses, threshold_of, weights_of
from lightning_prune.report.report import Histogram, Layer, Moment, Report, Row
from lightning_prune.report.run import batch_size, file_size

__all__ = ["build_report", "compare"]


def compare(
    dense: nn.Module,
    pruned: nn.Module,
    example_inputs: Any,
    *,
    plan: Plan | None = None,
    title: str = "",
    latency: bool = True,
) -> Report:
    """Measure a pruned model beside a dense one; neither is changed.

    Args:
        dense: The model before pruning, or one like it.
        pruned: The model after: its layers have the names that they have in ``dense``, and are not larger.
        example_inputs: A tensor, a tuple of positional or a dict of keyword arguments that both take. MACs and latency
            are those of this very call.
        plan: What was removed, where it is known: says what was exact and what had to stay. Without it the dense model
            is traced.
        title: What it is a report of.
        latency: Measure the time too, which takes seconds.

    Raises:
        PruningError: The models don't fit together, or one doesn't take the inputs.

    Example:
        >>> import torch
        >>> from lightning_prune import prune_neurons
        >>> from lightning_prune.models import LeNet
        >>> dense, pruned, image = LeNet(), LeNet(), torch.rand(1, 3, 32, 32)
        >>> plan = prune_neurons(pruned, image, 0.5)
        >>> report = compare(dense, pruned, image, plan=plan, latency=False)
        >>> report["parameters"].dense, report.layers[0].status
        (62006, 'exact')
    """
    for model in (dense, pruned):
        check_model(model)
    calls = as_calls(example_inputs)
    _check_fit(dense, pruned)
    groups = None
    with undisturbed(dense), undisturbed(pruned):
        costs = [_cost(which, model, calls) for which, model in (("dense", dense), ("pruned", pruned))]
        if plan is None:
            try:
                groups = find_groups(dense, example_inputs)
            except PruningError:  # it runs, but can't be followed: nothing is known of what can go
                groups = None
        size = batch_size(calls, dense)
        rows = [
            Row("parameters", costs[0].params, costs[1].params),
            Row("non-zero", costs[0].nonzero, costs[1].nonzero),
            Row(f"MACs (batch {size})", costs[0].macs, costs[1].macs),
            Row("file size", file_size(dense), file_size(pruned), "B"),
        ]
        if latency:
            before, after = latencies([dense, pruned], calls)
            rows.append(Row(f"latency (batch {size})", before, after, "s"))
        layers = layers_of(
            dense,
            pruned,
            costs,
            times=_times(dense, pruned, calls) if latency else None,
            statuses=statuses(dense, plan or Plan({}, {}), groups),
            activations=plan.activations if plan else None,
        )
    return Report(tuple(rows), layers, weights=_compared(dense, pruned, plan), title=title or type(pruned).__name__)


def _check_fit(dense: nn.Module, pruned: nn.Module) -> None:
    """Raise a PruningError unless ``pruned`` may have come from ``dense``."""
    before, after = named_tensors(dense), named_tensors(pruned)
    kinds = f"{type(dense).__name__} (dense) and {type(pruned).__name__} (pruned)"
    strange = [name for name in after if name not in before and isinstance(after[name], nn.Parameter)]
    if strange or not after.keys() & before.keys():
        listed = ", ".join(repr(name) for name in strange[:3]) + (", …" if len(strange) > 3 else "")
        raise PruningError(
            f"{kinds} don't fit together: "
            + (f"the dense model has no {listed}" if strange else "they have no parameter in common")
        )
    for name, tensor in after.items():
        if name not in before or not isinstance(tensor, nn.Parameter):
            continue
        was, now = tuple(before[name].shape), tuple(tensor.shape)
        if len(was) != len(now) or any(b > a for a, b in zip(was, now, strict=True)):
            turned = len(was) == len(now) and all(b >= a for a, b in zip(was, now, strict=True))
            raise PruningError(
                f"{kinds} don't fit together: {name!r} has shape {was} in the dense model and {now} in the pruned one"
                + (". Is the dense model the first of the two?" if turned else "")
            )
    devices = {str(tensor.device) for tensor in (*before.values(), *after.values())}
    if len(devices) > 1:
        raise PruningError(f"{kinds} must be on one device to be compared, found {', '.join(sorted(devices))}")


def _cost(which: str, model: nn.Module, calls: tuple[ModuleCall, ...]) -> Cost:
    try:
        return cost_of_calls(model, calls)
    except Exception as error:  # whatever a user's forward may raise
        raise TraceError(
            f"the {which} model ({type(model).__name__}) raised {type(error).__name__} on example_inputs: {error}"
        ) from error


def _times(dense: nn.Module, pruned: nn.Module, calls: Sequence[ModuleCall]) -> list[dict[str, float]]:
    with plain_encoders():
        return [layer_times(model, calls) for model in (dense, pruned)]


def _compared(dense: nn.Module, pruned: nn.Module, plan: Plan | None) -> tuple[Histogram, ...]:
    before, after = weights_of(dense), weights_of(pruned)
    kept = plan.kept if plan else {}
    thresholds: dict[str, float] = {}
    for name, weight in after.items():
        left = take(before[name], kept.get(name, {})) if name in before else None
        if left is not None and left.shape == weight.shape:
            zero = weight == 0
            found = threshold_of(left[zero], left[~zero])
            thresholds |= {} if found is None else {name: found}
    return histograms(after, {name: magnitudes(weight) for name, weight in before.items()}, thresholds)


def build_report(
    model: nn.Module,
    plan: Plan,
    single: Sequence[ModuleCall],
    whole: Sequence[ModuleCall],
    *,
    macs: tuple[int | None, int] | None = None,
    metric: str,
    dense_value: float | None,
    pruned_value: float | None,
    groups: Groups | None = None,
    activations: Mapping[str, Change] | None = None,
    timeline: Sequence[Moment] = (),
    sensitivity: Sensitivity | None = None,
    before: Mapping[str, Sequence[int]] | None = None,
    thresholds: Mapping[str, float] | None = None,
) -> Report:
    """Measure a pruned model beside the dense one that it came from.

    Sizes, MACs and latency of a dense model don't depend on its values, so the dense one is built anew from the
    pruned one and its plan; nothing has to be kept during training.

    Args:
        model: The pruned model.
        plan: What was removed from it.
        single: Module calls with one example, to count and to time; empty where nothing can be run.
        whole: The same with a whole training batch.
        macs: MACs of one example before and now, if they are known without running anything.
        metric: Name of the validation metric.
        dense_value: Its value before pruning, if it was measured.
        pruned_value: Its value now, if there is one; without either the row is left out.
        groups: The groups of the model as it is now, where they are known.
        activations: What a search has chosen.
        timeline: What happened while it was trained.
        sensitivity: Curves, where they were measured.
        before: `magnitudes` of weights before pruning.
        thresholds: By weight, the magnitude below which it was set to zero.
    """
    dense = _dense_twin(model, plan)
    with undisturbed(model):
        costs = [cost_of_calls(each, tuple(single)) for each in (dense, model)]
        rows = [
            Row("parameters", costs[0].params, costs[1].params),
            Row("non-zero", costs[0].params, costs[1].nonzero),
            Row("file size", file_size(dense), file_size(model), "B"),
        ]
        sizes = {batch_size(some, model): some for some in (single, whole) if some}
        if single:
            rows.insert(2, Row(f"MACs (batch {next(iter(sizes))})", costs[0].macs, costs[1].macs))
        elif macs is not None:
            rows.insert(2, Row("MACs (batch 1)", *macs))
        for size, some in sizes.items():
            before_, after = latencies([dense, model], some)
            rows.append(Row(f"latency (batch {size})", before_, after, "s"))
        layers: tuple[Layer, ...] = layers_of(
            dense,
            model,
            costs,
            times=_times(dense, model, single) if single else None,
            statuses=statuses(dense, plan, groups),
            activations=activations,
        )
    if dense_value is not None or pruned_value is not None:
        rows.append(Row(metric, dense_value, pruned_value))
    return Report(
        tuple(rows),
        layers,
        tuple(timeline),
        sensitivity,
        histograms(weights_of(model), before, thresholds),
        type(model).__name__,
        metric,
    )


def _dense_twin(model: nn.Module, plan: Plan) -> nn.Module:
    dense = copy.deepcopy(model)
    plan.take_back(dense)
    with torch.no_grad():
        for name, tensor in named_tensors(dense).items():
            if tensor.is_floating_point() and (isinstance(tensor, nn.Parameter) or name in plan.shapes):
                tensor.masked_fill_(tensor == 0, 1e-3)  # a dense file holds no zeros
    return dense
