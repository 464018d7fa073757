"""Repair: constants folded away, least squares against `torch.linalg.lstsq`, statistics against plain means."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from networks import (
    IMAGE,
    Net,
    Snapshot,
    assert_close,
    assert_same_outputs,
    build,
    build_case,
    forward,
    inputs,
    masked_twin,
    sequential,
)
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_prune import Plan, PruningError, find_groups, prune_neurons
from lightning_prune.graph.callsites import ModuleCall
from lightning_prune.pruning.neurons import remove_chosen
from lightning_prune.pruning.repair import RIDGE, Repair, add_to, recalibrate


def remove(
    model: nn.Module,
    x: Tensor,
    gone: Mapping[str, Sequence[int]],
    compensate: str | None = None,
    batches: Sequence[Tensor] | None = None,
) -> tuple[Plan, dict[str, Tensor]]:
    """Remove neurons by their group and number, and repair the model; what was added is given back."""
    groups = find_groups(model, x)
    alive = torch.ones(groups.neurons, dtype=torch.bool)
    for group, numbers in zip(groups.prunable, groups.ranges, strict=True):
        for number in gone.get(group.name, ()):
            alive[numbers.start + number] = False
    given = [calls(x) for x in batches] if batches is not None else [groups.calls]

    def repair(groups: Any, alive: Tensor) -> Repair:
        return Repair.of(model, groups, alive, given, compensate)

    plan, _, _, changes = remove_chosen(model, groups, lambda _: alive, repair=repair)
    assert plan
    add_to(model, changes)
    return plan, changes


def calls(*batches: Tensor) -> list[ModuleCall]:
    return [ModuleCall("", (batch,), {}) for batch in batches]


@torch.no_grad()
def plant(model: Any, path: str, numbers: Sequence[int]) -> None:
    """Zeros in the weights of some neurons: all they give is a constant."""
    layer = model.get_submodule(path)
    weight = layer.weight.movedim(1, 0) if isinstance(layer, nn.ConvTranspose2d) else layer.weight
    weight[list(numbers)] = 0


# Constants


def conv(*args: Any, **kwargs: Any) -> nn.Conv2d:
    return nn.Conv2d(*args, **kwargs)


FOLDED: dict[str, tuple[list[nn.Module], tuple[int, ...], set[str]]] = {
    "linear": ([nn.Linear(4, 8), nn.Sigmoid(), nn.Linear(8, 3)], (4,), {"2.bias"}),
    "linear over positions": ([nn.Linear(4, 8), nn.Sigmoid(), nn.Linear(8, 3)], (5, 4), {"2.bias"}),
    "linear with a norm": (
        [nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Sigmoid(), nn.Linear(8, 3)], (4,), {"3.bias"}),
    "linear without bias before a norm": (
        [nn.Linear(4, 8), nn.Sigmoid(), nn.Linear(8, 3, bias=False), nn.BatchNorm1d(3)], (4,), {"3.running_mean"}),
    "conv": ([conv(3, 8, 3), nn.Sigmoid(), conv(8, 2, 2)], IMAGE, {"2.bias"}),
    "conv with stride and dilation": (
        [conv(3, 8, 1), nn.Sigmoid(), conv(8, 2, 2, stride=2, dilation=2)], IMAGE, {"2.bias"}),
    "conv without bias before a norm": (
        [conv(3, 8, 3), nn.Sigmoid(), conv(8, 4, 2, bias=False), nn.BatchNorm2d(4), nn.Sigmoid(), conv(4, 2, 1)],
        IMAGE, {"3.running_mean"}),
    "conv behind a norm": (
        [conv(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.Sigmoid(), conv(8, 4, 1), nn.BatchNorm2d(4)], IMAGE, {"3.bias"}),
    "replicate": ([conv(3, 8, 3), nn.Sigmoid(), conv(8, 2, 3, padding=1, padding_mode="replicate")], IMAGE, {"2.bias"}),
    "circular": ([conv(3, 8, 3), nn.Tanh(), conv(8, 2, 3, padding=1, padding_mode="circular")], IMAGE, {"2.bias"}),
    "reflect": (
        [conv(3, 8, 3), nn.Tanh(), conv(8, 2, 3, padding="same", padding_mode="reflect")], IMAGE, {"2.bias"}),
    "conv1d": ([nn.Conv1d(3, 8, 2), nn.Sigmoid(), nn.Conv1d(8, 2, 3, bias=True)], (3, 7), {"2.bias"}),
    "conv3d": ([nn.Conv3d(3, 8, 1), nn.Sigmoid(), nn.Conv3d(8, 2, 2)], (3, 3, 3, 3), {"2.bias"}),
    "flatten": ([conv(3, 8, 3), nn.Sigmoid(), nn.Flatten(), nn.Linear(72, 2)], IMAGE, {"3.bias"}),
    "pooling": ([conv(3, 8, 2), nn.Sigmoid(), nn.MaxPool2d(2), conv(8, 2, 2)], IMAGE, {"3.bias"}),
    "dropout": ([nn.Linear(4, 8), nn.Sigmoid(), nn.Dropout(0.5), nn.Linear(8, 3)], (4,), {"3.bias"}),
}  # fmt: skip


@pytest.mark.parametrize("name", FOLDED)
def test_constants_are_folded_away(name: str) -> None:
    """The pruned model gives what the model gave, not what the masked one gives."""
    layers, shape, changed = FOLDED[name]
    model, x = build(sequential(*layers)).eval(), inputs(shape, 3)
    plant(model, "0", [1, 4, 6])
    dense = copy.deepcopy(model)
    plan, changes = remove(model, x, {"0": [1, 4, 6]})
    assert model[0].weight.size(0) == 5
    assert set(changes) == changed
    for batch in (x, inputs(shape, 4, 1)):
        assert_close(forward(model, batch), forward(dense, batch))
    with pytest.raises(AssertionError):
        assert_same_outputs(model, masked_twin(dense, plan.kept), x)


@pytest.mark.parametrize("name", FOLDED)
def test_neurons_that_are_no_constants_are_not_folded(name: str) -> None:
    layers, shape, _ = FOLDED[name]
    model, x = build(sequential(*layers)).eval(), inputs(shape, 3)
    dense = copy.deepcopy(model)
    plan, changes = remove(model, x, {"0": [1, 4, 6]})
    assert changes == {}
    assert_same_outputs(model, masked_twin(dense, plan.kept), x)


def test_only_the_constants_among_those_that_go_are_folded() -> None:
    model, x = build(sequential(nn.Linear(4, 8), nn.Sigmoid(), nn.Linear(8, 3))), inputs((4,), 3)
    plant(model, "0", [1, 4])  # 4 stays
    dense = copy.deepcopy(model)
    remove(model, x, {"0": [1, 2, 6]})
    twin = copy.deepcopy(dense)
    with torch.no_grad():
        twin[2].weight[:, [2, 6]] = 0  # the others are masked behind the sigmoid: what a removal does
    assert_close(forward(model, x), forward(twin, x))


def test_constants_that_rounding_tells_apart_are_folded_too() -> None:
    """Softplus, ELU and Mish give others in the last place for the last rows, which no vector instruction takes."""
    place = 1 + torch.finfo(torch.float64).eps * (torch.arange(5) % 2).double()[:, None]
    run = lambda n, x: n.b(n.a(x).sigmoid() * place)  # noqa: E731
    model, x = build(lambda: Net(run, a=nn.Linear(4, 8), b=nn.Linear(8, 3))), inputs((4,), 5)
    plant(model, "a", [1, 4])
    before = forward(model, x)
    remove(model, x, {"a": [1, 4]})
    assert_close(forward(model, x), before)


def test_one_example_does_not_make_a_constant() -> None:
    """A single position has no variance; only zeros in the weights tell."""
    model, x = build(sequential(nn.Linear(4, 8), nn.Sigmoid(), nn.Linear(8, 3))), inputs((4,), 1)
    assert remove(model, x, {"0": [1, 4]})[1] == {}


ZERO_PADDED: dict[str, list[nn.Module]] = {
    "zeros": [conv(3, 8, 3), nn.Sigmoid(), conv(8, 2, 3, padding=1)],
    "same": [conv(3, 8, 3), nn.Sigmoid(), conv(8, 2, 3, padding="same")],
    "a layer of its own": [conv(3, 8, 3), nn.Sigmoid(), nn.ZeroPad2d(1), conv(8, 2, 3)],
    "no bias and no norm": [conv(3, 8, 3), nn.Sigmoid(), conv(8, 2, 3, bias=False)],
    "no bias and the norm later": [conv(3, 8, 3), nn.Sigmoid(), conv(8, 2, 3, bias=False), nn.Tanh(), nn.BatchNorm2d(2)],
    "a norm without statistics": [
        conv(3, 8, 3), nn.Sigmoid(), conv(8, 2, 2, bias=False), nn.BatchNorm2d(2, track_running_stats=False)],
    "grouped": [conv(3, 8, 3), nn.Sigmoid(), conv(8, 4, 2, groups=4), nn.ReLU(), conv(4, 2, 1)],
    "transposed": [conv(3, 8, 3), nn.Sigmoid(), nn.ConvTranspose2d(8, 2, 2)],
}  # fmt: skip


@pytest.mark.parametrize("name", ZERO_PADDED)
def test_where_nothing_can_take_a_constant_removal_equals_masking(name: str) -> None:
    model, x = build(sequential(*ZERO_PADDED[name])).eval(), inputs(IMAGE, 3)
    gone = [0, 1] if name == "grouped" else [1, 4]
    plant(model, "0", range(4) if name == "grouped" else gone)
    if name == "grouped":
        plant(model, "2", [0, 1])
    dense = copy.deepcopy(model)
    plan, changes = remove(model, x, {find_groups(model, x).prunable[0].name: gone})
    assert name == "grouped" or changes == {}
    if not changes:
        assert_same_outputs(model, masked_twin(dense, plan.kept), x)
    else:
        assert_close(forward(model, x), forward(dense, x))


def test_zero_padding_around_a_neuron_that_is_zero_matters_not() -> None:
    """ReLU of a negative bias: nothing to make up for."""
    model, x = build(sequential(conv(3, 8, 3), nn.ReLU(), conv(8, 2, 3, padding=1))), inputs(IMAGE, 3)
    plant(model, "0", [1, 4])
    with torch.no_grad():
        model[0].bias[[1, 4]] = -0.5
    dense = copy.deepcopy(model)
    remove(model, x, {"0": [1, 4]})
    assert_close(forward(model, x), forward(dense, x))


def test_every_layer_that_reads_a_constant_takes_it() -> None:
    layers = {"a": nn.Linear(4, 8), "b": nn.Linear(8, 3), "c": nn.Linear(8, 6), "d": nn.Linear(6, 3)}
    model = build(lambda: Net(lambda n, x: n.b(h := n.a(x).sigmoid()) + n.d(n.c(h).tanh()), **layers))
    plant(model, "a", [0, 7])
    dense, x = copy.deepcopy(model), inputs((4,), 3)
    _, changes = remove(model, x, {"a": [0, 7], "c": [2]})
    assert set(changes) == {"b.bias", "c.bias"}
    assert len(changes["c.bias"]) == 5  # a row of its own is gone too
    with torch.no_grad():
        dense.d.weight[:, 2] = 0
    assert_close(forward(model, x), forward(dense, x))


def test_constants_are_folded_by_prune_neurons_itself() -> None:
    model, x = build(sequential(nn.Linear(4, 8), nn.Sigmoid(), nn.Linear(8, 3))), inputs((4,), 3)
    plant(model, "0", [1, 4])
    with torch.no_grad():
        model[2].weight[:, [1, 4]] *= 0.01
    before = forward(model, x)
    assert prune_neurons(model, x, 0.25).kept["0.weight"][0] == [0, 2, 3, 5, 6, 7]
    assert_close(forward(model, x), before)


def test_a_layer_that_runs_several_times_takes_it_once() -> None:
    def run(n: Any, x: Tensor) -> Tensor:
        return n.b(n.a(x).sigmoid()) - n.b(n.a(-x).sigmoid()).tanh()

    model, x = build(lambda: Net(run, a=nn.Linear(4, 8), b=nn.Linear(8, 3))), inputs((4,), 3)
    plant(model, "a", [2, 3])
    before = forward(model, x)
    assert set(remove(model, x, {"a": [2, 3]})[1]) == {"b.bias"}
    assert_close(forward(model, x), before)


def test_a_neuron_that_is_a_constant_in_one_run_only_is_none() -> None:
    """The same layer reads it behind a sigmoid and behind another number."""
    run = lambda n, x: n.b(n.a(x).sigmoid()) + n.b(n.a(x).tanh())  # noqa: E731
    model, x = build(lambda: Net(run, a=nn.Linear(4, 8), b=nn.Linear(8, 3))), inputs((4,), 3)
    plant(model, "a", [2, 3])
    dense = copy.deepcopy(model)
    plan, changes = remove(model, x, {"a": [2, 3]})
    assert changes == {} or float(changes["b.bias"].abs().max()) == 0
    assert_same_outputs(model, masked_twin(dense, plan.kept), x)


def test_a_norm_that_two_layers_share_is_not_spoiled() -> None:
    """Its mean is that of both: a shift for the one would move the other."""
    layers = {"a": conv(3, 8, 1), "e": conv(3, 6, 1), "norm": nn.BatchNorm2d(4)}
    layers |= {"b": conv(8, 4, 1, bias=False), "c": conv(6, 4, 1, bias=False)}
    run = lambda n, x: torch.cat([n.norm(n.b(n.a(x).sigmoid())), n.norm(n.c(n.e(x).sigmoid()))], 1)  # noqa: E731
    model, x = build(lambda: Net(run, **layers)).eval(), inputs(IMAGE, 3)
    plant(model, "a", [2, 3])
    (before,) = forward(model, x)
    remove(model, x, {"a": [2, 3]})
    (after,) = forward(model, x)
    assert_close([after[:, 4:]], [before[:, 4:]])


def test_a_layer_that_two_norms_follow_is_right_behind_both() -> None:
    """As in detectors: the heads of all sizes share convolutions, each has norms of its own."""
    layers = {"a": conv(3, 8, 1), "b": conv(8, 4, 1, bias=False), "n": nn.BatchNorm2d(4), "m": nn.BatchNorm2d(4)}
    run = lambda n, x: n.n(n.b(n.a(x).sigmoid())) + n.m(n.b(n.a(-x).sigmoid())).tanh()  # noqa: E731
    model, x = build(lambda: Net(run, **layers)).eval(), inputs(IMAGE, 3)
    plant(model, "a", [2, 3])
    before = forward(model, x)
    remove(model, x, {"a": [2, 3]})
    assert_close(forward(model, x), before)


def test_an_output_that_a_norm_and_something_else_read_stays_within_the_masked_one() -> None:
    run = lambda n, x: n.norm(h := n.b(n.a(x).sigmoid())) + h  # noqa: E731
    layers = {"a": conv(3, 8, 1), "b": conv(8, 4, 1, bias=False), "norm": nn.BatchNorm2d(4)}
    model, x = build(lambda: Net(run, **layers)).eval(), inputs(IMAGE, 3)
    plant(model, "a", [2, 3])
    dense = copy.deepcopy(model)
    remove(model, x, {"a": [2, 3]})
    twin = copy.deepcopy(dense)
    with torch.no_grad():
        shift = (dense.b.weight.flatten(1) * dense.a.bias.sigmoid())[:, [2, 3]].sum(1)
        h = dense.b(dense.a(x).sigmoid())
        expected = twin.norm(h) + h - shift.view(1, -1, 1, 1)
    assert_close(forward(model, x), [expected])


# Least squares


def design(layer: Any, x: Tensor) -> Tensor:
    """What each weight of a layer adds to one output of it, for every example and position: a column per weight."""
    columns = []
    for index in itertools.product(*map(range, layer.weight.shape[1:])):
        basis = torch.zeros_like(layer.weight[:1])
        basis[(0, *index)] = 1
        if isinstance(layer, nn.Linear):
            columns.append(F.linear(x, basis).flatten())
        else:
            columns.append(layer._conv_forward(x, basis, None).flatten())
    return torch.stack(columns, 1)


@torch.no_grad()
def solved(layer: Any, x: Tensor, kept: Sequence[int], ridge: float = RIDGE) -> tuple[Tensor, Tensor | None]:
    """The weights and bias that give on ``x``, with the inputs that are kept, what the layer gives with all."""
    whole = design(layer, x)
    size = whole.size(1) // layer.weight.size(1)
    here = [i * size + j for i in kept for j in range(size)]
    gone = sorted(set(range(whole.size(1))) - set(here))
    weights = layer.weight.flatten(1)
    left = whole[:, here]
    if layer.bias is not None:
        left = torch.cat([left, torch.ones(len(left), 1).double()], 1)
    target = whole[:, gone] @ weights[:, gone].T
    # The penalty is of the mean of squares over all columns, the bias's among them (its column is zero without one).
    count = len(here) + 1
    strength = (ridge * float(left.square().sum()) / count) ** 0.5
    eye = strength * torch.eye(left.size(1), dtype=torch.float64)
    more = torch.linalg.lstsq(
        torch.cat([left, eye]), torch.cat([target, torch.zeros(len(eye), target.size(1)).double()]), driver="gelsd"
    ).solution
    weight = (weights[:, here] + more[: len(here)].T).view(-1, len(kept), *layer.weight.shape[2:])
    return weight, None if layer.bias is None else layer.bias + more[-1]


READERS: dict[str, tuple[nn.Module, nn.Module, tuple[int, ...]]] = {
    "linear": (nn.Linear(4, 8), nn.Linear(8, 3), (4,)),
    "linear without bias": (nn.Linear(4, 8), nn.Linear(8, 3, bias=False), (4,)),
    "linear over positions": (nn.Linear(4, 8), nn.Linear(8, 3), (3, 4)),
    "conv": (conv(3, 8, 1), conv(8, 2, 2), IMAGE),
    "without bias": (conv(3, 8, 1), conv(8, 2, 2, bias=False), IMAGE),
    "stride": (conv(3, 8, 1), conv(8, 2, 2, stride=2), IMAGE),
    "dilation": (conv(3, 8, 1), conv(8, 2, (2, 1), dilation=(2, 1)), IMAGE),
    "padding": (conv(3, 8, 1), conv(8, 2, 3, padding=(1, 2)), IMAGE),
    "same": (conv(3, 8, 1), conv(8, 2, (3, 1), padding="same"), IMAGE),
    "everything": (conv(3, 8, 1), conv(8, 2, (3, 2), (2, 1), (2, 1), (2, 1)), IMAGE),
    "replicate": (conv(3, 8, 1), conv(8, 2, (3, 1), padding=(1, 0), padding_mode="replicate"), IMAGE),
    "reflect": (conv(3, 8, 1), conv(8, 2, (1, 3), padding=(0, 2), padding_mode="reflect"), IMAGE),
    "circular": (conv(3, 8, 1), conv(8, 2, 3, stride=2, padding=1, padding_mode="circular"), IMAGE),
    "conv1d": (nn.Conv1d(3, 8, 1), nn.Conv1d(8, 2, 3, dilation=2, padding=1), (3, 7)),
    "conv3d": (nn.Conv3d(3, 8, 1), nn.Conv3d(8, 2, (2, 1, 2), padding=(1, 0, 0)), (3, 3, 2, 3)),
}


def squared_error(model: nn.Module, dense: nn.Module, x: Tensor) -> float:
    return float((forward(model, x)[0] - forward(dense, x)[0]).square().sum())


@pytest.mark.parametrize("name", READERS)
def test_least_squares_is_that_of_lstsq(name: str) -> None:
    first, reader, shape = READERS[name]
    model, x = build(sequential(first, nn.Tanh(), reader)), inputs(shape, 12)
    dense, plain = copy.deepcopy(model), copy.deepcopy(model)
    kept = [0, 2, 3, 5, 7]
    weight, bias = solved(dense[2], dense[1](dense[0](x)).detach(), kept)
    remove(model, x, {"0": [1, 4, 6]}, "least_squares")
    torch.testing.assert_close(model[2].weight.detach(), weight, rtol=1e-7, atol=1e-9)
    if bias is not None:
        torch.testing.assert_close(model[2].bias.detach(), bias.detach(), rtol=1e-7, atol=1e-9)
    remove(plain, x, {"0": [1, 4, 6]})
    best = copy.deepcopy(plain)
    weight, bias = solved(dense[2], dense[1](dense[0](x)).detach(), kept, ridge=1e-12)
    with torch.no_grad():
        best[2].weight.copy_(weight)
        if bias is not None:
            best[2].bias.copy_(bias)
    without, ours, least = (squared_error(m, dense, x) for m in (plain, model, best))
    assert least <= ours * (1 + 1e-6)
    assert ours < without
    assert ours <= least + 0.05 * without  # the penalty costs little


def test_several_batches_are_one() -> None:
    first, reader, shape = READERS["padding"]
    models = [build(sequential(first, nn.Tanh(), reader)) for _ in range(2)]
    batches = [inputs(shape, batch, seed) for seed, batch in enumerate((1, 5, 2))]
    remove(models[0], batches[0], {"0": [1, 4, 6]}, "least_squares", batches)
    remove(models[1], batches[0], {"0": [1, 4, 6]}, "least_squares", [torch.cat(batches)])
    assert_close([*models[0].parameters()], [*models[1].parameters()], 1e-8)


@pytest.mark.parametrize("name", ["mlp", "flatten", "global_mean", "linear_over_space", "linear_3d_input", "recurrent"])
@pytest.mark.parametrize("amount", [0.2, 0.5, 0.8])
def test_the_error_on_the_batch_is_never_larger_than_without(name: str, amount: float) -> None:
    """One group at a time, whose reader gives the output."""
    dense, x = build_case(name)
    x = inputs(tuple(x.shape[1:]), 8)
    last = {"mlp": "2", "linear_3d_input": "2", "linear_over_space": "b"}.get(name)
    last = last or find_groups(dense, x).prunable[-1].name
    readers = [s.name for g in find_groups(dense, x).prunable if g.name == last for s in g.slices if s.role == "reads"]
    pruned = []
    for compensate in (None, "least_squares"):
        model = copy.deepcopy(dense)
        prune_neurons(model, x, amount, include=None if name == "recurrent" else last, compensate=compensate)
        pruned.append(model)
    plain, repaired = (squared_error(m, dense, x) for m in pruned)
    assert readers
    if name != "recurrent":  # there, layers inside are made up for one by one
        assert repaired < plain


def test_every_layer_that_loses_inputs_is_solved_for() -> None:
    """By the inputs that the whole model gave it; its own lost rows aside."""
    layers = {"a": nn.Linear(4, 8), "b": nn.Linear(8, 6), "c": nn.Linear(6, 3), "d": nn.Linear(8, 3)}
    model = build(lambda: Net(lambda n, x: n.c(n.b(h := n.a(x).tanh()).tanh()) + n.d(h), **layers))
    dense, x = copy.deepcopy(model), inputs((4,), 20)
    _, changes = remove(model, x, {"a": [0, 3], "b": [1]}, "least_squares")
    assert set(changes) == {f"{name}.{kind}" for name in "bcd" for kind in ("weight", "bias")}
    with torch.no_grad():
        h = dense.a(x).tanh()
        left, rows = [1, 2, 4, 5, 6, 7], [0, 2, 3, 4, 5]
        expected = {"b": solved(dense.b, h, left), "d": solved(dense.d, h, left)}
        expected["c"] = solved(dense.c, dense.b(h).tanh(), rows)
    for name, (weight, bias) in expected.items():
        layer = model.get_submodule(name)
        own = rows if name == "b" else slice(None)
        assert bias is not None
        torch.testing.assert_close(layer.weight.detach(), weight[own], rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(layer.bias.detach(), bias[own].detach(), rtol=1e-7, atol=1e-9)
    for name in ("a",):
        assert torch.equal(model.a.weight, dense.a.weight[left]), name


def test_layers_that_lose_nothing_are_left_alone() -> None:
    model, x = (
        build(sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 2))),
        inputs((4,), 9),
    )
    dense = copy.deepcopy(model)
    assert set(remove(model, x, {"0": [5]}, "least_squares")[1]) == {"2.weight", "2.bias"}
    for ours, theirs in zip(model[4].parameters(), dense[4].parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", ["linear", "linear without bias", "conv", "padding", "stride", "circular"])
def test_a_copy_of_a_neuron_that_stays_costs_nothing(name: str) -> None:
    first, reader, shape = READERS[name]
    model, x = build(sequential(first, nn.Tanh(), reader)), inputs(shape, 64)
    with torch.no_grad():
        for gone, stays in ((1, 0), (6, 3)):
            for tensor in (model[0].weight, model[0].bias):
                tensor[gone] = tensor[stays]
    dense, plain = copy.deepcopy(model), copy.deepcopy(model)
    remove(model, x, {"0": [1, 6]}, "least_squares")
    remove(plain, x, {"0": [1, 6]})
    for batch in (x, inputs(shape, 16, 5)):
        size = float(forward(dense, batch)[0].square().sum())
        assert (squared_error(plain, dense, batch) / size) ** 0.5 > 0.1
        assert (squared_error(model, dense, batch) / size) ** 0.5 < 1e-2  # the ridge keeps it from being exact


def test_a_tied_weight_is_solved_for_once() -> None:
    """The same parameter in two layers: what is added must be added once, and to neither more than helps both."""
    dense, x = build_case("tied_square")
    pruned = []
    for compensate in (None, "least_squares"):
        model = copy.deepcopy(dense)
        prune_neurons(model, x := inputs((4,), 32), 0.35, compensate=compensate)
        pruned.append(model)
    assert pruned[1][4].weight is pruned[1][2].weight
    plain, repaired = (squared_error(m, dense, x) for m in pruned)
    assert repaired < plain


def test_inputs_that_are_too_large_to_be_squared_are_left_alone() -> None:
    model = build(lambda: Net(lambda n, x: n.b(1e200 * n.a(x).tanh()), a=nn.Linear(4, 8), b=nn.Linear(8, 3)))
    dense, x = copy.deepcopy(model), inputs((4,), 6)
    with pytest.warns(UserWarning, match="the inputs of b are not finite: its weights are not compensated"):
        plan, changes = remove(model, x, {"a": [1, 4]}, "least_squares")
    assert changes == {}
    assert torch.equal(model.b.weight, dense.b.weight[:, plan.kept["a.weight"][0]])
    assert torch.equal(model.b.bias, dense.b.bias)


def test_inputs_that_are_infinite_are_left_alone() -> None:
    def run(n: Any, x: Tensor) -> Tensor:
        return n.c(n.a(x).tanh()) + n.b(n.a(x) / 0).nan_to_num(0, 0, 0)

    layers = {"a": nn.Linear(4, 8), "b": nn.Linear(8, 3), "c": nn.Linear(8, 3)}
    model, x = build(lambda: Net(run, **layers)), inputs((4,), 6)
    b = copy.deepcopy(model.b)
    with pytest.warns(UserWarning, match="the inputs of b are not finite"):
        _, changes = remove(model, x, {"a": [1, 4]}, "least_squares")
    assert set(changes) == {"c.weight", "c.bias"}
    assert torch.equal(model.b.weight, b.weight[:, [0, 2, 3, 5, 6, 7]])


def test_inputs_of_nothing_but_zeros_change_nothing() -> None:
    run = lambda n, x: n.b(0 * n.a(x))  # noqa: E731
    model = build(lambda: Net(run, a=nn.Linear(4, 8), b=nn.Linear(8, 3, bias=False)))
    assert remove(model, inputs((4,)), {"a": [1]}, "least_squares")[1] == {}


@pytest.mark.parametrize("wrong", ["lstsq", "", 3, True, ["least_squares"]])
def test_unknown_ways_to_compensate_are_refused(wrong: Any) -> None:
    model, x = build_case("mlp")
    snapshot = Snapshot(model)
    with pytest.raises(PruningError, match="compensate must be one of 'least_squares', got"):
        prune_neurons(model, x, 0.5, compensate=wrong)
    snapshot.assert_unchanged()


@pytest.mark.parametrize("compensate", [None, "least_squares"])
def test_noting_what_the_model_does_leaves_no_trace(compensate: str | None) -> None:
    model, x = build(sequential(conv(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.3), conv(8, 2, 1))), inputs(IMAGE, 3)
    plant(model.train(), "0", [1])
    groups = find_groups(model, x)
    alive = torch.ones(8, dtype=torch.bool)
    alive[1] = False
    snapshot = Snapshot(model)
    assert set(Repair.of(model, groups, alive, [groups.calls], compensate).readers) == {"3"}
    snapshot.assert_unchanged()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_changes_keep_the_optimizer_and_half_precision() -> None:
    model, x = build(sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))).bfloat16(), inputs((4,), 9).bfloat16()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    assert prune_neurons(model, x, 0.5, compensate="least_squares", optimizer=optimizer)
    assert model[2].weight.dtype is model[2].bias.dtype is torch.bfloat16
    assert optimizer.param_groups[0]["params"][2] is model[2].weight


# Statistics


def batch_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance of each channel, by hand."""
    values = x.movedim(1, 0).flatten(1)
    mean = values.mean(1)
    return mean, (values - mean[:, None]).square().sum(1) / (values.size(1) - 1)


def normed(x: Tensor, norm: Any) -> Tensor:
    mean, variance = batch_statistics(x)
    count = x.numel() / x.size(1)
    shape = (1, -1, *[1] * (x.dim() - 2))
    scale = norm.weight / (variance * (count - 1) / count + norm.eps).sqrt()
    return (x - mean.view(shape)) * scale.view(shape) + norm.bias.view(shape)


def normed_net(momentum: float | None = 0.1) -> nn.Module:
    layers = [conv(3, 6, 3), nn.BatchNorm2d(6, momentum=momentum), nn.ReLU(), conv(6, 4, 2), nn.Dropout(0.5)]
    return nn.Sequential(*layers, nn.BatchNorm2d(4, momentum=momentum), nn.Flatten(), nn.Linear(16, 2))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0, None])
def test_statistics_are_plain_means_over_batches(momentum: float | None, training: bool) -> None:
    model = build(lambda: normed_net(momentum)).train(training)
    batches = [inputs(IMAGE, batch, seed) for seed, batch in enumerate((2, 5, 3))]
    expected: list[list[tuple[Tensor, Tensor]]] = [[], []]
    with torch.no_grad():
        for x in batches:
            first = model[0](x)
            second = model[3](normed(first, model[1]).relu())
            for found, h in zip(expected, (first, second), strict=True):
                found.append(batch_statistics(h))
    counted = [model[i].num_batches_tracked.clone() for i in (1, 5)]
    recalibrate(model, [calls(batch) for batch in batches])
    for norm, told in zip((model[1], model[5]), expected, strict=True):
        means, variances = (torch.stack(each).mean(0) for each in zip(*told, strict=True))
        torch.testing.assert_close(norm.running_mean, means, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(norm.running_var, variances, rtol=1e-10, atol=1e-12)
        assert norm.momentum == momentum
    assert all(torch.equal(model[i].num_batches_tracked, n) for i, n in zip((1, 5), counted, strict=True))
    assert all(module.training is training for module in model.modules())


def test_recalibration_changes_nothing_else() -> None:
    model = build(normed_net).train()
    statistics = {norm: (norm.running_mean, norm.running_var) for norm in (model[1], model[5])}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    recalibrate(model, [calls(inputs(IMAGE, 4))])
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {f"{i}.running_{kind}" for i in (1, 5) for kind in ("mean", "var")}
    assert torch.equal(torch.get_rng_state(), state)
    assert all(norm.running_mean is mean and norm.running_var is var for norm, (mean, var) in statistics.items())


def test_frozen_statistics_stay_while_the_model_trains() -> None:
    model, x = build(normed_net).train(), inputs(IMAGE, 4)
    model[1].eval()
    before = copy.deepcopy(model)
    recalibrate(model, [calls(x)])
    assert torch.equal(model[1].running_mean, before[1].running_mean)
    assert torch.equal(model[1].running_var, before[1].running_var)
    assert [model[i].training for i in (1, 5)] == [False, True]
    with torch.no_grad():
        mean, variance = batch_statistics(before[3](before[2](before[1](before[0](x)))))
    torch.testing.assert_close(model[5].running_mean, mean, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(model[5].running_var, variance, rtol=1e-10, atol=1e-12)


def test_layers_that_no_batch_reaches_keep_their_statistics() -> None:
    def run(n: Any, x: Tensor, aside: bool = False) -> Tensor:
        return n.norm(n.a(x)) if not aside else n.other(n.a(x))

    layers = {"a": nn.Linear(4, 6), "norm": nn.BatchNorm1d(6), "other": nn.BatchNorm1d(6)}
    layers |= {"none": nn.BatchNorm1d(6, track_running_stats=False)}
    model, x = build(lambda: Net(run, **layers)).train(), inputs((4,), 5)
    before = copy.deepcopy(model)
    recalibrate(model, [calls(x)])
    assert torch.equal(model.other.running_mean, before.other.running_mean)
    assert torch.equal(model.other.running_var, before.other.running_var)
    assert model.other.num_batches_tracked == before.other.num_batches_tracked
    torch.testing.assert_close(model.norm.running_mean, model.a(x).mean(0).detach(), rtol=1e-10, atol=1e-12)
    assert model.none.running_mean is None


def test_a_layer_that_runs_twice_has_the_mean_of_both() -> None:
    model = build(
        lambda: Net(lambda n, x: n.norm(n.a(x)) + n.norm(-2 * n.a(x)), a=nn.Linear(4, 6), norm=nn.BatchNorm1d(6))
    )
    x = inputs((4,), 5)
    recalibrate(model, [calls(x)])
    mean, variance = batch_statistics(model.a(x).detach())
    torch.testing.assert_close(model.norm.running_mean, -mean / 2, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(model.norm.running_var, variance * 5 / 2, rtol=1e-10, atol=1e-12)


def test_what_a_batch_cannot_be_run_for_leaves_everything() -> None:
    model, x = build(normed_net).train(), inputs(IMAGE, 4)
    snapshot = Snapshot(model)
    with pytest.raises(RuntimeError):
        recalibrate(model, [calls(x), calls(inputs((4, 5, 5), 4))])
    snapshot.assert_unchanged()
    recalibrate(model, [])
    recalibrate(model, [[ModuleCall("", (x,), {}, repeatable=False)]])
    snapshot.assert_unchanged()


def test_processes_have_one_mean() -> None:
    model, x = build(normed_net).train(), inputs(IMAGE, 4)
    twin = copy.deepcopy(model)
    recalibrate(model, [calls(x)])
    recalibrate(twin, [calls(x)], reduce=lambda value: 3 * value)
    for i in (1, 5):
        torch.testing.assert_close(twin[i].running_mean, 3 * model[i].running_mean)
        torch.testing.assert_close(twin[i].running_var, 3 * model[i].running_var)
