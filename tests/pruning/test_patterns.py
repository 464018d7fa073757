"""Patterns against groups and blocks that are walked by hand."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import Net, Snapshot, build, resnet
from torch import Tensor, nn

from lightning_prune import PruningError, prune_weights
from lightning_prune.pruning.patterns import get_pattern
from lightning_prune.pruning.weight_selection import select_weights

LAYERS = {
    "linear": lambda: nn.Linear(24, 5),
    "conv": lambda: nn.Conv2d(24, 5, (3, 2)),
    "turned": lambda: nn.ConvTranspose2d(24, 5, (3, 2)),
    "grouped": lambda: nn.Conv2d(48, 6, 1, groups=2),
}
NM = {"2:4": (2, 4), "1:4": (1, 4), "4:8": (4, 8), "3:4": (3, 4), "1:3": (1, 3)}


def by_output(layer: nn.Module, tensor: Tensor) -> Tensor:
    """(all else, inputs): the values that one output reads at one place of the kernel are a row."""
    inputs = 0 if isinstance(layer, nn.ConvTranspose2d) else 1
    return tensor.movedim(inputs, -1).reshape(-1, tensor.size(inputs))


def groups(row: list[Any], m: int) -> Iterator[list[Any]]:
    for start in range(0, len(row), m):
        yield row[start : start + m]


@pytest.mark.parametrize("part", [0.2, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("pattern", NM)
@pytest.mark.parametrize("kind", LAYERS)
def test_each_group_along_the_inputs_keeps_its_n(kind: str, pattern: str, part: float) -> None:
    n, m = NM[pattern]
    layer = build(LAYERS[kind])
    size = by_output(layer, layer.weight.detach().abs()).tolist()
    amount = part * (1 - n / m)
    mask = prune_weights(layer, amount, pattern=pattern)["weight"]
    assert int((~mask).sum()) == round(amount * mask.numel())
    assert torch.equal(layer.weight != 0, mask)
    lost, candidates = [], []
    for sizes, stays in zip(size, by_output(layer, mask).tolist(), strict=True):
        for values, kept in zip(groups(sizes, m), groups(stays, m), strict=True):
            assert sum(kept) >= n
            if part == 1:
                assert sum(kept) == n
            gone = [v for v, k in zip(values, kept, strict=True) if not k]
            assert gone == [v for v in values if v in sorted(values)[: len(gone)]]  # the smallest of the group
            lost += gone
            candidates += sorted(values)[: m - n]
    assert sorted(lost) == sorted(candidates)[: len(lost)]  # and the smallest of those that may go


@given(
    st.sampled_from(sorted(NM)),
    st.lists(st.floats(0, 1), min_size=2, max_size=4),
    st.integers(0, 10**6),
    st.sampled_from([0, 1, 3]),
    st.sampled_from(["global", "layer", "lamp"]),
)
def test_gradual_amounts_stay_within_the_pattern(
    pattern: str, parts: list[float], seed: int, levels: int, scope: str
) -> None:
    """Scores change from step to step, and many are equal."""
    n, m = NM[pattern]
    torch.manual_seed(seed)
    shapes = {"a": (4, 2 * m), "b": (m, 3, 2), "c": (2, m, 1, 2)}
    dims = {"a": 1, "b": 0, "c": 1}
    masks: dict[str, Tensor] | None = None
    for part in sorted(parts):
        scores = {name: torch.rand(shape, dtype=torch.float64) for name, shape in shapes.items()}
        scores = {name: (s * levels).round() for name, s in scores.items()} if levels else scores
        amount = part * (1 - n / m)
        later = select_weights(scores, amount, scope=scope, masks=masks, pattern=get_pattern(pattern), dims=dims)
        for name, mask in later.items():
            for row in mask.movedim(dims[name], -1).reshape(-1, m).tolist():
                assert sum(row) >= n
            assert masks is None or bool((mask <= masks[name]).all())
            if scope == "layer":
                assert int((~mask).sum()) == round(amount * mask.numel())
        total = sum(mask.numel() for mask in later.values())
        if scope != "layer":
            assert sum(int((~mask).sum()) for mask in later.values()) == round(amount * total)
        masks = later


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_group_that_diverged_does_not_cost_another_its_n(value: float) -> None:
    scores = {"w": torch.tensor([[1.0, 2, 3, 4], [value] * 4])}
    mask = select_weights(scores, 0.5, pattern=get_pattern("2:4"))["w"]
    assert all(sum(row) >= 2 for row in mask.tolist())


# blocks

BLOCKS = {"block:2x3": (2, 3), "block:1x4": (1, 4), "block:4x1": (4, 1), "block:4x12": (4, 12), "block:1x1": (1, 1)}
BLOCKED = {
    "linear": lambda: nn.Linear(24, 8),
    "conv": lambda: nn.Conv2d(24, 8, (3, 2)),
    "turned": lambda: nn.ConvTranspose2d(24, 8, (3, 2)),
}


def cut(layer: nn.Module, tensor: Tensor, rows: int, columns: int) -> list[list[float]]:
    """The values of each block, found by its indices."""
    turned = isinstance(layer, nn.ConvTranspose2d)
    matrix = (tensor.transpose(0, 1) if turned else tensor).reshape(8, 24, -1).tolist()
    return [
        [matrix[r + i][c + j][k] for i in range(rows) for j in range(columns)]
        for k in range(len(matrix[0][0]))
        for r in range(0, 8, rows)
        for c in range(0, 24, columns)
    ]


@pytest.mark.parametrize("amount", [0.05, 0.3, 0.77])
@pytest.mark.parametrize("pattern", BLOCKS)
@pytest.mark.parametrize("kind", BLOCKED)
def test_the_blocks_of_the_lowest_sums_go_whole(kind: str, pattern: str, amount: float) -> None:
    rows, columns = BLOCKS[pattern]
    layer = build(BLOCKED[kind])
    sums = [sum(block) for block in cut(layer, layer.weight.detach().abs(), rows, columns)]
    if round(amount * len(sums)) == 0:
        pytest.skip("rounds to no block")
    mask = prune_weights(layer, amount, pattern=pattern)["weight"]
    kept = cut(layer, mask, rows, columns)
    assert all(len(set(block)) == 1 for block in kept)
    assert abs(int((~mask).sum()) - amount * mask.numel()) <= rows * columns / 2 + 1e-9
    gone = [s for s, block in zip(sums, kept, strict=True) if not block[0]]
    assert sorted(gone) == sorted(sums)[: len(gone)]
    assert torch.equal(layer.weight != 0, mask)


@pytest.mark.parametrize("scope", ["global", "layer", "lamp"])
def test_blocks_that_are_gone_stay_gone(scope: str) -> None:
    masks: dict[str, Tensor] | None = None
    for amount in (0.1, 0.4, 0.4, 0.8):
        scores = {"a": torch.rand(6, 8), "b": torch.rand(4, 4, 3)}
        later = select_weights(scores, amount, scope=scope, masks=masks, pattern=get_pattern("block:2x4"))
        assert masks is None or all(bool((later[name] <= masks[name]).all()) for name in later)
        assert masks is None or amount > 0.4 or abs(sum(int((~m).sum()) for m in later.values()) - 0.4 * 96) <= 8
        masks = later


# with scopes


def net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 1), nn.ReLU(), nn.ConvTranspose2d(16, 8, 2))


@pytest.mark.parametrize("pattern", ["1:4", "block:2x4"])
@pytest.mark.parametrize("scope", ["layer", "erk", "lamp", "global", {"0": 0.7, "2": 0.1}])
def test_patterns_in_scopes(pattern: str, scope: Any) -> None:
    model = build(net)
    sizes = {name: p.numel() for name, p in model.named_parameters() if p.dim() == 4}
    unit = 8 if pattern.startswith("block") else 1
    masks = prune_weights(model, 0.4, pattern=pattern, scope=scope)
    gone = {name: int((~mask).sum()) for name, mask in masks.items()}
    wanted = dict.fromkeys(sizes, 0.4) | ({"0.weight": 0.7, "2.weight": 0.1} if isinstance(scope, dict) else {})
    if scope == "layer" or isinstance(scope, dict):
        assert all(abs(gone[name] - wanted[name] * size) <= unit / 2 + 1e-9 for name, size in sizes.items())
    else:
        assert abs(sum(gone.values()) - 0.4 * sum(sizes.values())) <= unit / 2 * len(sizes)
    for name, mask in masks.items():
        layer = model.get_submodule(name.removesuffix(".weight"))
        if unit == 1:
            assert int(by_output(layer, mask).reshape(-1, 4).sum(1).min()) >= 1
        else:
            turned = mask.transpose(0, 1) if isinstance(layer, nn.ConvTranspose2d) else mask
            blocks = turned.unfold(0, 2, 2).unfold(1, 4, 4).flatten(-2)
            assert torch.equal(blocks.all(-1), blocks.any(-1))


# errors


@pytest.mark.parametrize(
    "pattern",
    ["", "2", "2:", ":4", "0:4", "4:4", "5:4", "-1:4", "2:4:8", "2.0:4", "2:4\n", " 2:4", "block", "block:", "block:2",
     "block:0x2", "block:2x0", "block:2x", "block:-2x2", "block:2x2x2", "Block:2x2", "blocks:2x2", 24, 0.5, (2, 4), ["2:4"],
     True],
)  # fmt: skip
def test_what_is_no_pattern_is_an_error(pattern: Any) -> None:
    model = nn.Linear(8, 8)
    snapshot = Snapshot(model)
    with pytest.raises(PruningError, match=r"pattern must be 'n:m'.*" + re.escape(repr(pattern))):
        prune_weights(model, 0.5, pattern=pattern)
    snapshot.assert_unchanged()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pattern": "2:4"}, "'0.weight' of shape (8, 3, 3, 3) has 3"),
        ({"pattern": "4:8", "exclude": "0"}, "'4.conv2.weight' of shape (12, 12, 3, 3) has 12"),
        ({"pattern": "block:2x2"}, "8 outputs and 3 inputs can't be cut into blocks of 2 and 2"),
        ({"pattern": "block:5x1"}, "8 outputs and 3 inputs can't be cut into blocks of 5 and 1"),
        ({"pattern": "2:4", "exclude": "0", "amount": 0.51}, "removes 0.5 of the weights at most, got amount=0.51"),
        ({"pattern": "3:4", "exclude": "0", "amount": 0.5}, "removes 0.25 of the weights at most"),
        ({"pattern": "2:4", "exclude": "0", "amount": 0.1, "scope": {"8": 0.6}}, "at most, got amount=0.6"),
        ({"pattern": "2:4", "exclude": "0", "amount": 0.5, "scope": "erk"}, "removes 0.5 of the weights at most"),
    ],
)
def test_what_does_not_fit_is_an_error(options: dict[str, Any], message: str) -> None:
    model = build(resnet)
    snapshot = Snapshot(model)
    with pytest.raises(PruningError, match=re.escape(message)):
        prune_weights(model, **({"amount": 0.5} | options))
    snapshot.assert_unchanged()


def test_the_inputs_of_other_weights_are_their_second_dimension() -> None:
    table = nn.Parameter(torch.rand(3, 8, 5))
    model = Net(lambda n, x: x, table=table, words=nn.Embedding(5, 8), cell=nn.LSTM(8, 4))
    masks = prune_weights(model, 0.5, pattern="2:4")
    assert set(masks) == {"table", "words.weight", "cell.weight_ih_l0", "cell.weight_hh_l0"}
    assert all(set(mask.movedim(1, -1).reshape(-1, 4).sum(1).tolist()) == {2} for mask in masks.values())
