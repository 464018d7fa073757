"""Networks that follow another one, as momentum encoders and mean teachers do: they must lose the same neurons.

What averages the weights of one network into another may run anywhere: in the training step, in a hook after it, in a
callback. So it isn't observed; a copy is known by what it is.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_prune.graph.trace import Trace
from lightning_prune.graph.tree import modules_of

__all__ = ["copies_of_trained", "original_of", "tie_copies", "trained_by"]

ALIKE = 0.5
"""Least cosine between the weights of a network and a copy of it. Networks that have nothing to do with each other are
at 0, a copy starts at 1 and lags behind."""


def copies_of_trained(model: nn.Module, trained: Collection[int]) -> dict[str, str]:
    """The parts of a model that are copies of another part, which is trained.

    A copy is built alike, holds none of the parameters that are trained, and its weights are like the other's.

    Args:
        model: The model.
        trained: Ids of the parameters that an optimizer holds.

    Returns:
        Path of each copy -> path of what it is a copy of; no path is inside another.
    """
    if not trained:
        return {}
    parts = {path: module for path, module in modules_of(model).items() if path}
    held = {path: dict(module.named_parameters()) for path, module in parts.items()}
    kinds: dict[object, list[str]] = {}
    for path, module in parts.items():
        if any(id(p) in trained for p in held[path].values()):
            kinds.setdefault(_kind(module, held[path]), []).append(path)
    found: dict[str, str] = {}
    for path, module in parts.items():
        own = held[path]
        if any(path.startswith(f"{copy}.") for copy in found) or any(id(p) in trained for p in own.values()):
            continue
        alike = [(_cosine(own, held[other]), other) for other in kinds.get(_kind(module, own), ())]
        if alike and max(alike)[0] >= ALIKE:
            found[path] = max(alike)[1]
    return found


def _kind(module: nn.Module, parameters: dict[str, Tensor]) -> object:
    return type(module), tuple((name, tuple(p.shape)) for name, p in parameters.items())


def _cosine(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Of all their weights; what has one dimension (biases, scales of norms) is much alike in any two networks."""
    dot = first = second = 0.0
    for name, a in one.items():
        if a.dim() > 1:
            a, b = a.detach().float(), other[name].detach().float().to(a.device)
            dot += torch.vdot(a.flatten(), b.flatten()).item()
            first, second = first + a.square().sum().item(), second + b.square().sum().item()
    scale = (first * second) ** 0.5
    return dot / scale if scale else 0.0


def trained_by(optimizers: Iterable[Optimizer]) -> set[int]:
    """Ids of the parameters that optimizers change."""
    every = (parameter for optimizer in optimizers for group in optimizer.param_groups for parameter in group["params"])
    return {id(parameter) for parameter in every if parameter.requires_grad}


def original_of(path: str, copies: Mapping[str, str]) -> str | None:
    """What a module in a copy is a copy of; None for any other."""
    for copy, other in copies.items():
        if path == copy or path.startswith(f"{copy}."):
            return other + path[len(copy) :]
    return None


def tie_copies(trace: Trace, copies: Mapping[str, str]) -> None:
    """State that copies lose what the others lose; their layers make no neurons of their own."""
    labels = {(leaf.name, leaf.dim): leaf.labels for leaf in trace.leaves}
    for leaf in trace.leaves:
        known = labels.get((original_of(leaf.name, copies) or "", leaf.dim))
        if known is not None and len(known) == len(leaf.labels):
            trace.book.tie(known, leaf.labels)
    trace.followers |= copies.keys()
