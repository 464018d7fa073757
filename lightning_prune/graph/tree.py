"""Trees: the modules of a model, the tensors that a forward takes and gives, whatever they are packed in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

__all__ = ["leaves", "modules_of", "tensors"]


def leaves(tree: Any) -> Iterator[Any]:
    """All leaves of a tree in order; dataclasses, mappings and plain objects are looked into too."""
    yield from _leaves(tree, set())


def _leaves(tree: Any, seen: set[int]) -> Iterator[Any]:
    for leaf in pytree.tree_leaves(tree):
        inside = None if isinstance(leaf, Tensor) else _contents(leaf)
        if inside is None:
            yield leaf
        elif id(leaf) not in seen:
            seen.add(id(leaf))
            for each in inside:
                yield from _leaves(each, seen)


def _contents(leaf: Any) -> list[Any] | None:
    """What a container that torch doesn't know holds; None for what is no container."""
    if isinstance(leaf, type) or callable(leaf):
        return None
    if is_dataclass(leaf):
        return [getattr(leaf, field.name, None) for field in fields(leaf)]
    if isinstance(leaf, Mapping):
        return list(leaf.values())
    if isinstance(leaf, (set, frozenset)):
        return list(leaf)
    own = getattr(leaf, "__dict__", None)
    return list(own.values()) if own and any(isinstance(each, Tensor) for each in own.values()) else None


def tensors(tree: Any) -> list[Tensor]:
    """All tensors of a tree."""
    return [leaf for leaf in leaves(tree) if isinstance(leaf, Tensor)]


def modules_of(model: nn.Module) -> dict[str, Any]:
    """What ``dict(model.named_modules())`` is, in a fraction of its time: deep models are walked often."""
    found: dict[str, nn.Module] = {}
    seen: set[nn.Module] = set()
    waiting = [("", model)]
    while waiting:
        path, module = waiting.pop()
        if module in seen:
            continue
        seen.add(module)
        found[path] = module
        if module._modules:
            prefix = f"{path}." if path else ""
            parts = [(prefix + name, part) for name, part in module._modules.items() if part is not None]
            waiting += reversed(parts)
    return found
