from collections.abc import Callable
from typing import Any

import pytest
import torch
from networks import Net, Snapshot, build_case, cases, forward, masked_twin
from torch import Tensor, nn

from lightning_prune import SurgeryError, find_groups
from lightning_prune.graph.run import as_calls
from lightning_prune.graph.verify import TOLERANCE, MaskedModel, compare_outputs, masked_tensors
from lightning_prune.pruning.neurons import remove_neurons

ONE = torch.tensor([1.0, -2.0], dtype=torch.float64)
NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("large", [MaskedModel.LARGE, 0], ids=["at once", "in passing"])
@cases(["article", "resnet", "tied_square", "batch_norm_plain", "buffers", "dense", "picked", "attention", "recurrent"])
def test_masked_outputs_are_those_of_the_twin_made_by_hand(
    name: str, large: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if large parameters are masked one after the other, in the same memory, while their module runs."""
    monkeypatch.setattr(MaskedModel, "LARGE", large)
    model, x = build_case(name)
    groups = find_groups(model, x)
    alive = torch.arange(groups.neurons) % 3 > 0
    kept = groups.kept(alive)
    model.eval()
    snapshot = Snapshot(model)
    masked = MaskedModel(model, kept, groups.unmasked, groups.own)
    twin = masked_twin(model, kept).eval()
    for _ in range(2):
        assert torch.equal(masked.outputs(groups.calls)[0], forward(twin, x)[0])
        snapshot.assert_unchanged()


class ChannelNorm(nn.LayerNorm):
    """A norm over the channels of an image, as ConvNeXt has it."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        return nn.functional.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps).permute(0, 3, 1, 2)


@pytest.mark.parametrize("large", [MaskedModel.LARGE, 0], ids=["at once", "in passing"])
@pytest.mark.parametrize("norm", [ChannelNorm, nn.BatchNorm2d])
def test_masked_outputs_are_those_of_the_smaller_network_whatever_its_norm_and_hooks(
    norm: Callable[[int], nn.Module], large: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MaskedModel, "LARGE", large)
    torch.manual_seed(0)
    last = Net(lambda n, x: n.conv(input=x), conv=nn.Conv2d(6, 2, 1))
    model = nn.Sequential(nn.Conv2d(3, 8, 3), norm(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), last)
    model = model.double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    model[3].register_forward_hook(lambda module, args, output: output * 2)
    x = torch.rand(2, 3, 9, 9, dtype=torch.float64)
    groups = find_groups(model, x)
    alive = torch.arange(groups.neurons) % 3 > 0
    (masked,) = MaskedModel(model, groups.kept(alive), groups.unmasked, groups.own).outputs(groups.calls)
    remove_neurons(model, groups, alive, verify=False)
    torch.testing.assert_close(model(x), masked, rtol=1e-12, atol=1e-12)
    assert sum(p.numel() for p in model.parameters()) < 800


def test_indices_that_are_called_a_weight_stay_as_they_are() -> None:
    model = Net(lambda n, x: x[:, n.weight])
    model.register_buffer("weight", torch.tensor([2, 0, 1]))
    (call,) = as_calls(torch.rand(2, 3))
    (given,) = MaskedModel(model, {"weight": {0: [0, 1]}}).outputs([call])
    assert torch.equal(given, call.args[0][:, [2, 0, 1]])


def test_a_masked_model_that_fails_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MaskedModel, "LARGE", 0)
    model, x = build_case("mlp")
    groups = find_groups(model, x)
    alive = torch.arange(groups.neurons) % 3 > 0
    left: list[Tensor] = []

    def fail(module: nn.Module, args: Any, output: Any) -> None:
        left.append(output.detach().clone())
        raise ValueError("no")

    snapshot = Snapshot(model)
    handle = model[0].register_forward_hook(fail)
    with pytest.raises(ValueError, match="no"):
        MaskedModel(model, groups.kept(alive), groups.unmasked, groups.own).outputs(groups.calls)
    handle.remove()
    assert int(left[0].eq(0).all(0).sum()) > 0  # it ran masked
    snapshot.assert_unchanged()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_masked_tensors_are_zero_where_nothing_is_kept_but_for_indices_and_what_is_to_stay() -> None:
    whole = {"w": torch.ones(3, 4), "i": torch.arange(4), "v": torch.ones(3, 2), "c": torch.ones(4, dtype=torch.cfloat)}
    kept = {"w": {0: [0, 2], 1: torch.tensor([1, 2])}, "i": {0: [0]}, "v": {0: [1], 1: [0]}, "c": {0: [3]}}
    masked = masked_tensors(whole, kept, {("v", 0)})
    assert {name: tensor.tolist() for name, tensor in masked.items()} == {
        "w": [[0, 1, 1, 0], [0, 0, 0, 0], [0, 1, 1, 0]],
        "v": [[1, 0], [1, 0], [1, 0]],
        "c": [0, 0, 0, 1],
    }
    assert all(bool(tensor.all()) for name, tensor in whole.items() if name != "i")


@pytest.mark.parametrize(
    ("expected", "actual"),
    [
        (ONE, ONE * (1 + 1e-12)),
        ({"a": ONE, "b": [ONE, 3, None]}, {"a": ONE.clone(), "b": [ONE, 4, None]}),
        (torch.tensor([NAN, INF, 1.0]), torch.tensor([INF, NAN, 1.0])),
        (torch.tensor([1, 2]), torch.tensor([1, 3])),
        (torch.zeros(0), torch.zeros(0)),
        (ONE.float(), ONE.float() + 1e-4),
    ],
)
def test_outputs_that_agree(expected: Any, actual: Any) -> None:
    """Up to rounding; integers jump where rounding differs."""
    compare_outputs(expected, actual)


@pytest.mark.parametrize(
    ("expected", "actual", "message"),
    [
        (ONE, ONE + 1e-9, "output 0 differs from the masked model's by 1e-09"),
        ((ONE, ONE), (ONE, -ONE), "output 1 differs"),
        (ONE, ONE[:1], r"output 0 has shape \(1,\) after, \(2,\) before"),
        (ONE, ONE[None], r"has shape \(1, 2\) after"),
        ((ONE, ONE), (ONE,), "1 outputs after the removal, 2 before"),
        (ONE, torch.tensor([1.0, NAN], dtype=torch.float64), "output 0 differs"),
        (torch.tensor([INF, 1.0]), torch.tensor([1.0, 1.0]), "output 0 differs"),
        (torch.zeros(2), torch.full((2,), 1e-9), "output 0 differs"),
        (torch.complex(ONE, ONE), torch.complex(ONE, -ONE), "output 0 differs"),
    ],
)
def test_outputs_that_differ(expected: Any, actual: Any, message: str) -> None:
    with pytest.raises(SurgeryError, match=message):
        compare_outputs(expected, actual)


def test_tolerances_grow_with_the_rounding_of_the_dtype() -> None:
    assert TOLERANCE[torch.float64] == 1e-10 < TOLERANCE[torch.float32] < TOLERANCE[torch.bfloat16]
