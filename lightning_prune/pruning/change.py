"""What a surgery did, and how to take it back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

__all__ = ["Attributes", "Change", "Indices", "Replaced", "Undo", "Value", "setter", "take"]

Indices = Sequence[int] | Tensor
Undo = Callable[[], None]
Replaced = dict[int, tuple[Tensor, Tensor, Mapping[int, Tensor]]]
"""Id of a tensor -> itself, the smaller one in its place, what that keeps of each dimension."""

Value = int | str | tuple[int, ...] | list[int]
Attributes = dict[str, dict[str, tuple[Value, Value]]]
"""Module path -> attribute -> its value before and after."""


@dataclass
class Change:
    """What a surgery did, and how to take it back."""

    attributes: Attributes = field(default_factory=dict)
    steps: list[Undo] = field(default_factory=list)

    def undo(self) -> None:
        """Put everything back as it was."""
        while self.steps:
            self.steps.pop()()


def setter(target: Any, key: Any, value: Any) -> Undo:
    """A step that puts a value back into a dictionary or list."""

    def put_back() -> None:
        target[key] = value

    return put_back


def take(tensor: Tensor, dims: Mapping[int, Indices]) -> Tensor:
    """A new contiguous tensor with only some indices along some dimensions."""
    result = tensor.detach()
    for dim, index in dims.items():
        result = result.index_select(dim, torch.as_tensor(index, device=tensor.device))
    return result if result.is_sparse else result.contiguous()
