"""The timeline that callbacks keep, and what loggers get of it."""

from __future__ import annotations

import csv
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning_modules import LIGHTNING_WARNINGS, Spy, Task, fit, seeded

from lightning_prune import NeuronPruning, WeightPruning
from lightning_prune.callbacks import _base
from lightning_prune.pruning.latency import latencies, layer_times
from lightning_prune.report.layers import magnitudes

pytestmark = LIGHTNING_WARNINGS


@pytest.fixture(autouse=True)
def _hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    for measure in (latencies, layer_times):
        monkeypatch.setitem(measure.__kwdefaults__, "seconds", 0.0)


def test_each_epoch_end_is_a_moment_with_its_own_metric() -> None:
    seen: list[tuple[int, float]] = []

    def note(trainer: Any, module: Any) -> None:
        seen.append((trainer.global_step, float(trainer.callback_metrics["val_acc"])))

    callback = WeightPruning(0.5, end=1.0)
    module = seeded(Task)
    fit(module, callback, Spy(on_validation_end=note), max_epochs=4)
    moments = callback.report_.timeline
    assert [(m.step, m.metric) for m in moments] == seen
    assert [m.epoch for m in moments] == [1, 2, 3, 4]
    assert [m.amount for m in moments] == pytest.approx(WeightPruning(0.5, end=1.0).preview(4))
    nonzero = sum(int(p.count_nonzero()) for p in module.parameters())
    assert moments[-1].sparsity == 1 - nonzero / moments[-1].params
    assert {m.lr for m in moments} == {0.05}


def test_each_pruning_in_between_is_a_moment_too() -> None:
    callbacks = [NeuronPruning(0.5, every=1, end=0.5), WeightPruning(0.3, every=1, end=0.5)]
    fit(seeded(Task), *callbacks, max_epochs=2)
    moments = callbacks[0].report_.timeline
    assert moments == tuple(callbacks[1].timeline_)
    assert [m.step for m in moments] == [1, 2, 3, 4, 8]
    assert [m.epoch for m in moments] == [0.25, 0.5, 0.75, 1, 2]
    assert [m.params for m in moments] == sorted((m.params for m in moments), reverse=True)
    assert moments[0].macs > moments[3].macs
    assert [m.metric is None for m in moments] == [True, True, True, False, False]


def test_a_training_metric_is_taken_at_the_epochs_end() -> None:
    class Logs(Task):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            self.log("train_mean", loss.detach(), on_step=False, on_epoch=True)
            return loss

    callback, seen = WeightPruning(0.5, monitor="train_mean"), []
    fit(
        seeded(Logs),
        callback,
        Spy(on_train_epoch_end=lambda t, _: seen.append(float(t.callback_metrics["train_mean"]))),
    )
    assert [m.metric for m in callback.report_.timeline] == seen


def test_a_resumed_run_has_the_whole_timeline(tmp_path: Path) -> None:
    def ours() -> list[Any]:
        return [NeuronPruning(0.5), WeightPruning(0.3, end=1.0)]

    whole, again = ours(), ours()
    saver = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    fit(seeded(Task), *whole, saver, max_epochs=4)
    torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)
    fit(seeded(Task, 7), *again, max_epochs=4, ckpt_path=tmp_path / "epoch=1.ckpt")
    assert len(whole[1].timeline_) == 4
    assert again[1].timeline_ == whole[1].timeline_
    assert again[1].report_.weights == whole[1].report_.weights


@pytest.mark.parametrize(
    "make",
    [
        lambda: [NeuronPruning(0.5, start=1, end=3)],
        lambda: [WeightPruning(0.5, start=2, end=3), NeuronPruning(0.5, start=1, end=3)],
        lambda: [NeuronPruning(0.5, start=1, end=3), WeightPruning(0.5, start=2, end=3)],
    ],
    ids=["neurons", "weights, neurons", "neurons, weights"],
)
def test_weights_before_are_those_before_the_first_pruning(make: Any, tmp_path: Path) -> None:
    """Of whichever callback; also in a run that is resumed after it."""
    seen: dict[str, list[int]] = {}

    def note(trainer: Any, module: Any, *_: Any) -> None:
        if trainer.is_last_batch and trainer.current_epoch == 1:
            seen.update({name: magnitudes(p) for name, p in module.named_parameters() if p.dim() > 1})

    callbacks, again = make(), make()
    saver = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    fit(seeded(Task), Spy(on_train_batch_end=note), *callbacks, saver, max_epochs=4)
    found = {each.name: each for each in callbacks[0].report_.weights}
    assert found.keys() == seen.keys()
    for name, counts in seen.items():
        assert sum(found[name].dense) == sum(counts) > 0
        assert [count for count in found[name].dense if count] == [count for count in counts if count]
    fit(seeded(Task, 7), *again, max_epochs=4, ckpt_path=tmp_path / "epoch=1.ckpt")
    assert again[0].report_.weights == callbacks[0].report_.weights
    fit(seeded(Task, 8), *again, max_epochs=4)
    assert again[0].report_.weights != callbacks[0].report_.weights, "another model's"


def test_a_fit_that_goes_on_knows_the_weights_before() -> None:
    module, callback = seeded(Task), WeightPruning(0.5)
    fit(module, callback)
    first = callback.report_.weights
    fit(module, callback)
    assert [each.dense for each in callback.report_.weights] != [()] * len(first)
    assert [each.threshold for each in callback.report_.weights] == [each.threshold for each in first]


def test_another_fit_starts_another_timeline() -> None:
    callback = WeightPruning(0.5)
    fit(seeded(Task), callback)
    first = list(callback.timeline_)
    fit(seeded(Task, 1), callback)
    assert [m.step for m in callback.timeline_] == [m.step for m in first]


def test_a_long_timeline_stays_short_and_keeps_every_metric(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_base, "MOMENTS", 6)
    callback = WeightPruning(0.5, every=1, end=1.0)
    fit(seeded(lambda: Task(batches=6)), callback, max_epochs=4)
    moments = callback.timeline_
    assert len(moments) <= 7
    assert [m.step for m in moments if m.metric is not None] == [6, 12, 18, 24]


class Pictures(Logger):
    """Takes figures as W&B's logger does."""

    def __init__(self, broken: bool = False) -> None:
        super().__init__()
        self.images: dict[str, Any] = {}
        self.scalars: list[tuple[int, dict[str, float]]] = []
        self.broken = broken

    name, version = "pictures", 0

    def log_metrics(self, metrics: Any, step: Any = None) -> None:
        self.scalars.append((step, dict(metrics)))

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        pass

    def log_image(self, key: str, images: list[Any]) -> None:
        if self.broken:
            raise RuntimeError("no room left")
        self.images[key] = images


def test_loggers_get_scalars_at_each_pruning_and_figures_at_the_end(tmp_path: Path) -> None:
    pictures, table = Pictures(), CSVLogger(tmp_path, name="", version="")
    fit(seeded(Task), WeightPruning(0.5, every=1, end=0.5), max_epochs=2, logger=[pictures, table])
    logged = [step for step, values in pictures.scalars if "sparsity" in values]
    assert len(logged) == 5, "three in the middle of the first epoch, and two epochs' ends"
    assert logged == sorted(logged)
    with (tmp_path / "metrics.csv").open() as file:
        assert len([row for row in csv.DictReader(file) if row["sparsity"]]) == 5
    assert set(pictures.images) == {"pruning/layers", "pruning/timeline", "pruning/weights"}
    assert all(image.size[0] > 300 for images in pictures.images.values() for image in images)


def test_the_threshold_is_that_of_all_prunings() -> None:
    """What goes in the last one is small: those before decided."""

    def shrink(trainer: Any, module: Any) -> None:
        if trainer.current_epoch == 3:
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter.mul_(1e-3)

    callback = WeightPruning(0.5, schedule="linear", end=4, report=True)
    fit(seeded(Task), callback, Spy(on_train_epoch_start=shrink), max_epochs=4)
    assert all(each.threshold is not None and each.threshold > 0.01 for each in callback.report_.weights)


def test_tensorboard_gets_figures(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from lightning.pytorch.loggers import TensorBoardLogger
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    fit(seeded(Task), WeightPruning(0.5), logger=TensorBoardLogger(tmp_path, name="", version=""))
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert {"pruning/layers", "pruning/timeline", "pruning/weights"} <= set(events.Tags()["images"])
    assert {"sparsity", "params", "macs"} <= set(events.Tags()["scalars"])


def test_wandb_gets_scalars_and_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline, by wandb itself."""
    wandb = pytest.importorskip("wandb")
    from lightning.pytorch.loggers import WandbLogger

    monkeypatch.setenv("WANDB_SILENT", "true")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logger = WandbLogger(offline=True, save_dir=tmp_path, project="pruning")
        try:
            fit(seeded(Task), WeightPruning(0.5), logger=logger)
            assert logger.experiment.summary["sparsity"] > 0.4
        finally:
            wandb.finish()
    pictures = {path.name.partition("_")[0] for path in tmp_path.rglob("*.png")}
    assert {"layers", "timeline", "weights"} <= pictures


def test_a_logger_that_fails_does_not_cost_the_run() -> None:
    callback = WeightPruning(0.5)
    with pytest.warns(UserWarning, match="was not logged: RuntimeError: no room left"):
        fit(seeded(Task), callback, logger=Pictures(broken=True))
    assert callback.report_ is not None


def test_the_curves_of_a_sensitivity_scope_are_in_the_report_by_layer() -> None:
    callback = NeuronPruning(0.3, scope="sensitivity")
    fit(seeded(Task), callback)
    found = callback.report_.sensitivity
    assert found is not None
    assert set(found.values) <= {name for name, _ in Task().named_modules()}
