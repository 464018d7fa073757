"""NeuronPruning: neurons, channels and features are removed while Lightning trains."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from lightning_prune.callbacks._base import ConfigurationError, averaged_copies, pruning_callbacks
from lightning_prune.callbacks._clock import Point
from lightning_prune.callbacks._interrupts import waiting_interrupts
from lightning_prune.callbacks._recent import RecentCalls
from lightning_prune.callbacks._steps import before_steps
from lightning_prune.callbacks._structure import StructureCallback
from lightning_prune.callbacks._unseen import Unseen
from lightning_prune.errors import PruningError
from lightning_prune.graph.callsites import ModuleCall
from lightning_prune.graph.copies import tie_copies, trained_by
from lightning_prune.graph.groups import Groups, draw_groups
from lightning_prune.graph.run import as_calls, traced
from lightning_prune.graph.trace import Trace, Tracer
from lightning_prune.graph.tree import named_tensors
from lightning_prune.graph.verify import kept_masks
from lightning_prune.pruning.criteria import UNTOLD, Activation, Random, Taylor, collect_now, get_neuron_criterion
from lightning_prune.pruning.masks import HeldMasks, apply_masks
from lightning_prune.pruning.neurons import Choice, check_compensate, latency_amount, remove_chosen
from lightning_prune.pruning.plan import Plan
from lightning_prune.pruning.repair import Repair, add_to, recalibrate
from lightning_prune.pruning.select import (
    Curves,
    Dense,
    check_choice,
    check_flag,
    check_scores,
    copies_to_tie,
    globs,
    measure_dense,
)
from lightning_prune.pruning.sensitivity import Sensitivity, by_layers
from lightning_prune.pruning.surgery import take
from lightning_prune.pruning.weight_criteria import mix_seed
from lightning_prune.report.run import batch_size

__all__ = ["NeuronPruning"]

PATIENCE = 0.5
"""Part of the amount until which, within the first epoch, the first removal waits for parts that have not run yet."""

BATCHES = 4
"""Training batches that ``compensate`` looks at, where ``recalibrate`` doesn't ask for more."""


class _TooFewJudgedError(Exception):
    """The budget asks for neurons that can't be judged yet, or are not known yet, too."""


class NeuronPruning(StructureCallback):
    """Removes the least important neurons while Lightning trains: the model gets smaller and faster.

    Everything that depends on a shape follows: neighbouring layers, norm statistics, gradients, optimizer
    state, DDP's buckets, the masks of `WeightPruning`, momentum encoders (parts that no optimizer trains, and whose
    weights are like those of a part that is trained; ``exclude`` them to keep them whole). What neurons belong together
    is traced, not assumed: on ``example_inputs``, else on the module's ``example_input_array``, else on the first
    training batch as it flows through ``training_step``.

    Args:
        amount: Fraction that is gone at the end, [0, 1): 0.3 is 30 % of the dense model.
        of: What the fraction is of: ``"neurons"``, ``"params"``, ``"macs"``, or ``"latency"``: the time of a forward of
            ``example_inputs`` (else of the first batch) on this machine, measured on pruned copies at the start.
        criterion: What makes a neuron important: ``"l1"``, ``"l2"`` norm of all its slices; ``"geometric_median"``,
            its distance to the others; ``"lamp"``; ``"bn_scale"``, its norm layer's scale; ``"taylor"``, its gradients
            in training; ``"activation"``, its mean magnitude in training; ``"random"``; or a function that maps weights
            of neurons, shape (neurons, k), to scores, (neurons,).
        scope: ``"global"`` ranks all neurons together, ``"layer"`` takes the same fraction of each group,
            ``"sensitivity"`` from each what changes the model's outputs as much; or fractions of neurons by glob on
            module names (``amount`` where none matches).
        schedule: ``"cubic"``, ``"linear"``, ``"exponential"``, ``"one_cycle"``, ``"one_shot"``, or a function of the
            schedule's progress (0 to 1) that gives the part of the amount that is gone.
        start: Where the schedule starts: a fraction of training (float) or an epoch (int).
        end: Where the full amount is reached, likewise.
        every: ``"epoch"``: prune at the end of each epoch; or a number of optimizer steps.
        remove: ``"progressive"``: neurons are removed as the schedule goes on, so that training gets faster; ``"end"``:
            they are masked until training ends, and removed then.
        round_to: Layers shrink to multiples of this only.
        min_channels: Layers keep at least so many neurons.
        include: Globs on module names: only neurons that these layers make (None: all).
        exclude: Globs on module names: no neurons that these layers make.
        example_inputs: A tensor, a tuple of positional or a dict of keyword arguments of the module's forward.
        exact_only: Leave groups alone whose removal does not equal masking exactly.
        recalibrate: After a removal, recompute the statistics of batch norms over the last so many training batches
            (0: leave them). These batches are kept in memory; a run that is resumed has only those it has seen.
        compensate: ``"least_squares"``: after a removal, solve for the weights of linear layers and convolutions that
            read what is gone, so that their outputs on the last training batches change least. None: leave them.
        verify: Check every removal against the masked model, one forward of each; roll back if they differ.
        report: Print a table after training; it is in ``report_`` too.
        monitor: Validation metric that the table shows.

    Attributes:
        plan_: What was kept of the dense model.
        groups_: The groups of the model as it is now (None before the first batch).

    Raises:
        PruningError: Bad arguments, at once; arguments that don't fit the Trainer or the model, before anything
            is changed.

    Source: Li et al., 2017, arXiv:1608.08710 (L1 norm); Fang et al., 2023, arXiv:2301.12900 (groups).
    """

    def __init__(
        self,
        amount: float = 0.5,
        *,
        of: str = "neurons",
        criterion: str | Callable[[Tensor], Tensor] = "l1",
        scope: str | dict[str, float] = "global",
        schedule: str | Callable[[float], float] = "cubic",
        start: Point = 0.0,
        end: Point = 0.5,
        every: int | str = "epoch",
        remove: str = "progressive",
        round_to: int = 1,
        min_channels: int = 1,
        include: str | list[str] | None = None,
        exclude: str | list[str] | None = None,
        example_inputs: Any = None,
        exact_only: bool = False,
        recalibrate: int = 0,
        compensate: str | None = None,
        verify: bool = True,
        report: bool = True,
        monitor: str = "val_acc",
    ) -> None:
        super().__init__(amount, schedule, start, end, every, include, exclude, report, monitor)
        self._choice = Choice(of, scope, round_to, min_channels, include, exclude, exact_only)
        self._choice.check()
        self._judge = get_neuron_criterion(criterion)
        check_choice("remove", remove, ("progressive", "end"))
        check_compensate(compensate)
        check_flag("verify", verify)
        if isinstance(recalibrate, bool) or not isinstance(recalibrate, int) or recalibrate < 0:
            raise PruningError(f"recalibrate must be a number of batches, 0 for none, got {recalibrate!r}")
        if example_inputs is not None:
            as_calls(example_inputs)
        self.of = of
        self.criterion = criterion
        self.scope = scope
        self.remove = remove
        self.round_to = round_to
        self.min_channels = min_channels
        self.example_inputs = example_inputs
        self.exact_only = exact_only
        self.recalibrate = recalibrate
        self.compensate = compensate
        self.verify = verify
        self.groups_: Groups | None = None
        self._dense: Dense | None = None
        self._macs = 0.0
        self._pruned = 0.0
        self._refused: list[dict[str, str]] = []
        self._latency_macs: float | None = None
        self._curves: Curves | None = None
        self._masked: Tensor | None = None
        self._held: HeldMasks | None = None
        self._by_gradients: set[int] = set()
        self._restored: dict[str, Any] = {}
        self._seed: int | None = None
        self._recent: RecentCalls | None = None
        self._handles: list[RemovableHandle] = []
        self._tracer: Tracer | None = None
        self._tracing: Any = None
        self._unseen: Unseen | None = None
        self._parts: list[str] = []

    def _start(self, trainer: Any, pl_module: Any) -> None:
        super()._start(trainer, pl_module)
        self.groups_, self._masked, self._held = None, None, None
        self._forget_trace()
        self._judge.forget()
        if isinstance(self._judge, Activation):
            self._judge.sums = dict(self._restored.get("sums", {}))
        inputs = self.example_inputs
        if inputs is None:
            inputs = getattr(pl_module, "example_input_array", None)
        if inputs is not None:
            inputs = trainer.precision_plugin.convert_input(inputs)
            calls = tuple(_to_device(call, pl_module.device) for call in as_calls(inputs))
            self._take(trainer, pl_module, traced(pl_module, calls))

    def _resumed(self) -> bool:
        return bool(self._restored)

    def _anew(self) -> None:
        self._dense, self._latency_macs, self._curves, self._seed = None, None, None, None
        self._pruned, self._refused, self._restored, self._parts = 0.0, [], {}, []

    def _outdated(self, plan: Plan, macs: float) -> None:
        if self.groups_ is not None:  # the next batch is traced again
            self._restored = self._of_neurons()
        self.groups_ = None
        self._forget_trace()
        self._macs *= macs
        if self._recent is not None:
            self._recent.close()
            self._recent = None

    def _renewed(self) -> None:
        self._outdated(Plan({}, {}), 1.0)
        self._masked, self._held = None, None
        self._judge.forget()

    def _follow_removal(self, trainer: Any, pl_module: Any, plan: Plan) -> None:
        super()._follow_removal(trainer, pl_module, plan)
        if self._held is not None:
            tensors, masks = named_tensors(pl_module), self._held.masks
            left = {name: take(mask, plan.kept.get(name, {})) for name, mask in masks.items() if name in tensors}
            self._held = HeldMasks(tensors, left)

    def _look_again(self, trainer: Any) -> bool:
        came = self._unseen is not None and self._unseen.came
        return self.groups_ is None or (self._tracer is not None and (came or self._misses))

    @property
    def _misses(self) -> bool:
        """Whether a part that has run earlier has not run since the model was last traced."""
        return self._unseen is not None and not self._unseen.paths.isdisjoint(self._parts)

    def _take(self, trainer: Any, pl_module: Any, trace: Trace) -> None:
        """Draw the groups and check that the whole amount can be reached, before anything is changed."""
        tie_copies(trace, copies_to_tie(pl_module, trainer.optimizers, globs("exclude", self.exclude)))
        groups = draw_groups(trace)
        if self.groups_ is not None:  # a part has run for the first time; nothing is gone yet
            self._restored, self._dense = self._of_neurons(), None
        for reasons in self._refused:  # in the order in which they were, since others may have come in their place
            found = {number: reasons[key] for number, key in enumerate(groups.keys) if key in reasons}
            groups = groups.refuse(found) if found else groups
        if self.groups_ is None:
            _check_ranks(trainer, groups, complete=trace.parameters <= trace.readers.keys())
        try:
            allowed = self._choice.allowed(pl_module, groups, self._judge)
            for callback in pruning_callbacks(trainer):
                callback._check_groups(pl_module, groups, allowed, self.round_to)
            macs = groups.macs(torch.ones(groups.neurons, dtype=torch.bool))
            if self._dense is None:
                self._dense = measure_dense(groups, allowed)
            elif self._macs:  # traced on other inputs than before, a batch of another size for one
                self._dense = replace(self._dense, macs=self._dense.macs * (macs / self._macs))
            self._macs = macs
            if self.of == "latency" and self._latency_macs is None:
                self._latency_macs = self._measure_latency(trainer, pl_module, groups, allowed)
            late = {id(pl_module.get_parameter(name)) for name in trace.parameters - trace.readers.keys()}
            if trained_by(trainer.optimizers).isdisjoint(late):  # else what can go is not all known
                self._select(groups, allowed, torch.zeros(groups.neurons), self.amount, 1.0)
        except PruningError as error:
            raise ConfigurationError(f"NeuronPruning: {error}") from None
        self.groups_ = groups
        if isinstance(self._judge, Activation):
            self._judge.watch_for(pl_module, groups)
        self._go_on(pl_module, groups)

    def _go_on(self, pl_module: Any, groups: Groups) -> None:
        """Go on with what a checkpoint knows of neurons, now that these have numbers."""
        restored, self._restored = self._restored, {}
        if restored.get("masked"):  # zero already, and perhaps needed as it is for a backward that is to come
            self._mask(pl_module, groups, _in_order(groups, restored["masked"], True))
        if isinstance(self._judge, Taylor) and restored.get("sums"):
            self._judge.sums["total"] = _in_order(groups, restored["sums"], UNTOLD).double()

    def _measure_latency(self, trainer: Any, pl_module: Any, groups: Groups, allowed: Tensor) -> float:
        """The fraction of the MACs that stands for the latency, as rank 0 measures it."""
        norms = get_neuron_criterion("l1")
        scores, dense = norms.score(pl_module, groups), self._dense
        assert dense is not None

        def select(macs: float) -> Tensor:
            return self._choice.select(groups, scores, allowed, macs, norms, dense=dense)

        found: tuple[float, str] = (0.0, "")
        if trainer.is_global_zero:
            try:
                found = latency_amount(pl_module, groups, select, self.amount), ""
            except PruningError as error:  # the other ranks must hear of it
                found = 0.0, str(error)
        macs, reason = trainer.strategy.broadcast(found)
        if reason:
            raise PruningError(reason)
        return float(macs)

    def _select(
        self, groups: Groups, allowed: Tensor, scores: Tensor, amount: float, part: float, waiting: int = 0
    ) -> Tensor:
        """The neurons that stay; ``waiting``: how many of those that may go can't be judged yet."""
        assert self._dense is not None
        asked = amount if self._latency_macs is None else part * self._latency_macs
        return self._choice.select(
            groups,
            scores,
            allowed,
            self.amount if isinstance(self.scope, dict) else asked,
            self._judge,
            dense=replace(self._dense, neurons=self._dense.neurons - waiting),
            part=part,
            curves=self._curves,
            on_the_way=part < 1,
        )

    def _watch(self, trainer: Any, pl_module: Any) -> Any:
        self._tracing = None
        if not self._look_again(trainer):
            return super()._watch(trainer, pl_module)
        self._tracing = trainer
        if self._tracer is None:
            self._tracer = Tracer(pl_module, wrapped=trainer.strategy.model is not pl_module)
        tracer = self._tracer
        return tracer.watch() if pl_module.automatic_optimization else self._watch_steps(trainer, tracer)

    @contextmanager
    def _watch_steps(self, trainer: Any, tracer: Tracer) -> Iterator[None]:
        """Watch a whole batch of manual optimization, its optimizer steps aside."""

        def step(stepping: bool) -> Callable[..., None]:
            return lambda *_: setattr(tracer, "stepping", stepping)

        handles = [optimizer.register_step_pre_hook(step(True)) for optimizer in trainer.optimizers]
        handles += [optimizer.register_step_post_hook(step(False)) for optimizer in trainer.optimizers]
        module = trainer.lightning_module
        original = module.training_step

        def training_step(*args: Any, **kwargs: Any) -> Any:
            tracer.paused = False
            try:
                return original(*args, **kwargs)
            finally:  # what callbacks do at the batch's end is no part of the model
                tracer.paused = True

        module.__dict__["training_step"] = training_step
        try:
            with tracer.watch():
                yield
        finally:
            module.__dict__.pop("training_step", None)
            for handle in handles:
                handle.remove()

    def _watched(self, pl_module: Any) -> tuple[ModuleCall, ...] | None:
        tracer, trainer = self._tracer, self._tracing
        if tracer is None or trainer is None:
            return super()._watched(pl_module)
        self._tracing = None
        if not tracer.has_read:
            self._tracer = None
            return None
        trace = tracer.trace
        self._take(trainer, pl_module, trace)
        if self._keep and not self._is_over:
            earlier = [list(trace.calls)] if self._recent is None else list(self._recent.batches)
            if self._recent is not None:
                self._recent.close()
            self._recent = RecentCalls(pl_module, trace.calls, self._keep)
            self._recent.batches.extend(earlier)
        self._unseen = self._unseen or Unseen(pl_module, tracer.unread, self._has_come)
        self._unseen.know(tracer.unread)
        if self._parts or self._unseen.paths:
            self._parts = sorted({*self._parts, *self._unseen.known})
        return tuple(trace.calls)

    def _forget_trace(self) -> None:
        if self._unseen is not None:
            self._unseen.close()
        self._unseen, self._tracer, self._tracing = None, None, None

    def _has_come(self, path: str) -> None:
        """A part runs that no watched batch has run: from the next batch on they are watched, until it is known."""
        if self._tracer is None:
            rank_zero_warn(
                f"NeuronPruning: {path!r} runs for the first time, but neurons are gone already: what it reads may "
                "have another size than it expects. Give example_inputs that run it, start later, or exclude that."
            )

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Watch the optimizers, and what the criterion judges by."""
        super().on_train_start(trainer, pl_module)
        if self._seed is None:
            self._seed = trainer.strategy.broadcast(torch.initial_seed() % (1 << 62))
        self._handles = before_steps(trainer.optimizers, lambda optimizer: self._take_gradients(pl_module, optimizer))
        self._handles += [optimizer.register_step_post_hook(self._after_step) for optimizer in trainer.optimizers]
        if isinstance(self._judge, Activation):
            self._handles += self._judge.listen(pl_module, training_only=True)
        if self._held is not None:
            self._held.clear(trainer.optimizers)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Observe the first batch; keep the last ones, where they are needed."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self._keep and self.groups_ is not None and not self._is_over:
            if self._recent is None:
                self._recent = RecentCalls(pl_module, self.groups_.calls, self._keep)
            self._recent.next_batch()

    @property
    def _is_over(self) -> bool:
        """Whether nothing more will be removed."""
        return self._pruned >= 1 and (self.remove == "progressive" or self._acted)

    @property
    def _keep(self) -> int:
        """How many of the last batches are needed."""
        return max(self.recalibrate, BATCHES) if self.compensate else self.recalibrate

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Take in what the batch told, then prune."""
        if isinstance(self._judge, Activation):
            add = partial(trainer.strategy.reduce, reduce_op="sum")
            self._judge.merge(pl_module, add if trainer.world_size > 1 else None)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def _take_gradients(self, pl_module: Any, optimizer: Any) -> None:
        if isinstance(self._judge, Taylor) and self.groups_ is not None and self._pruned < 1:
            own = (parameter for group in optimizer.param_groups for parameter in group["params"])
            self._judge.collect(self.groups_, named_tensors(pl_module), own)
        if self._held is not None and self._held.before_step(optimizer):
            self._by_gradients.add(id(optimizer))

    def _after_step(self, optimizer: Any, *_: Any) -> None:
        if self._held is not None:
            self._held.after_step(optimizer, id(optimizer) in self._by_gradients)
        self._by_gradients.discard(id(optimizer))

    def _prune(self, trainer: Any, pl_module: Any, amount: float) -> None:
        if self.groups_ is None and self._calls is None:
            raise ConfigurationError("NeuronPruning: no training batch has used a parameter of the model so far")
        if trainer.strategy.reduce_boolean_decision(self._waits(trainer, pl_module), all=False):  # on any process
            return
        now = self.remove == "progressive" or _ends(trainer)
        if self._part > self._pruned or (now and self._masked is not None):
            assert self.groups_ is not None
            complete = self._unseen is None or not self._unseen.paths or _ends(trainer)
            if not self._pruned and not _check_ranks(trainer, self.groups_, complete):
                return  # they have not run the same parts yet
            self._go(trainer, pl_module, amount, now)

    def _waits(self, trainer: Any, pl_module: Any) -> bool:
        """Whether too little is known to remove anything now."""
        if self.groups_ is None:
            return True  # no batch has run the model since another callback changed it
        if _ends(trainer):
            return False
        told = self._judge.told(pl_module, self.groups_) | ~self._judge.judged(pl_module, self.groups_)
        if not bool(told.all()) and not (trainer.is_last_batch and bool(told.any())):
            return True  # parts take turns, as in a GAN
        return self._misses or self._expects(trainer)

    def _expects(self, trainer: Any) -> bool:
        """Whether parts that are trained have not run yet, and may still do so before anything goes."""
        return not (self._pruned or self._part >= PATIENCE or trainer.is_last_batch) and self._lacks(trainer)

    def _lacks(self, trainer: Any) -> bool:
        """Whether parts that are trained have not run yet."""
        return self._unseen is not None and not trained_by(trainer.optimizers).isdisjoint(self._unseen.parameters)

    def _go(self, trainer: Any, pl_module: Any, amount: float, now: bool) -> None:
        """Choose what goes, and remove it now or only mask it."""
        assert self.groups_ is not None
        if isinstance(self._judge, Random):
            self._judge.seed = mix_seed(self._seed or 0, str(trainer.global_step))
        try:
            with self._referred(trainer, pl_module):
                plan, groups, alive, changes = remove_chosen(
                    pl_module,
                    self.groups_,
                    partial(self._choose, trainer, pl_module, self.groups_, self._dense, amount),
                    optimizers=trainer.optimizers if now else (),
                    verify=self.verify,
                    repair=partial(self._repair, trainer, pl_module, now),
                    keep=now,
                    refused=self._refused.append,
                )
        except _TooFewJudgedError:
            return  # at the next occasion, with what has been collected so far
        self._pruned = self._part
        self._judge.forget()
        if isinstance(self._judge, Activation):
            self._judge.watch_for(pl_module, groups)
        if not now:
            masks = self._mask(pl_module, groups, alive)
            if self._held is not None:
                self._held.clear(trainer.optimizers)
            for copy in averaged_copies(trainer):
                apply_masks(named_tensors(copy), masks)
            return
        self.groups_ = groups.without(alive) if plan else groups
        self._masked, self._held = None, None
        if plan:
            self._have_gone(trainer, pl_module, plan, changes)

    def _choose(
        self, trainer: Any, pl_module: Any, drawn: Groups, whole: Dense | None, amount: float, groups: Groups
    ) -> Tensor:
        """The neurons that stay, the same on all processes.

        Args:
            trainer: The Trainer.
            pl_module: Its module.
            drawn: The groups as they were first drawn.
            whole: What the amount is a fraction of with these.
            amount: What is to be gone of it.
            groups: The same, or what has come in their place after a removal failed.
        """
        try:
            allowed = self._choice.allowed(pl_module, groups, self._judge)
        except PruningError:
            if groups is drawn and not self._refused:
                raise
            return torch.ones(groups.neurons, dtype=torch.bool)  # no removal has worked; the run goes on
        if groups is not drawn and whole is not None:  # groups whose removal fails are no part of what can go
            gone = set(drawn.keys) - set(groups.keys)
            sizes = {key: size for key, size in whole.sizes.items() if key not in gone}
            fewer = int(self._choice.allowed(pl_module, drawn, self._judge).sum()) - int(allowed.sum())
            self._dense = replace(whole, neurons=whole.neurons - fewer, sizes=sizes)
            collect_now(self._judge, pl_module, groups, groups.calls)
        left = torch.ones(groups.neurons, dtype=torch.bool)
        if self._masked is not None and groups is drawn:
            left = self._masked
            if self._part <= self._pruned:
                return left
        self._judge.ready(pl_module, groups)
        scores = self._judge.score(pl_module, groups)
        waiting = allowed & ~self._judge.told(pl_module, groups)
        check_scores(groups, scores, allowed & ~waiting)
        if self.scope == "sensitivity" and self._curves is None:
            curves = self._choice.curves(pl_module, groups, scores, allowed, groups.calls)
            self._curves = trainer.strategy.broadcast(curves)
        rest, may, number = groups if bool(left.all()) else groups.without(left), allowed & ~waiting, int(waiting.sum())
        alive = left.clone()
        try:
            alive[left] = self._select(rest, may[left], scores[left], amount, self._part, number)
        except PruningError as error:
            wait = not _ends(trainer) and (number > 0 or self._lacks(trainer))
            if not trainer.strategy.reduce_boolean_decision(wait, all=False):  # all processes do the same
                raise
            raise _TooFewJudgedError from error
        agreed: Tensor = trainer.strategy.broadcast(alive)
        return agreed

    def _repair(self, trainer: Any, pl_module: Any, now: bool, groups: Groups, alive: Tensor) -> Repair:
        batches = list(self._recent.batches) if self._recent is not None else [list(groups.calls)]
        add = partial(trainer.strategy.reduce, reduce_op="sum")
        return Repair.of(pl_module, groups, alive, batches, self.compensate if now else None, add)

    def _have_gone(self, trainer: Any, pl_module: Any, plan: Plan, changes: Mapping[str, Tensor]) -> None:
        """Let all that depends on the model's shape follow."""
        assert self.groups_ is not None
        self._tracer = None
        if isinstance(self._judge, Activation):
            self._judge.watch_for(pl_module, self.groups_)
        add_to(pl_module, changes)
        before, self._macs = self._macs, self.groups_.macs(torch.ones(self.groups_.neurons, dtype=torch.bool))
        if self.recalibrate and self._recent is not None:
            recalibrate(pl_module, list(self._recent.batches), partial(trainer.strategy.reduce, reduce_op="mean"))
        for callback in pruning_callbacks(trainer):
            callback._calls = self._calls  # they tell which calls keep their input's shape
        self._changed(trainer, pl_module, plan, self._macs / before if before else 1.0)
        for copy in averaged_copies(trainer):
            add_to(copy, changes)

    def _mask(self, pl_module: Any, groups: Groups, alive: Tensor) -> dict[str, Tensor]:
        """From now on hold at zero whatever belongs to neurons that are to go; the masks."""
        self.groups_, self._masked = groups, alive
        tensors = named_tensors(pl_module)
        masks = kept_masks(tensors, groups.kept(alive), groups.unmasked)
        self._held = HeldMasks(tensors, masks)
        return masks

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Remove what is still masked, if training ended before its time; then say what was gained."""
        if self._masked is not None and not bool(self._masked.all()):
            with waiting_interrupts():
                self._go(trainer, pl_module, self.amount_, True)
        super().on_train_end(trainer, pl_module)

    def _traced_macs(self) -> tuple[int, int] | None:
        if self.groups_ is None or self._dense is None:
            return None
        size = batch_size(self.groups_.calls)
        return round(self._dense.macs / size), round(self._macs / size)

    def _groups(self) -> Groups | None:
        return self.groups_

    def _sensitivity(self) -> Sensitivity | None:
        if self._curves is None:
            return None
        rows = {key: curve.tolist() for key, curve in self._curves.items()}
        values = {key: {n / (len(row) - 1): row[n] for n in range(1, len(row))} for key, row in rows.items()}
        return Sensitivity("squared change of the outputs, relative", 0.0, by_layers(values))

    def _why_nothing(self) -> str:
        reasons = [f"{key.partition('#')[0]}: {why}" for refused in self._refused for key, why in refused.items()]
        if reasons:
            return f"nothing could be removed of amount={self.amount:g}. {'; '.join(reasons)}"
        return super()._why_nothing()

    def _release(self) -> None:
        super()._release()
        self._forget_trace()
        for hook in self._handles:
            hook.remove()
        self._handles = []
        if self._recent is not None:
            self._recent.close()
        self._recent, self._held, self._masked = None, None, None
        self._by_gradients = set()
        self._restored = {}

    def state_dict(self) -> dict[str, Any]:
        """The plan and what the amount is a fraction of, as plain data and tensors."""
        return {
            **super().state_dict(),
            "dense": None if self._dense is None else asdict(self._dense),
            "macs": self._macs,
            "pruned": self._pruned,
            "refused": [dict(reasons) for reasons in self._refused],
            "latency_macs": self._latency_macs,
            "curves": None if self._curves is None else dict(self._curves),
            "seed": self._seed,
            "parts": list(self._parts),
            **self._of_neurons(),
        }

    def _of_neurons(self) -> dict[str, dict[str, Tensor]]:
        """What is known of single neurons, by name: numbers change."""
        if self.groups_ is None and self._restored:  # not taken up yet
            sums = self._judge.sums if isinstance(self._judge, Activation) else self._restored["sums"]
            return {"masked": dict(self._restored["masked"]), "sums": {key: each.cpu() for key, each in sums.items()}}
        sums = {key: each.cpu() for key, each in self._judge.sums.items()}
        if isinstance(self._judge, Taylor):
            sums = {} if self.groups_ is None or not sums else _by_key(self.groups_, sums["total"])
        masked = {} if self.groups_ is None or self._masked is None else _by_key(self.groups_, self._masked)
        return {"masked": masked, "sums": sums}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the plan of a checkpoint."""
        super().load_state_dict(state_dict)
        self._dense = None if state_dict["dense"] is None else Dense(**state_dict["dense"])
        self._macs = state_dict["macs"]
        self._pruned = state_dict["pruned"]
        self._refused = [dict(reasons) for reasons in state_dict["refused"]]
        self._latency_macs = state_dict["latency_macs"]
        self._curves = state_dict["curves"]
        self._seed = state_dict["seed"]
        self._parts = list(state_dict.get("parts", ()))
        self._restored = {key: state_dict[key] for key in ("masked", "sums")}


def _check_ranks(trainer: Any, groups: Groups, complete: bool) -> bool:
    """Whether processes agree on what neuron a number means, as they must before one tells the others which to keep.

    Args:
        trainer: The Trainer.
        groups: What this process has found.
        complete: Whether it is to be so now; else they may still come to agree.

    Raises:
        ConfigurationError: It is to be so, and isn't; on all of them.
    """
    if trainer.world_size == 1:
        return True
    told = "\n".join(f"{key} {group.size}" for key, group in zip(groups.keys, groups.prunable, strict=True))
    own = torch.tensor([zlib.crc32(told.encode()), complete])
    sums, ends = trainer.strategy.all_gather(own.to(trainer.strategy.root_device)).view(-1, 2).T
    agree = len(sums.unique()) == 1
    if not agree and bool(ends.all()):
        raise ConfigurationError(
            "NeuronPruning: the processes have different models, or ran different parts of them on their first batch; "
            f"process {trainer.global_rank} has {len(groups.prunable)} groups: {told.replace(chr(10), ', ')}"
        )
    return agree


def _ends(trainer: Any) -> bool:
    """Whether this is training's last batch, as far as can be known."""
    by_steps = trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps
    by_epochs = trainer.max_epochs not in (None, -1) and trainer.current_epoch + 1 >= trainer.max_epochs
    return bool(by_steps or (by_epochs and trainer.is_last_batch))


def _by_key(groups: Groups, values: Tensor) -> dict[str, Tensor]:
    """Values of neurons by their group's key: a new trace may number the groups anew."""
    return {key: values[r.start : r.stop].cpu() for key, r in zip(groups.keys, groups.ranges, strict=True)}


def _in_order(groups: Groups, values: dict[str, Tensor], default: float) -> Tensor:
    """What `_by_key` took apart; a group of another size has the default."""
    parts = []
    for key, numbers in zip(groups.keys, groups.ranges, strict=True):
        known = values.get(key)
        whole = torch.full((len(numbers),), default)
        parts.append(known if known is not None and len(known) == len(numbers) else whole)
    joined = torch.cat(parts) if parts else torch.empty(0)
    return joined.bool() if default is True else joined


def _to_device(call: ModuleCall, device: torch.device) -> ModuleCall:
    def move(leaf: Any) -> Any:
        return leaf.to(device) if isinstance(leaf, Tensor) else leaf

    tree_map = torch.utils._pytree.tree_map
    return ModuleCall(call.path, tree_map(move, call.args), tree_map(move, call.kwargs))
