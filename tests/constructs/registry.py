"""The list of one-construct networks that pruning must get right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from networks import Net
from torch import Tensor, nn

Inputs = Callable[[int], Any]


@dataclass(frozen=True)
class Construct:
    """A network with one construct between prunable layers, and its inputs by batch size."""

    build: Callable[[], nn.Module]
    inputs: Inputs  # batch size -> a tensor, tuple (positional) or dict (keyword), float64
    approximate: bool = False  # exact_only=True leaves nothing prunable
    frozen: bool = False  # freezing everything is the only right answer


CONSTRUCTS: dict[str, Construct] = {}


def construct(
    name: str,
    build: Callable[[], nn.Module],
    inputs: Inputs,
    *,
    approximate: bool = False,
    frozen: bool = False,
) -> None:
    """Register a network; a name is given once."""
    if name in CONSTRUCTS:
        raise ValueError(f"two constructs are called {name!r}")
    CONSTRUCTS[name] = Construct(build, inputs, approximate, frozen)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def image(channels: int = 3, side: int = 8) -> Inputs:
    return lambda batch: normal(batch, channels, side, side)


def signal(channels: int = 3, length: int = 8) -> Inputs:
    return lambda batch: normal(batch, channels, length)


def volume(channels: int = 3, side: int = 4) -> Inputs:
    return lambda batch: normal(batch, channels, side, side, side)


def tokens(length: int = 6, width: int = 8) -> Inputs:
    return lambda batch: normal(batch, length, width)


def vector(width: int = 6) -> Inputs:
    return lambda batch: normal(batch, width)


def indices(length: int = 6, vocab: int = 12) -> Inputs:
    return lambda batch: torch.randint(vocab, (batch, length), generator=torch.Generator().manual_seed(0))


def conv_net(op: Callable[[Tensor], Tensor], width: int = 8, reads: int | None = None, *, tail: bool = False) -> Any:
    """Builder of ``b(op(tanh(a(x))))`` with convolutions; ``tail`` adds a last layer, so that b can be pruned too."""

    def build() -> nn.Module:
        a, b = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(reads or width, 6 if tail else 2, 1)
        if tail:
            return Net(lambda n, x: n.c(torch.tanh(n.b(op(torch.tanh(n.a(x)))))), a=a, b=b, c=nn.Conv2d(6, 2, 1))
        return Net(lambda n, x: n.b(op(torch.tanh(n.a(x)))), a=a, b=b)

    return build


def linear_net(op: Callable[[Tensor], Tensor], width: int = 8, reads: int | None = None, *, tail: bool = False) -> Any:
    """Like `conv_net`, with linear layers that read 8 features."""

    def build() -> nn.Module:
        a, b = nn.Linear(8, width), nn.Linear(reads or width, 6 if tail else 2)
        if tail:
            return Net(lambda n, x: n.c(torch.tanh(n.b(op(torch.tanh(n.a(x)))))), a=a, b=b, c=nn.Linear(6, 2))
        return Net(lambda n, x: n.b(op(torch.tanh(n.a(x)))), a=a, b=b)

    return build


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape) / 2)
