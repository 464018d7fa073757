"""Trainings with NeuronPruning that are killed and resumed. As a script: ``python neuron_cases.py FOLDER KILLS``.

Imports once and forks before anything was run: each attempt is a process of its own that knows nothing of the others,
and costs no import. Kills = 0 runs every case without an interruption.
"""

from __future__ import annotations

import functools
import os
import random
import signal
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from families import FAMILIES, Alike, Gan, ResNet, lstm
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_modules import (
    ADAMW,
    CLASSES,
    IMAGE,
    Spy,
    Task,
    WithForward,
    conv_net,
    fit,
    neurons,
    optimizer_states,
    seeded,
    snapshot,
    trainer_of,
    weights,
)
from torch import Tensor, nn

PAUSE = 0.02
"""Seconds after each batch of a training that is to be killed."""


class AlikeLSTM(Alike, WithForward):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(lstm().net, shape=(6, 5), **kwargs)


class AlikeGan(Alike, Gan):
    """The same noise in every batch."""


@dataclass(frozen=True)
class Case:
    """One training; ``steps``: save so often, else at the end of each epoch."""

    make: Callable[..., Any]
    callbacks: Callable[[], list[Any]]
    steps: int | None = None
    ranks: int = 1
    options: dict[str, Any] = field(default_factory=dict)

    def run(self, folder: Path, kills: int, rank: int, pause: float) -> None:
        """Train from the last checkpoint on, and tell what came out of it."""
        last, seed = folder / "last.ckpt", rank + 10 * len(list(folder.glob("log*")))
        module, pruning = seeded(lambda: self.make(optimizer=ADAMW), seed if last.exists() else 0), self.callbacks()
        when: dict[str, Any] = {"every_n_train_steps": self.steps} if self.steps else {"every_n_epochs": 1}
        saver = ModelCheckpoint(folder, save_last=True, **when)
        spy = Spy(on_train_batch_end=lambda *_: time.sleep(pause))
        options = dict(self.options) | {"max_epochs": kills + 3}
        if self.ranks > 1:
            options |= {"strategy": "ddp", "devices": self.ranks}
        trainer = fit(module, *pruning, spy, saver, ckpt_path=last if last.exists() else None, **options)
        result = {
            "weights": snapshot(module),
            "optimizers": optimizer_states(trainer),
            "callbacks": [callback.state_dict() for callback in pruning],
            "step": trainer.global_step,
        }
        torch.save(result, folder / f"done-{rank}.pt")


def step_lr(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)


slowly = functools.partial(neurons, 0.5, schedule="linear", end=0.8)
CASES = {
    "resnet": Case(functools.partial(FAMILIES["resnet"], scheduler=step_lr, batches=3), lambda: [slowly(of="macs")]),
    "transformer": Case(functools.partial(FAMILIES["transformer"], batches=3), lambda: [slowly(exact_only=True)]),
    "gan": Case(functools.partial(Gan, batches=3), lambda: [slowly()]),
    "unet": Case(functools.partial(FAMILIES["unet"], batches=3), lambda: [slowly(scope="layer")]),
    "weights too": Case(
        lambda **o: Task(conv_net(), shape=IMAGE, batches=3, **o), lambda: [weights(0.5, end=1.0), slowly()]
    ),
    "lstm by steps": Case(functools.partial(AlikeLSTM, batches=7), lambda: [slowly(every=3)], steps=4),
    "gan by steps": Case(functools.partial(AlikeGan, batches=7), lambda: [slowly(every=4)], steps=4),
    "ddp resnet": Case(
        lambda **o: WithForward(ResNet(), shape=IMAGE, batches=4, **o), lambda: [slowly(of="params")], ranks=2
    ),
    "ddp lstm by steps": Case(functools.partial(AlikeLSTM, batches=14), lambda: [slowly(every=3)], steps=4, ranks=2),
}


QUICK = ("gan", "lstm by steps", "ddp lstm by steps")
"""Those that run where LIGHTNING_PRUNE_KILLS doesn't ask for all."""


def asked_for() -> dict[str, Case]:
    """The cases to run."""
    return CASES if "LIGHTNING_PRUNE_KILLS" in os.environ else {name: CASES[name] for name in QUICK}


def child(work: Callable[[], None], log: Path, environment: dict[str, str]) -> int:
    """The id of a forked process that does some work."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        os.environ.update(environment)
        with log.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        work()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def children(work: Callable[[int], None], ranks: int, log: Path) -> list[int]:
    """As many processes as there are ranks, which find each other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    found = []
    for rank in range(ranks):
        each = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(ranks)}
        each |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0"}
        place = log.with_name(f"{log.name}-{rank}")
        found.append(child(functools.partial(work, rank), place, each if ranks > 1 else {}))
    return found


def wait(pids: list[int], seconds: float = 60.0) -> list[int]:
    """Exit statuses, negative for signals; what doesn't end is killed."""
    statuses: dict[int, int] = {}
    until = time.monotonic() + seconds
    while len(statuses) < len(pids):
        for pid in pids:
            if pid not in statuses:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    statuses[pid] = os.waitstatus_to_exitcode(status)
                elif time.monotonic() > until:
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.002)
    return [statuses[pid] for pid in pids]


def ended(pid: int) -> bool:
    """Whether a process is over; it can still be waited for."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def interrupted(case: Case, folder: Path, kills: int, asked: int, chance: random.Random) -> None:
    """Run a case in processes that are killed so many times at random moments."""
    folder.mkdir()
    last = folder / "last.ckpt"
    for left in range(kills, -1, -1):
        before = last.stat().st_mtime_ns if last.exists() else 0
        work = functools.partial(case.run, folder, asked, pause=PAUSE if left else 0.0)
        pids = children(lambda rank, work=work: work(rank=rank), case.ranks, folder / f"log{kills - left}")  # type: ignore[misc]
        expected = 0
        if left:
            while not ended(pids[0]) and (not last.exists() or last.stat().st_mtime_ns == before):
                time.sleep(0.001)
            time.sleep(chance.uniform(0, 4 * PAUSE))
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
            expected = -signal.SIGKILL
        statuses = wait(pids)
        if statuses != [expected] * len(pids):
            logs = "".join(path.read_text()[-3000:] for path in sorted(folder.glob(f"log{kills - left}-*")))
            (folder / "failed").write_text(f"{statuses} after {kills - left} kills\n{logs}")
            return


# -- processes with different models ---------------------------------------------------------------------------------


class Differs(nn.Module):
    """Two layers of the same width, one after the other or beside a shortcut."""

    def __init__(self, width: int, shortcut: bool) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, width), nn.Linear(width, width), nn.Linear(width, CLASSES)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).tanh()
        return self.head(self.second(x).tanh() + x if self.shortcut else self.second(x).tanh())  # type: ignore[no-any-return]


DIFFERENT = {
    "widths": lambda rank: Differs(8 + 2 * rank, False),
    "forwards": lambda rank: Differs(8, rank == 0),
}


def different(name: str, rank: int) -> None:
    module = seeded(lambda: Task(DIFFERENT[name](rank)))
    fit(module, neurons(0.5), strategy="ddp", devices=2)


# -- evaluated in a process that has not trained ------------------------------------------------------------------------


def evaluate(folder: Path) -> None:
    """Metrics and predictions of each checkpoint of each family."""
    for name, make in FAMILIES.items():
        found = {}
        for path in sorted((folder / name).glob("*.ckpt")):
            trainer, module = trainer_of(neurons(0.9)), seeded(make, 9)
            (validated,) = trainer.validate(module, ckpt_path=path, verbose=False)
            module = seeded(make, 8)
            (tested,) = trainer.test(module, ckpt_path=path, verbose=False)
            found[path.name] = {"validate": validated, "test": tested, "weights": snapshot(module)}
            if name != "gan":
                found[path.name]["predict"] = trainer.predict(seeded(make, 7), ckpt_path=path)
        torch.save(found, folder / f"{name}.pt")


def main(folder: Path, kills: int) -> None:
    """Run every case; kills < 0: the other two parts."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if kills < 0:
        for name in DIFFERENT:
            wait(children(functools.partial(different, name), 2, folder / f"different-{name}"), 30)
        evaluate(folder)
        return
    for name, case in asked_for().items():
        asked = int(os.environ.get("LIGHTNING_PRUNE_KILLS", "2"))
        if case.steps:  # killed 20 times in mid-epoch, lightning makes 177 steps of 161 without any callback of ours
            asked = min(asked, 2)
        interrupted(case, folder / name, min(kills, asked), asked, random.Random(name))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
