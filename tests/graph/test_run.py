"""A user's model is run without leaving a trace in it."""

from __future__ import annotations

import copy

import torch
from torch import nn

from lightning_prune.graph.run import undisturbed


def test_statistics_of_batch_norm_are_put_back() -> None:
    """They change without being counted as written to (`Tensor._version`)."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    before = copy.deepcopy(net.state_dict())
    with undisturbed(net):
        net(torch.randn(2, 3, 5, 5))
        assert not torch.equal(net[1].running_mean, before["1.running_mean"])
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]), name
