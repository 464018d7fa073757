"""Watching the ATen operations of a run."""

from __future__ import annotations

import sys
from abc import abstractmethod
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch._C import DispatchKey
from torch._ops import HigherOrderOperator
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["OperationMode", "as_written"]

COMPILER = "torch._dynamo"


def as_written() -> AbstractContextManager[Any]:
    """Inside, compiled functions run as they are written: what is compiled can't be watched."""
    # Where the compiler is not loaded nothing is compiled, and to load it takes long.
    return torch.compiler.set_stance("force_eager") if COMPILER in sys.modules else nullcontext()


class OperationMode(TorchDispatchMode):
    """Inside, `operation` takes the place of every ATen operation.

    Operations that take functions (`flex_attention`, `torch.cond`) do not come there, but what they run does. Compiled
    functions run as they are written: torch compiles none in here, and refuses those of one graph.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        TorchDispatchMode.__init__(self)
        self._entered: list[AbstractContextManager[Any]] = []

    def __enter__(self) -> Any:
        self._entered.append(nullcontext() if self._entered else as_written())
        self._entered[-1].__enter__()
        return TorchDispatchMode.__enter__(self)

    def __exit__(self, *error: Any) -> None:
        TorchDispatchMode.__exit__(self, *error)
        self._entered.pop().__exit__(*error)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not isinstance(func, HigherOrderOperator):
            return self.operation(func, args, kwargs)
        if func is torch.ops.higher_order.cond:  # whose kernel wants no mode
            where, whether_true, whether_false, inputs = args
            with self:
                return (whether_true if where else whether_false)(*inputs)
        kernel = func.py_kernels.get(DispatchKey.CompositeExplicitAutograd)
        if kernel is None:
            return func(*args, **kwargs)
        with self:
            return kernel(*args, **kwargs)

    @abstractmethod
    def operation(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation, or do something else, and give what comes of it."""

    def decomposed(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What an operation gives whose parts run instead; NotImplemented where it has none.

        In inference mode composite operations arrive whole.
        """
        if func.namespace != "aten":
            return NotImplemented
        with self:
            return func.decompose(*args, **kwargs)
