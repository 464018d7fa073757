"""Cost: parameters, non-zero weights, MACs and bytes of a model, per layer and in all."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lightning_prune.errors import TraceError
from lightning_prune.graph.callsites import ModuleCall, ModuleStack
from lightning_prune.graph.operations import OperationMode
from lightning_prune.graph.run import as_calls, run_calls, undisturbed
from lightning_prune.graph.trace import FLOP_FORMULAS

__all__ = ["Cost", "LayerCost", "cost_of_calls", "count_cost"]


@dataclass(frozen=True)
class LayerCost:
    """What one layer holds and does.

    Attributes:
        params: Elements of its own parameters.
        nonzero: Those that are not zero.
        macs: Multiply-accumulates of its forward, its children's included.
        bytes: Memory of its own parameters and buffers.
    """

    params: int
    nonzero: int
    macs: int
    bytes: int


@dataclass(frozen=True)
class Cost:
    """What a model holds and does in one forward over the given inputs.

    Attributes:
        params: Elements of all parameters, shared ones once.
        nonzero: Those that are not zero.
        macs: Multiply-accumulates of convolutions, matrix products and attention; a FLOP count is twice this.
        bytes: Memory of all parameters and buffers.
        layers: The same for each module that owns parameters, by name.
        own: MACs by the module whose own forward makes them; these add up to ``macs``.
    """

    params: int
    nonzero: int
    macs: int
    bytes: int
    layers: dict[str, LayerCost]
    own: dict[str, int] = field(default_factory=dict)

    @property
    def sparsity(self) -> float:
        """Fraction of the parameters' elements that are zero."""
        return 1 - self.nonzero / self.params if self.params else 0.0


def count_cost(model: nn.Module, example_inputs: Any) -> Cost:
    """Count what a model holds and what one forward costs.

    Args:
        model: Any module; it is left as it was.
        example_inputs: A tensor, a tuple of positional or a dict of keyword arguments of ``model``. MACs are
            those of this very call: with a batch of 1 they are per example.

    Raises:
        TraceError: The model raised on the inputs.

    Example:
        >>> import torch
        >>> cost = count_cost(nn.Linear(4, 3), torch.rand(1, 4))
        >>> cost.params, cost.macs, cost.bytes
        (15, 12, 60)
    """
    calls = as_calls(example_inputs)
    try:
        return cost_of_calls(model, calls)
    except Exception as error:
        raise TraceError(f"{type(model).__name__} raised {type(error).__name__} on example_inputs: {error}") from error


def cost_of_calls(model: nn.Module, calls: tuple[ModuleCall, ...]) -> Cost:
    """`count_cost` over several calls of the model or of its parts."""
    stack = ModuleStack(model)
    counter = _MacCounter(stack)
    with undisturbed(model), stack.watch(), counter:
        model.eval()
        fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)  # one call that no formula knows
        try:
            run_calls(model, calls)
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
    layers = {
        path: LayerCost(
            params=sum(p.numel() for p in module.parameters(recurse=False)),
            nonzero=sum(int(p.count_nonzero()) for p in module.parameters(recurse=False)),
            macs=counter.macs[path],
            bytes=_bytes(module, recurse=False),
        )
        for path, module in _owners(model)
    }
    return Cost(
        params=sum(p.numel() for p in model.parameters()),
        nonzero=sum(int(p.count_nonzero()) for p in model.parameters()),
        macs=counter.total,
        bytes=_bytes(model, recurse=True),
        layers=layers,
        own=dict(counter.own),
    )


class _MacCounter(OperationMode):
    """Adds the MACs of each call to every module that is running; torch's own counter needs gradients to know which."""

    def __init__(self, stack: ModuleStack) -> None:
        super().__init__()
        self.stack = stack
        self.total = 0
        self.macs: Counter[str] = Counter()
        self.own: Counter[str] = Counter()

    def operation(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        formula = FLOP_FORMULAS.get(func._overloadpacket)
        if formula is None and (made := self.decomposed(func, args, kwargs)) is not NotImplemented:
            return made
        out = func(*args, **kwargs)
        if formula is not None:
            macs = int(formula(*args, **kwargs, out_val=out)) // 2
            self.total += macs
            self.macs.update(dict.fromkeys(self.stack.paths, macs))
            self.own[self.stack.path] += macs
        return out


def _owners(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [
        (path, module)
        for path, module in model.named_modules()
        if next(module.parameters(recurse=False), None) is not None
    ]


def _bytes(module: nn.Module, *, recurse: bool) -> int:
    tensors = (*module.parameters(recurse), *module.buffers(recurse))
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
