"""Running a user's model without leaving a trace in it: inputs, mode, buffers, random state."""

from __future__ import annotations

import gc
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_map

from lightning_prune.errors import PruningError, TraceError
from lightning_prune.graph.callsites import ModuleCall
from lightning_prune.graph.trace import Trace, Tracer
from lightning_prune.graph.tree import modules_of, named_tensors, tensors

__all__ = [
    "as_calls",
    "cast",
    "check_model",
    "cuda_devices",
    "doubled",
    "no_collection",
    "plain_encoders",
    "run_calls",
    "same_buffers",
    "standing_in",
    "traced",
    "undisturbed",
]


def as_calls(example_inputs: Any) -> tuple[ModuleCall, ...]:
    """The one call that a user's ``example_inputs`` mean.

    Args:
        example_inputs: A tensor (the only argument), a tuple or list (positional) or a dict (keyword).

    Raises:
        PruningError: It is something else, or holds no tensor.
    """
    if isinstance(example_inputs, Tensor):
        call = ModuleCall("", (example_inputs,), {})
    elif isinstance(example_inputs, tuple | list):
        call = ModuleCall("", tuple(example_inputs), {})
    elif isinstance(example_inputs, Mapping):
        call = ModuleCall("", (), dict(example_inputs))
    else:
        raise PruningError(
            "example_inputs must be a tensor, a tuple of positional or a dict of keyword arguments, "
            f"got {type(example_inputs).__name__}"
        )
    given = tensors((call.args, call.kwargs))
    if not given:
        raise PruningError("example_inputs holds no tensor")
    if not any(tensor.numel() for tensor in given):
        raise PruningError("example_inputs is empty: a batch of no example tells nothing about a model")
    numbers = [t for t in given if (t.is_floating_point() or t.is_complex()) and not t.is_meta]
    if not all(bool((t.to_dense() if t.layout != torch.strided else t).isfinite().all()) for t in numbers):
        raise PruningError("example_inputs holds values that are not finite: no removal could be checked with them")
    return (call,)


def check_model(model: Any) -> None:
    """Refuse what can't be pruned, before it is run.

    Raises:
        PruningError: It is no module, a wrapper or a ScriptModule, or its parameters are meta, lazy or sharded.
    """
    if not isinstance(model, nn.Module):
        raise PruningError(f"model must be an nn.Module, got {type(model).__name__}")
    kind = type(model).__name__
    if isinstance(model, torch.jit.ScriptModule):
        raise PruningError(f"{kind} is compiled by TorchScript and can't be changed; prune it before it is scripted")
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    if isinstance(model, wrappers) or "FullyShardedDataParallel" in {cls.__name__ for cls in type(model).__mro__}:
        raise PruningError(
            f"{kind} keeps buffers for the parameters of the model inside: prune the model first and wrap it then, "
            "or use the NeuronPruning callback, which keeps DDP up to date"
        )
    if isinstance(getattr(model, "_orig_mod", None), nn.Module):
        raise PruningError(f"{kind} is compiled; prune model._orig_mod, then compile it again")
    if isinstance(model, torch.fx.GraphModule) and _has_one_mode(model):
        raise PruningError(
            f"{kind} has been exported for one mode and can't be changed; prune it before it is exported"
        )
    for name, tensor in named_tensors(model).items():
        if is_lazy(tensor):
            raise PruningError(f"{name!r} of a lazy module has no shape yet; run {kind} on an input once")
        if tensor.is_meta:
            raise PruningError(f"{name!r} is on the meta device and holds no values; load {kind} first")
        if hasattr(tensor, "device_mesh"):
            raise PruningError(f"{name!r} is sharded (DTensor); prune {kind} before it is distributed")


def _has_one_mode(model: nn.Module) -> bool:
    """Whether a model refuses to change between training and evaluation mode."""
    modes = {module: module.training for module in modules_of(model).values()}
    try:
        model.eval()
    except NotImplementedError:
        return True
    finally:
        for module, mode in modes.items():
            module.training = mode
    return False


def cuda_devices(model: nn.Module) -> list[torch.device]:
    """The GPUs that hold parameters of a model."""
    held = (tensor for module in modules_of(model).values() for tensor in module._parameters.values())
    return sorted({tensor.device for tensor in held if tensor is not None and tensor.is_cuda}, key=str)


def _version(tensor: Tensor) -> int | None:
    """How often a tensor was written to, where that is counted."""
    return None if tensor.is_inference() else tensor._version


def _differ(one: Tensor, other: Tensor) -> bool:
    return one.layout == torch.strided and not one.is_meta and not torch.equal(one, other)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Whatever runs inside, the model's mode, what a forward writes to and the random state are put back afterwards."""
    modules = modules_of(model).values()
    modes = {module: module.training for module in modules}
    renormed = (m.weight for m in modules if getattr(m, "max_norm", None) is not None)  # by each forward
    buffers = {id(each): each for module in modules for each in module._buffers.values() if each is not None}
    written = [*buffers.values(), *(weight for weight in renormed if isinstance(weight, Tensor))]
    before = [(tensor, tensor.detach().clone(), _version(tensor)) for tensor in written]
    devices = [device.index or 0 for device in cuda_devices(model)]
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        with torch.no_grad():
            for tensor, value, version in before:
                # A backward that is to come may need it as it is; batch norm's statistics change without being counted.
                if version is None or _version(tensor) != version or _differ(tensor, value):
                    tensor.copy_(value)
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def no_collection() -> Iterator[None]:
    """Inside, Python doesn't look for garbage in cycles: every look goes through all that the process holds.

    A trace allocates many small things that live to its end, which makes Python look often and find nothing.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def plain_encoders(plain: bool = True) -> Iterator[None]:
    """Inside, torch runs the parts of an encoder layer one by one, or (``plain=False``) as one where it can.

    The one fused operation reads the parameters of all parts, so that nothing can stand in for one of them.
    """
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(not plain)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def same_buffers(model: nn.Module) -> Iterator[None]:
    """A forward may put a new tensor in a buffer's place (``self.mean = ...``): the old ones come back afterwards."""
    plain = (module._buffers for module in modules_of(model).values() if not isinstance(module, torch.jit.ScriptModule))
    held = [(registry, dict(registry)) for registry in plain if registry]
    try:
        yield
    finally:
        for registry, buffers in held:
            registry.update(buffers)


@contextmanager
def standing_in(
    model: nn.Module, values: Mapping[int, Tensor], flags: Collection[int] = ()
) -> Iterator[dict[int, Tensor]]:
    """Inside, the model holds other tensors: ``values``, by the id of the own; those in ``flags`` require gradients.

    Its own are not touched: a gradient hook, such as DDP's, is lost where a parameter's data changes its dtype.
    """
    own = {id(tensor): tensor for tensor in named_tensors(model).values()} if values else {}
    stand_ins = {
        key: nn.Parameter(value, requires_grad=key in flags) if isinstance(own[key], nn.Parameter) else value
        for key, value in values.items()
    }
    held: list[tuple[dict[Any, Any], Any, Any]] = []
    try:
        for module in modules_of(model).values() if values else ():
            registries: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
            for registry in registries:
                for name, tensor in list(registry.items()):
                    if id(tensor) in stand_ins:
                        held.append((registry, name, tensor))
                        registry[name] = stand_ins[id(tensor)]
            if isinstance(module, nn.RNNBase):
                held.append((module.__dict__, "_flat_weights", module._flat_weights))
                module.__dict__["_flat_weights"] = [
                    stand_ins.get(id(weight), weight) for weight in module._flat_weights
                ]
            if "FSDPModule" in {cls.__name__ for cls in type(module).__mro__}:  # its hooks would bring its own back
                for hooks in ("_forward_hooks", "_forward_pre_hooks"):
                    held.append((module.__dict__, hooks, module.__dict__[hooks]))
                    module.__dict__[hooks] = OrderedDict()
        yield stand_ins
    finally:
        for registry, name, value in reversed(held):
            registry[name] = value


@contextmanager
def doubled(model: nn.Module, really: bool = True) -> Iterator[None]:
    """Inside, the parameters and buffers of a model are in double precision, which hardly rounds."""
    own = named_tensors(model).values() if really else ()
    real = [tensor for tensor in own if tensor.is_floating_point() and tensor.dtype != torch.float64]
    with standing_in(model, {id(tensor): tensor.detach().double() for tensor in real}):
        yield


def cast(call: ModuleCall, dtype: torch.dtype | None) -> ModuleCall:
    """The same call with its floating-point tensors in another dtype (None: their own)."""

    def converted(leaf: Any) -> Any:
        return leaf.to(dtype) if dtype and isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

    return replace(call, args=tree_map(converted, call.args), kwargs=tree_map(converted, call.kwargs))


def run_calls(model: nn.Module, calls: Sequence[ModuleCall]) -> list[Any]:
    """Run the model's calls again, in order, without gradients."""
    modules = modules_of(model)
    with torch.no_grad(), same_buffers(model):
        return [modules[call.path](*call.args, **call.kwargs) for call in calls]


def traced(model: nn.Module, calls: Sequence[ModuleCall]) -> Trace:
    """Trace the model over ``calls`` in evaluation mode, and in training mode too where that reads more.

    Raises:
        TraceError: The model raised.
    """
    tracer = Tracer(model)
    with undisturbed(model):
        model.eval()
        _observe(tracer, model, calls)
        if tracer.unread:  # such as auxiliary classifiers: they run, and read channels, in training only
            model.train()
            for module in modules_of(model).values():
                if isinstance(module, nn.modules.batchnorm._NormBase):
                    module.eval()  # a batch of one has no statistics
            costs, seen = tracer.trace.contractions[:], tracer.trace.calls[:]
            _observe(tracer, model, calls)
            tracer.trace.contractions, tracer.trace.calls = costs, seen
    return tracer.trace


def _observe(tracer: Tracer, model: nn.Module, calls: Sequence[ModuleCall]) -> None:
    try:
        with tracer.watch():
            outputs = run_calls(model, calls)
    except Exception as error:
        mode = "training" if model.training else "evaluation"
        shapes = [tuple(t.shape) for call in calls for t in tensors((call.args, call.kwargs))]
        raise TraceError(
            f"{type(model).__name__} in {mode} mode raised {type(error).__name__} on inputs of shapes {shapes}: "
            f"{error}\nGive example_inputs that the model accepts."
        ) from error
    tracer.freeze_outputs(outputs, "reaches the model's output")
    if not model.training and len(outputs) == len(tracer.trace.calls):
        pairs = zip(tracer.trace.calls, outputs, strict=True)
        tracer.trace.calls = [replace(call, shapes=tuple(t.shape for t in tensors(each))) for call, each in pairs]
