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
from torch.overrides import TorchFunctionMode

from lightning_prune.graph.callsites import ModuleCall, ModuleStack
from lightning_prune.graph.operations import as_written
from lightning_prune.graph.run import run_calls

__all__ = ["NumberRecorder", "Numbers", "numbers_of", "where_numbers_differ"]

Numbers = list[tuple[str, str, Sequence[Any]]]
"""Of each call that takes any: the function, the innermost running module, the numbers."""

_ARITHMETIC = """
    add addbmm addcdiv addcmul addmm addmv addr atan2 baddbmm bfloat16 celu clamp clamp_max clamp_min clip copysign
    div divide double elu fill float float_power floor_divide floordiv fmax fmin fmod full full_like half hardshrink
    hardtanh hypot iadd idiv ifloordiv imod imul ipow isub itruediv ldexp leaky_relu lerp masked_fill max
    maximum min minimum mod mul multiply nan_to_num new_full pad pow radd rdiv remainder rfloordiv rmod rmul rpow rsub
    rtruediv softplus softshrink sub subtract threshold to true_divide truediv type type_as where xlogy
"""
ARITHMETIC = frozenset(_ARITHMETIC.split())
"""Names of functions whose integers are neither sizes nor places, without underscores around them."""

MAKERS = frozenset({"as_tensor", "new_tensor", "scalar_tensor", "tensor"})
"""Names of functions that make tensors of numbers."""

SMALL = 64
"""Elements of the tensors of constants that are looked at."""

READS = frozenset({"__array__", "__complex__", "__float__", "item", "numpy", "tolist"})
"""Names of functions that give what a tensor holds."""


class NumberRecorder(TorchFunctionMode):
    """Notes the numbers that a run calculates with, up to the first one that it reads from a tensor of fractions.

    Those that come of such a one differ by rounding from run to run.

    Attributes:
        found: What was noted.
    """

    def __init__(self, stack: ModuleStack | None = None) -> None:
        """Take the stack of running modules, where these are to be told."""
        super().__init__()
        self.found: Numbers = []
        self._stack, self._read, self._as_written = stack, False, as_written()

    def __enter__(self) -> NumberRecorder:
        self._as_written.__enter__()
        TorchFunctionMode.__enter__(self)
        return self

    def __exit__(self, *error: Any) -> None:
        TorchFunctionMode.__exit__(self, *error)
        self._as_written.__exit__(*error)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run a function, and note its numbers."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if self._read:
            return out
        own = getattr(func, "__name__", "")
        if own in READS and args and isinstance(args[0], Tensor) and args[0].is_floating_point():
            self._read = True
        name = own.strip("_")
        numbers = _numbers(name, (*args, *kwargs.values()) if kwargs else args, out)
        if numbers:
            self.found.append((name, self._stack.path if self._stack else "", numbers))
        return out


def _numbers(name: str, given: Sequence[Any], out: Any) -> Sequence[Any]:
    """The numbers that fractions are made with."""
    fractions = isinstance(out, Tensor) and out.is_floating_point()
    if name in MAKERS:
        return tuple(out.flatten().tolist()) if fractions and out.numel() <= SMALL else ()
    if name in ARITHMETIC and fractions:
        wholes = (each.item() if isinstance(each, Tensor) and _is_whole(each) else each for each in given)
        return tuple(each for each in wholes if isinstance(each, (int, float, complex)))
    return [each for each in given if isinstance(each, (float, complex))]


def _is_whole(tensor: Tensor) -> bool:
    """Whether this is one integer, such as ``torch.tensor(len(x))``."""
    if tensor.numel() != 1 or tensor.device.type != "cpu" or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return False  # the last: one for each example
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)


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
