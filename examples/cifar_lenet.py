"""Train the reference network on real images while pruning it, and save what is left.

    python examples/cifar_lenet.py                                    # half of the MACs and of the weights go
    python examples/cifar_lenet.py --prune weight --amount 0.9
    python examples/cifar_lenet.py --prune neuron --devices 2 --strategy ddp

CIFAR-10 is used when it lies in ``--data-dir`` or can be downloaded there, else scikit-learn's digits.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from urllib.error import URLError

import torch
from lightning.pytorch import LightningDataModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import NeuronPruning, WeightPruning, save_pruned
from lightning_prune.models import ImageClassifier, LeNet


class Images(TensorDataset):
    """Images and labels in memory; hands out whole batches, which is much faster than one by one."""

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, ...]:
        chosen = torch.as_tensor(indices)
        return tuple(tensor[chosen] for tensor in self.tensors)


def load_cifar10(folder: Path) -> tuple[Images, Images]:
    """The 50 000 training and 10 000 test images, scaled to [-1, 1]."""
    from torchvision.datasets import CIFAR10

    def images(train: bool) -> Images:
        data = CIFAR10(str(folder), train=train, download=not (folder / "cifar-10-batches-py").is_dir())
        pixels = torch.from_numpy(data.data).permute(0, 3, 1, 2).float() / 127.5 - 1
        return Images(pixels.contiguous(), torch.tensor(data.targets))

    return images(True), images(False)


def load_digits() -> tuple[Images, Images]:
    """1 797 scans of handwritten digits, 8x8 scaled up to 3x32x32; every fifth is a test image."""
    from sklearn.datasets import load_digits as load

    pixels, labels = load(return_X_y=True)
    small = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
    large = torch.nn.functional.interpolate(small, size=(32, 32), mode="bilinear").expand(-1, 3, -1, -1)
    test = torch.arange(len(large)) % 5 == 0
    classes = torch.tensor(labels)
    return Images(large[~test], classes[~test]), Images(large[test], classes[test])


class Data(LightningDataModule):
    """Real images; every tenth training image is held out for validation."""

    def __init__(self, folder: Path, batch_size: int) -> None:
        super().__init__()
        try:
            self.name, (train, self.test) = "CIFAR-10", load_cifar10(folder)
        except (URLError, OSError, RuntimeError, ImportError) as error:
            reason = str(error).splitlines()[0]
            rank_zero_info(f"CIFAR-10 is not in {folder} and can't be downloaded ({reason}): using digits instead")
            self.name, (train, self.test) = "digits", load_digits()
        held_out = torch.arange(len(train)) % 10 == 0
        self.train = Images(*(tensor[~held_out] for tensor in train.tensors))
        self.val = Images(*(tensor[held_out] for tensor in train.tensors))
        self.batch_size = batch_size

    def _loader(self, images: Images, shuffle: bool = False) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(images, batch_size=self.batch_size, shuffle=shuffle, collate_fn=lambda batch: batch)

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return self._loader(self.train, shuffle=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return self._loader(self.val)

    def test_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return self._loader(self.test)


def main() -> None:
    """Parse the command line, train, report, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prune", choices=["weight", "neuron", "both", "none"], default="both")
    parser.add_argument("--amount", type=float, default=0.5, help="fraction that goes (default: 0.5)")
    parser.add_argument("--epochs", type=int, help="default: 10 for CIFAR-10, 40 for digits")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--strategy", default="auto")
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--out", type=Path, default=Path("lenet_pruned.safetensors"))
    arguments = parser.parse_args()

    callbacks: list[Callback] = []
    if arguments.prune in ("neuron", "both"):
        callbacks.append(NeuronPruning(arguments.amount, of="macs"))
    if arguments.prune in ("weight", "both"):
        callbacks.append(WeightPruning(arguments.amount))

    seed_everything(arguments.seed, verbose=False)
    data = Data(arguments.data_dir, arguments.batch_size)
    model = ImageClassifier(LeNet(), lr=arguments.lr, lr_scheduler="cosine")
    trainer = Trainer(
        max_epochs=arguments.epochs or (10 if data.name == "CIFAR-10" else 40),
        accelerator=arguments.accelerator,
        devices=arguments.devices,
        strategy=arguments.strategy,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=sys.stdout.isatty(),
    )
    trainer.fit(model, data)
    results = trainer.test(model, data, verbose=False)
    if rank_zero_only.rank == 0:
        save_pruned(model.network, arguments.out)
        print(f"{data.name} test accuracy {results[0]['test_acc']:.4f}, saved to {arguments.out}")
        print(f'Load it again: load_pruned("{arguments.out}", LeNet())')


if __name__ == "__main__":
    main()
