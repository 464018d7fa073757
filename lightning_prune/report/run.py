"""Measuring runs: the same calls with one example, file sizes."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_prune.export import save_pruned
from lightning_prune.graph.callsites import ModuleCall
from lightning_prune.graph.run import run_calls, undisturbed

__all__ = ["batch_size", "file_size", "measurable", "needs_library"]


def batch_size(calls: Sequence[ModuleCall]) -> int:
    """Size of the first dimension of the first input tensor; 1 where there is none."""
    tensors = [leaf for leaf in pytree.tree_leaves([(c.args, c.kwargs) for c in calls]) if isinstance(leaf, Tensor)]
    return next((tensor.size(0) for tensor in tensors if tensor.dim()), 1)


def first_of(calls: Sequence[ModuleCall]) -> tuple[ModuleCall, ...]:
    """The same calls with the first example of the batch only."""
    size = batch_size(calls)

    def narrow(leaf: Any) -> Any:
        batched = isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.size(0) == size
        return leaf[:1] if batched else leaf

    return tuple(
        replace(call, args=pytree.tree_map(narrow, call.args), kwargs=pytree.tree_map(narrow, call.kwargs))
        for call in calls
    )


def measurable(model: nn.Module, calls: Sequence[ModuleCall]) -> tuple[tuple[ModuleCall, ...], tuple[ModuleCall, ...]]:
    """The calls that a model can repeat in evaluation mode: with one example, and with the whole batch.

    Returns:
        Both empty where the model can't (with a warning) or where one part's input comes from another, so that
        the parts can't be run one by one after pruning; the whole batch twice where it wants more than one.
    """
    whole = tuple(calls)
    if not all(call.repeatable for call in whole):
        return (), ()
    error = _error_of(model, whole)
    if error is not None:
        warnings.warn(
            f"MACs and latency are not measured: {type(model).__name__} can't repeat its training forward in "
            f"evaluation mode ({type(error).__name__}: {error})",
            stacklevel=2,
        )
        return (), ()
    single = first_of(whole)
    return (single if _error_of(model, single) is None else whole), whole


def _error_of(model: nn.Module, calls: Sequence[ModuleCall]) -> Exception | None:
    with undisturbed(model):
        model.eval()
        try:
            run_calls(model, calls)
        except Exception as error:  # whatever a user's forward may raise is the answer
            return error
    return None


def needs_library(model: nn.Module) -> list[str]:
    """Paths of the modules that run code of this library: what unpickles the model needs it then.

    Sizes or activations were rewritten in a forward, attention has other heads than torch's own allows, or something
    stands for a removed layer or a chosen activation that torch has no module for. Exported files need nothing.
    """

    def ours(thing: Any) -> bool:
        home = type(thing).__module__
        return home.startswith("lightning_prune.") and not home.startswith("lightning_prune.models")

    return [path for path, module in model.named_modules() if ours(module) or ours(module.__dict__.get("forward"))]


def file_size(model: nn.Module) -> int:
    """Bytes of the file that `save_pruned` writes."""
    with TemporaryDirectory() as folder:
        path = Path(folder, "model.safetensors")
        save_pruned(model, path)
        return path.stat().st_size
