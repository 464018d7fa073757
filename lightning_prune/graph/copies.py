"""Networks that follow another one, as momentum encoders and mean teachers do: they must lose the same neurons.

What averages the weights of one network into another may run anywhere: in the training step, in a hook after it, in a
callback. So it isn't observed; a copy is known by what it is.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

from lightning_prune.graph.trace import Trace

__all__ = ["copies_of_trained", "tie_copies"]

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
    parts = {path: module for path, module in model.named_modules() if path}
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


def tie_copies(trace: Trace, copies: dict[str, str]) -> None:
    """State that copies lose what the others lose; their layers make no neurons of their own."""
    labels = {(leaf.name, leaf.dim): leaf.labels for leaf in trace.leaves}
    for leaf in trace.leaves:
        for copy, other in copies.items():
            if leaf.name.startswith(f"{copy}."):
                known = labels.get((f"{other}.{leaf.name[len(copy) + 1 :]}", leaf.dim))
                if known is not None and len(known) == len(leaf.labels):
                    trace.book.tie(known, leaf.labels)
    trace.followers |= copies.keys()
