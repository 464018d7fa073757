"""What a sensitivity run measures with: data and metrics by import path, or the model's own predictions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lightning_prune.cli.inputs import describe
from lightning_prune.cli.models import import_object
from lightning_prune.cli.parser import theirs
from lightning_prune.errors import PruningError
from lightning_prune.graph.run import as_calls, run_calls, undisturbed
from lightning_prune.graph.tree import tensors
from lightning_prune.report.run import batch_size

__all__ = ["accuracy", "agreement", "find_data", "find_metric"]

EXAMPLES = 64
"""Random examples where there is no data."""


def predictions(outputs: Any) -> Tensor:
    """The class that each example, place or pixel gets.

    Raises:
        PruningError: The outputs don't look like those of a classifier.
    """
    found = [each for each in tensors(outputs) if each.is_floating_point() and each.dim() >= 2]
    many = isinstance(outputs, list | tuple) and any(isinstance(each, Mapping) for each in outputs)
    if not found or many:  # a dict for each image: boxes, not classes
        raise PruningError("the model's output is no scores of classes: name a metric with --metric")
    scores = found[0]
    dim = -1 if scores.dim() == 3 else 1  # (batch, place, class) of tokens, else (batch, class, …)
    if scores.size(dim) < 2:
        raise PruningError("the model's output has one value, no scores of classes: name a metric with --metric")
    return scores.argmax(dim)


def agreement(outputs: Any, targets: Any) -> float:
    """Fraction of the predictions that equal the target, which are the whole model's predictions or outputs."""
    wanted = targets if isinstance(targets, Tensor) and not targets.is_floating_point() else predictions(targets)
    return float((predictions(outputs) == wanted).float().mean())


def accuracy(outputs: Any, targets: Any) -> float:
    """Fraction of the predictions that are right; targets are class indices."""
    got = predictions(outputs)
    if not isinstance(targets, Tensor) or targets.is_floating_point() or targets.shape != got.shape:
        raise PruningError(f"accuracy wants class indices of shape {tuple(got.shape)} as targets: name a --metric")
    return float((got == targets).float().mean())


METRICS: dict[str, Callable[[Any, Any], float]] = {"agreement": agreement, "accuracy": accuracy}


def find_metric(name: str) -> Any:
    """A metric by name or import path."""
    if name in METRICS:
        return METRICS[name]
    if ":" not in name:
        raise PruningError(f"--metric is one of {', '.join(METRICS)} or an import path, got {name!r}")
    found = import_object(name)
    return _called(name, found) if isinstance(found, type) else found


def _called(spec: str, thing: Callable[[], Any]) -> Any:
    with theirs(spec):
        return thing()


def find_data(spec: str | None, model: nn.Module, inputs: Any, batches: int) -> list[Any]:
    """Pairs of inputs and targets.

    Args:
        spec: Import path of a LightningDataModule (class or object), of a DataLoader or other iterable, or of a
            function that gives one; None: random inputs, with the model's own predictions as targets.
        model: The model.
        inputs: What it takes.
        batches: At most so many; 0: all.

    Raises:
        PruningError: The data is none of these, or empty.
    """
    if batches < 0:
        raise PruningError(f"--batches is a whole number, 0 for all, got {batches}")
    if spec is None:
        return _own(model, inputs)
    found = import_object(spec)
    if isinstance(found, type) or (callable(found) and not hasattr(found, "__iter__") and not _is_module(found)):
        found = _called(spec, found)
    if _is_module(found):
        found = _called(spec, lambda: _loader(found))
    if not isinstance(found, Iterable):
        raise PruningError(f"{spec} gives no batches but {type(found).__name__}")
    pairs: list[Any] = _called(spec, lambda: list(islice(found, batches or None)))
    if not pairs:
        raise PruningError(f"{spec} gives no batch")
    return pairs


def _is_module(thing: Any) -> bool:
    return hasattr(thing, "val_dataloader") and hasattr(thing, "setup")


def _loader(data: Any) -> Any:
    data.prepare_data()
    data.setup("validate")
    return data.val_dataloader()


def _own(model: nn.Module, inputs: Any) -> list[Any]:
    """Random examples like the inputs, in batches of as many, and what the model predicts for them."""
    generator = torch.Generator().manual_seed(1)
    size = batch_size(as_calls(inputs), model)

    def like(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if value.is_floating_point():
            return torch.randn(value.shape, generator=generator).to(value) * value.std(correction=0) + value.mean()
        flat = value.flatten()
        return flat[torch.randint(0, flat.numel(), value.shape, generator=generator)]

    made = [inputs, *(tree_map(like, inputs) for _ in range(max(1, EXAMPLES // size) - 1))]
    with undisturbed(model), torch.no_grad(), theirs(f"{type(model).__name__} on inputs of {describe(inputs)}"):
        model.eval()
        return [(each, predictions(run_calls(model, as_calls(each))[0])) for each in made]
