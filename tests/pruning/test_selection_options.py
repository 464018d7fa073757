"""Amounts by glob, floors, sensitivity and latency: what `prune_neurons` leaves of each layer."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import IMAGE, Net, Residual, Snapshot, assert_same_outputs, build, build_case, inputs, masked_twin, resnet
from torch import Tensor, nn

from lightning_prune import NoEffectWarning, PruningError, count_cost, find_groups, prune_neurons
from lightning_prune.pruning import latency
from lightning_prune.pruning.criteria import L1, relative
from lightning_prune.pruning.select import measure_dense, select_neurons
from lightning_prune.pruning.sensitivity import damage_curves


def mlp(*sizes: int) -> Callable[[], nn.Module]:
    """Linear layers named 0, 2, 4, …"""

    def make() -> nn.Module:
        layers: list[nn.Module] = []
        for fan_in, fan_out in itertools.pairwise(sizes):
            layers += [nn.Linear(fan_in, fan_out), nn.Tanh()]
        return nn.Sequential(*layers[:-1])

    return make


def blocks() -> nn.Module:
    """Two residual blocks on one stream, named enter, first, second, out."""
    layers = {"enter": nn.Linear(4, 12), "out": nn.Linear(12, 2)}
    for name, width in (("first", 10), ("second", 8)):
        layers[name] = Residual(nn.Linear(12, width), nn.Tanh(), nn.Linear(width, 12))
    return Net(lambda n, x: n.out(n.second(n.first(n.enter(x)))), **layers)


def refused(model: nn.Module, x: Any, message: str, amount: float = 0.5, **options: Any) -> None:
    snapshot = Snapshot(model)
    with pytest.raises(PruningError, match=message):
        prune_neurons(model, x, amount, **options)
    snapshot.assert_unchanged()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def widths(model: Any, *names: str) -> list[int]:
    return [model.get_parameter(f"{name}.weight").size(0) for name in names]


# Amounts by glob


@given(st.lists(st.floats(0, 0.85), min_size=3, max_size=3), st.floats(0, 0.85))
def test_each_group_loses_its_own_fraction_to_the_nearest_neuron(shares: list[float], amount: float) -> None:
    sizes = (11, 7, 9, 13)
    model, x = build(mlp(4, *sizes, 2)), inputs((4,))
    asked = dict(zip(("0", "2", "4"), shares, strict=True))
    if not any(round(share * size) for share, size in zip((*shares, amount), sizes, strict=True)):
        return
    prune_neurons(model, x, amount, scope=asked)
    for size, share, left in zip(sizes, (*shares, amount), widths(model, "0", "2", "4", "6"), strict=True):
        assert abs((size - left) - share * size) <= 0.5 + 1e-9


def test_the_lowest_scores_of_each_group_go() -> None:
    model, x = build(mlp(4, 11, 7, 2)), inputs((4,))
    groups = find_groups(model, x)
    scores = L1().score(model, groups)
    plan = prune_neurons(model, x, 0.0, scope={"0": 4 / 11, "2": 3 / 7})
    assert plan.kept["0.weight"][0] == sorted(torch.argsort(scores[:11])[4:].tolist())
    assert plan.kept["2.weight"][0] == sorted(torch.argsort(scores[11:])[3:].tolist())


@pytest.mark.parametrize(
    ("scope", "expected"),
    [
        ({"enter": 0.5}, [6, 10, 8]),  # the stream has three makers; one is enough
        ({"first.body.2": 0.5}, [6, 10, 8]),
        ({"enter": 0.5, "second.body.2": 0.25}, [9, 10, 8]),
        ({"second.body.2": 0.25, "enter": 0.5, "first.body.2": 0.75}, [9, 10, 8]),
        ({"first": 0.5}, [6, 5, 8]),
        ({"first.*": 0.5, "*": 0.75}, [6, 5, 2]),
        ({"*": 0.5}, [6, 5, 4]),
        ({"second.body.0": 0.5}, [12, 10, 4]),
        ({"*.body.0": 0.5, "first*": 0.2}, [10, 8, 4]),
        ({"enter": 0.0, "*": 0.5}, [12, 5, 4]),
        ({"f[i]rst.body.0": 0.5, "second.body.?": 0.25}, [9, 5, 6]),
    ],
)
def test_the_smallest_of_several_fractions_counts(scope: dict[str, float], expected: list[int]) -> None:
    model, x = build(blocks), inputs((4,))
    dense = copy.deepcopy(model)
    plan = prune_neurons(model, x, 0.0, scope=scope)
    assert widths(model, "enter", "first.body.0", "second.body.0") == expected
    assert widths(model, "first.body.2", "second.body.2") == expected[:1] * 2
    assert_same_outputs(model, masked_twin(dense, plan.kept), x, inputs((4,), 5, 1), modes=("train",))


def test_what_no_pattern_matches_takes_the_amount() -> None:
    model = build(blocks)
    prune_neurons(model, inputs((4,)), 0.75, scope={"first.body.0": 0.2})
    assert widths(model, "enter", "first.body.0", "second.body.0") == [3, 8, 2]


def test_amounts_by_glob_are_of_what_may_go() -> None:
    model = build(blocks)
    prune_neurons(model, inputs((4,)), 0.5, scope={"first.body.0": 0.2}, include="*.body.0")
    assert widths(model, "enter", "first.body.0", "second.body.0") == [12, 8, 4]
    refused(build(blocks), inputs((4,)), "'enter' matches no module", scope={"enter": 0.2}, include="*.body.0")
    refused(build(blocks), inputs((4,)), "'first' matches no module", scope={"first": 0.2}, exclude="first")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scope": {"nothing": 0.5}}, r"the pattern 'nothing' matches no module .* there are: enter, first\.body\.0"),
        ({"scope": {"enter": 0.5, "first.body.1": 0.5}}, r"the pattern 'first\.body\.1' matches no module"),
        ({"scope": {"out": 0.5}}, r"the pattern 'out' matches no module that can be pruned"),
        ({"scope": {"enter": 0.5}, "of": "macs"}, r"amounts by glob are fractions of the neurons.*of='macs'"),
        ({"scope": {"enter": 0.5}, "of": "params"}, r"of='params'"),
        ({"scope": {"enter": 0.5}, "of": "latency"}, r"of='latency'"),
        ({"scope": {}}, "scope names no layer"),
        ({"scope": {3: 0.5}}, "scope maps glob patterns on module names to amounts, got 3"),
        ({"scope": {"enter": 1.0}}, r"scope: 'enter': amount must be a fraction in \[0, 1\)"),
        ({"scope": {"enter": 50}}, r"scope: 'enter': .* For 50 % pass 0\.5"),
        ({"scope": {"enter": "half"}}, "scope: 'enter': amount must be a fraction, a number"),
        ({"scope": {"enter": True}}, "scope: 'enter': amount must be a fraction, a number"),
        ({"scope": {"enter": float("nan")}}, "scope: 'enter': amount must be a fraction"),
        ({"scope": "everywhere"}, "scope must be one of 'global', 'layer', 'sensitivity', got 'everywhere'"),
        ({"scope": ["enter"]}, "scope must be one of"),
        ({"scope": {"enter": 0.8}, "min_channels": 3}, r"scope: 0\.8 of the 12 neurons of enter .* at least 3 must"),
        ({"scope": {"first.body.0": 0.96}}, r"0\.96 of the 10 neurons of first\.body\.0 can't go: at least 1 must"),
        ({"min_channels": 0}, "min_channels must be a whole number of at least 1, got 0"),
        ({"min_channels": True}, "min_channels must be a whole number"),
        ({"min_channels": 2.0}, "min_channels must be a whole number"),
        ({"round_to": 0}, "round_to must be a whole number of at least 1, got 0"),
        ({"of": "time"}, "of must be one of 'neurons', 'params', 'macs', 'latency', got 'time'"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], message: str) -> None:
    refused(build(blocks), inputs((4,)), message, amount=0.0, **options)


@pytest.mark.parametrize(("share", "left"), [(0.0, 12), (0.1, 12), (0.2, 8), (0.5, 8), (0.6, 4), (0.7, 4)])
def test_amounts_by_glob_go_to_the_nearest_multiple(share: float, left: int) -> None:
    model, x = build(mlp(4, 12, 10, 2)), inputs((4,))
    prune_neurons(model, x, 0.0, scope={"0": share, "2": 0.6}, round_to=4)
    assert widths(model, "0", "2") == [left, 4]


@pytest.mark.parametrize("whole", [{"0": 0.5, "2": 0.75}, {"*": 0.6}])
def test_steps_of_amounts_by_glob_end_where_one_step_does(whole: dict[str, float]) -> None:
    """A part of each group's own amount, of the dense whole; it never compounds."""
    model, x = build(mlp(4, 11, 7, 9, 2)), inputs((4,))
    groups = find_groups(model, x)
    scores, allowed = relative(groups, L1().score(model, groups)), torch.ones(groups.neurons, dtype=torch.bool)
    dense = measure_dense(groups, allowed)
    at_once = select_neurons(groups, scores, allowed, 0.25, scope=whole, dense=dense)
    left = torch.arange(groups.neurons)
    for part in (0.0, 0.3, 0.7, 1.0):
        alive = select_neurons(groups, scores[left], allowed[left], 0.25, scope=whole, part=part, dense=dense)
        groups, left = groups.without(alive), left[alive]
        for size, key in ((11, "0#0"), (7, "2#0"), (9, "4#0")):
            share = part * whole.get("*", whole.get(key[0], 0.25))
            now = dict(zip(groups.keys, (g.size for g in groups.prunable), strict=True))[key]
            assert abs((size - now) - share * size) <= 0.5 + 1e-9
    assert left.tolist() == at_once.nonzero().flatten().tolist()


# Floors


@pytest.mark.parametrize("of", ["neurons", "params", "macs"])
@pytest.mark.parametrize("scope", ["global", "layer", "sensitivity"])
@pytest.mark.parametrize(("round_to", "min_channels"), [(1, 3), (2, 3), (4, 1), (2, 4), (3, 5)])
def test_floors_hold_under_every_budget(round_to: int, min_channels: int, scope: str, of: str) -> None:
    floor = math.ceil(min_channels / round_to) * round_to
    options = {"of": of, "scope": scope, "round_to": round_to, "min_channels": min_channels}
    reached = 0
    for amount in (0.3, 0.8):
        model, x = build(resnet), inputs((3, 8, 8))
        before = count_cost(model, x)
        sizes = {g.name: g.size for g in find_groups(model, x).prunable}
        try:
            prune_neurons(model, x, amount, **options)
        except PruningError as error:
            assert f"can't be reached: with every group down to {floor}" in str(error)  # noqa: PT017
            continue
        reached += 1
        after = {g.name: g.size for g in find_groups(model, x).prunable}
        for name, size in sizes.items():
            assert after[name] >= min(floor, size)
            assert after[name] == size or after[name] % round_to == 0
        if of == "neurons":
            goal = round(amount * sum(sizes.values()))
            assert abs(sum(sizes.values()) - sum(after.values()) - goal) <= round_to / 2
        else:
            assert getattr(count_cost(model, x), of) <= (1 - amount) * getattr(before, of) * (1 + 1e-9)
    assert reached


def test_a_floor_is_reached_and_no_more() -> None:
    model, x = build(mlp(4, 10, 6, 3, 2)), inputs((4,))
    prune_neurons(model, x, (6 + 2) / 19, min_channels=4)
    assert widths(model, "0", "2", "4") == [4, 4, 3]  # a group that has fewer keeps them
    again = build(mlp(4, 10, 6, 3, 2))
    refused(again, x, r"with every group down to 4 neuron\(s\) 0.421 is gone", amount=9 / 19, min_channels=4)
    refused(again, x, "can't be reached: with every group down to 6", amount=0.5, min_channels=5, round_to=3)


# Sensitivity


def planted() -> nn.Module:
    """What ``b`` makes hardly matters: one more layer reads it and makes it small, with weights like all others."""
    layers = {"a": nn.Linear(4, 8), "b": nn.Linear(4, 8), "c": nn.Linear(8, 2), "d": nn.Linear(8, 2)}
    return Net(lambda n, x: n.c(n.a(x).tanh()) + 1e-4 * n.d(n.b(x).tanh()), **layers)


@pytest.mark.parametrize("criterion", ["l1", "lamp", "activation"])
@pytest.mark.parametrize(("of", "amount"), [("neurons", 7 / 16), ("params", 0.42), ("macs", 0.4)])
def test_neurons_that_do_not_matter_go_first(of: str, amount: float, criterion: str) -> None:
    model, x = build(planted), inputs((4,), 16)
    dense = copy.deepcopy(model)
    plan = prune_neurons(model, x, amount, of=of, scope="sensitivity", criterion=criterion)
    assert widths(model, "a", "b") == [8, 1]
    with torch.no_grad():
        assert float((model(x) - dense(x)).norm() / dense(x).norm()) < 1e-3
    assert_same_outputs(model, masked_twin(dense, plan.kept), x)
    other = build(planted)
    prune_neurons(other, x, amount, of=of, criterion=criterion)
    assert widths(other, "a")[0] < 8


def test_curves_are_the_damage_of_masking_by_hand() -> None:
    model, x = build(planted), inputs((4,), 16)
    groups = find_groups(model, x)
    scores, allowed = L1().score(model, groups), torch.ones(groups.neurons, dtype=torch.bool)
    allowed[8:] = False
    curves = damage_curves(model, groups, scores, allowed, groups.calls)
    assert list(curves) == ["a#0"]
    order, whole = torch.argsort(scores[:8]), model(x).detach()
    for gone in range(9):
        twin = copy.deepcopy(model)
        with torch.no_grad():
            for number in order[:gone]:
                twin.a.weight[number] = twin.a.bias[number] = 0
            damage = float((twin(x) - whole).square().sum() / whole.square().sum())
        assert float(curves["a#0"][gone]) == pytest.approx(damage, rel=1e-9, abs=1e-15)


def test_sensitivity_takes_as_much_damage_from_each() -> None:
    """The one that suffers twice as much per neuron loses half as many."""
    groups = find_groups(build(planted), inputs((4,)))
    curve = torch.linspace(0, 1, 9).double()
    allowed = torch.ones(16, dtype=torch.bool)
    alive = select_neurons(
        groups,
        torch.rand(16, dtype=torch.float64),
        allowed,
        9 / 16,
        scope="sensitivity",
        curves={"a#0": 2 * curve, "b#0": curve},
        dense=measure_dense(groups, allowed),
    )
    assert [int(part.sum()) for part in alive.split(8)] == [5, 2]


def test_sensitivity_prunes_what_a_removal_equals_masking_of() -> None:
    model, x = build(resnet), inputs((3, 8, 8), 4)
    dense = copy.deepcopy(model)
    plan = prune_neurons(model, x, 0.5, scope="sensitivity")
    assert_same_outputs(model, masked_twin(dense, plan.kept), x, modes=("train",))


# Latency, with MACs in the place of time


def fake_latencies(time: Callable[[nn.Module], float], calls: list[int] | None = None) -> Callable[..., list[float]]:
    def fake(models: Any, given: Any, *, seconds: float = 1.0) -> list[float]:
        if calls is not None:
            calls.append(len(models))
        return [time(model) for model in models]

    return fake


def image_macs(model: nn.Module) -> float:
    return float(count_cost(model, inputs(IMAGE)).macs)


def staircase(model: nn.Module) -> float:
    """A device that computes four channels at a time."""
    convs = [m.weight.shape for m in model.modules() if isinstance(m, nn.Conv2d)]
    return float(sum(math.ceil(out / 4) * math.ceil(into / 4) for out, into, *_ in convs)) + 1.0


def convs() -> nn.Module:
    layers = [nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 24, 3), nn.ReLU(), nn.Conv2d(24, 12, 1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(12, 2))


@pytest.mark.parametrize("amount", [0.05, 0.2, 0.5, 0.8])
@pytest.mark.parametrize(
    "options",
    [{}, {"scope": "layer"}, {"scope": "sensitivity"}, {"criterion": "lamp"}, {"criterion": "activation"}],
    ids=str,
)
def test_latency_is_reached_and_hardly_more(
    options: dict[str, Any], amount: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_prune.pruning.latency.latencies", fake_latencies(image_macs))
    model, x = build(convs), inputs(IMAGE)
    dense, before = copy.deepcopy(model), image_macs(model)
    plan = prune_neurons(model, x, amount, of="latency", **options)
    gone = 1 - image_macs(model) / before
    assert amount <= gone < amount + 1 / 64 + 0.05  # a step of the bisection, and a neuron
    assert_same_outputs(model, masked_twin(dense, plan.kept), x)


@pytest.mark.parametrize("amount", [0.1, 0.3, 0.5, 0.7])
def test_latency_is_reached_where_time_goes_in_steps(amount: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_prune.pruning.latency.latencies", fake_latencies(staircase))
    model = build(convs)
    before = staircase(model)
    prune_neurons(model, inputs(IMAGE), amount, of="latency")
    assert 1 - staircase(model) / before >= amount


def test_latency_keeps_floors_and_what_is_excluded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_prune.pruning.latency.latencies", fake_latencies(image_macs))
    model = build(convs)
    before = image_macs(model)
    prune_neurons(model, inputs(IMAGE), 0.4, of="latency", round_to=4, min_channels=6, exclude="4")
    assert widths(model, "4") == [12]
    assert all(width >= 8 and width % 4 == 0 for width in widths(model, "0", "2"))
    assert 1 - image_macs(model) / before >= 0.4


@pytest.mark.parametrize("optimizer", [None, torch.optim.Adam])
def test_a_latency_out_of_reach_says_what_can_be(optimizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A constant part that no removal saves."""
    model, x = build(convs), inputs(IMAGE)
    whole = image_macs(model)
    monkeypatch.setattr(
        "lightning_prune.pruning.latency.latencies", fake_latencies(lambda model: whole + image_macs(model))
    )
    given = None if optimizer is None else optimizer(model.parameters())
    message = r"amount=0.6 of the latency can't be reached: with as much removed as can be, 0.9\d of the MACs, 0.4\d of"
    refused(model, x, message, amount=0.6, of="latency", optimizer=given)
    prune_neurons(model, x, 0.4, of="latency")
    assert (whole + image_macs(model)) / (2 * whole) <= 0.6


def test_latency_of_a_smaller_model_that_is_slower_is_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_prune.pruning.latency.latencies", lambda *_, **__: [1.0, 1.5])
    refused(build(convs), inputs(IMAGE), r"0\.00 of the time is gone on this machine", amount=0.1, of="latency")


def test_copies_are_timed_beside_the_model_and_thrown_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is timed for an amount of zero; the model that is timed is the model, in evaluation mode or not."""
    calls: list[int] = []
    monkeypatch.setattr("lightning_prune.pruning.latency.latencies", fake_latencies(image_macs, calls))
    model, x = build(convs), inputs(IMAGE)
    snapshot = Snapshot(model)
    with pytest.warns(NoEffectWarning, match="amount=0 of the latency"):
        prune_neurons(model, x, 0.0, of="latency")
    assert calls == []
    snapshot.assert_unchanged()
    state = torch.get_rng_state()
    prune_neurons(model.train(), x, 0.5, of="latency")
    assert set(calls) == {2}
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)


def test_real_times_are_measured_in_evaluation_mode_without_a_trace() -> None:
    """The clock itself is not tested, only that measuring changes nothing."""
    seen: list[bool] = []
    model, x = build_case("resnet")
    handle = model.register_forward_hook(lambda module, *_: seen.append(module.training))
    snapshot, twin = Snapshot(model), copy.deepcopy(model)
    with latency.undisturbed(model):
        times = latency.latencies([model, twin], find_groups(model, x).calls, seconds=0.0)
    assert len(times) == 2
    assert min(times) > 0
    assert seen.count(False) >= 5
    snapshot.assert_unchanged()
    handle.remove()


def test_scores_below_zero_will_do() -> None:
    """Only their order counts where neurons are counted."""

    def signed(rows: Tensor) -> Tensor:
        return rows.sum(1) - 100 * rows.size(1)

    model, x = build(mlp(4, 11, 2)), inputs((4,))
    groups = find_groups(model, x)
    weight, bias, reader = model[0].weight.detach(), model[0].bias.detach(), model[2].weight.detach()
    order = torch.argsort(weight.sum(1) + bias + reader.sum(0))
    assert groups.neurons == 11
    for of, amount in (("neurons", 5 / 11), ("macs", 5 / 11 - 1e-6)):
        twin = copy.deepcopy(model)
        plan = prune_neurons(twin, x, amount, of=of, criterion=signed)
        assert plan.kept["0.weight"][0] == sorted(order[5:].tolist()), of
