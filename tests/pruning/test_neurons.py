import copy
import gc
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import (
    CASES,
    FUNCTIONAL_ACTIVATIONS,
    IMAGE,
    MODULE_ACTIVATIONS,
    Article,
    Auxiliary,
    Literal,
    Net,
    Residual,
    Snapshot,
    activation_case,
    assert_same_outputs,
    build,
    build_case,
    cases,
    dropouts,
    forward,
    inputs,
    masked_twin,
    n_params,
    networks,
    resnet,
    sequential,
)
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_prune import NoEffectWarning, Plan, PruningError, SurgeryError, count_cost, find_groups, prune_neurons
from lightning_prune.pruning import neurons as neurons_module
from lightning_prune.pruning.neurons import remove_neurons

# Law 1: removal equals masking


def check_removal(model: nn.Module, x: Any, *others: Any, amounts: tuple[float, ...], modes: tuple[str, ...]) -> Plan:
    """Prune in steps; the network must give what the dense one gives with the same slices set to zero."""
    dense, plan = copy.deepcopy(model), Plan({}, {})
    for amount in amounts:
        step = prune_neurons(model, x, amount)
        assert step
        plan = plan.then(step)
    assert n_params(model) < n_params(dense)
    assert_same_outputs(model, masked_twin(dense, plan.kept), x, *others, modes=modes)
    return plan


@cases(CASES)
def test_removal_equals_masking(name: str) -> None:
    model, x = build_case(name)
    check_removal(model, x, inputs(CASES[name][1], batch=3, seed=1), amounts=(0.4,), modes=("train",))


@cases(CASES)
def test_three_steps_of_removal_equal_masking_with_the_union(name: str) -> None:
    model, x = build_case(name)
    check_removal(model, x, inputs(CASES[name][1], batch=3, seed=1), amounts=(0.2, 0.2, 0.25), modes=("train",))


@pytest.mark.parametrize("activation", MODULE_ACTIVATIONS + FUNCTIONAL_ACTIVATIONS, ids=str)
def test_removal_equals_masking_behind_every_activation(activation: Any) -> None:
    model = build(lambda: activation_case(activation))
    check_removal(model, inputs(IMAGE), inputs(IMAGE, batch=3), amounts=(0.5,), modes=("train",))


def test_removal_equals_masking_with_dropout() -> None:
    check_removal(build(dropouts).eval(), inputs(IMAGE), inputs(IMAGE, batch=3), amounts=(0.3, 0.3), modes=())


def torchvision_case(name: str) -> nn.Module:
    models = pytest.importorskip("torchvision.models")
    if name == "mobilenet_v2":
        return models.mobilenet_v2(width_mult=0.35, num_classes=7)
    if name == "resnet18":
        return models.resnet18(num_classes=7)
    model = models.vgg11_bn(num_classes=7, init_weights=False) if False else small_vgg(models)
    return model


def small_vgg(models: Any) -> nn.Module:
    """vgg11_bn with its own layers, but not the 100 million weights of its classifier."""
    features = models.vgg.make_layers(models.vgg.cfgs["A"], batch_norm=True)
    model = models.vgg.VGG(nn.Identity(), num_classes=7, init_weights=False)
    return model


@given(networks(), st.sampled_from([0.2, 0.5, 0.7]), st.sampled_from(["global", "layer"]))
def test_removal_equals_masking_in_random_networks(
    drawn: tuple[nn.Module, tuple[int, ...]], amount: float, scope: str
) -> None:
    model, shape = drawn
    dense, x = copy.deepcopy(model), inputs(shape)
    plan = prune_neurons(model, x, amount, scope=scope)
    assert_same_outputs(model, masked_twin(dense, plan.kept), x, inputs(shape, 5, 1), modes=("train",))


@given(networks(), st.integers(0, 2**32 - 1))
def test_two_random_removals_equal_their_union(drawn: tuple[nn.Module, tuple[int, ...]], seed: int) -> None:
    model, shape = drawn
    dense, x = copy.deepcopy(model), inputs(shape)
    generator = torch.Generator().manual_seed(seed)
    union = Plan({}, {})
    for _ in range(2):
        groups = find_groups(model, x)
        alive = torch.rand(groups.neurons, generator=generator) < 0.6
        for numbers in groups.ranges:
            alive[numbers.start] = True
        union = union.then(remove_neurons(model, groups, alive))
    assert_same_outputs(model, masked_twin(dense, union.kept), x, inputs(shape, 5, 1), modes=("train",))
    union.apply(dense)
    assert {n: p.shape for n, p in dense.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    assert all(torch.equal(a, b) for a, b in zip(dense.state_dict().values(), model.state_dict().values(), strict=True))
