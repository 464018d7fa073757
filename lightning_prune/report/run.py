"""Measuring runs: the same calls with one example, file sizes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_prune.export import save_pruned
from lightning_prune.graph.callsites import ModuleCall
from lightning_prune.graph.run import run_calls, undisturbed
from lightning_prune.graph.tree import tensors

__all__ = ["batch_size", "file_size", "measurable", "needs_library"]


def batch_size(calls: Sequence[ModuleCall], model: nn.Module | None = None) -> int:
    """How many examples the calls hold, as their first input tells; 1 where there is none.

    A tensor has them along its first dimension. A list of tensors or dicts is a batch of them (images of several sizes,
    say) or one input in several parts: only the model tells, by giving twice as many outputs for a list twice as long.

    Args:
        calls: The calls.
        model: What to ask; None, or one that can't repeat the calls: a list is a batch.
    """
    return _batch(calls, model)[0]


def _batch(calls: Sequence[ModuleCall], model: nn.Module | None) -> tuple[int, bool]:
    """How many examples, and whether it is lists that hold them."""
    inputs = (leaf for call in calls for each in (*call.args, *call.kwargs.values()) for leaf in _leaves(each))
    first = next((leaf for leaf in inputs if _is_list(leaf) or (isinstance(leaf, Tensor) and leaf.dim())), None)
    if first is None:
        return 1, False
    if isinstance(first, Tensor):
        return first.size(0), False
    if model is None or _grows(model, calls, len(first)):
        return len(first), True
    return next((tensor.size(0) for tensor in tensors(first) if tensor.dim()), 1), False


def _is_list(leaf: Any) -> bool:
    return isinstance(leaf, list | tuple) and bool(leaf) and any(all(isinstance(e, k) for e in leaf) for k in LISTED)


LISTED = (Tensor, Mapping)
"""What lists that may be batches hold."""


def _leaves(tree: Any) -> list[Any]:
    leaves: list[Any] = pytree.tree_leaves(tree, is_leaf=_is_list)
    return leaves


def _changed(calls: Sequence[ModuleCall], change: Callable[[Any], Any]) -> tuple[ModuleCall, ...]:
    """The calls with each input changed, a list as a whole."""

    def changed(value: Any) -> Any:
        return pytree.tree_map(change, value, is_leaf=_is_list)

    return tuple(
        replace(call, args=tuple(map(changed, call.args)), kwargs={k: changed(v) for k, v in call.kwargs.items()})
        for call in calls
    )


def _grows(model: nn.Module, calls: Sequence[ModuleCall], length: int) -> bool:
    """Whether lists of a length give twice as many outputs when they are twice as long."""
    longer = _changed(calls, lambda leaf: leaf + leaf if _is_list(leaf) and len(leaf) == length else leaf)
    counts = []
    with undisturbed(model):
        model.eval()
        for some in (calls, longer):
            try:
                outputs = tensors(run_calls(model, some))
            except Exception:  # whatever a user's forward may raise; the calls as they are tell nothing then
                return some is calls
            counts.append((len(outputs), sum(each.size(0) for each in outputs if each.dim())))
    return any(was and now == 2 * was for was, now in zip(*counts, strict=True))


def first_of(model: nn.Module, calls: Sequence[ModuleCall]) -> tuple[ModuleCall, ...]:
    """The same calls with the first example of the batch only."""
    size, listed = _batch(calls, model)

    def narrow(leaf: Any) -> Any:
        return leaf[:1] if isinstance(leaf, Tensor) and leaf.dim() and len(leaf) == size else leaf

    def narrow_all(leaf: Any) -> Any:
        if listed and _is_list(leaf):
            return leaf[:1] if len(leaf) == size else leaf
        return pytree.tree_map(narrow, leaf)

    return _changed(calls, narrow_all)


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
    single = first_of(model, whole)
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
