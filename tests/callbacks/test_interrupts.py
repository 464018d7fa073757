"""Ctrl-C in the middle of a removal."""

import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from lightning_modules import LIGHTNING_WARNINGS, Task, fit, left_hooks, mlp, seeded
from torch.utils.hooks import RemovableHandle

from lightning_prune import NeuronPruning
from lightning_prune.callbacks._interrupts import waiting_interrupts

pytestmark = [*LIGHTNING_WARNINGS]


@pytest.fixture(autouse=True)
def _heard() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt: pytest's workers ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("options", [{}, {"remove": "end"}, {"recalibrate": 2}], ids=str)
@pytest.mark.parametrize("place", [1, 3, 10, 14])
def test_ctrl_c_while_hooks_are_taken_out(options: dict[str, Any], place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two of them nothing of Python's own would take out the rest."""
    remove, removals = RemovableHandle.remove, 0

    def remove_and_interrupt(handle: RemovableHandle) -> None:
        nonlocal removals
        remove(handle)
        removals += 1
        if removals == place:
            interrupt()

    module = seeded(lambda: Task(mlp(6, 16, 12, 4), batches=4))
    pruning = NeuronPruning(0.5, end=1.0, report=False, **options)

    monkeypatch.setattr(RemovableHandle, "remove", remove_and_interrupt)
    with pytest.raises(SystemExit):  # Lightning's answer to KeyboardInterrupt
        fit(module, pruning, max_epochs=1)
    monkeypatch.setattr(RemovableHandle, "remove", remove)
    assert not left_hooks(module.trainer, module)
    assert "training_step" not in vars(module)
    held = [p for group in module.trainer.optimizers[0].param_groups for p in group["params"]]
    assert all(a is b for a, b in zip(held, module.parameters(), strict=True))
    module.net(torch.randn(2, 6)).sum().backward()
    module.trainer.optimizers[0].step()


def sent(interrupts: int, done: list[int], error: Exception | None = None) -> None:
    """So many of them while one waits."""
    with waiting_interrupts():
        for _ in range(interrupts):
            interrupt()
        if error is not None:
            raise error
        done.append(interrupts)


def test_the_first_interrupt_waits_and_the_second_does_not() -> None:
    done: list[int] = []
    for interrupts, error in ((1, None), (2, None), (1, ValueError("its own"))):
        with pytest.raises(KeyboardInterrupt) as raised:
            sent(interrupts, done, error)
        assert error is None or raised.value.__context__ is error
    assert done == [1]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_in_another_thread_nothing_waits() -> None:
    done: list[int] = []

    def work() -> None:
        with waiting_interrupts():
            done.append(1)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [1]
