"""What a trace need not calculate: it follows shapes, so products of large matrices may be blank, all zero.

Only where values decide what happens next, such as how many boxes are kept, the model has to run as it is.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_prune.graph.tree import modules_of

__all__ = ["Blanks", "Held", "ValuesNeededError", "has_hooks"]

_aten = torch.ops.aten
_READS: frozenset[Any] = frozenset({torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output})
_PLAIN = (Tensor, nn.Parameter)


class ValuesNeededError(BaseException):
    """The model looked at a value that was not calculated; what it catches must not hide this."""


class Blanks:
    """Runs ATen calls, and gives zeros instead of what convolutions and products of matrices would give.

    Attributes:
        needed: Whether values were asked for that are not there.
    """

    def __init__(self, is_static: Callable[[Tensor], bool]) -> None:
        """``is_static``: whether a tensor is made of parameters and constants only; these keep their values."""
        self.needed = False
        self._is_static = is_static
        self._used = False
        self._written = False
        """Whether what was not calculated may have been written into a constant."""
        self._kinds: dict[Any, tuple[bool, bool]] = {}

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of a call, in its shape, strides and dtype.

        Raises:
            ValuesNeededError: The call depends on values that were not calculated.
        """
        make = _MAKERS.get(func)
        if make is not None and not kwargs and self._may_skip(args):
            blank = make(*args)
            if blank is not None:
                self._used = True
                return blank
        if self._used:
            self._look(func, args, kwargs)
        return func(*args, **kwargs)

    def read(self, tensor: Tensor) -> None:
        """Python is about to read the values of a tensor.

        Raises:
            ValuesNeededError: They were not calculated.
        """
        if self.holds(tensor):
            self._fail()

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor may hold what was not calculated."""
        return self._used and not self._is_real(tensor)

    def _may_skip(self, args: tuple[Any, ...]) -> bool:
        tensors = [each for each in args if isinstance(each, Tensor)]
        usual = all(type(each) in _PLAIN and each.layout is torch.strided and not each.is_meta for each in tensors)
        return usual and not all(map(self._is_static, tensors))

    def _look(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kind = self._kinds.get(func)
        if kind is None:
            # Calls of other libraries: what they do with values isn't known.
            reads = not _READS.isdisjoint(func.tags) or func.namespace not in ("aten", "prim", "prims")
            kind = self._kinds[func] = reads or func is _aten._local_scalar_dense.default, func._schema.is_mutable
        reads, writes = kind
        if not (reads or writes):
            return
        tensors = [each for each in pytree.arg_tree_leaves(*args, **kwargs) if isinstance(each, Tensor)]
        real = [self._is_real(each) for each in tensors]
        if writes and any(real) and not all(real):
            self._written = True
        if func is _aten.index.Tensor:  # only a mask has as many indices as its values say
            reads = any(not self._is_real(each) for each in args[1] if each is not None and each.dtype in _MASKS)
        if reads and not all(real):
            self._fail()

    def _is_real(self, tensor: Tensor) -> bool:
        return self._is_static(tensor) and not self._written

    def _fail(self) -> None:
        self.needed = True
        raise ValuesNeededError


_MASKS = (torch.bool, torch.uint8)


def _mm(a: Tensor, b: Tensor) -> Tensor | None:
    return a.new_zeros(a.shape[0], b.shape[1]) if a.shape[1] == b.shape[0] and a.dtype == b.dtype else None


def _addmm(bias: Tensor, a: Tensor, b: Tensor) -> Tensor | None:
    fits = bias.dtype == a.dtype and bias.dim() == 1 and bias.shape[0] in (1, b.shape[1])
    return _mm(a, b) if fits else None


def _bmm(a: Tensor, b: Tensor) -> Tensor | None:
    fits = a.shape[0] == b.shape[0] and a.shape[2] == b.shape[1] and a.dtype == b.dtype
    return a.new_zeros(a.shape[0], a.shape[1], b.shape[2]) if fits else None


def _baddbmm(bias: Tensor, a: Tensor, b: Tensor) -> Tensor | None:
    out = _bmm(a, b)
    return out if out is not None and bias.dtype == a.dtype and bias.shape == out.shape else None


def _convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
) -> Tensor | None:
    channels, features = weight.shape[1], weight.shape[0]
    if transposed:
        channels, features = features, channels * groups
    else:
        channels = channels * groups
    same = x.dtype == weight.dtype and (bias is None or (bias.dtype == x.dtype and bias.shape == (features,)))
    plain = x.is_contiguous() and weight.is_contiguous() and x.dim() == weight.dim()
    if not (same and plain and x.shape[1] == channels and features % groups == 0):
        return None
    spatial = []
    for at, size in enumerate(x.shape[2:]):
        each = [values[at if len(values) > 1 else 0] for values in (stride, padding, dilation, output_padding)]
        step, pad, spread, extra = each
        reach = spread * (weight.shape[2 + at] - 1)
        if transposed:
            spatial.append((size - 1) * step - 2 * pad + reach + extra + 1)
        else:
            spatial.append((size + 2 * pad - reach - 1) // step + 1)
    return x.new_zeros(x.shape[0], features, *spatial) if min(spatial, default=1) > 0 else None


_MAKERS: dict[Any, Callable[..., Tensor | None]] = {
    _aten.mm.default: _mm,
    _aten.addmm.default: _addmm,
    _aten.bmm.default: _bmm,
    _aten.baddbmm.default: _baddbmm,
    _aten.convolution.default: _convolution,
}


def has_hooks(model: nn.Module) -> bool:
    """Whether someone else looks at what the modules of a model take and give."""
    everywhere = torch.nn.modules.module
    if everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks:
        return True
    return any(module._forward_hooks or module._forward_pre_hooks for module in modules_of(model).values())


_CONTAINERS = (dict, list, set)
_REGISTRIES = ("_parameters", "_buffers", "_modules")
_OWN = frozenset(nn.Module().__dict__) - {*_REGISTRIES, "training"}


class Held:
    """What the modules of a model hold: a forward may keep what it calculates in an attribute."""

    def __init__(self, model: nn.Module) -> None:
        self._held: list[tuple[nn.Module, dict[str, Any], dict[str, Any]]] = []
        self._tensors: dict[int, tuple[Tensor, Tensor, int]] = {}
        for module in modules_of(model).values():
            values = {name: value for name, value in module.__dict__.items() if name not in _OWN}
            inside = {name: copy.copy(value) for name, value in values.items() if type(value) in _CONTAINERS}
            self._held.append((module, values, inside))
            for name, value in values.items():
                if name not in _REGISTRIES:
                    for tensor in _tensors_in(value):
                        if not tensor.is_inference():
                            self._tensors[id(tensor)] = (tensor, tensor.detach().clone(), tensor._version)

    def new(self) -> Iterator[Tensor]:
        """Tensors in attributes, no parameters or buffers, that were not there or have been written to."""
        for module, _, _ in self._held:
            for name, value in module.__dict__.items():
                if name not in _OWN and name not in _REGISTRIES:
                    for tensor in _tensors_in(value):
                        known = self._tensors.get(id(tensor))
                        if known is None or (not tensor.is_inference() and tensor._version != known[2]):
                            yield tensor

    def restore(self) -> None:
        """Make the modules hold what they held."""
        for module, values, inside in self._held:
            for name in [name for name in module.__dict__ if name not in _OWN and name not in values]:
                del module.__dict__[name]
            module.__dict__.update(values)
            for name, content in inside.items():
                value = values[name]
                if type(value) is list:
                    value[:] = content
                else:
                    value.clear()
                    value.update(content)
        with torch.no_grad():
            for tensor, value, version in self._tensors.values():
                if tensor._version != version:
                    tensor.copy_(value)


def _tensors_in(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if type(value) in (list, tuple):
        return [item for item in value if isinstance(item, Tensor)]
    if type(value) is dict:
        return [item for item in value.values() if isinstance(item, Tensor)]
    return []
