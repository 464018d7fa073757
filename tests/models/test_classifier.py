import copy
import functools
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import lightning.pytorch
import pytest
import pytorch_lightning
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune.errors import PruningError
from lightning_prune.models import ImageClassifier, LeNet
from lightning_prune.models.classifier import OPTIMIZERS
from lightning_prune.schedulers import LENGTH_OPTIONS, SCHEDULERS, preview_lr

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),  # lightning 2.6 on torch 2.14
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`.*"),
]

PACKAGES: dict[str, Any] = {"lightning.pytorch": lightning.pytorch, "pytorch_lightning": pytorch_lightning}
OPTIONS: dict[str, dict[str, Any]] = {
    "multistep": {"milestones": [1]},
    "one_cycle": {"interval": "step"},
}


def make_network() -> nn.Module:
    torch.manual_seed(0)
    return LeNet(channels=[4], kernel_size=3, hidden=[8], in_shape=(1, 8, 8), num_classes=3)


def make_data(dtype: torch.dtype = torch.float32, batch_size: int = 4) -> DataLoader[Any]:
    """18 images of 3 classes; with batches of 4 the last batch is smaller."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(18, 1, 8, 8, generator=generator, dtype=dtype)
    labels = torch.randint(0, 3, (18,), generator=generator)
    return DataLoader(TensorDataset(images, labels), batch_size=batch_size)


def make_trainer(package: str = "lightning.pytorch", **options: Any) -> Any:
    quiet = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return PACKAGES[package].Trainer(**quiet | options)


def evaluate_by_hand(network: nn.Module, data: DataLoader[Any]) -> tuple[float, float]:
    images, labels = data.dataset.tensors  # type: ignore[attr-defined]
    with torch.no_grad():
        logits = network(images)
    right = [int(row.argmax()) == int(label) for row, label in zip(logits, labels, strict=True)]
    return F.cross_entropy(logits, labels).item(), sum(right) / len(right)


def train_by_hand(network: nn.Module, data: DataLoader[Any], lrs: list[float]) -> None:
    """SGD with momentum 0.9, written out: one learning rate per epoch."""
    velocity = [torch.zeros_like(parameter) for parameter in network.parameters()]
    for lr in lrs:
        for images, labels in data:
            loss = F.cross_entropy(network(images), labels)
            gradients = torch.autograd.grad(loss, list(network.parameters()))
            with torch.no_grad():
                for parameter, gradient, v in zip(network.parameters(), gradients, velocity, strict=True):
                    v.mul_(0.9).add_(gradient)
                    parameter -= lr * v


def assert_same_weights(model: nn.Module, other: nn.Module, **tolerance: float) -> None:
    torch.testing.assert_close(model.state_dict(), other.state_dict(), **tolerance or {"rtol": 0.0, "atol": 0.0})


@pytest.mark.parametrize("package", PACKAGES)
def test_fit_equals_a_loop_written_by_hand(package: str) -> None:
    network, data = make_network().double(), make_data(torch.float64)
    twin = copy.deepcopy(network)
    model = ImageClassifier(network, lr=0.05, lr_scheduler="step", lr_scheduler_options={"warmup": 1, "step_size": 1})
    make_trainer(package, max_epochs=3).fit(model, data)
    train_by_hand(twin, data, [0.025, 0.05, 0.005])
    assert_same_weights(network, twin, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("package", PACKAGES)
def test_logged_numbers_equal_the_ones_by_hand(package: str) -> None:
    network, data = make_network(), make_data()
    # lr 0, so that the means over the training epoch are those of the network as it is.
    model, trainer = ImageClassifier(network, lr=0.0), make_trainer(package, max_epochs=1)
    trainer.fit(model, data, data)
    assert {"loss", "train_loss", "train_acc", "val_loss", "val_acc"} == set(trainer.callback_metrics)
    logged = {name: value.item() for name, value in trainer.callback_metrics.items()}
    (validated,) = trainer.validate(model, data, verbose=False)
    (tested,) = trainer.test(model, data, verbose=False)
    loss, accuracy = evaluate_by_hand(network, data)
    for stage, numbers in (("train", logged), ("val", logged), ("val", validated), ("test", tested)):
        assert numbers[f"{stage}_loss"] == pytest.approx(loss, rel=1e-6)
        assert numbers[f"{stage}_acc"] == pytest.approx(accuracy, rel=1e-6)


@pytest.mark.parametrize("package", PACKAGES)
def test_predict_gives_the_logits(package: str) -> None:
    model, data = ImageClassifier(make_network()), make_data()
    images = data.dataset.tensors[0]  # type: ignore[attr-defined]
    with torch.no_grad():
        wanted = model.network(images)
    trainer = make_trainer(package)
    torch.testing.assert_close(torch.cat(trainer.predict(model, data)), wanted)
    torch.testing.assert_close(torch.cat(trainer.predict(model, DataLoader(images, batch_size=9))), wanted)


@pytest.mark.filterwarnings("ignore:.*weights_only=False.*:FutureWarning")  # pickled tensors in torch 2.4
@pytest.mark.parametrize("first", PACKAGES)
def test_both_trainers_take_the_same_object_in_turn(first: str, tmp_path: Path) -> None:
    (second,) = PACKAGES.keys() - {first}
    model, data = ImageClassifier(make_network(), lr=0.1), make_data()
    twin = copy.deepcopy(model.network)
    for package in (first, second, first):
        # Nothing looks overridden that isn't: no val_dataloader, configure_model, prepare_data, ...
        trainer = make_trainer(package, max_epochs=1)
        trainer.fit(model, data)
        trainer.validate(model, data, verbose=False)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        train_by_hand(twin, data, [0.1])
    assert_same_weights(model.network, twin, rtol=1e-4, atol=1e-6)
    loaded = ImageClassifier.load_from_checkpoint(tmp_path / "last.ckpt", network=make_network())
    assert_same_weights(loaded, model)
    assert_same_weights(pickle.loads(pickle.dumps(model)), model)
    assert_same_weights(copy.deepcopy(model), model)


def test_pytorch_lightning_may_be_imported_late(tmp_path: Path) -> None:
    # A fresh interpreter: ours first, and an object that was unpickled, as in a process made by ddp_spawn.
    with open(tmp_path / "model.pkl", "wb") as file:
        pickle.dump((ImageClassifier(make_network()), make_data()), file)
    script = """
        import pickle, sys
        from lightning_prune.models import ImageClassifier
        assert "pytorch_lightning" not in sys.modules
        import pytorch_lightning
        assert not issubclass(ImageClassifier, pytorch_lightning.LightningModule)
        with open(sys.argv[1], "rb") as file:
            model, data = pickle.load(file)
        options = dict(accelerator="cpu", logger=False, enable_checkpointing=False, max_epochs=1)
        pytorch_lightning.Trainer(**options).fit(model, data)
        print(model.trainer.global_step)
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "model.pkl")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.split()[-1:] == ["5"], done.stderr


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("name", ["cosine", "one_cycle", "step"])
def test_resume_equals_never_stopping(name: str, package: str, tmp_path: Path) -> None:
    def make() -> ImageClassifier:
        options = {"warmup": 1} | OPTIONS.get(name, {})
        return ImageClassifier(make_network(), lr=0.1, lr_scheduler=name, lr_scheduler_options=options)

    def fit(model: ImageClassifier, **options: Any) -> None:
        checkpoint = PACKAGES[package].callbacks.ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
        trainer = make_trainer(package, max_epochs=4, enable_checkpointing=True, callbacks=[checkpoint])
        trainer.fit(model, make_data(), **options)

    never_stopped, resumed = make(), make()
    fit(never_stopped)
    fit(resumed, ckpt_path=tmp_path / "epoch=1.ckpt")
    assert_same_weights(resumed, never_stopped)


def test_checkpoint_holds_plain_values_only(tmp_path: Path) -> None:
    model = ImageClassifier(
        make_network(), optimizer="adamw", lr=0.02, lr_scheduler="plateau", lr_scheduler_options={"warmup": 1}
    )
    trainer = make_trainer(max_epochs=1)
    trainer.fit(model, make_data(), make_data())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["hyper_parameters"] == {
        "num_classes": None,
        "optimizer": "adamw",
        "lr": 0.02,
        "optimizer_options": None,
        "lr_scheduler": "plateau",
        "lr_scheduler_options": {"warmup": 1},
    }
    assert all(name.startswith("network.") for name in saved["state_dict"])
    loaded = ImageClassifier.load_from_checkpoint(tmp_path / "last.ckpt", network=make_network())
    assert_same_weights(loaded, model)
    assert (loaded.optimizer, loaded.lr) == (torch.optim.AdamW, 0.02)


def test_factories_stay_out_of_the_checkpoint(tmp_path: Path) -> None:
    model = ImageClassifier(make_network(), optimizer=functools.partial(torch.optim.Adam, lr=0.5))
    trainer = make_trainer(max_epochs=1)
    trainer.fit(model, make_data())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert "optimizer" not in torch.load(tmp_path / "last.ckpt", weights_only=True)["hyper_parameters"]


def test_subclass_with_its_own_arguments_loads(tmp_path: Path) -> None:
    model = Wide(width=5)
    trainer = make_trainer(max_epochs=1)
    trainer.fit(model, make_data())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    loaded = Wide.load_from_checkpoint(tmp_path / "last.ckpt")
    assert_same_weights(loaded, model)


class Wide(ImageClassifier):
    def __init__(self, width: int = 3) -> None:
        super().__init__(LeNet([width], 3, [8], in_shape=(1, 8, 8), num_classes=3))


# ---- optimizers


@pytest.mark.parametrize("spell", [str, str.lower, str.upper])
@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_every_optimizer_by_name(name: str, spell: Any) -> None:
    # One matrix, because Muon takes no other parameters.
    model = ImageClassifier(nn.Linear(4, 3, bias=False), optimizer=spell(name), lr=0.125)
    optimizer = model.configure_optimizers()
    assert type(optimizer) is getattr(torch.optim, name)
    assert optimizer.param_groups[0]["lr"] == 0.125
    assert optimizer.param_groups[0]["params"] == list(model.network.parameters())


@pytest.mark.parametrize("name", ["Adagrad", "AdamW", "LBFGS", "RMSprop"])
def test_optimizers_train(name: str) -> None:
    model, data = ImageClassifier(make_network(), optimizer=name, lr=0.01), make_data(batch_size=18)
    before, _ = evaluate_by_hand(model.network, data)
    make_trainer(max_epochs=2).fit(model, data)
    after, _ = evaluate_by_hand(model.network, data)
    assert after < before


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, {"lr": 0.01, "momentum": 0.9, "nesterov": False}),
        ({"optimizer_options": {"nesterov": True}}, {"momentum": 0.9, "nesterov": True}),
        ({"optimizer_options": {"momentum": 0.0}, "lr": 0.5}, {"lr": 0.5, "momentum": 0.0}),
        ({"optimizer": torch.optim.SGD, "lr": 0.5}, {"lr": 0.5, "momentum": 0.9}),
        ({"optimizer": "rmsprop"}, {"lr": 0.01, "momentum": 0}),
        ({"optimizer": "Adam", "optimizer_options": {"betas": (0.5, 0.6)}}, {"betas": (0.5, 0.6)}),
        ({"optimizer": lambda parameters: torch.optim.Adam(parameters, lr=0.3)}, {"lr": 0.3}),
    ],
)
def test_optimizer_options(options: dict[str, Any], wanted: dict[str, Any]) -> None:
    (group,) = ImageClassifier(make_network(), **options).configure_optimizers().param_groups
    assert {name: group[name] for name in wanted} == wanted


def test_lr_can_be_set_by_a_tuner() -> None:
    model = ImageClassifier(make_network())
    model.lr = 0.25
    assert model.configure_optimizers().param_groups[0]["lr"] == 0.25


# ---- schedules


class Recorder(Callback):
    """Keeps the learning rate of every epoch, and the scheduler."""

    def __init__(self) -> None:
        self.curve: list[float] = []

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.curve.append(trainer.optimizers[0].param_groups[0]["lr"])

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        self.config = trainer.lr_scheduler_configs[0]


@pytest.mark.parametrize("name", sorted(SCHEDULERS.keys() - {"one_cycle", "plateau"}))
@pytest.mark.parametrize("warmup", [0, 2])
def test_schedule_equals_preview(name: str, warmup: int) -> None:
    recorder, options = Recorder(), {"warmup": warmup, **OPTIONS.get(name, {})}
    model = ImageClassifier(make_network(), lr=0.1, lr_scheduler=name, lr_scheduler_options=options)
    make_trainer(max_epochs=6, callbacks=[recorder]).fit(model, make_data(batch_size=18))
    length = {LENGTH_OPTIONS[name]: 6 - warmup} if name in LENGTH_OPTIONS else {}
    assert recorder.curve == preview_lr(name, lr=0.1, steps=6, **options | length)


@pytest.mark.parametrize(
    ("name", "options", "limits", "attribute", "wanted"),
    [
        ("cosine", {}, {"max_epochs": 3}, "T_max", 3),
        ("cosine", {"T_max": 7}, {"max_epochs": 3}, "T_max", 7),
        ("polynomial", {}, {"max_epochs": 2}, "total_iters", 2),
        # 18 images are 5 batches of 4, and 3 optimizer steps of 2 batches.
        ("cosine", {"interval": "step"}, {"max_epochs": 2}, "T_max", 10),
        (
            "one_cycle",
            {"interval": "step"},
            {"max_epochs": 2, "accumulate_grad_batches": 2},
            "total_steps",
            6,
        ),
        ("one_cycle", {"interval": "step"}, {"max_epochs": 2, "limit_train_batches": 3}, "total_steps", 6),
        ("one_cycle", {"interval": "step"}, {"max_steps": 4}, "total_steps", 4),
        (
            "one_cycle",
            {"interval": "step", "epochs": 2, "steps_per_epoch": 9},
            {"max_epochs": 1},
            "total_steps",
            18,
        ),
    ],
)
@pytest.mark.parametrize("package", PACKAGES)
def test_length_comes_from_the_trainer(
    name: str, options: dict[str, Any], limits: dict[str, Any], attribute: str, wanted: int, package: str
) -> None:
    model = ImageClassifier(make_network(), lr_scheduler=name, lr_scheduler_options=options)
    trainer = make_trainer(package, **limits)
    trainer.fit(model, make_data())
    assert getattr(trainer.lr_scheduler_configs[0].scheduler, attribute) == wanted


def test_warm_up_comes_off_the_length() -> None:
    options = {"interval": "step", "warmup": 4}
    model = ImageClassifier(make_network(), lr_scheduler="cosine", lr_scheduler_options=options)
    trainer = make_trainer(max_epochs=2)
    trainer.fit(model, make_data())
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-15)


def test_fast_dev_run_ends_within_the_warm_up() -> None:
    model = ImageClassifier(make_network(), lr_scheduler="cosine", lr_scheduler_options={"warmup": 5})
    make_trainer(fast_dev_run=True).fit(model, make_data())


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, ("val_loss", "min")),
        ({"monitor": "val_acc"}, ("val_acc", "max")),
        ({"monitor": "train_loss", "mode": "max"}, ("train_loss", "max")),
    ],
)
def test_plateau_watches_our_own_metrics(options: dict[str, Any], wanted: tuple[str, str]) -> None:
    recorder = Recorder()
    model = ImageClassifier(make_network(), lr_scheduler="plateau", lr_scheduler_options=options)
    make_trainer(max_epochs=1, callbacks=[recorder]).fit(model, make_data(), make_data())
    assert (recorder.config.monitor, recorder.config.scheduler.mode) == wanted


@pytest.mark.parametrize(
    ("options", "limits"),
    [({}, {"max_steps": 4}), ({}, {"max_epochs": -1}), ({"interval": "step"}, {"max_epochs": -1})],
)
def test_unknown_length_is_asked_for(options: dict[str, Any], limits: dict[str, int]) -> None:
    network = make_network()
    before = copy.deepcopy(network)
    model = ImageClassifier(network, lr_scheduler="cosine", lr_scheduler_options=options)
    with pytest.raises(PruningError, match=r"'cosine' needs T_max: .*max_steps=(4|-1)"):
        make_trainer(**limits).fit(model, make_data())
    assert_same_weights(network, before)


def test_bad_schedule_is_refused_before_training() -> None:
    model = ImageClassifier(make_network(), lr_scheduler="cosin")
    with pytest.raises(PruningError, match="Unknown lr scheduler 'cosin'"):
        make_trainer(max_epochs=1).fit(model, make_data())
    options = {"warmup": "3"}
    model = ImageClassifier(make_network(), lr_scheduler="cosine", lr_scheduler_options=options)
    with pytest.raises(PruningError, match="warmup must be a whole number"):
        make_trainer(max_epochs=1).fit(model, make_data())


# ---- arguments


class Convolutional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).flatten(1)


def test_number_of_classes() -> None:
    assert ImageClassifier(make_network()).num_classes == 3
    assert ImageClassifier(nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 5))).num_classes == 5
    assert ImageClassifier(Convolutional(), num_classes=3).num_classes == 3
    with pytest.raises(PruningError, match=r"Convolutional has neither num_classes nor an nn.Linear"):
        ImageClassifier(Convolutional())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"network": LeNet}, "network must be an nn.Module"),
        ({"num_classes": 1}, "num_classes must be 2 or more, got 1"),
        ({"num_classes": 2.0}, "num_classes must be 2 or more, got 2.0"),
        ({"optimizer": "sdg"}, f"Unknown optimizer 'sdg'. Allowed: {', '.join(sorted(OPTIMIZERS))}"),
        ({"optimizer": None}, "optimizer must be a name or a factory"),
        ({"optimizer_options": {"beta": 1}}, "Unknown option 'beta' of optimizer SGD. Allowed: momentum,"),
        ({"optimizer_options": {"lr": 1}}, "Unknown option 'lr' of optimizer SGD"),
        ({"optimizer": torch.optim.Adam, "optimizer_options": {"momentum": 0.9}}, "of optimizer Adam"),
        ({"optimizer": lambda p: None, "optimizer_options": {"momentum": 0.9}}, "drop optimizer_options"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    options = {"network": make_network()} | options
    with pytest.raises(PruningError, match=message):
        ImageClassifier(**options)


def test_best_checkpoint_has_the_metric_it_was_chosen_by(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path, monitor="val_loss")
    model, data = ImageClassifier(make_network(), lr=0.1), make_data()
    make_trainer(max_epochs=3, enable_checkpointing=True, callbacks=[checkpoint]).fit(model, data, data)
    best = ImageClassifier.load_from_checkpoint(checkpoint.best_model_path, network=make_network())
    (numbers,) = make_trainer().validate(best, data, verbose=False)
    assert numbers["val_loss"] == checkpoint.best_model_score.item()
