"""Every construct of ``tests/constructs`` is pruned: exactly where it can be, in steps, and again from the plan."""

import dataclasses
import json
import pickle
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from constructs import CONSTRUCTS, Construct
from networks import assert_close, build, complement, n_params
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_prune import Plan, PruningError, prune_neurons

every = pytest.mark.parametrize("name", list(CONSTRUCTS))

MAGNITUDES = {"original1": "original0", "weight_v": "weight_g"}
"""The rows of a weight norm whose magnitude is zero already stay: a row of zeros has no direction."""

DIVISORS = ("std",)
"""Buffers that something is divided by."""


def make(case: Construct, *, train: bool = False) -> nn.Module:
    """The same network each time; never a deep copy, which the old hooks of ``nn.utils`` do not take."""
    return build(case.build).train(train)


def leaves(out: Any) -> list[Tensor]:
    """The tensors of an output, also those in dataclasses."""
    found = []
    for leaf in pytree.tree_leaves(out, is_leaf=dataclasses.is_dataclass):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif dataclasses.is_dataclass(leaf):
            found += [each for field in dataclasses.fields(leaf) for each in leaves(getattr(leaf, field.name))]
    return found


def call(model: nn.Module, x: Any) -> list[Tensor]:
    out = leaves(model(**x) if isinstance(x, dict) else model(*x) if isinstance(x, tuple) else model(x))
    assert out
    return out


@torch.no_grad()
def outputs(model: nn.Module, *examples: Any) -> list[Tensor]:
    return [leaf for x in examples for leaf in call(model, x)]


def train_step(model: nn.Module, x: Any) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    loss = sum(leaf.abs().square().mean() for leaf in call(model.train(), x) if leaf.requires_grad)
    assert isinstance(loss, Tensor)
    loss.backward()
    optimizer.step()
    model.eval()
    assert all(torch.isfinite(each).all() for each in model.parameters())


@torch.no_grad()
def masked(case: Construct, kept: Mapping[str, Mapping[int, Sequence[int]]]) -> nn.Module:
    """The dense network with zeros where something was removed; integers are positions, not values."""
    twin = make(case)
    tensors = dict(twin.named_parameters(remove_duplicate=False)) | dict(twin.named_buffers(remove_duplicate=False))
    for name, dims in kept.items():
        for dim, index in dims.items():
            path, _, last = name.rpartition(".")
            stays = last in DIVISORS or (dim == 0 and f"{path}.{MAGNITUDES.get(last)}" in kept)
            if tensors[name].is_floating_point() and not stays:
                for gone in complement(tensors[name].size(dim), index):
                    tensors[name].select(dim, gone).zero_()
    return twin


def is_random(case: Construct) -> bool:
    one, two = make(case, train=True), make(case, train=True)
    return any(not torch.equal(a, b) for a, b in zip(*(outputs(m, case.inputs(2)) for m in (one, two)), strict=True))


@every
def test_dense_networks_run(name: str) -> None:
    case = CONSTRUCTS[name]
    for batch in (2, 3):
        dense = make(case)
        out = outputs(dense, case.inputs(batch))
        assert all(leaf.dtype in (torch.float64, torch.complex128) for leaf in out)
        assert_close(outputs(make(case), case.inputs(batch)), out)
        train_step(dense, case.inputs(batch))


@every
def test_removal_equals_masking(name: str) -> None:
    case = CONSTRUCTS[name]
    model, x = make(case), case.inputs(2)
    if case.approximate or case.frozen:
        with pytest.raises(PruningError, match="no neuron of this model can be pruned"):
            prune_neurons(model, x, 0.5, exact_only=True)
        return
    plan = prune_neurons(model, x, 0.5, exact_only=True)
    twin = masked(case, plan.kept)
    for example in (x, case.inputs(3)):
        assert_close(outputs(model, example), outputs(twin, example))
    if not is_random(case):
        assert_close(outputs(model.train(), x), outputs(twin.train(), x))


@every
def test_three_gradual_steps(name: str) -> None:
    case = CONSTRUCTS[name]
    model, dense = make(case), make(case)
    if case.frozen:
        with pytest.raises(PruningError, match="no neuron of this model can be pruned"):
            prune_neurons(model, case.inputs(2), 0.2)
        return
    for amount in (0.2, 0.25, 0.3):
        prune_neurons(model, case.inputs(2), amount)
        for batch in (2, 3):
            out = outputs(model, case.inputs(batch))
            assert [leaf.shape for leaf in out] == [leaf.shape for leaf in outputs(dense, case.inputs(batch))]
            assert all(torch.isfinite(leaf).all() for leaf in out)
        train_step(model, case.inputs(3))
    assert n_params(model) < n_params(dense)


@every
def test_plan_replays(name: str) -> None:
    case = CONSTRUCTS[name]
    if case.frozen:
        pytest.skip("nothing is pruned")
    model, x = make(case), case.inputs(2)
    plan = prune_neurons(model, x, 0.5)
    expected = outputs(model, x, case.inputs(3))
    for again in (plan, Plan.from_dict(json.loads(json.dumps(plan.to_dict()))), pickle.loads(pickle.dumps(plan))):
        fresh = make(case)
        again.apply(fresh)
        fresh.load_state_dict(model.state_dict())
        assert all(map(torch.equal, outputs(fresh, x, case.inputs(3)), expected))
