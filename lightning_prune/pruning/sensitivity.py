"""Sensitivity: how much a model suffers when a part of one group of neurons is masked, group by group."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.errors import PruningError
from lightning_prune.graph.callsites import ModuleCall
from lightning_prune.graph.groups import Groups, find_groups
from lightning_prune.graph.run import as_calls, run_calls, undisturbed
from lightning_prune.graph.tree import tensors as tensors_of
from lightning_prune.graph.verify import MaskedModel
from lightning_prune.pruning.criteria import collect_now, get_neuron_criterion
from lightning_prune.pruning.progress import progress_bar
from lightning_prune.pruning.select import globs, pick

__all__ = ["Sensitivity", "by_layers", "damage_curves", "sensitivity"]

RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)

Metric = Callable[[Any, Any], Any]


@dataclass(frozen=True)
class Sensitivity:
    """A metric against the fraction of one group's neurons that is masked, group by group.

    Attributes:
        metric: Its name.
        base: Its value for the model as it is.
        values: By the layers that make the group, ``"conv1 + block.conv2"``, with a number where they make several
            (``"qkv#0"``), by ratio: the value with that part of the group masked.
    """

    metric: str
    base: float
    values: dict[str, dict[float, float]]

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {"metric": self.metric, "base": self.base, "values": {k: dict(v) for k, v in self.values.items()}}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Sensitivity:
        """From what `to_dict` gave, through JSON (which turns numbers that are keys into text) or not."""

        def number(value: Any) -> float:
            return float("nan") if value is None else float(value)

        values = {
            str(key): {float(ratio): number(value) for ratio, value in row.items()}
            for key, row in data["values"].items()
        }
        return cls(str(data["metric"]), number(data["base"]), values)

    def __str__(self) -> str:
        ratios = sorted({ratio for row in self.values.values() for ratio in row})
        width = max((len(key) for key in self.values), default=0)
        lines = [f"{self.metric} {self.base:.4g} as it is; with a part of one group masked:"]
        lines.append(f"{'':<{width}}  " + "  ".join(f"{f'{ratio:g}':>8}" for ratio in ratios))
        for key, row in self.values.items():
            cells = "  ".join(f"{row[ratio]:>8.4g}" if ratio in row else " " * 8 for ratio in ratios)
            lines.append(f"{key:<{width}}  {cells}")
        return "\n".join(lines)

    def plot(self, path: str | PathLike[str] | None = None) -> Any:
        """One curve per group.

        Args:
            path: Where to write it, as what its ending says; None: nowhere.

        Returns:
            The matplotlib figure.

        Raises:
            PruningError: matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise PruningError('a plot needs matplotlib: pip install "lightning-prune[plots]"') from error
        figure = Figure(figsize=(7, 4.5))
        axes = figure.add_subplot()
        axes.set_prop_cycle(color=["#0072b2", "#c44e00", "#00805d", "#1c2024"])  # told apart with any colour vision
        markers = "osv^Dpx+*<>"
        for number, (key, row) in enumerate(self.values.items()):
            ratios = sorted(row)
            axes.plot(ratios, [row[r] for r in ratios], marker=markers[number % len(markers)], ms=4, label=key)
        axes.axhline(self.base, color="0.5", ls="--", label="nothing masked")
        axes.set_xlabel("fraction of the group's neurons masked")
        axes.set_ylabel(self.metric)
        axes.set_xlim(0, 1)
        axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.02, 0.5))
        if path is not None:
            figure.savefig(path, bbox_inches="tight")  # names may be longer than any layout has room for
        return figure


def sensitivity(
    model: nn.Module,
    batches: Iterable[Any],
    metric: Metric,
    *,
    criterion: str | Callable[[Tensor], Tensor] = "l1",
    ratios: Sequence[float] = RATIOS,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    progress: bool | None = None,
) -> Sensitivity:
    """Mask a growing part of each group, one group at a time, and measure the model each time.

    Args:
        model: Any module; it is not changed.
        batches: Pairs of what the model takes (a tensor, a tuple of positional or a dict of keyword arguments) and
            what the metric compares its output with. A DataLoader will do. They are kept in memory.
        metric: A torchmetrics metric, or a function of outputs and targets whose mean over all batches counts, each
            by its number of targets.
        criterion: Which neurons of a group go first: as for `prune_neurons`. Gradients must be there for ``"taylor"``.
        ratios: Fractions of each group, in (0, 1).
        include: Globs on module names: only neurons that these layers make (None: all).
        exclude: Globs on module names: no neurons that these layers make.
        progress: Show a progress bar; None: if standard error is a terminal.

    Raises:
        PruningError: Bad arguments, no batch, or nothing prunable.

    Source: Li et al., 2017, arXiv:1608.08710, section 3.2.
    """
    if not callable(metric):
        raise PruningError(f"metric must be a torchmetrics metric or a function of outputs and targets, got {metric!r}")
    if not ratios or not all(isinstance(r, float | int) and 0 < r < 1 for r in ratios):
        raise PruningError(f"ratios must be fractions in (0, 1), got {ratios!r}")
    pairs = [_pair(batch) for batch in batches]
    if not pairs:
        raise PruningError("batches is empty")
    judge = get_neuron_criterion(criterion)
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    calls = [call for inputs, _ in pairs for call in as_calls(_to(inputs, device))]
    targets = [_to(target, device) for _, target in pairs]
    with torch.inference_mode(False), torch.no_grad():
        groups = find_groups(model, calls[0].args or calls[0].kwargs)
        collect_now(judge, model, groups, calls)
        allowed = pick(groups, globs("include", include), globs("exclude", exclude), False)
        allowed &= judge.judged(model, groups)
        scores = judge.score(model, groups)

        def measure(alive: Tensor) -> float:
            return _measured(metric, _outputs(model, groups, alive, calls), targets)

        base = measure(torch.ones(groups.neurons, dtype=torch.bool))
        parts = [float(ratio) for ratio in ratios]
        values = _by_group(groups, scores, allowed, parts, measure, progress=progress)
    if not values:
        raise PruningError(f"no neuron of this model can be pruned.\n{groups}")
    name = getattr(metric, "__name__", type(metric).__name__)
    return Sensitivity(name, base, by_layers(values))


def by_layers(values: dict[str, dict[float, float]]) -> dict[str, dict[float, float]]:
    """By the names of the layers alone, but where they make several groups."""
    short = Counter(key.rpartition("#")[0] for key in values)
    named = ((key, key.rpartition("#")[0], row) for key, row in values.items())
    return {layers if short[layers] == 1 else key: row for key, layers, row in named}


def _pair(batch: Any) -> tuple[Any, Any]:
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        raise PruningError("each batch must be a pair: what the model takes, and the target")
    return batch[0], batch[1]


def _to(tree: Any, device: torch.device) -> Any:
    return torch.utils._pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device), tree)


def _outputs(model: nn.Module, groups: Groups, alive: Tensor, calls: Sequence[ModuleCall]) -> list[Any]:
    with undisturbed(model):
        model.eval()
        if bool(alive.all()):
            return run_calls(model, calls)
        return MaskedModel(model, groups.kept(alive), groups.unmasked, groups.own).outputs(calls)


def _measured(metric: Any, outputs: Sequence[Any], targets: Sequence[Any]) -> float:
    if hasattr(metric, "update") and hasattr(metric, "compute") and hasattr(metric, "reset"):
        metric.reset()
        for output, target in zip(outputs, targets, strict=True):
            metric.update(output, target)
        value = float(metric.compute())
        metric.reset()
        return value
    sizes = [len(target) if isinstance(target, Tensor) and target.dim() else 1 for target in targets]
    values = [float(metric(output, target)) for output, target in zip(outputs, targets, strict=True)]
    return sum(value * size for value, size in zip(values, sizes, strict=True)) / sum(sizes)


def _by_group(
    groups: Groups,
    scores: Tensor,
    allowed: Tensor,
    ratios: Sequence[float],
    measure: Callable[[Tensor], float],
    *,
    progress: bool | None = None,
) -> dict[str, dict[float, float]]:
    found: dict[str, dict[float, float]] = {}
    all_groups = zip(groups.keys, groups.prunable, groups.ranges, strict=True)
    chosen = [(key, group, numbers) for key, group, numbers in all_groups if bool(allowed[numbers.start])]
    with progress_bar(len(chosen) * len(ratios), "sensitivity", progress) as bar:
        for key, group, numbers in chosen:
            order = torch.argsort(scores[numbers.start : numbers.stop], stable=True) + numbers.start
            row: dict[float, float] = {}
            for ratio in ratios:
                alive = torch.ones(groups.neurons, dtype=torch.bool)
                alive[order[: round(ratio * group.size)]] = False
                row[ratio] = measure(alive)
                bar.update()
            found[key] = row
    return found


POINTS = 8
"""Parts of each group that `damage_curves` looks at."""


def damage_curves(
    model: nn.Module, groups: Groups, scores: Tensor, allowed: Tensor, calls: Sequence[ModuleCall]
) -> Mapping[str, Tensor]:
    """How much the outputs change when 0, 1/8, … 8/8 of a group is masked: squared, relative to the outputs' own.

    Returns:
        By the group's key, shape (9,), float64.

    Raises:
        PruningError: There is no call that can be repeated.
    """
    calls = [call for call in calls if call.repeatable]
    if not calls:
        raise PruningError("scope='sensitivity' runs the model on its inputs again; give example_inputs")
    whole = _floats(_outputs(model, groups, torch.ones(groups.neurons, dtype=torch.bool), calls))
    size = sum(float(each.square().sum()) for each in whole)

    def damage(alive: Tensor) -> float:
        masked = _floats(_outputs(model, groups, alive, calls))
        lost = sum(float((a - b).square().sum()) for a, b in zip(whole, masked, strict=True) if a.shape == b.shape)
        return lost / size if size else 0.0

    ratios = [point / POINTS for point in range(1, POINTS + 1)]
    rows = _by_group(groups, scores, allowed, ratios, damage)
    return {key: torch.tensor([0.0, *row.values()], dtype=torch.float64) for key, row in rows.items()}


def _floats(outputs: Any) -> list[Tensor]:
    found = [torch.view_as_real(each) if each.is_complex() else each for each in tensors_of(outputs)]
    return [each.detach().double() for each in found if each.is_floating_point()]
