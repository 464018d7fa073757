"""WeightPruning: single weights go to zero and stay there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_prune.callbacks._base import ConfigurationError, PruningCallback, averaged_copies
from lightning_prune.callbacks._clock import Point
from lightning_prune.callbacks._rewind import Rewind
from lightning_prune.callbacks._steps import before_steps
from lightning_prune.errors import PruningError
from lightning_prune.graph.groups import Groups
from lightning_prune.pruning.masks import HeldMasks, Masks, apply_masks, local, placed_like, share_of, whole
from lightning_prune.pruning.passing import inside
from lightning_prune.pruning.patterns import get_pattern
from lightning_prune.pruning.plan import Plan
from lightning_prune.pruning.regrow import REGROW, moved, share
from lightning_prune.pruning.select import check_choice, globs
from lightning_prune.pruning.surgery import take
from lightning_prune.pruning.weight_criteria import (
    L1,
    Collected,
    GradientCriterion,
    Random,
    Wanda,
    get_weight_criterion,
    mix_seed,
)
from lightning_prune.pruning.weights import (
    check_finite,
    check_fit,
    check_scope,
    check_widths,
    choose_masks,
    prunable_weights,
)
from lightning_prune.report.layers import threshold_of, thresholds_of

__all__ = ["WeightPruning"]


class WeightPruning(PruningCallback):
    """Sets the least important weights to zero while Lightning trains, and keeps them there.

    The model stays as it is: no reparametrisation, no hooks left behind, parameter names, order and identity
    unchanged. Masks live in the callback (and in its checkpoint state) and hold after every optimizer step, for the
    optimizer's momentum too.

    Args:
        amount: Fraction of the considered weights that is zero at the end, [0, 1): 0.3 is 30 %.
        criterion: What makes a weight important: ``"l1"``, its magnitude; ``"random"``; its gradients in training,
            ``"taylor"``, ``"snip"``, ``"movement"``, ``"fisher"``; the inputs of its layer, ``"wanda"``; the flow of
            ones through the network, ``"synflow"``; or a function that maps a parameter to scores of its shape.
        scope: ``"global"`` ranks all weights together, ``"layer"`` takes the same fraction of each parameter, ``"erk"``
            more of large ones, ``"lamp"`` ranks all by their share in their layer; or amounts by glob on module names
            (what none matches takes ``amount``).
        pattern: ``"n:m"``: of m weights in a row along the input dimension n stay at least (``"2:4"``);
            ``"block:RxC"``: blocks of R outputs and C inputs go together; None: single weights.
        schedule: ``"cubic"``, ``"linear"``, ``"exponential"``, ``"one_cycle"``, ``"one_shot"``, or a function of the
            schedule's progress (0 to 1) that gives the part of the amount that is gone. `preview` shows it.
        start: Where the schedule starts: a fraction of training (float) or an epoch (int).
        end: Where the full amount is reached, likewise.
        every: ``"epoch"``: prune at the end of each epoch; or a number of optimizer steps.
        regrow: Until ``end``, weights that went come back in the place of others, at each pruning: ``"rigl"`` those
            with the largest gradients, ``"set"`` random ones. None: what is gone stays gone.
        regrow_fraction: The part of the kept weights that moves at a time (``"rigl"``: at first, less and less later).
        rewind_to: After each pruning, put the weights back to what they were after so many epochs (0: at the start),
            and the optimizer's state with them: a lottery ticket. None: train on.
        include: Globs on module names: only their weights (None: all parameters of two dimensions or more).
        exclude: Globs on module names: not their weights.
        report: Print a table after training; it is in ``report_`` too.
        monitor: Validation metric that the table shows.

    Attributes:
        masks_: Bool masks by parameter name, True = kept.

    Raises:
        PruningError: Bad arguments, at once; arguments that don't fit the Trainer or the model, when ``fit``
            starts. Nothing is changed.

    Source: Zhu & Gupta, 2017, arXiv:1710.01878 (gradual magnitude pruning); Evci et al., 2020, arXiv:1911.11134 (RigL);
    Frankle & Carbin, 2019, arXiv:1803.03635 (lottery tickets).
    """

    strategies: ClassVar[tuple[str, ...]] = ("SingleDeviceStrategy", "DDPStrategy", "ModelParallelStrategy")

    def __init__(
        self,
        amount: float = 0.5,
        *,
        criterion: str | Callable[[Tensor], Tensor] = "l1",
        scope: str | dict[str, float] = "global",
        pattern: str | None = None,
        schedule: str | Callable[[float], float] = "cubic",
        start: Point = 0.0,
        end: Point = 0.75,
        every: int | str = "epoch",
        regrow: str | None = None,
        regrow_fraction: float = 0.3,
        rewind_to: int | None = None,
        include: str | list[str] | None = None,
        exclude: str | list[str] | None = None,
        report: bool = True,
        monitor: str = "val_acc",
    ) -> None:
        super().__init__(amount, schedule, start, end, every, include, exclude, report, monitor)
        self._judge = get_weight_criterion(criterion)
        check_scope(scope)
        get_pattern(pattern)
        _check_regrow(regrow, regrow_fraction, pattern)
        if rewind_to is not None and (isinstance(rewind_to, bool) or not isinstance(rewind_to, int) or rewind_to < 0):
            raise PruningError(f"rewind_to must be a number of epochs, 0 for the start, got {rewind_to!r}")
        self.criterion = criterion
        self.scope = scope
        self.pattern = pattern
        self.regrow = regrow
        self.regrow_fraction = regrow_fraction
        self.rewind_to = rewind_to
        self.masks_: Masks = {}
        self._held: HeldMasks | None = None
        self._names: dict[int, str] = {}
        self._masked: set[int] = set()
        self._gradients: dict[str, Tensor] = {}
        self._keeps_gradients = False
        self._handles: list[RemovableHandle] = []
        self._watched_optimizers: list[Optimizer] = []
        self._listening: list[RemovableHandle] = []
        self._ranks: list[Collected] = []
        self._restored = False
        self._seed: int | None = None
        self._pruned = 0.0
        self._rewind: Rewind | None = None
        self._thresholds: dict[str, float] = {}
        self._lost = False

    def _weights(self, pl_module: Any) -> dict[str, torch.nn.Parameter]:
        try:
            return prunable_weights(pl_module, globs("include", self.include), globs("exclude", self.exclude))
        except PruningError:
            if self._lost:  # all of its layers may be among those that are gone
                return {}
            raise

    def _check_groups(self, pl_module: Any, groups: Groups, allowed: Tensor, round_to: int) -> None:
        names = list(self._weights(pl_module))
        check_widths(pl_module, names, get_pattern(self.pattern), groups, allowed, round_to)

    def _start(self, trainer: Any, pl_module: Any) -> None:
        self._lost = self._lost and self._restored
        try:
            weights = self._weights(pl_module)
            if weights:
                self._check_masked(weights)
                check_fit(pl_module, weights, self.amount, self.scope, get_pattern(self.pattern))
            if isinstance(self._judge, Wanda):
                self._judge.check(pl_module, list(weights))
        except PruningError as error:
            raise ConfigurationError(f"WeightPruning: {error}") from None
        fixed = [name for name, weight in weights.items() if not weight.requires_grad]
        if fixed and (self._judge.needs == "gradients" or self.regrow == "rigl"):
            raise ConfigurationError(
                f"WeightPruning: criterion={self.criterion!r}, regrow={self.regrow!r} need gradients, but {fixed[0]!r} "
                "is frozen (requires_grad=False); leave it out with exclude"
            )
        for other in trainer.callbacks:
            if isinstance(other, WeightPruning) and other is not self:
                common = sorted(set(weights) & set(other._weights(pl_module)))
                if common:
                    raise ConfigurationError(
                        f"two WeightPruning callbacks prune {common[0]!r}; keep them apart with include and exclude"
                    )
        self._take_up(trainer, pl_module, weights)

    def _check_masked(self, weights: dict[str, torch.nn.Parameter]) -> None:
        """In a second fit, weights that are not finite are no reason to think that the masks are another model's."""
        masks = self.masks_
        if not self._restored and {n: m.shape for n, m in masks.items()} == {n: w.shape for n, w in weights.items()}:
            check_finite(weights)

    def _take_up(self, trainer: Any, pl_module: Any, weights: dict[str, torch.nn.Parameter]) -> None:
        """Go on with the masks of a checkpoint or of an earlier fit, or start anew."""
        fits = self._fit_masks(weights)
        collected = [self._judge.sums, *(sums for sums, _ in self._ranks)]
        fits_sums = all(_broadcasts(each, weights.get(name)) for sums in collected for name, each in sums.items())
        if self._restored and not (fits and fits_sums):
            what = "what its criterion has collected is" if fits else "masks are"
            raise ConfigurationError(f"WeightPruning: the checkpoint's {what} not of this model's weights")
        if not fits:
            self.masks_, self._thresholds = {}, {}  # masks of another model: this fit starts anew
            self.amount_ = self._part = self._pruned = 0.0
            self._restored = False
        if not self._restored:
            self._judge.forget()
            self._rewind, self._seed, self._ranks = None, None, []
        if self._restored and isinstance(self._judge, Wanda):
            self._share_out(trainer.global_rank, trainer.world_size)
        self._restored = False
        self._bind(pl_module)

    def _fit_masks(self, weights: dict[str, torch.nn.Parameter]) -> bool:
        """Whether the masks are those of these weights: of their shapes, and what they mask is zero already.

        A checkpoint's masks may be ahead of its weights, those of an averaged model for one.
        """
        if self._restored and not self.masks_:
            return True  # of before the first pruning
        return self.masks_.keys() == weights.keys() and all(
            mask.shape == weight.shape
            and (self._restored or not bool((local(weight.detach()) * ~share_of(mask, weight)).any()))
            for mask, weight in ((mask, weights[name]) for name, mask in self.masks_.items())
        )

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Watch the optimizers; a resumed run continues with its masks in place."""
        super().on_train_start(trainer, pl_module)
        if self._restored:  # a strategy that shards restores everything only now
            self._take_up(trainer, pl_module, self._weights(pl_module))
        assert self._clock is not None
        self._progress = self._clock.progress(trainer.current_epoch, trainer.global_step)
        if self._seed is None:
            self._seed = trainer.strategy.broadcast(torch.initial_seed() % (1 << 62))
        # Manual optimization may clear them before the pruning.
        self._keeps_gradients = not pl_module.automatic_optimization
        if self.rewind_to is not None:
            self._prepare_rewind(trainer, pl_module, self.rewind_to)
        self._watch_steps(trainer.optimizers)
        if isinstance(self._judge, Wanda) and not self._over:
            self._listening = self._judge.listen(pl_module, list(self._weights(pl_module)), training_only=True)
        self._hold(trainer)

    def _watch_steps(self, optimizers: list[Optimizer]) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = before_steps(optimizers, self._take_gradients)
        self._handles += [optimizer.register_step_post_hook(self._after_step) for optimizer in optimizers]
        self._watched_optimizers = list(optimizers)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Training may go on with other optimizers than it began with."""
        if trainer.optimizers != self._watched_optimizers:
            self._watch_steps(trainer.optimizers)
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

    @property
    def _over(self) -> bool:
        """Whether no further pruning can come that a criterion collects something for."""
        return self._pruned >= self._part and (self._part >= 1 or self._progress >= 1)

    def _prepare_rewind(self, trainer: Any, pl_module: Any, epoch: int) -> None:
        assert self._clock is not None
        per_epoch = self._clock.steps_per_epoch
        steps = 0 if per_epoch == float("inf") else int((epoch - 1) * per_epoch)
        epochs: float = epoch - 1
        if self.every != "epoch":  # the last pruning that may come before the epoch's end
            epochs = epoch - (1e-9 if per_epoch == float("inf") else 1 / trainer.num_training_batches)
            steps += 0 if per_epoch == float("inf") else int(per_epoch) - 1
        if epoch and self._clock.progress(epochs, steps) > 0:
            raise ConfigurationError(
                f"WeightPruning: rewind_to={epoch} lies after the first pruning; let the schedule start later"
            )
        if epoch == 0 and self._rewind is None and trainer.global_step == 0:
            self._rewind = Rewind.of(pl_module, trainer.optimizers)
        over = trainer.global_step > 0 if epoch == 0 else trainer.current_epoch >= epoch
        if over and self._rewind is None and self._part < 1:
            raise ConfigurationError(
                f"WeightPruning: rewind_to={epoch} is over, and the checkpoint has no snapshot of it"
            )

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Remember what to go back to, then prune."""
        due = bool(self.rewind_to) and self._rewind is None and self.rewind_to == trainer.current_epoch + 1
        if due and trainer.is_last_batch:
            self._rewind = Rewind.of(pl_module, trainer.optimizers)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def _bind(self, pl_module: Any) -> None:
        weights = self._weights(pl_module)
        self._names = {id(weight): name for name, weight in weights.items()}
        self.masks_ = {name: mask.to(weights[name].device) for name, mask in self.masks_.items()}
        self._judge.sums = {name: placed_like(each, weights[name]) for name, each in self._judge.sums.items()}
        self._held = HeldMasks(weights, self.masks_) if self.masks_ else None

    def _hold(self, trainer: Any) -> None:
        """Zero what is masked: weights, gradients and optimizer state."""
        if self._held is None:
            return
        self._held.clear(trainer.optimizers)
        for copy in averaged_copies(trainer):  # an average of zeros stays zero
            own = dict(copy.named_parameters())  # without what configure_model builds, where it was made before
            apply_masks(own, {name: mask for name, mask in self.masks_.items() if name in own})

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Optimizer) -> None:
        """Clipping by norm comes next: it is to see the gradients of what is kept only."""
        if self._held is not None and trainer.gradient_clip_val is not None and self.regrow != "rigl":
            self._held.before_step(optimizer)

    def _take_gradients(self, optimizer: Optimizer) -> None:
        if isinstance(self._judge, GradientCriterion) and not self._over:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    name = self._names.get(id(parameter))
                    if name is not None and parameter.grad is not None:
                        self._judge.collect(name, parameter, parameter.grad)
        if self.regrow == "rigl" and self._keeps_gradients and self._progress < 1:
            for group in optimizer.param_groups:
                found = {self._names.get(id(p)): p.grad for p in group["params"] if p.grad is not None}
                self._gradients |= {name: grad.detach().clone() for name, grad in found.items() if name is not None}
        # RigL wants to see the gradients of what is masked too.
        if self._held is not None and self.regrow != "rigl" and self._held.before_step(optimizer):
            self._masked.add(id(optimizer))

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        if self._held is not None:
            self._held.after_step(optimizer, id(optimizer) in self._masked)
        self._masked.discard(id(optimizer))

    def _prune(self, trainer: Any, pl_module: Any, amount: float) -> None:
        weights, further = self._weights(pl_module), self._part > self._pruned
        if not weights or (further and not self._gather(trainer, weights)):
            return
        part = share(self.regrow, self.regrow_fraction, self._progress) if self.regrow and self.masks_ else 0.0
        if further or part:
            check_finite(weights)
            masks = self._next_masks(trainer, pl_module, weights, further, part)
            if further and self.report:
                self._look_at(weights, masks)
            self.masks_, self._pruned = masks, self._part
        elif not trainer.is_last_batch:
            return
        if further:
            self._judge.forget(last=self._over)
            if self._rewind is not None:
                self._rewind.restore(pl_module, trainer.optimizers)
                for other in trainer.callbacks:
                    if isinstance(other, WeightPruning) and other is not self:
                        other._hold(trainer)
        if self._over:
            self._stop_listening()
        self._bind(pl_module)
        self._hold(trainer)

    def _next_masks(self, trainer: Any, pl_module: Any, weights: Any, further: bool, part: float) -> Masks:
        """The masks after this pruning, the same on all processes; nothing is changed yet."""
        step = mix_seed(self._seed or 0, str(trainer.global_step))
        if isinstance(self._judge, Random):
            self._judge.seed = step
        masks = self._choose(pl_module, dict(weights)) if further else self.masks_
        if part and self.regrow:
            masks = moved(masks, weights, self.regrow, part, step, self._gradients)
        if trainer.world_size > 1:
            masks = trainer.strategy.broadcast({name: mask.cpu() for name, mask in masks.items()})
        return masks

    def _gather(self, trainer: Any, weights: Mapping[str, Tensor]) -> bool:
        """Put together what the processes have collected; false to wait for weights of which there is nothing yet.

        Optimizers that take turns, or parts of a model that do, may not all have had theirs. An epoch's end is the last
        moment to wait for; then the criterion says what is missing.
        """
        judge = self._judge
        sums, stale = judge.sums, judge.stale
        if isinstance(judge, Wanda) and trainer.world_size > 1:
            sums, stale = judge.of_all(self._everyones())
        final = trainer.is_last_batch or trainer.global_step >= trainer.max_steps != -1
        if not final and judge.needs in ("gradients", "inputs") and not sums.keys() >= weights.keys():
            return False
        judge.sums, judge.stale = {name: placed_like(each, weights[name]) for name, each in sums.items()}, stale
        return True

    def _everyones(self) -> list[Collected]:
        """What each process has collected."""
        own = {name: each.cpu() for name, each in self._judge.sums.items()}, self._judge.stale
        parts: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(parts, own)
        return parts

    def _share_out(self, rank: int, world_size: int) -> None:
        """Each process goes on with its own share of a checkpoint; of as many others, the first one with all."""
        parts = self._ranks or [(self._judge.sums, self._judge.stale)]
        if len(parts) == world_size:
            self._judge.sums, self._judge.stale = parts[rank]
        else:
            self._judge.sums, self._judge.stale = Wanda.of_all(parts) if rank == 0 else ({}, set())
        self._ranks = []

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Inputs of layers are collected by each process for itself."""
        if isinstance(self._judge, Wanda) and trainer.world_size > 1 and not self._over:
            parts = [{"sums": sums, "stale": sorted(stale)} for sums, stale in self._everyones()]
            checkpoint["callbacks"][self.state_key]["ranks"] = parts

    def _look_at(self, weights: Mapping[str, Tensor], masks: Masks) -> None:
        """Before weights go: up to which magnitude they go."""
        for name, weight in weights.items():
            if hasattr(weight, "device_mesh"):  # a shard doesn't tell
                continue
            mask = masks[name].to(weight.device)
            old = self.masks_.get(name)
            gone = ~mask if old is None else old.to(weight.device) & ~mask
            if bool(gone.any()):
                before = self._thresholds.pop(name, 0.0)
                found = threshold_of(weight[gone], weight[mask])
                if found is not None:  # what goes last may have become small since
                    self._thresholds[name] = max(found, before)

    def _lowest(self) -> Mapping[str, float]:
        return self._thresholds

    def _choose(self, pl_module: Any, weights: dict[str, Tensor]) -> Masks:
        return choose_masks(
            pl_module,
            weights,
            self._judge,
            self.amount,
            scope=self.scope,
            pattern=get_pattern(self.pattern),
            masks=self.masks_ or None,
            calls=self._calls or (),
            part=self._part,
            before=self._pruned,
        )

    def _why_nothing(self) -> str:
        return "the layers that it was to prune have been removed" if self._lost else super()._why_nothing()

    def _has_effect(self) -> bool:
        return not all(bool(mask.all()) for mask in self.masks_.values())

    def _follow_removal(self, trainer: Any, pl_module: Any, plan: Plan) -> None:
        super()._follow_removal(trainer, pl_module, plan)
        self._lost = self._lost or bool(plan.removed)
        self._judge.sums, self._gradients = _taken(self._judge.sums, plan), _taken(self._gradients, plan)
        if self._rewind is not None:
            self._rewind.follow(plan)
        if self.masks_:
            # The fraction of what is left; a criterion may have nothing collected now, so magnitudes decide.
            options: dict[str, Any] = {"scope": self.scope, "pattern": get_pattern(self.pattern), "part": self._part}
            masks, weights = _taken(self.masks_, plan), dict(self._weights(pl_module))
            if weights:
                masks = choose_masks(pl_module, weights, L1(), self.amount, masks=masks, **options)
            self.masks_ = masks
        self._bind(pl_module)
        self._hold(trainer)

    def _stop_listening(self) -> None:
        for handle in self._listening:
            handle.remove()
        self._listening = []

    def _release(self) -> None:
        self._stop_listening()
        for handle in self._handles:
            handle.remove()
        self._handles, self._watched_optimizers = [], []
        self._restored = False
        self._held, self._names, self._masked, self._gradients = None, {}, set(), {}

    def state_dict(self) -> dict[str, Any]:
        """Masks, how far the schedule was, and what the criterion has collected."""
        return {
            **super().state_dict(),
            "pruned": self._pruned,
            "masks": {name: mask.cpu() for name, mask in self.masks_.items()},
            "sums": {name: whole(each).cpu() for name, each in self._judge.sums.items()},
            "stale": sorted(self._judge.stale),
            "criterion": self._criterion_name,
            "seed": self._seed,
            "rewind": None if self._rewind is None else self._rewind.to_dict(),
            "thresholds": dict(self._thresholds),
            "lost": self._lost,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the masks of a checkpoint.

        Raises:
            PruningError: It is no state of this callback; nothing has changed.
        """
        try:
            masks = dict(state_dict["masks"])
            wrong = [name for name, mask in masks.items() if not (torch.is_tensor(mask) and mask.dtype is torch.bool)]
            if wrong:
                raise TypeError(f"the mask of {wrong[0]!r} is no tensor of bools")
            amount, part, pruned = (float(state_dict[key]) for key in ("amount", "part", "pruned"))
            if not all(0 <= value <= 1 for value in (amount, part, pruned)):
                raise ValueError(f"amount={amount:g}, part={part:g}, pruned={pruned:g} are no fractions")
            sums, stale = dict(state_dict["sums"]), set(state_dict.get("stale", ()))
            ranks = [(dict(each["sums"]), set(each["stale"])) for each in state_dict.get("ranks", ())]
            if state_dict.get("criterion", self._criterion_name) != self._criterion_name:
                sums, stale, ranks = {}, set(), []  # another criterion has collected something else
            seed, lost, rewind = state_dict["seed"], bool(state_dict["lost"]), state_dict["rewind"]
            rewind = None if rewind is None else Rewind.from_dict(rewind)
            thresholds = thresholds_of(state_dict.get("thresholds", {}))
            super().load_state_dict(state_dict)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise PruningError(
                f"the checkpoint's state of WeightPruning is damaged: {type(error).__name__}: {error}"
            ) from error
        self._pruned, self.masks_ = pruned, masks
        self._judge.sums, self._judge.stale, self._ranks = sums, stale, ranks
        self._seed, self._lost, self._rewind, self._restored = seed, lost, rewind, True
        self._thresholds = thresholds

    @property
    def _criterion_name(self) -> str:
        return self.criterion if isinstance(self.criterion, str) else "function"

    def _check_checkpoint(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        for name, mask in dict(state.get("masks") or {}).items():
            had, shape = getattr(tensors.get(name), "shape", None), getattr(mask, "shape", None)
            if had is not None and had != shape:
                raise ConfigurationError(
                    f"WeightPruning: the checkpoint's masks are not those of its weights: {name!r} has shape "
                    f"{tuple(had)}, its mask {shape and tuple(shape)}"
                )


def _taken(tensors: dict[str, Tensor], plan: Plan) -> dict[str, Tensor]:
    """What is left of tensors of the shapes of weights; one that has a dimension of one there keeps it."""

    def taken(name: str, tensor: Tensor) -> Tensor:
        dims = plan.kept.get(name, {})
        return take(tensor, {dim: index for dim, index in dims.items() if tensor.size(dim) == plan.shapes[name][dim]})

    return {name: taken(name, each) for name, each in tensors.items() if not inside(name, plan.removed)}


def _broadcasts(collected: Any, weight: Tensor | None) -> bool:
    """Whether what was collected can be that of a weight: of its shape, or with dimensions of one."""
    if weight is None or not isinstance(collected, Tensor) or collected.dim() != weight.dim():
        return False
    return all(size in (1, full) for size, full in zip(collected.shape, weight.shape, strict=True))


def _check_regrow(regrow: Any, fraction: Any, pattern: str | None) -> None:
    if regrow is None:
        return
    check_choice("regrow", regrow, REGROW)
    if isinstance(fraction, bool) or not isinstance(fraction, int | float) or not 0 < fraction < 1:
        raise PruningError(f"regrow_fraction must be a number between 0 and 1, got {fraction!r}")
    if pattern is not None:
        raise PruningError(f"regrow={regrow!r} moves single weights and would break the pattern {pattern!r}")
