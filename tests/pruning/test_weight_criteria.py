"""Criteria of single weights against their formulas, written out in float64."""

import copy
import itertools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import Net, Snapshot, build, inputs, resnet, shared_block
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_prune import PruningError, prune_weights
from lightning_prune.graph.run import as_calls
from lightning_prune.pruning.weight_criteria import L1, WEIGHT_CRITERIA, Synflow, Wanda, collect, get_weight_criterion
from lightning_prune.pruning.weight_selection import select_weights
from lightning_prune.pruning.weights import choose_masks, prunable_weights

Masks = dict[str, Tensor]


def lowest(scores: Mapping[str, Tensor], amount: float) -> dict[str, list[bool]]:
    """Plain Python: which weights stay when the lowest of all together go, those that come first among equals."""
    places = [(value, name, i) for name, s in scores.items() for i, value in enumerate(s.flatten().tolist())]
    order = sorted(range(len(places)), key=lambda k: (places[k][0], k))
    gone = {places[k][1:] for k in order[: round(amount * len(places))]}
    return {name: [(name, i) not in gone for i in range(s.numel())] for name, s in scores.items()}


def as_lists(masks: Mapping[str, Tensor]) -> dict[str, list[bool]]:
    return {name: mask.flatten().tolist() for name, mask in masks.items()}


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().double().clone() for name, p in model.named_parameters() if p.dim() >= 2}


def backward(model: nn.Module, *shape: int, batches: int = 1) -> None:
    for seed in range(batches):
        model(inputs(shape, 4, seed)).pow(3).sum().backward()


# gradients

FORMULAS: dict[str, Callable[[list[tuple[float, float]]], float]] = {
    "taylor": lambda pairs: math.fsum(abs(w * g) for w, g in pairs),
    "snip": lambda pairs: abs(math.fsum(w * g for w, g in pairs)),
    "movement": lambda pairs: math.fsum(-w * g for w, g in pairs),
    "fisher": lambda pairs: math.fsum((w * g) ** 2 for w, g in pairs),
}
"""What a criterion says of one weight, given its values and gradients over the batches."""


@pytest.mark.parametrize("name", FORMULAS)
@given(seed=st.integers(0, 10**6), batches=st.integers(1, 4))
def test_gradients_of_several_batches_add_up(name: str, seed: int, batches: int) -> None:
    """The weight changes in between, as it does in training."""
    torch.manual_seed(seed)
    criterion = get_weight_criterion(name)
    told = [(torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)) for _ in range(batches)]
    for w, g in told:
        before = w.clone(), g.clone()
        criterion.collect("w", nn.Parameter(w), g)
        assert torch.equal(w, before[0])
        assert torch.equal(g, before[1])
    score = criterion.score("w", told[-1][0])
    for i in range(3):
        for j in range(4):
            assert float(score[i, j]) == pytest.approx(
                FORMULAS[name]([(float(w[i, j]), float(g[i, j])) for w, g in told])
            )


@pytest.mark.parametrize("amount", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("name", FORMULAS)
def test_a_gradient_criterion_removes_what_its_formula_ranks_lowest(name: str, amount: float) -> None:
    model = build(resnet)
    backward(model, 3, 8, 8, batches=2)
    dense, grads = weights_of(model), {n: p.grad.clone() for n, p in model.named_parameters()}
    scores = {
        n: torch.tensor(
            [FORMULAS[name]([pair]) for pair in zip(w.flatten().tolist(), grads[n].flatten().tolist(), strict=True)]
        )
        for n, w in dense.items()
    }
    masks = prune_weights(model, amount, criterion=name)
    assert as_lists(masks) == lowest({n: s.double() for n, s in scores.items()}, amount)
    assert all(torch.equal(p.grad, grads[n]) for n, p in model.named_parameters())


def test_movement_takes_a_large_weight_on_its_way_to_zero_before_a_small_one_on_its_way_up() -> None:
    layer = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[5.0, 0.1]]))
    layer.weight.grad = torch.tensor([[1.0, -1.0]])  # a step of descent makes the first smaller, the second larger
    assert prune_weights(layer, 0.5, criterion="movement")["weight"].tolist() == [[False, True]]


@pytest.mark.parametrize("name", FORMULAS)
def test_only_movement_remembers_after_a_pruning(name: str) -> None:
    """The others go by what they knew before only for weights of which there is nothing new: none, or zeros."""
    criterion = get_weight_criterion(name)
    for weight in ("a", "b", "c"):
        criterion.collect(weight, torch.ones(2, 2), torch.ones(2, 2))
    criterion.forget(last=False)
    criterion.collect("a", torch.ones(2, 2), 3 * torch.ones(2, 2))
    criterion.collect("b", torch.ones(2, 2), torch.zeros(2, 2))
    criterion.ready({"a": torch.ones(2, 2), "b": torch.ones(2, 2), "c": torch.ones(2, 2)})
    anew = {"taylor": 3.0, "snip": 3.0, "movement": -4.0, "fisher": 9.0}[name]
    assert criterion.sums["a"].tolist() == [[anew] * 2] * 2
    for weight in ("b", "c"):
        assert criterion.sums[weight].abs().tolist() == [[1.0] * 2] * 2
    criterion.collect("a", torch.ones(2, 2), torch.zeros(2, 2))
    assert criterion.sums["a"].tolist() == [[anew] * 2] * 2
    criterion.forget()
    assert not criterion.sums


def test_wanda_of_several_processes_is_the_sum_of_what_is_new() -> None:
    one, two, three = (torch.full((1, 2), float(n)) for n in (1, 2, 3))
    parts = [({"a": one, "b": two, "c": one}, {"b", "c"}), ({"b": three, "c": one, "a": two}, {"c"}), ({}, set[str]())]
    sums, stale = Wanda.of_all(parts)
    assert {name: each[0, 0].item() for name, each in sums.items()} == {"a": 3.0, "b": 3.0, "c": 1.0}
    assert stale == {"c"}


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("frozen", [False, True])
def test_a_missing_gradient_is_an_error_that_names_the_weight(name: str, frozen: bool) -> None:
    model = build(resnet)
    if frozen:
        model[4].conv2.weight.requires_grad_(False)
        backward(model, 3, 8, 8)
    snapshot = Snapshot(model)
    first = "4.conv2.weight" if frozen else "0.weight"
    with pytest.raises(PruningError, match=f"{name}.*{re.escape(first)}"):
        prune_weights(model, 0.5, criterion=name)
    snapshot.assert_unchanged()
    if frozen:
        masks = prune_weights(model, 0.5, criterion=name, exclude="4.conv2")
        assert sum(int((~m).sum()) for m in masks.values()) == round(0.5 * sum(m.numel() for m in masks.values()))


def test_fisher_ranks_half_precision_weights_by_their_scores() -> None:
    layer = nn.Linear(16, 16).half()
    layer.weight.grad = (torch.rand(16, 16) * 1e-4).half()
    w, g = layer.weight.detach().double().clone(), layer.weight.grad.double()
    mask = prune_weights(layer, 0.5, criterion="fisher")["weight"]
    score = (w * g).square()
    assert float(score[mask].min()) >= 0.9 * float(score[~mask].max())


# inputs


def reads(module: Any, out: int, own: int) -> tuple[int, int]:
    """The place in the weight, and the input channel that it reads, of the ``own``-th input of output ``out``."""
    groups = getattr(module, "groups", 1)
    outs = (module.out_features if isinstance(module, nn.Linear) else module.out_channels) // groups
    ins = (module.in_features if isinstance(module, nn.Linear) else module.in_channels) // groups
    return outs, out // outs * ins + own


def wanda_by_hand(module: Any, examples: list[Tensor]) -> Tensor:
    """|w| times the root of the sum of squares of everything that is read from the weight's channel."""
    w = module.weight.detach().double()
    score = torch.zeros_like(w)
    linear, turned = isinstance(module, nn.Linear), isinstance(module, nn.ConvTranspose2d)
    n_out = module.out_features if linear else module.out_channels
    for out in range(n_out):
        for own in range(w.size(0) // module.groups if turned else w.size(1)):
            outs, channel = reads(module, out, own)
            place = (channel, out % outs) if turned else (out, own)
            read = [x[..., channel] if linear else x.movedim(x.dim() - w.dim() + 1, 0)[channel] for x in examples]
            norm = math.sqrt(math.fsum(v * v for part in read for v in part.flatten().tolist()))
            score[place] = w[place].abs() * norm
    return score


LAYERS: dict[str, tuple[Callable[[], nn.Module], list[tuple[int, ...]]]] = {
    "linear": (lambda: nn.Linear(5, 3), [(4, 5)]),
    "sequence": (lambda: nn.Linear(5, 3), [(4, 7, 5)]),
    "vector": (lambda: nn.Linear(5, 3), [(5,)]),
    "calls": (lambda: nn.Linear(5, 3), [(4, 5), (2, 6, 5), (1, 5)]),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), [(2, 4, 8)]),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, padding=1), [(2, 4, 5, 6), (1, 4, 3, 3)]),
    "unbatched": (lambda: nn.Conv2d(4, 6, 3), [(4, 5, 6)]),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), [(2, 2, 3, 4, 3)]),
    "grouped": (lambda: nn.Conv2d(6, 9, 2, groups=3), [(2, 6, 4, 4)]),
    "depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4), [(2, 4, 4, 4)]),
    "grouped1d": (lambda: nn.Conv1d(4, 6, 2, groups=2), [(2, 4, 4)]),
    "transposed": (lambda: nn.ConvTranspose2d(4, 3, 2), [(2, 4, 3, 3)]),
    "transposed_grouped": (lambda: nn.ConvTranspose2d(4, 6, 2, groups=2), [(2, 4, 3, 3)]),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("keyword", [False, True])
@pytest.mark.parametrize("case", LAYERS)
def test_wanda_is_magnitude_times_the_norm_of_what_a_weight_reads(case: str, keyword: bool, dtype: torch.dtype) -> None:
    make, shapes = LAYERS[case]
    layer = make().to(dtype)
    scale = torch.arange(1, 7)  # channels differ
    examples = []
    for shape in shapes:
        x = torch.randn(shape)
        dim = -1 if isinstance(layer, nn.Linear) else x.dim() - layer.weight.dim() + 1
        examples.append((x.movedim(dim, -1) * scale[: x.size(dim)]).movedim(-1, dim).to(dtype))
    model = Net(lambda n, *xs: [n.a(input=x) if keyword else n.a(x) for x in xs], a=layer)
    wanda = Wanda()
    collect(wanda, model, dict(prunable_weights(model)), as_calls(tuple(examples)))
    expected = wanda_by_hand(layer, [x.double() for x in examples])
    torch.testing.assert_close(wanda.score("a.weight", layer.weight).double(), expected, rtol=1e-5, atol=1e-7)
    masks = prune_weights(model, 0.5, criterion="wanda", example_inputs=tuple(examples))
    if dtype is torch.float64:
        assert as_lists(masks) == lowest({"a.weight": expected}, 0.5)


def test_wanda_sees_each_call_of_a_layer_in_one_forward() -> None:
    layer = nn.Linear(5, 5)
    model = Net(lambda n, x: n.a(torch.tanh(n.a(x))), a=layer)
    x = torch.randn(4, 5) * torch.tensor([9.0, 1, 1, 1, 1])
    with torch.no_grad():
        expected = wanda_by_hand(layer, [x.double(), torch.tanh(layer(x)).double()])
    wanda = Wanda()
    collect(wanda, model, dict(prunable_weights(model)), as_calls(x))
    torch.testing.assert_close(wanda.score("a.weight", layer.weight).double(), expected, rtol=1e-5, atol=1e-7)


def test_wanda_leaves_no_trace() -> None:
    model = build(resnet).train()
    snapshot = Snapshot(model)
    judge = get_weight_criterion("wanda")
    collect(judge, model, dict(prunable_weights(model)), as_calls(inputs((3, 8, 8))))
    choose_masks(model, dict(prunable_weights(model)), judge, 0.5)
    snapshot.assert_unchanged()


def partly() -> nn.Module:
    return Net(lambda n, x: n.a(x), a=nn.Linear(4, 4), b=nn.Linear(4, 4))


@pytest.mark.parametrize(
    ("model", "x", "message"),
    [
        (nn.Linear(4, 3), None, "needs example_inputs"),
        (
            nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 3)),
            torch.tensor([1, 2]),
            "'0.weight' is no weight of a linear",
        ),
        (Net(lambda n, x: n.a(x)[0], a=nn.LSTM(4, 3)), torch.rand(2, 4), "'a.weight_ih_l0' is no weight of a linear"),
        (Net(lambda n, x: x @ n.w, w=nn.Parameter(torch.rand(4, 4))), torch.rand(2, 4), "'w' is no weight of a linear"),
        (partly(), torch.rand(2, 4), "'b.weight' has none"),
        (nn.Linear(4, 3), 3, "got int"),
    ],
)
def test_what_wanda_cannot_judge_is_an_error(model: nn.Module, x: Any, message: str) -> None:
    snapshot = Snapshot(model)
    with pytest.raises(PruningError, match=re.escape(message)):
        prune_weights(model, 0.5, criterion="wanda", example_inputs=x)
    snapshot.assert_unchanged()


def test_wanda_sees_the_inputs_of_all_layers_that_share_a_weight() -> None:
    model = build(shared_block)  # 2 and 4 share theirs
    x = inputs((4,))
    wanda = Wanda()
    with torch.no_grad():
        second, third = model[:2](x), model[:4](x)
    collect(wanda, model, dict(prunable_weights(model)), as_calls(x))
    expected = wanda_by_hand(model[2], [second, third])
    torch.testing.assert_close(wanda.score("2.weight", model[2].weight), expected, rtol=1e-5, atol=1e-7)


# chance


def test_the_same_seed_makes_the_same_choice() -> None:
    choices = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        choices.append(as_lists(prune_weights(build_without_seeding(), 0.5, criterion="random")))
    assert choices[0] == choices[1] != choices[2]


def build_without_seeding() -> nn.Module:
    state = torch.get_rng_state()
    model = build(resnet)
    torch.set_rng_state(state)
    return model


def test_a_given_seed_needs_no_random_state_and_each_weight_has_its_own_draw() -> None:
    weights = {"a": torch.zeros(40, 50), "b": torch.zeros(40, 50)}
    first, second = get_weight_criterion("random"), get_weight_criterion("random")
    first.seed = second.seed = 7
    state = torch.get_rng_state()
    torch.rand(3)
    scores = {name: first.score(name, w) for name, w in weights.items()}
    torch.set_rng_state(state)
    again = {name: second.score(name, weights[name]) for name in ("b", "a")}
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(scores[name], again[name]) for name in weights)
    assert not torch.equal(scores["a"], scores["b"])
    pairs = torch.stack([scores["a"].flatten(), scores["b"].flatten()]).double()
    assert abs(float(torch.corrcoef(pairs)[0, 1])) < 0.1
    assert float(pairs.mean()) == pytest.approx(0.5, abs=0.02)
    assert 0 <= float(pairs.min()) < 0.01 < 0.99 < float(pairs.max()) < 1


@given(st.integers(0, 10**6), st.lists(st.floats(0, 1, exclude_max=True), min_size=2, max_size=5))
def test_random_masks_only_lose_even_where_the_seed_changes(seed: int, amounts: list[float]) -> None:
    weights = {"a": torch.zeros(6, 5), "b": torch.zeros(3, 4, 2)}
    masks: Masks | None = None
    for step, amount in enumerate(sorted(amounts)):
        judge = get_weight_criterion("random")
        judge.seed = seed + step
        scores = {name: judge.score(name, w) for name, w in weights.items()}
        later = select_weights(scores, amount, masks=masks)
        assert sum(int((~m).sum()) for m in later.values()) == round(amount * 54)
        assert masks is None or all(bool((later[n] <= masks[n]).all()) for n in later)
        masks = later


# a function


def test_a_function_judges_and_sees_the_gradient() -> None:
    model = build(resnet)
    backward(model, 3, 8, 8)
    scores = {n: p.grad.abs().clone() for n, p in model.named_parameters() if p.dim() >= 2}
    seen: list[Tensor] = []

    def judge(weight: Tensor) -> Tensor:
        seen.append(weight)
        assert not torch.is_grad_enabled()
        return weight.grad.abs()

    assert as_lists(prune_weights(model, 0.4, criterion=judge)) == lowest(scores, 0.4)
    parameters = dict(model.named_parameters())
    assert {id(w) for w in seen} == {id(parameters[n]) for n in scores}


@pytest.mark.parametrize("scope", ["global", "layer", "erk", "lamp", {"*": 0.4}])
@pytest.mark.parametrize("amount", [0.01, 0.37, 0.9])
def test_a_function_that_throws_dice_still_meets_the_amount(amount: float, scope: Any) -> None:
    model = build(resnet)
    masks = prune_weights(model, amount, criterion=lambda w: torch.rand(w.shape), scope=scope)
    wanted = 0.4 if isinstance(scope, dict) else amount
    assert abs(sum(int((~m).sum()) - wanted * m.numel() for m in masks.values())) <= 0.5 * len(masks) + 1e-9
    for name, mask in masks.items():
        assert torch.equal(model.get_parameter(name) == 0, ~mask)


def late(weight: Tensor) -> Any:
    """Fails at the last weight only."""
    return weight.abs() if weight.dim() == 4 else weight.abs().sum()


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda w: w.sum(), "gave () for '0.weight'"),
        (lambda w: w.flatten(), "gave (216,) for '0.weight'"),
        (lambda w: w.abs()[..., :1], "gave (8, 3, 3, 1) for '0.weight'"),
        (lambda w: None, "gave NoneType"),
        (lambda w: w.tolist(), "gave list"),
        (late, "gave () for '8.weight'"),
    ],
)
def test_scores_of_another_shape_are_an_error(function: Any, message: str) -> None:
    model = build(resnet)
    snapshot = Snapshot(model)
    with pytest.raises(PruningError, match=re.escape(message)):
        prune_weights(model, 0.5, criterion=function)
    snapshot.assert_unchanged()


@pytest.mark.parametrize(
    "function",
    [
        lambda w: w > 0,
        lambda w: (w * 1000).int(),
        lambda w: w,
        lambda w: w.abs().expand_as(w).movedim(0, -1).contiguous().movedim(-1, 0),
    ],
)
def test_scores_may_be_of_any_dtype_and_layout(function: Any) -> None:
    layer = build(lambda: nn.Linear(6, 5))
    expected = lowest({"weight": function(layer.weight.detach()).double()}, 0.3)
    assert as_lists(prune_weights(layer, 0.3, criterion=function)) == expected


def test_scores_may_be_whole_numbers() -> None:
    scores = {"w": torch.tensor([2**40 + 3, 2**40 + 2, 2**40 + 1, 2**40])}
    assert select_weights(scores, 0.25)["w"].tolist() == [True, True, True, False]


def test_a_class_in_the_registry_is_a_criterion(monkeypatch: pytest.MonkeyPatch) -> None:
    class Large(L1):
        def score(self, name: str, weight: Tensor) -> Tensor:
            return -weight.detach().abs()

    monkeypatch.setitem(WEIGHT_CRITERIA, "large", Large)
    layer = build(lambda: nn.Linear(6, 5))
    expected = lowest({"weight": -layer.weight.detach().abs()}, 0.3)
    assert as_lists(prune_weights(layer, 0.3, criterion="large")) == expected


@pytest.mark.parametrize("criterion", [None, 3, "", "L1", ["l1"]])
def test_what_is_no_criterion_is_an_error(criterion: Any) -> None:
    with pytest.raises(PruningError, match="unknown criterion"):
        prune_weights(nn.Linear(4, 4), 0.5, criterion=criterion)


# flow


def mlp(*widths: int, bias: bool = False) -> nn.Module:
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b, bias=bias), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def flow_of_mlp(weights: list[Tensor], biases: list[Tensor]) -> list[Tensor]:
    """Nothing is negative, so rectifiers do nothing: what flows in times |w| times what one unit brings at the end."""
    before = [torch.ones(weights[0].size(1), dtype=torch.float64)]
    for w, b in zip(weights, biases, strict=True):
        before.append(w.abs() @ before[-1] + b.abs())
    after = torch.ones(weights[-1].size(0), dtype=torch.float64)
    flows = []
    for w, x in zip(reversed(weights), reversed(before[:-1]), strict=True):
        flows.append(torch.outer(after, x) * w.abs())
        after = w.abs().T @ after
    return flows[::-1]


def flow(model: nn.Module, x: Any) -> Masks:
    judge = Synflow()
    judge.flow(model, as_calls(x), dict(prunable_weights(model)))
    return judge.sums


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_flow_of_a_perceptron(bias: bool, dtype: torch.dtype) -> None:
    model = mlp(5, 7, 6, 3, bias=bias).to(dtype)
    layers = [layer for layer in model if isinstance(layer, nn.Linear)]
    biases = [torch.zeros(layer.out_features).double() for layer in layers]  # they count as zero
    expected = flow_of_mlp([layer.weight.detach().double() for layer in layers], biases)
    for x in (torch.randn(4, 5, dtype=dtype), torch.full((1, 5), 1e9, dtype=dtype)):  # shapes count, not values
        for found, wanted in zip(flow(model, x).values(), expected, strict=True):
            torch.testing.assert_close(found.double(), wanted, rtol=1e-12, atol=0)


def test_flow_of_a_convolutional_network_is_that_of_one_built_of_magnitudes() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3, groups=2), nn.ReLU(),
        nn.ConvTranspose2d(6, 4, 2, bias=False), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 3),
    ).double().train()  # fmt: skip
    for p in (model[1].weight, model[1].bias, model[1].running_mean):
        nn.init.normal_(p)
    nn.init.uniform_(model[1].running_var, 0.5, 2)
    norm, turned = model[1], model[5]
    own = {f"{i}.weight": model[i].weight.detach().abs().requires_grad_() for i in (0, 3, 5, 8)}
    x = torch.ones(1, 3, 11, 11, dtype=torch.float64)
    h = F.conv2d(x, own["0.weight"], None, 2, 1)
    scale = (norm.weight.detach().abs() / (norm.running_var + norm.eps).sqrt()).view(1, -1, 1, 1)
    h = h * scale  # what layers add counts as zero
    h = F.relu(F.conv2d(F.relu(h), own["3.weight"], groups=2))
    h = F.avg_pool2d(F.conv_transpose2d(h, own["5.weight"]), 2).flatten(1)
    (h @ own["8.weight"].T).sum().backward()
    found = flow(model, inputs((3, 11, 11), 4))
    assert turned.weight.size(0) == 6
    assert set(found) == set(own)
    for name, w in own.items():
        torch.testing.assert_close(found[name], w.detach() * w.grad, rtol=1e-9, atol=1e-12)


def test_a_weight_that_is_called_a_bias_has_a_flow_nonetheless() -> None:
    """Such as the table of relative positions of a Swin transformer."""
    table = nn.Parameter(torch.rand(5, 4) + 0.1)
    model = Net(lambda n, x: n.a(x) + n.position_bias_table, a=nn.Linear(3, 4), position_bias_table=table)
    assert bool((flow(model, torch.ones(2, 5, 3))["position_bias_table"] > 0).all())


@pytest.mark.parametrize("amount", [0.3, 0.8, 0.95])
def test_a_hundred_rounds_each_on_what_the_last_one_left(amount: float) -> None:
    model = mlp(6, 8, 8, 4).double()
    weights = weights_of(model)
    masks = {name: torch.ones_like(w) for name, w in weights.items()}
    total = sum(w.numel() for w in weights.values())
    zeros = [torch.zeros(w.size(0), dtype=torch.float64) for w in weights.values()]
    for number in range(1, 101):
        flows = flow_of_mlp([w * masks[name] for name, w in weights.items()], zeros)
        scores = {n: torch.where(masks[n] > 0, f, -1.0) for n, f in zip(weights, flows, strict=True)}
        part = round((1 - (1 - amount) ** (number / 100)) * total) / total
        kept = lowest(scores, part)
        masks = {n: torch.tensor(kept[n]).double().view(w.shape) for n, w in weights.items()}
    found = prune_weights(model, amount, criterion="synflow", example_inputs=torch.ones(1, 6).double())
    assert as_lists(found) == {n: m.bool().flatten().tolist() for n, m in masks.items()}


CUT = {
    "narrow": lambda: mlp(20, 60, 6, 60, 10),
    "biased": lambda: mlp(20, 60, 6, 60, 10, bias=True),
    "deep": lambda: mlp(10, *[16] * 12, 4),
    "conv": lambda: nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 32, 3), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    ),
    "conv_without_bias": lambda: nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 32, 3, bias=False), nn.ReLU(),
        nn.BatchNorm2d(32), nn.Conv2d(32, 32, 3, bias=False), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(32, 10),
    ),
}  # fmt: skip


def positive_paths(model: nn.Module, x: Tensor) -> dict[str, bool]:
    """Whether anything flows through each weight of the network of magnitudes."""
    twin = copy.deepcopy(model).eval()
    for tensor in (*twin.parameters(), *twin.buffers()):
        tensor.data.abs_()
    twin(torch.ones_like(x)).sum().backward()
    return {name: bool((p * p.grad).any()) for name, p in twin.named_parameters() if p.dim() >= 2}


@pytest.mark.parametrize("net", list(CUT))
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_flow_never_cuts_a_layer_through_where_magnitude_and_sensitivity_do(net: str, seed: int) -> None:
    torch.manual_seed(seed)
    model = CUT[net]()
    layers = [m for m in model if isinstance(m, nn.Linear | nn.Conv2d)]
    with torch.no_grad():
        layers[len(layers) // 2].weight.mul_(1e-3)  # a layer of small weights, as good as any other
    x = torch.randn(4, 3, 10, 10) if "conv" in net else torch.randn(4, layers[0].in_features)
    model(x).square().sum().backward()
    for criterion in ("l1", "snip", "synflow"):
        twin = copy.deepcopy(model)
        for copied, p in zip(twin.parameters(), model.parameters(), strict=True):
            copied.grad = p.grad
        masks = prune_weights(twin, 0.99, criterion=criterion, example_inputs=x)
        assert sum(int((~m).sum()) for m in masks.values()) == round(0.99 * sum(m.numel() for m in masks.values()))
        whole = all(bool(mask.any()) for mask in masks.values())
        if criterion == "l1":
            assert not whole
        if criterion == "synflow":
            assert whole
            assert all(positive_paths(twin, x).values())


def state(model: nn.Module) -> dict[str, Any]:
    """All that a run on ones must leave as it was, to the bit."""
    tensors = dict((*model.named_parameters(), *model.named_buffers()))
    bits = {n: t.detach().clone().view(torch.uint8) if t.dim() else t.item() for n, t in tensors.items()}
    grads = {n: None if t.grad is None else t.grad.clone() for n, t in tensors.items()}
    facts = {n: (id(t), t.data_ptr(), t.dtype, t.stride(), t.requires_grad, id(t.grad)) for n, t in tensors.items()}
    modes = {n: m.training for n, m in model.named_modules()}
    return {"bits": bits, "grads": grads, "facts": facts, "modes": modes, "rng": torch.get_rng_state()}


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return torch.equal(a, b) if isinstance(a, Tensor) else bool(a == b)


class Counting(nn.Module):
    """Keeps numbers of its own: one it changes in place, one it replaces, floating or whole."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 4)
        self.register_buffer("inside", torch.zeros(3))
        self.register_buffer("calls", torch.zeros(3, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        self.inside += 1
        self.calls = self.calls + 1
        return self.layer(x)


MODELS: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "resnet": (resnet, torch.randn(4, 3, 8, 8)),
    "dropout": (lambda: nn.Sequential(nn.Linear(5, 8), nn.Dropout(), nn.BatchNorm1d(8), nn.Linear(8, 3)), torch.ones(4, 5)),
    "tokens": (lambda: nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 4)), torch.tensor([[1, 8, 3], [2, 2, 0]])),
    "keywords": (
        lambda: Net(lambda n, *, ids, mask: n.b(n.a(ids) * mask.unsqueeze(-1)), a=nn.Embedding(9, 6), b=nn.Linear(6, 4)),
        {"ids": torch.tensor([[1, 8, 3]]), "mask": torch.tensor([[True, True, False]])},
    ),
    "dict": (
        lambda: Net(lambda n, batch: {"out": n.b(n.a(batch["x"])), "n": 3}, a=nn.Linear(5, 6), b=nn.Linear(6, 4)),
        ({"x": torch.ones(2, 5)},),
    ),
    "shared": (shared_block, torch.ones(2, 4)),
    "lstm": (lambda: Net(lambda n, x: n.b(n.a(x)[0]), a=nn.LSTM(5, 6, 2), b=nn.Linear(6, 2)), torch.ones(3, 2, 5)),
    "attention": (
        lambda: Net(lambda n, x: n.a(x, x, x)[0], a=nn.MultiheadAttention(8, 2, batch_first=True)), torch.ones(2, 3, 8)),
    "own_dtype": (
        lambda: Net(lambda n, x: n.b(n.a(x).float().to(x.dtype) @ torch.ones(6, 6)), a=nn.Linear(5, 6), b=nn.Linear(6, 4)),
        torch.ones(2, 5)),
    "keeps_floats": (lambda: Counting(torch.float32), torch.ones(2, 5)),
    "keeps_integers": (lambda: Counting(torch.int64), torch.ones(2, 5)),
}  # fmt: skip


@pytest.mark.parametrize("net", list(MODELS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_flow_leaves_the_model_as_it_was_to_the_bit(net: str, dtype: torch.dtype) -> None:
    make, x = MODELS[net]
    if net == "own_dtype" and dtype is torch.float64:
        pytest.skip("runs in float32 only")
    model = make().to(dtype).train()
    x = x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x
    if net == "dict":
        x = ({"x": x[0]["x"].to(dtype)},)
    next(iter(model.children())).requires_grad_(False)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    for module in model.modules():
        if isinstance(module, nn.Dropout | nn.BatchNorm1d):
            module.eval()
    weights, before = dict(prunable_weights(model)), state(model)
    judge = get_weight_criterion("synflow")
    collect(judge, model, weights, as_calls(x))
    masks = choose_masks(model, weights, judge, 0.5, calls=as_calls(x))
    assert same(before, state(model))
    assert sum(int((~m).sum()) for m in masks.values()) == round(0.5 * sum(m.numel() for m in masks.values()))
    assert as_lists(prune_weights(model, 0.5, criterion="synflow", example_inputs=x)) == as_lists(masks)


def test_flow_leaves_gradient_hooks_alone() -> None:
    """Those of DDP hang on the node that adds gradients up; they must live on, and stay silent meanwhile."""
    layer, hits = nn.Linear(4, 3), []
    node = layer.weight.expand_as(layer.weight).grad_fn.next_functions[0][0]
    node.register_hook(lambda *_: hits.append("node"))
    layer.weight.register_hook(lambda gradient: hits.append("tensor"))
    prune_weights(layer, 0.5, criterion="synflow", example_inputs=torch.ones(2, 4))
    assert not hits
    layer(torch.ones(2, 4)).sum().backward()
    assert sorted(hits) == ["node", "tensor"]


def test_flow_works_where_gradients_are_off() -> None:
    expected = prune_weights(build(lambda: nn.Linear(4, 3)), 0.5, criterion="synflow", example_inputs=torch.ones(2, 4))
    with torch.no_grad():
        found = prune_weights(build(lambda: nn.Linear(4, 3)), 0.5, criterion="synflow", example_inputs=torch.ones(2, 4))
    assert as_lists(found) == as_lists(expected)


def raises(net: Any, x: Tensor) -> Tensor:
    raise ValueError("no")


@pytest.mark.parametrize(
    ("model", "x", "error", "message"),
    [
        (nn.Linear(4, 3), None, PruningError, "needs example_inputs"),
        (
            Net(lambda n, x: x * 2, a=nn.Linear(4, 3)),
            torch.ones(2, 4),
            PruningError,
            "no output depends on the weights",
        ),
        (nn.Sequential(*[nn.Linear(64, 64) for _ in range(250)]), torch.ones(2, 64), PruningError, "too large"),
        (Net(raises, a=nn.Linear(4, 3), b=nn.BatchNorm1d(3)), torch.ones(2, 4), PruningError, "ValueError: no"),
        (nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(4)), torch.ones(2, 4), PruningError, "should contain"),
    ],
)
def test_what_flow_cannot_judge_is_an_error(model: nn.Module, x: Any, error: type[Exception], message: str) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(100)
    snapshot, before = Snapshot(model), state(model)
    with pytest.raises(error, match=message):
        prune_weights(model, 0.5, criterion="synflow", example_inputs=x)
    snapshot.assert_unchanged()
    assert same(before, state(model))


@pytest.mark.parametrize("criterion", ["synflow", "wanda"])
def test_inputs_that_the_model_refuses_are_a_pruning_error(criterion: str) -> None:
    with pytest.raises(PruningError):
        prune_weights(nn.Linear(4, 3), 0.5, criterion=criterion, example_inputs=torch.ones(2, 5))


@pytest.mark.filterwarnings("ignore::lightning_prune.NoEffectWarning")
@pytest.mark.parametrize("scope", ["layer", "erk", "lamp", {"0": 0.75, "4": 0.25}])
def test_flow_in_scopes(scope: Any) -> None:
    masks = prune_weights(mlp(8, 8, 8, 8), 0.5, criterion="synflow", scope=scope, example_inputs=torch.ones(1, 8))
    gone = [int((~m).sum()) for m in masks.values()]
    assert sum(gone) == 96
    assert gone == [48, 32, 16] or scope in ("layer", "erk", "lamp")
    assert gone == [32, 32, 32] or scope not in ("layer", "erk")
