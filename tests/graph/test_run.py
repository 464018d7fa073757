"""A user's model is run without leaving a trace in it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lightning_prune.graph.run import doubled, undisturbed
from lightning_prune.graph.tree import modules_of, named_tensors, tensors


def test_statistics_of_batch_norm_are_put_back() -> None:
    """They change without being counted as written to (`Tensor._version`)."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    before = copy.deepcopy(net.state_dict())
    with undisturbed(net):
        net(torch.randn(2, 3, 5, 5))
        assert not torch.equal(net[1].running_mean, before["1.running_mean"])
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_modules_are_found_as_torch_finds_them() -> None:
    """In the same order, a shared one once, under its first name; what is not there is left out."""
    shared = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    net = nn.Sequential(shared, nn.ModuleDict({"a": nn.Sequential(nn.Conv2d(1, 1, 1), shared[0]), "b": shared}))
    net.append(nn.MultiheadAttention(4, 2))
    net.register_module("none", None)
    net[1]["a"].again = net  # type: ignore[assignment]  # a cycle
    assert list(modules_of(net).items()) == list(net.named_modules())


@pytest.mark.parametrize("net", [nn.Linear(3, 3), nn.LSTM(3, 4, 2), nn.BatchNorm1d(3)])
def test_a_model_in_double_precision_is_itself_again_afterwards(net: nn.Module) -> None:
    own = dict(named_tensors(net))
    x = torch.randn(5, 3)
    twin = copy.deepcopy(net).double()
    with doubled(net):
        result, expected = net(x.double()), twin(x.double())
    for one, other in zip(tensors(result), tensors(expected), strict=True):
        assert one.dtype == torch.float64
        assert torch.equal(one, other)
    assert all(value is own[name] for name, value in named_tensors(net).items())
    assert all(each.dtype == torch.float32 for each in tensors(net(x)))
