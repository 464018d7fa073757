"""NeuronPruning's options in real training: criteria, masks until the end, amounts per layer, repair."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from ids import without_addresses
from lightning.pytorch import callbacks as lightning_callbacks
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_modules import (
    ADAMW,
    CLASSES,
    IMAGE,
    LIGHTNING_WARNINGS,
    SGD,
    Manual,
    Residual,
    SmallLiteralView,
    Spy,
    Task,
    TwoOptimizers,
    WithForward,
    assert_refused,
    assert_same,
    conv_net,
    fit,
    left_hooks,
    neurons,
    optimizer_states,
    seeded,
    snapshot,
    trainer_of,
    weights,
    zeros,
)
from torch import Tensor, nn

from lightning_prune import NoEffectWarning, PruningError, count_cost, find_groups
from lightning_prune.graph.run import run_calls

pytestmark = LIGHTNING_WARNINGS


def images(net: Any, **options: Any) -> Task:
    return Task(net(), shape=IMAGE, **options)


def widths(module: nn.Module) -> list[int]:
    return [layer.weight.size(0) for layer in module.modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]


def left(module: Any) -> int:
    """Neurons that could still go, and the last ones of their group."""
    return find_groups(module.net, torch.randn(2, *IMAGE)).neurons


def own_criterion(rows: Tensor) -> Tensor:
    return rows.square().sum(1)


# -- every option meets its amount, learns on and leaves a plain module ------------------------------------------

OPTIONS: list[dict[str, Any]] = [
    {"criterion": "l2"},
    {"criterion": "lamp"},
    {"criterion": "random"},
    {"criterion": "geometric_median"},
    {"criterion": "activation"},
    {"criterion": "taylor"},
    {"criterion": own_criterion},
    {"criterion": "taylor", "every": 3},
    {"criterion": "activation", "every": 3, "remove": "end"},
    {"remove": "end"},
    {"remove": "end", "schedule": "one_shot"},
    {"recalibrate": 3},
    {"compensate": "least_squares"},
    {"compensate": "least_squares", "recalibrate": 2, "criterion": "taylor"},
    {"scope": "sensitivity"},
    {"min_channels": 2},
]


@pytest.mark.parametrize(
    "options", OPTIONS, ids=lambda options: ", ".join(f"{k}={without_addresses(v)}" for k, v in options.items())
)
@pytest.mark.parametrize("net", [conv_net, Residual, SmallLiteralView])
def test_every_option_meets_its_amount_and_leaves_a_plain_module(net: Any, options: dict[str, Any]) -> None:
    module = seeded(lambda: images(net))
    whole = left(module)
    trainer = fit(module, neurons(0.5, **options), max_epochs=4)
    assert left(module) == whole - round(0.5 * whole)
    assert left_hooks(trainer, module) == []
    assert all(bool(parameter.isfinite().all()) for parameter in module.parameters())
    for parameter in module.parameters():
        state = trainer.optimizers[0].state[parameter]
        assert all(value.shape == parameter.shape for value in state.values() if isinstance(value, Tensor))


def test_norm_scales_decide() -> None:
    module = seeded(lambda: images(Residual))
    norms = [layer for layer in module.net.modules() if isinstance(layer, nn.BatchNorm2d)]
    with torch.no_grad():
        for norm in norms:
            norm.weight[1::2] = 1e-3
    callback = neurons(0.4, criterion="bn_scale", schedule="one_shot", end=0.5)
    fit(module, callback)
    kept = [callback.plan_.kept[f"net.norm{number}.weight"][0] for number in (0, 1)]
    assert sum(map(len, kept)) == 20 - 8
    assert {0, 2, 4, 6} <= set(kept[0])
    assert {0, 2, 4, 6, 8, 10} <= set(kept[1])


@pytest.mark.parametrize("cls", [TwoOptimizers, Manual])
def test_gradients_are_seen_with_manual_optimization(cls: Any) -> None:
    module = seeded(cls)
    before = sum(widths(module))
    fit(module, neurons(0.5, criterion="taylor", end=1.0), max_epochs=4)
    assert sum(widths(module)) < before


def test_a_neuron_without_gradient_goes_first() -> None:
    module = seeded(lambda: images(conv_net, optimizer=functools.partial(torch.optim.SGD, lr=0.0)))
    with torch.no_grad():  # large, but the loss does not see it
        module.net[0].weight[4].mul_(3)
        module.net[2].weight[:, 4] = 0
    callback = neurons(1 / 26, criterion="taylor", schedule="one_shot", end=0.5)
    fit(module, callback)
    assert callback.plan_.kept["net.0.weight"][0] == [0, 1, 2, 3, 5]


def test_a_neuron_that_never_fires_goes_first() -> None:
    module = seeded(lambda: images(conv_net, optimizer=functools.partial(torch.optim.SGD, lr=0.0)))
    with torch.no_grad():
        module.net[0].bias[2] = -100.0
    callback = neurons(1 / 26, criterion="activation", schedule="one_shot", end=0.5)
    fit(module, callback)
    assert callback.plan_.kept["net.0.weight"][0] == [0, 1, 3, 4, 5]


@pytest.mark.parametrize(
    ("amount", "middle", "end"), [(0.25, [4, 7, 8, 4], [3, 6, 3, 4]), (0.0, [4, 8, 8, 4], [3, 8, 3, 4])]
)
def test_amounts_by_layer(amount: float, middle: list[int], end: list[int]) -> None:
    module = seeded(lambda: images(conv_net))
    seen: list[list[int]] = []
    spy = Spy(on_validation_end=lambda *_: seen.append(widths(module)))
    fit(module, neurons(amount, scope={"net.0": 0.5, "net.5": 0.75}, schedule="linear", end=1.0), spy, max_epochs=4)
    assert seen[-1] == end
    assert seen[1] == middle  # half of each amount, to the nearest neuron


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scope": {"nothing*": 0.5}}, r"nothing\*.*matches no module"),
        ({"scope": {"net.0": 0.99}, "min_channels": 3}, r"scope: 0.99 of the 6 neurons of net.0 can't go: at least 3"),
        ({"amount": 0.9, "min_channels": 4}, r"amount=0.9 of the neurons can't be reached: with every group down to 4"),
        ({"criterion": "bn_scale"}, "can judge none of the neurons that may go: no norm layer"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_first_step(options: dict[str, Any], message: str) -> None:
    amount = options.pop("amount", 0.5)
    assert_refused(lambda: images(conv_net), [neurons(amount, **options)], {}, message)


def patterned() -> Task:
    """A linear layer that reads four places of each channel, and one that reads neurons."""
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 16), nn.ReLU()]
    return Task(nn.Sequential(*layers, nn.Linear(16, CLASSES)), shape=IMAGE)


@pytest.mark.parametrize("first", [True, False], ids=["neurons first", "weights first"])
@pytest.mark.parametrize("remove", ["progressive", "end"])
@pytest.mark.parametrize(
    ("pattern", "others", "message"),
    [
        ("2:4", {"exclude": "net.0"}, "2:4 needs the inputs of 'net.6.weight' in groups of 4.*round_to=4"),
        ("4:8", {"include": "net.4"}, "4:8 needs the inputs of 'net.4.weight' in groups of 8.*round_to=2"),
        ("block:4x1", {"include": "net.4"}, "block:4x1 needs the outputs of 'net.4.weight' in groups of 4.*round_to=4"),
    ],
)
def test_a_pattern_that_neurons_would_break_is_refused(
    pattern: str, others: dict[str, Any], message: str, remove: str, first: bool
) -> None:
    ours = [neurons(0.4, remove=remove), weights(0.25, pattern=pattern, **others)]
    assert_refused(patterned, ours if first else ours[::-1], {}, message)


def test_a_pattern_holds_where_neurons_go_by_its_multiples() -> None:
    module = seeded(patterned)
    fit(module, neurons(0.4, round_to=4), weights(0.5, pattern="2:4", exclude="net.0", end=0.5), max_epochs=4)
    assert module.net[6].in_features < 16
    for layer in (module.net[4], module.net[6]):
        assert bool((layer.weight.unflatten(1, (-1, 4)).count_nonzero(-1) == 2).all())


@pytest.mark.parametrize("criterion", ["l1", "l2", "geometric_median", "lamp", "activation"])
def test_a_model_that_has_diverged_is_refused(criterion: str) -> None:
    module = seeded(lambda: images(conv_net))
    spoil = Spy(on_train_epoch_end=lambda *_: module.net[2].weight.data.fill_(math.nan))
    with pytest.raises(PruningError, match="score that is NaN or infinite; nothing was pruned"):
        fit(module, neurons(0.5, criterion=criterion, start=1, end=3), spoil, max_epochs=4)
    assert widths(module) == [6, 8, 12, 4]


# -- latency ----------------------------------------------------------------------------------------------------


def test_latency_is_a_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time is replaced by MACs, so that the outcome is known: at or just past the fraction."""

    def fake(models: Any, calls: Any, *, seconds: float = 1.0) -> list[float]:
        return [float(count_cost(model.net, torch.rand(1, *IMAGE)).macs) for model in models]

    monkeypatch.setattr("lightning_prune.pruning.latency.latencies", fake)
    module = seeded(lambda: images(conv_net))
    whole = count_cost(module.net, torch.rand(1, *IMAGE)).macs
    callback = neurons(0.5, of="latency")
    fit(module, callback, max_epochs=4)
    assert 0.42 * whole < count_cost(module.net, torch.rand(1, *IMAGE)).macs <= 0.5 * whole
    assert callback.state_dict()["latency_macs"] == pytest.approx(0.5, abs=1 / 32)


def test_a_latency_is_measured_between_forward_and_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch norm's backward needs its buffers as its forward left them."""

    def fake(models: Any, calls: Any, *, seconds: float = 1.0) -> list[float]:
        for model in models:
            model.eval()
            run_calls(model, calls)
        return [float(sum(p.numel() for p in model.parameters())) for model in models]

    monkeypatch.setattr("lightning_prune.pruning.latency.latencies", fake)
    net = nn.Sequential(nn.Linear(6, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 4))
    module = Task(net)
    fit(module, neurons(0.25, of="latency"), max_epochs=2)
    assert net[0].out_features < 24


def test_a_latency_out_of_reach_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_prune.pruning.latency.latencies", lambda *_, **__: [1.0, 0.9])
    message = r"amount=0.5 of the latency can't be reached.*0.10 of the time is gone on this machine"
    assert_refused(lambda: images(conv_net), [neurons(0.5, of="latency")], {}, message)


# -- masks until the end ----------------------------------------------------------------------------------------


OPTIMIZERS = {
    "SGD": SGD,
    "Adam": functools.partial(torch.optim.Adam, lr=0.01),
    "AdamW": ADAMW,
    "RMSprop": functools.partial(torch.optim.RMSprop, lr=0.01, momentum=0.9),
    "Rprop": torch.optim.Rprop,  # moves by the sign of the gradient, also where it is zero before
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("net", [conv_net, Residual, SmallLiteralView])
def test_masked_neurons_stay_at_zero_and_go_at_the_end(net: Any, optimizer: Any) -> None:
    """The removal is the last thing that happens, and changes no output: float64."""
    module = seeded(lambda: images(net, optimizer=optimizer))
    x = torch.randn(4, *IMAGE, dtype=torch.float64)
    counts: list[int] = []
    outputs: list[Tensor] = []
    shapes = {name: p.shape for name, p in module.named_parameters()}

    def before(trainer: Any, module: Any) -> None:
        assert {name: p.shape for name, p in module.named_parameters()} == shapes
        counts.append(zeros(dict(module.named_parameters()))[0])
        outputs.append(evaluated(module, x))

    callback = neurons(0.5, remove="end", end=0.5)
    fit(module, Spy(on_train_batch_end=before), callback, max_epochs=4, precision="64-true")
    assert max(counts[:4]) < 5  # dead units aside
    assert counts[4] > 50
    assert counts[8:] == [counts[8]] * 8
    small = evaluated(module, x)
    torch.testing.assert_close(small, outputs[-1], rtol=1e-10, atol=1e-10)
    assert callback.plan_
    assert widths(module) != [shape[0] for name, shape in shapes.items() if "weight" in name and len(shape) > 1]


def evaluated(module: Any, x: Tensor) -> Tensor:
    mode = module.training
    module.eval()
    with torch.no_grad():
        y = module.net(x)
    module.train(mode)
    return y.clone()


def test_masking_until_the_end_equals_removing_at_once() -> None:
    """Law 2, the other way round."""
    options = {"schedule": "one_shot", "start": 1, "end": 2}
    small, masked = (seeded(lambda: images(conv_net, optimizer=ADAMW)) for _ in range(2))
    fit(small, neurons(0.5, **options), max_epochs=4, precision="64-true")
    fit(masked, neurons(0.5, remove="end", **options), max_epochs=4, precision="64-true")
    torch.testing.assert_close(dict(masked.named_parameters()), dict(small.named_parameters()), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("limits", [{"max_steps": 6, "max_epochs": -1}, {"max_epochs": 1}])
def test_the_end_is_found_however_training_ends(limits: dict[str, Any]) -> None:
    module = seeded(lambda: images(conv_net))
    callback = neurons(0.5, remove="end", end=1.0)
    fit(module, callback, **limits)
    assert left(module) == 13


def test_an_early_stop_removes_what_is_masked() -> None:
    module = seeded(lambda: images(conv_net))
    halt = Spy(on_train_epoch_end=lambda t, _: setattr(t, "should_stop", t.current_epoch == 1))
    callback = neurons(0.5, remove="end", end=0.25)
    fit(module, callback, halt, max_epochs=4)
    assert left(module) == 13
    assert callback.plan_


def test_validation_sees_the_small_network_last(tmp_path: Any) -> None:
    """Law 4: the last checkpoint's metric is that of the network in it."""
    saver = ModelCheckpoint(tmp_path, "{epoch}", monitor="val_loss", save_top_k=-1)
    module = seeded(lambda: images(conv_net))
    fit(module, neurons(0.5, remove="end"), saver, max_epochs=3)
    for path, value in saver.best_k_models.items():
        fresh = seeded(lambda: images(conv_net), 3)
        (metrics,) = trainer_of(neurons(0.5, remove="end")).validate(fresh, ckpt_path=path, verbose=False)
        assert metrics["val_loss"] == float(value)
        assert (left(fresh) == 13) == path.endswith("epoch=2.ckpt")


@pytest.mark.skipif(not hasattr(lightning_callbacks, "EMAWeightAveraging"), reason="newer lightning")
def test_masks_and_averages_and_weight_masks_together() -> None:
    module = seeded(lambda: images(conv_net))
    average = lightning_callbacks.EMAWeightAveraging(decay=0.5)
    fit(module, neurons(0.5, remove="end"), weights(0.5, end=0.5), average, max_epochs=4)
    assert left(module) == 13
    gone, whole = zeros({n: p for n, p in module.named_parameters() if p.dim() > 1})
    assert abs(gone - whole / 2) <= 1


# -- resume in the middle of an epoch: what criteria have collected, and masks ------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"criterion": "taylor"},
        {"criterion": "activation"},
        {"remove": "end", "every": 2},
        {"criterion": "activation", "remove": "end"},
        {"criterion": "random", "every": 2},
    ],
    ids=lambda options: ", ".join(f"{k}={without_addresses(v)}" for k, v in options.items()),
)
@pytest.mark.parametrize("net", [conv_net, Residual])
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
def test_resume_mid_epoch(net: Any, options: dict[str, Any], tmp_path: Any) -> None:
    """Batches are alike, since Lightning does not restore a plain loader's place."""

    def task(seed: int = 0) -> Task:
        module = seeded(lambda: images(net, optimizer=ADAMW, batches=1), seed)
        module.data = torch.utils.data.ConcatDataset([module.data] * 5)
        return module

    def callback() -> Any:
        return neurons(0.6, end=1.0, **options)

    whole, first = task(), callback()
    saver = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = fit(whole, first, saver, max_epochs=3)
    for step in (2, 4, 8, 12):
        resumed, second = task(seed=5), callback()
        again = fit(resumed, second, ckpt_path=tmp_path / f"step={step}.ckpt", max_epochs=3)
        assert_same(snapshot(resumed), snapshot(whole))
        assert_same(optimizer_states(again), optimizer_states(trainer))
        assert_same(second.state_dict(), first.state_dict())


# -- repair -----------------------------------------------------------------------------------------------------


def test_compensation_changes_outputs_less() -> None:
    def lost(**options: Any) -> float:
        module = seeded(lambda: images(conv_net, batches=1, batch_size=64))
        x = torch.stack([each[0] for each in module.data])
        outputs: list[Tensor] = []
        note = Spy(on_train_batch_end=lambda t, m: outputs.append(evaluated(m, x)))
        fit(module, note, neurons(0.4, schedule="one_shot", **options), max_epochs=1)
        return float((evaluated(module, x) - outputs[0]).norm())

    assert lost(compensate="least_squares") < 0.8 * lost()


def test_recalibration_gives_the_statistics_of_the_last_batches() -> None:
    module = seeded(lambda: images(Residual, optimizer=functools.partial(torch.optim.SGD, lr=0.0)))
    fit(module, neurons(0.4, schedule="one_shot", end=0.5, recalibrate=2), max_epochs=1)
    first = next(layer for layer in module.net.modules() if isinstance(layer, nn.BatchNorm2d))
    conv = next(layer for layer in module.net.modules() if isinstance(layer, nn.Conv2d))
    batches = [torch.stack([module.data[i][0] for i in range(8 * b, 8 * b + 8)]) for b in (2, 3)]
    means = torch.stack([conv(x).mean((0, 2, 3)) for x in batches]).mean(0)
    torch.testing.assert_close(first.running_mean, means.detach(), rtol=1e-4, atol=1e-5)


def test_constants_are_folded_into_the_next_bias() -> None:
    module = seeded(lambda: Task(optimizer=functools.partial(torch.optim.SGD, lr=0.0)))
    with torch.no_grad():
        module.net[0].weight[3:6] = 0
    x = torch.randn(4, 6)
    before = evaluated(module, x)
    fit(module, neurons(3 / 22, schedule="one_shot", end=0.5, criterion=lambda w: w.abs().sum(1) * (w.size(1) == 6)))
    assert widths(module) == [9, 10, 4]
    torch.testing.assert_close(evaluated(module, x), before)


# -- what happens besides -----------------------------------------------------------------------------------------


def test_a_second_fit_goes_on_with_every_option() -> None:
    for options in ({"criterion": "taylor"}, {"criterion": "activation"}, {"remove": "end"}, {"recalibrate": 2}):
        module, callback = seeded(lambda: WithForward(conv_net(), shape=IMAGE)), neurons(0.5, **options)
        for _ in range(2):
            fit(module, callback, max_epochs=2)
            assert left(module) == 13


def test_a_schedule_that_masks_nothing_says_so() -> None:
    module = seeded(lambda: images(conv_net))
    with pytest.warns(NoEffectWarning, match="rounds to nothing"):
        fit(module, neurons(0.01, remove="end"))
