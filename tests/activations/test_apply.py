"""Chosen activations in a model equal the model written with them; it stays a plain module."""

from __future__ import annotations

import copy
import io
import json
import pickle
from pathlib import Path

import pytest
import torch
from activation_nets import Block, Net, Varying
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_prune import Plan, PruningError, load_pruned, prune_neurons, save_pruned
from lightning_prune.activations.apply import apply_changes, changes_for, present_activations, take_back_changes
from lightning_prune.activations.candidates import Choice
from lightning_prune.activations.sites import find_activations

CHOICES = {
    "block.relu#0": Choice("sine"),
    "block.relu#1": Choice("elu", (("alpha", 0.7),)),
    "block.relu#2": Choice("gelu"),
    "act": Choice("tanh"),
    "elu#0": Choice("silu"),
    "relu#0": Choice("identity"),
}

OLD = [int(part) for part in torch.__version__.split(".")[:2]] < [2, 7]
OLD_COMPILER = (
    "torch 2.6 compiles no context manager of contextlib, as around activations that hide calls" if OLD else ""
)


def x64() -> Tensor:
    return torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def written(net: Net, x: Tensor) -> Tensor:
    """`Net` as it would be written with the choices."""
    block = net.block
    x = torch.sin(block.a(x))
    x = torch.tanh(block.b(x))
    x = F.elu(x, 0.7)
    x = F.gelu(block.c(x))
    x = torch.tanh(net.mid(x))
    x = x * torch.sigmoid(net.gate(x))
    return net.out(F.silu(x))


def chosen() -> tuple[Net, Plan]:
    net = Net().double()
    plan = Plan({}, {}, activations=changes_for(net, find_activations(net, x64()), CHOICES))
    plan.apply(net)
    return net, plan


def grads(net: nn.Module, output: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(output.square().sum(), list(net.parameters())))


def test_the_changed_model_is_the_one_written_with_the_choices() -> None:
    net, _ = chosen()
    assert type(net.act) is nn.Tanh
    assert torch.equal(net(x64()), written(net, x64()))
    for one, other in zip(grads(net, net(x64())), grads(net, written(net, x64())), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def test_taking_back_gives_the_model_as_it_was() -> None:
    net, plan = chosen()
    plain = Net().double()
    plain.load_state_dict(net.state_dict())
    assert not torch.equal(net(x64()), plain(x64()))
    plan.take_back(net)
    assert torch.equal(net(x64()), plain(x64()))
    assert repr(net) == repr(plain)
    assert not any("forward" in module.__dict__ for module in net.modules())


def test_a_plan_travels_as_json_and_is_replayed() -> None:
    net, plan = chosen()
    again = Plan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert again == plan
    assert bool(plan)
    fresh = Net().double()
    fresh.load_state_dict(net.state_dict())
    again.apply(fresh)
    assert torch.equal(fresh(x64()), net(x64()))
    old = plan.to_dict()
    del old["activations"]
    assert Plan.from_dict(old) == Plan({}, {})


def test_two_plans_merge_into_what_both_did() -> None:
    def make() -> nn.Sequential:
        return nn.Sequential(Block(), nn.LeakyReLU(0.2), nn.Linear(4, 2)).double()

    net = make()
    plans = []
    for choices in ({"0.relu#1": Choice("elu"), "1": Choice("tanh")}, {"1": Choice("identity")}):
        plans.append(Plan({}, {}, activations=changes_for(net, find_activations(net, x64()), choices)))
        plans[-1].apply(net)
    both = plans[0].then(plans[1])
    fresh = make()
    fresh.load_state_dict(net.state_dict())
    both.apply(fresh)
    assert type(fresh[1]) is nn.Identity
    assert torch.equal(fresh(x64()), net(x64()))
    both.take_back(fresh)
    assert fresh[1].negative_slope == 0.2
    left = find_activations(net, x64()).left
    assert [site.name for site in left] == ["0.relu#0", "0.tanh#0", "0.relu#1", "0.relu#2"]
    assert "replaced already" in left[0].left


class Mixed(nn.Module):
    """A module and functions of the same name in one forward, so that replacing the one shifts the numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.act, self.fc, self.out = nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.fc(x))
        x = torch.tanh(self.fc(x))
        x = F.relu(self.fc(x))
        return self.out(x)


@pytest.mark.parametrize("module", ["tanh", "identity", "relu", "squared_relu", "sine", "swish"])
def test_replacing_a_module_shifts_no_call(module: str) -> None:
    net = Mixed().double()
    sites = find_activations(net, x64())
    assert [site.name for site in sites.sites] == ["act", "tanh#0", "relu#1"]
    choices = {"act": Choice(module), "tanh#0": Choice("sigmoid"), "relu#1": Choice("silu")}
    apply_changes(net, changes_for(net, sites, choices))
    x = torch.sigmoid(net.fc(Choice(module)(net.fc(x64()))))
    assert torch.equal(net(x64()), net.out(F.silu(net.fc(x))))


class Skips(nn.Module):
    """A child with activations of its own runs in training only."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.fc, self.out = Block(), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            x = self.block(x)
        return self.out(F.relu(self.fc(x)))


@pytest.mark.parametrize("training", [True, False])
def test_a_child_that_runs_in_training_only_shifts_no_call(training: bool) -> None:
    net = Skips().double()
    sites = find_activations(net, x64())
    assert sites.varying == ()
    apply_changes(net, changes_for(net, sites, {"relu#0": Choice("tanh")}))
    net.train(training)
    inner = net.block(x64()) if training else x64()
    plain = Block().double()
    plain.load_state_dict(net.block.state_dict())
    assert torch.equal(net.block(x64()), plain(x64()))
    assert torch.equal(net(x64()), net.out(torch.tanh(net.fc(inner))))


def test_a_shared_site_changes_all_its_calls() -> None:
    net = Varying().double().train()
    apply_changes(net, changes_for(net, find_activations(net, x64()), {"relu#all": Choice("tanh")}))
    once, twice = torch.tanh(net.fc(x64())), torch.tanh(net.fc(torch.tanh(net.fc(x64()))))
    assert torch.equal(net.train()(x64()), net.out(twice))
    assert torch.equal(net.eval()(x64()), net.out(once))


def test_copies_pickles_and_files_are_the_same_model(tmp_path: Path) -> None:
    net, _ = chosen()
    expected = net(x64())
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net)), torch.load(file, weights_only=False)):
        assert torch.equal(other(x64()), expected)
        with torch.no_grad():
            other.out.bias.add_(1)
        assert torch.equal(net(x64()), expected)
        torch.testing.assert_close(other(x64()), expected + 1)
    save_pruned(net, tmp_path / "net.safetensors")
    fresh = Net().double()
    assert torch.equal(load_pruned(tmp_path / "net.safetensors", fresh)(x64()), expected)
    assert present_activations(fresh).keys() == present_activations(net).keys()
    with pytest.raises(PruningError, match="doesn't fit"):
        load_pruned(tmp_path / "net.safetensors", nn.Linear(4, 2))


@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects:UserWarning")
@pytest.mark.parametrize("strict", [True, False])
def test_it_can_be_exported(strict: bool) -> None:
    if OLD_COMPILER and strict:
        pytest.skip(OLD_COMPILER)
    for net in (chosen()[0].eval(), skips_changed().eval()):
        program = torch.export.export(net, (x64(),), strict=strict)
        assert torch.equal(program.module()(x64()), net(x64()))


def skips_changed() -> nn.Module:
    net = Skips().double()
    apply_changes(net, changes_for(net, find_activations(net, x64()), {"relu#0": Choice("tanh")}))
    return net


@pytest.mark.skipif(bool(OLD_COMPILER), reason=OLD_COMPILER)
def test_it_can_be_compiled_in_one_graph() -> None:
    for net in (chosen()[0], skips_changed()):
        torch._dynamo.reset()
        compiled = torch.compile(net, fullgraph=True, backend="eager")
        assert torch.equal(compiled(x64()), net(x64()))
        compiled(x64()).sum().backward()
        assert next(net.parameters()).grad is not None


def test_pruning_neurons_and_choosing_activations_go_together() -> None:
    class Sized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(F.relu(self.a(x)).view(-1, 8))

    net = Sized().double()
    plan = Plan({}, {}, activations=changes_for(net, find_activations(net, x64()), {"relu#0": Choice("tanh")}))
    plan.apply(net)
    plan = plan.then(prune_neurons(net, x64(), 0.5))
    assert net.a.out_features == 4
    assert torch.equal(net(x64()), net.b(torch.tanh(net.a(x64()))))
    fresh = Sized().double()
    plan.apply(fresh)
    fresh.load_state_dict(net.state_dict())
    assert torch.equal(fresh(x64()), net(x64()))
    plan.take_back(fresh)
    assert not any("forward" in module.__dict__ for module in fresh.modules())
    assert fresh(x64()).shape == (3, 2)


def test_what_doesnt_fit_is_refused_and_nothing_changes() -> None:
    net, plan = chosen()
    other = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(PruningError, match="Sequential has no"):
        apply_changes(other, plan.activations)
    assert not any("forward" in module.__dict__ for module in other.modules())
    with pytest.raises(PruningError, match=r"no activation site 'nothing'; there are: block.tanh#0"):
        changes_for(net, find_activations(Net().double(), x64()).pick(["block.tanh#0"], None), {"nothing": Choice("elu")})  # fmt: skip
    take_back_changes(net, plan.activations)
    take_back_changes(net, plan.activations)
    assert type(net.act) is nn.LeakyReLU


class ThroughViews(nn.Module):
    """Half of the neurons, changed in place through a view, and then all of them through another."""

    def __init__(self, module: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.act = nn.Linear(4, 6), nn.Linear(6, 3), nn.ReLU(inplace=True) if module else F.relu_

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x) * 1
        self.act(h[:, :3])
        h.view(-1).tanh_()
        torch.sigmoid(h.detach(), out=torch.empty_like(h))  # no site
        return self.b(h)


@pytest.mark.parametrize("module", [False, True], ids=["function", "module"])
def test_what_is_changed_through_a_view_is_changed_by_the_choice_too(module: bool) -> None:
    torch.manual_seed(0)
    net = ThroughViews(module).double()
    choices = {"relu#0": Choice("gelu"), "tanh#0": Choice("silu")}
    sites = find_activations(net, x64())
    assert {site.name for site in (*sites.sites, *sites.left)} == set(choices)
    apply_changes(net, changes_for(net, sites, choices))
    h = net.a(x64())
    expected = net.b(F.silu(torch.cat([F.gelu(h[:, :3]), h[:, 3:]], 1)))
    torch.testing.assert_close(net(x64()), expected)
    gradients = [torch.autograd.grad(y.square().sum(), list(net.parameters())) for y in (net(x64()), expected)]
    torch.testing.assert_close(*gradients)


class Recomputed(nn.Module):
    """A method of its own and a whole part, both checkpointed."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.part = nn.Linear(4, 6), nn.Linear(6, 3), Block()

    def first(self, x: Tensor) -> Tensor:
        return F.silu(self.a(x))

    def forward(self, x: Tensor) -> Tensor:
        x = checkpoint(self.part, x, use_reentrant=False)
        return torch.tanh(self.b(checkpoint(self.first, x, use_reentrant=False))).exp()


def test_only_parts_that_are_modules_are_chosen_for_inside_checkpoints() -> None:
    torch.manual_seed(0)
    net = Recomputed().double()
    sites = find_activations(net, x64())
    assert [(site.name, "checkpoint" in site.left) for site in sites.left] == [("silu#0", True)]
    chosen = {site.name: Choice("elu") for site in sites.sites}
    assert {"part.relu#0", "tanh#0"} <= set(chosen)
    apply_changes(net, changes_for(net, sites, chosen))
    expected = F.elu(net.b(F.silu(net.a(net.part(x64()))))).exp()
    torch.testing.assert_close(net(x64()), expected)
    gradients = [torch.autograd.grad(y.sum(), list(net.parameters())) for y in (net(x64()), expected)]
    torch.testing.assert_close(*gradients)
