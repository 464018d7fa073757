"""KernelShrinking: convolution kernels lose their outer rings while Lightning trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lightning_prune.callbacks._clock import Point
from lightning_prune.callbacks._structure import ObservingCallback
from lightning_prune.graph.observe import Use
from lightning_prune.pruning.budget import Budget
from lightning_prune.pruning.kernels import Kernels, check_rings, choose_rings, find_kernels, shrink_chosen
from lightning_prune.pruning.plan import Plan
from lightning_prune.pruning.select import globs

__all__ = ["KernelShrinking"]


class KernelShrinking(ObservingCallback):
    """Shrinks convolution kernels (7 to 5 to 3 to 1, even ones down to 2) while Lightning trains.

    Where the outer ring of a kernel matters least, it goes: the model equals the one with the ring's weights set to
    zero. All shapes stay, since padding gets less by the dilation; a convolution that pads by less than that crops its
    input instead, and remains a plain ``nn.Conv2d`` (of negative padding). 1d, 2d and 3d, strides, dilation, groups,
    rectangular kernels and every padding mode; transposed convolutions where they pad enough. Weights, gradients and
    optimizer state are sliced, and DDP's buckets, averaged copies and the masks of `WeightPruning` follow.

    Args:
        amount: Fraction of the dense model that is gone at the end, [0, 1); met at or just past it. Where other
            callbacks change the architecture too, of what there would be without this one: 0.2 and 0.5 leave 0.4.
        of: What the fraction is of: ``"params"`` or ``"macs"``.
        criterion: What makes a ring important: its ``"l1"`` norm, or ``"l2"`` (squared), as a share of its kernel's,
            for each parameter or MAC that it costs.
        schedule: ``"cubic"``, ``"linear"``, ``"exponential"``, ``"one_cycle"``, ``"one_shot"``, or a function of the
            schedule's progress (0 to 1) that gives the part of the amount that is gone.
        start: Where the schedule starts: a fraction of training (float) or an epoch (int).
        end: Where the full amount is reached, likewise.
        every: ``"epoch"``: prune at the end of each epoch; or a number of optimizer steps.
        include: Globs on module names: only these convolutions (None: all).
        exclude: Globs on module names: not these convolutions.
        verify: Check every change against the masked model, one forward of each; roll back if they differ.
        report: Print a table after training; it is in ``report_`` too.
        monitor: Validation metric that the table shows.

    Attributes:
        plan_: What is left of the dense model, and what is gone; by all callbacks of the Trainer.
        frozen_: Convolutions that can't shrink (any more) -> why, as of the last change.

    Raises:
        PruningError: Bad arguments, at once; an amount out of reach or a model that doesn't fit, before the first
            optimizer step.
    """

    def __init__(
        self,
        amount: float = 0.5,
        *,
        of: str = "params",
        criterion: str = "l1",
        schedule: str | Callable[[float], float] = "cubic",
        start: Point = 0.0,
        end: Point = 0.5,
        every: int | str = "epoch",
        include: str | list[str] | None = None,
        exclude: str | list[str] | None = None,
        verify: bool = True,
        report: bool = True,
        monitor: str = "val_acc",
    ) -> None:
        super().__init__(amount, of, schedule, start, end, every, include, exclude, verify, report, monitor)
        check_rings(of, criterion)
        self.criterion = criterion

    def _find(self, pl_module: Any, uses: Mapping[str, Use]) -> Kernels:
        named = globs("include", self.include), globs("exclude", self.exclude)
        optimizers, strict = pl_module.trainer.optimizers, not self.plan_
        kernels = find_kernels(pl_module, uses, self.of, *named, optimizers=optimizers, strict=strict)
        self.frozen_ = kernels.frozen
        return kernels

    def _check(self, pl_module: Any, uses: Mapping[str, Use], budget: Budget) -> None:
        choose_rings(self._find(pl_module, uses), budget, self.amount, self.criterion)

    def _change(
        self, trainer: Any, pl_module: Any, uses: Mapping[str, Use], amount: float, budget: Budget
    ) -> tuple[Plan, float]:
        found = self._find(pl_module, uses)

        def choose(refused: Mapping[str, str]) -> dict[str, int]:
            left, on_the_way = found.without(refused), amount < self.amount
            rings: dict[str, int] = trainer.strategy.broadcast(
                choose_rings(left, budget, amount, self.criterion, on_the_way=on_the_way, strict=False)
            )
            return rings

        plan, kernels = shrink_chosen(pl_module, self._repeatable(), found, choose, trainer.optimizers)
        self.frozen_ = kernels.frozen
        shrunk = {path: weight for path, weight in found.weights.items() if f"{path}.weight" in plan.kept}
        left = {path: pl_module.get_parameter(f"{path}.weight").numel() / w.numel() for path, w in shrunk.items()}
        left |= {copy: left[path] for copy, path in found.copies.items() if path in left and copy in uses}
        return plan, sum(uses[path].macs * (1 - part) for path, part in left.items())
