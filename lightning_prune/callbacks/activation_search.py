"""ActivationSearch: which activation function stands where is chosen while Lightning trains."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_prune._lightning import accept_both_lightnings
from lightning_prune.activations.apply import changes_for
from lightning_prune.activations.candidates import DEFAULT_CHOICES, Choice, check_choices
from lightning_prune.activations.mixture import UNITS, Mixture, draw_units, installed
from lightning_prune.activations.sites import SiteFinder, Sites
from lightning_prune.callbacks._base import ConfigurationError, averaged_copies
from lightning_prune.callbacks._clock import Clock, Point, check_window
from lightning_prune.callbacks._files import check_files, check_no_files
from lightning_prune.callbacks._reporting import Reporting
from lightning_prune.callbacks._trials import ShortRuns, aside, fetch, loss_on, validation_batches
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


@dataclass(frozen=True)
class SiteReport:
    """What was found for one site.

    Attributes:
        site: Its name.
        before: What the user had there.
        after: What is there now.
        loss: Held-out loss with the choice, after the short run that it was checked with; None: not checked.
        loss_without: The same with what the user had at this site.
        note: Why it is as it is.
    """

    site: str
    before: str
    after: str
    loss: float | None = None
    loss_without: float | None = None
    note: str = ""


@dataclass(frozen=True)
class ActivationReport:
    """The outcome of a search; printable.

    Attributes:
        sites: One row per site.
        history: Mixture: at each epoch's end the weight of every option, by unit; trial: the loss of every run.
        loss: Held-out loss with all choices; None: not measured.
        loss_without: With what the user had everywhere.
    """

    sites: tuple[SiteReport, ...]
    history: tuple[dict[str, Any], ...] = ()
    loss: float | None = None
    loss_without: float | None = None

    def __str__(self) -> str:
        head = ("site", "before", "after", "loss", "without", "")
        rows = [(r.site, r.before, r.after, _number(r.loss), _number(r.loss_without), r.note) for r in self.sites]
        rows.append(("all", "", "", _number(self.loss), _number(self.loss_without), ""))
        widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in (head, *rows)]
        return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


class ActivationSearch(Reporting[ActivationReport], Callback):
    """Finds which activation function suits each place of a model, and leaves the model with it.

    Sites are activation modules (one that is used twice is two sites) and functions (``F.relu``, ``torch.tanh``,
    ``x.relu_()``) in any forward. Gates, softmax and what gives the model's output are left alone.

    ``mode="mixture"``: from the second batch on each site runs a weighted mean of the candidates, scaled to the same
    spread. The weights are a softmax at a falling temperature; they start with half on what the user has and are
    fitted on held-out batches where there is a validation loader, else on the training batches. What has little
    weight is dropped. At ``search_until`` the best stays alone, and a site that does worse than what the user had,
    each after a few steps from the same weights, goes back.

    ``mode="trial"``: before the first batch, short runs from the same weights, one per candidate.

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
        trial_steps: Optimizer steps of a short run; 0: compare at once.
        held_out: Validation batches that are used; 0: fit on training batches, check nothing.
        lr: Learning rate of the mixture's weights.
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
    dropping); Ramachandran et al., 2017, arXiv:1710.05941 (searching activations).
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
        trial_steps: int = 20,
        held_out: int = 8,
        lr: float = 0.05,
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
        for name, number in (("lr", lr), ("value_lr", value_lr), ("temperature", temperature)):
            if isinstance(number, bool) or not isinstance(number, int | float) or not 0 < number < math.inf:
                raise PruningError(f"{name} must be a positive number, got {number!r}")
        if isinstance(drop_below, bool) or not isinstance(drop_below, int | float) or not 0 <= drop_below < 1:
            raise PruningError(f"drop_below must be a number in [0, 1), got {drop_below!r}")
        globs("include", include)
        globs("exclude", exclude)
        if mode == "trial" and strategy == "optuna":
            _optuna()
        self.choices, self.mode, self.search_until, self.per = choices, mode, search_until, per
        self.threshold, self.budget, self.include, self.exclude = threshold, budget, include, exclude
        self.gates, self.strategy, self.trials, self.trial_steps = gates, strategy, trials, trial_steps
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
        self._updates = 0
        self._search: dict[str, Any] | None = None
        self._mixture: Mixture | None = None
        self._adam: torch.optim.Optimizer | None = None
        self._restored = False
        self._found_in: weakref.ref[nn.Module] | None = None
        self._mixing = ExitStack()
        self._watching = ExitStack()
        self._finder: SiteFinder | None = None
        self._batches: tuple[list[Any], list[Any]] = ([], [])
        self._varying: set[str] = set()
        self._clock: Clock | None = None
        self._state_hooks: list[RemovableHandle] = []

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
            self._clock = Clock.of(trainer, 0.0, self.search_until)
        except PruningError as error:
            raise ConfigurationError(f"ActivationSearch: {error}".replace("end=", "search_until=")) from None
        loaders = trainer.fit_loop._combined_loader.flattened
        if len(loaders) > 1 and self.mode == "trial":
            raise ConfigurationError(
                "ActivationSearch: mode='trial' works with one training loader; use mode='mixture'"
            )
        # A module of several loaders has batches of its own make, and one that steps by itself can't be run aside.
        if pl_module.automatic_optimization and len(loaders) == 1:
            held = validation_batches(trainer, self.held_out, pl_module) if self.held_out else []
            wanted = self.trial_steps if held or self.mode == "trial" else 0
            self._batches = fetch(loaders[0], max(wanted, int(self.mode == "trial")), pl_module), held
        if self._search is not None:
            self._resume(pl_module)
        elif self.mode == "trial":
            self._try(trainer, pl_module)

    def _resume(self, pl_module: Any) -> None:
        assert self._search is not None
        self.sites_ = Sites.from_dict(self._search["all_sites"])
        self._start(pl_module, Mixture.from_state(self.sites_, self._search["mixture"], pl_module.device))
        assert self._adam is not None
        self._adam.load_state_dict(self._search["adam"])
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
            self._warn_varying(owner)
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

    def _warn_varying(self, owner: str) -> None:
        rank_zero_warn(
            f"ActivationSearch: the activation calls in {owner or 'the model itself'} differ from run to run, so all "
            "calls of one function there share one choice"
        )

    # -- the mixture ----------------------------------------------------------------------------------------

    def _start(self, pl_module: Any, mixture: Mixture) -> None:
        """Let the model run the mixture."""
        assert self.sites_ is not None
        self._mixture = mixture
        groups: list[dict[str, Any]] = [{"params": mixture.alphas, "lr": self.lr}]
        if mixture.values:
            groups.append({"params": list(mixture.values.values()), "lr": self.value_lr})
        self._adam = torch.optim.Adam(groups, betas=(0.5, 0.999), weight_decay=0.0)
        self._mixing.enter_context(installed(pl_module, self.sites_, mixture, self._count))

    def _count(self, owner: str, training: bool, counts: Mapping[str, int]) -> None:
        """A forward has run: were its calls those that were observed?"""
        assert self.sites_ is not None
        expected: dict[str, int] = {}
        for function, _ in self.sites_.calls.get(owner, ()):
            if function is not None:
                expected[function] = expected.get(function, 0) + 1
        seen = {name: count for name, count in counts.items() if name and count}
        if owner not in self.sites_.varying and seen != expected:
            self._varying.add(owner)

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
            self._start(pl_module, mixture)
        else:
            self._fit(trainer, pl_module)
        assert self._clock is not None
        assert self._mixture is not None
        epochs: float = trainer.current_epoch + 1
        if not trainer.is_last_batch:
            epochs = trainer.current_epoch + (batch_idx + 1) / trainer.num_training_batches
        progress = self._clock.progress(epochs, trainer.global_step)
        self._mixture.temperature = float(self.temperature**progress)
        self._mixture.matching = 1.0 - progress
        if trainer.is_last_batch or progress >= 1:
            self.history_.append({"step": trainer.global_step, "weights": self._mixture.table()})
        if progress >= 1:
            self._commit_best(trainer, pl_module)

    def _fit(self, trainer: Any, pl_module: Any) -> None:
        """One step of the mixture's weights."""
        mixture, adam = self._mixture, self._adam
        assert mixture is not None
        assert adam is not None
        found = self._held_out_gradients(trainer, pl_module, mixture.leaves)
        if found is None:
            found = [leaf.grad for leaf in mixture.leaves]
        self._updates += 1
        grads = [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(mixture.leaves, found, strict=True)]
        owners = list(self.sites_.calls) if self.sites_ is not None else []
        places = [(u, o) for u, unit in enumerate(mixture.units) for o in range(len(unit.options))]
        told = [float(place in mixture.failed) for place in places] + [float(o in self._varying) for o in owners]
        flat = torch.cat([*(grad.flatten().float() for grad in grads), torch.tensor(told, device=pl_module.device)])
        flat = trainer.strategy.reduce(flat, reduce_op="mean")  # every process makes the same step
        learned = sum(grad.numel() for grad in grads)
        flags = flat[learned:].tolist()
        if bool(flat[:learned].isfinite().all()):
            for leaf, part in zip(mixture.leaves, flat[:learned].split([g.numel() for g in grads]), strict=True):
                leaf.grad = part.view_as(leaf).to(leaf.dtype)
            adam.step()
        for leaf in mixture.leaves:
            leaf.grad = None
        for (unit, option), failed in zip(places, flags, strict=False):
            if failed:
                mixture.fail(unit, option)
                rank_zero_warn(
                    f"ActivationSearch: {mixture.units[unit].labels()[option]} gave values that are not finite at "
                    f"{mixture.units[unit].name} and is dropped there"
                )
        mixture.failed.clear()
        mixture.drop(self.drop_below)
        varying = [owner for owner, told in zip(owners, flags[len(places) :], strict=True) if told]
        self._varying.clear()
        if varying:
            self._share(pl_module, varying)

    def _held_out_gradients(self, trainer: Any, pl_module: Any, leaves: list[Tensor]) -> Sequence[Tensor | None] | None:
        """Of the loss on the next held-out batch; None: there is none that the training step takes."""
        held = self._batches[1]
        if not held:
            return None
        number = self._updates % len(held)
        try:
            with aside(pl_module), torch.enable_grad():
                loss = loss_on(trainer, pl_module, held[number], number)
                if loss is None or not loss.requires_grad:
                    return [None] * len(leaves)
                return torch.autograd.grad(loss, leaves, allow_unused=True)
        except Exception as error:  # validation batches may be made otherwise than training batches
            rank_zero_warn(
                f"ActivationSearch: training_step doesn't take a validation batch ({type(error).__name__}: {error}); "
                "the search goes on with training batches, and nothing is checked at its end"
            )
            self._batches = self._batches[0], []
            return None

    def _share(self, pl_module: Any, owners: Sequence[str]) -> None:
        """Search all calls of a function in these modules together, because their number varies."""
        mixture, sites = self._mixture, self.sites_
        assert mixture is not None
        assert sites is not None
        for owner in owners:
            before, sites = sites, sites.shared(owner)
            if sites is not before:
                self._warn_varying(owner)
        old = {name: number for number, unit in enumerate(mixture.units) for name in unit.sites}
        self._mixing.close()
        self.sites_ = sites
        units = draw_units(sites, self._names, self.per, {} if self.threshold else None)
        merged = Mixture(sites, units, device=pl_module.device, learn=bool(self.threshold))
        merged.temperature, merged.matching = mixture.temperature, mixture.matching
        with torch.no_grad():
            for number, unit in enumerate(units):
                if unit.sites[0] in old and unit.options == mixture.units[old[unit.sites[0]]].options:
                    merged.alphas[number].copy_(mixture.alphas[old[unit.sites[0]]])
                    merged.alive[number] = list(mixture.alive[old[unit.sites[0]]])
        self._start(pl_module, merged)

    # -- trials ---------------------------------------------------------------------------------------------

    def _try(self, trainer: Any, pl_module: Any) -> None:
        """Short runs from the weights as they are."""
        training, held = self._batches
        finder = self._new_finder(pl_module)
        with aside(pl_module), torch.no_grad(), finder.watch():
            loss_on(trainer, pl_module, training[0])
            if held:
                pl_module.eval()
                loss_on(trainer, pl_module, held[0])
        mixture = self._take(trainer, pl_module, finder)
        if mixture is None:
            raise ConfigurationError("ActivationSearch: no activation site to search; the first batch ran no module")
        runs = ShortRuns(trainer, pl_module, training, held or training)
        finite: dict[tuple[int, int], bool] = {}

        def loss(picks: Sequence[int]) -> float:
            chosen = _picked(mixture, picks)
            found = runs.loss(partial(self._with, pl_module, chosen), self.trial_steps)
            self.history_.append({"choices": {name: str(choice) for name, choice in chosen.items()}, "loss": found})
            for unit, place in enumerate(picks):
                finite[unit, place] = finite.get((unit, place), False) or math.isfinite(found)
            return found

        search = self._greedy if self.strategy == "greedy" else self._sampled
        picks, found, without = search(mixture, loss)
        for number, place in sorted(place for place, well in finite.items() if place[1] and not well):
            unit = mixture.units[number]
            rank_zero_warn(
                f"ActivationSearch: {unit.labels()[place]} gave a loss that is not finite at {unit.name} and is "
                "dropped there"
            )
        chosen = _picked(mixture, picks)
        self._commit(trainer, pl_module, chosen)
        self._tell(trainer, chosen, {}, found, without)

    def _greedy(self, mixture: Mixture, loss: Any) -> tuple[list[int], float, float]:
        picks = [0] * len(mixture.units)
        without = best = loss(picks)
        for unit, each in enumerate(mixture.units):
            if self.budget is not None and sum(map(bool, picks)) >= self.budget:
                break
            for place in range(1, len(each.options)):
                tried = [*picks[:unit], place, *picks[unit + 1 :]]
                found = loss(tried)
                if found < best:
                    best, picks = found, tried
        return picks, best, without

    def _sampled(self, mixture: Mixture, loss: Any) -> tuple[list[int], float, float]:
        optuna = _optuna()
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0))
        study.enqueue_trial({f"{n}": 0 for n in range(len(mixture.units))})
        without = math.inf

        def objective(trial: Any) -> float:
            nonlocal without
            picks = [
                trial.suggest_categorical(f"{n}", list(range(len(u.options)))) for n, u in enumerate(mixture.units)
            ]
            if self.budget is not None and sum(map(bool, picks)) > self.budget:
                return 1e30
            found = float(loss(picks))
            without = found if not any(picks) else without
            return found if math.isfinite(found) else 1e30

        study.optimize(objective, n_trials=self.trials)
        return [study.best_params[f"{n}"] for n in range(len(mixture.units))], study.best_value, without

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
        mixture = self._mixture
        assert mixture is not None
        self._mixing.close()
        chosen = mixture.best()
        if self.budget is not None:
            gains = {u: max(mixture.weights(u).tolist()) for u in range(len(mixture.units))}
            kept = sorted(gains, key=lambda u: -gains[u] * any(n in chosen for n in mixture.units[u].sites))
            names = {name for u in kept[: self.budget] for name in mixture.units[u].sites}
            chosen = {name: choice for name, choice in chosen.items() if name in names}
        chosen = trainer.strategy.broadcast(chosen)
        training, held = self._batches
        rows: dict[str, tuple[float, float, str]] = {}
        whole = without = None
        if held and pl_module.automatic_optimization and len(trainer.optimizers) == 1:
            runs = ShortRuns(trainer, pl_module, training, held)

            def loss(choices: Mapping[str, Choice]) -> float:
                return runs.loss(partial(self._with, pl_module, choices), self.trial_steps)

            whole, without = loss(chosen), loss({})
            for unit in mixture.units:
                changed = [name for name in unit.sites if name in chosen]
                if not changed:
                    continue
                back = loss({name: choice for name, choice in chosen.items() if name not in changed})
                note = "" if whole <= back else f"{chosen[changed[0]]} did worse, went back"
                rows |= dict.fromkeys(changed, (whole, back, note))
                if note:
                    chosen = {name: choice for name, choice in chosen.items() if name not in changed}
                    whole = back
        self._mixture, self._adam = None, None
        self._commit(trainer, pl_module, chosen)
        self._tell(trainer, chosen, rows, whole, without)

    def _commit(self, trainer: Any, pl_module: Any, chosen: Mapping[str, Choice]) -> None:
        """Make the choices part of the model."""
        plan = self._plan_of(pl_module, chosen)
        for model in (pl_module, *averaged_copies(trainer)):
            plan.apply(model)
        self.plan_ = self.plan_.then(plan)
        if isinstance(pl_module, Prunable):
            pl_module.activation_plan = self.plan_
        self._done = True
        self._batches = [], []

    def _tell(
        self,
        trainer: Any,
        chosen: Mapping[str, Choice],
        rows: Mapping[str, tuple[float, float, str]],
        whole: float | None,
        without: float | None,
    ) -> None:
        assert self.sites_ is not None
        told = []
        for site in self.sites_.sites:
            loss, back, note = rows.get(site.name, (None, None, ""))
            before = site.function if site.own is None else str(site.own)
            told.append(SiteReport(site.name, before, str(chosen.get(site.name, before)), loss, back, note))
        report = ActivationReport(tuple(told), tuple(self.history_), whole, without)
        if trainer.is_global_zero:
            self.report_ = report
            if self.report:
                print(f"\n{report}", flush=True)

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
        self._mixing.close()
        if self._mixture is not None:
            self._search = self._search_state()  # a second fit goes on where this one stopped
            self._mixture, self._adam = None, None
        self._finder = None
        self._batches = [], []
        self._remove_hooks()

    def _remove_hooks(self) -> None:
        for hook in self._state_hooks:
            hook.remove()
        self._state_hooks = []

    def _search_state(self) -> dict[str, Any] | None:
        if self._mixture is None or self._adam is None or self.sites_ is None:
            return self._search
        return {
            "all_sites": self.sites_.to_dict(),
            "mixture": self._mixture.state_dict(),
            "adam": self._adam.state_dict(),
        }

    def state_dict(self) -> dict[str, Any]:
        """The plan and, while the search lasts, the mixture: plain data and tensors."""
        return {
            "plan": self.plan_.to_dict(),
            "done": self._done,
            "updates": self._updates,
            "history": list(self.history_),
            "search": self._search_state(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what a checkpoint found."""
        self.plan_ = Plan.from_dict(state_dict["plan"])
        self._done = state_dict["done"]
        self._updates = state_dict["updates"]
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


def _picked(mixture: Mixture, picks: Sequence[int]) -> dict[str, Choice]:
    """The choices that options of each unit mean."""
    chosen: dict[str, Choice] = {}
    for unit, place in zip(mixture.units, picks, strict=True):
        option = unit.options[place]
        if option is not None:
            chosen |= {name: option for name in unit.sites if option != mixture.sites[name].own}
    return chosen


def _optuna() -> Any:
    """The package, imported only where it is used.

    Raises:
        PruningError: It isn't installed; the message names the extra.
    """
    try:
        import optuna
    except ImportError:
        raise PruningError(
            "strategy='optuna' needs the package optuna: pip install 'lightning-prune[search]'"
        ) from None
    return optuna
