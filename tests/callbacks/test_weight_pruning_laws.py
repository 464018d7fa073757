"""WeightPruning's laws, over optimizers, precisions, kinds of training, Lightning's own callbacks, and criteria."""

from __future__ import annotations

import copy
import functools
import itertools
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ids import without_addresses
from lightning.pytorch import callbacks
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from lightning_modules import (
    CLASSES,
    IMAGE,
    LAW_WARNINGS,
    SGD,
    EncoderDecoder,
    LateLayers,
    Spy,
    Task,
    TwoOptimizers,
    WithForward,
    assert_refused,
    assert_same,
    conv_net,
    fit,
    left_hooks,
    load_plain,
    mlp,
    neurons,
    prunable,
    seeded,
    snapshot,
    trainer_of,
    weights,
    zeros,
)
from torch import Tensor, nn, optim
from torch.nn import functional as F
from weight_cases import CRITERIA, GRADIENTS, OPTIMIZERS, Held

from lightning_prune import PruningError, WeightPruning

pytestmark = LAW_WARNINGS

one_shot = functools.partial(weights, schedule="one_shot")


def hold(module: Task, *others: Any, gone: int | None = None, **options: Any) -> Any:
    """Train; zero stays zero after every step, and the amount is met. Returns the trainer."""
    pruning = [c for c in others if isinstance(c, WeightPruning)]
    held = Held(*pruning)
    trainer = fit(module, *others, held.spy(), **{"max_epochs": 3} | options)
    assert held.checks >= 10
    assert held.alive == []
    count, total = zeros(prunable(module))
    assert count == (round(pruning[0].amount * total) if gone is None else gone)
    for handle in held.handles:
        handle.remove()
    assert left_hooks(trainer, module) == []
    return trainer


# -- zero stays zero --------------------------------------------------------------------------------------------------

PARTS = functools.partial


class Groups(Task):
    """Weight decay for weights only."""

    def configure_optimizers(self) -> Any:
        groups: list[Any] = [{"params": [p for p in self.parameters() if (p.dim() < 2) == flat]} for flat in (0, 1)]
        groups[1]["weight_decay"] = 0.0
        return self.optimizer(groups)


@pytest.mark.parametrize("every", [2, "epoch"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_zero_stays_zero_under_every_optimizer(name: str, every: Any) -> None:
    for cls in (Task,) if name == "Muon" or "LBFGS" in name else (Task, Groups):
        module = seeded(PARTS(cls, optimizer=OPTIMIZERS[name]))
        pruning = weights(0.5, schedule="linear", end=1.0, every=every)
        before = snapshot(module)
        hold(module, pruning)
        kept = pruning.masks_["net.2.weight"]
        assert not torch.equal(module.net[2].weight[kept], before["net.2.weight"][kept]), "the others do learn"


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_clip_val": 0.01},
        {"gradient_clip_val": 0.001, "gradient_clip_algorithm": "value"},
        {"accumulate_grad_batches": 3},
        {"precision": "bf16-mixed"},
        {"precision": "bf16-true"},
        {"precision": "bf16-true", "gradient_clip_val": 0.01, "accumulate_grad_batches": 2},
    ],
    ids=without_addresses,
)
@pytest.mark.parametrize("criterion", CRITERIA, ids=without_addresses)
def test_zero_stays_zero_under_every_criterion(criterion: Any, options: dict[str, Any]) -> None:
    pruning = weights(0.5, criterion=criterion, every=3, end=1.0)
    hold(seeded(lambda: Task(optimizer=PARTS(optim.AdamW, lr=0.01, weight_decay=0.1))), pruning, **options)


def test_masks_are_laid_out_like_the_weights() -> None:
    """Masking a gradient of another layout takes six times as long."""
    module = seeded(lambda: Task(conv_net().to(memory_format=torch.channels_last), shape=IMAGE))
    pruning, strides = weights(0.5, end=0.5, exclude="net.7"), list[bool]()

    def look(trainer: Any, pl_module: Any) -> None:
        if pruning._held is not None:
            bits = pruning._held._bits
            assert id(pl_module.net[7].weight) not in bits
            strides.extend(p.grad.stride() == bits[id(p)].stride() for p in pl_module.parameters() if id(p) in bits)

    count = sum(p.numel() for name, p in prunable(module).items() if "net.7" not in name)
    hold(module, pruning, Spy(on_before_optimizer_step=look), gone=round(0.5 * count))
    assert len(strides) >= 12
    assert all(strides)


class Two(TwoOptimizers):
    """Two optimizers in manual optimization, Lightning's wrappers or the plain ones, with closures or without."""

    def __init__(self, wrapped: bool, closures: bool, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.wrapped, self.closures = wrapped, closures

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers(use_pl_optimizer=self.wrapped):  # type: ignore[union-attr]

            def closure(optimizer: Any = optimizer) -> Tensor:
                optimizer.zero_grad()
                loss = F.cross_entropy(self.logits(batch[0]), batch[1])
                self.manual_backward(loss)
                return loss

            if self.closures:
                optimizer.step(closure=closure)
            else:
                closure()
                optimizer.step()


BOTH = {"SGD": SGD, "LBFGS": PARTS(optim.LBFGS, lr=0.1, max_iter=2)}


@pytest.mark.parametrize("wrapped", [True, False], ids=["wrapped", "plain"])
@pytest.mark.parametrize("closures", [True, False], ids=["closure", "no closure"])
@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("criterion", ["l1", "taylor", "wanda", "synflow"])
def test_manual_optimization(wrapped: bool, closures: bool, name: str, criterion: str) -> None:
    if name == "LBFGS" and not closures:
        pytest.skip("LBFGS needs a closure")
    module = seeded(lambda: Two(wrapped, closures, optimizer=BOTH[name]))
    hold(module, weights(0.5, criterion=criterion, every=3, end=1.0))


class Noise(Task):
    """A hook of the user's own changes the gradients."""

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        for parameter in self.parameters():
            parameter.grad += 0.01  # type: ignore[operator]


class Centralized(Task):
    """Clips gradients in a way of its own."""

    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        for parameter in self.parameters():
            parameter.grad -= parameter.grad.mean()  # type: ignore[union-attr, operator]


class Sqrt(Task):
    """The gradient of this penalty is no number where a weight is zero."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        penalty = torch.stack([p.abs().sqrt().sum() for p in prunable_parameters(self)]).sum()
        return super().training_step(batch, batch_idx) + 1e-4 * penalty


class Sparse(Task):
    """Sparse gradients; the decoder sees the rows that the batch has asked for."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(nn.ModuleList([nn.Embedding(16, 6, sparse=True), nn.Linear(6, CLASSES)]), **kwargs)

    def logits(self, x: Tensor) -> Tensor:
        embedding, head = self.net  # type: ignore[misc]
        return head(embedding((x[:, :3].abs() * 5).long().clamp(max=15)).mean(1))  # type: ignore[no-any-return]


class Perturbed(Task):
    """SAM by hand: a step is taken with the gradients of a point nearby."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        optimizer: Any = self.optimizers()
        loss = F.cross_entropy(self.logits(batch[0]), batch[1])
        self.manual_backward(loss)
        moves = [0.05 * p.grad for p in self.parameters() if p.grad is not None]
        with torch.no_grad():
            torch._foreach_add_(list(self.parameters()), moves)
            optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(self.logits(batch[0]), batch[1]))
        with torch.no_grad():
            torch._foreach_sub_(list(self.parameters()), moves)
        optimizer.step()


class Clamped(Task):
    """Weights are kept away from zero after each batch."""

    def on_train_batch_end(self, *args: Any) -> None:
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.clamp_(min=0.01)


class Hurried(Task):
    """Goes on with another optimizer in the second epoch."""

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            self.trainer.strategy.optimizers = [optim.Adam(self.parameters(), lr=0.05, weight_decay=0.1)]


@pytest.mark.parametrize("make", [Clamped, Hurried])
def test_zero_comes_back_after_a_step_whoever_wrote_to_the_weights(make: Any) -> None:
    pruning, alive = one_shot(0.5, end=0.25), list[int]()

    def step(optimizer: Any, *_: Any) -> None:
        parameters = {id(p): p for group in optimizer.param_groups for p in group["params"]}
        for name, mask in pruning.masks_.items():
            weight = parameters[id(dict(module.named_parameters())[name])]
            state = [v for v in optimizer.state[weight].values() if torch.is_tensor(v) and v.shape == mask.shape]
            alive.append(sum(int(value[~mask].count_nonzero()) for value in [weight, *state]))

    def listen(trainer: Any, module: Any) -> None:
        if trainer.optimizers[0] not in watched:  # after the callback's own
            watched.append(trainer.optimizers[0])
            trainer.optimizers[0].register_step_post_hook(step)

    watched: list[Any] = []
    module = seeded(make)
    fit(module, pruning, Spy(on_train_batch_start=listen), max_epochs=4)
    assert len(watched) == (2 if make is Hurried else 1)
    assert len(alive) == 3 * 12
    assert not any(alive)


def prunable_parameters(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.dim() >= 2]


@pytest.mark.parametrize(
    "make",
    [
        Noise,
        Centralized,
        Sqrt,
        pytest.param(lambda: Sparse(optimizer=PARTS(optim.SGD, lr=0.5))),
        pytest.param(lambda: Sparse(optimizer=PARTS(optim.Adagrad, lr=0.5))),
        Perturbed,
        lambda: Perturbed(optimizer=PARTS(optim.AdamW, lr=0.01, weight_decay=0.1)),
    ],
    ids=["noise", "clipping", "nan gradients", "sparse SGD", "sparse Adagrad", "SAM", "SAM AdamW"],
)
def test_zero_stays_zero_whatever_happens_to_gradients(make: Any) -> None:
    hold(seeded(make), one_shot(0.5))


@pytest.mark.parametrize("criterion", GRADIENTS)
def test_criteria_take_sparse_gradients(criterion: str) -> None:
    hold(seeded(lambda: Sparse(optimizer=PARTS(optim.SGD, lr=0.5))), weights(0.5, criterion=criterion))


@pytest.mark.parametrize("criterion", GRADIENTS)
def test_steps_that_a_scaler_skips_do_not_count(criterion: str) -> None:
    """The first steps of 16-mixed always overflow."""
    precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**20))
    pruning, finite = weights(0.5, criterion=criterion, start=0.4, end=1.0), list[bool]()
    spy = Spy(
        on_train_batch_end=lambda *_: finite.extend(bool(s.isfinite().all()) for s in pruning._judge.sums.values())
    )
    hold(seeded(Task), spy, pruning, plugins=[precision], max_epochs=6)
    assert all(finite)


@pytest.mark.parametrize("criterion", ["l1", *GRADIENTS, "synflow"])
def test_float16_weights(criterion: str) -> None:
    hold(
        seeded(lambda: Task(optimizer=PARTS(optim.SGD, lr=0.05))),
        weights(0.5, criterion=criterion),
        precision="16-true",
    )


def test_fisher_tells_small_gradients_apart_in_half_precision() -> None:
    pruning = WeightPruning(criterion="fisher")
    weight, gradient = torch.tensor([[0.05, 0.05]]).half(), torch.tensor([[1e-3, 2e-3]]).half()
    pruning._judge.collect("w", weight, gradient)  # type: ignore[attr-defined]
    low, high = pruning._judge.sums["w"].flatten().tolist()
    assert low < high


def test_sums_of_low_precision_go_on() -> None:
    pruning, one = WeightPruning(criterion="taylor"), torch.ones(1, 1, dtype=torch.bfloat16)
    for _ in range(1000):
        pruning._judge.collect("w", one, one)  # type: ignore[attr-defined]
    assert float(pruning._judge.sums["w"]) == pytest.approx(1000, rel=0.01)


# -- amounts are met: scopes, patterns, schedules ------------------------------------------------------------------

SCOPES: list[Any] = ["global", "layer", "erk", "lamp", {"net.0": 0.5, "net.4": 0.2}]


def wanted(scope: Any, sizes: dict[str, int], amount: float) -> Any:
    """Number of zeros: of each weight, or of all together."""
    if scope in ("global", "lamp"):
        return round(amount * sum(sizes.values()))
    return None if scope == "erk" else {
        name: round((amount if scope == "layer" else scope.get(name[:5], amount)) * size) for name, size in sizes.items()
    }  # fmt: skip


@pytest.mark.parametrize("every", ["epoch", 3])
@pytest.mark.parametrize("schedule", ["cubic", "linear", "exponential", "one_cycle", "one_shot", lambda p: p**2])
@pytest.mark.parametrize("scope", SCOPES, ids=without_addresses)
def test_amounts_of_every_scope_and_schedule(scope: Any, schedule: Any, every: Any) -> None:
    module = seeded(lambda: Task(mlp(8, 12, 8, CLASSES), shape=(8,)))
    gone: list[int] = []
    pruning = weights(0.37, scope=scope, schedule=schedule, every=every, end=0.8)
    spy = Spy(on_train_batch_end=lambda *_: gone.append(zeros(prunable(module))[0]))
    fit(module, pruning, spy, max_epochs=4)
    found = {name: zeros({name: p})[0] for name, p in prunable(module).items()}
    sizes = {name: p.numel() for name, p in prunable(module).items()}
    expected = wanted(scope, sizes, 0.37)
    if scope == "erk":
        assert abs(sum(found.values()) - 0.37 * sum(sizes.values())) <= len(sizes) / 2
    else:
        assert (found if isinstance(expected, dict) else sum(found.values())) == expected
    assert gone == sorted(gone), "a schedule never takes anything back"


@pytest.mark.parametrize("criterion", CRITERIA, ids=without_addresses)
@pytest.mark.parametrize("pattern", ["2:4", "1:4", "block:2x2", "block:4x1"])
@pytest.mark.parametrize("scope", SCOPES, ids=without_addresses)
def test_patterns_hold(scope: Any, pattern: str, criterion: Any) -> None:
    module = seeded(lambda: Task(mlp(8, 12, 8, CLASSES), shape=(8,)))
    pruning = weights(0.4, scope=scope, pattern=pattern, criterion=criterion, every=3)
    held = Held(pruning)
    fit(module, pruning, held.spy(), max_epochs=3)
    assert held.alive == []
    size = {"block:2x2": 4, "block:4x1": 4}.get(pattern, 1)
    for name, p in prunable(module).items():
        if ":" in pattern[:2]:
            kept = (p != 0).view(len(p), -1, 4).sum(-1)
            assert int(kept.min()) >= int(pattern[0])
        else:
            rows, columns = (2, 2) if pattern == "block:2x2" else (4, 1)
            blocks = (p != 0).view(len(p) // rows, rows, -1, columns).sum((1, 3))
            assert set(blocks.flatten().tolist()) <= {0, size}, name
    sizes = {name: p.numel() // size for name, p in prunable(module).items()}
    found = {name: zeros({name: p})[0] // size for name, p in prunable(module).items()}
    if scope != "erk":
        expected = wanted(scope, sizes, 0.4)
        assert (found if isinstance(expected, dict) else sum(found.values())) == expected


def test_a_scope_of_amounts_needs_no_other_amount() -> None:
    module = seeded(Task)
    fit(module, weights(0.0, scope={"net.0": 0.5}))
    assert {name: zeros({name: p})[0] for name, p in prunable(module).items()} == {
        "net.0.weight": 36, "net.2.weight": 0, "net.4.weight": 0,
    }  # fmt: skip


@pytest.mark.parametrize(
    "value",
    [
        float("nan"),
        float("inf"),
    ],
)
def test_scores_that_are_no_numbers(value: float) -> None:
    """An error, or weights go; but nothing that is gone comes back without a word."""
    scores = itertools.chain([1.0] * 3, itertools.repeat(value))
    module, gone = seeded(Task), list[int]()
    spy = Spy(on_train_batch_end=lambda *_: gone.append(zeros(prunable(module))[0]))
    pruning = weights(0.5, criterion=lambda w: w.abs() * next(scores), end=1.0, schedule="linear")
    try:
        fit(module, pruning, spy, max_epochs=4)
    except PruningError:
        return
    assert gone == sorted(gone)
    assert gone[-1] == 116


# -- Lightning's own callbacks, compiled parts, late layers, tied weights ---------------------------------------------


class Parts(EncoderDecoder):
    """A backbone that is frozen at first, and a learning rate that may be found."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.backbone, self.lr = self.encoder, 0.05

    def configure_optimizers(self) -> Any:
        return optim.SGD([p for p in self.parameters() if p.requires_grad], lr=self.lr, momentum=0.9)


class Finder(callbacks.LearningRateFinder):
    """In the middle of training, as Lightning's documentation shows."""

    def on_fit_start(self, *args: Any) -> None:
        pass

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 2:
            self.lr_find(trainer, pl_module)


AROUND: dict[str, Callable[[], Any]] = {
    "backbone": lambda: callbacks.BackboneFinetuning(unfreeze_backbone_at_epoch=2),
    "lr finder": lambda: callbacks.LearningRateFinder(num_training_steps=25),
    "lr finder later": lambda: Finder(num_training_steps=5, update_attr=False),
    "swa": lambda: callbacks.StochasticWeightAveraging(0.05, swa_epoch_start=2),
    "accumulation": lambda: callbacks.GradientAccumulationScheduler({0: 3, 2: 1}),
}
if hasattr(callbacks, "EMAWeightAveraging"):
    AROUND["ema"] = lambda: callbacks.EMAWeightAveraging(decay=0.9)


@pytest.mark.parametrize("ours_first", [True, False])
@pytest.mark.parametrize(
    "options", [{}, {"rewind_to": 0}, {"rewind_to": 1, "start": 0.3}, {"regrow": "set"}], ids=without_addresses
)
@pytest.mark.parametrize("name", AROUND)
def test_beside_lightnings_own_callbacks(
    name: str, options: dict[str, Any], ours_first: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "lr finder" and options.get("rewind_to") and not hasattr(callbacks, "WeightAveraging"):
        pytest.skip("lightning 2.5's finder leaves the first epoch without a batch, so there is nothing to rewind to")
    pruning, other = weights(0.5, **options), AROUND[name]()
    order = (pruning, other) if ours_first else (other, pruning)
    hold(seeded(Parts), *order, max_epochs=4, default_root_dir=tmp_path)
    if options.get("rewind_to") is not None:
        assert pruning._rewind is not None


@pytest.mark.parametrize("name", ["lr finder", "lr finder later"])
def test_a_learning_rate_finder_does_not_make_the_next_fit_a_resumed_one(name: str, tmp_path: Path) -> None:
    pruning, start = weights(0.5), list[int]()
    fit(seeded(Parts), AROUND[name](), pruning, max_epochs=4, default_root_dir=tmp_path)
    fresh = seeded(Parts, 1)
    fit(fresh, pruning, Spy(on_train_batch_start=lambda *_: start.append(zeros(prunable(fresh))[0])))
    assert start[0] == 0


@pytest.mark.filterwarnings("ignore:.*WeightAveraging callback with a model that overrides.*")
@pytest.mark.parametrize("name", ["swa", "ema"])
def test_averages_that_lack_the_late_layers(name: str) -> None:
    """Lightning copies the module before `configure_model`."""
    if name not in AROUND:
        pytest.skip("newer lightning")
    hold(seeded(LateLayers), weights(0.5), AROUND[name](), max_epochs=4)


class Wrapped(nn.Module):
    """One layer of its own, the rest compiled."""

    def __init__(self, inside: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.first, self.rest = nn.Linear(6, 6), torch.compile(inside(), backend="eager")

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(torch.tanh(self.first(x)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("criterion", ["l1", "taylor", "wanda", "synflow"])
@pytest.mark.parametrize("kind", ["wrapper", "in place", "whole"])
@pytest.mark.filterwarnings("ignore:.*torch._dynamo.*")
def test_compiled_parts(kind: str, criterion: str) -> None:
    torch._dynamo.reset()
    module = seeded(lambda: Task(Wrapped(mlp) if kind == "wrapper" else mlp()))
    if kind == "in place":
        module.net.compile(backend="eager")
    if kind == "whole":
        module = seeded(WithForward)
        trainer_of(weights(0.5, criterion=criterion)).fit(torch.compile(module, backend="eager"))
        assert zeros(prunable(module)) == (116, 232)
    else:
        hold(module, weights(0.5, criterion=criterion))


class Tied(Task):
    """Two layers, one weight."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)), **kwargs)
        self.net[2].weight = self.net[0].weight  # type: ignore[index]


OPTIONS: list[dict[str, Any]] = [
    *({"criterion": criterion} for criterion in CRITERIA),
    {"scope": "erk"},
    {"scope": "lamp", "criterion": "fisher"},
    {"regrow": "rigl"},
    {"regrow": "set", "criterion": "taylor"},
    {"rewind_to": 0},
    {"rewind_to": 1, "start": 0.5, "end": 1.0, "criterion": "wanda"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=without_addresses)
@pytest.mark.parametrize("make", [LateLayers, Tied])
def test_late_layers_and_tied_weights(make: Any, options: dict[str, Any]) -> None:
    module = seeded(make)
    pruning = weights(0.5, **options)
    held = Held(pruning)
    fit(module, pruning, held.spy(), max_epochs=4)
    gone, total = zeros(prunable(module))
    assert held.alive == []
    assert abs(gone - 0.5 * total) <= (1.5 if options.get("scope") == "erk" else 0.5)
    if make is Tied:
        assert module.net[0].weight is module.net[2].weight
    copy.deepcopy(module)
    assert pickle.loads(pickle.dumps(snapshot(module))).keys() == module.state_dict().keys()


# -- a checkpoint's metric is its own ------------------------------------------------------------------------------

SAVERS: dict[str, dict[str, Any]] = {
    "top k": {"monitor": "val_loss", "save_top_k": 2, "save_last": True},
    "weights only": {"monitor": "val_loss", "save_top_k": -1, "save_weights_only": True},
}


@pytest.mark.parametrize("average", [None, "ema", "swa"])
@pytest.mark.parametrize(
    "options",
    [{}, {"every": 3}, {"criterion": "wanda", "pattern": "2:4"}, {"regrow": "rigl"}, {"rewind_to": 1, "start": 0.25}],
    ids=without_addresses,
)
@pytest.mark.parametrize("saver", SAVERS)
def test_validating_a_checkpoint_gives_its_metric(
    saver: str, options: dict[str, Any], average: Any, tmp_path: Path
) -> None:
    if average == "ema" and (average not in AROUND or saver == "weights only"):
        pytest.skip("newer lightning, which saves the model itself there, not the average that it has measured")

    def make() -> Task:
        return Task(mlp(8, 12, 8, CLASSES), shape=(8,))

    keeper = ModelCheckpoint(tmp_path, **SAVERS[saver])
    others = [] if average is None else [AROUND[average]()]
    stop = callbacks.EarlyStopping("val_loss", patience=50)
    fit(
        seeded(make),
        weights(0.5, **{"end": 1.0} | options),
        keeper,
        stop,
        *others,
        max_epochs=4,
        val_check_interval=0.5,
    )
    assert keeper.best_k_models
    for path, score in keeper.best_k_models.items():
        for fresh in (weights(0.5, **options), None):
            trainer = trainer_of(*([fresh] if fresh else []))
            (metrics,) = trainer.validate(seeded(make, 1), ckpt_path=path, verbose=False)
            assert metrics["val_loss"] == float(score)
            (tested,) = trainer.test(seeded(make, 1), ckpt_path=path, verbose=False)
            assert tested == metrics
            module = seeded(make, 1)
            assert len(trainer.predict(module, ckpt_path=path)) == 2
            assert_same(dict(module.state_dict()), dict(load_plain(path)["state_dict"]))


# -- nothing is left behind, and exceptions leave the model usable -------------------------------------------------


@pytest.mark.parametrize("options", [*OPTIONS, {"pattern": "2:4"}, {"scope": {"net.0": 0.3}}], ids=without_addresses)
@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
@pytest.mark.parametrize(
    "hook", ["on_train_batch_start", "on_before_backward", "on_before_optimizer_step", "on_validation_start"]
)
def test_nothing_is_left_behind(hook: str, error: Any, options: dict[str, Any]) -> None:
    if error is None and hook != "on_train_batch_start":
        pytest.skip("no error: once is enough")

    def fail(trainer: Any, module: Any) -> None:
        if error is not None and trainer.current_epoch == 2:
            raise error("stop here")

    module = seeded(lambda: Task(mlp(8, 12, 8, CLASSES), shape=(8,)))
    names, identities = list(module.state_dict()), [id(p) for p in module.parameters()]
    pruning = weights(0.4, **options)
    trainer = trainer_of(pruning, Spy(**{hook: fail}), max_epochs=4)
    if error is None:
        trainer.fit(module)
    else:
        with pytest.raises(ValueError if error is ValueError else SystemExit):
            trainer.fit(module)
    assert left_hooks(trainer, module) == []
    assert (list(module.state_dict()), [id(p) for p in module.parameters()]) == (names, identities)
    assert all("forward" not in vars(m) for m in module.modules())
    x = torch.randn(2, 8)
    expected = module.net(x)
    assert_same(copy.deepcopy(module).net(x), expected)
    assert_same(pickle.loads(pickle.dumps(module.net))(x), expected)
    if options.get("criterion") is not torch.abs:
        assert copy.deepcopy(pruning).masks_.keys() == pruning.masks_.keys()
        pickle.dumps(pruning.state_dict())
    held = Held(pruning)
    module.train()
    fit(module, pruning, held.spy(), max_epochs=4)  # the same model, the same callback: no compounding
    assert held.alive == []
    if options.get("scope") not in ("erk", {"net.0": 0.3}):
        gone, total = zeros(prunable(module))
        assert gone == round(0.4 * total)


# -- several callbacks in one Trainer ------------------------------------------------------------------------------

PAIRS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"criterion": "taylor"}, {"criterion": "wanda", "pattern": "block:2x2"}),
    ({"criterion": "synflow"}, {"criterion": "movement", "scope": "erk"}),
    ({"regrow": "rigl"}, {"criterion": "fisher", "every": 3}),
    ({"regrow": "set"}, {"criterion": "random", "schedule": "one_cycle"}),
    ({"rewind_to": 0}, {"criterion": "snip", "end": 0.5}),
    ({"rewind_to": 0}, {"rewind_to": 1, "start": 0.5}),
]


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize(("first", "second"), PAIRS, ids=without_addresses)
def test_callbacks_on_different_parts(first: dict[str, Any], second: dict[str, Any], swap: bool) -> None:
    module = seeded(lambda: Task(mlp(8, 12, 8, CLASSES), shape=(8,)))
    one, two = weights(0.5, include="net.0", **first), weights(0.25, exclude="net.0", **second)
    held = Held(one, two)
    fit(module, *((two, one) if swap else (one, two)), held.spy(), max_epochs=4)
    assert held.alive == []
    parameters = prunable(module)
    assert zeros({"first": parameters.pop("net.0.weight")}) == (48, 96)
    assert zeros(parameters) == (32, 128)


TOGETHER = [*OPTIONS, {"criterion": "movement", "regrow": "rigl", "every": 3}, {"schedule": "linear", "end": 0.5}]


@pytest.mark.parametrize(
    ("options", "ours_first"),
    [
        pytest.param(options, ours, id=without_addresses(f"{options}-{ours}"))
        for options, ours in itertools.product(TOGETHER, (True, False))
    ],
)
def test_weights_and_neurons_together(options: dict[str, Any], ours_first: bool) -> None:
    module = seeded(lambda: Task(mlp(6, 16, 12, CLASSES), optimizer=PARTS(optim.AdamW, lr=0.01)))
    pruning, removal = weights(0.5, **options), neurons(0.3, end=1.0, schedule="linear")
    held = Held(pruning)
    fit(module, *((pruning, removal) if ours_first else (removal, pruning)), held.spy(), max_epochs=4)
    assert sum(layer.out_features for layer in list(module.net)[:4:2]) == 28 - round(0.3 * 28)
    assert held.alive == []
    gone, total = zeros(prunable(module))
    assert abs(gone - 0.5 * total) <= (1.5 if options.get("scope") == "erk" else 0.5)
    shapes = {name: tuple(p.shape) for name, p in prunable(module).items()}
    assert {name: tuple(mask.shape) for name, mask in pruning.masks_.items()} == shapes
    if pruning._rewind is not None:
        found = {name: tuple(pruning._rewind.tensors[name].shape) for name in shapes}
        assert found == shapes


# -- bad input: a clear error before anything is changed -----------------------------------------------------------


def frozen(kind: Any = Task) -> Any:
    module = kind()
    module.net[0].weight.requires_grad_(False)
    return module


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        *((frozen, {"criterion": c}, "need gradients.*'net.0.weight' is frozen.*exclude") for c in GRADIENTS),
        (frozen, {"regrow": "rigl"}, "need gradients.*'net.0.weight' is frozen"),
        (Task, {"pattern": "2:4"}, r"groups of 4.*'net.0.weight'.*\(12, 6\).*exclude"),
        (Task, {"pattern": "block:5x2"}, r"block:5x2 doesn't fit 'net.0.weight'.*\(12, 6\)"),
        (lambda: Task(mlp(8, 4)), {"pattern": "2:4", "amount": 0.6}, "2:4 removes 0.5.*amount=0.6"),
        (lambda: Task(mlp(8, 4)), {"pattern": "2:4", "scope": {"net.0": 0.7}, "amount": 0.1}, "2:4 removes 0.5.*0.7"),
        (Task, {"scope": {"encoder.*": 0.5}}, r"'encoder\.\*' matches no module.*net\.0"),
        (Task, {"scope": {"net.0": 0.5}, "exclude": "net.0"}, r"'net\.0' matches no module"),
        (lambda: Task(nn.Bilinear(3, 3, 4)), {"criterion": "wanda"}, "needs a layer's input.*'net.weight'.*exclude"),
        (Task, {"rewind_to": 2, "start": 0.0}, "rewind_to=2 lies after the first pruning"),
        (Task, {"rewind_to": 9, "start": 0.0}, "rewind_to=9 lies after the first pruning"),
        (Task, {"rewind_to": 1, "start": 0.0, "every": 1}, "rewind_to=1 lies after the first pruning"),
        (PARTS(Task, endless=True), {"rewind_to": 2, "end": 2}, "rewind_to=2 lies after the first pruning"),
        (Task, {"rewind_to": 2, "start": 1, "end": 4, "every": 3}, "rewind_to=2 lies after the first pruning"),
    ],
    ids=without_addresses,
)
def test_what_cannot_work_is_refused(make: Any, options: dict[str, Any], message: str) -> None:
    assert_refused(make, [weights(**options)], {"max_epochs": 4}, message)


# -- parts that take turns -----------------------------------------------------------------------------------------


class Turns(EncoderDecoder):
    """A GAN's way: two optimizers, one of which steps at a time; zeros, or nothing, where the other's gradients were."""

    def __init__(self, to_none: bool = True, both: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.automatic_optimization, self.to_none, self.both = False, to_none, both

    def configure_optimizers(self) -> Any:
        return self.optimizer(self.encoder.parameters()), self.optimizer(self.decoder.parameters())

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        own: Any = self.optimizers()
        part = (self.encoder, self.decoder)[batch_idx % 2]
        for optimizer in own:
            optimizer.zero_grad(set_to_none=self.to_none)
        loss = F.cross_entropy(self.logits(batch[0]), batch[1])
        for p, g in zip(part.parameters(), torch.autograd.grad(loss, list(part.parameters())), strict=True):
            p.grad = g if p.grad is None else p.grad.copy_(g)
        for number, optimizer in enumerate(own):
            if self.both or number == batch_idx % 2:
                optimizer.step()


class Branches(EncoderDecoder):
    """One optimizer; every second batch runs only the decoder."""

    def logits(self, x: Tensor) -> Tensor:
        number = self.trainer.fit_loop.epoch_loop.batch_idx if self.training else 0
        return super().logits(x) if number % 2 == 0 else self.decoder(torch.cat([x, x[:, :4]], 1))  # type: ignore[no-any-return]


TURNS = {
    "one steps": Turns,
    "one steps, zeros": PARTS(Turns, to_none=False),
    "both step": PARTS(Turns, both=True),
    "both step, zeros": PARTS(Turns, to_none=False, both=True),
    "branches": Branches,
}


@pytest.mark.parametrize("schedule", ["linear", "one_shot"])
@pytest.mark.parametrize("criterion", [*GRADIENTS, "wanda"])
@pytest.mark.parametrize("make", TURNS)
def test_parts_that_take_turns_are_judged_by_what_they_did_last(make: str, criterion: str, schedule: str) -> None:
    """With zeros for scores, all that goes would be of the part that rests."""
    pruning, seen = weights(0.5, criterion=criterion, every=1, end=1.0, schedule=schedule), list[dict[str, Tensor]]()
    module = seeded(lambda: TURNS[make](optimizer=PARTS(optim.AdamW, lr=0.01)))
    judge = pruning._judge
    ready = judge.ready

    def look(given: Any) -> None:
        ready(given)
        seen.append({name: judge.score(name, weight).clone() for name, weight in given.items()})

    judge.ready = look  # type: ignore[method-assign]
    hold(module, pruning, max_epochs=3)
    assert len(seen) >= (1 if schedule == "one_shot" else 8)
    for scores in seen:
        assert all(bool(score[pruning.masks_[name]].any()) for name, score in scores.items())
    gone = {name: float((~mask).float().mean()) for name, mask in pruning.masks_.items()}
    assert max(gone.values()) < 1, gone


@pytest.mark.parametrize("make", TURNS)
def test_rigl_where_parts_take_turns(make: str) -> None:
    pruning, moves = weights(0.5, regrow="rigl", every=1, end=1.0, schedule="one_shot"), set[str]()
    before: dict[str, Tensor] = {}

    def look(trainer: Any, module: Any) -> None:
        moves.update(name for name, mask in pruning.masks_.items() if name in before and (mask & ~before[name]).any())
        before.update(pruning.masks_)

    hold(seeded(TURNS[make]), Spy(on_train_batch_end=look), pruning, max_epochs=3)
    assert moves == set(pruning.masks_)


class Untrained(EncoderDecoder):
    """A layer that no step trains."""

    def logits(self, x: Tensor) -> Tensor:
        return self.decoder(torch.cat([x, x[:, :4]], 1))  # type: ignore[no-any-return]


@pytest.mark.parametrize("every", [1, 3, "epoch"])
@pytest.mark.parametrize("criterion", [*GRADIENTS, "wanda"])
def test_a_layer_that_is_never_trained_is_named(criterion: str, every: Any) -> None:
    module = seeded(Untrained)
    with pytest.raises(PruningError, match=f"{criterion}.*'encoder.0.weight' has none.*exclude"):
        fit(module, weights(0.5, criterion=criterion, every=every))
    assert all(bool((p != 0).all()) for p in prunable(module).values())


# -- hooks that have nothing to do, weights that are no numbers ----------------------------------------------------


@pytest.mark.parametrize("every", ["epoch", 3])
@pytest.mark.parametrize("schedule", ["linear", "one_shot", lambda p: 0.8 * p])
@pytest.mark.filterwarnings("ignore:.*the schedule never gives 1.*")
def test_inputs_are_not_watched_longer_than_needed(schedule: Any, every: Any, tmp_path: Path) -> None:
    watched = dict[int, bool]()

    def look(trainer: Any, module: Any) -> None:
        watched[trainer.global_step] = any(m._forward_pre_hooks for m in module.modules())

    pruning = weights(0.5, criterion="wanda", schedule=schedule, every=every, end=2)
    saver = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    fit(seeded(Task), pruning, saver, Spy(on_train_batch_end=look), max_epochs=4)
    last = 4 if schedule == "one_shot" and every == "epoch" else 3 if schedule == "one_shot" else 8
    assert watched == {step: step < last for step in range(1, 17)}
    assert not pruning._judge.sums
    for epoch in (0, 2):
        watched.clear()
        again = weights(0.5, criterion="wanda", schedule=schedule, every=every, end=2)
        path = tmp_path / f"epoch={epoch}.ckpt"
        fit(seeded(Task), again, Spy(on_train_batch_end=look), max_epochs=4, ckpt_path=path)
        assert watched == {step: step < last for step in range(4 * epoch + 5, 17)}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("criterion", ["l1", "taylor", "wanda", "synflow", "random"])
@pytest.mark.parametrize("options", [{}, {"regrow": "set", "schedule": "one_shot"}], ids=without_addresses)
def test_a_diverged_training_is_named_and_nothing_is_pruned(
    options: dict[str, Any], criterion: str, value: float
) -> None:
    pruning, state = weights(0.5, criterion=criterion, end=1.0, **options), dict[str, Any]()

    def diverge(trainer: Any, module: Any) -> None:
        if trainer.global_step == 8:
            with torch.no_grad():
                module.net[2].weight[3, 4] = value
            state.update(weights=snapshot(module), masks=dict(pruning.masks_))

    module = seeded(Task)
    trainer = trainer_of(Spy(on_train_batch_end=diverge), pruning, max_epochs=4)
    with pytest.raises(PruningError, match=r"'net\.2\.weight' holds .* NaN or infinite; nothing was pruned"):
        trainer.fit(module)
    assert trainer.global_step == 8
    assert_same(snapshot(module), state["weights"])
    assert_same(pruning.masks_, state["masks"])
    assert left_hooks(trainer, module) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_second_fit_of_a_diverged_model_is_refused(value: float) -> None:
    module, pruning = seeded(Task), weights(0.5)
    fit(module, pruning)
    masks = {name: mask.clone() for name, mask in pruning.masks_.items()}
    with torch.no_grad():
        good, at = module.net[2].weight.clone(), int(masks["net.2.weight"].flatten().nonzero()[0])
        module.net[2].weight.view(-1)[at] = value
    state = snapshot(module)
    with pytest.raises(PruningError, match=r"'net\.2\.weight' holds 1 values of 120 that are NaN or infinite"):
        fit(module, pruning)
    assert_same(snapshot(module), state)
    assert_same(pruning.masks_, masks)
    with torch.no_grad():
        module.net[2].weight.copy_(good)
    fit(module, pruning)
    assert_same(pruning.masks_, masks)
    assert zeros(prunable(module)) == (116, 232)
