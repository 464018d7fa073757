"""`ActivationSearch` on CIFAR-10 with the reference LeNet, and what a committed choice costs.

    python benchmarks/activation_search.py accuracy            # ReLU, the search, every single activation; seeds
    python benchmarks/activation_search.py accuracy --quick    # one short run of each, to see that it works
    python benchmarks/activation_search.py overhead            # a step after the commit, beside a model written so
    python benchmarks/activation_search.py searching           # a step during the search, beside one without

CIFAR-10 is read from ``data/cifar-10-batches-py``. The search's own batches are held out of the training images, so
the test images see each model once, at the end.
"""

from __future__ import annotations

import argparse
import pickle
import statistics
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from lightning_prune import ActivationSearch, Plan, find_activations
from lightning_prune.activations.apply import changes_for
from lightning_prune.activations.candidates import DEFAULT_CHOICES, Choice
from lightning_prune.models import LeNet

DATA = Path("data") / "cifar-10-batches-py"


def images(files: list[str]) -> TensorDataset:
    """Images in [-1, 1] of shape (n, 3, 32, 32), and labels."""
    parts = []
    for name in files:
        with (DATA / name).open("rb") as file:
            parts.append(pickle.load(file, encoding="bytes"))
    x = torch.cat([torch.as_tensor(part[b"data"]) for part in parts]).view(-1, 3, 32, 32)
    y = torch.cat([torch.as_tensor(part[b"labels"]) for part in parts])
    return TensorDataset(x.float().div_(127.5).sub_(1), y)


class Classifier(LightningModule):
    """LeNet, SGD with momentum as in PyTorch's tutorial."""

    def __init__(self, net: nn.Module, data: dict[str, TensorDataset], lr: float = 0.01, batch: int = 64) -> None:
        super().__init__()
        self.net, self.sets, self.lr, self.batch = net, data, lr, batch

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Cross entropy."""
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Accuracy."""
        self.log("acc", (self.net(batch[0]).argmax(1) == batch[1]).float().mean())

    test_step = validation_step

    def configure_optimizers(self) -> Any:
        """SGD with momentum."""
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)

    def train_dataloader(self) -> Any:
        """Shuffled."""
        batches = BatchSampler(RandomSampler(self.sets["train"]), self.batch, drop_last=True)
        return DataLoader(self.sets["train"], sampler=batches, batch_size=None)  # a whole batch at once

    def val_dataloader(self) -> Any:
        """Held out of the training images."""
        return DataLoader(self.sets["val"], min(250, 4 * self.batch))

    def test_dataloader(self) -> Any:
        """The test images."""
        return DataLoader(self.sets["test"], 500)


def run(
    activation: str | None, seed: int, data: dict[str, TensorDataset], epochs: int, mode: str
) -> tuple[float, str, float]:
    """Test accuracy, what was chosen (None: search), and steps of short runs over those of the training."""
    seed_everything(seed, verbose=False)
    net = LeNet()
    callbacks: list[Any] = []
    if activation is None:
        callbacks = [ActivationSearch(mode=mode, report=False)]
    elif activation != "relu":  # the same weights as every other run of the seed
        sites = find_activations(net, torch.zeros(1, 3, 32, 32))
        choices = {site.name: Choice(activation) for site in sites.sites}
        Plan({}, {}, activations=changes_for(net, sites, choices)).apply(net)
    trainer = Trainer(
        max_epochs=epochs, callbacks=callbacks, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, accelerator="cpu", devices=1, num_sanity_val_steps=0,
    )  # fmt: skip
    module = Classifier(net, data)
    trainer.fit(module)
    accuracy = trainer.test(module, verbose=False)[0]["acc"]
    chosen = [str(each.after) for each in callbacks[0].plan_.activations.values()] if callbacks else [str(activation)]
    cost = callbacks[0].report_.steps / trainer.global_step if callbacks else 0.0
    return accuracy, ", ".join(chosen) or "relu", cost


def accuracy(quick: bool, seeds: int, epochs: int, only: list[str] | None) -> None:
    """Accuracy of ReLU, of both kinds of search, and of every single activation."""
    train = images([f"data_batch_{n}" for n in range(1, 2 if quick else 6)])
    held = 1000 if quick else 5000
    used = 2000 if quick else len(train) - held
    data = {
        "train": TensorDataset(*(t[:used] for t in train.tensors)),
        "val": TensorDataset(*(t[-held:] for t in train.tensors)),
        "test": TensorDataset(*(t[: 1000 if quick else None] for t in images(["test_batch"]).tensors)),
    }
    rows: dict[str, list[tuple[float, float]]] = {}
    kinds: list[tuple[str, str | None, str]] = [(name, name, "") for name in DEFAULT_CHOICES]
    searches: list[tuple[str, str | None, str]] = [("trial", None, "trial"), ("mixture", None, "mixture")]
    kinds = [kind for kind in (*searches, *kinds[: 2 if quick else None]) if only is None or kind[0] in only]
    for name, activation, mode in kinds:
        for seed in range(1 if quick else seeds):
            start = time.perf_counter()
            found, chosen, cost = run(activation, seed, data, 2 if quick else epochs, mode)
            rows.setdefault(name, []).append((found, cost))
            took = f"{time.perf_counter() - start:.0f} s"
            print(f"{name}, seed {seed}: {found:.4f} ({chosen}; short runs {cost:.2f}; {took})", flush=True)
    print("\n| activation | test accuracy | spread | steps of short runs / of the training |\n|---|---|---|---|")
    for name, values in sorted(rows.items(), key=lambda row: -statistics.mean(a for a, _ in row[1])):
        found = [accuracy for accuracy, _ in values]
        deviation = statistics.stdev(found) if len(found) > 1 else 0.0
        cost = statistics.mean(cost for _, cost in values)
        print(f"| {name} | {statistics.mean(found):.4f} | {deviation:.4f} | {cost:.2f} |")


class Functional(nn.Module):
    """LeNet with functions in its forward; ``written`` with what the other is changed to."""

    def __init__(self, written: bool) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 5), nn.Conv2d(6, 16, 5)
        self.fc1, self.fc2, self.fc3 = nn.Linear(400, 120), nn.Linear(120, 84), nn.Linear(84, 10)
        self.function = torch.tanh if written else F.relu

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        function = self.function
        x = F.max_pool2d(function(self.conv1(x)), 2)
        x = F.max_pool2d(function(self.conv2(x)), 2).flatten(1)
        return self.fc3(function(self.fc2(function(self.fc1(x)))))


def overhead(rounds: int = 15, steps: int = 20) -> None:
    """Time of a training step with committed choices over that of a model written with them, measured in turns."""
    from torchvision.models import densenet121

    def changed(net: nn.Module, x: Tensor) -> nn.Module:
        sites = find_activations(net, x)
        plan = Plan({}, {}, activations=changes_for(net, sites, {site.name: Choice("tanh") for site in sites.sites}))
        plan.apply(net)
        return net

    small, large = torch.randn(64, 3, 32, 32), torch.randn(4, 3, 64, 64)
    modules = [changed(LeNet(), small), LeNet(activation="tanh")]
    dense = [changed(densenet121(weights=None), large), changed(densenet121(weights=None), large)]
    dense[1].__dict__.pop("forward", None)  # the same but for the one call that is patched
    dense[1].features.__dict__.pop("forward", None)
    for name, pair, x, count in (
        ("LeNet, modules, batch 64", modules, small, steps),
        ("LeNet, functions, batch 64", [changed(Functional(False), small), Functional(True)], small, steps),
        ("densenet121, 120 modules and 1 function, batch 4", dense, large, 2),
    ):
        times: list[list[float]] = [[], []]
        optimizers = [torch.optim.AdamW(net.parameters()) for net in pair]
        labels = torch.randint(10, (len(x),))
        for turn in range(rounds * count):  # step by step, each first in turn, so that a busy machine hits both
            for side in (turn % 2, 1 - turn % 2):
                start = time.process_time()
                optimizers[side].zero_grad()
                F.cross_entropy(pair[side](x), labels).backward()
                optimizers[side].step()
                times[side].append(time.process_time() - start)
        ours, theirs = map(statistics.median, times)
        print(f"{name}: {ours * 1e3:.3f} ms, written so {theirs * 1e3:.3f} ms, ratio {ours / theirs:.3f}")


class Steps(Callback):
    """Time of each training step, and bytes that autograd keeps for its backward."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.kept: list[int] = []

    def on_train_batch_start(self, *_: Any) -> None:
        """A step begins; every tenth one tells its memory instead of its time."""
        self.sizes: dict[int, int] = {}
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.keep, lambda tensor: tensor)
        self.began = 0.0
        if len(self.times) % 10 == 9:
            self.hooks.__enter__()
        else:
            self.began = time.process_time()

    def keep(self, tensor: Tensor) -> Tensor:
        """Note a tensor once."""
        self.sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    def on_train_batch_end(self, *_: Any) -> None:
        """A step ends."""
        if self.began:
            self.times.append(time.process_time() - self.began)
        else:
            self.hooks.__exit__(None, None, None)
            self.kept.append(sum(self.sizes.values()))
            self.times.append(statistics.median(self.times))


def searching() -> None:
    """Time and memory of a training step while the mixture is in the model, beside one without."""
    from torchvision.models import resnet18

    def steps(make: Any, size: int, batch: int, count: int, search: bool) -> Steps:
        seed_everything(0, verbose=False)
        sets = {
            "train": TensorDataset(torch.randn(64 * count, 3, size, size), torch.randint(10, (64 * count,))),
            "val": TensorDataset(torch.randn(250, 3, size, size), torch.randint(10, (250,))),
        }
        watch, module = Steps(), Classifier(make(), sets, batch=batch)
        callbacks = [ActivationSearch(search_until=1, report=False), watch] if search else [watch]
        Trainer(
            max_epochs=2, limit_train_batches=count, limit_val_batches=1, callbacks=callbacks, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
            devices=1, num_sanity_val_steps=0,
        ).fit(module)  # fmt: skip
        watch.times = watch.times[:count]  # the second epoch's end commits
        return watch

    for name, make, size, batch, count in (
        ("LeNet, batch 64", LeNet, 32, 64, 200),
        ("resnet18, batch 32", partial(resnet18, weights=None), 32, 32, 31),
    ):
        before, ours, after = (steps(make, size, batch, count, search) for search in (False, True, False))
        alone = statistics.median(before.times + after.times)
        memory = statistics.median(ours.kept) / statistics.median(before.kept)
        print(f"{name}: step {statistics.median(ours.times) / alone:.2f} times as long, {memory:.2f} times the memory")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["accuracy", "overhead", "searching"])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument(
        "--only", nargs="+", choices=["mixture", "trial", *DEFAULT_CHOICES], help="of accuracy: these rows only"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if arguments.what == "overhead":
        overhead()
    elif arguments.what == "searching":
        searching()
    else:
        accuracy(arguments.quick, arguments.seeds, arguments.epochs, arguments.only)


if __name__ == "__main__":
    main()
