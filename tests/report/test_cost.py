import copy
from typing import Any

import pytest
import torch
from networks import CASES, IMAGE, Net, Snapshot, build, build_case, cases, inputs, n_params, recurrent, sequential
from torch import nn
from torch.nn import functional as F

from lightning_prune import PruningError, TraceError, count_cost, prune_neurons, prune_weights
from lightning_prune.graph.callsites import ModuleCall
from lightning_prune.models import LeNet
from lightning_prune.report.cost import Cost, cost_of_calls

LENET = {  # params, MACs: output positions x kernel x channels, by hand
    "conv1": (6 * 3 * 25 + 6, 28 * 28 * 6 * 3 * 25),
    "conv2": (16 * 6 * 25 + 16, 10 * 10 * 16 * 6 * 25),
    "fc1": (400 * 120 + 120, 400 * 120),
    "fc2": (120 * 84 + 84, 120 * 84),
    "fc3": (84 * 10 + 10, 84 * 10),
}


@pytest.mark.parametrize("batch", [1, 7])
def test_lenet_by_hand(batch: int) -> None:
    cost = count_cost(LeNet(), torch.rand(batch, 3, 32, 32))
    assert (cost.params, cost.macs, cost.bytes) == (62_006, 651_720 * batch, 4 * 62_006)
    assert {name: (layer.params, layer.macs) for name, layer in cost.layers.items()} == {
        name: (params, macs * batch) for name, (params, macs) in LENET.items()
    }


@pytest.mark.parametrize(
    ("make", "shape", "macs"),
    [
        (lambda: nn.Conv1d(3, 8, 3, stride=2, bias=False), (3, 9), 4 * 8 * 3 * 3),
        (lambda: nn.Conv2d(4, 8, 3, padding=1, groups=4), (4, 5, 6), 30 * 8 * 1 * 9),
        (lambda: nn.Conv3d(2, 4, 2, dilation=2), (2, 4, 4, 4), 8 * 4 * 2 * 8),
        (lambda: nn.ConvTranspose2d(3, 5, 2, stride=2), (3, 4, 4), 16 * 3 * 5 * 4),
        (lambda: nn.Linear(5, 7), (3, 5), 3 * 5 * 7),
        (lambda: Net(lambda n, x: x @ x.mT), (4, 3), 4 * 3 * 4),
        (lambda: nn.BatchNorm2d(3), (3, 4, 4), 0),
        (recurrent, (4,), 4 * 6 + 3 * 36 + 12),
    ],
)
@pytest.mark.parametrize("batch", [1, 3])
def test_macs_of_layers_by_hand(make: Any, shape: tuple[int, ...], macs: int, batch: int) -> None:
    assert count_cost(build(make), inputs(shape, batch)).macs == macs * batch


def test_attention_counts_both_products() -> None:
    model = build(lambda: Net(lambda n, x: F.scaled_dot_product_attention(x, x, x)))
    assert count_cost(model, inputs((2, 6, 4), 1)).macs == 2 * (6 * 6 * 4 + 6 * 6 * 4)


@cases(CASES)
def test_layers_add_up(name: str) -> None:
    model, x = build_case(name)
    cost = count_cost(model, x)
    buffers = {id(b): b.numel() * b.element_size() for b in model.buffers()}
    assert cost.params == n_params(model)
    assert cost.bytes == 8 * n_params(model) + sum(buffers.values())
    if name == "tied_square":  # each layer tells what it holds, the model counts what is shared once
        assert sum(layer.params for layer in cost.layers.values()) == cost.params + 36
    elif name not in (
        "tied_transposed",
        "matmul",
        "attention_scores",
        "heads",
    ):  # these multiply outside of their layers
        assert sum(layer.params for layer in cost.layers.values()) == cost.params
        assert sum(layer.macs for layer in cost.layers.values()) == cost.macs
        assert sum(layer.nonzero for layer in cost.layers.values()) == cost.nonzero


def test_a_module_counts_its_childrens_work() -> None:
    model = Net(lambda n, x: n.inner(x) @ n.w, inner=nn.Linear(3, 4), w=nn.Parameter(torch.ones(4, 2)))
    layers = count_cost(model, torch.rand(1, 3)).layers
    assert (layers[""].macs, layers[""].params, layers["inner"].macs) == (20, 8, 12)


def test_nonzero_and_sparsity() -> None:
    model, x = build_case("resnet")
    assert count_cost(model, x).sparsity == 0
    masks = prune_weights(model, 0.75)
    gone = sum(int((~mask).sum()) for mask in masks.values())
    cost = count_cost(model, x)
    assert cost.nonzero == cost.params - gone
    assert cost.sparsity == gone / cost.params
    assert Cost(0, 0, 0, 0, {}).sparsity == 0


def test_bytes_follow_the_dtype_and_buffers_count() -> None:
    model, x = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), torch.rand(2, 3)
    assert count_cost(model, x).bytes == 4 * (16 + 8 + 8) + 8
    assert count_cost(model.bfloat16(), x.bfloat16()).bytes == 2 * (16 + 8 + 8) + 8


@pytest.mark.parametrize("training", [True, False])
@cases(["article", "resnet", "buffers", "batch_norm_average"])
def test_counting_leaves_the_model_as_it_was(name: str, training: bool) -> None:
    model, x = build_case(name)
    model.train(training)
    next(model.children()).train(not training)
    snapshot = Snapshot(model)
    count_cost(model, x)
    snapshot.assert_unchanged()


def test_a_model_is_counted_in_evaluation_mode() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).train()  # one example has no statistics
    assert count_cost(model, torch.rand(1, 3)).macs == 12


def test_inputs_that_do_not_fit_are_an_error_and_nothing_changes() -> None:
    model = build(sequential(nn.BatchNorm2d(3), nn.Dropout(), nn.Conv2d(3, 8, 3))).train()
    x, snapshot = inputs((4, 5, 5)), Snapshot(model)
    with pytest.raises((TraceError, RuntimeError)):
        count_cost(model, x)
    snapshot.assert_unchanged()
    with pytest.raises(PruningError, match="example_inputs"):
        count_cost(model, 3)


@pytest.mark.parametrize("kind", ["tuple", "dict"])
def test_several_inputs(kind: str) -> None:
    model = build(lambda: Net(lambda n, x, y: n.a(x) + y, a=nn.Linear(3, 4)))
    x, y = inputs((3,)), inputs((4,))
    assert count_cost(model, (x, y) if kind == "tuple" else {"x": x, "y": y}).macs == 2 * 12


def test_pruned_models_cost_what_their_smaller_layers_cost() -> None:
    model, x = LeNet(), torch.rand(1, 3, 32, 32)
    prune_neurons(model, x, 0.5, scope="layer")
    small = LeNet(channels=(model.conv1.out_channels, model.conv2.out_channels),
                  hidden=(model.fc1.out_features, model.fc2.out_features))  # fmt: skip
    assert count_cost(model, x) == count_cost(small, x)
    assert count_cost(model, x).params < 62_006 / 2


def test_patched_models_can_be_counted() -> None:
    model, x = build_case("article")
    fresh = copy.deepcopy(model)
    plan = prune_neurons(model, x, 0.5)
    assert plan.patches
    channels = [len(plan.kept[f"{name}.bias"][0]) for name in ("conv1", "conv2", "fc1", "fc2")]
    small = LeNet(channels=channels[:2], hidden=channels[2:]).double()
    assert count_cost(model, x) == count_cost(small, x)
    assert count_cost(fresh, x).macs == 2 * 651_720


def test_calls_of_parts_count_under_the_names_that_the_parts_have_in_the_model() -> None:
    """A training step that calls its network by itself, not through the module's own forward."""
    model = build(lambda: Net(lambda n, x: x, net=nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(72, 2)),
                              head=nn.Linear(2, 5)))  # fmt: skip
    calls = (ModuleCall("net", (inputs(IMAGE, 1),), {}), ModuleCall("head", (inputs((2,), 1),), {}))
    cost = cost_of_calls(model, calls)
    assert cost.macs == 9 * 8 * 27 + 144 + 10
    assert {name: layer.macs for name, layer in cost.layers.items()} == {
        "net.0": 9 * 8 * 27,
        "net.2": 144,
        "head": 10,
    }


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("context", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_torchs_own_attention_counts_its_projections_and_products(context: Any, train: bool) -> None:
    """Without gradients, in evaluation mode, torch runs it as one fused call."""
    layer = nn.TransformerEncoderLayer(12, 4, 20, batch_first=True).double().train(train)
    attention = 4 * 12 * 12 + 2 * 5 * 12
    with context():
        assert count_cost(layer.self_attn, (inputs((5, 12)),) * 3).macs == 2 * 5 * attention
        assert count_cost(layer, inputs((5, 12))).macs == 2 * 5 * (attention + 2 * 12 * 20)
