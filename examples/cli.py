"""Everything from a YAML file: LightningCLI with the reference network, real images and every callback.

    python examples/cli.py fit --config examples/lenet.yaml
    python examples/cli.py fit --config examples/lenet.yaml --trainer.max_epochs 3 --data.batch_size 64
    python examples/cli.py fit --print_config > my.yaml              # all that can be set
    eval "$(python examples/cli.py --print_shtab=bash)"              # completion, for a command named cli.py

A misspelt argument or a value of the wrong type is one line that names the right one. Needs the extras ``cli`` and
``examples``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from cifar_lenet import Images, load_cifar10, load_digits
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_prune.cli.parser import one_line_errors
from lightning_prune.cli.training import PruningCLI
from lightning_prune.models import ImageClassifier


class Data(LightningDataModule):
    """Real images of 3x32x32; every tenth training image is held out for validation.

    Args:
        dataset: scikit-learn's handwritten digits, or CIFAR-10.
        folder: Where CIFAR-10 lies, or is downloaded to.
        batch_size: Images in a batch.
    """

    def __init__(self, dataset: Literal["digits", "cifar10"] = "digits", folder: str = "data", batch_size: int = 32):
        super().__init__()
        self.dataset = dataset
        self.folder = folder
        self.batch_size = batch_size

    def setup(self, stage: str) -> None:
        """Load the images."""
        train, self.test = load_digits() if self.dataset == "digits" else load_cifar10(Path(self.folder))
        held_out = torch.arange(len(train)) % 10 == 0
        self.train = Images(*(tensor[~held_out] for tensor in train.tensors))
        self.val = Images(*(tensor[held_out] for tensor in train.tensors))

    def _loader(self, images: Images, shuffle: bool = False) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(images, batch_size=self.batch_size, shuffle=shuffle, collate_fn=lambda batch: batch)

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return self._loader(self.train, shuffle=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return self._loader(self.val)

    def test_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return self._loader(self.test)


def main() -> None:
    """Parse the command line and run what it says."""
    with one_line_errors("cli.py"):
        PruningCLI(ImageClassifier, Data, save_config_kwargs={"overwrite": True})


if __name__ == "__main__":
    main()
