"""What `WeightPruning` costs: per training step, and per selection; beside Lightning's and torch's own.

    python benchmarks/weight_pruning.py            # all
    python benchmarks/weight_pruning.py steps      # time of a training step: without, ours, Lightning's ModelPruning
    python benchmarks/weight_pruning.py select     # one global selection of 50 %: prune_weights, torch's, and memory
    python benchmarks/weight_pruning.py files      # size of a sparse file

All sides of a ratio are measured in one run, in turns of a few steps each, so that what else the machine does meets all
of them alike. Times are of one thread; a ratio is the median over the turns.
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelPruning
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import WeightPruning, prune_weights, save_pruned

TURNS = {"resnet18": (40, 4), "cifar": (15, 3), "mlp": (60, 60)}
"""How many turns each side has, and of how many steps; the first step of a turn doesn't count."""
SIZES = {"25 M": 25, "100 M": 100}


class Task(LightningModule):
    """A classifier of random images."""

    def __init__(self, net: nn.Module, shape: tuple[int, ...], batch: int, turns: tuple[int, int]) -> None:
        super().__init__()
        self.net, self.shape, self.batch, self.turns = net, shape, batch, turns

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Cross entropy."""
        loss: Tensor = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        return loss

    def configure_optimizers(self) -> Any:
        """SGD with momentum, as these networks are trained."""
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)

    def train_dataloader(self) -> Any:
        """A short epoch that prunes, and a long one that is timed."""
        turns, steps = self.turns
        data = TensorDataset(torch.randn(2 * self.batch, *self.shape), torch.randint(10, (2 * self.batch,)))
        count = 2 if self.trainer.current_epoch == 0 else turns * steps + 1
        sampler = [i % len(data) for i in range(count * self.batch)]
        return DataLoader(data, self.batch, sampler=sampler)


class Turns:
    """Lets several trainings take turns: only one of them runs at a time."""

    def __init__(self, sides: int) -> None:
        self.sides, self.now, self.left = sides, 0, set[int]()
        self.changed = threading.Condition()

    def wait(self, side: int) -> None:
        """Until it is this side's turn."""
        with self.changed:
            self.changed.wait_for(lambda: self.now == side)

    def over(self, side: int, *, last: bool = False) -> None:
        """It is another one's turn."""
        with self.changed:
            if last:
                self.left.add(side)
            others = [(side + i) % self.sides for i in range(1, self.sides + 1)]
            self.now = next((other for other in others if other not in self.left), -1)
            self.changed.notify_all()


class Stopwatch(Callback):
    """Times the batches of the second epoch, from start to start, so that all that happens between counts."""

    def __init__(self, turns: Turns, side: int, steps: int) -> None:
        self.turns, self.side, self.steps = turns, side, steps
        self.starts: list[float] = []
        self.medians: list[float] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """A batch begins; the first of a turn waits for the others' turns."""
        if trainer.current_epoch == 0:
            return
        self.starts.append(time.perf_counter())
        if batch_idx % self.steps == 0:
            if batch_idx:
                seconds = [b - a for a, b in zip(self.starts[1:], self.starts[2:], strict=False)]
                self.medians.append(statistics.median(seconds))
                self.turns.over(self.side)
                self.turns.wait(self.side)
            self.starts = [time.perf_counter()]


def mlp(batch: int) -> Task:
    """784-300-100-10."""
    layers = [nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)]
    return Task(nn.Sequential(*layers), (784,), batch, TURNS["mlp"])


def resnet18() -> Task:
    """torchvision's, on 32x32, batches of 64."""
    from torchvision.models import resnet18

    return Task(resnet18(weights=None, num_classes=10), (3, 32, 32), 64, TURNS["resnet18"])


def cifar() -> Task:
    """ResNet-18 as it is used on 32x32: a first convolution of 3x3, and no pooling behind it."""
    task = resnet18()
    task.net.conv1, task.net.maxpool, task.turns = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity(), TURNS["cifar"]
    return task


def ours() -> list[Callback]:
    """Half of all weights after the first epoch."""
    return [WeightPruning(0.5, schedule="one_shot", end=0.5, report=False)]


def lightnings() -> list[Callback]:
    """The same with Lightning's callback."""
    once: Any = ModelPruning(
        "l1_unstructured", amount=lambda epoch: 0.5 if epoch == 0 else 0, use_lottery_ticket_hypothesis=False
    )
    return [once]


def time_steps(make: Callable[[], Task], sides: list[Callable[[], list[Callback]]]) -> list[list[float]]:
    """Seconds per training step after the pruning: for each side the median of each turn."""
    turns, tasks = Turns(len(sides)), [make() for _ in sides]
    watches = [Stopwatch(turns, side, task.turns[1]) for side, task in enumerate(tasks)]
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    failed: list[BaseException] = []

    def train(side: int) -> None:
        torch.set_num_threads(1)  # each thread has a number of its own
        turns.wait(side)
        try:
            callbacks = [*sides[side](), watches[side]]
            trainer = Trainer(
                max_epochs=2,
                accelerator="cpu",
                callbacks=callbacks,
                enable_model_summary=False,
                reload_dataloaders_every_n_epochs=1,
                **quiet,
            )
            trainer.fit(tasks[side])
        except BaseException as error:
            failed.append(error)
        finally:
            turns.over(side, last=True)

    threads = [threading.Thread(target=train, args=(side,)) for side in range(len(sides))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
    return [watch.medians for watch in watches]


def steps() -> list[tuple[str, ...]]:
    """Rows of step times."""
    rows = []
    networks: dict[str, Callable[[], Task]] = {
        "resnet18 32x32": resnet18,
        "resnet18 32x32, CIFAR's stem": cifar,
        "mlp 784-300-100-10": partial(mlp, 64),
        "mlp 784-300-100-10, batch 128": partial(mlp, 128),
    }
    for name, make in networks.items():
        none, *others = time_steps(make, [list, lambda: [Callback()], ours, lightnings])
        ratios = [statistics.median(b / a - 1 for a, b in zip(none, other, strict=True)) for other in others]
        rows.append((name, f"{statistics.median(none) * 1e3:.2f} ms", *(f"{ratio:+.1%}" for ratio in ratios)))
    return rows


def weights(millions: int) -> nn.Module:
    """Ten linear layers with so many million weights in all."""
    layers = [nn.Linear(2500, 40 * millions, bias=False) for _ in range(10)]
    return nn.Sequential(*layers)


def torchs(model: nn.Module) -> None:
    """torch's global pruning, made permanent."""
    layers: Any = [(layer, "weight") for layer in model]  # type: ignore[attr-defined]
    prune.global_unstructured(layers, pruning_method=prune.L1Unstructured, amount=0.5)


METHODS: dict[str, Callable[[nn.Module], Any]] = {"ours": lambda model: prune_weights(model, 0.5), "torch": torchs}


def one_selection(method: str, millions: int) -> dict[str, float]:
    """Seconds and memory beyond the weights themselves, in this process."""
    model = weights(millions)
    METHODS[method](nn.Sequential(nn.Linear(64, 64, bias=False)))  # imports and first calls
    gc.collect()
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    METHODS[method](model)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "copies": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / size}


def select() -> list[tuple[str, ...]]:
    """Rows of selections; each in a process of its own, in turns, the best of three."""
    rows = []
    for name, millions in SIZES.items():
        found: dict[str, list[dict[str, float]]] = {method: [] for method in METHODS}
        for _ in range(3):
            for method, results in found.items():
                command = [sys.executable, __file__, "one", "--method", method, "--millions", str(millions)]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                results.append(json.loads(done.stdout.splitlines()[-1]))
        best = {method: min(each["seconds"] for each in results) for method, results in found.items()}
        copies = {method: max(each["copies"] for each in results) for method, results in found.items()}
        cells = [f"{best['ours']:.2f} s", f"{best['torch']:.2f} s", f"{best['ours'] / best['torch']:.2f}"]
        rows.append((name, *cells, f"{copies['ours']:.2f}", f"{copies['torch']:.2f}"))
    return rows


def files() -> list[tuple[str, ...]]:
    """Rows of file sizes of a pruned ResNet-18, relative to its dense file."""
    rows = []
    for amount in (0.5, 0.8, 0.9, 0.95, 0.99):
        model = resnet18().net
        with tempfile.TemporaryDirectory() as folder:
            save_pruned(model, dense := Path(folder) / "dense.safetensors")
            prune_weights(model, amount)
            save_pruned(model, sparse := Path(folder) / "sparse.safetensors")
            sizes = dense.stat().st_size, sparse.stat().st_size
        rows.append(
            (f"{amount:.0%}", f"{sizes[0] / 1e6:.1f} MB", f"{sizes[1] / 1e6:.1f} MB", f"{sizes[1] / sizes[0]:.3f}")
        )
    return rows


TABLES: dict[str, tuple[Callable[[], list[tuple[str, ...]]], tuple[str, ...]]] = {
    "steps": (steps, ("training step", "without", "an empty callback", "ours", "ModelPruning")),
    "select": (select, ("weights", "ours", "torch", "ratio", "copies of the weights: ours", "torch")),
    "files": (files, ("zeros", "dense file", "sparse file", "ratio")),
}


def show(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """Print a table in Markdown."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    for number, row in enumerate((header, *rows)):
        print("| " + " | ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) + " |")
        if not number:
            print("|" + "|".join("-" * (width + 2) for width in widths) + "|")
    print(flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", default="all", choices=["all", "one", *TABLES])
    parser.add_argument("--method", choices=METHODS, help=argparse.SUPPRESS)
    parser.add_argument("--millions", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if arguments.what == "one":
        print(json.dumps(one_selection(arguments.method, arguments.millions)))
        return
    for name in TABLES if arguments.what == "all" else [arguments.what]:
        make, header = TABLES[name]
        show(header, make())


if __name__ == "__main__":
    main()
