"""Cost: parameters, non-zero weights, MACs and bytes of a model, per layer and in all."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from lightning_prune.errors import TraceError
from lightning_prune.graph.callsites import ModuleCall
from lightning_prune.graph.run import as_calls, run_calls, undisturbed

__all__ = ["Cost", "LayerCost", "cost_of_calls", "count_cost"]

_TOTAL = "Global"


def _attention_flops(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    flops: int = sdpa_flop_count(query, key, value)
    return flops


# torch has no formula for the attention that it runs on the CPU
_MORE_FORMULAS = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}


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
    flops: Counter[str] = Counter()
    with undisturbed(model):
        model.eval()
        for call in calls:
            flops += _flops_of_call(model, call)
    names = dict(_names(model))
    layers = {
        path: LayerCost(
            params=sum(p.numel() for p in module.parameters(recurse=False)),
            nonzero=sum(int(p.count_nonzero()) for p in module.parameters(recurse=False)),
            macs=sum(flops[name] for name in names[path]) // 2,
            bytes=_bytes(module, recurse=False),
        )
        for path, module in _owners(model)
    }
    return Cost(
        params=sum(p.numel() for p in model.parameters()),
        nonzero=sum(int(p.count_nonzero()) for p in model.parameters()),
        macs=flops[_TOTAL] // 2,
        bytes=_bytes(model, recurse=True),
        layers=layers,
    )


def _flops_of_call(model: nn.Module, call: ModuleCall) -> Counter[str]:
    """FLOPs by module path, of one call of the model or of a part; torch's counter names all by the class called."""
    counter = FlopCounterMode(display=False, custom_mapping=_MORE_FORMULAS)
    with counter:
        run_calls(model, [call])
    called = type(model.get_submodule(call.path)).__name__
    found: Counter[str] = Counter()
    for name, flops in counter.get_flop_counts().items():
        path = name if name == _TOTAL else f"{call.path}{name.removeprefix(called)}".removeprefix(".")
        found[path] += sum(flops.values())
    return found


def _names(model: nn.Module) -> list[tuple[str, list[str]]]:
    """The first path of each module that owns parameters, and all of its paths."""
    names: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(path)
    return [(path, names[module]) for path, module in _owners(model)]


def _owners(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [
        (path, module)
        for path, module in model.named_modules()
        if next(module.parameters(recurse=False), None) is not None
    ]


def _bytes(module: nn.Module, *, recurse: bool) -> int:
    tensors = (*module.parameters(recurse), *module.buffers(recurse))
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
