"""Masks: keep pruned weights at zero without touching names, order or identity of the parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, optim
from torch.optim import Optimizer

from lightning_prune.pruning.optimizers import with_inner

__all__ = [
    "INTEGERS",
    "HeldMasks",
    "Masks",
    "apply_masks",
    "local",
    "mask_optimizer",
    "placed_like",
    "share_of",
    "whole",
]

Masks = dict[str, Tensor]
"""Bool masks by parameter name, of the parameter's shape; True = kept."""

_ELEMENTWISE = frozenset(
    getattr(optim, name)
    for name in (
        "ASGD",
        "Adadelta",
        "Adafactor",
        "Adagrad",
        "Adam",
        "AdamW",
        "NAdam",
        "RAdam",
        "RMSprop",
        "SGD",
    )
    if hasattr(optim, name)
)
"""Optimizers that leave a zero weight, and its state, alone where its gradient is zero."""


def local(tensor: Tensor) -> Tensor:
    """The part of a distributed tensor that this process holds; any other tensor itself."""
    to_local: Any = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


def whole(tensor: Tensor) -> Tensor:
    """All of a distributed tensor, on every process; any other tensor itself."""
    full: Any = getattr(tensor, "full_tensor", None)
    return tensor if full is None else full()


def placed_like(value: Tensor, tensor: Tensor) -> Tensor:
    """A tensor on the device of another of its shape, distributed like it."""
    mesh = getattr(tensor, "device_mesh", None)
    if mesh is None or value.shape != tensor.shape or hasattr(value, "device_mesh"):
        return value.to(local(tensor).device)
    from torch.distributed.tensor import distribute_tensor

    placements: Any = tensor.placements  # type: ignore[attr-defined]
    placed: Tensor = distribute_tensor(value.to(local(tensor).device), mesh, placements, src_data_rank=None)
    return placed


def share_of(mask: Tensor, tensor: Tensor) -> Tensor:
    """The part of a mask that belongs to the part of a tensor that this process holds."""
    return local(placed_like(mask, tensor))


@torch.no_grad()
def apply_masks(parameters: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> None:
    """Set every masked weight to exactly zero, in place."""
    for name, mask in masks.items():
        _clear(parameters[name], share_of(mask, parameters[name]))


@torch.no_grad()
def mask_optimizer(optimizer: Optimizer, parameters: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> None:
    """Set an optimizer's state to zero in masked places, and of those inside: momentum would revive them."""
    every = with_inner(optimizer)
    for name, mask in masks.items():
        for each in every:
            for value in each.state.get(parameters[name], {}).values():
                if isinstance(value, Tensor) and value.shape == mask.shape:
                    _clear(value, share_of(mask, value))


INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integers by their size in bytes: the bits of a float of that size."""


def _bits(mask: Tensor, like: Tensor) -> Tensor:
    """A mask as integers of the size of a float, laid out like it (channels last …): all ones where it is kept."""
    return torch.empty_like(like, dtype=INTEGERS[like.element_size()]).copy_(mask).neg_()


def _clear(tensor: Tensor, mask: Tensor) -> None:
    """Zero what is masked, in place."""
    part = local(tensor.detach())
    _and(part, _bits(mask, part))


def _and(tensor: Tensor, bits: Tensor) -> None:
    """No multiplication, which would leave not-a-numbers and give -0.0; and many times faster than filling."""
    tensor.view(bits.dtype).bitwise_and_(bits)


class HeldMasks:
    """Masks at work during training: what is masked is zero after every optimizer step.

    A weight that is zero, whose gradient and momentum are zero, stays zero under the optimizers of torch that work
    element by element; so before each step the gradients are masked, one pass over memory. After a step of any other
    optimizer, weights and state are; also where someone else has written to the weights since the last step, such as a
    projection, a clamp or noise (through ``.data`` it is not seen: torch doesn't count these writes).
    """

    def __init__(self, parameters: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> None:
        """Hold ``masks`` of ``parameters``."""
        self.parameters = {name: parameters[name] for name in masks}
        self.masks = dict(masks)
        self._sharded = any(hasattr(parameter, "device_mesh") for parameter in self.parameters.values())
        self._bits = {
            id(parameter): _bits(share_of(self.masks[name], parameter), local(parameter.detach()))
            for name, parameter in self.parameters.items()
            if not bool(self.masks[name].all())
        }
        self._versions: list[int] = []

    def clear(self, optimizers: Iterable[Optimizer]) -> None:
        """Zero what is masked everywhere: weights, gradients, optimizer state."""
        apply_masks(self.parameters, self.masks)
        for optimizer in optimizers:
            mask_optimizer(optimizer, self.parameters, self.masks)
        gradients = {name: p.grad for name, p in self.parameters.items() if p.grad is not None and _dense(p.grad)}
        apply_masks(gradients, {name: self.masks[name] for name in gradients})
        self._versions = self._written()

    def _written(self) -> list[int]:
        """How many times each weight has been written to."""
        return [parameter._version for parameter in self.parameters.values()]

    def before_step(self, optimizer: Optimizer) -> bool:
        """Gradients are there: mask them; whether that is all it takes."""
        if type(optimizer) not in _ELEMENTWISE:
            return False
        everything = self._versions == self._written()
        with torch.no_grad():
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    gradient, bits = parameter.grad, self._bits.get(id(parameter))
                    if bits is None or gradient is None:
                        continue
                    if not _dense(gradient):
                        everything = False
                        continue
                    _and(local(gradient) if self._sharded else gradient, bits)
        return everything

    def after_step(self, optimizer: Optimizer, masked_gradients: bool = False) -> None:
        """The step is done: mask weights and state, unless that of the gradients was enough."""
        if not (masked_gradients and type(optimizer) in _ELEMENTWISE):
            with torch.no_grad():
                for parameter in self.parameters.values():
                    if id(parameter) in self._bits:
                        _and(local(parameter.detach()), self._bits[id(parameter)])
            mask_optimizer(optimizer, self.parameters, self.masks)
        self._versions = self._written()


def _dense(gradient: Tensor) -> bool:
    return gradient.layout is torch.strided
