"""Learning-rate schedules by name, as the dict that Lightning's ``configure_optimizers`` returns.

Every curve is one of torch's own classes. Nothing here imports Lightning.
"""

from __future__ import annotations

import copy
import inspect
import math
import warnings
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from os import PathLike
from typing import Any, SupportsFloat

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    ExponentialLR,
    LinearLR,
    LRScheduler,
    MultiStepLR,
    OneCycleLR,
    PolynomialLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)

from lightning_prune.errors import PruningError

__all__ = [
    "AFTER_PRUNING",
    "LENGTH_OPTIONS",
    "SCHEDULERS",
    "FollowsPruning",
    "create_lr_scheduler",
    "plot_lr",
    "preview_lr",
]

SCHEDULERS: dict[str, type[LRScheduler]] = {
    "exponential": ExponentialLR,
    "step": StepLR,
    "multistep": MultiStepLR,
    "cosine": CosineAnnealingLR,
    "polynomial": PolynomialLR,
    "plateau": ReduceLROnPlateau,
    "one_cycle": OneCycleLR,
    "constant": ConstantLR,
}
"""The torch class behind each name."""

LENGTH_OPTIONS = {"cosine": "T_max", "polynomial": "total_iters", "one_cycle": "total_steps"}
"""The option that holds the length of the training, in intervals after the warm-up."""

AFTER_PRUNING = ("restart", "rewarm")
"""What a schedule can do when something has been pruned."""

_INTERVALS = ("epoch", "step")
# Ours only where torch has none, or where torch's own would not do what the name says.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "exponential": {"gamma": 0.95},
    "step": {"step_size": 10},
    "constant": {"factor": 1.0},
}
# The optimizer is our first argument, resuming is load_state_dict's job, and torch deprecated verbose.
_NOT_OPTIONS = ("optimizer", "last_epoch", "verbose")
_COUNTS = ("step_size", "T_max", "total_iters", "total_steps", "epochs", "steps_per_epoch")


def create_lr_scheduler(
    optimizer: Optimizer,
    name: str,
    *,
    warmup: int = 0,
    interval: str = "epoch",
    monitor: str | None = None,
    after_pruning: str | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Build a learning-rate schedule as Lightning's ``lr_scheduler`` dict.

    =============  =================  =====================================================================
    name           torch class        options to know (the others are torch's, with torch's defaults)
    =============  =================  =====================================================================
    exponential    ExponentialLR      ``gamma`` = 0.95
    step           StepLR             ``step_size`` = 10, ``gamma`` = 0.1
    multistep      MultiStepLR        ``milestones`` needed, ``gamma`` = 0.1
    cosine         CosineAnnealingLR  ``T_max`` needed
    polynomial     PolynomialLR       ``total_iters`` = 5, ``power`` = 1.0
    plateau        ReduceLROnPlateau  ``monitor`` needed; ``mode`` = "min"
    one_cycle      OneCycleLR         ``total_steps`` needed; ``max_lr`` = the optimizer's learning rate
    constant       ConstantLR         ``factor`` = 1.0: the optimizer's learning rate for good
    =============  =================  =====================================================================

    With ``warmup=n``, interval ``k < n`` runs at ``(k + 1) / (n + 1)`` of the schedule's first learning
    rate, and interval ``n`` is the schedule's own interval 0; its options count from there. ``one_cycle``
    starts at ``max_lr / div_factor``, so its warm-up ends there and momentum waits at its maximum;
    ``plateau`` ignores its metric until the warm-up is over.

    Args:
        optimizer: The optimizer to schedule; every parameter group follows the same schedule.
        name: One of the names above.
        warmup: Intervals of linear warm-up in front of the schedule.
        interval: What ``warmup`` and the options count: ``"epoch"``, or ``"step"`` for optimizer steps.
        monitor: Logged metric that ``plateau`` watches, e.g. ``"val_loss"``; the others ignore it.
        after_pruning: What happens when a pruning callback has taken something away: ``"restart"``, the schedule starts
            anew, with its warm-up; ``"rewarm"``, it goes on, but climbs to its rate over ``warmup`` intervals once
            more. None: it goes on.
        **options: Options of the torch class.

    Returns:
        ``{"scheduler": ..., "interval": ..., "frequency": 1}``, with ``"monitor"`` where one was given.

    Raises:
        PruningError: Unknown name, interval or option (the message lists the allowed ones), an option
            that is missing or that torch refuses, or a bad ``warmup``.

    Example:
        >>> optimizer = SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
        >>> create_lr_scheduler(optimizer, "step", step_size=30)["interval"]
        'epoch'
    """
    if not isinstance(optimizer, Optimizer):
        raise PruningError(f"create_lr_scheduler needs a torch optimizer, got {type(optimizer).__name__}.")
    if name not in list(SCHEDULERS):
        raise PruningError(f"Unknown lr scheduler {name!r}. Allowed: {', '.join(SCHEDULERS)}.")
    if interval not in _INTERVALS:
        raise PruningError(f"Unknown interval {interval!r}. Allowed: {', '.join(_INTERVALS)}.")
    if not _is_whole(warmup) or warmup < 0:
        raise PruningError(f"warmup must be a whole number of {interval}s, 0 or more, got {warmup!r}.")
    if name == "plateau" and not monitor:
        raise PruningError("lr scheduler 'plateau' needs monitor, a metric that is logged, e.g. 'val_loss'.")

    if after_pruning is not None and after_pruning not in AFTER_PRUNING:
        raise PruningError(f"Unknown after_pruning {after_pruning!r}. Allowed: {', '.join(AFTER_PRUNING)}, None.")
    if after_pruning == "rewarm" and not warmup:
        raise PruningError("after_pruning='rewarm' repeats the warm-up, so warmup must be 1 or more.")

    options = {**_DEFAULTS.get(name, {}), **options}
    if name == "one_cycle":
        options.setdefault("max_lr", [float(group["lr"]) for group in optimizer.param_groups])
    _check_options(name, options)
    scheduler = _build(optimizer, name, warmup, options, after_pruning)
    config = {"scheduler": scheduler, "interval": interval, "frequency": 1}
    return config if monitor is None else {**config, "monitor": monitor}


def preview_lr(
    name: str,
    *,
    lr: float,
    steps: int,
    warmup: int = 0,
    metrics: Sequence[float] | None = None,
    **options: Any,
) -> list[float]:
    """Compute the curve that ``create_lr_scheduler`` gives, without training.

    Args:
        name: Name of the schedule.
        lr: Learning rate of the optimizer.
        steps: Number of intervals (epochs or optimizer steps, whichever the schedule will count).
        warmup: Intervals of linear warm-up.
        metrics: For ``plateau`` only: the monitored value after each interval; at least ``steps - 1``
            values. Without it the metric never improves, which is the fastest decay possible.
        **options: Options of the torch class.

    Returns:
        The learning rate during each of the ``steps`` intervals.

    Raises:
        PruningError: As ``create_lr_scheduler``; ``steps`` is no positive whole number or goes past the end
            of ``one_cycle``; ``metrics`` is too short or the schedule watches none.

    Example:
        >>> preview_lr("step", lr=0.5, steps=5, step_size=2, gamma=0.5)
        [0.5, 0.5, 0.25, 0.25, 0.125]
        >>> preview_lr("constant", lr=0.5, steps=5, warmup=3)
        [0.125, 0.25, 0.375, 0.5, 0.5]
    """
    if not _is_whole(steps) or steps < 1:
        raise PruningError(f"steps must be a whole number, 1 or more, got {steps!r}.")
    if metrics is not None and name != "plateau":
        raise PruningError(f"Only 'plateau' watches metrics, lr scheduler {name!r} does not.")
    if metrics is not None and len(metrics) < steps - 1:
        raise PruningError(f"metrics needs a value for each of {steps - 1} intervals, got {len(metrics)}.")

    # With momentum, because one_cycle moves it; without a gradient, so stepping changes nothing.
    optimizer = SGD([nn.Parameter(torch.zeros(1))], lr=lr, momentum=0.9)
    monitor = "metrics" if name == "plateau" else None
    scheduler = create_lr_scheduler(optimizer, name, warmup=warmup, monitor=monitor, **options)["scheduler"]
    curve = [float(optimizer.param_groups[0]["lr"])]
    for interval in range(steps - 1):
        optimizer.step()
        if name == "plateau":
            scheduler.step(0.0 if metrics is None else metrics[interval])
        else:
            try:
                scheduler.step()
            except ValueError as error:  # one_cycle refuses to go on after its end
                raise PruningError(f"lr scheduler {name!r}: {error}") from error
        curve.append(float(optimizer.param_groups[0]["lr"]))
    return curve


def plot_lr(
    name: str, *, lr: float, steps: int, warmup: int = 0, path: str | PathLike[str] | None = None, **options: Any
) -> Any:
    """Draw the curve that `preview_lr` computes.

    Args:
        name: Name of the schedule.
        lr: Learning rate of the optimizer.
        steps: Number of intervals.
        warmup: Intervals of linear warm-up.
        path: Where to write it, as what its ending says; None: nowhere.
        **options: ``metrics`` and the options of the torch class.

    Returns:
        The matplotlib figure.

    Raises:
        PruningError: As `preview_lr`; matplotlib is not installed.
    """
    curve = preview_lr(name, lr=lr, steps=steps, warmup=warmup, **options)
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PruningError('a plot needs matplotlib: pip install "lightning-prune[plots]"') from error
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.add_subplot()
    axes.step(range(steps), curve, where="post")
    axes.set_xlabel("interval (epoch or optimizer step)")
    axes.set_ylabel("learning rate")
    axes.set_title(name if not warmup else f"{name}, {warmup} intervals of warm-up")
    axes.set_ylim(bottom=0)
    if path is not None:
        figure.savefig(path)
    return figure


class _WarmUp(SequentialLR):
    """torch's linear warm-up, then ``scheduler``."""

    def __init__(self, optimizer: Optimizer, scheduler: LRScheduler, warmup: int) -> None:
        climb = LinearLR(optimizer, start_factor=1 / (warmup + 1), total_iters=warmup)
        super().__init__(optimizer, [climb, scheduler], milestones=[warmup])

    def step(self) -> None:  # type: ignore[override]
        if self.last_epoch + 1 != self._milestones[0]:
            super().step()
            return
        # Older torch hands over by a call of its own that it deprecated; the user can't avoid the warning.
        # Only here, since every catch_warnings makes Python show once-only warnings again.
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The epoch parameter in `scheduler.step")
            super().step()


class _WarmUpPlateau(ReduceLROnPlateau):
    """Linear warm-up that ignores the metric, then torch's ReduceLROnPlateau as if it were new.

    SequentialLR refuses ReduceLROnPlateau, and Lightning passes the metric to its subclasses alone.
    """

    def __init__(self, optimizer: Optimizer, warmup: int, **options: Any) -> None:
        super().__init__(optimizer, **options)
        self.warmup = warmup
        self.base_lrs = [float(group["lr"]) for group in optimizer.param_groups]
        self._climb()

    def step(self, metrics: SupportsFloat, epoch: int | None = None) -> None:  # type: ignore[override]
        if self.last_epoch >= self.warmup:
            super().step(metrics, epoch)
        else:
            self.last_epoch += 1
            self._climb()

    def _climb(self) -> None:
        factor = (self.last_epoch + 1) / (self.warmup + 1)
        for group, base_lr in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(base_lr * factor)
            else:
                group["lr"] = base_lr * factor
        self._last_lr = [float(group["lr"]) for group in self.optimizer.param_groups]


class FollowsPruning:
    """Mixin for torch's schedulers: starts anew, or warms up again, when something has been pruned."""

    optimizer: Optimizer
    after_pruning: str | None = None
    _warmup = 0
    _plain: list[float] | None = None
    _since: int | None = None
    _pending = False
    _first: tuple[Any, Any] | None = None

    def follow(self, after_pruning: str, warmup: int) -> None:
        """From now on, heed `pruned`; the schedule is at its start."""
        self.after_pruning, self._warmup = after_pruning, warmup
        groups = [{k: v for k, v in group.items() if k in _SCHEDULED} for group in self.optimizer.param_groups]
        self._first = copy.deepcopy((self.state_dict(), groups))  # type: ignore[attr-defined]

    def pruned(self, *, before_step: bool) -> None:
        """Something has been pruned.

        Args:
            before_step: `step` comes before the next training step.
        """
        if before_step:
            self._pending = True
        else:
            self._act()

    def step(self, *args: Any, **kwargs: Any) -> None:
        """Go on by one interval."""
        if self._pending and self.after_pruning == "restart":
            self._act()
            return
        if self._plain is not None:
            self._set(self._plain)
            self._plain = None
        super().step(*args, **kwargs)  # type: ignore[misc]
        if self._pending:
            self._act()
        elif self._since is not None:
            self._since += 1
            self._scale()

    def _act(self) -> None:
        self._pending = False
        if self.after_pruning == "rewarm":
            if self._plain is not None:
                self._set(self._plain)
            self._since = 0
            self._scale()
        elif self._first is not None:
            first = self._first
            state, groups = copy.deepcopy(first)
            self.load_state_dict(state)  # type: ignore[attr-defined]
            self._first = first
            for group, values in zip(self.optimizer.param_groups, groups, strict=True):
                lr = group["lr"]
                group.update(values)
                if isinstance(lr, Tensor):  # the optimizer holds on to it
                    group["lr"] = lr.fill_(float(values["lr"]))

    def _scale(self) -> None:
        assert self._since is not None
        self._plain = [float(group["lr"]) for group in self.optimizer.param_groups]
        factor = min((self._since + 1) / (self._warmup + 1), 1.0)
        self._set([rate * factor for rate in self._plain])
        if self._since >= self._warmup:
            self._since, self._plain = None, None

    def _set(self, rates: Sequence[float]) -> None:
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        self._last_lr = list(rates)


_SCHEDULED = ("lr", "momentum", "betas")
"""What torch's schedules change of a parameter group."""


def _following(cls: type[LRScheduler]) -> type[LRScheduler]:
    return type(f"{cls.__name__.lstrip('_')}FollowsPruning", (FollowsPruning, cls), {"__module__": __name__})


def _build(
    optimizer: Optimizer, name: str, warmup: int, options: dict[str, Any], after_pruning: str | None
) -> LRScheduler:
    """Make the torch object; what torch refuses becomes a PruningError that names the schedule."""
    outer: Callable[[Any], Any] = (lambda cls: cls) if after_pruning is None else _following
    try:
        scheduler: LRScheduler
        if warmup and name == "plateau":
            scheduler = outer(_WarmUpPlateau)(optimizer, warmup, **options)
        elif warmup:
            scheduler = outer(_WarmUp)(optimizer, SCHEDULERS[name](optimizer, **options), warmup)
        else:
            scheduler = outer(SCHEDULERS[name])(optimizer, **options)
        if isinstance(scheduler, FollowsPruning):
            scheduler.follow(str(after_pruning), warmup)
        return scheduler
    except (TypeError, ValueError) as error:
        raise PruningError(f"lr scheduler {name!r}: {error}") from error


def _check_options(name: str, options: dict[str, Any]) -> None:
    """Refuse unknown and missing options, and values that torch would choke on in the middle of training."""
    cls = SCHEDULERS[name]
    allowed = {k: p for k, p in inspect.signature(cls).parameters.items() if k not in _NOT_OPTIONS}
    where = f"lr scheduler {name!r} (torch's {cls.__name__})"
    unknown = [option for option in options if option not in allowed]
    if unknown:
        raise PruningError(f"Unknown option {unknown[0]!r} of {where}. Allowed: {', '.join(allowed)}.")
    missing = [k for k, p in allowed.items() if p.default is p.empty and k not in options]
    if missing:
        raise PruningError(f"{where} needs {missing[0]}. Its options: {', '.join(allowed)}.")
    for option, value in options.items():
        default = allowed[option].default
        if value is None and default is None:
            continue
        if option in _COUNTS:
            fits, wanted = _is_whole(value) and value >= 1, "a whole number, 1 or more"
        elif option == "milestones":
            fits = _is_list(value) and all(_is_whole(v) and v >= 0 for v in value)
            wanted = "a list of whole numbers"
        elif isinstance(default, (bool, str)):
            fits, wanted = isinstance(value, type(default)), f"a {type(default).__name__}"
        else:
            fits = all(_is_finite(v) for v in (value if _is_list(value) else [value]))
            wanted = "a finite number"
        if not fits:
            raise PruningError(f"Option {option!r} of {where} must be {wanted}, got {value!r}.")


def _is_whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_finite(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)
