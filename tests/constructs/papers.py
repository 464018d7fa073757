"""Blocks as published networks write them, one each: channel attention, conditional kernels, styles, token mixers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from networks import Net
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torchvision.ops import DeformConv2d

from constructs.registry import construct, image, indices, normal, parameter, tokens, vector

SMALL, WORDS = image(side=6), tokens(5, 8)


def between(block: Callable[[], nn.Module], reads: int = 8) -> Callable[[], nn.Module]:
    """A block over eight channels, with a convolution before and one behind it."""
    return lambda: nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Tanh(), block(), nn.Tanh(), nn.Conv2d(reads, 2, 1))


def among(block: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """A block over tokens of eight features, with a linear layer before and one behind it."""
    return lambda: nn.Sequential(nn.Linear(8, 8), nn.Tanh(), block(), nn.Tanh(), nn.Linear(8, 2))


def op(run: Callable[..., Tensor], **layers: Any) -> Callable[[], nn.Module]:
    """A block given as a function of its layers, which are made anew for each network."""
    return lambda: Net(run, **{name: make() for name, make in layers.items()})


# Attention over channels


def expanded(n: Any, x: Tensor) -> Tensor:
    b, c, _, _ = x.size()
    return x * n.fc(F.adaptive_avg_pool2d(x, 1).view(b, c)).view(b, c, 1, 1).expand_as(x)


def squeeze() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 3), nn.ReLU(), nn.Linear(3, 8), nn.Sigmoid())


def eca(n: Any, x: Tensor) -> Tensor:
    y = n.conv(F.adaptive_avg_pool2d(x, 1).squeeze(-1).mT).mT.unsqueeze(-1)
    return x * y.sigmoid().expand_as(x)


def gated(n: Any, x: Tensor) -> Tensor:
    """GCT: an L2 norm over space, normalised over channels."""
    energy = (x.pow(2).sum((2, 3), keepdim=True) + 1e-5).sqrt() * n.alpha
    return x * (1 + torch.tanh(energy * n.gamma / (energy.pow(2).mean(1, keepdim=True) + 1e-5).sqrt() + n.beta))


def simam(n: Any, x: Tensor) -> Tensor:
    d = (x - x.mean((2, 3), keepdim=True)).pow(2)
    v = d.sum((2, 3), keepdim=True) / (x.shape[2] * x.shape[3] - 1)
    return x * torch.sigmoid(d / (4 * (v + 1e-4)) + 0.5)


def recalibrated(n: Any, x: Tensor) -> Tensor:
    """SRM: a depthwise convolution over the statistics of each channel."""
    u = torch.stack([x.mean((2, 3)), x.flatten(2).std(-1)], -1)
    return x * n.bn(n.cfc(u)).sigmoid().unsqueeze(-1)


def triplet(n: Any, x: Tensor) -> Tensor:
    def gate(x: Tensor) -> Tensor:
        return x * n.conv(torch.cat([x.amax(1, keepdim=True), x.mean(1, keepdim=True)], 1)).sigmoid()

    return gate(x) + gate(x.permute(0, 2, 1, 3).contiguous()).permute(0, 2, 1, 3)


def doubly(n: Any, x: Tensor) -> Tensor:
    b, _, h, w = x.shape
    a, k, v = n.a(x).view(b, 6, h * w), n.k(x).view(b, 4, h * w).softmax(-1), n.v(x).view(b, 4, h * w).softmax(1)
    return n.o((a @ k.mT @ v).view(b, 6, h, w))


def scale(*shape: int) -> Callable[[], nn.Parameter]:
    return lambda: parameter(*shape)


def conv(*args: int, **options: Any) -> Callable[[], nn.Module]:
    return lambda: nn.Conv2d(*args, **options)


construct("paper_se_expanded", between(op(expanded, fc=squeeze)), SMALL)
construct(
    "paper_eca", between(op(eca, conv=lambda: nn.Conv1d(1, 1, 3, padding=1, bias=False))), SMALL, approximate=True
)
construct(
    "paper_gct",
    between(op(gated, alpha=scale(1, 8, 1, 1), beta=scale(1, 8, 1, 1), gamma=scale(1, 8, 1, 1))),
    SMALL,
    approximate=True,
)
construct("paper_simam", between(op(simam)), SMALL)
construct(
    "paper_srm",
    between(
        op(recalibrated, cfc=lambda: nn.Conv1d(8, 8, 2, groups=8, bias=False), bn=lambda: nn.BatchNorm1d(8)),
    ),
    SMALL,
)
construct("paper_triplet", between(op(triplet, conv=conv(2, 1, 3, padding=1))), SMALL, approximate=True)
construct(
    "paper_double_attention",
    between(op(doubly, a=conv(8, 6, 1), k=conv(8, 4, 1), v=conv(8, 4, 1), o=conv(6, 8, 1))),
    SMALL,
)

# Convolutions of other kinds


def deform(n: Any, x: Tensor) -> Tensor:
    return n.conv(x, n.offset(x))


def deform_with_mask(n: Any, x: Tensor) -> Tensor:
    one, two, mask = n.offset(x).chunk(3, 1)
    return n.conv(x, torch.cat([one, two], 1), mask.sigmoid())


def omni(n: Any, x: Tensor) -> Tensor:
    """ODConv: kernels, inputs and outputs weighed by the input; one group per example."""
    b = x.size(0)
    a = F.relu(n.fc(x.mean((2, 3))))
    inputs, outputs, kernels = n.ci(a).sigmoid(), n.co(a).sigmoid(), n.k(a).softmax(-1)
    y = (x * inputs[..., None, None]).reshape(1, -1, *x.shape[2:])
    weight = (kernels.view(b, 2, 1, 1, 1, 1) * n.weight.unsqueeze(0)).sum(1).view(-1, 8, 1, 1)
    return F.conv2d(y, weight, groups=b).view(b, 8, *x.shape[2:]) * outputs[..., None, None]


def merged(n: Any, x: Tensor) -> Tensor:
    """RepLKNet after training: the small kernel lies in the middle of the large one."""
    weight = n.large.weight + F.pad(n.small.weight, [1] * 4)
    return F.conv2d(x, weight, n.large.bias + n.small.bias, padding=2, groups=8)


for name, run, layers in (
    ("deform", deform, {"offset": conv(8, 18, 3, padding=1), "conv": lambda: DeformConv2d(8, 8, 3, padding=1)}),
    (
        "deform_masked",
        deform_with_mask,
        {"offset": conv(8, 27, 3, padding=1), "conv": lambda: DeformConv2d(8, 8, 3, padding=1)},
    ),
    (
        "deform_grouped",
        deform,
        {"offset": conv(8, 36, 3, padding=1), "conv": lambda: DeformConv2d(8, 8, 3, padding=1, groups=2)},
    ),
    (
        "odconv",
        omni,
        {"fc": lambda: nn.Linear(8, 4), "ci": lambda: nn.Linear(4, 8), "co": lambda: nn.Linear(4, 8)}
        | {"k": lambda: nn.Linear(4, 2), "weight": scale(2, 8, 8, 1, 1)},
    ),
    (
        "replk_merged",
        merged,
        {"large": conv(8, 8, 5, padding=2, groups=8), "small": conv(8, 8, 3, padding=1, groups=8)},
    ),
):
    construct(f"paper_{name}", between(op(run, **layers)), SMALL)

# Styles


def adain(n: Any, x: Tensor, y: Tensor) -> Tensor:
    def moments(x: Tensor) -> tuple[Tensor, Tensor]:
        flat = x.view(*x.shape[:2], -1)
        return flat.mean(2).view(*x.shape[:2], 1, 1), (flat.var(2) + 1e-5).sqrt().view(*x.shape[:2], 1, 1)

    x, y = n.a(x), n.s(y)
    (m, d), (m2, d2), size = moments(x), moments(y), x.size()
    return n.b((x - m.expand(size)) / d.expand(size) * d2.expand(size) + m2.expand(size))


def spade(n: Any, x: Tensor, mask: Tensor) -> Tensor:
    h = F.relu(n.hidden(F.interpolate(mask, x.shape[2:])))
    return n.b(n.norm(n.a(x)) * (1 + n.gamma(h)) + n.beta(h))


def modulated(n: Any, x: Tensor, z: Tensor) -> Tensor:
    x, (batch, _, h, w) = n.a(x), x.shape
    weight = n.weight / math.sqrt(72) * n.style(z).view(batch, 1, 8, 1, 1)
    weight = weight * torch.rsqrt(weight.pow(2).sum([2, 3, 4]) + 1e-8).view(batch, 8, 1, 1, 1)
    x = F.conv2d(x.view(1, batch * 8, h, w), weight.view(batch * 8, 8, 3, 3), padding=1, groups=batch)
    return n.b(F.leaky_relu(x.view(batch, 8, h, w), 0.2))


def constant(n: Any, z: Tensor) -> Tensor:
    gamma, beta = n.style(z).unsqueeze(2).unsqueeze(3).chunk(2, 1)
    x = n.const.repeat(z.size(0), 1, 1, 1)
    return n.b(F.leaky_relu(n.c(F.instance_norm(x) * (gamma + 1) + beta), 0.2))


def image_and(*shape: int) -> Callable[[int], Any]:
    return lambda batch: (normal(batch, 3, 6, 6), normal(batch, *shape, seed=1))


construct(
    "paper_adain",
    op(adain, a=conv(3, 8, 3, padding=1), s=conv(3, 8, 3, padding=1), b=conv(8, 2, 1)),
    image_and(3, 6, 6),
)
construct(
    "paper_spade",
    op(
        spade,
        a=conv(3, 8, 3, padding=1),
        norm=lambda: nn.BatchNorm2d(8, affine=False),
        hidden=conv(1, 6, 3, padding=1),
        gamma=conv(6, 8, 3, padding=1),
        beta=conv(6, 8, 3, padding=1),
        b=conv(8, 2, 1),
    ),
    image_and(1, 3, 3),
)
construct(
    "paper_modulated",
    op(
        modulated,
        a=conv(3, 8, 3, padding=1),
        style=lambda: nn.Linear(4, 8),
        weight=scale(1, 8, 8, 3, 3),
        b=conv(8, 2, 1),
    ),
    image_and(4),
)
construct(
    "paper_constant_input",
    op(constant, style=lambda: nn.Linear(4, 16), const=scale(1, 8, 4, 4), c=conv(8, 6, 3, padding=1), b=conv(6, 2, 1)),
    vector(4),
)

# Weights that are computed


class Upper(nn.Module):
    """A symmetric weight from its upper half."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight.triu() + weight.triu(1).mT


class UnitRows(nn.Module):
    """Each row of length one: what reads it sees all of the row's inputs."""

    def forward(self, weight: Tensor) -> Tensor:
        return F.normalize(weight, dim=1)


def computed(rule: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        layer = nn.Linear(8, 8)
        parametrize.register_parametrization(layer, "weight", rule())
        return layer

    return among(make)


construct("paper_symmetric", computed(Upper), WORDS)
construct("paper_unit_rows", computed(UnitRows), WORDS)
for name, run, layers in (
    ("diagonal", lambda n, x: x @ torch.diag(n.d), {"d": scale(8)}),
    ("diagonal_embedded", lambda n, x: x @ n.d.diag_embed(), {"d": scale(8)}),
    ("diagonal_read", lambda n, x: x * (n.w @ n.w.mT).diagonal(), {"w": scale(8, 8)}),
    ("block_diagonal", lambda n, x: x @ torch.block_diag(n.one, n.two), {"one": scale(4, 4), "two": scale(4, 4)}),
    ("kronecker", lambda n, x: x @ torch.kron(n.one, n.two), {"one": scale(2, 2), "two": scale(4, 4)}),
):
    construct(f"paper_{name}", among(op(run, **layers)), WORDS)

# Tokens


class Heads(nn.Module):
    """Projections into two heads and back."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))

    def split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], 2, 4).transpose(1, 2)

    def join(self, x: Tensor) -> Tensor:
        return self.o(x.transpose(1, 2).reshape(x.size(0), x.size(2), -1))


class Performer(Heads):
    """Random features stand for the softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("features", torch.randn(4, 5, dtype=torch.float64))

    def phi(self, x: Tensor) -> Tensor:
        return torch.exp(x @ self.features - x.pow(2).sum(-1, keepdim=True) / 2) / math.sqrt(5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.phi(self.split(self.q(x))), self.phi(self.split(self.k(x))), self.split(self.v(x))
        return self.join((q @ (k.mT @ v)) / (q @ k.sum(-2).unsqueeze(-1)))


class Cached(Heads):
    """Keys and values of the steps before are kept."""

    def forward(self, x: Tensor) -> Tensor:
        keys, values, outs = [], [], []
        for t in range(x.size(1)):
            step = x[:, t : t + 1]
            keys.append(self.split(self.k(step)))
            values.append(self.split(self.v(step)))
            scores = self.split(self.q(step)) @ torch.cat(keys, 2).mT
            outs.append(self.join(scores.softmax(-1) @ torch.cat(values, 2)))
        return torch.cat(outs, 1)


class TransformerXL(Heads):
    """Relative positions, shifted into place."""

    def __init__(self) -> None:
        super().__init__()
        self.r, self.u, self.w = nn.Linear(8, 8, bias=False), parameter(2, 4), parameter(2, 4)
        self.register_buffer("places", torch.randn(5, 8, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).view(*x.shape[:2], 2, 4)
        k, v, r = self.k(x).view_as(q), self.v(x).view_as(q), self.r(self.places).view(-1, 2, 4)
        content = torch.einsum("bihd,bjhd->bhij", q + self.u, k)
        place = torch.einsum("bihd,jhd->bhij", q + self.w, r)
        b, h, i, j = place.shape
        place = F.pad(place, (1, 0)).view(b, h, j + 1, i)[:, :, 1:].view_as(place)
        return self.o(torch.einsum("bhij,bjhd->bihd", (content + place).softmax(-1), v).flatten(2))


class Delta(Heads):
    """A state that is corrected at each step (DeltaNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(self.q(x)), F.normalize(self.split(self.k(x)), dim=-1), self.split(self.v(x))
        rate, state, outs = self.rate(x).sigmoid().transpose(1, 2), x.new_zeros(x.size(0), 2, 4, 4), []
        for t in range(x.size(1)):
            wrong = v[:, :, t] - torch.einsum("bhd,bhde->bhe", k[:, :, t], state)
            state = state + rate[:, :, t, None, None] * torch.einsum("bhd,bhe->bhde", k[:, :, t], wrong)
            outs.append(torch.einsum("bhd,bhde->bhe", q[:, :, t], state))
        return self.join(torch.stack(outs, 2))


def mixtral(n: Any, x: Tensor) -> Tensor:
    flat, out = x.view(-1, x.size(-1)), torch.zeros_like(x).view(-1, x.size(-1))
    weights, chosen = n.gate(flat).softmax(-1).topk(2, -1)
    weights = weights / weights.sum(-1, keepdim=True)
    for number, expert in enumerate(n.experts):
        rows, place = torch.where(chosen == number)
        out.index_add_(0, rows, expert(flat[rows]) * weights[rows, place, None])
    return out.view(x.shape)


def aft(n: Any, x: Tensor) -> Tensor:
    e, w = torch.exp(n.k(x)), torch.exp(n.w)
    return n.q(x).sigmoid() * (w @ (e * n.v(x))) / (w @ e)


def hyena(n: Any, x: Tensor) -> Tensor:
    a, b, v = n.i(x).mT.chunk(3, 1)
    y = torch.fft.irfft(torch.fft.rfft(a * v, n=10) * torch.fft.rfft(n.filter, n=10), n=10)[..., : x.size(1)]
    return n.o((y * b).mT)


def experts() -> nn.Module:
    return nn.ModuleList(nn.Sequential(nn.Linear(8, 6), nn.GELU(), nn.Linear(6, 8)) for _ in range(3))


def linear(*sizes: int) -> Callable[[], nn.Module]:
    return lambda: nn.Linear(*sizes)


for kind in (Performer, Cached, TransformerXL, Delta):
    construct(f"paper_{kind.__name__.lower()}", among(kind), WORDS)
for name, run, layers in (
    ("mixtral", mixtral, {"gate": linear(8, 3), "experts": experts}),
    ("aft", aft, {"q": linear(8, 8), "k": linear(8, 8), "v": linear(8, 8), "w": scale(5, 5)}),
    ("hyena", hyena, {"i": linear(8, 24), "o": linear(8, 8), "filter": scale(8, 5)}),
    ("fnet", lambda n, x: torch.fft.fft(x, dim=1).real, {}),
    ("dynamic_tanh", lambda n, x: torch.tanh(n.a * x) * n.w + n.b, {"a": scale(1), "w": scale(8), "b": scale(8)}),
):
    construct(f"paper_{name}", among(op(run, **layers)), WORDS)


class NormedLSTM(nn.Module):
    """Gates cut out by number, a norm in the loop: as many cuts as steps."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.u, self.norm, self.out = (
            nn.Linear(8, 24),
            nn.Linear(6, 24, bias=False),
            nn.LayerNorm(6),
            nn.Linear(6, 2),
        )

    def forward(self, x: Tensor) -> Tensor:
        h = c = x.new_zeros(x.shape[0], 6)
        for t in range(x.shape[1]):
            g = self.w(x[:, t]) + self.u(h)
            c = g[:, 6:12].sigmoid() * c + g[:, :6].sigmoid() * g[:, 18:].tanh()
            h = g[:, 12:18].sigmoid() * torch.tanh(self.norm(c))
        return self.out(h)


construct("paper_normed_lstm", NormedLSTM, WORDS, approximate=True)

# Tables and distances


def bases(n: Any, x: Tensor) -> Tensor:
    return n.out(torch.exp(-torch.cdist(n.a(x), n.centres).pow(2) * n.widths.exp()))


construct(
    "paper_radial_bases",
    op(bases, a=linear(6, 8), centres=scale(5, 8), widths=scale(5), out=linear(5, 2)),
    vector(),
)
construct(
    "paper_table_indexed",
    lambda: Net(lambda n, x: n.b(torch.tanh(n.table[x])), table=parameter(12, 8), b=nn.Linear(8, 2)),
    indices(),
)
construct(
    "paper_embedding_of_bounded_norm",
    lambda: Net(lambda n, x: n.b(torch.tanh(n.e(x))), e=nn.Embedding(12, 8, max_norm=0.5), b=nn.Linear(8, 2)),
    indices(),
)
