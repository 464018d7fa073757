import copy
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from constructs import CONSTRUCTS
from hypothesis import given
from hypothesis import strategies as st
from networks import (
    CASES,
    IMAGE,
    Auxiliary,
    Net,
    Tied,
    as_lists,
    assert_same_outputs,
    build,
    build_case,
    cases,
    inputs,
    masked_twin,
    n_params,
    networks,
    sequential,
)
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_prune import Plan, PruningError, count_cost, find_groups, prune_neurons
from lightning_prune.graph.callsites import installed_patches
from lightning_prune.graph.groups import Extent, Group, Groups
from lightning_prune.graph.rules import Call, rule
from lightning_prune.pruning.neurons import remove_neurons


def describe(group: Group) -> tuple[Any, ...]:
    slices = sorted((s.name, s.dim, s.role, s.index.tolist()) for s in group.slices)
    return group.name, group.size, group.frozen, group.mixing, slices


def as_units(table: Mapping[Any, Extent]) -> dict[Any, list[int]]:
    """The neurons along dimensions."""
    return {key: extent.unit_of.tolist() for key, extent in table.items()}


def written(groups: Groups, alive: Tensor, model: nn.Module) -> dict[Any, int]:
    """Sizes in calls and attributes.

    One of nothing counts nothing; those of torch's attention follow from its weights; one that a patch leaves to torch
    (-1) is not written any more.
    """
    inferred = {(patch.site, patch.dim) for patch in installed_patches(model) if patch.size == -1}
    own = {path for path, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)}
    sizes = {(site, dim): size for site, dims in groups.sizes(alive).items() for dim, size in dims.items()}
    sizes |= {(site, 0): size for site, size in groups.numbers(alive).items()}
    return {
        (site, dim): size
        for (site, dim), size in sizes.items()
        if size and site.module not in own and (site, dim) not in inferred
    }


def random_alive(groups: Groups, seed: int, least: int = 2) -> Tensor:
    """A random mask that leaves each group a few neurons."""
    generator = torch.Generator().manual_seed(seed)
    alive = torch.rand(groups.neurons, generator=generator) < 0.5
    for numbers in groups.ranges:
        order = torch.randperm(len(numbers), generator=generator)[:least]
        alive[order + numbers.start] = True
    return alive


def assert_same_groups(ours: Groups, fresh: Groups, model: nn.Module) -> None:
    """Everything that a new trace finds in the pruned model, the old groups tell without one."""
    assert [describe(g) for g in ours.prunable] == [describe(g) for g in fresh.prunable]
    assert sorted(map(describe, ours.frozen)) == sorted(map(describe, fresh.frozen))
    assert ours.shapes == fresh.shapes
    assert ours.parameters == fresh.parameters
    for table, other in ((ours.extents, fresh.extents), (ours.constants, fresh.constants)):
        assert as_units(table) == as_units(other)
    for alive in (torch.ones(fresh.neurons, dtype=torch.bool), random_alive(fresh, 1, 1)):
        assert ours.macs(alive) == fresh.macs(alive)
        assert ours.params(alive) == fresh.params(alive)
        assert as_lists(ours.kept(alive)) == as_lists(fresh.kept(alive))
        assert written(ours, alive, model) == written(fresh, alive, model)
        assert ours.counts(alive) == fresh.counts(alive)


@pytest.mark.parametrize("seed", range(2))
@cases(CASES)
def test_groups_after_a_removal_are_those_that_a_new_trace_finds(name: str, seed: int) -> None:
    model, x = build_case(name)
    groups = find_groups(model, x)
    for number in range(2):
        alive = random_alive(groups, 10 * seed + number)
        remove_neurons(model, groups, alive)
        groups = groups.without(alive)
        assert_same_groups(groups, find_groups(model, x), model)


@given(networks(), st.integers(0, 10**6))
def test_the_same_for_random_networks(drawn: tuple[nn.Module, tuple[int, ...]], seed: int) -> None:
    model, shape = drawn
    x = inputs(shape)
    groups = find_groups(model, x)
    alive = random_alive(groups, seed)
    remove_neurons(model, groups, alive)
    assert_same_groups(groups.without(alive), find_groups(model, x), model)


@cases(CASES)
def test_costs_are_those_that_the_pruned_model_has(name: str) -> None:
    """The counter of `count_cost` is torch's, over the pruned model; groups work it out before anything is pruned."""
    model, x = build_case(name)
    groups = find_groups(model, x)
    everything = torch.ones(groups.neurons, dtype=torch.bool)
    assert (groups.params(everything), groups.macs(everything)) == (n_params(model), count_cost(model, x).macs)
    alive = random_alive(groups, 3, 1)
    remove_neurons(model, groups, alive)
    assert (groups.params(alive), groups.macs(alive)) == (n_params(model), count_cost(model, x).macs)


def test_costs_include_parameters_and_operations_that_cannot_be_pruned() -> None:
    def run(net: Any, x: Tensor) -> Tensor:
        h = net.b(net.act(net.a(x))) * torch.arange(8.0).to(x)
        return net.c(torch.baddbmm(h[:, None], h[:, None], net.w.expand(len(x), 8, 8)).squeeze(1)) * net.scale

    layers = {"a": nn.Linear(3, 6), "act": nn.PReLU(), "b": nn.Linear(6, 8), "c": nn.Linear(8, 1)}
    bare = {"w": nn.Parameter(torch.rand(1, 8, 8)), "scale": nn.Parameter(torch.tensor(2.0))}
    model, x = build(lambda: Net(run, **layers, **bare)), inputs((3,))
    groups = find_groups(model, x)
    everything = torch.ones(groups.neurons, dtype=torch.bool)
    assert [group.name for group in groups.prunable] == ["a"]
    assert groups.params(everything) == n_params(model) == 18 + 6 + 1 + 48 + 8 + 8 + 1 + 64 + 1
    assert groups.macs(everything) == count_cost(model, x).macs == 2 * (18 + 48 + 64 + 8)
    assert_same_groups(groups.without(everything), groups, model)


def rows(index: Tensor) -> list[list[int]]:
    return index.tolist()


def test_the_articles_network_by_hand() -> None:
    model, x = build_case("article")
    groups = find_groups(model, x)
    assert [(g.name, g.size, g.exact, g.frozen) for g in groups.prunable] == [
        ("conv1", 6, True, None),
        ("conv2", 16, True, None),
        ("fc1", 120, True, None),
        ("fc2", 84, True, None),
    ]
    found = {(s.name, s.dim): (s.role, rows(s.index)) for s in groups[1].slices}
    one = [[c] for c in range(16)]
    assert found == {
        ("conv2.weight", 0): ("makes", one),
        ("conv2.bias", 0): ("follows", one),
        ("fc1.weight", 1): ("reads", [[25 * c + i for i in range(25)] for c in range(16)]),
    }
    assert {str(s): g.frozen for g in groups.frozen for s in g.slices if g.frozen} == {
        "conv1.weight[1]": "reads a fixed input: the model's own or a constant (convolution in conv1)",
        "fc3.weight[0]": "reaches the model's output",
        "fc3.bias[0]": "reaches the model's output",
    }
    assert {(site.function, site.call, dim): len(e.unit_of) for (site, dim), e in groups.sized.items()} == {
        ("view", 0, 1): 400
    }
    assert (len(groups), groups.neurons, list(groups)[-1]) == (6, 226, groups[5])


def test_resnet_groups_by_hand() -> None:
    model, x = build_case("resnet")
    groups = find_groups(model, x)
    assert {g.name: g.size for g in groups.prunable} == {
        "0 + 3.conv2": 8,
        "3.conv1": 8,
        "4.conv1": 12,
        "4.conv2 + 4.downsample.0 + 5.conv2": 12,
        "5.conv1": 12,
    }
    stream = next(g for g in groups if g.name == "0 + 3.conv2")
    assert {str(s): s.role for s in stream.slices} == {
        "0.weight[0]": "makes",
        **{f"1.{n}[0]": "follows" for n in ("weight", "bias", "running_mean", "running_var")},
        "3.conv1.weight[1]": "reads",
        "3.conv2.weight[0]": "makes",
        **{f"3.bn2.{n}[0]": "follows" for n in ("weight", "bias", "running_mean", "running_var")},
        "4.conv1.weight[1]": "reads",
        "4.downsample.0.weight[1]": "reads",
    }


def test_concatenated_channels_stand_where_they_were_put() -> None:
    model, x = build_case("concat_input")
    groups = {g.name: g for g in find_groups(model, x).prunable}
    reads = {name: next(s for s in group.slices if s.name == "1.weight") for name, group in groups.items()}
    read = {name: part.index.flatten().tolist() for name, part in reads.items()}
    assert read == {"0.branches.0": list(range(6)), "0.branches.2": list(range(9, 14))}


def test_channels_that_are_turned_round_or_padded_keep_their_labels() -> None:
    turned = lambda n, x: n.b(F.pad(n.a(x).flip(1).roll(1, 1), (0, 0, 0, 0, 2, 0)))  # noqa: E731
    model = build(lambda: Net(turned, a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(6, 2, 1)))
    group = find_groups(model, inputs(IMAGE)).prunable[0]
    assert next(s for s in group.slices if s.name == "b.weight").index.flatten().tolist() == [2, 5, 4, 3]
    dense = copy.deepcopy(model)
    plan = prune_neurons(model, inputs(IMAGE), 0.5)
    assert plan.kept["b.weight"][1][:2] == [0, 1]
    assert_same_outputs(model, masked_twin(dense, plan.kept), inputs(IMAGE))


def test_padding_that_is_taken_off_again_leaves_no_trace() -> None:
    padded = lambda n, x: n.b(F.pad(n.a(x), (0, 0, 0, 0, 1, 2), value=2.0).sigmoid()[:, 1:-2])  # noqa: E731
    model = build(lambda: Net(padded, a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(8, 2, 1)))
    dense = copy.deepcopy(model)
    assert [(g.name, g.size) for g in find_groups(model, inputs(IMAGE)).prunable] == [("a", 8)]
    plan = prune_neurons(model, inputs(IMAGE), 0.5)
    assert_same_outputs(model, masked_twin(dense, plan.kept), inputs(IMAGE))


# What can be followed goes, whatever the way


def between(function: Callable[[Tensor], Tensor], channels: int = 8) -> tuple[nn.Module, Tensor]:
    """A function of the channels of one convolution, which another reads; a third layer can be pruned in any case."""
    layers = {"a": nn.Conv2d(3, 8, 3), "b": nn.Conv2d(channels, 6, 1), "c": nn.Conv2d(6, 2, 1)}
    return build(lambda: Net(lambda n, x: n.c(n.b(function(n.a(x).tanh())).relu()), **layers)), inputs(IMAGE)


FOLLOWED: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "fft_over_space": (lambda x: torch.fft.fft(x, dim=2).real, 8),
    "cumsum": (lambda x: x.cumsum(1), 8),
    "sort_over_space": (lambda x: x.sort(2).values, 8),
    "gather_over_space": (lambda x: x.gather(2, torch.zeros_like(x, dtype=torch.int64)), 8),
    "group_norm": (lambda x: F.group_norm(x, 4), 4),
    "instance_norm": (lambda x: F.group_norm(x, 8), 8),
    "unflatten": (lambda x: x.unflatten(1, (2, 4)).flatten(1, 2), 2),
    "shuffle": (lambda x: x.view(-1, 2, 4, 3, 3).transpose(1, 2).reshape(x.shape), 2),
    "channel_shuffle": (lambda x: F.channel_shuffle(x, 2), 2),
    "pixel_shuffle": (lambda x: F.pixel_unshuffle(F.pixel_shuffle(x, 2), 2), 2),
    "halves": (lambda x: torch.cat([h * 2 for h in x.chunk(2, 1)], 1), 8),
    "split": (lambda x: torch.cat(x.split([3, 5], 1), 1), 8),
    "slices": (lambda x: torch.cat([x[:, 3:], x[:, :3]], 1), 8),
    "narrow": (lambda x: torch.cat([x.narrow(1, 3, 5), x.narrow(1, 0, 3)], 1), 8),
    "even_and_odd": (lambda x: torch.cat([x[:, ::2], x[:, 1::2]], 1), 4),
    "roll": (lambda x: x.roll(3, 1), 8),
    "grouped": (lambda x: F.conv2d(x, torch.ones(8, 4, 1, 1).to(x), groups=2), 2),
    "one_kernel_over_space": (lambda x: F.conv2d(x.mT, torch.ones(8, 1, 3, 1).to(x), groups=8, padding=(1, 0)).mT, 8),
    "interpolate": (lambda x: F.interpolate(x, scale_factor=2), 8),
    "as_strided": (lambda x: x.as_strided(x.shape, x.stride()), 8),
    "glu": (lambda x: F.glu(torch.cat([x, x], 1), 1), 8),
    "stack": (lambda x: torch.stack([x, x.sin()], 2).sum(2), 8),
    "repeat": (lambda x: x.repeat(1, 2, 1, 1).view(-1, 2, 8, 3, 3).sum(1), 8),
    "windows_of_space": (lambda x: x.unfold(2, 2, 1).sum(-1), 8),
    "diagonal_of_space": (lambda x: x.diagonal(0, 2, 3)[..., None], 8),
    "norm": (lambda x: x / x.norm(dim=1, keepdim=True), 8),
}


@pytest.mark.parametrize("name", FOLLOWED)
def test_what_can_be_followed_is_pruned_and_equals_masking(name: str) -> None:
    function, neurons = FOLLOWED[name]
    model, x = between(function)
    assert [(g.name, g.size, g.exact) for g in find_groups(model, x).prunable] == [("a", neurons, True), ("b", 6, True)]
    dense, plan, left = copy.deepcopy(model), Plan({}, {}), 8
    for _ in range(2):
        plan = plan.then(prune_neurons(model, x, 0.4, scope="layer"))
        left, before = model.a.out_channels, left
        assert left < before or neurons < 4  # of two one is left after the first step
    assert not plan.approximate
    assert model.a.out_channels < 8
    assert_same_outputs(model, masked_twin(dense, plan.kept), x, inputs(IMAGE, 3), modes=("train",))


def test_one_picked_channel_stays_and_the_others_go() -> None:
    for pick in (lambda x: x.select(1, 2)[:, None], lambda x: x[:, 2:3], lambda x: x[:, 2, None]):
        model, x = between(lambda x, pick=pick: x * pick(x))
        groups = find_groups(model, x)
        assert [(g.name, g.size) for g in groups.prunable] == [("a", 7), ("b", 6)]
        assert next(s for s in groups[0].slices if s.name == "a.bias").index.flatten().tolist() == [0, 1, 3, 4, 5, 6, 7]
        dense = copy.deepcopy(model)
        plan = prune_neurons(model, x, 0.8)
        assert 2 in plan.kept["a.bias"][0]
        assert len(plan.kept["a.bias"][0]) < 4
        assert_same_outputs(model, masked_twin(dense, plan.kept), x, inputs(IMAGE, 3))


@pytest.mark.parametrize("context", [torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("layer", ["lstm", "gru", "rnn", "embedding", "bag", "bilinear"])
def test_layers_of_other_kinds_are_pruned_and_equal_masking(layer: str, context: Any) -> None:
    kind: nn.Module = {
        "lstm": nn.LSTM(3, 8, 2, batch_first=True, bidirectional=True),
        "gru": nn.GRU(3, 8, batch_first=True),
        "rnn": nn.RNN(3, 8, batch_first=True),
        "embedding": nn.Embedding(9, 8),
        "bag": nn.EmbeddingBag(9, 8),
        "bilinear": nn.Bilinear(3, 3, 8),
    }[layer]

    def run(net: Any, x: Tensor) -> Tensor:
        h = net.a(x, x) if layer == "bilinear" else net.a(x)
        return net.b(h[0] if isinstance(h, tuple) else h)

    model = build(lambda: Net(run, a=kind, b=nn.Linear(16 if layer == "lstm" else 8, 2)))
    x = torch.arange(8).view(2, 4) if layer in ("embedding", "bag") else inputs((4, 3))
    dense = copy.deepcopy(model)
    with context():
        groups = find_groups(model, x)
        plan = prune_neurons(model, x, 0.5)
    assert groups.neurons == 8  # the state has one size for all layers and directions
    assert all(group.exact for group in groups.prunable)
    assert model.b.in_features == (8 if layer == "lstm" else 4)
    assert_same_outputs(model, masked_twin(dense, plan.kept), x, x.flip(0)[:1], modes=("train",))


# What can't be followed stays, and says why

KEEPS_CHANNELS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "fft": (lambda x: torch.fft.fft(x, dim=1).real, "transforms it"),
    "sort": (lambda x: x.sort(1).values, "orders or searches"),
    "topk": (lambda x: x.topk(8, 1).values, "orders or searches"),
    "cummax": (lambda x: x.cummax(1).values, "orders or searches"),
    "argmax": (lambda x: x + x.argmax(1, keepdim=True), "orders or searches"),
    "index_by_data": (lambda x: x[:, (x.sum((0, 2, 3)) > 0).long()], "picks indices of"),
    "index_by_mask": (lambda x: x[:, x.sum((0, 2, 3)) < 1e9], "picks by a mask from"),
    "gather_differently": (
        lambda x: x.gather(1, torch.arange(9).view(1, 1, 3, 3).expand(x.shape) % 8),
        "picks indices of",
    ),
    "triangle_off": (lambda x: x.flatten(2).tril(2).view_as(x), "compares rows with columns"),
    "off_the_diagonal": (lambda x: x.mean((2, 3)).diag_embed(1)[:, :8, 1:, None], "moves it off the diagonal"),
    "write_at_list": (lambda x: x.clone().index_fill_(1, torch.tensor([1]), 0.0), "writes at indices of"),
    "unique": (lambda x: x * x[0, :, 0, 0].unique().sum(), "makes a shape of values"),
    "unbind": (lambda x: torch.stack(x.unbind(1), 1), "picks one index of a prunable dimension"),
    "constant": (lambda x: x + torch.arange(8.0).to(x).view(-1, 1, 1), "meets a dimension of fixed size"),
    "channels_as_space": (lambda x: F.adaptive_avg_pool2d(x.transpose(1, 3), (3, 8)).transpose(1, 3), "pools over it"),
    "overlapping_channels": (
        lambda x: F.max_pool1d(x.flatten(2).mT, 4, 2, 1).repeat(1, 1, 2).mT.view(-1, 8, 3, 3),
        "pools over it",
    ),
    "convolved_as_space": (
        lambda x: F.conv2d(x.transpose(1, 3), torch.ones(3, 3, 1, 2).to(x), padding=(0, 1)).transpose(1, 3)[:, :8],
        "convolves over it",
    ),
    "padded_as_space": (
        lambda x: F.pad(x.flatten(2).mT, (1, 1), mode="reflect")[..., 1:-1].mT.view(-1, 8, 3, 3),
        "pads it with its own indices",
    ),
    "windows": (lambda x: x.unfold(1, 1, 1).squeeze(-1), "reads it in windows or along a diagonal"),
    "as_strided": (lambda x: x.as_strided((2, 8, 9), (72, 9, 1)).view(2, 8, 3, 3), "reads memory under another shape"),
    "svd": (lambda x: torch.linalg.svdvals(x)[..., None], "no rule for aten._linalg_svd"),
}


@pytest.mark.parametrize("name", KEEPS_CHANNELS)
def test_what_cannot_be_followed_is_frozen_with_a_reason_and_the_rest_is_pruned_right(name: str) -> None:
    function, reason = KEEPS_CHANNELS[name]
    model, x = between(function)
    groups = find_groups(model, x)
    assert [g.name for g in groups.prunable] == ["b"]
    why = next(g.frozen or "" for g in groups.frozen if any(str(s) == "a.weight[0]" for s in g.slices))
    assert why.startswith(reason)
    assert why.endswith(("in the model itself)", "in a)"))
    dense = copy.deepcopy(model)
    plan = prune_neurons(model, x, 0.5)
    assert plan.frozen["a.weight[0]"] == why
    others = () if name == "as_strided" else (inputs(IMAGE, 3),)  # the batch is written in the call
    assert_same_outputs(model, masked_twin(dense, plan.kept), x, *others)


@torch.library.custom_op("lightning_prune_tests::swirl", mutates_args=())
def swirl(x: Tensor) -> Tensor:
    return x.roll(1, 1) * 2


def test_an_operation_of_someone_elses_is_frozen_and_named() -> None:
    layers = {"a": nn.Linear(3, 8), "b": nn.Linear(8, 6), "c": nn.Linear(6, 2)}
    model = build(lambda: Net(lambda n, x: n.c(n.b(torch.ops.lightning_prune_tests.swirl(n.a(x)))), **layers))
    groups = find_groups(model, inputs((3,)))
    assert [g.name for g in groups.prunable] == ["b"]
    assert "no rule for lightning_prune_tests.swirl.default" in str(groups)
    assert "(swirl in the model itself)" in str(groups)


def test_a_layer_whose_neurons_nobody_makes_is_frozen() -> None:
    """A parameter that is read as if it were an activation has no layer that makes it."""
    model = build(lambda: Net(lambda n, x: n.b(n.w + 0 * x.sum()), w=nn.Parameter(torch.rand(2, 6)), b=nn.Linear(6, 2)))
    groups = find_groups(model, inputs((3,)))
    assert not groups.prunable
    assert "no layer of the traced run makes it" in str(groups)


def test_every_prunable_index_belongs_to_exactly_one_neuron() -> None:
    for name in ("article", "resnet", "dense", "tied_transposed", "views"):
        model, x = build_case(name)
        groups = find_groups(model, x)
        seen: dict[tuple[str, int, int], int] = {}
        for number, group in enumerate(groups):
            for part in group.slices:
                assert part.index.shape[0] == group.size
                for index in part.index.flatten().tolist():
                    assert seen.setdefault((part.name, part.dim, index), number) == number
        for (tensor, dim), extent in groups.extents.items():
            for index, unit in enumerate(extent.unit_of.tolist()):
                if unit >= 0:
                    owner = next(i for i, numbers in enumerate(groups.ranges) if unit in numbers)
                    assert seen[tensor, dim, index] == owner


def test_tied_weights_are_one_parameter_in_one_group() -> None:
    groups = find_groups(build(Tied), inputs((5,)))
    assert [(g.name, [str(s) for s in g.slices]) for g in groups.prunable] == [
        ("encoder", ["encoder.weight[0]", "encoder.bias[0]"])
    ]


def test_an_auxiliary_head_belongs_to_the_groups_that_it_reads() -> None:
    groups = find_groups(build(Auxiliary).eval(), inputs(IMAGE))
    first = groups.prunable[0]
    assert {str(s) for s in first.slices} == {
        "conv1.weight[0]",
        "conv1.bias[0]",
        "conv2.weight[1]",
        "aux.weight[1] x9",
    }
    assert (
        groups.macs(torch.ones(groups.neurons, dtype=torch.bool))
        == count_cost(build(Auxiliary).eval(), inputs(IMAGE)).macs
    )


def test_printed_groups_can_be_read() -> None:
    model, x = build_case("article")
    assert [" ".join(line.split()) for line in str(find_groups(model, x)).splitlines()] == [
        "4 prunable groups, 226 neurons",
        "conv1 6 read by conv2 (exact)",
        "conv2 16 read by fc1 (25 each) (exact)",
        "fc1 120 read by fc2 (exact)",
        "fc2 84 read by fc3 (exact)",
        "2 frozen",
        "conv1.weight[1] 3 reads a fixed input: the model's own or a constant (convolution in conv1)",
        "fc3.weight[0], fc3.bias[0] 10 reaches the model's output",
    ]
    model, x = build_case("resnet")
    assert "  4.conv2 + 4.downsample.0 + 5.conv2     12  with 4.bn2, 4.downsample.1" in str(find_groups(model, x))


@pytest.mark.parametrize("bad", [None, 3, "x", {1, 2}, (), {}, [3], (None,), {"x": "text"}])
def test_example_inputs_of_another_kind_are_refused(bad: Any) -> None:
    with pytest.raises(PruningError, match="example_inputs"):
        find_groups(nn.Linear(3, 2), bad)


@pytest.mark.parametrize("bad", [None, "model", torch.rand(3), lambda x: x])
def test_a_model_of_another_kind_is_refused(bad: Any) -> None:
    with pytest.raises(PruningError, match=f"must be an nn.Module, got {type(bad).__name__}"):
        find_groups(bad, torch.rand(1, 3))


def test_an_exported_model_is_refused() -> None:
    exported = torch.export.export(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), (torch.rand(2, 3),))
    model = exported.module()
    before = {module: module.training for module in model.modules()}
    with pytest.raises(PruningError, match="GraphModule has been exported for one mode"):
        find_groups(model, torch.rand(2, 3))
    assert before == {module: module.training for module in model.modules()}


def test_sparse_inputs_are_taken() -> None:
    model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
    assert [group.size for group in find_groups(model, torch.eye(8).to_sparse()).prunable] == [4]
    with pytest.raises(PruningError, match="not finite"):
        find_groups(model, (torch.eye(8) / 0).nan_to_num(0, float("inf")).to_sparse())


GRAPH: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sparse_mm": torch.sparse.mm,
    "sparse_addmm": lambda edges, x: torch.sparse.addmm(x, edges, x, beta=0.5),
    "at": lambda edges, x: edges @ x,
    "spmm": torch.spmm,
}


@pytest.mark.parametrize(("layout", "held"), [("to_sparse", False), ("to_sparse", True), ("to_sparse_csr", False)])
@pytest.mark.parametrize("name", GRAPH)
@pytest.mark.filterwarnings("ignore:.*Sparse CSR tensor support is in beta")
def test_features_of_a_graphs_nodes_go(name: str, layout: str, held: bool) -> None:
    edges = getattr((inputs((6,), 6) > 0).double(), layout)()

    def run(net: Any, x: Tensor, edges: Any = None) -> Tensor:
        edges = net.edges if held else edges
        return net.b(GRAPH[name](edges, net.a(x).tanh()))  # type: ignore[no-any-return]

    model = build(lambda: Net(run, a=nn.Linear(3, 8), b=nn.Linear(8, 2)))
    model.register_buffer("edges", edges if held else None)
    x = inputs((3,), 6) if held else (inputs((3,), 6), edges)
    dense = copy.deepcopy(model)
    plan = prune_neurons(model, x, 0.5, exact_only=True)
    assert model.a.out_features == 4
    assert_same_outputs(model, masked_twin(dense, plan.kept), x)


def test_a_forward_that_copies_layers_is_left_alone() -> None:
    """The copies have the hooks of the layers that were copied."""
    run = lambda n, x: copy.deepcopy(n.b)(copy.deepcopy(n.a)(x).tanh())  # noqa: E731
    model = build(lambda: Net(run, a=nn.Linear(3, 8), b=nn.Linear(8, 2)))
    assert {group.frozen for group in find_groups(model, inputs((3,)))} >= {"no layer of the traced run makes it"}


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_rows_that_each_forward_scales_are_afterwards_what_they_were(kind: Any) -> None:
    model = build(lambda: nn.Sequential(kind(12, 8, max_norm=0.5), nn.Tanh(), nn.Linear(8, 2)))
    x, before = torch.arange(12).view(3, 4), copy.deepcopy(model.state_dict())
    find_groups(model, x)
    assert all(map(torch.equal, model.state_dict().values(), before.values()))
    plan = prune_neurons(model, x, 0.5)
    assert torch.equal(model[0].weight, before["0.weight"][:, plan.kept["0.weight"][1]])


def test_finding_groups_twice_finds_the_same() -> None:
    for name in ("resnet", "nested", "dense"):
        model, x = build_case(name)
        assert [describe(g) for g in find_groups(model, x)] == [describe(g) for g in find_groups(model, x)]


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_groups_do_not_depend_on_the_gradient_mode(context: Any) -> None:
    for name in ("resnet", "max1d", "linear_3d_input", "adaptive_avg1d", "matmul", "cast", "views", "instance_norm"):
        model, x = build_case(name)
        expected = [describe(g) for g in find_groups(model, x)]
        with context():
            assert [describe(g) for g in find_groups(model, x)] == expected


def test_groups_of_a_float32_bfloat16_or_autocast_model_are_the_same() -> None:
    make = sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(72, 6), nn.Linear(6, 2))
    model, x = build(make), inputs(IMAGE)
    find = find_groups
    expected = [(g.name, g.size, g.exact, [str(s) for s in g.slices]) for g in find(model, x).prunable]
    for dtype in (torch.float32, torch.bfloat16):
        found = find(model.to(dtype), x.to(dtype)).prunable
        assert [(g.name, g.size, g.exact, [str(s) for s in g.slices]) for g in found] == expected
    with torch.autocast("cpu", torch.bfloat16):
        found = find(model.float(), x.float()).prunable
    assert [(g.name, g.size, g.exact, [str(s) for s in g.slices]) for g in found] == expected


class Experts(nn.Module):
    """Runs of tokens with a matrix of each expert, in one call."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 2)
        self.up, self.down = nn.Parameter(torch.randn(3, 16, 24) / 4), nn.Parameter(torch.randn(3, 24, 16) / 4)

    def forward(self, x: Tensor) -> Tensor:
        ends = torch.tensor([len(x) // 4, len(x) // 2, len(x)], dtype=torch.int32)
        h = torch._grouped_mm(self.a(x), self.up, offs=ends)
        return self.b(torch._grouped_mm(h.relu(), self.down, offs=ends))


def grouped_mm_runs() -> bool:
    """Whether this torch multiplies by groups on the CPU."""
    try:
        Experts()(torch.rand(8, 8))
    except (AttributeError, RuntimeError):
        return False
    return True


@pytest.mark.skipif(not grouped_mm_runs(), reason="this torch multiplies by groups on GPUs only")
def test_experts_in_one_call_lose_their_hidden_features() -> None:
    """In single precision, which is all that it takes; its strides are multiples of 16 bytes."""
    torch.manual_seed(0)
    model, x = Experts(), torch.rand(8, 8)
    dense = copy.deepcopy(model)
    assert sorted((g.size, g.exact) for g in find_groups(model, x).prunable) == [(16, True), (16, True), (24, True)]
    plan = prune_neurons(model, x, 0.5, scope="layer", round_to=4, exact_only=True)
    assert (model.up.shape, model.down.shape) == ((3, 8, 12), (3, 12, 8))
    with torch.no_grad():
        for name, dims in plan.kept.items():
            for dim, index in dims.items():
                gone = sorted(set(range(dense.get_parameter(name).size(dim))) - set(index))
                dense.get_parameter(name).index_fill_(dim, torch.tensor(gone), 0.0)
    for batch in (x, torch.rand(12, 8)):
        torch.testing.assert_close(model(batch), dense(batch), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", ["edh", "ehd", "dhe", "edh_best", "ehd_best", "dhe_best"])
def test_experts_of_an_einsum_lose_their_hidden_features(how: str) -> None:
    model = CONSTRUCTS[f"experts_einsum_{how}"].build()
    hidden = [g for g in find_groups(model, torch.rand(2, 6, 5)).prunable if g.size == 6]
    assert [(g.slices[0].name, g.slices[0].role) for g in hidden if g.exact] == [("2.w_in", "makes")]


class Fused(nn.Module):
    """Queries, keys and values by one einsum over a weight of four dimensions."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.qkv = nn.Parameter(torch.randn(*({"t": 3, "d": 8, "h": 4, "k": 5}[axis] for axis in how)) / 3)
        self.out = nn.Parameter(torch.randn(4, 5, 8) / 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = torch.einsum(f"bnd,{self.how}->tbhnk", x, self.qkv)
        return torch.einsum("bhqs,bhsk,hkd->bqd", (q @ k.mT).softmax(-1), v, self.out)


@pytest.mark.parametrize("how", ["tdhk", "dthk", "dhkt", "hdtk"])
def test_heads_of_one_weight_of_many_dimensions_go(how: str) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 8), Fused(how), nn.Linear(8, 2)).double(), torch.rand(2, 7, 6).double()
    dense = copy.deepcopy(model)
    (heads,) = (group for group in find_groups(model, x).prunable if group.size == 4)
    assert heads.exact
    assert {(s.name, s.dim, s.role) for s in heads.slices} == {
        ("1.qkv", how.index("h"), "makes"),
        ("1.out", 0, "reads"),
    }
    plan = prune_neurons(model, x, 0.5, scope="layer", exact_only=True)
    assert model[1].out.shape == (2, 5, 4)
    assert_same_outputs(model, masked_twin(dense, plan.kept), x)


@rule("mine::picky")
def picky(call: Call) -> Any:
    raise KeyError("what")


def test_a_rule_that_raises_freezes_what_reached_it() -> None:
    with torch.library._scoped_library("mine", "DEF") as library:
        library.define("picky(Tensor x) -> Tensor")
        library.impl("picky", lambda x: x * 2, "CPU")
        model, x = between(lambda x: torch.ops.mine.picky(x))
        groups = find_groups(model, x)
    assert [g.name for g in groups.prunable] == ["b"]
    assert "the rule of mine.picky.default raised KeyError: 'what'" in {
        (g.frozen or "").partition(" (")[0] for g in groups.frozen
    }
