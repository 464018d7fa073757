"""Saving and loading pruned models as safetensors: no pickled classes, sparse tensors stored compactly."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import replace
from os import PathLike
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_prune.activations.apply import Change, apply_changes, present_activations, take_back_changes
from lightning_prune.errors import PruningError
from lightning_prune.graph.callsites import SizePatch, install_patches, installed_patches, remove_patches
from lightning_prune.graph.tree import named_tensors
from lightning_prune.pruning.masks import INTEGERS
from lightning_prune.pruning.passing import Form, inside, passes, passing_layers, remove_modules
from lightning_prune.pruning.surgery import Numbers, fit_shapes, fits

__all__ = ["load_pruned", "save_pruned"]

FORMAT = "1"
_MASK, _VALUES = ".__mask__", ".__values__"


def save_pruned(model: nn.Module, path: str | PathLike[str]) -> None:
    """Save a model's state as one safetensors file that needs no code of ours to be read where it is dense.

    A tensor with so many zeros that it pays is stored as a bit per element and its non-zero values. Buffers that
    are not in the state dict are in the file, because pruning shrinks them too. Sizes that had to be rewritten in
    a forward are in the file's metadata, and so is a checksum.

    Args:
        model: A pruned model, or any other.
        path: The file; one that exists is replaced.

    Raises:
        PruningError: The state dict holds something else than tensors or lazy ones, or the file can't be written;
            nothing was.
    """
    stored: dict[str, Tensor] = {}
    shapes: dict[str, list[int]] = {}
    aliases: dict[str, str] = {}
    seen: dict[int, str] = {}
    state = model.state_dict(keep_vars=True)
    transient = _transient(model, state)
    for name, tensor in (state | transient).items():
        if not isinstance(tensor, Tensor):
            raise PruningError(
                f"{name!r} in the state dict of {type(model).__name__} is no tensor but {type(tensor).__name__}: "
                "a safetensors file can't hold it"
            )
        if is_lazy(tensor):
            raise PruningError(
                f"{name!r} of a lazy module has no values yet; run {type(model).__name__} on an input once"
            )
        if id(tensor) in seen:
            aliases[name] = seen[id(tensor)]
            continue
        seen[id(tensor)] = name
        shapes[name] = list(tensor.shape)
        _encode(name, tensor.detach().cpu().contiguous(), stored)
    content = json.dumps(
        {
            "shapes": shapes,
            "aliases": aliases,
            "patches": [patch.to_dict() for patch in installed_patches(model)],
            "activations": {name: each.to_dict() for name, each in present_activations(model).items()},
            "transient": list(transient),
            "numbers": _numbers(model),
            "passing": {path: form.to_dict() for path, form in passing_layers(model).items()},
        }
    )
    checksum = _checksum(content, stored)
    try:
        save_file(stored, path, metadata={"lightning_prune": FORMAT, "content": content, "checksum": checksum})
    except SafetensorError as error:  # its own kind, for a full disk and a missing folder too
        raise PruningError(f"can't write {path}: {error}") from error


def _numbers(model: nn.Module) -> dict[str, dict[str, int | list[int]]]:
    """The integers that modules hold, by path: numbers of heads and groups are in no tensor's shape."""
    found: dict[str, dict[str, int | list[int]]] = {}
    for path, module in model.named_modules():
        for name, value in module.__dict__.items():
            if name.startswith("_"):
                continue
            if type(value) is int:
                found.setdefault(path, {})[name] = value
            elif type(value) in (tuple, list) and value and all(type(item) is int for item in value):
                found.setdefault(path, {})[name] = list(value)
    return found


def _transient(model: nn.Module, state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The buffers that the state dict leaves out (``persistent=False``)."""
    return {name: buffer for name, buffer in model.named_buffers(remove_duplicate=False) if name not in state}


def _checksum(content: str, stored: Mapping[str, Tensor]) -> str:
    """CRC-32 of all that a file holds: safetensors has none, and a flipped bit would be another model."""
    crc = zlib.crc32(content.encode())
    for name in sorted(stored):
        tensor = stored[name]
        crc = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), crc)
        crc = zlib.crc32(tensor.contiguous().view(-1).view(torch.uint8).numpy().data, crc)
    return f"{crc:08x}"


def _encode(name: str, tensor: Tensor, stored: dict[str, Tensor]) -> None:
    """Store a tensor as it is, or as bits and non-zero values where that is smaller. Bit-exact: -0.0 is kept."""
    flat = tensor.flatten()
    if not tensor.is_floating_point() or tensor.element_size() not in INTEGERS:
        stored[name] = tensor.clone()  # safetensors refuses tensors that share memory
        return
    nonzero = flat.view(INTEGERS[tensor.element_size()]) != 0
    if int(nonzero.sum()) * tensor.element_size() + (flat.numel() + 7) // 8 >= flat.numel() * tensor.element_size():
        stored[name] = tensor.clone()
        return
    padded = torch.nn.functional.pad(nonzero, (0, -flat.numel() % 8)).view(-1, 8)
    stored[name + _MASK] = (padded * (1 << torch.arange(8))).sum(1).to(torch.uint8)
    stored[name + _VALUES] = flat.view(INTEGERS[tensor.element_size()])[nonzero].view(tensor.dtype)


def _decode(name: str, shape: list[int], stored: Mapping[str, Tensor]) -> Tensor:
    if name in stored:
        return stored[name].view(shape)
    bits, values = stored[name + _MASK], stored[name + _VALUES]
    numel = int(torch.Size(shape).numel())
    nonzero = (bits.unsqueeze(1) & (1 << torch.arange(8)).to(torch.uint8)).ne(0).flatten()[:numel]
    bytes_ = INTEGERS[values.element_size()]
    tensor = torch.zeros(numel, dtype=bytes_)
    tensor[nonzero] = values.view(bytes_)
    return tensor.view(values.dtype).view(shape)


def load_pruned(path: str | PathLike[str], model: nn.Module) -> nn.Module:
    """Give a fresh full-size model the architecture and the state that `save_pruned` wrote.

    Args:
        path: The file.
        model: A model of the class and constructor arguments that the saved one had before pruning. Changed in
            place.

    Returns:
        ``model``.

    Raises:
        PruningError: The file is damaged or no file of ours, or it doesn't fit the model; ``model`` is untouched.
    """
    state, transient, patches, numbers, passing, activations = _read(path)
    fresh = {name: form for name, form in passing.items() if not passes(model, name)}
    removal = remove_modules(
        model, {name: form for name, form in fresh.items() if not inside(name, fresh, proper=True)}
    )
    try:
        _load(path, model, state, transient, patches, numbers, activations)
    except BaseException:
        removal.undo()
        raise
    return model


def _load(
    path: str | PathLike[str],
    model: nn.Module,
    state: dict[str, Tensor],
    transient: dict[str, Tensor],
    patches: list[SizePatch],
    numbers: Numbers,
    activations: Mapping[str, Change],
) -> None:
    """Give a model that has the layers of a file their shapes and values; one that doesn't fit is untouched."""
    expected = model.state_dict()
    if set(state) != set(expected):
        missing, extra = sorted(set(expected) - set(state)), sorted(set(state) - set(expected))
        raise PruningError(f"{path} doesn't fit {type(model).__name__}: it lacks {missing}, it has in excess {extra}")
    buffers = _transient(model, expected)
    transient = {  # one of another shape is a cache that the forward fills, not something that was pruned
        name: value for name, value in transient.items() if name in buffers and fits(value.shape, buffers[name].shape)
    }
    shapes = {name: list(tensor.shape) for name, tensor in (state | transient).items()}
    chosen = _differing(model, activations)
    change = fit_shapes(model, shapes, _fitting(model, numbers))
    before = installed_patches(model)
    values = [(tensor, tensor.detach().clone()) for tensor in named_tensors(model).values()]
    try:
        install_patches(model, patches)
        apply_changes(model, chosen)
        model.load_state_dict(state)
        with torch.no_grad():
            for name, value in transient.items():
                model.get_buffer(name).copy_(value)
    except BaseException:
        with torch.no_grad():
            for tensor, value in values:
                tensor.copy_(value)
        change.undo()
        take_back_changes(model, chosen)
        remove_patches(model)
        install_patches(model, before)
        raise


def _differing(model: nn.Module, activations: Mapping[str, Change]) -> dict[str, Change]:
    """Those of the saved activations that the model doesn't have anyway, and what it has there."""
    own = present_activations(model)
    chosen = {name: each for name, each in activations.items() if each.owner is not None or name in own}
    missing = sorted(set(activations) - set(chosen))
    if missing:
        raise PruningError(f"{type(model).__name__} has no activation module {missing[0]!r}, which the file holds")
    return {
        name: each if each.owner is not None else replace(each, before=own[name].after)
        for name, each in chosen.items()
        if name not in own or own[name].after != each.after
    }


def _fitting(model: nn.Module, numbers: Numbers) -> Numbers:
    """Those of the saved integers that the model holds too, in the same places."""
    own = _numbers(model)
    return {
        path: {name: value for name, value in named.items() if type(own.get(path, {}).get(name)) is type(value)}
        for path, named in numbers.items()
        if path in own
    }


def _read(
    path: str | PathLike[str],
) -> tuple[dict[str, Tensor], dict[str, Tensor], list[SizePatch], Numbers, dict[str, Form], dict[str, Change]]:
    """State dict, buffers beside it, patches, integers that modules hold, what passes its input on, activations."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata: Any = file.metadata() or {}
            stored = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise PruningError(f"{path} is no safetensors file, or it is damaged: {error}") from error
    if metadata.get("lightning_prune") != FORMAT:
        raise PruningError(f"{path} was not written by save_pruned")
    try:
        if metadata["checksum"] != _checksum(metadata["content"], stored):
            raise ValueError("the checksum differs")
        content = json.loads(metadata["content"])
        state = {name: _decode(name, shape, stored) for name, shape in content["shapes"].items()}
        state.update({name: state[first] for name, first in content["aliases"].items()})
        transient = {name: state.pop(name) for name in content["transient"]}
        patches = [SizePatch.from_dict(patch) for patch in content["patches"]]
        passing = {name: Form.from_dict(form) for name, form in content.get("passing", {}).items()}
        activations = {name: Change.from_dict(each) for name, each in content.get("activations", {}).items()}
        return state, transient, patches, content.get("numbers", {}), passing, activations
    except (AttributeError, KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
        raise PruningError(f"{path} is damaged: {type(error).__name__}: {error}") from error
