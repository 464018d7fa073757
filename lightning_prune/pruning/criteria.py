"""Criteria: how much a neuron matters, judged by what is known of it. Higher means keep."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_prune.errors import PruningError
from lightning_prune.graph.callsites import ModuleCall, untraced
from lightning_prune.graph.groups import NO_UNIT, Groups, Slice
from lightning_prune.graph.run import run_calls, undisturbed
from lightning_prune.graph.tree import modules_of, named_tensors
from lightning_prune.pruning.weight_criteria import CONVOLUTIONS, TRANSPOSED

__all__ = ["NEURON_CRITERIA", "NeuronCriterion", "collect_now", "get_neuron_criterion", "relative"]


class NeuronCriterion:
    """What a criterion collects during training, and the score of each neuron that it makes of it.

    Attributes:
        needs: What it judges by: ``"weights"``, ``"gradients"`` or ``"outputs"`` of layers.
        comparable: Whether scores of different groups are on one scale. Those that are not are divided by their
            group's mean, so that a global ranking doesn't empty the layers of small fan-in first.
        sums: What has been collected, float64.
    """

    needs: ClassVar[str] = "weights"
    comparable: ClassVar[bool] = False

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self._slices: tuple[Groups, list[tuple[str, int, Tensor, Tensor]]] | None = None

    def score(self, model: nn.Module, groups: Groups) -> Tensor:
        """Scores, shape (neurons,), float64, non-negative."""
        raise NotImplementedError

    def judged(self, model: nn.Module, groups: Groups) -> Tensor:
        """The neurons that it can judge, bool (neurons,); the others stay."""
        return torch.ones(groups.neurons, dtype=torch.bool)

    def told(self, model: nn.Module, groups: Groups) -> Tensor:
        """Those of which enough has been collected to judge them now, bool (neurons,)."""
        return self.judged(model, groups)

    def ready(self, model: nn.Module, groups: Groups) -> None:
        """Raise a PruningError if something that the scores need has not been collected, or nothing can be judged."""
        if not bool(self.judged(model, groups).any()):
            raise PruningError(f"criterion {self.name!r} can judge none of the neurons{self.advice}")

    advice: ClassVar[str] = ""

    @property
    def name(self) -> str:
        """Its name in the registry, where it is there."""
        return next((name for name, cls in NEURON_CRITERIA.items() if type(self) is cls), type(self).__name__)

    def forget(self) -> None:
        """Neurons are gone: collect anew."""
        self.sums, self._slices = {}, None


def relative(groups: Groups, scores: Tensor) -> Tensor:
    """Scores as multiples of their group's mean: makes layers of different fan-in comparable."""
    scores = scores.clone()
    for numbers in groups.ranges:
        part = scores[numbers.start : numbers.stop]
        part /= part.abs().mean().clamp(min=torch.finfo(torch.float64).tiny)
    return scores


class L1(NeuronCriterion):
    """L1 norm of each neuron over every slice of its group.

    Source: Li et al., 2017, "Pruning filters for efficient ConvNets", arXiv:1608.08710 (they score the filter
    alone).
    """

    power: ClassVar[int] = 1

    def score(self, model: nn.Module, groups: Groups) -> Tensor:
        """Sum of magnitudes."""
        scores = torch.zeros(groups.neurons, dtype=torch.float64)
        parameters = named_tensors(model)
        wanted: dict[str, list[int]] = {}
        for (name, dim), extent in groups.extents.items():
            if name in groups.parameters and not extent.fixed:
                wanted.setdefault(name, []).append(dim)
        if wanted:
            units = torch.cat([groups.extents[name, dim].unit_of for name, dims in wanted.items() for dim in dims])
            every = [_norms(parameters[name].detach(), dims, self.power) for name, dims in wanted.items()]
            norms = torch.cat([norm for each in every for norm in each])
            scores.index_add_(0, units[units != NO_UNIT], norms[units != NO_UNIT])
        return scores if self.power == 1 else scores.sqrt()


class L2(L1):
    """L2 norm of each neuron over every slice of its group.

    Source: He et al., 2018, "Soft filter pruning", arXiv:1808.06866 (they score the filter alone).
    """

    power = 2


class Lamp(L2):
    """Squared L2 norm as a share of what is left in the group when all smaller ones are gone.

    Source: Lee et al., 2021, "Layer-adaptive sparsity for the magnitude-based pruning", arXiv:2010.07611, of neurons
    in the place of single weights.
    """

    comparable = True

    def score(self, model: nn.Module, groups: Groups) -> Tensor:
        """Share of the rest, in (0, 1] per group; 1 for the largest."""
        squares = super().score(model, groups).square()
        for numbers in groups.ranges:
            part = squares[numbers.start : numbers.stop]
            order = torch.argsort(part, descending=True, stable=True)
            rest = part[order].cumsum(0).clamp(min=torch.finfo(torch.float64).tiny)
            part[order] = part[order] / rest
        return squares


class Random(NeuronCriterion):
    """Chance: what any criterion must beat.

    Source: Mittal et al., 2018, "Recovering from random pruning", arXiv:1801.10447.
    """

    comparable = True

    def __init__(self) -> None:
        super().__init__()
        self.seed: int | None = None
        """Makes the choice. None: torch's own random state does."""

    def score(self, model: nn.Module, groups: Groups) -> Tensor:
        """Uniform in [0, 1)."""
        seed = int(torch.randint(1 << 62, ())) if self.seed is None else self.seed
        return torch.rand(groups.neurons, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class NormScale(NeuronCriterion):
    """Magnitude of the scale that a norm layer gives a neuron; neurons without one are left alone.

    Source: Liu et al., 2017, "Learning efficient convolutional networks through network slimming", arXiv:1708.06519.
    """

    comparable = True
    advice = ": no norm layer with a scale follows any of them"

    def _scales(self, model: nn.Module, groups: Groups) -> list[tuple[str, Tensor]]:
        modules = modules_of(model)
        kinds = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
        return [
            (name, extent.unit_of)
            for (name, dim), extent in groups.extents.items()
            if not extent.fixed and name.endswith("weight") and isinstance(modules[name.rpartition(".")[0]], kinds)
        ]

    def judged(self, model: nn.Module, groups: Groups) -> Tensor:
        """Those with a norm layer."""
        found = torch.zeros(groups.neurons, dtype=torch.bool)
        for _, unit_of in self._scales(model, groups):
            found[unit_of[unit_of != NO_UNIT]] = True
        return found

    def score(self, model: nn.Module, groups: Groups) -> Tensor:
        """Mean |scale| over the norm layers of each neuron."""
        tensors = named_tensors(model)
        total = torch.zeros(groups.neurons, dtype=torch.float64)
        count = torch.zeros_like(total)
        for name, unit_of in self._scales(model, groups):
            inside = unit_of != NO_UNIT
            total.index_add_(0, unit_of[inside], tensors[name].detach().abs().double().cpu().flatten()[inside])
            count.index_add_(0, unit_of[inside], torch.ones(int(inside.sum()), dtype=torch.float64))
        return total / count.clamp(min=1)


class GeometricMedian(NeuronCriterion):
    """Distance to the other neurons of the group: one near their geometric median can be replaced by them.

    Source: He et al., 2019, "Filter pruning via geometric median", arXiv:1811.00250 (FPGM).
    """

    def score(self, model: nn.Module, groups: Groups) -> Tensor:
        """Sum of L2 distances between what makes a neuron and what makes the others."""
        tensors = named_tensors(model)
        scores = torch.zeros(groups.neurons, dtype=torch.float64)
        for group, numbers in zip(groups.prunable, groups.ranges, strict=True):
            squares = torch.zeros(group.size, group.size, dtype=torch.float64)
            for part in group.slices:
                if part.role == "makes" and part.name in groups.parameters:
                    rows = rows_of(tensors[part.name], part)
                    squares += torch.cdist(rows, rows).square().cpu()
            scores[numbers.start : numbers.stop] = squares.sqrt().sum(1)
        return scores


def rows_of(weight: Tensor, part: Slice) -> Tensor:
    """What a tensor holds of each neuron: shape (neurons, k), at least single precision."""
    weight = weight.detach().movedim(part.dim, 0).reshape(weight.size(part.dim), -1)
    rows = weight[part.index.flatten().to(weight.device)].view(len(part.units), -1)
    return rows.to(torch.promote_types(rows.dtype, torch.float32))


UNTOLD = -1.0
"""Stands for the sum of a neuron that has had no gradient."""


class Taylor(NeuronCriterion):
    """First-order change of the loss without the neuron: (sum of w · g over what makes it)², summed over batches.

    Source: Molchanov et al., 2019, "Importance estimation for neural network pruning", arXiv:1906.10771.
    """

    needs = "gradients"
    comparable = True
    advice = ": no layer makes them"

    def _made(self, groups: Groups) -> list[tuple[str, int, Tensor, Tensor]]:
        """Name, dimension, indices and their neurons, of each tensor that makes neurons or goes with them."""
        if self._slices is None or self._slices[0] is not groups:
            parts = [part for group in groups.prunable for part in group.slices if part.role != "reads"]
            found = []
            for name, dim in sorted({(part.name, part.dim) for part in parts}):
                if name in groups.parameters:
                    unit_of = groups.extents[name, dim].unit_of
                    inside = (unit_of != NO_UNIT).nonzero().squeeze(1)
                    found.append((name, dim, inside, unit_of[inside]))
            self._slices = groups, found
        return self._slices[1]

    def judged(self, model: nn.Module, groups: Groups) -> Tensor:
        """Those that a tensor makes that is trained."""
        tensors = named_tensors(model)
        found = torch.zeros(groups.neurons, dtype=torch.bool)
        for name, _, _, units in self._made(groups):
            if tensors[name].requires_grad:
                found[units] = True
        return found

    @torch.no_grad()
    def collect(self, groups: Groups, tensors: Mapping[str, Tensor], only: Iterable[Tensor] | None = None) -> None:
        """Add what the gradients say that are there now (of ``only`` some tensors)."""
        wanted = None if only is None else {id(tensor) for tensor in only}
        told: Tensor | None = None
        for name, dim, inside, units in self._made(groups):
            tensor = tensors[name]
            gradient = tensor.grad
            if gradient is None or (wanted is not None and id(tensor) not in wanted):
                continue
            gradient = gradient.to_dense() if gradient.layout is not torch.strided else gradient
            wide = torch.promote_types(tensor.dtype, torch.float32)
            product = tensor.detach().to(wide) * gradient.to(wide)
            each = product.sum([d for d in range(product.dim()) if d != dim]) if product.dim() > 1 else product
            if told is None:
                told = torch.zeros(groups.neurons, dtype=torch.float64, device=each.device)
                fresh = torch.zeros_like(told, dtype=torch.bool)
            told.index_add_(0, units.to(each.device), each.double()[inside.to(each.device)].to(told.device))
            fresh[units] = True
        if told is not None:
            total = self.sums.get("total", torch.full_like(told, UNTOLD)).to(told.device)
            self.sums["total"] = torch.where(fresh, total.clamp(min=0) + told.square(), total)

    def ready(self, model: nn.Module, groups: Groups) -> None:
        """Raise a PruningError if there was no gradient."""
        super().ready(model, groups)
        if "total" not in self.sums:
            raise PruningError(f"criterion {self.name!r} needs gradients, but there are none; call backward() first")

    def score(self, model: nn.Module, groups: Groups) -> Tensor:
        """(w · g)², summed over batches."""
        return self.sums["total"].cpu().clamp(min=0)

    def told(self, model: nn.Module, groups: Groups) -> Tensor:
        """Those that had a gradient."""
        judged = self.judged(model, groups)
        return judged & (self.sums["total"].cpu() >= 0) if "total" in self.sums else torch.zeros_like(judged)


class Activation(NeuronCriterion):
    """Mean |output| of a neuron, as the layers see it that read it (where none can be asked: as its layer gives it).

    Source: Molchanov et al., 2017, "Pruning convolutional neural networks for resource efficient inference",
    arXiv:1611.06440 (section 2.2, mean activation).
    """

    needs = "outputs"
    advice = ": no linear layer and no convolution makes or reads them"

    def __init__(self) -> None:
        super().__init__()
        self._fresh: dict[str, Tensor] = {}
        self._wanted: tuple[Groups, set[str]] | None = None

    def _seen(self, model: nn.Module, groups: Groups) -> tuple[dict[str, Tensor], Tensor]:
        """Neurons at the inputs (``"path<"``) and outputs (``"path>"``) of layers; and which neurons these are."""
        seen = torch.zeros(groups.neurons, dtype=torch.bool)
        found: dict[str, Tensor] = {}
        for outputs in (False, True):
            now = torch.zeros_like(seen)
            for path, layer in _layers(model).items():
                grouped = getattr(layer, "groups", 1) > 1
                if grouped and (not outputs or isinstance(layer, TRANSPOSED)):
                    continue  # the weight's dimension is that of one group of channels
                dim = int(outputs == isinstance(layer, TRANSPOSED))
                extent = groups.extents.get((f"{path}.weight" if path else "weight", dim))
                if extent is None or extent.fixed:
                    continue
                unit_of = extent.unit_of
                unit_of = torch.where(seen[unit_of.clamp(min=0)], NO_UNIT, unit_of)
                if bool((unit_of != NO_UNIT).any()):
                    now[unit_of[unit_of != NO_UNIT]] = True
                    found[f"{path}{'>' if outputs else '<'}"] = unit_of
            seen |= now
        return found, seen

    def judged(self, model: nn.Module, groups: Groups) -> Tensor:
        """Those that a linear layer or a convolution reads or makes."""
        return self._seen(model, groups)[1]

    def watch_for(self, model: nn.Module, groups: Groups) -> None:
        """Collect only what these groups need; until then, everything is."""
        self._wanted = groups, set(self._seen(model, groups)[0])

    def listen(self, model: nn.Module, *, training_only: bool) -> list[RemovableHandle]:
        """Collect from now on, until the handles are removed."""
        handles = []
        for path, layer in _layers(model).items():

            def before(layer: nn.Module, args: Any, kwargs: Any, key: str = f"{path}<") -> None:
                self._note(layer, args[0] if args else kwargs["input"], key, training_only)

            def after(layer: nn.Module, args: Any, output: Tensor, key: str = f"{path}>") -> None:
                self._note(layer, output, key, training_only)

            handles.append(layer.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(layer.register_forward_hook(after))
        return handles

    @torch.no_grad()
    def _note(self, layer: Any, x: Tensor, key: str, training_only: bool) -> None:
        if (training_only and not layer.training) or (self._wanted is not None and key not in self._wanted[1]):
            return
        channel = x.dim() - 1 if isinstance(layer, nn.Linear) else x.dim() - 1 - len(layer.kernel_size)
        if not 0 <= channel < x.dim():
            return  # the layer is about to refuse it
        others = [dim for dim in range(x.dim()) if dim != channel]
        with untraced():
            sizes = x.detach().abs().to(torch.promote_types(x.dtype, torch.float32))
            told = (sizes.sum(others) if others else sizes).double()
            told = torch.cat([told, told.new_full((1,), x.numel() / x.size(channel))])
            self._fresh[key] = told if key not in self._fresh else self._fresh[key].to(told.device).add_(told)

    def merge(self, model: nn.Module, reduce: Callable[[Tensor], Tensor] | None = None) -> None:
        """A batch is over: add what it told, on all processes alike.

        Args:
            model: The model.
            reduce: Gives the sum over all processes; None where there is one.
        """
        fresh, self._fresh = self._fresh, {}
        if reduce is not None:  # processes may have run other layers, but must reduce the same
            device = next((p.device for p in model.parameters()), torch.device("cpu"))
            sizes = {key: size for key, size in _ends(model).items() if self._wanted is None or key in self._wanted[1]}
            flat = [fresh[key].to(device) if key in fresh else torch.zeros(sizes[key] + 1).to(device) for key in sizes]
            parts = reduce(torch.cat([each.double() for each in flat])).split([size + 1 for size in sizes.values()])
            fresh = {key: part for key, part in zip(sizes, parts, strict=True) if bool(part[-1])}
        for key, told in fresh.items():
            self.sums[key] = told if key not in self.sums else self.sums[key].to(told.device) + told

    def ready(self, model: nn.Module, groups: Groups) -> None:
        """Raise a PruningError if nothing ran."""
        super().ready(model, groups)
        if not self.sums:
            raise PruningError(f"criterion {self.name!r} needs the outputs of layers, but none has run")

    def score(self, model: nn.Module, groups: Groups) -> Tensor:
        """Mean magnitude."""
        total, count = self._collected(model, groups)
        return total / count.clamp(min=1)

    def told(self, model: nn.Module, groups: Groups) -> Tensor:
        """Those whose layers have run."""
        return self.judged(model, groups) & (self._collected(model, groups)[1] > 0)

    def _collected(self, model: nn.Module, groups: Groups) -> tuple[Tensor, Tensor]:
        """Sum of magnitudes, and of how many, per neuron."""
        total = torch.zeros(groups.neurons, dtype=torch.float64)
        count = torch.zeros_like(total)
        for key, unit_of in self._seen(model, groups)[0].items():
            if key in self.sums:
                inside, told = unit_of != NO_UNIT, self.sums[key].cpu()
                total.index_add_(0, unit_of[inside], told[:-1][inside])
                count.index_add_(0, unit_of[inside], told[-1:].expand(int(inside.sum())))
        return total, count

    def forget(self) -> None:
        """Neurons are gone: collect anew."""
        super().forget()
        self._wanted, self._fresh = None, {}


def _ends(model: nn.Module) -> dict[str, int]:
    """Size of the inputs (``"path<"``) and outputs (``"path>"``) of layers."""
    sizes = {}
    for path, layer in _layers(model).items():
        linear = isinstance(layer, nn.Linear)
        sizes[f"{path}<"] = int(layer.in_features if linear else layer.in_channels)
        sizes[f"{path}>"] = int(layer.out_features if linear else layer.out_channels)
    return sizes


def _layers(model: nn.Module) -> dict[str, Any]:
    kinds = (nn.Linear, *CONVOLUTIONS, *TRANSPOSED)
    return {path: module for path, module in modules_of(model).items() if type(module) in kinds}


class Custom(NeuronCriterion):
    """A function of the user's own: takes the weights of neurons, shape (neurons, k), and gives scores, (neurons,).

    It is asked for every parameter that makes, follows or reads a group's neurons, biases too (k = 1); the answers are
    added.
    """

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def score(self, model: nn.Module, groups: Groups) -> Tensor:
        """What the function gives.

        Raises:
            PruningError: It gives something else.
        """
        tensors = named_tensors(model)
        scores = torch.zeros(groups.neurons, dtype=torch.float64)
        for group, numbers in zip(groups.prunable, groups.ranges, strict=True):
            for part in group.slices:
                if part.name not in groups.parameters:
                    continue
                given = self.function(rows_of(tensors[part.name], part))
                if not isinstance(given, Tensor) or given.shape != (group.size,) or not bool(given.isfinite().all()):
                    got = f"shape {tuple(given.shape)}" if isinstance(given, Tensor) else type(given).__name__
                    if isinstance(given, Tensor) and given.shape == (group.size,):
                        got = "values that are not finite"
                    k = tensors[part.name].numel() // max(tensors[part.name].size(part.dim), 1)
                    raise PruningError(
                        f"the criterion gave {got} for {part} (biases and norm scales count too, with k=1; here "
                        f"k={k}); it must give a finite score for each of the {group.size} rows"
                    )
                scores[numbers.start : numbers.stop] += given.detach().double().cpu()
        return scores


CHUNK = 1 << 18
"""Elements whose magnitudes are held at a time, in the same memory: to fill fresh memory costs more than to read."""


def _norms(weight: Tensor, dims: list[int], power: int) -> list[Tensor]:
    """Sum of |w|^power over each slice along each of some dimensions, float64."""
    if weight.dim() == 1:
        sizes = weight.abs().double()
        return [sizes.square_().cpu() if power == 2 else sizes.cpu()]
    rows = max(CHUNK * weight.size(0) // weight.numel(), 1) if weight.numel() else 1
    found: list[list[Tensor]] = [[] for _ in dims]
    exact = weight.dtype in (torch.float32, torch.float64)
    memory = torch.empty_like(weight[:rows], memory_format=torch.contiguous_format) if exact else None
    for part in weight.split(rows):
        sizes = part.abs().float() if memory is None else torch.abs(part, out=memory[: len(part)])
        sizes = sizes.square_() if power == 2 else sizes
        others = [dim for dim in range(sizes.dim()) if dim not in dims]
        sizes = sizes.sum(others) if others else sizes
        for norms, at in zip(found, range(len(dims)), strict=True):
            rest = [dim for dim in range(sizes.dim()) if dim != at]
            norms.append((sizes.sum(rest) if rest else sizes).double().cpu())
    return [torch.cat(norms) if dim == 0 else sum(norms[1:], norms[0]) for dim, norms in zip(dims, found, strict=True)]


NEURON_CRITERIA: dict[str, type[NeuronCriterion]] = {
    "activation": Activation,
    "bn_scale": NormScale,
    "geometric_median": GeometricMedian,
    "l1": L1,
    "l2": L2,
    "lamp": Lamp,
    "random": Random,
    "taylor": Taylor,
}
"""The registry: a class of the user's own may be added under a name."""


def collect_now(criterion: NeuronCriterion, model: nn.Module, groups: Groups, calls: Sequence[ModuleCall]) -> None:
    """Collect what a criterion needs outside of training: gradients that are there, outputs of ``calls``.

    Raises:
        PruningError: It isn't there.
    """
    criterion.forget()
    if isinstance(criterion, Taylor):
        criterion.collect(groups, named_tensors(model))
    elif isinstance(criterion, Activation):
        criterion.watch_for(model, groups)
        handles = criterion.listen(model, training_only=False)
        try:
            with undisturbed(model):
                model.eval()
                run_calls(model, [call for call in calls if call.repeatable])
            criterion.merge(model)
        finally:
            for handle in handles:
                handle.remove()
    criterion.ready(model, groups)


def get_neuron_criterion(criterion: str | Callable[[Tensor], Tensor]) -> NeuronCriterion:
    """A fresh criterion: one of the registry, or of the user's own function.

    Raises:
        PruningError: The registry has none of this name; the message lists those that exist.
    """
    if callable(criterion):
        return Custom(criterion)
    if not isinstance(criterion, str) or criterion not in NEURON_CRITERIA:
        raise PruningError(
            f"unknown criterion {criterion!r}; choose from {', '.join(sorted(NEURON_CRITERIA))}, or give a function"
        )
    return NEURON_CRITERIA[criterion]()
