"""A report as one HTML page that needs nothing else: styles and plots are inside, there is no script."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable
from html import escape
from typing import Any

from lightning_prune.report.figures import COLORS, draw_figures
from lightning_prune.report.render import HEAD, line_of
from lightning_prune.report.report import Layer, Report, text_of

__all__ = ["page_of"]

DARK = {
    "ink": "#e8ebee",
    "muted": "#9aa4ae",
    "grid": "#343a41",
    "dense": "#66707a",
    "pruned": "#4aa8e0",
    "second": "#f08a3c",
    "third": "#2fbf95",
}
"""What the plots' colours become where the reader prefers dark."""

FIGURES = {
    "layers": "Width and sparsity",
    "timeline": "Timeline",
    "sensitivity": "Sensitivity",
    "weights": "Weights",
}
"""The plots' headings, in the order of the page."""

STYLE = """
:root { color-scheme: light dark; --page: #ffffff; --card: #f6f7f9; --link: #00558a; LIGHT }
@media (prefers-color-scheme: dark) { :root { --page: #14171a; --card: #1d2125; --link: #7cc0ee; DARK } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
.skip { position: absolute; left: -999em; }
.skip:focus { left: 1rem; top: 1rem; padding: .5rem 1rem; background: var(--card); }
header, main, footer { max-width: 84rem; margin: 0 auto; padding: 0 1.25rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 2rem 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .25rem; }
p { margin: .25rem 0 .75rem; max-width: 46rem; }
.lead, .note, footer { color: var(--muted); }
nav ul { list-style: none; display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; margin: .75rem 0 0; padding: 0; }
a { color: var(--link); }
:focus-visible { outline: 2px solid var(--link); outline-offset: 2px; }
.scroll { overflow: auto; max-width: 100%; border: 1px solid var(--grid); border-radius: 6px; }
.tall { max-height: 36rem; }
.tall table { font-size: .78rem; }
.tall th, .tall td { padding: .25rem .5rem; }
table { border-collapse: separate; border-spacing: 0; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .75rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--grid); }
tbody tr:last-child > * { border-bottom: 0; }
thead th { position: sticky; top: 0; z-index: 1; background: var(--card); font-weight: 600; }
tbody th { font-weight: 400; background: var(--page); }
th:first-child, td.text, th.text { text-align: left; }
@media (min-width: 48rem) { th:first-child { position: sticky; left: 0; } thead th:first-child { z-index: 2; } }
td.why { white-space: normal; min-width: 9rem; }
.bar { display: inline-block; vertical-align: middle; width: 8rem; height: .7rem; background: var(--dense);
  border-radius: 2px; overflow: hidden; }
.bar i { display: block; height: 100%; background: var(--pruned); }
figure { margin: .5rem 0 0; }
figure svg { display: block; max-width: none; }
figcaption { margin-bottom: .5rem; max-width: 46rem; color: var(--muted); }
footer { padding-top: 2rem; padding-bottom: 3rem; font-size: .9rem; }
@media (max-width: 40rem) { th, td { padding: .3rem .5rem; } header, main, footer { padding: 0 .75rem; } }
@media print { .scroll { overflow: visible; max-height: none; } }
"""


def page_of(report: Report) -> str:
    """The whole page.

    Raises:
        PruningError: matplotlib is not installed.
    """
    plots = {name: _svg(figure, name) for name, figure in draw_figures(report).items()}
    title = f"{report.title}: pruning report" if report.title else "Pruning report"
    sections = [("summary", "Summary", _summary(report))]
    if report.layers:
        sections.append(("table", "Layers", _layers(report.layers)))
    for name in FIGURES:
        if name in plots:
            sections.append((name, FIGURES[name], _figure(name, plots[name], report)))
    links = "".join(f'<li><a href="#{anchor}">{escape(heading)}</a></li>' for anchor, heading, _ in sections)
    body = "\n".join(
        f'<section aria-labelledby="{anchor}"><h2 id="{anchor}">{escape(heading)}</h2>\n{content}\n</section>'
        for anchor, heading, content in sections
    )
    style = STYLE.replace("LIGHT", _variables(COLORS)).replace("DARK", _variables(DARK))
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{style}</style>
</head>
<body>
<a class="skip" href="#summary">Skip to the summary</a>
<header><h1>{escape(title)}</h1>
<p class="lead">{escape(_lead(report))}</p>
<nav aria-label="Sections"><ul>{links}</ul></nav></header>
<main>
{body}
</main>
<footer>Made by lightning_prune. This page needs no network.</footer>
</body>
</html>
"""


def _variables(colors: dict[str, str]) -> str:
    return " ".join(f"--{name}: {color};" for name, color in colors.items())


def _lead(report: Report) -> str:
    """The ratios in one line."""
    names = {"parameters": "parameters", "non-zero": "non-zero parameters", "file size": "file size"}
    told = []
    for row in report.rows:
        name = names.get(row.name, row.name if row.name.startswith(("MACs", "latency")) else None)
        if name is not None and row.ratio is not None:
            told.append(f"{name} {row.ratio:.2f}")
    return f"Of the dense model there are left: {', '.join(told)}." if told else ""


def _summary(report: Report) -> str:
    lines = []
    for row in report.rows:
        ratio = "–" if row.ratio is None else f"{row.ratio:.3f}"
        bar = "" if row.ratio is None else _bar(row.ratio)
        cells = (text_of(row.dense, row.unit), text_of(row.pruned, row.unit), ratio)
        numbers = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        lines.append(f'<tr><th scope="row">{escape(row.name)}</th>{numbers}<td class="text">{bar}</td></tr>')
    head = "".join(f'<th scope="col">{name}</th>' for name in ("quantity", "dense", "pruned", "ratio", ""))
    return _scrolling("Summary", f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>")


def _bar(part: float) -> str:
    return f'<span class="bar" aria-hidden="true"><i style="width:{100 * min(max(part, 0.0), 1.0):.1f}%"></i></span>'


TEXTS = (0, 1, 8, 9)
"""Columns of `HEAD` that hold no numbers."""


def _layers(layers: Iterable[Layer]) -> str:
    head = "".join(
        f'<th scope="col"{" class=text" * (number in TEXTS)}>{escape(name)}</th>' for number, name in enumerate(HEAD)
    )
    lines = []
    for layer in layers:
        first, *others = line_of(layer)
        classes = {1: ' class="text"', 8: ' class="text"', 9: ' class="text why"'}
        cells = "".join(f"<td{classes.get(n, '')}>{escape(cell)}</td>" for n, cell in enumerate(others, start=1))
        lines.append(f'<tr><th scope="row">{escape(first)}</th>{cells}</tr>')
    note = (
        '<p class="note">Before → after where they differ. MACs and latency shares are those of a layer alone, layers '
        "inside it aside. Exact: removing neurons that the layer makes equals masking them.</p>"
    )
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    return note + _scrolling("Layers", table, "tall")


def _figure(name: str, svg: str, report: Report) -> str:
    caption = escape(_caption(name, report))
    return f"<figure><figcaption>{caption}</figcaption>{_scrolling(FIGURES[name], svg)}</figure>"


def _caption(name: str, report: Report) -> str:
    """What a plot shows; of what it has no data for it promises nothing."""
    if name == "layers":
        gone = any(layer.width[0] is not None and layer.width[1] is None for layer in report.layers)
        return (
            "Each row is a layer that holds a weight. Left: the neurons (channels, features) that it still makes, as a "
            "fraction of those it made. Right: the fraction of its parameters that is zero."
            + (" –: the layer was removed." if gone else "")
        )
    if name == "timeline":
        macs = any(moment.macs is not None for moment in report.timeline)
        measured = any(moment.metric is not None for moment in report.timeline)
        rates = any(moment.lr is not None for moment in report.timeline)
        below = [text for text, shown in (("the metric", measured), ("the learning rate", rates)) if shown]
        counted = "arameters and MACs" if macs else "arameters"
        return (
            f"{'Top: p' if below else 'P'}{counted} as fractions of the dense model's, and the fraction of all "
            "parameters that is zero."
            + (f" Below: {' and '.join(below)}." if below else "")
            + ("" if measured or not report.metric else f" Nothing was logged as {report.metric}.")
        )
    if name == "sensitivity":
        return (
            "The metric when a part of one group of neurons is masked, one group at a time. A group whose values stay "
            "flat can lose much."
        )
    return "How the magnitudes of each layer's weights are distributed, each row to its own height." + (
        " Where weights were chosen by magnitude, the line is the magnitude below which they were set to zero; those "
        "that stayed may have moved since."
        if any(each.threshold for each in report.weights)
        else ""
    )


def _scrolling(label: str, content: str, kind: str = "") -> str:
    """A box that scrolls by itself, with the keyboard too."""
    classes = f"scroll {kind}".strip()
    return f'<div class="{classes}" role="region" tabindex="0" aria-label="{escape(label)}">{content}</div>'


def _svg(figure: Any, name: str) -> str:
    """A figure as inline SVG: its text stays text, its colours follow the page's, its ids are its own."""
    import matplotlib

    file = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(href="|url\()#', rf"\1#{name}-", text)
    for color, value in COLORS.items():
        text = re.sub(value, f"var(--{color})", text, flags=re.IGNORECASE)
    label = escape(FIGURES[name])
    return text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
