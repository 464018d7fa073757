"""Two models side by side, layer by layer; what is written is whole, what doesn't fit is said."""

from __future__ import annotations

import copy
import csv
import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import CASES, build_case, cases
from rich.console import Console
from torch import nn

from lightning_prune import (
    ActivationSearch,
    KernelShrinking,
    LayerPruning,
    NeuronPruning,
    Plan,
    PruningError,
    Report,
    Sensitivity,
    TraceError,
    WeightPruning,
    compare,
    count_cost,
    find_groups,
    prune_neurons,
    prune_weights,
    remove_layers,
    sensitivity,
    shrink_kernels,
)
from lightning_prune.graph.run import as_calls
from lightning_prune.models import LeNet
from lightning_prune.pruning import progress
from lightning_prune.pruning.latency import layer_times
from lightning_prune.pruning.progress import progress_bar
from lightning_prune.report.layers import statuses
from lightning_prune.report.report import Moment, Row
from lightning_prune.report.run import measurable

IMAGE = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(layer_times.__kwdefaults__, "seconds", 0.0)


def pruned_pair() -> tuple[LeNet, LeNet, Any]:
    dense = LeNet()
    pruned = copy.deepcopy(dense)
    plan = prune_neurons(pruned, IMAGE, 0.5)
    prune_weights(pruned, 0.5)
    return dense, pruned, plan


def full() -> Report:
    dense, pruned, plan = pruned_pair()
    report = compare(dense, pruned, IMAGE, plan=plan, title="a | b", latency=False)
    timeline = (Moment(1, 5, 0.2, 0.1, 100, None, 0.5, 0.1), Moment(2, 10, 0.5, 0.1, 90, 7))
    curves = Sensitivity("accuracy", 0.9, {"conv1#0": {0.1: 0.8, 0.5: 0.3}})
    return replace(report, timeline=timeline, sensitivity=curves, metric="val_acc")


def test_layers_say_what_each_was_and_is() -> None:
    dense, pruned, plan = pruned_pair()
    report = compare(dense, pruned, IMAGE, plan=plan, latency=False)
    layers = {layer.name: layer for layer in report.layers}
    width = pruned.conv1.out_channels
    conv = layers["conv1"]
    assert (conv.kind, conv.shape, conv.width) == ("Conv2d", ((6, 3, 5, 5), (width, 3, 5, 5)), (6, width))
    assert conv.params == (456, width * 76)
    assert conv.nonzero[1] == sum(int(p.count_nonzero()) for p in pruned.conv1.parameters())
    assert conv.macs == (28 * 28 * 6 * 75, 28 * 28 * width * 75)
    assert conv.sparsity[1] == 1 - conv.nonzero[1] / conv.params[1]
    assert (conv.status, layers["fc3"].status) == ("exact", "frozen")
    assert layers["fc3"].reason == "reaches the model's output"
    assert layers["act1"].activation == ("relu", "relu")


@pytest.mark.parametrize("with_plan", [True, False])
def test_the_plan_and_a_trace_say_the_same(with_plan: bool) -> None:
    dense, pruned, plan = pruned_pair()
    report = compare(dense, pruned, IMAGE, plan=plan if with_plan else None, latency=False)
    told = {layer.name: layer.status for layer in report.layers if layer.width[0]}
    assert told == {"conv1": "exact", "conv2": "exact", "fc1": "exact", "fc2": "exact", "fc3": "frozen"}


def test_approximate_layers_say_why() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3))
    pruned, x = copy.deepcopy(model), torch.rand(2, 6)
    plan = prune_neurons(pruned, x, 0.5)
    for given in (plan, None):
        layer = compare(model, pruned, x, plan=given, latency=False).layers[0]
        assert layer.status == "approximate"
        assert "norm" in layer.reason


@cases([name for name in CASES if not name.startswith("tied")])
def test_columns_add_up(name: str) -> None:
    model, x = build_case(name)
    cost = count_cost(model, x)
    layers = compare(model, copy.deepcopy(model), x, latency=False).layers
    assert sum(layer.params[0] for layer in layers) == cost.params
    assert sum(layer.macs[1] for layer in layers) == cost.macs


def test_shares_of_the_time_add_up_and_the_slow_layer_has_most() -> None:
    model = nn.Sequential(nn.Linear(4, 900), nn.ReLU(), nn.Linear(900, 900), nn.Linear(900, 2))
    report = compare(model, copy.deepcopy(model), torch.rand(64, 4))
    for side in (0, 1):
        shares = [layer.latency_share[side] for layer in report.layers]
        assert sum(shares) == pytest.approx(1)
        assert shares[2] == max(shares)


def test_a_removed_layer_counts_nothing_and_says_so() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = x + block(x)
            return x

    dense, x = Residual(), torch.rand(2, 6)
    pruned = copy.deepcopy(dense)
    plan = remove_layers(pruned, x, 0.25)
    (path,) = [path for path in plan.removed if path.count(".") == 1]
    layer = {each.name: each for each in compare(dense, pruned, x, plan=plan, latency=False).layers}[f"{path}.0"]
    assert (layer.params, layer.macs, layer.shape[1]) == ((42, 0), (72, 0), None)
    assert layer.reason.startswith("removed")
    assert layer.activation[1] is None, "what passes its input on is no activation that was chosen"


def test_the_threshold_parts_what_went_from_what_stayed() -> None:
    dense, pruned = LeNet(), LeNet()
    pruned.load_state_dict(dense.state_dict())
    masks = prune_weights(pruned, 0.6)
    report = compare(dense, pruned, IMAGE, latency=False)
    for each in report.weights:
        gone = dense.get_parameter(each.name).detach()[~masks[each.name]].abs()
        assert each.threshold == pytest.approx(float(gone.max()))
        assert sum(each.dense) == masks[each.name].numel()
        assert sum(each.pruned) == int(masks[each.name].sum())
    pruned.load_state_dict(dense.state_dict())
    prune_weights(pruned, 0.6, criterion="random")
    assert all(each.threshold is None for each in compare(dense, pruned, IMAGE, latency=False).weights)


# -- how it is written -------------------------------------------------------------------------------------------------


def test_a_report_goes_to_json_and_back() -> None:
    report = full()
    assert Report.from_dict(report.to_dict()) == report
    assert Report.from_dict(json.loads(report.to_json())) == report
    assert json.loads(replace(report, rows=(Row("val_loss", float("nan"), float("inf")),)).to_json())["rows"]
    for bad in ({}, {**report.to_dict(), "format": 99}, {**report.to_dict(), "layers": [3]}, {"rows": []}):
        with pytest.raises(PruningError, match="not a report"):
            Report.from_dict(bad)


def test_csv_has_a_line_per_layer_and_one_for_all() -> None:
    report = full()
    rows = list(csv.DictReader(io.StringIO(report.to_csv())))
    assert [row["name"] for row in rows] == ["(all)", *(layer.name for layer in report.layers)]
    for key in ("params", "macs", "nonzero"):
        assert int(rows[0][f"pruned_{key}"]) == sum(int(row[f"pruned_{key}"]) for row in rows[1:])
    assert int(rows[0]["dense_params"]) == 62_006
    assert Report((Row("parameters", 4, 2),)).to_csv() == "name,dense,pruned,ratio,unit\nparameters,4,2,0.5,\n"


def test_markdown_escapes_what_would_break_a_table() -> None:
    lines = full().to_markdown().splitlines()
    assert lines[0] == "# a \\| b"
    head = next(line for line in lines if line.startswith("| layer"))
    assert all(line.count("|") - line.count("\\|") == head.count("|") for line in lines[lines.index(head) :])
    assert any("| fc3 | Linear |" in line and "frozen: reaches the model's output" in line for line in lines)


def test_rich_shows_every_layer_in_80_columns() -> None:
    report = full()
    console = Console(width=80, file=io.StringIO())
    console.print(report)
    text = console.file.getvalue()
    assert all(layer.name in text for layer in report.layers)
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize("suffix", [".html", ".md", ".json", ".csv", ".txt"])
def test_save_writes_by_ending(suffix: str, tmp_path: Path) -> None:
    report, path = full(), tmp_path / f"report{suffix}"
    path.write_text("old")
    report.save(path)
    start = {".html": "<!doctype html>", ".md": "# a", ".json": "{", ".csv": "name,", ".txt": " "}[suffix]
    assert path.read_text().startswith(start)
    assert os.listdir(tmp_path) == [path.name]
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_what_cannot_be_written_is_said_and_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = full()
    with pytest.raises(PruningError, match=r"\.html, \.md, \.json, \.csv, \.txt, got 'report\.pdf'"):
        report.save(tmp_path / "report.pdf")
    with pytest.raises(PruningError, match="No such file or directory"):
        report.save(tmp_path / "missing" / "report.md")
    (tmp_path / "folder.md").mkdir()
    with pytest.raises(PruningError, match="Is a directory"):
        report.save(tmp_path / "folder.md")
    path = tmp_path / "report.md"
    path.write_text("old")

    def refuse(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(PruningError, match="Permission denied"):
        report.save(path)
    assert path.read_text() == "old"
    assert sorted(os.listdir(tmp_path)) == ["folder.md", "report.md"]


@pytest.mark.parametrize(
    ("package", "call", "extra"), [("matplotlib", "to_html", "plots"), ("rich", "__rich__", "cli")]
)
def test_without_an_extra_the_error_names_it(package: str, call: str, extra: str) -> None:
    code = (
        "import sys; from lightning_prune import Report, PruningError\n"
        f"sys.modules |= {{n: None for n in [{package!r}, *sys.modules] if n.split('.')[0] == {package!r}}}\n"
        "from lightning_prune.report.report import Row\n"
        "report = Report((Row('parameters', 4, 2),)); report.to_markdown(), report.to_json(), report.to_csv()\n"
        f"try:\n    report.{call}()\nexcept PruningError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert f'pip install "lightning-prune[{extra}]"' in done.stdout


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_models_that_do_not_fit_together_are_refused() -> None:
    dense, pruned, _ = pruned_pair()
    with pytest.raises(PruningError, match="Is the dense model the first of the two"):
        compare(pruned, dense, IMAGE)
    with pytest.raises(PruningError, match=r"the dense model has no '0\.weight', '0\.bias'"):
        compare(dense, nn.Sequential(nn.Linear(3, 3)), IMAGE)
    with pytest.raises(PruningError, match="no parameter in common"):
        compare(dense, nn.Sequential(nn.ReLU()), IMAGE)
    with pytest.raises(TraceError, match="the dense model"):
        compare(dense, pruned, torch.rand(1, 7))
    with pytest.raises(PruningError, match=r"must be an nn\.Module"):
        compare(dense, "lenet", IMAGE)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "make",
    [
        lambda: WeightPruning(0.5),
        lambda: NeuronPruning(0.5),
        lambda: KernelShrinking(0.5),
        lambda: LayerPruning(0.5),
        lambda: ActivationSearch(),
    ],
    ids=["WeightPruning", "NeuronPruning", "KernelShrinking", "LayerPruning", "ActivationSearch"],
)
def test_a_report_asked_for_before_fit_is_one_clear_line(make: Any) -> None:
    callback = make()
    with pytest.raises(PruningError, match=rf"this {type(callback).__name__} has no report yet: Trainer\.fit makes it"):
        callback.report_.save("report.html")
    assert not hasattr(callback, "report_")


def test_what_is_said_of_layers_is_not_said_of_their_neurons() -> None:
    """A norm layer can't be removed as a layer; its channels can go."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
    plan = Plan({}, {}, frozen={"1": "has no weights but scales and shifts", "2": "has no weights"})
    told = statuses(model, plan, find_groups(model, torch.rand(1, 3, 9, 9)))
    assert told["1"] == ("exact", "")
    assert told["2"] == ("frozen", "has no weights")
    shrunk = shrink_kernels(model, torch.rand(1, 3, 9, 9), 0.3)
    assert shrunk.kept.keys() & {"0.weight", "3.weight"}
    told = statuses(model, Plan(shrunk.kept, shrunk.shapes, frozen={"0": "has no ring", "3": "has no ring"}))
    assert [name in told for name in ("0", "3")] == [f"{name}.weight" not in shrunk.kept for name in ("0", "3")]


# -- batches -----------------------------------------------------------------------------------------------------------


class OfImages(nn.Module):
    """A detector in small: takes a list of images of any size, gives a dict for each."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)

    def forward(self, images: Any, targets: Any = None) -> Any:
        found = [{"boxes": self.head(self.conv(each.unsqueeze(0)).relu()).flatten(2)[0].T} for each in images]
        return found if targets is None else [{**each, **targets[n]} for n, each in enumerate(found)]


class OfParts(nn.Module):
    """Takes one batch in two parts, as a list."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(3, 8), nn.Linear(5, 8)

    def forward(self, parts: Any) -> Any:
        return torch.cat([self.left(parts[0]), self.right(parts[1])], dim=1).relu()


class OfState(nn.Module):
    """Takes a batch and a state in two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTM(3, 4, batch_first=True)

    def forward(self, x: Any, state: Any) -> Any:
        return self.cell(x, state)[0]


IMAGES = [torch.rand(3, 8, 10), torch.rand(3, 9, 9)]
TARGETS = [{"labels": torch.ones(1)}, {"labels": torch.ones(3)}]


@pytest.mark.parametrize(
    ("make", "inputs", "size"),
    [
        (OfImages, (IMAGES[:1],), 1),
        (OfImages, (IMAGES,), 2),
        (OfImages, (tuple(IMAGES), TARGETS), 2),
        (OfImages, {"images": IMAGES * 2}, 4),
        (OfParts, ([torch.rand(6, 3), torch.rand(6, 5)],), 6),
        (OfState, (torch.rand(2, 7, 3), (torch.rand(1, 2, 4), torch.rand(1, 2, 4))), 2),
        (OfState, (torch.rand(5, 7, 3), (torch.rand(1, 5, 4), torch.rand(1, 5, 4))), 5),
        (lambda: nn.Linear(3, 2), torch.rand(7, 3), 7),
    ],
)
def test_the_batch_is_what_the_model_takes_for_one(make: Any, inputs: Any, size: int) -> None:
    model = make()
    report = compare(model, model, inputs, latency=False)
    assert f"MACs (batch {size})" in [row.name for row in report.rows]


def test_one_example_of_a_list_is_one_image() -> None:
    single, whole = measurable(OfImages(), as_calls((IMAGES, TARGETS)))
    assert [each.shape for each in single[0].args[0]] == [IMAGES[0].shape]
    assert len(single[0].args[1]) == 1
    assert whole == as_calls((IMAGES, TARGETS))
    (single,), _ = measurable(OfState(), as_calls((torch.rand(2, 7, 3), (torch.rand(1, 2, 4), torch.rand(1, 2, 4)))))
    assert [tuple(each.shape) for each in single.args[1]] == [(1, 2, 4)] * 2  # a state of the whole batch: no first one


# -- progress ----------------------------------------------------------------------------------------------------------


def test_sensitivity_shows_its_progress_where_asked(capfd: pytest.CaptureFixture[str]) -> None:
    batches = [(IMAGE, torch.zeros(1))]

    def metric(output: torch.Tensor, _: torch.Tensor) -> float:
        return float(output.sum())

    sensitivity(LeNet(), batches, metric, ratios=[0.5])
    assert "sensitivity" not in capfd.readouterr().err, "standard error is no terminal here"
    sensitivity(LeNet(), batches, metric, ratios=[0.5], progress=True)
    assert "sensitivity" in capfd.readouterr().err


def test_only_the_first_process_shows_progress(monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    monkeypatch.setattr(progress, "_rank", lambda: 1)
    with progress_bar(3, "work", shown=True) as bar:
        bar.update(3)
    assert capfd.readouterr().err == ""
