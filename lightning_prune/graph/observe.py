"""What each module does while a model runs: how it is called, what it gives, what it costs, how much it changes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.graph.callsites import in_backward, untraced
from lightning_prune.graph.operations import OperationMode
from lightning_prune.graph.trace import FLOP_FORMULAS
from lightning_prune.graph.tree import modules_of

__all__ = ["Observer", "Use", "rescaled"]


@dataclass
class Use:
    """What one watched run told of one module.

    Attributes:
        calls: How often it was called.
        macs: MACs of its forward, its children's included.
        own: Those that no other module was running for.
        argument: Name of its input where that came by keyword.
        outputs: 0: it gave a tensor; n: a tuple of a tensor and n - 1 times None.
        extra: Whether anything came along with its input.
        residual: Whether its forward has added something to its input.
        reason: Why it can't be left out, where it gave something else than a tensor like its input.
        difference: L1 norm of output minus input, over all calls.
        size: L1 norm of the input, over all calls.
    """

    calls: int = 0
    macs: float = 0
    own: float = 0
    argument: str | None = None
    outputs: int = 0
    extra: bool = False
    residual: bool = False
    reason: str | None = None
    difference: Tensor | float = 0.0
    size: Tensor | float = 0.0

    @property
    def change(self) -> float:
        """L1 norm of what it changes, in those of its input."""
        size = float(self.size)
        return float(self.difference) / size if size else float("inf")


@dataclass
class _Running:
    """A call that has not returned yet."""

    path: str
    argument: str | None
    input: Tensor | None
    version: int


@dataclass
class Observer:
    """Watches one model; every forward inside `watch` adds to ``uses``.

    Attributes:
        model: The model.
        differences: Whether to measure how much modules with parameters change their input.
        uses: By path, modules that ran.
        macs: MACs of everything that ran.
    """

    model: nn.Module
    differences: bool = False
    uses: dict[str, Use] = field(default_factory=dict)
    macs: int = 0
    _running: list[_Running] = field(default_factory=list)

    @contextmanager
    def watch(self) -> Iterator[Observer]:
        """Follow the model's calls."""
        modules = {m: path for path, m in modules_of(self.model).items() if not isinstance(m, torch.jit.ScriptModule)}
        measured = {m for m in modules if self.differences and next(m.parameters(), None) is not None}

        @torch._dynamo.disable  # type: ignore[untyped-decorator]
        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not in_backward():  # a checkpointed forward runs again there
                self._enter(modules[module], args, kwargs)

        @torch._dynamo.disable  # type: ignore[untyped-decorator]
        def leave(module: nn.Module, args: Any, output: Any) -> None:
            if not in_backward():
                self._leave(modules[module], output, module in measured)

        hooks = [module.register_forward_pre_hook(enter, with_kwargs=True) for module in modules]
        hooks += [module.register_forward_hook(leave, always_call=True) for module in modules]
        try:
            with _Operations(self):
                yield self
        finally:
            for hook in hooks:
                hook.remove()
            self._running.clear()

    def _enter(self, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        use = self.uses.setdefault(path, Use())
        argument, given = None, args[0] if args else None
        if not args:
            argument, given = next(((k, v) for k, v in kwargs.items() if isinstance(v, Tensor)), (None, None))
        use.extra = use.extra or len(args) + len(kwargs) > 1
        use.argument = argument or use.argument
        tensor = given if isinstance(given, Tensor) else None
        # Inference tensors keep no count of what is written into them.
        version = -1 if tensor is None or tensor.is_inference() else tensor._version
        self._running.append(_Running(path, argument, tensor, version))

    def _leave(self, path: str, output: Any, measured: bool) -> None:
        if not self._running or self._running[-1].path != path:  # a hook of the user's raised before ours came to enter
            return
        call, use = self._running.pop(), self.uses[path]
        use.calls += 1
        outputs, given = 0, output
        if isinstance(output, tuple) and output and all(each is None for each in output[1:]):
            outputs, given = len(output), output[0]
            if type(output) is not tuple:
                use.reason = f"gives a {type(output).__name__}"
        if use.calls > 1 and outputs != use.outputs:
            use.reason = "gives a tensor in one call and a tuple in another"
        use.outputs = outputs
        reason = _unlike(call, given)
        use.reason = use.reason or reason
        if measured and use.reason is None and call.input is not None and not call.input.is_meta:
            with torch.no_grad(), untraced():
                before, after = call.input.detach(), given.detach()
                precise = torch.promote_types(torch.promote_types(before.dtype, after.dtype), torch.float32)
                before = before.to(precise)
                use.difference = use.difference + (after.to(precise) - before).abs().sum()
                use.size = use.size + before.abs().sum()

    def count(self, macs: int) -> None:
        """Charge a multiplication to all modules that are running."""
        if self._running:
            self.macs += macs
            for path in {call.path for call in self._running}:
                self.uses[path].macs += macs
            self.uses[self._running[-1].path].own += macs

    def note_sum(self, terms: Sequence[Any]) -> None:
        """A sum of the innermost running module's input and something else makes it a residual block."""
        given = self._running[-1].input if self._running else None
        if given is not None and any(_same(term, given) for term in terms):
            self.uses[self._running[-1].path].residual = True


def _unlike(call: _Running, given: Any) -> str | None:
    """Why a call isn't one whose output could be its input; None where it could."""
    if not isinstance(given, Tensor):
        return f"gives a {type(given).__name__}"
    if call.input is None:
        return "is called without a tensor"
    if not (given.is_floating_point() and call.input.is_floating_point()):
        return "gives or takes no floating point numbers"
    if given.shape != call.input.shape:
        return f"gives shape {tuple(given.shape)}, takes {tuple(call.input.shape)}"
    if given.device != call.input.device:
        return "gives a tensor on another device"
    if call.version >= 0 and call.input._version != call.version:
        return "writes into its input"
    return None


def _same(term: Any, tensor: Tensor) -> bool:
    if term is tensor:
        return True
    if not isinstance(term, Tensor) or term.shape != tensor.shape or term.is_meta or tensor.is_meta:
        return False
    return term.device == tensor.device and term.data_ptr() == tensor.data_ptr()


def rescaled(uses: Mapping[str, Use], shares: Mapping[str, float]) -> dict[str, Use]:
    """What a run would tell of modules after they have shrunk: what a layer multiplies goes with its parameters.

    Args:
        uses: What the run told before.
        shares: By path, the part of its own parameters that each module has left; others have not changed.
    """
    own = {path: use.own * shares.get(path, 1.0) for path, use in uses.items()}
    totals = dict.fromkeys(uses, 0.0)
    for path, macs in own.items():
        parts = path.split(".") if path else []
        for end in range(len(parts) + 1):
            above = ".".join(parts[:end])
            if above in totals:
                totals[above] += macs
    return {path: replace(use, own=own[path], macs=totals[path]) for path, use in uses.items()}


_SUMS = (torch.ops.aten.add, torch.ops.aten.add_)


class _Operations(OperationMode):
    """Tells an observer of each multiplication in a forward, and of sums."""

    def __init__(self, observer: Observer) -> None:
        super().__init__()
        self.observer = observer

    def operation(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        formula = FLOP_FORMULAS.get(func._overloadpacket)
        if formula is None and (made := self.decomposed(func, args, kwargs)) is not NotImplemented:
            return made
        if func._overloadpacket in _SUMS and not in_backward():
            self.observer.note_sum(args[:2])
        out = func(*args, **kwargs)
        if formula is not None and not in_backward():
            self.observer.count(int(formula(*args, **kwargs, out_val=out)) // 2)
        return out
