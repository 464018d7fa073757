"""LayerPruning: residual blocks and other layers that change little go while Lightning trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from lightning_prune.callbacks._clock import Point
from lightning_prune.callbacks._structure import ObservingCallback
from lightning_prune.graph.observe import Use
from lightning_prune.pruning.budget import Budget
from lightning_prune.pruning.layers import Layers, check_layers, choose_layers, drop_chosen, find_layers
from lightning_prune.pruning.plan import Plan
from lightning_prune.pruning.select import globs

__all__ = ["LayerPruning"]


class LayerPruning(ObservingCallback):
    """Removes whole residual blocks and other shape-preserving layers while Lightning trains.

    A layer can go if its output has the shape of its input whenever it is called. Those go first that change their
    input least, as measured in the training batch after which they go. The model then equals the one in which the
    layer's input is its output: an ``nn.Identity`` takes its place, or a `PassThrough` where it is called with more
    than its input or gives a tuple with nothing else in it. Optimizers forget the parameters that are gone; DDP's
    buckets, averaged copies and the masks of `WeightPruning` follow. A layer that the model turns out to need, because
    something reads its attributes for one, is left alone.

    Args:
        amount: Fraction of the dense model that is gone at the end, [0, 1); met at or just past it. Where other
            callbacks change the architecture too, of what there would be without this one: 0.2 and 0.5 leave 0.4.
        of: What the fraction is of: ``"params"`` or ``"macs"``.
        criterion: What makes a layer important: ``"l1"``, the L1 norm of output minus input in those of the input; or
            ``"random"``.
        schedule: ``"cubic"``, ``"linear"``, ``"exponential"``, ``"one_cycle"``, ``"one_shot"``, or a function of the
            schedule's progress (0 to 1) that gives the part of the amount that is gone.
        start: Where the schedule starts: a fraction of training (float) or an epoch (int).
        end: Where the full amount is reached, likewise.
        every: ``"epoch"``: prune at the end of each epoch; or a number of optimizer steps.
        include: Globs on module names: only these layers (None: all).
        exclude: Globs on module names: not these layers.
        verify: Check every removal against the model in which the layers pass their input on; roll back if they differ.
        report: Print a table after training; it is in ``report_`` too.
        monitor: Validation metric that the table shows.

    Attributes:
        plan_: What is left of the dense model, and what is gone; by all callbacks of the Trainer.
        frozen_: Modules that can't go -> why, as of the last change.

    Raises:
        PruningError: Bad arguments, at once; an amount out of reach or a model that doesn't fit, before the first
            optimizer step.

    Source: Men et al., 2024, arXiv:2403.03853 (layers that change their input least are the first to go; by cosine).
    """

    differences = True

    def __init__(
        self,
        amount: float = 0.25,
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
        check_layers(of, criterion)
        self.criterion = criterion

    def _find(self, pl_module: Any, uses: Mapping[str, Use], step: int) -> Layers:
        named = globs("include", self.include), globs("exclude", self.exclude)
        optimizers, strict = pl_module.trainer.optimizers, not self.plan_
        layers = find_layers(
            pl_module, uses, self.of, self.criterion, *named, seed=step, optimizers=optimizers, strict=strict
        )
        self.frozen_ = layers.frozen
        return layers

    def _check(self, pl_module: Any, uses: Mapping[str, Use], budget: Budget) -> None:
        choose_layers(self._find(pl_module, uses, 0), budget, self.amount)

    def _change(
        self, trainer: Any, pl_module: Any, uses: Mapping[str, Use], amount: float, budget: Budget
    ) -> tuple[Plan, float]:
        found = self._find(pl_module, _of_all_ranks(trainer, pl_module, uses), trainer.global_step)

        def choose(refused: Mapping[str, str]) -> list[str]:
            left = found.without(refused)
            paths: list[str] = trainer.strategy.broadcast(
                choose_layers(left, budget, amount, on_the_way=amount < self.amount, strict=False)
            )
            return paths

        plan, layers = drop_chosen(pl_module, self._repeatable(), found, choose, trainer.optimizers)
        self.frozen_ = layers.frozen
        return plan, sum(uses[path].macs for path in plan.removed if path in uses)


def _of_all_ranks(trainer: Any, pl_module: Any, uses: Mapping[str, Use]) -> Mapping[str, Use]:
    """What modules change in the batches of all processes together."""
    if trainer.world_size == 1:
        return uses
    paths = [path for path, _ in pl_module.named_modules()]  # the same everywhere, whatever has run
    found = [(float(uses[path].difference), float(uses[path].size)) if path in uses else (0.0, 0.0) for path in paths]
    norms = torch.tensor(found, dtype=torch.float64, device=pl_module.device)
    together = dict(zip(paths, trainer.strategy.reduce(norms, reduce_op="sum").tolist(), strict=True))
    return {path: replace(use, difference=together[path][0], size=together[path][1]) for path, use in uses.items()}
