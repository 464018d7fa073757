"""WeightPruning: exact amounts, exact zeros, checkpoints that say the truth, a plain module afterwards."""

from __future__ import annotations

import copy
import itertools
import pickle
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
    Manual,
    Residual,
    Spy,
    Task,
    TwoOptimizers,
    WithForward,
    assert_refused,
    assert_same,
    conv_net,
    fit,
    left_hooks,
    mlp,
    optimizer_states,
    prunable,
    seeded,
    snapshot,
    trainer_of,
    weights,
    zeros,
)
from torch import Tensor, nn
from weight_cases import Held

from lightning_prune import NoEffectWarning, PruningError, WeightPruning

pytestmark = LIGHTNING_WARNINGS

# -- Law 7: amounts are met -----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::lightning_prune.NoEffectWarning")  # of amount 0
@pytest.mark.parametrize("amount", [0.0, 0.3, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_the_amount_is_met_to_the_weight(amount: float, scope: str) -> None:
    module = seeded(lambda: Task(conv_net(), shape=IMAGE))
    fit(module, weights(amount, scope=scope))
    parts = [{name: p} for name, p in prunable(module).items()] if scope == "layer" else [prunable(module)]
    for part in parts:
        gone, total = zeros(part)
        assert gone == round(amount * total)
    assert all(bool((p != 0).all()) for p in module.parameters() if p.dim() < 2), "biases stay"


@pytest.mark.parametrize("schedule", ["cubic", "linear", "one_shot"])
@pytest.mark.parametrize(
    ("module", "pruning", "options"),
    [
        ({}, {}, {"max_epochs": 1}),
        ({}, {"start": 0.5, "end": 1.0}, {"max_epochs": 3}),
        ({}, {}, {"max_steps": 6}),  # ends in the middle of the second epoch
        ({}, {"end": 1.0}, {"max_steps": 6, "max_epochs": 3}),
        ({}, {"end": 1.0}, {"max_steps": 60, "max_epochs": 2}),
        ({}, {}, {"limit_train_batches": 3, "max_epochs": 2}),
        ({}, {}, {"limit_train_batches": 0.5, "max_steps": 3}),
        ({}, {}, {"accumulate_grad_batches": 3, "max_epochs": 2}),  # 4 batches: the second step is a short one
        ({}, {"end": 1.0}, {"accumulate_grad_batches": 3, "max_steps": 3}),
        ({}, {"every": 2}, {}),
        ({}, {"every": 3, "end": 1.0}, {"max_steps": 7}),
        ({}, {"every": 1, "end": 1.0}, {"accumulate_grad_batches": 3}),
        ({}, {"start": 1, "end": 2}, {"max_epochs": 3}),
        ({}, {"start": 1, "end": 2}, {"max_steps": 10}),
        ({}, {"start": 0.25, "end": 2}, {"max_epochs": 3}),
        ({"endless": True}, {}, {"max_epochs": 2}),
        ({"endless": True}, {"every": 3, "end": 1.0}, {"max_steps": 6}),
        ({"endless": True}, {"start": 1, "end": 3}, {"max_epochs": 3}),
    ],
    ids=str,
)
def test_the_amount_is_met_however_training_ends(
    module: dict[str, Any], pruning: dict[str, Any], options: dict[str, Any], schedule: str
) -> None:
    task = seeded(lambda: Task(**module))
    callback = weights(0.37, schedule=schedule, **pruning)
    fit(task, callback, **options)
    gone, total = zeros(prunable(task))
    assert gone == round(0.37 * total)
    assert callback.amount_ == 0.37
    assert gone == sum(int((~mask).sum()) for mask in callback.masks_.values())


def test_amounts_never_compound() -> None:
    module = seeded(Task)
    gone: list[float] = []
    spy = Spy(on_validation_end=lambda *_: gone.append(zeros(prunable(module))[0]))
    fit(module, weights(0.5, schedule="one_shot"), spy, max_epochs=4)
    assert gone == [116] * 4  # four prunings of 0.5 of 232 weights


def test_what_is_gone_stays_gone() -> None:
    masks: list[dict[str, Tensor]] = []
    callback = weights(0.8, schedule="linear", end=1.0)
    fit(seeded(Task), callback, Spy(on_validation_end=lambda *_: masks.append(callback.masks_)), max_epochs=4)
    assert len(masks) == 4
    for earlier, later in itertools.pairwise(masks):
        assert all(not bool((later[name] & ~earlier[name]).any()) for name in earlier)


def test_the_smallest_weights_go() -> None:
    module = seeded(Task)
    before: list[dict[str, Tensor]] = []
    callback = weights(0.5, schedule="one_shot")
    spy = Spy(on_train_batch_end=lambda *_: before.append(snapshot(module)))
    fit(module, spy, callback, max_epochs=1)
    magnitudes = {name: before[-1][name].abs() for name in callback.masks_}
    gone = torch.cat([magnitudes[name][~mask] for name, mask in callback.masks_.items()])
    kept = torch.cat([magnitudes[name][mask] for name, mask in callback.masks_.items()])
    assert len(gone) == 116
    assert gone.max() <= kept.min()


@pytest.mark.parametrize(
    ("include", "exclude", "touched"),
    [
        ("net.0", None, {"net.0.weight"}),
        (["net.0", "net.4"], None, {"net.0.weight", "net.4.weight"}),
        (None, "net.[04]", {"net.2.weight"}),
        ("net", ["net.4"], {"net.0.weight", "net.2.weight"}),
        ("n*", None, {"net.0.weight", "net.2.weight", "net.4.weight"}),
    ],
)
def test_patterns_choose_the_layers(include: Any, exclude: Any, touched: set[str]) -> None:
    module = seeded(Task)
    fit(module, weights(0.4, include=include, exclude=exclude), max_epochs=1)
    parameters = prunable(module)
    assert {name for name, p in parameters.items() if bool((p == 0).any())} == touched
    gone, total = zeros({name: parameters[name] for name in touched})
    assert gone == round(0.4 * total)


def test_two_callbacks_prune_disjoint_layers() -> None:
    module = seeded(Task)
    first, second = weights(0.5, include="net.0"), weights(0.25, exclude="net.0")
    fit(module, first, second)
    parameters = prunable(module)
    assert zeros({"first": parameters.pop("net.0.weight")}) == (36, 72)
    assert zeros(parameters) == (40, 160)


# -- Law 6: zero stays zero -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (Task, {"accumulate_grad_batches": 3}),
        (Task, {"gradient_clip_val": 0.01}),
        (Task, {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}),
        (Task, {"precision": "64-true"}),
        (Task, {"precision": "bf16-mixed"}),
        (Manual, {}),
        (TwoOptimizers, {}),
        (lambda: Task(Residual(), shape=IMAGE), {}),
    ],
    ids=["accumulate", "clip norm", "clip value", "float64", "mixed", "manual", "two optimizers", "batch norm"],
)
def test_zero_stays_zero_in_every_kind_of_training(make: Any, options: dict[str, Any]) -> None:
    callback = weights(0.5, schedule="linear", end=1.0, every=2)
    held = Held(callback)
    module = seeded(make)
    fit(module, callback, held.spy(), **options)
    gone, total = zeros(prunable(module))
    assert (held.alive, gone) == ([], round(0.5 * total))
    assert held.checks >= 6


# -- Law 4: a checkpoint's metric is its own ------------------------------------------------------------------


@pytest.mark.parametrize(("monitor", "mode"), [("val_loss", "min"), ("val_acc", "max")])
@pytest.mark.parametrize("options", [{}, {"val_check_interval": 0.5}], ids=["epoch", "half epoch"])
def test_every_checkpoint_holds_the_weights_that_were_measured(
    monitor: str, mode: str, options: dict[str, Any], tmp_path: Path
) -> None:
    saver = ModelCheckpoint(tmp_path, monitor=monitor, mode=mode, save_top_k=-1, save_last=True)
    fit(seeded(Task), weights(0.9, end=1.0, schedule="linear"), saver, max_epochs=3, **options)
    assert len(saver.best_k_models) == (6 if options else 3)
    assert saver.best_model_path in saver.best_k_models
    for path, score in saver.best_k_models.items():
        (metrics,) = trainer_of().validate(seeded(Task, 1), ckpt_path=path, verbose=False)
        assert metrics[monitor] == float(score)


# -- Law 3: resume equals never stopping ----------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", [SGD, ADAMW], ids=["SGD", "AdamW"])
@pytest.mark.parametrize("net", [mlp, Residual])
def test_resume_equals_never_stopping(optimizer: Any, net: Any, tmp_path: Path) -> None:
    def make(seed: int = 0) -> Task:
        return seeded(lambda: Task(net(), shape=(6,) if net is mlp else IMAGE, optimizer=optimizer), seed)

    whole = make()
    trainer = fit(whole, weights(0.8, schedule="linear", end=1.0), max_epochs=4)
    part, saver = make(), ModelCheckpoint(tmp_path, save_last=True)
    halt = Spy(on_train_epoch_end=lambda t, _: setattr(t, "should_stop", t.current_epoch == 1))
    with pytest.warns(UserWarning, match="training ended before the schedule did"):
        fit(part, weights(0.8, schedule="linear", end=1.0), saver, halt, max_epochs=4)
    assert zeros(prunable(part))[0] == round(0.4 * zeros(prunable(part))[1])

    resumed, callback = make(seed=5), weights(0.8, schedule="linear", end=1.0)
    again = fit(resumed, callback, ckpt_path=saver.last_model_path, max_epochs=4)
    assert_same(snapshot(resumed), snapshot(whole))
    assert_same(optimizer_states(again), optimizer_states(trainer))
    assert zeros(prunable(resumed)) == zeros(prunable(whole))


def test_checkpoints_are_plain_data(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, save_last=True)
    module = seeded(Task)
    names = list(module.state_dict())
    fit(module, weights(0.5), saver)
    checkpoint = torch.load(saver.last_model_path, weights_only=True)
    assert list(checkpoint["state_dict"]) == names
    (key,) = (key for key in checkpoint["callbacks"] if key.startswith("WeightPruning"))
    assert checkpoint["callbacks"][key]["amount"] == 0.5


def test_weights_only_checkpoints_load(tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, save_weights_only=True, monitor="val_loss")
    fit(seeded(Task), weights(0.5), saver)
    (metrics,) = trainer_of().validate(seeded(Task, 1), ckpt_path=saver.best_model_path, verbose=False)
    assert metrics["val_loss"] == float(saver.best_model_score)


# -- Law 9: leaves a plain module -----------------------------------------------------------------------------


def test_nothing_is_left_behind() -> None:
    module = seeded(lambda: WithForward(conv_net(), shape=IMAGE))
    identities = {name: id(p) for name, p in module.named_parameters()}
    types = [type(m) for m in module.modules()]
    trainer = fit(module, weights(0.5))
    assert {name: id(p) for name, p in module.named_parameters()} == identities
    assert [type(m) for m in module.modules()] == types
    assert left_hooks(trainer, module) == []
    assert all("forward" not in vars(m) for m in module.modules())

    net, x = module.net.eval(), torch.randn(2, *IMAGE)
    expected = net(x)
    assert_same(copy.deepcopy(net)(x), expected)
    assert_same(copy.deepcopy(module)(x), expected)
    assert_same(pickle.loads(pickle.dumps(net))(x), expected)
    assert_same(torch.compile(net, backend="eager", fullgraph=True)(x), expected)
    assert_same(torch.export.export(net, (x,), strict=False).module()(x), expected)
    fresh = conv_net()
    fresh.load_state_dict(net.state_dict())
    assert_same(fresh(x), expected)


def test_a_second_fit_continues_without_compounding() -> None:
    module, callback = seeded(Task), weights(0.5)
    fit(module, callback)
    masks = copy.deepcopy(callback.masks_)
    gone: list[int] = []
    fit(module, callback, Spy(on_train_batch_end=lambda *_: gone.append(zeros(prunable(module))[0])))
    assert gone == [116] * 8
    assert_same(callback.masks_, masks)


def test_a_second_fit_of_a_fresh_model_starts_anew() -> None:
    once, again, callback = seeded(Task, 1), seeded(Task, 1), weights(0.5, schedule="linear", end=1.0)
    fit(once, weights(0.5, schedule="linear", end=1.0))
    fit(seeded(Task, 0), callback)
    fit(again, callback)
    assert_same(snapshot(again), snapshot(once))


def test_validate_test_and_predict_work_afterwards() -> None:
    module, callback = seeded(Task), weights(0.5)
    trainer = fit(module, callback)
    state = snapshot(module)
    for run in (trainer, trainer_of(callback), trainer_of(weights(0.5))):
        (metrics,) = run.validate(module, verbose=False)
        assert run.test(module, verbose=False) == [metrics]
        assert len(run.predict(module)) == 2
    assert_same(snapshot(module), state)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_interrupted_training_leaves_a_usable_module(error: type[BaseException]) -> None:
    def fail(trainer: Any, module: Any) -> None:
        if trainer.current_epoch == 1:
            raise error("stop here")

    module, callback = seeded(Task), weights(0.5, schedule="one_shot")
    trainer = trainer_of(callback, Spy(on_before_zero_grad=fail), max_epochs=3)
    with pytest.raises(ValueError if error is ValueError else SystemExit):
        trainer.fit(module)
    assert left_hooks(trainer, module) == []
    copy.deepcopy(module)
    fit(module, callback, max_epochs=3)
    assert zeros(prunable(module))[0] == 116


# -- bad input: an error before the model is touched ----------------------------------------------------------


@pytest.mark.parametrize("amount", [-0.1, 1, 1.0, 30, float("nan"), "0.3", None, True])
def test_amount_must_be_a_fraction(amount: Any) -> None:
    with pytest.raises(PruningError, match=r"amount must be a fraction.*\[0, 1\)") as caught:
        WeightPruning(amount)
    assert repr(amount) in str(caught.value)
    assert ("For 30 % pass 0.3" in str(caught.value)) == (amount == 30)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"start": 0.5, "end": 0.5}, ["start", "before end", "0.5"]),
        ({"start": 0.9}, ["start=0.9", "end=0.75"]),
        ({"start": 3, "end": 2}, ["start=3", "end=2"]),
        ({"end": 0.0}, ["end=0.0"]),
        ({"start": -0.1}, ["start", "-0.1"]),
        ({"end": 1.5}, ["end", "1.5", "epoch (int)"]),
        ({"end": "0.5"}, ["end", "'0.5'"]),
        ({"end": True}, ["end", "True"]),
        ({"start": float("nan")}, ["start", "nan"]),
        ({"schedule": "cubik"}, ["'cubik'", "cubic, exponential, linear"]),
        ({"schedule": None}, ["None", "cubic"]),
        ({"criterion": "l3"}, ["'l3'", "l1"]),
        ({"scope": "local"}, ["'local'", "'global'", "'layer'"]),
        ({"every": 0}, ["every", "0", "at least 1"]),
        ({"every": "step"}, ["every", "'step'", "'epoch'"]),
        ({"every": 1.5}, ["every", "1.5"]),
        ({"every": True}, ["every", "True"]),
        ({"include": [3]}, ["include", "glob", "[3]"]),
        ({"exclude": 3}, ["exclude", "glob", "3"]),
    ],
    ids=str,
)
def test_a_bad_argument_is_refused_at_once(options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(PruningError) as caught:
        WeightPruning(0.5, **options)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(
    ("make", "callbacks", "options", "message"),
    [
        (Task, lambda: [weights(include="encoder.*")], {}, r"'encoder\.\*' matches no module.*net\.0, net\.2, net\.4"),
        (Task, lambda: [weights(exclude="nett")], {}, r"'nett' matches no module.*net\.0"),
        (Task, lambda: [weights(exclude="net")], {}, r"exclude=\['net'\] leaves no weights.*net\.0"),
        (lambda: Task(nn.PReLU(6)), lambda: [weights()], {}, r"Task has no weights to prune.*two dimensions"),
        (Task, lambda: [weights(end=5)], {"max_epochs": 4}, r"end=5 is after the end of training.*max_epochs=4"),
        (Task, lambda: [weights(start=3, end=0.5)], {"max_epochs": 4}, r"start must be before end, got start=3"),
        (Task, lambda: [weights()], {"max_epochs": -1}, r"end=0\.75 is a fraction.*max_epochs=-1.*give start and end"),
        (Task, lambda: [weights(0.5), weights(0.3)], {}, r"two WeightPruning.*net\.0\.weight.*include and exclude"),
        (Task, lambda: [weights(), weights(include="net.2")], {}, r"two WeightPruning.*'net\.2\.weight'"),
    ],
    ids=["include", "exclude", "all excluded", "nothing", "late end", "early end", "no end", "twice", "overlap"],
)
def test_what_does_not_fit_is_refused_before_the_model_is_touched(
    make: Any, callbacks: Any, options: dict[str, Any], message: str
) -> None:
    assert_refused(make, callbacks(), options, message)


def test_a_callback_cannot_be_used_twice_in_one_trainer() -> None:
    callback = weights(0.5)
    for twins in ([callback, callback], [callback, weights(0.5)]):
        with pytest.raises((PruningError, RuntimeError), match="WeightPruning"):
            fit(seeded(Task), *twins)


def test_a_schedule_that_stops_short_is_told_from_a_training_that_does() -> None:
    with pytest.warns(NoEffectWarning, match=r"the schedule never gives 1 \(end=0.5\): 0.4 of amount=0.8 was asked"):
        fit(seeded(lambda: Task(mlp(), shape=(6,))), weights(0.8, schedule=lambda p: p / 2, end=0.5), max_epochs=4)
