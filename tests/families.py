"""Five families of networks as small Lightning modules: residual, attention, recurrent, adversarial and U-shaped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning_modules import CLASSES, IMAGE, SGD, Task, WithForward, mlp
from networks import forward
from torch import Tensor, nn, optim
from torch.nn import functional as F
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

TOKENS = (6, 5)
NOISE = 6


class Block(nn.Module):
    """Two convolutions with batch norm beside a shortcut, which has a convolution of its own where shapes change."""

    def __init__(self, fan_in: int, fan_out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(fan_in, fan_out, 3, stride, 1, bias=False), nn.BatchNorm2d(fan_out)
        self.conv2, self.norm2 = nn.Conv2d(fan_out, fan_out, 3, 1, 1, bias=False), nn.BatchNorm2d(fan_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or fan_in != fan_out:
            self.shortcut = nn.Sequential(nn.Conv2d(fan_in, fan_out, 1, stride, bias=False), nn.BatchNorm2d(fan_out))

    def forward(self, x: Tensor) -> Tensor:
        inside = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(inside + self.shortcut(x))


class ResNet(nn.Module):
    """A stem, a block of the same width, a block of another."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.blocks = nn.Sequential(Block(8, 8), Block(8, 12, 2))
        self.head = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.norm(self.stem(x))))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))  # type: ignore[no-any-return]


class Attention(nn.Module):
    """Self-attention written out, with the number of heads as an attribute."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.queries, self.keys, self.values = (nn.Linear(dim, dim) for _ in range(3))
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (
            layer(x).view(batch, length, self.num_heads, self.head_dim).transpose(1, 2)
            for layer in (self.queries, self.keys, self.values)
        )
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, self.num_heads * self.head_dim))  # type: ignore[no-any-return]


class Transformer(nn.Module):
    """torch's encoder layer after the norm, then a layer of its own before it; learned positions."""

    def __init__(self, dim: int = 12, drop: float = 0.0) -> None:
        super().__init__()
        self.embed, self.positions = nn.Linear(TOKENS[1], dim), nn.Parameter(torch.randn(1, TOKENS[0], dim) / 4)
        layer = nn.TransformerEncoderLayer(dim, 4, 20, drop, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1)
        self.norm1, self.attention, self.norm2 = nn.LayerNorm(dim), Attention(dim, 3), nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 16), nn.GELU(), nn.Linear(16, dim))
        self.head = nn.Linear(dim, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.encoder(self.embed(x) + self.positions)
        x = x + self.attention(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return self.head(x.mean(1))  # type: ignore[no-any-return]


class Recurrent(nn.Module):
    """Two LSTMs, the first of them in both directions, and a classifier of the last step."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.LSTM(TOKENS[1], 6, batch_first=True, bidirectional=True)
        self.second = nn.LSTM(12, 8, batch_first=True)
        self.hidden, self.head = nn.Linear(8, 10), nn.Linear(10, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(x)[0])[0][:, -1]
        return self.head(torch.tanh(self.hidden(x)))  # type: ignore[no-any-return]


class Double(nn.Sequential):
    """Convolution, batch norm, ReLU."""

    def __init__(self, fan_in: int, fan_out: int) -> None:
        super().__init__(nn.Conv2d(fan_in, fan_out, 3, padding=1), nn.BatchNorm2d(fan_out), nn.ReLU())


class UNet(nn.Module):
    """Two levels down and up again, with skips that are concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2, self.bottom = Double(3, 6), Double(6, 8), Double(8, 12)
        self.up2, self.merge2 = nn.ConvTranspose2d(12, 8, 2, 2), Double(16, 8)
        self.up1, self.merge1 = nn.ConvTranspose2d(8, 6, 2, 2), Double(12, 6)
        self.head = nn.Conv2d(6, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.down1(x)
        second = self.down2(F.max_pool2d(first, 2))
        x = self.bottom(F.max_pool2d(second, 2))
        x = self.merge2(torch.cat([second, self.up2(x)], 1))
        return self.head(self.merge1(torch.cat([first, self.up1(x)], 1)))  # type: ignore[no-any-return]


class Segmentation(WithForward):
    """A class for every pixel: which of the first values of the input is the largest."""

    def __init__(self, net: nn.Module | None = None, **kwargs: Any) -> None:
        super().__init__(UNet() if net is None else net, **{"shape": IMAGE} | kwargs)
        self.data, self.val_data = (
            TensorDataset(x, x.argmax(1)) for x in (self.data.tensors[0], self.val_data.tensors[0])
        )


class Gan(WithForward):
    """A generator and a discriminator in manual optimization, with an optimizer each; the noise is in the batch."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(nn.Identity(), **{"optimizer": SGD} | kwargs)
        self.automatic_optimization = False
        self.generator = nn.Sequential(
            nn.Linear(NOISE, 12), nn.ReLU(), nn.Unflatten(1, (3, 2, 2)),
            nn.ConvTranspose2d(3, 8, 2, 2), nn.BatchNorm2d(8), nn.ReLU(),
            nn.ConvTranspose2d(8, 3, 2, 2), nn.Tanh(),
        )  # fmt: skip
        self.discriminator = nn.Sequential(
            nn.Conv2d(3, 6, 3, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(6, 10, 3, 2, 1), nn.LeakyReLU(0.2),
            nn.Flatten(), nn.Linear(40, 1),
        )  # fmt: skip
        self.data, self.val_data = (
            TensorDataset(*(data.tensors[0].new_empty(len(data), *shape).normal_(generator=numbers) for shape in each))
            for data in (self.data, self.val_data)
            for numbers, each in [(torch.Generator().manual_seed(len(data)), ((NOISE,), IMAGE))]
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.generator(x)  # type: ignore[no-any-return]

    def configure_optimizers(self) -> Any:
        optimizers = [self.optimizer(part.parameters()) for part in (self.generator, self.discriminator)]
        return optimizers if self.scheduler is None else (optimizers, [self.scheduler(each) for each in optimizers])

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        noise, real = batch
        first, second = self.optimizers()  # type: ignore[misc, union-attr]
        fake = self(noise)
        self.toggle_optimizer(first)
        first.zero_grad()
        self.manual_backward(F.softplus(-self.discriminator(fake)).mean())
        first.step()
        self.untoggle_optimizer(first)
        self.toggle_optimizer(second)
        second.zero_grad()
        loss = F.softplus(-self.discriminator(real)) + F.softplus(self.discriminator(fake.detach()))
        self.manual_backward(loss.mean())
        second.step()
        self.untoggle_optimizer(second)
        self.log("train_loss", loss.detach().mean(), on_step=False, on_epoch=True)

    def on_train_epoch_end(self) -> None:
        for scheduler in [] if self.scheduler is None else self.lr_schedulers():  # type: ignore[union-attr]
            scheduler.step()  # type: ignore[union-attr, call-arg]

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        fake, real = self.discriminator(self(batch[0])), self.discriminator(batch[1])
        self.log_dict({"val_loss": F.softplus(-fake).mean(), "val_acc": (real > fake).to(real.dtype).mean()})

    test_step = validation_step


class Alike:
    """Mixed into a task: all its batches are the same, so that training may go on in the middle of an epoch."""

    def train_dataloader(self: Any) -> Any:
        count, size = len(self.data) // self.batch_size, self.batch_size
        rows = [tensor[:size].repeat(count, *[1] * (tensor.dim() - 1)) for tensor in self.data.tensors]
        data = TensorDataset(*rows)
        sampler = DistributedSampler(data, shuffle=False) if self.trainer.world_size > 1 else None
        return DataLoader(data, batch_size=size, sampler=sampler)


class Groups(WithForward):
    """Weight decay for weights only, and the head at a rate of its own."""

    def configure_optimizers(self) -> Any:
        head = list(self.net.head.parameters())
        body = [p for p in self.parameters() if all(p is not other for other in head)]
        groups: list[Any] = [
            {"params": [p for p in body if p.dim() > 1]},
            {"params": [p for p in body if p.dim() <= 1], "weight_decay": 0.0},
            {"params": head, "lr": 0.001},
        ]
        return optim.AdamW(groups, lr=0.01, weight_decay=0.1)


class Insists(nn.Module):
    """Insists on the width that it was made with, in a way that no trace can see."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = str(width)

    def forward(self, x: Tensor) -> Tensor:
        if x.size(1) != int(self.width):
            raise ValueError("another width")
        return x


def insisting(*places: int) -> Task:
    """An MLP with 12, 20 and 10 neurons; those of the layers in these places can't shrink."""
    layers = list(mlp(6, 12, 20, 10, CLASSES))
    for place in sorted(places, reverse=True):
        layers.insert(2 * place + 1, Insists(layers[2 * place].out_features))
    return Task(nn.Sequential(*layers))


def resnet(**options: Any) -> WithForward:
    return WithForward(ResNet(), **{"shape": IMAGE} | options)


def transformer(**options: Any) -> WithForward:
    return WithForward(Transformer(), **{"shape": TOKENS} | options)


def lstm(**options: Any) -> WithForward:
    return WithForward(Recurrent(), **{"shape": TOKENS} | options)


FAMILIES: dict[str, Callable[..., WithForward]] = {
    "resnet": resnet,
    "transformer": transformer,
    "lstm": lstm,
    "gan": Gan,
    "unet": Segmentation,
}

OUTPUTS = ("net.head", "generator.6", "discriminator.5")
"""The layers whose neurons are outputs."""


def example(module: Any) -> Tensor:
    """Two inputs of its forward."""
    return module.val_data.tensors[0][:2].to(next(module.parameters()).dtype)  # type: ignore[no-any-return]


def outputs(module: Any) -> list[Tensor]:
    """What a module gives in evaluation mode, all its networks."""
    was = module.training
    module.eval()
    result = forward(module, example(module))
    if isinstance(module, Gan):
        result += forward(module.discriminator, module.val_data.tensors[1][:2].to(result[0].dtype))
    module.train(was)
    return result
