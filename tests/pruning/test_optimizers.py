"""Optimizers that are not torch's own: wrappers, state of other shapes, tensors beside the state."""

import copy
import warnings
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from networks import assert_close, build, inputs, mask, sliced, step, zero_gone
from torch import Tensor, nn

from lightning_prune import prune_neurons
from lightning_prune.pruning.change import Change
from lightning_prune.pruning.masks import mask_optimizer
from lightning_prune.pruning.optimizers import follow, forget, with_inner
from lightning_prune.pruning.surgery import take


def net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Tanh(), nn.Conv2d(8, 6, 3), nn.Flatten(), nn.Linear(6, 2)
    )


class Sharpness(torch.optim.Optimizer):
    """As SAM's implementations do: a wrapper that shares the groups of an optimizer inside, each with its own state."""

    def __init__(self, parameters: Any, rho: float = 0.05) -> None:
        super().__init__(parameters, {"rho": rho})
        self.base = torch.optim.SGD(self.param_groups, 0.05, momentum=0.9)
        self.param_groups = self.base.param_groups

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["old"] = self.state[p].get("old", torch.zeros_like(p)).mul(0.5) + p.grad
                p.grad += 0.1 * self.state[p]["old"]
        self.base.step()


class Slow(torch.optim.Optimizer):
    """As Lookahead does: slow weights beside the state, one list per group."""

    def __init__(self, parameters: Any, keep: Callable[[list[dict[str, Any]]], Any]) -> None:
        self.inner = torch.optim.Adam(parameters, 0.02)
        super().__init__(self.inner.param_groups, {})
        self.param_groups = self.inner.param_groups
        self.slow = keep(self.param_groups)

    def held(self) -> list[Tensor]:
        if isinstance(self.slow, dict):
            return [self.slow[p] for group in self.param_groups for p in group["params"]]
        return [t for each in self.slow for t in (each if isinstance(each, (list, tuple)) else [each])]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.inner.step()
        parameters = [p for group in self.param_groups for p in group["params"]]
        for p, slow in zip(parameters, self.held(), strict=True):
            slow += 0.5 * (p - slow)
            p.copy_(slow)


def per_group(groups: Any) -> Any:
    return [[p.detach().clone() for p in group["params"]] for group in groups]


def flat(groups: Any) -> Any:
    return tuple(p.detach().clone() for group in groups for p in group["params"])


def by_parameter(groups: Any) -> Any:
    found: dict[Tensor, Tensor] = defaultdict(lambda: torch.zeros(()))
    found.update({p: p.detach().clone() for group in groups for p in group["params"]})
    return found


WRAPPERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sharpness": Sharpness,
    "slow_per_group": lambda p: Slow(p, per_group),
    "slow_flat": lambda p: Slow(p, flat),
    "slow_by_parameter": lambda p: Slow(p, by_parameter),
}


def two_groups(model: nn.Module) -> list[dict[str, Any]]:
    parameters = list(model.parameters())
    return [{"params": parameters[:4]}, {"params": parameters[4:], "lr": 0.03}]


@pytest.mark.parametrize("name", WRAPPERS)
def test_training_on_with_a_wrapper_equals_training_the_masked_twin(name: str) -> None:
    model, twin = build(net), build(net)
    first, other = WRAPPERS[name](two_groups(model)), WRAPPERS[name](two_groups(twin))
    kept: dict[str, dict[int, list[int]]] = {}
    for number in range(8):
        if number == 3:
            kept = prune_neurons(model, inputs((3, 5, 5)), 0.5, optimizer=first).kept
        if kept:
            for each in with_inner(other):
                mask(twin, each, kept)
        if kept and isinstance(other, Slow):
            tensors = dict(zip([n for n, _ in twin.named_parameters()], other.held(), strict=True))
            zero_gone(tensors, kept)
        step(model, first, (3, 5, 5), number)
        step(twin, other, (3, 5, 5), number)
    assert len(kept["0.weight"][0]) < 8
    small, large = dict(model.named_parameters()), dict(twin.named_parameters())
    for key, parameter in small.items():
        assert_close([parameter], [sliced(large[key], kept.get(key, {}))], 1e-8)


def test_an_optimizer_in_a_list_follows_and_one_that_holds_itself_ends() -> None:
    model = build(net)
    first = torch.optim.SGD(model[0].parameters(), 0.1, momentum=0.9)
    other = torch.optim.Adam([p for n, p in model.named_parameters() if not n.startswith("0.")])
    first.__dict__["others"] = [other, first]
    assert with_inner(first) == [first, other]
    step(model, first, (3, 5, 5), 0)
    other.step()
    prune_neurons(model, inputs((3, 5, 5)), 0.5, optimizer=first)
    held = {id(p) for each in (first, other) for group in each.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}
    assert all(state["exp_avg"].shape == p.shape for p, state in other.state.items())


@pytest.mark.parametrize(
    ("shape", "key", "value", "expected"),
    [
        ((4, 6), "row_var", (4, 1), {0: [1, 2]}),  # torch
        ((4, 6), "col_var", (1, 6), {1: [0, 5]}),
        ((4, 6), "exp_avg_sq_row", (4,), {0: [1, 2]}),  # transformers, timm
        ((4, 6), "exp_avg_sq_col", (6,), {0: [0, 5]}),
        ((4, 4), "exp_avg_sq_col", (4,), {0: [0, 3]}),  # a square tells nothing by its shape
        ((4, 6, 3, 2), "exp_avg_sq_row", (4, 6, 3), {0: [1, 2], 1: [0, 5]}),
        ((4, 6, 3, 2), "exp_avg_sq_col", (4, 6, 2), {0: [1, 2], 1: [0, 5]}),
        ((4, 6), "step", (), {}),
        ((4, 6), "count", (1,), {}),
        ((4, 6), "odd", (6,), None),
        ((4, 6), "odd", (6, 4), None),
    ],
)
def test_factored_state_follows(shape: Any, key: str, value: Any, expected: Any) -> None:
    parameter = nn.Parameter(torch.randn(shape))
    optimizer = torch.optim.SGD([parameter], 0.1)
    state = torch.randn(value)
    optimizer.state[parameter] = {key: state}
    dims = {0: torch.tensor([1, 2]), 1: torch.tensor([0, shape[1] - 1])}
    new = nn.Parameter(take(parameter, dims))
    change = Change()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        follow(optimizer, {id(parameter): (parameter, new, dims)}, change)
    assert optimizer.param_groups[0]["params"] == [new]
    assert list(optimizer.state) == [new]
    if expected is None:
        assert optimizer.state[new] == {}
        assert key in str(caught[0].message)
    else:
        assert not caught
        assert torch.equal(optimizer.state[new][key], take(state, expected))
    change.undo()
    assert optimizer.state == {parameter: {key: state}}
    assert optimizer.param_groups[0]["params"][0] is parameter


def test_torchs_adafactor_trains_on_with_what_it_knows() -> None:
    if not hasattr(torch.optim, "Adafactor"):
        pytest.skip("this torch has no Adafactor")
    model = build(net)
    optimizer = torch.optim.Adafactor(model.parameters(), 0.05)
    for number in range(3):
        step(model, optimizer, (3, 5, 5), number)
    before = {name: copy.deepcopy(optimizer.state[p]) for name, p in model.named_parameters()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan = prune_neurons(model, inputs((3, 5, 5)), 0.5, optimizer=optimizer)
    row, column = before["3.weight"]["row_var"], before["3.weight"]["col_var"]
    now = optimizer.state[model.get_parameter("3.weight")]
    assert torch.equal(now["row_var"], sliced(row, plan.kept["3.weight"]))
    assert torch.equal(now["col_var"], sliced(column, plan.kept["3.weight"]))
    step(model, optimizer, (3, 5, 5), 3)


def test_what_is_gone_is_forgotten_inside_and_beside_too() -> None:
    model = build(net)
    for name in WRAPPERS:
        optimizer = WRAPPERS[name](two_groups(model))
        step(model, optimizer, (3, 5, 5), 0)
        gone = {id(p) for p in model[3].parameters()}
        left = [p for p in model.parameters() if id(p) not in gone]
        change = Change()
        forget(optimizer, gone, change)
        for each in with_inner(optimizer):
            assert [id(p) for group in each.param_groups for p in group["params"]] == list(map(id, left))
            assert not any(id(p) in gone for p in each.state)
        if isinstance(optimizer, Slow):
            assert [t.shape for t in optimizer.held()] == [p.shape for p in left]
        change.undo()
        step(model, optimizer, (3, 5, 5), 1)


def test_masks_clear_the_state_of_optimizers_inside_too() -> None:
    model = build(net)
    optimizer = Sharpness(model.parameters())
    step(model, optimizer, (3, 5, 5), 0)
    weight = model.get_parameter("0.weight")
    keep = weight.detach().abs() > weight.detach().abs().median()
    mask_optimizer(optimizer, {"0.weight": weight}, {"0.weight": keep})
    for state in (optimizer.state[weight]["old"], optimizer.base.state[weight]["momentum_buffer"]):
        assert not bool(state[~keep].any())
        assert bool(state[keep].all())
