"""A progress bar for long work outside of training."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch

__all__ = ["Bar", "progress_bar"]


class Bar(Protocol):
    """What takes steps."""

    def update(self, n: float = 1) -> bool | None:
        """So many steps more are done."""


class _NoBar:
    def update(self, n: float = 1) -> bool | None:
        return None


@contextmanager
def progress_bar(total: int, name: str, shown: bool | None = None) -> Iterator[Bar]:
    """A bar on standard error while the work inside goes on.

    Args:
        total: Number of steps.
        name: What the work is.
        shown: None: if standard error is a terminal. Only the first of several processes shows one.
    """
    wanted = sys.stderr is not None and sys.stderr.isatty() if shown is None else shown
    if not wanted or _rank():
        yield _NoBar()
        return
    from tqdm.auto import tqdm  # Lightning's own bars are tqdm's, so it is there

    with tqdm(total=total, desc=name, leave=False, dynamic_ncols=True) as bar:
        yield bar


def _rank() -> int:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank()
    return int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) or 0)
