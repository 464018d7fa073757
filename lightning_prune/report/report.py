"""The report of a run: dense against pruned, as data and as one table."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from lightning_prune.graph.callsites import ModuleCall
from lightning_prune.graph.run import named_tensors, undisturbed
from lightning_prune.pruning.latency import latencies
from lightning_prune.pruning.plan import Plan
from lightning_prune.report.cost import cost_of_calls
from lightning_prune.report.run import batch_size, file_size

__all__ = ["Report", "Row", "build_report"]


@dataclass(frozen=True)
class Row:
    """One quantity, before and after.

    Attributes:
        name: What was measured.
        dense: Its value for the model before pruning; None where it was not measured.
        pruned: Its value now; None where there is none.
        unit: ``""`` for counts and fractions, else ``"B"`` or ``"s"``.
    """

    name: str
    dense: float | None
    pruned: float | None
    unit: str = ""

    @property
    def ratio(self) -> float | None:
        """pruned / dense."""
        return self.pruned / self.dense if self.dense and self.pruned is not None else None


@dataclass(frozen=True)
class Report:
    """What pruning changed; prints as a table, ``report["macs"]`` is one row, `to_dict` gives plain data."""

    rows: tuple[Row, ...]

    def __getitem__(self, name: str) -> Row:
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"{name!r}; the report has {', '.join(row.name for row in self.rows)}")

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """As plain data: row name -> dense, pruned, ratio, unit."""
        return {row.name: {**asdict(row), "ratio": row.ratio} for row in self.rows}

    def __str__(self) -> str:
        cells = [("", "dense", "pruned", "ratio")]
        for row in self.rows:
            ratio = "–" if row.ratio is None else f"{row.ratio:.3f}"
            cells.append((row.name, _text(row.dense, row.unit), _text(row.pruned, row.unit), ratio))
        widths = [max(len(line[column]) for line in cells) for column in range(4)]
        lines = [
            "  ".join(
                [
                    line[0].ljust(widths[0]),
                    *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True)),
                ]
            )
            for line in cells
        ]
        return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _text(value: float | None, unit: str) -> str:
    if value is None:
        return "–"
    if unit == "s":
        return f"{value * 1e3:.3f} ms"
    if unit == "B":
        return f"{value / 1e3:,.1f} kB"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


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
    """
    dense = _dense_twin(model, plan)
    with undisturbed(model):
        costs = [cost_of_calls(each, tuple(single)) for each in (dense, model)]
        rows = [
            Row("parameters", costs[0].params, costs[1].params),
            Row("non-zero", costs[0].params, costs[1].nonzero),
            Row("file size", file_size(dense), file_size(model), "B"),
        ]
        if single:
            rows.insert(2, Row(f"MACs (batch {batch_size(single)})", costs[0].macs, costs[1].macs))
        elif macs is not None:
            rows.insert(2, Row("MACs (batch 1)", *macs))
        for size, some in {batch_size(some): some for some in (single, whole) if some}.items():
            before, after = latencies([dense, model], some)
            rows.append(Row(f"latency (batch {size})", before, after, "s"))
    if dense_value is not None or pruned_value is not None:
        rows.append(Row(metric, dense_value, pruned_value))
    return Report(tuple(rows))


def _dense_twin(model: nn.Module, plan: Plan) -> nn.Module:
    dense = copy.deepcopy(model)
    plan.take_back(dense)
    with torch.no_grad():
        for name, tensor in named_tensors(dense).items():
            if tensor.is_floating_point() and (isinstance(tensor, nn.Parameter) or name in plan.shapes):
                tensor.masked_fill_(tensor == 0, 1e-3)  # a dense file holds no zeros
    return dense
