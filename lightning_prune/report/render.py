"""A report as CSV, as Markdown and as rich tables."""

from __future__ import annotations

import csv
import io
from typing import Any

from lightning_prune.errors import PruningError
from lightning_prune.report.report import Layer, Report, text_of

__all__ = ["csv_of", "markdown_of", "rich_of"]

PAIRS = ("shape", "width", "params", "nonzero", "macs", "bytes", "sparsity", "latency_share", "activation")
SUMS = ("params", "nonzero", "macs", "bytes")


def csv_of(report: Report) -> str:
    """One line per layer, after one for all of them; without layers, one line per row of the report."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    if not report.layers:
        writer.writerow(["name", "dense", "pruned", "ratio", "unit"])
        for row in report.rows:
            writer.writerow([row.name, *map(_cell, (row.dense, row.pruned, row.ratio)), row.unit])
        return file.getvalue()
    writer.writerow(["name", "kind", *(f"{side}_{key}" for key in PAIRS for side in SIDES), "status", "reason"])
    writer.writerow(["(all)", report.title, *(_cell(value) for key in PAIRS for value in _total(report, key)), "", ""])
    for layer in report.layers:
        pairs = [_cell(value) for key in PAIRS for value in getattr(layer, key)]
        writer.writerow([layer.name, layer.kind, *pairs, layer.status, layer.reason])
    return file.getvalue()


SIDES = ("dense", "pruned")


def _total(report: Report, key: str) -> tuple[Any, ...]:
    """What all layers come to; parameters as the report counts them, shared ones once."""
    known = {row.name: (row.dense, row.pruned) for row in report.rows}
    sides = [[getattr(layer, key)[side] for layer in report.layers] for side in (0, 1)]
    if key == "params" and "parameters" in known:
        return known["parameters"]
    if key == "nonzero" and "non-zero" in known:
        return known["non-zero"]
    if key in SUMS:
        return tuple(sum(value for value in side if value is not None) for side in sides)
    if key == "sparsity":
        params, nonzero = _total(report, "params"), _total(report, "nonzero")
        return tuple(1 - n / p if p else None for p, n in zip(params, nonzero, strict=True))
    return None, None


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, tuple):
        return "x".join(map(str, value))
    return repr(value) if isinstance(value, float) else str(value)


def markdown_of(report: Report) -> str:
    """A table of the rows, and one of the layers."""
    lines = [f"# {_escaped(report.title)}", ""] if report.title else []
    lines += ["| | dense | pruned | ratio |", "|---|---:|---:|---:|"]
    for row in report.rows:
        ratio = "–" if row.ratio is None else f"{row.ratio:.3f}"
        cells = (_escaped(row.name), text_of(row.dense, row.unit), text_of(row.pruned, row.unit), ratio)
        lines.append(f"| {' | '.join(cells)} |")
    if report.layers:
        lines += ["", f"| {' | '.join(HEAD)} |", f"|{'|'.join(['---', '---', *['---:'] * 6, '---', '---'])}|"]
        lines += [f"| {' | '.join(map(_escaped, line_of(layer)))} |" for layer in report.layers]
    return "\n".join(lines) + "\n"


HEAD = ("layer", "kind", "shape", "parameters", "non-zero", "MACs", "sparsity", "latency share", "activation", "status")


def line_of(layer: Layer) -> tuple[str, ...]:
    """A layer's cells under `HEAD`."""
    return (
        layer.name or "(the model itself)",
        layer.kind,
        arrow(*(None if shape is None else "×".join(map(str, shape)) for shape in layer.shape)),
        arrow(*map(_count, layer.params)),
        arrow(*map(_count, layer.nonzero)),
        arrow(*map(_count, layer.macs)),
        arrow(*map(_share, layer.sparsity)),
        arrow(*map(_share, layer.latency_share)),
        arrow(*layer.activation),
        f"{layer.status}: {layer.reason}" if layer.status and layer.reason else layer.status or layer.reason,
    )


def arrow(before: str | None, after: str | None) -> str:
    """Before and after in one cell."""
    if before == after:
        return before or ""
    return f"{before or '–'} → {after or '–'}"


def _count(value: int | None) -> str | None:
    return None if value is None else f"{value:,}"


def _share(value: float | None) -> str | None:
    return None if value is None else f"{value:.3f}"


def _short(value: int | None) -> str | None:
    """Three digits and a letter."""
    if value is None:
        return None
    size: float = value
    for letter in ("", "k", "M", "G", "T"):
        if size < 999.5 or letter == "T":
            break
        size /= 1000
    return f"{size:.3g}{letter}"


def _escaped(text: str) -> str:
    for character in "\\`*_<>|[]":
        text = text.replace(character, f"\\{character}")
    return text.replace("\n", " ")


def rich_of(report: Report) -> Any:
    """Two rich tables.

    Raises:
        PruningError: rich is not installed.
    """
    try:
        from rich import box
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text
    except ImportError as error:
        raise PruningError('rich tables need rich: pip install "lightning-prune[cli]"') from error
    whole = Table(title=Text(report.title) if report.title else None, box=box.SIMPLE_HEAD)
    for number, name in enumerate(("", "dense", "pruned", "ratio")):
        whole.add_column(name, justify="right" if number else "left", no_wrap=True)
    for row in report.rows:
        ratio = "–" if row.ratio is None else f"{row.ratio:.3f}"
        whole.add_row(*map(Text, (row.name, text_of(row.dense, row.unit), text_of(row.pruned, row.unit), ratio)))
    if not report.layers:
        return whole
    layers = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for number, name in enumerate(("layer", "neurons", "params", "MACs", "zeros", "time", "can go")):
        layers.add_column(name, justify="right" if 1 <= number < 6 else "left", overflow="fold", no_wrap=0 < number < 6)
    for layer in report.layers:
        zeros, time = layer.sparsity[1], layer.latency_share[1]
        layers.add_row(
            Text(layer.name or "(the model itself)"),
            arrow(*(None if width is None else str(width) for width in layer.width)),
            arrow(*map(_short, layer.params)),
            arrow(*map(_short, layer.macs)),
            "" if zeros is None else f"{zeros:.2f}",
            "" if time is None else f"{time:.2f}",
            Text(layer.status or layer.reason),
        )
    return Group(whole, layers)
