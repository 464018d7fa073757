"""Trees: the modules of a model, the tensors that a forward takes and gives, whatever they are packed in."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Generic, TypeVar

from torch import Tensor, nn
from torch.utils import _pytree as pytree

__all__ = ["OWN", "TensorMap", "leaves", "modules_of", "named_tensors", "tensors", "tensors_of_call", "unique_tensors"]

V = TypeVar("V")

OWN = frozenset(nn.Module().__dict__)
"""The attributes that every module has: its parts, parameters, buffers, hooks and mode."""


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


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, each name of a shared one."""
    parameters, buffers = _named(model)
    return parameters | buffers


def unique_tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Parameters, and buffers, by the first name of each."""
    parameters, buffers = _named(model)
    return _first_names(parameters), _first_names(buffers)


def _first_names(named: dict[str, Tensor]) -> dict[str, Tensor]:
    names = {id(tensor): name for name, tensor in reversed(named.items())}
    return {name: tensor for name, tensor in named.items() if names[id(tensor)] == name}


def _named(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    parameters: dict[str, Tensor] = {}
    buffers: dict[str, Tensor] = {}

    def walk(prefix: str, module: nn.Module) -> None:
        for found, held in ((parameters, module._parameters), (buffers, module._buffers)):
            for name, tensor in held.items():
                if tensor is not None:
                    found[prefix + name] = tensor
        for name, part in module._modules.items():
            if part is not None:
                walk(f"{prefix}{name}.", part)

    walk("", model)
    return parameters, buffers


def tensors_of_call(*arguments: Any) -> list[Tensor]:
    """The tensors among the arguments or results of an ATen call, which hold no other containers than lists."""
    found = []
    for argument in arguments:
        if isinstance(argument, Tensor):
            found.append(argument)
        elif isinstance(argument, (list, tuple)):
            found += tensors_of_call(*argument)
    return found


class TensorMap(Generic[V]):
    """A dictionary of tensors, told apart by identity, that keeps none of them alive.

    It does what torch's ``WeakTensorKeyDictionary`` does, in a fraction of its time.
    """

    def __init__(self) -> None:
        self._held: dict[int, tuple[weakref.ref[Tensor], V]] = {}
        self._self = weakref.ref(self)

    def __setitem__(self, tensor: Tensor, value: V) -> None:
        key, own = id(tensor), self._self

        def forget(_: Any) -> None:
            held = own()  # not by itself, which would make a cycle of references
            if held is not None:
                held._held.pop(key, None)

        before = self._held.get(key)
        self._held[key] = (weakref.ref(tensor, forget) if before is None else before[0], value)

    def __getitem__(self, tensor: Tensor) -> V:
        return self._held[id(tensor)][1]

    def __contains__(self, tensor: Tensor) -> bool:
        return id(tensor) in self._held

    def get(self, tensor: Tensor) -> V | None:
        """What is held for a tensor, or None."""
        held = self._held.get(id(tensor))
        return None if held is None else held[1]
