import copy
import io
import math
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import LinearLR, LRScheduler, OneCycleLR, ReduceLROnPlateau, SequentialLR
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune.errors import PruningError
from lightning_prune.schedulers import SCHEDULERS, create_lr_scheduler, preview_lr

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),  # lightning 2.6 on torch 2.14
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:A `OneCycleLR` scheduler is using 'interval'.*"),
]

LR, INTERVALS = 0.2, 12
METRICS = [5.0, 4.0, 3.0, 3.0, 3.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0]
OPTIONS: dict[str, dict[str, Any]] = {
    "exponential": {"gamma": 0.8},
    "step": {"step_size": 2, "gamma": 0.5},
    "multistep": {"milestones": [2, 5], "gamma": 0.1},
    "cosine": {"T_max": 8, "eta_min": 0.01},
    "polynomial": {"total_iters": 7, "power": 2.0},
    "plateau": {"factor": 0.5, "patience": 1},
    "one_cycle": {"max_lr": 0.5, "total_steps": 12, "base_momentum": 0.8},
    "constant": {},
}
EVERY = [(name, warmup) for name in OPTIONS for warmup in (0, 3)]


def by_hand_one_cycle(k: int) -> float:
    """By cosines from 0.5 / 25 up to 0.5 at step 0.3 * 12 - 1 = 2.6, and down to 0.5 / 25 / 1e4 at 11."""
    low, high, floor, peak = 0.5 / 25, 0.5, 0.5 / 25 / 1e4, 2.6
    start, end, part = (low, high, k / peak) if k <= peak else (high, floor, (k - peak) / (11 - peak))
    return end + (start - end) / 2 * (1 + math.cos(math.pi * part))


BY_HAND: dict[str, Callable[[int], float]] = {
    "exponential": lambda k: LR * 0.8**k,
    "step": lambda k: LR * 0.5 ** (k // 2),
    "multistep": lambda k: LR * 0.1 ** ((k >= 2) + (k >= 5)),
    "cosine": lambda k: 0.01 + (LR - 0.01) * (1 + math.cos(math.pi * k / 8)) / 2,
    "polynomial": lambda k: LR * (1 - min(k, 7) / 7) ** 2,
    "one_cycle": by_hand_one_cycle,
    "constant": lambda k: LR,
}


def make_optimizer(**options: Any) -> Optimizer:
    return SGD([nn.Parameter(torch.zeros(1))], lr=LR, momentum=0.9, **options)


def make(name: str, warmup: int, optimizer: Optimizer, **options: Any) -> LRScheduler:
    monitor = "val_loss" if name == "plateau" else None
    options = options or OPTIONS[name]
    return create_lr_scheduler(optimizer, name, warmup=warmup, monitor=monitor, **options)["scheduler"]


def make_by_hand(name: str, warmup: int, optimizer: Optimizer) -> LRScheduler:
    defaults = {"factor": 1.0} if name == "constant" else {}
    scheduler = SCHEDULERS[name](optimizer, **defaults | OPTIONS[name])
    if not warmup:
        return scheduler
    climb = LinearLR(optimizer, start_factor=1 / (warmup + 1), total_iters=warmup)
    return SequentialLR(optimizer, [climb, scheduler], milestones=[warmup])


def advance(optimizer: Optimizer, scheduler: LRScheduler, metric: float) -> None:
    optimizer.step()
    scheduler.step(metric) if isinstance(scheduler, ReduceLROnPlateau) else scheduler.step()


def run(optimizer: Optimizer, scheduler: LRScheduler, metrics: list[float]) -> list[tuple[Any, ...]]:
    """Learning rate and momentum of every group, in each interval."""
    curve = []
    for metric in metrics:
        curve.append(tuple((group["lr"], group.get("momentum")) for group in optimizer.param_groups))
        advance(optimizer, scheduler, metric)
    return curve


def test_every_name_is_tested() -> None:
    assert set(OPTIONS) == set(SCHEDULERS)


@pytest.mark.parametrize(("name", "warmup"), [case for case in EVERY if case[0] != "plateau"])
def test_values_equal_torch_exactly(name: str, warmup: int) -> None:
    optimizer, reference = make_optimizer(), make_optimizer()
    ours = run(optimizer, make(name, warmup, optimizer), METRICS)
    with warnings.catch_warnings():
        # Older torch warns of its own call; that ours doesn't is part of this test.
        warnings.filterwarnings("ignore", message="The epoch parameter")
        theirs = run(reference, make_by_hand(name, warmup, reference), METRICS)
    assert ours == theirs


@pytest.mark.parametrize("warmup", [0, 3])
def test_plateau_equals_torch_exactly_after_the_warm_up(warmup: int) -> None:
    optimizer, reference = make_optimizer(), make_optimizer()
    ours = run(optimizer, make("plateau", warmup, optimizer), METRICS)
    theirs = run(reference, make_by_hand("plateau", 0, reference), METRICS[warmup:])
    assert ours[warmup:] == theirs


@pytest.mark.parametrize(("name", "warmup"), [case for case in EVERY if case[0] != "plateau"])
def test_values_equal_the_formula(name: str, warmup: int) -> None:
    first = BY_HAND[name](0)
    climb = [first * (k + 1) / (warmup + 1) for k in range(warmup)]
    wanted = climb + [BY_HAND[name](k) for k in range(INTERVALS - warmup)]
    got = preview_lr(name, lr=LR, steps=INTERVALS, warmup=warmup, **OPTIONS[name])
    assert got == pytest.approx(wanted, rel=1e-9, abs=1e-12)


def test_plateau_equals_the_numbers_worked_out_by_hand() -> None:
    # Patience 1: the second interval in a row without a better metric halves the rate of the next one.
    got = preview_lr("plateau", lr=0.8, steps=INTERVALS, metrics=METRICS, **OPTIONS["plateau"])
    assert got == [0.8] * 5 + [0.4] * 3 + [0.2] * 2 + [0.1] * 2
    # The same with 3 intervals of climbing first, whose metrics (5, 4, 3) are not looked at: 3 is new then.
    got = preview_lr("plateau", lr=0.8, steps=INTERVALS, warmup=3, metrics=METRICS, **OPTIONS["plateau"])
    assert got == pytest.approx([0.2, 0.4, 0.6] + [0.8] * 5 + [0.4] * 2 + [0.2] * 2, rel=1e-15)


def test_plateau_without_metrics_is_the_fastest_decay() -> None:
    got = preview_lr("plateau", lr=0.8, steps=6, **OPTIONS["plateau"])
    assert got == [0.8, 0.8, 0.8, 0.4, 0.4, 0.2]
    assert got == preview_lr("plateau", lr=0.8, steps=6, mode="max", **OPTIONS["plateau"])


@pytest.mark.parametrize("stop", [1, 3, 4, 7])
@pytest.mark.parametrize(("name", "warmup"), EVERY)
def test_resume_equals_never_stopping(name: str, warmup: int, stop: int) -> None:
    optimizer = make_optimizer()
    never_stopped = run(optimizer, make(name, warmup, optimizer), METRICS)

    optimizer = make_optimizer()
    scheduler = make(name, warmup, optimizer)
    before = run(optimizer, scheduler, METRICS[:stop])
    file = io.BytesIO()
    torch.save([optimizer.state_dict(), scheduler.state_dict()], file)
    file.seek(0)
    saved_optimizer, saved_scheduler = torch.load(file, weights_only=True)

    optimizer = make_optimizer()
    scheduler = make(name, warmup, optimizer)
    optimizer.load_state_dict(saved_optimizer)
    scheduler.load_state_dict(saved_scheduler)
    assert before + run(optimizer, scheduler, METRICS[stop:]) == never_stopped


@pytest.mark.filterwarnings("ignore:.*weights_only=False.*:FutureWarning")  # pickled tensors in torch 2.4
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_plateau_with_warm_up_can_be_copied(clone: Callable[[Any], Any]) -> None:
    optimizer = make_optimizer()
    scheduler = make("plateau", 3, optimizer)
    run(optimizer, scheduler, METRICS[:2])
    twin_optimizer, twin = clone((optimizer, scheduler))
    assert twin.optimizer is twin_optimizer
    assert run(twin_optimizer, twin, METRICS[2:]) == run(optimizer, scheduler, METRICS[2:])


@pytest.mark.parametrize(("name", "warmup"), EVERY)
def test_every_group_follows(name: str, warmup: int) -> None:
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (LR, LR / 2)]
    optimizer = SGD(groups, lr=LR, momentum=0.9)
    options = {"total_steps": 12} if name == "one_cycle" else {"eta_min": 0.0} if name == "cosine" else {}
    curve = run(optimizer, make(name, warmup, optimizer, **OPTIONS[name] | options), METRICS)
    if name == "one_cycle":  # max_lr is one number for all groups there
        assert all(first == second for first, second in curve)
    else:
        assert [first[0] / 2 for first, _ in curve] == pytest.approx([second[0] for _, second in curve])


# The warm-up of the others is torch's own code, which gets tensors wrong in torch 2.4.
@pytest.mark.parametrize(("name", "warmup"), [(name, 0) for name in OPTIONS] + [("plateau", 3)])
def test_tensor_learning_rates_follow(name: str, warmup: int) -> None:
    lr = torch.tensor(LR, dtype=torch.float64)
    optimizer = Adam([nn.Parameter(torch.zeros(1))], lr=lr, foreach=False)
    scheduler = make(name, warmup, optimizer)
    got = []
    for metric in METRICS:
        got.append(float(optimizer.param_groups[0]["lr"]))
        advance(optimizer, scheduler, metric)
    metrics = METRICS if name == "plateau" else None
    wanted = preview_lr(name, lr=LR, steps=INTERVALS, warmup=warmup, metrics=metrics, **OPTIONS[name])
    assert got == pytest.approx(wanted)


@pytest.mark.parametrize("warmup", [0, 3])
def test_one_cycle_peaks_at_the_optimizers_own_rates(warmup: int) -> None:
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (0.2, 0.5)]
    optimizer = SGD(groups, lr=1.0, momentum=0.9)
    scheduler = make("one_cycle", warmup, optimizer, total_steps=10, pct_start=0.5)
    curve = run(optimizer, scheduler, [0.0] * (10 + warmup))
    assert [max(lr for lr, _ in group) for group in zip(*curve, strict=True)] == [0.2, 0.5]
    assert [momentum for (_, momentum), _ in curve[: warmup + 1]] == [0.95] * (warmup + 1)


def test_defaults() -> None:
    assert preview_lr("exponential", lr=1.0, steps=3) == pytest.approx([1.0, 0.95, 0.9025])
    assert preview_lr("step", lr=1.0, steps=21)[::10] == pytest.approx([1.0, 0.1, 0.01])
    assert preview_lr("polynomial", lr=1.0, steps=7) == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2, 0.0, 0.0])
    assert preview_lr("constant", lr=0.3, steps=50) == [0.3] * 50


@pytest.mark.parametrize("interval", ["epoch", "step"])
@pytest.mark.parametrize(("name", "warmup"), EVERY)
def test_dict_is_what_lightning_takes(name: str, warmup: int, interval: str) -> None:
    optimizer = make_optimizer()
    config = create_lr_scheduler(optimizer, name, warmup=warmup, interval=interval, monitor="val_acc", **OPTIONS[name])
    scheduler = config.pop("scheduler")
    assert config == {"interval": interval, "frequency": 1, "monitor": "val_acc"}
    assert isinstance(scheduler, ReduceLROnPlateau) == (name == "plateau")
    if not warmup:
        assert type(scheduler) is SCHEDULERS[name]


class Recorder(Callback):
    """Keeps the learning rate of every epoch and of every optimizer step."""

    def __init__(self) -> None:
        self.epoch: list[float] = []
        self.step: list[float] = []

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.epoch.append(trainer.optimizers[0].param_groups[0]["lr"])

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self.step.append(optimizer.param_groups[0]["lr"])


class Scheduled(LightningModule):
    """One weight, and a metric that follows METRICS."""

    def __init__(self, name: str, warmup: int, interval: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.schedule = {"name": name, "warmup": warmup, "interval": interval, "monitor": "metric"}

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        if self.schedule["interval"] == "step":
            self.log("metric", METRICS[self.global_step])
        return (self.weight * batch[0]).sum()

    def on_train_epoch_end(self) -> None:
        if self.schedule["interval"] == "epoch":
            self.log("metric", METRICS[self.current_epoch])

    def configure_optimizers(self) -> Any:
        optimizer = SGD(self.parameters(), lr=LR, momentum=0.9)
        schedule = dict(self.schedule)
        return {
            "optimizer": optimizer,
            "lr_scheduler": create_lr_scheduler(optimizer, **schedule, **OPTIONS[schedule["name"]]),
        }


@pytest.mark.parametrize("interval", ["epoch", "step"])
@pytest.mark.parametrize(("name", "warmup"), EVERY)
def test_preview_equals_a_real_run(name: str, warmup: int, interval: str) -> None:
    recorder = Recorder()
    trainer = Trainer(
        max_epochs=INTERVALS if interval == "epoch" else INTERVALS // 4,
        accumulate_grad_batches=2,
        callbacks=[recorder],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Scheduled(name, warmup, interval), DataLoader(TensorDataset(torch.ones(8, 1))))
    metrics = METRICS if name == "plateau" else None
    wanted = preview_lr(name, lr=LR, steps=INTERVALS, warmup=warmup, metrics=metrics, **OPTIONS[name])
    assert getattr(recorder, interval) == wanted


@pytest.mark.parametrize("name", ["cosin", "Cosine", "", None, ["step"]])
def test_unknown_name_lists_the_names(name: Any) -> None:
    with pytest.raises(PruningError, match=f"Allowed: {', '.join(OPTIONS)}") as error:
        create_lr_scheduler(make_optimizer(), name)
    assert repr(name) in str(error.value)


@pytest.mark.parametrize("name", sorted(OPTIONS))
@pytest.mark.parametrize("option", ["gama", "optimizer_", "last_epoch", "verbose"])
def test_unknown_option_lists_the_options(name: str, option: str) -> None:
    with pytest.raises(PruningError, match=f"Unknown option '{option}' of lr scheduler '{name}'") as error:
        make(name, 0, make_optimizer(), **OPTIONS[name], **{option: 1})
    for known in OPTIONS[name]:
        assert known in str(error.value)


@pytest.mark.parametrize(
    ("name", "needed"),
    [("cosine", "T_max"), ("multistep", "milestones"), ("one_cycle", "total_steps"), ("plateau", "monitor")],
)
def test_what_has_no_honest_default_is_asked_for(name: str, needed: str) -> None:
    with pytest.raises(PruningError, match=f"'{name}'.*{needed}"):
        create_lr_scheduler(make_optimizer(), name)


@pytest.mark.parametrize("warmup", [-1, 1.0, float("nan"), True, "3", None])
@pytest.mark.parametrize("name", ["step", "plateau"])
def test_bad_warmup(name: str, warmup: Any) -> None:
    with pytest.raises(PruningError, match=f"warmup must be a whole number.*got {warmup!r}"):
        make(name, warmup, make_optimizer())


@pytest.mark.parametrize("interval", ["batch", "epochs", None, 1])
def test_bad_interval(interval: Any) -> None:
    with pytest.raises(PruningError, match="Allowed: epoch, step"):
        create_lr_scheduler(make_optimizer(), "constant", interval=interval)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("exponential", {"gamma": float("nan")}),
        ("exponential", {"gamma": "0.9"}),
        ("exponential", {"gamma": True}),
        ("step", {"step_size": 0}),
        ("step", {"step_size": 1.5}),
        ("multistep", {"milestones": 3}),
        ("multistep", {"milestones": [1.5]}),
        ("cosine", {"T_max": 0}),
        ("cosine", {"T_max": None}),
        ("cosine", {"T_max": 5, "eta_min": float("inf")}),
        ("polynomial", {"total_iters": -1}),
        ("plateau", {"factor": 1.0}),
        ("plateau", {"mode": "lowest"}),
        ("plateau", {"mode": 1}),
        ("one_cycle", {"total_steps": 2.5}),
        ("one_cycle", {"total_steps": 5, "max_lr": [0.1, 0.2]}),
        ("one_cycle", {"total_steps": 5, "anneal_strategy": "cubic"}),
        ("one_cycle", {"total_steps": 5, "three_phase": 1}),
        ("constant", {"factor": 2.0}),
    ],
)
def test_bad_option_value_is_refused_at_once(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(PruningError, match=name):
        make(name, 0, make_optimizer(), **options)


def test_one_cycle_needs_an_optimizer_with_momentum() -> None:
    optimizer = torch.optim.Adagrad([nn.Parameter(torch.zeros(1))], lr=LR)
    with pytest.raises(PruningError, match="'one_cycle': optimizer must support momentum"):
        make("one_cycle", 0, optimizer)
    assert isinstance(make("one_cycle", 0, optimizer, total_steps=5, cycle_momentum=False), OneCycleLR)


def test_not_an_optimizer() -> None:
    with pytest.raises(PruningError, match="needs a torch optimizer, got Linear"):
        create_lr_scheduler(nn.Linear(1, 1), "constant")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "step", "steps": 0}, "steps must be a whole number, 1 or more, got 0"),
        ({"name": "step", "steps": 2.0}, "steps must be a whole number"),
        ({"name": "step", "steps": 3, "metrics": [1.0, 1.0]}, "Only 'plateau' watches metrics"),
        ({"name": "plateau", "steps": 4, "metrics": [1.0]}, "each of 3 intervals, got 1"),
        ({"name": "one_cycle", "steps": 9, "total_steps": 5}, "'one_cycle': Tried to step"),
    ],
)
def test_bad_preview(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PruningError, match=message):
        preview_lr(lr=LR, **options)
