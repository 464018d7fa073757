"""ActivationSearch: which activation function stands where is chosen while Lightning trains."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn
from torch.utils.data import DataLoader
from torch.utils.hooks import RemovableHandle

from lightning_prune._lightning import accept_both_lightnings
from lightning_prune.activations.apply import changes_for
from lightning_prune.activations.candidates import DEFAULT_CHOICES, Choice, check_choices
from lightning_prune.activations.mixture import UNITS, Mixture, draw_units
from lightning_prune.activations.sites import SiteFinder, Sites
from lightning_prune.activations.trials import import_optuna, sample, search
from lightning_prune.callbacks._activation_mixture import Fitting, MixtureOptions, check_mixture, warn_varying
from lightning_prune.callbacks._activation_report import ActivationReport, Outcome, SiteReport, tabulate
from lightning_prune.callbacks._activation_trials import Trials
from lightning_prune.callbacks._base import ConfigurationError, averaged_copies
from lightning_prune.callbacks._clock import Clock, Point, check_window
from lightning_prune.callbacks._files import check_files, check_no_files
from lightning_prune.callbacks._reporting import Reporting
from lightning_prune.callbacks._trials import Rates, ShortRuns, aside, fetch, loss_on, validation_batches
from lightning_prune.errors import NoEffectWarning, PruningError
from lightning_prune.pruning.plan import Plan
from lightning_prune.pruning.prunable import ACTIVATIONS, Prunable
from lightning_prune.pruning.select import check_choice, globs

__all__ = ["ActivationReport", "ActivationSearch", "SiteReport"]

MODES = ("mixture", "trial")
STRATEGIES = ("greedy", "optuna")
THRESHOLDS = (False, True, "site", "channel")
QUANTILES = (0.1, 0.25, 0.5)
"""Of a ReLU's positive inputs: the thresholds that are tried."""

COSTS, AT_MOST = {"mixture": 0.25, "trial": 1.0}, 30
"""What short runs may cost unless told otherwise: this part of the training's steps, so many epochs at most."""

CHECKED_ON = 20
"""Training batches of runs that keep theirs."""

TRAVEL, FASTEST = 4.0, 0.05
"""How far a mixture's weight may move in a search, in units of the softmax's logits at first; and in one step."""


class ActivationSearch(Reporting[ActivationReport], Callback):
    """Finds which activation function suits each place of a model, and leaves the model with it.

    Sites are activation modules (one that is used twice is two sites) and functions (``F.relu``, ``torch.tanh``,
    ``x.relu_()``) in any forward. Gates, softmax and what gives the model's output are left alone.

    ``mode="trial"``: before the first batch, short runs from the same weights: the whole model with each candidate at
    all places, fewer and fewer of them for longer and longer; then what is second best at single places of a model
    that has learned with the best; what helps there counts if it also does from the start. Each run is the training
    in small, learning rates included. Training then starts from the first weights, so that all of it is with the
    choice. All runs together have as many steps as the training, if that isn't very long (``trial_cost``).

    ``mode="mixture"``: from the second batch on each site runs a weighted mean of the candidates, scaled to the same
    spread. The weights are a softmax at a falling temperature; they start with half on what the user has and are
    fitted on held-out batches where there is a validation loader, else on the training batches. What has little
    weight is dropped. At ``search_until`` the best stays alone, and a site that does worse than what the user had,
    each after a few steps from the same weights, goes back.

    The mixture's weights are in an optimizer of the callback's own (Adam without weight decay): one more group in the
    user's optimizer would change what its scheduler counts and what its checkpoint holds, and LBFGS takes one only.

    While it searches, a step keeps what all candidates need for their backward, of a held-out batch too: validation
    batches much larger than the training's may be what memory ends at.

    Fitting on held-out batches and short runs call ``training_step`` aside from training: nothing is logged, and
    buffers, metrics and random state are put back.

    Args:
        choices: Names of candidates.
        mode: ``"mixture"`` or ``"trial"``.
        search_until: Where the search ends: a fraction of training (float) or an epoch (int). Mixture only.
        per: What shares one choice: each ``"site"``, each ``"layer"`` (the module whose forward calls it) or the
            whole ``"model"``.
        threshold: Search parameters too: a threshold for ReLU, the slope of leaky ReLU, beta of swish. True or
            ``"site"``: one number per site; ``"channel"``: one per channel (dimension 1 of 2, 4 or 5).
        budget: How many units may change at most; None: all.
        include: Globs on sites' names (None: all).
        exclude: Globs on sites' names.
        gates: Search gates and outputs too.
        strategy: Of trials: ``"greedy"`` goes through the sites, ``"optuna"`` samples (extra ``search``).
        trials: Runs that optuna may make.
        trial_steps: Optimizer steps of every short run, with every candidate tried at every place; 0: compare at once.
            None: longer ones for what does well, within ``trial_cost``.
        trial_cost: Optimizer steps of all short runs together, as a part of the training's. None: 1.0 for trials,
            0.25 for what the mixture is checked with at its end, and not more than of 30 epochs.
        held_out: Validation batches that are used; 0: fit on training batches, check nothing.
        lr: Learning rate of the mixture's weights. None: what lets none of them win before the end of the search.
        value_lr: Learning rate of slopes, shifts and betas.
        temperature: Of the softmax at the end; it starts at 1.
        drop_below: An option with less than this part of an equal share is dropped.
        report: Print a table after the search; it is in ``report_`` too.

    Attributes:
        plan_: What was chosen; ``plan_.activations``.
        sites_: The sites that are searched (None before the first batch).
        report_: Which site chose what, weights over time, losses with and without; None before the search has ended and
            on other ranks than 0.
        history_: The weights at each epoch's end, or the trials.

    Raises:
        PruningError: Bad arguments, at once; arguments that don't fit the Trainer or the model, before anything
            is changed.

    Source: Liu et al., 2019, arXiv:1806.09055 (mixtures, first order); Noy et al., 2019, arXiv:1904.04123 (annealing,
    dropping); Ramachandran et al., 2017, arXiv:1710.05941 (searching activations); Jamieson & Talwalkar, 2016,
    arXiv:1502.07943 (fewer candidates, longer runs).
    """

    strategies: ClassVar[tuple[str, ...]] = ("SingleDeviceStrategy", "DDPStrategy")

    def __init__(
        self,
        choices: str | Sequence[str] = DEFAULT_CHOICES,
        *,
        mode: str = "mixture",
        search_until: Point = 0.5,
        per: str = "site",
        threshold: bool | str = False,
        budget: int | None = None,
        include: str | list[str] | None = None,
        exclude: str | list[str] | None = None,
        gates: bool = False,
        strategy: str = "greedy",
        trials: int = 50,
        trial_steps: int | None = None,
        trial_cost: float | None = None,
        held_out: int = 8,
        lr: float | None = None,
        value_lr: float = 0.01,
        temperature: float = 0.1,
        drop_below: float = 0.1,
        report: bool = True,
    ) -> None:
        accept_both_lightnings(ActivationSearch, "Callback")
        self._names = check_choices(choices)
        check_choice("mode", mode, MODES)
        check_window(0.0, search_until)
        check_choice("per", per, UNITS)
        if threshold not in THRESHOLDS:
            raise PruningError(f"threshold must be one of {', '.join(map(repr, THRESHOLDS))}, got {threshold!r}")
        check_choice("strategy", strategy, STRATEGIES)
        for name, value, least in (
            ("budget", budget, 1), ("trials", trials, 1), ("trial_steps", trial_steps, 0), ("held_out", held_out, 0)
        ):  # fmt: skip
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise PruningError(f"{name} must be a whole number of at least {least}, got {value!r}")
        for name, number in (
            ("lr", FASTEST if lr is None else lr), ("value_lr", value_lr), ("temperature", temperature),
            ("trial_cost", COSTS[mode] if trial_cost is None else trial_cost),
        ):  # fmt: skip
            if isinstance(number, bool) or not isinstance(number, int | float) or not 0 < number < math.inf:
                raise PruningError(f"{name} must be a positive number, got {number!r}")
        if isinstance(drop_below, bool) or not isinstance(drop_below, int | float) or not 0 <= drop_below < 1:
            raise PruningError(f"drop_below must be a number in [0, 1), got {drop_below!r}")
        globs("include", include)
        globs("exclude", exclude)
        if mode == "trial" and strategy == "optuna":
            import_optuna()
        self.choices, self.mode, self.search_until, self.per = choices, mode, search_until, per
        self.threshold, self.budget, self.include, self.exclude = threshold, budget, include, exclude
        self.gates, self.strategy, self.trials = gates, strategy, trials
        self.trial_steps, self.trial_cost = trial_steps, trial_cost
        self.held_out, self.lr, self.value_lr, self.temperature = held_out, lr, value_lr, temperature
        self.drop_below, self.report = drop_below, report
        self.plan_ = Plan({}, {})
        self.sites_: Sites | None = None
        self.history_: list[dict[str, Any]] = []
        self._reset()
        self._key: str | None = None

    def _reset(self) -> None:
        """Before any search."""
        self.plan_ = Plan({}, {})
        self.sites_ = None
        self.history_ = []
        self._done = False
        self._search: dict[str, Any] | None = None
        self._fitting: Fitting | None = None
        self._restored = False
        self._found_in: weakref.ref[nn.Module] | None = None
        self._watching = ExitStack()
        self._finder: SiteFinder | None = None
        self._batches: tuple[Any, list[Any]] = ([], [])
        self._clock: Clock | None = None
        self._rate = FASTEST if self.lr is None else self.lr
        self._state_hooks: list[RemovableHandle] = []

    @property
    def _mixture(self) -> Mixture | None:
        return None if self._fitting is None else self._fitting.mixture

    @property
    def state_key(self) -> str:
        """Distinguishes callbacks of one class by what they search."""
        if self._key is None:
            self._key = self._generate_state_key(include=self.include, exclude=self.exclude)
        return self._key

    # -- before training ------------------------------------------------------------------------------------

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse what can be seen to be impossible; make a checkpoint's activations come with its weights."""
        check_files(trainer)
        if stage == "fit":
            known = {cls.__name__ for cls in type(trainer.strategy).__mro__}
            if not known & set(self.strategies):
                raise ConfigurationError(
                    f"ActivationSearch works with {', '.join(self.strategies)}, not with "
                    f"{type(trainer.strategy).__name__}"
                )
            if "MultiProcessing" in type(trainer.strategy.launcher).__name__:
                raise ConfigurationError(
                    "ActivationSearch can't bring a changed model back from forked or spawned processes; "
                    "start them with strategy='ddp'"
                )
            if sum(isinstance(other, ActivationSearch) for other in trainer.callbacks) > 1:
                raise ConfigurationError("only one ActivationSearch callback can be in the Trainer's callbacks")
        self._remove_hooks()
        # Functions, not methods: a copy of the module must not copy this callback.
        self._state_hooks = [
            pl_module._register_state_dict_hook(lambda *args: self._describe(*args)),
            pl_module._register_load_state_dict_pre_hook(lambda *args: self._rebuild(*args), with_module=True),
        ]

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Go on with what a checkpoint or an earlier fit of this module found, or start anew."""
        same = self._found_in is not None and self._found_in() is pl_module
        if not (self._restored or same):
            hooks, self._state_hooks = self._state_hooks, []
            self._reset()
            self._state_hooks = hooks
        self.report_ = self._report if same else None  # a search that is over has told what it has to tell
        self._found_in = weakref.ref(pl_module)
        self._restored = False
        if self.mode == "trial" and not self._done:
            if not pl_module.automatic_optimization or len(trainer.optimizers) != 1:
                raise ConfigurationError(
                    "ActivationSearch: mode='trial' makes steps with the module's optimizer, so it needs automatic "
                    "optimization and one optimizer; use mode='mixture'"
                )
            if trainer.global_step:
                raise ConfigurationError("ActivationSearch: mode='trial' searches before the first step, which is over")

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Place the search in the training; trials are made now."""
        if self._done:
            return
        try:
            self._clock = Clock.of(trainer, 0.0, self.search_until, check=self.mode == "mixture")
        except PruningError as error:
            raise ConfigurationError(f"ActivationSearch: {error}".replace("end=", "search_until=")) from None
        if self.lr is None and self.mode == "mixture":
            # Weights that move fast choose what learns fast: all would be decided in the first hundreds of steps.
            updates = self._clock.steps_until(self.search_until) * trainer.accumulate_grad_batches
            self._rate = min(TRAVEL / updates, FASTEST) if math.isfinite(updates) else FASTEST
        loaders = trainer.fit_loop._combined_loader.flattened
        if len(loaders) > 1 and self.mode == "trial":
            raise ConfigurationError(
                "ActivationSearch: mode='trial' works with one training loader; use mode='mixture'"
            )
        # A module of several loaders has batches of its own make, and one that steps by itself can't be run aside.
        if pl_module.automatic_optimization and len(loaders) == 1:
            held = validation_batches(trainer, self.held_out, pl_module) if self.held_out else []
            # Runs of a given length go through few batches again and again; others are long enough to learn those.
            few = CHECKED_ON if self.trial_steps is None else self.trial_steps
            anew = self.mode == "trial" or (self.trial_steps is None and isinstance(loaders[0], DataLoader))
            self._batches = loaders[0] if anew else fetch(loaders[0], few if held else 0, pl_module), held
        if self._search is not None:
            self._resume(pl_module)
        elif self.mode == "trial":
            self._try(trainer, pl_module)

    def _options(self) -> MixtureOptions:
        return MixtureOptions(
            self._names, self.per, self.threshold, self._rate, self.value_lr, self.temperature, self.drop_below
        )

    def _resume(self, pl_module: Any) -> None:
        assert self._search is not None
        self._fitting = Fitting.from_state(pl_module, self._search, self._options())
        self.sites_ = self._fitting.sites
        self._search = None

    # -- finding sites --------------------------------------------------------------------------------------

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Observe the first batch that runs the model."""
        if not self._done and self._mixture is None and self._finder is None and self.mode == "mixture":
            self._finder = self._new_finder(pl_module)
            self._watching.enter_context(self._finder.watch())

    def _new_finder(self, pl_module: Any) -> SiteFinder:
        wanted = QUANTILES if self.threshold else ()
        return SiteFinder(pl_module, quantiles=wanted, per_channel=self.threshold == "channel")

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
        """The first batch's forward is over; manual optimization may still run other parts of the model."""
        if self._finder is not None and pl_module.automatic_optimization:
            self._watching.close()
            self._take(trainer, pl_module, self._finder)

    def _take(self, trainer: Any, pl_module: Any, finder: SiteFinder) -> Mixture | None:
        """Draw the units from what was observed; None: it ran nothing."""
        if not finder.runs and not finder.outside:
            return None
        try:
            sites = finder.sites().pick(globs("include", self.include), globs("exclude", self.exclude), self.gates)
        except PruningError as error:
            raise ConfigurationError(f"ActivationSearch: {error}") from None
        for owner in sites.varying:
            warn_varying(owner)
        thresholds = finder.thresholds(sites) if self.threshold else None
        sites, thresholds = trainer.strategy.broadcast((sites, thresholds))
        units = draw_units(sites, self._names, self.per, thresholds)
        if all(len(unit.options) == 1 for unit in units):
            raise ConfigurationError(
                f"ActivationSearch: every site has {', '.join(self._names)} already, and there is no other choice"
            )
        self.sites_ = sites
        return Mixture(
            sites, units, device=pl_module.device, per_channel=self.threshold == "channel", learn=bool(self.threshold)
        )

    # -- the mixture ----------------------------------------------------------------------------------------

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Fit the mixture's weights; end the search where it is due: after the step, before validation."""
        if self._done or self.mode == "trial":
            return
        if self._finder is not None:
            self._watching.close()
            finder, self._finder = self._finder, None
            mixture = self._take(trainer, pl_module, finder)
            if mixture is None:
                return
            assert self.sites_ is not None
            self._fitting = Fitting(pl_module, self.sites_, mixture, self._options())
        else:
            assert self._fitting is not None
            self._fitting.step(trainer, pl_module, self._batches[1])
            self.sites_ = self._fitting.sites
        assert self._clock is not None
        epochs: float = trainer.current_epoch + 1
        if not trainer.is_last_batch:
            epochs = trainer.current_epoch + (batch_idx + 1) / trainer.num_training_batches
        progress = self._clock.progress(epochs, trainer.global_step)
        self._fitting.progress(progress)
        if trainer.is_last_batch or progress >= 1:
            self.history_.append({"step": trainer.global_step, "weights": self._fitting.mixture.table()})
        if progress >= 1:
            self._commit_best(trainer, pl_module)

    # -- trials ---------------------------------------------------------------------------------------------

    def _try(self, trainer: Any, pl_module: Any) -> None:
        """Short runs from the weights as they are."""
        assert self._clock is not None
        loader, held = self._batches
        finder = self._new_finder(pl_module)
        first = fetch(loader, 1, pl_module)
        if not first:
            raise ConfigurationError("ActivationSearch: the training loader gave no batch")
        with aside(pl_module), torch.no_grad(), finder.watch():
            loss_on(trainer, pl_module, first[0])
            if held:
                pl_module.eval()
                loss_on(trainer, pl_module, held[0])
        mixture = self._take(trainer, pl_module, finder)
        if mixture is None:
            raise ConfigurationError("ActivationSearch: no activation site to search; the first batch ran no module")
        total = self._total()
        if self.trial_steps is None and math.isinf(total):  # loaders without a length, too
            raise ConfigurationError(
                "ActivationSearch: this training has no known length, of which short runs could take a part; give "
                "trial_steps"
            )
        length = f"{total:,.0f} steps" if self.trial_steps is None else f"{self.trial_steps} steps each"
        rank_zero_info(f"ActivationSearch: short runs of {length} before the training starts")
        rates = Rates(trainer, pl_module, self._clock.steps, self._clock.steps_per_epoch)
        short = ShortRuns(trainer, pl_module, loader, held or fetch(loader, CHECKED_ON, pl_module), rates)
        runs = Trials(short, mixture, partial(self._with, pl_module))
        options: dict[str, Any] = {"steps": self.trial_steps, "total": total, "budget": self.budget}
        if self.strategy == "greedy":
            found = search(mixture.units, runs, **options)
        else:
            found = sample(mixture.units, runs, trials=self.trials, **options)
        runs.warn()
        self.history_ = runs.history
        self._commit(
            trainer, pl_module, Outcome(mixture.choices(found.picks), {}, found.loss, found.without, short.steps)
        )

    def _total(self) -> float:
        """Steps that all short runs together may make."""
        assert self._clock is not None
        if self.trial_cost is not None:
            return self.trial_cost * self._clock.steps
        # Many a training has no end but the one that early stopping makes.
        return COSTS[self.mode] * min(self._clock.steps, AT_MOST * self._clock.steps_per_epoch)

    @contextmanager
    def _with(self, pl_module: Any, choices: Mapping[str, Choice]) -> Iterator[None]:
        """Inside, the model has these choices."""
        plan = self._plan_of(pl_module, choices)
        plan.apply(pl_module)
        try:
            yield
        finally:
            plan.take_back(pl_module)

    def _plan_of(self, pl_module: Any, choices: Mapping[str, Choice]) -> Plan:
        assert self.sites_ is not None
        return Plan({}, {}, activations=changes_for(pl_module, self.sites_, choices))

    # -- the end of the search ------------------------------------------------------------------------------

    def _commit_best(self, trainer: Any, pl_module: Any) -> None:
        """Keep the best option of each site, alone, where it does no worse than what the user had."""
        fitting = self._fitting
        assert fitting is not None
        mixture = fitting.mixture
        fitting.close()
        chosen = mixture.best()
        if self.budget is not None:
            gains = {u: max(mixture.weights(u).tolist()) for u in range(len(mixture.units))}
            kept = sorted(gains, key=lambda u: -gains[u] * any(n in chosen for n in mixture.units[u].sites))
            names = {name for u in kept[: self.budget] for name in mixture.units[u].sites}
            chosen = {name: choice for name, choice in chosen.items() if name in names}
        chosen = trainer.strategy.broadcast(chosen)
        training, held = self._batches
        outcome = Outcome(chosen)
        if held and pl_module.automatic_optimization and len(trainer.optimizers) == 1:
            runs = ShortRuns(trainer, pl_module, training, held)
            steps = self.trial_steps
            if steps is None:
                total = min(self._total(), trainer.global_step)  # a training that ends early has not made more
                steps = max(int(total / (len(mixture.units) + 2)), 1)

            def loss(choices: Mapping[str, Choice]) -> float:
                return runs.loss(partial(self._with, pl_module, choices), steps)

            outcome = replace(check_mixture(mixture, chosen, loss), steps=runs.steps)
        self._fitting = None
        self._commit(trainer, pl_module, outcome)

    def _commit(self, trainer: Any, pl_module: Any, outcome: Outcome) -> None:
        """Make the choices part of the model, and tell."""
        assert self.sites_ is not None
        plan = self._plan_of(pl_module, outcome.chosen)
        for model in (pl_module, *averaged_copies(trainer)):
            plan.apply(model)
        self.plan_ = self.plan_.then(plan)
        if isinstance(pl_module, Prunable):
            pl_module.activation_plan = self.plan_
        self._done = True
        self._batches = [], []
        if trainer.is_global_zero:
            self.report_ = tabulate(self.sites_, outcome, self.history_)
            if self.report:
                print(f"\n{self.report_}", flush=True)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """A training that ends before the search does keeps the best so far: its weights are used to it."""
        if self._mixture is not None:
            rank_zero_warn(
                f"ActivationSearch: training ended before the search did (search_until={self.search_until!r}); "
                "the best so far stays",
                category=NoEffectWarning,
            )
            self._commit_best(trainer, pl_module)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Say so if nothing has changed."""
        if not self._done:
            rank_zero_warn("ActivationSearch: no training batch has run the model", category=NoEffectWarning)

    # -- evaluation, checkpoints, the end -------------------------------------------------------------------

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """A checkpoint of the middle of a search is measured as it was: with the mixture."""
        self._watching.close()
        self._finder = None
        if self._search is not None and self._mixture is None and trainer.state.fn != "fit":
            self._resume(pl_module)

    on_test_start = on_validation_start
    on_predict_start = on_validation_start

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Leave nothing of ours in the model."""
        self._release()
        check_no_files(trainer)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Leave nothing of ours in the model."""
        self._release()
        check_no_files(trainer)

    def _release(self) -> None:
        self._watching.close()
        if self._fitting is not None:
            self._search = self._fitting.state_dict()  # a second fit goes on where this one stopped
            self._fitting.close()
            self._fitting = None
        self._finder = None
        self._batches = [], []
        self._remove_hooks()

    def _remove_hooks(self) -> None:
        for hook in self._state_hooks:
            hook.remove()
        self._state_hooks = []

    def state_dict(self) -> dict[str, Any]:
        """The plan and, while the search lasts, the mixture: plain data and tensors."""
        return {
            "plan": self.plan_.to_dict(),
            "done": self._done,
            "history": list(self.history_),
            "search": self._search if self._fitting is None else self._fitting.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what a checkpoint found."""
        self.plan_ = Plan.from_dict(state_dict["plan"])
        self._done = state_dict["done"]
        self.history_ = list(state_dict["history"])
        self._search = state_dict["search"]
        self._restored = True

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Describe the state dict of a checkpoint that is saved after ``fit`` too."""
        metadata = getattr(checkpoint["state_dict"], "_metadata", {})
        metadata.setdefault("", {})[ACTIVATIONS] = self.state_dict()

    def _describe(self, module: nn.Module, state_dict: Any, prefix: str, metadata: dict[str, Any]) -> None:
        metadata[ACTIVATIONS] = self.state_dict()

    def _rebuild(self, module: nn.Module, state_dict: Any, prefix: str, metadata: dict[str, Any], *args: Any) -> None:
        """Give the module the activations that a state dict was saved with, before it is loaded."""
        if ACTIVATIONS not in metadata:
            return
        described = metadata[ACTIVATIONS]
        plan = Plan.from_dict(described["plan"])
        if isinstance(module, Prunable) and module.activation_plan == plan:  # it has seen to it itself
            self.plan_, self._found_in = plan, weakref.ref(module)
        same = self._found_in is not None and self._found_in() is module
        if plan != self.plan_ or not same:
            if same:
                self.plan_.take_back(module)
            plan.apply(module)
        self._found_in = weakref.ref(module)
        if "search" in described:
            self.load_state_dict(described)
        else:  # a module has described itself
            self.plan_, self._done = plan, True
