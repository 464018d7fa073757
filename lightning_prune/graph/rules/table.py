"""The one table: which rule says what happens to labels at which ATen operation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload, OpOverloadPacket
from torch.utils import _pytree as pytree

from lightning_prune.graph.labels import Dims, LabelBook, no_labels

__all__ = ["Call", "Rule", "family", "find_rule", "rule"]


@dataclass(frozen=True)
class Call:
    """One executed ATen call, as a rule sees it."""

    func: OpOverload
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any
    path: str
    book: LabelBook
    known: Callable[[Tensor], Dims | None]
    factors: list[Tensor] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{self.func.overloadpacket.__name__} in {self.path or 'the model itself'}"

    def dims(self, tensor: Tensor) -> Dims:
        """Labels of a tensor, one entry per dimension."""
        return self.known(tensor) or no_labels(tensor)

    def tensors(self) -> Iterator[Tensor]:
        """All tensor arguments, in order."""
        for leaf in pytree.tree_leaves((self.args, self.kwargs)):
            if isinstance(leaf, Tensor):
                yield leaf

    def arg(self, position: int, name: str, default: Any = None) -> Any:
        """An argument by position or by name."""
        return self.args[position] if len(self.args) > position else self.kwargs.get(name, default)

    def freeze_all(self, reason: str) -> None:
        """Freeze every label that reaches this call."""
        for tensor in self.tensors():
            for labels in self.dims(tensor):
                self.book.freeze(labels, reason)


Rule = Callable[[Call], Any]
"""Takes a call, states facts in ``call.book`` and returns the labels of the output: a `Dims` for one
tensor, a list of `Dims` for several (an output beyond the list has no labels), None for no labels."""

_RULES: dict[OpOverload | OpOverloadPacket, Rule] = {}


def rule(*ops: OpOverload | OpOverloadPacket) -> Callable[[Rule], Rule]:
    """Register a rule for ATen operations, all overloads or one: ``@rule(torch.ops.aten.convolution)``."""

    def register(function: Rule) -> Rule:
        family(function, *ops)
        return function

    return register


def family(function: Rule, *ops: OpOverload | OpOverloadPacket) -> None:
    """Register one rule for a family of operations."""
    for op in ops:
        if op in _RULES:
            raise ValueError(f"{op} already has the rule {_RULES[op].__name__}")
        _RULES[op] = function


def find_rule(func: OpOverload) -> Rule | None:
    """The rule for an operation: its own, its packet's, or that of the kind torch itself says it is."""
    found = _RULES.get(func) or _RULES.get(func.overloadpacket)
    if found is None and torch.Tag.pointwise in func.tags:
        found = _RULES[torch.ops.aten.add]
    if found is None and _is_view(func):
        found = _RULES[torch.ops.aten.view]
    return found


def _is_view(func: OpOverload) -> bool:
    returns = func._schema.returns
    return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)
