"""KernelShrinking and LayerPruning: the architecture changes while Lightning trains, and everything follows."""

from __future__ import annotations

import copy
import functools
import itertools
import math
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from ddp_cases import run_script
from lightning.pytorch import callbacks as lightning_callbacks
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_modules import (
    ADAMW,
    IMAGE,
    LIGHTNING_WARNINGS,
    SGD,
    EncoderDecoder,
    LateLayers,
    Manual,
    SmallLiteralView,
    Spy,
    Task,
    TwoOptimizers,
    WithExampleArray,
    WithForward,
    assert_refused,
    assert_same,
    fit,
    left_hooks,
    neurons,
    optimizer_states,
    prunable,
    quiet,
    seeded,
    snapshot,
    trainer_of,
    weights,
    zeros,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_prune import KernelShrinking, LayerPruning, NoEffectWarning, Plan, PruningError, count_cost
from lightning_prune.models import LeNet

pytestmark = LIGHTNING_WARNINGS

kernels = functools.partial(quiet, KernelShrinking)
layers = functools.partial(quiet, LayerPruning)


class Block(nn.Module):
    """A residual block; a batch norm where there is to be one."""

    def __init__(self, channels: int = 6, kernel: int = 5, norm: bool = False) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(channels, channels, kernel), nn.Conv2d(channels, channels, 3, padding=1)
        self.conv1.padding = (kernel // 2,) * 2
        self.norm = nn.BatchNorm2d(channels) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x + self.norm(self.conv2(torch.tanh(self.conv1(x)))))


def resnet(norm: bool = False) -> nn.Sequential:
    """Without padding at first; three blocks."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.Tanh(), Block(norm=norm), Block(norm=norm), Block(norm=norm),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 4),
    )  # fmt: skip


def wide() -> nn.Sequential:
    """Layers of equal width, no residuals."""
    return nn.Sequential(
        nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 4)
    )


def images(net: Any = resnet, **options: Any) -> Task:
    return Task(net(), shape=IMAGE, **options)


def cost(net: nn.Module) -> Any:
    return count_cost(net, torch.randn(1, *IMAGE))


def check_optimizers(trainer: Any, module: nn.Module) -> None:
    """The optimizers hold exactly the live parameters, and their state has the parameters' shapes."""
    held = [p for o in trainer.optimizers for group in o.param_groups for p in group["params"]]
    assert sorted(map(id, held)) == sorted(map(id, module.parameters()))
    for optimizer in trainer.optimizers:
        assert {id(p) for p in optimizer.state} <= set(map(id, held))
        for parameter, state in optimizer.state.items():
            for value in state.values():
                assert not isinstance(value, Tensor) or value.dim() == 0 or value.shape == parameter.shape


ALONE = {"kernels": lambda **o: kernels(0.3, **o), "layers": lambda **o: layers(0.3, **o)}
TOGETHER = {
    "neurons and layers": lambda: [neurons(0.4, end=0.75), layers(0.5)],
    "layers and neurons": lambda: [layers(0.3), neurons(0.5, of="params")],
    "kernels and neurons": lambda: [kernels(0.2), neurons(0.5, of="macs", end=0.75)],
    "all": lambda: [layers(0.3, of="macs"), kernels(0.5, of="macs"), neurons(0.6, of="macs"), weights(0.3)],
    "all the other way": lambda: [weights(0.3), neurons(0.3), kernels(0.4), layers(0.6, end=0.75)],
}
EACH = {**{name: lambda make=make: [make()] for name, make in ALONE.items()}, **TOGETHER}


# -- amounts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("of", ["params", "macs"])
@pytest.mark.parametrize("which", ALONE)
@pytest.mark.parametrize(
    "options",
    [
        {"max_epochs": 1},
        {"max_epochs": 4},
        {"max_epochs": -1, "max_steps": 7},
        {"max_epochs": 3, "accumulate_grad_batches": 3},
    ],
)
def test_the_amount_is_met_however_training_ends(which: str, of: str, options: dict[str, Any]) -> None:
    module = seeded(images)
    dense = cost(module.net)
    callback = ALONE[which](of=of)
    fit(module, callback, **options)
    gone = 1 - getattr(cost(module.net), of) / getattr(dense, of)
    assert 0.3 - 1e-9 <= gone < 0.3 + 0.31  # one unit
    assert callback.amount_ == 0.3
    assert callback.plan_


@pytest.mark.parametrize("which", ALONE)
def test_a_schedule_stays_short_of_its_budget_until_its_end(which: str) -> None:
    gone: list[float] = []
    module = seeded(images)
    dense = cost(module.net)
    callback = ALONE[which](schedule="linear", end=4)
    fit(
        module,
        callback,
        Spy(on_train_epoch_end=lambda t, m: gone.append(1 - cost(m.net).params / dense.params)),
        max_epochs=5,
    )
    assert all(part <= 0.3 * epoch / 4 for epoch, part in enumerate(gone[:3], start=1))
    assert gone[3] == gone[4] >= 0.3


@pytest.mark.parametrize("which", ALONE)
@pytest.mark.parametrize("of", ["params", "macs"])
def test_an_amount_out_of_reach_is_refused_before_the_first_step(which: str, of: str) -> None:
    assert_refused(
        images,
        [type(ALONE[which]())(0.97, of=of, report=False)],
        {},
        r"0\.97 of the .* can't be reached.* is gone",
    )


@pytest.mark.parametrize(
    ("make", "callback", "message"),
    [
        (lambda: Task(), lambda: kernels(0.1), "no kernel of this model can shrink: it has no convolution"),
        (lambda: Task(), lambda: layers(0.1), "no layer of this model can be removed; what stays:.*takes"),
        (images, lambda: kernels(0.1, include="net.9"), "matches no module"),
        (images, lambda: layers(0.1, exclude="*"), "nothing that include and exclude leave over"),
    ],
)
def test_what_has_nothing_to_shrink_is_refused(make: Any, callback: Any, message: str) -> None:
    assert_refused(make, [callback()], {}, message)


@pytest.mark.parametrize("cls", [KernelShrinking, LayerPruning])
@pytest.mark.parametrize("options", [{"amount": 1}, {"of": "neurons"}, {"criterion": "no"}, {"end": 1.5}, {"every": 0}])
def test_a_bad_argument_is_refused_at_once(cls: Any, options: dict[str, Any]) -> None:
    with pytest.raises(PruningError, match=next(iter(options))):
        cls(**options)


def test_amounts_of_several_callbacks_are_of_what_there_would_be_without_each() -> None:
    module = seeded(images)
    dense = cost(module.net)
    fit(module, layers(0.3, of="macs"), kernels(0.5, of="macs"), max_epochs=4)
    assert 1 - 0.3 * 1.4 < cost(module.net).macs / dense.macs / 0.5 + 0.3 < 1 + 0.3
    assert cost(module.net).macs / dense.macs <= 0.7 * 0.5


def test_what_others_make_unreachable_is_reached_as_far_as_it_goes() -> None:
    def make() -> Task:
        return images(lambda: nn.Sequential(*resnet()[:3], *resnet()[5:]))

    callback = kernels(0.6, start=0.5, end=0.75)
    with pytest.warns(NoEffectWarning, match=r"KernelShrinking: 0\.\d+ of amount=0.6 of the params could be reached"):
        fit(seeded(make), layers(0.6, end=0.25), callback, max_epochs=4)


def test_what_could_not_be_reached_is_no_error_later(tmp_path: Path) -> None:
    """Neither in a second fit, nor where a run is resumed after others have acted."""

    def run(module: Task, max_epochs: int, ours: list[Any] | None = None, **options: Any) -> list[Any]:
        ours = ours or [layers(0.6, end=1), kernels(0.6, start=2, end=3)]
        keep = lightning_callbacks.ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
        with pytest.warns(NoEffectWarning, match="of amount=0.6 of the params could be reached"):
            fit(module, *ours, keep, max_epochs=max_epochs, **options)
        return ours

    def make() -> Task:
        return images(lambda: nn.Sequential(*resnet()[:3], *resnet()[5:]))

    module = seeded(make)
    ours = run(module, 4)
    before = snapshot(module)
    resumed = seeded(make, 1)
    run(resumed, 4, ckpt_path=tmp_path / "epoch=1.ckpt")
    assert_same(snapshot(resumed), before)
    run(module, 4, ours)
    assert {name: t.shape for name, t in snapshot(module).items()} == {name: t.shape for name, t in before.items()}


# -- modules of every kind --------------------------------------------------------------------------------------------


class Parts(EncoderDecoder):
    """Two networks in turn, each with layers that can go."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.encoder, self.decoder = wide()[:-1], nn.Sequential(*(list(wide())[2:]))


class ManualParts(TwoOptimizers):
    """The same by hand."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.encoder, self.decoder = wide()[:-1], nn.Sequential(*(list(wide())[2:]))


class Late(LateLayers):
    """Builds them in ``configure_model``."""

    def configure_model(self) -> None:
        if self.late is None:
            self.late = wide()


MODULES = {
    "task": lambda: Task(wide()),
    "forward": lambda: WithForward(wide()),
    "example array": lambda: WithExampleArray(wide()),
    "parts": Parts,
    "late": Late,
    "manual": lambda: Manual(wide()),
    "two optimizers": ManualParts,
    "convolutions": images,
    "batch norm": lambda: images(functools.partial(resnet, norm=True)),
}


@pytest.mark.parametrize(
    ("kind", "others"),
    [(kind, []) for kind in MODULES] + [(kind, [lambda: neurons(0.3)]) for kind in ("convolutions", "batch norm")],
)
def test_every_kind_of_module_loses_layers_and_learns_on(kind: str, others: list[Any]) -> None:
    states: list[dict[str, Tensor]] = []

    def note(trainer: Any, module: Any) -> None:
        check_optimizers(trainer, module)
        states.append(snapshot(module))

    module, callback = seeded(MODULES[kind]), layers(0.25)
    fit(module, *[make() for make in others], callback, Spy(on_train_epoch_end=note), max_epochs=4)
    assert callback.plan_.removed
    still = {name for name in prunable(module) if torch.equal(states[-1][name], states[-2][name])}
    assert not still, "every parameter learns after the removal"
    (metrics,) = trainer_of().validate(module, verbose=False)
    assert math.isfinite(metrics["val_loss"])


@pytest.mark.parametrize("kind", ["task", "parts", "two optimizers"])
def test_layers_whose_width_has_changed_are_left_alone(kind: str) -> None:
    """Removing neurons makes layers of other widths, in the very step in which they would go."""
    module, callback = seeded(MODULES[kind]), layers(0.25, schedule="one_shot", start=1, end=2)
    with pytest.warns(NoEffectWarning, match=r"LayerPruning: .* could be reached"):
        fit(module, callback, neurons(0.3, schedule="one_shot", start=1, end=2), max_epochs=4)
    assert any("gives shape" in reason or "lost neurons" in reason for reason in callback.frozen_.values())


@pytest.mark.parametrize("net", [lambda: LeNet([4, 5], 5, [6], in_shape=(3, 20, 20), num_classes=4), SmallLiteralView])
@pytest.mark.parametrize("others", [[], [lambda: neurons(0.3)]], ids=["alone", "with neurons"])
def test_networks_without_padding_shrink_kernels(net: Any, others: list[Any]) -> None:
    shape = (3, 20, 20) if not isinstance(net, type) else IMAGE
    module, callback = seeded(lambda: Task(net(), shape=shape)), kernels(0.6, of="macs")
    trainer = fit(module, *[make() for make in others], callback, max_epochs=4)
    check_optimizers(trainer, module)
    shrunk = [layer for layer in module.net.modules() if type(layer) is nn.Conv2d and layer.kernel_size != (5, 5)]
    assert any(layer.padding_mode == "constant" for layer in shrunk)
    (metrics,) = trainer_of().validate(module, verbose=False)
    assert math.isfinite(metrics["val_loss"])


class MaskedTwin(Spy):
    """Does to whole weights, step by step, what the plan does: the oracle for training on."""

    def __init__(self, plan: Plan, steps: int) -> None:
        super().__init__(on_train_batch_end=self.mask, on_before_optimizer_step=self.clear)
        self.plan, self.steps = plan, steps

    def masks(self, module: Any) -> Any:
        for name, dims in self.plan.kept.items():
            parameter = module.get_parameter(name)
            mask = torch.zeros_like(parameter)
            places = [torch.tensor(dims.get(dim, list(range(size)))) for dim, size in enumerate(parameter.shape)]
            mask[torch.meshgrid(*places, indexing="ij")] = 1
            yield parameter, mask

    def clear(self, trainer: Any, module: Any) -> None:
        if trainer.global_step >= self.steps:
            for parameter, mask in self.masks(module):
                parameter.grad *= mask

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.clear(trainer, pl_module)

    def mask(self, trainer: Any, module: Any) -> None:
        if trainer.global_step == self.steps:
            for parameter, mask in self.masks(module):
                for value in (parameter.data, *trainer.optimizers[0].state[parameter].values()):
                    if isinstance(value, Tensor) and value.shape == mask.shape:
                        value *= mask


@pytest.mark.parametrize("optimizer", [SGD, ADAMW])
def test_training_on_with_small_kernels_equals_training_the_masked_twin(optimizer: Any) -> None:
    def make() -> Task:
        return images(optimizer=optimizer)

    callback, options = kernels(0.3, schedule="one_shot", end=1), {"max_epochs": 4, "precision": "64-true"}
    module, twin = seeded(make), seeded(make)
    fit(module, callback, **options)
    fit(twin, MaskedTwin(callback.plan_, 4), **options)
    for name, parameter in module.named_parameters():
        value = twin.get_parameter(name).detach()
        for dim, index in callback.plan_.kept.get(name, {}).items():
            value = value.index_select(dim, torch.tensor(index))
        torch.testing.assert_close(parameter.detach(), value, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("which", ALONE)
def test_observing_disturbs_nothing(which: str) -> None:
    def make() -> Task:
        return images(lambda: nn.Sequential(resnet(norm=True), nn.Dropout(0.2)))

    states: list[Any] = []
    note = Spy(on_train_epoch_end=lambda t, m: states.append((snapshot(m), torch.get_rng_state())))
    fit(seeded(make), note, max_epochs=3)
    with pytest.warns(NoEffectWarning):  # nothing ever goes: only observed
        fit(seeded(make), ALONE[which](schedule=lambda progress: 0.0, end=1.0, every=1), note, max_epochs=3)
    assert_same(states[3:], states[:3])


# -- checkpoints and resume -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("halt", [1, 2])
@pytest.mark.parametrize("optimizer", [SGD, ADAMW])
@pytest.mark.parametrize("which", EACH)
def test_resume_equals_never_stopping(which: str, optimizer: Any, halt: int, tmp_path: Path) -> None:
    def task(seed: int = 0) -> Task:
        return seeded(lambda: images(functools.partial(resnet, norm=True), optimizer=optimizer), seed)

    whole, first = task(), EACH[which]()
    trainer = fit(whole, *first, max_epochs=4)
    saver = ModelCheckpoint(tmp_path, save_last=True)
    stop = Spy(on_train_epoch_end=lambda t, _: setattr(t, "should_stop", t.current_epoch == halt))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning_prune.callbacks._base.rank_zero_warn", lambda *args, **kwargs: None)
        fit(task(), *EACH[which](), stop, saver, max_epochs=4)
    resumed, second = task(seed=5), EACH[which]()
    again = fit(resumed, *second, ckpt_path=saver.last_model_path, max_epochs=4)
    assert_same(snapshot(resumed), snapshot(whole))
    assert_same(optimizer_states(again), optimizer_states(trainer))
    assert_same([c.state_dict() for c in second], [c.state_dict() for c in first])


RESUMED = """
    import sys, warnings, torch
    warnings.simplefilter("ignore")
    sys.path.insert(0, {tests!r})
    from callbacks.test_structure import *
    torch.set_num_threads(1)
    resumed = seeded(lambda: images(optimizer=ADAMW), 5)
    again = fit(resumed, *EACH["all"](), ckpt_path={path!r}, max_epochs=4)
    torch.save((snapshot(resumed), optimizer_states(again)), {out!r})
"""


def test_resume_in_a_fresh_process(tmp_path: Path) -> None:
    whole = seeded(lambda: images(optimizer=ADAMW))
    saver = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    trainer = fit(whole, *EACH["all"](), saver, max_epochs=4)
    tests, out = str(Path(__file__).parent.parent), str(tmp_path / "resumed.pt")
    script = textwrap.dedent(RESUMED).format(tests=tests, path=str(tmp_path / "epoch=1.ckpt"), out=out)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    state, optimizers = torch.load(out, weights_only=True)
    assert_same(state, snapshot(whole))
    assert_same(optimizers, optimizer_states(trainer))


@pytest.mark.parametrize("which", EACH)
def test_every_checkpoint_holds_the_network_that_was_measured(which: str, tmp_path: Path) -> None:
    measured: list[float] = []
    note = Spy(on_validation_end=lambda t, m: measured.append(float(t.callback_metrics["val_loss"])))
    module = seeded(images)
    fit(module, *EACH[which](), note, ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}"), max_epochs=4)
    order = [0, 2, 1, 3, 0]
    fresh, ours = seeded(images, 3), EACH[which]()
    trainer = trainer_of(*ours)
    for epoch in order:  # to and fro, in one module: smaller and larger again
        (metrics,) = trainer.validate(fresh, ckpt_path=tmp_path / f"epoch={epoch}.ckpt", verbose=False)
        assert metrics["val_loss"] == measured[epoch]
    one = next(callback for callback in EACH[which]() if hasattr(callback, "plan_"))
    (metrics,) = trainer_of(one).validate(seeded(images, 4), ckpt_path=tmp_path / "epoch=3.ckpt", verbose=False)
    assert metrics["val_loss"] == measured[3], "one callback is enough to load what all of them made"
    checkpoint = torch.load(tmp_path / "epoch=3.ckpt", weights_only=True)
    metadata = checkpoint["state_dict"]._metadata[""]["lightning_prune"]
    rebuilt = seeded(images, 6)
    Plan.from_dict(metadata["plan"]).apply(rebuilt)
    rebuilt.load_state_dict(checkpoint["state_dict"])
    assert_same(snapshot(rebuilt), snapshot(module))


@pytest.mark.parametrize("which", EACH)
def test_going_back_to_an_earlier_checkpoint_does_not_compound(which: str, tmp_path: Path) -> None:
    module, ours = seeded(images), EACH[which]()
    saver = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    fit(module, *ours, saver, max_epochs=4)
    final = snapshot(module)
    fit(module, *ours, ckpt_path=tmp_path / "epoch=0.ckpt", max_epochs=4)
    assert_same(snapshot(module), final)


@pytest.mark.parametrize("which", EACH)
def test_weights_only_checkpoints_load(which: str, tmp_path: Path) -> None:
    module = seeded(images)
    saver = ModelCheckpoint(tmp_path, save_weights_only=True, save_last=True)
    fit(module, *EACH[which](), saver, max_epochs=4)
    (expected,) = trainer_of().validate(module, verbose=False)
    (metrics,) = trainer_of(*EACH[which]()).validate(seeded(images, 3), ckpt_path=saver.last_model_path, verbose=False)
    assert metrics == expected


def test_a_state_dict_that_lost_its_metadata_tells_kernels(tmp_path: Path) -> None:
    module = seeded(images)
    trainer = fit(module, kernels(0.4), max_epochs=4)
    trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    (expected,) = trainer_of().validate(module, verbose=False)
    (metrics,) = trainer_of(kernels(0.4)).validate(
        seeded(images, 3), ckpt_path=tmp_path / "weights.ckpt", verbose=False
    )
    assert metrics == expected


# -- what follows -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_callbacks_work_together_in_any_order(order: tuple[int, ...]) -> None:
    ours = [layers(0.3, of="macs"), kernels(0.5, of="macs"), neurons(0.7, of="macs", end=0.75)]
    module = seeded(images)
    dense = cost(module.net)
    trainer = fit(module, *[ours[i] for i in order], max_epochs=4)
    check_optimizers(trainer, module)
    left = cost(module.net).macs / dense.macs
    assert 0.05 < left <= 0.3
    assert math.isclose(ours[0]._macs_left, left, rel_tol=1e-3)
    assert ours[0].plan_ == ours[1].plan_ == ours[2].plan_
    assert all(callback._acted for callback in ours)
    fresh = seeded(images, 7)
    ours[0].plan_.apply(fresh)
    fresh.load_state_dict(module.state_dict())
    assert_same(snapshot(fresh), snapshot(module))


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("which", ALONE)
def test_masks_follow(which: str, first: bool) -> None:
    masking, changing = weights(0.5, schedule="linear", end=4), ALONE[which](end=2)
    module, counts = seeded(images), []
    note = Spy(on_train_batch_end=lambda t, m: counts.append(zeros(prunable(m))))
    fit(module, *([masking, changing] if first else [changing, masking]), note, max_epochs=4)
    gone, total = zeros(prunable(module))
    assert gone == round(0.5 * total)
    assert set(masking.masks_) == set(prunable(module))
    for name, mask in masking.masks_.items():
        assert bool((module.get_parameter(name)[~mask] == 0).all())
    assert all(after[0] / after[1] >= before[0] / before[1] - 0.01 for before, after in itertools.pairwise(counts))


def test_masks_of_layers_that_all_go_go_with_them(tmp_path: Path) -> None:
    """A run goes on, says so at its end, and is resumed."""

    def run(**options: Any) -> Task:
        module = seeded(images)
        gone = layers(0.9, of="params", include="net.[234]", end=1)
        masking = weights(0.5, include=["net.2", "net.2.*"], end=4)
        keep = lightning_callbacks.ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
        with pytest.warns(NoEffectWarning, match="WeightPruning: the layers that it was to prune have been removed"):
            fit(module, gone, masking, keep, max_epochs=4, **options)
        assert masking.masks_ == {}
        return module

    whole = run()
    assert_same(snapshot(run(ckpt_path=tmp_path / "epoch=1.ckpt")), snapshot(whole))


@pytest.mark.skipif(not hasattr(lightning_callbacks, "EMAWeightAveraging"), reason="newer lightning")
@pytest.mark.parametrize("which", ["kernels", "layers", "all"])
@pytest.mark.parametrize("ours_first", [True, False])
def test_averages_follow(which: str, ours_first: bool) -> None:
    module, average = seeded(images), lightning_callbacks.EMAWeightAveraging(decay=0.9)
    ours = EACH[which]()
    fit(module, *([*ours, average] if ours_first else [average, *ours]), max_epochs=4)
    assert ours[0].plan_.made(module)
    assert bool(module.net(torch.randn(3, *IMAGE)).isfinite().all())


def test_the_learning_rate_schedule_goes_on() -> None:
    rates: list[float] = []
    scheduler = functools.partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5)
    module = seeded(lambda: images(scheduler=scheduler))
    note = Spy(on_train_epoch_start=lambda t, m: rates.append(t.optimizers[0].param_groups[0]["lr"]))
    fit(module, layers(0.3), kernels(0.5), note, max_epochs=4)
    assert rates == [0.05, 0.025, 0.0125, 0.00625]


@pytest.mark.parametrize("which", EACH)
def test_nothing_is_left_behind(which: str) -> None:
    module = seeded(images)
    trainer = fit(module, *EACH[which](), max_epochs=4)
    assert left_hooks(trainer, module) == []
    x = torch.randn(2, *IMAGE)
    expected = module.net(x)
    for again in (copy.deepcopy(module.net), pickle.loads(pickle.dumps(module.net))):
        assert torch.equal(again(x), expected)
    exported = torch.export.export(module.net.eval(), (x,), strict=False).module()
    torch.testing.assert_close(exported(x), module.net(x))


def test_a_second_fit_does_not_compound_and_a_fresh_model_starts_anew() -> None:
    ours = [kernels(0.3), layers(0.4, end=0.75)]
    module = seeded(images)
    fit(module, *ours, max_epochs=4)
    shapes = {name: p.shape for name, p in module.named_parameters()}
    fit(module, *ours, max_epochs=4)
    assert {name: p.shape for name, p in module.named_parameters()} == shapes
    other = seeded(images)
    fit(other, *ours, max_epochs=4)
    assert {name: p.shape for name, p in other.named_parameters()} == shapes
    assert ours[0].plan_.made(other)


@pytest.mark.parametrize("which", EACH)
def test_a_failing_training_step_leaves_a_usable_module(which: str) -> None:
    class Fails(Task):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if self.trainer.global_step == 7:
                raise RuntimeError("out of paper")
            return super().training_step(batch, batch_idx)

    module = seeded(lambda: Fails(resnet(), shape=IMAGE))
    trainer = trainer_of(*EACH[which](), max_epochs=4)
    with pytest.raises(RuntimeError, match="out of paper"):
        trainer.fit(module)
    assert left_hooks(trainer, module) == []
    assert bool(module.net(torch.randn(3, *IMAGE)).isfinite().all())


class Needed(nn.Module):
    """Reads an attribute of the block that changes least."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.blocks = nn.Conv2d(3, 6, 3), nn.Sequential(Block(), Block(), Block())
        self.head = nn.Linear(6, 4)
        with torch.no_grad():
            self.blocks[0].conv2.weight *= 0.01

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.blocks[0].conv2.kernel_size
        return self.head(self.blocks(torch.tanh(self.stem(x))).mean((2, 3)) / len(kernel))


def test_a_layer_that_is_needed_is_left_alone_and_training_goes_on() -> None:
    module, callback = seeded(lambda: images(Needed)), layers(0.25, include="net.blocks.?")
    fit(module, callback, max_epochs=4)
    assert "no attribute" in callback.frozen_["net.blocks.0"]
    assert callback.plan_.removed
    assert isinstance(module.net.blocks[0], Block)


class Recorded(Task):
    """Logs what the callbacks log."""

    def val_dataloader(self) -> Any:
        return DataLoader(self.val_data, batch_size=16)


def test_macs_and_params_are_logged_and_reported(capsys: pytest.CaptureFixture[str]) -> None:
    module = seeded(lambda: Recorded(resnet(), shape=IMAGE))
    dense = cost(module.net)
    ours = [KernelShrinking(0.2), LayerPruning(0.4)]
    trainer = fit(module, *ours, max_epochs=4)
    pruned = cost(module.net)
    assert trainer.callback_metrics["macs"] == pruned.macs
    assert trainer.callback_metrics["params"] == pruned.params
    report = ours[0].report_
    assert report is not None
    assert (report["parameters"].dense, report["parameters"].pruned) == (dense.params, pruned.params)
    assert (report["MACs (batch 1)"].dense, report["MACs (batch 1)"].pruned) == (dense.macs, pruned.macs)
    assert str(report) in capsys.readouterr().out


# -- several processes ------------------------------------------------------------------------------------------------

DDP = {
    "kernels": lambda: [kernels(0.4)],
    "layers": lambda: [layers(0.3, of="macs")],
    "all": lambda: [layers(0.3, of="macs"), neurons(0.5, of="params"), kernels(0.4), weights(0.3)],
}

RANKS = """
    import sys, warnings, torch
    warnings.simplefilter("ignore")
    sys.path.insert(0, {tests!r})
    from callbacks.test_structure import *
    torch.set_num_threads(1)
    for name, make in DDP.items():
        ours, module = make(), seeded(lambda: images(batch_size=8, batches=4))
        trainer = fit(module, *ours, strategy="ddp", devices=2, precision="64-true", max_epochs=4)
        states = [callback.state_dict() for callback in ours]
        torch.save((snapshot(module), optimizer_states(trainer), states), f"{folder}/{{name}}-{{trainer.global_rank}}.pt")
"""


def test_processes_agree_and_do_what_one_does(tmp_path: Path) -> None:
    script = tmp_path / "ranks.py"
    script.write_text(textwrap.dedent(RANKS).format(tests=str(Path(__file__).parent.parent), folder=str(tmp_path)))
    done = run_script(script)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    for name, make in DDP.items():
        first, second = (torch.load(tmp_path / f"{name}-{rank}.pt", weights_only=True) for rank in (0, 1))
        assert_same(second, first)
        ours, module = make(), seeded(lambda: images(batch_size=16, batches=2))
        fit(module, *ours, precision="64-true", max_epochs=4)
        plans = [{**state["plan"], "frozen": None} for state in (first[2][0], ours[0].state_dict())]
        assert plans[0] == plans[1]  # reasons tell the batch size
        torch.testing.assert_close(first[0], snapshot(module), rtol=1e-8, atol=1e-8)
