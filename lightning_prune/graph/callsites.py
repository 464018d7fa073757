"""Call sites: "the k-th call of this function inside this module", found while tracing, changed afterwards.

A forward may hold a size as a number (``x.view(-1, 16 * 5 * 5)``). The number can't be reached from outside,
but the call can: a `TorchFunctionMode` sees it. What must change is plain data, a `SizePatch`; `install_patches`
gives the one module an instance-level ``forward`` that rewrites it, every other module stays as it is.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import FunctionType, MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from lightning_prune.errors import PruningError
from lightning_prune.graph.replaced import CallReplacer, Replacement, shielded
from lightning_prune.graph.sized import COUNTED_AS, SIZED_FUNCTIONS, SizedFunction, kind_of, shape_of_input
from lightning_prune.graph.tree import OWN, modules_of

__all__ = [
    "Attribute",
    "CallListener",
    "CallRecorder",
    "CallSite",
    "ModuleCall",
    "ModuleStack",
    "Number",
    "PatchedForward",
    "SizeChecker",
    "SizePatch",
    "in_backward",
    "install_patches",
    "installed_patches",
    "marked_attributes",
    "remove_patches",
    "replace_calls",
    "replaced_calls",
    "untraced",
    "watched_size",
]


@contextmanager
def untraced() -> Iterator[None]:
    """What runs inside is no part of a model that is being watched: a hook's own arithmetic, for one."""
    with _disable_current_modes(), torch._C.DisableTorchFunction():
        yield


def in_backward() -> bool:
    """Whether gradients are flowing back right now: a checkpointed forward runs a second time then."""
    return torch._C._current_graph_task_id() != -1


Size = int | tuple[int, ...]
"""What stands at a place of a call: a size, or a list of indices."""


def _as_data(size: Size | None) -> int | list[int] | None:
    return list(size) if isinstance(size, tuple) else size


def _as_size(data: Any) -> Size:
    return tuple(int(item) for item in data) if isinstance(data, (list, tuple)) else int(data)


def _is(given: Any, size: Size) -> bool:
    """Whether a call asks for a size; what a tensor of indices holds is not looked at in a forward."""
    return not isinstance(given, Tensor) and bool(given == size)


@dataclass(frozen=True, order=True)
class CallSite:
    """The ``call``-th call (from 0) of ``function`` while the forward of the module at ``module`` runs."""

    module: str
    function: str
    call: int


@dataclass(frozen=True)
class SizePatch:
    """At ``site``, the size at place ``dim`` among those that the call asks for is to be ``size``.

    A list of indices that the call picks counts as one size, a tuple.

    A forward need not make the same calls each time: one more in training mode, another number of turns of a loop.
    So a patch tells its call by what it asks for and of which tensor, and by its number only where that is not enough.

    Attributes:
        site: The call in the traced run.
        dim: The place.
        size: What is to be asked for.
        asked: What the forward itself asks for there; None: that varies, or it leaves it open.
        of: Dimensions of the tensor that it is asked of, and their sizes.
        ranks: How many sizes are asked for, and of how many dimensions; -1: that varies.
        calls: How often that run called the function in this module; 0: not known.
        before: The patch that this one takes the place of.
    """

    site: CallSite
    dim: int
    size: Size
    asked: Size | None = field(default=None, compare=False)
    of: tuple[tuple[int, int], ...] = field(default=(), compare=False)
    ranks: tuple[int, int] = field(default=(-1, -1), compare=False)
    calls: int = field(default=0, compare=False)
    before: SizePatch | None = field(default=None, compare=False)

    def fits(self, asked: Sequence[Any], shape: Sequence[int]) -> bool:
        """Whether a call that asks for these sizes of a tensor of this shape is one that the patch is for."""
        if any(own not in (-1, other) for own, other in zip(self.ranks, (len(asked), len(shape)), strict=True)):
            return False
        if self.asked is not None and not (self.dim < len(asked) and _is(asked[self.dim], self.asked)):
            return False
        return all(-len(shape) <= dim < len(shape) and shape[dim] == size for dim, size in self.of)

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        site = self.site
        data: dict[str, Any] = {"module": site.module, "function": site.function, "call": site.call}
        data |= {
            "dim": self.dim,
            "size": _as_data(self.size),
            "asked": _as_data(self.asked),
            "of": [list(each) for each in self.of],
        }
        data |= {"ranks": list(self.ranks), "calls": self.calls}
        return data if self.before is None else data | {"before": self.before.to_dict()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SizePatch:
        """From what `to_dict` gave."""
        if data["function"] not in SIZED_FUNCTIONS:
            raise PruningError(f"unknown function {data['function']!r}; known: {', '.join(SIZED_FUNCTIONS)}")
        site = CallSite(str(data["module"]), data["function"], int(data["call"]))
        asked, before = data["asked"], data.get("before")
        return cls(
            site,
            int(data["dim"]),
            _as_size(data["size"]),
            None if asked is None else _as_size(asked),
            tuple((int(dim), int(size)) for dim, size in data["of"]),
            (int(data["ranks"][0]), int(data["ranks"][1])),
            int(data["calls"]),
            None if before is None else cls.from_dict(before),
        )


@dataclass(frozen=True)
class ModuleCall:
    """One call of a module of a model, from outside any other of its modules: what a forward needs to run again."""

    path: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    repeatable: bool = True
    """Whether its inputs come from outside the model, and so keep their shapes when the model is pruned."""
    shapes: tuple[Any, ...] | None = None
    """Shapes of the tensors that it gives in evaluation mode, where that is known."""


@dataclass
class ModuleStack:
    """Which modules of a model are running, outermost first; keeps the calls that came from outside."""

    model: nn.Module
    on_leave: Callable[[str, Any], None] = lambda path, output: None
    is_outside: Callable[[Any], bool] = lambda inputs: True
    on_enter: Callable[[str, nn.Module, tuple[Any, ...]], None] = lambda path, module, args: None
    outermost: list[ModuleCall] = field(default_factory=list)
    calls: dict[tuple[str, str], int] = field(default_factory=dict)
    """The most calls of each function in one run of each module."""
    owners: set[str] = field(default_factory=set)
    """Paths of the modules that hold parameters, or have some below them: no losses, metrics or dropouts."""
    _running: list[tuple[str | None, dict[str, int]]] = field(default_factory=list)

    @property
    def inside(self) -> bool:
        """Whether a module with parameters is running."""
        return any(path in self.owners for path, _ in self._running)

    @property
    def running(self) -> bool:
        """Whether any module of the model is running."""
        return bool(self._running)

    @property
    def path(self) -> str:
        """Path of the innermost running module ("" for the model itself or none)."""
        for path, _ in reversed(self._running):
            if path is not None:
                return path
        return ""

    @property
    def paths(self) -> list[str]:
        """Paths of all running modules, outermost first."""
        return [path for path, _ in self._running if path is not None]

    def site(self, function: str) -> CallSite | None:
        """Count a call in every running module; where in the innermost one it is (None: no module runs)."""
        site = None
        counted = COUNTED_AS[function]
        for path, calls in self._running:
            if path is not None:
                number = calls.get(counted, 0)
                calls[counted] = number + 1
                site = CallSite(path, counted, number)
        return site

    def _note(self, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ModuleCall:
        """The call, without what would keep the activations of this run alive."""
        if not self.is_outside((args, kwargs)):
            return ModuleCall(path, (), {}, repeatable=False)
        args, kwargs = pytree.tree_map_only(Tensor, lambda t: t.detach() if t.requires_grad else t, (args, kwargs))
        return ModuleCall(path, args, kwargs)

    @contextmanager
    def watch(self) -> Iterator[ModuleStack]:
        """Follow the model's module calls; ``on_leave`` hears the output of each outermost one."""
        paths = {module: path for path, module in modules_of(self.model).items()}
        # Running a metric or a loss again would tell nothing, and count an example twice.
        holders = [path for module, path in paths.items() if any(p is not None for p in module._parameters.values())]
        self.owners = {path[:end] for path in holders for end in (*_ends(path), len(path))} | (
            {""} if holders else set()
        )
        entered: list[nn.Module] = []

        @torch._dynamo.disable  # type: ignore[untyped-decorator]
        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if module not in paths:  # a copy that the forward makes: copies have the hooks too
                return
            # Lightning sends training_step through DDP by putting a plain function in forward's place for
            # one call; such a call is not the module's own forward and can't be repeated as one.
            redirected = isinstance(module.__dict__.get("forward"), FunctionType)
            path = None if redirected or in_backward() else paths[module]
            if path is not None and path in self.owners and all(other is None for other, _ in self._running):
                self.outermost.append(self._note(path, args, kwargs))
            self._running.append((path, {}))
            entered.append(module)
            if path is not None:
                self.on_enter(path, module, args)

        @torch._dynamo.disable  # type: ignore[untyped-decorator]
        def leave(module: nn.Module, args: Any, output: Any) -> None:
            if not entered or entered[-1] is not module:  # a hook of the user's raised before ours came to enter
                return
            entered.pop()
            path, counts = self._running.pop()
            if path is not None:
                for function, number in counts.items():
                    self.calls[path, function] = max(number, self.calls.get((path, function), 0))
            if path is not None and all(other is None for other, _ in self._running):
                self.on_leave(path, output)

        hooked = [module for module in paths if not isinstance(module, torch.jit.ScriptModule)]
        hooks = [module.register_forward_pre_hook(enter, with_kwargs=True) for module in hooked]
        hooks += [module.register_forward_hook(leave, always_call=True) for module in hooked]
        try:
            yield self
        finally:
            for hook in hooks:
                hook.remove()
            self._running.clear()


def _ends(path: str) -> list[int]:
    """Where each module above ends in a path."""
    return [at for at, character in enumerate(path) if character == "."]


class SizeRewriter(TorchFunctionMode):
    """Counts sized calls of one module's forward and rewrites the sizes of those that have a patch."""

    def __init__(self, patches: Mapping[str, Sequence[SizePatch]]) -> None:
        """Take the patches of each function."""
        super().__init__()
        self.patches = patches
        self.counts = dict.fromkeys(COUNTED_AS.values(), 0)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = kind_of(func)
        if name is not None:
            counted = COUNTED_AS[name]
            number = self.counts[counted]
            self.counts[counted] = number + 1
            if counted in self.patches:
                kind = SIZED_FUNCTIONS[name]
                asked = kind.read(args, kwargs)
                sizes = _choose(self.patches[counted], number, asked, shape_of_input(args, kwargs))
                if sizes:
                    func, args, kwargs = kind.write(func, args, kwargs, sizes)
        return func(*args, **kwargs)


def _choose(patches: Sequence[SizePatch], number: int, asked: Sequence[Any], shape: Sequence[int]) -> dict[int, Size]:
    """The sizes to write in the ``number``-th call of a function, by place.

    Raises:
        PruningError: Several patches fit it, but it is none of the calls that were traced.
    """
    fitting: dict[int, dict[int, Size]] = {}
    sure = True
    for patch in patches:
        if patch.fits(asked, shape):
            fitting.setdefault(patch.site.call, {})[patch.dim] = patch.size
            sure = sure and patch.asked is not None and len(patch.of) > 0  # bool() of it stops torch 2.6's compiler
    if not fitting or number in fitting:
        return fitting.get(number, {})
    known = max(patch.calls for patch in patches)
    first, *others = fitting.values()
    alike = all(other == first for other in others)
    if number < known:  # a traced call that needed nothing, unless there was one more before it
        return first if sure and alike else {}
    if known and number % known in fitting:
        return fitting[number % known]  # another turn of a loop
    if not sure:
        return {}
    if not alike:
        raise PruningError(
            f"call {number} of {patches[0].site.function} in {patches[0].site.module or 'the model itself'} was not "
            f"there when the model was pruned, and it may be any of {sorted(fitting)}: prune the model with "
            "example_inputs that make its forward take this way"
        )
    return first


class PatchedForward:
    """Runs a module's own forward with some sizes rewritten and some activation functions replaced.

    ``module.forward`` becomes this object, which a closure could not be: it is pickled and copied with the module.
    It shows the signature of the module's own forward; export reads that, and ``__code__``.
    """

    # Class attributes too, for objects that were pickled before there were any.
    replacements: Mapping[tuple[str, int], Replacement] = MappingProxyType({})
    shields = False
    on_counts: Callable[[Mapping[str, int]], None] | None = None

    def __init__(self, module: nn.Module, patches: dict[str, list[SizePatch]]) -> None:
        self.module = module
        self.patches = patches
        self.replacements = {}  # the class's own is a proxy, which torch.compile of torch 2.6 can't look into
        inner = module.__dict__.get("forward")  # an instance-level forward of the user's own
        own = getattr(inner, "__func__", None) is type(module).forward and getattr(inner, "__self__", None) is module
        self.inner = None if own else inner

    @property
    def _forward(self) -> Any:
        return type(self.module).forward.__get__(self.module) if self.inner is None else self.inner

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._forward)

    @property
    def __code__(self) -> Any:
        return self._forward.__code__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward, sizes rewritten and functions replaced."""
        run = self._sized if self.patches else self._replaced
        if not self.shields:
            return run(*args, **kwargs)
        with shielded():
            return run(*args, **kwargs)

    def _sized(self, *args: Any, **kwargs: Any) -> Any:
        with SizeRewriter(self.patches):
            return self._replaced(*args, **kwargs)

    def _replaced(self, *args: Any, **kwargs: Any) -> Any:
        if not self.replacements:
            return self._own(*args, **kwargs)
        replacer = CallReplacer(self.replacements)
        with replacer:  # on top, where a shielded child can take it away
            result = self._own(*args, **kwargs)
        if self.on_counts is not None:
            self.on_counts(replacer.counts)
        return result

    def _own(self, *args: Any, **kwargs: Any) -> Any:
        if self.inner is not None:
            return self.inner(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)


def _patched_forward(module: nn.Module) -> PatchedForward | None:
    owner = module.__dict__.get("forward")
    return owner if isinstance(owner, PatchedForward) else None


def install_patches(model: nn.Module, patches: Iterable[SizePatch]) -> None:
    """Make the calls of ``model`` follow ``patches``; a later patch of the same place replaces the earlier.

    Raises:
        PruningError: A patch names a module that the model doesn't have; nothing was installed.
    """
    modules = modules_of(model)
    patches = list(patches)
    for patch in patches:
        if patch.site.module not in modules:
            raise PruningError(f"no module {patch.site.module!r} in {type(model).__name__}, named by {patch}")
    for patch in patches:
        module = modules[patch.site.module]
        patched = _patched_forward(module)
        if patched is None:
            patched = PatchedForward(module, {})
            module.forward = patched
        function = patch.site.function
        places = {(each.site, each.dim): each for each in patched.patches.get(function, ())}
        places[patch.site, patch.dim] = patch
        patched.patches[function] = [places[place] for place in sorted(places)]


def remove_patches(model: nn.Module) -> None:
    """Let every module ask for its own sizes again."""
    for module in modules_of(model).values():
        patched = _patched_forward(module)
        if patched is not None:
            patched.patches = {}
            _restore_idle(module, patched)


def _restore_idle(module: nn.Module, patched: PatchedForward) -> None:
    """Give a module its own forward back if the patched one does nothing any more."""
    if not (patched.patches or patched.replacements or patched.shields):
        del module.__dict__["forward"]
        if patched.inner is not None:
            module.forward = patched.inner


def replace_calls(
    model: nn.Module,
    replacements: Mapping[str, Mapping[tuple[str, int], Replacement]],
    shields: Iterable[str] = (),
    on_counts: Callable[[str, bool, Mapping[str, int]], None] | None = None,
) -> None:
    """Make the modules at these paths, and no others, call other activation functions.

    Args:
        model: The model.
        replacements: Path -> name of a function and number of the call -> what runs in its place.
        shields: Paths of modules whose calls those around them don't count.
        on_counts: Called after each forward with its module's path, mode and how often it called each function.

    Raises:
        PruningError: There is no such module; nothing was changed.
    """
    modules = modules_of(model)
    shields = set(shields)
    for path in (*replacements, *shields):
        if path not in modules:
            raise PruningError(f"no module {path!r} in {type(model).__name__}, whose activations are to be replaced")
    for path, module in modules.items():
        patched = _patched_forward(module)
        wanted = dict(replacements.get(path, {}))
        if patched is None:
            if not wanted and path not in shields:
                continue
            patched = PatchedForward(module, {})
            module.forward = patched
        patched.replacements = wanted
        patched.shields = path in shields
        patched.on_counts = None
        if on_counts is not None and wanted:
            patched.on_counts = partial(_tell, on_counts, path, module)
        _restore_idle(module, patched)


def _tell(
    on_counts: Callable[[str, bool, Mapping[str, int]], None], path: str, module: nn.Module, counts: Mapping[str, int]
) -> None:
    on_counts(path, module.training, counts)


def replaced_calls(model: nn.Module) -> tuple[dict[str, dict[tuple[str, int], Replacement]], list[str]]:
    """The replacements that ``model`` carries and the paths of its shields, as `replace_calls` takes them."""
    owners = {path: each for path, m in modules_of(model).items() if (each := _patched_forward(m)) is not None}
    found = {path: dict(each.replacements) for path, each in owners.items() if each.replacements}
    return found, [path for path, each in owners.items() if each.shields]


def installed_patches(model: nn.Module) -> list[SizePatch]:
    """The patches that ``model`` carries."""
    owners = [patched for module in modules_of(model).values() if (patched := _patched_forward(module)) is not None]
    return [patch for owner in owners for patches in owner.patches.values() for patch in patches]


class SizeChecker(TorchFunctionMode):
    """Runs sized calls with the sizes they should have.

    Attributes:
        stack: The modules of the model that runs.
        expected: The sizes that calls should ask for, by place.
        free: Places that no removal changes. Where the forward asks for something else there, as for a number of boxes,
            that is tried too.
        varying: Places whose size may be a multiple of the batch, or of an image's size: torch infers it, where it can.
        asked: What the forward asked for in each call that it made, by place.
        ranks: How many sizes that was, and of how many dimensions.
        wrong: What to write in calls that asked for something else.
    """

    def __init__(
        self,
        stack: ModuleStack,
        expected: Mapping[CallSite, Mapping[int, Size]],
        free: Collection[tuple[CallSite, int]] = (),
        varying: Collection[tuple[CallSite, int]] = (),
    ) -> None:
        super().__init__()
        self.stack = stack
        self.expected = expected
        self.free = free
        self.varying = varying
        self.asked: dict[CallSite, dict[int, Any]] = {}
        self.ranks: dict[CallSite, tuple[int, int]] = {}
        self.wrong: dict[CallSite, dict[int, Size]] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = kind_of(func)
        site = self.stack.site(name) if name is not None else None
        if name is not None and site is not None:
            kind = SIZED_FUNCTIONS[name]
            given = dict(enumerate(kind.read(args, kwargs)))
            self.asked[site] = dict(given)
            self.ranks[site] = (-1 if kind.together else len(given), len(shape_of_input(args, kwargs)))
            expected = self.expected.get(site)
            if expected:
                for at in expected.keys() & given.keys():
                    if isinstance(given[at], Tensor) and isinstance(expected[at], tuple):
                        found = kind.picked(args, kwargs).get(at) if kind.picked is not None else None
                        given[at] = () if found is None else tuple(found[1].tolist())
                wrong = {at: size for at, size in expected.items() if given.get(at) not in (-1, size)}
                needed = {at: size for at, size in wrong.items() if (site, at) not in self.free}
                if kind.together and (wrong or len(given) != len(expected)):
                    wrong = dict(expected)
                if kind.infers and wrong and -1 not in given.values():
                    left = wrong if len(wrong) == 1 else [at for at in wrong if (site, at) in self.varying]
                    if len(left) == 1:
                        wrong |= dict.fromkeys(left, -1)
                if wrong and not kind.together and len(needed) < len(wrong):
                    # Was what stays calculated from what goes, or is it another number by itself, of boxes, say?
                    changed = kind.write(func, args, kwargs, wrong)
                    try:
                        result = changed[0](*changed[1], **changed[2])
                    except RuntimeError:
                        wrong = needed
                    else:
                        self.wrong.setdefault(site, {}).update(wrong)
                        return result
                if wrong:
                    self.wrong.setdefault(site, {}).update(wrong)
                    func, args, kwargs = kind.write(func, args, kwargs, wrong)
        return func(*args, **kwargs)


_REPEATED = (int, list, tuple, str)


class Number(int):
    """An integer that tells when a forward calculates with it: ``x / math.sqrt(x.size(-1))`` depends on its value.

    Sums and products of integers are plain integers again and tell nothing: sizes are made of these. So are quotients,
    but they tell when it is them that the forward calculates with: ``(x.size(-1) // self.num_heads) ** -0.5``.
    """

    told: Callable[[], Any]
    counted_by: Callable[[Attribute], Any] | None = None
    """Hears of an attribute that the forward finds equal: ``x.size(1) == self.width``."""
    divided_by: Callable[[Attribute], Any] | None = None
    """Hears of an attribute by which it was divided for a number to calculate with."""

    __hash__ = int.__hash__

    def __eq__(self, other: object) -> bool:
        equal = int.__eq__(self, other)
        if equal is True and isinstance(other, Number):
            for one, attribute in ((self, other), (other, self)):
                if one.counted_by is not None and isinstance(attribute, Attribute):
                    one.counted_by(attribute)
        return equal

    def __ne__(self, other: object) -> bool:
        equal = self == other
        return equal if equal is NotImplemented else not equal

    def _number(self) -> int:
        self.told()
        return int(self)

    def __float__(self) -> float:
        return float(self._number())

    def __truediv__(self, other: Any) -> Any:
        return self._number() / other

    def __rtruediv__(self, other: Any) -> Any:
        return other / self._number()

    def __pow__(self, other: Any) -> Any:  # type: ignore[override]
        return self._number() ** other

    def __rpow__(self, other: Any) -> Any:  # type: ignore[override]
        return other ** self._number()

    def __mul__(self, other: Any) -> Any:
        return int(self) * other if isinstance(other, _REPEATED) else self._number() * other

    def __rmul__(self, other: Any) -> Any:
        return other * int(self) if isinstance(other, _REPEATED) else other * self._number()

    def __floordiv__(self, other: Any) -> Any:
        quotient = int.__floordiv__(self, other)
        if quotient is NotImplemented:
            return quotient
        divided_by = self.divided_by
        if divided_by is not None and isinstance(other, Attribute):
            return watched_size(quotient, partial(divided_by, other))
        return _quotient(quotient, self, other)

    def __rfloordiv__(self, other: Any) -> Any:
        quotient = int.__rfloordiv__(self, other)
        return quotient if quotient is NotImplemented else _quotient(quotient, self, other)

    def __reduce__(self) -> Any:
        return int, (int(self),)

    def __deepcopy__(self, memo: Any) -> int:
        return int(self)


class Attribute(Number):
    """A number that remembers which attribute of which module it was read from, also after a multiplication.

    ``x.view(batch * self.num_heads, -1)`` asks for a multiple of it.
    """

    module: str
    name: str
    place: int | None
    factor: int = 1

    def __mul__(self, other: Any) -> Any:
        if type(other) is not int:
            return super().__mul__(other)
        product = Attribute(int(self) * other)
        product.__dict__.update(self.__dict__, factor=self.factor * other)
        return product

    __rmul__ = __mul__


def watched_size(
    size: int,
    told: Callable[[], Any],
    counted_by: Callable[[Attribute], Any] | None = None,
    divided_by: Callable[[Attribute], Any] | None = None,
) -> Number:
    """A size of a tensor that tells when it is calculated with, and what an attribute has to do with it."""
    number = Number(size)
    number.told, number.counted_by, number.divided_by = told, counted_by, divided_by
    return number


def _quotient(quotient: int, *of: Any) -> Number:
    def told() -> None:
        for number in of:
            if isinstance(number, Number):
                number.told()

    return watched_size(quotient, told)


def _marked(value: int, numeric: set[tuple[str, str]], module: str, name: str, place: int | None = None) -> Attribute:
    marked = Attribute(value)
    marked.module, marked.name, marked.place = module, name, place
    marked.told = lambda: numeric.add((module, name))
    return marked


def _holds_numbers(value: Any) -> bool:
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else (value,)
    return any(isinstance(item, Number) for item in inside)


def _plain(value: Any) -> Any:
    if isinstance(value, Number):
        return int(value)
    if isinstance(value, dict):
        value.update({key: _plain(item) for key, item in value.items()})
        return value
    if isinstance(value, list):
        value[:] = map(_plain, value)
        return value
    if isinstance(value, torch.Size):
        return torch.Size(map(_plain, value))
    return tuple(map(_plain, value)) if type(value) is tuple else value


_HOLDERS = (Number, dict, list, tuple)


@contextmanager
def marked_attributes(model: nn.Module, numeric: set[tuple[str, str]]) -> Iterator[None]:
    """Inside, the integers that modules hold as attributes are `Attribute`; assignments of the forward's own stay.

    Args:
        model: The model.
        numeric: Takes module and name of those that were used as numbers.
    """
    planted: list[tuple[dict[str, Any], str, Any, Any]] = []
    for path, module in modules_of(model).items():
        for name, value in list(module.__dict__.items()):
            if name in OWN:
                continue
            marked: Any = None
            if type(value) is int:
                marked = _marked(value, numeric, path, name)
            elif type(value) in (tuple, list) and value and all(type(item) is int for item in value):
                marked = type(value)(_marked(item, numeric, path, name, at) for at, item in enumerate(value))
            if marked is not None:
                planted.append((module.__dict__, name, value, marked))
                module.__dict__[name] = marked
    try:
        yield
    finally:
        for held, name, value, marked in planted:
            if held.get(name) is marked:
                held[name] = value
        for module in modules_of(model).values():  # what the forward itself has kept
            for name, value in list(module.__dict__.items()):
                if isinstance(value, _HOLDERS) and name not in OWN and _holds_numbers(value):
                    module.__dict__[name] = _plain(value)


class CallRecorder(TorchFunctionMode):
    """Tells ``listener`` of each torch function that the forward calls, before and after it runs."""

    def __init__(self, stack: ModuleStack, listener: CallListener) -> None:
        super().__init__()
        self.stack = stack
        self.listener = listener

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = kind_of(func)
        if name is None:
            for item in () if func is torch.arange else (*args, *kwargs.values()):
                if isinstance(item, Number):  # such as x * self.width
                    item.told()
            result = func(*args, **kwargs)
            if func in _SHAPED_LIKE:
                self.listener.shaped_like(result, args[1] if len(args) > 1 else kwargs["other"])
            if func in _SIZE_READERS and sys._getframe(1).f_code is not _PICKLES:
                return self.listener.size_read(args[0], result, (*args[1:], *kwargs.values()))
            return result
        kind, site = SIZED_FUNCTIONS[name], self.stack.site(name)
        with self.listener.calling(kind, site, args, kwargs):
            result = func(*args, **kwargs)
        self.listener.called(kind, site, args, kwargs, result)
        return result


_SIZE_READERS = (Tensor.size, Tensor.shape.__get__, Tensor.numel, Tensor.nelement, torch.numel)  # type: ignore[attr-defined]


_PICKLES = Tensor._reduce_ex_internal.__code__
"""What reads sizes in order to write them to a file, where plain numbers belong."""

_SHAPED_LIKE = (Tensor.expand_as, Tensor.view_as, Tensor.reshape_as)


class CallListener(Protocol):
    """Who wants to know of sized calls."""

    def shaped_like(self, result: Tensor, other: Tensor) -> None:
        """A tensor took the shape of another."""

    def size_read(self, tensor: Tensor, size: Any, dim: tuple[Any, ...]) -> Any:
        """A size was read; what the forward gets in its place."""

    def calling(
        self, kind: SizedFunction, site: CallSite | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> AbstractContextManager[None]:
        """The call runs inside."""

    def called(
        self, kind: SizedFunction, site: CallSite | None, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
    ) -> None:
        """The call has run."""
