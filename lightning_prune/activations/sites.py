"""Where a model calls activation functions: modules, functions and in-place methods, told apart call by call."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from types import FrameType, FunctionType
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from lightning_prune.activations.candidates import CANDIDATES, Choice, choice_of
from lightning_prune.errors import PruningError, TraceError
from lightning_prune.graph.callsites import in_backward, replaced_calls, untraced
from lightning_prune.graph.replaced import ALL_CALLS, activation_function
from lightning_prune.graph.run import as_calls, check_model, run_calls, undisturbed

__all__ = ["Site", "SiteFinder", "Sites", "find_activations"]

_BOUNDED = frozenset({"sigmoid", "hardsigmoid", "tanh", "softsign", "hardtanh", "relu6"})
"""Functions that make gates: what they give is multiplied by something."""

_MULTIPLICATIONS = frozenset({"mul", "mul_", "multiply", "multiply_", "__mul__", "__rmul__", "__imul__"})
_SAME_VALUES = frozenset(
    {"view", "reshape", "expand", "expand_as", "view_as", "unsqueeze", "squeeze", "permute", "transpose", "flatten"}
    | {"unflatten", "contiguous", "broadcast_to", "movedim", "swapaxes", "clone", "detach"}
    | {"to", "type", "type_as", "float", "double", "half", "bfloat16"}
)
"""Functions that give the values of their first argument in another shape, place or type."""


@dataclass(frozen=True)
class Site:
    """A place where a model applies an activation function.

    Attributes:
        name: What ``include`` and ``exclude`` match: the module's path, or ``owner.function#call``.
        owner: Path of the module whose forward makes the call.
        function: What the call counts as.
        call: Its number among the owner's calls of the function; -1: all of them.
        module: Path of the module that can be replaced as a whole; None: the call has to be.
        own: The function that the model has there; None: one with arguments that no choice has.
        in_place: Whether the forward goes on to use the input that it changes.
        shape: Of the input in the run that was observed.
        left: Why the site is left alone; "": it isn't.
    """

    name: str
    owner: str
    function: str
    call: int
    module: str | None
    own: Choice | None
    in_place: bool = False
    shape: tuple[int, ...] = ()
    left: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        data = {name: getattr(self, name) for name in ("name", "owner", "function", "call", "module", "in_place")}
        own = None if self.own is None else self.own.to_dict()
        return data | {"own": own, "shape": list(self.shape), "left": self.left}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Site:
        """From what `to_dict` gave."""
        own = None if data["own"] is None else Choice.from_dict(data["own"])
        return cls(**{**data, "own": own, "shape": tuple(data["shape"])})

    def __str__(self) -> str:
        kind = "module" if self.module is not None else "call"
        what = self.function if self.own is None else str(self.own)
        return f"{self.name}: {what} ({kind})" + (f", left alone: {self.left}" if self.left else "")


@dataclass(frozen=True)
class Sites:
    """The activation sites of a model.

    Attributes:
        sites: Those that can be changed, in the order in which they are called.
        left: Those that are left alone.
        calls: Owner -> the calls in one run of its forward: function (None: one that isn't counted) and module.
        nested: Owner -> modules that its forward runs and that call activations themselves.
        varying: Owners whose calls differ from run to run.
    """

    sites: tuple[Site, ...]
    left: tuple[Site, ...]
    calls: Mapping[str, tuple[tuple[str | None, str | None], ...]]
    nested: Mapping[str, tuple[str, ...]]
    varying: tuple[str, ...] = ()

    def __str__(self) -> str:
        head = f"{len(self.sites)} activation sites, {len(self.left)} left alone"
        return "\n".join([head, *(f"  {site}" for site in (*self.sites, *self.left))])

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "sites": [site.to_dict() for site in self.sites],
            "left": [site.to_dict() for site in self.left],
            "calls": {owner: [list(call) for call in calls] for owner, calls in self.calls.items()},
            "nested": {owner: list(paths) for owner, paths in self.nested.items()},
            "varying": list(self.varying),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Sites:
        """From what `to_dict` gave."""
        return cls(
            tuple(map(Site.from_dict, data["sites"])),
            tuple(map(Site.from_dict, data["left"])),
            {owner: tuple((call[0], call[1]) for call in calls) for owner, calls in data["calls"].items()},
            {owner: tuple(paths) for owner, paths in data["nested"].items()},
            tuple(data["varying"]),
        )

    def pick(self, include: Sequence[str] | None, exclude: Sequence[str] | None, gates: bool = False) -> Sites:
        """Only those that some ``include`` pattern matches (None: all) and no ``exclude`` pattern does.

        A pattern matches a site by its name or by that of a module that contains it.

        Args:
            include: Globs.
            exclude: Globs.
            gates: Take gates and outputs too.

        Raises:
            PruningError: A pattern matches nothing, or nothing remains; the message lists the sites.
        """
        asked = (_GATE, _OUTPUT) if gates else ()
        whole = [replace(s, left="") if s.left in asked else s for s in (*self.sites, *self.left)]
        known = ", ".join(site.name for site in whole) or "none"

        def hits(pattern: str) -> set[str]:
            found = {s.name for s in whole if any(fnmatchcase(name, pattern) for name in _with_parents(s.name))}
            if not found:
                raise PruningError(f"the pattern {pattern!r} matches no activation site; there are: {known}")
            return found

        chosen = {s.name for s in whole} if include is None else set[str]().union(*map(hits, include))
        chosen = chosen.difference(*map(hits, exclude or ()))
        sites = tuple(site for site in whole if site.name in chosen and not site.left)
        if not sites:
            reasons = "; ".join(f"{site.name}: {site.left or 'not chosen'}" for site in whole)
            raise PruningError(f"no activation site to search; there are: {reasons or 'none at all'}")
        left = [replace(s, left=s.left or "not chosen") for s in whole if s.name not in chosen or s.left]
        return replace(self, sites=sites, left=tuple(left))

    def shared(self, owner: str) -> Sites:
        """The same with all calls of a function in ``owner`` as one site: their number turned out to vary.

        Of a function with a call that is to be left alone, all are.
        """
        kept = {site.function for site in self.left if site.owner == owner and site.call != ALL_CALLS}
        sites: list[Site] = []
        left = list(self.left)
        calls = [site for site in self.sites if site.owner == owner and site.module is None]
        if not calls:  # modules are told apart by themselves
            return self
        done = set()
        for site in self.sites:
            if site.owner != owner:
                sites.append(site)
            elif site.module is not None or site.function in kept:
                left.append(replace(site, left=_VARYING))
            elif site.function not in done:
                done.add(site.function)
                name = site.name.rpartition("#")[0] + "#all"
                in_place = any(each.in_place for each in calls if each.function == site.function)
                sites.append(replace(site, name=name, call=ALL_CALLS, in_place=in_place))
        return replace(self, sites=tuple(sites), left=tuple(left), varying=(*self.varying, owner))


def _with_parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]


_GATE = "a gate: what it gives is multiplied by another tensor"
_OUTPUT = "gives the model's output"
_OUTSIDE = "called outside any module's forward"
_VARYING = "its module's calls vary from run to run"
_AGAIN = "inside torch.utils.checkpoint, which calls it once more in the backward, outside its module's forward"
_REPLACED = "a call in its module has been replaced already"


@dataclass
class _Event:
    """One call in one run of an owner's forward."""

    function: str | None
    number: int
    module: str | None
    own: Choice | None
    shape: tuple[int, ...]
    owner: str


@dataclass
class _Frame:
    path: str | None
    events: list[_Event] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    parent: _Frame | None = None


_Key = tuple[str, str | None, int, str | None]


def _key(event: _Event) -> _Key:
    return event.owner, event.function, event.number, event.module


class SiteFinder(TorchFunctionMode):
    """Observes runs of a model; `sites` tells what was seen."""

    def __init__(self, model: nn.Module, *, quantiles: Sequence[float] = (), per_channel: bool = False) -> None:
        """Observe a model.

        Args:
            model: It may run more than once.
            quantiles: Of the positive inputs of each ReLU; `thresholds` has them.
            per_channel: Of each channel (dimension 1 of 2, 4 or 5).
        """
        super().__init__()
        self.model = model
        self.quantiles, self.per_channel = tuple(quantiles), per_channel
        self._inputs: dict[_Key, Tensor] = {}
        self._before: Tensor | None = None
        self.paths = {module: path for path, module in model.named_modules()}
        self.runs: dict[str, list[list[_Event]]] = {}
        self.nested: dict[str, dict[str, None]] = {}
        self.outside: list[str] = []
        self._frames: list[_Frame] = []
        self._leaf = 0
        self._tags: dict[int, tuple[Tensor, _Event]] = {}
        self._changed: dict[int, tuple[Tensor, _Event]] = {}
        self._gates: set[_Key] = set()
        self._outputs: set[_Key] = set()
        self._aliased: set[_Key] = set()
        self._again: set[_Key] = set()

    @contextmanager
    def watch(self) -> Iterator[SiteFinder]:
        """Observe all that runs inside."""
        hooked = [module for module in self.paths if not isinstance(module, torch.jit.ScriptModule)]
        handles = [module.register_forward_pre_hook(self._enter, with_kwargs=True) for module in hooked]
        handles += [module.register_forward_hook(self._leave, with_kwargs=True, always_call=True) for module in hooked]
        try:
            with torch.compiler.set_stance("force_eager"), self:  # compiled modules run what they were made of
                yield self
        finally:
            for handle in handles:
                handle.remove()
            self._frames.clear()
            self._tags.clear()
            self._changed.clear()

    @property
    def _frame(self) -> _Frame | None:
        return next((frame for frame in reversed(self._frames) if frame.path is not None), None)

    def _is_leaf(self, module: nn.Module) -> bool:
        return choice_of(module) is not None and self._frame is not None

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if in_backward():
            return
        self._use((args, kwargs))
        if self._leaf or self._is_leaf(module):
            if not self._leaf and self.quantiles and args and isinstance(args[0], Tensor):
                self._before = args[0].detach().clone()
            self._leaf += 1
            return
        if all(frame.path is None for frame in self._frames):
            for tensor in pytree.tree_leaves((args, kwargs)):
                if id(tensor) in self._tags:  # one part of the model reads what another gave
                    self._outputs.discard(_key(self._tags[id(tensor)][1]))
        # Lightning puts a function in forward's place to send training_step through DDP.
        redirected = isinstance(module.__dict__.get("forward"), FunctionType)
        self._frames.append(_Frame(None if redirected else self.paths[module], parent=self._frame))

    def _leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if in_backward():
            return None
        if self._leaf:
            self._leaf -= 1
            choice = choice_of(module)
            if self._leaf or choice is None or not isinstance(output, Tensor):
                return None
            x = args[0] if args else kwargs.get("input", output)
            if type(module) is nn.Identity:  # a placeholder
                self._carry(x, output)
                return None
            return self._record(choice.emits, self.paths[module], choice, x, output)
        frame = self._frames.pop()
        if frame.path is None:
            return None
        self.runs.setdefault(frame.path, []).append(frame.events)
        above = frame.parent
        if above is not None and above.path is not None and (frame.events or frame.path in self.nested):
            self.nested.setdefault(above.path, {})[frame.path] = None
        if all(each.path is None for each in self._frames):
            for tensor in pytree.tree_leaves(output):
                if id(tensor) in self._tags:
                    self._outputs.add(_key(self._tags[id(tensor)][1]))
                if id(tensor) in self._changed:  # what was changed in place, under its old name
                    self._outputs.add(_key(self._changed[id(tensor)][1]))
        return None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._leaf or in_backward():
            return func(*args, **kwargs)
        self._use((args, kwargs))
        entry = activation_function(func)
        if entry is None or "out" in kwargs:
            self._follow(func, args)
            result = func(*args, **kwargs)
            if getattr(func, "__name__", "") in _SAME_VALUES and args:
                self._carry(args[0], result)
            return result
        x = args[0] if args else kwargs["input"]
        shape = tuple(x.shape)
        if self.quantiles:
            self._before = x.detach().clone()
        result = func(*args, **kwargs)
        if self._frame is None:
            self.outside.append(entry.name)
            return result
        own = _choice_with(entry.name, entry.settings(args, kwargs))
        changed = self._record(entry.name, None, own, x, result, shape)
        return result if changed is None else changed

    def _record(
        self,
        function: str | None,
        module: str | None,
        own: Choice | None,
        x: Any,
        output: Tensor,
        shape: tuple[int, ...] | None = None,
    ) -> Tensor | None:
        """Note a call; gives what the forward is to get if it worked in place."""
        frame = self._frame
        assert frame is not None
        assert frame.path is not None
        number = frame.counts.get(function or "", 0)
        frame.counts[function or ""] = number + 1
        # Plain integers: while neurons are traced, sizes are numbers that remember where they come from.
        sizes = tuple(map(int, shape or output.shape))
        event = _Event(function, number, module, own, sizes, frame.path)
        frame.events.append(event)
        if self._before is not None and own == Choice("relu"):
            self._inputs[_key(event)] = self._before
        self._before = None
        if self._is_checkpointed(frame.path):
            self._again.add(_key(event))
        given = None
        if output is x:
            if output._is_view():  # the forward may go on with what it is a part of
                self._aliased.add(_key(event))
            # A new name for the same memory: if the forward uses the old one, it relies on the change.
            given = output.view_as(output)
            self._changed[id(x)] = x, event
        self._tags[id(output if given is None else given)] = (output if given is None else given), event
        return given

    def _is_checkpointed(self, owner: str) -> bool:
        """Whether the forward of the module at this path has called a checkpointed function, which is running now."""
        at: FrameType | None = sys._getframe(1)
        while at is not None:
            if at.f_code.co_filename == torch.utils.checkpoint.__file__:
                return True
            if at.f_code is nn.Module._call_impl.__code__ and self.paths.get(at.f_locals["self"]) == owner:
                return False
            at = at.f_back
        return False

    def _use(self, inputs: Any) -> None:
        if self._changed:
            for leaf in pytree.tree_leaves(inputs):
                if id(leaf) in self._changed:
                    self._aliased.add(_key(self._changed[id(leaf)][1]))

    def _carry(self, x: Any, output: Any) -> None:
        if id(x) in self._tags and isinstance(output, Tensor):
            self._tags[id(output)] = output, self._tags[id(x)][1]

    def _follow(self, func: Any, args: tuple[Any, ...]) -> None:
        """A product with another tensor makes a gate of what an activation gave."""
        if getattr(func, "__name__", "") not in _MULTIPLICATIONS or len(args) < 2 or args[0] is args[1]:
            return
        for one, other in (args[:2], (args[1], args[0])):
            tagged = self._tags.get(id(one))
            if tagged is None or not isinstance(other, Tensor) or other.dim() == 0 or isinstance(other, nn.Parameter):
                continue
            against = self._tags.get(id(other))
            gated = against is not None and against[1].function in _BOUNDED
            # What a gate is multiplied by is no gate itself.
            if tagged[1].function in _BOUNDED or not gated:
                self._gates.add(_key(tagged[1]))

    def thresholds(self, sites: Sites) -> dict[str, tuple[float | tuple[float, ...], ...]]:
        """Site -> the quantiles of what is positive in its input, for the ReLUs.

        A threshold has no gradient where it is a step, so it is chosen among such values.
        """
        places = {(s.owner, s.function, s.call): s.name for s in sites.sites if s.module is None}
        modules = {site.module: site.name for site in sites.sites if site.module is not None}
        found: dict[str, tuple[float | tuple[float, ...], ...]] = {}
        with torch.no_grad(), untraced():
            for (owner, function, number, module), x in self._inputs.items():
                name = modules.get(module or "") or places.get((owner, function or "", number))
                if name is not None:
                    channels = self.per_channel and x.dim() in (2, 4, 5)
                    parts = x.transpose(0, 1).flatten(1).unbind(0) if channels else (x,)
                    rows = [[_quantile(part, q) for part in parts] for q in self.quantiles]
                    found[name] = tuple(tuple(row) if channels else row[0] for row in rows)
        return found

    def sites(self) -> Sites:
        """What was seen so far."""
        patched = set(replaced_calls(self.model)[0])
        owners: dict[str, set[tuple[str, int]]] = {}
        for path, runs in self.runs.items():
            for number, run in enumerate(runs):
                for event in run:
                    if event.module is not None:
                        owners.setdefault(event.module, set()).add((path, number))
        counts = {
            module: sum(e.module == module for runs in self.runs.values() for run in runs for e in run)
            for module in owners
        }
        # A module that is called once in each run of one forward is a site of its own.
        single = {m for m, seen in owners.items() if len({path for path, _ in seen}) == 1 and counts[m] == len(seen)}
        taken: dict[_Key, None] = {}
        events: dict[_Key, _Event] = {}
        varying = []
        calls = {}
        for path, runs in self.runs.items():
            told = {tuple((event.function, event.module) for event in run) for run in runs}
            calls[path] = max(told, key=len)
            if len(told) > 1 and any(e.module not in single for run in runs for e in run):
                varying.append(path)
            for run in runs:
                for event in run:
                    taken[_key(event)] = None
                    events.setdefault(_key(event), event)
        sites: list[Site] = []
        left: list[Site] = []
        whole: set[str] = set()
        for key in taken:
            event = events[key]
            if event.function is None and event.module not in single:
                continue  # nothing by which the call could be told from others
            aliased = key in self._aliased
            own_module = event.module in single and not aliased
            if own_module and event.module in whole:
                continue
            whole |= {event.module} if own_module and event.module is not None else set()
            function = event.function or "identity"
            prefix = f"{event.owner}." if event.owner else ""
            name = event.module if own_module and event.module else f"{prefix}{function}#{event.number}"
            site = Site(
                name, event.owner, function, event.number, event.module if own_module else None, event.own,
                aliased, event.shape,
            )  # fmt: skip
            reason = _GATE if key in self._gates else _OUTPUT if key in self._outputs else ""
            if key in self._again and not own_module:
                reason = _AGAIN
            if event.owner in patched:
                reason = _REPLACED
            (left if reason else sites).append(replace(site, left=reason))
        for name in dict.fromkeys(self.outside):
            left.append(Site(name, "", name, ALL_CALLS, None, None, left=_OUTSIDE))
        nested = {path: tuple(children) for path, children in self.nested.items()}
        found = Sites(tuple(sites), tuple(left), {p: c for p, c in calls.items() if c}, nested)
        for path in varying:
            found = found.shared(path)
        return found


def _quantile(x: Tensor, q: float) -> float:
    """Of the positive values; 0 where there is none. Sorted, because torch.quantile takes 16 million at most."""
    positive = x[x > 0].flatten().float()
    if not positive.numel():
        return 0.0
    return float(positive.kthvalue(min(int(q * positive.numel()), positive.numel() - 1) + 1).values)


def _choice_with(name: str, settings: Mapping[str, Any]) -> Choice | None:
    """The choice that a call with these settings is."""
    if name == "threshold":
        return Choice("thresholded_relu", (("threshold", settings["threshold"]),)) if not settings["value"] else None
    known = CANDIDATES[name].parameters
    if not all(key in known and isinstance(value, float | int | str) for key, value in settings.items()):
        return None
    return Choice(name, tuple((key, value) for key, value in settings.items() if value != known[key]))


def find_activations(model: nn.Module, example_inputs: Any) -> Sites:
    """The activation sites of a model, seen in one run in evaluation and one in training mode.

    Args:
        model: Left as it is.
        example_inputs: A tensor, a tuple of positional or a dict of keyword arguments of its forward.

    Raises:
        PruningError: It is no model or these are no inputs.
        TraceError: The model raised.
    """
    check_model(model)
    calls = as_calls(example_inputs)
    finder = SiteFinder(model)
    modes: tuple[Callable[[], Any], ...] = (model.eval, model.train)
    with undisturbed(model):
        for mode in modes:
            mode()
            for module in model.modules():
                if isinstance(module, nn.modules.batchnorm._NormBase):
                    module.eval()  # a batch of one has no statistics
            try:
                with finder.watch():
                    run_calls(model, calls)
            except Exception as error:
                raise TraceError(f"{type(model).__name__} raised {type(error).__name__}: {error}") from error
    return finder.sites()
