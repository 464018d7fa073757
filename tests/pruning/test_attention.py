"""`NarrowAttention` is torch's own attention while all heads are there, and attention by hand when some are gone."""

import copy
import inspect
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import Snapshot, assert_close, assert_same_outputs, build, inputs, masked_twin
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_prune import Plan, prune_neurons
from lightning_prune.pruning.attention import NarrowAttention, install_narrow_attention, remove_narrow_attention

WIDTH, HEADS, BATCH, LONG, SHORT = 12, 3, 2, 5, 4

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no_bias": {"bias": False},
    "bias_kv": {"add_bias_kv": True},
    "zero_attn": {"add_zero_attn": True},
    "both_more": {"add_bias_kv": True, "add_zero_attn": True},
    "kdim": {"kdim": 7},
    "kdim_vdim": {"kdim": 7, "vdim": 8},
    "kdim_bias_kv": {"kdim": 7, "vdim": 8, "add_bias_kv": True, "add_zero_attn": True},
    "one_head": {"num_heads": 1},
}


def attention(**options: Any) -> nn.MultiheadAttention:
    return build(lambda: nn.MultiheadAttention(WIDTH, **({"num_heads": HEADS} | options)))


def narrowed(module: nn.MultiheadAttention) -> nn.MultiheadAttention:
    """A copy that runs with the other forward."""
    twin = copy.deepcopy(module)
    install_narrow_attention(twin, module.head_dim**-0.5)
    return twin


def qkv(module: nn.MultiheadAttention, *, batched: bool = True, same: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Queries of one length, keys and values of another, in the layout that the module wants."""

    def make(length: int, width: int, seed: int) -> Tensor:
        x = inputs((length, width), BATCH, seed)
        return x[0] if not batched else x if module.batch_first else x.transpose(0, 1)

    query = make(LONG, WIDTH, 0)
    return (query,) * 3 if same else (query, make(SHORT, module.kdim, 1), make(SHORT, module.vdim, 2))


def boolean(*shape: int) -> Tensor:
    """A mask under which no query is left without a key."""
    mask = inputs(shape[1:], shape[0], 3) > 0.3
    mask[..., 0] = False
    return mask


def additive(*shape: int) -> Tensor:
    return inputs(shape[1:], shape[0], 4)


MASKS: dict[str, Callable[[int], dict[str, Any]]] = {
    "none": lambda heads: {},
    "boolean": lambda heads: {"attn_mask": boolean(LONG, SHORT)},
    "additive": lambda heads: {"attn_mask": additive(LONG, SHORT)},
    "per_head": lambda heads: {"attn_mask": boolean(BATCH * heads, LONG, SHORT)},
    "per_head_additive": lambda heads: {"attn_mask": additive(BATCH * heads, LONG, SHORT)},
    "padding": lambda heads: {"key_padding_mask": boolean(BATCH, SHORT)},
    "padding_additive": lambda heads: {"key_padding_mask": additive(BATCH, SHORT)},
    "both": lambda heads: {"attn_mask": boolean(LONG, SHORT), "key_padding_mask": boolean(BATCH, SHORT)},
    "both_additive": lambda heads: {"attn_mask": additive(LONG, SHORT), "key_padding_mask": additive(BATCH, SHORT)},
    "both_per_head": lambda heads: {
        "attn_mask": boolean(BATCH * heads, LONG, SHORT), "key_padding_mask": boolean(BATCH, SHORT),
    },
}  # fmt: skip

WEIGHTS: list[dict[str, bool]] = [
    {},
    {"need_weights": True, "average_attn_weights": False},
    {"need_weights": False},
]


def assert_same(ours: tuple[Tensor, Tensor | None], theirs: tuple[Tensor, Tensor | None]) -> None:
    assert (ours[1] is None) == (theirs[1] is None)
    assert_close([each for each in ours if each is not None], [each for each in theirs if each is not None])


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_with_all_heads_it_is_torchs_own(kind: str, batch_first: bool, masks: str, weights: dict[str, bool]) -> None:
    module = attention(batch_first=batch_first, **KINDS[kind])
    x, options = qkv(module), MASKS[masks](module.num_heads) | weights
    for training in (True, False):
        module.train(training)
        assert_same(narrowed(module)(*x, **options), module(*x, **options))


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("masks", ["none", "boolean", "additive", "per_head", "padding", "both"])
@pytest.mark.parametrize("kind", KINDS)
def test_without_a_batch_it_is_torchs_own(kind: str, masks: str, weights: dict[str, bool]) -> None:
    module = attention(batch_first=True, **KINDS[kind])
    options = dict(weights)
    if masks in ("boolean", "both"):
        options["attn_mask"] = boolean(LONG, SHORT)
    if masks == "additive":
        options["attn_mask"] = additive(LONG, SHORT)
    if masks == "per_head":
        options["attn_mask"] = boolean(module.num_heads, LONG, SHORT)
    if masks in ("padding", "both"):
        options["key_padding_mask"] = boolean(1, SHORT)[0]
    x = qkv(module, batched=False)
    assert_same(narrowed(module)(*x, **options), module(*x, **options))


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_a_causal_hint_is_torchs_own(batch_first: bool, need_weights: bool) -> None:
    module = attention(batch_first=batch_first)
    query, key, value = qkv(module, same=True)
    mask = nn.Transformer.generate_square_subsequent_mask(LONG, dtype=torch.float64)
    options: dict[str, Any] = {"is_causal": True, "need_weights": need_weights}
    for more in ({"attn_mask": mask}, {"attn_mask": mask == -math.inf}):
        more_options = options | more
        assert_same(narrowed(module)(query, key, value, **more_options), module(query, key, value, **more_options))
    for each in (module, narrowed(module)):
        with pytest.raises(RuntimeError, match="is_causal"):
            each(query, key, value, is_causal=True)


def test_positional_arguments_are_torchs_own() -> None:
    module = attention(batch_first=True)
    x = (*qkv(module), boolean(BATCH, SHORT), True, boolean(LONG, SHORT), False)
    assert_same(narrowed(module)(*x), module(*x))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_torchs_own(kind: str) -> None:
    module = attention(batch_first=True, **KINDS[kind])
    twin = narrowed(module)
    for each in (module, twin):
        out, weights = each(*qkv(each), attn_mask=boolean(LONG, SHORT))
        (out.square().sum() + weights.square().sum()).backward()
    ours, theirs = (dict(each.named_parameters()) for each in (twin, module))
    assert list(ours) == list(theirs)
    assert_close([p.grad for p in ours.values()], [p.grad for p in theirs.values()])


@pytest.mark.parametrize("need_weights", [True, False])
def test_dropout_happens_in_training_only(need_weights: bool) -> None:
    module = narrowed(attention(batch_first=True, dropout=0.5))
    x = qkv(module)
    out = [[module.train(mode)(*x, need_weights=need_weights)[0] for _ in range(2)] for mode in (True, False)]
    assert not torch.equal(*out[0])
    assert torch.equal(*out[1])
    assert_close([out[1][0]], [attention(batch_first=True).eval()(*x)[0]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_types_are_torchs_own(dtype: torch.dtype) -> None:
    module = attention(batch_first=True).to(dtype)
    x = tuple(each.to(dtype) for each in qkv(module))
    for mask in (None, boolean(LONG, SHORT)):
        ours, theirs = (each(*x, attn_mask=mask)[0] for each in (narrowed(module), module))
        assert ours.dtype == theirs.dtype == dtype
        assert torch.allclose(ours.float(), theirs.float(), atol=1e-6 if dtype is torch.float32 else 2e-2)


# Some of the heads, or of their features


def by_hand(module: nn.MultiheadAttention, heads: int, scale: float, x: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """One head after the other; batch first, no masks."""
    weights = module.in_proj_weight.chunk(3) if module.in_proj_weight is not None else (
        module.q_proj_weight, module.k_proj_weight, module.v_proj_weight
    )  # fmt: skip
    q, k, v = (F.linear(each, w, b) for each, w, b in zip(x, weights, module.in_proj_bias.chunk(3), strict=True))
    outs = [
        torch.softmax(a @ b.transpose(1, 2) * scale, -1) @ c
        for a, b, c in zip(*(each.chunk(heads, 2) for each in (q, k, v)), strict=True)
    ]
    return module.out_proj(torch.cat(outs, 2))


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize(("heads", "size"), [(1, 4), (2, 4), (5, 4), (3, 2), (2, 7)])
def test_with_any_number_and_size_of_heads_it_is_attention_by_hand(heads: int, size: int, need_weights: bool) -> None:
    module = attention(batch_first=True)
    with torch.no_grad():
        module.in_proj_weight = nn.Parameter(inputs((WIDTH,), 3 * heads * size))
        module.in_proj_bias = nn.Parameter(inputs((), 3 * heads * size))
        module.out_proj.weight = nn.Parameter(inputs((heads * size,), WIDTH))
    module.num_heads = heads
    install_narrow_attention(module, 0.3)
    x = qkv(module)
    out, weights = module(*x, need_weights=need_weights, average_attn_weights=False)
    assert_close([out], [by_hand(module, heads, 0.3, x)])
    assert (weights is not None) == need_weights
    if weights is not None:
        assert weights.shape == (BATCH, heads, LONG, SHORT)
        assert torch.allclose(weights.sum(-1), torch.ones(()).double())


class Attending(nn.Module):
    """Attention between layers that can be pruned, over tokens (batch, tokens, features)."""

    def __init__(self, call: dict[str, Any], **options: Any) -> None:
        super().__init__()
        self.enter, self.attention = (
            nn.Linear(6, WIDTH),
            nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, **options),
        )
        self.memory = nn.Linear(6, self.attention.kdim)
        self.values = nn.Linear(6, self.attention.vdim)
        self.leave = nn.Linear(WIDTH, 2)
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        out, weights = self.attention(self.enter(x), self.memory(x[:, 1:]), self.values(x[:, 1:]), **self.call)
        out = self.leave(out)
        return out if weights is None else out + 0 * weights.sum()


PRUNED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "weights": ({}, {}),
    "no_weights": ({"need_weights": False}, {}),
    "kdim": ({}, {"kdim": 7, "vdim": 8}),
    "bias_kv": ({}, {"add_bias_kv": True}),
    "zero_attn": ({"need_weights": False}, {"add_zero_attn": True}),
    "no_bias": ({"need_weights": False}, {"bias": False}),
    "masks": ({"attn_mask": boolean(4, 3), "key_padding_mask": None}, {}),
}


@pytest.mark.parametrize("name", PRUNED)
def test_heads_are_pruned_and_equal_masking(name: str) -> None:
    """Where the average over the heads is used it is their size that goes, for that equals masking exactly."""
    call, options = PRUNED[name]
    model, x = build(lambda: Attending(call, **options)), inputs((4, 6))
    dense = copy.deepcopy(model)
    plan = Plan({}, {})
    for _ in range(2):
        plan = plan.then(prune_neurons(model, x, 0.3, include="attention", scope="layer"))
    assert isinstance(model.attention.__dict__["forward"], NarrowAttention)
    assert not plan.approximate
    assert (model.attention.num_heads, model.attention.head_dim) == (
        (HEADS, 2) if call.get("need_weights", True) else (1, 4)
    )
    assert model.attention.forward.scale == (WIDTH // HEADS) ** -0.5
    assert_same_outputs(model, masked_twin(dense, plan.kept), x, inputs((4, 6), 5), modes=("train",))
    fresh = copy.deepcopy(dense)
    plan.apply(fresh)
    fresh.load_state_dict(model.state_dict())
    assert_same_outputs(fresh, model, x, modes=("train",))


def test_width_alone_can_go_while_heads_stay() -> None:
    model, x = build(lambda: Attending({"need_weights": False})), inputs((4, 6))
    dense = copy.deepcopy(model)
    plan = prune_neurons(model, x, 0.5, include=["enter", "memory", "values"], scope="layer")
    assert (model.attention.num_heads, model.attention.head_dim) == (HEADS, WIDTH // HEADS)
    assert model.attention.embed_dim == model.enter.out_features == WIDTH // 2
    assert (model.attention.kdim, model.attention.vdim) == (model.memory.out_features, model.values.out_features)
    assert_same_outputs(model, masked_twin(dense, plan.kept), x, inputs((4, 6), 5), modes=("train",))


@given(st.integers(0, 10**6), st.floats(0.1, 0.6))
def test_random_removals_of_an_encoder_equal_masking(seed: int, amount: float) -> None:
    def make() -> nn.Module:
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 10, dropout=0.0, batch_first=True, norm_first=True)
        return nn.Sequential(nn.Linear(6, WIDTH), layer, nn.Linear(WIDTH, 2))

    model, x = build(make, seed), inputs((4, 6), seed=seed)
    dense = copy.deepcopy(model)
    plan = prune_neurons(model, x, amount, exact_only=True, scope="layer")
    assert plan.approximate == {}
    assert_same_outputs(model, masked_twin(dense, plan.kept), x, inputs((4, 6), 3, seed + 1), modes=("train",))


# The object that stands in forward's place


def pruned() -> tuple[Attending, Tensor]:
    model, x = build(lambda: Attending({"need_weights": False})), inputs((4, 6))
    prune_neurons(model, x, 0.5, scope="layer")
    return model, x


def through_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def through_torch(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle, through_torch])
def test_a_copy_attends_with_its_own_weights(duplicate: Any) -> None:
    model, x = pruned()
    other = duplicate(model)
    assert other.attention.forward is not model.attention.forward
    assert other.attention.forward.module is other.attention
    assert_same_outputs(other, model, x)
    before = model(x)
    with torch.no_grad():
        other.attention.in_proj_weight.zero_()
    assert torch.equal(model(x), before)
    assert not torch.allclose(other(x), before)


def test_it_shows_torchs_signature_and_state() -> None:
    module = attention(batch_first=True)
    twin = narrowed(module)
    assert inspect.signature(twin.forward) == inspect.signature(module.forward)
    assert list(twin.state_dict()) == list(module.state_dict())
    assert type(twin) is nn.MultiheadAttention


@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects:UserWarning")
@pytest.mark.parametrize("strict", [True, False])
def test_it_can_be_exported(strict: bool) -> None:
    model, x = pruned()
    program = torch.export.export(model.eval(), (x,), strict=strict)
    assert_close([program.module()(x)], [model(x)])


def test_it_can_be_compiled() -> None:
    model, x = pruned()
    torch._dynamo.reset()
    assert_close([torch.compile(model, backend="eager")(x)], [model(x)])


def test_the_fast_path_of_an_encoder_layer_stays_off() -> None:
    """It reads weights of its own accord and knows nothing of other numbers of heads."""
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 10, dropout=0.0, batch_first=True)
    model, x = build(lambda: nn.Sequential(nn.Linear(6, WIDTH), layer, nn.Linear(WIDTH, 2))).eval(), inputs((4, 6))
    prune_neurons(model, x, 0.6, include="1.self_attn", scope="layer")
    assert model[1].self_attn.num_heads == 1
    with torch.no_grad():
        fast = model(x)
    with torch.enable_grad():
        assert_close([fast], [model(x).detach()])


def test_installing_is_taken_back() -> None:
    module = attention()
    snapshot = Snapshot(module)
    put_back = install_narrow_attention(module, 0.5)
    assert isinstance(module.forward, NarrowAttention)
    put_back()
    assert "forward" not in module.__dict__
    snapshot.assert_unchanged()
    put_back()
    snapshot.assert_unchanged()


def test_installing_twice_keeps_the_first_scale() -> None:
    module = attention()
    install_narrow_attention(module, 0.5)
    first = module.forward
    put_back = install_narrow_attention(module, 0.7)
    assert module.forward is first
    assert first.scale == 0.5
    put_back()
    assert module.forward is first
    remove_narrow_attention(module)
    assert "forward" not in module.__dict__
    remove_narrow_attention(module)


def test_a_forward_of_the_users_own_comes_back() -> None:
    module = attention()
    own = lambda *args, **kwargs: args  # noqa: E731
    module.forward = own
    remove_narrow_attention(module)
    assert module.forward is own
    put_back = install_narrow_attention(module, 0.5)
    put_back()
    assert module.forward is own
