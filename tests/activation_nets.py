"""Networks that call activation functions in every way."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    """One ReLU module called twice, a function, an in-place method."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.a(x))
        x = torch.tanh(self.b(x))
        x = self.relu(x)
        x = self.c(x)
        x.relu_()
        return x


class Net(nn.Module):
    """A block, then forms of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.act, self.out = Block(), nn.LeakyReLU(0.2), nn.Linear(4, 2)
        self.gate, self.mid = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.mid(self.block(x)))
        x = x * torch.sigmoid(self.gate(x))
        x = F.elu(x, 0.5)
        return self.out(F.relu(x, inplace=True))


class Varying(nn.Module):
    """Calls a function once in evaluation and twice in training."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2 if self.training else 1):
            x = F.relu(self.fc(x))
        return self.out(x)
