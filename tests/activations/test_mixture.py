"""The mixture: where it starts, what it gives, what is dropped, and that it leaves the model as it was."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from activation_nets import Net
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_prune.activations.candidates import Choice, spread
from lightning_prune.activations.mixture import Mixture, Unit, draw_units, installed
from lightning_prune.activations.sites import Sites, find_activations

NAMES = ("relu", "gelu", "tanh", "identity")


def x64() -> Tensor:
    return torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def of(net: nn.Module, names: tuple[str, ...] = NAMES, per: str = "site") -> tuple[Sites, Mixture]:
    sites = find_activations(net, x64())
    return sites, Mixture(sites, draw_units(sites, names, per))


def test_it_is_the_weighted_mean_of_the_matched_candidates() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    sites, mixture = of(net)
    z = net[0](x64())
    with torch.no_grad():
        mixture.alphas[0].copy_(torch.tensor([0.3, -0.2, 0.5, 0.1]))
    for temperature, matching in ((1.0, 1.0), (0.5, 0.5), (0.5, 0.0)):
        mixture.temperature, mixture.matching = temperature, matching
        w = mixture.weights(0).double()
        own = spread(Choice("relu"))
        gains = [(own / spread(Choice(name))) ** matching for name in ("gelu", "tanh", "identity")]
        functions = [F.gelu(z), torch.tanh(z), z]
        expected = w[0] * F.relu(z) + sum(
            w[i + 1] * g * f for i, (g, f) in enumerate(zip(gains, functions, strict=True))
        )
        with installed(net, sites, mixture):
            torch.testing.assert_close(net(x64()), net[2](expected), rtol=1e-6, atol=1e-7)


def test_it_starts_at_half_of_what_the_user_has_at_any_temperature() -> None:
    _, mixture = of(Net().double())
    for temperature in (1.0, 0.1):
        mixture.temperature = temperature
        for unit in range(len(mixture.units)):
            assert math.isclose(float(mixture.weights(unit).detach()[0]), 0.5, rel_tol=1e-6)


def test_matched_candidates_have_the_spread_of_what_the_user_has() -> None:
    sites, mixture = of(
        nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).double(), ("tanh", "sigmoid", "gelu")
    )
    z = torch.randn(400_000, dtype=torch.float64)
    for place, option in enumerate(mixture.units[0].options):
        if option is not None:
            y = mixture._scaled(0, place, option, sites.sites[0], z)
            assert abs(float(y.square().mean().sqrt()) / math.sqrt(0.5) - 1) < 0.01


def test_the_model_is_the_users_own_when_only_its_own_are_alive_and_afterwards() -> None:
    net = Net().double()
    plain = copy.deepcopy(net)
    sites, mixture = of(net)
    mixture.alive = [[place == 0 for place in range(len(unit.options))] for unit in mixture.units]
    with installed(net, sites, mixture):
        assert torch.equal(net(x64()), plain(x64()))
    mixture.alive = [[True] * len(unit.options) for unit in mixture.units]
    with installed(net, sites, mixture):
        assert not torch.allclose(net(x64()), plain(x64()))
        assert [name for name, _ in net.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert torch.equal(net(x64()), plain(x64()))
    assert not any("forward" in module.__dict__ for module in net.modules())


@pytest.mark.parametrize("place", range(1, 4))
def test_one_option_alone_is_the_committed_model(place: int) -> None:
    """The numbers of calls during a search and after its end mean the same places."""
    from lightning_prune.activations.apply import apply_changes, changes_for

    net = Net().double()
    sites = find_activations(net, x64())
    units = [Unit(site.name, (site.name,), (None, *map(Choice, ("gelu", "tanh", "identity")))) for site in sites.sites]
    mixture = Mixture(sites, units)
    mixture.matching = 0.0
    mixture.alive = [[p == (place + u) % 4 for p in range(4)] for u in range(len(units))]
    other = copy.deepcopy(net)
    apply_changes(other, changes_for(other, sites, mixture.best()))
    with installed(net, sites, mixture):
        torch.testing.assert_close(net(x64()), other(x64()), rtol=1e-12, atol=1e-14)


def test_weak_options_are_dropped_and_the_best_stays() -> None:
    _, mixture = of(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).double())
    with torch.no_grad():
        mixture.alphas[0].copy_(torch.tensor([0.0, -5.0, 2.0, 0.0]))
    mixture.drop(0.1)
    assert mixture.alive == [[True, False, True, True]]
    mixture.temperature = 0.05
    mixture.drop(0.1)
    assert mixture.alive == [[False, False, True, False]]
    assert mixture.best() == {"1": Choice("tanh")}
    mixture.fail(0, 2)  # whatever fails, something is left
    assert mixture.best() == {}


def test_units_share_what_they_are_asked_to() -> None:
    sites = find_activations(Net().double(), x64())
    names = [[unit.name for unit in draw_units(sites, NAMES, per)] for per in ("layer", "model")]
    assert names == [["block", "(model)"], ["(model)"]]
    units = draw_units(sites, ("relu", "tanh"), "site")
    assert [unit.labels() for unit in units][:2] == [["own", "tanh"], ["own", "relu"]]


def test_its_state_brings_it_back() -> None:
    sites, mixture = of(Net().double())
    with torch.no_grad():
        for alpha in mixture.alphas:
            alpha.normal_()
    mixture.drop(0.9)
    mixture.temperature, mixture.matching = 0.3, 0.2
    again = Mixture.from_state(Sites.from_dict(sites.to_dict()), mixture.state_dict())
    assert again.table() == mixture.table()
    assert again.alive == mixture.alive
    assert again.best() == mixture.best()
