"""Kernels, layers or neurons: ResNet-20 on CIFAR-10 at equal MACs, one training from scratch each.

    python ../shared/data/unpack.py data
    python benchmarks/structure.py [--epochs 30] [--amounts 0.2 0.4] [--seeds 1] [--quick]

Prints test accuracy after the last epoch, no checkpoint is chosen, and parameters and MACs as fractions of the dense
network's. An amount that a method can't reach is left out, and says why. ``--quick``: a narrow network, two epochs of
512 images; shows that everything runs, its accuracies mean nothing.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Callable
from statistics import mean
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset
from torchvision import transforms
from torchvision.datasets import CIFAR10

from lightning_prune import KernelShrinking, LayerPruning, NeuronPruning, PruningError, count_cost, create_lr_scheduler

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)

METHODS: dict[str, Callable[[float], list[Any]]] = {
    "dense": lambda amount: [],
    "neurons": lambda amount: [NeuronPruning(amount, of="macs", report=False)],
    "kernels": lambda amount: [KernelShrinking(amount, of="macs", report=False)],
    "layers": lambda amount: [LayerPruning(amount, of="macs", report=False)],
    "kernels, layers": lambda amount: [
        KernelShrinking(1 - (1 - amount) ** 0.5, of="macs", report=False),
        LayerPruning(1 - (1 - amount) ** 0.5, of="macs", report=False),
    ],
}


class Block(nn.Module):
    """A basic block; where it changes the shape, its shortcut is a strided 1x1 convolution."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False), nn.BatchNorm2d(outside)
        self.conv2, self.norm2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False), nn.BatchNorm2d(outside)
        same = inside == outside and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(inside, outside, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Shape (N, inside, H, W) to (N, outside, H / stride, W / stride)."""
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


def resnet20(width: int = 16) -> nn.Sequential:
    """He et al., 2016, arXiv:1512.03385, section 4.2."""
    blocks = [
        Block(width * (inside if number == 0 else outside), width * outside, 2 if number == 0 and outside > 1 else 1)
        for inside, outside in ((1, 1), (1, 2), (2, 4))
        for number in range(3)
    ]
    stem = nn.Sequential(nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
    return nn.Sequential(stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 10))


class Classifier(L.LightningModule):
    """SGD with a cosine schedule."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Cross entropy."""
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Log the accuracy."""
        self.log("accuracy", (self.net(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> Any:
        """SGD with momentum."""
        optimizer = torch.optim.SGD(self.parameters(), 0.1, momentum=0.9, weight_decay=5e-4)
        return [optimizer], [create_lr_scheduler(optimizer, "cosine", T_max=self.trainer.max_epochs)]


def loaders(folder: str, quick: bool) -> tuple[Any, Any]:
    """Training and test batches."""
    plain = [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    moved = [transforms.RandomCrop(32, 4), transforms.RandomHorizontalFlip(), *plain]
    train: Any = CIFAR10(folder, train=True, transform=transforms.Compose(moved))
    test: Any = CIFAR10(folder, train=False, transform=transforms.Compose(plain))
    if quick:
        train, test = Subset(train, range(512)), Subset(test, range(512))
    workers = 0 if quick else 4
    return (
        DataLoader(train, 128, shuffle=True, num_workers=workers, drop_last=True),
        DataLoader(test, 500, num_workers=workers),
    )


def run(method: str, amount: float, seed: int, args: argparse.Namespace) -> tuple[float, float, float]:
    """Accuracy, and what is left of parameters and MACs."""
    L.seed_everything(seed, verbose=False)
    module, x = Classifier(resnet20(4 if args.quick else 16)), torch.randn(1, 3, 32, 32)
    dense = count_cost(module.net, x)
    train, test = loaders(args.data, args.quick)
    trainer = L.Trainer(
        max_epochs=args.epochs, callbacks=METHODS[method](amount), logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, train)
    (metrics,) = trainer.test(module, test, verbose=False)
    pruned = count_cost(module.net.cpu(), x)
    return metrics["accuracy"], pruned.params / dense.params, pruned.macs / dense.macs


def main() -> None:
    """Train and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--amounts", type=float, nargs="+", default=[0.2, 0.4])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--data", default="data")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    if args.quick:
        args.epochs = 2
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*does not have many workers.*|.*smaller than the logging interval.*")
    print(f"{'method':<16} {'amount':>6} {'accuracy':>8} {'params':>7} {'MACs':>7}")
    for amount in args.amounts:
        for method in METHODS:
            if method == "dense" and amount != args.amounts[0]:
                continue
            try:
                runs = [run(method, amount, seed, args) for seed in range(args.seeds)]
            except PruningError as error:
                print(f"{method:<16} {amount:>6.2f} {str(error).splitlines()[0]}")
                continue
            accuracy, params, macs = (mean(values) for values in zip(*runs, strict=True))
            asked = 0.0 if method == "dense" else amount
            print(f"{method:<16} {asked:>6.2f} {accuracy:>8.4f} {params:>7.3f} {macs:>7.3f}", flush=True)


if __name__ == "__main__":
    main()
