"""Verification: a pruned model must give what the whole one gives with the removed slices set to zero."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_prune.errors import SurgeryError
from lightning_prune.graph.callsites import ModuleCall
from lightning_prune.graph.operations import OperationMode
from lightning_prune.graph.run import same_buffers, standing_in
from lightning_prune.graph.tree import leaves, modules_of, named_tensors

__all__ = [
    "TOLERANCE",
    "MaskedModel",
    "NumbersDifferError",
    "OutputsDifferError",
    "compare_outputs",
    "compare_shapes",
    "kept_masks",
    "masked_tensors",
]


class OutputsDifferError(SurgeryError):
    """The pruned model gives other values than the masked one."""


class NumbersDifferError(SurgeryError):
    """The pruned model calculates with other numbers than the masked one, whatever comes of it for some inputs."""


TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 5e-2}
"""Largest difference allowed, relative to the largest output, by dtype: rounding differs with the shapes."""


Kept = Mapping[str, Mapping[int, Sequence[int] | Tensor]]


def masked_tensors(
    tensors: Mapping[str, Tensor], kept: Kept, unmasked: Collection[tuple[str, int]] = ()
) -> dict[str, Tensor]:
    """Copies of the tensors that shrink, zero wherever one of the dimensions is not kept; indices stay as they are."""
    names = [name for name in kept if tensors[name].is_floating_point() or tensors[name].is_complex()]
    return {name: _masked(tensors[name].detach().clone(), name, kept[name], unmasked) for name in names}


def kept_masks(
    tensors: Mapping[str, Tensor], kept: Kept, unmasked: Collection[tuple[str, int]] = ()
) -> dict[str, Tensor]:
    """The places that `masked_tensors` leaves as they are: bool, of the tensors' shapes, where something goes."""
    shaped = {name: dims for name, dims in kept.items() if any((name, dim) not in unmasked for dim in dims)}
    names = [name for name in shaped if tensors[name].is_floating_point()]
    return {
        name: _masked(torch.ones_like(tensors[name], dtype=torch.bool), name, kept[name], unmasked) for name in names
    }


def _masked(
    tensor: Tensor, name: str, dims: Mapping[int, Sequence[int] | Tensor], unmasked: Collection[tuple[str, int]]
) -> Tensor:
    for dim, index in dims.items():
        if (name, dim) not in unmasked:
            tensor.index_fill_(dim, _gone(index, tensor.size(dim)).to(tensor.device), 0)
    return tensor


def _gone(index: Sequence[int] | Tensor, size: int) -> Tensor:
    """The other indices of a dimension."""
    gone = torch.ones(size, dtype=torch.bool)
    gone[torch.as_tensor(index)] = False
    return gone.nonzero().squeeze(1)


def _is_layer(module: nn.Module, name: str) -> bool:
    """Whether a parameter is the weight of a linear layer or a convolution of one group that is nothing else."""
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    own = type(module) in kinds and "forward" not in module.__dict__ and name.rpartition(".")[2] == "weight"
    return own and getattr(module, "groups", 1) == 1


@dataclass(frozen=True)
class MaskedModel:
    """A model with the removed slices set to zero, without touching it.

    Attributes:
        model: The model.
        kept: What stays of its parameters and buffers.
        unmasked: Dimensions that keep their values.
        own: Parameters that only the module that holds them reads. Of the large ones among these there is one masked
            copy at a time, while that module runs: to fill fresh memory costs more than to run the model.
    """

    LARGE: ClassVar[int] = 1 << 13

    model: nn.Module
    kept: Kept
    unmasked: Collection[tuple[str, int]] = ()
    own: Collection[str] = ()

    @cached_property
    def _tensors(self) -> dict[str, Tensor]:
        return named_tensors(self.model)

    @cached_property
    def _passing(self) -> dict[nn.Module, list[str]]:
        """Modules with large parameters of their own, and none below them."""
        tensors = self._tensors
        found: dict[str, list[str]] = {}
        for name in self.kept:
            own = name in self.own and isinstance(tensors[name], nn.Parameter) and tensors[name].dim() > 1
            if own and tensors[name].numel() > self.LARGE:
                found.setdefault(name.rpartition(".")[0], []).append(name)
        modules = modules_of(self.model)
        return {
            modules[path]: names
            for path, names in found.items()
            if path in modules and not any(other.startswith(f"{path}.") for other in found if path) and path
        }

    @cached_property
    def _standing(self) -> dict[str, Tensor]:
        passing = {name for names in self._passing.values() for name in names}
        kept = {name: dims for name, dims in self.kept.items() if name not in passing}
        return masked_tensors(self._tensors, kept, self.unmasked)

    def outputs(self, calls: Sequence[ModuleCall]) -> list[Any]:
        """What the model's calls give."""
        modules = modules_of(self.model)
        results = []
        # In every place of a tensor, which `torch.func.functional_call` does not leave all of: a module of two names
        # whose weight is tied keeps what was put there.
        masked = {id(self._tensors[name]): tensor for name, tensor in self._standing.items()}
        norms = {id(self._tensors[name]): torch.as_tensor(self.kept[name][0]) for name in self.norms.values()}
        with ExitStack() as stack:
            stand_ins = stack.enter_context(standing_in(self.model, masked))
            stack.enter_context(self._in_passing())
            if norms:
                stack.enter_context(_KeptNorms({id(stand_ins[key]): index for key, index in norms.items()}))
            for call in calls:
                with torch.no_grad(), same_buffers(self.model):
                    results.append(modules[call.path](*call.args, **call.kwargs))
        return results

    @cached_property
    def norms(self) -> dict[str, str]:
        """What can be compared although it mixes: norms over features, by what a trace calls them, and their weights.

        In the masked model their statistics run over what is kept, and so they give what the smaller norm gives.
        """
        modules = modules_of(self.model)
        found: dict[str, str] = {}
        for name in self.kept:
            path, _, last = name.rpartition(".")
            tensor = self._tensors[name]
            if (
                last == "weight"
                and tensor.dim() == 1
                and tensor.is_floating_point()
                and _may_be_norm(modules.get(path))
            ):
                found |= {f"{kind} in {path or 'the model itself'}": name for kind in _NORMS}
        return found

    @contextmanager
    def _in_passing(self) -> Iterator[None]:
        """Large parameters are masked while their module runs, all in the same memory.

        Where a layer reads and makes channels, these are masked in their place: they are fewer than its weights.
        """
        tensors = self._tensors
        layers = {
            module: name for module, (name, *more) in self._passing.items() if not more and _is_layer(module, name)
        }
        copied = [module for module in self._passing if module not in layers]
        scratch: dict[torch.dtype, Tensor] = {}
        held: dict[nn.Module, dict[str, Any]] = {}

        def enter(module: nn.Module, args: Any) -> None:
            if module in held:  # it calls itself
                return
            names = self._passing[module]
            held[module] = {name: module._parameters[name.rpartition(".")[2]] for name in names}
            used: dict[torch.dtype, int] = {}
            for name in names:
                source = tensors[name]
                start = used.get(source.dtype, 0)
                used[source.dtype] = start + source.numel()
                memory = scratch.get(source.dtype)
                if memory is None or memory.numel() < used[source.dtype]:
                    size = max(sum(tensors[n].numel() for n in each) for each in self._passing.values())
                    memory = scratch[source.dtype] = torch.empty(size, dtype=source.dtype, device=source.device)
                copy = memory[start : start + source.numel()].view(source.shape)
                copy.copy_(source.detach())
                module._parameters[name.rpartition(".")[2]] = nn.Parameter(
                    _masked(copy, name, self.kept[name], self.unmasked), requires_grad=False
                )

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            for name, parameter in held.pop(module, {}).items():
                module._parameters[name.rpartition(".")[2]] = parameter

        gone = {
            (name, dim): _gone(index, tensors[name].size(dim)).to(tensors[name].device)
            for name in layers.values()
            for dim, index in self.kept[name].items()
            if dim < 2 and (name, dim) not in self.unmasked
        }

        def without(name: str, dim: int, channels: Tensor) -> Tensor:
            """Channels of a layer, zero where its weight has nothing left along a dimension."""
            index = gone.get((name, dim))
            if index is None:
                return channels
            return channels.index_fill(1 - tensors[name].dim(), index, 0)

        def read(module: nn.Module, args: Any, kwargs: Any) -> Any:
            given = args[0] if args else kwargs["input"]
            return (without(layers[module], 1, given),), {}

        def made(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            return without(layers[module], 0, output)

        hooks = [module.register_forward_pre_hook(read, with_kwargs=True) for module in layers]
        hooks += [module.register_forward_hook(made, prepend=True) for module in layers]  # before the user's own
        hooks += [module.register_forward_pre_hook(enter) for module in copied]
        hooks += [module.register_forward_hook(leave, always_call=True) for module in copied]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for module in list(held):
                leave(module, None, None)


_NORMS = {
    name: getattr(torch.ops.aten, name).default
    for name in ("native_layer_norm", "_fused_rms_norm")
    if hasattr(torch.ops.aten, name)
}
"""Norms over features, by their names in a trace."""


def _may_be_norm(module: nn.Module | None) -> bool:
    """Whether a module may normalise over features with its weight: the others of torch's own don't."""
    return isinstance(module, (nn.LayerNorm, nn.RMSNorm)) or not type(module).__module__.startswith("torch.nn.")


class _KeptNorms(OperationMode):
    """Norms whose weights are masked leave out what is removed: it becomes zero."""

    def __init__(self, kept: Mapping[int, Tensor]) -> None:
        """Take what stays of each norm, by the id of its weight."""
        super().__init__()
        self.kept = kept

    def operation(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        index = self.kept.get(id(args[2])) if func in _NORMS.values() else None
        if index is None:
            return func(*args, **kwargs)
        x, _, weight, *rest = args  # shapes (..., features), (features,)
        with torch._C.DisableTorchFunction():  # as in any operation
            index = index.to(x.device)
            rest = [each[index] if isinstance(each, Tensor) else each for each in rest]
            part, *statistics = func(x[..., index], [len(index)], weight[index], *rest)
            return torch.zeros_like(x, dtype=part.dtype).index_copy_(-1, index, part), *statistics


def compare_shapes(expected: Any, actual: Any) -> None:
    """Check that two trees of outputs have the same shapes.

    Raises:
        SurgeryError: They differ in structure or shape; the message says where.
    """
    wanted, got = list(leaves(expected)), list(leaves(actual))
    if len(wanted) != len(got):
        raise SurgeryError(f"{len(got)} outputs after the removal, {len(wanted)} before")
    for number, (a, b) in enumerate(zip(wanted, got, strict=True)):
        if isinstance(a, Tensor) and a.shape != b.shape:
            raise SurgeryError(f"output {number} has shape {tuple(b.shape)} after, {tuple(a.shape)} before")


def compare_outputs(expected: Any, actual: Any) -> None:
    """Check that two trees of outputs agree up to rounding.

    Raises:
        OutputsDifferError: They differ in value; the message says where and how much.
        SurgeryError: They differ in structure or shape.
    """
    compare_shapes(expected, actual)
    for number, (a, b) in enumerate(zip(leaves(expected), leaves(actual), strict=True)):
        if not isinstance(a, Tensor) or not (a.is_floating_point() or a.is_complex()):
            continue  # indices and counts jump where rounding differs
        if a.is_complex():
            a, b = torch.view_as_real(a), torch.view_as_real(b)
        finite = a.isfinite() & b.isfinite()
        largest = a[finite].abs().max().item() if bool(finite.any()) else 0.0
        worst = (a[finite] - b[finite]).abs().max().item() if bool(finite.any()) else 0.0
        if not torch.equal(a.isfinite(), b.isfinite()) or worst > TOLERANCE.get(a.dtype, 1e-3) * largest:
            raise OutputsDifferError(
                f"output {number} differs from the masked model's by {worst:.3g} (largest value {largest:.3g})"
            )
