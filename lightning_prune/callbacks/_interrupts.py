"""Ctrl-C waits while a model is being changed."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["waiting_interrupts"]


@contextmanager
def waiting_interrupts() -> Iterator[None]:
    """The first Ctrl-C takes effect at the end, also where an error comes before it; a second one does at once.

    Python would raise KeyboardInterrupt between any two lines, also while hooks are taken out or a change is undone,
    and no ``finally`` is proof against that. Signals arrive in the main thread: elsewhere there is nothing to wait for.
    """
    before: Any = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    came = False

    def wait(number: int, frame: Any) -> None:
        nonlocal came
        if came:
            before(number, frame)
        came = True

    signal.signal(signal.SIGINT, wait)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if came:
            before(signal.SIGINT, None)
