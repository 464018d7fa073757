"""The HTML page in a real browser without a network: nothing overlaps, nothing is cut, nothing is asked for."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import torch
from browser import Browser, find_browser
from torch import nn

from lightning_prune import Plan, Report, Sensitivity, compare, prune_neurons, prune_weights, remove_layers
from lightning_prune.models import LeNet
from lightning_prune.report.figures import COLORS, CYCLE, draw_figures
from lightning_prune.report.page import DARK
from lightning_prune.report.report import Moment

NASTY = "<script>alert('x')</script>&\"quoted\""


def moments(count: int) -> tuple[Moment, ...]:
    """A timeline of a run that loses a little at each epoch, at a learning rate that falls by decades."""
    return tuple(
        Moment(
            e, 10 * e, 0.5 * e / count, 0.4 * e / count, 62006 - 100 * e, 651720 - 2000 * e, 0.5 + 0.01 * e, 10.0**-e
        )
        for e in range(1, count + 1)
    )


def curves(report: Report) -> Sensitivity:
    """The longer the name, the more it suffers."""
    keys = [f"{layer.name}#0" for layer in report.layers if layer.shape[0] and len(layer.shape[0]) > 1]
    values = {key: {q / 10: 0.9 - q / 10 * len(key) / 100 for q in range(1, 10)} for key in keys}
    return Sensitivity("a metric with a rather long name, as they come", 0.91, values)


def small() -> Report:
    dense, image = LeNet(), torch.rand(2, 3, 32, 32)
    pruned = copy.deepcopy(dense)
    plan = prune_neurons(pruned, image, 0.5)
    prune_weights(pruned, 0.4)
    report = compare(dense, pruned, image, plan=plan, title=NASTY, latency=False)
    return replace(report, timeline=moments(6), sensitivity=curves(report), metric=NASTY)


class Deep(nn.Module):
    """160 layers of long names, one of them of no decent name."""

    def __init__(self) -> None:
        super().__init__()
        names = [f"encoder_of_the_whole_model_block_{n:03}_attention_output_projection" for n in range(159)]
        for name in (*names, NASTY.replace(".", "_")):
            self.add_module(name, nn.Linear(6, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.children():
            x = torch.tanh(layer(x))
        return x


def deep() -> Report:
    dense = Deep()
    pruned = copy.deepcopy(dense)
    prune_weights(pruned, 0.7)
    report = compare(dense, pruned, torch.rand(1, 6), plan=Plan({}, {}), latency=False)
    return replace(report, timeline=moments(80), sensitivity=curves(report), metric="val_acc")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    binary = find_browser()
    if binary is None:
        pytest.skip("no chromium or chrome is installed")
    with Browser(binary) as found:
        yield found


@pytest.fixture(scope="module", params=[small, deep], ids=["4 layers", "160 layers"])
def page(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("page") / "report.html"
    request.param().save(path)
    return path


OVERLAPS = """[...document.querySelectorAll('svg')].flatMap(svg => {
  const frame = svg.getBoundingClientRect();
  const boxes = [...svg.querySelectorAll('text')].filter(t => t.textContent.trim())
    .map(t => [t.textContent.trim(), t.getBoundingClientRect()]);
  const cut = boxes.filter(([_, b]) => b.left < frame.left - 1 || b.right > frame.right + 1 ||
    b.top < frame.top - 1 || b.bottom > frame.bottom + 1).map(([t, _]) => 'cut: ' + t);
  const shared = [];
  boxes.forEach(([t, a], i) => boxes.slice(i + 1).forEach(([u, b]) => {
    const w = Math.min(a.right, b.right) - Math.max(a.left, b.left);
    const h = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
    if (w > 1 && h > 3) shared.push(t + ' / ' + u);
  }));
  return cut.concat(shared);
})"""

STUCK = """[...document.querySelectorAll('*')].filter(e => e.scrollWidth > e.clientWidth + 1 &&
  ['auto', 'scroll'].includes(getComputedStyle(e).overflowX) && e.tabIndex !== 0).map(e => e.outerHTML.slice(0, 80))"""


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_the_page_opens_whole_without_a_network(browser: Browser, page: Path, width: int, dark: bool) -> None:
    browser.open(page, width=width, dark=dark)
    assert browser.errors == []
    assert browser.run("document.documentElement.scrollWidth") <= width
    assert browser.run("document.querySelectorAll('svg').length") == 4
    assert browser.run(OVERLAPS) == []
    assert browser.run(STUCK) == [], "what scrolls can be reached with the keyboard"
    assert browser.run("document.querySelectorAll('script').length") == 0
    background = browser.run("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background))) < 200) == dark
    drawn = browser.run("getComputedStyle(document.querySelector('svg text')).fill")
    ink = (DARK if dark else COLORS)["ink"]
    assert [int(value) for value in re.findall(r"\d+", drawn)] == [int(ink[i : i + 2], 16) for i in (1, 3, 5)]


def test_the_checks_of_the_page_can_fail(browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "bad.html"
    path.write_text(
        "<div style='width:2000px'>x</div><div style='overflow:auto;width:9px'>wiiiiiiiiiiiiiiide</div>"
        "<svg width=100 height=40><text x=5 y=20>one</text><text x=9 y=20>two</text><text x=80 y=20>cutoff</text></svg>"
        "<img src='http://example.invalid/x.png'><script>console.error('said')</script>"
    )
    browser.open(path)
    assert any("said" in error for error in browser.errors)
    assert any("example.invalid" in error for error in browser.errors)
    assert browser.run("document.documentElement.scrollWidth") > 1280
    found = browser.run(OVERLAPS)
    assert "one / two" in found
    assert any(each.startswith("cut: cutoff") for each in found)
    assert len(browser.run(STUCK)) == 1


def test_ids_in_the_page_are_unique_and_names_are_text(page: Path) -> None:
    text = page.read_text()
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert not re.search(r"(src|href)=\"(?!#|data:)", text)


@pytest.mark.parametrize("palette", [COLORS, DARK], ids=["light", "dark"])
def test_curves_are_told_apart_without_red_and_green(palette: dict[str, str]) -> None:
    """Colours that follow each other, as a deuteranope sees them (Machado et al., 2009), differ in CIE L*a*b*."""
    simulated = torch.tensor(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    )
    to_xyz = torch.tensor([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])

    def lab(color: str) -> torch.Tensor:
        value = torch.tensor([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        linear = torch.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
        xyz = to_xyz @ (simulated @ linear).clamp(0, 1) / torch.tensor([0.9505, 1.0, 1.089])
        f = torch.where(xyz > 0.008856, xyz ** (1 / 3), 7.787 * xyz + 16 / 116)
        return torch.stack([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])

    for number, one in enumerate(CYCLE):
        for other in CYCLE[:number]:
            assert float((lab(palette[one]) - lab(palette[other])).norm()) > 20, (one, other)


@pytest.mark.parametrize("palette", [(COLORS, "#ffffff"), (DARK, "#14171a")], ids=["light", "dark"])
def test_text_and_lines_stand_out(palette: tuple[dict[str, str], str]) -> None:
    """WCAG: 4.5 to 1 for text, 3 to 1 for lines and bars."""

    def luminance(color: str) -> float:
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    colors, page = palette
    for name, least in (("ink", 4.5), ("muted", 4.5), ("pruned", 3), ("second", 3), ("third", 3)):
        one, other = sorted((luminance(colors[name]), luminance(page)), reverse=True)
        assert (one + 0.05) / (other + 0.05) >= least, name


def caption(report: Report, plot: str) -> str:
    found = re.search(
        rf'<section aria-labelledby="{plot}">.*?<figcaption>(.*?)</figcaption>', report.to_html(), re.DOTALL
    )
    assert found is not None
    return unescape(found[1])


def test_a_caption_promises_what_is_drawn() -> None:
    report = small()
    whole = replace(report, metric="val_acc")
    assert caption(whole, "timeline").endswith("Below: the metric and the learning rate.")
    without = replace(whole, timeline=tuple(replace(m, metric=None) for m in report.timeline))
    assert caption(without, "timeline").endswith("Below: the learning rate. Nothing was logged as val_acc.")
    neither = replace(without, metric="", timeline=tuple(replace(m, lr=None, macs=None) for m in without.timeline))
    assert caption(neither, "timeline") == (
        "Parameters as fractions of the dense model's, and the fraction of all parameters that is zero."
    )
    assert "the line is the magnitude" in caption(report, "weights")
    unchosen = replace(report, weights=tuple(replace(each, threshold=None) for each in report.weights))
    assert "line" not in caption(unchosen, "weights")


def test_a_removed_layer_has_no_numbers_in_plot_and_table() -> None:
    dense = LeNet(hidden=(120, 84, 84))
    pruned = copy.deepcopy(dense)
    plan = remove_layers(pruned, torch.rand(2, 3, 32, 32), 0.05)
    assert isinstance(pruned.fc3, nn.Identity)
    report = compare(dense, pruned, torch.rand(2, 3, 32, 32), plan=plan, latency=False)
    texts = [text.get_text() for axes in draw_figures(report)["layers"].axes for text in axes.texts]
    rows = [layer.name for layer in report.layers if len(layer.shape[0] or ()) > 1]
    shown = dict(zip(rows, zip(texts[: len(rows)], texts[len(rows) :], strict=True), strict=True))
    assert shown["fc3"] == ("– of 84", "–")
    assert shown["fc2"] == ("84 of 84", "0.00")
    assert "0.000 → –" in report.to_markdown()
    assert "–: the layer was removed." in caption(report, "layers")


@pytest.mark.parametrize("curves_of", [3, 30], ids=["curves", "rows of colours"])
def test_long_names_are_whole_in_a_picture_of_dots(curves_of: int) -> None:
    """Loggers get one: its letters stand on whole pixels, so that text is longer than its outline."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    names = [" + ".join(f"transformer.h.{n}.mlp.c_proj" for n in range(8)) + f".{curve}" for curve in range(curves_of)]
    found = Sensitivity("agreement", 1.0, {name: {0.3: 0.9, 0.7: 0.5} for name in names})
    figure = draw_figures(Report((), sensitivity=found))["sensitivity"]
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    width, _ = canvas.get_width_height()
    legends = [legend for axes in figure.axes if (legend := axes.get_legend()) is not None]
    texts = [text for legend in legends for text in legend.get_texts()]
    texts += [label for axes in figure.axes for label in axes.get_yticklabels()]
    boxes = [text.get_window_extent(canvas.get_renderer()) for text in texts if text.get_text()]
    assert len(boxes) > curves_of
    assert all(box.x0 >= 0 and box.x1 <= width for box in boxes)
