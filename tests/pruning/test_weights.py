import functools
import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import Net, Snapshot, build, resnet, shared_block
from torch import Tensor, nn

from lightning_prune import NoEffectWarning, PruningError, prune_weights
from lightning_prune.pruning.masks import apply_masks, mask_optimizer
from lightning_prune.pruning.weights import select_weights

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


def test_not_a_number_is_kept_and_the_count_is_exact() -> None:
    """A diverged network is no reason to take more than was asked for."""
    layer = nn.Linear(5, 4)
    with torch.no_grad():
        layer.weight[0] = float("nan")
        layer.weight[1, 0] = float("inf")
    masks = prune_weights(layer, 0.5)
    assert int((~masks["weight"]).sum()) == 10
    assert bool(masks["weight"][0].all())
    assert bool(masks["weight"][1, 0])


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
