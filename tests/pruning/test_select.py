import functools
import itertools
from statistics import mean
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import build_case, cases
from torch import Tensor, nn

from lightning_prune import PruningError, find_groups
from lightning_prune.graph.groups import Groups
from lightning_prune.pruning.criteria import L1, relative
from lightning_prune.pruning.select import matching, measure_dense, pick, select_neurons
from lightning_prune.pruning.surgery import named_tensors


@functools.cache
def find(name: str) -> tuple[Groups, Tensor, Tensor]:
    model, x = build_case(name)
    groups = find_groups(model, x)
    return groups, relative(groups, L1().score(model, groups)), torch.ones(groups.neurons, dtype=torch.bool)


def in_groups(groups: Groups, values: Tensor) -> list[list[Any]]:
    return [values[numbers.start : numbers.stop].tolist() for numbers in groups.ranges]


@cases(["article", "resnet", "concat_input", "tied_transposed", "recurrent"])
def test_scores_are_the_l1_norms_over_all_slices_relative_to_the_groups_mean(name: str) -> None:
    model, x = build_case(name)
    groups = find_groups(model, x)
    tensors = named_tensors(model)
    expected: list[list[float]] = []
    for group in groups.prunable:
        scores = [
            sum(
                tensors[s.name].select(s.dim, index).abs().sum().item()
                for s in group.slices
                if s.name in dict(model.named_parameters())
                for index in s.index[neuron].tolist()
            )
            for neuron in range(group.size)
        ]
        expected.append([score / (sum(scores) / len(scores)) for score in scores])
    for ours, theirs in zip(in_groups(groups, relative(groups, L1().score(model, groups))), expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-12)


def random_scores(groups: Groups, seed: int) -> Tensor:
    return torch.rand(groups.neurons, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def all_that_may_go(groups: Groups, scores: Tensor) -> list[int]:
    """In the order of their scores; the best of each group stays."""
    best = {max(numbers, key=lambda i: scores[i].item()) for numbers in groups.ranges}
    return [i for i in torch.argsort(scores).tolist() if i not in best]


@given(st.integers(0, 10**6), st.floats(0, 0.99))
def test_global_selection_takes_the_lowest_scores(seed: int, amount: float) -> None:
    groups, _, allowed = find("resnet")
    scores = random_scores(groups, seed)
    order, count = all_that_may_go(groups, scores), round(amount * groups.neurons)
    dense = measure_dense(groups, allowed)
    if count > len(order):
        with pytest.raises(PruningError, match="can't be reached"):
            select_neurons(groups, scores, allowed, amount, dense=dense)
        return
    alive = select_neurons(groups, scores, allowed, amount, dense=dense)
    assert set((~alive).nonzero().flatten().tolist()) == set(order[:count])


@given(st.integers(0, 10**6), st.floats(0, 0.99), st.sampled_from(["params", "macs"]))
def test_a_budget_is_met_and_no_neuron_can_be_given_back(seed: int, amount: float, of: str) -> None:
    groups, _, allowed = find("resnet")
    scores = random_scores(groups, seed)
    dense = measure_dense(groups, allowed)
    goal = (1 - amount) * getattr(dense, of) * (1 + 1e-9)
    least = torch.ones(groups.neurons, dtype=torch.bool)
    least[all_that_may_go(groups, scores)] = False
    if getattr(groups, of)(least) > goal:
        with pytest.raises(PruningError, match="can't be reached"):
            select_neurons(groups, scores, allowed, amount, of=of, dense=dense)
        return
    alive = select_neurons(groups, scores, allowed, amount, of=of, dense=dense)
    assert getattr(groups, of)(alive) <= goal
    for gone in (~alive).nonzero().flatten().tolist():
        more = alive.clone()
        more[gone] = True
        assert getattr(groups, of)(more) > goal


@pytest.mark.parametrize("amount", [0.0, 0.1, 0.3, 0.5, 0.7])
@pytest.mark.parametrize("round_to", [1, 2, 3, 4])
@pytest.mark.parametrize("scope", ["global", "layer"])
@cases(["article", "resnet"])
def test_selection_keeps_the_order_inside_each_group(name: str, scope: str, round_to: int, amount: float) -> None:
    groups, scores, allowed = find(name)
    try:
        alive = select_neurons(
            groups, scores, allowed, amount, scope=scope, round_to=round_to, dense=measure_dense(groups, allowed)
        )
    except PruningError:
        assert round_to > 1
        return
    for stays, values in zip(in_groups(groups, alive), in_groups(groups, scores), strict=True):
        kept = [value for value, stay in zip(values, stays, strict=True) if stay]
        gone = [value for value, stay in zip(values, stays, strict=True) if not stay]
        assert len(kept) >= 1
        assert not gone or max(gone) <= min(kept)
        assert not gone or len(kept) % round_to == 0


@pytest.mark.parametrize("of", ["neurons", "params", "macs"])
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_steps_of_a_growing_amount_end_where_one_step_does(scope: str, of: str) -> None:
    """The amount is of the dense whole and never compounds."""
    groups, scores, allowed = find("article")
    dense = measure_dense(groups, allowed)
    whole = select_neurons(groups, scores, allowed, 0.6, of=of, scope=scope, dense=dense)
    left = torch.arange(groups.neurons)
    for amount in (0.2, 0.45, 0.6):
        alive = select_neurons(groups, scores[left], allowed[left], amount, of=of, scope=scope, dense=dense)
        groups, left = groups.without(alive), left[alive]
        measured = {"neurons": groups.neurons, "params": 0, "macs": 0}[of]
        if of != "neurons":
            measured = getattr(groups, of)(torch.ones(groups.neurons, dtype=torch.bool))
        goal = (1 - amount) * getattr(dense, of)
        assert abs(measured - goal) <= 0.5 if of == "neurons" else 0.9 * goal < measured <= goal * (1 + 1e-9)
    if of == "neurons":
        assert left.tolist() == whole.nonzero().flatten().tolist()


def test_equal_scores_go_in_the_order_of_the_network() -> None:
    groups, scores, allowed = find("article")
    dense = measure_dense(groups, allowed)
    chosen = [select_neurons(groups, torch.ones_like(scores), allowed, 0.3, dense=dense) for _ in range(2)]
    assert torch.equal(*chosen)
    assert (~chosen[0]).nonzero().flatten().tolist()[:5] == [0, 1, 2, 3, 4]


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(64, 64), nn.Linear(64, 64)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        out: Tensor = self.last(x)
        return out


@pytest.mark.parametrize("of", ["params", "macs"])
@pytest.mark.parametrize("amount", [0.3, 0.6])
def test_a_residual_stream_is_not_cheap_for_being_read_by_many(of: str, amount: float) -> None:
    groups = find_groups(Residual(), torch.rand(1, 64))
    allowed = torch.ones(groups.neurons, dtype=torch.bool)
    scores = torch.ones(groups.neurons, dtype=torch.float64)
    alive = select_neurons(groups, scores, allowed, amount, of=of, dense=measure_dense(groups, allowed))
    left = {group.name: sum(kept) for group, kept in zip(groups.prunable, in_groups(groups, alive), strict=True)}
    stream = left.pop("first + blocks.0.2 + blocks.1.2 + blocks.2.2 + blocks.3.2")
    assert stream == pytest.approx(mean(left.values()), rel=0.1)


def test_only_what_is_allowed_goes() -> None:
    groups, scores, _ = find("article")
    allowed = pick(groups, None, ["fc1"], exact_only=False)
    alive = select_neurons(groups, scores, allowed, 0.5, dense=measure_dense(groups, allowed))
    assert bool((alive | allowed).all())
    assert int((~alive).sum()) == round(0.5 * (6 + 16 + 84))


NAMES = ["stem", "layer1.0.conv1", "layer1.0.conv2", "layer1.1.conv1", "layer10.conv", "head"]


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        (None, None, NAMES),
        (["*"], None, NAMES),
        (["layer1"], None, NAMES[1:4]),
        (["layer1.*"], None, NAMES[1:4]),
        (["layer1*"], None, NAMES[1:5]),
        (["*.conv1"], None, [NAMES[1], NAMES[3]]),
        (["layer1.[01].conv1", "head"], None, [NAMES[1], NAMES[3], NAMES[5]]),
        (None, ["layer1", "head"], [NAMES[0], NAMES[4]]),
        (["layer1"], ["*.conv1"], [NAMES[2]]),
        ([], None, []),
        (None, [], NAMES),
    ],
)
def test_globs(include: list[str] | None, exclude: list[str] | None, expected: list[str]) -> None:
    assert matching(NAMES, include, exclude) == set(expected)


@pytest.mark.parametrize(("pattern", "side"), [*itertools.product(["LAYER1", "conv1", "layer1.0.conv", ""], [0, 1])])
def test_a_glob_that_matches_nothing_is_an_error_that_lists_the_names(pattern: str, side: int) -> None:
    arguments: list[Any] = [None, None]
    arguments[side] = [pattern]
    with pytest.raises(PruningError, match=f"'{pattern}' matches no module .* there are: stem, layer1"):
        matching(NAMES, *arguments)
