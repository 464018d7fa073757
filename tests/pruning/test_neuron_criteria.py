"""Every criterion against loops over neurons whose slices are written down here by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from networks import CASES, IMAGE, Net, Snapshot, build, build_case, cases, inputs, sequential
from torch import Tensor, nn
from torch.func import functional_call

from lightning_prune import PruningError, find_groups, prune_neurons
from lightning_prune.graph.callsites import ModuleCall
from lightning_prune.pruning.criteria import (
    NEURON_CRITERIA,
    NeuronCriterion,
    collect_now,
    get_neuron_criterion,
    relative,
)

# Which slices make a neuron, go with it and read it, by hand

Places = Callable[[int], Iterable[int]]


def each(times: int = 1) -> Places:
    """Neuron i stands at ``times`` places in a row."""
    return lambda i: range(i * times, (i + 1) * times)


def gates(count: int, size: int) -> Places:
    """Neuron i stands once in each of ``count`` blocks of ``size``."""
    return lambda i: range(i, count * size, size)


def heads(count: int, size: int) -> Places:
    """Head i has ``size`` rows in each of q, k and v."""
    return lambda i: [part * count * size + i * size + j for part in range(3) for j in range(size)]


Slices = list[tuple[str, int, Places]]


@dataclass(frozen=True)
class Owned:
    """Slices of a group by role: name, dimension, places of neuron i."""

    size: int
    makes: Slices
    follows: Slices
    reads: Slices

    @property
    def all(self) -> Slices:
        return self.makes + self.follows + self.reads


def made(name: str, places: Places | None = None) -> tuple[Slices, Slices]:
    places = places or each()
    return [(f"{name}.weight", 0, places)], [(f"{name}.bias", 0, places)]


def image_net() -> nn.Module:
    layers = [nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 4, 2), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(16, 6), nn.Tanh(), nn.Linear(6, 2))


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "image_net": (image_net, IMAGE),
    "mlp": (sequential(nn.Linear(4, 7), nn.ReLU(), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 2)), (4,)),
    "flatten": (sequential(nn.Conv2d(3, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(54, 2)), IMAGE),
} | {name: CASES[name] for name in (
    "residual", "grouped", "grouped_transposed", "depthwise2d", "transposed2d", "attention", "heads", "lstm")
}  # fmt: skip


def lstm_layer(number: int) -> tuple[Slices, Slices, Slices]:
    of, four = f"_l{number}", gates(4, 6)
    makes = [(f"a.weight_ih{of}", 0, four), (f"a.weight_hh{of}", 0, four)]
    follows = [(f"a.bias_ih{of}", 0, four), (f"a.bias_hh{of}", 0, four)]
    return makes, follows, [(f"a.weight_hh{of}", 1, each())]


def lstm_owned() -> Owned:
    (m0, f0, r0), (m1, f1, r1) = lstm_layer(0), lstm_layer(1)
    return Owned(6, m0 + m1, f0 + f1, [*r0, *r1, ("a.weight_ih_l1", 1, each()), ("b.weight", 1, each())])


HAND: dict[str, dict[str, Owned]] = {
    "image_net": {
        "0": Owned(5, [("0.weight", 0, each())], [(n, 0, each()) for n in ("0.bias", "1.weight", "1.bias")],
                   [("3.weight", 1, each())]),
        "3": Owned(4, *made("3"), [("6.weight", 1, each(4))]),
        "6": Owned(6, *made("6"), [("8.weight", 1, each())]),
    },
    "mlp": {"0": Owned(7, *made("0"), [("2.weight", 1, each())]), "2": Owned(6, *made("2"), [("4.weight", 1, each())])},
    "flatten": {"0": Owned(6, *made("0"), [("3.weight", 1, each(9))])},
    "residual": {
        "0 + 1.body.3": Owned(
            8, [("0.weight", 0, each()), ("1.body.3.weight", 0, each())],
            [(n, 0, each()) for n in ("0.bias", "1.body.3.bias", "2.weight", "2.bias")],
            [("1.body.1.weight", 1, each()), ("3.weight", 1, each())]),
        "1.body.1": Owned(6, *made("1.body.1"), [("1.body.3.weight", 1, each())]),
    },
    "grouped": {
        "0 + 2": Owned(6, [("0.weight", 0, each(2)), ("2.weight", 0, each(3))],
                       [("0.bias", 0, each(2)), ("2.bias", 0, each(3))], [("4.weight", 1, each(3))]),
    },
    "grouped_transposed": {
        "0": Owned(6, [("0.weight", 0, each(2))], [("0.bias", 0, each(2)), ("2.bias", 0, each(3))],
                   [("2.weight", 0, each(2)), ("4.weight", 1, each(3))]),
    },
    "depthwise2d": {
        "0": Owned(8, [("0.weight", 0, each())], [("0.bias", 0, each()), ("2.bias", 0, each())],
                   [("2.weight", 0, each()), ("4.weight", 1, each())]),
    },
    "transposed2d": {
        "0": Owned(8, *made("0"), [("2.weight", 0, each())]),
        "2": Owned(6, [("2.weight", 1, each())], [("2.bias", 0, each())], [("4.weight", 1, each())]),
    },
    "attention": {
        "enter": Owned(12, *made("enter"), [("attention.in_proj_weight", 1, each())]),
        "attention": Owned(4, [("attention.in_proj_weight", 0, heads(4, 3))],
                           [("attention.in_proj_bias", 0, heads(4, 3))], [("attention.out_proj.weight", 1, each(3))]),
        "attention.out_proj": Owned(12, *made("attention.out_proj"), [("out.weight", 1, each())]),
    },
    "heads": {
        "qkv": Owned(4, *made("qkv", heads(4, 3)), [("proj.weight", 1, each(3))]),
        "proj": Owned(6, *made("proj"), [("out.weight", 1, each())]),
    },
    "lstm": {"a": lstm_owned()},
}  # fmt: skip


def get(name: str) -> tuple[nn.Module, Tensor]:
    maker, shape = NETS[name]
    return build(maker), inputs(shape, batch=3)


def slices_of(model: nn.Module, slices: Slices, neuron: int) -> list[Tensor]:
    parameters = dict(model.named_parameters())
    return [parameters[name].detach().select(dim, at) for name, dim, places in slices for at in places(neuron)]


# The oracles


def l1(model: nn.Module, owned: Owned) -> list[float]:
    return [sum(float(s.abs().sum()) for s in slices_of(model, owned.all, i)) for i in range(owned.size)]


def squares(model: nn.Module, owned: Owned) -> list[float]:
    return [sum(float(s.square().sum()) for s in slices_of(model, owned.all, i)) for i in range(owned.size)]


def l2(model: nn.Module, owned: Owned) -> list[float]:
    return [value**0.5 for value in squares(model, owned)]


def lamp(model: nn.Module, owned: Owned) -> list[float]:
    values = squares(model, owned)
    return [value / sum(other for other in values if other >= value) for value in values]


def geometric_median(model: nn.Module, owned: Owned) -> list[float]:
    rows = [torch.cat([s.flatten() for s in slices_of(model, owned.makes, i)]) for i in range(owned.size)]
    return [sum(float((row - other).norm()) for other in rows) for row in rows]


def largest(rows: Tensor) -> Tensor:
    return rows.abs().amax(1) + rows.square().mean(1)


def own_function(model: nn.Module, owned: Owned) -> list[float]:
    scores = []
    for i in range(owned.size):
        values = [torch.cat([each.flatten() for each in slices_of(model, [s], i)]) for s in owned.all]
        scores.append(sum(float(v.abs().max() + v.square().mean()) for v in values))
    return scores


BY_WEIGHT: dict[str, tuple[Any, Callable[[nn.Module, Owned], list[float]]]] = {
    "l1": ("l1", l1), "l2": ("l2", l2), "lamp": ("lamp", lamp), "geometric_median": ("geometric_median", geometric_median),
    "function": (largest, own_function),
}  # fmt: skip


def collected(criterion: Any, model: nn.Module, x: Any) -> tuple[NeuronCriterion, Any]:
    groups = find_groups(model, x)
    judge = get_neuron_criterion(criterion)
    collect_now(judge, model, groups, groups.calls)
    return judge, groups


def scores_of(criterion: Any, model: nn.Module, x: Any) -> dict[str, list[float]]:
    """By group, what a criterion says."""
    judge, groups = collected(criterion, model, x)
    scores = judge.score(model, groups)
    assert scores.dtype is torch.float64
    owned = zip(groups.prunable, groups.ranges, strict=True)
    return {group.name: scores[numbers.start : numbers.stop].tolist() for group, numbers in owned}


@pytest.mark.parametrize("criterion", BY_WEIGHT)
@cases(NETS)
def test_weights_are_judged_as_by_hand(name: str, criterion: str) -> None:
    given, oracle = BY_WEIGHT[criterion]
    model, x = get(name)
    found = scores_of(given, model, x)
    assert found.keys() == HAND[name].keys()
    for group, owned in HAND[name].items():
        assert found[group] == pytest.approx(oracle(model, owned), rel=1e-9)


@pytest.mark.parametrize("criterion", BY_WEIGHT)
@pytest.mark.parametrize("name", ["image_net", "mlp", "residual", "lstm"])
def test_what_goes_is_what_the_oracle_ranks_lowest(name: str, criterion: str) -> None:
    given, oracle = BY_WEIGHT[criterion]
    model, x = get(name)
    ranked = []
    for group, owned in HAND[name].items():
        scores = oracle(model, owned)
        mean = 1.0 if criterion == "lamp" else sum(scores) / len(scores)
        best = max(range(owned.size), key=scores.__getitem__)
        ranked += [(score / mean, group, i) for i, score in enumerate(scores) if i != best]
    whole = sum(owned.size for owned in HAND[name].values())
    gone = {(group, i) for _, group, i in sorted(ranked)[: round(0.4 * whole)]}
    plan = prune_neurons(model, x, 0.4, criterion=given)
    for group, owned in HAND[name].items():
        tensor, dim, places = owned.makes[0]
        left = [at for i in range(owned.size) if (group, i) not in gone for at in places(i)]
        kept = plan.kept.get(tensor, {}).get(dim)
        assert (list(range(plan_size(plan, model, tensor, dim))) if kept is None else kept) == sorted(left)


def plan_size(plan: Any, model: nn.Module, tensor: str, dim: int) -> int:
    return plan.shapes[tensor][dim] if tensor in plan.shapes else model.get_parameter(tensor).size(dim)


# bn_scale


def test_norm_scales_are_judged_as_by_hand() -> None:
    """A neuron with several norms has their mean; one that was flattened has one scale per place."""
    norms = {"n": nn.BatchNorm2d(5), "m": nn.BatchNorm2d(5), "flat": nn.BatchNorm1d(45), "last": nn.BatchNorm1d(6)}
    layers = {"a": nn.Conv2d(3, 5, 3), "b": nn.Linear(45, 6), "c": nn.Linear(6, 2)} | norms
    model = build(
        lambda: Net(lambda n, x: n.c(n.last(n.b(n.flat((n.n(h := n.a(x)) + n.m(-h)).relu().flatten(1))))), **layers)
    )
    with torch.no_grad():
        model.n.weight[1:4].neg_()
    found = scores_of("bn_scale", model, inputs(IMAGE, 3))
    scale = {name: getattr(model, name).weight.detach().abs() for name in norms}
    expected = [
        float((scale["n"][i] + scale["m"][i] + sum(scale["flat"][9 * i + j] for j in range(9))) / 11) for i in range(5)
    ]
    assert found == {"a": pytest.approx(expected, rel=1e-12), "b": pytest.approx(scale["last"].tolist(), rel=1e-12)}


@pytest.mark.parametrize(("norm", "times"), [(nn.GroupNorm(4, 8), 2), (nn.GroupNorm(8, 8), 1), (nn.LayerNorm(8), 1)])
def test_other_norms_have_scales_too(norm: nn.Module, times: int) -> None:
    model = build(sequential(nn.Linear(4, 8), norm, nn.ReLU(), nn.Linear(8, 2)))
    scale = model[1].weight.detach().tolist()
    expected = [sum(scale[i * times : (i + 1) * times]) / times for i in range(8 // times)]
    assert scores_of("bn_scale", model, inputs((4,), 3)) == {"0": pytest.approx(expected, rel=1e-12)}


def test_neurons_without_a_norm_are_left_alone() -> None:
    model, x = build(image_net), inputs(IMAGE)
    judge, groups = collected("bn_scale", model, x)
    judged = judge.judged(model, groups)
    assert {g.name: bool(judged[n.start]) for g, n in zip(groups.prunable, groups.ranges, strict=True)} == {
        "0": True, "3": False, "6": False}  # fmt: skip
    scale = model[1].weight.detach().clone()
    plan = prune_neurons(model, x, 0.6, criterion="bn_scale")  # of the 5 that it can judge
    assert plan.kept["0.weight"][0] == sorted(torch.argsort(scale)[3:].tolist())
    assert (model[3].out_channels, model[6].out_features) == (4, 6)


def test_an_amount_is_met_in_the_neurons_that_can_be_judged() -> None:
    with pytest.raises(PruningError, match=r"amount=0.95 of the neurons can't be reached"):
        prune_neurons(build(image_net), inputs(IMAGE), 0.95, criterion="bn_scale")


# taylor


def loss_of(output: Tensor) -> Tensor:
    return (output.sin() * torch.linspace(0.5, 2, output.numel()).double().view_as(output)).sum()


def expected_taylor(model: nn.Module, x: Tensor, owned: Owned) -> list[float]:
    """A gate of ones on every slice that makes the neurons or goes with them; its gradient, squared."""
    gate = torch.ones(owned.size, dtype=torch.float64, requires_grad=True)
    tensors = {name: p.detach() for name, p in model.named_parameters()}
    for name, dim, places in owned.makes + owned.follows:
        parts = list(tensors[name].unbind(dim))
        for i in range(owned.size):
            for at in places(i):
                parts[at] = parts[at] * gate[i]
        tensors[name] = torch.stack(parts, dim)
    loss_of(functional_call(model, tensors, (x,))).backward()
    assert gate.grad is not None
    return gate.grad.square().tolist()


@cases(NETS)
def test_taylor_is_the_squared_gradient_of_a_gate(name: str) -> None:
    model, x = get(name)
    model.eval()
    loss_of(model(x)).backward()
    found = scores_of("taylor", model, x)
    assert found.keys() == HAND[name].keys()
    for group, owned in HAND[name].items():
        expected = expected_taylor(model, x, owned)
        assert max(expected) > 1e-6
        assert found[group] == pytest.approx(expected, rel=1e-8, abs=1e-14)


@pytest.mark.parametrize(
    ("layers", "shape", "makers"),
    [
        ([nn.Linear(4, 7), nn.ReLU(), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 2)], (4,), [0, 2]),
        ([nn.Linear(4, 7, bias=False), nn.GELU(), nn.Linear(7, 2)], (3, 4), [0]),
        ([nn.Conv2d(3, 6, 3), nn.Tanh(), nn.Conv2d(6, 5, 2), nn.Flatten(), nn.Linear(20, 2)], IMAGE, [0, 2]),
        ([nn.Conv2d(3, 6, 3), nn.Tanh(), nn.ConvTranspose2d(6, 5, 2), nn.ReLU(), nn.Conv2d(5, 2, 1)], IMAGE, [0, 2]),
        ([nn.Conv1d(3, 8, 2), nn.SiLU(), nn.Conv1d(8, 2, 1)], (3, 6), [0]),
    ],
    ids=["mlp", "linear_3d", "conv", "transposed", "conv1d"],
)
def test_taylor_is_the_squared_gradient_of_a_gate_on_the_output(
    layers: Sequence[nn.Module], shape: tuple[int, ...], makers: list[int]
) -> None:
    """Without norms, w · g of a neuron is what the loss would change if its output were scaled."""
    model, x = build(sequential(*layers)), inputs(shape, 3)
    loss_of(model(x)).backward()
    found = scores_of("taylor", model, x)
    assert list(found) == [str(maker) for maker in makers]
    for maker in makers:
        h, gate = x, None
        for number, layer in enumerate(model):
            h = layer(h)
            if number == maker:
                channel = h.dim() - 1 if isinstance(layer, nn.Linear) else 1
                gate = torch.ones(h.size(channel), dtype=torch.float64, requires_grad=True)
                h = h * gate.view([-1 if d == channel else 1 for d in range(h.dim())])
        (gradient,) = torch.autograd.grad(loss_of(h), [gate])
        assert found[str(maker)] == pytest.approx(gradient.square().tolist(), rel=1e-8, abs=1e-14)


def test_taylor_sums_squares_over_batches() -> None:
    model, x = get("mlp")
    groups, judge = find_groups(model, x), get_neuron_criterion("taylor")
    expected = torch.zeros(groups.neurons, dtype=torch.float64)
    for seed in range(3):
        batch = inputs((4,), 5, seed)
        model.zero_grad()
        loss_of(model(batch)).backward()
        judge.collect(groups, dict(model.named_parameters()))
        values = [v for owned in HAND["mlp"].values() for v in expected_taylor(model, batch, owned)]
        expected += torch.tensor(values, dtype=torch.float64)
    torch.testing.assert_close(judge.score(model, groups), expected, rtol=1e-9, atol=1e-14)


def test_a_neuron_that_the_loss_does_not_see_goes_first() -> None:
    model, x = get("mlp")
    with torch.no_grad():
        model[0].bias.fill_(5.0)  # every other neuron fires
        model[0].weight[3] *= 50
        model[2].weight[:, 3] = 0
    loss_of(model(x)).backward()
    assert prune_neurons(model, x, 1 / 13, criterion="taylor").kept["0.weight"][0] == [0, 1, 2, 4, 5, 6]


def test_a_frozen_layer_has_no_gradient_and_stays() -> None:
    model, x = get("mlp")
    model[0].requires_grad_(False)
    loss_of(model(x)).backward()
    plan = prune_neurons(model, x, 0.5, criterion="taylor")
    assert (model[0].out_features, model[2].out_features) == (7, 3)
    assert "0.weight" not in plan.kept


# activation


def mean_size(*seen: tuple[Tensor, int]) -> list[float]:
    """Mean magnitude of each neuron over everything seen of it, where neurons stand ``times`` in a row."""
    (first, times), *_ = seen
    size = first.size(1) // times
    found = []
    for i in range(size):
        values = [x[:, i * k : (i + 1) * k].abs().flatten() for x, k in seen]
        found.append(float(torch.cat(values).mean()))
    return found


@torch.no_grad()
def seen_by_hand(name: str, model: Any, x: Tensor) -> dict[str, list[float]]:
    """What the layers see that read each group, channels second."""
    if name == "image_net":
        a = model[2](model[1](model[0](x)))
        b = model[5](model[4](model[3](a)))
        return {"0": mean_size((a, 1)), "3": mean_size((b, 4)), "6": mean_size((model[7](model[6](b)), 1))}
    if name == "mlp":
        a = model[0](x).relu()
        return {"0": mean_size((a, 1)), "2": mean_size((model[2](a).tanh(), 1))}
    if name == "flatten":
        return {"0": mean_size((model[0](x).tanh().flatten(1), 9))}
    if name == "residual":
        h = model[0](x)
        a, body = h.relu(), model[1].body
        b = body[1](a).relu()
        return {"0 + 1.body.3": mean_size((a, 1), (model[2](h + body[3](b)), 1)), "1.body.1": mean_size((b, 1))}
    if name in ("grouped", "grouped_transposed", "depthwise2d"):
        h = model[:4](x)
        return {next(iter(HAND[name])): mean_size((h, 1 if name == "depthwise2d" else 3))}
    if name == "transposed2d":
        return {"0": mean_size((model[:2](x), 1)), "2": mean_size((model[:4](x), 1))}
    if name == "attention":  # torch's attention asks no layer: the first is judged by what it gives
        a = model.enter(x)
        out = model.attention(a, a, a, need_weights=False)[0]
        zero = [0.0] * 4  # not judged
        return {"enter": mean_size((a.mT, 1)), "attention": zero, "attention.out_proj": mean_size((out.mT, 1))}
    if name == "heads":
        q, k, v = (part.reshape(len(x), 4, 4, 3) for part in model.qkv(x).split(12, 2))
        scores = torch.einsum("nqhd,nkhd->nhqk", q, k) / 3**0.5
        h = torch.einsum("nhqk,nkhd->nqhd", scores.softmax(-1), v).reshape(len(x), 4, 12)
        return {"qkv": mean_size((h.mT, 3)), "proj": mean_size((model.proj(h).tanh().mT, 1))}
    assert name == "lstm"
    return {"a": mean_size((model.a(x)[0].mT, 1))}


@cases(NETS)
def test_activations_are_those_of_a_forward_by_hand(name: str) -> None:
    model, x = get(name)
    model.eval()
    expected = seen_by_hand(name, model, x)
    found = scores_of("activation", model.train(), x)  # it looks at evaluation mode
    assert model.training
    assert found.keys() == expected.keys()
    for group, values in expected.items():
        assert found[group] == pytest.approx(values, rel=1e-9)


def test_activations_of_several_batches_count_each_example_once() -> None:
    model, x = get("image_net")
    model.eval()
    groups, judge = find_groups(model, x), get_neuron_criterion("activation")
    batches = [inputs(IMAGE, batch, seed) for seed, batch in enumerate((1, 4, 2))]
    collect_now(judge, model, groups, [ModuleCall("", (batch,), {}) for batch in batches])
    expected = [v for values in seen_by_hand("image_net", model, torch.cat(batches)).values() for v in values]
    assert judge.score(model, groups).tolist() == pytest.approx(expected, rel=1e-9)


def test_collecting_again_forgets_what_was_collected() -> None:
    model, x = get("mlp")
    groups, judge = find_groups(model, x), get_neuron_criterion("activation")
    collect_now(judge, model, groups, [ModuleCall("", (1e3 * x,), {})])
    collect_now(judge, model, groups, [ModuleCall("", (x,), {})])
    expected = [v for values in seen_by_hand("mlp", model, x).values() for v in values]
    assert judge.score(model, groups).tolist() == pytest.approx(expected, rel=1e-9)


def test_a_neuron_that_never_fires_goes_first() -> None:
    model, x = get("mlp")
    with torch.no_grad():
        model[0].bias.fill_(5.0)  # every other neuron fires
        model[0].weight[5] *= 10
        model[0].bias[5] = -1e3
    assert prune_neurons(model, x, 1 / 13, criterion="activation").kept["0.weight"][0] == [0, 1, 2, 3, 4, 6]


@pytest.mark.parametrize("criterion", NEURON_CRITERIA)
def test_judging_leaves_no_trace(criterion: str) -> None:
    model, x = get("image_net")
    loss_of(model.train()(x)).backward()
    snapshot = Snapshot(model)
    groups, judge = find_groups(model, x), get_neuron_criterion(criterion)
    collect_now(judge, model, groups, groups.calls)
    if criterion != "random":
        judge.score(model, groups)
    snapshot.assert_unchanged()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


# What can't be judged


def frozen_mlp() -> nn.Module:
    model = get("mlp")[0]
    loss_of(model(inputs((4,), 3))).backward()
    for layer in (0, 2):
        model[layer].requires_grad_(False)
    return model


@pytest.mark.parametrize(
    ("criterion", "maker", "options", "message"),
    [
        ("bn_scale", lambda: get("mlp")[0], {}, "criterion 'bn_scale' can judge none of the neurons.*: no norm layer"),
        (
            "bn_scale",
            lambda: build(sequential(nn.Linear(4, 8), nn.BatchNorm1d(8, affine=False), nn.Linear(8, 2))),
            {},
            "criterion 'bn_scale' can judge none of the neurons.*: no norm layer with a scale",
        ),
        ("taylor", lambda: get("mlp")[0], {}, "criterion 'taylor' needs gradients, but there are none"),
        ("taylor", frozen_mlp, {}, "criterion 'taylor' can judge none of the neurons"),
        ("taylor", lambda: get("mlp")[0].requires_grad_(False), {}, "criterion 'taylor' can judge none of the neurons"),
    ],
)
def test_what_cannot_be_judged_is_refused(
    criterion: str, maker: Callable[[], nn.Module], options: dict[str, Any], message: str
) -> None:
    model = maker()
    snapshot = Snapshot(model)
    with pytest.raises(PruningError, match=message):
        prune_neurons(model, inputs((4,)), 0.4, criterion=criterion, **options)
    snapshot.assert_unchanged()


@pytest.mark.parametrize(
    ("criterion", "name", "include"), [("bn_scale", "image_net", "6"), ("activation", "attention", "attention")]
)
def test_what_may_go_but_cannot_be_judged_is_refused(criterion: str, name: str, include: str) -> None:
    model, x = get(name)
    snapshot = Snapshot(model)
    options = {"include": include} | ({"exclude": "attention.out_proj"} if name == "attention" else {})
    with pytest.raises(PruningError, match=f"criterion '{criterion}' can judge none of the neurons that may go: no "):
        prune_neurons(model, x, 0.4, criterion=criterion, **options)
    snapshot.assert_unchanged()


@pytest.mark.parametrize(
    "bad",
    [
        lambda rows: rows,
        lambda rows: rows.sum(),
        lambda rows: rows.sum(0),
        lambda rows: rows.sum(1)[:-1],
        lambda rows: rows.sum(1, keepdim=True),
        lambda rows: rows.sum(1) * float("nan"),
        lambda rows: rows.sum(1) / 0,
        lambda rows: rows.sum(1).tolist(),
        lambda rows: None,
        lambda rows: 1.0,
    ],
)
def test_a_function_that_gives_something_else_is_refused(bad: Callable[[Tensor], Any]) -> None:
    model, x = get("mlp")
    snapshot = Snapshot(model)
    with pytest.raises(PruningError, match=r"the criterion gave .* a finite score for each of the 7 rows"):
        prune_neurons(model, x, 0.4, criterion=bad)
    snapshot.assert_unchanged()


def test_a_function_that_raises_is_heard() -> None:
    model, x = get("mlp")
    snapshot = Snapshot(model)
    with pytest.raises(ZeroDivisionError):
        prune_neurons(model, x, 0.4, criterion=lambda rows: rows / (1 // 0))
    snapshot.assert_unchanged()


def test_a_function_may_change_what_it_is_given() -> None:
    model, x = get("mlp")
    twin = copy.deepcopy(model)
    plan = prune_neurons(model, x, 0.4, criterion=lambda rows: rows.abs_().neg_().sum(1))
    assert plan.kept == prune_neurons(twin, x, 0.4, criterion=lambda rows: -rows.abs().sum(1)).kept
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_function_sees_rows_of_at_least_single_precision_and_without_gradient() -> None:
    seen: list[Tensor] = []

    def note(rows: Tensor) -> Tensor:
        seen.append(rows)
        return torch.arange(len(rows))

    model = get("mlp")[0].bfloat16()
    plan = prune_neurons(model, inputs((4,)).bfloat16(), 0.4, criterion=note, scope="layer")
    assert [tuple(rows.shape) for rows in seen] == [(7, 4), (7, 1), (7, 6), (6, 7), (6, 1), (6, 2)]
    assert all(rows.dtype is torch.float32 and not rows.requires_grad for rows in seen)
    assert plan.kept["0.weight"][0] == [3, 4, 5, 6]


@pytest.mark.parametrize("wrong", ["L1", "magnitude", "", None, 3, ["l1"]])
def test_unknown_names_list_the_choices(wrong: Any) -> None:
    model, x = get("mlp")
    with pytest.raises(PruningError, match="unknown criterion") as error:
        prune_neurons(model, x, 0.4, criterion=wrong)
    assert all(name in str(error.value) for name in NEURON_CRITERIA)


# Rankings


def two_branches() -> nn.Module:
    layers = {"a": nn.Linear(4, 8), "b": nn.Linear(4, 6), "c": nn.Linear(8, 2), "d": nn.Linear(6, 2)}
    return Net(lambda n, x: n.c(n.a(x).tanh()) + n.d(n.b(x).tanh()), **layers)


def magnitude(rows: Tensor) -> Tensor:
    return rows.abs().sum(1)


@pytest.mark.parametrize("criterion", ["l1", "l2", "lamp", "geometric_median", magnitude])
def test_the_scale_of_a_layer_does_not_change_a_global_ranking(criterion: Any) -> None:
    """Layers are ranked together by what a neuron is among its own."""
    model, x = build(two_branches), inputs((4,))
    judge, groups = collected(criterion, model, x)

    def ranking() -> list[int]:
        scores = judge.score(model, groups)
        return torch.argsort(scores if judge.comparable else relative(groups, scores)).tolist()

    before = ranking()
    with torch.no_grad():
        for tensor in (model.a.weight, model.a.bias, model.c.weight):
            tensor.mul_(1000)
    assert ranking() == before
    twin = build(two_branches)
    plans = [prune_neurons(each, x, 0.5, criterion=criterion) for each in (model, twin)]
    assert plans[0].kept == plans[1].kept


def test_a_dead_layer_is_judged_too() -> None:
    """All scores zero: no division by their mean."""
    model, x = build(two_branches), inputs((4,))
    with torch.no_grad():
        for tensor in (model.a.weight, model.a.bias, model.c.weight):
            tensor.zero_()
    for criterion in ("l1", "l2", "lamp", "geometric_median"):
        plan = prune_neurons(copy.deepcopy(model), x, 7 / 14, criterion=criterion)
        assert len(plan.kept["a.weight"][0]) == 1, criterion
        assert "b.weight" not in plan.kept


# Chance


def test_chance_follows_the_seed() -> None:
    def chosen(seed: int) -> Any:
        model, x = build_case("mlp")
        torch.manual_seed(seed)
        return prune_neurons(model, x, 0.5, criterion="random").kept

    assert chosen(1) == chosen(1)
    assert len({str(chosen(seed)) for seed in range(8)}) > 4


def test_chance_does_not_look_at_weights_and_is_uniform() -> None:
    model, x = get("mlp")
    judge, groups = collected("random", model, x)
    torch.manual_seed(3)
    draws = torch.stack([judge.score(model, groups) for _ in range(400)])
    assert float(draws.min()) >= 0
    assert float(draws.max()) < 1
    assert float((draws.mean(0) - 0.5).abs().max()) < 0.08
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    torch.manual_seed(3)
    assert torch.equal(judge.score(model, groups), draws[0])


def test_neurons_without_a_gradient_stay() -> None:
    model = nn.ModuleDict({name: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)) for name in "ab"})

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        return model["a"](x), model["b"](x)

    model.forward = forward  # type: ignore[method-assign]
    x = torch.randn(5, 4)
    model["a"](x).sum().backward()
    plan = prune_neurons(model, x, 0.25, criterion="taylor")
    assert len(plan.kept["a.0.weight"][0]) == 6
    assert model["b"][0].out_features == 8


def test_sparse_gradients_follow() -> None:
    model = nn.Sequential(nn.Embedding(20, 8, sparse=True), nn.Flatten(), nn.Linear(24, 3))
    x = torch.randint(20, (4, 3))
    model(x).sum().backward()
    dense = model[0].weight.grad.to_dense()
    plan = prune_neurons(model, x, 0.5)
    assert model[0].weight.grad.is_sparse
    assert torch.equal(model[0].weight.grad.to_dense(), dense[:, plan.kept["0.weight"][1]])
