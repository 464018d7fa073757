"""Operations that work index by index: pointwise arithmetic, activations, dropout, fresh tensors of a like shape."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lightning_prune.graph.labels import Dims
from lightning_prune.graph.rules.table import Call, aten_family, rule
from lightning_prune.graph.tree import tensors_of_call

aten = torch.ops.aten

SAMPLES = (-2.3, -0.7, 0.4, 1.9)
"""What an operand that is not masked may hold, where the question is what an operation makes of zeros."""


def pointwise(call: Call) -> list[Dims]:
    """Equal indices meet; a broadcast dimension takes the labels of those that have it in full.

    Every operation that torch tags as pointwise comes here too.
    """
    inputs, outs = call.tensors(), tensors_of_call(call.out)
    if not outs:  # torch.equal gives a bool
        return []
    rank = max((tensor.dim() for tensor in inputs), default=0)
    every = [call.dims(tensor) for tensor in inputs]
    result: list[Tensor | None] = []
    zero_at: dict[tuple[int, ...], bool] = {}
    for back in range(rank, 0, -1):
        full = [i for i, t in enumerate(inputs) if t.dim() >= back and t.size(-back) > 1]
        labels = [every[i][-back] for i in full]
        if not labels or all(item is None for item in labels):
            result.append(None)
            continue
        common = labels[0]
        for other in labels[1:]:
            common = call.unify(common, other)
        if common is not None:
            known = [(i, item) for i, item in zip(full, labels, strict=True) if item is not None]
            blank = [(i, item) for i, item in known if not call.book.is_filled(item)]
            zeros = tuple(i for i, _ in blank)
            if zeros not in zero_at:
                zero_at[zeros] = _keeps_zero(call, inputs, zeros, common)
            common = blank[0][1] if blank else common
            common = common if zero_at[zeros] else call.book.fill(common)
        result.append(common)
    return [tuple(result) if out.dim() == rank else (None,) * out.dim() for out in outs]


def cross(call: Call) -> Dims | None:
    """Index by index but for the dimension of three."""
    first, second = call.args[:2]
    if first.shape != second.shape:
        call.freeze_all(f"broadcasts ({call})")
        return None
    dims = [call.unify(one, other) for one, other in zip(call.dims(first), call.dims(second), strict=True)]
    along = call.kwargs.get("dim", -1)
    call.freeze(dims[along], "turns it into another direction")
    dims[along] = None
    return tuple(dims)


aten_family(cross, ["linalg_cross"])
aten_family(
    pointwise,
    [
        "_prelu_kernel",
        "add",
        "celu",
        "celu_",
        "clamp",
        "complex",
        "copy_",
        "elu",
        "elu_",
        "gelu",
        "hardshrink",
        "hardsigmoid",
        "hardswish",
        "hardswish_",
        "hardtanh",
        "hardtanh_",
        "leaky_relu",
        "leaky_relu_",
        "log_sigmoid_forward",
        "masked_fill",
        "masked_fill_",
        "mish",
        "native_dropout",
        "nan_to_num",
        "polar",
        "relu6",
        "rrelu_with_noise",
        "selu",
        "softplus",
        "softshrink",
        "threshold",
        "where",
    ],
)


@rule(
    aten._foreach_abs,
    aten._foreach_abs_,
    aten._foreach_add.List,
    aten._foreach_add_.List,
    aten._foreach_addcdiv,
    aten._foreach_addcdiv_,
    aten._foreach_addcmul,
    aten._foreach_addcmul_,
    aten._foreach_copy_,
    aten._foreach_div,
    aten._foreach_div_,
    aten._foreach_lerp,
    aten._foreach_lerp_,
    aten._foreach_mul,
    aten._foreach_mul_,
    aten._foreach_neg,
    aten._foreach_neg_,
    aten._foreach_sqrt,
    aten._foreach_sqrt_,
    aten._foreach_sub.List,
    aten._foreach_sub_.List,
    aten._foreach_zero_,
)
def foreach(call: Call) -> list[Dims]:
    """Lists of tensors, one operation for all of their first ones, one for all of their second ones, …; zero stays."""
    lists = [arg for arg in (*call.args, *call.kwargs.values()) if isinstance(arg, (list, tuple))]
    lists = [each for each in lists if each and all(isinstance(item, Tensor) for item in each)]
    result: list[Dims] = []
    for together in zip(*lists, strict=True):
        same = [call.dims(tensor) for tensor in together if tensor.shape == together[0].shape]
        dims = list(same[0])
        for other in same[1:]:
            dims = [call.unify(one, two) for one, two in zip(dims, other, strict=True)]
        if len(same) < len(together):  # broadcast
            for tensor in together:
                for labels in call.dims(tensor):
                    call.freeze(labels, "is broadcast in a list of tensors by")
        result.append(tuple(dims))
    return result


def _keeps_zero(call: Call, inputs: list[Tensor], zeros: tuple[int, ...], labels: Tensor) -> bool:
    """Whether the operation makes zero of zeros in some of its inputs: run it on a few numbers and see."""
    if torch.Tag.nondeterministic_seeded in call.func.tags:  # dropouts keep zeros; a run would draw random numbers
        return bool(zeros)
    if call.func.overloadpacket is aten.copy_:
        return 1 in zeros or len(inputs) < 2
    key = (call.func, zeros, str(_kinds((call.args, call.kwargs))))
    if key not in _results:
        _results[key] = _try_zeros(call, zeros)
    keeps, finite = _results[key]
    if zeros and not finite:  # zero times infinity: the masked model gives no number
        call.mix(labels)
    return keeps


_results: dict[Any, tuple[bool, bool]] = {}


def _kinds(arguments: Any) -> Any:
    """The arguments of a call, with a dtype in the place of each tensor."""
    if isinstance(arguments, Tensor):
        return arguments.dtype
    if isinstance(arguments, (list, tuple)):
        return [_kinds(each) for each in arguments]
    return {name: _kinds(each) for name, each in arguments.items()} if isinstance(arguments, dict) else arguments


def _try_zeros(call: Call, zeros: tuple[int, ...]) -> tuple[bool, bool]:
    """Whether the operation makes zeros, and numbers, where some of its inputs are zero."""
    numbers = iter(range(len(call.tensors())))

    def stand_in(leaf: Any, zeros: tuple[int, ...] = zeros) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if next(numbers) in zeros:
            return torch.zeros(len(SAMPLES), dtype=leaf.dtype)
        if leaf.dtype is torch.bool:
            return torch.tensor([False, True, False, True])
        return torch.tensor(SAMPLES).abs().ceil().to(leaf.dtype) if not _is_real(leaf) else _samples(leaf.dtype)

    args, kwargs = pytree.tree_map(stand_in, (call.args, call.kwargs))
    values = pytree.tree_leaves(call.func(*args, **kwargs))[0]
    finite = bool(values.isfinite().all())
    if not finite:  # by itself, as masked_fill with minus infinity is?
        numbers = iter(range(len(call.tensors())))
        args, kwargs = pytree.tree_map(lambda leaf: stand_in(leaf, ()), (call.args, call.kwargs))
        without = pytree.tree_leaves(call.func(*args, **kwargs))[0]
        finite = not bool((without.isfinite() & ~values.isfinite()).any())
    return not bool(values.any()), finite


def _is_real(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _samples(dtype: torch.dtype) -> Tensor:
    return torch.tensor(SAMPLES).to(dtype)


def loss(call: Call) -> Dims:
    """Two tensors index by index, then their sum, which leaves out what is zero, or mean, which mixes."""
    at = [argument.name for argument in call.func._schema.arguments].index("reduction")
    reduction = call.arg(at, "reduction", 1)
    args, kwargs = (*call.args[:at], 0, *call.args[at + 1 :]), call.kwargs
    if len(call.args) <= at:
        args, kwargs = call.args, {**call.kwargs, "reduction": 0}
    first, second = call.args[:2]
    whole = first.new_empty(()).expand(torch.broadcast_shapes(first.shape, second.shape))
    (dims,) = pointwise(replace(call, args=args, kwargs=kwargs, out=whole))
    if reduction == 0:
        return dims
    for labels in dims:
        if labels is not None and (reduction == 1 or call.book.is_filled(labels)):
            call.mix(labels)
    return ()


aten_family(
    loss,
    [
        "binary_cross_entropy_with_logits",
        "huber_loss",
        "mse_loss",
        "smooth_l1_loss",
        "soft_margin_loss",
    ],
)


def like(call: Call) -> Dims:
    """A fresh tensor of the first argument's shape: it shrinks with it and holds nothing of its own."""
    source: Tensor = call.args[0]
    return tuple(map(call.book.fill, call.dims(source)))


aten_family(
    like,
    [
        "bernoulli",
        "bernoulli_",
        "empty_like",
        "exponential_",
        "fill_",
        "full_like",
        "normal_",
        "ones_like",
        "rand_like",
        "randint_like",
        "randn_like",
        "uniform_",
    ],
)


@rule(aten.zeros_like, aten.zero_)
def zeros_like(call: Call) -> Dims:
    """Zeros of the first argument's shape, in the masked places too."""
    source: Tensor = call.args[0]
    return tuple(_blank(call, labels) for labels in call.dims(source))


def _blank(call: Call, labels: Tensor | None) -> Tensor | None:
    if labels is None or not call.book.is_filled(labels):
        return labels
    known, places = labels.unique(return_inverse=True)
    fresh: Tensor | None = call.book.unify(call.book.new(len(known))[places], labels, "")
    return fresh


def made(call: Call) -> Dims:
    """A fresh tensor that holds the same everywhere, or noise: each index may go, if what it meets goes."""
    return tuple(None if size < 2 else call.book.new(size) for size in call.out.shape)


aten_family(made, ["zeros", "new_zeros", "new_empty", "empty", "new_empty_strided", "empty_strided"])


def made_full(call: Call) -> Dims:
    """The same of other values than zero."""
    return tuple(map(call.book.fill, made(call)))


aten_family(made_full, ["full", "new_full", "new_ones", "ones", "rand", "randn"])


@rule(aten.eye)
def eye(call: Call) -> Dims:
    """Ones on the diagonal: an index may go as row and column."""
    size = call.out.size(0)
    if call.out.size(1) != size or size < 2:
        return (None, None)
    labels = call.book.fill(call.book.new(size))
    assert labels is not None
    call.sizes.update({0: labels, 1: labels})
    return (labels, labels)


@rule(aten.repeat_interleave.Tensor)
def number(call: Call) -> None:
    """Creates a tensor that counts its indices, or reads a number: no labels, and none are touched."""


aten_family(
    number,
    [
        "_assert_async",
        "_local_scalar_dense",
        "arange",
        "is_same_size",
        "linspace",
        "randint",
        "randperm",
        "scalar_tensor",
        "sym_numel",
        "sym_size",
        "sym_storage_offset",
        "sym_stride",
    ],
)


def fake_quantize(call: Call) -> list[Dims]:
    """Rounding to a grid that holds zero; scales and zero points are of the whole tensor or of each channel."""
    dims = list(call.dims(call.args[0]))
    if "per_channel" in str(call.func):
        axis = call.args[3]
        for each in call.args[1:3]:
            dims[axis] = call.unify(dims[axis], call.dims(each)[0])
    return [tuple(dims)] * 2


aten_family(
    fake_quantize,
    [
        "_fake_quantize_learnable_per_channel_affine",
        "_fake_quantize_learnable_per_tensor_affine",
        "_fake_quantize_per_tensor_affine_cachemask_tensor_qparams",
        "fake_quantize_per_channel_affine_cachemask",
        "fake_quantize_per_tensor_affine_cachemask",
    ],
)


def observe_and_quantize(call: Call) -> list[Dims]:
    """The same after the range was brought up to date: by the values of the whole tensor, or of each channel."""
    observed, axis, by_channel = call.args[1], call.args[10], call.arg(11, "per_row_fake_quant", False)
    dims = list(call.dims(call.args[0]))
    for dim, labels in enumerate(dims):
        if by_channel and dim == axis:
            for each in call.args[3:7]:
                dims[dim] = call.unify(dims[dim], call.dims(each)[0])
        elif bool(observed):
            call.mix(labels)
    return [tuple(dims)] * 2


aten_family(observe_and_quantize, ["_fused_moving_avg_obs_fq_helper"])


@rule(aten.glu)
def glu(call: Call) -> Dims:
    """The first half, gated by the second: their indices go together."""
    x, dim = call.args[0], call.arg(1, "dim", -1)
    dims = list(call.dims(x))
    labels = dims[dim]
    if labels is not None:
        first, second = labels.chunk(2)
        if x.size(dim) == 2:
            call.freeze(labels, "gates one index by another")
        call.book.tie(first, second)
        dims[dim] = first if x.size(dim) > 2 else None
    return tuple(dims)
