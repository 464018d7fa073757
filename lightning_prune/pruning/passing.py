"""Whole layers go: what passes their input on stands in their place; can be undone."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_prune.errors import PruningError, SurgeryError
from lightning_prune.pruning.change import Change
from lightning_prune.pruning.optimizers import forget

__all__ = ["Form", "PassThrough", "inside", "passes", "passing_layers", "put_back", "remove_modules", "skeletons_of"]


@dataclass(frozen=True)
class Form:
    """How a layer is called and what it gives.

    Attributes:
        argument: Name under which its input comes, where that isn't the first positional argument.
        outputs: 0: it gives a tensor; n: a tuple of a tensor and n - 1 times None.
        extra: Whether anything else comes along, which is of no use to what only passes its input on.
    """

    argument: str | None = None
    outputs: int = 0
    extra: bool = False

    def layer(self) -> nn.Module:
        """What takes such calls and gives their input back: an `nn.Identity` wherever that does."""
        return nn.Identity() if self == Form() else PassThrough(self.argument, self.outputs)

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {"argument": self.argument, "outputs": self.outputs, "extra": self.extra}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Form:
        """From what `to_dict` gave."""
        argument = data["argument"]
        return cls(None if argument is None else str(argument), int(data["outputs"]), bool(data["extra"]))


class PassThrough(nn.Identity):
    """Gives its first argument back, whatever else comes along.

    Args:
        argument: Name of the argument that is given back where there is no positional one.
        outputs: 0: it gives a tensor; n: a tuple of it and n - 1 times None.
    """

    def __init__(self, argument: str | None = None, outputs: int = 0) -> None:
        super().__init__()
        self.argument = argument
        self.outputs = outputs

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Its input."""
        given = args[0] if args else kwargs[self.argument or ""]
        return (given, *[None] * (self.outputs - 1)) if self.outputs else given

    def extra_repr(self) -> str:
        """Its arguments."""
        return f"argument={self.argument!r}, outputs={self.outputs}"


def inside(name: str, paths: Iterable[str], *, proper: bool = False) -> bool:
    """Whether a module, parameter or buffer is one of these modules (unless ``proper``) or in one of them."""
    return any(name.startswith(f"{path}.") or (name == path and not proper) for path in paths)


def _place(model: nn.Module, path: str) -> tuple[dict[str, Any], str]:
    parent, _, name = path.rpartition(".")
    try:
        registry: dict[str, Any] = model.get_submodule(parent)._modules
    except AttributeError:
        registry = {}
    if registry.get(name) is None:
        raise PruningError(f"{type(model).__name__} has no module {path!r}")
    return registry, name


def passes(model: nn.Module, path: str) -> bool:
    """Whether a module only passes its input on."""
    try:
        registry, name = _place(model, path)
    except PruningError:
        return False
    return isinstance(registry[name], nn.Identity)


def passing_layers(model: nn.Module) -> dict[str, Form]:
    """The modules of a model that only pass their input on, and how they are called."""
    found = {path: module for path, module in model.named_modules() if path and isinstance(module, nn.Identity)}
    return {
        path: Form(module.argument, module.outputs, extra=True) if isinstance(module, PassThrough) else Form()
        for path, module in found.items()
    }


def remove_modules(model: nn.Module, forms: Mapping[str, Form], optimizers: Iterable[Optimizer] = ()) -> Change:
    """Put what passes its input on in the place of modules; optimizers forget the parameters that are gone.

    Args:
        model: The model.
        forms: Paths of modules, none of which is inside another -> how they are called.
        optimizers: Those that hold its parameters.

    Returns:
        What was done, with ``undo()``.

    Raises:
        PruningError: A module doesn't exist; nothing was changed.
        SurgeryError: An optimizer would hold nothing any more; nothing was changed.
    """
    places = {path: _place(model, path) for path in forms}
    held = {id(parameter) for parameter in model.parameters()}
    change = Change()
    try:
        for path, (registry, name) in places.items():
            old, layer = registry[name], forms[path].layer()
            layer.training = old.training

            def put_old_back(registry: dict[str, Any] = registry, name: str = name, old: nn.Module = old) -> None:
                registry[name] = old

            change.steps.append(put_old_back)
            registry[name] = layer
        gone = held - {id(parameter) for parameter in model.parameters()}
        for optimizer in optimizers:
            if all(id(p) in gone for group in optimizer.param_groups for p in group["params"]):
                raise SurgeryError(f"{type(optimizer).__name__} holds the parameters of removed layers only")
            forget(optimizer, gone, change)
    except BaseException:
        change.undo()
        raise
    return change


def skeletons_of(model: nn.Module, paths: Iterable[str]) -> dict[str, nn.Module]:
    """What modules are, without values: copies on the meta device. Those that can't be copied are left out."""
    found = {}
    for path in paths:
        module = model.get_submodule(path)
        memo: dict[int, Any] = {}
        for tensor in (*module.parameters(), *module.buffers()):
            empty = torch.empty_like(tensor, device="meta")
            memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
        try:
            found[path] = copy.deepcopy(module, memo)
        except (TypeError, RuntimeError, AttributeError, NotImplementedError):  # it holds something that has no copy
            continue
    return found


def put_back(model: nn.Module, removed: Iterable[str], skeletons: Mapping[str, nn.Module]) -> None:
    """Put modules with all their parameters zero in the place of removed ones.

    Raises:
        PruningError: What one of them was is not known; the model is untouched.
    """
    unknown = [path for path in removed if not inside(path, skeletons)]
    if unknown:
        raise PruningError(
            f"what {unknown[0]!r} was before it was removed is not known in this process; make the model anew"
        )
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    training = model.training

    def filled(tensor: Tensor) -> Tensor:
        return torch.zeros_like(tensor, device=device)

    for path in sorted(skeletons, key=lambda each: each.count(".")):  # an outer one brings places for the inner ones
        registry, name = _place(model, path)
        registry[name] = copy.deepcopy(skeletons[path])._apply(filled).train(training)
