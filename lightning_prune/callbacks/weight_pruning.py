"""WeightPruning: single weights go to zero and stay there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_prune.callbacks._base import ConfigurationError, PruningCallback, averaged_copies
from lightning_prune.callbacks._clock import Point
from lightning_prune.errors import PruningError
from lightning_prune.pruning.criteria import WEIGHT_CRITERIA, get_criterion
from lightning_prune.pruning.masks import Masks, apply_masks, mask_optimizer
from lightning_prune.pruning.plan import Plan
from lightning_prune.pruning.select import check_choice, globs
from lightning_prune.pruning.surgery import take
from lightning_prune.pruning.weights import WEIGHT_SCOPES, prunable_weights, select_weights

__all__ = ["WeightPruning"]


class WeightPruning(PruningCallback):
    """Sets the least important weights to zero while Lightning trains, and keeps them there.

    The model stays as it is: no reparametrisation, no hooks left behind, parameter names, order and identity
    unchanged. Masks live in the callback (and in its checkpoint state) and are applied after every optimizer
    step, to the optimizer's momentum too.

    Args:
        amount: Fraction of the considered weights that is zero at the end, [0, 1): 0.3 is 30 %.
        criterion: What makes a weight important: ``"l1"``, its magnitude.
        scope: ``"global"`` ranks all weights together, ``"layer"`` takes the same fraction of each parameter.
        schedule: ``"cubic"``, ``"linear"`` or ``"one_shot"``.
        start: Where the schedule starts: a fraction of training (float) or an epoch (int).
        end: Where the full amount is reached, likewise.
        every: ``"epoch"``: prune at the end of each epoch; or a number of optimizer steps.
        include: Globs on module names: only their weights (None: all parameters of two dimensions or more).
        exclude: Globs on module names: not their weights.
        report: Print a table after training; it is in ``report_`` too.
        monitor: Validation metric that the table shows.

    Attributes:
        masks_: Bool masks by parameter name, True = kept.

    Raises:
        PruningError: Bad arguments, at once; arguments that don't fit the Trainer or the model, when ``fit``
            starts. Nothing is changed.

    Source: Zhu & Gupta, 2017, arXiv:1710.01878 (gradual magnitude pruning).
    """

    def __init__(
        self,
        amount: float = 0.5,
        *,
        criterion: str = "l1",
        scope: str = "global",
        schedule: str = "cubic",
        start: Point = 0.0,
        end: Point = 0.75,
        every: int | str = "epoch",
        include: str | list[str] | None = None,
        exclude: str | list[str] | None = None,
        report: bool = True,
        monitor: str = "val_acc",
    ) -> None:
        super().__init__(amount, schedule, start, end, every, include, exclude, report, monitor)
        get_criterion(criterion, WEIGHT_CRITERIA)
        check_choice("scope", scope, WEIGHT_SCOPES)
        self.criterion = criterion
        self.scope = scope
        self.masks_: Masks = {}
        self._bound: dict[str, Tensor] = {}
        self._handles: list[RemovableHandle] = []
        self._restored = False

    def _weights(self, pl_module: Any) -> dict[str, torch.nn.Parameter]:
        return prunable_weights(pl_module, globs("include", self.include), globs("exclude", self.exclude))

    def _start(self, trainer: Any, pl_module: Any) -> None:
        try:
            weights = self._weights(pl_module)
        except PruningError as error:
            raise ConfigurationError(f"WeightPruning: {error}") from None
        for other in trainer.callbacks:
            if isinstance(other, WeightPruning) and other is not self:
                common = sorted(set(weights) & set(other._weights(pl_module)))
                if common:
                    raise ConfigurationError(
                        f"two WeightPruning callbacks prune {common[0]!r}; keep them apart with include and exclude"
                    )
        if not self._fit_masks(weights):
            self.masks_, self.amount_ = {}, 0.0  # masks of another model: this fit starts anew
        self._restored = False
        self._bind(pl_module)

    def _fit_masks(self, weights: dict[str, torch.nn.Parameter]) -> bool:
        """Whether the masks are those of these weights: of their shapes, and what they mask is zero already.

        A checkpoint's masks may be ahead of its weights, those of an averaged model for one.
        """
        return self.masks_.keys() == weights.keys() and all(
            mask.shape == weight.shape and (self._restored or not bool(weight.detach()[~mask.to(weight.device)].any()))
            for mask, weight in ((mask, weights[name]) for name, mask in self.masks_.items())
        )

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Watch the optimizers; a resumed run continues with its masks in place."""
        super().on_train_start(trainer, pl_module)
        self._handles = [o.register_step_post_hook(self._after_step) for o in trainer.optimizers]
        self._hold(trainer)

    def _bind(self, pl_module: Any) -> None:
        parameters = dict(pl_module.named_parameters())
        self._bound = {name: parameters[name] for name in self.masks_}
        self.masks_ = {name: mask.to(self._bound[name].device) for name, mask in self.masks_.items()}

    def _hold(self, trainer: Any) -> None:
        """Zero what is masked: weights and optimizer state."""
        apply_masks(self._bound, self.masks_)
        for optimizer in trainer.optimizers:
            self._after_step(optimizer)
        for copy in averaged_copies(trainer):  # an average of zeros stays zero
            apply_masks(dict(copy.named_parameters()), self.masks_)

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        apply_masks(self._bound, self.masks_)
        mask_optimizer(optimizer, self._bound, self.masks_)

    def _prune(self, trainer: Any, pl_module: Any, amount: float) -> None:
        weights = self._weights(pl_module)
        score = get_criterion(self.criterion, WEIGHT_CRITERIA)
        self.masks_ = select_weights(
            {name: score(weight) for name, weight in weights.items()},
            amount,
            scope=self.scope,
            masks=self.masks_ or None,
        )
        self._bind(pl_module)
        self._hold(trainer)

    def _has_effect(self) -> bool:
        return not all(bool(mask.all()) for mask in self.masks_.values())

    def _follow_removal(self, trainer: Any, pl_module: Any, plan: Plan) -> None:
        super()._follow_removal(trainer, pl_module, plan)
        if self.masks_:
            self.masks_ = {
                name: take(mask, plan.kept[name]) if name in plan.kept else mask for name, mask in self.masks_.items()
            }
            self._prune(trainer, pl_module, self.amount_)  # the fraction of what is left

    def _release(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._bound = {}

    def state_dict(self) -> dict[str, Any]:
        """Masks and how far the schedule was."""
        return {"amount": self.amount_, "masks": {name: mask.cpu() for name, mask in self.masks_.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the masks of a checkpoint."""
        self.amount_ = state_dict["amount"]
        self.masks_ = dict(state_dict["masks"])
        self._restored = True
