"""NeuronPruning: neurons, channels and features are removed while Lightning trains."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_prune.callbacks._base import ConfigurationError, PruningCallback, pruning_callbacks
from lightning_prune.errors import PruningError
from lightning_prune.export import fit_shapes
from lightning_prune.graph.callsites import ModuleCall, install_patches
from lightning_prune.graph.groups import Groups, draw_groups
from lightning_prune.graph.run import as_calls, traced
from lightning_prune.graph.trace import Trace, Tracer
from lightning_prune.pruning.criteria import NEURON_CRITERIA, get_criterion
from lightning_prune.pruning.neurons import check_prunable, check_round_to, remove_neurons
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
from lightning_prune.pruning.surgery import named_tensors

__all__ = ["NeuronPruning"]

SUPPORTED_STRATEGIES = ("SingleDeviceStrategy", "DDPStrategy")


class NeuronPruning(PruningCallback):
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
        schedule: ``"cubic"``, ``"linear"`` or ``"one_shot"``.
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
        criterion: str = "l1",
        scope: str = "global",
        schedule: str = "cubic",
        start: float | int = 0.0,
        end: float | int = 0.5,
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
        self.plan_ = Plan({}, {})
        self.groups_: Groups | None = None
        self._allowed = torch.empty(0, dtype=torch.bool)
        self._dense: Dense | None = None
        self._load_hook: RemovableHandle | None = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse strategies that can't follow; make a checkpoint of a pruned model fit before it is loaded."""
        super().setup(trainer, pl_module, stage)
        names = {cls.__name__ for cls in type(trainer.strategy).__mro__}
        spawned = "MultiProcessing" in type(trainer.strategy.launcher).__name__
        if stage == "fit" and (spawned or not names & set(SUPPORTED_STRATEGIES)):
            raise ConfigurationError(
                f"NeuronPruning works on one device and with strategy='ddp', not with "
                f"{type(trainer.strategy).__name__}{' in spawned processes' if spawned else ''}"
            )
        self._load_hook = _before_load(pl_module)

    def _start(self, trainer: Any, pl_module: Any) -> None:
        if any(isinstance(other, NeuronPruning) and other is not self for other in trainer.callbacks):
            raise ConfigurationError("only one NeuronPruning callback can be in the Trainer's callbacks")
        shapes = {name: list(tensor.shape) for name, tensor in named_tensors(pl_module).items()}
        small = {
            name: [len(dims.get(dim, range(size))) for dim, size in enumerate(self.plan_.shapes[name])]
            for name, dims in self.plan_.kept.items()
        }
        if any(shapes.get(name) != shape for name, shape in small.items()):
            self.plan_, self._dense, self.amount_ = Plan({}, {}), None, 0.0  # another model: start anew
        install_patches(pl_module, self.plan_.patches)
        self.groups_ = None
        inputs = self.example_inputs
        if inputs is None:
            inputs = getattr(pl_module, "example_input_array", None)
        if inputs is not None:
            calls = tuple(_to_device(call, pl_module.device) for call in as_calls(inputs))
            self._take(traced(pl_module, calls))

    def _take(self, trace: Trace) -> None:
        """Draw the groups and check that the whole amount can be reached, before anything is changed."""
        groups = draw_groups(trace)
        try:
            allowed = pick(groups, globs("include", self.include), globs("exclude", self.exclude), self.exact_only)
            check_prunable(groups, allowed)
            self._dense = self._dense or measure_dense(groups, allowed)
            self._select(groups, allowed, self._scores_of_size(groups), self.amount)
        except PruningError as error:
            raise ConfigurationError(f"NeuronPruning: {error}") from None
        self.groups_, self._allowed = groups, allowed

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
        )

    def _watch(self, pl_module: Any) -> Any:
        if self.groups_ is not None:
            return super()._watch(pl_module)
        self._tracer = Tracer(pl_module)
        return self._tracer.watch()

    def _watched(self, trainer: Any, pl_module: Any) -> tuple[ModuleCall, ...]:
        if self.groups_ is not None:
            return super()._watched(trainer, pl_module)
        trace = self._tracer.trace
        del self._tracer
        self._take(trace)
        return tuple(trace.calls)

    def _prune(self, trainer: Any, pl_module: Any, amount: float) -> None:
        assert self.groups_ is not None
        scores = get_criterion(self.criterion, NEURON_CRITERIA)(self.groups_, named_tensors(pl_module))
        alive = self._select(self.groups_, self._allowed, scores, amount)
        alive = trainer.strategy.broadcast(alive)
        if bool(alive.all()):
            return
        plan = remove_neurons(pl_module, self.groups_, alive, optimizers=trainer.optimizers, verify=self.verify)
        self.groups_ = self.groups_.without(alive)
        self._allowed = self._allowed[alive]
        self.plan_ = self.plan_.then(plan)
        strategy = trainer.strategy
        if hasattr(strategy, "configure_ddp"):  # DDP's buckets hold the old parameters
            strategy.model = pl_module
            strategy.configure_ddp()
        for callback in pruning_callbacks(trainer):
            callback._follow_removal(trainer, pl_module, plan)

    def _plan(self) -> Plan:
        return self.plan_

    def _has_effect(self) -> bool:
        return bool(self.plan_)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Leave nothing of ours in the model, except sizes that had to be rewritten in a forward."""
        super().teardown(trainer, pl_module, stage)
        if self._load_hook is not None:
            self._load_hook.remove()
            self._load_hook = None

    def state_dict(self) -> dict[str, Any]:
        """The plan and what the amount is a fraction of, as plain data."""
        dense = None if self._dense is None else asdict(self._dense)
        return {"amount": self.amount_, "plan": self.plan_.to_dict(), "dense": dense}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the plan of a checkpoint."""
        self.amount_ = state_dict["amount"]
        self.plan_ = Plan.from_dict(state_dict["plan"])
        self._dense = None if state_dict["dense"] is None else Dense(**state_dict["dense"])


def _to_device(call: ModuleCall, device: torch.device) -> ModuleCall:
    def move(leaf: Any) -> Any:
        return leaf.to(device) if isinstance(leaf, Tensor) else leaf

    tree_map = torch.utils._pytree.tree_map
    return ModuleCall(call.path, tree_map(move, call.args), tree_map(move, call.kwargs))


def _before_load(pl_module: nn.Module) -> RemovableHandle:
    """Shrink the module to the shapes of a state dict that is about to be loaded into it."""

    def reshape(module: nn.Module, state_dict: Any, prefix: str, *args: Any) -> None:
        shapes = {
            name.removeprefix(prefix): list(tensor.shape)
            for name, tensor in state_dict.items()
            if name.startswith(prefix) and isinstance(tensor, Tensor)
        }
        fit_shapes(module, shapes)

    handle: RemovableHandle = pl_module._register_load_state_dict_pre_hook(reshape, with_module=True)
    return handle
