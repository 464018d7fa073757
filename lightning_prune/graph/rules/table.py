"""The one table: which rule says what happens to labels at which ATen operation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload, OpOverloadPacket

from lightning_prune.graph.labels import Dims, LabelBook, no_labels
from lightning_prune.graph.tree import tensors_of_call

__all__ = ["Call", "Rule", "family", "find_rule", "rule"]


@dataclass(frozen=True)
class Call:
    """One executed ATen call, as a rule sees it.

    Attributes:
        func: The operation.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        out: What it returned.
        path: The innermost running module.
        book: Takes the facts.
        known: Labels of a tensor, None where it has none.
        static: Whether a tensor was made from parameters, buffers and constants alone.
        patchable: Whether the sizes in this call can be rewritten where Python made it.
        literal: Lists of indices of this call that can be rewritten there.
        factors: Takes the dimensions that the cost of the call is linear in.
        mixes: Takes what the call mixes; it counts only if the result is used.
        sizes: Takes the labels that an integer argument counts, by its place among the integers of the call.
        constants: Takes index tensors, their own labels and those of the dimension that they count along.
        unmasked: Takes tensors, with a dimension, that a masked model must leave as they are.
    """

    func: OpOverload
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any
    path: str
    book: LabelBook
    known: Callable[[Tensor], Dims | None]
    static: Callable[[Tensor], bool] = lambda tensor: False
    patchable: bool = False
    literal: Sequence[Tensor] = ()
    factors: list[Tensor] = field(default_factory=list)
    mixes: list[tuple[Tensor, str]] = field(default_factory=list)
    sizes: dict[int, Tensor] = field(default_factory=dict)
    constants: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)
    unmasked: list[tuple[Tensor, int]] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{self.func.overloadpacket.__name__} in {self.path or 'the model itself'}"

    def dims(self, tensor: Tensor) -> Dims:
        """Labels of a tensor, one entry per dimension."""
        return self.known(tensor) or no_labels(tensor)

    def tensors(self) -> list[Tensor]:
        """All tensor arguments, in order."""
        return tensors_of_call(*self.args, *self.kwargs.values())

    def arg(self, position: int, name: str, default: Any = None) -> Any:
        """An argument by position or by name."""
        return self.args[position] if len(self.args) > position else self.kwargs.get(name, default)

    def is_literal(self, index: Tensor) -> bool:
        """Whether these indices can be rewritten where Python made the call; shape (picked,)."""
        index = index.detach().cpu()
        return any(torch.equal(index, each) for each in self.literal)

    def unify(self, first: Tensor | None, second: Tensor | None, what: str = "meets a dimension of fixed size") -> Any:
        """`LabelBook.unify`, with this call in the reason."""
        return self.book.unify(first, second, f"{what} ({self})")

    def freeze(self, labels: Tensor | None, what: str) -> None:
        """`LabelBook.freeze`, with this call in the reason."""
        self.book.freeze(labels, f"{what} ({self})")

    def mix(self, labels: Tensor | None) -> None:
        """State that this call reads the indices together, so that masking one changes the others."""
        if labels is not None:
            self.mixes.append((labels, str(self)))

    def cost(self, *labels: Tensor | None) -> None:
        """State that the cost of this call is linear in these dimensions."""
        self.factors.extend(each for each in labels if each is not None)

    def contract(self, first: Tensor | None, second: Tensor | None) -> Tensor | None:
        """Two dimensions that are multiplied and summed over: masked indices add nothing."""
        if first is not None and second is not None and self.book.is_filled(first) and self.book.is_filled(second):
            self.mix(first)  # a masked neuron adds something to the sum, a removed one doesn't
        return self.book.unify(first, second, f"reads a fixed input: the model's own or a constant ({self})")

    def freeze_all(self, reason: str) -> None:
        """Freeze every label that reaches this call."""
        for tensor in self.tensors():
            for labels in self.dims(tensor):
                self.book.freeze(labels, reason)


Rule = Callable[[Call], Any]
"""Takes a call, states facts in ``call.book`` and returns the labels of the output: a `Dims` for one
tensor, a list of `Dims` for several (an output beyond the list has no labels), None for no labels."""

_RULES: dict[OpOverload | OpOverloadPacket | str, Rule] = {}


def rule(*ops: OpOverload | OpOverloadPacket | str) -> Callable[[Rule], Rule]:
    """Register a rule for ATen operations, all overloads or one: ``@rule(torch.ops.aten.convolution)``.

    An operation of a library that may not be loaded is given by name: ``@rule("torchvision::roi_align")``.
    For an operation that behaves like one that has a rule, one line will do: ``rule(op)(pointwise)``.
    """

    def register(function: Rule) -> Rule:
        family(function, *ops)
        return function

    return register


def family(function: Rule, *ops: OpOverload | OpOverloadPacket | str) -> None:
    """Register one rule for a family of operations."""
    for op in ops:
        if op in _RULES:
            raise ValueError(f"{op} already has the rule {_RULES[op].__name__}")
    for op in ops:
        _RULES[op] = function
    _found.clear()


def aten_family(function: Rule, names: Sequence[str]) -> None:
    """Register one rule for ATen operations by name; one that this torch doesn't have is left out."""
    found = [getattr(torch.ops.aten, name, None) for name in names]
    family(function, *(op for op in found if op is not None))


_found: dict[OpOverload, Rule | None] = {}


def find_rule(func: OpOverload) -> Rule | None:
    """The rule for an operation: its own, its packet's, or that of the kind torch itself says it is."""
    if func not in _found:
        _found[func] = _look_up(func)
    return _found[func]


def _look_up(func: OpOverload) -> Rule | None:
    found = _RULES.get(func) or _RULES.get(func.overloadpacket) or _RULES.get(func._schema.name)
    if found is None and torch.Tag.pointwise in func.tags:
        found = _RULES[torch.ops.aten.add]
    if found is None and _is_view(func):
        found = _RULES[torch.ops.aten.flip]
    return found


def _is_view(func: OpOverload) -> bool:
    returns = func._schema.returns
    return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)
