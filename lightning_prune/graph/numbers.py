"""Numbers that a run calculates with, for telling whether they depend on the size of what is pruned.

Python hides some calculations with a size from whoever watches it: ``1.0 / x.size(1)``, ``math.log(n)``, ``len(x)``.
What comes of them meets a tensor in the end, and there the masked model and the pruned one can be compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_prune.graph.callsites import ModuleCall, ModuleStack
from lightning_prune.graph.operations import OperationMode
from lightning_prune.graph.run import run_calls

__all__ = ["NumberRecorder", "Numbers", "numbers_of", "where_numbers_differ"]

Numbers = list[tuple[str, str, tuple[Any, ...]]]
"""Of each call that takes any: the operation, the innermost running module, the numbers."""

_aten = torch.ops.aten
_FILLED = {_aten.full: 1, _aten.new_full: 2, _aten.full_like: 1, _aten.fill: 1, _aten.fill_: 1, _aten.scalar_tensor: 0}
"""Operations that make a tensor of one number, and where it is among their arguments."""

SMALL = 64
"""Elements of the tensors of constants that are looked at."""


class NumberRecorder(OperationMode):
    """Notes the numbers that a run calculates with, up to the first one that it reads from a tensor of fractions.

    Those that come of such a one differ by rounding from run to run.

    Attributes:
        found: What was noted.
    """

    def __init__(self, stack: ModuleStack | None = None) -> None:
        """Take the stack of running modules, where these are to be told."""
        super().__init__()
        self.found: Numbers = []
        self._stack, self._read = stack, False

    def operation(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run it, and note its numbers."""
        out = func(*args, **kwargs)
        packet = func.overloadpacket
        if packet is _aten._local_scalar_dense and args[0].is_floating_point():
            self._read = True
        numbers = () if self._read else tuple(_numbers(func, packet, args, kwargs, out))
        if numbers:
            self.found.append((packet.__name__, self._stack.path if self._stack else "", numbers))
        return out


def _numbers(func: Any, packet: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> list[Any]:
    """The numbers that fractions are made with: integers too where they can be neither sizes nor places."""
    fractions = isinstance(out, Tensor) and out.is_floating_point()
    if packet in (_aten.lift_fresh, _aten.lift):  # torch.tensor(...)
        return out.flatten().tolist() if fractions and out.numel() <= SMALL else []
    if packet in _FILLED:
        return list(args[_FILLED[packet] :][:1]) if fractions else []
    leaves = pytree.arg_tree_leaves(*args, **kwargs)
    if not fractions or torch.Tag.pointwise not in func.tags:
        return [leaf for leaf in leaves if isinstance(leaf, float)]
    wholes = [leaf.item() if isinstance(leaf, Tensor) and _is_whole(leaf) else leaf for leaf in leaves]
    return [leaf for leaf in wholes if isinstance(leaf, (int, float))]


def _is_whole(tensor: Tensor) -> bool:
    """Whether this is one integer, such as ``torch.tensor(len(x))``."""
    integer = not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)
    return tensor.dim() == 0 and integer and tensor.device.type == "cpu"


def numbers_of(model: nn.Module, calls: Sequence[ModuleCall]) -> Numbers:
    """Run the model's calls again and note the numbers that they calculate with, and where."""
    stack = ModuleStack(model)
    recorder = NumberRecorder(stack)
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
        if repr(one[2]) != repr(other[2]):  # no NaN is equal to itself
            return one[1] or "the model itself"
    return None
