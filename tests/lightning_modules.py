"""Tiny Lightning modules, data and trainers that the callback tests share."""

from __future__ import annotations

import atexit
import copy
import functools
import itertools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import SWALR
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, TensorDataset

from lightning_prune import NeuronPruning, PruningError, WeightPruning


@atexit.register
def _leave_the_process_group() -> None:
    # A process that ends while a group of gloo is open is aborted now and then by threads that ask for the GIL
    # (1 spawned fit in 6 without any callback, on 2 cores). Lightning leaves only those of NCCL.
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


LIGHTNING_WARNINGS = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in (
        ".*LeafSpec.*:FutureWarning",  # lightning 2.6 on torch 2.14
        ".*does not have many workers.*",
        ".*smaller than the logging interval.*",
        "Checkpoint directory .* exists and is not empty.*",
        "`training_step` returned `None`.*",
        "Be aware that when using `ckpt_path`, callbacks used to create.*",
    )
]
"""What Lightning says of tiny runs; the tests' own warnings stay errors."""

LAW_WARNINGS = [
    *LIGHTNING_WARNINGS,
    *(
        pytest.mark.filterwarnings(f"ignore:{message}")
        for message in (
            "Swapping scheduler.*",
            ".*lr_scheduler.step.*before.*optimizer.step.*",
            ".*resuming from a checkpoint that ended before the epoch.*",
            ".*mid-epoch.*",
            "The `lr_find` call.*",
            "Using ModelCheckpoint with manual optimization and every_n_train_steps.*",
            ".*no `optimizer` and.*",
            "Sparse invariant checks are implicitly disabled.*",
            ".*torch._dynamo.*",
            "The .grad attribute of a Tensor that is not a leaf.*",  # dynamo's, where a module has hooks
        )
    ),
]
"""And what it and torch say of resuming, averaging, compiling and other things that the laws are tested with."""

CLASSES = 4
SGD = functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9)
ADAMW = functools.partial(torch.optim.AdamW, lr=0.01, weight_decay=0.05)


class LiteralView(nn.Module):
    """The article's network: functional activations, pooling, and the size of the features written in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 5)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = x.view(-1, 16 * 5 * 5)
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x))
        return self.fc3(x)


class SmallLiteralView(nn.Module):
    """The same idea for 3x8x8 images."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3)
        self.conv2 = nn.Conv2d(6, 8, 3)
        self.fc1 = nn.Linear(8 * 4 * 4, 12)
        self.fc2 = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv2(F.relu(self.conv1(x)))).view(-1, 8 * 4 * 4)
        return self.fc2(F.relu(self.fc1(x)))


class Residual(nn.Module):
    """Convolution, batch norm, a residual block, global pooling."""

    def __init__(self, drop: float = 0.0) -> None:
        super().__init__()
        self.stem, self.norm0 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv1, self.norm1 = nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.conv2, self.norm2 = nn.Conv2d(12, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.drop, self.head = nn.Dropout(drop), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm0(self.stem(x)))
        x = F.relu(x + self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))))
        return self.head(self.drop(F.adaptive_avg_pool2d(x, 1).flatten(1)))


def conv_net() -> nn.Sequential:
    """Convolutions and a flatten; no batch norm."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 12), nn.ReLU(),
        nn.Linear(12, CLASSES),
    )  # fmt: skip


def mlp(*sizes: int) -> nn.Sequential:
    """Linear layers with tanh between them: no neuron ever dies of its own."""
    sizes = sizes or (6, 12, 10, CLASSES)
    layers: list[nn.Module] = []
    for fan_in, fan_out in itertools.pairwise(sizes):
        layers += [nn.Linear(fan_in, fan_out), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


IMAGE = (3, 8, 8)


def examples(count: int, shape: tuple[int, ...], *, seed: int = 0, classes: int = CLASSES) -> TensorDataset:
    """Random inputs with labels that can be learned: which of the first values is the largest."""
    x = torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(x, x.flatten(1)[:, :classes].argmax(1))


class Endless(IterableDataset[Any]):
    """A dataset that doesn't know its length."""

    def __init__(self, data: TensorDataset) -> None:
        self.data = data

    def __iter__(self) -> Iterator[Any]:
        return (self.data[i] for i in range(len(self.data)))


class Task(LightningModule):
    """Classification by a network of any kind, with its own loaders; no ``forward``."""

    def __init__(
        self,
        net: nn.Module | None = None,
        *,
        shape: tuple[int, ...] = (6,),
        optimizer: Callable[..., torch.optim.Optimizer] = SGD,
        scheduler: Callable[..., Any] | None = None,
        batches: int = 4,
        batch_size: int = 8,
        classes: int = CLASSES,
        endless: bool = False,
    ) -> None:
        super().__init__()
        self.net = mlp() if net is None else net
        self.optimizer, self.scheduler = optimizer, scheduler
        self.batch_size = batch_size
        data = examples(batches * batch_size, shape, classes=classes)
        self.data: Any = Endless(data) if endless else data
        self.val_data = examples(16, shape, seed=1, classes=classes)

    def logits(self, x: Tensor) -> Tensor:
        return self.net(x)  # type: ignore[no-any-return]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self.logits(batch[0]), batch[1])
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        logits = self.logits(batch[0])
        accuracy = (logits.argmax(1) == batch[1]).to(logits.dtype).mean()
        self.log_dict({"val_loss": F.cross_entropy(logits, batch[1]), "val_acc": accuracy}, sync_dist=True)

    test_step = validation_step

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.logits(batch[0])

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer(self.parameters())
        return optimizer if self.scheduler is None else ([optimizer], [self.scheduler(optimizer)])

    def train_dataloader(self) -> Any:
        # In order, so that the processes' batches make up one process's batch; Lightning's own sampler shuffles.
        sampler = DistributedSampler(self.data, shuffle=False) if self.trainer.world_size > 1 else None
        return DataLoader(self.data, batch_size=self.batch_size, sampler=sampler)

    def val_dataloader(self) -> Any:
        return DataLoader(self.val_data, batch_size=8)

    test_dataloader = val_dataloader
    predict_dataloader = val_dataloader


class WithForward(Task):
    """Has a ``forward`` that the steps go through."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)  # type: ignore[no-any-return]

    def logits(self, x: Tensor) -> Tensor:
        return self(x)  # type: ignore[no-any-return]


class WithExampleArray(WithForward):
    """Offers ``example_input_array``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.example_input_array = self.val_data.tensors[0][:1]


class EncoderDecoder(Task):
    """The steps call two submodules in turn."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(nn.Identity(), **kwargs)
        self.encoder, self.decoder = mlp(6, 12, 10), mlp(10, 8, CLASSES)

    def logits(self, x: Tensor) -> Tensor:
        return self.decoder(torch.tanh(self.encoder(x)))  # type: ignore[no-any-return]


class LateLayers(Task):
    """Builds its layers in ``configure_model``."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(nn.Identity(), **kwargs)
        self.late: nn.Module | None = None

    def configure_model(self) -> None:
        if self.late is None:
            self.late = mlp()

    def logits(self, x: Tensor) -> Tensor:
        assert self.late is not None
        return self.late(x)  # type: ignore[no-any-return]


class Manual(Task):
    """Manual optimization."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(self.logits(batch[0]), batch[1]))
        optimizer.step()


class TwoOptimizers(EncoderDecoder):
    """An encoder that is trained by itself first, then a decoder that reads it: two optimizers, two backwards."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        return self.optimizer(self.encoder.parameters()), self.optimizer(self.decoder.parameters())

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        for_encoder, for_decoder = self.optimizers()  # type: ignore[misc, union-attr]
        loss = (self.encoder(batch[0]).pow(2).mean(1) - batch[0].pow(2).mean(1)).pow(2).mean()
        for_encoder.zero_grad()
        self.manual_backward(loss)
        for_encoder.step()
        for_decoder.zero_grad()
        self.manual_backward(F.cross_entropy(self.logits(batch[0]), batch[1]))
        for_decoder.step()


class Spy(Callback):
    """Calls a function at one or several hooks: ``Spy(on_train_batch_end=lambda trainer, module: ...)``."""

    def __init__(self, **hooks: Callable[[Any, Any], Any]) -> None:
        for name, function in hooks.items():
            setattr(self, name, functools.partial(self._call, function))

    @staticmethod
    def _call(function: Callable[[Any, Any], Any], trainer: Any, module: Any, *args: Any) -> None:
        function(trainer, module)


def compiled(net: nn.Module, how: str, backend: str = "eager") -> Any:
    """A network that is compiled as a "wrapper" or "in place"; anything else leaves it alone."""
    if how == "wrapper":
        return torch.compile(net, backend=backend)
    if how == "in place":
        net.compile(backend=backend)
    return net


def trainer_of(*callbacks: Callback, **options: Any) -> Trainer:
    """A quiet Trainer on the CPU."""
    quiet = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    return Trainer(callbacks=list(callbacks), **quiet | {"max_epochs": 2} | options)


def fit(module: Any, *callbacks: Callback, ckpt_path: Path | str | None = None, **options: Any) -> Trainer:
    """Train a module; returns the Trainer."""
    trainer = trainer_of(*callbacks, **options)
    trainer.fit(module, ckpt_path=ckpt_path)
    return trainer


def seeded(make: Callable[[], Any], seed: int = 0) -> Any:
    """What ``make`` gives, from the same random weights each time."""
    torch.manual_seed(seed)
    return make()


def quiet(cls: type[Any], *args: Any, **kwargs: Any) -> Any:
    """A pruning callback without the report, which takes seconds to measure latencies."""
    return cls(*args, report=False, **kwargs)


weights = functools.partial(quiet, WeightPruning)
neurons = functools.partial(quiet, NeuronPruning)


def prunable(module: nn.Module) -> dict[str, Tensor]:
    """The parameters that WeightPruning considers by default."""
    return {name: p.detach() for name, p in module.named_parameters() if p.dim() >= 2}


def zeros(tensors: dict[str, Tensor]) -> tuple[int, int]:
    """How many elements are zero, of how many."""
    return sum(int((t == 0).sum()) for t in tensors.values()), sum(t.numel() for t in tensors.values())


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    """A copy of a module's state."""
    return copy.deepcopy(dict(module.state_dict()))


def measured_again(resumed: dict[str, Any], whole: dict[str, Any]) -> dict[str, Any]:
    """A callback's state with the metrics that Lightning does not measure again.

    Resumed from a checkpoint between an epoch's last batch and its validation, it leaves that validation out.
    """
    pairs = zip(resumed["timeline"], whole["timeline"], strict=True)
    filled = [{**one, "metric": other["metric"] if one["metric"] is None else one["metric"]} for one, other in pairs]
    assert sum(one != other for one, other in zip(filled, resumed["timeline"], strict=True)) <= 1
    return {**resumed, "timeline": filled}


def assert_same(first: Any, second: Any) -> None:
    """Two trees of tensors and plain values are bit for bit the same."""
    (leaves, tree), (others, other_tree) = pytree.tree_flatten(first), pytree.tree_flatten(second)
    assert tree == other_tree
    for a, b in zip(leaves, others, strict=True):
        if isinstance(a, Tensor):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
        else:
            assert a == b


def optimizer_states(trainer: Any) -> list[Any]:
    """State of each optimizer, in the order of the parameters."""
    return [optimizer.state_dict()["state"] for optimizer in trainer.optimizers]


def assert_refused(make: Callable[[], Any], callbacks: list[Callback], options: dict[str, Any], message: str) -> None:
    """``fit`` ends in a PruningError with this message, and the model is what it was."""
    module = seeded(make)
    before = snapshot(module)
    trainer = trainer_of(*callbacks, **options)
    with pytest.raises(PruningError, match=re.compile(message, re.DOTALL)):
        trainer.fit(module)
    assert_same(snapshot(module), before)
    assert trainer.global_step == 0
    assert left_hooks(trainer, module) == []


def left_hooks(trainer: Any, module: nn.Module) -> list[Any]:
    """The hooks that modules, parameters and optimizers still have."""
    things = [*module.modules(), *module.parameters(), *trainer.optimizers]
    registries = [value for thing in things for key, value in vars(thing).items() if "hook" in key]
    registries += [p._backward_hooks for p in module.parameters()]
    registries += [p._post_accumulate_grad_hooks for p in module.parameters()]
    return [value for value in registries if value and not callable(value)]


def load_plain(path: Any) -> Any:
    """A checkpoint's content, with nothing but plain data and tensors in it.

    The SWALR of torch 2.6 puts a method of its own into its state; that is none of ours.
    """
    old = [int(part) for part in torch.__version__.split(".")[:2]] < [2, 7]
    with torch.serialization.safe_globals([getattr, SWALR] if old else []):
        return torch.load(path, weights_only=True)
