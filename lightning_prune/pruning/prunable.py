"""Loading pruned modules from Lightning's checkpoints: the architecture first, then the weights."""

from __future__ import annotations

import inspect
import warnings
import zlib
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, TypeVar
from zipfile import BadZipFile, ZipFile, ZipInfo

import torch
from torch import nn

from lightning_prune.errors import PruningError
from lightning_prune.pruning.plan import Plan

__all__ = [
    "ACTIVATIONS",
    "METADATA",
    "Prunable",
    "UntrustedError",
    "check_dense",
    "check_whole",
    "load_from_checkpoint",
    "read_checkpoint",
    "structure_state",
]

METADATA = "lightning_prune"
"""Where in a state dict's metadata the plan stands: a file of weights alone has nothing else."""

ACTIVATIONS = "lightning_prune_activations"
"""Where the plan of `ActivationSearch` stands."""

OBJECTS = ("unsupported global", "unrecognized function", "can only build", "can only create")
"""In what torch says of a file that has more than plain data in it; the rest is said of damaged ones."""

Module = TypeVar("Module", bound=nn.Module)


class UntrustedError(PruningError):
    """A file holds objects that only unpickling could make, which runs code."""


def check_dense(plan: Plan, dense: Mapping[str, list[int]], owner: str) -> None:
    """Raise a PruningError unless a plan was made from tensors of these shapes."""
    for name, shape in plan.shapes.items():
        if dense.get(name) != list(shape):
            had = f"shape {tuple(dense[name])}" if name in dense else "nothing of that name"
            raise PruningError(f"the checkpoint was pruned from {name!r} of shape {tuple(shape)}; {owner} has {had}")


def check_whole(path: str | PathLike[str]) -> None:
    """Raise a PruningError if a local file is plainly no checkpoint, was cut off, or altered since it was written.

    What torch says of such a file names neither the file nor the damage, and it reads altered weights as they are.
    """
    if "://" in str(path) or not Path(path).is_file():
        return
    with Path(path).open("rb") as file:
        start = file.read(2)
        if start[:1] == b"\x80":  # torch's old format has no sums to check
            return
        try:
            if start != b"PK":
                raise BadZipFile("it does not begin as one")
            with ZipFile(file) as archive:
                members = archive.infolist()
                unsummed = all(info.CRC == 0 for info in members)  # set_crc32_options(False)
                damaged = [] if unsummed else [info.filename for info in members if not _intact(archive, info)]
        except (BadZipFile, EOFError, OSError, ValueError, NotImplementedError, RuntimeError) as error:
            raise PruningError(f"{path} is no checkpoint, or it was cut off: {error}") from error
    if damaged:
        raise PruningError(f"{path} was altered since it was written: {damaged[0]} is not what its checksum says")


def _intact(archive: ZipFile, member: ZipInfo) -> bool:
    try:
        with archive.open(member) as content:
            while content.read(1 << 20):
                pass
    except (BadZipFile, zlib.error):  # the latter of a compressed one, which torch doesn't write but reads
        return False
    return True


def read_checkpoint(path: str | PathLike[str], map_location: str = "cpu") -> dict[str, Any]:
    """What a local checkpoint holds, read without running anything of it.

    Args:
        path: The file.
        map_location: Where its tensors go; ``"meta"``: their shapes alone.

    Raises:
        UntrustedError: It holds objects that only unpickling could make.
        PruningError: It is none, or was cut off or altered.
    """
    check_whole(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a pickle that is none of torch's; the error says it in one line
            content = torch.load(path, map_location=map_location, weights_only=True)
    except UnpicklingError as error:
        if any(sign in str(error).lower() for sign in OBJECTS):
            raise UntrustedError(
                f"{path} holds more than tensors and plain values; nothing was unpickled, for that could run "
                f"anything ({_culprit(error)})"
            ) from error
        raise PruningError(f"{path} is no checkpoint, or it is damaged") from error
    except (FileNotFoundError, IsADirectoryError, PermissionError):
        raise
    except Exception as error:  # torch and pickle raise many kinds for a file that is cut off or altered
        raise PruningError(f"{path} is no checkpoint, or it is damaged") from error
    if not isinstance(content, Mapping):
        raise PruningError(f"{path} is no checkpoint: it holds a {type(content).__name__}")
    return dict(content)


def _culprit(error: BaseException) -> str:
    """The name in torch's message of what it would have had to make."""
    text = str(error)
    for mark in ("GLOBAL ", "Unsupported global: ", "Unsupported class "):
        if mark in text:
            return text.partition(mark)[2].split()[0].strip("`.,()")
    return "an object of another class"


def structure_state(checkpoint: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a checkpoint's callbacks say of the architecture; all of them share one plan."""
    states = [state for state in checkpoint.get("callbacks", {}).values() if isinstance(state, dict)]
    return next((state for state in states if {"plan", "macs_left"} <= state.keys()), None)


def become(module: nn.Module, plan: Plan, own: Plan) -> None:
    """Give a module the architecture that ``plan`` leads to; ``own`` is what was removed from it so far.

    Raises:
        PruningError: The plan is that of another model; the module is untouched.
    """
    if plan.made(module) and (not own.made(module) or plan == own):
        return
    now = own if own.made(module) else Plan({}, {})
    check_dense(plan, now.dense_shapes(module), type(module).__name__)
    if now:
        now.take_back(module)
    plan.apply(module)


class Prunable:
    """Mixin for LightningModules that load and describe themselves when pruned; stands before ``LightningModule``.

    ``Cls.load_from_checkpoint``, ``load_state_dict`` and ``Trainer.test(model, ckpt_path=…)`` without a callback give
    the small model; ``state_dict`` says what was removed. With it, `NeuronPruning` works in spawned processes too.

    Attributes:
        pruning_plan: What was removed from the module so far; `NeuronPruning` and `prune_neurons` keep it.
        activation_plan: What `ActivationSearch` has chosen.

    Example:
        >>> import torch
        >>> from lightning_prune import prune_neurons
        >>> class Net(Prunable, nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layers = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        ...     def forward(self, x):
        ...         return self.layers(x)
        >>> net, other = Net(), Net()
        >>> plan = prune_neurons(net, torch.rand(1, 4), 0.5)
        >>> other.load_state_dict(net.state_dict())
        <All keys matched successfully>
        >>> other.layers[0]
        Linear(in_features=4, out_features=4, bias=True)
    """

    pruning_plan: Plan = Plan({}, {})
    activation_plan: Plan = Plan({}, {})

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        before = cls.__mro__[1 : cls.__mro__.index(Prunable)]
        hidden = [base for base in before if issubclass(base, nn.Module) and not issubclass(base, Prunable)]
        if hidden:  # their methods would be taken in place of these
            name = hidden[0].__name__
            raise TypeError(f"Prunable must stand before {name}: class {cls.__name__}(Prunable, {name})")

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[misc]
        metadata = getattr(destination, "_metadata", None)
        if self.pruning_plan and metadata is not None:
            metadata[prefix[:-1]][METADATA] = {"plan": self.pruning_plan.to_dict()}
        if self.activation_plan and metadata is not None:
            metadata[prefix[:-1]][ACTIVATIONS] = {"plan": self.activation_plan.to_dict()}

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: dict[str, Any], *args: Any) -> None:
        if METADATA in local_metadata:
            self._become(Plan.from_dict(local_metadata[METADATA]["plan"]))
        if ACTIVATIONS in local_metadata:
            self._choose(Plan.from_dict(local_metadata[ACTIVATIONS]["plan"]))
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)  # type: ignore[misc]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the architecture from the callback's state: an averaging callback saves another state dict."""
        structure = structure_state(checkpoint)
        if structure is not None:
            self._become(Plan.from_dict(structure["plan"]))
        for state in checkpoint.get("callbacks", {}).values():
            if isinstance(state, dict) and {"plan", "history", "search"} <= state.keys():
                self._choose(Plan.from_dict(state["plan"]))
        super().on_load_checkpoint(checkpoint)  # type: ignore[misc]

    def _become(self, plan: Plan) -> None:
        if isinstance(self, nn.Module):
            become(self, plan, self.pruning_plan)
        if plan != self.pruning_plan or plan.skeletons:  # told twice, the first one knows what was removed
            self.pruning_plan = plan

    def _choose(self, plan: Plan) -> None:
        if plan == self.activation_plan or not isinstance(self, nn.Module):
            return
        if self.activation_plan:
            self.activation_plan.take_back(self)
        plan.apply(self)
        self.activation_plan = plan


def load_from_checkpoint(cls: type[Module], path: str | PathLike[str], **init: Any) -> Module:
    """A LightningModule from a checkpoint of a run that pruned it, already small.

    Args:
        cls: Its class.
        path: The checkpoint, with weights only or with everything.
        **init: What ``cls.load_from_checkpoint`` takes: constructor arguments that are not among the saved
            hyper-parameters, ``map_location``, ``strict``, ``weights_only``, …. A file that holds objects of classes
            other than torch's is refused, since reading it runs code; ``weights_only=False`` trusts it.

    Raises:
        PruningError: The file is damaged or no checkpoint, holds objects that have to be trusted, or was pruned from
            another architecture.
    """
    loader = getattr(cls, "load_from_checkpoint", None)
    if not isinstance(cls, type) or loader is None:
        raise PruningError(f"cls must be a LightningModule class, got {cls!r}")
    if "://" not in str(path):  # else Lightning decides
        try:
            content = read_checkpoint(path, "meta")
        except UntrustedError as error:
            if init.get("weights_only") is not False:
                raise PruningError(f"{error}; pass weights_only=False if you trust it") from error
        else:
            if not isinstance(content.get("state_dict"), Mapping):
                raise PruningError(f"{path} is no checkpoint of {cls.__name__}: it holds no state_dict")
    if "weights_only" not in inspect.signature(loader).parameters:
        init.pop("weights_only", None)  # lightning 2.5 always unpickles
    knows: Any = cls
    if not issubclass(cls, Prunable):
        knows = type(cls.__name__, (Prunable, cls), {"__module__": cls.__module__, "__doc__": cls.__doc__})
    try:
        module: Any = knows.load_from_checkpoint(path, **init)
    except (RuntimeError, KeyError, UnpicklingError) as error:
        if isinstance(error, PruningError):
            raise
        said = f"it has no {error}" if isinstance(error, KeyError) else error
        raise PruningError(f"{path} is no checkpoint of {cls.__name__}, or it is damaged: {said}") from error
    if knows is not cls:
        module.__class__ = cls
        module.__dict__.pop("pruning_plan", None)
        module.__dict__.pop("activation_plan", None)
    result: Module = module
    return result
