import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from networks import (
    Article,
    Literal,
    Net,
    Snapshot,
    Tied,
    assert_close,
    assert_same_outputs,
    build,
    build_case,
    cases,
    inputs,
    mask,
    resnet,
    sequential,
    shared_block,
    sliced,
    step,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from lightning_prune import PruningError, prune_neurons
from lightning_prune.pruning.change import CHUNK
from lightning_prune.pruning.surgery import enlarge, fit_shapes, named_tensors, shrink, take

Kept = Mapping[str, Mapping[int, Sequence[int]]]

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05),
    "sgd_momentum": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=1e-2),
    "sgd_nesterov": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True, foreach=False),
    "adam": lambda p: torch.optim.Adam(p, 0.02),
    "adam_amsgrad": lambda p: torch.optim.Adam(p, 0.02, amsgrad=True, weight_decay=1e-2, foreach=False),
    "adamw": lambda p: torch.optim.AdamW(p, 0.02, weight_decay=0.1),
    "adamax": lambda p: torch.optim.Adamax(p, 0.02),
    "nadam": lambda p: torch.optim.NAdam(p, 0.02),
    "radam": lambda p: torch.optim.RAdam(p, 0.02),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.5, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.05, initial_accumulator_value=0.1),
    "adadelta": lambda p: torch.optim.Adadelta(p, 0.5),
    "asgd": lambda p: torch.optim.ASGD(p, 0.05),
    "rprop": lambda p: torch.optim.Rprop(p, 0.01),
}


def head_and_body(make: Callable[[Any], torch.optim.Optimizer], model: nn.Module) -> torch.optim.Optimizer:
    """Two param groups with learning rates of their own."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = make([{"params": parameters[:-2]}, {"params": parameters[-2:], "lr": 0.03}])
    return optimizer


def check_training(make: Callable[[], nn.Module], shape: tuple[int, ...], optimizer: str, steps: int = 6) -> nn.Module:
    """Train, prune, train, prune, train; the dense twin trains along with its masks reapplied every step."""
    model = build(make).train()
    twin = copy.deepcopy(model)
    optimizers = [head_and_body(OPTIMIZERS[optimizer], net) for net in (model, twin)]
    kept: Kept = {}
    whole: Any = None
    for number in range(3 * steps):
        if number in (steps, 2 * steps):
            plan = prune_neurons(model, inputs(shape), 0.25, optimizer=optimizers[0])
            whole = plan if whole is None else whole.then(plan)
            kept = whole.kept
            mask(twin, optimizers[1], kept)
        step(model, optimizers[0], shape, number)
        step(twin, optimizers[1], shape, number)
        mask(twin, optimizers[1], kept)
    expected = {name: sliced(t.detach(), kept.get(name, {})) for name, t in named_tensors(twin).items()}
    actual = {name: t.detach() for name, t in named_tensors(model).items()}
    assert set(actual) == set(expected)
    for name, value in actual.items():
        assert_close([value], [expected[name]], 1e-8)
    held = [id(p) for group in optimizers[0].param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert {id(p) for p in optimizers[0].state} <= set(held)
    assert [len(g["params"]) for g in optimizers[0].param_groups] == [
        len(g["params"]) for g in optimizers[1].param_groups
    ]
    return model


def smooth() -> nn.Module:
    """Every kind of layer, without kinks: a rounding difference stays one.

    No bias in front of the batch norm: its gradient is zero but for rounding, which Adam would blow up.
    """
    layers = [nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.SiLU(), nn.Conv2d(8, 8, 2, groups=8), nn.Tanh()]
    layers += [nn.Flatten(), nn.Linear(32, 6), nn.Softplus(), nn.Linear(6, 2)]
    return nn.Sequential(*layers)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_after_removal_equals_training_the_masked_twin(optimizer: str) -> None:
    check_training(smooth, (3, 5, 5), optimizer)


@pytest.mark.parametrize("optimizer", ["sgd_nesterov", "adamw"])
@pytest.mark.parametrize(
    ("make", "shape"),
    [(resnet, (3, 8, 8)), (Literal, (3, 8, 8)), (Tied, (5,)), (shared_block, (4,)), (Article, (3, 32, 32))],
)
def test_training_equality_holds_for_other_networks(make: Any, shape: tuple[int, ...], optimizer: str) -> None:
    steps = 2 if make is Article else 4
    model = check_training(make, shape, optimizer, steps)
    if make is shared_block:
        assert model[4].weight is model[2].weight


def test_frozen_parameters_stay_frozen_while_the_rest_trains() -> None:
    def make() -> nn.Module:
        model = smooth()
        model[0].requires_grad_(False)
        model[6].bias.requires_grad_(False)
        return model

    model = check_training(make, (3, 5, 5), "sgd_momentum")
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["0.weight", "6.bias"]


def test_tied_weights_stay_tied() -> None:
    model = build(shared_block)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    step(model, optimizer, (4,), 0)
    prune_neurons(model, inputs((4,)), 0.5, optimizer=optimizer)
    assert model[4].weight is model[2].weight
    assert model[4].weight.shape == (3, 3)
    assert len(list(model.parameters())) == len(optimizer.param_groups[0]["params"]) == 7
    step(model, optimizer, (4,), 1)
    assert model[4].weight is model[2].weight


def test_gradients_are_sliced() -> None:
    model, x = build_case("resnet")
    model(x).square().sum().backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters()}
    plan = prune_neurons(model, x, 0.5)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, sliced(before[name], plan.kept.get(name, {})))


def test_no_gradient_stays_no_gradient() -> None:
    model, x = build_case("resnet")
    prune_neurons(model, x, 0.5)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_parameters_keep_their_own_attributes() -> None:
    model, x = build_case("mlp")
    model[0].weight.tag = "mine"
    prune_neurons(model, x, 0.5)
    assert model[0].weight.tag == "mine"


def test_the_scheduler_still_steers_the_optimizer() -> None:
    model = build(smooth).train()
    optimizer = torch.optim.SGD(model.parameters(), 1.0, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    groups = optimizer.param_groups
    step(model, optimizer, (3, 5, 5), 0)
    scheduler.step()
    prune_neurons(model, inputs((3, 5, 5)), 0.5, optimizer=optimizer)
    step(model, optimizer, (3, 5, 5), 1)
    scheduler.step()
    assert scheduler.optimizer is optimizer
    assert optimizer.param_groups is groups
    assert optimizer.param_groups[0]["lr"] == 0.25


def test_several_optimizers_follow() -> None:
    model = build(smooth).train()
    half = len(list(model.parameters())) // 2
    first = torch.optim.Adam(list(model.parameters())[:half])
    second = torch.optim.SGD(list(model.parameters())[half:], 0.1, momentum=0.9)
    for optimizer in (first, second):
        step(model, optimizer, (3, 5, 5), 0)
    prune_neurons(model, inputs((3, 5, 5)), 0.5, optimizer=[first, second])
    held = [p for optimizer in (first, second) for p in optimizer.param_groups[0]["params"]]
    assert list(map(id, held)) == list(map(id, model.parameters()))
    for optimizer in (first, second):
        assert set(optimizer.state) == set(optimizer.param_groups[0]["params"])
        step(model, optimizer, (3, 5, 5), 1)


def test_the_optimizers_state_dict_goes_into_a_new_optimizer() -> None:
    model = build(smooth).train()
    optimizer = torch.optim.AdamW(model.parameters())
    step(model, optimizer, (3, 5, 5), 0)
    prune_neurons(model, inputs((3, 5, 5)), 0.5, optimizer=optimizer)
    twin = copy.deepcopy(model)
    other = torch.optim.AdamW(twin.parameters())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for net, each in ((model, optimizer), (twin, other)):
        step(net, each, (3, 5, 5), 1)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


class Odd(torch.optim.SGD):
    """Keeps more per parameter than tensors of its shape."""

    def __init__(self, parameters: Any, value: Callable[[Tensor], Any]) -> None:
        super().__init__(parameters, 0.1)
        self.value = value

    def step(self, closure: Any = None) -> None:
        super().step()
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter].setdefault("odd", self.value(parameter))


@pytest.mark.parametrize(
    ("value", "follows"),
    [
        (lambda p: p.sum(), True),
        (lambda p: 3, True),
        (lambda p: None, True),
        (lambda p: "text", True),
        (lambda p: p.clone().bool(), True),
        (lambda p: p.new_ones(p.numel() + 1), False),
        (lambda p: [p.clone()], True),
        (lambda p: {"inner": p.clone()}, True),
        (lambda p: [p.new_ones(p.numel() + 1)], False),
        (lambda p: {"inner": p.new_ones(p.numel() + 1)}, False),
    ],
)
def test_state_of_any_kind_follows_or_is_reset_with_a_warning_that_names_it(
    value: Callable[[Tensor], Any], follows: bool
) -> None:
    model = build(smooth).train()
    optimizer = Odd(model.parameters(), value)
    step(model, optimizer, (3, 5, 5), 0)
    last = optimizer.state[model[8].bias]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        plan = prune_neurons(model, inputs((3, 5, 5)), 0.5, optimizer=optimizer)
    named = [str(warning.message) for warning in caught]
    assert len(named) == (0 if follows else len([name for name in plan.kept if "running" not in name]))
    assert all("Odd keeps 'odd'" in message for message in named)
    assert bool(optimizer.state[model[0].weight]) is follows
    assert optimizer.state[model[8].bias] is last
    step(model, optimizer, (3, 5, 5), 1)


@pytest.mark.filterwarnings("ignore:LBFGS keeps")
@pytest.mark.parametrize(
    ("name", "options"),
    [("Adafactor", {"lr": 0.05}), ("LBFGS", {"line_search_fn": "strong_wolfe"})],
)
@pytest.mark.parametrize("layer", ["0", "6"])
def test_an_optimizer_with_odd_state_trains_on(name: str, options: Any, layer: str) -> None:
    """LBFGS keeps a history over all parameters together, at the first of them, which may not shrink itself."""
    model, x, target = build(smooth), inputs((3, 5, 5), 8), inputs((2,), 8, 1)
    if not hasattr(torch.optim, name):
        pytest.skip(f"this torch has no {name}")
    optimizer = getattr(torch.optim, name)(model.parameters(), **options)

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.mse_loss(model.eval()(x), target)
        value.backward()
        return value

    for _ in range(3):
        optimizer.step(loss)
    prune_neurons(model, x, 0.5, include=layer, optimizer=optimizer)
    before = loss().item()
    parameters = [p.detach().clone() for p in model.parameters()]
    for _ in range(10):
        optimizer.step(loss)
    assert loss().item() < before
    assert not any(torch.equal(a, b) for a, b in zip(parameters, model.parameters(), strict=True))


def test_an_optimizer_of_something_else_is_left_alone() -> None:
    model, other = build(smooth), build(smooth)
    optimizer = torch.optim.Adam(other.parameters())
    step(other, optimizer, (3, 5, 5), 0)
    snapshot = Snapshot(other, optimizer)
    prune_neurons(model, inputs((3, 5, 5)), 0.5, optimizer=optimizer)
    snapshot.assert_unchanged()


# shrink and enlarge


def test_take_is_index_select_by_hand() -> None:
    tensor = torch.arange(24.0).view(2, 3, 4).transpose(0, 2).requires_grad_()
    assert torch.equal(take(tensor, {0: [0, 3], 1: [2]}), tensor.detach()[[0, 3]][:, [2]])
    assert take(tensor, {0: [1]}).is_contiguous()
    assert not take(tensor, {0: [1]}).requires_grad


@pytest.mark.parametrize("dim", [1, 2])
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_what_is_taken_of_large_tensors_piece_by_piece_is_the_same(dim: int, order: torch.memory_format) -> None:
    tensor = torch.rand(700, 40, 6, 7).to(memory_format=order)
    assert tensor.numel() > 2 * CHUNK
    rows, index = torch.randperm(700)[:301], torch.arange(0, tensor.size(dim), 2)
    taken = take(tensor, {0: rows, dim: index})
    assert torch.equal(taken, tensor[rows].index_select(dim, index))
    assert taken.is_contiguous()


def test_shrink_and_undo_give_the_same_objects_back() -> None:
    model, x = build_case("resnet")
    optimizer = torch.optim.Adam(model.parameters())
    model(x).sum().backward()
    optimizer.step()
    snapshot = Snapshot(model, optimizer)
    change = shrink(model, {"0.weight": {0: [1, 2]}, "1.running_mean": {0: [1, 2]}}, [optimizer])
    assert model[0].weight.shape == (2, 3, 3, 3)
    assert model[0].out_channels == 2
    assert model[1].running_mean.shape == (2,)
    change.undo()
    snapshot.assert_unchanged()
    change.undo()
    snapshot.assert_unchanged()


@pytest.mark.parametrize(
    "kept",
    [
        {"9.weight": {0: [0]}},
        {"0.weight": {0: []}},
        {"0.weight": {0: [8]}},
        {"0.weight": {0: [-1]}},
        {"0.weight": {4: [0]}},
        {"0.weight": {-1: [0]}},
        {"0.weight": {0: [0]}, "1.weight": {0: [99]}},
    ],
)
def test_what_does_not_exist_is_an_error_and_nothing_changes(kept: Kept) -> None:
    model = build(resnet)
    snapshot = Snapshot(model)
    with pytest.raises(PruningError, match=r"no such|no parameter or buffer"):
        shrink(model, kept)
    snapshot.assert_unchanged()


@cases(["resnet", "article", "views", "depthwise2d", "depthwise_transposed", "transposed2d", "batch_norm_plain"])
def test_enlarge_gives_the_dense_architecture_back(name: str) -> None:
    model, x = build_case(name)
    shapes = {key: t.shape for key, t in named_tensors(model).items()}
    text = repr(model)
    plan = prune_neurons(model, x, 0.5)
    enlarge(model, plan.shapes, plan.attributes)
    assert {key: t.shape for key, t in named_tensors(model).items()} == shapes
    assert repr(model) == text


def test_indices_are_counted_anew_and_numbers_are_set_and_both_come_back() -> None:
    def make() -> nn.Module:
        net = Net(lambda n, x: x, buffers={"order": torch.tensor([3, 0, 2])}, inner=nn.Linear(4, 4))
        net.width, net.pair, net.sizes = 4, (4, 9), [4, 9]
        return net

    model = build(make)
    snapshot, pair, listed = Snapshot(model), model.pair, model.sizes
    numbers = {"": {"width": 3, "pair": (3, 9), "sizes": (3, 9), "no_such": 3}, "inner": {"in_features": 3}}
    change = shrink(model, {"order": {0: [0, 2]}}, counts={"order": [0, 2, 3]}, numbers=numbers)
    assert model.order.tolist() == [2, 1]
    assert (model.width, model.pair, model.sizes, model.inner.in_features) == (3, (3, 9), [3, 9], 3)
    assert not hasattr(model, "no_such")
    assert change.attributes == {
        "": {"width": (4, 3), "pair": ((4, 9), (3, 9)), "sizes": ([4, 9], [3, 9])},
        "inner": {"in_features": (4, 3)},
    }
    change.undo()
    snapshot.assert_unchanged()
    assert model.pair is pair
    assert model.sizes is listed
    change = shrink(model, {}, counts={"order": [0, 2, 3]})  # what they count along shrinks, they keep their length
    assert model.order.tolist() == [2, 0, 1]
    change.undo()
    snapshot.assert_unchanged()
    with pytest.raises(PruningError, match="no module 'nowhere'"):
        shrink(model, {"order": {0: [0]}}, numbers={"nowhere": {"width": 1}})
    with pytest.raises(PruningError, match="no parameter or buffer 'disorder'"):
        shrink(model, {"order": {0: [0]}}, counts={"disorder": [0]})
    snapshot.assert_unchanged()


@cases(["grouped", "grouped_transposed", "depthwise2d", "group_norm", "lstm", "attention", "resnet", "batch_norm1d"])
def test_shapes_alone_tell_torchs_layers_their_sizes(name: str) -> None:
    """Another state will be loaded: which indices were kept is not known then."""
    model, x = build_case(name)
    fresh = copy.deepcopy(model)
    prune_neurons(model, x, 0.4)
    change = fit_shapes(fresh, {key: list(t.shape) for key, t in named_tensors(model).items()})
    assert {key: t.shape for key, t in named_tensors(fresh).items()} == {
        key: t.shape for key, t in named_tensors(model).items()
    }
    if name != "group_norm":  # its number of groups is in no shape
        assert repr(fresh) == repr(model)
        fresh.load_state_dict(model.state_dict())
        assert_same_outputs(fresh, model, x)
    dense = build_case(name)[0]
    change.undo()
    assert repr(fresh) == repr(dense)
    fresh.load_state_dict(dense.state_dict())
    assert_same_outputs(fresh, dense, x)


def test_shapes_that_are_no_smaller_ones_are_refused() -> None:
    model = build(resnet)
    snapshot = Snapshot(model)
    for shape in ([9, 3, 3, 3], [8, 3, 3], [8]):
        with pytest.raises(PruningError, match="another architecture"):
            fit_shapes(model, {"1.weight": [4], "0.weight": shape})
        snapshot.assert_unchanged()


def test_hooks_of_a_parameter_stay_on_it() -> None:
    model, x = build_case("mlp")
    heard: list[tuple[int, ...]] = []
    model[0].weight.register_hook(lambda grad: heard.append(tuple(grad.shape)))
    model[0].weight.register_post_accumulate_grad_hook(lambda p: heard.append(tuple(p.grad.shape)))
    prune_neurons(model, x, 0.5, include="0")
    model(x).sum().backward()
    assert heard == [tuple(model[0].weight.shape)] * 2


def test_a_depthwise_layer_survives_down_to_one_channel() -> None:
    make = sequential(nn.Conv2d(3, 2, 1), nn.Conv2d(2, 2, 3, groups=2), nn.ReLU(), nn.Conv2d(2, 2, 1))
    model, x = build(make), inputs((3, 4, 4))
    text = repr(model)
    plan = prune_neurons(model, x, 0.5)
    assert (model[1].groups, model[1].in_channels, model[1].out_channels) == (1, 1, 1)
    assert model(x).shape == (2, 2, 2, 2)
    enlarge(model, plan.shapes, plan.attributes)
    assert repr(model) == text


def test_non_persistent_buffers_and_shared_modules_follow() -> None:
    act = nn.PReLU(6)
    layers = {"a": nn.Linear(3, 6), "b": nn.Linear(6, 6), "act": act, "same": act, "c": nn.Linear(6, 2)}
    run = lambda n, x: n.c(n.same(n.b(n.act(n.a(x)) * n.scale)))  # noqa: E731
    model = build(lambda: Net(run, transient={"scale": torch.rand(6)}, **layers))
    prune_neurons(model, inputs((3,)), 0.5)
    assert len(model.scale) == model.act.num_parameters == model.a.out_features == model.b.out_features == 3
    assert "scale" not in model.state_dict()
    assert model.act is model.same


def parametrized() -> nn.Sequential:
    return nn.Sequential(
        parametrizations.weight_norm(nn.Conv1d(3, 8, 3)),
        nn.ReLU(),
        parametrizations.weight_norm(nn.Conv1d(8, 8, 3, groups=8)),
        nn.ReLU(),
        parametrizations.spectral_norm(nn.ConvTranspose1d(8, 6, 3)),
        nn.ReLU(),
        parametrizations.orthogonal(nn.Linear(9, 9)),
        nn.Flatten(),
        parametrizations.spectral_norm(nn.Linear(54, 10)),
        nn.ReLU(),
        parametrizations.weight_norm(nn.Linear(10, 2)),
    )


@pytest.mark.parametrize("training", [True, False])
def test_parametrized_layers_tell_their_sizes_after_each_removal(training: bool) -> None:
    model, x = parametrized().train(training), torch.rand(2, 3, 11)
    dense = copy.deepcopy(model)
    for amount in (0.3, 0.3):
        plan = prune_neurons(model, x, amount)
        one, depthwise, transposed, first, last = (model[i] for i in (0, 2, 4, 8, 10))
        assert one.out_channels == one.weight.size(0) == depthwise.in_channels == depthwise.out_channels
        assert depthwise.groups == depthwise.weight.size(0) == transposed.in_channels == transposed.weight.size(0)
        assert transposed.out_channels == transposed.weight.size(1) == first.in_features / 9
        assert first.out_features == first.weight.size(0) == last.in_features == last.weight.size(1)
        assert one.out_channels < 8
        assert first.out_features < 10
        assert first.parametrizations.weight.training == training
        plan.apply(dense)
        assert repr(dense) == repr(model)
    model(x).sum().backward()
