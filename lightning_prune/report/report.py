"""The report: dense against pruned, as plain frozen data; how it looks is for `render`, `figures` and `page`."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from lightning_prune.errors import PruningError
from lightning_prune.pruning.sensitivity import Sensitivity

__all__ = ["Histogram", "Layer", "Moment", "Report", "Row", "check_ending", "timeline_of"]

T = TypeVar("T")
Pair = tuple[T | None, T | None]
"""Before and after; None where that is not known."""

FORMAT = 1
"""Of `Report.to_dict`."""


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
class Layer:
    """One layer, before and after; every pair is (dense, pruned), None where that is not known.

    A layer is a module that holds parameters, multiplies, or is the innermost one to run. MACs of all layers add up to
    those of the model, and so do parameters, but for those that several layers share: they count in each.

    Attributes:
        name: Its path in the model; ``""`` is the model itself, with what it holds and does outside of other layers.
        kind: Name of its class.
        shape: Of its weight (else of its largest parameter).
        params: Elements of its own parameters.
        nonzero: Those that are not zero.
        macs: Multiply-accumulates of its own forward, layers inside it aside, in the calls that were measured.
        bytes: Memory of its own parameters and buffers.
        sparsity: Fraction of its own parameters' elements that are zero.
        latency_share: Its part of the time that a forward spends in layers, 0 to 1; layers inside it aside.
        activation: The activation function that it is, or those that its forward calls and a search has looked at.
        status: ``"exact"``: removing neurons that it makes equals masking them; ``"approximate"``: an operation reads
            several of them together; ``"frozen"``: they have to stay; ``""``: it makes none, or nobody has looked.
        reason: Why.
        width: How many neurons (channels, features) it makes.
    """

    name: str
    kind: str
    shape: Pair[tuple[int, ...]] = (None, None)
    params: Pair[int] = (None, None)
    nonzero: Pair[int] = (None, None)
    macs: Pair[int] = (None, None)
    bytes: Pair[int] = (None, None)
    sparsity: Pair[float] = (None, None)
    latency_share: Pair[float] = (None, None)
    activation: Pair[str] = (None, None)
    status: str = ""
    reason: str = ""
    width: Pair[int] = (None, None)


@dataclass(frozen=True)
class Moment:
    """One point of the pruning timeline: after a pruning, or at an epoch's end.

    Attributes:
        epoch: Epochs trained so far; 1.5 is the middle of the second.
        step: Optimizer steps made so far.
        amount: The fraction that schedules have asked for so far; of several callbacks the largest.
        sparsity: Fraction of the parameters' elements that are zero.
        params: Elements of all parameters.
        macs: Multiply-accumulates of one example; None where nothing tells.
        metric: The monitored metric; None: not measured at this moment.
        lr: Learning rate of the first optimizer's first parameter group; None: there is none.
    """

    epoch: float
    step: int
    amount: float
    sparsity: float
    params: int
    macs: int | None = None
    metric: float | None = None
    lr: float | None = None


@dataclass(frozen=True)
class Histogram:
    """How large the weights of one layer are: counts over the decimal logarithm of their magnitudes.

    Attributes:
        name: Name of the parameter.
        low: Logarithm at which the first bin starts; smaller magnitudes are in it too, zeros aren't.
        width: Of a bin, in decades.
        dense: Weights per bin before pruning; empty where that was not looked at.
        pruned: Weights per bin now.
        threshold: The magnitude below which weights were set to zero; None: they were not chosen by magnitude alone.
    """

    name: str
    low: float
    width: float
    dense: tuple[int, ...]
    pruned: tuple[int, ...]
    threshold: float | None = None


@dataclass(frozen=True)
class Report:
    """What pruning changed; prints as a table, ``report["macs"]`` is one row, `to_dict` gives plain data.

    Attributes:
        rows: Quantities of the whole model.
        layers: The same and more, layer by layer.
        timeline: What happened while it was trained.
        sensitivity: How much it suffers from each group's masking, where that was measured.
        weights: Histograms of the weights.
        title: What it is a report of.
        metric: Name of the metric in the timeline.
    """

    rows: tuple[Row, ...]
    layers: tuple[Layer, ...] = ()
    timeline: tuple[Moment, ...] = ()
    sensitivity: Sensitivity | None = None
    weights: tuple[Histogram, ...] = ()
    title: str = ""
    metric: str = ""

    def __getitem__(self, name: str) -> Row:
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"{name!r}; the report has {', '.join(row.name for row in self.rows)}")

    # -- data -----------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """As plain data; ``"rows"`` by their names."""
        return {
            "format": FORMAT,
            "title": self.title,
            "metric": self.metric,
            "rows": {row.name: {**asdict(row), "ratio": row.ratio} for row in self.rows},
            "layers": [_listed(asdict(layer)) for layer in self.layers],
            "timeline": [asdict(moment) for moment in self.timeline],
            "sensitivity": None if self.sensitivity is None else self.sensitivity.to_dict(),
            "weights": [_listed(asdict(each)) for each in self.weights],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Report:
        """From what `to_dict` gave, through JSON or not.

        Raises:
            PruningError: The data is not a report.
        """
        try:
            if data["format"] != FORMAT:
                raise ValueError(f"its format is {data['format']!r}, this version reads {FORMAT}")
            found = data["sensitivity"]
            return cls(
                tuple(_made(Row, row) for row in data["rows"].values()),
                tuple(_made(Layer, layer) for layer in data["layers"]),
                tuple(_made(Moment, moment) for moment in data["timeline"]),
                None if found is None else Sensitivity.from_dict(found),
                tuple(_made(Histogram, each) for each in data["weights"]),
                str(data["title"]),
                str(data["metric"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise PruningError(f"not a report: {type(error).__name__}: {error}") from error

    def to_json(self) -> str:
        """As JSON; what is no finite number is null there."""
        return json.dumps(_finite(self.to_dict()), indent=2, allow_nan=False) + "\n"

    # -- text -----------------------------------------------------------------------------------------------

    def __str__(self) -> str:
        cells = [("", "dense", "pruned", "ratio")]
        for row in self.rows:
            ratio = "–" if row.ratio is None else f"{row.ratio:.3f}"
            cells.append((row.name, text_of(row.dense, row.unit), text_of(row.pruned, row.unit), ratio))
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

    def to_csv(self) -> str:
        """One line per layer and one for all of them, ``(all)``; without layers, one line per row."""
        from lightning_prune.report.render import csv_of

        return csv_of(self)

    def to_markdown(self) -> str:
        """Tables of the rows and of the layers."""
        from lightning_prune.report.render import markdown_of

        return markdown_of(self)

    def to_html(self) -> str:
        """One page that needs nothing else: no network, no script, plots inside.

        Raises:
            PruningError: matplotlib is not installed.
        """
        from lightning_prune.report.page import page_of

        return page_of(self)

    def __rich__(self) -> Any:
        from lightning_prune.report.render import rich_of

        return rich_of(self)

    def save(self, path: str | PathLike[str]) -> None:
        """Write a file: ``.html``, ``.md``, ``.json``, ``.csv``, or ``.txt`` for the table that `print` shows.

        Raises:
            PruningError: Another ending, or the file can't be written; what was there before is whole then.
        """
        path = Path(path)
        check_ending(path)
        _write(path, KINDS[path.suffix.lower()](self))


KINDS: dict[str, Callable[[Report], str]] = {
    ".html": Report.to_html,
    ".md": Report.to_markdown,
    ".json": Report.to_json,
    ".csv": Report.to_csv,
    ".txt": lambda report: f"{report}\n",
}
"""What is written, by the ending of a file."""


def check_ending(path: Path) -> None:
    """Raise a PruningError unless a report can be saved under such a name."""
    if path.suffix.lower() not in KINDS:
        raise PruningError(f"a report is saved as one of {', '.join(KINDS)}, got {path.name!r}")


def _write(path: Path, text: str) -> None:
    """Write a whole file or none."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("x", encoding="utf-8", newline="") as file:
            file.write(text)
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise PruningError(f"the report can't be written to {path}: {error.strerror or error}") from error


def text_of(value: float | None, unit: str) -> str:
    """A row's value as text."""
    if value is None:
        return "–"
    if unit == "s":
        return f"{value * 1e3:.3f} ms"
    if unit == "B":
        return f"{value / 1e3:,.1f} kB"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def timeline_of(data: Iterable[Mapping[str, Any]]) -> list[Moment]:
    """Moments from the plain data that checkpoints hold.

    Raises:
        PruningError: It is from a version that knew less, or no timeline.
    """
    try:
        return [_made(Moment, moment) for moment in data]
    except (TypeError, AttributeError) as error:
        raise PruningError(f"the timeline can't be read: {error}") from error


def _listed(value: Any) -> Any:
    """Tuples as lists."""
    if isinstance(value, dict):
        return {key: _listed(each) for key, each in value.items()}
    return [_listed(each) for each in value] if isinstance(value, list | tuple) else value


def _tupled(value: Any) -> Any:
    return tuple(_tupled(each) for each in value) if isinstance(value, list | tuple) else value


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _made(cls: type[T], data: Mapping[str, Any]) -> T:
    """One of the dataclasses above, from plain data; what else stands there is left aside."""
    kinds = get_type_hints(cls)
    given = {name: _tupled(value) for name, value in data.items() if name in kinds}
    for name, value in given.items():
        if not _is(value, kinds[name]):
            raise TypeError(f"{name!r} of a {cls.__name__} can't be {value!r}")
    return cls(**given)


def _is(value: Any, kind: Any) -> bool:
    """Whether plain data is of the type of a field of the dataclasses above."""
    parts = get_args(kind)
    if isinstance(kind, UnionType) or get_origin(kind) is Union:
        return any(_is(value, each) for each in parts)
    if get_origin(kind) is tuple:
        if not isinstance(value, tuple):
            return False
        parts = (parts[0],) * len(value) if parts[-1] is ... else parts
        return len(value) == len(parts) and all(_is(each, part) for each, part in zip(value, parts, strict=True))
    if kind is float:
        kind = int | float
    return isinstance(value, kind) and not isinstance(value, bool)
