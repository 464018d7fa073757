"""Layers: convolutions, products, norms, activations, parametrizations, shared weights."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from networks import Net
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from constructs.registry import (
    construct,
    conv_net,
    image,
    linear_net,
    parameter,
    signal,
    tokens,
    vector,
    volume,
)

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
INPUTS = {1: signal(), 2: image(side=6), 3: volume()}


def around(middle: Any, rank: int = 2, enter: int = 8, leave: int = 8) -> Any:
    """Builder of a convolution, what ``middle`` builds and another convolution."""
    conv = CONVS[rank]
    return lambda: nn.Sequential(conv(3, enter, 1), nn.Tanh(), middle(), nn.Tanh(), conv(leave, 2, 1))


# Convolutions

for name, rank, enter, leave, middle in (
    ("conv1d", 1, 8, 6, lambda: nn.Conv1d(8, 6, 3)),
    ("conv1d_strided", 1, 8, 6, lambda: nn.Conv1d(8, 6, 3, stride=2, padding=1)),
    ("conv2d", 2, 8, 6, lambda: nn.Conv2d(8, 6, 3, bias=False)),
    ("conv2d_dilated", 2, 8, 6, lambda: nn.Conv2d(8, 6, 3, dilation=2)),
    ("conv2d_same", 2, 8, 6, lambda: nn.Conv2d(8, 6, 3, padding="same")),
    ("conv2d_circular", 2, 8, 6, lambda: nn.Conv2d(8, 6, 3, padding=1, padding_mode="circular")),
    ("conv2d_reflect", 2, 8, 6, lambda: nn.Conv2d(8, 6, 3, padding=1, padding_mode="reflect")),
    ("conv3d", 3, 8, 6, lambda: nn.Conv3d(8, 6, 2)),
    ("conv_transpose1d", 1, 8, 6, lambda: nn.ConvTranspose1d(8, 6, 3)),
    ("conv_transpose2d", 2, 8, 6, lambda: nn.ConvTranspose2d(8, 6, 2, stride=2, bias=False)),
    ("conv_transpose2d_padded", 2, 8, 6, lambda: nn.ConvTranspose2d(8, 6, 3, 2, padding=1, output_padding=1)),
    ("conv_transpose3d", 3, 8, 6, lambda: nn.ConvTranspose3d(8, 6, 2)),
    ("grouped1d", 1, 16, 16, lambda: nn.Conv1d(16, 16, 3, groups=4)),
    ("grouped2d", 2, 16, 16, lambda: nn.Conv2d(16, 16, 3, groups=4)),
    ("grouped2d_no_bias", 2, 16, 16, lambda: nn.Conv2d(16, 16, 3, groups=4, bias=False)),
    ("grouped2d_widening", 2, 8, 16, lambda: nn.Conv2d(8, 16, 3, groups=4)),
    ("grouped2d_narrowing", 2, 16, 8, lambda: nn.Conv2d(16, 8, 1, groups=4)),
    ("grouped3d", 3, 8, 8, lambda: nn.Conv3d(8, 8, 2, groups=4)),
    ("grouped_transpose1d", 1, 8, 8, lambda: nn.ConvTranspose1d(8, 8, 2, groups=4)),
    ("grouped_transpose2d", 2, 8, 16, lambda: nn.ConvTranspose2d(8, 16, 2, stride=2, groups=4)),
    ("depthwise1d", 1, 8, 8, lambda: nn.Conv1d(8, 8, 3, groups=8)),
    ("depthwise2d", 2, 8, 8, lambda: nn.Conv2d(8, 8, 3, padding=1, groups=8)),
    ("depthwise3d", 3, 8, 8, lambda: nn.Conv3d(8, 8, 2, groups=8)),
    ("depthwise_transpose2d", 2, 8, 8, lambda: nn.ConvTranspose2d(8, 8, 2, stride=2, groups=8)),
    ("depthwise_multiplier", 2, 8, 16, lambda: nn.Conv2d(8, 16, 3, groups=8)),
    ("depthwise_transpose_multiplier", 2, 8, 16, lambda: nn.ConvTranspose2d(8, 16, 3, groups=8)),
    ("grouped_twice", 2, 16, 16, lambda: nn.Sequential(nn.Conv2d(16, 16, 1, groups=4), nn.ReLU(), nn.Conv2d(16, 16, 1, groups=8))),
    ("depthwise_separable", 2, 8, 8, lambda: nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.ReLU6(), nn.Conv2d(8, 8, 1))),
    ("pointwise_one_channel_per_group", 2, 16, 4, lambda: nn.Conv2d(16, 4, 1, groups=4)),
):  # fmt: skip
    construct(name, around(middle, rank, enter, leave), INPUTS[rank])


construct(
    "grouped_in_two",
    lambda: nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.Tanh(), nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(8, 6, 1), nn.ReLU(), nn.Conv2d(6, 2, 1)
    ),
    image(side=6),
)


class FunctionalConv(nn.Module):
    """Its own parameters and the number of groups as a literal."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.weight, self.bias = parameter(8, 8 // groups, 3, 3), parameter(8)
        self.head = nn.Conv2d(8, 2, 1)


class FunctionalPlain(FunctionalConv):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(F.conv2d(torch.tanh(self.stem(x)), self.weight, self.bias, padding=1)))


class FunctionalGrouped(FunctionalConv):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(F.conv2d(torch.tanh(self.stem(x)), self.weight, self.bias, groups=4)))


class FunctionalDepthwise(FunctionalConv):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(F.conv2d(torch.tanh(self.stem(x)), self.weight, self.bias, 1, 1, 1, 8)))


class FunctionalTransposed(FunctionalConv):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(F.conv_transpose2d(torch.tanh(self.stem(x)), self.weight, self.bias, stride=2)))


construct("functional_conv", lambda: FunctionalPlain(1), image(side=6))
construct("functional_grouped", lambda: FunctionalGrouped(4), image(side=6))
construct("functional_depthwise", lambda: FunctionalDepthwise(8), image(side=6))
construct("functional_transposed", lambda: FunctionalTransposed(1), image(side=6))


class Blur(nn.Module):
    """A fixed depthwise kernel, by channel or expanded to the channels at hand."""

    def __init__(self, channels: int, expand: bool) -> None:
        super().__init__()
        kernel = torch.tensor([1.0, 2.0, 1.0])
        kernel = (kernel[:, None] * kernel / 16)[None, None]
        self.register_buffer("kernel", kernel if expand else kernel.repeat(channels, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.kernel.expand(x.shape[1], -1, -1, -1), stride=2, padding=1, groups=x.shape[1])


construct("blur_pool", around(lambda: Blur(8, expand=False)), image(side=6))
construct("blur_pool_expanded", around(lambda: Blur(8, expand=True)), image(side=6))


class StandardizedConv(nn.Conv2d):
    """Weight standardization: each filter is normalised over all that it reads."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        weight = weight / (weight.std((1, 2, 3), keepdim=True) + 1e-5)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


construct("weight_standardization", around(lambda: StandardizedConv(8, 8, 3)), image(side=6))


class CondConv(nn.Module):
    """A mixture of three kernels by example, run as one convolution with a group per example."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.route = nn.Conv2d(3, 8, 1), nn.Linear(8, 3)
        self.weight = parameter(3, 6, 8, 3, 3)
        self.head = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        b, c, h, w = x.shape
        route = torch.sigmoid(self.route(x.mean((2, 3))))
        weight = torch.einsum("be,eoikl->boikl", route, self.weight).flatten(0, 1)
        x = F.conv2d(x.reshape(1, b * c, h, w), weight, padding=1, groups=b)
        return self.head(torch.tanh(x.view(b, -1, h, w)))


construct("cond_conv", CondConv, image(side=6))


def reparametrized() -> nn.Module:
    """Two kernels that are added before the convolution, one of them padded."""

    def run(net: Any, x: Tensor) -> Tensor:
        weight = net.big.weight + F.pad(net.small.weight, (1, 1, 1, 1))
        return net.b(torch.tanh(F.conv2d(torch.tanh(net.a(x)), weight, net.big.bias + net.small.bias, padding=1)))

    return Net(run, a=nn.Conv2d(3, 8, 1), big=nn.Conv2d(8, 6, 3), small=nn.Conv2d(8, 6, 1), b=nn.Conv2d(6, 2, 1))


construct("added_kernels", reparametrized, image(side=6))
construct(
    "conv_over_tokens",
    lambda: Net(
        lambda n, x: n.b(torch.tanh(n.conv(torch.tanh(n.a(x)).transpose(1, 2)).transpose(1, 2))),
        a=nn.Linear(8, 6), conv=nn.Conv1d(6, 8, 3, padding=1), b=nn.Linear(8, 2)),
    tokens(),
)  # fmt: skip
construct(
    "causal_conv_over_tokens",
    lambda: Net(
        lambda n, x: n.b(F.silu(n.conv(n.a(x).mT)[..., : x.shape[1]]).mT),
        a=nn.Linear(8, 6), conv=nn.Conv1d(6, 6, 3, padding=2, groups=6), b=nn.Linear(6, 2)),
    tokens(),
)  # fmt: skip

# Products


class Product(nn.Module):
    """A matrix of its own between two linear layers."""

    def __init__(self, product: Any, *shape: int) -> None:
        super().__init__()
        self.product = product
        self.enter = nn.Linear(8, 6)
        self.matrix, self.offset = parameter(*shape), parameter(8)
        self.leave = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(torch.tanh(self.product(torch.tanh(self.enter(x)), self.matrix) + self.offset))


construct(
    "linear", lambda: nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)), vector(8)
)
construct(
    "linear_over_tokens", lambda: nn.Sequential(nn.Linear(8, 6, bias=False), nn.ReLU(), nn.Linear(6, 2)), tokens()
)
construct("linear_over_image", lambda: nn.Sequential(nn.Linear(8, 6), nn.Sigmoid(), nn.Linear(6, 2)), image(3, 8))

for name, product, shape, inputs in (
    ("mm", torch.mm, (6, 8), vector(8)),
    ("mm_transposed", lambda x, w: torch.mm(x, w.t()), (8, 6), vector(8)),
    ("matmul", torch.matmul, (6, 8), tokens()),
    ("matmul_4d", torch.matmul, (6, 8), image(3, 8)),
    ("matmul_left", lambda x, w: (w @ x.mT).mT, (8, 6), tokens()),
    ("matmul_batched_matrix", lambda x, w: x @ w.expand(len(x), -1, -1), (6, 8), tokens()),
    ("bmm", lambda x, w: torch.bmm(x, w.expand(x.size(0), -1, -1)), (6, 8), tokens()),
    ("bmm_per_token", lambda x, w: torch.bmm(x.transpose(0, 1), w).transpose(0, 1), (5, 6, 8), tokens(5)),
    ("baddbmm", lambda x, w: torch.baddbmm(x.new_zeros(1), x, w.expand(x.size(0), -1, -1), beta=0.5), (6, 8), tokens()),
    ("einsum", lambda x, w: torch.einsum("bli,oi->blo", x, w), (8, 6), tokens()),
    ("einsum_ellipsis", lambda x, w: torch.einsum("...i,io->...o", x, w), (6, 8), tokens()),
    ("einsum_per_token", lambda x, w: torch.einsum("bli,lio->blo", x, w), (5, 6, 8), tokens(5)),
    ("tensordot", lambda x, w: torch.tensordot(x, w, dims=([2], [1])), (8, 6), tokens()),
    ("inner", lambda x, w: torch.inner(x, w), (8, 6), tokens()),
    ("multi_dot", lambda x, w: torch.linalg.multi_dot([x, w, w.t(), w]), (6, 8), vector(8)),
    ("product_by_sum", lambda x, w: (x.unsqueeze(-1) * w).sum(-2), (6, 8), tokens()),
):
    construct(name, lambda product=product, shape=shape: Product(product, *shape), inputs)
construct(
    "addmm",
    lambda: Net(lambda n, x: n.b(torch.tanh(torch.addmm(n.bias, torch.tanh(n.a(x)), n.w))),
                a=nn.Linear(8, 6), w=parameter(6, 8), bias=parameter(8), b=nn.Linear(8, 2)),
    vector(8),
)  # fmt: skip
construct(
    "einsum_image",
    lambda: Net(lambda n, x: n.b(torch.tanh(torch.einsum("bchw,oc->bohw", torch.tanh(n.a(x)), n.w))),
                a=nn.Conv2d(3, 8, 3), w=parameter(6, 8), b=nn.Conv2d(6, 2, 1)),
    image(side=6),
)  # fmt: skip
construct(
    "matmul_vector",
    lambda: Net(lambda n, x: torch.tanh(n.a(x)) @ n.scores, a=nn.Linear(8, 6), scores=parameter(6)),
    tokens(),
)
construct(
    "mv",
    lambda: Net(lambda n, x: torch.mv(torch.tanh(n.a(x)), n.scores), a=nn.Linear(8, 6), scores=parameter(6)),
    vector(8),
)
construct(
    "vector_on_the_left",
    lambda: Net(lambda n, x: n.scores @ torch.tanh(n.a(x)).mT, a=nn.Linear(8, 6), scores=parameter(6)),
    tokens(),
)
construct(
    "outer_product",
    lambda: Net(lambda n, x: n.c((n.a(x).unsqueeze(2) * n.b(x).unsqueeze(1)).flatten(1)),
                a=nn.Linear(8, 4), b=nn.Linear(8, 6), c=nn.Linear(24, 2)),
    vector(8),
)  # fmt: skip
construct(
    "gram_matrix",
    lambda: Net(lambda n, x: n.b((n.a(x).flatten(2) @ n.a(x).flatten(2).mT / 36).flatten(1)),
                a=nn.Conv2d(3, 6, 1), b=nn.Linear(36, 2)),
    image(side=6),
    frozen=True,  # a pair of channels goes if either does: two axes of one box
)  # fmt: skip
construct(
    "bilinear",
    lambda: Net(lambda n, x: n.c(torch.tanh(n.pair(torch.tanh(n.a(x)), torch.tanh(n.b(x))))),
                a=nn.Linear(8, 5), b=nn.Linear(8, 6), pair=nn.Bilinear(5, 6, 7), c=nn.Linear(7, 2)),
    vector(8),
)  # fmt: skip
construct(
    "low_rank_update",
    lambda: Net(lambda n, x: n.b(torch.tanh(F.linear(n.a(x), n.base + n.up @ n.down))),
                a=nn.Linear(8, 6), base=parameter(8, 6), up=parameter(8, 4), down=parameter(4, 6), b=nn.Linear(8, 2)),
    tokens(),
)  # fmt: skip
construct(
    "cosine_classifier",
    lambda: Net(lambda n, x: 10 * F.linear(F.normalize(torch.tanh(n.a(x)), dim=-1), F.normalize(n.classes, dim=-1)),
                a=nn.Linear(8, 6), classes=parameter(3, 6)),
    vector(8),
)  # fmt: skip
construct(
    "cosine_similarity",
    lambda: Net(lambda n, x: F.cosine_similarity(n.a(x), n.b(x), dim=-1), a=nn.Linear(8, 6), b=nn.Linear(8, 6)),
    vector(8),
)
construct(
    "distances",
    lambda: Net(
        lambda n, x: torch.cdist(torch.tanh(n.a(x)), n.prototypes), a=nn.Linear(8, 6), prototypes=parameter(3, 6)
    ),
    tokens(),
)


def lazy(width: int, out: int) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer = nn.LazyLinear(out)
    layer(torch.zeros(1, width))
    return layer


construct(
    "lazy_linear",
    lambda: Net(
        lambda n, x: n.c(F.relu(n.b(F.relu(n.a(x)).flatten(1)))), a=nn.Conv2d(3, 6, 3), b=lazy(96, 8), c=nn.Linear(8, 2)
    ),
    image(side=6),
)


# Norms

for name, rank, norm in (
    ("batch_norm1d", 1, lambda: nn.BatchNorm1d(8)),
    ("batch_norm2d", 2, lambda: nn.BatchNorm2d(8)),
    ("batch_norm3d", 3, lambda: nn.BatchNorm3d(8)),
    ("batch_norm_no_affine", 2, lambda: nn.BatchNorm2d(8, affine=False)),
    ("batch_norm_no_statistics", 2, lambda: nn.BatchNorm2d(8, track_running_stats=False)),
    ("batch_norm_cumulative", 2, lambda: nn.BatchNorm2d(8, momentum=None)),
    ("instance_norm", 2, lambda: nn.InstanceNorm2d(8)),
    ("instance_norm_affine", 2, lambda: nn.InstanceNorm2d(8, affine=True)),
    ("instance_norm_statistics", 2, lambda: nn.InstanceNorm2d(8, affine=True, track_running_stats=True)),
    ("instance_norm1d", 1, lambda: nn.InstanceNorm1d(8, affine=True)),
    ("instance_norm3d", 3, lambda: nn.InstanceNorm3d(8, affine=True)),
    ("group_norm_each_channel", 2, lambda: nn.GroupNorm(8, 8)),
):
    construct(name, around(norm, rank), INPUTS[rank])


class FunctionalBatchNorm(nn.Module):
    """Statistics kept by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 1)
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("var", torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(F.batch_norm(self.a(x), self.mean, self.var, training=self.training)))


construct("functional_batch_norm", FunctionalBatchNorm, image(side=6))
construct(
    "batch_norm_over_features",
    lambda: nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2)),
    vector(8),
)


def normed(norm: Any, enter: int = 8) -> Any:
    """A norm over the channels: masking it is not exact, but the layer behind it can go exactly."""
    return lambda: nn.Sequential(
        nn.Conv2d(3, enter, 3), norm(), nn.GELU(), nn.Conv2d(enter, 6, 1), nn.Tanh(), nn.Conv2d(6, 2, 1)
    )


for name, norm in (
    ("group_norm_one", lambda: nn.GroupNorm(1, 8)),
    ("group_norm_two", lambda: nn.GroupNorm(2, 8)),
    ("group_norm_no_affine", lambda: nn.GroupNorm(2, 8, affine=False)),
    ("layer_norm_image", lambda: nn.LayerNorm([8, 4, 4])),
    ("layer_norm_image_no_affine", lambda: nn.LayerNorm([8, 4, 4], elementwise_affine=False)),
    ("local_response_norm", lambda: nn.LocalResponseNorm(3)),
):
    construct(name, normed(norm), image(side=6))
construct("group_norm_alone", around(lambda: nn.GroupNorm(4, 16), 2, 16, 16), image(side=6))
construct("layer_norm_space", around(lambda: nn.LayerNorm([6, 6])), image(side=6))


class RootMeanSquare(nn.Module):
    """RMS norm as Llama writes it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class ChannelNorm(nn.Module):
    """Layer norm over the channels of an image, as ConvNeXt writes it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        u = x.mean(1, keepdim=True)
        s = (x - u).pow(2).mean(1, keepdim=True)
        return self.weight[:, None, None] * ((x - u) / torch.sqrt(s + 1e-6)) + self.bias[:, None, None]


class PermutedLayerNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class LiteralLayerNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain, self.shift = parameter(8), parameter(8)

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (8,), self.gain, self.shift)


construct("channel_norm", normed(lambda: ChannelNorm(8)), image(side=6))
construct("layer_norm_permuted", normed(lambda: PermutedLayerNorm(8)), image(side=6))
construct("normalize_channels", conv_net(lambda x: F.normalize(x, dim=1)), image(side=6))
construct("normalize_space", conv_net(lambda x: F.normalize(x.flatten(2), dim=-1).view_as(x)), image(side=6))
construct("normalize_l1", linear_net(lambda x: F.normalize(x, p=1.0, dim=-1)), tokens())


def normed_tokens(norm: Any) -> Any:
    return lambda: nn.Sequential(nn.Linear(8, 8), norm(), nn.Linear(8, 6), nn.GELU(), nn.Linear(6, 2))


for name, norm in (
    ("layer_norm", lambda: nn.LayerNorm(8)),
    ("layer_norm_no_bias", lambda: nn.LayerNorm(8, bias=False)),
    ("layer_norm_no_affine", lambda: nn.LayerNorm(8, elementwise_affine=False)),
    ("layer_norm_literal", LiteralLayerNorm),
    ("rms_norm", lambda: nn.RMSNorm(8)),
    ("rms_norm_by_hand", lambda: RootMeanSquare(8)),
):
    construct(name, normed_tokens(norm), tokens())
construct("layer_norm_functional_shape", linear_net(lambda x: F.layer_norm(x, x.shape[-1:]), tail=True), tokens())
construct(
    "layer_norm_alone",
    lambda: nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 2)),
    tokens(),
    approximate=True,
)

# Activations

for name, activation in (
    ("prelu", lambda: nn.PReLU()),
    ("prelu_per_channel", lambda: nn.PReLU(8)),
    ("softplus", lambda: nn.Softplus()),
    ("mish", lambda: nn.Mish()),
    ("elu", lambda: nn.ELU()),
    ("hardswish", lambda: nn.Hardswish()),
    ("dropout_none", lambda: nn.Dropout2d(0.0)),
    ("identity", lambda: nn.Identity()),
):
    construct(name, around(activation), image(side=6))
for name, op, reads in (
    ("clamp", lambda x: x.clamp(-0.5, 0.5), 8),
    ("where", lambda x: torch.where(x > 0.1, x, x.new_ones(()) * 0.2), 8),
    ("masked_fill", lambda x: x.masked_fill(x < 0, 0.3), 8),
    ("quick_gelu", lambda x: x * torch.sigmoid(1.702 * x), 8),
    ("maximum", lambda x: torch.maximum(x, -0.1 * x), 8),
    ("threshold", lambda x: F.threshold(x, 0.1, 0.5), 8),
    ("glu", lambda x: F.glu(x, dim=1), 4),
    ("maxout", lambda x: x.view(x.size(0), 4, 2, *x.shape[2:]).amax(2), 4),
    ("crelu", lambda x: torch.cat([F.relu(x), F.relu(-x)], 1), 16),
    ("simple_gate", lambda x: x.chunk(2, dim=1)[0] * x.chunk(2, dim=1)[1], 4),
):
    construct(name, conv_net(op, 8, reads), image(side=6))


class SwiGLU(nn.Module):
    """Llama's: two projections; or one that is split."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        self.up = nn.Linear(8, 16 if fused else 8)
        self.gate = nn.Identity() if fused else nn.Linear(8, 8, bias=False)
        self.down = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.up(x).chunk(2, -1) if self.fused else (self.gate(x), self.up(x))
        return self.down(F.silu(gate) * up)


construct("swiglu", lambda: SwiGLU(fused=False), tokens())
construct("swiglu_fused", lambda: SwiGLU(fused=True), tokens())

# Parametrizations


def old(hook: Any, layer: nn.Module, **options: Any) -> nn.Module:
    """The hooks of ``torch.nn.utils``, which torch calls deprecated."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return hook(layer, **options)


class Symmetric(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight.triu() + weight.triu(1).mT


class Positive(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight.abs()


def positive(layer: nn.Module) -> nn.Module:
    nn.utils.parametrize.register_parametrization(layer, "weight", Positive())
    return layer


for name, middle in (
    ("weight_norm", lambda: parametrizations.weight_norm(nn.Conv2d(8, 8, 3))),
    ("weight_norm_hook", lambda: old(nn.utils.weight_norm, nn.Conv2d(8, 8, 3))),
    ("weight_norm_whole", lambda: parametrizations.weight_norm(nn.Conv2d(8, 8, 3), dim=None)),
    ("spectral_norm", lambda: parametrizations.spectral_norm(nn.Conv2d(8, 8, 3))),
    ("spectral_norm_hook", lambda: old(nn.utils.spectral_norm, nn.Conv2d(8, 8, 3))),
    ("own_parametrization", lambda: positive(nn.Conv2d(8, 8, 3))),
):
    construct(name, around(middle), image(side=6))


def symmetric() -> nn.Module:
    net = nn.Sequential(
        nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2)
    )
    nn.utils.parametrize.register_parametrization(net[2], "weight", Symmetric())
    return net


def orthogonal() -> nn.Module:
    net = nn.Sequential(
        nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)
    )
    parametrizations.orthogonal(net[2], orthogonal_map="cayley")
    return net


construct("symmetric_parametrization", symmetric, tokens())
construct("orthogonal", orthogonal, tokens())

# Shared weights


def tied(swapped: bool) -> nn.Module:
    """Two layers with one weight: one after the other, or side by side."""
    net = nn.Sequential(
        nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2)
    )
    if not swapped:
        net[4].weight = net[2].weight
        return net
    run = lambda n, x: n.out(torch.tanh(n.one(x)) + torch.tanh(n.two(-x)))  # noqa: E731
    pair = Net(run, one=nn.Linear(8, 6), two=nn.Linear(8, 6), out=nn.Linear(6, 2))
    pair.two.weight = pair.one.weight
    return pair


class Autoencoder(nn.Module):
    """The decoder is the encoder's weight, transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 7), nn.Linear(7, 6)
        self.bias = nn.Parameter(torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.second(torch.tanh(self.first(x))))
        return F.linear(torch.tanh(F.linear(h, self.second.weight.t())), self.first.weight.t(), self.bias)


class TiedConv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 8, 3, stride=2)
        self.up = nn.ConvTranspose2d(8, 3, 3, stride=2)
        self.up.weight = self.down.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.up(F.relu(self.down(x)))


def repeated() -> nn.Module:
    """The same layers several times."""

    def run(net: Any, x: Tensor) -> Tensor:
        x = torch.tanh(net.enter(x))
        for _ in range(3):
            x = x + net.norm(torch.tanh(net.again(x)))
        return net.leave(x)

    return Net(
        run,
        enter=nn.Conv2d(3, 6, 1),
        again=nn.Conv2d(6, 6, 3, padding=1),
        norm=nn.BatchNorm2d(6),
        leave=nn.Conv2d(6, 2, 1),
    )


def siamese() -> nn.Module:
    """One trunk for two inputs, compared."""

    def run(net: Any, one: Tensor, two: Tensor) -> Tensor:
        one, two = (torch.tanh(net.b(torch.relu(net.a(x)))) for x in (one, two))
        return net.c(torch.cat([one - two, one * two], -1))

    return Net(run, a=nn.Linear(8, 6), b=nn.Linear(6, 5), c=nn.Linear(10, 2))


construct("tied_linears", lambda: tied(swapped=False), vector(8))
construct("tied_linears_side_by_side", lambda: tied(swapped=True), vector(8))
construct("tied_transposed", Autoencoder, vector(8))
construct("tied_conv_transposed", TiedConv, image(side=7))
construct("called_several_times", repeated, image(side=6))
construct("siamese", siamese, lambda batch: (vector(8)(batch), vector(8)(batch).flip(0)))
