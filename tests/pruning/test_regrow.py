"""Masks that move: how many, which go, which come back."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_prune import PruningError
from lightning_prune.pruning.regrow import moved, share

kinds = pytest.mark.parametrize("kind", ["rigl", "set"])


def layer(shape: list[int], density: float, seed: int, levels: int = 0) -> tuple[Tensor, nn.Parameter]:
    """A mask, and a weight that is zero where it says so, with a gradient everywhere."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(shape, generator=generator) < density
    values, gradient = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    if levels:
        values, gradient = (t.mul(levels).round() for t in (values, gradient))
    weight = nn.Parameter(values * mask)
    weight.grad = gradient
    return mask, weight


def numbers(tensor: Tensor) -> list[Any]:
    return tensor.detach().flatten().tolist()


@kinds
@given(
    shapes=st.lists(st.lists(st.integers(1, 6), min_size=2, max_size=3), min_size=1, max_size=3),
    density=st.floats(0, 1),
    part=st.floats(0, 1),
    seed=st.integers(0, 10**6),
    levels=st.sampled_from([0, 0, 1]),
)
def test_as_many_come_as_go(kind: str, shapes: Any, density: float, part: float, seed: int, levels: int) -> None:
    made = {f"w{i}": layer(shape, density, seed + i, levels) for i, shape in enumerate(shapes)}
    masks, weights = {n: m for n, (m, _) in made.items()}, {n: w for n, (_, w) in made.items()}
    before = {n: (m.clone(), weights[n].detach().clone(), weights[n].grad.clone()) for n, m in masks.items()}
    found = moved(masks, weights, kind, part, 3)
    for name, old in masks.items():
        assert torch.equal(old, before[name][0])  # nothing is changed in place
        assert torch.equal(weights[name], before[name][1])
        assert torch.equal(weights[name].grad, before[name][2])
        new = found[name]
        assert new.dtype == torch.bool
        assert new.shape == old.shape
        was, now, size, slope = map(numbers, (old, new, weights[name].abs(), weights[name].grad.abs()))
        places = range(len(was))
        dropped = [i for i in places if was[i] and not now[i]]
        grown = [i for i in places if now[i] and not was[i]]
        assert len(dropped) == len(grown) == min(round(part * sum(was)), len(was) - sum(was))
        stay = [i for i in places if was[i] and now[i]]
        assert max((size[i] for i in dropped), default=0) <= min((size[i] for i in stay), default=math.inf)
        if kind == "rigl":
            rest = [i for i in places if not was[i] and not now[i]]
            assert min((slope[i] for i in grown), default=math.inf) >= max((slope[i] for i in rest), default=0)


def test_chance_is_that_of_the_seed() -> None:
    mask, weight = layer([20, 30], 0.3, 0)
    weight.grad = None  # not needed
    state = torch.get_rng_state()
    first, again, other = (moved({"w": mask}, {"w": weight}, "set", 0.3, seed)["w"] for seed in (5, 5, 6))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(first & mask, other & mask)  # what goes is no chance
    twins = moved({"a": mask, "b": mask}, {"a": weight, "b": weight}, "set", 0.3, 5)
    assert not torch.equal(twins["a"], twins["b"])


def test_chance_gives_each_of_those_gone_the_same_odds() -> None:
    mask = torch.arange(60).view(6, 10) < 20
    weight = nn.Parameter(torch.rand(6, 10) * mask)
    rounds = 400
    grown = sum((moved({"w": mask}, {"w": weight}, "set", 0.5, seed)["w"] & ~mask).double() for seed in range(rounds))
    odds, spread = 10 / 40, math.sqrt(0.25 * 0.75 / rounds)
    assert float((grown[~mask] / rounds - odds).abs().max()) < 5 * spread


def test_signs_do_not_matter_and_what_went_just_now_does_not_come_back() -> None:
    mask = torch.tensor([[True, True, True, False, False, False]])
    weight = nn.Parameter(torch.tensor([[-3.0, 0.1, 2.0, 0, 0, 0]]))
    weight.grad = torch.tensor([[0.0, 99.0, 0.0, 1.0, -5.0, 2.0]])
    assert moved({"w": mask}, {"w": weight}, "rigl", 0.34, 0)["w"].tolist() == [[True, False, True, False, True, False]]


@kinds
def test_with_nothing_gone_or_nothing_kept_nothing_moves(kind: str) -> None:
    _, weight = layer([3, 4], 1, 0)
    for mask in (torch.ones(3, 4, dtype=torch.bool), torch.zeros(3, 4, dtype=torch.bool)):
        assert torch.equal(moved({"w": mask}, {"w": weight}, kind, 0.5, 0)["w"], mask)


@pytest.mark.parametrize("absent", ["missing", "zeros", "sparse zeros"])
def test_a_weight_that_was_not_trained_stays_as_it_is(absent: str) -> None:
    """Zeros would bring back the first of what is gone, whatever it is."""
    made = {name: layer([4, 5], 0.5, i) for i, name in enumerate(("a", "b"))}
    masks, weights = {n: m for n, (m, _) in made.items()}, {n: w for n, (_, w) in made.items()}
    alone = moved({"a": masks["a"]}, {"a": weights["a"]}, "rigl", 0.3, 0)["a"]
    zeros = torch.zeros_like(weights["b"])
    weights["b"].grad = {"missing": None, "zeros": zeros, "sparse zeros": zeros.to_sparse()}[absent]
    after = moved(masks, weights, "rigl", 0.3, 0)
    assert torch.equal(after["b"], masks["b"])
    assert torch.equal(after["a"], alone)
    assert not torch.equal(alone, masks["a"])


def test_no_gradient_at_all_is_an_error() -> None:
    mask, weight = layer([4, 5], 0.5, 0)
    weight.grad = None
    before = mask.clone()
    with pytest.raises(PruningError, match="regrow='rigl' needs gradients, but neither 'a' nor another weight has one"):
        moved({"a": mask}, {"a": weight}, "rigl", 0.3, 0)
    assert torch.equal(mask, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@kinds
def test_half_precision(kind: str, dtype: torch.dtype) -> None:
    mask, weight = layer([20, 30], 0.3, 0)
    half = nn.Parameter(weight.detach().to(dtype))
    half.grad = weight.grad.to(dtype)
    exact = nn.Parameter(half.detach().double())
    exact.grad = half.grad.double()
    assert torch.equal(
        moved({"w": mask}, {"w": half}, kind, 0.3, 1)["w"], moved({"w": mask}, {"w": exact}, kind, 0.3, 1)["w"]
    )


# how much


@pytest.mark.parametrize(
    ("kind", "progress", "expected"),
    [
        ("set", 0.0, 0), ("set", 0.01, 0.3), ("set", 0.5, 0.3), ("set", 0.99, 0.3), ("set", 1.0, 0),
        ("rigl", 0.0, 0), ("rigl", 1 / 3, 0.225), ("rigl", 0.5, 0.15), ("rigl", 2 / 3, 0.075), ("rigl", 1.0, 0),
    ],
)  # fmt: skip
def test_share(kind: str, progress: float, expected: float) -> None:
    """RigL's cosine: three quarters at a third of the way, half in the middle."""
    assert share(kind, 0.3, progress) == pytest.approx(expected)


@given(st.floats(0.01, 0.99), st.lists(st.floats(0, 1, exclude_min=True, exclude_max=True), min_size=2))
def test_share_of_rigl_only_falls(fraction: float, points: list[float]) -> None:
    values = [share("rigl", fraction, progress) for progress in sorted(points)]
    assert values == sorted(values, reverse=True)
    assert all(0 <= value <= fraction for value in values)
