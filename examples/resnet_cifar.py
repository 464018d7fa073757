"""ResNet-20: train, prune while training, keep the best small network; a run that was killed goes on with --resume.

    python examples/resnet_cifar.py --data-dir data        # CIFAR-10: half of the MACs go
    python examples/resnet_cifar.py --resume               # the same run, from its last epoch on
    python examples/resnet_cifar.py --amount 0             # the dense network, trained as long

CIFAR-10 is used when it lies in ``--data-dir`` or can be downloaded there, else scikit-learn's digits.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cifar_lenet import Data
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_prune import NeuronPruning, count_cost, load_from_checkpoint, save_pruned
from lightning_prune.models import ImageClassifier


class Block(nn.Module):
    """Two convolutions beside a shortcut; a strided 1x1 convolution where the shape changes."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False), nn.BatchNorm2d(outside)
        self.conv2, self.norm2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False), nn.BatchNorm2d(outside)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or inside != outside:
            self.shortcut = nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


def resnet20(width: int = 16) -> nn.Sequential:
    """He et al., 2016, arXiv:1512.03385, section 4.2."""
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    inside = width
    for stage in (1, 2, 4):
        for number in range(3):
            layers.append(Block(inside, width * stage, 2 if stage > 1 and number == 0 else 1))
            inside = width * stage
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inside, 10))


class Moved(Data):
    """Training images of CIFAR-10 are moved by up to four pixels, and mirrored every second time."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        if self.name != "CIFAR-10" or self.trainer is None or not self.trainer.training:
            return batch
        images, labels = batch
        down, right = torch.randint(9, (2,)).tolist()
        images = F.pad(images, (4, 4, 4, 4))[..., down : down + 32, right : right + 32]
        mirrored = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
        return torch.where(mirrored, images.flip(-1), images), labels


class BestWhile(ModelCheckpoint):
    """Keeps the best epoch of those that ``allowed`` lets pass: of all epochs a dense one would be best."""

    def __init__(self, folder: Path, name: str, allowed: Callable[[], bool]) -> None:
        super().__init__(
            folder, name, monitor="val_acc", mode="max", save_on_train_epoch_end=False, enable_version_counter=False
        )
        self.name, self.allowed = name, allowed

    @property
    def state_key(self) -> str:
        return f"BestWhile {self.name}"

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if self.allowed():
            super().on_validation_end(trainer, pl_module)


def averaging(decay: float) -> list[Callback]:
    """Lightning's moving average of the weights; it becomes small together with the network."""
    try:
        from lightning.pytorch.callbacks import EMAWeightAveraging
    except ImportError:
        print("No moving average: EMAWeightAveraging needs lightning 2.6")
        return []
    return [EMAWeightAveraging(decay=decay)]


def main() -> None:
    """Parse the command line, train, compare, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--amount", type=float, default=0.5, help="fraction of the MACs that goes (default: 0.5)")
    parser.add_argument("--epochs", type=int, help="default: 60 for CIFAR-10, 15 for digits")
    parser.add_argument("--width", type=int, default=16, help="channels of the first stage")
    parser.add_argument("--round-to", type=int, default=4, help="channels are multiples of this (default: 4)")
    parser.add_argument("--batch-size", type=int, help="default: 128 for CIFAR-10, 32 for digits")
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--ema", type=float, default=0.99, help="decay of the moving average; 0: none")
    parser.add_argument("--resume", action="store_true", help="go on with the last epoch that --run holds")
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--run", type=Path, default=Path("runs/resnet"), help="folder of checkpoints and result")
    arguments = parser.parse_args()
    last = arguments.run / "last.ckpt"
    if arguments.resume and not last.is_file():
        parser.error(f"--resume: there is no {last}")

    seed_everything(arguments.seed, verbose=False)
    data = Moved(arguments.data_dir, batch_size=128)
    real = data.name == "CIFAR-10"
    data.batch_size = arguments.batch_size or (128 if real else 32)
    model = ImageClassifier(
        resnet20(arguments.width), lr=arguments.lr, lr_scheduler="cosine", optimizer_options={"weight_decay": 5e-4}
    )
    callbacks: list[Callback] = averaging(arguments.ema) if arguments.ema else []
    savers: list[ModelCheckpoint] = []
    if arguments.amount:
        # The batch norms' statistics belong to the whole network: they are taken anew after each pruning.
        pruning = NeuronPruning(
            arguments.amount, of="macs", start=0.3, end=0.6, round_to=arguments.round_to, recalibrate=8
        )
        callbacks.append(pruning)
        savers.append(BestWhile(arguments.run, "dense", lambda: pruning.amount_ == 0))
        savers.append(BestWhile(arguments.run, "pruned", lambda: pruning.amount_ == arguments.amount))
    else:
        savers.append(BestWhile(arguments.run, "dense", lambda: True))
    trainer = Trainer(
        max_epochs=arguments.epochs or (60 if real else 15),
        accelerator=arguments.accelerator,
        devices=1,
        callbacks=[*callbacks, *savers, ModelCheckpoint(arguments.run, "last", enable_version_counter=False)],
        logger=False,
        enable_model_summary=False,
        enable_progress_bar=sys.stdout.isatty(),
    )
    if arguments.resume:
        epochs = torch.load(last, weights_only=True, map_location="cpu")["epoch"] + 1
        print(f"Going on after {epochs} of {trainer.max_epochs} epochs")
    trainer.fit(model, data, ckpt_path=last if arguments.resume else None)

    # A checkpoint tells what the network had become: load_from_checkpoint needs no callback and no Trainer.
    for saver in savers:
        best = load_from_checkpoint(ImageClassifier, saver.best_model_path, network=resnet20(arguments.width))
        tester = Trainer(
            accelerator=arguments.accelerator, devices=1, logger=False, enable_progress_bar=False,
            enable_checkpointing=False, enable_model_summary=False,
        )  # fmt: skip
        (result,) = tester.test(best, data, verbose=False)
        cost = count_cost(best.network.cpu(), torch.zeros(1, 3, 32, 32))
        epoch = torch.load(saver.best_model_path, weights_only=True, map_location="cpu")["epoch"] + 1
        name = Path(saver.best_model_path).stem
        print(
            f"{name:<6} after {epoch:>3} epochs: {data.name} test accuracy {result['test_acc']:.4f}, "
            f"{cost.params:,} parameters, {cost.macs:,} MACs"
        )
        save_pruned(best.network, arguments.run / f"{name}.safetensors")
        print(f"       saved to {arguments.run / f'{name}.safetensors'}")


if __name__ == "__main__":
    main()
