"""Layer removal without Lightning: blocks whose output differs least from their input go, and pass it on instead."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_prune.errors import PruningError
from lightning_prune.graph.callsites import ModuleCall
from lightning_prune.graph.copies import original_of
from lightning_prune.graph.observe import Observer, Use
from lightning_prune.graph.run import as_calls, check_model, run_calls, undisturbed
from lightning_prune.pruning.budget import COSTS, Budget, add_copies, among, listed
from lightning_prune.pruning.neurons import as_optimizers, warn_no_effect
from lightning_prune.pruning.passing import Form, inside, remove_modules, skeletons_of
from lightning_prune.pruning.plan import Plan
from lightning_prune.pruning.select import check_amount, check_choice, copies_to_tie, globs
from lightning_prune.pruning.surgery import Change
from lightning_prune.pruning.transaction import checked, settle

__all__ = [
    "LAYER_CRITERIA",
    "Layers",
    "LeftOut",
    "check_layers",
    "choose_layers",
    "drop_chosen",
    "drop_layers",
    "find_layers",
    "remove_layers",
]

LAYER_CRITERIA: dict[str, Callable[[str, Use, int], float]] = {
    "l1": lambda path, use, seed: use.change,
    "random": lambda path, use, seed: random.Random(f"{seed} {path}").random(),
}
"""What makes a layer important, given its path, what a run told of it, and a seed."""


def remove_layers(
    model: nn.Module,
    example_inputs: Any,
    amount: float,
    *,
    of: str = "params",
    criterion: str = "l1",
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    verify: bool = True,
) -> Plan:
    """Remove residual blocks and other layers that change their input least, in place.

    A layer can go if in the run its output had the shape of its input. An `nn.Identity` takes its place, or a
    `PassThrough` where it is called with more than its input or gives a tuple; the model equals the one in which the
    layer's input is its output.

    Args:
        model: Any module.
        example_inputs: A tensor, a tuple of positional or a dict of keyword arguments of ``model``.
        amount: Fraction of the whole model that goes, [0, 1); met at or just past it.
        of: What the fraction is of: ``"params"`` or ``"macs"``.
        criterion: What makes a layer important: ``"l1"``, the L1 norm of output minus input in those of the input, on
            ``example_inputs``; or ``"random"``.
        include: Globs on module names: only these layers (None: all).
        exclude: Globs on module names: not these layers.
        optimizer: The optimizer or optimizers that hold the parameters; they forget those that are gone.
        verify: Compare with the model in which the layers pass their input on, and roll back if they differ.

    Returns:
        What was removed; ``plan.frozen`` says why other layers stay.

    Raises:
        PruningError: Bad arguments, nothing that can be removed or a budget out of reach; the model is untouched.

    Warns:
        NoEffectWarning: Nothing was removed.

    Source: Men et al., 2024, arXiv:2403.03853 (layers that change their input least are the first to go; by cosine).
    """
    amount = check_amount(amount)
    check_layers(of, criterion)
    optimizers = as_optimizers(optimizer)
    check_model(model)
    calls = as_calls(example_inputs)
    with torch.inference_mode(False), torch.no_grad():
        observer = Observer(model, differences=True)
        with undisturbed(model), observer.watch():
            model.eval()
            run_calls(model, calls)
        seed = torch.initial_seed()
        layers = find_layers(
            model,
            observer.uses,
            of,
            criterion,
            globs("include", include),
            globs("exclude", exclude),
            seed=seed,
            optimizers=optimizers,
        )
        now = observer.macs if of == "macs" else sum(p.numel() for p in model.parameters())
        budget = Budget(of, now, now)

        def choose(refused: Mapping[str, str]) -> list[str]:
            return choose_layers(layers.without(refused), budget, amount)

        plan, _ = drop_chosen(model, calls if verify else None, layers, choose, optimizers)
    if not plan:
        warn_no_effect(f"amount={amount:g} of the {of} asks for no layer to go")
    return plan


def check_layers(of: Any, criterion: Any) -> None:
    """Raise a PruningError unless there are such a budget and such a criterion."""
    check_choice("of", of, COSTS)
    check_choice("criterion", criterion, tuple(LAYER_CRITERIA))


@dataclass(frozen=True)
class Layers:
    """Layers that may go.

    Attributes:
        scores: How much each changes its input, by module path; higher means keep.
        forms: How each is called.
        costs: What each costs now, in parameters or MACs, with everything inside it and its copies.
        residual: Those that add something to their input.
        frozen: Other modules with parameters -> why they stay.
        copies: Modules that follow another one, see `copies_of_trained` -> that one.
    """

    scores: dict[str, float]
    forms: dict[str, Form]
    costs: dict[str, float]
    residual: frozenset[str]
    frozen: dict[str, str]
    copies: dict[str, str]

    def without(self, refused: Mapping[str, str]) -> Layers:
        """Some turn out to be needed."""
        left = {path: score for path, score in self.scores.items() if path not in refused}
        return replace(self, scores=left, frozen={**self.frozen, **refused})

    def goes_with(self, path: str) -> bool:
        """Whether a layer is to go with one around it only: a residual block, or one that changes no more than it."""
        around = [other for other in self.scores if path != other and inside(path, [other])]
        own = path in self.residual
        return any((other in self.residual and not own) or self.scores[other] <= self.scores[path] for other in around)

    def saved(self, paths: Collection[str]) -> float:
        """What is no longer spent without some layers; one inside another goes with it."""
        return sum(self.costs[path] for path in outermost(paths))


def outermost(paths: Collection[str]) -> list[str]:
    """Those that are in no other."""
    return [path for path in paths if not inside(path, paths, proper=True)]


def find_layers(
    model: nn.Module,
    uses: Mapping[str, Use],
    of: str,
    criterion: str,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    *,
    seed: int = 0,
    optimizers: Iterable[Optimizer] = (),
    strict: bool = True,
) -> Layers:
    """The layers of a model that may go, and why other modules may not.

    Args:
        model: The model.
        uses: What a run told of its modules.
        of: What they cost: ``"params"`` or ``"macs"``.
        criterion: A name in ``LAYER_CRITERIA``.
        include: Globs on module names (None: all).
        exclude: Globs on module names.
        seed: For the criterion that draws random numbers.
        optimizers: Copies of what these train follow it.
        strict: Refuse patterns that match nothing, and models with nothing that may go.

    Raises:
        PruningError: ``strict``, and no layer may go, or a pattern matches none.
    """
    names = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    holders: Counter[int] = Counter()
    for module in model.modules():
        holders.update(id(p) for p in module._parameters.values() if p is not None)
    networks = copies_to_tie(model, optimizers, exclude)
    copies: dict[str, str] = {}
    found: dict[str, nn.Module] = {}
    frozen: dict[str, str] = {}
    for path, module in model.named_modules():
        if not path or next(module.parameters(), None) is None:
            continue
        original = original_of(path, networks)
        if original is not None:
            copies[path] = original
            continue
        reason = _reason(model, module, uses.get(path), names, holders)
        if reason is None:
            found[path] = module
        else:
            frozen[path] = reason
    if strict and not found:
        raise PruningError(f"no layer of this model can be removed{listed(frozen) or ': it has no layers'}")
    chosen = among([*found, *frozen], include, exclude, strict=strict)
    if strict and not chosen & found.keys():
        raise PruningError(f"nothing that include and exclude leave over can go{listed(frozen)}")
    frozen |= {path: "left out by include or exclude" for path in found if path not in chosen}
    params = {path: sum(p.numel() for p in found[path].parameters()) for path in found if path in chosen}
    costs = {path: float(uses[path].macs if of == "macs" else count) for path, count in params.items()}
    add_copies(costs, copies, uses, of)
    return Layers(
        scores={path: LAYER_CRITERIA[criterion](path, uses[path], seed) for path in params},
        forms={path: Form(uses[path].argument, uses[path].outputs, uses[path].extra) for path in params},
        costs=costs,
        residual=frozenset(path for path in params if uses[path].residual),
        frozen=frozen,
        copies=copies,
    )


def _reason(
    model: nn.Module, module: nn.Module, use: Use | None, names: Mapping[int, int], holders: Mapping[int, int]
) -> str | None:
    """Why a module can't be left out; None if it can."""
    if use is None or not use.calls:
        return "was not called"
    if use.reason is not None:
        return use.reason
    own: Counter[int] = Counter()
    for part in module.modules():
        own.update(id(p) for p in part._parameters.values() if p is not None)
    if all(p.dim() < 2 for p in module.parameters()):
        return "has no weights but scales and shifts"
    if any(count < holders[key] for key, count in own.items()):
        return "its parameters are used elsewhere too"
    if len(own) == len(holders):
        return "is the whole model"
    if any(names[id(part)] > 1 for part in module.modules()):
        return "stands in the model under several names"
    return None


def choose_layers(
    layers: Layers, budget: Budget, amount: float, *, on_the_way: bool = False, strict: bool = True
) -> list[str]:
    """Choose which layers go, those that change their input least first.

    Args:
        layers: Those that may go.
        budget: What there was and what there is.
        amount: Fraction of the whole that is to be gone, at or just past it.
        on_the_way: A later step will remove more: stay just short of the budget, for what is gone can't come back.
        strict: Refuse a budget that can't be reached; otherwise all that can go goes.

    Returns:
        Paths of modules, none inside another.

    Raises:
        PruningError: ``strict``, and the budget can't be reached; the message says what can.
    """
    everything = layers.saved(list(layers.scores))
    if strict:
        budget.check(amount, everything, "every layer gone that can go", layers.frozen)
    needed = budget.within(amount, everything)
    order = [path for path in layers.scores if not layers.goes_with(path)]
    order.sort(key=lambda path: layers.scores[path])
    chosen: list[str] = []
    while layers.saved(chosen) < needed:
        chosen.append(order[len(chosen)])
    if not chosen:
        return []
    last = chosen.pop()
    if on_the_way:
        return outermost(chosen)
    # What closes the budget may be much larger than what is missing, a stage of blocks for one: of those that don't
    # change their input twice as much, take the one that fits best.
    rest = [p for p in order if p not in chosen and layers.scores[p] <= 2 * layers.scores[last]]
    chosen.append(
        min((p for p in rest if layers.saved([*chosen, p]) >= needed), key=lambda p: layers.saved([*chosen, p]))
    )
    for path in reversed(chosen[:]):  # what the last one made superfluous
        fewer = [other for other in chosen if other != path]
        if layers.saved(fewer) >= needed:
            chosen = fewer
    return outermost(chosen)


@dataclass(frozen=True)
class LeftOut:
    """A model in which some modules pass their input on, but still stand and run.

    Attributes:
        model: The model.
        forms: Paths of modules -> how they are called.
    """

    model: nn.Module
    forms: Mapping[str, Form]

    def outputs(self, calls: Sequence[ModuleCall]) -> list[Any]:
        """What the model's calls give."""
        with self._passing():
            return run_calls(self.model, calls)

    @contextmanager
    def _passing(self) -> Iterator[None]:
        """A copy of the input of these modules is their output: what writes into one must not write into the other."""
        inputs: list[Tensor] = []
        hooks = []
        for path, form in self.forms.items():

            def enter(module: nn.Module, args: Any, kwargs: Any, form: Form = form) -> None:
                inputs.append((args[0] if args else kwargs[form.argument or ""]).clone())

            def leave(module: nn.Module, args: Any, output: Any, form: Form = form) -> Any:
                given = inputs.pop()
                return (given, *[None] * (form.outputs - 1)) if form.outputs else given

            module = self.model.get_submodule(path)
            hooks += [module.register_forward_pre_hook(enter, with_kwargs=True), module.register_forward_hook(leave)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def drop_chosen(
    model: nn.Module,
    calls: Sequence[ModuleCall] | None,
    layers: Layers,
    choose: Callable[[Mapping[str, str]], Collection[str]],
    optimizers: Iterable[Optimizer] = (),
) -> tuple[Plan, Layers]:
    """Remove the layers that ``choose`` picks; those that turn out to be needed are left alone.

    Args:
        model: The model.
        calls: Calls of the model to compare it with its twin; None: don't.
        layers: The layers that were found in it.
        choose: Picks paths, none inside another, given those that can't go and why.
        optimizers: Those that hold its parameters.

    Returns:
        The plan, empty if nothing was chosen, and the layers that can go.

    Raises:
        PruningError: ``choose`` finds that what is left can't reach the amount; everything is as it was.
    """
    optimizers = tuple(optimizers)

    def attempt(paths: Collection[str]) -> tuple[Plan, Change]:
        forms = {path: layers.forms[path] for path in paths}
        following = {copy: forms[path] for copy, path in layers.copies.items() if path in forms}
        return drop_layers(model, calls, forms | following, optimizers)

    plan, refused = settle(choose, attempt)
    layers = layers.without(refused)
    if plan is None:
        return Plan({}, {}), layers
    return Plan({}, {}, frozen=dict(layers.frozen), removed=plan.removed, skeletons=plan.skeletons), layers


def drop_layers(
    model: nn.Module,
    calls: Sequence[ModuleCall] | None,
    forms: Mapping[str, Form],
    optimizers: Iterable[Optimizer] = (),
) -> tuple[Plan, Change]:
    """Remove layers: a transaction, checked by running the model.

    Args:
        model: The model.
        calls: Calls of the model to compare it with its twin; None: don't.
        forms: Paths of layers, none inside another -> how they are called.
        optimizers: Those that hold its parameters.

    Raises:
        SurgeryError: The model fails or differs from the one in which they pass their input on; everything is as it
            was.
    """
    skeletons = skeletons_of(model, forms)
    change = checked(
        model,
        calls,
        LeftOut(model, forms),
        lambda: remove_modules(model, forms, optimizers),
        f"remove {', '.join(forms)}",
    )
    return Plan({}, {}, removed=dict(forms), skeletons=skeletons), change
