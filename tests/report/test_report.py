"""What a run says: metrics while it trains, one table at the end, the same table as data."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from lightning_modules import (
    IMAGE,
    LIGHTNING_WARNINGS,
    EncoderDecoder,
    Manual,
    Residual,
    SmallLiteralView,
    Spy,
    Task,
    WithForward,
    assert_same,
    conv_net,
    fit,
    mlp,
    seeded,
    snapshot,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy

from lightning_prune import NeuronPruning, Plan, Report, WeightPruning, save_pruned
from lightning_prune.models import LeNet
from lightning_prune.pruning.latency import latencies, layer_times
from lightning_prune.report.build import build_report
from lightning_prune.report.report import Row
from lightning_prune.report.run import needs_library

pytestmark = LIGHTNING_WARNINGS

ROWS = ["parameters", "non-zero", "MACs (batch 1)", "file size", "latency (batch 1)", "latency (batch 8)", "val_acc"]
DENSE_MACS = 6 * 12 + 12 * 10 + 10 * 4
BIASES = 12 + 10 + 4


@pytest.fixture(autouse=True)
def _hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Latencies from a few runs: their values are not tested."""
    for measure in (latencies, layer_times):
        monkeypatch.setitem(measure.__kwdefaults__, "seconds", 0.0)


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Any:
    """What was printed, whatever the level of the loggers."""
    return lambda: capsys.readouterr().out


def linear_macs(module: nn.Module) -> int:
    """By hand: each weight of a linear layer multiplies once per example."""
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))


@pytest.mark.parametrize(
    "callbacks",
    [
        lambda: [WeightPruning(0.5)],
        lambda: [NeuronPruning(0.5)],
        lambda: [NeuronPruning(0.5), WeightPruning(0.5)],
        lambda: [WeightPruning(0.5), NeuronPruning(0.5)],
    ],
    ids=["weights", "neurons", "both", "both, turned"],
)
def test_one_table_tells_dense_from_pruned(callbacks: Any, said: Any, tmp_path: Path) -> None:
    module, pruning = seeded(Task), callbacks()
    assert not any(hasattr(callback, "report_") for callback in pruning)
    trainer = fit(module, *pruning)
    report = pruning[0].report_
    assert all(callback.report_ is report for callback in pruning)
    assert [row.name for row in report.rows] == ROWS

    count = sum(p.numel() for p in module.parameters())
    nonzero = sum(int(p.count_nonzero()) for p in module.parameters())
    save_pruned(module, tmp_path / "pruned")
    save_pruned(seeded(Task), tmp_path / "dense")
    assert report["parameters"] == Row("parameters", DENSE_MACS + BIASES, count)
    assert report["non-zero"] == Row("non-zero", DENSE_MACS + BIASES, nonzero)
    assert report["MACs (batch 1)"] == Row("MACs (batch 1)", DENSE_MACS, linear_macs(module))
    sizes = [(tmp_path / name).stat().st_size for name in ("dense", "pruned")]
    assert report["file size"] == Row("file size", *sizes, "B")
    for batch in (1, 8):
        row = report[f"latency (batch {batch})"]
        assert row.unit == "s"
        assert min(row.dense, row.pruned) > 0
    assert report["val_acc"].pruned == float(trainer.callback_metrics["val_acc"])
    assert said() == f"\n{report}\n"


def test_ratios_and_plain_data() -> None:
    report = Report((Row("parameters", 1000, 250), Row("val_acc", None, 0.5), Row("file size", 4000.0, 1000.0, "B")))
    assert report["parameters"].ratio == 0.25
    assert report["val_acc"].ratio is None
    assert Row("x", 0, 1).ratio is None
    assert report.to_dict()["rows"]["file size"] == {
        "name": "file size", "dense": 4000.0, "pruned": 1000.0, "unit": "B", "ratio": 0.25,
    }  # fmt: skip
    with pytest.raises(KeyError, match="'macs'; the report has parameters, val_acc, file size"):
        report["macs"]


def test_the_table_is_aligned() -> None:
    rows = (Row("parameters", 1234567, 4321), Row("file size", 4.2e6, 1.5e3, "B"), Row("latency (batch 1)", 2e-3, 1e-3, "s"),
            Row("val_acc", None, 0.9876))  # fmt: skip
    assert str(Report(rows)).splitlines() == [
        "                        dense    pruned  ratio",
        "----------------------------------------------",
        "parameters          1,234,567     4,321  0.004",
        "file size          4,200.0 kB    1.5 kB  0.000",
        "latency (batch 1)    2.000 ms  1.000 ms  0.500",
        "val_acc                     –    0.9876      –",
    ]


@pytest.mark.parametrize("cls", [WeightPruning, NeuronPruning])
def test_the_dense_metric_is_shown_where_it_was_measured(cls: Any) -> None:
    seen: list[float] = []
    spy = Spy(on_validation_end=lambda trainer, _: seen.append(float(trainer.callback_metrics["val_loss"])))
    callback = cls(0.5, start=0.5, end=1.0, monitor="val_loss")
    fit(seeded(Task), callback, spy, max_epochs=4)
    row = callback.report_["val_loss"]
    assert (row.dense, row.pruned) == (seen[1], seen[3])
    assert row.ratio == seen[3] / seen[1]


def test_a_metric_from_the_sanity_check_is_not_the_dense_one() -> None:
    callback = WeightPruning(0.5, schedule="one_shot")
    fit(seeded(Task), callback, num_sanity_val_steps=2)
    assert callback.report_ is not None
    assert callback.report_["val_acc"].dense is None


def test_without_the_metric_its_row_is_left_out() -> None:
    callback = WeightPruning(0.5, monitor="val_f1")
    fit(seeded(Task), callback)
    assert callback.report_ is not None
    assert [row.name for row in callback.report_.rows] == ROWS[:-1]


def test_no_report_where_none_is_wanted(said: Any) -> None:
    callback = WeightPruning(0.5, report=False)
    fit(seeded(Task), callback)
    assert callback.report_ is None
    assert said() == ""


@pytest.mark.filterwarnings("ignore::lightning_prune.NoEffectWarning")  # of amount 0
@pytest.mark.parametrize("net", [conv_net, Residual, SmallLiteralView])
def test_the_dense_side_is_that_of_the_model_before(net: Any) -> None:
    """Built anew from the pruned one, it must count as the model did when it was whole."""
    module, callback = seeded(lambda: Task(net(), shape=IMAGE)), NeuronPruning(0.6)
    fit(module, callback)
    assert callback.report_ is not None
    fresh = seeded(lambda: WithForward(net(), shape=IMAGE))
    untouched = NeuronPruning(0.0)
    fit(fresh, untouched)
    assert untouched.report_ is not None
    for name in ("parameters", "MACs (batch 1)", "file size"):
        assert callback.report_[name].dense == untouched.report_[name].pruned
        assert callback.report_[name].dense > callback.report_[name].pruned
        assert untouched.report_[name].ratio == 1


def test_a_report_needs_no_plan() -> None:
    model = mlp()
    report = build_report(model, Plan({}, {}), (), (), metric="val_acc", dense_value=None, pruned_value=None)
    assert [row.name for row in report.rows] == ["parameters", "non-zero", "file size"]
    assert all(row.ratio == 1 for row in report.rows)


# -- while it trains ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [1, -1])
def test_metrics_go_to_callbacks_logger_and_progress_bar_once(order: int, tmp_path: Path) -> None:
    logged: list[Any] = []

    class Bar(TQDMProgressBar):
        def get_metrics(self, trainer: Any, pl_module: Any) -> Any:
            logged.append(super().get_metrics(trainer, pl_module))
            return logged[-1]

    module = seeded(Task)
    pruning = [NeuronPruning(0.5, report=False), WeightPruning(0.5, report=False)][::order]
    logger = CSVLogger(tmp_path, name="", version="")
    calls: list[str] = []
    log_dict = module.log_dict
    module.log_dict = lambda values, **options: (calls.extend(values), log_dict(values, **options))
    trainer = fit(module, *pruning, Bar(), enable_progress_bar=True, logger=logger)

    count = sum(p.numel() for p in module.parameters())
    nonzero = sum(int(p.count_nonzero()) for p in module.parameters())
    expected = {"sparsity": 1 - nonzero / count, "params": float(count), "macs": float(linear_macs(module))}
    for metrics in (trainer.callback_metrics, trainer.logged_metrics, logged[-1]):
        assert {name: float(metrics[name]) for name in expected} == pytest.approx(expected, abs=1e-3)
    assert calls.count("sparsity") == 2, "once an epoch, not once a callback"
    with (tmp_path / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["macs"]]
    assert len(rows) == 2
    assert float(rows[-1]["params"]) == count


def test_checkpoints_can_be_named_and_chosen_by_sparsity(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, "{epoch}-{sparsity:.2f}", monitor="sparsity", mode="max")
    fit(seeded(Task), WeightPruning(0.5, report=False), saver)
    assert saver.best_model_path.endswith("-sparsity=0.45.ckpt")  # 116 of 258


@pytest.mark.parametrize("make", [Task, EncoderDecoder, Manual, lambda: Task(endless=True)])
@pytest.mark.parametrize(
    "callbacks",
    [
        lambda: [WeightPruning(0.5)],
        lambda: [NeuronPruning(0.5)],
        lambda: [NeuronPruning(0.5), WeightPruning(0.5)],
        lambda: [WeightPruning(0.5), NeuronPruning(0.5)],
    ],
    ids=["weights", "neurons", "both", "both, turned"],
)
def test_macs_count_every_part_of_the_model(make: Any, callbacks: Any) -> None:
    module, pruning = seeded(make), callbacks()
    dense = linear_macs(module)
    trainer = fit(module, *pruning)
    row = pruning[0].report_["MACs (batch 1)"]
    assert trainer.callback_metrics["macs"] == linear_macs(module)
    assert (row.dense, row.pruned) == (dense, linear_macs(module))


class Metrics(Task):
    """Keeps accuracy in a torchmetrics module that is called in the step, beside a loss module."""

    def __init__(self) -> None:
        super().__init__(Residual(0.25), shape=IMAGE)
        self.accuracy, self.loss = MulticlassAccuracy(4, average="micro"), nn.CrossEntropyLoss()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self.logits(batch[0])
        self.accuracy(logits.argmax(1), batch[1])
        self.log("train_acc", self.accuracy, on_step=False, on_epoch=True)
        return self.loss(logits, batch[1]) + 0 * F.mse_loss(logits, logits.detach())


@pytest.mark.filterwarnings("ignore::lightning_prune.NoEffectWarning")  # of amount 0
@pytest.mark.parametrize("cls", [WeightPruning, NeuronPruning])
def test_measuring_changes_no_weight_no_statistic_and_no_metric(cls: Any) -> None:
    def run(*callbacks: Any) -> tuple[dict[str, Tensor], list[float], Tensor]:
        seen: list[float] = []
        spy = Spy(on_train_epoch_end=lambda trainer, _: seen.append(float(trainer.callback_metrics["train_acc"])))
        module = seeded(Metrics)
        fit(module, *callbacks, spy)
        return snapshot(module), seen, torch.get_rng_state()

    assert_same(run(cls(0.0)), run())


def test_the_dense_side_of_a_second_run_is_what_the_first_one_left() -> None:
    net = seeded(SmallLiteralView)
    first, second = NeuronPruning(0.5), NeuronPruning(0.3)
    fit(Task(net, shape=IMAGE), first)
    fit(Task(net, shape=IMAGE), second)
    for row in ("parameters", "MACs (batch 1)"):
        assert second.report_[row].dense == first.report_[row].pruned > second.report_[row].pruned


def test_the_run_says_whether_unpickling_needs_the_library(capsys: pytest.CaptureFixture[str]) -> None:
    for net, expected in ((SmallLiteralView, ["net"]), (conv_net, [])):
        module = seeded(lambda net=net: Task(net(), shape=IMAGE))
        fit(module, NeuronPruning(0.5))
        assert needs_library(module) == expected
        said = "Unpickling this model needs lightning_prune, for the forward of net." in capsys.readouterr().out
        assert said == bool(expected)
    assert needs_library(LeNet()) == []
