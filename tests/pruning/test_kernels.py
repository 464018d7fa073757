"""Kernel shrinking: a smaller kernel is the same network with the outer ring set to zero."""

from __future__ import annotations

import copy
import json
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from lightning_prune import NoEffectWarning, Plan, PruningError, count_cost, load_pruned, save_pruned, shrink_kernels
from lightning_prune.graph.run import as_calls
from lightning_prune.models import LeNet
from lightning_prune.pruning.kernels import exact_rings, remove_rings


@pytest.fixture(autouse=True)
def _precise() -> Any:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def ring_masked(model: nn.Module, plan: Plan) -> nn.Module:
    """The oracle: the dense model with everything that the plan doesn't keep set to zero."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for name, dims in plan.kept.items():
            weight = twin.get_parameter(name)
            for dim, index in dims.items():
                gone = [i for i in range(weight.size(dim)) if i not in index]
                weight.index_fill_(dim, torch.tensor(gone), 0)
    return twin


def assert_equal(actual: Tensor, expected: Tensor) -> None:
    actual, expected = actual.detach(), expected.detach()
    assert actual.shape == expected.shape
    assert float((actual - expected).abs().max()) <= 1e-10 * float(expected.abs().max())


CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
MODES = ["zeros", "reflect", "replicate", "circular"]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@given(
    dims=st.integers(1, 3),
    kernels=st.lists(st.integers(1, 7), min_size=3, max_size=3),
    paddings=st.lists(st.integers(0, 5), min_size=3, max_size=3) | st.sampled_from(["same", "valid"]),
    strides=st.lists(st.integers(1, 3), min_size=3, max_size=3),
    dilations=st.lists(st.integers(1, 3), min_size=3, max_size=3),
    mode=st.sampled_from(MODES),
    groups=st.sampled_from([1, 2, 4]),
    bias=st.booleans(),
    rings=st.integers(1, 3),
)
def test_a_smaller_kernel_equals_the_masked_one(
    dims: int,
    kernels: list[int],
    paddings: list[int] | str,
    strides: list[int],
    dilations: list[int],
    mode: str,
    groups: int,
    bias: bool,
    rings: int,
) -> None:
    same = paddings == "same"
    if dims == 3:
        kernels, dilations = [min(k, 5) for k in kernels], [1, 1, 1]
    padding = paddings if isinstance(paddings, str) else tuple(paddings[:dims])
    conv = CONVS[dims](
        4, 8, tuple(kernels[:dims]), (1,) * dims if same else tuple(strides[:dims]), padding, tuple(dilations[:dims]),
        groups=groups, bias=bias, padding_mode=mode,
    )  # fmt: skip
    x = torch.randn(2, 4, *[22, 21, 20][:dims]) if dims < 3 else torch.randn(1, 4, 8, 9, 7)
    model = nn.Sequential(conv)
    dense = copy.deepcopy(model)
    total = sum(p.numel() for p in model.parameters())
    if not exact_rings(conv):
        with pytest.raises(PruningError, match=r"has no ring|crop along one dimension"):
            shrink_kernels(model, x, 1e-6)
        return
    plan = shrink_kernels(model, x, 1e-6, verify=False)  # the oracle checks it, not the code itself
    for _ in range(rings - 1):
        try:
            plan = plan.then(shrink_kernels(model, x, 1e-6, verify=False))
        except PruningError:
            break
    assert sum(p.numel() for p in model.parameters()) < total
    assert_equal(model(x), ring_masked(dense, plan)(x))
    assert tuple(model[0].weight.shape[2:]) == model[0].kernel_size
    fresh = copy.deepcopy(dense)
    Plan.from_dict(json.loads(json.dumps(plan.to_dict()))).apply(fresh)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(x), model(x))
    assert plan.made(fresh)
    plan.take_back(fresh)
    fresh.load_state_dict(dense.state_dict())
    assert torch.equal(fresh(x), dense(x))


def lenet(**options: Any) -> tuple[nn.Module, Tensor]:
    return LeNet([4, 6], 5, [8], in_shape=(1, 20, 20), num_classes=3, **options), torch.randn(2, 1, 20, 20)


def shrunk_lenet() -> tuple[nn.Module, Tensor]:
    model, x = lenet()
    shrink_kernels(model, x, 0.5, of="macs")
    return model, x


def test_the_reference_network_keeps_the_shapes_after_it() -> None:
    model, x = lenet()
    dense = copy.deepcopy(model)
    plan = shrink_kernels(model, x, 0.93, of="macs")
    assert_equal(model(x), ring_masked(dense, plan)(x))
    assert type(model.conv1) is nn.Conv2d
    assert type(model.conv2) is nn.Conv2d
    assert model.conv2.kernel_size == (1, 1)
    assert model.conv2.padding == (-2, -2)
    assert model.fc1.in_features == dense.fc1.in_features


COPIES = {
    "deepcopy": lambda model, x: copy.deepcopy(model),
    "pickle": lambda model, x: pickle.loads(pickle.dumps(model)),
    "export": lambda model, x: torch.export.export(model, (x,), strict=False).module(),
    "strict export": lambda model, x: torch.export.export(model, (x,), strict=True).module(),
    "trace": lambda model, x: torch.jit.trace(model, x),
    "script": lambda model, x: torch.jit.script(model),
}


@pytest.mark.filterwarnings("ignore:`torch.jit.*:FutureWarning", "ignore:`torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("how", COPIES)
def test_it_stays_a_plain_module(how: str) -> None:
    model, x = shrunk_lenet()
    assert_equal(COPIES[how](model, x)(x), model(x))


def test_it_is_saved_and_loaded(tmp_path: Any) -> None:
    model, x = shrunk_lenet()
    save_pruned(model, tmp_path / "model.safetensors")
    fresh = load_pruned(tmp_path / "model.safetensors", lenet()[0])
    assert torch.equal(fresh(x), model(x))


@pytest.mark.parametrize(
    ("kernel", "padding", "shrunk"), [(4, 1, 2), (3, 1, 1), (5, 2, 3), (7, 1, 5), (5, 0, None), (2, 1, None)]
)
def test_transposed_convolutions_shrink_where_they_pad_enough(kernel: int, padding: int, shrunk: int | None) -> None:
    model = nn.Sequential(nn.ConvTranspose2d(3, 4, kernel, stride=2, padding=padding, output_padding=1))
    dense, x = copy.deepcopy(model), torch.randn(2, 3, 6, 6)
    if shrunk is None:
        with pytest.raises(PruningError, match=r"transposed convolution that pads|no ring around"):
            shrink_kernels(model, x, 0.1)
        return
    plan = shrink_kernels(model, x, 0.1, verify=False)
    assert model[0].kernel_size == (shrunk, shrunk)
    assert_equal(model(x), ring_masked(dense, plan)(x))


class Loop(nn.Module):
    """One convolution, three calls, on inputs of several sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(torch.tanh(self.conv(torch.tanh(self.conv(x)))))


def test_a_convolution_that_is_called_repeatedly() -> None:
    model, x = Loop(), torch.randn(2, 3, 15, 15)
    dense = copy.deepcopy(model)
    plan = shrink_kernels(model, x, 0.5, of="macs")
    assert_equal(model(x), ring_masked(dense, plan)(x))


# -- choice and amounts -----------------------------------------------------------------------------------------------


def three(**options: Any) -> nn.Sequential:
    return nn.Sequential(*[nn.Conv2d(4, 4, 5, padding=2, **options) for _ in range(3)])


@pytest.mark.parametrize("weak", [0, 1, 2])
@pytest.mark.parametrize("criterion", ["l1", "l2"])
def test_the_ring_of_least_norm_goes(weak: int, criterion: str) -> None:
    model = three()
    with torch.no_grad():
        ring = torch.ones(5, 5)
        ring[1:4, 1:4] = 0
        model[weak].weight *= torch.where(ring == 1, 0.01, 1.0)
    plan = shrink_kernels(model, torch.randn(1, 4, 8, 8), 0.1, criterion=criterion)
    assert list(plan.kept) == [f"{weak}.weight"]
    assert plan.kept[f"{weak}.weight"] == {2: [1, 2, 3], 3: [1, 2, 3]}


@pytest.mark.parametrize("of", ["params", "macs"])
@pytest.mark.parametrize("amount", [0.05, 0.3, 0.5, 0.9])
def test_a_budget_is_met_at_or_just_past_it(of: str, amount: float) -> None:
    model, x = (
        nn.Sequential(nn.Conv2d(3, 8, 7), nn.Conv2d(8, 4, 5, stride=2), nn.Conv2d(4, 6, 3)),
        torch.randn(1, 3, 24, 24),
    )
    dense = count_cost(model, x)
    plan = shrink_kernels(model, x, amount, of=of)
    cost = count_cost(model, x)
    gone = 1 - getattr(cost, of) / getattr(dense, of)
    assert gone >= amount - 1e-9
    # No convolution could have its last ring back: what is missing then is more than what was past the budget.
    for name in plan.kept:
        layer = model.get_submodule(name.rpartition(".")[0])
        share = getattr(cost.layers[name.rpartition(".")[0]], of) / getattr(dense, of)
        side = layer.kernel_size[0]
        assert gone - share * ((side + 2) ** 2 / side**2 - 1) < amount + 1e-2


def test_what_a_large_ring_makes_superfluous_stays() -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 64, 3, padding=1)), torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        ring = torch.ones(3, 3)
        ring[1, 1] = 0
        model[0].weight *= torch.where(ring == 1, 1e-6, 1.0)  # the first to go, and not enough
    plan = shrink_kernels(model, x, 0.5)
    assert list(plan.kept) == ["1.weight"]


def test_an_amount_out_of_reach_is_refused_with_what_can_be_reached() -> None:
    model, x = lenet()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(PruningError, match=r"every kernel as small as it can be 0\.\d+ is gone"):
        shrink_kernels(model, x, 0.9)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.conv1.kernel_size == (5, 5)


def test_patterns_choose_the_convolutions() -> None:
    model, x = three(), torch.randn(1, 4, 8, 8)
    plan = shrink_kernels(model, x, 0.2, include=["0", "1"], exclude="0")
    assert list(plan.kept) == ["1.weight"]
    assert plan.frozen["0"] == plan.frozen["2"] == "left out by include or exclude"
    with pytest.raises(PruningError, match="matches no module"):
        shrink_kernels(model, x, 0.2, include="layer9")


def test_asking_for_nothing_warns() -> None:
    with pytest.warns(NoEffectWarning, match="asks for no kernel"):
        assert not shrink_kernels(three(), torch.randn(1, 4, 8, 8), 0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"amount": 1.0}, "amount"),
        ({"of": "neurons"}, "'params', 'macs'"),
        ({"criterion": "l3"}, "'l1', 'l2'"),
        ({"include": 3}, "glob"),
    ],
)
def test_bad_arguments_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(PruningError, match=words):
        shrink_kernels(three(), torch.randn(1, 4, 8, 8), **{"amount": 0.1} | options)


# -- what is left alone, with a reason --------------------------------------------------------------------------------


class Functional(nn.Module):
    """Reads a convolution's weight by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.other = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(self.conv(self.other(x)), self.conv.weight, padding=1)


class Tied(nn.Module):
    """Two convolutions share a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.twin, self.other = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
        self.twin.weight = self.conv.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.twin(self.conv(x)))


class Padded(nn.Conv2d):
    """A convolution with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (1, 1, 1, 1)))


class Unused(nn.Sequential):
    """Never calls one of its layers."""

    def forward(self, x: Tensor) -> Tensor:
        return self[1](x)


REFUSED = {
    "functional": (Functional, "conv", "leaving it out fails"),
    "tied": (Tied, "conv", "its weight is shared"),
    "own forward": (lambda: nn.Sequential(Padded(3, 3, 3), nn.Conv2d(3, 3, 3)), "0", "has a forward of its own"),
    "parametrized": (
        lambda: nn.Sequential(parametrizations.weight_norm(nn.Conv2d(3, 3, 3)), nn.Conv2d(3, 3, 3)),
        "0",
        "its weight is computed",
    ),
    "even": (lambda: nn.Sequential(nn.Conv2d(3, 3, 2), nn.Conv2d(3, 3, 3)), "0", "kernel of 2x2 has no ring"),
    "not called": (lambda: Unused(nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3)), "0", "was not called"),
    "mixed": (
        lambda: nn.Sequential(nn.Conv2d(3, 3, 3, padding=(2, 0), padding_mode="circular"), nn.Conv2d(3, 3, 3)),
        "0",
        "crop along one dimension and pad by 'circular'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_exact_is_left_alone(case: str) -> None:
    make, path, reason = REFUSED[case]
    model, x = make(), torch.randn(2, 3, 12, 12)
    dense = copy.deepcopy(model)
    plan = shrink_kernels(model, x, 0.05)
    assert reason in plan.frozen[path]
    assert plan.kept
    assert all(not name.startswith(f"{path}.") for name in plan.kept)
    assert_equal(model(x), ring_masked(dense, plan)(x))


def test_a_failing_change_leaves_everything_as_it_was() -> None:
    model, x = Functional(), torch.randn(2, 3, 12, 12)
    optimizer = torch.optim.Adam(model.parameters())
    model(x).sum().backward()
    optimizer.step()
    parameters, state, output = list(model.parameters()), copy.deepcopy(optimizer.state_dict()), model(x)
    with pytest.raises(PruningError, match="Can't shrink conv"):
        remove_rings(model, as_calls(x), {"conv": 1}, [optimizer])
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert model.conv.kernel_size == (3, 3)
    assert model.conv.padding == (1, 1)
    assert torch.equal(model(x), output)
    now = optimizer.state_dict()["state"]
    assert now.keys() == state["state"].keys()
    assert all(
        torch.equal(value, now[key][name]) for key, each in state["state"].items() for name, value in each.items()
    )


# -- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, 0.01, momentum=0.9, weight_decay=0.01),
        lambda p: torch.optim.AdamW(p, 0.01),
    ],
)
def test_training_on_equals_training_the_masked_network(make: Any) -> None:
    model, x = lenet(activation="tanh")
    optimizer = make(model.parameters())

    def step(net: nn.Module, optimizer: Any, mask: dict[str, Tensor] | None = None) -> None:
        optimizer.zero_grad()
        net(x).square().sum().backward()
        for name, parameter in net.named_parameters():
            if mask and name in mask and parameter.grad is not None:
                parameter.grad *= mask[name]
        optimizer.step()

    for _ in range(3):
        step(model, optimizer)
    twin = copy.deepcopy(model)
    other = make(twin.parameters())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    plan = shrink_kernels(model, x, 0.5, of="macs", optimizer=optimizer)
    mask = {}
    for name, dims in plan.kept.items():
        mask[name] = torch.zeros(plan.shapes[name])
        places = [dims.get(dim, list(range(size))) for dim, size in enumerate(plan.shapes[name])]
        mask[name][torch.meshgrid(*map(torch.tensor, places), indexing="ij")] = 1
        parameter = twin.get_parameter(name)
        for value in (parameter.data, *other.state[parameter].values()):
            if isinstance(value, Tensor) and value.shape == mask[name].shape:
                value *= mask[name]
    for _ in range(5):
        step(model, optimizer)
        step(twin, other, mask)
    for name, parameter in twin.named_parameters():
        value = parameter.detach()
        for dim, index in plan.kept.get(name, {}).items():
            value = value.index_select(dim, torch.tensor(index))
        torch.testing.assert_close(model.get_parameter(name).detach(), value, rtol=1e-8, atol=1e-12)
