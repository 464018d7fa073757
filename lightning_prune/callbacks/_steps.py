"""Optimizer steps: act on gradients when they are there, whoever runs the backward."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

__all__ = ["before_steps"]


def before_steps(optimizers: Iterable[Optimizer], act: Callable[[Optimizer], None]) -> list[RemovableHandle]:
    """Call ``act`` with the optimizer before each of its steps, when the gradients of that step are there.

    Lightning's automatic optimization runs the backward inside the step, in a closure: then ``act`` comes after it.
    """

    def hook(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        closure = args[1] if len(args) > 1 else kwargs.get("closure")  # the first is the optimizer
        if closure is None:
            act(optimizer)
            return None

        def last() -> Any:
            result = closure()  # Lightning's runs hooks and clips in here
            act(optimizer)
            return result

        return ((args[0], last, *args[2:]), kwargs) if len(args) > 1 else (args, kwargs | {"closure": last})

    return [optimizer.register_step_pre_hook(hook) for optimizer in optimizers]
