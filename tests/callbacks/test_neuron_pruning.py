"""NeuronPruning: networks of every make get smaller while they train, and everything else follows."""

from __future__ import annotations

import copy
import functools
import gc
import math
import pickle
import warnings
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_modules import (
    ADAMW,
    IMAGE,
    LIGHTNING_WARNINGS,
    SGD,
    EncoderDecoder,
    LateLayers,
    LiteralView,
    Manual,
    Residual,
    SmallLiteralView,
    Spy,
    Task,
    TwoOptimizers,
    WithExampleArray,
    WithForward,
    assert_refused,
    assert_same,
    conv_net,
    examples,
    fit,
    left_hooks,
    mlp,
    neurons,
    optimizer_states,
    prunable,
    seeded,
    snapshot,
    trainer_of,
    weights,
    zeros,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from lightning_prune import NeuronPruning, NoEffectWarning, Plan, PruningError, count_cost
from lightning_prune.models import ImageClassifier, LeNet

pytestmark = LIGHTNING_WARNINGS


def images(net: Any, **options: Any) -> Task:
    return Task(net(), shape=IMAGE, **options)


class Classifier(ImageClassifier):
    """The package's own LightningModule, with loaders."""

    def __init__(self) -> None:
        super().__init__(LeNet([4, 6], 3, [10, 8], in_shape=(1, 16, 16), num_classes=4), lr=0.05)

    def train_dataloader(self) -> Any:
        return DataLoader(examples(32, (1, 16, 16)), batch_size=8)

    val_dataloader = test_dataloader = train_dataloader


class SkipsABatch(Task):
    """Gives no loss for the first batch."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx) if self.trainer.global_step or batch_idx else None


class SkipsAnEpoch(Task):
    """Refuses every batch of the first epoch."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> Any:
        return -1 if self.current_epoch == 0 else None


class Checkpointed(Task):
    """Runs its network a second time in the backward."""

    def logits(self, x: Tensor) -> Tensor:
        return checkpoint(self.net, x, use_reentrant=False)


class CheckpointedManual(Checkpointed, Manual):
    """The same with manual optimization, where the backward is watched over."""


class OwnBackward(Manual):
    """Calls torch's backward itself, in a closure."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(self.logits(batch[0]), batch[1])
            loss.backward()
            return loss

        optimizer.step(closure=closure)


class GradientPenalty(Task):
    """Differentiates through a gradient, and compares tensors on the way."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x = batch[0].clone().requires_grad_()
        logits = self.logits(x)
        assert not torch.equal(logits, logits.relu())
        (slope,) = torch.autograd.grad(logits.sum(), x, create_graph=True)
        return {"loss": F.cross_entropy(logits, batch[1]) + slope.pow(2).mean()}


class Adversaries(EncoderDecoder):
    """Two networks against each other; the second one's first run is the other's loss."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.encoder, self.decoder = mlp(5, 12, 6), mlp(6, 10, 1)

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(part.parameters(), 0.01) for part in (self.encoder, self.decoder)]

    def training_step(self, batch: Any, batch_idx: int) -> None:
        first, second = self.optimizers()
        fake = self.encoder(torch.randn(len(batch[0]), 5))
        self.toggle_optimizer(first)
        first.zero_grad()
        self.manual_backward(F.softplus(-self.decoder(fake)).mean())
        first.step()
        self.untoggle_optimizer(first)
        self.toggle_optimizer(second)
        second.zero_grad()
        loss = F.softplus(-self.decoder(batch[0])) + F.softplus(self.decoder(fake.detach()))
        self.manual_backward(loss.mean())
        second.step()
        self.untoggle_optimizer(second)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.decoder(batch[0]).mean())


KINDS = {
    "mlp without forward": Task,
    "through forward": WithForward,
    "example_input_array": WithExampleArray,
    "encoder and decoder": EncoderDecoder,
    "configure_model": LateLayers,
    "manual optimization": Manual,
    "two optimizers": TwoOptimizers,
    "convolutions": lambda: images(conv_net),
    "batch norm and residual": lambda: images(Residual),
    "dropout": lambda: images(functools.partial(Residual, 0.25)),
    "literal view": lambda: images(SmallLiteralView),
    "article": lambda: Task(LiteralView(), shape=(3, 32, 32), classes=10, batches=2, batch_size=4),
    "ImageClassifier": Classifier,
    "skips a batch": SkipsABatch,
    "skips an epoch": SkipsAnEpoch,
    "checkpointed": Checkpointed,
    "checkpointed, manual": CheckpointedManual,
    "own backward in a closure": OwnBackward,
    "gradient penalty": GradientPenalty,
    "adversaries": Adversaries,
}


def hidden(net: nn.Module) -> int:
    """Neurons of the linear layers of an MLP, the outputs aside."""
    return sum([m.out_features for m in net.modules() if isinstance(m, nn.Linear)][:-1])


def check_optimizers(trainer: Any, module: nn.Module) -> None:
    """The optimizers hold exactly the live parameters, and their state has the parameters' shapes."""
    held = [p for o in trainer.optimizers for group in o.param_groups for p in group["params"]]
    assert sorted(map(id, held)) == sorted(map(id, module.parameters()))
    for optimizer in trainer.optimizers:
        assert {id(p) for p in optimizer.state} <= set(map(id, held))
        for parameter, state in optimizer.state.items():
            for value in state.values():
                assert not isinstance(value, Tensor) or value.dim() == 0 or value.shape == parameter.shape


# -- networks and modules of every kind -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_module_gets_smaller_and_learns_on(kind: str) -> None:
    shapes: list[dict[str, Any]] = []
    states: list[dict[str, Tensor]] = []

    def note(trainer: Any, module: Any) -> None:
        check_optimizers(trainer, module)
        shapes.append({name: tuple(p.shape) for name, p in module.named_parameters()})
        states.append(snapshot(module))

    module, callback = seeded(KINDS[kind]), neurons(0.5, schedule="linear", start=0.0, end=2)
    fit(module, callback, Spy(on_train_epoch_end=note), max_epochs=3)
    sizes = [sum(map(math.prod, epoch.values())) for epoch in shapes]
    assert sizes[0] > sizes[1] == sizes[2]
    for name, dims in callback.plan_.kept.items():
        new = shapes[-1].get(name)
        assert new is None or new == tuple(
            len(dims[i]) if i in dims else size for i, size in enumerate(callback.plan_.shapes[name])
        )
    still = {name for name in prunable(module) if torch.equal(states[-1][name], states[-2][name])}
    assert not still, "every parameter learns after the removal"
    (metrics,) = trainer_of().validate(module, verbose=False)
    assert math.isfinite(metrics["val_loss"])


@pytest.mark.parametrize("make", [Task, lambda: images(Residual), lambda: images(SmallLiteralView)])
def test_example_inputs_give_what_the_first_batch_gives(make: Any) -> None:
    class Forward(WithForward):
        pass

    task = make()
    runs = []
    for cls, inputs in (
        (Task, lambda x: None),
        (Forward, lambda x: x[:1]),
        (Forward, lambda x: (x[:2],)),
        (Forward, lambda x: {"x": x}),
        (WithExampleArray, lambda x: None),
    ):
        module = cls(copy.deepcopy(task.net), shape=tuple(task.val_data.tensors[0].shape[1:]))
        callback = neurons(0.5, example_inputs=inputs(task.val_data.tensors[0]))
        fit(module, callback)
        runs.append((snapshot(module), callback.plan_.to_dict()["kept"]))
    for run in runs[1:]:
        assert_same(run, runs[0])


@pytest.mark.parametrize("precision", ["64-true", "bf16-mixed"])
@pytest.mark.parametrize("cls", [Task, WithExampleArray])
def test_other_precisions_work(precision: Any, cls: Any) -> None:
    module = seeded(lambda: cls(Residual(), shape=IMAGE))
    callback = neurons(0.5)
    fit(module, callback, precision=precision)
    assert callback.plan_


def test_patterns_choose_the_layers_and_the_output_is_never_one() -> None:
    module = seeded(Task)
    fit(module, neurons(0.5, include="net.0"), max_epochs=1)
    assert [m.out_features for m in module.net[::2]] == [6, 10, 4]
    module = seeded(Task)
    fit(module, neurons(0.5, exclude="net.[0]"), max_epochs=1)
    assert [m.out_features for m in module.net[::2]] == [12, 5, 4]
    with pytest.raises(PruningError, match=r"'net\.4' matches no module that can be pruned; there are: net\.0, net\.2"):
        fit(seeded(Task), neurons(0.5, include="net.4"))


def test_round_to_keeps_multiples() -> None:
    module = seeded(lambda: Task(mlp(6, 32, 24, 4)))
    fit(module, neurons(0.5, round_to=8))
    sizes = [m.out_features for m in module.net[::2]][:2]
    assert all(size % 8 == 0 for size in sizes)
    assert sum(sizes) in (24, 32)  # 28 asked for


def test_equal_shares_per_layer() -> None:
    module = seeded(lambda: Task(mlp(6, 32, 24, 4)))
    fit(module, neurons(0.25, scope="layer", schedule="linear"), max_epochs=4)
    assert [m.out_features for m in module.net[::2]] == [24, 18, 4]


# -- Law 7: amounts are met -----------------------------------------------------------------------------------

ENDINGS: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = [
    ({}, {}, {"max_epochs": 1}),
    ({}, {"start": 0.5, "end": 1.0}, {"max_epochs": 3}),
    ({}, {}, {"max_steps": 6}),
    ({}, {}, {"limit_train_batches": 3}),
    ({}, {}, {"accumulate_grad_batches": 3}),
    ({}, {"every": 2, "end": 1.0}, {}),
    ({}, {"start": 1, "end": 2}, {"max_epochs": 3}),
    ({"endless": True}, {"every": 3}, {}),
]


@pytest.mark.parametrize("amount", [0.3, 0.8])
@pytest.mark.parametrize(("module", "pruning", "options"), ENDINGS, ids=str)
def test_the_amount_of_neurons_is_met_however_training_ends(
    module: dict[str, Any], pruning: dict[str, Any], options: dict[str, Any], amount: float
) -> None:
    task, callback = seeded(lambda: Task(**module)), neurons(amount, **pruning)
    fit(task, callback, **options)
    assert abs(22 - hidden(task.net) - amount * 22) <= 1
    assert callback.amount_ == amount


@pytest.mark.parametrize("schedule", ["one_shot", "linear"])
@pytest.mark.parametrize("amount", [0.3, 0.8])
@pytest.mark.parametrize("of", ["params", "macs"])
@pytest.mark.parametrize("net", [mlp, Residual])
@pytest.mark.parametrize("options", [{"max_epochs": 4}, {"max_epochs": 1}, {"max_steps": 6}], ids=str)
def test_a_budget_is_met_at_or_just_past_it(
    of: str, amount: float, schedule: str, net: Any, options: dict[str, Any]
) -> None:
    shape = (6,) if net is mlp else IMAGE
    module = seeded(lambda: Task(net(), shape=shape))
    dense = count_cost(module.net, torch.zeros(1, *shape))
    fit(module, neurons(amount, of=of, schedule=schedule), **options)
    cost = count_cost(module.net, torch.zeros(1, *shape))
    if net is mlp:  # what the dearest neuron costs, by hand; later ones are cheaper
        dearest = {"macs": max(6 + 10, 12 + 4), "params": max(6 + 1 + 10, 12 + 1 + 4)}[of]
    else:  # stem + conv1 + conv2 (+ norms) + head, or conv1 + conv2
        convolutions = {"macs": 64 * 9, "params": 9}[of]
        dearest = convolutions * max(3 + 12 + 12, 8 + 8) + {"macs": 4, "params": 2 + 4 + 4}[of]
    past = getattr(dense, of) - getattr(cost, of) - amount * getattr(dense, of)
    assert past + 1e-6 >= 0
    assert past < dearest


def test_amounts_never_compound() -> None:
    seen: list[int] = []
    module = seeded(Task)
    spy = Spy(on_validation_end=lambda *_: seen.append(hidden(module.net)))
    fit(module, neurons(0.5, schedule="one_shot"), spy, max_epochs=4)
    assert seen == [11] * 4


def test_the_schedule_is_followed_epoch_by_epoch() -> None:
    seen: list[int] = []
    module = seeded(lambda: Task(mlp(6, 60, 40, 4)))
    spy = Spy(on_validation_end=lambda *_: seen.append(hidden(module.net)))
    fit(module, neurons(0.64, schedule="cubic", end=1.0), spy, max_epochs=4)
    assert seen == [63, 44, 37, 36]  # 100 - 64 * (37/64, 56/64, 63/64, 1)


@pytest.mark.parametrize("of", ["neurons", "params", "macs"])
def test_an_amount_out_of_reach_is_refused_before_the_first_step(of: str) -> None:
    module = seeded(WithExampleArray)
    before = snapshot(module)
    callback = neurons(0.99, of=of)
    trainer = trainer_of(callback)
    with pytest.raises(PruningError, match=rf"amount=0\.99 of the {of} can't be reached.*is gone"):
        trainer.fit(module)
    assert trainer.global_step == 0
    assert_same(snapshot(module), before)
    other = seeded(lambda: Task(mlp(6, 200, 4)))  # and the callback remembers nothing of it
    fit(other, callback)
    assert hidden(other.net) <= 2


class InsistsOnTwelve(nn.Module):
    """Insists on the width that it was made with, in a way that no trace can see."""

    def forward(self, x: Tensor) -> Tensor:
        if x.size(1) != int("12"):
            raise ValueError("twelve")
        return x


@pytest.mark.parametrize("of", ["neurons", "params", "macs"])
@pytest.mark.parametrize("schedule", ["one_shot", "linear"])
def test_a_group_whose_removal_fails_is_left_alone_and_training_goes_on(schedule: str, of: str) -> None:
    """The amount is then of what can go, as in `prune_neurons`."""
    module = seeded(lambda: Task(mlp(6, 12, 60, 40, 4)))
    module.net.insert(1, InsistsOnTwelve())
    dense = count_cost(module.net, torch.rand(1, 6))
    callback = neurons(0.5, of=of, scope="layer", schedule=schedule)
    trainer = fit(module, callback, max_epochs=4)
    assert trainer.current_epoch == 4
    assert module.net[0].out_features == 12
    assert callback.plan_.frozen["net.0.weight[0]"] == "its removal fails: twelve"
    if of == "neurons":
        assert module.net[3].out_features + module.net[5].out_features == 50
    else:
        cost = count_cost(module.net, torch.rand(1, 6))
        assert 0.45 * getattr(dense, of) <= getattr(cost, of) <= 0.5 * getattr(dense, of)
    fresh = seeded(lambda: Task(mlp(6, 12, 60, 40, 4)))
    fresh.net.insert(1, InsistsOnTwelve())
    callback.plan_.apply(fresh)
    assert {n: p.shape for n, p in fresh.named_parameters()} == {n: p.shape for n, p in module.named_parameters()}


# -- Law 2: training after removal equals training the masked twin ---------------------------------------------


class MaskedTwin(Spy):
    """Does by hand, at the same moment, what NeuronPruning does: zeroes every slice and keeps it at zero."""

    def __init__(self, plan: Plan, epoch: int) -> None:
        self.plan, self.epoch = plan, epoch

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        if trainer.is_last_batch and trainer.current_epoch == self.epoch:
            self.masks = {}
            for name, dims in self.plan.kept.items():
                mask = torch.zeros(self.plan.shapes[name], dtype=torch.bool)
                index = [torch.tensor(dims.get(d, list(range(size)))) for d, size in enumerate(mask.shape)]
                mask[torch.meshgrid(*index, indexing="ij")] = True
                self.masks[name] = mask
            for optimizer in trainer.optimizers:
                self.hold(trainer, module)
                optimizer.register_step_post_hook(lambda *_: self.hold(trainer, module))

    def hold(self, trainer: Any, module: Any) -> None:
        for name, parameter in module.named_parameters():
            if name in self.masks:
                with torch.no_grad():
                    parameter.mul_(self.masks[name])
                    for value in trainer.optimizers[0].state[parameter].values():
                        if value is not None and value.dim():
                            value.mul_(self.masks[name])


@pytest.mark.parametrize(
    "optimizer", [SGD, functools.partial(torch.optim.Adam, lr=0.01), ADAMW], ids=["SGD", "Adam", "AdamW"]
)
@pytest.mark.parametrize("net", [conv_net, SmallLiteralView, Residual])
def test_training_on_equals_training_the_masked_twin(optimizer: Any, net: Any) -> None:
    small, twin = (seeded(lambda: images(net, optimizer=optimizer)) for _ in range(2))
    callback = neurons(0.5, schedule="one_shot", start=1, end=2)
    fit(small, callback, max_epochs=4, precision="64-true")
    fit(twin, MaskedTwin(callback.plan_, epoch=1), max_epochs=4, precision="64-true")
    wanted = dict(twin.named_parameters())
    for name, parameter in small.named_parameters():
        expected = wanted[name].detach()
        for dim, index in callback.plan_.kept.get(name, {}).items():
            expected = expected.index_select(dim, torch.tensor(index))
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-8, atol=1e-8)


# -- what follows: optimizer, scheduler, random state ---------------------------------------------------------


def test_the_lr_scheduler_and_the_loss_go_on() -> None:
    def run(*callbacks: Any) -> tuple[list[float], list[float]]:
        rates: list[float] = []
        losses: list[float] = []
        spy = Spy(
            on_train_batch_end=lambda trainer, _: rates.append(trainer.optimizers[0].param_groups[0]["lr"]),
            on_train_epoch_end=lambda trainer, _: losses.append(float(trainer.callback_metrics["train_loss"])),
        )
        scheduler = functools.partial(torch.optim.lr_scheduler.StepLR, step_size=3, gamma=0.9)
        module = seeded(lambda: Task(scheduler=scheduler, optimizer=functools.partial(SGD, lr=0.1)))
        fit(module, *callbacks, spy, max_epochs=10)
        return rates, losses

    rates, losses = run(neurons(0.4, end=2))
    assert rates == run()[0]
    assert len(set(rates)) == 4
    assert losses[-1] < losses[3] < losses[0]


class Drawing(Task):
    """Every batch reads the random stream: shuffling and noise on the inputs."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step([batch[0] + torch.randn_like(batch[0]), batch[1]], batch_idx)

    def train_dataloader(self) -> Any:
        return DataLoader(self.data, batch_size=8, shuffle=True)


@pytest.mark.filterwarnings("ignore::lightning_prune.NoEffectWarning")  # of amount 0
@pytest.mark.parametrize("net", [conv_net, Residual, functools.partial(Residual, 0.25)])
def test_tracing_disturbs_nothing(net: Any) -> None:
    def run(*callbacks: Any) -> dict[str, Tensor]:
        module = seeded(lambda: Drawing(net(), shape=IMAGE))
        fit(module, *callbacks)
        return snapshot(module)

    plain = run()
    assert_same(run(neurons(0.0)), plain)
    with pytest.warns(NoEffectWarning, match="rounds to nothing"):
        assert_same(run(neurons(0.001)), plain)


class Jitter(Residual):
    """Draws random numbers in evaluation mode too, so that no two outputs are alike."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + torch.randn_like(x))


@pytest.mark.filterwarnings("ignore::lightning_prune.NoEffectWarning")  # of amount 0
@pytest.mark.parametrize(("net", "options"), [(Residual, {}), (Jitter, {"verify": False})])
def test_pruning_leaves_the_random_stream_where_it_was(net: Any, options: dict[str, Any]) -> None:
    def run(*callbacks: Any) -> list[Tensor]:
        states: list[Tensor] = []
        module = seeded(lambda: Drawing(net(), shape=IMAGE))
        fit(module, *callbacks, Spy(on_train_epoch_end=lambda *_: states.append(torch.get_rng_state())))
        return states

    assert_same(run(neurons(0.5, **options)), run())


@pytest.mark.parametrize("cls", [neurons, weights])
def test_the_activations_of_the_first_batch_are_let_go(cls: Any) -> None:
    class Keeps(EncoderDecoder):
        def logits(self, x: Tensor) -> Tensor:
            hidden = torch.tanh(self.encoder(x))
            activations.append(weakref.ref(hidden))
            return self.decoder(hidden)

    def look(trainer: Any, module: Any) -> None:
        gc.collect()
        alive.append(activations[0]() is not None)

    activations: list[Any] = []
    alive: list[bool] = []
    fit(seeded(Keeps), cls(0.5), Spy(on_train_epoch_end=look))
    assert alive == [False, False]


@pytest.mark.parametrize("order", [1, -1], ids=["neurons first", "weights first"])
def test_both_callbacks_meet_their_amounts(order: int) -> None:
    module = seeded(lambda: images(conv_net, optimizer=ADAMW))
    both = [neurons(0.5), weights(0.4, schedule="linear", end=1.0)]
    fit(module, *both[::order], max_epochs=4)
    gone, total = zeros(prunable(module))
    assert gone == round(0.4 * total)
    assert sum(m.weight.shape[0] for m in module.net if hasattr(m, "weight")) - 4 == 13  # half of 6 + 8 + 12
    assert {name: tuple(mask.shape) for name, mask in both[1].masks_.items()} == {
        name: tuple(p.shape) for name, p in prunable(module).items()
    }


# -- Law 4: a checkpoint's metric is its own ------------------------------------------------------------------


def fresh_trainer() -> Any:
    """A Trainer that can load checkpoints of pruned models."""
    return trainer_of(neurons(0.9))


@pytest.mark.parametrize("net", [conv_net, Residual, SmallLiteralView])
@pytest.mark.parametrize(("monitor", "mode"), [("val_loss", "min"), ("val_acc", "max")])
@pytest.mark.parametrize("options", [{}, {"val_check_interval": 0.5}], ids=["epoch", "half epoch"])
def test_every_checkpoint_holds_the_network_that_was_measured(
    net: Any, monitor: str, mode: str, options: dict[str, Any], tmp_path: Path
) -> None:
    saver = ModelCheckpoint(tmp_path, monitor=monitor, mode=mode, save_top_k=-1, save_last=True)
    fit(seeded(lambda: images(net)), neurons(0.6, end=1.0, schedule="linear"), saver, max_epochs=3, **options)
    assert len(saver.best_k_models) == (6 if options else 3)
    for path, score in saver.best_k_models.items():
        fresh = seeded(lambda: images(net), 1)
        (metrics,) = fresh_trainer().validate(fresh, ckpt_path=path, verbose=False)
        assert metrics[monitor] == float(score)


@pytest.mark.parametrize("net", [conv_net, SmallLiteralView])
def test_the_best_checkpoint_can_be_tested_right_after_fit(net: Any, tmp_path: Path) -> None:
    """The first epoch's network is larger than the last one's."""
    saver = ModelCheckpoint(tmp_path, monitor="val_loss", mode="max", save_top_k=-1)
    module = seeded(lambda: images(net))
    trainer = fit(module, neurons(0.6, end=1.0, schedule="linear"), saver, max_epochs=3)
    for path, score in saver.best_k_models.items():
        (metrics,) = trainer.test(module, ckpt_path=path, verbose=False)
        assert metrics["val_loss"] == float(score)


@pytest.mark.parametrize("net", [conv_net, SmallLiteralView])
def test_a_checkpoint_that_is_saved_after_fit_loads(net: Any, tmp_path: Path) -> None:
    module = seeded(lambda: images(net))
    trainer = fit(module, neurons(0.5))
    expected = trainer.validate(module, verbose=False)
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    fresh = seeded(lambda: images(net), 1)
    assert fresh_trainer().validate(fresh, ckpt_path=tmp_path / "after.ckpt", verbose=False) == expected


@pytest.mark.parametrize("net", [conv_net, SmallLiteralView])
@pytest.mark.parametrize("amount", [0.6, 0.4])
def test_going_back_to_an_earlier_checkpoint_does_not_compound(net: Any, amount: float, tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    module, callback = seeded(lambda: images(net)), neurons(0.6, end=1.0, schedule="linear")
    fit(module, callback, saver, max_epochs=3)
    first = tmp_path / "epoch=0.ckpt"
    trainer_of(callback).validate(
        module, ckpt_path=first, verbose=False
    )  # the same callback, or one that asks for less
    fit(module, callback if amount == 0.6 else neurons(amount), ckpt_path=first, max_epochs=4)
    left = sum(m.weight.shape[0] for m in module.net.modules() if isinstance(m, nn.Conv2d | nn.Linear)) - 4
    assert left == 26 - round(amount * 26)


@pytest.mark.parametrize("net", [conv_net, SmallLiteralView])
def test_weights_only_checkpoints_load(net: Any, tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, save_weights_only=True, monitor="val_loss")
    fit(seeded(lambda: images(net)), neurons(0.5), saver)
    fresh = seeded(lambda: images(net), 1)
    (metrics,) = fresh_trainer().validate(fresh, ckpt_path=saver.best_model_path, verbose=False)
    assert metrics["val_loss"] == float(saver.best_model_score)


# -- Law 3: resume equals never stopping ----------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", [SGD, ADAMW], ids=["SGD", "AdamW"])
@pytest.mark.parametrize(
    ("make", "callbacks"),
    [
        (Task, lambda: [neurons(0.6, end=1.0)]),
        (lambda **o: Task(mlp(6, 2, 30, 4), **o), lambda: [neurons(0.85, scope="layer", schedule="linear", end=1.0)]),
        (lambda **o: images(Residual, **o), lambda: [neurons(0.6, of="macs", end=1.0)]),
        (lambda **o: images(SmallLiteralView, **o), lambda: [neurons(0.6, of="params", end=1.0)]),
        (lambda **o: WithExampleArray(Residual(), shape=IMAGE, **o), lambda: [neurons(0.6, scope="layer", end=1.0)]),
        (TwoOptimizers, lambda: [neurons(0.6, end=1.0)]),
        (Task, lambda: [neurons(0.6, end=1.0, criterion="taylor")]),
        (lambda **o: images(Residual, **o), lambda: [neurons(0.6, end=1.0, criterion="activation", recalibrate=2)]),
        (Task, lambda: [neurons(0.6, end=1.0, criterion="random")]),
        (lambda **o: images(SmallLiteralView, **o), lambda: [neurons(0.6, end=1.0, remove="end")]),
        (
            lambda **o: images(Residual, **o),
            lambda: [
                neurons(0.6, end=0.75, remove="end", criterion="taylor", recalibrate=2, compensate="least_squares")
            ],
        ),
        (lambda **o: images(conv_net, **o), lambda: [neurons(0.6, end=1.0, scope="sensitivity", of="macs")]),
        (lambda **o: images(conv_net, **o), lambda: [neurons(0.6, end=1.0, compensate="least_squares")]),
        (lambda **o: images(conv_net, **o), lambda: [neurons(0.6, end=1.0), weights(0.5, end=1.0)]),
        (lambda **o: images(SmallLiteralView, **o), lambda: [weights(0.5, end=1.0), neurons(0.6, end=1.0)]),
    ],
    ids=[
        "mlp",
        "down to one",
        "residual",
        "literal view",
        "example array",
        "two optimizers",
        "taylor",
        "activation",
        "random",
        "masked",
        "masked and repaired",
        "sensitivity",
        "repaired",
        "both",
        "both, turned",
    ],
)
def test_resume_equals_never_stopping(make: Any, callbacks: Any, optimizer: Any, tmp_path: Path) -> None:
    def task(seed: int = 0) -> Any:
        return seeded(lambda: make(optimizer=optimizer), seed)

    whole, first = task(), callbacks()
    trainer = fit(whole, *first, max_epochs=4)
    saver = ModelCheckpoint(tmp_path, save_top_k=-1, save_last=True)
    halt = Spy(on_train_epoch_end=lambda t, _: setattr(t, "should_stop", t.current_epoch == 1))
    with pytest.warns(NoEffectWarning, match="training ended before the schedule did"):
        fit(task(), *callbacks(), saver, halt, max_epochs=4)

    torch.load(saver.last_model_path, weights_only=True)
    resumed, second = task(seed=5), callbacks()
    again = fit(resumed, *second, ckpt_path=saver.last_model_path, max_epochs=4)
    assert_same(snapshot(resumed), snapshot(whole))
    assert_same(optimizer_states(again), optimizer_states(trainer))
    for a, b in zip(first, second, strict=True):
        assert_same(a.state_dict(), b.state_dict())


def test_a_state_dict_that_lost_its_metadata_resumes(tmp_path: Path) -> None:
    """Averaging callbacks and asynchronous saving write plain dictionaries."""

    class Plain(Task):
        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["state_dict"] = dict(checkpoint["state_dict"])

    def make() -> Any:
        return neurons(0.6, end=1.0)

    whole = seeded(lambda: Plain(SmallLiteralView(), shape=IMAGE))
    fit(whole, make(), ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1), max_epochs=4)
    resumed = seeded(lambda: Plain(SmallLiteralView(), shape=IMAGE), 5)
    fit(resumed, make(), ckpt_path=tmp_path / "epoch=1.ckpt", max_epochs=4)
    assert_same(snapshot(resumed), snapshot(whole))


# -- Law 9: leaves a plain module -----------------------------------------------------------------------------


@pytest.mark.parametrize("net", [conv_net, Residual, SmallLiteralView, LiteralView])
def test_nothing_is_left_behind(net: Any) -> None:
    shape = (3, 32, 32) if net is LiteralView else IMAGE
    module = seeded(lambda: WithForward(net(), shape=shape, classes=4))
    types, keys = [type(m) for m in module.modules()], list(module.state_dict())
    trainer = fit(module, neurons(0.5))
    assert [type(m) for m in module.modules()] == types
    assert list(module.state_dict()) == keys
    assert left_hooks(trainer, module) == []
    sized = "Literal" in net.__name__
    assert [m for m in module.modules() if "forward" in vars(m)] == ([module.net] if sized else [])
    for layer in module.modules():  # the layers tell the truth
        if isinstance(layer, nn.Conv2d):
            assert layer.weight.shape[:2] == (layer.out_channels, layer.in_channels)
        if isinstance(layer, nn.Linear):
            assert layer.weight.shape == (layer.out_features, layer.in_features)

    small, x = module.net.eval(), torch.randn(2, *shape)
    expected = small(x)
    assert_same(copy.deepcopy(small)(x), expected)
    assert_same(copy.deepcopy(module)(x), expected)
    assert_same(pickle.loads(pickle.dumps(small))(x), expected)
    assert_same(torch.compile(small, backend="eager", fullgraph=True)(x), expected)
    assert_same(torch.export.export(small, (x,), strict=False).module()(x), expected)
    with warnings.catch_warnings():  # a forward that enters a mode has side effects while it is compiled
        warnings.filterwarnings("ignore", "While compiling, we found certain side effects")
        assert_same(torch.export.export(small, (x,), strict=True).module()(x), expected)


def test_copies_are_independent_of_the_pruned_network() -> None:
    module = seeded(lambda: WithForward(SmallLiteralView(), shape=IMAGE))
    fit(module, neurons(0.5))
    x = torch.randn(2, *IMAGE)
    for twin in (copy.deepcopy(module.net), pickle.loads(pickle.dumps(module.net))):
        before = module.net(x)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.zero_()
        assert twin(x).abs().max() == 0
        assert_same(module.net(x), before)


@pytest.mark.parametrize("batch_size", [8, 16])
@pytest.mark.parametrize("of", ["neurons", "params", "macs"])
def test_a_second_fit_continues_without_compounding(of: str, batch_size: int) -> None:
    module, callback = seeded(Task), neurons(0.5, of=of)
    fit(module, callback)
    shapes = {name: p.shape for name, p in module.named_parameters()}
    module.batch_size = batch_size
    trainer = fit(module, callback)
    assert {name: p.shape for name, p in module.named_parameters()} == shapes
    check_optimizers(trainer, module)


@pytest.mark.parametrize("of", ["neurons", "macs"])
def test_a_second_fit_of_a_fresh_model_starts_anew(of: str) -> None:
    def make() -> Any:
        return neurons(0.5, of=of, schedule="linear", end=1.0)

    once, again, callback = seeded(Task, 1), seeded(Task, 1), make()
    fit(once, make(), max_epochs=3)
    fit(seeded(lambda: Task(mlp(6, 30, 10, 4))), callback, max_epochs=3)
    fit(again, callback, max_epochs=3)
    assert_same(snapshot(again), snapshot(once))


def test_validate_test_and_predict_work_afterwards() -> None:
    module, callback = seeded(lambda: images(SmallLiteralView)), neurons(0.5)
    trainer = fit(module, callback)
    state = snapshot(module)
    for run in (trainer, trainer_of(callback), trainer_of(neurons(0.5)), trainer_of()):
        (metrics,) = run.validate(module, verbose=False)
        assert run.test(module, verbose=False) == [metrics]
        assert len(run.predict(module)) == 2
    assert_same(snapshot(module), state)
    assert left_hooks(trainer, module) == []


@pytest.mark.parametrize("hook", ["on_before_backward", "on_before_zero_grad", "on_validation_start"])
@pytest.mark.parametrize("epoch", [0, 1])
def test_an_interrupted_training_leaves_a_usable_module(hook: str, epoch: int) -> None:
    def fail(trainer: Any, module: Any) -> None:
        if trainer.current_epoch == epoch:
            raise ValueError("stop here")

    module, callback = seeded(lambda: images(SmallLiteralView)), neurons(0.5, schedule="one_shot")
    trainer = trainer_of(Spy(**{hook: fail}), callback, max_epochs=3)
    with pytest.raises(ValueError, match="stop here"):
        trainer.fit(module)
    assert left_hooks(trainer, module) == []
    pickle.dumps(module.net)
    copy.deepcopy(module)
    assert math.isfinite(trainer_of().validate(module, verbose=False)[0]["val_loss"])
    module.train()  # interrupted in validation, Lightning leaves it in evaluation mode
    fit(module, callback, max_epochs=3)
    assert module.net.conv1.out_channels + module.net.conv2.out_channels + module.net.fc1.out_features == 13


def test_a_failing_training_step_leaves_a_usable_module() -> None:
    class Fails(Task):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            super().training_step(batch, batch_idx)
            raise ValueError("stop here")

    module = seeded(Fails)
    trainer = trainer_of(neurons(0.5), weights(0.5))
    with pytest.raises(ValueError, match="stop here"):
        trainer.fit(module)
    assert left_hooks(trainer, module) == []
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None
    assert not torch.overrides._get_current_function_mode_stack()


# -- bad input: an error before the model is touched ----------------------------------------------------------


@pytest.mark.parametrize("amount", [-0.1, 1, 1.0, 30, float("nan"), "0.3", None, True])
def test_amount_must_be_a_fraction(amount: Any) -> None:
    with pytest.raises(PruningError, match=r"amount must be a fraction.*\[0, 1\)") as caught:
        NeuronPruning(amount)
    assert repr(amount) in str(caught.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"start": 0.9}, ["start=0.9", "end=0.5"]),
        ({"start": 3, "end": 3}, ["start=3", "end=3"]),
        ({"schedule": "cubik"}, ["'cubik'", "cubic, exponential, linear"]),
        ({"criterion": "l3"}, ["'l3'", "l1"]),
        ({"scope": "local"}, ["'local'", "'global'", "'layer'"]),
        ({"of": "flops"}, ["'flops'", "'neurons'", "'params'", "'macs'"]),
        ({"every": 0}, ["every", "0", "at least 1"]),
        ({"every": "step"}, ["every", "'step'", "'epoch'"]),
        ({"every": 1.5}, ["every", "1.5"]),
        ({"round_to": 0}, ["round_to", "0", "at least 1"]),
        ({"round_to": 1.5}, ["round_to", "1.5"]),
        ({"round_to": True}, ["round_to", "True"]),
        ({"verify": "no"}, ["verify", "'no'", "True or False"]),
        ({"exact_only": "yes"}, ["exact_only", "'yes'", "True or False"]),
        ({"monitor": 3}, ["monitor", "metric", "3"]),
        ({"include": [3]}, ["include", "glob", "[3]"]),
        ({"exclude": 3}, ["exclude", "glob", "3"]),
        ({"example_inputs": 3}, ["example_inputs", "int", "tensor", "tuple", "dict"]),
        ({"example_inputs": "x"}, ["example_inputs", "str"]),
        ({"example_inputs": ()}, ["example_inputs", "no tensor"]),
        ({"example_inputs": {"x": 3}}, ["example_inputs", "no tensor"]),
    ],
    ids=str,
)
def test_a_bad_argument_is_refused_at_once(options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(PruningError) as caught:
        NeuronPruning(0.5, **options)
    assert all(word in str(caught.value) for word in words), str(caught.value)


X = torch.zeros(1, 6)


@pytest.mark.parametrize(
    ("make", "callbacks", "options", "message"),
    [
        (Task, lambda: [neurons(include="encoder.*")], {}, r"'encoder\.\*' matches no module.*net\.0, net\.2"),
        (Task, lambda: [neurons(exclude="nett")], {}, r"'nett' matches no module.*net\.0"),
        (Task, lambda: [neurons(exclude="net")], {}, r"no neuron.*can be pruned"),
        (lambda: Task(nn.Linear(6, 4)), lambda: [neurons()], {}, r"no neuron.*can be pruned.*net\.weight"),
        (Task, lambda: [neurons(end=5)], {"max_epochs": 4}, r"end=5 is after the end of training.*max_epochs=4"),
        (Task, lambda: [neurons()], {"max_epochs": -1}, r"end=0\.5 is a fraction.*max_epochs=-1.*give start and end"),
        (Task, lambda: [neurons(0.5), neurons(0.3)], {}, r"only one NeuronPruning"),
        (Task, lambda: [neurons(include="net.0"), neurons(include="net.2")], {}, r"only one NeuronPruning"),
        (WithForward, lambda: [neurons(example_inputs=torch.zeros(1, 7))], {}, r"WithForward.*\(1, 7\).*example_inputs"),
        (WithForward, lambda: [neurons(example_inputs=(X, X))], {}, r"WithForward.*takes 2 positional.*example_inputs"),
        (WithForward, lambda: [neurons(example_inputs={"y": X})], {}, r"WithForward.*'y'.*example_inputs"),
        (Task, lambda: [neurons(example_inputs=X)], {}, r"Task.*forward.*"),
    ],
    ids=["include", "exclude", "all excluded", "nothing", "late end", "no end", "two", "two disjoint", "wrong shape",
         "wrong count", "wrong name", "no forward"],
)  # fmt: skip
def test_what_does_not_fit_is_refused_before_the_model_is_touched(
    make: Any, callbacks: Any, options: dict[str, Any], message: str
) -> None:
    assert_refused(make, callbacks(), options, message)


def test_a_callback_cannot_be_used_twice_in_one_trainer() -> None:
    callback = neurons(0.5)
    for twins in ([callback, callback], [callback, neurons(0.5)]):
        with pytest.raises((PruningError, RuntimeError), match="NeuronPruning"):
            fit(seeded(Task), *twins)
