"""Surgery: change the shapes of a model's tensors and of everything that follows them; can be undone.

No tensor is written to: every one that shrinks is replaced by a new one, so undoing is putting the old
ones back.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from lightning_prune.errors import PruningError

__all__ = ["Attributes", "Change", "Kept", "Undo", "enlarge", "fit_shapes", "fits", "named_tensors", "shrink", "take"]

Kept = Mapping[str, Mapping[int, Sequence[int]]]
Undo = Callable[[], None]
Replaced = dict[int, tuple[Tensor, Tensor, Mapping[int, Sequence[int]]]]
"""Id of a tensor -> itself, the smaller one in its place, what that keeps of each dimension."""

Attributes = dict[str, dict[str, tuple[int, int]]]
"""Module path -> attribute -> its value before and after."""


@dataclass
class Change:
    """What a surgery did, and how to take it back."""

    attributes: Attributes = field(default_factory=dict)
    steps: list[Undo] = field(default_factory=list)

    def undo(self) -> None:
        """Put everything back as it was."""
        while self.steps:
            self.steps.pop()()


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, each name of a shared one."""
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def take(tensor: Tensor, dims: Mapping[int, Sequence[int]]) -> Tensor:
    """A new contiguous tensor with only some indices along some dimensions."""
    result = tensor.detach()
    for dim, index in dims.items():
        result = result.index_select(dim, torch.as_tensor(index, device=tensor.device))
    return result.contiguous()


def shrink(model: nn.Module, kept: Kept, optimizers: Iterable[Optimizer] = ()) -> Change:
    """Keep only some indices of a model's parameters and buffers.

    Shared parameters stay shared, gradients and optimizer state shrink alike, the size attributes of torch's
    layers (``in_features``, ``num_features``, ``groups``, …) tell the truth afterwards.

    Args:
        model: The model.
        kept: Name of a parameter or buffer -> dimension -> indices to keep.
        optimizers: Those that hold its parameters.

    Returns:
        What was done, with ``undo()``.

    Raises:
        PruningError: A name or an index does not exist; nothing was changed.
    """
    tensors = named_tensors(model)
    replaced: Replaced = {}
    for name, dims in kept.items():
        if name not in tensors:
            raise PruningError(f"{type(model).__name__} has no parameter or buffer {name!r}")
        old = tensors[name]
        for dim, index in dims.items():
            size = old.size(dim) if 0 <= dim < old.dim() else 0
            if len(index) == 0 or not 0 <= min(index) <= max(index) < size:
                raise PruningError(f"{name!r} of shape {tuple(old.shape)} has no such indices in dim {dim}: {index}")
        replaced[id(old)] = (old, _shrunk(old, dims), dims)

    change = Change()
    try:
        for path, module in model.named_modules():
            _replace(path, module, replaced, change)
        for optimizer in optimizers:
            _follow(optimizer, replaced, change)
    except BaseException:
        change.undo()
        raise
    return change


def _replace(path: str, module: nn.Module, replaced: Replaced, change: Change) -> None:
    """Put the smaller tensors into one module."""
    before = dict(module.__dict__)
    registries: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
    for registry in registries:
        for key, tensor in registry.items():
            if tensor is not None and id(tensor) in replaced:
                change.steps.append(_setter(registry, key, tensor))
                registry[key] = replaced[id(tensor)][1]
    for attribute, value in _sizes(module, before).items():
        if before[attribute] != value:
            change.steps.append(_setter(module.__dict__, attribute, before[attribute]))
            change.attributes.setdefault(path, {})[attribute] = (before[attribute], value)
            module.__dict__[attribute] = value


def _setter(target: Any, key: Any, value: Any) -> Undo:
    def put_back() -> None:
        target[key] = value

    return put_back


def _shrunk(old: Tensor, dims: Mapping[int, Sequence[int]]) -> Tensor:
    data = take(old, dims)
    if not isinstance(old, nn.Parameter):
        return data
    new = nn.Parameter(data, requires_grad=old.requires_grad)
    if old.grad is not None:
        new.grad = take(old.grad, dims)
    new.__dict__.update(old.__dict__)
    return new


def _sizes(module: nn.Module, before: Mapping[str, Any]) -> dict[str, Any]:
    """What the size attributes of torch's own layers must be, given the shapes of their tensors."""
    weight: Any = getattr(module, "weight", None)
    if isinstance(module, nn.Linear):
        return {"in_features": weight.size(1), "out_features": weight.size(0)}
    if isinstance(module, nn.modules.conv._ConvNd):
        depthwise = before["groups"] > 1 and before["groups"] == before["in_channels"] == before["out_channels"]
        groups = weight.size(0) if depthwise else module.groups
        first, second = weight.size(0), weight.size(1) * groups
        if module.transposed:
            first, second = weight.size(1) * groups, weight.size(0)
        return {"out_channels": first, "in_channels": second, "groups": groups}
    if isinstance(module, nn.modules.batchnorm._NormBase):
        holder = next((t for t in (weight, module.running_mean) if t is not None), None)
        return {} if holder is None else {"num_features": holder.numel()}
    if isinstance(module, nn.PReLU):
        return {"num_parameters": weight.numel()}
    return {}


def _follow(optimizer: Optimizer, replaced: Replaced, change: Change) -> None:
    """Make an optimizer hold the new parameters, with the state of what was kept."""
    if not any(id(p) in replaced for group in optimizer.param_groups for p in group["params"]):
        return
    for group in optimizer.param_groups:
        parameters = list(group["params"])
        change.steps.append(_setter(group["params"], slice(None), parameters))
        # The list itself stays: an optimizer may hold on to it, as LBFGS does.
        group["params"][:] = [replaced[id(p)][1] if id(p) in replaced else p for p in parameters]
        for old in parameters:
            if id(old) in replaced and old in optimizer.state:
                new, dims = replaced[id(old)][1:]
                state = optimizer.state[old]
                change.steps.append(_setter(optimizer.state, old, state))
                del optimizer.state[old]
                change.steps.append(_deleter(optimizer.state, new))
                optimizer.state[new] = _shrunk_state(state, old, dims, type(optimizer).__name__)
    if isinstance(optimizer, LBFGS):
        _restart(optimizer, change)


def _restart(optimizer: LBFGS, change: Change) -> None:
    """LBFGS has one history over all its parameters together, and counts them once: both start anew."""
    for parameter, state in optimizer.state.items():
        if state:
            warnings.warn("LBFGS keeps one history of all its parameters: it starts anew", stacklevel=2)
            change.steps.append(_setter(optimizer.state, parameter, state))
            optimizer.state[parameter] = {}
    change.steps.append(_setter(optimizer.__dict__, "_numel_cache", optimizer._numel_cache))
    optimizer._numel_cache = None


def _deleter(target: Any, key: Any) -> Undo:
    def put_back() -> None:
        target.pop(key, None)

    return put_back


def _shrunk_state(
    state: Mapping[str, Any], old: Tensor, dims: Mapping[int, Sequence[int]], optimizer: str
) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in state.items():
        if isinstance(value, Tensor) and value.shape == old.shape:
            result[key] = take(value, dims)
        elif not isinstance(value, Tensor | list | tuple | dict) or (isinstance(value, Tensor) and value.dim() == 0):
            result[key] = value
        else:
            shape = f" of shape {tuple(value.shape)}" if isinstance(value, Tensor) else ""
            warnings.warn(
                f"{optimizer} keeps {key!r}{shape} for a parameter of shape {tuple(old.shape)}: it can't follow "
                "the removal, so the optimizer state of this parameter starts anew",
                stacklevel=2,
            )
            return {}
    return result


def fits(small: Sequence[int], large: Sequence[int]) -> bool:
    """Whether a tensor of one shape can be a tensor of the other after pruning."""
    return len(small) == len(large) and all(a <= b for a, b in zip(small, large, strict=True))


def fit_shapes(model: nn.Module, shapes: Mapping[str, list[int]]) -> Change:
    """Shrink a model's tensors to given shapes; which values they hold doesn't matter, others will be loaded.

    Returns:
        What was done, with ``undo()``.

    Raises:
        PruningError: A tensor is smaller than asked for or has other dimensions; the model is untouched.
    """
    kept: dict[str, dict[int, range]] = {}
    for name, tensor in named_tensors(model).items():
        wanted = shapes.get(name)
        if wanted is None or list(tensor.shape) == list(wanted):
            continue
        if not fits(wanted, tensor.shape):
            raise PruningError(
                f"{name!r} of shape {tuple(tensor.shape)} can't be pruned to {tuple(wanted)}: another architecture"
            )
        kept[name] = {dim: range(size) for dim, size in enumerate(wanted) if size != tensor.size(dim)}
    return shrink(model, kept)


def enlarge(model: nn.Module, shapes: Mapping[str, Sequence[int]], attributes: Attributes) -> None:
    """Give tensors of a pruned model their old shapes back, filled up with zeros; the values' places are lost.

    For measuring what the model was before: its cost depends on shapes alone.
    """
    tensors = named_tensors(model)
    larger: dict[int, Tensor] = {}
    for name, shape in shapes.items():
        old = tensors[name]
        if id(old) not in larger:
            data = old.new_zeros(tuple(shape))
            data[tuple(slice(size) for size in old.shape)] = old.detach()
            larger[id(old)] = nn.Parameter(data, old.requires_grad) if isinstance(old, nn.Parameter) else data
    for path, module in model.named_modules():
        for registry in (module._parameters, module._buffers):
            for key, tensor in registry.items():
                if tensor is not None and id(tensor) in larger:
                    registry[key] = larger[id(tensor)]
        for attribute, (before, _) in attributes.get(path, {}).items():
            module.__dict__[attribute] = before
