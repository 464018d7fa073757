"""A report's plots, as matplotlib figures whose colours a page can exchange; every row keeps its whole label."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from math import log10
from typing import Any

from lightning_prune.errors import PruningError
from lightning_prune.pruning.sensitivity import Sensitivity
from lightning_prune.report.report import Histogram, Layer, Moment, Report

__all__ = ["COLORS", "check_plots", "draw_figures"]

COLORS = {
    "ink": "#1c2024",
    "muted": "#5c646d",
    "grid": "#dde1e6",
    "dense": "#a9b1ba",
    "pruned": "#0072b2",
    "second": "#c44e00",
    "third": "#00805d",
}
"""What things are drawn in; told apart with any colour vision, and by shape where two share a plot."""
CYCLE = ("pruned", "second", "third", "ink")
STYLES = ("-", "--", ":")
MARKERS = "osv^DPX*<>"

FONT = 9
ROW = 0.21
"""Height of one row, in inches."""
PANEL = 2.9
"""Width of one panel beside the rows' labels, in inches."""
MOST_CURVES = 10
"""More than so many curves in one plot can't be told apart; they become the rows of a table of colours."""


def check_plots() -> Any:
    """The package that draws.

    Raises:
        PruningError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise PruningError('a plot needs matplotlib: pip install "lightning-prune[plots]"') from error
    return matplotlib


def draw_figures(report: Report) -> dict[str, Any]:
    """Every plot that the report has data for.

    Returns:
        Matplotlib figures: ``"layers"`` (width and sparsity), ``"timeline"``, ``"sensitivity"``, ``"weights"``.

    Raises:
        PruningError: matplotlib is not installed.
    """
    matplotlib = check_plots()
    style: dict[Any, Any] = {
        "font.size": FONT,
        "axes.titlesize": FONT,
        "axes.labelsize": FONT,
        "axes.edgecolor": COLORS["muted"],
        "axes.labelcolor": COLORS["ink"],
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "axes.formatter.useoffset": False,
        "grid.color": COLORS["grid"],
        "grid.linewidth": 0.6,
        "text.color": COLORS["ink"],
        "xtick.color": COLORS["muted"],
        "ytick.color": COLORS["muted"],
        "xtick.labelcolor": COLORS["ink"],
        "ytick.labelcolor": COLORS["ink"],
        "legend.frameon": False,
        "text.parse_math": False,
        "font.family": "DejaVu Sans",
    }
    layers = [layer for layer in report.layers if layer.width[0] is not None and len(layer.shape[0] or ()) > 1]
    with matplotlib.rc_context(style):
        figures = {}
        if layers:
            figures["layers"] = _layers(layers)
        if report.timeline:
            figures["timeline"] = _timeline(report)
        if report.sensitivity is not None and report.sensitivity.values:
            figures["sensitivity"] = _sensitivity(report.sensitivity)
        weights = [each for each in report.weights if any(each.pruned) or any(each.dense)]
        if weights:
            figures["weights"] = _weights(weights)
    return figures


# -- rows --------------------------------------------------------------------------------------------------------------


def _text_width(texts: Sequence[str]) -> float:
    """Of the longest, in inches."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextPath

    font = FontProperties(family="DejaVu Sans", size=FONT)
    widths = [TextPath((0, 0), text, prop=font, usetex=False).get_extents().width for text in texts if text.strip()]
    return 1.03 * max(widths, default=0.0) / 72  # where letters are placed on whole pixels, text gets longer


def _rows(labels: Sequence[str], panels: int, *, right: Sequence[float], legend: int = 0) -> tuple[Any, list[Any]]:
    """A figure with a row for each label, from the top, and panels beside them that share the rows.

    Args:
        labels: Of the rows.
        panels: How many panels.
        right: Room to the right of each panel, in inches.
        legend: Lines of a legend above the panels.
    """
    from matplotlib.figure import Figure

    left, top, bottom = _text_width(labels) + 0.3, 0.35 + 0.2 * legend, 0.55
    body = ROW * len(labels)
    width, height = left + panels * PANEL + sum(right), top + body + bottom
    figure = Figure(figsize=(width, height))
    found: list[Any] = []
    start = left
    for number in range(panels):
        axes = figure.add_axes((start / width, bottom / height, PANEL / width, body / height))
        axes.set_ylim(len(labels) - 0.5, -0.5)
        axes.set_yticks(range(len(labels)), labels if not number else [""] * len(labels))
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x")
        found.append(axes)
        start += PANEL + right[number]
    return figure, found


def _legend(axes: Any, handles: Sequence[Any], *, columns: int) -> None:
    """Above the axes, where it can hide nothing."""
    axes.legend(
        handles=handles, loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, borderaxespad=0.2, handlelength=1.4
    )


def _name(layer: str) -> str:
    return layer or "(the model itself)"


def _layers(layers: Sequence[Layer]) -> Any:
    """How many of each layer's neurons are left, and which part of its parameters is zero."""
    from matplotlib.patches import Patch

    labels = [_name(layer.name) for layer in layers]
    widths = [f"{_count(layer.width[1])} of {_count(layer.width[0])}" for layer in layers]
    room = _text_width(widths) + 0.35
    figure, (left, right) = _rows(labels, 2, right=[room, 0.55], legend=1)
    rows = range(len(layers))
    kept = [(layer.width[1] or 0) / layer.width[0] if layer.width[0] else 0.0 for layer in layers]
    left.barh(rows, [1.0] * len(layers), height=0.7, color=COLORS["dense"])
    left.barh(rows, kept, height=0.7, color=COLORS["pruned"])
    told = [layer.sparsity[1] for layer in layers]
    zeros = [value or 0.0 for value in told]
    right.barh(rows, zeros, height=0.7, color=COLORS["pruned"])
    for row in rows:
        left.text(1.03, row, widths[row], va="center")
        right.text(zeros[row] + 0.02, row, "–" if told[row] is None else f"{told[row]:.2f}", va="center")
    for axes, label in ((left, "neurons left (fraction of the layer's)"), (right, "zeros (fraction of parameters)")):
        axes.set_xlim(0, 1)
        axes.set_xlabel(label)
    _legend(left, [Patch(color=COLORS["dense"], label="dense"), Patch(color=COLORS["pruned"], label="now")], columns=2)
    return figure


def _count(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"


# -- over time ---------------------------------------------------------------------------------------------------------


def _timeline(report: Report) -> Any:
    """What was left, the metric and the learning rate, over epochs; each pruning is a line through all."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    moments = report.timeline
    measured = [(m.epoch, m.metric) for m in moments if m.metric is not None]
    rates = [(m.epoch, m.lr) for m in moments if m.lr is not None]
    parts: list[tuple[str, Callable[[Any], None]]] = [
        ("what is left, and what is zero (fraction)", lambda axes: _fractions(axes, report))
    ]
    if measured:
        parts.append((report.metric or "metric", lambda axes: _curve(axes, measured, "second", "s")))
    if rates:
        parts.append(("learning rate (first group)", lambda axes: _rates(axes, rates)))
    heights, left, right = 1.6, 0.85, 0.25
    width = max(7.8, left + _text_width([report.metric]) + 0.3)
    top, gap, bottom = 0.68, 0.42, 0.55
    height = top + bottom + heights * len(parts) + gap * (len(parts) - 1)
    figure = Figure(figsize=(width, height))
    prunings = [
        after.epoch for before, after in pairwise((Moment(0, 0, 0, 0, 0), *moments)) if after.amount > before.amount
    ]
    first: Any = None
    for number, (title, draw) in enumerate(parts):
        at = height - top - heights * (number + 1) - gap * number
        box = (left / width, at / height, (width - left - right) / width, heights / height)
        axes: Any = figure.add_axes(box, sharex=first)
        first = axes if first is None else first
        draw(axes)
        for epoch in prunings:
            axes.axvline(epoch, color=COLORS["muted"], lw=0.6, ls=(0, (2, 2)), zorder=0)
        axes.grid(axis="y")
        axes.set_title(title, loc="left", pad=21 if not number else 6)
        axes.tick_params(labelbottom=number == len(parts) - 1)
    axes.set_xlabel("epoch")
    axes.set_xlim(0, max(m.epoch for m in moments) * 1.02)
    handles = [
        *first.get_legend_handles_labels()[0],
        *([Line2D([], [], color=COLORS["muted"], lw=0.8, ls=(0, (2, 2)), label="a pruning")] if prunings else []),
    ]
    _legend(first, handles, columns=4)
    return figure


def _rates(axes: Any, rates: Sequence[tuple[float, float]]) -> None:
    _curve(axes, rates, "third", "v")
    low, high = min(rate for _, rate in rates), max(rate for _, rate in rates)
    if low > 0 and high > 30 * low:
        axes.set_yscale("log")
        axes.minorticks_off()
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")


def _fractions(axes: Any, report: Report) -> None:
    rows = {row.name: row.dense for row in report.rows}
    dense = {
        "parameters": rows.get("parameters") or max(m.params for m in report.timeline),
        "MACs": next((v for name, v in rows.items() if name == "MACs (batch 1)" and v), None)
        or max((m.macs for m in report.timeline if m.macs), default=None),
    }
    series: list[tuple[str, list[tuple[float, float]], str, str]] = [
        ("parameters", [(m.epoch, m.params / (dense["parameters"] or 1)) for m in report.timeline], "pruned", "o"),
        ("zeros", [(m.epoch, m.sparsity) for m in report.timeline], "second", "s"),
    ]
    if dense["MACs"]:
        macs = [(m.epoch, m.macs / dense["MACs"]) for m in report.timeline if m.macs is not None]
        series.insert(1, ("MACs", macs, "third", "v"))
    for name, points, color, marker in series:
        begin = [] if rows.get("parameters") is None else [(0.0, 0.0 if name == "zeros" else 1.0)]
        _curve(axes, [*begin, *points], color, marker, name, drawstyle="steps-post")
    axes.set_ylim(0, 1.05)


def _curve(
    axes: Any,
    points: Sequence[tuple[float, float]],
    color: str,
    marker: str,
    label: str | None = None,
    drawstyle: str = "default",
) -> None:
    x, y = zip(*points, strict=True) if points else ((), ())
    few = len(points) <= 60
    shown = marker if few else None
    axes.plot(x, y, color=COLORS[color], marker=shown, ms=3.5, lw=1.3, label=label, drawstyle=drawstyle, clip_on=False)


# -- sensitivity -------------------------------------------------------------------------------------------------------


def _sensitivity(found: Sensitivity) -> Any:
    """The metric over the part of each group that is masked: curves, or rows of colours where there are many."""
    keys = [key.partition("#")[0] if key.endswith("#0") else key for key in found.values]
    return _curves(found, keys) if len(keys) <= MOST_CURVES else _colors(found, keys)


def _curves(found: Sensitivity, labels: Sequence[str]) -> Any:
    from matplotlib.figure import Figure

    left, plot, bottom, top = 0.8, 4.6, 0.55, 0.35
    legend = _text_width([*labels, "nothing masked"]) + 0.7
    width, height = (
        left + max(plot + legend, _text_width([found.metric]) + 0.3),
        max(3.0, 0.2 * (len(labels) + 1) + 1) + bottom + top,
    )
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((left / width, bottom / height, plot / width, 1 - (bottom + top) / height))
    for number, (label, row) in enumerate(zip(labels, found.values.values(), strict=True)):
        ratios = sorted(row)
        axes.plot(
            ratios,
            [row[ratio] for ratio in ratios],
            color=COLORS[CYCLE[number % len(CYCLE)]],
            ls=STYLES[number // len(CYCLE) % len(STYLES)],
            marker=MARKERS[number % len(MARKERS)],
            ms=4,
            lw=1.3,
            label=label,
            clip_on=False,
        )
    axes.axhline(found.base, color=COLORS["dense"], lw=1.5, zorder=1, label="nothing masked")
    axes.set_xlabel("fraction of the group's neurons masked")
    axes.set_title(found.metric, loc="left")
    axes.set_xlim(0, 1)
    axes.grid()
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0)
    return figure


def _colors(found: Sensitivity, labels: Sequence[str]) -> Any:
    import numpy as np

    ratios = sorted({ratio for row in found.values.values() for ratio in row})
    values = np.array([[row.get(ratio, np.nan) for ratio in ratios] for row in found.values.values()])
    title = f"{found.metric} (nothing masked: {found.base:.4g})"
    figure, (axes,) = _rows(labels, 1, right=[max(1.3, _text_width([title]) - PANEL + 0.3)])
    axes.grid(visible=False)
    image = axes.pcolormesh(
        np.arange(len(ratios) + 1), np.arange(len(labels) + 1) - 0.5, values, cmap="cividis", edgecolors="none"
    )
    axes.set_xticks(np.arange(len(ratios)) + 0.5, [f"{ratio:g}" for ratio in ratios])
    axes.set_xlabel("fraction of the group's neurons masked")
    axes.set_title(title, loc="left")
    box = axes.get_position()
    width, height = figure.get_size_inches()
    tall = min(box.height, 2.5 / height)
    bar = figure.add_axes((box.x1 + 0.15 / width, box.y1 - tall, 0.14 / width, tall))
    figure.colorbar(image, cax=bar)
    return figure


# -- weights -----------------------------------------------------------------------------------------------------------


def _weights(weights: Sequence[Histogram]) -> Any:
    """A row of each layer's magnitudes, before and now, each row to its own height."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    names = [each.name.removesuffix(".weight") for each in weights]
    counts = [f"{sum(each.pruned):,}" for each in weights]
    figure, (axes,) = _rows(names, 1, right=[_text_width(counts) + 0.3], legend=1)
    low, high = float("inf"), float("-inf")
    for row, each in enumerate(weights):
        tops = max((*each.dense, *each.pruned), default=0)
        for bins, filled in ((each.dense, False), (each.pruned, True)):
            used = [place for place, count in enumerate(bins) if count]
            if not used:
                continue
            first, last = used[0], used[-1] + 1
            edges = [each.low + each.width * place for place in range(first, last + 1)]
            low, high = min(low, edges[0]), max(high, edges[-1])
            x = [edge for edge in edges for _ in (0, 1)]
            y = [0.4, *(0.4 - 0.8 * count / tops for count in bins[first:last] for _ in (0, 1)), 0.4]
            y = [row + each_y for each_y in y]
            if filled:
                axes.fill_between(x, y, row + 0.4, color=COLORS["pruned"], alpha=0.75, lw=0)
            else:
                axes.fill_between(x, y, row + 0.4, color=COLORS["dense"], alpha=0.9, lw=0)
        if each.threshold:
            at = log10(each.threshold)
            axes.plot([at, at], [row - 0.45, row + 0.45], color=COLORS["second"], lw=1.3)
    low, high = max(low, high - 5), high  # a few tiny ones are no reason to squeeze all others
    axes.set_xlim(low, high)
    for row, count in enumerate(counts):
        axes.text(1.02, row, count, va="center", transform=axes.get_yaxis_transform())
    ticks = [tick for tick in range(-9, 4) if low <= tick <= high]
    axes.set_xticks(ticks, [f"{10.0**tick:g}" for tick in ticks])
    axes.set_xlabel("magnitude (right: weights that are not zero)")
    handles: list[Any] = [Patch(color=COLORS["pruned"], alpha=0.75, label="now")]
    if any(each.dense for each in weights):
        handles.insert(0, Patch(color=COLORS["dense"], label="dense"))
    if any(each.threshold for each in weights):
        handles.append(Line2D([], [], color=COLORS["second"], lw=1.3, label="threshold"))
    _legend(axes, handles, columns=3)
    return figure
