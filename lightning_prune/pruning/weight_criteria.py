"""Criteria: how much a single weight matters, judged by what is known of it. Higher means keep."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_prune.errors import PruningError
from lightning_prune.graph.callsites import ModuleCall, untraced
from lightning_prune.graph.run import run_calls, undisturbed
from lightning_prune.pruning.masks import whole
from lightning_prune.pruning.synflow import flow

__all__ = [
    "WEIGHT_CRITERIA",
    "Collected",
    "Criterion",
    "Custom",
    "GradientCriterion",
    "Random",
    "Synflow",
    "Wanda",
    "collect",
    "get_weight_criterion",
    "in_dim",
    "mix_seed",
]

Collected = tuple[dict[str, Tensor], set[str]]
"""Sums by parameter name, and those of the names that are stale."""

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def in_dim(module: nn.Module | None) -> int:
    """The dimension of a layer's weight that runs over its inputs."""
    return 0 if isinstance(module, TRANSPOSED) else 1


class Criterion:
    """What a criterion collects during training, and the score that it makes of it.

    Attributes:
        needs: What it judges by: ``"weights"``, ``"gradients"``, ``"inputs"`` of layers or ``"flow"``, a run of the
            model on ones.
        rounds: How many times the whole amount is reached in equal steps, each scored anew.
        sums: What has been collected, by parameter name.
        stale: Those of them that are from before the last pruning; they judge until there is something new.
    """

    needs = "weights"
    rounds = 1
    keeps = False
    """Whether what was collected is kept after a pruning."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.stale: set[str] = set()

    def add(self, name: str, told: Tensor) -> None:
        """Collect something more of a weight."""
        if name in self.sums and name not in self.stale:
            self.sums[name].add_(told)
        else:
            self.sums[name] = told
            self.stale.discard(name)

    def score(self, name: str, weight: Tensor) -> Tensor:
        """Scores of a weight: its shape, any units."""
        raise NotImplementedError

    def ready(self, weights: Mapping[str, Tensor]) -> None:
        """Raise a PruningError if something that the scores need has not been collected."""
        if missing := self.missing(weights):
            what = "gradient" if self.needs == "gradients" else "input"
            raise PruningError(
                f"criterion {type(self).__name__.lower()!r} needs the {what} of every weight, but {missing[0]!r} has "
                f"none{_advice(self.needs)}"
            )

    def missing(self, weights: Mapping[str, Tensor]) -> list[str]:
        """The weights of which nothing has been collected that the scores need."""
        return [name for name in weights if name not in self.sums] if self.needs in ("gradients", "inputs") else []

    def forget(self, *, last: bool = True) -> None:
        """A pruning is done: collect anew, unless it was the last one."""
        if last or self.needs not in ("gradients", "inputs"):
            self.sums, self.stale = {}, set()
        elif not self.keeps:
            self.stale = set(self.sums)


def _advice(needs: str) -> str:
    if needs == "gradients":
        return "; call backward() first, and leave frozen layers out with exclude"
    return "; give example_inputs, and leave out with exclude what is no linear layer and no convolution"


class L1(Criterion):
    """Magnitude.

    Source: Han et al., 2015, "Learning both weights and connections", arXiv:1506.02626.
    """

    def score(self, name: str, weight: Tensor) -> Tensor:
        """Magnitude of each weight."""
        return weight.detach().abs()


class Random(Criterion):
    """Chance: what any criterion must beat.

    Source: Liu et al., 2022, "The unreasonable effectiveness of random pruning", arXiv:2202.02643.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seed: int | None = None
        """Makes the choice; the same on all processes. None: torch's own random state does."""

    def score(self, name: str, weight: Tensor) -> Tensor:
        """Uniform in [0, 1)."""
        if self.seed is None:
            self.seed = int(torch.randint(1 << 62, ()))
        generator = torch.Generator().manual_seed(mix_seed(self.seed, name))
        return torch.rand(weight.shape, generator=generator).to(weight.device)


def mix_seed(seed: int, name: str) -> int:
    """A seed for one parameter; `hash` differs between processes."""
    for character in name.encode():
        seed = (seed * 1000003 + character) % (1 << 63)
    return seed


class GradientCriterion(Criterion):
    """One that judges weights by the gradients that they get."""

    needs = "gradients"

    def collect(self, name: str, weight: Tensor, gradient: Tensor) -> None:
        """Add what one gradient says of a weight.

        One that is zero throughout says nothing new: it is that of a part that this step did not train.
        """
        with torch.no_grad():
            gradient = gradient.detach()
            gradient = gradient.to_dense() if gradient.layout is not torch.strided else gradient
            if name in self.stale and not bool(whole((gradient != 0).sum())):
                return
            wide = torch.promote_types(weight.dtype, torch.float32)
            self.add(name, self.told(weight.detach().to(wide), gradient.to(wide)))

    def told(self, weight: Tensor, gradient: Tensor) -> Tensor:
        """What one gradient says."""
        raise NotImplementedError

    def score(self, name: str, weight: Tensor) -> Tensor:
        """What all gradients say."""
        return self.sums[name]


class Taylor(GradientCriterion):
    """First-order change of the loss, |w · g|, summed over batches.

    Source: Molchanov et al., 2019, "Importance estimation for neural network pruning", arXiv:1906.10771.
    """

    def told(self, weight: Tensor, gradient: Tensor) -> Tensor:
        """|w · g|."""
        return (weight * gradient).abs_()


class Snip(GradientCriterion):
    """Connection sensitivity: |w · g| of the loss over all batches together.

    Source: Lee et al., 2019, "SNIP: single-shot network pruning", arXiv:1810.02340.
    """

    def told(self, weight: Tensor, gradient: Tensor) -> Tensor:
        """w · g."""
        return weight * gradient

    def score(self, name: str, weight: Tensor) -> Tensor:
        """|sum of w · g|."""
        return self.sums[name].abs()


class Movement(GradientCriterion):
    """Whether training moves a weight away from zero: -w · g, summed over the whole training.

    Source: Sanh et al., 2020, "Movement pruning", arXiv:2005.07683.
    """

    keeps = True

    def told(self, weight: Tensor, gradient: Tensor) -> Tensor:
        """-w · g."""
        return (weight * gradient).neg_()


class Fisher(GradientCriterion):
    """Second-order change of the loss, with the squared gradient for its curvature: (w · g)², summed over batches.

    Source: Theis et al., 2018, "Faster gaze prediction with dense networks and Fisher pruning", arXiv:1801.05787.
    """

    def told(self, weight: Tensor, gradient: Tensor) -> Tensor:
        """(w · g)²."""
        return (weight * gradient).square_()


class Wanda(Criterion):
    """Magnitude times the L2 norm of the input that the weight is multiplied with.

    Inputs of convolutions count per channel. Collected while the model trains, or from ``example_inputs``.

    Source: Sun et al., 2024, "A simple and effective pruning approach for large language models", arXiv:2306.11695.
    """

    needs = "inputs"

    def score(self, name: str, weight: Tensor) -> Tensor:
        """|w| · ‖x‖₂."""
        return whole(weight.detach()).abs() * self.sums[name].sqrt()

    @staticmethod
    def of_all(parts: Sequence[Collected]) -> Collected:
        """What several processes have collected together; what none has anew is as old on all of them."""
        sums: dict[str, Tensor] = {}
        stale: set[str] = set()
        for name in dict.fromkeys(name for own, _ in parts for name in own):
            fresh = [own[name] for own, old in parts if name in own and name not in old]
            if not fresh:
                stale.add(name)
            sums[name] = sum(fresh[1:], start=fresh[0]) if fresh else next(own[name] for own, _ in parts if name in own)
        return sums, stale

    def check(self, model: nn.Module, names: Sequence[str]) -> None:
        """Raise a PruningError if one of these is no weight of a linear layer or a convolution."""
        modules = dict(model.named_modules())
        for name in names:
            path, _, own = name.rpartition(".")
            if own != "weight" or not isinstance(modules.get(path), (nn.Linear, *CONVOLUTIONS, *TRANSPOSED)):
                raise PruningError(
                    f"criterion 'wanda' needs a layer's input, but {name!r} is no weight of a linear layer or a "
                    "convolution; leave it out with exclude"
                )

    @contextmanager
    def listening(self, model: nn.Module, names: Sequence[str], *, training_only: bool) -> Iterator[None]:
        """Inside, the inputs of the layers that hold these weights are collected."""
        handles = self.listen(model, names, training_only=training_only)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def listen(self, model: nn.Module, names: Sequence[str], *, training_only: bool) -> list[RemovableHandle]:
        """Collect the inputs of the layers that hold these weights, until the handles are removed.

        Raises:
            PruningError: One of them is no weight of a linear layer or a convolution.
        """
        self.check(model, names)
        modules = dict(model.named_modules())
        shared = {id(modules[name.rpartition(".")[0]].weight): name for name in names}
        handles = []
        for module in modules.values():
            name = shared.get(id(module._parameters.get("weight")))
            if name is None or not isinstance(module, (nn.Linear, *CONVOLUTIONS, *TRANSPOSED)):
                continue

            def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str = name) -> None:
                if module.training or not training_only:
                    x = args[0] if args else kwargs["input"]
                    with torch.no_grad(), untraced():
                        self.add(name, _squares(module, x.detach()))

            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        return handles


def _squares(module: Any, x: Tensor) -> Tensor:
    """Sum of squares of each input, of a shape that broadcasts to the weight's."""
    squares = x.to(torch.promote_types(x.dtype, torch.float32)).square()
    if isinstance(module, nn.Linear):
        return (squares.sum(list(range(x.dim() - 1))) if x.dim() > 1 else squares).view(1, -1)
    spatial = len(module.kernel_size)
    channel = x.dim() - spatial - 1
    sums = squares.sum([dim for dim in range(x.dim()) if dim != channel])
    tail = (1,) * spatial
    if isinstance(module, TRANSPOSED):
        return sums.view(-1, 1, *tail)
    per_group = sums.view(module.groups, -1)  # each output reads the inputs of its group
    return per_group.repeat_interleave(module.out_channels // module.groups, 0).view(module.out_channels, -1, *tail)


class Synflow(Criterion):
    """Synaptic flow: |w · ∂R/∂w|, where R sums the outputs of the network of all |weights| for an input of ones.

    It needs no data, and in its 100 rounds it cuts no layer through before it has to. What layers add (biases, running
    means) counts as zero.

    Source: Tanaka et al., 2020, "Pruning neural networks without any data by iteratively conserving synaptic flow",
    arXiv:2006.05467.
    """

    needs = "flow"
    rounds = 100

    def flow(
        self,
        model: nn.Module,
        calls: Sequence[ModuleCall],
        weights: Mapping[str, Tensor],
        masks: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Run the model on ones and note the scores of these weights; where ``masks`` are false, they count as zero."""
        self.sums = flow(model, calls, weights, masks or {})

    def score(self, name: str, weight: Tensor) -> Tensor:
        """|w · ∂R/∂w|."""
        return self.sums[name]


class Custom(Criterion):
    """A function of the user's own: takes a parameter, with its ``grad``, and gives scores of its shape."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def score(self, name: str, weight: Tensor) -> Tensor:
        """What the function gives.

        Raises:
            PruningError: No tensor of the weight's shape.
        """
        if name in self.sums:  # asked for several times; it may draw random numbers
            return self.sums[name]
        with torch.no_grad():
            scores = self.function(weight)
        if not isinstance(scores, Tensor) or scores.shape != weight.shape:
            got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise PruningError(f"the criterion gave {got} for {name!r}; it must give a score for each weight")
        self.sums[name] = scores if scores.is_floating_point() else scores.double()
        return self.sums[name]


WEIGHT_CRITERIA: dict[str, type[Criterion]] = {
    "fisher": Fisher,
    "l1": L1,
    "movement": Movement,
    "random": Random,
    "snip": Snip,
    "synflow": Synflow,
    "taylor": Taylor,
    "wanda": Wanda,
}
"""The registry: a class of the user's own may be added under a name."""


def get_weight_criterion(criterion: str | Callable[[Tensor], Tensor]) -> Criterion:
    """A fresh criterion: one of the registry, or of the user's own function.

    Raises:
        PruningError: The registry has none of this name; the message lists those that exist.
    """
    if callable(criterion):
        return Custom(criterion)
    if not isinstance(criterion, str) or criterion not in WEIGHT_CRITERIA:
        raise PruningError(
            f"unknown criterion {criterion!r}; choose from {', '.join(sorted(WEIGHT_CRITERIA))}, or give a function"
        )
    return WEIGHT_CRITERIA[criterion]()


def collect(criterion: Criterion, model: nn.Module, weights: Mapping[str, Tensor], calls: Sequence[ModuleCall]) -> None:
    """Collect what a criterion needs outside of training: gradients that are there, inputs of ``calls``.

    Raises:
        PruningError: It isn't there.
    """
    if isinstance(criterion, GradientCriterion):
        for name, weight in weights.items():
            if weight.grad is not None:
                criterion.collect(name, weight, weight.grad)
    elif isinstance(criterion, Wanda):
        if not calls:
            raise PruningError(
                "criterion 'wanda' needs example_inputs: it judges weights by what they are multiplied with"
            )
        with undisturbed(model), criterion.listening(model, list(weights), training_only=False):
            model.eval()
            try:
                run_calls(model, calls)
            except Exception as error:  # whatever the user's forward raises
                kind = type(error).__name__
                raise PruningError(f"criterion 'wanda': the model raised {kind} on example_inputs: {error}") from error
    elif criterion.needs == "flow" and not calls:
        raise PruningError("criterion 'synflow' needs example_inputs: their shapes, not their values")
    criterion.ready(weights)
