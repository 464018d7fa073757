"""What callbacks share that change a model's architecture: one plan, checkpoints that fit, everything that follows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_prune.callbacks._base import ConfigurationError, PruningCallback, averaged_copies, pruning_callbacks
from lightning_prune.callbacks._clock import Point
from lightning_prune.errors import NoEffectWarning, PruningError
from lightning_prune.graph.callsites import ModuleCall, install_patches
from lightning_prune.graph.observe import Observer, Use, rescaled
from lightning_prune.graph.run import run_calls, undisturbed
from lightning_prune.graph.tree import named_tensors
from lightning_prune.pruning.budget import Budget, listed
from lightning_prune.pruning.change import Change, refer
from lightning_prune.pruning.optimizers import renew
from lightning_prune.pruning.passing import inside
from lightning_prune.pruning.plan import Plan
from lightning_prune.pruning.prunable import METADATA, Prunable, check_dense, structure_state
from lightning_prune.pruning.schedules import Schedule
from lightning_prune.pruning.select import check_flag
from lightning_prune.pruning.surgery import fit_shapes

__all__ = ["ObservingCallback", "StructureCallback", "structure_callbacks"]


def structure_callbacks(trainer: Any) -> list[StructureCallback]:
    """Those of the Trainer's callbacks that change the architecture, in order."""
    return [callback for callback in trainer.callbacks if isinstance(callback, StructureCallback)]


class StructureCallback(PruningCallback):
    """Changes the architecture of the model while it trains.

    All such callbacks of a Trainer share one plan, in which changes stand in the order in which they were made. It is
    in every checkpoint, in the metadata of the state dict: before a state dict is loaded, the module is given the
    architecture that its plan leads to, whatever it was pruned to before.

    Attributes:
        plan_: What is left of the dense model, and what is gone; by all callbacks of the Trainer.
    """

    def __init__(
        self,
        amount: float,
        schedule: str | Schedule,
        start: Point,
        end: Point,
        every: int | str,
        include: str | list[str] | None,
        exclude: str | list[str] | None,
        report: bool,
        monitor: str,
    ) -> None:
        super().__init__(amount, schedule, start, end, every, include, exclude, report, monitor)
        self.plan_ = Plan({}, {})
        self._acted = False
        self._loaded = False
        self._current: dict[str, Tensor] | None = None
        self._macs_left = 1.0
        self._state_hooks: list[RemovableHandle] = []

    # -- what a subclass does -------------------------------------------------------------------------------

    def _resumed(self) -> bool:
        """Whether a checkpoint has told more than a plan."""
        return False

    def _anew(self) -> None:
        """Forget what was measured of a model that isn't this one."""

    def _outdated(self, plan: Plan, macs: float) -> None:
        """Another callback has changed the architecture; ``macs`` is the part of the MACs that is left."""

    def _renewed(self) -> None:
        """A state dict of another architecture was loaded while training; what it tells of this callback comes next."""

    # -- setup ----------------------------------------------------------------------------------------------

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse processes whose model is lost; make a checkpoint of a pruned model fit before it is loaded."""
        super().setup(trainer, pl_module, stage)
        spawned = "MultiProcessing" in type(trainer.strategy.launcher).__name__
        if stage == "fit" and spawned and not isinstance(pl_module, Prunable):
            raise ConfigurationError(
                f"{type(self).__name__} can bring a smaller model back from forked or spawned processes only if the "
                f"module can load itself: derive {type(pl_module).__name__} from lightning_prune.Prunable too, or use "
                "strategy='ddp'"
            )
        if structure_callbacks(trainer)[0] is not self:
            return
        # Functions, not methods: a copy of the module must not copy this callback.
        self._state_hooks = [
            pl_module._register_state_dict_hook(lambda *args: self._describe(trainer, *args)),
            pl_module._register_load_state_dict_pre_hook(lambda *args: self._reshape(trainer, *args), with_module=True),
        ]

    def _start(self, trainer: Any, pl_module: Any) -> None:
        if sum(type(other) is type(self) for other in trainer.callbacks) > 1:
            raise ConfigurationError(f"only one {type(self).__name__} callback can be in the Trainer's callbacks")
        self._take_up(trainer, pl_module)

    def _take_up(self, trainer: Any, pl_module: Any) -> None:
        """Go on with the plan that this model was made by, or start anew."""
        if trainer.ckpt_path is not None and self._loaded and self.plan_ and not self.plan_.made(pl_module):
            raise ConfigurationError(
                f"{type(self).__name__}: the checkpoint is damaged: its plan does not lead to the weights in it"
            )
        if not self.plan_.made(pl_module) and (self.plan_ or not self._resumed()):
            self.amount_, self._part, self._acted = 0.0, 0.0, False  # nothing gone yet, or another model
            self.plan_, self._macs_left = Plan({}, {}), 1.0
            for other in structure_callbacks(trainer):
                if other.plan_.made(pl_module):
                    self.plan_, self._macs_left = other.plan_, other._macs_left
            self._anew()
        if isinstance(pl_module, Prunable):
            pl_module.pruning_plan = self.plan_
        install_patches(pl_module, self.plan_.live_patches)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """From now on optimizers hold the parameters."""
        super().on_train_start(trainer, pl_module)
        self._current = named_tensors(pl_module)

    def _may_act(self, trainer: Any) -> bool:
        return True  # a removal may wait for gradients or for parts that have not run yet

    def _settle(self, trainer: Any, pl_module: Any) -> None:
        ours = structure_callbacks(trainer)
        if self is ours[-1]:
            for callback in ours:
                if isinstance(callback, ObservingCallback):
                    callback._act(trainer, pl_module)

    # -- changes --------------------------------------------------------------------------------------------

    def _changed(self, trainer: Any, pl_module: Any, plan: Plan, macs: float) -> None:
        """The model was changed: everything follows that depends on its parameters.

        Args:
            trainer: The Trainer.
            pl_module: The module.
            plan: What was done to it.
            macs: The part of its MACs that is left.
        """
        self._acted = True
        for copy in averaged_copies(trainer):
            Plan.from_dict(plan.to_dict()).apply(copy)
        _wrap_again(trainer, pl_module)
        total, left = self.plan_.then(plan), self._macs_left * macs
        if isinstance(pl_module, Prunable):
            pl_module.pruning_plan = total
        for callback in structure_callbacks(trainer):
            callback.plan_, callback._macs_left = total, left
            callback._current = named_tensors(pl_module)
            if callback is not self:
                callback._outdated(plan, macs)
        for other in pruning_callbacks(trainer):
            other._follow_removal(trainer, pl_module, plan)

    @contextmanager
    def _referred(self, trainer: Any, pl_module: Any) -> Iterator[None]:
        """What the user's callbacks hold of the parameters that are replaced inside follows."""
        before = named_tensors(pl_module)
        yield
        _tell_callbacks(trainer, _replacements(before, pl_module))

    def _renew(self, trainer: Any, pl_module: Any, before: Mapping[str, Tensor]) -> None:
        """A state dict of another architecture is loaded in the middle of training: what follows goes on with it."""
        new = _replacements(before, pl_module)
        _tell_callbacks(trainer, new)
        for optimizer in trainer.optimizers:
            renew(optimizer, new)
        _wrap_again(trainer, pl_module)
        for callback in structure_callbacks(trainer):
            callback._current = named_tensors(pl_module)
            callback._renewed()
            callback._follow_removal(trainer, pl_module, Plan({}, {}))
        rank_zero_warn(
            "a state dict of another architecture was loaded while training: the optimizer state of the parameters "
            "whose shape has changed starts anew"
        )

    def _plan(self) -> Plan:
        return self.plan_

    def _has_effect(self) -> bool:
        return self._acted

    def _release(self) -> None:
        for hook in self._state_hooks:
            hook.remove()
        self._state_hooks = []
        self._loaded, self._current = False, None

    # -- checkpoints ----------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The plan and what the amount is a fraction of, as plain data."""
        return {
            **super().state_dict(),
            "plan": self.plan_.to_dict(),
            "acted": self._acted,
            "macs_left": self._macs_left,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the plan of a checkpoint."""
        super().load_state_dict(state_dict)
        self._loaded = True
        plan = Plan.from_dict(state_dict["plan"])
        if plan != self.plan_:  # an equal one may know what removed layers were
            self.plan_ = plan
        self._acted = state_dict["acted"]
        self._macs_left = state_dict["macs_left"]

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Describe the state dict of a checkpoint that is saved after ``fit`` too."""
        metadata = getattr(checkpoint["state_dict"], "_metadata", {})
        metadata.setdefault("", {})[METADATA] = self._description(trainer)

    def _description(self, trainer: Any) -> dict[str, Any]:
        states = {
            other.state_key: {**other.state_dict(), "kind": type(other).__name__}
            for other in structure_callbacks(trainer)
        }
        return {"plan": self.plan_.to_dict(), "macs_left": self._macs_left, "callbacks": states}

    def _describe(
        self, trainer: Any, module: nn.Module, state_dict: Any, prefix: str, metadata: dict[str, Any]
    ) -> None:
        metadata[METADATA] = self._description(trainer)

    def _reshape(
        self,
        trainer: Any,
        module: nn.Module,
        state_dict: Any,
        prefix: str,
        metadata: dict[str, Any],
        strict: bool,
        *args: Any,
    ) -> None:
        """Give the module the architecture of a state dict that is about to be loaded into it, smaller or larger.

        So do the copies that averaging callbacks hold: theirs is loaded next.

        Raises:
            PruningError: The state dict's plan is that of another model, or does not lead to its tensors; the module is
                untouched.
        """
        described = metadata.get(METADATA) or _described_elsewhere(trainer, state_dict)
        plan = Plan.from_dict(described["plan"]) if described else Plan({}, {})
        now = next((c.plan_ for c in structure_callbacks(trainer) if c.plan_.made(module)), Plan({}, {}))
        copies = [copy for copy in averaged_copies(trainer) if copy is not module]
        # A model that has lost more fits a smaller plan too.
        if plan != now if now else not plan.made(module):
            masking = [other for other in pruning_callbacks(trainer) if not isinstance(other, StructureCallback)]
            if self._current is not None and masking:
                raise PruningError(
                    "this state dict is of another architecture than the module has now, and the masks of "
                    f"{type(masking[0]).__name__} can't follow it: load it after fit"
                )
            dense = now.dense_shapes(module)
            if described:
                # What torch tells hooks is True whatever load_state_dict was given.
                strict = getattr(module, "strict_loading", True)
                _check_plan(plan, dense, module, {k.removeprefix(prefix): v for k, v in state_dict.items()}, strict)
            else:
                loaded = {name.removeprefix(prefix): t for name, t in state_dict.items() if name.startswith(prefix)}
                shapes = {name: list(t.shape) for name, t in loaded.items() if isinstance(t, Tensor)}
                try:
                    for each in (module, *copies):
                        fit_shapes(each, shapes)
                except PruningError as error:
                    hint = ". A deepcopy of a state dict still tells its architecture, a new dict doesn't"
                    raise PruningError(f"{error}{hint if now else ''}") from None
                if self._current is not None:
                    self._renew(trainer, module, self._current)
                return
            for copy in copies:
                if now.made(copy):
                    now.take_back(copy)
                Plan.from_dict(plan.to_dict()).apply(copy)
            if now:
                now.take_back(module)
            plan.apply(module)
        elif plan == now:
            plan = now
        # A `Prunable` module has already reshaped itself.
        if self._current is not None and _replacements(self._current, module):
            self._renew(trainer, module, self._current)
        for callback in structure_callbacks(trainer):
            callback.plan_, callback._macs_left = plan, described.get("macs_left", 1.0)
            state = _state_of(callback, described.get("callbacks", {}))
            if state is not None:
                callback.load_state_dict(state)


def _replacements(before: Mapping[str, Tensor], module: nn.Module) -> dict[int, Tensor]:
    """Id of each tensor that a module held before -> the other one that it holds in its place now."""
    after = named_tensors(module)
    return {id(t): after[name] for name, t in before.items() if name in after and after[name] is not t}


def _tell_callbacks(trainer: Any, new: Mapping[int, Tensor]) -> None:
    """The user's callbacks hold the module's tensors as they are now."""
    for callback in trainer.callbacks if new else ():
        if not isinstance(callback, PruningCallback):
            refer(vars(callback), new, Change())


def _wrap_again(trainer: Any, pl_module: Any) -> None:
    """DDP's buckets hold the old parameters."""
    if hasattr(trainer.strategy, "configure_ddp"):
        trainer.strategy.model = pl_module
        trainer.strategy.configure_ddp()


def _described_elsewhere(trainer: Any, state_dict: Any) -> dict[str, Any]:
    """What the checkpoint that is being loaded says of its state dict, where that is a plain one: an average, say."""
    connector = getattr(trainer, "_checkpoint_connector", None)
    checkpoint = getattr(connector, "_loaded_checkpoint", None) or {}
    if not any(state_dict is checkpoint.get(name) for name in ("state_dict", "current_model_state")):
        names: Any = getattr(checkpoint.get("state_dict"), "keys", dict)()
        if not names or set(names) != set(state_dict):  # load_state_dict works on a copy
            return {}
    state = structure_state(checkpoint)
    return {} if state is None else {"plan": state["plan"], "macs_left": state["macs_left"]}


def _check_plan(
    plan: Plan, dense: Mapping[str, list[int]], module: nn.Module, state: Mapping[str, Any], strict: bool
) -> None:
    """Raise a PruningError unless a plan fits a module's dense shapes, and leads to the tensors of a state dict."""
    check_dense(plan, dense, type(module).__name__)
    for name, before in dense.items():
        dims = plan.kept.get(name, {})
        shape = [len(dims.get(dim, range(size))) for dim, size in enumerate(before)]
        found = state.get(name)
        if isinstance(found, Tensor) and list(found.shape) != shape and not inside(name, plan.removed):
            raise PruningError(
                f"the checkpoint is damaged, or of another model: {name!r} has shape {tuple(found.shape)}, its plan "
                f"leads to {tuple(shape)}"
            )
    missing = [name for name in _persistent(module) if name not in state and not inside(name, plan.removed)]
    if missing and strict:
        raise PruningError(f"the checkpoint is damaged, or of another model: it lacks {missing[0]!r}")


def _persistent(module: nn.Module) -> set[str]:
    """Names in the module's state dict, as far as they are parameters and buffers."""
    return {
        f"{path}.{name}" if path else name
        for path, part in module.named_modules(remove_duplicate=False)
        for name, tensor in (*part._parameters.items(), *part._buffers.items())
        if tensor is not None and name not in part._non_persistent_buffers_set
    }


def _state_of(callback: StructureCallback, states: Mapping[str, dict[str, Any]]) -> dict[str, Any] | None:
    """What a checkpoint says of a callback; one whose arguments have changed is known by its kind."""
    alike = [state for state in states.values() if state["kind"] == type(callback).__name__]
    return states.get(callback.state_key, alike[0] if len(alike) == 1 else None)


class ObservingCallback(StructureCallback):
    """Decides by what it observes in the training batch after which it acts.

    It acts when all callbacks have had their turn at a batch's end, for `NeuronPruning` goes by what it has traced of
    the model as it is.
    """

    def __init__(
        self,
        amount: float,
        of: str,
        schedule: str | Schedule,
        start: Point,
        end: Point,
        every: int | str,
        include: str | list[str] | None,
        exclude: str | list[str] | None,
        verify: bool,
        report: bool,
        monitor: str,
    ) -> None:
        super().__init__(amount, schedule, start, end, every, include, exclude, report, monitor)
        self.of = of
        check_flag("verify", verify)
        self.verify = verify
        self._observed: Observer | None = None
        self._at_observation = 1.0
        self._own_left = 1.0
        self.frozen_: dict[str, str] = {}
        self._sizes: dict[str, int] = {}
        self._lost_neurons = False
        self._wanted: float | None = None
        self._met = False
        self._said = False

    # -- what a subclass does -------------------------------------------------------------------------------

    differences: bool = False
    """Whether it asks how much modules change their input."""

    def _check(self, pl_module: Any, uses: Mapping[str, Use], budget: Budget) -> None:
        """Raise a PruningError if the whole amount can't be reached."""
        raise NotImplementedError

    def _change(
        self, trainer: Any, pl_module: Any, uses: Mapping[str, Use], amount: float, budget: Budget
    ) -> tuple[Plan, float]:
        """Change the model until ``amount`` is gone; what was done, and the MACs that this has saved."""
        raise NotImplementedError

    # -- observing ------------------------------------------------------------------------------------------

    def _anew(self) -> None:
        self._own_left = 1.0

    def _start(self, trainer: Any, pl_module: Any) -> None:
        super()._start(trainer, pl_module)
        self._observed, self._wanted, self._met, self._said = None, None, False, False

    def _look_again(self, trainer: Any) -> bool:
        due = trainer.is_last_batch or trainer.max_steps != -1 or self.every != "epoch"
        return bool(due) and not self._met

    @contextmanager
    def _watch(self, trainer: Any, pl_module: Any) -> Iterator[None]:
        self._observer = Observer(pl_module, differences=self.differences)
        with super()._watch(trainer, pl_module), self._observer.watch():
            yield

    def _watched(self, pl_module: Any) -> tuple[ModuleCall, ...] | None:
        calls, observer, first = super()._watched(pl_module), self._observer, self._observed is None
        del self._observer
        if calls is None:
            return None
        observer.model = nn.Identity()  # let go of it
        self._observed, self._at_observation, self._sizes = observer, self._macs_left, _own_sizes(pl_module)
        budget = self._budget(pl_module)
        if first and not self.plan_ and budget.needed(self.amount) > 0:  # later, as far as it goes
            try:
                self._check(pl_module, observer.uses, budget)
            except PruningError as error:
                raise ConfigurationError(f"{type(self).__name__}: {error}") from None
        self._lost_neurons = False
        return calls

    def _outdated(self, plan: Plan, macs: float) -> None:
        # Kernels and layers that go leave all shapes as they are, neurons don't.
        self._lost_neurons = self._lost_neurons or any(dim < 2 for dims in plan.kept.values() for dim in dims)

    def _renewed(self) -> None:
        self._observed, self._met, self._said = None, False, False

    def _budget(self, pl_module: Any) -> Budget:
        """What is left, and what there would be without this callback; MACs are those of the observed batch."""
        assert self._observed is not None
        now: float = sum(p.numel() for p in pl_module.parameters())
        if self.of == "macs":
            now = self._observed.macs * self._macs_left / self._at_observation
        return Budget(self.of, now / self._own_left, now)

    # -- acting ---------------------------------------------------------------------------------------------

    def _prune(self, trainer: Any, pl_module: Any, amount: float) -> None:
        self._wanted = amount

    def _act(self, trainer: Any, pl_module: Any) -> None:
        """Do what was asked for at this batch's end."""
        amount, self._wanted = self._wanted, None
        if amount is None:
            return
        observed = self._observed
        if observed is None:
            raise ConfigurationError(f"{type(self).__name__}: no training batch has run the model so far")
        budget = self._budget(pl_module)
        if budget.needed(amount) > 0:
            sizes = _own_sizes(pl_module)
            shares = {path: size / self._sizes[path] for path, size in sizes.items() if self._sizes.get(path)}
            uses = rescaled({path: use for path, use in observed.uses.items() if path in sizes}, shares)
            if self._lost_neurons:
                uses = self._seen_again(pl_module, uses)
            params = sum(p.numel() for p in pl_module.parameters())
            with self._referred(trainer, pl_module):
                plan, saved = self._change(trainer, pl_module, uses, amount, budget)
            if plan:
                macs = observed.macs * self._macs_left / self._at_observation
                left = float(trainer.strategy.broadcast(1 - saved / macs if macs else 1.0))
                self._own_left *= left if self.of == "macs" else sum(p.numel() for p in pl_module.parameters()) / params
                self._changed(trainer, pl_module, plan, left)
            if amount >= self.amount and self._budget(pl_module).needed(amount) > 0:
                self._said = True
                rank_zero_warn(
                    f"{type(self).__name__}: {1 - self._own_left:.3g} of amount={self.amount:g} of the {self.of} could "
                    f"be reached, nothing else can go{listed(self.frozen_)}",
                    category=NoEffectWarning,
                )
        self._met = amount >= self.amount

    def _has_effect(self) -> bool:
        return self._acted or self._said

    def _seen_again(self, pl_module: Any, uses: Mapping[str, Use]) -> dict[str, Use]:
        """What is known of modules that have lost neurons since: whether their outputs are still like their inputs."""
        again = Observer(pl_module)
        with undisturbed(pl_module), again.watch():
            pl_module.eval()
            for call in self._calls or ():
                if call.repeatable:
                    with suppress(Exception):  # what can't be run again is left alone
                        run_calls(pl_module, [call])
        unknown = Use(reason="has lost neurons, and could not be run again")
        return {path: replace(use, reason=again.uses.get(path, unknown).reason) for path, use in uses.items()}

    def _repeatable(self) -> list[ModuleCall] | None:
        """The calls to check a change with; None where it isn't to be checked."""
        return [call for call in self._calls or () if call.repeatable] if self.verify else None

    def state_dict(self) -> dict[str, Any]:
        """The plan and what the amount is a fraction of, as plain data."""
        return {**super().state_dict(), "own_left": self._own_left}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the plan of a checkpoint."""
        super().load_state_dict(state_dict)
        self._own_left = state_dict["own_left"]


def _own_sizes(module: nn.Module) -> dict[str, int]:
    """Elements of the weights that each module holds itself; what is added multiplies nothing."""
    return {
        path: sum(p.numel() for p in m.parameters(recurse=False) if p.dim() > 1) for path, m in module.named_modules()
    }
