"""WeightPruning: a resumed training equals one that never stopped, bit for bit; moving masks, rewound weights."""

from __future__ import annotations

import copy
import functools
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from ids import without_addresses
from lightning.pytorch import callbacks
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_modules import (
    CLASSES,
    LAW_WARNINGS,
    SGD,
    EncoderDecoder,
    LateLayers,
    Spy,
    Task,
    TwoOptimizers,
    assert_same,
    fit,
    left_hooks,
    measured_again,
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
from torch import Tensor, nn, optim
from torch.utils.data import TensorDataset
from weight_cases import CRITERIA, OPTIMIZERS

from lightning_prune import PruningError, WeightPruning

pytestmark = LAW_WARNINGS

ADAM = functools.partial(optim.AdamW, lr=0.01, weight_decay=0.05)


def net() -> nn.Sequential:
    return mlp(8, 12, 8, CLASSES)


class Alike(Task):
    """All batches are the same, so that a training may go on in the middle of an epoch."""

    def __init__(self, network: Any = None, **kwargs: Any) -> None:
        super().__init__(net() if network is None else network, **{"shape": (8,), "optimizer": ADAM} | kwargs)
        count, size = len(self.data) // self.batch_size, self.batch_size
        self.data = TensorDataset(*(t[:size].repeat(count, *[1] * (t.dim() - 1)) for t in self.data.tensors))


class Compared:
    """One uninterrupted training that keeps every checkpoint, and trainings resumed from each of them."""

    def __init__(
        self,
        make: Callable[[], Any],
        pruning: Callable[[], list[Any]],
        folder: Path,
        *,
        steps: int | None,
        **options: Any,
    ) -> None:
        self.make, self.pruning, self.options = make, pruning, {"max_epochs": 4} | options
        when: dict[str, Any] = {"every_n_epochs": 1} if steps is None else {"every_n_train_steps": steps}
        saver = ModelCheckpoint(folder, filename="{epoch}-{step}", save_top_k=-1, **when)
        self.module, self.callbacks = seeded(make), pruning()
        self.trainer = fit(self.module, *self.callbacks, saver, **self.options)
        self.paths = sorted(folder.glob("*.ckpt"), key=lambda path: int(path.stem.partition("step=")[2]))

    def check(self, lost: int | None = None) -> int:
        """Resume from each checkpoint, but for the one that Lightning alone can't resume from either."""
        for path in [path for number, path in enumerate(self.paths) if number != lost]:
            module, ours = seeded(self.make, 7), self.pruning()
            trainer = fit(module, *ours, ckpt_path=path, **self.options)
            assert trainer.global_step == self.trainer.global_step, path.stem
            assert_same(snapshot(module), snapshot(self.module))
            assert_same(optimizer_states(trainer), optimizer_states(self.trainer))
            for one, other in zip(ours, self.callbacks, strict=True):
                if isinstance(one, WeightPruning):
                    assert_same(one.masks_, other.masks_)
                    assert_same(measured_again(one.state_dict(), other.state_dict()), other.state_dict())
            assert left_hooks(trainer, module) == []
        return len(self.paths)


OPTIONS: list[dict[str, Any]] = [
    *({"criterion": criterion} for criterion in CRITERIA),
    *({"criterion": criterion, "every": 3, "end": 0.8} for criterion in CRITERIA),
    *({"scope": scope, "criterion": "taylor"} for scope in ("layer", "erk", "lamp", {"net.0": 0.8, "net.4": 0.1})),
    *({"pattern": pattern, "criterion": "wanda"} for pattern in ("2:4", "block:2x2")),
    *({"schedule": schedule} for schedule in ("linear", "exponential", "one_cycle", "one_shot", lambda p: p**2)),
    *({"regrow": regrow, "every": every, "end": 1.0} for regrow in ("rigl", "set") for every in (3, "epoch")),
    {"regrow": "rigl", "criterion": "fisher", "schedule": "one_shot"},
    {"rewind_to": 0},
    {"rewind_to": 0, "criterion": "movement", "every": 3},
    {"rewind_to": 2, "start": 0.5, "end": 1.0, "criterion": "taylor"},
    {"rewind_to": 2, "start": 2, "end": 4, "criterion": "wanda", "every": 3},
]


@pytest.mark.parametrize("options", OPTIONS, ids=without_addresses)
@pytest.mark.parametrize("optimizer", [SGD, ADAM], ids=["SGD", "AdamW"])
def test_resumed_from_every_epoch(optimizer: Any, options: dict[str, Any], tmp_path: Path) -> None:
    def make() -> Task:
        return Task(net(), shape=(8,), optimizer=optimizer)

    amount = 0.4 if options.get("pattern") == "2:4" else 0.6
    both = Compared(make, lambda: [weights(amount, **options)], tmp_path, steps=None)
    assert both.check() == 4


@pytest.mark.parametrize("options", OPTIONS, ids=without_addresses)
def test_resumed_from_the_middle_of_epochs(options: dict[str, Any], tmp_path: Path) -> None:
    amount = 0.4 if options.get("pattern") == "2:4" else 0.6
    both = Compared(Alike, lambda: [weights(amount, **options)], tmp_path, steps=3)
    assert both.check() == 5


RESUMED = [
    *("Adam amsgrad", "Adam fused", "Adagrad", "Adadelta", "Adamax", "RMSprop", "NAdam", "RAdam", "ASGD", "Rprop"),
    *("Adafactor", "LBFGS", *({"Muon"} & OPTIMIZERS.keys())),
]


@pytest.mark.parametrize(
    "options", [{"end": 1.0}, {"rewind_to": 0}, {"rewind_to": 1, "start": 0.25}], ids=without_addresses
)
@pytest.mark.parametrize("name", RESUMED)
def test_resumed_under_every_optimizer(name: str, options: dict[str, Any], tmp_path: Path) -> None:

    def make() -> Task:
        return Task(net(), shape=(8,), optimizer=OPTIMIZERS[name])

    assert Compared(make, lambda: [weights(0.6, **options)], tmp_path, steps=None).check() == 4


class Backbone(EncoderDecoder):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.backbone = self.encoder

    def configure_optimizers(self) -> Any:
        return optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.05, momentum=0.9)


class Scheduled(Task):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(scheduler=lambda o: optim.lr_scheduler.StepLR(o, 1, 0.5), **kwargs)


def pair() -> list[Any]:
    return [
        weights(0.5, include="net.0", criterion="taylor"),
        weights(0.3, exclude="net.0", criterion="wanda", every=3),
    ]


KINDS: dict[str, tuple[Any, Callable[[], list[Any]], dict[str, Any]]] = {
    "late layers": (LateLayers, lambda: [weights(0.5, criterion="fisher")], {}),
    "two optimizers": (TwoOptimizers, lambda: [weights(0.5, criterion="taylor", rewind_to=0)], {}),
    "learning rate": (Scheduled, lambda: [weights(0.5, rewind_to=1, start=0.25)], {}),
    "bf16-mixed": (Task, lambda: [weights(0.5, criterion="movement")], {"precision": "bf16-mixed"}),
    "bf16-true": (Task, lambda: [weights(0.5, criterion="wanda")], {"precision": "bf16-true"}),
    "accumulation": (Task, lambda: [weights(0.5, criterion="snip")], {"accumulate_grad_batches": 3}),
    "clipping": (Task, lambda: [weights(0.5, criterion="taylor")], {"gradient_clip_val": 0.01}),
    "two callbacks": (Task, pair, {}),
    "two rewound": (Task, lambda: [weights(0.5, include="net.0", rewind_to=0), weights(0.5, exclude="net.0")], {}),
    "backbone": (Backbone, lambda: [weights(0.5), callbacks.BackboneFinetuning(2)], {}),
    "swa": (Task, lambda: [weights(0.5), callbacks.StochasticWeightAveraging(0.05, swa_epoch_start=2)], {}),
    "steps": (Task, lambda: [weights(0.5, criterion="taylor", every=2)], {"max_steps": 14, "max_epochs": None}),
}
for _criterion in ("l1", "movement", "synflow", "random"):
    for _rewind in (None, 0):
        KINDS[f"neurons too, {_criterion}, {_rewind}"] = (
            functools.partial(Task, None, optimizer=ADAM),
            lambda criterion=_criterion, rewind=_rewind: [  # type: ignore[misc]
                weights(0.5, criterion=criterion, rewind_to=rewind),
                neurons(0.3, end=1.0, schedule="linear"),
            ],
            {},
        )
if hasattr(callbacks, "EMAWeightAveraging"):
    KINDS["ema"] = (Task, lambda: [weights(0.5, criterion="taylor"), callbacks.EMAWeightAveraging(decay=0.9)], {})
LOST = {"backbone": 2, "ema": 3, "swa": 3}
"""The checkpoint that a training without pruning can't be resumed from bit for bit: that of the unfreezing, the last."""


@pytest.mark.parametrize("name", KINDS)
def test_resumed_in_every_kind_of_training(name: str, tmp_path: Path) -> None:
    make, pruning, options = KINDS[name]
    assert Compared(make, pruning, tmp_path, steps=None, **options).check(LOST.get(name)) == 4


# -- regrowing -----------------------------------------------------------------------------------------------------


class Moves:
    """At each pruning: the masks before and after, and what those that came back start with."""

    def __init__(self, pruning: WeightPruning) -> None:
        self.pruning, self.masks, self.moved = pruning, dict[str, Tensor](), list[tuple[float, int]]()
        self.zeros, self.alive = set[int](), 0

    def look(self, trainer: Any, module: Any) -> None:
        parameters, now = dict(module.named_parameters()), self.pruning.masks_
        if not now:
            return
        self.zeros.add(sum(int((~mask).sum()) for mask in now.values()))
        if self.masks:
            back = {name: now[name] & ~self.masks[name] for name in now}
            self.moved.append((trainer.current_epoch + 1, sum(int(each.sum()) for each in back.values())))
            for name, each in back.items():
                states = [o.state[parameters[name]].values() for o in trainer.optimizers if parameters[name] in o.state]
                for value in [parameters[name], *(v for state in states for v in state)]:
                    if isinstance(value, Tensor) and value.shape == each.shape:
                        self.alive += int(value[each].count_nonzero())
        self.masks = {name: mask.clone() for name, mask in now.items()}


@pytest.mark.parametrize("optimizer", [SGD, ADAM], ids=["SGD", "AdamW"])
@pytest.mark.parametrize("every", ["epoch", 3, 1])
@pytest.mark.parametrize("criterion", ["l1", "random", "taylor", "movement", "wanda", "synflow"])
@pytest.mark.parametrize("regrow", ["rigl", "set"])
def test_masks_move_at_constant_sparsity_until_the_end(regrow: str, criterion: str, every: Any, optimizer: Any) -> None:
    # All together, wanda takes the whole head of this network, and RigL finds no gradient behind it.
    scope = "layer" if criterion == "wanda" else "global"
    pruning = weights(
        0.6,
        regrow=regrow,
        criterion=criterion,
        scope=scope,
        schedule="one_shot",
        every=every,
        end=4,
        regrow_fraction=0.4,
    )
    moves, module = Moves(pruning), seeded(lambda: Task(net(), shape=(8,), optimizer=optimizer))
    fit(module, pruning, Spy(on_train_batch_end=moves.look), max_epochs=6)
    parts = [tensor.numel() for tensor in prunable(module).values()]
    wanted = sum(round(0.6 * count) for count in (parts if scope == "layer" else [sum(parts)]))
    assert moves.zeros == {wanted}
    assert zeros(prunable(module))[0] >= wanted, "what comes back in a neuron that nobody listens to stays at zero"
    assert moves.alive == 0, "what comes back starts at zero, its momentum too"
    by_epoch = {epoch: sum(n for e, n in moves.moved if e == epoch) for epoch in range(1, 7)}
    assert all(by_epoch[epoch] > 0 for epoch in (2, 3)), by_epoch
    assert by_epoch[5] == by_epoch[6] == 0, by_epoch
    if regrow == "rigl" and every == "epoch":
        assert by_epoch[2] > by_epoch[3], "ever fewer"


@pytest.mark.parametrize("kind", ["zero_grad last", "zero_grad to zeros"])
def test_rigl_where_gradients_are_cleared_after_the_step(kind: str) -> None:
    class Cleared(Task):
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer: Any = self.optimizers()
            self.manual_backward(nn.functional.cross_entropy(self.logits(batch[0]), batch[1]))
            optimizer.step()
            optimizer.zero_grad(set_to_none=kind == "zero_grad last")

    class Usual(Cleared):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer: Any = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(nn.functional.cross_entropy(self.logits(batch[0]), batch[1]))
            optimizer.step()

    found = []
    for cls in (Usual, Cleared):
        pruning = weights(0.5, regrow="rigl", schedule="one_shot", end=1.0)
        fit(seeded(cls), pruning, max_epochs=4)
        found.append(pruning.masks_)
    assert_same(*found)


# -- rewinding -----------------------------------------------------------------------------------------------------


def plain(optimizer: Any) -> Any:
    """Its state by the parameters' order, tensors copied."""
    return copy.deepcopy(optimizer.state_dict()["state"])


@pytest.mark.parametrize("to", [0, 2])
@pytest.mark.parametrize("every", ["epoch", 3])
@pytest.mark.parametrize("criterion", ["l1", "taylor", "wanda", "synflow"])
@pytest.mark.parametrize("name", ["momentum", "AdamW", *RESUMED])
def test_survivors_are_what_they_were(name: str, criterion: str, every: Any, to: int) -> None:
    if name not in ("momentum", "AdamW") and criterion != "l1":
        pytest.skip("once is enough")
    optimizer = {**OPTIMIZERS, "AdamW": ADAM}[name]
    module = seeded(lambda: Task(nn.Sequential(nn.BatchNorm1d(8), net()), shape=(8,), optimizer=optimizer))
    pruning = weights(0.6, rewind_to=to, start=to, end=6, criterion=criterion, every=every, schedule="linear")
    start: dict[str, Any] = {}
    times, before = [], {"masks": 0}

    def keep(trainer: Any, pl_module: Any) -> None:
        if (to == 0 and not start) or (trainer.global_step == 4 * to and "of" not in start and to):
            start.update(of=snapshot(pl_module), state=plain(trainer.optimizers[0]))

    def look(trainer: Any, pl_module: Any) -> None:
        masks = pruning.masks_
        gone = sum(int((~mask).sum()) for mask in masks.values())
        if gone <= before["masks"]:
            return
        before["masks"] = gone
        times.append(trainer.global_step)
        for key, value in pl_module.state_dict().items():
            mask = masks.get(key, torch.ones_like(value, dtype=torch.bool))
            assert_same(value, torch.where(mask, start["of"][key], 0))
        name_of = {id(p): key for key, p in pl_module.named_parameters()}
        names = [name_of[id(p)] for p in trainer.optimizers[0].param_groups[0]["params"]]
        now = trainer.optimizers[0].state_dict()["state"]
        assert now.keys() == start["state"].keys()
        for number, state in now.items():
            for key, value in state.items():
                if isinstance(value, Tensor) and names[number] in masks and value.shape == masks[names[number]].shape:
                    assert_same(value, torch.where(masks[names[number]], start["state"][number][key], 0))
                else:
                    assert_same(value, start["state"][number][key])

    first = Spy(on_train_start=keep) if to == 0 else Spy(on_train_batch_end=keep)
    fit(module, first, pruning, Spy(on_train_batch_end=look), max_epochs=6)
    assert len(times) >= 4
    assert zeros(prunable(module))[0] == round(0.6 * zeros(prunable(module))[1])


def test_the_snapshot_is_independent() -> None:
    """LBFGS keeps lists, and changes them in place."""
    pruning, seen = weights(0.5, start=1, end=4, rewind_to=1), list[Any]()
    spy = Spy(on_train_batch_end=lambda *_: seen.append(copy.deepcopy(pruning._rewind and pruning._rewind.to_dict())))
    fit(seeded(lambda: Task(optimizer=OPTIMIZERS["LBFGS"])), pruning, spy, max_epochs=4)
    first, *others = [each for each in seen if each]
    for other in others:
        assert_same(other, first)


def dense(folder: Path, epochs: int = 1) -> Path:
    saver = ModelCheckpoint(folder, save_last=True)
    fit(seeded(Task), saver, max_epochs=epochs)
    return Path(saver.last_model_path)


@pytest.mark.parametrize(("to", "options"), [(0, {}), (1, {"start": 0.25}), (2, {"start": 0.5, "end": 1.0})])
def test_rewinding_to_what_is_over_is_refused(to: int, options: dict[str, Any], tmp_path: Path) -> None:
    path, module = dense(tmp_path, max(to, 1)), seeded(Task, 1)
    with pytest.raises(PruningError, match="rewind_to"):
        fit(module, weights(0.5, rewind_to=to, **options), ckpt_path=path, max_epochs=4)


def test_a_dense_checkpoint_may_be_pruned(tmp_path: Path) -> None:
    module = seeded(Task, 1)
    fit(module, weights(0.5, criterion="taylor"), ckpt_path=dense(tmp_path), max_epochs=4)
    assert zeros(prunable(module)) == (116, 232)


# -- checkpoints that don't fit ------------------------------------------------------------------------------------


def damaged(folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    saver = ModelCheckpoint(folder, save_last=True)
    fit(seeded(Task), weights(0.5, end=0.5), saver, max_epochs=2)
    checkpoint = torch.load(saver.last_model_path)
    (key,) = (key for key in checkpoint["callbacks"] if key.startswith("WeightPruning"))
    change(checkpoint["callbacks"][key]["masks"])
    torch.save(checkpoint, folder / "damaged.ckpt")
    return folder / "damaged.ckpt"


@pytest.mark.parametrize(
    "change",
    [
        lambda masks: masks.update({"net.0.weight": masks["net.0.weight"][:3]}),
        lambda masks: masks.update({"other.weight": masks.pop("net.0.weight")}),
        lambda masks: masks.pop("net.0.weight"),
    ],
    ids=["shape", "name", "missing"],
)
def test_masks_that_do_not_fit_are_refused(change: Any, tmp_path: Path) -> None:
    path, module = damaged(tmp_path, change), seeded(Task, 1)
    with pytest.raises(PruningError, match="masks"):
        fit(module, weights(0.5), ckpt_path=path, max_epochs=4)


@pytest.mark.parametrize("what", ["fit", "validate", "test", "predict"])
def test_masks_of_another_shape_are_refused_before_anything_is_loaded(what: str, tmp_path: Path) -> None:
    path = damaged(tmp_path, lambda masks: masks.update({"net.0.weight": masks["net.0.weight"][:3]}))
    module, pruning = seeded(Task, 1), weights(0.5)
    before = snapshot(module)
    with pytest.raises(PruningError, match=r"'net\.0\.weight' has shape \(12, 6\), its mask \(3, 6\)"):
        getattr(trainer_of(pruning, max_epochs=4), what)(module, ckpt_path=path)
    assert_same(snapshot(module), before)
    assert pruning.masks_ == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state["masks"].update({n: m.float() for n, m in state["masks"].items()}), "no tensor of bools"),
        (lambda state: state["masks"].update({n: m.tolist() for n, m in state["masks"].items()}), "masks|bools"),
        (lambda state: state.update(masks=None), "damaged: TypeError"),
        (lambda state: state.pop("seed"), "damaged: KeyError: 'seed'"),
        (lambda state: state.update(part="half"), "damaged: ValueError"),
        (lambda state: state.update(amount=7.0), "amount=7, part=1, pruned=1 are no fractions"),
        (lambda state: state.update(rewind=3), "damaged: TypeError"),
        (lambda state: state.update(sums={"net.0.weight": torch.ones(2, 2)}), "criterion has collected is not of this"),
        (lambda state: state.update(sums={"other": torch.ones(2, 2)}), "criterion has collected is not of this"),
    ],
)
def test_a_state_that_is_none_is_refused(change: Any, message: str, tmp_path: Path) -> None:
    saver, pruning = ModelCheckpoint(tmp_path, save_last=True), weights(0.5)
    fit(seeded(Task), weights(0.5, end=0.5), saver, max_epochs=2)
    checkpoint = torch.load(saver.last_model_path)
    (key,) = (key for key in checkpoint["callbacks"] if key.startswith("WeightPruning"))
    change(checkpoint["callbacks"][key])
    torch.save(checkpoint, tmp_path / "damaged.ckpt")
    module = seeded(Task, 1)
    with pytest.raises(PruningError, match=message):
        fit(module, pruning, ckpt_path=tmp_path / "damaged.ckpt", max_epochs=4)
    fit(seeded(Task, 1), weights(0.5))


@pytest.mark.parametrize("criterion", ["taylor", "movement", "wanda", "l1", torch.abs])
def test_what_another_criterion_has_collected_is_left_alone(criterion: Any, tmp_path: Path) -> None:
    """The gradients' sums of one would be read as the inputs' of another."""
    saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    late: dict[str, Any] = {"start": 2, "end": 4}
    fit(seeded(Task), weights(0.5, criterion="snip", **late), saver, max_epochs=4)
    found = []
    for change in (False, True):
        checkpoint = torch.load(tmp_path / "epoch=1.ckpt")
        (state,) = (s for key, s in checkpoint["callbacks"].items() if key.startswith("WeightPruning"))
        assert state["sums"]
        if change:
            state["sums"] = {}
        torch.save(checkpoint, tmp_path / "given.ckpt")
        module = seeded(Task, 1)
        fit(module, weights(0.5, criterion=criterion, **late), ckpt_path=tmp_path / "given.ckpt", max_epochs=4)
        found.append(snapshot(module))
    assert_same(*found)


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    path, module = damaged(tmp_path, lambda masks: None), seeded(lambda: Task(net(), shape=(8,)))
    before, pruning = snapshot(module), weights(0.5)
    with pytest.raises(RuntimeError, match="size mismatch"):
        fit(module, pruning, ckpt_path=path, max_epochs=4)
    assert {name: t.shape for name, t in snapshot(module).items()} == {name: t.shape for name, t in before.items()}
    assert pruning.masks_ == {}
    fit(module, pruning)
    assert zeros(prunable(module))[0] == 112


def test_a_checkpoint_of_other_parts_starts_anew(tmp_path: Path) -> None:
    """The callback's state belongs to what it prunes: another amount or other parts find none."""
    saver = ModelCheckpoint(tmp_path, save_last=True)
    fit(seeded(Task), weights(0.5, end=0.5), saver, max_epochs=2)
    module = seeded(Task, 1)
    fit(module, weights(0.75, include="net.0"), ckpt_path=saver.last_model_path, max_epochs=4)
    assert zeros(prunable(module))[0] >= 54
    assert zeros({"first": prunable(module)["net.0.weight"]}) == (54, 72)


@pytest.mark.parametrize("options", OPTIONS, ids=without_addresses)
def test_a_second_fit_of_a_fresh_model_starts_anew(options: dict[str, Any]) -> None:
    amount = 0.4 if options.get("pattern") == "2:4" else 0.6
    results, used = [], weights(amount, **options)
    fit(seeded(lambda: Task(net(), shape=(8,)), 2), used, max_epochs=4)
    for pruning in (used, weights(amount, **options)):
        module = seeded(lambda: Task(net(), shape=(8,)), 1)
        torch.manual_seed(3)
        assert left_hooks(fit(module, pruning, max_epochs=4), module) == []
        results.append(snapshot(module))
    assert_same(*results)


# -- interrupted again and again --------------------------------------------------------------------------------------


class Cut(Exception):
    """The power is gone."""


@pytest.mark.parametrize("options", OPTIONS, ids=without_addresses)
def test_interrupted_again_and_again(options: dict[str, Any], tmp_path: Path) -> None:
    """The same as below, in one process."""
    amount, whole = 0.4 if options.get("pattern") == "2:4" else 0.6, seeded(lambda: Alike(batches=7))
    trainer = fit(whole, weights(amount, **options), max_epochs=4)
    module, again = whole, trainer
    for stop in (4, 9, 13, 20, None):  # saved after 3, 6, 12, 18 steps: never at the end of an epoch

        def cut(trainer: Any, pl_module: Any, stop: int | None = stop) -> None:
            if trainer.global_step == stop:
                raise Cut

        saver = ModelCheckpoint(tmp_path, every_n_train_steps=3, save_last=True, save_top_k=0)
        last, module = tmp_path / "last.ckpt", seeded(lambda: Alike(batches=7), stop or 99)
        if stop == 4:
            module = seeded(lambda: Alike(batches=7))
        again = trainer_of(weights(amount, **options), saver, Spy(on_train_batch_start=cut), max_epochs=4)
        with nullcontext() if stop is None else pytest.raises(Cut):
            again.fit(module, ckpt_path=last if last.exists() else None)
    assert_same(snapshot(module), snapshot(whole))
    assert_same(optimizer_states(again), optimizer_states(trainer))


# -- killed and resumed --------------------------------------------------------------------------------------------

SCRIPT = """
import sys, time, warnings
warnings.simplefilter("ignore")
folder, options, batches, pause = sys.argv[1:]
import torch
torch.set_num_threads(1)
from pathlib import Path
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_modules import Spy, fit, mlp, seeded, weights
from test_weight_pruning_resume import Alike
module = seeded(lambda: Alike(batches=int(batches)))
last = Path(folder) / "last.ckpt"
spy = Spy(on_train_batch_end=lambda *_: time.sleep(float(pause)))
saver = ModelCheckpoint(folder, every_n_train_steps=4, save_last=True, save_top_k=0)
pruning = weights(0.6, **eval(options))
trainer = fit(module, pruning, spy, saver, max_epochs=3, ckpt_path=last if last.exists() else None)
state = {"weights": dict(module.state_dict()), "optimizer": trainer.optimizers[0].state_dict()["state"]}
torch.save(state, Path(folder) / "done.pt")
"""


def killed(folder: Path, kills: int, options: dict[str, Any], batches: int, pause: float) -> dict[str, Any]:
    """Train in a process that is killed so many times at random moments; what it ends with."""
    folder.mkdir()
    script, last, done, tests = folder / "train.py", folder / "last.ckpt", folder / "done.pt", Path(__file__).parents[1]
    script.write_text(SCRIPT)
    path = os.pathsep.join([str(tests.parent), str(tests), str(tests / "callbacks")])
    arguments = [sys.executable, str(script), str(folder), repr(options), str(batches), str(pause)]
    chance = random.Random(repr(options))
    for left in range(kills, -1, -1):
        before = last.stat().st_mtime_ns if last.exists() else 0
        with (folder / "log").open("w") as log:
            process = subprocess.Popen(arguments, env=os.environ | {"PYTHONPATH": path}, stdout=log, stderr=log)
            try:
                if left:
                    while process.poll() is None and (not last.exists() or last.stat().st_mtime_ns == before):
                        time.sleep(0.001)
                    time.sleep(chance.uniform(0, 5 * pause))
                    process.send_signal(signal.SIGKILL)
                expected = -signal.SIGKILL if left else 0
                assert process.wait(120) == expected, (folder / "log").read_text()[-2000:]
            finally:
                process.kill()
    return torch.load(done)  # type: ignore[no-any-return]


KILLS = int(os.environ.get("LIGHTNING_PRUNE_KILLS", "3"))
"""How many times; set it to run the test."""
slow = pytest.mark.skipif("LIGHTNING_PRUNE_KILLS" not in os.environ, reason="a minute each; LIGHTNING_PRUNE_KILLS=3")


@slow
@pytest.mark.parametrize(
    "options",
    [
        {"criterion": "taylor", "every": 3},
        {"regrow": "rigl", "every": 3, "end": 1.0},
        {"rewind_to": 1, "start": 1, "end": 3},
    ],
    ids=without_addresses,
)
def test_killed_and_resumed(options: dict[str, Any], tmp_path: Path) -> None:
    # Never at the end of an epoch: Lightning alone loses count if it is resumed from there twice.
    batches = 4 * max(KILLS, 3) + 3
    whole = killed(tmp_path / "whole", 0, options, batches, 0.0)
    part = killed(tmp_path / "part", KILLS, options, batches, 0.05)
    assert_same(part, whole)
