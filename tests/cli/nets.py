"""What a user's own file may hold; the tests name it by its path."""

import warnings
from collections.abc import Iterator

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class Net(nn.Module):
    """Two layers of the width that is asked for."""

    def __init__(self, width: int = 8, depth: int = 1) -> None:
        super().__init__()
        self.first = nn.Linear(6, width)
        self.hidden = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.last = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        for layer in self.hidden:
            x = layer(x).relu()
        return self.last(x)


class Lit(LightningModule):
    """Net in training, with what it takes."""

    def __init__(self, network: nn.Module, lr: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters(ignore="network")
        self.network = network
        self.example_input_array = torch.zeros(2, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_acc", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.hparams["lr"])


class Tokens(nn.Module):
    """Takes two tensors by name."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, width)
        self.inner = nn.Linear(width, 16)
        self.outer = nn.Linear(16, width)
        self.head = nn.Linear(width, 20)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.embedding(ids) * mask.unsqueeze(-1)
        return self.head(x + self.outer(self.inner(x).relu()))


def build(width: int = 4, **more: int) -> nn.Module:
    """A function that gives a module."""
    return Net(width, **more)


class ByValue(Net):
    """What it does depends on values: it can't be exported."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        return self.last(x * 2 if float(x.sum()) > 0 else x)


class Infinite(Net):
    """Its output is no number, always."""

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).relu()) / 0


class Boxes(Net):
    """Gives a dict for each example, as detectors do."""

    def forward(self, x: Tensor) -> list[dict[str, Tensor]]:
        return [{"boxes": each.unsqueeze(0)} for each in super().forward(x)]


def leaves() -> nn.Module:
    raise SystemExit(7)


def stopped() -> nn.Module:
    raise KeyboardInterrupt


def offline() -> nn.Module:
    raise OSError("no connection\nand more")


def talks() -> nn.Module:
    warnings.warn("a word of caution\nand more", stacklevel=2)
    return Net()


ready = Net(5)
number = 3


def broken() -> nn.Module:
    raise RuntimeError("no such luck")


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(48, 6, generator=generator)
    return TensorDataset(images, images[:, :3].argmax(1))


def batches() -> Iterator[tuple[Tensor, Tensor]]:
    for batch in DataLoader(data(), batch_size=16):
        yield batch[0], batch[1]


class Data(LightningDataModule):
    def setup(self, stage: str) -> None:
        self.data = data()

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.data, batch_size=16)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.data, batch_size=16)


def off(outputs: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs, targets)


def widest(weights: Tensor) -> Tensor:
    """A criterion: the first neurons matter most."""
    return -torch.arange(len(weights), dtype=torch.float)
