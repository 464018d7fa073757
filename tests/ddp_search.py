"""Searches on two processes: ``python ddp_search.py FOLDER``."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning_modules import (
    IMAGE,
    Manual,
    SmallLiteralView,
    Spy,
    Task,
    conv_net,
    fit,
    optimizer_states,
    seeded,
    snapshot,
)

from lightning_prune import ActivationSearch

CASES: dict[str, Any] = {
    "modules": (lambda: Task(conv_net(), shape=IMAGE), {}),
    "functions": (lambda: Task(SmallLiteralView(), shape=IMAGE), {"threshold": "channel"}),
    "training batches": (lambda: Task(SmallLiteralView(), shape=IMAGE), {"held_out": 0}),
    "manual": (Manual, {}),
    "trial": (lambda: Task(conv_net(), shape=IMAGE), {"mode": "trial"}),
    "trial by cost": (lambda: Task(SmallLiteralView(), shape=IMAGE, batches=8), {"mode": "trial", "trial_steps": None}),
}


def main(folder: Path) -> None:
    """Run every case on two processes, each starting from other weights and another random state."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for name, (make, options) in CASES.items():
        callback = ActivationSearch(("gelu", "sigmoid", "relu"), lr=0.5, report=False, **{"trial_steps": 2} | options)
        module = seeded(make)
        middle: list[Any] = []

        def look(trainer: Any, module: Any, callback: Any = callback, middle: list[Any] = middle) -> None:
            if callback._mixture is not None:
                middle.append([leaf.detach().clone() for leaf in callback._mixture.leaves])

        differ = Spy(on_fit_start=lambda t, _: torch.manual_seed(t.global_rank))
        trainer = fit(module, callback, differ, Spy(on_train_batch_start=look), strategy="ddp", devices=2, max_epochs=4)
        state = callback.state_dict()
        result = {
            "weights": snapshot(module),
            "optimizers": optimizer_states(trainer),
            "state": state,
            "middle": middle,
        }
        torch.save(result | {"repr": repr(module)}, folder / f"{name}-{trainer.global_rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
