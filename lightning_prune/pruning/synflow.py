"""The flow of ones through a network of all |weights|, and how much of it goes through each weight.

Source: Tanaka et al., 2020, "Pruning neural networks without any data by iteratively conserving synaptic flow",
arXiv:2006.05467.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lightning_prune.errors import PruningError
from lightning_prune.graph.callsites import ModuleCall
from lightning_prune.graph.run import cast, same_buffers, standing_in, undisturbed
from lightning_prune.graph.tree import tensors
from lightning_prune.pruning.masks import whole

__all__ = ["flow"]


def flow(
    model: nn.Module, calls: Sequence[ModuleCall], weights: Mapping[str, Tensor], masks: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """|w · ∂R/∂w| of these weights, where R sums the outputs of the calls for ones; the model is not changed.

    Args:
        model: The module; what it adds (biases, running means) counts as zero.
        calls: Their shapes matter, not their values.
        weights: By name.
        masks: By name; where false, weights count as zero.

    Raises:
        PruningError: There is no call that can be repeated, or no weight reaches an output, or the flow isn't finite.
    """
    calls = [call for call in calls if call.repeatable]
    if not calls:
        raise PruningError("criterion 'synflow' needs example_inputs: their shapes, not their values")
    found = _first_flow(model, calls, weights, masks)
    if not all(bool(each.isfinite().all()) for each in found.values()):
        raise PruningError(
            "criterion 'synflow': the flow through this network is not finite: too large for its precision, or "
            "weights are, or they are divided by their own norm"
        )
    return found


def _first_flow(model: nn.Module, calls: Sequence[ModuleCall], *what: Any) -> dict[str, Tensor]:
    """The flow of one example in double precision; of the whole batch or in the model's own, where it must be."""
    small = [_ones(call, 1) for call in calls]
    tries = [(some, dtype) for some in (small, [_ones(c, None) for c in calls]) for dtype in (torch.float64, None)]
    for number, (some, dtype) in enumerate(tries, 1):
        try:
            return _flow(model, some, *what, dtype=dtype)
        except PruningError:
            raise
        except Exception as error:  # a dtype or a batch of its own in the user's forward
            if number == len(tries):
                raise PruningError(f"criterion 'synflow': the model raised {type(error).__name__}: {error}") from error
    raise AssertionError


def _flow(
    model: nn.Module,
    calls: Sequence[ModuleCall],
    weights: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    *,
    dtype: torch.dtype | None,
) -> dict[str, Tensor]:
    mask_of = {id(weights[name]): mask for name, mask in masks.items()}
    flags = {id(weight) for weight in weights.values()}
    magnitudes: dict[int, Tensor] = {}
    with torch.inference_mode(False), torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.is_floating_point():
                size = whole(tensor.detach()).abs().to(dtype or tensor.dtype)
                if _is_shift(name) and id(tensor) not in flags:  # what is added would flow past the layers before
                    size = torch.zeros_like(size)
                magnitudes[id(tensor)] = size * mask_of[id(tensor)] if id(tensor) in mask_of else size
    with undisturbed(model), same_buffers(model), standing_in(model, magnitudes, flags) as stand_ins:
        model.eval()
        with torch.inference_mode(False), torch.enable_grad():
            outputs = tensors([_run(model, cast(call, dtype)) for call in calls])
            reached = [t.double().sum() for t in outputs if t.requires_grad]
            if not reached:
                raise PruningError("criterion 'synflow': no output depends on the weights")
            leaves = {name: stand_ins[id(weight)] for name, weight in weights.items()}
            found = torch.autograd.grad(torch.stack(reached).sum(), list(leaves.values()), allow_unused=True)
    return {
        name: torch.zeros_like(leaf) if gradient is None else (leaf.detach() * gradient).abs()
        for (name, leaf), gradient in zip(leaves.items(), found, strict=True)
    }


def _ones(call: ModuleCall, examples: int | None) -> ModuleCall:
    """The same call of some examples (None: all), all ones."""

    def one(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.dim():
            return leaf
        return torch.ones_like(leaf[:examples]) if leaf.is_floating_point() else leaf[:examples]

    return ModuleCall(call.path, tree_map(one, call.args), tree_map(one, call.kwargs))


def _is_shift(name: str) -> bool:
    last = name.rpartition(".")[2]
    return "bias" in last or last == "running_mean"


def _run(model: nn.Module, call: ModuleCall) -> Any:
    return model.get_submodule(call.path)(*call.args, **call.kwargs)
