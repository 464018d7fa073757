"""Cost: parameters, non-zero weights, MACs and bytes of a model, per layer and in all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lightning_prune.graph.callsites import ModuleCall
from lightning_prune.graph.run import as_calls, run_calls, undisturbed

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
    """

    params: int
    nonzero: int
    macs: int
    bytes: int
    layers: dict[str, LayerCost]

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

    Example:
        >>> import torch
        >>> cost = count_cost(nn.Linear(4, 3), torch.rand(1, 4))
        >>> cost.params, cost.macs, cost.bytes
        (15, 12, 60)
    """
    return cost_of_calls(model, as_calls(example_inputs))


def cost_of_calls(model: nn.Module, calls: tuple[ModuleCall, ...]) -> Cost:
    """`count_cost` over several calls of the model or of its parts."""
    counter = FlopCounterMode(display=False)
    with undisturbed(model):
        model.eval()
        with counter:
            run_calls(model, calls)
    flops = counter.get_flop_counts()
    names = {path: f"{type(model).__name__}.{path}" if path else type(model).__name__ for path, _ in _owners(model)}
    layers = {
        path: LayerCost(
            params=sum(p.numel() for p in module.parameters(recurse=False)),
            nonzero=sum(int(p.count_nonzero()) for p in module.parameters(recurse=False)),
            macs=sum(flops.get(names[path], {}).values()) // 2,
            bytes=_bytes(module, recurse=False),
        )
        for path, module in _owners(model)
    }
    return Cost(
        params=sum(p.numel() for p in model.parameters()),
        nonzero=sum(int(p.count_nonzero()) for p in model.parameters()),
        macs=counter.get_total_flops() // 2,
        bytes=_bytes(model, recurse=True),
        layers=layers,
    )


def _owners(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [
        (path, module)
        for path, module in model.named_modules()
        if next(module.parameters(recurse=False), None) is not None
    ]


def _bytes(module: nn.Module, *, recurse: bool) -> int:
    tensors = (*module.parameters(recurse), *module.buffers(recurse))
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
