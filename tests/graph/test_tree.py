import gc
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.graph.tree import TensorMap, named_tensors, tensors_of_call, unique_tensors


def test_tensors_are_told_apart_by_identity() -> None:
    held: TensorMap[str] = TensorMap()
    one, same = torch.ones(2), torch.ones(2)
    held[one] = "one"
    assert (one in held, same in held) == (True, False)
    assert (held.get(one), held.get(same)) == ("one", None)
    held[one] = "two"
    assert held[one] == "two"


def test_a_tensor_that_is_gone_is_forgotten() -> None:
    held: TensorMap[int] = TensorMap()
    for number in range(1000):  # their ids are used again
        tensor = torch.zeros(1)
        assert tensor not in held
        held[tensor] = number
        del tensor
    gc.collect()
    assert not held._held


def test_a_map_that_is_gone_leaves_nothing() -> None:
    held: TensorMap[Tensor] = TensorMap()
    key, value = torch.ones(1), torch.ones(1)
    held[key] = value
    left = weakref.ref(value)
    gc.disable()
    try:
        del held, value
        assert left() is None
    finally:
        gc.enable()


def test_a_tensor_that_only_autograd_holds_is_still_known() -> None:
    held: TensorMap[int] = TensorMap()
    x = torch.rand(3, requires_grad=True)
    y = x * 2
    held[y] = 1
    z: Any = y.sin()
    del y
    gc.collect()
    assert held.get(z.grad_fn._saved_self) == 1


def test_named_tensors_are_those_of_torch() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Sequential(nn.Linear(2, 2)))
    net.again, net.nothing = net[0], None
    net[2][0].weight = net[0].weight
    parameters, buffers = unique_tensors(net)
    assert list(parameters.items()) == list(net.named_parameters())
    assert list(buffers.items()) == list(net.named_buffers())
    every = dict(net.named_parameters(remove_duplicate=False)) | dict(net.named_buffers(remove_duplicate=False))
    assert list(named_tensors(net).items()) == list(every.items())


def test_tensors_of_a_call_in_order() -> None:
    a, b, c = (torch.zeros(size) for size in (1, 2, 3))
    found: list[Tensor] = tensors_of_call(a, [b, None, (c, 1)], 2.0, "x", None)
    assert [len(each) for each in found] == [1, 2, 3]
