"""Optimizers follow a removal: their groups, the state of each parameter, and what else they hold of parameters."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import LBFGS, Optimizer

from lightning_prune.pruning.change import Change, Replaced, refer, setter, take

__all__ = ["follow", "forget", "renew", "with_inner"]

_OWN = ("state", "param_groups", "defaults")
_ROWS, _COLUMNS = ("_row", "row_var"), ("_col", "col_var")
"""How Adafactors name the means over a parameter's last dimension, and over the one before."""


def with_inner(optimizer: Optimizer) -> list[Optimizer]:
    """An optimizer and those that it holds, as wrappers do (Lookahead, SAM): they may have a state of their own."""
    found = [optimizer]
    for each in found:  # grows on the way
        for value in each.__dict__.values():
            for item in value if isinstance(value, (list, tuple)) else (value,):
                if isinstance(item, Optimizer) and not any(item is other for other in found):
                    found.append(item)
    return found


def follow(optimizer: Optimizer, replaced: Replaced, change: Change) -> None:
    """Make an optimizer, and those inside, hold the new parameters, with the state of what was kept.

    Tensors that they hold beside their state follow where they stand in a parameter's place: in a list as long as the
    parameters, in one such list per group, or in a dictionary with parameters for keys.
    """
    every = with_inner(optimizer)
    before = [[list(group["params"]) for group in each.param_groups] for each in every]
    for each, groups in zip(every, before, strict=True):
        if not any(id(p) in replaced for group in groups for p in group):
            continue
        _rewrite_groups(each, lambda p: replaced[id(p)][1] if id(p) in replaced else p, change)
        name = type(each).__name__
        for old in [p for p in each.state if id(p) in replaced]:
            new, dims = replaced[id(old)][1:]
            state = each.state[old]
            change.steps.append(setter(each.state, old, state))
            del each.state[old]
            change.steps.append(_deleter(each.state, new))
            each.state[new] = _shrunk_state(state, old, dims, name)
        _rewrite_beside(each, groups, lambda p, held: _smaller(p, held, replaced), change)
        if isinstance(each, LBFGS):
            _restart(each, change)


def forget(optimizer: Optimizer, gone: Collection[int], change: Change) -> None:
    """Take parameters, by id, out of an optimizer and those inside, and their state; an empty group stays."""
    every = with_inner(optimizer)
    before = [[list(group["params"]) for group in each.param_groups] for each in every]
    for each, groups in zip(every, before, strict=True):
        if not any(id(p) in gone for group in groups for p in group):
            continue
        _rewrite_groups(each, lambda p: None if id(p) in gone else p, change)
        for parameter in [p for p in each.state if id(p) in gone]:
            change.steps.append(setter(each.state, parameter, each.state[parameter]))
            del each.state[parameter]
        _rewrite_beside(each, groups, lambda p, held: None if id(p) in gone else held, change)
        if isinstance(each, LBFGS):
            _restart(each, change)


def renew(optimizer: Optimizer, new: Mapping[int, Tensor]) -> None:
    """Make an optimizer, and those inside, hold other parameters, by id, in place of some; their state starts anew."""
    change = Change()
    for each in with_inner(optimizer):
        if not any(id(p) in new for group in each.param_groups for p in group["params"]):
            continue
        _rewrite_groups(each, lambda p: new.get(id(p), p), change)
        for parameter in [p for p in each.state if id(p) in new]:
            del each.state[parameter]
        refer({key: value for key, value in each.__dict__.items() if key not in _OWN}, new, change)
        if isinstance(each, LBFGS):
            _restart(each, change)


def _rewrite_groups(optimizer: Optimizer, rewrite: Callable[[Tensor], Tensor | None], change: Change) -> None:
    for group in optimizer.param_groups:
        parameters = list(group["params"])
        change.steps.append(setter(group["params"], slice(None), parameters))
        # The list itself stays: an optimizer may hold on to it, as LBFGS does.
        group["params"][:] = [new for p in parameters if (new := rewrite(p)) is not None]


Rewrite = Callable[[Tensor, Any], Any]
"""Maps a parameter, as it was, and what stands in its place to what is to stand there; None: nothing."""


def _rewrite_beside(optimizer: Optimizer, groups: Sequence[list[Tensor]], rewrite: Rewrite, change: Change) -> None:
    """What an optimizer holds of its parameters outside of groups and state."""
    parameters = [p for group in groups for p in group]
    ids = set(map(id, parameters))
    for key, value in list(optimizer.__dict__.items()):
        if key in _OWN or not isinstance(value, (list, tuple, dict)) or not value:
            continue
        new: Any
        if isinstance(value, dict):
            if not any(id(p) in ids for p in value):
                continue
            new = copy.copy(value)  # a defaultdict stays one
            new.clear()
            for p, held in value.items():
                owner = rewrite(p, p) if id(p) in ids else p
                if owner is not None:
                    new[owner] = rewrite(p, held) if id(p) in ids else held
        elif _stands_for(value, parameters):
            new = _listed(value, parameters, rewrite)
        elif len(value) == len(groups) and all(map(_stands_for, value, groups)):
            new = type(value)(_listed(each, group, rewrite) for each, group in zip(value, groups, strict=True))
        else:
            continue
        change.steps.append(setter(optimizer.__dict__, key, value))
        optimizer.__dict__[key] = new


def _stands_for(held: Any, parameters: Sequence[Tensor]) -> bool:
    """Whether this is a list with a tensor of each parameter's shape."""
    return (
        isinstance(held, (list, tuple))
        and len(held) == len(parameters)
        and all(isinstance(a, Tensor) and a.shape == p.shape for a, p in zip(held, parameters, strict=True))
    )


def _listed(held: Any, parameters: Sequence[Tensor], rewrite: Rewrite) -> Any:
    pairs = zip(parameters, held, strict=True)
    return type(held)(new for p, each in pairs if (new := rewrite(p, each)) is not None)


def _smaller(parameter: Tensor, held: Any, replaced: Replaced) -> Any:
    """What stands for a parameter that may have shrunk."""
    if id(held) in replaced:
        return replaced[id(held)][1]
    if id(parameter) not in replaced:
        return held
    old, _, dims = replaced[id(parameter)]
    shrunk = _shrunk_value("", held, old, dims)
    return held if shrunk is _UNKNOWN else shrunk


def _restart(optimizer: LBFGS, change: Change) -> None:
    """LBFGS has one history over all its parameters together, and counts them once: both start anew."""
    for parameter, state in optimizer.state.items():
        if state:
            warnings.warn("LBFGS keeps one history of all its parameters: it starts anew", stacklevel=2)
            change.steps.append(setter(optimizer.state, parameter, state))
            optimizer.state[parameter] = {}
    change.steps.append(setter(optimizer.__dict__, "_numel_cache", optimizer._numel_cache))
    optimizer._numel_cache = None


def _deleter(target: Any, key: Any) -> Callable[[], None]:
    def put_back() -> None:
        target.pop(key, None)

    return put_back


def _shrunk_state(state: Mapping[str, Any], old: Tensor, dims: Mapping[int, Tensor], optimizer: str) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in state.items():
        result[key] = _shrunk_value(key, value, old, dims)
        if result[key] is _UNKNOWN:
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in _tensors(value))
            warnings.warn(
                f"{optimizer} keeps {key!r} of shape {shapes} for a parameter of shape {tuple(old.shape)}: it can't "
                "follow the removal, so the optimizer state of this parameter starts anew",
                stacklevel=2,
            )
            return {}
    return result


_UNKNOWN = object()
"""Stands for a value of which it can't be told how it follows."""


def _shrunk_value(key: Any, value: Any, old: Tensor, dims: Mapping[int, Tensor]) -> Any:
    """A value of a parameter's state after the parameter has shrunk."""
    if isinstance(value, Tensor):
        own = _dims_of(str(key), value, old, dims)
        return _UNKNOWN if own is None else take(value, own) if own else value
    if isinstance(value, dict):
        parts = {name: _shrunk_value(name, each, old, dims) for name, each in value.items()}
        return _UNKNOWN if any(part is _UNKNOWN for part in parts.values()) else parts
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        listed = [_shrunk_value(key, each, old, dims) for each in value]
        return _UNKNOWN if any(part is _UNKNOWN for part in listed) else type(value)(listed)
    return value if not list(_tensors(value)) else _UNKNOWN


def _dims_of(key: str, value: Tensor, old: Tensor, dims: Mapping[int, Tensor]) -> Mapping[int, Tensor] | None:
    """What a state tensor keeps of its dimensions; None where that can't be told.

    One of the parameter's shape keeps what that keeps. A mean over some dimensions has 1 there (torch's Adafactor), or
    lacks the last or the one before (other Adafactors, which tell by its name).
    """
    if value.dim() == 0 or value.numel() == 1:
        return {}
    if value.dim() == old.dim() and all(a in (b, 1) for a, b in zip(value.shape, old.shape, strict=True)):
        return {dim: index for dim, index in dims.items() if value.size(dim) == old.size(dim)}
    last = old.dim() - 1
    if key.endswith(_ROWS) and value.shape == old.shape[:-1]:
        return {dim: index for dim, index in dims.items() if dim < last}
    if key.endswith(_COLUMNS) and value.shape == (*old.shape[:-2], *old.shape[-1:]):
        return {min(dim, last - 1): index for dim, index in dims.items() if dim != last - 1}
    return None


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        items: Iterable[Any] = value.values() if isinstance(value, dict) else value
        for item in items:
            yield from _tensors(item)
