import functools
import math
import re
from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import Net, Snapshot, build, resnet, shared_block
from torch import Tensor, nn

from lightning_prune import NoEffectWarning, PruningError, prune_weights
from lightning_prune.pruning import weight_selection as module
from lightning_prune.pruning.masks import apply_masks, mask_optimizer
from lightning_prune.pruning.weight_selection import select_weights

Masks = dict[str, Tensor]

shapes = st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=3), min_size=1, max_size=4)
amounts = st.floats(0, 1, exclude_max=True)
scopes = st.sampled_from(["global", "layer"])


def draw_scores(shapes: list[list[int]], seed: int, levels: int = 0) -> Masks:
    generator = torch.Generator().manual_seed(seed)
    scores = {f"w{i}": torch.rand(*shape, generator=generator, dtype=torch.float64) for i, shape in enumerate(shapes)}
    return {name: (score * levels).round() for name, score in scores.items()} if levels else scores


def ranked_by_hand(scores: Masks, amount: float) -> dict[str, list[bool]]:
    """Plain Python: sort all (score, place) pairs, the first go."""
    places = [(value, name, i) for name, score in scores.items() for i, value in enumerate(score.flatten().tolist())]
    order = sorted(range(len(places)), key=lambda k: (places[k][0], k))
    gone = {places[k][1:] for k in order[: round(amount * len(places))]}
    return {name: [(name, i) not in gone for i in range(score.numel())] for name, score in scores.items()}


def as_lists(masks: Masks) -> dict[str, list[bool]]:
    return {name: mask.flatten().tolist() for name, mask in masks.items()}


@given(shapes, st.integers(0, 10**6), amounts, st.sampled_from([0, 1, 3]))
def test_global_selection_equals_sorting_by_hand(shapes: Any, seed: int, amount: float, levels: int) -> None:
    """Ties included: with few levels most scores are equal."""
    scores = draw_scores(shapes, seed, levels)
    masks = select_weights(scores, amount)
    assert as_lists(masks) == ranked_by_hand(scores, amount)
    assert all(mask.shape == scores[name].shape and mask.dtype == torch.bool for name, mask in masks.items())


@given(shapes, st.integers(0, 10**6), amounts, st.sampled_from([0, 1, 3]))
def test_layer_selection_equals_sorting_each_by_hand(shapes: Any, seed: int, amount: float, levels: int) -> None:
    scores = draw_scores(shapes, seed, levels)
    masks = as_lists(select_weights(scores, amount, scope="layer"))
    assert masks == {name: ranked_by_hand({name: score}, amount)[name] for name, score in scores.items()}


@given(shapes, st.integers(0, 10**6), st.lists(amounts, min_size=2, max_size=4), scopes, st.sampled_from([0, 2]))
def test_what_is_gone_stays_gone_and_counts(
    shapes: Any, seed: int, steps: list[float], scope: str, levels: int
) -> None:
    masks: Masks | None = None
    for number, amount in enumerate(sorted(steps)):
        scores = draw_scores(shapes, seed + number, levels)
        later = select_weights(scores, amount, scope=scope, masks=masks)
        sizes = [[m] for m in later.values()] if scope == "layer" else [list(later.values())]
        for part in sizes:
            assert sum(int((~m).sum()) for m in part) == round(amount * sum(m.numel() for m in part))
        assert masks is None or all(bool((later[name] <= masks[name]).all()) for name in later)
        masks = later


@pytest.mark.filterwarnings("ignore::lightning_prune.NoEffectWarning")  # of amount 0
@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("amount", [0.1, 1 / 3, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_prune_weights_zeroes_exactly_the_smallest(amount: float, scope: str, dtype: torch.dtype) -> None:
    model = build(resnet).to(dtype)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    identity = [id(p) for p in model.parameters()]
    masks = prune_weights(model, amount, scope=scope)
    assert [id(p) for p in model.parameters()] == identity
    assert set(masks) == {name for name, p in model.named_parameters() if p.dim() >= 2}
    considered = list(masks.values())
    for part in [[m] for m in considered] if scope == "layer" else [considered]:
        assert sum(int((~m).sum()) for m in part) == round(amount * sum(m.numel() for m in part))
    for name, parameter in model.named_parameters():
        mask = masks.get(name, torch.ones_like(parameter, dtype=torch.bool))
        assert torch.equal(parameter, torch.where(mask, before[name], torch.zeros((), dtype=dtype)))
    thresholds = [max((before[n].abs()[~m].max().item() for n, m in masks.items() if not bool(m.all())), default=0.0)]
    if scope == "global":
        assert all(before[n].abs()[m].min().item() >= thresholds[0] for n, m in masks.items() if bool(m.any()))


@pytest.mark.parametrize("amount", [0, 0.0, 1e-6])
def test_an_amount_that_takes_nothing_says_so(amount: float) -> None:
    model = build(resnet)
    snapshot = Snapshot(model)
    with pytest.warns(NoEffectWarning, match="rounds to no weight"):
        masks = prune_weights(model, amount)
    assert masks
    assert all(bool(mask.all()) for mask in masks.values())
    snapshot.assert_unchanged()


def test_parameters_shared_by_two_modules_count_once() -> None:
    model = build(shared_block)
    masks = prune_weights(model, 0.5)
    assert set(masks) == {"0.weight", "2.weight", "6.weight"}
    assert sum(int((~m).sum()) for m in masks.values()) == (24 + 36 + 18) // 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("criterion", ["l1", "random", "synflow", "wanda", torch.abs])
def test_a_diverged_network_is_refused(criterion: Any, value: float, dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)).to(dtype)
    with torch.no_grad():
        model[1].weight[1, 2] = value
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    x = torch.ones(2, 5, dtype=dtype)
    with pytest.raises(PruningError, match=r"'1\.weight' holds 1 values of 12 that are NaN or infinite; nothing was"):
        prune_weights(model, 0.5, criterion=criterion, example_inputs=x)
    assert all(torch.equal(p.nan_to_num(7.0), before[n].nan_to_num(7.0)) for n, p in model.named_parameters())
    masks = prune_weights(model, 0.5, exclude="1")  # what is not looked at may hold anything
    assert int((~masks["0.weight"]).sum()) == 10


@pytest.mark.parametrize("scope", ["global", "layer", "erk", "lamp", {"*": 0.5}])
@pytest.mark.parametrize("criterion", ["l1", "random", "synflow"])
def test_a_weight_without_elements_is_none(criterion: str, scope: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4))
    model.register_parameter("nothing", nn.Parameter(torch.empty(0, 5)))
    masks = prune_weights(model, 0.5, criterion=criterion, scope=scope, example_inputs=torch.ones(1, 4))
    assert set(masks) == {"0.weight", "1.weight"}
    assert sum(int((~m).sum()) for m in masks.values()) == 24
    alone = nn.Module()
    alone.register_parameter("nothing", nn.Parameter(torch.empty(0, 5)))
    with pytest.raises(PruningError, match="no weights to prune"):
        prune_weights(alone, 0.5)


def test_a_sum_that_overflows_is_no_divergence() -> None:
    layer = nn.Linear(50, 40).half()
    with torch.no_grad():
        layer.weight.fill_(60000)
    assert int((~prune_weights(layer, 0.5)["weight"]).sum()) == 1000


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, {"stem.weight", "body.0.weight", "body.2.weight", "table"}),
        ({"include": "body"}, {"body.0.weight", "body.2.weight"}),
        ({"include": ["stem", "body.2"]}, {"stem.weight", "body.2.weight"}),
        ({"exclude": ["body.*"]}, {"stem.weight", "table"}),
        ({"exclude": "table"}, {"stem.weight", "body.0.weight", "body.2.weight"}),
    ],
)
def test_globs_choose_the_modules(options: dict[str, Any], names: set[str]) -> None:
    body = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    model = Net(lambda n, x: x, stem=nn.Linear(4, 4), body=body, table=nn.Parameter(torch.rand(4, 4)))
    assert set(prune_weights(model, 0.5, **options)) == names


NAN = float("nan")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"amount": 1}, "got 1"),
        ({"amount": 30}, "pass 0.3"),
        ({"amount": -0.1}, "got -0.1"),
        ({"amount": NAN}, "got nan"),
        ({"amount": float("inf")}, "got inf"),
        ({"amount": "0.3"}, "got '0.3'"),
        ({"amount": True}, "got True"),
        ({"amount": None}, "got None"),
        ({"scope": "local"}, "'erk', 'global'"),
        ({"criterion": "l7"}, "choose from fisher, l1, movement"),
        ({"include": "nothing"}, "'nothing' matches no module that can be pruned; there are: 0, 3.conv1"),
        ({"exclude": "1"}, "'1' matches no module"),
        ({"exclude": "*"}, "leaves no weights"),
        ({"include": 3}, "include must be glob"),
        ({"include": [None]}, "include must be glob"),
    ],
)
def test_bad_arguments_leave_the_model_untouched(options: dict[str, Any], message: str) -> None:
    model = build(resnet)
    snapshot = Snapshot(model)
    with pytest.raises(PruningError, match=re.escape(message)):
        prune_weights(model, **({"amount": 0.5} | options))
    snapshot.assert_unchanged()


@pytest.mark.parametrize("model", [nn.ReLU(), nn.BatchNorm2d(3), nn.PReLU(), nn.ParameterList([torch.zeros(())])])
def test_a_model_without_weights_is_an_error(model: nn.Module) -> None:
    with pytest.raises(PruningError, match=f"{type(model).__name__} has no weights to prune"):
        prune_weights(model, 0.5)


# masks


@pytest.mark.parametrize(
    "make",
    [
        functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.1),
        functools.partial(torch.optim.Adam, lr=0.1, amsgrad=True),
        functools.partial(torch.optim.AdamW, lr=0.1, weight_decay=0.1),
        functools.partial(torch.optim.RMSprop, lr=0.1, momentum=0.9, centered=True),
        functools.partial(torch.optim.Adagrad, lr=0.1, initial_accumulator_value=0.5),
        functools.partial(torch.optim.Adamax, lr=0.1),
    ],
)
def test_masked_places_are_zero_in_weights_and_state(make: Any) -> None:
    model = build(resnet)
    optimizer = make(model.parameters())
    masks = prune_weights(model, 0.5)
    parameters = dict(model.named_parameters())
    for _ in range(3):
        model(torch.randn(4, 3, 8, 8, dtype=torch.float64)).square().sum().backward()
        optimizer.step()
        apply_masks(parameters, masks)
        mask_optimizer(optimizer, parameters, masks)
        for name, mask in masks.items():
            assert not parameters[name][~mask].any()
            assert parameters[name][mask].all()
            state = [v for v in optimizer.state[parameters[name]].values() if isinstance(v, Tensor)]
            same = [value for value in state if value.shape == mask.shape]
            assert not any(value[~mask].any() for value in same)
            assert all(value[mask].any() for value in same)


def test_an_amount_of_nothing_is_told() -> None:
    with pytest.warns(NoEffectWarning, match="rounds to no weight"):
        prune_weights(nn.Linear(4, 3), 0.01)
    with pytest.raises(PruningError, match=r"nn\.Module, got int"):
        prune_weights(3, 0.5)  # type: ignore[arg-type]


# scopes


def erk_by_hand(shapes: list[tuple[int, ...]], amount: float) -> list[float]:
    """RigL's published formula: the scale is found by bisection, a density is never above 1."""
    sizes = [math.prod(shape) for shape in shapes]
    raw = [sum(shape) / size for shape, size in zip(shapes, sizes, strict=True)]
    low, high = 0.0, 1 / min(raw)
    for _ in range(200):
        scale = (low + high) / 2
        kept = math.fsum(min(scale * r, 1) * size for r, size in zip(raw, sizes, strict=True))
        low, high = (scale, high) if kept < (1 - amount) * sum(sizes) else (low, scale)
    return [min(scale * r, 1) for r in raw]


kernels = st.lists(
    st.one_of(st.tuples(*[st.integers(1, 12)] * 2), st.tuples(*[st.integers(1, 6)] * 2, *[st.integers(1, 3)] * 2)),
    min_size=1,
    max_size=5,
)


@given(kernels, amounts, st.integers(0, 10**6))
def test_erk_densities_are_those_of_the_formula(shapes: Any, amount: float, seed: int) -> None:
    scores = draw_scores([list(shape) for shape in shapes], seed)
    masks = select_weights(scores, amount, scope="erk")
    for (name, mask), density in zip(masks.items(), erk_by_hand(shapes, amount), strict=True):
        assert abs(int(mask.sum()) - density * mask.numel()) <= 0.5 + 1e-6
        kept, gone = scores[name][mask], scores[name][~mask]
        assert not len(kept) or not len(gone) or float(gone.max()) < float(kept.min())
    total = sum(mask.numel() for mask in masks.values())
    assert abs(sum(int((~m).sum()) for m in masks.values()) - amount * total) <= 0.5 * len(masks) + 1e-6


@pytest.mark.parametrize("amount", [0.2, 0.5, 0.8, 0.95])
def test_erk_keeps_small_layers_whole_and_meets_the_amount(amount: float) -> None:
    sizes = [(4, 3, 3, 3), (64, 64), (200, 100), (2, 2)]
    masks = select_weights(draw_scores([list(s) for s in sizes], 0), amount, scope="erk")
    kept = {name: float(mask.double().mean()) for name, mask in masks.items()}
    assert kept["w3"] == 1.0
    assert kept["w2"] < kept["w1"] <= kept["w0"]
    total = sum(m.numel() for m in masks.values())
    assert abs(sum(int((~m).sum()) for m in masks.values()) - amount * total) <= 2


def lamp_by_hand(score: Tensor) -> list[float]:
    """Of each score's square, its share in those that are not smaller, itself included; ties in order of place."""
    values = score.flatten().tolist()
    order = sorted(range(len(values)), key=lambda i: values[i])
    result = [0.0] * len(values)
    for k, i in enumerate(order):
        rest = math.fsum(values[j] ** 2 for j in order[k:])
        result[i] = values[i] ** 2 / rest if rest else 0.0
    return result


@given(shapes, st.integers(0, 10**6), amounts, st.sampled_from([0, 0, 2]))
def test_lamp_ranks_shares_of_layers(shapes: Any, seed: int, amount: float, levels: int) -> None:
    scores = draw_scores(shapes, seed, levels)
    scores = {name: score * 10.0**i for i, (name, score) in enumerate(scores.items())}  # layers of different scale
    shares = {name: torch.tensor(lamp_by_hand(score), dtype=torch.float64) for name, score in scores.items()}
    masks = select_weights(scores, amount, scope="lamp")
    total = sum(mask.numel() for mask in masks.values())
    assert sum(int((~m).sum()) for m in masks.values()) == round(amount * total)
    kept = [v for name, mask in masks.items() for v in shares[name][mask.flatten()].tolist()]
    gone = [v for name, mask in masks.items() for v in shares[name][~mask.flatten()].tolist()]
    assert max(gone, default=0) <= min(kept, default=1) * (1 + 1e-9)
    if not levels:
        assert as_lists(masks) == ranked_by_hand(shares, amount)


@pytest.mark.parametrize("amount", [i / 10 for i in range(10)])
def test_lamp_against_shares_by_hand(amount: float) -> None:
    scores = draw_scores([[5, 6], [7, 3], [4, 4, 2]], 1)
    scores["w1"] = scores["w1"].pow(4)
    shares = {name: torch.tensor(lamp_by_hand(score), dtype=torch.float64) for name, score in scores.items()}
    assert as_lists(select_weights(scores, amount, scope="lamp")) == ranked_by_hand(shares, amount)


def test_lamp_does_not_care_for_the_scale_of_a_layer_and_keeps_the_largest_of_each() -> None:
    scores = draw_scores([[5, 6], [7, 3], [4, 4]], 0)
    scaled = {name: score * 10.0 ** (3 * i - 3) for i, (name, score) in enumerate(scores.items())}
    masks = select_weights(scores, 0.9, scope="lamp")
    assert as_lists(masks) == as_lists(select_weights(scaled, 0.9, scope="lamp"))
    assert all(bool(mask.flatten()[scores[name].argmax()]) for name, mask in masks.items())


def test_lamp_takes_the_lowest_of_negative_scores() -> None:
    assert select_weights({"w": torch.tensor([-1.0, -2, -3, -4])}, 0.5, scope="lamp")["w"].tolist() == [
        True,
        True,
        False,
        False,
    ]


@pytest.mark.parametrize("value", [NAN, float("inf")])
def test_lamp_keeps_one_diverged_weight_and_judges_the_others(value: float) -> None:
    masks = select_weights(
        {"a": torch.tensor([value, 3, 2, 1, 4]), "b": torch.tensor([5.0, 3, 2, 1, 4])}, 0.4, scope="lamp"
    )
    assert masks["a"].tolist() == [True, True, False, False, True]
    assert masks["b"].tolist() == [True, True, False, False, True]


OWNERS = ["stem", "body.0", "body.2", "body.10", "head"]


def tree() -> nn.Module:
    body = nn.ModuleDict({k: nn.Linear(6, 5) for k in ("0", "2", "10")})
    return Net(lambda n, x: x, stem=nn.Linear(8, 5), body=body, head=nn.Conv2d(3, 4, 2))


@given(
    st.dictionaries(
        st.sampled_from(["stem", "body", "body.*", "body.1*", "b*", "head", "*", "*.2"]), amounts, max_size=4
    ),
    amounts,
)
@pytest.mark.filterwarnings("ignore::lightning_prune.NoEffectWarning")
def test_amounts_by_glob(scope: dict[str, float], amount: float) -> None:
    """The last glob that matches a layer, or a module that holds it, says; what none matches takes the amount."""
    amount = max(amount, 1e-3)
    model = build(tree)
    sizes = {
        name.removesuffix(".weight"): p.detach().abs().clone() for name, p in model.named_parameters() if p.dim() > 1
    }
    masks = prune_weights(model, amount, scope=scope)
    for owner, size in sizes.items():
        own = amount
        for glob, value in scope.items():
            parents = [owner, owner.rpartition(".")[0] or owner]
            own = value if any(fnmatchcase(parent, glob) for parent in parents) else own
        assert as_lists({"w": masks[f"{owner}.weight"]}) == ranked_by_hand({"w": size}, own)
    assert list(sizes) == OWNERS


def test_amounts_by_glob_where_the_rest_stays_whole() -> None:
    model = build(tree)
    masks = prune_weights(model, 0.0, scope={"stem": 0.5})
    assert {name: int((~mask).sum()) for name, mask in masks.items() if not mask.all()} == {"stem.weight": 20}


@pytest.mark.parametrize("amount", [0.2, 0.4, 0.8])
def test_on_the_way_to_the_final_amount_each_layer_has_gone_the_same_part(amount: float) -> None:
    masks = select_weights(draw_scores([[10, 10], [10, 10]], 0), amount, scope={"w1": 0.4}, part=amount / 0.8)
    assert [int((~mask).sum()) for mask in masks.values()] == [round(100 * amount), round(50 * amount)]


@pytest.mark.parametrize(
    ("scope", "message"),
    [
        ({"nothing": 0.5}, "'nothing' matches no module that can be pruned; there are: stem, body.0"),
        ({"body": 0.5, "body.0.weight": 0.5}, "'body.0.weight' matches no module"),
        ({"stem": 1.0}, "scope['stem']: amount must be a fraction in [0, 1), got 1.0"),
        ({"head": 0.5, "stem": -0.1}, "scope['stem']: amount must be"),
        ({"body.*": 50}, "scope['body.*']: amount must be a fraction in [0, 1), got 50. For 50 % pass 0.5"),
        ({"stem": NAN}, "scope['stem']: "),
        ({"stem": None}, "scope['stem']: "),
        ({"stem": True}, "scope['stem']: "),
        ({"stem": "0.5"}, "scope['stem']: "),
        ({3: 0.5}, "scope must be glob patterns"),
        ("lamp ", "'erk', 'global', 'lamp', 'layer'"),
        (None, "got None"),
        (["stem"], "got ['stem']"),
        (0.5, "got 0.5"),
    ],
)
def test_bad_scopes_leave_the_model_untouched(scope: Any, message: str) -> None:
    model = build(tree)
    snapshot = Snapshot(model)
    with pytest.raises(PruningError, match=re.escape(message)):
        prune_weights(model, 0.5, scope=scope)
    snapshot.assert_unchanged()


# large selections: the threshold is found by a sample

N = module.FEW + 100_003
"""Enough scores that they are sampled."""


def spread(values: Tensor) -> Masks:
    """The same scores in parts of odd sizes and shapes."""
    first, second, third = values.split([400_000, 3, len(values) - 400_003])
    return {"a": first.view(400, 1000), "b": second, "c": third}


def check_against_sorting(scores: Masks, amount: float) -> None:
    """All below the k-th lowest go, all above it stay, and the count is exact: those of the lower index among equals."""
    masks = select_weights(scores, amount)
    values = torch.cat([score.flatten().double() for score in scores.values()])
    mask = torch.cat([each.flatten() for each in masks.values()])
    count = round(amount * len(values))
    assert int((~mask).sum()) == count
    assert [(each.shape, each.dtype) for each in masks.values()] == [(s.shape, torch.bool) for s in scores.values()]
    if not count:
        return
    threshold = values.sort().values[count - 1]
    assert not bool(mask[values < threshold].any())
    assert bool(mask[values > threshold].all())
    assert bool(mask[values.isnan()].all())
    ties = mask[values == threshold]
    assert bool(ties[1:].ge(ties[:-1]).all())  # gone first, then kept


DISTRIBUTIONS: dict[str, Callable[[], Tensor]] = {
    "normal": lambda: torch.randn(N),
    "heavy": lambda: torch.randn(N).pow(9),
    "ties": lambda: torch.randint(0, 7, (N,)).float(),
    "half ties": lambda: torch.rand(N).clamp(min=0.5),
    "sorted": lambda: torch.arange(N, dtype=torch.float64),
    "descending": lambda: torch.arange(N, 0, -1, dtype=torch.float64),
    "constant": lambda: torch.full((N,), 0.25),
    "zeros": lambda: torch.zeros(N),
    "bumps": lambda: (torch.arange(N) % module.STRIDE == 0).double() + torch.rand(N) * 1e-9,  # a period of the sample's step
    "masked": lambda: torch.rand(N).masked_fill(torch.rand(N) < 0.4, -torch.inf),
    "some nan": lambda: torch.rand(N).masked_fill(torch.rand(N) < 0.001, NAN),
    "infinite": lambda: torch.randn(N).masked_fill(torch.rand(N) < 0.02, torch.inf).masked_fill(torch.rand(N) < 0.02, -torch.inf),
    "half": lambda: torch.randn(N).half(),
    "brain": lambda: torch.randn(N).bfloat16(),
    "close": lambda: 1 + torch.randperm(N).double() * 1e-15,
}  # fmt: skip


@pytest.mark.parametrize("amount", [1 / N, 3e-5, 0.3, 0.9, 0.99])
@pytest.mark.parametrize("kind", DISTRIBUTIONS)
def test_a_large_selection_equals_sorting(kind: str, amount: float) -> None:
    check_against_sorting(spread(DISTRIBUTIONS[kind]()), amount)


@pytest.mark.parametrize("amount", [1e-7, 0.5, 1 - 3e-5, 1 - 1 / N])
@pytest.mark.parametrize("kind", ["normal", "ties", "sorted", "constant", "masked", "half"])
def test_a_large_selection_near_the_ends(kind: str, amount: float) -> None:
    check_against_sorting(spread(DISTRIBUTIONS[kind]()), amount)


@pytest.mark.parametrize("amount", [0.001, 0.5, 0.95])
@pytest.mark.parametrize("levels", [0, 50])
def test_a_large_selection_of_several_dtypes(amount: float, levels: int) -> None:
    values = torch.randn(N, dtype=torch.float64)
    scores = spread((values * levels).round() if levels else values)
    scores |= {"a": scores["a"].float(), "c": scores["c"].bfloat16(), "d": torch.randn(50, 60).half()}
    check_against_sorting(scores, amount)


def test_a_large_selection_of_layers_that_differ_by_far() -> None:
    """The sample sees one of each, far too many of the small ones."""
    tiny = {f"tiny{i}": torch.rand(1) for i in range(3000)}
    scores = tiny | {"large": 10 + torch.rand(N)} | {"last": torch.rand(2000)}
    for amount in (2500 / (N + 5000), 4000 / (N + 5000), 0.5):
        check_against_sorting(scores, amount)


@pytest.mark.parametrize("levels", [0, 3, 20])
@pytest.mark.parametrize("sizes", [[[20, 9], [3], [50, 4]], [[1]] * 60 + [[17, 20]], [[400]]])
def test_sampling_and_sorting_agree(monkeypatch: pytest.MonkeyPatch, sizes: list[list[int]], levels: int) -> None:
    """On few scores, sampled as if they were many, well and badly; each amount."""
    monkeypatch.setattr(module, "FEW", 16)
    monkeypatch.setattr(module, "STRIDE", 4)
    monkeypatch.setattr(module, "CHUNK", 7)
    scores = draw_scores(sizes, levels, levels)
    if len(sizes) == 1:
        scores["w0"][::4] += 100  # none of the sample's is like the others
    if len(sizes) > 9:
        scores["w60"] += 100
    for amount in [i / 80 for i in range(80)] + [0.999]:
        assert as_lists(select_weights(scores, amount)) == ranked_by_hand(scores, amount)


# what is not a number


def test_where_most_are_no_numbers_the_others_go() -> None:
    scores = {"w": torch.tensor([NAN] * 16 + [1.0, 2, 3, 4])}
    masks = {"w": torch.tensor([True] * 16 + [False, True, True, True])}
    assert not select_weights(scores, 0.5, masks=masks)["w"][16:].any()


# promises to users


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("scope", ["global", "layer", "erk", "lamp"])
def test_masked_places_hold_a_positive_zero_and_nothing_else_changes(dtype: torch.dtype, scope: str) -> None:
    model = build(resnet).to(dtype).train()
    for number, p in enumerate(model.parameters()):
        p.requires_grad_(number % 2 == 0)
    with torch.no_grad():
        model[0].weight[0] = -0.0
        model[0].weight[1] = -1e-7
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    before = {name: (t, t.data_ptr(), t.detach().clone()) for name, t in model.state_dict(keep_vars=True).items()}
    snapshot = Snapshot(model, optimizer)
    masks = prune_weights(model, 0.6, scope=scope)
    for name, tensor in model.state_dict(keep_vars=True).items():
        assert tensor is before[name][0]
        assert tensor.data_ptr() == before[name][1]
        mask = masks.get(name, torch.ones_like(tensor, dtype=torch.bool))
        assert torch.equal(tensor[mask], before[name][2][mask])
        assert not tensor[~mask].any()
        assert not torch.signbit(tensor[~mask]).any()
        tensor.detach().copy_(before[name][2])
    snapshot.assert_unchanged()


def test_a_masked_weight_that_is_no_number_becomes_zero() -> None:
    layer = nn.Linear(3, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[float("-inf"), float("inf"), float("nan")]] * 2))
    apply_masks({"w": layer.weight}, {"w": torch.zeros(2, 3, dtype=torch.bool)})
    assert layer.weight.tolist() == [[0, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize("criterion", ["l1", "synflow", "random", "taylor"])
def test_tied_parameters_stay_tied_and_count_once(criterion: str) -> None:
    model = build(shared_block)
    x = torch.ones(1, 4, dtype=torch.float64)
    model(x).sum().backward()
    masks = prune_weights(model, 0.5, criterion=criterion, example_inputs=x)
    assert model[2].weight is model[4].weight
    assert "4.weight" not in masks
    assert torch.equal(model[4].weight == 0, ~masks["2.weight"])
    assert sum(int((~m).sum()) for m in masks.values()) == (24 + 36 + 18) // 2


@pytest.mark.parametrize("form", ["channels_last", "transposed"])
def test_the_layout_of_a_weight_in_memory_does_not_matter(form: str) -> None:
    plain, odd = build(lambda: nn.Conv2d(4, 6, 3)), build(lambda: nn.Conv2d(4, 6, 3))
    with torch.no_grad():
        if form == "channels_last":
            odd = odd.to(memory_format=torch.channels_last)
        else:
            odd.weight = nn.Parameter(odd.weight.transpose(0, 3).contiguous().transpose(0, 3))
        for layer in (plain, odd):
            layer.weight.mul_(3).round_()  # ties too
    strides = odd.weight.stride()
    assert strides != plain.weight.stride()
    for options in ({}, {"pattern": "2:4"}, {"pattern": "block:2x2"}, {"scope": "lamp"}):
        assert as_lists(prune_weights(plain, 0.5, **options)) == as_lists(prune_weights(odd, 0.5, **options))
        assert torch.equal(plain.weight, odd.weight)
    assert odd.weight.stride() == strides
