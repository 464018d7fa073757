"""NeuronPruning: neurons, channels and features are removed while Lightning trains."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from lightning_prune.callbacks._base import ConfigurationError, pruning_callbacks
from lightning_prune.callbacks._clock import Point
from lightning_prune.callbacks._structure import StructureCallback
from lightning_prune.errors import PruningError
from lightning_prune.graph.callsites import ModuleCall
from lightning_prune.graph.groups import Groups, draw_groups
from lightning_prune.graph.run import as_calls, named_tensors, traced
from lightning_prune.graph.trace import Trace, Tracer
from lightning_prune.pruning.criteria import NEURON_CRITERIA, get_criterion
from lightning_prune.pruning.neurons import check_prunable, check_round_to, remove_chosen
from lightning_prune.pruning.plan import Plan
from lightning_prune.pruning.select import (
    BUDGETS,
    NEURON_SCOPES,
    Dense,
    check_choice,
    globs,
    measure_dense,
    pick,
    select_neurons,
)
from lightning_prune.report.run import batch_size

__all__ = ["NeuronPruning"]


class NeuronPruning(StructureCallback):
    """Removes the least important neurons while Lightning trains: the model gets smaller and faster.

    Everything that depends on a shape follows: neighbouring layers, norm statistics, gradients, optimizer
    state, DDP's buckets, the masks of `WeightPruning`. What neurons belong together is traced, not assumed:
    on ``example_inputs``, else on the module's ``example_input_array``, else on the first training batch as it
    flows through ``training_step``.

    Args:
        amount: Fraction that is gone at the end, [0, 1): 0.3 is 30 % of the dense model.
        of: What the fraction is of: ``"neurons"``, ``"params"`` or ``"macs"``.
        criterion: What makes a neuron important: ``"l1"``, the L1 norm of all its slices.
        scope: ``"global"`` ranks all neurons together, ``"layer"`` takes the same fraction of each group.
        schedule: ``"cubic"``, ``"linear"``, ``"exponential"``, ``"one_cycle"``, ``"one_shot"``, or a function of the
            schedule's progress (0 to 1) that gives the part of the amount that is gone.
        start: Where the schedule starts: a fraction of training (float) or an epoch (int).
        end: Where the full amount is reached, likewise.
        every: ``"epoch"``: prune at the end of each epoch; or a number of optimizer steps.
        round_to: Layers shrink to multiples of this only.
        include: Globs on module names: only neurons that these layers make (None: all).
        exclude: Globs on module names: no neurons that these layers make.
        example_inputs: A tensor, a tuple of positional or a dict of keyword arguments of the module's forward.
        exact_only: Leave groups alone whose removal does not equal masking exactly.
        verify: Check every removal against the masked model, one forward of each; roll back if they differ.
        report: Print a table after training; it is in ``report_`` too.
        monitor: Validation metric that the table shows.

    Attributes:
        plan_: What was kept of the dense model, by this and other callbacks of the Trainer.
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
        criterion: str = "l1",
        scope: str = "global",
        schedule: str | Callable[[float], float] = "cubic",
        start: Point = 0.0,
        end: Point = 0.5,
        every: int | str = "epoch",
        round_to: int = 1,
        include: str | list[str] | None = None,
        exclude: str | list[str] | None = None,
        example_inputs: Any = None,
        exact_only: bool = False,
        verify: bool = True,
        report: bool = True,
        monitor: str = "val_acc",
    ) -> None:
        super().__init__(amount, schedule, start, end, every, include, exclude, report, monitor)
        check_choice("of", of, BUDGETS)
        get_criterion(criterion, NEURON_CRITERIA)
        check_choice("scope", scope, NEURON_SCOPES)
        check_round_to(round_to)
        if example_inputs is not None:
            as_calls(example_inputs)
        self.of = of
        self.criterion = criterion
        self.scope = scope
        self.round_to = round_to
        self.example_inputs = example_inputs
        self.exact_only = exact_only
        self.verify = verify
        self.groups_: Groups | None = None
        self._dense: Dense | None = None
        self._macs = 0.0

    def _start(self, trainer: Any, pl_module: Any) -> None:
        super()._start(trainer, pl_module)
        self.groups_ = None
        inputs = self.example_inputs
        if inputs is None:
            inputs = getattr(pl_module, "example_input_array", None)
        if inputs is not None:
            inputs = trainer.precision_plugin.convert_input(inputs)
            calls = tuple(_to_device(call, pl_module.device) for call in as_calls(inputs))
            self._take(traced(pl_module, calls))

    def _anew(self) -> None:
        self._dense = None

    def _outdated(self, plan: Plan, macs: float) -> None:
        self.groups_ = None  # the next batch is traced again
        self._macs *= macs

    def _look_again(self, trainer: Any) -> bool:
        return self.groups_ is None

    def _take(self, trace: Trace) -> None:
        """Draw the groups and check that the whole amount can be reached, before anything is changed."""
        groups = draw_groups(trace)
        try:
            allowed = self._pick(groups)
            check_prunable(groups, allowed)
            macs = groups.macs(torch.ones(groups.neurons, dtype=torch.bool))
            if self._dense is None:
                self._dense = measure_dense(groups, allowed)
            elif self._macs:  # traced on other inputs than before, a batch of another size for one
                self._dense = replace(self._dense, macs=self._dense.macs * (macs / self._macs))
            self._macs = macs
            self._select(groups, allowed, self._scores_of_size(groups), self.amount)
        except PruningError as error:
            raise ConfigurationError(f"NeuronPruning: {error}") from None
        self.groups_ = groups

    def _pick(self, groups: Groups) -> Tensor:
        return pick(groups, globs("include", self.include), globs("exclude", self.exclude), self.exact_only)

    @staticmethod
    def _scores_of_size(groups: Groups) -> Tensor:
        return torch.zeros(groups.neurons)

    def _select(self, groups: Groups, allowed: Tensor, scores: Tensor, amount: float) -> Tensor:
        assert self._dense is not None
        return select_neurons(
            groups,
            scores,
            allowed,
            amount,
            of=self.of,
            scope=self.scope,
            round_to=self.round_to,
            dense=self._dense,
            on_the_way=amount < self.amount,
        )

    def _watch(self, trainer: Any, pl_module: Any) -> Any:
        if self.groups_ is not None:
            return super()._watch(trainer, pl_module)
        self._tracer = Tracer(pl_module, wrapped=trainer.strategy.model is not pl_module)
        return self._tracer.watch() if pl_module.automatic_optimization else self._watch_steps(trainer)

    @contextmanager
    def _watch_steps(self, trainer: Any) -> Iterator[None]:
        """Watch a whole batch of manual optimization, its optimizer steps aside."""
        tracer = self._tracer

        def step(stepping: bool) -> Callable[..., None]:
            return lambda *_: setattr(tracer, "stepping", stepping)

        handles = [optimizer.register_step_pre_hook(step(True)) for optimizer in trainer.optimizers]
        handles += [optimizer.register_step_post_hook(step(False)) for optimizer in trainer.optimizers]
        try:
            with tracer.watch():
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _watched(self, pl_module: Any) -> tuple[ModuleCall, ...] | None:
        if self.groups_ is not None:
            return super()._watched(pl_module)
        if not self._tracer.has_read:
            return None
        trace = self._tracer.trace
        del self._tracer
        self._take(trace)
        return tuple(trace.calls)

    def _prune(self, trainer: Any, pl_module: Any, amount: float) -> None:
        if self.groups_ is None and self._calls is not None:
            return  # no batch has run the model since another callback changed it
        if self.groups_ is None:
            raise ConfigurationError("NeuronPruning: no training batch has used a parameter of the model so far")

        drawn, whole = self.groups_, self._dense

        def choose(groups: Groups) -> Tensor:
            allowed = self._pick(groups)
            if groups is not drawn and whole is not None:  # groups whose removal fails are no part of what can go
                gone = set(drawn.keys) - set(groups.keys)
                sizes = {key: size for key, size in whole.sizes.items() if key not in gone}
                fewer = int(self._pick(drawn).sum()) - int(allowed.sum())
                self._dense = replace(whole, neurons=whole.neurons - fewer, sizes=sizes)
            scores = get_criterion(self.criterion, NEURON_CRITERIA)(groups, named_tensors(pl_module))
            alive: Tensor = trainer.strategy.broadcast(self._select(groups, allowed, scores, amount))
            return alive

        plan, groups, alive = remove_chosen(
            pl_module, self.groups_, choose, optimizers=trainer.optimizers, verify=self.verify
        )
        self.groups_ = groups.without(alive) if plan else groups
        if not plan:
            return
        before, self._macs = self._macs, self.groups_.macs(torch.ones(self.groups_.neurons, dtype=torch.bool))
        for callback in pruning_callbacks(trainer):
            callback._calls = self._calls  # they tell which calls keep their input's shape
        self._changed(trainer, pl_module, plan, self._macs / before if before else 1.0)

    def _traced_macs(self) -> tuple[int, int] | None:
        if self.groups_ is None or self._dense is None:
            return None
        size = batch_size(self.groups_.calls)
        return round(self._dense.macs / size), round(self._macs / size)

    def state_dict(self) -> dict[str, Any]:
        """The plan and what the amount is a fraction of, as plain data."""
        dense = None if self._dense is None else asdict(self._dense)
        return {**super().state_dict(), "dense": dense, "macs": self._macs}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the plan of a checkpoint."""
        super().load_state_dict(state_dict)
        self._dense = None if state_dict["dense"] is None else Dense(**state_dict["dense"])
        self._macs = state_dict["macs"]


def _to_device(call: ModuleCall, device: torch.device) -> ModuleCall:
    def move(leaf: Any) -> Any:
        return leaf.to(device) if isinstance(leaf, Tensor) else leaf

    tree_map = torch.utils._pytree.tree_map
    return ModuleCall(call.path, tree_map(move, call.args), tree_map(move, call.kwargs))
