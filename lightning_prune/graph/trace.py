"""One run of a model under observation: labels follow every ATen call, sized calls and costs are noted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry

from lightning_prune.graph.callsites import (
    Attribute,
    CallRecorder,
    CallSite,
    ModuleCall,
    ModuleStack,
    in_backward,
    marked_attributes,
    untraced,
    watched_size,
)
from lightning_prune.graph.labels import CALCULATES, Dims, LabelBook
from lightning_prune.graph.operations import OperationMode
from lightning_prune.graph.rules import Call, find_rule
from lightning_prune.graph.sized import SizedFunction, input_of
from lightning_prune.graph.tree import TensorMap, modules_of, tensors, tensors_of_call, unique_tensors

__all__ = ["FLOP_FORMULAS", "AttributeSite", "Contraction", "Leaf", "Trace", "Tracer"]

_aten = torch.ops.aten
FLOP_FORMULAS = {  # torch has no formula for the attention that it runs on the CPU
    **flop_registry,
    _aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[_aten._scaled_dot_product_flash_attention],
}
"""FLOPs of an ATen call, twice its MACs, as `torch.utils.flop_counter` counts them."""
_COLLECTIVES = ("c10d", "_c10d_functional")
_REORDERS = frozenset(
    {
        _aten.alias.default,
        _aten.detach.default,
        _aten.permute.default,
        _aten.t.default,
        _aten.transpose.int,
    }
)
_NO_SIZES: frozenset[Any] = frozenset({torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output})


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


@dataclass(frozen=True, order=True)
class AttributeSite:
    """An integer that a module holds: its attribute, or an element of it where that is a tuple."""

    module: str
    name: str
    place: int | None = None


def _site(attribute: Attribute) -> AttributeSite:
    return AttributeSite(attribute.module, attribute.name, attribute.place)


@dataclass
class Trace:
    """What one or several runs of a model told.

    Attributes:
        leaves: Dimensions of parameters and buffers.
        shapes: Shapes of parameters and buffers.
        parameters: Names of the parameters.
        book: The labels and what is known of them.
        sized: What the sizes in calls count.
        picked: Lists of indices in calls: the labels of the dimension that they pick of, and the indices.
        inputs: Labels of the tensors that such calls take their sizes of, each time.
        attributes: What multiples of integers that modules hold count, each time that one was used as a size.
        numeric: Modules and their attributes that the forward calculates with: these must not change.
        divided: What multiples of such integers divided for a number that the forward calculates with, and where.
        constants: Buffers that hold indices, and what they count along.
        unmasked: Dimensions of parameters that a masked model leaves as they are.
        readers: Paths of the modules that were running when each parameter or buffer was read.
        contractions: Calls that multiply.
        calls: The calls of the model, or of its parts, from outside.
        data_dependent: Whether shapes depended on values.
        followers: Paths of parts that lose what others lose, see `tie_copies`.
        given: Labels of each tensor that a part of the model gave to code outside any module, such as a training step.
        lost: Which of these were read there, by a loss say.
        read_on: Which of these a layer was given, or what was made of them.
    """

    leaves: list[Leaf] = field(default_factory=list)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    parameters: set[str] = field(default_factory=set)
    book: LabelBook = field(default_factory=LabelBook)
    sized: dict[tuple[CallSite, int], Tensor] = field(default_factory=dict)
    picked: dict[tuple[CallSite, int], tuple[Tensor, Tensor]] = field(default_factory=dict)
    inputs: dict[CallSite, list[Dims]] = field(default_factory=dict)
    attributes: dict[AttributeSite, list[tuple[Tensor, int]]] = field(default_factory=dict)
    numeric: set[tuple[str, str]] = field(default_factory=set)
    divided: dict[AttributeSite, list[tuple[Tensor, int, str]]] = field(default_factory=dict)
    constants: dict[str, Tensor] = field(default_factory=dict)
    unmasked: set[tuple[str, int]] = field(default_factory=set)
    readers: dict[str, set[str]] = field(default_factory=dict)
    contractions: list[Contraction] = field(default_factory=list)
    calls: list[ModuleCall] = field(default_factory=list)
    data_dependent: bool = False
    followers: set[str] = field(default_factory=set)
    given: list[list[Tensor]] = field(default_factory=list)
    lost: set[int] = field(default_factory=set)
    read_on: set[int] = field(default_factory=set)

    def for_a_loss(self) -> list[Tensor]:
        """Labels of what is given out of the model, and read there, and given to no layer."""
        return [labels for number in self.lost - self.read_on for labels in self.given[number]]


@dataclass(frozen=True)
class _Known:
    """What is known of a tensor."""

    dims: Dims
    static: bool
    mixes: tuple[tuple[Tensor, str], ...] = ()
    sizes: dict[int, Tensor] = field(default_factory=dict)
    origins: frozenset[int] = frozenset()
    """Outside of all layers: the tensors out of the model that it was made of, as they are numbered in a trace."""
    gradient: bool = False
    """Whether it was made of gradients: what becomes of these is no part of the model's function."""


class _Dispatch(OperationMode):
    """Hands each ATen call to its rule."""

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self.tracer = tracer

    def operation(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self.tracer.listening:
            return func(*args, **kwargs)
        if find_rule(func) is None and (made := self.decomposed(func, args, kwargs)) is not NotImplemented:
            return made  # what it consists of has rules
        out = func(*args, **kwargs)
        self.tracer.follow(func, args, kwargs, out)
        return out


def _labelled(dims: Dims) -> int:
    return sum(labels is not None for labels in dims)


class Tracer:
    """Watches one model; every run inside `watch` adds to ``trace``.

    What is known of activations lives in a dictionary with weak keys, so a trace holds no tensor alive.
    """

    def __init__(self, model: nn.Module, *, wrapped: bool = False) -> None:
        """Prepare to watch ``model``; ``wrapped``: it is called by another module, such as DDP, never directly."""
        self.trace = Trace()
        self.stepping = False
        self.paused = False
        self._model = model
        self._wrapped = wrapped
        self._known = TensorMap[_Known]()
        parameters, buffers = unique_tensors(model)
        tensors = parameters | buffers
        self._unread = {id(p): name for name, p in parameters.items()}
        self._names = {id(t): name for name, t in tensors.items()}
        self._parameter_shapes = {tuple(p.shape) for p in parameters.values()}
        self._stack = ModuleStack(model, self._outermost_output, self._is_outside, self._entered)
        self._patchable = False
        self._literal: list[Tensor] = []
        self._constants = TensorMap[bool]()
        """Tensors that Python makes of numbers, and those that modules hold without registering them."""
        for module in modules_of(model).values():
            for value in module.__dict__.values():
                if isinstance(value, Tensor) and value not in self._known:
                    self._constants[value] = True
        self._scripted = [f"{p}." for p, m in modules_of(model).items() if p and isinstance(m, torch.jit.ScriptModule)]
        self.trace.parameters.update(parameters)
        for name, tensor in tensors.items():
            self._add_leaves(name, tensor)
        self._rows = {
            int(leaf.labels[0]): leaf.name
            for leaf in self.trace.leaves
            if leaf.rank == 1 and leaf.name not in self.trace.parameters
        }

    def _add_leaves(self, name: str, tensor: Tensor) -> None:
        self.trace.shapes[name] = tuple(tensor.shape)
        dims: list[Tensor | None] = []
        for dim, size in enumerate(tensor.shape):
            if size < 2:  # the last index of a dimension never goes, and such dimensions broadcast
                dims.append(None)
                continue
            labels = self.trace.book.new(size)
            dims.append(labels)
            if any(name.startswith(prefix) for prefix in self._scripted):
                self.trace.book.freeze(labels, "belongs to a ScriptModule, which can't be changed")
            self.trace.leaves.append(Leaf(name, dim, labels, tensor.dim()))
        self._known[tensor] = _Known(tuple(dims), True)

    @contextmanager
    def watch(self) -> Iterator[Trace]:
        """Everything that the model runs inside is followed; of a further run only what is new in it costs anything."""
        before = len(self.trace.contractions)
        known = {each.path for each in self.trace.contractions}
        with ExitStack() as stack:
            stack.enter_context(self._stack.watch())
            stack.enter_context(marked_attributes(self._model, self.trace.numeric))
            stack.enter_context(CallRecorder(self._stack, self))
            stack.enter_context(_Dispatch(self))
            yield self.trace
        self.trace.calls = self._stack.outermost
        if before:
            self.trace.contractions[before:] = [c for c in self.trace.contractions[before:] if c.path not in known]

    @property
    def listening(self) -> bool:
        """Not while gradients flow back or an optimizer steps: that says nothing of what belongs together.

        Nor does what a wrapper does around the model's call: DDP flattens all buffers to broadcast them. The
        closure that an optimizer may call runs with gradients enabled, unlike the step around it.
        """
        in_step = self.stepping and not torch.is_grad_enabled()
        return not (self.paused or in_step or in_backward() or (self._wrapped and not self._stack.running))

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
        for tensor in tensors(outputs):
            known = self._known.get(tensor)
            if known is not None:
                self.trace.book.mixed.extend(known.mixes)
                for labels in known.dims:
                    self.trace.book.freeze(labels, reason)

    def _outermost_output(self, path: str, output: Any) -> None:
        if path == "":
            self.freeze_outputs(output, "reaches the model's output")
            return
        for tensor in tensors(output) if path in self._stack.owners else ():
            known = self._known.get(tensor)
            if known is not None and not known.static:
                self._known[tensor] = replace(known, origins=frozenset([len(self.trace.given)]))
                self.trace.given.append([labels for labels in known.dims if labels is not None])

    def _origins(self, inputs: Iterable[Tensor]) -> frozenset[int]:
        known = (self._known.get(tensor) for tensor in inputs)
        return frozenset().union(*(each.origins for each in known if each is not None))

    def _entered(self, path: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        """A layer without tensors may hold a width nonetheless, that of its input."""
        if isinstance(module, nn.modules.batchnorm._NormBase) and args and isinstance(args[0], Tensor):
            unbatched = isinstance(module, nn.modules.instancenorm._InstanceNorm) and module._get_no_batch_dim()
            channel = 0 if unbatched == args[0].dim() else 1
            labels = self._labels_of(args[0])[channel] if args[0].dim() > channel else None
            if labels is not None:
                self.trace.attributes.setdefault(AttributeSite(path, "num_features"), []).append((labels, 1))

    def _is_outside(self, inputs: Any) -> bool:
        """Whether what a part of the model is given comes from outside the model; noted where it doesn't."""
        self.trace.read_on |= self._origins(tensors(inputs))
        return not any(tensor in self._known for tensor in tensors(inputs))

    def follow(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """Apply the rule of one executed call."""
        if func.namespace == "prim":  # a property of a tensor was read
            return
        if func is _aten.lift_fresh.default:  # torch.tensor([...])
            self._constants[out] = True
            return
        inputs = tensors_of_call(*args, *kwargs.values())
        gradients = self._is_on_gradients(inputs)
        if gradients and func not in _REORDERS:
            self._follow_gradients(inputs, out)
            return
        static = True
        for tensor in inputs:
            name = self._names.get(id(tensor))
            if name is not None:
                self._unread.pop(id(tensor), None)
                self.trace.readers.setdefault(name, set()).add(self._stack.path)
            known = self._known.get(tensor)
            static = static and self._is_static(tensor)
            branch = func is _aten._local_scalar_dense.default and tensor.dtype is torch.bool
            if known is not None and known.mixes and not branch:  # what Python branches on is not followed
                self.trace.book.mixed.extend(known.mixes)
        if not _NO_SIZES.isdisjoint(func.tags):
            self.trace.data_dependent = True
        call = Call(
            func,
            args,
            kwargs,
            out,
            self._stack.path,
            self.trace.book,
            self._dims_of,
            self._is_static,
            self._patchable,
            self._literal,
        )
        found = find_rule(func)
        result: Any = None
        if found is not None:
            try:
                result = found(call)
            except Exception as error:  # a rule that doesn't know this way of calling: nothing is known of the result
                call.freeze_all(f"the rule of {func} raised {type(error).__name__}: {error} ({call})")
        elif func.namespace not in _COLLECTIVES:  # those of DDP change no shape
            call.freeze_all(f"no rule for {func} ({call})")
        origins = frozenset[int]() if self._stack.inside else self._read_outside(inputs, result)
        self._note(call, result, static, gradients, origins)
        self._count(call)

    def _read_outside(self, inputs: list[Tensor], result: Any) -> frozenset[int]:
        """Note what an operation outside of all layers reads of what came out of them; all that it is made of."""
        origins = self._origins(inputs)
        if not origins:
            return origins
        if any(each.requires_grad and self._is_static(each) for each in inputs):  # with a parameter, as a layer does
            self.trace.read_on |= origins
        if torch.is_grad_enabled() and any(each.requires_grad for each in inputs):  # else no loss is made of it
            left = max(_labelled(dims) for dims in (result if isinstance(result, list) else [result or ()]) or [()])
            self.trace.lost |= self._origins(each for each in inputs if left < _labelled(self._labels_of(each)))
        return origins

    def _is_on_gradients(self, inputs: list[Tensor]) -> bool:
        """Whether a call works on gradients, and on parameters and numbers at most beside."""
        found = False
        for tensor in inputs:
            known = self._known.get(tensor)
            if known is None and not tensor.requires_grad and tuple(tensor.shape) in self._parameter_shapes:
                known = self._known_gradient(tensor)
            if known is not None and known.gradient:
                found = True
            elif id(tensor) not in self._names and tensor.dim():
                return False
        return found

    def _known_gradient(self, tensor: Tensor) -> _Known | None:
        for parameter in self._model.parameters():
            if parameter.grad is tensor:
                known = self._known[tensor] = _Known(self._known[parameter].dims, False, gradient=True)
                return known
        return None

    def _follow_gradients(self, inputs: list[Tensor], out: Any) -> None:
        """What has the shape of a gradient counts the same; a step that is written by hand adds it to a parameter."""
        for tensor in tensors_of_call(out):
            alike = [self._known[each].dims for each in inputs if each.shape == tensor.shape and each in self._known]
            for dims in alike[1:]:
                for one, other in zip(alike[0], dims, strict=True):
                    if one is not None and other is not None:
                        self.trace.book.tie(one, other)
            if id(tensor) not in self._names:
                self._known[tensor] = _Known(alike[0] if alike else (None,) * tensor.dim(), False, gradient=True)

    def _note(self, call: Call, result: Any, static: bool, gradient: bool, origins: frozenset[int]) -> None:
        """Keep what a rule said of the outputs, and what it said of the arguments."""
        if call.sizes and not self._patchable:
            for labels in call.sizes.values():
                call.freeze(labels, "a number that is written in a call counts it")
        for tensor, dim in call.unmasked:
            if id(tensor) in self._names:
                self.trace.unmasked.add((self._names[id(tensor)], dim))
        for values, own, labels in call.constants:
            name = self._buffer_of(own, values)
            known = self.trace.constants.setdefault(name, labels) if name is not None else None
            if known is None or len(known) != len(labels):
                call.freeze(labels, "picks indices of")
            else:
                self.trace.book.unify(known, labels, "")
        outs = tensors_of_call(call.out)
        all_dims = result if isinstance(result, list) else [] if result is None else [result]
        for at, tensor in enumerate(outs):
            dims = all_dims[at] if at < len(all_dims) else (None,) * tensor.dim()
            if static or call.mixes or any(labels is not None for labels in dims):
                self._known[tensor] = _Known(dims, static, tuple(call.mixes), call.sizes, origins, gradient)
            elif tensor in self._known:  # written into
                self._known[tensor] = _Known(dims, False)

    def _buffer_of(self, labels: Tensor, values: Tensor) -> str | None:
        """The buffer that an index tensor is, or shows."""
        name = self._rows.get(int(labels[0]))
        if name is None:
            return None
        buffer = self._model.get_buffer(name)
        return name if torch.equal(buffer, values) else None

    def _dims_of(self, tensor: Tensor) -> Dims | None:
        known = self._known.get(tensor)
        return None if known is None else known.dims

    def _is_static(self, tensor: Tensor) -> bool:
        known = self._known.get(tensor)
        return tensor in self._constants if known is None else known.static

    def _count(self, call: Call) -> None:
        count = FLOP_FORMULAS.get(call.func.overloadpacket)
        if count is not None:
            macs = int(count(*call.args, **call.kwargs, out_val=call.out)) // 2
            self.trace.contractions.append(Contraction(call.path, macs, tuple(call.factors)))

    @contextmanager
    def calling(
        self, kind: SizedFunction, site: CallSite | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Iterator[None]:
        """A function that may hold sizes is running; outside any module's forward they can't be rewritten."""
        before = self._patchable, self._literal
        self._patchable = site is not None and (kind.picks or kind.extents is None)
        self._literal = [index for _, _, index in self._picked(kind, site, args, kwargs)]
        try:
            yield
        finally:
            self._patchable, self._literal = before

    def _picked(
        self, kind: SizedFunction, site: CallSite | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> list[tuple[int, Tensor, Tensor]]:
        """Lists of indices in a call that are the same in every run: place, labels that they pick of, indices."""
        source = input_of(args, kwargs)
        if kind.picked is None or site is None or not self.listening or not isinstance(source, Tensor):
            return []
        dims = self._labels_of(source)
        if all(labels is None for labels in dims):
            return []
        with untraced():
            given, picked = kind.read(args, kwargs), kind.picked(args, kwargs)
        constant = [
            not isinstance(each, Tensor) or (self._is_static(each) and each.dtype != torch.uint8) for each in given
        ]
        return [
            (place, labels, index)
            for place, (dim, index) in picked.items()
            if constant[place] and (labels := dims[dim]) is not None
        ]

    def shaped_like(self, result: Tensor, other: Tensor) -> None:
        """State that two tensors have the same indices: one took the shape of the other."""
        if self.listening:
            where = f"takes the shape of another tensor in {self._stack.path or 'the model itself'}"
            for one, wanted in zip(self._labels_of(result), self._labels_of(other), strict=True):
                self.trace.book.unify(one, wanted, where)

    def size_read(self, tensor: Tensor, size: Any, dim: tuple[Any, ...]) -> Any:
        """Mark the sizes of labelled dimensions: what is calculated from them changes with their number.

        An integer without ``dim`` is the number of elements.
        """
        known = self._dims_of(tensor) if self.listening else None
        if known is None or all(labels is None for labels in known):
            return size

        def watched(number: int, *dims: Tensor | None) -> int:
            if all(labels is None for labels in dims):
                return number
            reason = f"{CALCULATES}{self._stack.path or 'the model itself'}"

            def told() -> None:
                for labels in dims:
                    self.trace.book.mix(labels, reason)

            if len(dims) > 1:
                return watched_size(number, told)
            (labels,) = dims
            assert labels is not None

            def divided_by(attribute: Attribute) -> None:
                self.trace.divided.setdefault(_site(attribute), []).append((labels, attribute.factor, reason))

            return watched_size(number, told, partial(self._counts, labels), divided_by)

        if dim:
            return watched(size, known[dim[0]])
        if isinstance(size, int):
            return watched(size, *known)
        return torch.Size([watched(number, labels) for labels, number in zip(known, size, strict=True)])

    def called(
        self, kind: SizedFunction, site: CallSite | None, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
    ) -> None:
        """Note what the sizes of a call count."""
        if not self.listening:
            return
        source = input_of(args, kwargs)
        if site is not None and isinstance(source, Tensor) and any(d is not None for d in self._labels_of(source)):
            self.trace.inputs.setdefault(site, []).append(self._labels_of(source))
        if site is not None:
            for place, labels, index in self._picked(kind, site, args, kwargs):
                known_labels, known_index = self.trace.picked.setdefault((site, place), (labels, index))
                with untraced():
                    same = len(known_labels) == len(labels) and torch.equal(known_index, index)
                if same:
                    self.trace.book.unify(known_labels, labels, "")
                else:
                    for different in (known_labels, labels):
                        self.trace.book.freeze(different, f"{site.function} in {site.module} picks varying indices")
        if kind.extents is None:
            known = self._known.get(result)
            extents = {} if known is None else known.sizes
        else:
            extents = kind.extents(self._labels_of, args, kwargs, result)
        if not extents or (site is None and kind.computes):
            return
        given = kind.read(args, kwargs)
        for place, labels in extents.items():
            if place >= len(given) or given[place] is None:
                continue
            if site is None:
                self.trace.book.freeze(labels, "its size is written outside any module's forward")
                continue
            if isinstance(given[place], Attribute):
                self._counts(labels, given[place])
            known_labels = self.trace.sized.setdefault((site, place), labels)
            if len(known_labels) == len(labels):  # the module runs more than once: one patch must serve all runs
                self.trace.book.unify(known_labels, labels, "")
            else:
                for different in (known_labels, labels):
                    self.trace.book.freeze(different, f"{site.function} in {site.module} has varying sizes")

    def _counts(self, labels: Tensor, attribute: Attribute) -> None:
        self.trace.attributes.setdefault(_site(attribute), []).append((labels, attribute.factor))

    def _labels_of(self, tensor: Tensor) -> Dims:
        return self._dims_of(tensor) or (None,) * tensor.dim()
