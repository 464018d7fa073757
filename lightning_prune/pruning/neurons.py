"""Neuron pruning without Lightning: trace, choose, remove, check."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from lightning_prune.errors import NoEffectWarning, PruningError, SurgeryError
from lightning_prune.graph.callsites import (
    CallSite,
    ModuleCall,
    ModuleStack,
    Size,
    SizeChecker,
    SizePatch,
    install_patches,
    installed_patches,
    remove_patches,
)
from lightning_prune.graph.copies import tie_copies
from lightning_prune.graph.groups import Group, Groups, draw_groups, find_groups
from lightning_prune.graph.labels import CALCULATES
from lightning_prune.graph.numbers import NumberRecorder, Numbers, numbers_of, where_numbers_differ
from lightning_prune.graph.run import (
    cast,
    cuda_devices,
    doubled,
    no_collection,
    plain_encoders,
    run_calls,
    undisturbed,
)
from lightning_prune.graph.sized import SHAPES
from lightning_prune.graph.tree import leaves, modules_of, named_tensors
from lightning_prune.graph.tree import tensors as tensors_of
from lightning_prune.graph.verify import MaskedModel, NumbersDifferError, OutputsDifferError, compare_outputs
from lightning_prune.pruning.criteria import NeuronCriterion, collect_now, get_neuron_criterion, relative
from lightning_prune.pruning.latency import macs_for_latency
from lightning_prune.pruning.plan import Plan
from lightning_prune.pruning.prunable import Prunable
from lightning_prune.pruning.repair import COMPENSATIONS, Repair, add_to
from lightning_prune.pruning.select import (
    BUDGETS,
    Curves,
    Dense,
    check_amount,
    check_choice,
    check_flag,
    check_neuron_scope,
    check_scores,
    copies_to_tie,
    globs,
    measure_dense,
    pick,
    select_neurons,
)
from lightning_prune.pruning.sensitivity import damage_curves
from lightning_prune.pruning.surgery import Change, Value, shrink

__all__ = ["Choice", "as_optimizers", "prune_neurons", "remove_chosen", "remove_neurons"]

RANDOM = object()
"""Stands for an output that differs from run to run."""


@dataclass(frozen=True)
class Choice:
    """Which neurons go: the options of `prune_neurons` and `NeuronPruning` that say so. See there."""

    of: str = "neurons"
    scope: str | Mapping[str, float] = "global"
    round_to: int = 1
    min_channels: int = 1
    include: str | Sequence[str] | None = None
    exclude: str | Sequence[str] | None = None
    exact_only: bool = False

    def check(self) -> None:
        """Raise a PruningError if an option is wrong in itself."""
        check_choice("of", self.of, BUDGETS)
        check_neuron_scope(self.scope, self.of)
        for name in ("round_to", "min_channels"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise PruningError(f"{name} must be a whole number of at least 1, got {value!r}")
        check_flag("exact_only", self.exact_only)
        globs("include", self.include)
        globs("exclude", self.exclude)

    def allowed(self, model: nn.Module, groups: Groups, judge: NeuronCriterion) -> Tensor:
        """The neurons that may go, bool (neurons,).

        Raises:
            PruningError: None may.
        """
        allowed = pick(groups, globs("include", self.include), globs("exclude", self.exclude), self.exact_only)
        if not bool(allowed.any()):
            raise PruningError(f"no neuron of this model can be pruned.\n{groups}")
        allowed &= judge.judged(model, groups)
        if not bool(allowed.any()):
            raise PruningError(f"criterion {judge.name!r} can judge none of the neurons that may go{judge.advice}")
        return allowed

    def select(
        self,
        groups: Groups,
        scores: Tensor,
        allowed: Tensor,
        amount: float,
        judge: NeuronCriterion,
        *,
        dense: Dense,
        part: float = 1.0,
        curves: Curves | None = None,
        on_the_way: bool = False,
    ) -> Tensor:
        """The neurons that stay, bool (neurons,): `select_neurons` with these options; latency stands for MACs."""
        return select_neurons(
            groups,
            scores if judge.comparable else relative(groups, scores),
            allowed,
            amount,
            of="macs" if self.of == "latency" else self.of,
            scope=self.scope,
            round_to=self.round_to,
            min_channels=self.min_channels,
            comparable=judge.comparable,
            curves=curves,
            part=part,
            dense=dense,
            on_the_way=on_the_way,
        )

    def curves(
        self, model: nn.Module, groups: Groups, scores: Tensor, allowed: Tensor, calls: Sequence[ModuleCall]
    ) -> Curves | None:
        """What the scope needs to know of the model."""
        return damage_curves(model, groups, scores, allowed, calls) if self.scope == "sensitivity" else None


def prune_neurons(
    model: nn.Module,
    example_inputs: Any,
    amount: float,
    *,
    of: str = "neurons",
    criterion: str | Callable[[Tensor], Tensor] = "l1",
    scope: str | Mapping[str, float] = "global",
    round_to: int = 1,
    min_channels: int = 1,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    exact_only: bool = False,
    compensate: str | None = None,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    verify: bool = True,
) -> Plan:
    """Remove the least important neurons of a model, in place.

    Args:
        model: Any module.
        example_inputs: A tensor, a tuple of positional or a dict of keyword arguments of ``model``.
        amount: Fraction that goes, [0, 1).
        of: What the fraction is of: ``"neurons"``, ``"params"``, ``"macs"``, or ``"latency"``: the time that a forward
            of ``example_inputs`` takes on this machine, measured on pruned copies.
        criterion: What makes a neuron important: ``"l1"``, ``"l2"`` norm of all its slices; ``"geometric_median"``,
            its distance to the others; ``"lamp"``; ``"bn_scale"``, its norm layer's scale; ``"taylor"``, from the
            gradients that are there; ``"activation"``, its mean magnitude for ``example_inputs``; ``"random"``; or a
            function that maps weights of neurons, shape (neurons, k), to scores, (neurons,).
        scope: ``"global"`` ranks all neurons together, ``"layer"`` takes the same fraction of each group,
            ``"sensitivity"`` from each what changes the outputs as much; or fractions of neurons by glob on module
            names (``amount`` where none matches).
        round_to: Groups shrink to multiples of this only.
        min_channels: Groups keep at least so many neurons.
        include: Globs on module names: only neurons that these layers make (None: all).
        exclude: Globs on module names: no neurons that these layers make.
        exact_only: Leave groups alone whose removal does not equal masking exactly.
        compensate: ``"least_squares"``: solve for the weights of linear layers and convolutions that read what is gone,
            so that their outputs for ``example_inputs`` change least. None: they stay as they are.
        optimizer: The optimizer or optimizers that hold the parameters; state and param groups follow. Parts that none
            of them trains and that are copies of a part that is trained (momentum encoders) lose the same neurons.
        verify: Compare with the masked model, one forward of each, and roll back if they differ.

    Returns:
        What was kept.

    Raises:
        PruningError: Bad arguments, nothing prunable or a budget out of reach; the model is untouched.
        SurgeryError: The pruned model differs where it must not; the model is as it was.

    Warns:
        NoEffectWarning: Nothing was removed.

    Source: the criteria name theirs, see `lightning_prune.pruning.criteria`.
    """
    amount = check_amount(amount)
    option = Choice(of, scope, round_to, min_channels, include, exclude, exact_only)
    option.check()
    check_flag("verify", verify)
    judge = get_neuron_criterion(criterion)
    check_compensate(compensate)
    optimizers = as_optimizers(optimizer)
    with torch.inference_mode(False), torch.no_grad():
        groups = find_groups(model, example_inputs)
        copies = copies_to_tie(model, optimizers, globs("exclude", exclude))
        if copies and groups.origin is not None:
            tie_copies(groups.origin.trace, copies)
            groups = draw_groups(groups.origin.trace)

        def choose(groups: Groups) -> Tensor:
            allowed = option.allowed(model, groups, judge)
            collect_now(judge, model, groups, groups.calls)
            allowed &= judge.told(model, groups)
            scores, dense = judge.score(model, groups), measure_dense(groups, allowed)
            check_scores(groups, scores, allowed)
            curves = option.curves(model, groups, scores, allowed, groups.calls)

            def select(amount: float) -> Tensor:
                return option.select(groups, scores, allowed, amount, judge, dense=dense, curves=curves)

            return select(latency_amount(model, groups, select, amount) if of == "latency" else amount)

        def repair(groups: Groups, alive: Tensor) -> Repair:
            return Repair.of(model, groups, alive, [groups.calls], compensate)

        plan, _, _, changes = remove_chosen(model, groups, choose, optimizers=optimizers, verify=verify, repair=repair)
        add_to(model, changes)
    if isinstance(model, Prunable):
        model.pruning_plan = model.pruning_plan.then(plan)
    if not plan:
        warn_no_effect(f"amount={amount:g} of the {of} rounds to no neuron at all")
    return plan


def latency_amount(model: nn.Module, groups: Groups, select: Callable[[float], Tensor], amount: float) -> float:
    """The fraction of the MACs that must go so that ``amount`` of the latency does, see `macs_for_latency`."""

    def remove(small: nn.Module, alive: Tensor) -> None:
        remove_neurons(small, groups, alive, verify=False)

    return macs_for_latency(model, groups, groups.calls, select, remove, amount)


def check_compensate(compensate: Any) -> None:
    """Raise a PruningError unless it is None or a way to compensate."""
    if compensate is not None:
        check_choice("compensate", compensate, COMPENSATIONS)


def as_optimizers(optimizer: Any) -> tuple[Optimizer, ...]:
    """One optimizer or several, as a tuple; a PruningError for anything else."""
    given = () if optimizer is None else (optimizer,) if isinstance(optimizer, Optimizer) else optimizer
    if not isinstance(given, (tuple, list)) or not all(isinstance(each, Optimizer) for each in given):
        raise PruningError(f"optimizer must be a torch optimizer or a list of them, got {optimizer!r}")
    return tuple(given)


def warn_no_effect(message: str) -> None:
    """Warn that nothing was pruned."""
    warnings.warn(message, NoEffectWarning, stacklevel=3)


def remove_chosen(
    model: nn.Module,
    groups: Groups,
    choose: Callable[[Groups], Tensor],
    *,
    optimizers: Iterable[Optimizer] = (),
    verify: bool = True,
    repair: Callable[[Groups, Tensor], Repair] = lambda groups, alive: Repair(),
    keep: bool = True,
    refused: Callable[[dict[str, str]], None] = lambda reasons: None,
) -> tuple[Plan, Groups, Tensor, dict[str, Tensor]]:
    """Remove what ``choose`` picks. Groups that turn out not to fit are drawn along another axis, or frozen.

    Args:
        model: The model that ``groups`` were found in.
        groups: Its groups.
        choose: Maps groups to the neurons that stay, bool (neurons,).
        optimizers: Those that hold its parameters.
        verify: Compare the outputs with those of the masked model.
        repair: Notes what the whole model does, to make up for the removal.
        refused: Hears of groups whose removal fails: their keys, and why.
        keep: Keep the model pruned; or only find out what can go, and put everything back.

    Returns:
        The plan, the groups that it was made from, which of their neurons stay, and what is to be added to
        tensors to repair it.

    Raises:
        PruningError: ``choose`` finds that what is left can't reach the amount; everything is as it was.
        SurgeryError: The model fails even if nothing is removed; everything is as it was.
    """
    optimizers = tuple(optimizers)
    while True:
        alive = choose(groups)
        if bool(alive.all()):
            return Plan({}, {}), groups, alive, {}
        noted = repair(groups, alive)
        try:
            plan, change = _attempt(model, groups, alive, optimizers, verify)
        except SurgeryError:
            faulty = _faulty(model, groups, alive, verify)
            if not faulty:
                raise
            refused({groups.keys[number]: reason for number, reason in faulty.items()})
            groups = groups.refuse(faulty)
            continue
        try:
            changes = noted.changes(model) if keep else {}
        except BaseException:
            change.undo()
            raise
        if not keep:
            change.undo()
        return plan, groups, alive, changes


def _faulty(model: nn.Module, groups: Groups, alive: Tensor, verify: bool) -> dict[int, str]:
    """The groups without which a removal succeeds, found by halving, each with a reason; nothing is removed."""
    touched = [
        number for number, numbers in enumerate(groups.ranges) if not bool(alive[numbers.start : numbers.stop].all())
    ]

    reasons: dict[int, str] = {}

    def works(numbers: Sequence[int], suspect: int | None) -> bool:
        some = torch.ones_like(alive)
        for number in numbers:
            neurons = groups.ranges[number]
            some[neurons.start : neurons.stop] = alive[neurons.start : neurons.stop]
        try:
            _attempt(model, groups, some, (), verify, explain=suspect is not None)[1].undo()
        except SurgeryError as error:
            if suspect is not None:
                why = str(error.__cause__ or error).splitlines()[0]
                known = groups.prunable[suspect].mixing
                reasons[suspect] = why if _is_news(why, known) else f"its removal fails: {why}"
            return False
        return True

    def search(good: list[int], candidates: list[int]) -> None:
        """Adds to ``good`` those of the candidates that work together with it."""
        alone = candidates[0] if len(candidates) == 1 else None
        if works([*good, *candidates], alone):
            good += candidates
        elif alone is None:
            half = len(candidates) // 2
            search(good, candidates[:half])
            search(good, candidates[half:])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the real attempt has said it
        search([], touched)
    return reasons


def _is_news(why: str, mixing: Collection[str]) -> bool:
    return why.startswith(CALCULATES) and why not in mixing


def remove_neurons(
    model: nn.Module,
    groups: Groups,
    alive: Tensor,
    *,
    optimizers: Iterable[Optimizer] = (),
    verify: bool = True,
) -> Plan:
    """Remove all neurons of ``groups`` that are not ``alive``: a transaction, checked by running the model.

    Args:
        model: The model that ``groups`` were found in.
        groups: Its groups.
        alive: Bool (neurons,).
        optimizers: Those that hold its parameters.
        verify: Compare the outputs with those of the masked model.

    Raises:
        SurgeryError: The pruned model fails or differs where it must not; everything is as it was.

    Warns:
        UserWarning: A call can't be repeated in evaluation mode, so that it could not be checked.
    """
    return _attempt(model, groups, alive, optimizers, verify)[0]


def _attempt(
    model: nn.Module,
    groups: Groups,
    alive: Tensor,
    optimizers: Iterable[Optimizer],
    verify: bool,
    calls: Sequence[ModuleCall] | None = None,
    *,
    explain: bool = False,
    exact: bool = False,
) -> tuple[Plan, Change]:
    """The removal, and how to take it back.

    ``calls``: those that the model can repeat, where that is known; ``explain``: where the outputs differ, look whether
    the forward calculates with a size; ``exact``: compare in double precision.
    """
    kept = groups.kept(alive)
    before = installed_patches(model)
    touched = [
        number for number, numbers in enumerate(groups.ranges) if not bool(alive[numbers.start : numbers.stop].all())
    ]
    tensors = named_tensors(model)
    counts = groups.counts(alive)
    masked = MaskedModel(model, kept, groups.unmasked, groups.own)
    mixed = [n for n in touched if not masked.norms.keys() >= set(groups.prunable[n].mixing)]
    if verify and 0 < len(mixed) < len(touched):  # those that can be compared, by themselves
        rest = alive.clone()
        for number in mixed:
            rest[groups.ranges[number].start : groups.ranges[number].stop] = True
        _attempt(model, groups, rest, (), verify, calls, explain=explain)[1].undo()
    with no_collection(), undisturbed(model), plain_encoders():
        model.eval()
        seen = SizeChecker(ModuleStack(model), {})
        with ExitStack() as watching:
            if groups.data_dependent or any(call.shapes is None for call in groups.calls):
                # Traced in training mode, say: other numbers of rows than those of the trace may be right now.
                watching.enter_context(seen.stack.watch())
                watching.enter_context(seen)
            with doubled(model, exact):
                check = _Check.of(masked, groups, calls, compare=verify and not mixed, exact=exact)
        change = shrink(model, kept, optimizers, counts=counts, numbers=_numbers(model, groups, alive, kept, tensors))
        change.steps.insert(0, lambda: _restore_patches(model, before))
        try:
            with undisturbed(model), doubled(model, exact):
                patches = check.passes(model, groups, alive, seen.asked)
        except BaseException as error:
            if exact:
                change.undo()
                raise
            differs = isinstance(error, (OutputsDifferError, NumbersDifferError))
            numbers = numbers_of(model, check.calls) if explain and differs else None
            change.undo()
            if numbers is not None and (where := where_numbers_differ(numbers_of(model, check.calls), numbers)):
                raise SurgeryError(f"{CALCULATES}{where}") from None
            if not isinstance(error, Exception):  # such as the user's Ctrl-C
                raise
            if isinstance(error, OutputsDifferError) and _rounds(model):
                # A threshold or a ranking, of boxes say, makes much of a rounding error: one that double precision
                # hardly has. Where that fails as well, this error tells.
                with suppress(Exception):
                    return _attempt(model, groups, alive, optimizers, verify, calls, explain=explain, exact=True)
            able = check.repeatable(model)
            if len(able) < len(check.calls):
                return _attempt(model, groups, alive, optimizers, verify, able, explain=explain)
            made_by = ", ".join(groups.prunable[number].name for number in touched)
            raise SurgeryError(f"Can't remove neurons of {made_by}: {error}\nThe model is as it was.") from error
    return _plan(groups, [groups.prunable[n] for n in touched], kept, tensors, change, patches, counts), change


def _plan(
    groups: Groups,
    touched: Sequence[Group],
    kept: Mapping[str, Mapping[int, Tensor]],
    tensors: Mapping[str, Tensor],
    change: Change,
    patches: Sequence[SizePatch],
    counts: dict[str, list[int]],
) -> Plan:
    """The record of a removal; ``tensors`` are those before it."""
    names: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        names.setdefault(id(tensor), []).append(name)
    aliases = {alias: name for name in kept for alias in names[id(tensors[name])]}
    lists = {name: {dim: index.tolist() for dim, index in dims.items()} for name, dims in kept.items()}
    return Plan(
        kept={alias: lists[name] for alias, name in aliases.items()},
        shapes={alias: list(tensors[alias].shape) for alias in aliases},
        attributes=change.attributes,
        patches=tuple(patches),
        counts=counts,
        approximate={group.name: ", ".join(group.mixing) for group in touched if group.mixing},
        frozen={str(part): group.frozen or "" for group in groups.frozen for part in group.slices},
    )


@dataclass(frozen=True)
class _Check:
    """How a removal is checked.

    Attributes:
        calls: The calls of the model, or of its parts, to run after it.
        expected: What each gives if the removed slices are zero; RANDOM where it draws random numbers; None where only
            shapes are compared.
        numbers: What that run calculates with; None where only shapes are compared.
        exact: The model runs in double precision: numbers of rows that depend on values are the same too.
    """

    calls: Sequence[ModuleCall]
    expected: Sequence[Any]
    numbers: Numbers | None = None
    exact: bool = False

    @classmethod
    def of(
        cls,
        masked: MaskedModel,
        groups: Groups,
        calls: Sequence[ModuleCall] | None,
        *,
        compare: bool,
        exact: bool,
    ) -> _Check:
        """Before the removal: run the masked model, or where nothing can be compared, note the shapes.

        Raises:
            SurgeryError: ``exact``, and the model does not run in double precision.
        """
        if calls is None:
            calls = [call for call in groups.calls if call.repeatable]
        if exact:
            calls = [cast(call, torch.float64) for call in calls]
            try:
                with NumberRecorder() as noted:
                    outputs = replace(masked).outputs(calls)  # with the tensors that there are now
                return cls(calls, outputs, noted.found, exact=True)
            except Exception as error:
                raise SurgeryError(f"{type(masked.model).__name__} can't run in double precision") from error
        if not compare:
            return cls(calls, [None] * len(calls))
        return _on_smaller_images(masked, groups, calls) or _on_the_same(masked, calls)

    def passes(
        self, model: nn.Module, groups: Groups, alive: Tensor, asked: Mapping[CallSite, Mapping[int, Any]]
    ) -> list[SizePatch]:
        """After the removal: the sized calls that had to be patched; ``asked``: sizes in the whole model's calls.

        Raises:
            SurgeryError: The outputs differ where they must not, or what they are calculated with.
        """
        with NumberRecorder() as noted:
            patches, actual = _patch_sizes(model, groups, alive, self.calls, asked)
        if patches:
            with NumberRecorder() as noted:
                actual = run_calls(model, self.calls)
        if any(isinstance(module, nn.TransformerEncoderLayer) for module in modules_of(model).values()):
            with plain_encoders(False):  # as users run them
                actual = run_calls(model, self.calls)
        for call, wanted, got in zip(self.calls, self.expected, actual, strict=True):
            # A part's output may shrink, the model's never; where shapes depend on values they may differ.
            fixed = call.path == "" and (self.exact or not groups.data_dependent)
            if wanted is None and fixed and call.shapes is not None:
                shapes = tuple(tensor.shape for tensor in tensors_of(got))
                if shapes != call.shapes:
                    raise SurgeryError(f"outputs have shapes {_listed(shapes)} after, {_listed(call.shapes)} before")
            elif wanted is not None and wanted is not RANDOM and (fixed or _same_shapes(wanted, got)):
                compare_outputs(wanted, got)
        if self.numbers is not None and where_numbers_differ(self.numbers, noted.found):
            raise NumbersDifferError("the forward calculates with the number of neurons")
        return patches

    def repeatable(self, model: nn.Module) -> list[ModuleCall]:
        """The calls that the model as it is can run; for the others there is a warning."""
        able = []
        for call in self.calls:
            try:
                run_calls(model, [call])
            except Exception as error:  # whatever the user's forward raises: it is the whole model that fails here
                _warn_unchecked(call, model, error)
            else:
                able.append(call)
        return able


def _rounds(model: nn.Module) -> bool:
    return any(each.is_floating_point() and each.dtype != torch.float64 for each in model.parameters())


def _listed(shapes: Iterable[Any]) -> str:
    return ", ".join(str(tuple(shape)) for shape in shapes)


def _warn_unchecked(call: ModuleCall, model: nn.Module, error: Exception) -> None:
    warnings.warn(
        f"{call.path or type(model).__name__} raised {type(error).__name__} when run again in evaluation mode "
        f"({error}): its removal is not checked",
        stacklevel=2,
    )


def _restore_patches(model: nn.Module, patches: Iterable[SizePatch]) -> None:
    remove_patches(model)
    install_patches(model, patches)


WIDTHS = frozenset(
    [
        "channel",
        "channels",
        "chans",
        "d",
        "dim",
        "dims",
        "embd",
        "embed",
        "emb",
        "embedding",
        "feature",
        "features",
        "filters",
        "hidden",
        "inner",
        "width",
        "planes",
        "units",
        "neurons",
        "in",
        "out",
        "input",
        "output",
    ]
)
"""Words in the names of attributes that hold a width; others are left alone unless the forward uses them as a size."""


def _numbers(
    model: nn.Module, groups: Groups, alive: Tensor, kept: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> dict[str, dict[str, Value]]:
    """The integers that modules hold and that must change: those used as sizes, and those that tell a width."""
    modules = modules_of(model)
    found: dict[str, dict[str, Value]] = {}
    for site, size in groups.numbers(alive).items():
        held = modules[site.module].__dict__.get(site.name)
        before = held[site.place] if isinstance(held, (tuple, list)) and site.place is not None else held
        if isinstance(before, int) and not groups.same_quotients(site, before, size, alive):
            continue
        if site.place is None:
            found.setdefault(site.module, {})[site.name] = size
        elif isinstance(held, (tuple, list)):
            numbers: list[Any] = list(found.get(site.module, {}).get(site.name, held))  # type: ignore[arg-type]
            numbers[site.place] = size
            found.setdefault(site.module, {})[site.name] = tuple(numbers)
    used = {(site.module, site.name) for site in (*groups.attributes, *groups.divided)} | groups.numeric
    sizes = [
        (name, dim, size, len(kept.get(name, {}).get(dim, range(size))))
        for name, tensor in tensors.items()
        for dim, size in enumerate(tensor.shape)
    ]
    for path, module in modules.items():
        if type(module).__module__.startswith("torch.nn."):
            continue  # what these hold follows from their tensors
        prefix = f"{path}." if path else ""
        for name, value in module.__dict__.items():
            if type(value) is not int or value < 2 or (path, name) in used or not WIDTHS & set(name.split("_")):
                continue
            after = {new for owner, _, size, new in sizes if size == value and owner.startswith(prefix)}
            if len(after) == 1 and after != {value}:
                found.setdefault(path, {})[name] = after.pop()
    return found


def _on_the_same(masked: MaskedModel, calls: Sequence[ModuleCall]) -> _Check:
    """What the masked model gives, RANDOM where it draws random numbers in evaluation mode too.

    Calls that can't be repeated, such as those that need training mode, are left out.
    """
    repeated: list[ModuleCall] = []
    outputs: list[Any] = []
    numbers: Numbers = []
    for call in calls:
        before = _random_states(masked.model)
        try:
            with NumberRecorder() as noted:
                outputs += masked.outputs([call])
        except Exception as error:  # whatever the user's forward raises: it is the whole model that fails here
            _warn_unchecked(call, masked.model, error)
            continue
        repeated.append(call)
        numbers += noted.found
        if not all(map(torch.equal, before, _random_states(masked.model))):
            outputs[-1] = RANDOM
            name = call.path or type(masked.model).__name__
            warnings.warn(f"{name} draws random numbers in evaluation mode: its removal is not checked", stacklevel=2)
    return _Check(repeated, outputs, numbers)


SMALL = 64
"""Pixels per side of the images on which a removal is checked, where the model takes them."""


def _on_smaller_images(masked: MaskedModel, groups: Groups, given: Sequence[ModuleCall]) -> _Check | None:
    """The same calls with a corner of large images, and what the masked model gives: a check that costs less.

    Equality must hold for every input. None where the model takes no other size, or where shapes are written in
    calls, which may be those of what was traced only.
    """
    shaped = any(not extent.fixed for (site, _), extent in groups.sized.items() if site.function in SHAPES)
    if shaped or groups.data_dependent:
        return None
    cut = 0

    def corner(leaf: Any) -> Any:
        nonlocal cut
        if not isinstance(leaf, Tensor) or leaf.dim() < 4 or min(leaf.shape[-2:]) < 1.5 * SMALL:
            return leaf
        cut += 1
        return leaf[..., :SMALL, :SMALL]

    calls = [replace(call, args=tree_map(corner, call.args), kwargs=tree_map(corner, call.kwargs)) for call in given]
    if not cut:
        return None
    before = _random_states(masked.model)
    try:
        with NumberRecorder() as noted:
            outputs = masked.outputs(calls)
    except Exception:  # a model that wants its own size is checked on that
        return None
    sure = all(bool(each.isfinite().all()) for each in tensors_of(outputs))
    sure = sure and all(map(torch.equal, before, _random_states(masked.model)))
    return _Check(calls, outputs, noted.found) if sure else None


def _random_states(model: nn.Module) -> list[Tensor]:
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in cuda_devices(model))]


def _patch_sizes(
    model: nn.Module,
    groups: Groups,
    alive: Tensor,
    calls: Sequence[ModuleCall],
    asked: Mapping[CallSite, Mapping[int, Any]],
) -> tuple[list[SizePatch], list[Any]]:
    """Find the sized calls that still ask for the old size and make them follow; also the outputs of the run.

    A size that the forward computes from its input is right by itself; only running it tells. What the run does not
    reach, such as a branch of training mode, gets the new size written in.
    """
    sizes, installed = groups.sizes(alive), {(patch.site, patch.dim): patch for patch in installed_patches(model)}
    if not sizes and not installed:
        return [], run_calls(model, calls)
    for (site, dim), patch in installed.items():
        sizes.setdefault(site, {}).setdefault(dim, patch.size)
    remove_patches(model)
    stack = ModuleStack(model)
    free = {
        place
        for place, extent in groups.sized.items()
        if extent.fixed and place not in installed and place[0].function != "pad"  # what is missing to a width grows
    }
    for site, dim in free:
        size = asked.get(site, {}).get(dim)
        if type(size) is int and size >= 0 and dim in sizes.get(site, {}):
            sizes[site][dim] = size
    varying = {place for place, extent in groups.sized.items() if extent.repeats}
    checker = SizeChecker(stack, sizes, free, varying)
    with stack.watch(), checker:
        outputs = run_calls(model, calls)
    places = [(site, dim) for site, dims in sizes.items() for dim in dims]
    found = [_patch(place, installed.get(place), sizes, groups, alive, checker) for place in places]
    patches = [patch for patch in found if patch is not None]
    install_patches(model, patches)
    return [patch for patch in patches if patch is not installed.get((patch.site, patch.dim))], outputs


def _patch(
    place: tuple[CallSite, int],
    before: SizePatch | None,
    sizes: Mapping[CallSite, Mapping[int, Size]],
    groups: Groups,
    alive: Tensor,
    checker: SizeChecker,
) -> SizePatch | None:
    """The patch that a sized call needs; ``before``, the one that it has, where nothing changes."""
    site, dim = place
    extent, asked = groups.sized.get(place), checker.asked.get(site)
    size = checker.wrong.get(site, {}).get(dim, sizes[site][dim])
    whole: Size | None = None if extent is None else len(extent.unit_of)
    if place in groups.picked:
        whole = groups.picked[place][1]
    right = asked is not None or whole is None or size == whole
    if before is None and right and dim not in checker.wrong.get(site, {}):
        return None
    if size == -1 and (extent is None or extent.repeats):  # it may be a multiple of the batch
        own = None
    elif asked is not None:
        own = None if isinstance(asked.get(dim), Tensor) else asked.get(dim)
    else:
        own = before.asked if before is not None else None if place in groups.picked else whole
    calls = checker.stack.calls.get((site.module, site.function), 0 if before is None else before.calls)
    ranks = checker.ranks.get(site, (-1, -1) if before is None else before.ranks)
    patch = SizePatch(site, dim, size, own, groups.read_of(site, alive), ranks, calls, before)
    if before is not None and replace(patch, before=before.before).to_dict() == before.to_dict():
        return before
    return patch


def _same_shapes(a: Any, b: Any) -> bool:
    return [getattr(leaf, "shape", None) for leaf in leaves(a)] == [getattr(leaf, "shape", None) for leaf in leaves(b)]
