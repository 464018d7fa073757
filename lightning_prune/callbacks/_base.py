"""What all pruning callbacks share: when to act, watching the first batch, logging, the report."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, replace
from itertools import accumulate
from typing import Any, ClassVar

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.optim.swa_utils import AveragedModel

from lightning_prune._lightning import accept_both_lightnings
from lightning_prune.callbacks._clock import Clock, Point, check_every, check_window
from lightning_prune.callbacks._files import check_files, check_no_files
from lightning_prune.callbacks._interrupts import waiting_interrupts
from lightning_prune.callbacks._loggers import log_figures, log_scalars
from lightning_prune.callbacks._reporting import Reporting
from lightning_prune.errors import NoEffectWarning, PruningError
from lightning_prune.graph.callsites import ModuleCall, ModuleStack
from lightning_prune.graph.groups import Groups
from lightning_prune.pruning.plan import Plan
from lightning_prune.pruning.schedules import Schedule, get_schedule
from lightning_prune.pruning.select import check_amount, globs
from lightning_prune.pruning.sensitivity import Sensitivity
from lightning_prune.report.build import build_report
from lightning_prune.report.cost import Cost, cost_of_calls
from lightning_prune.report.layers import counts_of, magnitudes, weights_of
from lightning_prune.report.report import Moment, Report, timeline_of
from lightning_prune.report.run import measurable, needs_library
from lightning_prune.schedulers import FollowsPruning

__all__ = ["ConfigurationError", "PruningCallback", "averaged_copies", "pruning_callbacks"]


MOMENTS = 1000
"""So many moments of a timeline are kept, and a few more: of those without a metric every second goes then."""


class ConfigurationError(PruningError, MisconfigurationException):
    """A callback can't work in this Trainer; raised before the model is touched."""


def pruning_callbacks(trainer: Any) -> list[PruningCallback]:
    """Our callbacks among the Trainer's, in order."""
    return [callback for callback in trainer.callbacks if isinstance(callback, PruningCallback)]


def _close_watches(trainer: Any) -> None:
    """Stop observing, the last one first: the modes that observe lie on a stack."""
    with waiting_interrupts():
        for callback in reversed(pruning_callbacks(trainer)):
            callback._watching.close()


def averaged_copies(trainer: Any) -> list[nn.Module]:
    """The copies of the module whose weights Lightning's averaging callbacks hold; they must follow the module."""
    averages = [getattr(callback, "_average_model", None) for callback in trainer.callbacks]
    return [a.module if isinstance(a, AveragedModel) else a for a in averages if a is not None]


def _tell_schedulers(trainer: Any, epoch_is_over: bool) -> None:
    """Learning rates may start anew after a pruning; those that watch a metric take their step only after this."""
    for config in trainer.lr_scheduler_configs:
        if isinstance(config.scheduler, FollowsPruning):
            due = config.interval == "step" or (epoch_is_over and (trainer.current_epoch + 1) % config.frequency == 0)
            config.scheduler.pruned(before_step=due and isinstance(config.scheduler, ReduceLROnPlateau))


class PruningCallback(Reporting[Report], Callback):
    """Acts at the end of an epoch's last training batch, before validation.

    So the metric that ModelCheckpoint monitors is that of the very weights it saves. Subclasses say what to do
    in `_prune`. Constructor arguments are configuration and never change; what a run produces ends in ``_``.

    Attributes:
        amount_: Fraction that the schedule has asked for so far.
        report_: Dense against pruned, after ``fit``; None with ``report=False`` and on other ranks than 0.
        timeline_: What happened so far, at each pruning and each epoch's end; of several callbacks the last one's.
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
        accept_both_lightnings(PruningCallback, "Callback")
        check_amount(amount)
        get_schedule(schedule, amount)
        check_window(start, end)
        check_every(every)
        globs("include", include)
        globs("exclude", exclude)
        self.amount = amount
        self.schedule = schedule
        self.start = start
        self.end = end
        self.every = every
        self.include = include
        self.exclude = exclude
        self.report = report
        if not isinstance(monitor, str):
            raise PruningError(f"monitor must be the name of a metric, got {monitor!r}")
        self.monitor = monitor
        self.amount_ = 0.0
        self._progress = 0.0
        self._part = 0.0
        self._key: str | None = None
        self.timeline_: list[Moment] = []
        self._before: dict[str, list[int]] = {}
        self._advanced = False
        self._clock: Clock | None = None
        self._steps = 0
        self._watching = ExitStack()
        self._stack: ModuleStack | None = None
        self._calls: tuple[ModuleCall, ...] | None = None
        self._measured: tuple[tuple[ModuleCall, ...], tuple[ModuleCall, ...]] | None = None
        self._cost: Cost | None = None
        self._dense_metric: float | None = None

    strategies: ClassVar[tuple[str, ...]] = ("SingleDeviceStrategy", "DDPStrategy")
    """Names of the strategies it works with, those derived from them included."""

    @property
    def state_key(self) -> str:
        """Distinguishes callbacks of one class by what they prune; two that prune the same are refused."""
        if self._key is None:  # Lightning asks for it at every hook
            self._key = self._generate_state_key(amount=self.amount, include=self.include, exclude=self.exclude)
        return self._key

    # -- what a subclass does -------------------------------------------------------------------------------

    def _start(self, trainer: Any, pl_module: Any) -> None:
        """Check the model and prepare, before training and before anything is changed."""

    def _watch(self, trainer: Any, pl_module: Any) -> Any:
        """A context manager that observes the first training batch."""
        assert self._stack is not None
        return self._stack.watch()

    def _watched(self, pl_module: Any) -> tuple[ModuleCall, ...] | None:
        """What a batch told: its module calls, None if it ran nothing, so that the next one is to be watched."""
        assert self._stack is not None
        return tuple(self._stack.outermost) or None

    def _check_groups(self, pl_module: Any, groups: Groups, allowed: Tensor, round_to: int) -> None:
        """Raise a PruningError if neurons of these groups can't go without breaking what this callback does."""

    def _prune(self, trainer: Any, pl_module: Any, amount: float) -> None:
        """Prune until ``amount`` of the dense whole is gone."""
        raise NotImplementedError

    def _look_again(self, trainer: Any) -> bool:
        """Whether the batch that starts is to be observed, although one was."""
        return False

    def _settle(self, trainer: Any, pl_module: Any) -> None:
        """Do what had to wait until all callbacks were asked, at a batch's end."""

    def _traced_macs(self) -> tuple[int, int] | None:
        """MACs of one example, before pruning and now, where a trace told them."""
        return None

    def _follow_removal(self, trainer: Any, pl_module: Any, plan: Plan) -> None:
        """A callback has removed something: follow the new shapes."""
        self._cost = None

    def _check_checkpoint(self, state: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
        """Refuse a checkpoint whose state of this callback doesn't fit its weights, before anything is loaded."""

    def _plan(self) -> Plan:
        """What has been removed so far."""
        return Plan({}, {})

    def _groups(self) -> Groups | None:
        """The groups of the model as it is now, where they are known."""
        return None

    def _sensitivity(self) -> Sensitivity | None:
        """Curves, where they were measured."""
        return None

    def _lowest(self) -> Mapping[str, float]:
        """The magnitudes below which weights were set to zero."""
        return {}

    def _release(self) -> None:
        """Take out of model and optimizers what was put there for this run."""

    def _why_nothing(self) -> str:
        """Why nothing has been pruned."""
        return f"amount={self.amount:g} rounds to nothing at all"

    def _has_effect(self) -> bool:
        """Whether anything has been pruned so far."""
        raise NotImplementedError

    def preview(self, epochs: int = 100) -> list[float]:
        """The fraction that is gone at the end of each epoch of a training of so many.

        Raises:
            PruningError: The schedule's window doesn't fit such a training.
        """
        if isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 1:
            raise PruningError(f"epochs must be a whole number of at least 1, got {epochs!r}")
        clock = Clock(self.start, self.end, max_epochs=epochs, max_steps=None, steps_per_epoch=1)
        clock.check()
        part = get_schedule(self.schedule, self.amount)
        return list(accumulate((self.amount * part(clock.progress(e, 0)) for e in range(1, epochs + 1)), max))

    # -- when -----------------------------------------------------------------------------------------------

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse what can be seen to be impossible before anything is set up."""
        check_files(trainer)
        if stage == "fit":
            known = {cls.__name__ for cls in type(trainer.strategy).__mro__}
            if not known & set(self.strategies):
                raise ConfigurationError(
                    f"{type(self).__name__} works with {', '.join(self.strategies)}, not with "
                    f"{type(trainer.strategy).__name__}, which shards parameters or keeps copies of them"
                )
            if trainer.max_epochs == -1 and trainer.max_steps == -1:
                self._resolve(trainer)
            twins = [c for c in trainer.callbacks if type(c) is type(self)]
            if any(twins.count(c) > 1 for c in twins):
                raise ConfigurationError(f"the same {type(self).__name__} is in the Trainer's callbacks twice")

    def _resolve(self, trainer: Any) -> None:
        try:
            self._clock = Clock.of(trainer, self.start, self.end)
        except PruningError as error:
            raise ConfigurationError(f"{type(self).__name__}: {error}") from None

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Check the model; nothing is changed yet."""
        self.report_ = None
        self._cost = None
        self._dense_metric = None
        self._start(trainer, pl_module)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Place the schedule in the training, now that its length is known."""
        self._resolve(trainer)
        self._steps = trainer.global_step
        self._calls, self._measured = None, None
        if self._part == 0:  # else those of the dense model are known, also in a fit that goes on
            self._before = {}
        # Those of another run, and those that come once more.
        self.timeline_ = [moment for moment in self.timeline_ if moment.step <= trainer.global_step]

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Observe the first batch that runs the model: its parts, and their inputs."""
        if (self._calls is None or self._look_again(trainer)) and self._stack is None:
            self._stack = ModuleStack(pl_module)
            with waiting_interrupts():
                self._watching.enter_context(self._watch(trainer, pl_module))

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
        """The first batch's forward is over; manual optimization may still run other parts of the model."""
        if pl_module.automatic_optimization:
            self._end_watch(trainer, pl_module)

    def _end_watch(self, trainer: Any, pl_module: Any) -> None:
        if self._stack is not None:
            _close_watches(trainer)
            calls, self._stack = self._watched(pl_module), None
            self._calls = self._calls if calls is None else calls

    def _drop_watch(self, trainer: Any) -> None:
        """A batch that the user's hook has skipped ends without a word; what comes next must not be observed."""
        _close_watches(trainer)
        self._stack = None

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Observe training only."""
        self._drop_watch(trainer)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Observe training only; a metric of training is known now."""
        self._drop_watch(trainer)
        self._measure(trainer, pl_module)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Prune where the schedule says so: after the optimizer step, before validation."""
        if self._may_act(trainer):
            with waiting_interrupts():
                self._end_batch(trainer, pl_module, batch_idx)

    def _may_act(self, trainer: Any) -> bool:
        """Whether there may be something to do at the end of this batch; most batches are over at once."""
        if trainer.is_last_batch or trainer.max_steps != -1 or self.every != "epoch":
            return True
        return any(callback._stack is not None or callback._advanced for callback in pruning_callbacks(trainer))

    def _end_batch(self, trainer: Any, pl_module: Any, batch_idx: int) -> None:
        ours = pruning_callbacks(trainer)
        for callback in ours:  # before any of them changes what they have seen
            callback._end_watch(trainer, pl_module)
        ends = self._prune_if_due(trainer, pl_module, batch_idx)
        self._settle(trainer, pl_module)
        if ours[-1] is self and (ends or any(callback._advanced for callback in ours)):
            moment = self._moment(trainer, pl_module, batch_idx)
            self._remember(moment)
            self._log(trainer, pl_module, moment, epoch=ends)

    def _prune_if_due(self, trainer: Any, pl_module: Any, batch_idx: int) -> bool:
        """Prune if it is time to; whether the epoch or the training ends here."""
        assert self._clock is not None
        self._advanced = False
        last: bool = trainer.is_last_batch
        if not last and trainer.max_steps == -1 and self.every == "epoch":
            return False
        final = trainer.max_steps != -1 and trainer.global_step >= trainer.max_steps
        epochs: float = trainer.current_epoch + 1
        if not last:
            epochs = trainer.current_epoch + (batch_idx + 1) / trainer.num_training_batches
        # Several optimizers make several steps per batch: a multiple of `every` may be passed without being hit.
        passed = self.every != "epoch" and trainer.global_step // int(self.every) > self._steps // int(self.every)
        self._steps = trainer.global_step
        if last or final or passed:
            progress = self._clock.progress(epochs, trainer.global_step)
            self._progress, before = progress, self._part
            # A schedule never takes anything back: a second fit starts where the first one stopped.
            self._part = max(self._part, get_schedule(self.schedule, self.amount)(progress))
            self.amount_ = max(self.amount_, self.amount * self._part)
            if self._part > 0:
                self._look(trainer, pl_module)
                self._prune(trainer, pl_module, self.amount_)
            self._advanced = self._part > before
            if self._part > before:
                _tell_schedulers(trainer, last)
        return last or final

    def _look(self, trainer: Any, pl_module: Any) -> None:
        """Remember how large weights were before any of the callbacks has changed them."""
        if self.report and not any(callback._before for callback in pruning_callbacks(trainer)):
            whole = {name: w for name, w in weights_of(pl_module).items() if not hasattr(w, "device_mesh")}
            self._before = {name: magnitudes(weight) for name, weight in whole.items()}  # a shard doesn't tell

    def _speaks(self, trainer: Any) -> bool:
        """Of several pruning callbacks the last one logs and reports."""
        return pruning_callbacks(trainer)[-1] is self

    def _macs_of_one(self, trainer: Any) -> tuple[int | None, int] | None:
        """MACs of one example, before pruning (where only a trace knows them) and now; None where nothing tells."""
        if self._measured and self._measured[0] and self._cost:
            return None, self._cost.macs
        return next((macs for c in pruning_callbacks(trainer) if (macs := c._traced_macs())), None)

    def _moment(self, trainer: Any, pl_module: Any, batch_idx: int | None = None) -> Moment:
        """How things stand, after a batch or (None) whenever else."""
        if self._measured is None:
            self._measured = measurable(pl_module, self._calls or ())
        if self._cost is None:  # shapes have changed
            self._cost = cost_of_calls(pl_module, self._measured[0])
        nonzero = sum(int(p.count_nonzero()) for p in pl_module.parameters())
        macs = self._macs_of_one(trainer)
        epoch: float = trainer.current_epoch + 1
        if batch_idx is not None and not trainer.is_last_batch:
            epoch = trainer.current_epoch + (batch_idx + 1) / trainer.num_training_batches
        rates = [float(group["lr"]) for optimizer in trainer.optimizers for group in optimizer.param_groups]
        return Moment(
            epoch,
            trainer.global_step,
            max(callback.amount_ for callback in pruning_callbacks(trainer)),
            1 - nonzero / self._cost.params if self._cost.params else 0.0,
            self._cost.params,
            None if macs is None else macs[1],
            lr=rates[0] if rates else None,
        )

    def _remember(self, moment: Moment) -> None:
        self.timeline_ = [each for each in self.timeline_ if each.step < moment.step] + [moment]
        if len(self.timeline_) > MOMENTS:
            between = [each for each in self.timeline_[:-1] if each.metric is None][::2]
            self.timeline_ = [each for each in self.timeline_ if each not in between]

    def _measure(self, trainer: Any, pl_module: Any) -> None:
        """Put the monitored metric, if it is new, to the moment that it was measured at."""
        if not self._speaks(trainer) or trainer.sanity_checking or trainer.state.fn != "fit":
            return
        found = trainer._results.metrics(False)["callback"].get(self.monitor) if trainer._results is not None else None
        if found is None or self._clock is None:
            return
        last = self.timeline_[-1] if self.timeline_ else None
        if last is None or last.step != trainer.global_step:  # a validation in the middle of an epoch
            done = trainer.fit_loop.epoch_loop.batch_progress.current.ready
            last = self._moment(trainer, pl_module, done - 1)
        self._remember(replace(last, metric=float(found)))

    def _log(self, trainer: Any, pl_module: Any, moment: Moment, *, epoch: bool) -> None:
        """Tell the loggers: with the epoch's metrics, or at once where the epoch goes on."""
        values = {"sparsity": moment.sparsity, "params": float(moment.params)}
        if moment.macs is not None:
            values["macs"] = float(moment.macs)
        if epoch:
            pl_module.log_dict(values, prog_bar=True, on_step=False, on_epoch=True, sync_dist=True, batch_size=1)
        else:
            log_scalars(trainer, values)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Remember the metric, also that of the model while it is still whole."""
        self._measure(trainer, pl_module)
        whole = all(callback._part == 0 for callback in pruning_callbacks(trainer))
        if whole and not trainer.sanity_checking and self.monitor in trainer.callback_metrics:
            self._dense_metric = float(trainer.callback_metrics[self.monitor])

    def state_dict(self) -> dict[str, Any]:
        """How far pruning is, and what the report will tell of its past: plain data."""
        return {
            "amount": self.amount_,
            "part": self._part,
            "timeline": [asdict(moment) for moment in self.timeline_],
            "before": {name: list(counts) for name, counts in self._before.items()},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what a checkpoint knows."""
        timeline = timeline_of(state_dict.get("timeline", ()))
        before = counts_of(state_dict.get("before", {}))
        self.amount_, self.timeline_, self._before = state_dict["amount"], timeline, before
        self._part = state_dict.get("part", self.amount_ / self.amount if self.amount else 0.0)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Say what was gained."""
        if self.report and trainer.is_global_zero and self._speaks(trainer):
            # Those that change the architecture share one plan.
            ours = pruning_callbacks(trainer)
            plan = next((own for c in ours if (own := c._plan())), Plan({}, {}))
            searched = (getattr(callback, "plan_", None) for callback in trainer.callbacks)
            activations = next((p.activations for p in searched if isinstance(p, Plan) and p.activations), None)
            metric = trainer.callback_metrics.get(self.monitor)
            report = build_report(
                pl_module,
                plan,
                *(self._measured or ((), ())),
                macs=self._macs_of_one(trainer),
                metric=self.monitor,
                dense_value=self._dense_metric,
                pruned_value=None if metric is None else float(metric),
                groups=next((groups for c in ours if (groups := c._groups()) is not None), None),
                activations=activations,
                timeline=self.timeline_,
                sensitivity=next((found for c in ours if (found := c._sensitivity()) is not None), None),
                before=next((c._before for c in ours if c._before), {}),
                thresholds={name: lowest for c in ours for name, lowest in c._lowest().items()},
            )
            for callback in ours:
                callback.report_ = report
            log_figures(trainer, report)
            print(f"\n{report}", flush=True)  # asked for, so not left to the level of a logger
            borrowed = needs_library(pl_module)
            if borrowed:
                listed = ", ".join(path or "the module itself" for path in borrowed)
                print(f"Unpickling this model needs lightning_prune, for the forward of {listed}.", flush=True)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Say so if the schedule did not come to its end, or had no effect; also where no batch was trained on."""
        if self._part < 1:
            over = "the schedule never gives 1" if self._progress >= 1 else "training ended before the schedule did"
            rank_zero_warn(
                f"{type(self).__name__}: {over} (end={self.end!r}): {self.amount_:.3g} of amount={self.amount:g} was "
                "asked for so far",
                category=NoEffectWarning,
            )
        elif not self._has_effect():
            rank_zero_warn(f"{type(self).__name__}: {self._why_nothing()}", category=NoEffectWarning)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Leave nothing of ours in the model."""
        with waiting_interrupts():
            self._drop_watch(trainer)
            self._release()
            self._calls, self._measured = None, None
        check_no_files(trainer)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Leave nothing of ours in the model."""
        with waiting_interrupts():
            self._drop_watch(trainer)
            self._release()
        check_no_files(trainer)
