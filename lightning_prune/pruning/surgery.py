"""Surgery: change the shapes of a model's tensors and of everything that follows them; can be undone.

No tensor is written to: every one that shrinks is replaced by a new one, so undoing is putting the old
ones back.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_prune.errors import PruningError
from lightning_prune.graph.tree import OWN, modules_of, named_tensors
from lightning_prune.pruning.attention import NarrowAttention, install_narrow_attention, remove_narrow_attention
from lightning_prune.pruning.change import (
    HOLDERS,
    Attributes,
    Change,
    Indices,
    Replaced,
    Undo,
    Value,
    refer,
    setter,
    take,
)
from lightning_prune.pruning.optimizers import follow

__all__ = [
    "Attributes",
    "Change",
    "Counts",
    "Kept",
    "Numbers",
    "Undo",
    "Value",
    "enlarge",
    "fit_shapes",
    "fits",
    "named_tensors",
    "shrink",
    "take",
]

Kept = Mapping[str, Mapping[int, Indices]]
Numbers = Mapping[str, Mapping[str, Value]]
"""Module path -> attribute -> its value afterwards."""

Counts = Mapping[str, Sequence[int]]
"""Buffer of indices -> the indices that stay of what it counts along."""


def shrink(
    model: nn.Module,
    kept: Kept,
    optimizers: Iterable[Optimizer] = (),
    *,
    counts: Counts | None = None,
    numbers: Numbers | None = None,
) -> Change:
    """Keep only some indices of a model's parameters and buffers.

    Shared parameters stay shared, gradients and optimizer state shrink alike, the size attributes of torch's
    layers (``in_features``, ``num_features``, ``groups``, …) tell the truth afterwards.

    Args:
        model: The model.
        kept: Name of a parameter or buffer -> dimension -> indices to keep.
        optimizers: Those that hold its parameters.
        counts: Buffers that hold indices -> the indices that stay of what they count along.
        numbers: Further integers that modules hold, and their values afterwards.

    Returns:
        What was done, with ``undo()``.

    Raises:
        PruningError: A name or an index does not exist; nothing was changed.
    """
    tensors = named_tensors(model)
    counts = counts or {}
    replaced: Replaced = {}
    for name in (*kept, *(name for name in counts if name not in kept)):
        if name not in tensors:
            raise PruningError(f"{type(model).__name__} has no parameter or buffer {name!r}")
        old = tensors[name]
        dims = {dim: torch.as_tensor(index) for dim, index in kept.get(name, {}).items()}
        for dim, index in dims.items():
            size = old.size(dim) if 0 <= dim < old.dim() else 0
            if len(index) == 0 or not 0 <= int(index.min()) <= int(index.max()) < size:
                listed = index.tolist()
                raise PruningError(f"{name!r} of shape {tuple(old.shape)} has no such indices in dim {dim}: {listed}")
        if id(old) not in replaced:
            new = _shrunk(old, dims)
            replaced[id(old)] = (old, _renumbered(new, counts[name]) if name in counts else new, dims)
    modules = modules_of(model)
    for path in numbers or {}:
        if path not in modules:
            raise PruningError(f"{type(model).__name__} has no module {path!r}")

    change = Change()
    try:
        smaller = {key: new for key, (_, new, _) in replaced.items()}
        fresh = set(map(id, smaller.values()))
        before = {path: dict(module.__dict__) for path, module in modules.items()}
        known = {path: None if numbers is None else numbers.get(path, {}) for path in modules}
        touched = {path for path, m in modules.items() if _replace(path, m, before[path], smaller, known[path], change)}
        for path, module in modules.items():  # when all are in place: a parametrized weight is made of those below it
            if path in touched or _is_parametrized(module, fresh):
                for attribute, value in layer_sizes(module, before[path], known[path]).items():
                    set_attribute(path, module, attribute, value, change)
        for path, module in modules.items():
            if isinstance(module, nn.MultiheadAttention):
                _narrow(path, module, kept, (numbers or {}).get(path, {}), change)
        for optimizer in optimizers:
            follow(optimizer, replaced, change)
    except BaseException:
        change.undo()
        raise
    return change


def _renumbered(index: Tensor, left: Sequence[int]) -> Tensor:
    """Indices into a dimension of which only some are left."""
    return torch.searchsorted(torch.as_tensor(left, dtype=index.dtype, device=index.device), index).to(index.dtype)


def _replace(
    path: str,
    module: nn.Module,
    before: Mapping[str, Any],
    new: Mapping[int, Tensor],
    numbers: Mapping[str, Value] | None,
    change: Change,
) -> bool:
    """Put the smaller tensors into one module, and the numbers it is to hold; whether tensors of its own went."""
    registries: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
    touched = False
    for registry in registries:
        for key, tensor in registry.items():
            if tensor is not None and id(tensor) in new:
                change.steps.append(setter(registry, key, tensor))
                registry[key] = new[id(tensor)]
                touched = True
    for key, value in before.items():
        if key in OWN or not isinstance(value, HOLDERS):
            continue
        if isinstance(value, Tensor):  # also what old-style weight_norm computes anew in each forward
            change.steps.append(setter(module.__dict__, key, value))
        current = refer(list(value) if key == "_flat_weights" else value, new, change)
        if current is not value:
            change.steps.append(setter(module.__dict__, key, value))
            module.__dict__[key] = current
    if touched and isinstance(module, nn.RNNBase):  # its list may hold what a functional call has put there
        module._flat_weights = [module._parameters.get(name) for name in module._flat_weights_names]
    if numbers and not isinstance(module, nn.MultiheadAttention):  # what this one holds follows from its weights
        for attribute, value in numbers.items():
            set_attribute(path, module, attribute, value, change)
    return touched


def _is_parametrized(module: nn.Module, fresh: Collection[int]) -> bool:
    """Whether some of the tensors that its weights are made of are new."""
    parametrizations = getattr(module, "parametrizations", None)
    return isinstance(parametrizations, nn.Module) and any(id(p) in fresh for p in parametrizations.parameters())


def set_attribute(path: str, module: nn.Module, attribute: str, value: Value, change: Change) -> None:
    """Give a module's attribute another value, and remember the one it had."""
    old = module.__dict__.get(attribute)
    if isinstance(old, (tuple, list)) and isinstance(value, (tuple, list)):
        value = type(old)(value)
    if old is None or old == value:
        return
    change.steps.append(setter(module.__dict__, attribute, old))
    first = change.attributes.setdefault(path, {}).get(attribute, (old, value))[0]
    change.attributes[path][attribute] = (first, value)
    module.__dict__[attribute] = value


def _narrow(path: str, module: nn.MultiheadAttention, kept: Kept, numbers: Mapping[str, Value], change: Change) -> None:
    """Attention whose heads no longer add up to the width of its input needs a forward that lets them."""
    prefix = f"{path}." if path else ""
    packed = module.in_proj_weight is not None
    name = f"{prefix}{'in_proj_weight' if packed else 'q_proj_weight'}"
    weight: Any = module.in_proj_weight if packed else module.q_proj_weight
    rows: Indices | None = kept.get(name, {}).get(0)
    heads, size = module.num_heads, module.head_dim
    if rows is not None:
        own = len(weight) // 3 if packed else len(weight)
        heads = len({int(row) // size for row in rows[:own]})
        size = own // heads
    if isinstance(given := numbers.get("num_heads"), int):  # a record of what was done tells
        heads, size = given, (len(weight) // 3 if packed else len(weight)) // given
    key: Any = weight if packed else module.k_proj_weight
    value: Any = weight if packed else module.v_proj_weight
    sizes = {"num_heads": heads, "head_dim": size, "embed_dim": weight.size(1)}
    sizes |= {"kdim": key.size(1), "vdim": value.size(1)}
    before = module.__dict__.get("forward")
    narrow = before if isinstance(before, NarrowAttention) else None
    scale = module.head_dim**-0.5 if narrow is None else narrow.scale
    for attribute, number in sizes.items():
        set_attribute(path, module, attribute, number, change)
    if heads * size != weight.size(1) or size != round(scale**-2):
        change.steps.append(install_narrow_attention(module, scale))
        set_attribute(path, module, "_qkv_same_embed_dim", False, change)  # keeps torch's fast path off
    elif narrow is not None:  # the width has followed since
        change.steps.append(setter(module.__dict__, "forward", narrow))
        remove_narrow_attention(module)
        set_attribute(path, module, "_qkv_same_embed_dim", packed, change)


def _shrunk(old: Tensor, dims: Mapping[int, Tensor]) -> Tensor:
    data = take(old, dims)
    if not isinstance(old, nn.Parameter):
        return data
    new = nn.Parameter(data, requires_grad=old.requires_grad)
    if old.grad is not None:
        new.grad = take(old.grad, dims)
    return _stand_in(new, old)


def _stand_in(new: nn.Parameter, old: nn.Parameter) -> nn.Parameter:
    """Give a parameter what users have put on the one whose place it takes."""
    new.__dict__.update(old.__dict__)
    # The very dictionaries: a handle that the user has kept takes its hook out of them.
    if old._backward_hooks:
        new._backward_hooks = old._backward_hooks
    if old._post_accumulate_grad_hooks:
        new._post_accumulate_grad_hooks = old._post_accumulate_grad_hooks
    return new


def _weight_of(module: nn.Module) -> Tensor | None:
    """A layer's weight, or what has its shape where a parametrization computes it."""
    for name in ("weight", "weight_v", "weight_orig"):
        if module._parameters.get(name) is not None:
            return module._parameters[name]
    parametrizations = getattr(module, "parametrizations", None)
    modes = {m: m.training for m in parametrizations.modules()} if isinstance(parametrizations, nn.Module) else {}
    try:
        for part in modes:  # spectral norm takes a step in each training forward
            part.training = False
        weight = getattr(module, "weight", None)
    finally:
        for part, training in modes.items():
            part.training = training
    return weight if isinstance(weight, Tensor) else None


def layer_sizes(module: nn.Module, before: Mapping[str, Any], numbers: Mapping[str, Value] | None) -> dict[str, Value]:
    """What the size attributes of torch's own layers must be, given the shapes of their tensors.

    Args:
        module: The layer, with its new tensors.
        before: Its attributes before.
        numbers: Those of them that shapes don't tell; None if only the shapes are known.
    """
    weight: Any = _weight_of(module)
    if isinstance(module, nn.Linear):
        return {"in_features": weight.size(1), "out_features": weight.size(0)}
    if isinstance(module, nn.modules.conv._ConvNd):
        groups = module.groups if numbers is not None else _groups_of(module, weight, before)
        first, second = weight.size(0), weight.size(1) * groups
        if module.transposed:
            first, second = weight.size(1) * groups, weight.size(0)
        return {"out_channels": first, "in_channels": second, "groups": groups, **_kernel_sizes(module, weight, before)}
    if isinstance(module, nn.modules.batchnorm._NormBase):
        holder = next((t for t in (weight, module.running_mean) if t is not None), None)
        return {} if holder is None else {"num_features": holder.numel()}
    if isinstance(module, nn.GroupNorm):
        return {} if weight is None else {"num_channels": weight.numel()}
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return {} if weight is None else {"normalized_shape": tuple(weight.shape)}
    if isinstance(module, nn.PReLU):
        return {"num_parameters": weight.numel()}
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return {"num_embeddings": weight.size(0), "embedding_dim": weight.size(1)}
    if isinstance(module, nn.Bilinear):
        out, one, other = weight.shape
        return {"in1_features": one, "in2_features": other, "out_features": out}
    if isinstance(module, nn.RNNBase):
        gates = {"LSTM": 4, "GRU": 3}.get(module.mode, 1)
        ih: Any = module._parameters["weight_ih_l0"]
        projection = module._parameters.get("weight_hr_l0")
        sizes = {"input_size": ih.size(1), "hidden_size": ih.size(0) // gates}
        return sizes if projection is None else {**sizes, "proj_size": projection.size(0)}
    if isinstance(module, nn.RNNCellBase):
        return {"input_size": module.weight_ih.size(1), "hidden_size": module.weight_hh.size(1)}
    return {}


def _kernel_sizes(module: Any, weight: Tensor, before: Mapping[str, Any]) -> dict[str, Value]:
    """What a convolution must hold when its kernel has lost outer rings, so that its output keeps its shape.

    A ring of zeros reads nothing, so the convolution pads by one dilation less on either side. Where it pads by less
    than that, its input is cropped instead: that is a padding below zero, which `F.pad` knows and a convolution does
    only if its padding has a mode of its own; a constant of zero is the mode that changes nothing else.
    """
    old, new = before["kernel_size"], tuple(weight.shape[2:])
    if old == new or len(old) != len(new):
        return {}
    less = [dilation * ((a - b) // 2) for dilation, a, b in zip(before["dilation"], old, new, strict=True)]
    # The last dimension comes first, each with its two sides.
    sides = before["_reversed_padding_repeated_twice"]
    sides = tuple(side - less[-1 - at // 2] for at, side in enumerate(sides))
    sizes: dict[str, Value] = {"kernel_size": new, "_reversed_padding_repeated_twice": sides}
    padding = before["padding"]
    if padding == "same":
        return sizes
    each = (0,) * len(less) if padding == "valid" else padding
    each = tuple(pad - own for pad, own in zip(each, less, strict=True))
    if min(each) < 0 and not module.transposed:
        return {**sizes, "padding": each, "padding_mode": "constant"}
    return {**sizes, "padding": each}


def _groups_of(module: Any, weight: Tensor, before: Mapping[str, Any]) -> int:
    """The groups of a convolution, from shapes alone: whole ones went, unless what a group makes has shrunk."""
    groups: int = before["groups"]
    made = weight.size(1) if module.transposed else weight.size(0)
    if module.transposed or groups == 1:
        inside = before["in_channels"] // groups
        return weight.size(0) // inside if groups > 1 and weight.size(0) % inside == 0 else groups
    each = before["out_channels"] // groups
    return made // each if made % each == 0 else groups


def fits(small: Sequence[int], large: Sequence[int]) -> bool:
    """Whether a tensor of one shape can be a tensor of the other after pruning."""
    return len(small) == len(large) and all(a <= b for a, b in zip(small, large, strict=True))


def fit_shapes(model: nn.Module, shapes: Mapping[str, list[int]], numbers: Numbers | None = None) -> Change:
    """Shrink a model's tensors to given shapes; which values they hold doesn't matter, others will be loaded.

    Args:
        model: The model.
        shapes: Shapes of parameters and buffers.
        numbers: Integers that its modules are to hold, where these are known.

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
    return shrink(model, kept, numbers=numbers)


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
            larger[id(old)] = data
            if isinstance(old, nn.Parameter):
                larger[id(old)] = _stand_in(nn.Parameter(data, old.requires_grad), old)
    for path, module in modules_of(model).items():
        for registry in (module._parameters, module._buffers):
            for key, tensor in registry.items():
                if tensor is not None and id(tensor) in larger:
                    registry[key] = larger[id(tensor)]
        for attribute, (before, _) in attributes.get(path, {}).items():
            module.__dict__[attribute] = before
        for key, value in list(module.__dict__.items()):
            if key not in ("_parameters", "_buffers"):
                module.__dict__[key] = refer(value, larger, Change())
        if isinstance(module, nn.MultiheadAttention):
            remove_narrow_attention(module)
