"""One run of a model under observation: labels follow every ATen call, sized calls and costs are noted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_prune.graph.callsites import CallRecorder, CallSite, ModuleCall, ModuleStack
from lightning_prune.graph.labels import LabelBook
from lightning_prune.graph.rules import Call, find_rule

__all__ = ["Contraction", "Leaf", "Trace", "Tracer"]


@dataclass(frozen=True)
class Leaf:
    """A dimension of a parameter or buffer and the labels of its indices."""

    name: str
    dim: int
    labels: Tensor
    shape: tuple[int, ...]
    is_parameter: bool


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

    def __init__(self, model: nn.Module) -> None:
        self.trace = Trace()
        self._dims: Any = WeakTensorKeyDictionary()
        self._unread = {id(p): name for name, p in model.named_parameters()}
        self._stack = ModuleStack(model, self._outermost_output, self._is_outside)
        parameters = {id(p) for p in model.parameters()}
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            self._add_leaf(name, tensor, id(tensor) in parameters)

    def _add_leaf(self, name: str, tensor: Tensor, is_parameter: bool) -> None:
        dims: list[Tensor | None] = []
        for dim, size in enumerate(tensor.shape):
            if size < 2:  # the last index of a dimension never goes, and such dimensions broadcast
                dims.append(None)
                continue
            labels = self.trace.book.new(size)
            dims.append(labels)
            self.trace.leaves.append(Leaf(name, dim, labels, tuple(tensor.shape), is_parameter))
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
        count = flop_registry.get(func.overloadpacket)
        if count is not None:
            macs = int(count(*args, **kwargs, out_val=out)) // 2
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
