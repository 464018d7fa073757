"""Operations that take functions, and compiled functions: what they run is followed."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from networks import Net, assert_same_outputs, build, inputs, masked_twin
from torch import Tensor, nn

from lightning_prune import count_cost, find_groups, prune_neurons

flex = pytest.importorskip("torch.nn.attention.flex_attention")


def assert_same_as_written(*models_and_inputs: Any, **options: Any) -> None:
    """Only the comparison runs uncompiled, to save time: what is tested has to see to that by itself."""
    with torch.compiler.set_stance("force_eager"):
        assert_same_outputs(*models_and_inputs, **options)


class FlexAttention(nn.Module):
    """Attention whose scores a function may change."""

    def __init__(self, score: Any = None, mask: Any = None, shared: int = 1, attend: Any = flex.flex_attention) -> None:
        super().__init__()
        self.enter, self.out, self.leave = nn.Linear(5, 8), nn.Linear(16, 8), nn.Linear(8, 2)
        self.q, self.k, self.v = nn.Linear(8, 16), nn.Linear(8, 16 // shared), nn.Linear(8, 16 // shared)
        self.score, self.mask, self.shared, self.attend = score, mask, shared, attend

    def forward(self, x: Tensor) -> Tensor:
        h, n = self.enter(x).tanh(), x.size(1)
        q, k, v = (layer(h).unflatten(-1, (-1, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        mask = None if self.mask is None else flex.create_block_mask(self.mask, None, None, n, n, device="cpu")
        y = self.attend(q, k, v, score_mod=self.score, block_mask=mask, enable_gqa=self.shared > 1)
        return self.leave(self.out(y.transpose(1, 2).flatten(2)).tanh())  # type: ignore[no-any-return]


FLEX: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"mask": lambda b, h, q, k: q >= k},
    "relative": {"score": lambda s, b, h, q, k: s + (q - k)},
    "grouped_queries": {"shared": 2},
    "compiled": {"attend": torch.compile(flex.flex_attention, fullgraph=True, backend="eager")},
}


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", FLEX)
def test_heads_of_flex_attention_go(name: str) -> None:
    model, x = build(lambda: FlexAttention(**FLEX[name])), inputs((6, 5))
    dense, n_heads = copy.deepcopy(model), 4 // model.shared
    groups = find_groups(model, x).prunable
    assert {(g.name, g.size, g.exact) for g in groups} == {
        ("enter", 8, True),
        ("q + k + v", n_heads, True),
        ("out", 8, True),
    }
    plan = prune_neurons(model, x, 0.5, scope="layer", exact_only=True)
    assert (model.q.out_features, model.k.out_features) == (8, 8 // model.shared)
    assert_same_as_written(model, masked_twin(dense, plan.kept), x, inputs((7, 5), 3))
    assert count_cost(model, x).macs < count_cost(dense, x).macs


BETWEEN: dict[str, Callable[[Tensor], Tensor]] = {
    "cond": lambda x: torch.cond(x.sum() > -100, lambda t: t * 2.0, lambda t: t.exp(), (x,)),
    "other_branch": lambda x: torch.cond(x.sum() > 100, lambda t: t.exp(), lambda t: t * 2.0, (x,)),
    "one_graph": torch.compile(lambda x: x * 2.0, fullgraph=True, backend="eager"),
    "several_graphs": torch.compile(lambda x: x * 2.0, backend="eager"),
}


@pytest.mark.parametrize("name", BETWEEN)
def test_what_runs_inside_is_followed(name: str) -> None:
    model, x = (
        build(lambda: Net(lambda n, x: n.b(BETWEEN[name](n.a(x).tanh())), a=nn.Linear(3, 8), b=nn.Linear(8, 2))),
        inputs((3,)),
    )
    dense = copy.deepcopy(model)
    assert [(g.size, g.exact) for g in find_groups(model, x).prunable] == [(8, True)]
    plan = prune_neurons(model, x, 0.5, exact_only=True)
    assert model.a.out_features == 4
    assert_same_as_written(model, masked_twin(dense, plan.kept), x, inputs((3,), 5), modes=("train",))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_repeated_channels_are_followed_in_inference_mode_too(context: Any) -> None:
    """Composite operations arrive whole there."""

    def run(net: Any, x: Tensor) -> Tensor:
        with context():
            y = torch.repeat_interleave(net.a(x).tanh(), 2, 1)
        return net.b(y + 0)  # type: ignore[no-any-return]

    model, x = (
        build(lambda: Net(run, a=nn.Conv1d(3, 4, 1), b=nn.Conv1d(8, 2, 1))),
        inputs((3, 5)),
    )
    dense = copy.deepcopy(model)
    plan = prune_neurons(model, x, 0.5)
    assert_same_outputs(model, masked_twin(dense, plan.kept), x)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")  # of torch.ao
def test_a_network_in_quantization_aware_training_shrinks_and_is_converted() -> None:
    quantization = pytest.importorskip("torch.ao.quantization")
    torch.manual_seed(0)
    layers = [quantization.QuantStub(), nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)]
    model, x = nn.Sequential(*layers, quantization.DeQuantStub()).train(), torch.randn(4, 3, 8, 8)
    model.qconfig = quantization.get_default_qat_qconfig("fbgemm")
    quantization.fuse_modules_qat(model, [["1", "2", "3"]], inplace=True)
    quantization.prepare_qat(model, inplace=True)
    model(x)
    plan = prune_neurons(model, x, 0.5)
    assert "_fused_moving_avg_obs_fq_helper in 1.activation_post_process" in plan.approximate["1"]
    conv = model[1]
    assert {len(t) for t in (conv.weight, conv.bn.running_var, conv.weight_fake_quant.scale)} == {4}
    model(x).sum().backward()
    expected = model.eval()(x).detach()
    if "fbgemm" in torch.backends.quantized.supported_engines:
        torch.backends.quantized.engine = "fbgemm"
        got = quantization.convert(model)(x)
        assert float((got - expected).abs().max()) < 0.1 * float(expected.abs().max())
