"""Finding activation sites: modules, functions, in-place forms; gates and outputs are left alone."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from activation_nets import Net, Varying
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_prune import PruningError
from lightning_prune.activations.candidates import CANDIDATES, Choice, choice_of, spread
from lightning_prune.activations.sites import Site, find_activations
from lightning_prune.graph.callsites import in_backward


def names(sites: tuple[Site, ...]) -> list[str]:
    return [site.name for site in sites]


def test_every_form_is_found_in_its_place() -> None:
    found = find_activations(Net(), torch.randn(3, 4))
    assert names(found.sites) == [
        "block.relu#0", "block.tanh#0", "block.relu#1", "block.relu#2", "act", "elu#0", "relu#0"
    ]  # fmt: skip
    assert [site.module for site in found.sites] == [None, None, None, None, "act", None, None]
    assert found.sites[4].own == Choice("leaky_relu", (("negative_slope", 0.2),))
    assert found.sites[5].own == Choice("elu", (("alpha", 0.5),))
    assert names(found.left) == ["sigmoid#0"]
    assert "gate" in found.left[0].left
    # x.relu_() is a statement: what follows uses x; F.relu(x, inplace=True) gives what follows.
    assert [site.name for site in found.sites if site.in_place] == ["block.relu#2"]


def test_the_list_is_printable() -> None:
    text = str(find_activations(Net(), torch.randn(3, 4)))
    assert text.splitlines()[0] == "7 activation sites, 1 left alone"
    assert "  act: leaky_relu(negative_slope=0.2) (module)" in text.splitlines()
    assert "sigmoid#0: sigmoid (call), left alone: a gate" in text


def test_an_activation_that_is_the_output_is_left_alone() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2), nn.Sigmoid(), nn.Flatten())
    found = find_activations(net, torch.randn(3, 4))
    assert (names(found.sites), names(found.left)) == (["1"], ["3"])
    assert "output" in found.left[0].left
    assert names(found.pick(None, None, gates=True).sites) == ["1", "3"]


def test_an_output_may_be_changed_in_place_or_copied() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.layer(x)
            x.relu_()
            return x

    class Copied(InPlace):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).sigmoid().clone().float()

    assert names(find_activations(InPlace(), torch.randn(3, 4)).left) == ["relu#0"]
    found = find_activations(Copied(), torch.randn(3, 4))
    assert (names(found.sites), names(found.left)) == (["relu#0"], ["sigmoid#0"])


def test_attention_and_its_softmax_are_no_sites() -> None:
    net = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    assert names(find_activations(net, torch.randn(2, 3, 8)).sites) == ["relu#0"]


def test_gated_units_are_gates_and_what_a_gate_scales_is_not() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
            self.scale = nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            x = F.silu(self.a(x)) * self.b(x)  # SwiGLU
            x = F.relu(x)
            x = x * torch.sigmoid(self.c(x)).view(-1, 4).expand_as(x)  # squeeze and excitation
            return self.c(F.gelu(x) * self.scale)  # layer scale

    found = find_activations(Gated(), torch.randn(3, 4))
    assert (names(found.sites), names(found.left)) == (["relu#0", "gelu#0"], ["silu#0", "sigmoid#0"])


def test_calls_that_vary_are_one_site() -> None:
    found = find_activations(Varying(), torch.randn(3, 4))
    assert names(found.sites) == ["relu#all"]
    assert found.varying == ("",)


def test_finding_leaves_the_model_as_it_is() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(inplace=True), nn.Dropout(), nn.Linear(4, 2))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    state = torch.get_rng_state()
    find_activations(net, torch.randn(5, 4, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
    assert not in_backward()


def test_patterns_pick_and_say_what_there_is() -> None:
    found = find_activations(Net(), torch.randn(3, 4))
    assert names(found.pick(["block"], ["*tanh*"]).sites) == ["block.relu#0", "block.relu#1", "block.relu#2"]
    with pytest.raises(PruningError, match=r"'nothing' matches no activation site; there are: block.relu#0"):
        found.pick(["nothing"], None)
    with pytest.raises(PruningError, match="no activation site to search; there are: 0: not chosen"):
        find_activations(nn.Sequential(nn.ReLU(), nn.Linear(4, 2)), torch.randn(3, 4)).pick(None, ["0"])
    with pytest.raises(PruningError, match="none at all"):
        find_activations(nn.Sequential(nn.Linear(4, 2)), torch.randn(3, 4)).pick(None, None)


def test_a_site_survives_as_plain_data() -> None:
    for site in find_activations(Net(), torch.randn(3, 4)).sites:
        assert Site.from_dict(site.to_dict()) == site


@pytest.mark.parametrize(
    ("name", "size", "functions", "left"),
    [
        # BasicConv2d calls F.relu, and so do the auxiliary heads.
        ("googlenet", 64, {("relu", "call"): 61}, 0),
        ("inception_v3", 299, {("relu", "call"): 96}, 0),
        # Each dense layer has two modules, each transition and the stem one; the function is the last.
        ("densenet121", 32, {("relu", "module"): 120, ("relu", "call"): 1}, 0),
        # Squeeze and excitation: the ReLU inside is a site, the gate is not.
        ("mobilenet_v3_small", 32, {("hardswish", "module"): 19, ("relu", "module"): 14}, 9),
        ("vit_b_16", 224, {("gelu", "module"): 12}, 0),
    ],
)
def test_torchvision(name: str, size: int, functions: dict[tuple[str, str], int], left: int) -> None:
    models = pytest.importorskip("torchvision.models")
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    with torch.device("cpu"), torch.no_grad():
        model = getattr(models, name)(weights=None, **options)
    found = find_activations(model, torch.randn(1, 3, size, size))
    kinds = Counter((site.function, "module" if site.module else "call") for site in found.sites)
    assert (dict(kinds), len(found.left), found.varying) == (functions, left, ())
    # The oracle: a module that is an activation is in the list, once, and each is what it says.
    modules = {path for path, module in model.named_modules() if choice_of(module) not in (None, Choice("identity"))}
    listed = [site.module for site in (*found.sites, *found.left) if site.module]
    assert len(listed) == len(set(listed))
    assert set(listed) == modules
    assert all(site.own == choice_of(model.get_submodule(site.module)) for site in found.sites if site.module)


@pytest.mark.parametrize("name", CANDIDATES)
def test_a_choice_its_module_and_its_data_are_the_same_function(name: str) -> None:
    x = torch.linspace(-3, 3, 50, dtype=torch.float64).view(5, 10)
    choice = Choice(name)
    assert torch.equal(choice.module()(x), choice(x))
    assert Choice.from_dict(choice.to_dict()) == choice
    assert choice_of(choice.module()) == choice
    assert choice.module(inplace=True)(x.clone()).shape == x.shape
    # A Monte Carlo oracle for the quadrature.
    z = torch.randn(400_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert abs(float(choice(z).square().mean().sqrt()) / spread(choice) - 1) < 0.02


PARAMETERS = [("leaky_relu", "negative_slope"), ("swish", "beta"), ("shifted_relu", "shift"), ("thresholded_relu", "threshold")]  # fmt: skip


@pytest.mark.parametrize(("name", "parameter"), PARAMETERS)
@pytest.mark.parametrize("shape", [(5, 3), (5, 3, 2, 2)], ids=str)
def test_parameters_per_channel_are_those_of_each_channel(name: str, parameter: str, shape: tuple[int, ...]) -> None:
    values = (0.1, 0.5, 1.5)
    x = torch.randn(shape, dtype=torch.float64)
    whole = Choice(name, ((parameter, values),))
    parts = [Choice(name, ((parameter, value),))(x[:, i : i + 1]) for i, value in enumerate(values)]
    torch.testing.assert_close(whole(x), torch.cat(parts, 1), rtol=0, atol=0)
    torch.testing.assert_close(whole.module()(x), whole(x), rtol=0, atol=0)
    assert Choice.from_dict(whole.to_dict()) == whole


def test_unknown_names_are_refused_with_the_list() -> None:
    with pytest.raises(PruningError, match="unknown activation 'rleu'; allowed: relu, leaky_relu, elu"):
        Choice.from_dict({"name": "rleu", "parameters": {}})
    with pytest.raises(PruningError, match="elu has no parameter 'slope'"):
        Choice.from_dict({"name": "elu", "parameters": {"slope": 1.0}})


def test_calls_that_vary_are_one_site_only_if_all_of_them_may_be_replaced() -> None:
    class Both(nn.Module):
        """In training a further ReLU; the last one gives the output in both modes."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = F.elu(F.relu(self.a(x)))
            return F.relu(self.b(F.relu(x) if self.training else x))

    found = find_activations(Both(), torch.randn(3, 4))
    assert names(found.sites) == ["elu#all"]
    assert {"relu#0", "relu#1", "relu#2"} == set(names(found.left))
