"""Numbers that a run calculates with, for telling whether they depend on the size of what is pruned.

Python hides some calculations with a size from whoever watches it: ``1.0 / x.size(1)``, ``math.log(n)``, ``len(x)``.
What comes of them meets a tensor in the end, and there the whole model and the pruned one can be compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_prune.graph.callsites import ModuleCall, ModuleStack
from lightning_prune.graph.run import run_calls

__all__ = ["numbers_of", "where_numbers_differ"]

Numbers = list[tuple[str, str, tuple[Any, ...]]]
"""Of each call that takes any: the operation, the innermost running module, the numbers."""

_aten = torch.ops.aten
_FILLED = {_aten.full: 1, _aten.new_full: 2, _aten.full_like: 1, _aten.fill: 1, _aten.fill_: 1, _aten.scalar_tensor: 0}
"""Operations that make a tensor of one number, and where it is among their arguments."""

SMALL = 64
"""Elements of the tensors of constants that are looked at."""


class _Recorder(TorchDispatchMode):
    def __init__(self, stack: ModuleStack) -> None:
        TorchDispatchMode.__init__(self)
        self.stack = stack
        self.found: Numbers = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        numbers = tuple(_numbers(func, args, kwargs, out))
        if numbers:
            self.found.append((func.overloadpacket.__name__, self.stack.path, numbers))
        return out


def _numbers(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> list[Any]:
    """The numbers among the arguments of a call: integers too where they can't be sizes."""
    packet = func.overloadpacket
    if packet in (_aten.lift_fresh, _aten.lift):  # torch.tensor(...)
        return out.flatten().tolist() if isinstance(out, Tensor) and out.numel() <= SMALL else []
    if packet in _FILLED:
        return list(args[_FILLED[packet] :][:1])
    whole = torch.Tag.pointwise in func.tags
    leaves = pytree.arg_tree_leaves(*args, **kwargs)
    return [leaf for leaf in leaves if isinstance(leaf, (int, float) if whole else float)]


def numbers_of(model: nn.Module, calls: Sequence[ModuleCall]) -> Numbers:
    """Run the model's calls again and note the numbers that they calculate with."""
    stack = ModuleStack(model)
    recorder = _Recorder(stack)
    with stack.watch(), recorder:
        run_calls(model, calls)
    return recorder.found


def where_numbers_differ(whole: Numbers, pruned: Numbers) -> str | None:
    """The module that first calculates with another number when pruned, None if none does.

    Where a run takes another way than before, what comes behind can't be compared.
    """
    for one, other in zip_longest(whole, pruned):
        if one is None or other is None or one[:2] != other[:2]:
            return None
        if one[2] != other[2]:
            return one[1] or "the model itself"
    return None
