"""Latency: models timed side by side, and the budget of MACs that a budget of time comes to."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.errors import PruningError
from lightning_prune.graph.callsites import ModuleCall
from lightning_prune.graph.groups import Groups
from lightning_prune.graph.run import run_calls, undisturbed
from lightning_prune.pruning.progress import Bar, progress_bar

__all__ = ["latencies", "layer_times", "macs_for_latency"]


def latencies(models: Sequence[nn.Module], calls: Sequence[ModuleCall], *, seconds: float = 1.0) -> list[float]:
    """Median time of one evaluation-mode forward of each model, measured in turn so that drift hits all alike.

    Args:
        models: Models that take the same calls.
        calls: What to run.
        seconds: How long to measure in all.

    Returns:
        Seconds, one per model.
    """
    device = next((p.device for p in models[0].parameters()), torch.device("cpu"))
    times: list[list[float]] = [[] for _ in models]

    def once(model: nn.Module) -> float:
        begin = perf_counter()
        run_calls(model, calls)
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        return perf_counter() - begin

    for model in models:
        model.eval()
        once(model)  # warm-up
    end = perf_counter() + seconds
    order = list(zip(models, times, strict=True))
    while perf_counter() < end or len(times[0]) < 4:
        for model, taken in order:
            taken.append(once(model))
        order.reverse()  # neither is always the one that runs on warm caches
    return [median(taken) for taken in times]


def layer_times(model: nn.Module, calls: Sequence[ModuleCall], *, seconds: float = 0.3) -> dict[str, float]:
    """Median time that each module spends in its own forward, the modules that it calls aside.

    Hooks stand around every module, so that the sum is more than the time of an undisturbed forward.

    Args:
        model: The model; in evaluation mode afterwards.
        calls: What to run.
        seconds: How long to measure.

    Returns:
        Seconds by module name, of those that ran.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    paths = {module: path for path, module in model.named_modules()}
    open_calls: list[list[float]] = []
    once: dict[str, float] = {}

    def now() -> float:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        return perf_counter()

    def enter(module: nn.Module, args: Any) -> None:
        came = perf_counter()
        open_calls.append([came, 0.0, now()])  # when it came, what it spent on others, when it began

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        end = now()
        came, others, began = open_calls.pop()
        once[paths[module]] = once.get(paths[module], 0.0) + end - began - others
        if open_calls:
            open_calls[-1][1] += perf_counter() - came

    hooked = [module for module in paths if not isinstance(module, torch.jit.ScriptModule)]
    handles = [module.register_forward_pre_hook(enter) for module in hooked]
    handles += [module.register_forward_hook(leave) for module in hooked]
    runs: list[dict[str, float]] = []
    try:
        model.eval()
        end = perf_counter() + seconds
        while perf_counter() < end or len(runs) < 3:
            once.clear()
            run_calls(model, calls)
            runs.append(dict(once))
    finally:
        for handle in handles:
            handle.remove()
    return {path: median(run.get(path, 0.0) for run in runs[1:]) for path in runs[0]}  # the first is the warm-up


STEPS = 6
"""How often the budget of MACs is halved: to within one sixty-fourth."""


def macs_for_latency(
    model: nn.Module,
    groups: Groups,
    calls: Sequence[ModuleCall],
    choose: Callable[[float], Tensor],
    remove: Callable[[nn.Module, Tensor], None],
    amount: float,
    *,
    seconds: float = 0.5,
) -> float:
    """The fraction of MACs that must go so that a fraction of the time of ``calls`` goes, measured on this machine.

    Copies are pruned and timed beside the model; the budget is found by bisection, each time both sides in turn.

    Args:
        model: The model.
        groups: Its groups.
        calls: What is timed; its batch and its device count.
        choose: Maps a fraction of the MACs to the neurons that stay.
        remove: Removes all others from a copy.
        amount: Fraction of the time that is to go, [0, 1).
        seconds: How long each pair is timed.

    Raises:
        PruningError: Nothing can be run again, or the fraction can't be reached; the message says what can.
    """
    if not calls or not all(call.repeatable for call in calls):
        raise PruningError(
            "of='latency' times the model's forward, but its parts can't be run one by one; give example_inputs"
        )
    if not amount:
        return 0.0
    most = _most(groups, choose)

    def gone(macs: float) -> float:
        small = copy.deepcopy(model)
        remove(small, choose(macs))
        with undisturbed(model):
            before, after = latencies([model, small], calls, seconds=seconds)
        return 1 - after / before

    with progress_bar(STEPS + 1, "timing pruned copies") as bar:
        return _bisected(amount, most, gone, bar)


def _bisected(amount: float, most: float, gone: Callable[[float], float], bar: Bar) -> float:
    reached = gone(most)
    bar.update()
    if reached < amount:
        raise PruningError(
            f"amount={amount:g} of the latency can't be reached: with as much removed as can be, {most:.2f} of the "
            f"MACs, {max(reached, 0.0):.2f} of the time is gone on this machine"
        )
    low, high = 0.0, most
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if gone(middle) >= amount else (middle, high)
        bar.update()
    return high


def _most(groups: Groups, choose: Callable[[float], Tensor]) -> float:
    """The largest fraction of the MACs that can be removed, to a percent."""
    low, high = 0.0, 1.0
    while high - low > 0.01:
        middle = (low + high) / 2
        try:
            choose(middle)
        except PruningError:
            high = middle
        else:
            low = middle
    return low
