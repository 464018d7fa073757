"""What a surgery did, and how to take it back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

__all__ = ["HOLDERS", "Attributes", "Change", "Indices", "Replaced", "Undo", "Value", "refer", "setter", "take"]

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


HOLDERS = (Tensor, list, tuple, dict, set)
"""What `refer` looks into."""


def refer(value: Any, new: Mapping[int, Tensor], change: Change) -> Any:
    """What stands in the place of a value that may be, or hold, tensors for which there are new ones.

    Lists, dictionaries and sets are changed in place, for others may hold them too; tuples are made anew.

    Args:
        value: A tensor, a container, or anything else; other objects are not looked into.
        new: Id of a tensor -> the one that takes its place.
        change: Takes down what was done.
    """
    return _refer(value, new, change, set()) if isinstance(value, HOLDERS) else value


def _refer(value: Any, new: Mapping[int, Tensor], change: Change, seen: set[int]) -> Any:
    if isinstance(value, Tensor):
        return new.get(id(value), value)
    if not isinstance(value, HOLDERS) or id(value) in seen:
        return value
    if not isinstance(value, tuple):
        seen.add(id(value))  # it may hold itself
    whole = list(value.items()) if isinstance(value, dict) else list(value)
    parts = [_refer(part, new, change, seen) if isinstance(part, HOLDERS) else part for part in whole]
    if all(part is before for part, before in zip(parts, whole, strict=True)):
        return value
    if isinstance(value, tuple):
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    change.steps.append(partial(_fill, value, whole))
    _fill(value, parts)
    return value


def _fill(container: Any, parts: list[Any]) -> None:
    if isinstance(container, list):
        container[:] = parts
        return
    if isinstance(container, set) or any(key not in container for key, _ in parts):  # else they stay in their places
        container.clear()
    container.update(parts)


CHUNK = 1 << 18
"""Elements that are taken along one dimension at a time, to be taken along another: fresh memory is slow to fill."""


def take(tensor: Tensor, dims: Mapping[int, Indices]) -> Tensor:
    """A new contiguous tensor with only some indices along some dimensions."""
    kept = {dim: torch.as_tensor(index, device=tensor.device) for dim, index in dims.items()}
    source = tensor.detach()
    if 0 in kept and len(kept) == 2 and source.numel() > 2 * CHUNK and not source.is_sparse:
        rows = kept.pop(0)
        ((dim, index),) = kept.items()
        shape = {0: len(rows), dim: len(index)}
        result = source.new_empty([shape.get(at, size) for at, size in enumerate(source.shape)])
        step = max(CHUNK * len(source) // source.numel(), 1)
        for some, part in zip(rows.split(step), result.split(step), strict=True):
            torch.index_select(source.index_select(0, some), dim, index, out=part)
        return result
    for dim, index in kept.items():
        source = source.index_select(dim, index)
    return source if source.is_sparse else source.contiguous()
