"""Transactions: change a model, compare it with its twin, put it back where they differ; tried without the faulty."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from lightning_prune.errors import SurgeryError
from lightning_prune.graph.callsites import ModuleCall
from lightning_prune.graph.run import cuda_devices, run_calls, undisturbed
from lightning_prune.graph.tree import modules_of
from lightning_prune.graph.verify import compare_outputs
from lightning_prune.pruning.surgery import Change

__all__ = ["Twin", "checked", "settle"]

Result = TypeVar("Result")


class Twin(Protocol):
    """A model that does without some of its parts, but still has them."""

    def outputs(self, calls: Sequence[ModuleCall]) -> list[Any]:
        """What the calls give."""


def checked(
    model: nn.Module, calls: Sequence[ModuleCall] | None, twin: Twin, change: Callable[[], Change], what: str
) -> Change:
    """Change a model and compare what it gives with what its twin gave before.

    Args:
        model: The model.
        calls: Those of its calls, or of its parts, that can be repeated; None: don't check.
        twin: What it must equal.
        change: Changes it.
        what: Names the change in messages.

    Raises:
        SurgeryError: The changed model fails or differs; everything is as it was.

    Warns:
        UserWarning: A call can't be repeated in evaluation mode, or draws random numbers: it is not compared.
    """
    if calls is None:
        return change()
    modes = {path: module.training for path, module in modules_of(model).items()}
    with undisturbed(model):
        model.eval()
        repeated, expected = _expected(model, twin, calls)
        done = change()
        try:
            for call, wanted in zip(repeated, expected, strict=True):
                if wanted is not None:
                    compare_outputs(wanted, run_calls(model, [call])[0])
        except BaseException as error:
            done.undo()
            if not isinstance(error, Exception):  # such as the user's Ctrl-C
                raise
            raise SurgeryError(f"Can't {what}: {error}\nThe model is as it was.") from error
    for path, module in modules_of(model).items():  # those that are new came in evaluation mode
        module.training = modes.get(path, module.training)
    return done


def _expected(model: nn.Module, twin: Twin, calls: Sequence[ModuleCall]) -> tuple[list[ModuleCall], list[Any]]:
    """The calls that the twin can run and what it gives, None where it draws random numbers."""
    repeated: list[ModuleCall] = []
    outputs: list[Any] = []
    for call in calls:
        name = call.path or type(model).__name__
        before = _random_states(model)
        try:
            output = twin.outputs([call])[0]
        except Exception as error:  # whatever the user's forward raises
            _blame(model, call, name, error)
            continue
        if not all(map(torch.equal, before, _random_states(model))):
            warnings.warn(f"{name} draws random numbers in evaluation mode: its change is not checked", stacklevel=2)
            output = None
        repeated.append(call)
        outputs.append(output)
    return repeated, outputs


def _blame(model: nn.Module, call: ModuleCall, name: str, error: Exception) -> None:
    """Raise a SurgeryError if a call fails in the twin only; if it fails in the model too, it can't be repeated."""
    try:
        run_calls(model, [call])
    except Exception as own:  # whatever the user's forward raises: it is the whole model that fails here
        warnings.warn(
            f"{name} raised {type(own).__name__} when run again in evaluation mode ({own}): its change is not checked",
            stacklevel=2,
        )
    else:
        raise SurgeryError(f"the model can't do without it: {type(error).__name__}: {error}") from error


def _random_states(model: nn.Module) -> list[Tensor]:
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in cuda_devices(model))]


def settle(
    choose: Callable[[Mapping[str, str]], Collection[str]],
    attempt: Callable[[Collection[str]], tuple[Result, Change]],
) -> tuple[Result | None, dict[str, str]]:
    """Change what is chosen; what turns out to be faulty is refused, and the choice made anew.

    Args:
        choose: Names what is to change, given what can't and why.
        attempt: Changes it all; raises a SurgeryError if that fails, and everything is as it was.

    Returns:
        What the attempt gave (None: nothing was chosen), and what was refused, with reasons.

    Raises:
        SurgeryError: It fails although every part succeeds by itself.
    """
    refused: dict[str, str] = {}
    while True:
        chosen = choose(refused)
        if not chosen:
            return None, refused
        try:
            return attempt(chosen)[0], refused
        except SurgeryError:
            faulty = _faulty(list(chosen), attempt)
            if not faulty:
                raise
            refused |= faulty


def _faulty(chosen: list[str], attempt: Callable[[Collection[str]], tuple[Any, Change]]) -> dict[str, str]:
    """Those without which the change succeeds, found by halving, each with a reason; nothing is changed."""
    reasons: dict[str, str] = {}

    def error_of(names: Collection[str]) -> SurgeryError | None:
        try:
            attempt(names)[1].undo()
        except SurgeryError as error:
            return error
        return None

    def search(good: list[str], candidates: list[str]) -> None:
        """Adds to ``good`` those of the candidates that work together with it."""
        error = error_of([*good, *candidates])
        if error is None:
            good += candidates
        elif len(candidates) == 1:
            reasons[candidates[0]] = f"leaving it out fails: {str(error.__cause__ or error).splitlines()[0]}"
        else:
            half = len(candidates) // 2
            search(good, candidates[:half])
            search(good, candidates[half:])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the real attempt has said it
        search([], chosen)
    return reasons
