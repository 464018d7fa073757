"""Trainings that two processes and one run alike. As a script: ``python ddp_cases.py FOLDER`` runs them with DDP."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_modules import (
    ADAMW,
    IMAGE,
    Manual,
    Residual,
    SmallLiteralView,
    Spy,
    Task,
    WithExampleArray,
    conv_net,
    fit,
    mlp,
    neurons,
    optimizer_states,
    seeded,
    snapshot,
    weights,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_prune import NeuronPruning, WeightPruning
from lightning_prune.pruning.latency import latencies


def run_script(script: Path, *arguments: Path) -> subprocess.CompletedProcess[str]:
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    return subprocess.run(
        [sys.executable, script, *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )


class Noisy(Task):
    """Every process draws its own numbers: shuffling, noise, dropout."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step([batch[0] + torch.randn_like(batch[0]), batch[1]], batch_idx)

    def train_dataloader(self) -> Any:
        return DataLoader(self.data, batch_size=self.batch_size, shuffle=True)


class Routed(Task):
    """Each process runs another head in a batch, and none of them runs all in its first one."""

    def __init__(self, **options: Any) -> None:
        super().__init__(mlp(6, 12, 10), **options)
        self.heads = nn.ModuleList(mlp(10, 8, 4) for _ in range(3))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        head = self.heads[(batch_idx + self.global_rank) % len(self.heads)]
        return F.cross_entropy(head(self.net(batch[0])), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        logits = sum(head(self.net(batch[0])) for head in self.heads)
        accuracy = (logits.argmax(1) == batch[1]).to(logits.dtype).mean()
        self.log_dict({"val_loss": F.cross_entropy(logits, batch[1]), "val_acc": accuracy}, sync_dist=True)


@dataclass(frozen=True)
class Case:
    """One training; ``same`` where one process with the whole batch must give the same weights."""

    make: Callable[..., Task]
    callbacks: Callable[[], list[Any]]
    options: dict[str, Any] = field(default_factory=dict)
    same: bool = True
    strategy: str = "ddp"

    def run(self, *callbacks: Any, seed: int, batch_size: int, **options: Any) -> dict[str, Any]:
        """Train, and tell everything that the processes must agree on."""
        module = seeded(lambda: self.make(batch_size=batch_size, batches=64 // batch_size), seed)
        pruning = self.callbacks()
        trainer = fit(
            module, *pruning, *callbacks, **{"precision": "64-true", "max_epochs": 4} | self.options | options
        )
        return {
            "weights": snapshot(module),
            "optimizers": optimizer_states(trainer),
            "callbacks": [callback.state_dict() for callback in pruning],
        }


CASES = {
    "weights": Case(lambda **o: Task(optimizer=ADAMW, **o), lambda: [weights(0.5, end=1.0)]),
    "neurons": Case(lambda **o: Task(conv_net(), shape=IMAGE, **o), lambda: [neurons(0.5, end=1.0)]),
    "literal view": Case(
        lambda **o: Task(SmallLiteralView(), shape=IMAGE, optimizer=ADAMW, **o), lambda: [neurons(0.5, of="macs")]
    ),
    "example array": Case(lambda **o: WithExampleArray(**o), lambda: [neurons(0.5)]),
    "both": Case(
        lambda **o: Task(conv_net(), shape=IMAGE, **o), lambda: [weights(0.5, end=1.0), neurons(0.5, end=1.0)]
    ),
    "manual": Case(lambda **o: Manual(**o), lambda: [neurons(0.5), weights(0.3)]),
    "accumulate": Case(lambda **o: Task(**o), lambda: [neurons(0.5), weights(0.3)], {"accumulate_grad_batches": 3}),
    "every": Case(lambda **o: Task(**o), lambda: [neurons(0.5, every=2), weights(0.3, every=3)], {"max_steps": 10}),
    "taylor": Case(lambda **o: Task(conv_net(), shape=IMAGE, **o), lambda: [neurons(0.5, criterion="taylor")]),
    "activation": Case(
        lambda **o: Task(conv_net(), shape=IMAGE, **o), lambda: [neurons(0.5, criterion="activation", every=3)]
    ),
    "masked until the end": Case(
        lambda **o: Task(conv_net(), shape=IMAGE, optimizer=ADAMW, **o), lambda: [neurons(0.5, remove="end")]
    ),
    "random neurons": Case(lambda **o: Task(**o), lambda: [neurons(0.5, criterion="random")], same=False),
    "repaired": Case(
        lambda **o: Task(conv_net(), shape=IMAGE, **o), lambda: [neurons(0.5, compensate="least_squares")], same=False
    ),
    "sensitivity": Case(
        lambda **o: Task(conv_net(), shape=IMAGE, **o), lambda: [neurons(0.5, scope="sensitivity")], same=False
    ),
    "recalibrated": Case(
        lambda **o: Task(Residual(), shape=IMAGE, **o), lambda: [neurons(0.5, recalibrate=3)], same=False
    ),
    "batch norm": Case(
        lambda **o: Task(Residual(), shape=IMAGE, **o), lambda: [neurons(0.5), weights(0.3)], same=False
    ),
    "routes": Case(
        lambda **o: Routed(**o), lambda: [neurons(0.5)], same=False, strategy="ddp_find_unused_parameters_true"
    ),
    "routes at every step": Case(
        lambda **o: Routed(**o),
        lambda: [neurons(0.5, every=1, criterion="taylor")],
        same=False,
        strategy="ddp_find_unused_parameters_true",
    ),
    "own random numbers": Case(
        lambda **o: Noisy(Residual(0.25), shape=IMAGE, **o), lambda: [neurons(0.5), weights(0.3)], same=False
    ),
}


def main(folder: Path) -> None:
    """Run every case on two processes, each starting from other weights and another random state."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    latencies.__kwdefaults__["seconds"] = 0.0
    ddp = {"strategy": "ddp", "devices": 2}
    for name, case in CASES.items():
        # The launcher of the first fit starts the second process, which then comes here from the top.
        start = Spy(on_fit_start=lambda t, _: torch.manual_seed(t.global_rank))
        result = case.run(start, seed=0, batch_size=8, **{**ddp, "strategy": case.strategy})
        torch.save(result, folder / f"{name}-{torch.distributed.get_rank()}.pt")

    halt = Spy(on_train_epoch_end=lambda t, _: setattr(t, "should_stop", t.current_epoch == 1))
    saver = ModelCheckpoint(folder / "saved", save_last=True)
    single = {**ddp, "precision": "32-true"}  # Lightning rounds what it loads with "64-true" to float32
    CASES["both"].run(halt, saver, seed=0, batch_size=8, **single)
    for name, seed, path in (("whole", 0, None), ("resumed", 5, folder / "saved" / "last.ckpt")):
        result = CASES["both"].run(seed=seed, batch_size=8, ckpt_path=path, **single)
        torch.save(result, folder / f"{name}-{torch.distributed.get_rank()}.pt")

    pruning = [NeuronPruning(0.5), WeightPruning(0.3)]
    trainer = fit(seeded(Task), *pruning, **ddp)
    told = [callback.report_ for callback in pruning]
    torch.save(
        [None if report is None else str(report) for report in told], folder / f"report-{trainer.global_rank}.pt"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
