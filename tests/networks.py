"""Small networks of every supported piece, and the oracle: a copy with the removed slices zeroed by hand."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from lightning_prune.graph.callsites import installed_patches
from lightning_prune.graph.tree import named_tensors

TOLERANCE = 1e-10
"""Relative; float64."""


class Net(nn.Module):
    """Layers by name, and a forward given as a function of the network and its inputs."""

    def __init__(
        self,
        run: Callable[..., Any],
        *,
        buffers: Mapping[str, Tensor] | None = None,
        transient: Mapping[str, Tensor] | None = None,
        **layers: Any,
    ) -> None:
        super().__init__()
        self.run = run
        for name, buffer in ((buffers or {}) | (transient or {})).items():
            self.register_buffer(name, buffer, persistent=name in (buffers or {}))
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(self, *args, **kwargs)


class Article(nn.Module):
    """The network of the source article as it is written there."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 5)
        self.pool = nn.MaxPool2d(2, 2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.conv1(x)))
        x = self.pool(F.relu(self.conv2(x)))
        x = x.view(-1, 16 * 5 * 5)
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x))
        return self.fc3(x)


class Literal(nn.Module):
    """A size written in the forward; small."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.fc = nn.Linear(8 * 3 * 3, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(torch.sigmoid(self.conv(x)), 2)
        return self.fc(x.view(-1, 8 * 3 * 3))


class Residual(nn.Module):
    """``x + body(x)``."""

    def __init__(self, *body: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*body)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Concat(nn.Module):
    """Branches side by side along the channels."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], 1)


class Block(nn.Module):
    """A ResNet's basic block, with a downsampling shortcut where the shape changes."""

    def __init__(self, first: int, second: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(first, second, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(second)
        self.conv2 = nn.Conv2d(second, second, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(second)
        same = stride == 1 and first == second
        conv = nn.Conv2d(first, second, 1, stride, bias=False)
        self.downsample = nn.Identity() if same else nn.Sequential(conv, nn.BatchNorm2d(second))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out))
        out += self.downsample(x)
        return F.relu(out)


def resnet() -> nn.Module:
    blocks = [Block(8, 8, 1), Block(8, 12, 2), Block(12, 12, 1)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 3)]
    return nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(True), *blocks, *head)


class Tied(nn.Module):
    """An autoencoder whose decoder is its encoder's weight, transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(5, 8)
        self.bias = nn.Parameter(torch.zeros(5))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.encoder(x)), self.encoder.weight.t(), self.bias)


def shared_block() -> nn.Module:
    """One parameter under two names, both of them pruned."""
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU())
    net.append(nn.Linear(6, 3))
    net[4].weight = net[2].weight
    return net


def recurrent() -> nn.Module:
    """A layer that is called three times."""

    def run(net: Any, x: Tensor) -> Tensor:
        h = net.enter(x)
        for _ in range(3):
            h = torch.tanh(net.again(h)) + h
        return net.out(h)

    return Net(run, enter=nn.Linear(4, 6), again=nn.Linear(6, 6), out=nn.Linear(6, 2))


def views() -> nn.Module:
    """Every way to write a size: ints, tuple, keyword, function; computed from the input or not."""

    def run(net: Any, x: Tensor) -> Tensor:
        x = net.conv(x)
        x = x.reshape((x.size(0), 8, 9))
        x = torch.reshape(input=x, shape=(-1, 72))
        x = net.fc1(x).relu().unsqueeze(2).expand(-1, 6, 2)
        x = x.reshape(x.size(0), -1) + x.reshape(-1, 12)
        return net.fc2(x.view(*x.shape))

    return Net(run, conv=nn.Conv2d(3, 8, 3), fc1=nn.Linear(72, 6), fc2=nn.Linear(12, 2))


class Inner(nn.Module):
    """A literal inside a module inside a module."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).reshape(-1, 6 * 4)


class Nested(nn.Module):
    """Two children with literals of their own, one of them called twice, around a literal of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Inner(), Inner()
        self.join = nn.Linear(24, 5)
        self.out = nn.Linear(10, 2)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.first(x), self.second(x) + self.second(-x)
        both = torch.stack([F.relu(self.join(a)), F.relu(self.join(b))])
        return self.out(torch.cat([both[0].view(-1, 5), both[1].view(-1, 5)], 1))


class Auxiliary(nn.Module):
    """A second head that runs in training only, with a literal of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3)
        self.fc, self.aux = nn.Linear(6, 2), nn.Linear(8 * 9, 2)

    def forward(self, x: Tensor) -> Any:
        h = F.relu(self.conv1(x))
        out = self.fc(self.conv2(h).mean((2, 3)))
        return (out, self.aux(h.view(-1, 8 * 9))) if self.training else out


def dropouts() -> nn.Module:
    layers = [nn.Conv2d(3, 8, 3), nn.Dropout2d(0.3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 6), nn.Dropout(0.5)]
    return nn.Sequential(*layers, nn.AlphaDropout(0.2), nn.Linear(6, 2))


def sequential(*layers: nn.Module) -> Callable[[], nn.Module]:
    return functools.partial(copy.deepcopy, nn.Sequential(*layers))


def conv_case(conv: nn.Module, channels: int, rank: int) -> Callable[[], nn.Module]:
    """A convolution between two others."""
    kinds = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
    return sequential(kinds[rank](3, 8, 1), nn.Tanh(), conv, nn.Tanh(), kinds[rank](channels, 2, 1))


def norm_case(norm: nn.Module) -> Callable[[], nn.Module]:
    return sequential(nn.Conv2d(3, 8, 2), norm, nn.ReLU(), nn.Conv2d(8, 6, 2), nn.ReLU(), nn.Conv2d(6, 2, 2))


def pool_case(pool: nn.Module, features: int, rank: int) -> Callable[[], nn.Module]:
    kinds = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
    return sequential(kinds[rank](3, 8, 2), nn.Sigmoid(), pool, nn.Flatten(), nn.Linear(8 * features, 2))


IMAGE = (3, 5, 5)

CONVOLUTIONS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv1d": (conv_case(nn.Conv1d(8, 6, 3), 6, 1), (3, 7)),
    "conv2d_strided_dilated": (conv_case(nn.Conv2d(8, 6, 2, stride=2, dilation=2, padding=1), 6, 2), IMAGE),
    "conv2d_same_reflect": (conv_case(nn.Conv2d(8, 6, 3, padding=1, padding_mode="reflect"), 6, 2), IMAGE),
    "conv3d": (conv_case(nn.Conv3d(8, 6, 2, bias=False), 6, 3), (3, 4, 3, 3)),
    "transposed1d": (conv_case(nn.ConvTranspose1d(8, 6, 3, stride=2), 6, 1), (3, 5)),
    "transposed2d": (conv_case(nn.ConvTranspose2d(8, 6, 3, stride=2, output_padding=1), 6, 2), IMAGE),
    "transposed3d": (conv_case(nn.ConvTranspose3d(8, 6, 2), 6, 3), (3, 2, 2, 2)),
    "depthwise1d": (conv_case(nn.Conv1d(8, 8, 3, groups=8), 8, 1), (3, 7)),
    "depthwise2d": (conv_case(nn.Conv2d(8, 8, 3, stride=2, groups=8), 8, 2), IMAGE),
    "depthwise_transposed": (conv_case(nn.ConvTranspose2d(8, 8, 3, groups=8), 8, 2), IMAGE),
    "two_images": (
        lambda: Net(lambda n, x: n.c(F.relu(n.a(x)) + n.b(x)), a=nn.Conv2d(3, 8, 3), b=nn.Conv2d(3, 8, 3),
                    c=nn.Conv2d(8, 2, 1)), IMAGE),
}  # fmt: skip

LINEARS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (sequential(nn.Linear(4, 7), nn.ReLU(), nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 2)), (4,)),
    "mlp_no_bias": (sequential(nn.Linear(4, 7, bias=False), nn.Sigmoid(), nn.Linear(7, 2, bias=False)), (4,)),
    "linear_3d_input": (sequential(nn.Linear(4, 7), nn.GELU(), nn.Linear(7, 6), nn.Linear(6, 2)), (3, 4)),
    "linear_4d_input": (sequential(nn.Linear(4, 7, bias=False), nn.ELU(), nn.Linear(7, 2)), (2, 3, 4)),
    "linear_over_space": (
        lambda: Net(lambda n, x: n.c(n.b(n.a(x).flatten(2)).sigmoid()).sum(-1), a=nn.Conv2d(3, 6, 3),
                    b=nn.Linear(9, 8), c=nn.Linear(8, 2)), IMAGE),
    "tied_transposed": (Tied, (5,)),
    "tied_square": (shared_block, (4,)),
    "recurrent": (recurrent, (4,)),
    "matmul": (
        lambda: Net(lambda n, x: (torch.tanh(x @ n.w) + n.b) @ n.v, w=nn.Parameter(torch.ones(4, 6)),
                    b=nn.Parameter(torch.zeros(6)), v=nn.Parameter(torch.ones(6, 2))), (4,)),
    "gated": (
        lambda: Net(lambda n, x: n.c(n.a(x) * torch.sigmoid(n.b(x))), a=nn.Linear(4, 6), b=nn.Linear(4, 6),
                    c=nn.Linear(6, 2)), (4,)),
}  # fmt: skip

NORMS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "batch_norm": (norm_case(nn.BatchNorm2d(8)), IMAGE),
    "batch_norm_plain": (norm_case(nn.BatchNorm2d(8, affine=False)), IMAGE),
    "batch_norm_no_statistics": (norm_case(nn.BatchNorm2d(8, track_running_stats=False)), IMAGE),
    "batch_norm_bare": (norm_case(nn.BatchNorm2d(8, affine=False, track_running_stats=False)), IMAGE),
    "batch_norm_average": (norm_case(nn.BatchNorm2d(8, momentum=None)), IMAGE),
    "instance_norm": (
        lambda: Net(lambda n, x: n.b(F.instance_norm(n.a(x)).relu()), a=nn.Conv2d(3, 8, 3), b=nn.Conv2d(8, 2, 1)),
        IMAGE),
    "batch_norm1d": (sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)), (4,)),
    "batch_norm3d": (
        sequential(nn.Conv3d(3, 8, 2), nn.BatchNorm3d(8), nn.Sigmoid(), nn.Conv3d(8, 2, 1)), (3, 3, 3, 3)),
}  # fmt: skip

POOLS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "max1d": (pool_case(nn.MaxPool1d(2), 3, 1), (3, 7)),
    "max2d": (pool_case(nn.MaxPool2d(2, padding=1), 9, 2), IMAGE),
    "max3d": (pool_case(nn.MaxPool3d(2), 1, 3), (3, 3, 3, 3)),
    "avg1d": (pool_case(nn.AvgPool1d(2), 3, 1), (3, 7)),
    "avg2d": (pool_case(nn.AvgPool2d(2, padding=1), 9, 2), IMAGE),
    "avg3d": (pool_case(nn.AvgPool3d(2), 1, 3), (3, 3, 3, 3)),
    "adaptive_avg1d": (pool_case(nn.AdaptiveAvgPool1d(2), 2, 1), (3, 7)),
    "adaptive_avg2d": (pool_case(nn.AdaptiveAvgPool2d((2, 3)), 6, 2), IMAGE),
    "adaptive_avg2d_to_one": (pool_case(nn.AdaptiveAvgPool2d(1), 1, 2), IMAGE),
    "adaptive_avg3d": (pool_case(nn.AdaptiveAvgPool3d(1), 1, 3), (3, 3, 3, 3)),
    "adaptive_max1d": (pool_case(nn.AdaptiveMaxPool1d(2), 2, 1), (3, 7)),
    "adaptive_max2d": (pool_case(nn.AdaptiveMaxPool2d(2), 4, 2), IMAGE),
    "adaptive_max3d": (pool_case(nn.AdaptiveMaxPool3d(1), 1, 3), (3, 3, 3, 3)),
    "global_mean": (
        lambda: Net(lambda n, x: n.b(n.a(x).mean((-2, -1))), a=nn.Conv2d(3, 8, 2), b=nn.Linear(8, 2)), IMAGE),
    "global_max": (
        lambda: Net(lambda n, x: n.b(n.a(x).amax((2, 3), keepdim=True).flatten(1)), a=nn.Conv2d(3, 8, 2),
                    b=nn.Linear(8, 2)), IMAGE),
}  # fmt: skip

SHAPES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "article": (Article, (3, 32, 32)),
    "literal": (Literal, (3, 8, 8)),
    "views": (views, IMAGE),
    "nested": (Nested, (3, 3, 3)),
    "flatten": (sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 2)), IMAGE),
    "flatten_space": (
        lambda: Net(lambda n, x: n.b(torch.relu(n.a(x)).flatten(2).transpose(1, 2)), a=nn.Conv2d(3, 8, 3),
                    b=nn.Linear(8, 2)), IMAGE),
    "channels_last": (
        lambda: Net(lambda n, x: n.b(n.a(x).permute(0, 2, 3, 1).contiguous().view(-1, 8)).view(len(x), -1),
                    a=nn.Conv2d(3, 8, 3), b=nn.Linear(8, 2)), IMAGE),
    "squeeze": (
        lambda: Net(lambda n, x: n.b(n.a(x).squeeze(-1).squeeze(-1)[:, :, None].movedim(1, -1)),
                    a=nn.Conv2d(3, 8, 5), b=nn.Linear(8, 2)), IMAGE),
    "pad": (
        lambda: Net(lambda n, x: n.c(F.pad(n.b(F.pad(n.a(x), (1, 1, 1, 1))).sigmoid(), (0, 1), value=3.0)),
                    a=nn.Conv2d(3, 8, 3), b=nn.Conv2d(8, 6, 3), c=nn.Conv2d(6, 2, 1)), IMAGE),
    "pad_channels": (
        lambda: Net(lambda n, x: n.b(F.pad(n.a(x), (0, 0, 0, 0, 1, 2), value=1.0)), a=nn.Conv2d(3, 8, 3),
                    b=nn.Conv2d(11, 2, 1)), IMAGE),
}  # fmt: skip

GRAPHS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "residual": (
        sequential(nn.Conv2d(3, 8, 3), Residual(nn.ReLU(), nn.Conv2d(8, 6, 3, 1, 1), nn.ReLU(),
                   nn.Conv2d(6, 8, 1)), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 1)), IMAGE),
    "concat": (
        sequential(Concat(nn.Conv2d(3, 5, 3), nn.Conv2d(3, 6, 3)), nn.BatchNorm2d(11), nn.ReLU(),
                   nn.Conv2d(11, 2, 1)), IMAGE),
    "concat_input": (
        sequential(Concat(nn.Conv2d(3, 6, 1), nn.Identity(), nn.Conv2d(3, 5, 1)), nn.Conv2d(14, 2, 1)), IMAGE),
    "dense": (
        sequential(nn.Conv2d(3, 6, 1), Concat(nn.Identity(), nn.Conv2d(6, 4, 3, 1, 1)),
                   Concat(nn.Identity(), nn.Conv2d(10, 4, 1)), nn.Flatten(), nn.Linear(14 * 25, 2)), IMAGE),
    "resnet": (resnet, (3, 8, 8)),
    "buffers": (
        lambda: Net(lambda n, x: n.b((n.a(x) - n.mean) * n.scale.view(1, -1, 1, 1)), a=nn.Conv2d(3, 8, 3),
                    b=nn.Conv2d(8, 2, 1), buffers={"mean": torch.rand(8, 1, 1)}, transient={"scale": torch.rand(8)}),
        IMAGE),
    "dot_product": (
        lambda: Net(lambda n, x: (n.a(x) * torch.sigmoid(n.b(x))).sum(-1), a=nn.Linear(4, 8), b=nn.Linear(4, 8)), (4,)),
    "attention_scores": (
        lambda: Net(lambda n, x: torch.softmax(n.q(x) @ (1 + n.k(x)).mT, -1) @ x, q=nn.Linear(4, 8),
                    k=nn.Linear(4, 8)), (5, 4)),
    "sum_of_relu": (lambda: Net(lambda n, x: F.relu(n.a(x)).sum(1), a=nn.Conv2d(3, 8, 3)), IMAGE),
    "sum_of_normed": (
        lambda: Net(lambda n, x: n.b(n.a(x).sigmoid()).sum((1, 2)), a=nn.Conv2d(3, 8, 3), b=nn.BatchNorm2d(8)), IMAGE),
    "channels_as_batch": (
        lambda: Net(lambda n, x: n.c(n.b(n.a(x).reshape(-1, 1, 3, 3)).view(len(x), -1, 3, 3)), a=nn.Conv2d(3, 8, 3),
                    b=nn.Conv2d(1, 1, 3, padding=1), c=nn.Conv2d(8, 2, 1)), IMAGE),
    "linear_across": (
        lambda: Net(lambda n, x: n.c(n.b(n.a(x).flatten(2)).sum(-1)), a=nn.Conv2d(3, 8, 3),
                    b=nn.Linear(9, 4), c=nn.Linear(8, 2)), IMAGE),
    "cast": (
        lambda: Net(lambda n, x: n.b(n.a(x).to(torch.float64, copy=True).type_as(x).to(x)), a=nn.Linear(4, 6),
                    b=nn.Linear(6, 2)), (4,)),
    "unused": (
        lambda: Net(lambda n, x: n.b(n.a(x)), a=nn.Linear(4, 6), b=nn.Linear(6, 2), never=nn.Linear(6, 6)), (4,)),
}  # fmt: skip


class Wide(nn.Module):
    """Sizes held as attributes, also in a tuple; one that the forward calculates with."""

    def __init__(self) -> None:
        super().__init__()
        self.width, self.shape, self.rank = 8, (3, 3), 6
        self.conv = nn.Conv2d(3, self.width, 3)
        self.fc = nn.Linear(self.width * 9, self.rank)
        self.out = nn.Linear(self.rank, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).sigmoid().view(-1, self.width, *self.shape).flatten(1)
        return self.out(self.fc(x).tanh().view(-1, self.rank) / self.rank**0.5)


class Heads(nn.Module):
    """Attention written by hand: heads beside each other in one dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.dim = 4, 3
        self.qkv, self.proj = nn.Linear(5, 36), nn.Linear(12, 6)
        self.out = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(len(x), -1, 3, self.heads, self.dim).permute(2, 0, 3, 1, 4)
        h = (q @ k.transpose(2, 3) / self.dim**0.5).softmax(-1) @ v
        return self.out(self.proj(h.transpose(1, 2).reshape(len(x), -1, self.heads * self.dim)).tanh())


class Torch(nn.Module):
    """torch's own attention, between layers that can be pruned too."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.attention = nn.Linear(5, 12), nn.MultiheadAttention(12, 4, batch_first=True)
        self.out = nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.enter(x)
        return self.out(self.attention(h, h, h, need_weights=False)[0])


def cut(net: Any, x: Tensor) -> Tensor:
    """Pieces of a dimension, by their sizes, by their number and by bounds."""
    a, b = net.a(x).tanh().split([4, 8], 1)
    c, d = net.b(torch.cat([b, b[:, :3]], 1)).chunk(2, 1)
    return net.c(a) + net.d(c * d.sigmoid())


SIZED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "attributes": (Wide, IMAGE),
    "heads": (Heads, (4, 5)),
    "attention": (Torch, (4, 5)),
    "grouped": (
        sequential(nn.Conv2d(3, 12, 3), nn.Tanh(), nn.Conv2d(12, 18, 2, groups=6), nn.Tanh(), nn.Conv2d(18, 2, 1)), IMAGE),
    "grouped_transposed": (
        sequential(nn.Conv2d(3, 12, 3), nn.Tanh(), nn.ConvTranspose2d(12, 18, 2, groups=6), nn.Tanh(),
                   nn.Conv2d(18, 2, 1)), IMAGE),
    "group_norm": (norm_case(nn.GroupNorm(4, 8)), IMAGE),
    "cut": (
        lambda: Net(cut, a=nn.Conv2d(3, 12, 3), b=nn.Conv2d(11, 8, 1), c=nn.Conv2d(4, 2, 1), d=nn.Conv2d(4, 2, 1)),
        IMAGE),
    "stack": (
        lambda: Net(lambda n, x: n.c(torch.stack([n.a(x), n.b(x)], 1).prod(1)), a=nn.Conv2d(3, 8, 3),
                    b=nn.Conv2d(3, 8, 3), c=nn.Conv2d(8, 2, 1)), IMAGE),
    "repeat": (
        lambda: Net(lambda n, x: n.b(n.a(x).repeat(1, 2, 1, 1)), a=nn.Conv2d(3, 8, 3), b=nn.Conv2d(16, 2, 1)), IMAGE),
    "unflatten": (
        lambda: Net(lambda n, x: n.b(n.a(x).unflatten(1, (6, 3)).sin().flatten(1, 2)), a=nn.Conv2d(3, 18, 3),
                    b=nn.Conv2d(18, 2, 1)), IMAGE),
    "shuffle": (
        sequential(nn.Conv2d(3, 12, 3), nn.ChannelShuffle(6), nn.Tanh(), nn.Conv2d(12, 2, 1)), IMAGE),
    "glu": (sequential(nn.Conv2d(3, 8, 3), nn.GLU(1), nn.Conv2d(4, 6, 1), nn.Tanh(), nn.Conv2d(6, 2, 1)), IMAGE),
    "picked": (
        lambda: Net(lambda n, x: n.b(n.a(x)[:, n.order].sigmoid()), buffers={"order": torch.tensor([7, 0, 3, 3, 5, 1])},
                    a=nn.Conv2d(3, 8, 3), b=nn.Conv2d(6, 2, 1)), IMAGE),
    "lstm": (
        lambda: Net(lambda n, x: n.b(n.a(x)[0]), a=nn.LSTM(5, 6, 2, batch_first=True), b=nn.Linear(6, 2)), (4, 5)),
    "gru": (
        lambda: Net(lambda n, x: n.b(n.a(x)[0]), a=nn.GRU(5, 6, batch_first=True, bidirectional=True),
                    b=nn.Linear(12, 2)), (4, 5)),
    "zeros": (
        lambda: Net(lambda n, x: n.b(n.a(x) + torch.zeros(len(x), 8, 3, 3).to(x)), a=nn.Conv2d(3, 8, 3),
                    b=nn.Conv2d(8, 2, 1)), IMAGE),
    "padded": (
        lambda: Net(lambda n, x: n.c(n.b(x) + F.pad(n.a(x), (0, 0, 0, 0, 0, 3))), a=nn.Conv2d(3, 5, 3),
                    b=nn.Conv2d(3, 8, 3), c=nn.Conv2d(8, 2, 1)), IMAGE),
}  # fmt: skip

CASES = CONVOLUTIONS | LINEARS | NORMS | POOLS | SHAPES | GRAPHS | SIZED

MODULE_ACTIVATIONS: list[nn.Module] = [
    nn.ReLU(), nn.ReLU(True), nn.ReLU6(), nn.LeakyReLU(0.1), nn.ELU(), nn.CELU(), nn.SELU(), nn.GELU(),
    nn.GELU("tanh"), nn.SiLU(), nn.SiLU(True), nn.Mish(), nn.Sigmoid(), nn.Tanh(), nn.Softplus(), nn.Softsign(),
    nn.Hardswish(), nn.Hardsigmoid(), nn.Hardtanh(), nn.Hardshrink(), nn.Softshrink(), nn.Tanhshrink(),
    nn.LogSigmoid(), nn.Threshold(0.1, 2.0), nn.PReLU(), nn.PReLU(8), nn.RReLU(0.2, 0.2), nn.Identity(),
]  # fmt: skip

FUNCTIONAL_ACTIVATIONS: list[Callable[[Tensor], Tensor]] = [
    F.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.sigmoid_, torch.tanh, F.elu_, F.leaky_relu_, F.silu,
    F.hardtanh_, F.gelu, F.logsigmoid, torch.exp, torch.sin, Tensor.square, Tensor.abs,
    lambda x: x.clamp(min=0.1), lambda x: x.mul_(2).add_(1), lambda x: x * torch.sigmoid(1.7 * x),
    lambda x: torch.where(x > 0, x, -2 * x), lambda x: 1 - x / 3, lambda x: torch.maximum(x, x**2),
]  # fmt: skip


def activation_case(activation: Any) -> nn.Module:
    run = lambda net, x: net.b(net.act(net.a(x)).flatten(1))  # noqa: E731
    act = copy.deepcopy(activation)
    return Net(run, a=nn.Conv2d(3, 8, 2), b=nn.Linear(8 * 16, 2), act=act)


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Norm scales, statistics and biases that are neither 0 nor 1."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dim() == 1 and tensor.is_floating_point():
            values = torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype) + 0.5
            tensor.copy_(values)
    for name, tensor in model.named_parameters():
        if tensor.dim() == 1 and name.endswith("bias"):
            tensor.sub_(1.0)
    return model


def build(maker: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """A float64 network with random everything, the same each time."""
    torch.manual_seed(seed)
    model = maker()
    for name, parameter in model.named_parameters():
        if name in ("w", "v"):  # bare parameters of a Net
            nn.init.normal_(parameter)
    return randomise(model.double(), seed)


def inputs(shape: Sequence[int], batch: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(batch, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def build_case(name: str) -> tuple[nn.Module, Tensor]:
    maker, shape = CASES[name]
    return build(maker), inputs(shape)


def complement(size: int, index: Sequence[int] | Tensor) -> list[int]:
    return sorted(set(range(size)) - set(map(int, index)))


def step(model: nn.Module, optimizer: torch.optim.Optimizer, shape: tuple[int, ...], number: int) -> None:
    """Train on a batch of its own."""
    x, target = inputs(shape, batch=4, seed=number), inputs((1,), batch=4, seed=1000 + number)
    optimizer.zero_grad()
    F.mse_loss(model(x).flatten(1).sum(1, keepdim=True), target).backward()
    optimizer.step()


def zero_gone(tensors: Mapping[str, Tensor], kept: Mapping[str, Mapping[int, Sequence[int]]]) -> None:
    """Zero wherever a neuron is gone."""
    with torch.no_grad():
        for name, dims in kept.items():
            if name in tensors:
                for dim, index in dims.items():
                    gone = torch.tensor(complement(tensors[name].size(dim), index))
                    tensors[name].index_fill_(dim, gone, 0)


def mask(model: nn.Module, optimizer: torch.optim.Optimizer, kept: Mapping[str, Mapping[int, Sequence[int]]]) -> None:
    """Zero in parameters, buffers and optimizer state wherever a neuron is gone."""
    zero_gone(named_tensors(model), kept)
    names = {id(p): name for name, p in model.named_parameters()}
    for parameter, state in optimizer.state.items():
        for value in state.values():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                zero_gone({names[id(parameter)]: value}, kept)


def as_lists(kept: Mapping[str, Mapping[int, Any]]) -> dict[str, dict[int, list[int]]]:
    """What is kept, as `Plan.kept` has it."""
    return {name: {dim: list(map(int, index)) for dim, index in dims.items()} for name, dims in kept.items()}


@torch.no_grad()
def masked_twin(dense: nn.Module, kept: Mapping[str, Mapping[int, Sequence[int] | Tensor]]) -> nn.Module:
    """A copy of the dense network in which everything that was not kept is zero; indices stay what they are."""
    twin = copy.deepcopy(dense)
    tensors = dict(twin.named_parameters(remove_duplicate=False)) | dict(twin.named_buffers(remove_duplicate=False))
    for name, dims in kept.items():
        for dim, index in dims.items():
            if not tensors[name].is_floating_point():
                continue
            for gone in complement(tensors[name].size(dim), index):
                tensors[name].select(dim, gone).zero_()
    return twin


def sliced(tensor: Tensor, dims: Mapping[int, Sequence[int] | Tensor]) -> Tensor:
    """What is left of a tensor."""
    for dim, index in dims.items():
        tensor = torch.stack([tensor.select(dim, int(i)) for i in index], dim)
    return tensor


def forward(model: nn.Module, x: Any) -> list[Tensor]:
    with torch.no_grad():
        out = model(**x) if isinstance(x, dict) else model(*x) if isinstance(x, tuple) else model(x)
    return [leaf for leaf in pytree.tree_leaves(out) if isinstance(leaf, Tensor)]


def assert_close(actual: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float = TOLERANCE) -> None:
    """Equal shapes, equal values relative to the largest."""
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        assert a.shape == b.shape
        assert torch.isfinite(b).all()
        assert (a - b).abs().max() <= tolerance * b.abs().max(), f"off by {(a - b).abs().max() / b.abs().max():.2g}"


def assert_same_outputs(actual: nn.Module, expected: nn.Module, *examples: Any, modes: Sequence[str] = ()) -> None:
    """Equal outputs on copies, in evaluation mode and, where asked for, in training mode."""
    for mode in ("eval", *modes):
        for x in examples:
            pair = [forward(getattr(copy.deepcopy(model), mode)(), x) for model in (actual, expected)]
            assert_close(*pair)


def n_params(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@st.composite
def networks(draw: st.DrawFn) -> tuple[nn.Module, tuple[int, ...]]:
    """A random small network on 3x6x6 images."""
    channels, side, layers = 3, 6, []
    for _ in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(["conv", "conv", "depthwise", "norm", "act", "pool", "residual", "concat"]))
        width, kernel = draw(st.integers(2, 6)), draw(st.integers(1, 3))
        if kind == "conv" and side >= kernel:
            layers.append(nn.Conv2d(channels, width, kernel, bias=draw(st.booleans())))
            channels, side = width, side - kernel + 1
        elif kind == "depthwise":
            layers.append(nn.Conv2d(channels, channels, 3, padding=1, groups=channels))
        elif kind == "norm":
            layers.append(nn.BatchNorm2d(channels, affine=draw(st.booleans())))
        elif kind == "act":
            layers.append(draw(st.sampled_from([nn.ReLU(), nn.Sigmoid(), nn.GELU(), nn.PReLU(channels)])))
        elif kind == "pool" and side >= 2:
            layers.append(draw(st.sampled_from([nn.MaxPool2d(2), nn.AvgPool2d(2)])))
            side //= 2
        elif kind == "residual":
            layers.append(Residual(nn.Conv2d(channels, width, 1), nn.Tanh(), nn.Conv2d(width, channels, 1)))
        elif kind == "concat":
            layers.append(Concat(nn.Conv2d(channels, width, 1), nn.Identity(), nn.Conv2d(channels, 2, 1)))
            channels += width + 2
    layers += [nn.Conv2d(channels, 4, 1), nn.Softplus()]
    if draw(st.booleans()):
        layers += [nn.Flatten(), nn.Linear(4 * side * side, 5)]
    else:
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)]
    layers += [nn.BatchNorm1d(5), nn.LeakyReLU(), nn.Linear(5, draw(st.integers(1, 3)))]
    return build(sequential(*layers), draw(st.integers(0, 9))), (3, 6, 6)


def cases(names: Sequence[str] | Mapping[str, Any]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("name", list(names))


class Snapshot:
    """Everything about a model, its optimizers and the random state that a refused pruning must leave alone."""

    def __init__(self, model: nn.Module, *optimizers: torch.optim.Optimizer) -> None:
        self.model, self.optimizers = model, optimizers
        self.before = self._take()

    def _take(self) -> dict[str, Any]:
        facts: dict[str, Any] = {"rng": torch.get_rng_state(), "patches": installed_patches(self.model)}
        for path, module in self.model.named_modules(remove_duplicate=False):
            facts[f"module {path}"] = module
            for name, value in module.__dict__.items():
                # a patched forward may be another object that does the same: "patches" tells
                held = dict(value) if isinstance(value, dict) else value if name != "forward" else None
                facts[f"attribute {path}.{name}"] = held
        tensors = (*self.model.named_parameters(), *self.model.named_buffers())
        for name, tensor in tensors:
            facts[f"value {name}"] = tensor.detach().clone()
            facts[f"grad {name}"] = tensor.grad
            facts[f"requires_grad {name}"] = tensor.requires_grad
        for number, optimizer in enumerate(self.optimizers):
            for group in optimizer.param_groups:
                facts[f"group {number} {id(group)}"] = group | dict(enumerate(group["params"]))
            for parameter, state in optimizer.state.items():
                facts[f"state {number} {id(parameter)}"] = dict(state)
                for key, value in state.items():
                    facts[f"state {number} {id(parameter)} {key}"] = copy.deepcopy(value)
        return facts

    def assert_unchanged(self) -> None:
        after = self._take()
        assert set(after) == set(self.before)
        changed = [key for key, value in self.before.items() if not _same(value, after[key])]
        assert not changed, changed


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or (a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.nan_to_num(7), b.nan_to_num(7)))
    if isinstance(a, dict) and isinstance(b, dict):
        return list(a) == list(b) and all(_same_object(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_same, a, b))
    return a is b or bool(a == b)


def _same_object(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if isinstance(a, Tensor | nn.Module) or isinstance(b, Tensor | nn.Module):
        return False
    return _same(a, b)
