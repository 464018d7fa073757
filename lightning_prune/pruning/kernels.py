"""Kernel shrinking without Lightning: outer rings of convolution kernels go, and padding follows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.optim import Optimizer

from lightning_prune.errors import PruningError
from lightning_prune.graph.callsites import ModuleCall
from lightning_prune.graph.copies import original_of
from lightning_prune.graph.observe import Observer, Use
from lightning_prune.graph.run import as_calls, check_model, run_calls, undisturbed
from lightning_prune.graph.tree import named_tensors
from lightning_prune.graph.verify import MaskedModel
from lightning_prune.pruning.budget import COSTS, Budget, add_copies, among, listed
from lightning_prune.pruning.neurons import as_optimizers, warn_no_effect
from lightning_prune.pruning.plan import Plan
from lightning_prune.pruning.select import check_amount, check_choice, copies_to_tie, globs
from lightning_prune.pruning.surgery import Change, shrink
from lightning_prune.pruning.transaction import checked, settle
from lightning_prune.pruning.weight_criteria import CONVOLUTIONS, TRANSPOSED

__all__ = [
    "RING_NORMS",
    "Kernels",
    "check_rings",
    "choose_rings",
    "find_kernels",
    "remove_rings",
    "shrink_chosen",
    "shrink_kernels",
]

RING_NORMS: dict[str, Callable[[Tensor], Tensor]] = {"l1": torch.abs, "l2": torch.square}
"""What is summed over the weights of a ring."""


def shrink_kernels(
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
    """Take the outer rings off a model's convolution kernels where they matter least, in place.

    A kernel of side k becomes one of side k - 2; padding gets less by the dilation, so that all shapes stay. A
    convolution that pads by less than that crops its input instead (a negative padding). The result equals the same
    model with the ring's weights set to zero. Kernels of even side shrink likewise, down to 2.

    Args:
        model: Any module.
        example_inputs: A tensor, a tuple of positional or a dict of keyword arguments of ``model``.
        amount: Fraction of the whole model that goes, [0, 1); met at or just past it.
        of: What the fraction is of: ``"params"`` or ``"macs"``.
        criterion: What makes a ring important: its ``"l1"`` norm, or ``"l2"`` (squared), as a share of its kernel's,
            for each parameter or MAC that it costs.
        include: Globs on module names: only these convolutions (None: all).
        exclude: Globs on module names: not these convolutions.
        optimizer: The optimizer or optimizers that hold the parameters; state follows.
        verify: Compare with the masked model, one forward of each, and roll back if they differ.

    Returns:
        What was kept; ``plan.frozen`` says why other convolutions stay.

    Raises:
        PruningError: Bad arguments, nothing to shrink or a budget out of reach; the model is untouched.

    Warns:
        NoEffectWarning: Nothing was shrunk.
    """
    amount = check_amount(amount)
    check_rings(of, criterion)
    optimizers = as_optimizers(optimizer)
    check_model(model)
    calls = as_calls(example_inputs)
    with torch.inference_mode(False), torch.no_grad():
        observer = Observer(model)
        with undisturbed(model), observer.watch():
            model.eval()
            run_calls(model, calls)
        named = globs("include", include), globs("exclude", exclude)
        kernels = find_kernels(model, observer.uses, of, *named, optimizers=optimizers)
        now = observer.macs if of == "macs" else sum(p.numel() for p in model.parameters())
        budget = Budget(of, now, now)

        def choose(refused: Mapping[str, str]) -> dict[str, int]:
            return choose_rings(kernels.without(refused), budget, amount, criterion)

        plan, _ = shrink_chosen(model, calls if verify else None, kernels, choose, optimizers)
    if not plan:
        warn_no_effect(f"amount={amount:g} of the {of} asks for no kernel to shrink")
    return plan


def check_rings(of: Any, criterion: Any) -> None:
    """Raise a PruningError unless there are such a budget and such a criterion."""
    check_choice("of", of, COSTS)
    check_choice("criterion", criterion, tuple(RING_NORMS))


@dataclass(frozen=True)
class Kernels:
    """Convolutions whose kernels may shrink.

    Attributes:
        weights: Their weights, by module path.
        rings: How many rings each can lose.
        costs: What each costs now with its copies, in parameters or MACs, all of it in proportion to the kernel's size.
        frozen: Other convolutions -> why they stay.
        copies: Convolutions that follow another one, see `copies_of_trained` -> that one.
    """

    weights: dict[str, Tensor]
    rings: dict[str, int]
    costs: dict[str, float]
    frozen: dict[str, str]
    copies: dict[str, str]

    def without(self, refused: Mapping[str, str]) -> Kernels:
        """Some turn out not to be able to shrink."""
        left = {path: weight for path, weight in self.weights.items() if path not in refused}
        return replace(self, weights=left, frozen={**self.frozen, **refused})

    def saved(self, path: str, rings: int) -> float:
        """What a convolution no longer costs without some rings."""
        sides = self.weights[path].shape[2:]
        return self.costs[path] * (1 - prod(inner(side, rings) for side in sides) / prod(sides))


def inner(side: int, rings: int) -> int:
    """Side of a kernel without some rings; 1 and 2 stay."""
    for _ in range(rings):
        side = side - 2 if side > 2 else side
    return side


def find_kernels(
    model: nn.Module,
    uses: Mapping[str, Use],
    of: str,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    *,
    optimizers: Iterable[Optimizer] = (),
    strict: bool = True,
) -> Kernels:
    """The convolutions of a model whose kernels may shrink, and why the others may not.

    Args:
        model: The model.
        uses: What a run told of its modules.
        of: What they cost: ``"params"`` or ``"macs"``.
        include: Globs on module names (None: all).
        exclude: Globs on module names.
        optimizers: Copies of what these train follow it.
        strict: Refuse patterns that match nothing, and models with nothing that may shrink.

    Raises:
        PruningError: ``strict``, and no convolution may shrink, or a pattern matches none.
    """
    holders = Counter(
        id(parameter)
        for module in model.modules()
        for parameter in module._parameters.values()
        if parameter is not None
    )
    found: dict[str, Tensor] = {}
    rings: dict[str, int] = {}
    frozen: dict[str, str] = {}
    networks = copies_to_tie(model, optimizers, exclude)
    copies: dict[str, str] = {}
    for path, module in model.named_modules():
        if not isinstance(module, _ConvNd):
            continue
        original = original_of(path, networks)
        if original is not None:
            copies[path] = original
            continue
        reason = _reason(module, holders) or (None if path in uses else "was not called")
        if reason is None:
            found[path], rings[path] = module.weight.detach(), exact_rings(module)
        else:
            frozen[path] = reason
    if strict and not found:
        raise PruningError(f"no kernel of this model can shrink{listed(frozen) or ': it has no convolution'}")
    chosen = among([*found, *frozen], include, exclude, strict=strict)
    if strict and not chosen & found.keys():
        raise PruningError(f"nothing that include and exclude leave over can shrink{listed(frozen)}")
    frozen |= {path: "left out by include or exclude" for path in found if path not in chosen}
    weights = {path: weight for path, weight in found.items() if path in chosen}
    costs = {path: float(uses[path].macs if of == "macs" else weight.numel()) for path, weight in weights.items()}
    add_copies(costs, copies, uses, of)
    return Kernels(weights, rings, costs, frozen, copies)


def _reason(module: _ConvNd, holders: Mapping[int, int]) -> str | None:
    """Why a convolution can't lose a ring; None if it can."""
    kind = next((cls for cls in (*CONVOLUTIONS, *TRANSPOSED) if isinstance(module, cls)), None)
    own = type(module)
    if kind is None or own.forward is not kind.forward or "forward" in module.__dict__:
        return "has a forward of its own"
    if hasattr(module, "_conv_forward") and own._conv_forward is not kind._conv_forward:
        return "has a forward of its own"
    if not isinstance(module._parameters.get("weight"), nn.Parameter):
        return "its weight is computed from others"
    if holders[id(module.weight)] > 1:
        return "its weight is shared"
    sides = module.weight.shape[2:]
    if max(sides) < 3:
        return f"its kernel of {'x'.join(map(str, sides))} has no ring around another kernel"
    if not exact_rings(module):
        if module.transposed:
            return "a transposed convolution that pads by less than its dilation has a smaller output without its ring"
        return f"it would have to crop along one dimension and pad by {module.padding_mode!r} along another"
    return None


def exact_rings(module: _ConvNd) -> int:
    """How many rings a convolution can lose so that what is left equals it with these set to zero."""
    sides, dilation = module.weight.shape[2:], module.dilation
    most = (max(sides) - 1) // 2
    if module.padding == "same":
        return most
    padding: Any = (0,) * len(sides) if module.padding == "valid" else module.padding
    for rings in range(1, most + 1):
        lost = [(side - inner(side, rings)) // 2 for side in sides]
        left = [pad - each * own for pad, each, own in zip(padding, dilation, lost, strict=True)]
        mixed = module.padding_mode not in ("zeros", "constant") and max(left) > 0
        if min(left) < 0 and (module.transposed or mixed):
            return rings - 1
    return most


def choose_rings(
    kernels: Kernels, budget: Budget, amount: float, criterion: str, *, on_the_way: bool = False, strict: bool = True
) -> dict[str, int]:
    """Choose how many rings each convolution loses, the least important first.

    Args:
        kernels: Those that may shrink.
        budget: What there was and what there is.
        amount: Fraction of the whole that is to be gone, at or just past it.
        criterion: A name in ``RING_NORMS``.
        on_the_way: A later step will remove more: stay just short of the budget, for what is gone can't come back.
        strict: Refuse a budget that can't be reached; otherwise all that can go goes.

    Raises:
        PruningError: ``strict``, and the budget can't be reached; the message says what can.
    """
    everything = sum(kernels.saved(path, kernels.rings[path]) for path in kernels.weights)
    if strict:
        budget.check(amount, everything, "every kernel as small as it can be", kernels.frozen)
    needed = budget.within(amount, everything)
    taken = dict.fromkeys(kernels.weights, 0)
    order: list[str] = []
    prices = {path: _prices(kernels, path, criterion) for path in kernels.weights}

    def saved() -> float:
        return sum(kernels.saved(path, rings) for path, rings in taken.items())

    while saved() < needed:
        path = min((p for p in taken if taken[p] < len(prices[p])), key=lambda p: prices[p][taken[p]])
        taken[path] += 1
        order.append(path)
    if order and on_the_way:
        taken[order.pop()] -= 1
    else:
        for path in reversed(order):  # what the last one made superfluous
            taken[path] -= 1
            if saved() < needed:
                taken[path] += 1
    return {path: rings for path, rings in taken.items() if rings}


def _prices(kernels: Kernels, path: str, criterion: str) -> list[float]:
    """What it costs to save one unit with each ring, from the outside in: its share of the norm of what is left."""
    weight = kernels.weights[path]
    norm = RING_NORMS[criterion](weight.double()).sum((0, 1))
    totals = [float(norm[within(norm.shape, rings)].sum()) for rings in range(kernels.rings[path] + 1)]
    prices = []
    for rings, (left, after) in enumerate(pairwise(totals)):
        saved = kernels.saved(path, rings + 1) - kernels.saved(path, rings)
        share = (left - after) / left if left else 0.0
        prices.append(share / saved if saved else float("inf"))
    return prices


def within(shape: Sequence[int], rings: int) -> tuple[slice, ...]:
    """What is left of a kernel without some rings."""
    lost = [(side - inner(side, rings)) // 2 for side in shape]
    return tuple(slice(each, side - each) for each, side in zip(lost, shape, strict=True))


def shrink_chosen(
    model: nn.Module,
    calls: Sequence[ModuleCall] | None,
    kernels: Kernels,
    choose: Callable[[Mapping[str, str]], Mapping[str, int]],
    optimizers: Iterable[Optimizer] = (),
) -> tuple[Plan, Kernels]:
    """Take off the rings that ``choose`` picks; convolutions that turn out to need theirs are left alone.

    Args:
        model: The model.
        calls: Calls of the model to compare it with the masked one; None: don't.
        kernels: The convolutions that were found in it.
        choose: Picks the number of rings of each, given those that can't shrink and why.
        optimizers: Those that hold its parameters.

    Returns:
        The plan, empty if nothing was chosen, and the convolutions that can shrink.

    Raises:
        PruningError: ``choose`` finds that what is left can't reach the amount; everything is as it was.
    """
    optimizers = tuple(optimizers)
    rings: Mapping[str, int] = {}

    def choose_paths(refused: Mapping[str, str]) -> Collection[str]:
        nonlocal rings
        rings = choose(refused)
        return list(rings)

    def attempt(paths: Collection[str]) -> tuple[Plan, Change]:
        asked = {path: rings[path] for path in paths}
        following = {copy: rings[path] for copy, path in kernels.copies.items() if path in asked}
        return remove_rings(model, calls, asked | following, optimizers)

    plan, refused = settle(choose_paths, attempt)
    kernels = kernels.without(refused)
    return (Plan({}, {}) if plan is None else _with_reasons(plan, kernels)), kernels


def _with_reasons(plan: Plan, kernels: Kernels) -> Plan:
    return Plan(plan.kept, plan.shapes, plan.attributes, frozen=dict(kernels.frozen))


def remove_rings(
    model: nn.Module,
    calls: Sequence[ModuleCall] | None,
    rings: Mapping[str, int],
    optimizers: Iterable[Optimizer] = (),
) -> tuple[Plan, Change]:
    """Take rings off kernels: a transaction, checked by running the model.

    Args:
        model: The model.
        calls: Calls of the model to compare it with the masked one; None: don't.
        rings: Paths of convolutions -> how many rings each loses.
        optimizers: Those that hold its parameters.

    Raises:
        SurgeryError: The model differs from the masked one; everything is as it was.
    """
    tensors = named_tensors(model)
    kept: dict[str, dict[int, Tensor]] = {}
    for path, count in rings.items():
        name = f"{path}.weight" if path else "weight"
        places = within(tensors[name].shape[2:], count)
        dims = {dim: torch.arange(p.start, p.stop) for dim, p in enumerate(places, start=2)}
        kept[name] = {dim: index for dim, index in dims.items() if len(index) < tensors[name].size(dim)}
    names = {id(tensors[name]): name for name in kept}
    aliases = {alias: names[id(tensor)] for alias, tensor in tensors.items() if id(tensor) in names}
    shapes = {alias: list(tensors[alias].shape) for alias in aliases}
    masked = MaskedModel(model, kept)
    change = checked(
        model, calls, masked, lambda: shrink(model, kept, optimizers, numbers={}), f"shrink {', '.join(rings)}"
    )
    lists = {name: {dim: index.tolist() for dim, index in dims.items()} for name, dims in kept.items()}
    plan = Plan({alias: lists[name] for alias, name in aliases.items()}, shapes, change.attributes)
    return plan, change
