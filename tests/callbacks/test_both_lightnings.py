"""Users of ``lightning`` and of ``pytorch_lightning``, of Python and of LightningCLI's YAML get the same callbacks."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import lightning.pytorch
import pytest
import pytorch_lightning
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.cli import LightningCLI
from lightning_modules import LIGHTNING_WARNINGS, Task, assert_same, examples, neurons, seeded, snapshot, weights, zeros
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_prune import NeuronPruning, WeightPruning
from lightning_prune.models import ImageClassifier, LeNet

pytestmark = [
    *LIGHTNING_WARNINGS,
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),  # LightningCLI's
]

PACKAGES: dict[str, Any] = {"lightning.pytorch": lightning.pytorch, "pytorch_lightning": pytorch_lightning}
QUIET = {
    "accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False,
}  # fmt: skip


def plain_module(package: Any) -> Any:
    """A LightningModule of one of the packages."""

    class Module(package.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 4))

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]))

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)

    return Module()


def classifier(package: Any) -> Any:
    """The package's own module, which serves both."""
    return ImageClassifier(LeNet([4], 3, [8], in_shape=(1, 8, 8), num_classes=4))


@pytest.mark.parametrize("make", [plain_module, classifier])
def test_both_trainers_prune_alike(make: Any, tmp_path: Path) -> None:
    runs = []
    # One after the other and back again: the same classes serve both packages in one process.
    for name in ("lightning.pytorch", "pytorch_lightning", "lightning.pytorch"):
        package = PACKAGES[name]
        module = seeded(lambda package=package: make(package))
        callbacks = [neurons(0.5), weights(0.4)]
        saver = package.callbacks.ModelCheckpoint(tmp_path / name, monitor="val_loss", save_last=True)
        trainer = package.Trainer(max_epochs=2, callbacks=[*callbacks, saver], **QUIET)
        loaders = [DataLoader(examples(24, (1, 8, 8), seed=seed), batch_size=8) for seed in (0, 1)]
        trainer.fit(module, *loaders)

        gone, total = zeros({n: p for n, p in module.named_parameters() if p.dim() > 1})
        assert gone == round(0.4 * total)
        assert callbacks[0].plan_
        again = package.Trainer(callbacks=[neurons(0.5), weights(0.4)], **QUIET)
        (metrics,) = again.validate(seeded(lambda p=package: make(p), 1), loaders[1], ckpt_path=saver.best_model_path)
        assert metrics["val_loss"] == float(saver.best_model_score)
        runs.append(snapshot(module))
    assert_same(runs[1], runs[0])
    assert_same(runs[2], runs[0])


SCRIPT = """
import warnings
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

warnings.simplefilter("ignore")

def use(package, callbacks):
    class Module(package.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Sequential(torch.nn.Linear(6, 12), torch.nn.ReLU(), torch.nn.Linear(12, 4))

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    data = TensorDataset(torch.randn(16, 6), torch.randint(0, 4, (16,)))
    trainer = package.Trainer(
        max_epochs=2, callbacks=callbacks, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )
    module = Module()
    trainer.fit(module, DataLoader(data, batch_size=8))
    assert module.net[0].out_features == 6, module.net
    weights = torch.cat([p.flatten() for p in module.parameters() if p.dim() > 1])
    assert int((weights == 0).sum()) == round(0.5 * weights.numel())

def both():
    return [lightning_prune.NeuronPruning(0.5, report=False), lightning_prune.WeightPruning(0.5, report=False)]
"""

ORDERS = {
    "pytorch_lightning last": """
        import sys
        import lightning_prune
        assert "pytorch_lightning" not in sys.modules, "importing it costs every user of lightning its import time"
        early = both()
        import pytorch_lightning
        import lightning.pytorch
        if hasattr(pytorch_lightning.callbacks, "WeightAveraging"):  # 2.5 asks for its own base class before anything of ours
            use(pytorch_lightning, early)  # made when pytorch_lightning's base class could not be known yet
        use(pytorch_lightning, both())
        use(lightning.pytorch, both())
        """,
    "pytorch_lightning first": """
        import pytorch_lightning
        import lightning_prune
        use(pytorch_lightning, both())
        """,
}


def test_imports_may_come_in_any_order() -> None:
    processes = {
        name: subprocess.Popen(
            [sys.executable, "-c", SCRIPT + textwrap.dedent(order)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for name, order in ORDERS.items()
    }
    output = {name: process.communicate(timeout=300)[0] for name, process in processes.items()}
    failed = {name: output[name][-2000:] for name, process in processes.items() if process.returncode}
    assert not failed, "\n".join(f"{name}:\n{text}" for name, text in failed.items())


# -- LightningCLI ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cls", "arguments"),
    [
        (WeightPruning, {}),
        (
            WeightPruning,
            {"amount": 0.3, "scope": "layer", "schedule": "linear", "start": 0.25, "end": 1.0, "every": 50},
        ),
        (WeightPruning, {"start": 1, "end": 3, "every": "epoch", "include": ["net.*"], "exclude": "net.4"}),
        (WeightPruning, {"start": 0, "end": 3, "report": False, "monitor": "val_loss"}),
        (NeuronPruning, {}),
        (NeuronPruning, {"amount": 0.5, "of": "macs", "round_to": 8, "exact_only": True, "verify": False}),
        (NeuronPruning, {"start": 2, "end": 5, "include": "net.*", "exclude": None, "example_inputs": None}),
    ],
    ids=str,
)
def test_plain_configuration_makes_the_callback(cls: Any, arguments: dict[str, Any]) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--callback", type=lightning.pytorch.Callback)
    config = {"class_path": f"{cls.__module__}.{cls.__qualname__}", "init_args": arguments}
    made = parser.instantiate_classes(parser.parse_object({"callback": config})).callback
    expected = vars(cls(**arguments))
    for name in [name for name in expected if not name.startswith("_") and not name.endswith("_")]:
        assert (type(getattr(made, name)), getattr(made, name)) == (type(expected[name]), expected[name]), name


class Untyped(Task):
    """Takes no arguments, so that the YAML has none to give."""

    def __init__(self) -> None:
        super().__init__()


def test_lightning_cli_trains_from_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("""
        trainer:
          max_epochs: 3
          accelerator: cpu
          logger: false
          enable_checkpointing: false
          enable_progress_bar: false
          enable_model_summary: false
          callbacks:
            - class_path: lightning_prune.NeuronPruning
              init_args: {amount: 0.5, end: 2, report: false}
            - class_path: lightning_prune.WeightPruning
              init_args: {amount: 0.4, include: net.0, report: false}
        """)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    cli = LightningCLI(
        Untyped, save_config_callback=None, seed_everything_default=0, args=["fit", f"--config={config}"]
    )
    assert [m.out_features for m in cli.model.net[::2]][-1] == 4
    assert sum(m.out_features for m in cli.model.net[::2]) - 4 == 11
    gone, total = zeros({"first": cli.model.net[0].weight})
    assert gone == round(0.4 * total)
