"""Repair: make up for a removal, in the layers that read what is gone and in batch norms, on a few real batches."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_prune.graph.callsites import ModuleCall
from lightning_prune.graph.groups import Groups
from lightning_prune.graph.run import run_calls, undisturbed
from lightning_prune.graph.tree import modules_of, named_tensors
from lightning_prune.pruning.weight_criteria import CONVOLUTIONS

__all__ = ["COMPENSATIONS", "Repair", "add_to", "recalibrate"]

COMPENSATIONS = ("least_squares",)

RIDGE = 1e-3
"""Added to the diagonal, relative to its mean: a few batches don't determine wide layers, and large weights would
magnify what earlier layers have lost."""

ROWS = 1 << 14
"""Positions of one call that count; images have many that say the same."""

Reduce = Callable[[Tensor], Tensor]


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


@dataclass(eq=False)
class _Reader:
    """A layer that loses inputs.

    Attributes:
        gone: The removed inputs.
        weight: Its weight before, the rows that stay only, shape (out, in, positions).
        gram: Products of its inputs, shape (in · positions + 1, …): the last stands for the bias.
        low: Smallest value of each input, shape (in,); with ``high``, constants are known by it.
        high: Largest value.
        norms: The batch norms that its output goes to directly.
    """

    gone: Tensor
    weight: Tensor
    gram: Tensor | None = None
    low: Tensor | None = None
    high: Tensor | None = None
    norms: set[str] = field(default_factory=set)


@dataclass(eq=False)
class Repair:
    """What is known of the whole model before a removal, to make up for it afterwards.

    Neurons whose layer has only zeros for them, so that all they do is to add a constant, are always made up for: the
    constant moves to the bias of the layer that reads it, or to the running mean of the batch norm behind it.

    Source (least squares): He et al., 2017, "Channel pruning for accelerating very deep neural networks",
    arXiv:1707.06168.
    """

    readers: dict[str, _Reader] = field(default_factory=dict)
    least_squares: bool = False
    reduce: Reduce = _as_it_is
    shared: set[str] = field(default_factory=set)
    """Batch norms that get something else too."""

    @classmethod
    def of(
        cls,
        model: nn.Module,
        groups: Groups,
        alive: Tensor,
        batches: Sequence[Sequence[ModuleCall]],
        compensate: str | None = None,
        reduce: Reduce = _as_it_is,
    ) -> Repair:
        """Run the model on ``batches`` and note what the layers get that are about to lose inputs."""
        kept = groups.kept(alive)
        idle = groups.idle(alive, named_tensors(model))
        if compensate is None and not bool(idle.any()):
            return cls()
        readers = {}
        for path, module in modules_of(model).items():
            name = f"{path}.weight" if path else "weight"
            extent = groups.extents.get((name, 1))
            if type(module) not in (nn.Linear, *CONVOLUTIONS) or 1 not in kept.get(name, {}) or extent is None:
                continue
            layer: Any = module
            if getattr(layer, "groups", 1) > 1:
                continue
            gone = torch.ones(layer.weight.size(1), dtype=torch.bool)
            gone[kept[name][1]] = False
            if compensate is None:
                gone &= idle[extent.unit_of.clamp(min=0)] & (extent.unit_of >= 0)
                if not bool(gone.any()):
                    continue
            rows = kept[name].get(0, slice(None))
            readers[path] = _Reader(gone, layer.weight.detach()[rows].flatten(2 if layer.weight.dim() > 2 else 1))
        repair = cls(readers, compensate is not None, reduce)
        if readers:
            with undisturbed(model), repair._listening(model):
                model.eval()
                for calls in batches:
                    run_calls(model, [call for call in calls if call.repeatable])
        return repair

    @contextmanager
    def _listening(self, model: nn.Module) -> Iterator[None]:
        modules = modules_of(model)
        outputs: dict[int, tuple[Tensor, str]] = {}
        norms = {id(m): path for path, m in modules.items() if isinstance(m, nn.modules.batchnorm._BatchNorm)}

        def before(path: str) -> Callable[..., None]:
            return lambda module, args, kwargs: self._note(path, module, args[0] if args else kwargs["input"])

        def after(path: str) -> Callable[..., None]:
            def note(module: nn.Module, args: Any, output: Tensor) -> None:
                outputs[id(output)] = (output, path)

            return note

        def norm(module: nn.Module, args: tuple[Any, ...]) -> None:
            given = outputs.get(id(args[0])) if args else None
            if given is not None and given[0] is args[0]:
                self.readers[given[1]].norms.add(norms[id(module)])
            else:
                self.shared.add(norms[id(module)])

        handles = []
        try:
            for path in self.readers:
                handles.append(modules[path].register_forward_pre_hook(before(path), with_kwargs=True))
                handles.append(modules[path].register_forward_hook(after(path)))
            for module in modules.values():
                if id(module) in norms:
                    handles.append(module.register_forward_pre_hook(norm))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _note(self, path: str, layer: Any, x: Tensor) -> None:
        reader = self.readers[path]
        rows = _patches(layer, x.detach())
        if self.least_squares:
            some = rows[:: -(-len(rows) // ROWS)].flatten(1).double()
            some = torch.cat([some, some.new_full((len(some), 1), 1.0 if layer.bias is not None else 0.0)], 1)
            gram = some.T @ some
            reader.gram = gram if reader.gram is None else reader.gram + gram
            return
        low, high = rows.amin((0, 2)), rows.amax((0, 2))
        reader.low = low if reader.low is None else torch.minimum(reader.low, low)
        reader.high = high if reader.high is None else torch.maximum(reader.high, high)

    @torch.no_grad()
    def changes(self, model: nn.Module) -> dict[str, Tensor]:
        """After the removal: what is to be added to weights, biases and running means, by name."""
        modules = modules_of(model)
        found: dict[str, Tensor] = {}
        for path, reader in self.readers.items():
            prefix = f"{path}." if path else ""
            if self.least_squares:
                found |= {prefix + name: each for name, each in self._solved(path, modules[path], reader).items()}
            elif reader.low is not None and reader.high is not None:
                shift = _constant(reader, reader.low, reader.high)
                if shift is not None and modules[path].bias is not None:
                    found[f"{prefix}bias"] = shift
                elif shift is not None:
                    found |= {f"{norm}.running_mean": -shift for norm in self._own_norms(path, modules)}
        return found

    def _own_norms(self, path: str, modules: Mapping[str, Any]) -> set[str]:
        """The batch norms behind a layer that see its output and nothing else."""
        others = set[str]().union(*(other.norms for name, other in self.readers.items() if name != path))
        own = self.readers[path].norms - others - self.shared
        return {norm for norm in own if modules[norm].running_mean is not None}

    def _solved(self, path: str, layer: Any, reader: _Reader) -> dict[str, Tensor]:
        size = reader.weight[0, 0].numel() if reader.weight.dim() > 2 else 1
        columns = len(reader.gone) * size + 1
        gram = reader.gram
        if gram is None:
            gram = reader.weight.new_zeros(columns, columns, dtype=torch.float64)
        gram = self.reduce(gram)
        if not bool(gram.isfinite().all()):
            warnings.warn(f"the inputs of {path} are not finite: its weights are not compensated", stacklevel=2)
            return {}
        gone = torch.cat([reader.gone.repeat_interleave(size), torch.zeros(1, dtype=torch.bool)]).to(gram.device)
        ours, theirs = gram[~gone][:, ~gone], gram[~gone][:, gone]
        ridge = RIDGE * float(ours.diagonal().mean())
        if not ridge:  # it ran on nothing but zeros, or not at all
            return {}
        ours.diagonal().add_(ridge)
        shares = torch.linalg.solve(ours, theirs)  # what is left stands in for what is gone: gone = left @ shares
        more = reader.weight.flatten(1).double()[:, gone[:-1]] @ shares.T
        changes = {"weight": more[:, :-1].view_as(layer.weight)}
        return changes | {"bias": more[:, -1]} if layer.bias is not None else changes


def _constant(reader: _Reader, low: Tensor, high: Tensor) -> Tensor | None:
    """What the removed inputs added to each output, where they are constants; zeros around an image make them none."""
    largest = torch.maximum(low.abs(), high.abs())  # vectorised and scalar code may round differently
    constant = reader.gone.to(low.device) & (high - low <= 8 * torch.finfo(low.dtype).eps * largest)
    if not bool(constant.any()):
        return None
    value = torch.where(constant, low, torch.zeros_like(low)).double()
    weight = reader.weight.double()
    shift: Tensor = (weight.sum(2) if weight.dim() > 2 else weight) @ value
    return shift


@torch.no_grad()
def add_to(model: nn.Module, changes: Mapping[str, Tensor]) -> None:
    """Add to parameters and buffers, by name."""
    tensors = named_tensors(model)
    for name, change in changes.items():
        tensors[name].add_(change.to(tensors[name]))


def _patches(layer: Any, x: Tensor) -> Tensor:
    """What one position of a layer's output is made of: shape (positions of all examples, inputs, kernel)."""
    if isinstance(layer, nn.Linear):
        return x.reshape(-1, x.size(-1), 1)
    rank = len(layer.kernel_size)
    x = x.unsqueeze(0) if x.dim() == rank + 1 else x
    if any(layer._reversed_padding_repeated_twice):
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    for dim, (size, stride, dilation) in enumerate(
        zip(layer.kernel_size, layer.stride, layer.dilation, strict=True), start=2
    ):
        x = x.unfold(dim, (size - 1) * dilation + 1, stride)[..., ::dilation]
    order = [0, *range(2, 2 + rank), 1, *range(2 + rank, 2 + 2 * rank)]
    x = x.permute(order)
    return x.reshape(-1, x.size(1 + rank), layer.weight[0, 0].numel())


@torch.no_grad()
def recalibrate(model: nn.Module, batches: Sequence[Sequence[ModuleCall]], reduce: Reduce = _as_it_is) -> None:
    """Recompute the running statistics of batch norms as plain means over some batches.

    Those that no batch reaches, and those that are in evaluation mode while the model trains, keep theirs.

    Args:
        model: The model.
        batches: The calls of each batch.
        reduce: Gives the mean over all processes.
    """
    training = model.training
    layers = [
        module
        for module in modules_of(model).values()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        and module.running_mean is not None
        and (module.training or not training)
    ]
    found: dict[nn.Module, dict[str, Tensor]] = {}
    momenta = {layer: layer.momentum for layer in layers}
    with undisturbed(model):
        model.eval()
        try:
            for layer in layers:
                layer.train()
                layer.reset_running_stats()
                layer.momentum = None
            for calls in batches:
                run_calls(model, [call for call in calls if call.repeatable])
            found = {
                layer: {name: getattr(layer, name).clone() for name in ("running_mean", "running_var")}
                for layer in layers
                if layer.num_batches_tracked
            }
        finally:
            for layer in layers:
                layer.momentum = momenta[layer]
    for layer in layers:
        if layer in found:
            for name, value in found[layer].items():
                getattr(layer, name).copy_(reduce(value))
