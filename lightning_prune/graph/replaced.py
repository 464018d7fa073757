"""Calls of activation functions in a forward: which functions count, and others run in their place.

The k-th call is told by the function's name and its number among the calls that the module's own forward makes.
Calls inside child modules are not counted, so a child that runs in training only shifts no number: children that
call such functions are *shielded*, which keeps the modes of the modules around them away. Activation modules
(``nn.ReLU``) are no such children; a call through one counts as a call of the module around it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

__all__ = [
    "ALL_CALLS",
    "ActivationFunction",
    "CallReplacer",
    "Replacement",
    "activation_function",
    "outer_replacers",
    "shielded",
]

ALL_CALLS = -1
"""In the place of a call's number: every call of the function."""


@dataclass(frozen=True)
class ActivationFunction:
    """An activation function under one of its names.

    Attributes:
        name: What it is counted as.
        plain: The same, not in place.
        in_place: Whether this form always works in place.
        at: Where ``inplace`` stands among the positional arguments; -1: nowhere.
        arguments: Names of its further positional arguments.
    """

    name: str
    plain: Callable[..., Tensor]
    in_place: bool = False
    at: int = -1
    arguments: tuple[str, ...] = ()

    def works_in_place(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Whether a call changes its input."""
        return self.in_place or bool(kwargs.get("inplace")) or (0 < self.at < len(args) and bool(args[self.at]))

    def settings(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The further arguments of a call, by name."""
        given = dict(zip(self.arguments, args[1:], strict=False)) | dict(kwargs)
        return {name: value for name, value in given.items() if name not in ("inplace", "input")}


def _table() -> dict[Callable[..., Any], ActivationFunction]:
    table: dict[Callable[..., Any], ActivationFunction] = {}
    # name: arguments between the input and `inplace`, and whether there is an `inplace`.
    functional: dict[str, tuple[tuple[str, ...], bool]] = {
        "relu": ((), True),
        "relu6": ((), True),
        "leaky_relu": (("negative_slope",), True),
        "elu": (("alpha",), True),
        "celu": (("alpha",), True),
        "selu": ((), True),
        "silu": ((), True),
        "mish": ((), True),
        "hardswish": ((), True),
        "hardsigmoid": ((), True),
        "hardtanh": (("min_val", "max_val"), True),
        "threshold": (("threshold", "value"), True),
        "gelu": (("approximate",), False),
        "softplus": (("beta", "threshold"), False),
        "softsign": ((), False),
        "tanhshrink": ((), False),
        "tanh": ((), False),
        "sigmoid": ((), False),
    }
    for name, (arguments, has_inplace) in functional.items():
        plain = getattr(torch, name, None) if name in ("tanh", "sigmoid") else getattr(F, name)
        at = len(arguments) + 1 if has_inplace else -1
        for owner in (F, torch, Tensor):
            if hasattr(owner, name):
                table[getattr(owner, name)] = ActivationFunction(name, plain, False, at, arguments)  # type: ignore[arg-type]
            if hasattr(owner, f"{name}_"):
                form = ActivationFunction(name, plain, True, -1, arguments)  # type: ignore[arg-type]
                table[getattr(owner, f"{name}_")] = form
    return table


_TABLE = _table()


def activation_function(function: Callable[..., Any]) -> ActivationFunction | None:
    """The entry that a torch function belongs to; None: it is no activation."""
    try:
        return _TABLE.get(function)
    except TypeError:  # unhashable: none of ours
        return None


@dataclass(frozen=True)
class Replacement:
    """What runs in the place of a call.

    Attributes:
        function: ``function(x)`` of the input; ``function(x, own)`` if ``with_own``.
        in_place: Whether the forward goes on to use the input of a call that works in place.
        with_own: Whether the function is given what the forward itself would have called, too.
    """

    function: Callable[..., Tensor]
    in_place: bool = False
    with_own: bool = False


class CallReplacer(TorchFunctionMode):
    """Counts the activation functions that one module's own forward calls and runs others in their place.

    Attributes:
        counts: Calls so far by name; ``""`` is how many shielded children are running.
    """

    def __init__(self, replacements: Mapping[tuple[str, int], Replacement]) -> None:
        super().__init__()
        self.replacements = replacements
        # A dict, because torch.compile may not replay changed attributes of a mode.
        self.counts: dict[str, int] = {"": 0}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        entry = _TABLE.get(func)  # every function that the forward calls comes through here: as little as can be
        if entry is None or self.counts[""]:
            return func(*args, **kwargs) if kwargs else func(*args)
        kwargs = kwargs or {}
        if "out" in kwargs:  # it writes somewhere else; no site
            return func(*args, **kwargs)
        number = self.counts.get(entry.name, 0)
        self.counts[entry.name] = number + 1
        replacement = self.replacements.get((entry.name, number)) or self.replacements.get((entry.name, ALL_CALLS))
        if replacement is None:
            return func(*args, **kwargs)
        x = args[0] if args else kwargs["input"]
        own = (partial(_own, entry, args, kwargs),) if replacement.with_own else ()
        if replacement.in_place and entry.works_in_place(args, kwargs):
            return x.copy_(replacement.function(x.clone(), *own))  # functions may need the old value in the backward
        return replacement.function(x, *own)


def _own(entry: ActivationFunction, args: tuple[Any, ...], kwargs: Mapping[str, Any], x: Tensor) -> Tensor:
    """What the forward itself would have called with these arguments, of ``x`` and not in place."""
    return entry.plain(x, **entry.settings(args, kwargs))


@contextmanager
def shielded() -> Iterator[None]:
    """Inside, the modules around don't count calls; those whose mode is on top don't see them, which costs nothing."""
    taken = []
    while torch._C._len_torch_function_stack() > 0:
        mode = torch.overrides._pop_mode()
        if not isinstance(mode, CallReplacer):
            torch.overrides._push_mode(mode)
            break
        taken.append(mode)
    below = outer_replacers()
    for mode in below:
        mode.counts[""] += 1
    try:
        yield
    finally:
        for mode in below:
            mode.counts[""] -= 1
        for mode in reversed(taken):
            torch.overrides._push_mode(mode)


def outer_replacers() -> list[CallReplacer]:
    """The modes of the modules around the one that is about to run."""
    modes = torch.overrides._get_current_function_mode_stack()
    return [mode for mode in modes if isinstance(mode, CallReplacer)]
