"""One run of a model under observation: labels follow every ATen call, sized calls and costs are noted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_prune.graph.callsites import CallRecorder, CallSite, ModuleCall, ModuleStack, in_backward
from lightning_prune.graph.labels import LabelBook
from lightning_prune.graph.rules import Call, find_rule

__all__ = ["Contraction", "Leaf", "Trace", "Tracer"]

_aten = torch.ops.aten
_FLOPS = {  # torch has no formula for the attention that it runs on the CPU
    **flop_registry,
    _aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[_aten._scaled_dot_product_flash_attention],
}


@dataclass(frozen=True)
class Leaf:
    """A dimension of a parameter or buffer and the labels of its indices."""

    name: str
    dim: int
    labels: Tensor
    rank: int


@dataclass(frozen=True)
class Contraction:
    """A call that multiplies: its MACs in the traced run and the labelled dimensions it is linear in."""

    path: str
    macs: int
    factors: tuple[Tensor, ...]


@dataclass
class Trace:
    """What one or several runs of a model told."""

    leaves: list[Leaf] = field(default_factory=list)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    parameters: set[str] = field(default_factory=set)
    book: LabelBook = field(default_factory=LabelBook)
    sized: dict[tuple[CallSite, int], Tensor] = field(default_factory=dict)
    contractions: list[Contraction] = field(default_factory=list)
    calls: list[ModuleCall] = field(default_factory=list)


class _Dispatch(TorchDispatchMode):
    """Hands each ATen call to its rule."""

    def __init__(self, tracer: Tracer) -> None:
        TorchDispatchMode.__init__(self)
        self.tracer = tracer

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not self.tracer.listening:
            return func(*args, **kwargs)
        if find_rule(func) is None and func.namespace == "aten":
            # In inference mode composite operations arrive whole; what they consist of has rules.
            with self:
                decomposed = func.decompose(*args, **kwargs)
            if decomposed is not NotImplemented:
                return decomposed
        out = func(*args, **kwargs)
        self.tracer.follow(func, args, kwargs, out)
        return out


class Tracer:
    """Watches one model; every run inside `watch` adds to ``trace``.

    Labels of activations live in a dictionary with weak keys, so a trace holds no tensor alive.
    """

    def __init__(self, model: nn.Module, *, wrapped: bool = False) -> None:
        """Prepare to watch ``model``; ``wrapped``: it is called by another module, such as DDP, never directly."""
        self.trace = Trace()
        self.stepping = False
        self._wrapped = wrapped
        self._dims: Any = WeakTensorKeyDictionary()
        self._unread = {id(p): name for name, p in model.named_parameters()}
        self._stack = ModuleStack(model, self._outermost_output, self._is_outside)
        self.trace.parameters.update(name for name, _ in model.named_parameters())
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            self._add_leaves(name, tensor)

    def _add_leaves(self, name: str, tensor: Tensor) -> None:
        self.trace.shapes[name] = tuple(tensor.shape)
        dims: list[Tensor | None] = []
        for dim, size in enumerate(tensor.shape):
            if size < 2:  # the last index of a dimension never goes, and such dimensions broadcast
                dims.append(None)
                continue
            labels = self.trace.book.new(size)
            dims.append(labels)
            self.trace.leaves.append(Leaf(name, dim, labels, tensor.dim()))
        self._dims[tensor] = tuple(dims)

    @contextmanager
    def watch(self) -> Iterator[Trace]:
        """Everything that the model runs inside is followed."""
        with ExitStack() as stack:
            stack.enter_context(self._stack.watch())
            stack.enter_context(CallRecorder(self._stack, self._sized_call))
            stack.enter_context(_Dispatch(self))
            yield self.trace
        self.trace.calls = self._stack.outermost

    @property
    def listening(self) -> bool:
        """Not while gradients flow back or an optimizer steps: that says nothing of what belongs together.

        Nor does what a wrapper does around the model's call: DDP flattens all buffers to broadcast them. The
        closure that an optimizer may call runs with gradients enabled, unlike the step around it.
        """
        in_step = self.stepping and not torch.is_grad_enabled()
        return not (in_step or in_backward() or (self._wrapped and not self._stack.running))

    @property
    def has_read(self) -> bool:
        """Whether any call has used a parameter so far."""
        return len(self._unread) < len(self.trace.parameters)

    @property
    def unread(self) -> list[str]:
        """Names of the parameters that no call has used so far."""
        return list(self._unread.values())

    def freeze_outputs(self, outputs: Any, reason: str) -> None:
        """State that these tensors keep their shape."""
        for leaf in pytree.tree_leaves(outputs):
            if isinstance(leaf, Tensor):
                for labels in self._dims.get(leaf, ()):
                    self.trace.book.freeze(labels, reason)

    def _outermost_output(self, path: str, output: Any) -> None:
        if path == "":
            self.freeze_outputs(output, "reaches the model's output")

    def _is_outside(self, inputs: Any) -> bool:
        return not any(isinstance(leaf, Tensor) and leaf in self._dims for leaf in pytree.tree_leaves(inputs))

    def follow(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """Apply the rule of one executed call."""
        if self._unread:
            for leaf in pytree.tree_leaves((args, kwargs)):
                self._unread.pop(id(leaf), None)
        book = self.trace.book
        call = Call(func, args, kwargs, out, self._stack.path, book, self._dims.get)
        found = find_rule(func)
        if found is None:
            self._count(call)
            if func.namespace in ("c10d", "_c10d_functional"):  # collectives of DDP change no shape
                return
            call.freeze_all(f"no rule for {func} ({call})")
            return
        result = found(call)
        outs = [leaf for leaf in pytree.tree_leaves(out) if isinstance(leaf, Tensor)]
        if result is None:
            return
        for tensor, dims in zip(outs, result if isinstance(result, list) else [result], strict=False):
            if any(labels is not None for labels in dims):
                self._dims[tensor] = dims
        self._count(call)

    def _count(self, call: Call) -> None:
        count = _FLOPS.get(call.func.overloadpacket)
        if count is not None:
            macs = int(count(*call.args, **call.kwargs, out_val=call.out)) // 2
            self.trace.contractions.append(Contraction(call.path, macs, tuple(call.factors)))

    def _sized_call(self, site: CallSite | None, sizes: list[Any], result: Tensor) -> None:
        for dim, labels in enumerate(self._dims.get(result, ())):
            if labels is None or len(sizes) != result.dim() or sizes[dim] == -1:
                continue
            if site is None:
                self.trace.book.freeze(labels, "its size is written outside any module's forward")
                continue
            known = self.trace.sized.setdefault((site, dim), labels)
            if len(known) == len(labels):  # the module runs more than once: one patch must serve all runs
                self.trace.book.unify(known, labels, "")
            else:
                for different in (known, labels):
                    self.trace.book.freeze(different, f"{site.function} in {site.module} has varying sizes")
