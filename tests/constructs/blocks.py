"""Building blocks of published networks, each between prunable layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from constructs.registry import construct, image, normal, tokens, vector

IMAGE = image(3, 8)
TOKENS = tokens(6, 5)


class Between(nn.Sequential):
    """A block of images, a convolution and a head around it."""

    def __init__(self, *blocks: nn.Module, width: int = 8, out: int | None = None) -> None:
        stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.ReLU())
        super().__init__(stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(out or width, 3))


class BetweenLinear(nn.Sequential):
    """A block of tokens or vectors between two linear layers."""

    def __init__(self, *blocks: nn.Module, width: int = 8, enter: int = 5, out: int | None = None) -> None:
        super().__init__(nn.Linear(enter, width), nn.Tanh(), *blocks, nn.Linear(out or width, 3))


def conv_bn(n_in: int, n_out: int, k: int = 1, s: int = 1, g: int = 1, act: bool = True) -> nn.Sequential:
    layers = [nn.Conv2d(n_in, n_out, k, s, k // 2, groups=g, bias=False), nn.BatchNorm2d(n_out)]
    return nn.Sequential(*layers, nn.ReLU(inplace=True)) if act else nn.Sequential(*layers)


# Residuals


class BasicBlock(nn.Module):
    """ResNet: two convolutions, a shortcut, the sum in place."""

    def __init__(self, n_in: int, n_out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(n_in, n_out, 3, stride, 1, bias=False), nn.BatchNorm2d(n_out)
        self.conv2, self.bn2 = nn.Conv2d(n_out, n_out, 3, 1, 1, bias=False), nn.BatchNorm2d(n_out)
        self.downsample = None
        if stride != 1 or n_in != n_out:
            self.downsample = nn.Sequential(nn.Conv2d(n_in, n_out, 1, stride, bias=False), nn.BatchNorm2d(n_out))

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return F.relu(out)


class Bottleneck(nn.Module):
    """Also ResNeXt, with groups."""

    def __init__(self, width: int = 8, inner: int = 8, groups: int = 1) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv_bn(width, inner), conv_bn(inner, inner, 3, g=groups)
        self.conv3 = conv_bn(inner, width, act=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.conv3(self.conv2(self.conv1(x))))


class PreActivation(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(width), nn.Conv2d(width, 6, 3, padding=1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(6), nn.Conv2d(6, width, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(F.relu(self.bn1(x)))
        return self.conv2(F.relu(self.bn2(out))) + x


class PaddedShortcut(nn.Module):
    """ResNet's option A: the shortcut is sliced and padded with zero channels."""

    def __init__(self, n_in: int = 8, n_out: int = 12) -> None:
        super().__init__()
        self.conv, self.add = nn.Conv2d(n_in, n_out, 3, 2, 1), n_out - n_in

    def forward(self, x: Tensor) -> Tensor:
        pad = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.add // 2, self.add // 2), "constant", 0)
        return F.relu(self.conv(x) + pad)


class DenseLayer(nn.Module):
    def __init__(self, n_in: int, growth: int = 4) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(n_in), nn.Conv2d(n_in, 6, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(6), nn.Conv2d(6, growth, 3, padding=1, bias=False)

    def forward(self, features: list[Tensor]) -> Tensor:
        out = self.conv1(F.relu(self.norm1(torch.cat(features, 1))))
        return self.conv2(F.relu(self.norm2(out)))


class DenseBlock(nn.Module):
    """DenseNet with a transition."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.layers = nn.ModuleList([DenseLayer(width + 4 * i) for i in range(3)])
        self.transition = nn.Sequential(nn.BatchNorm2d(width + 12), nn.ReLU(), nn.Conv2d(width + 12, 8, 1))

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.layers:
            features.append(layer(features))
        return F.avg_pool2d(self.transition(torch.cat(features, 1)), 2)


class DualPath(nn.Module):
    """DPN: some channels are added, the rest are put beside."""

    def __init__(self, width: int = 8, dense: int = 4) -> None:
        super().__init__()
        self.width, self.conv = width, nn.Sequential(conv_bn(width, 6), nn.Conv2d(6, width + dense, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        out, d = self.conv(x), self.width
        return F.relu(torch.cat([x + out[:, :d], out[:, d:]], dim=1))


class RepVGG(nn.Module):
    """Three branches that could be one."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.dense, self.point = conv_bn(width, width, 3, act=False), conv_bn(width, width, 1, act=False)
        self.identity = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.dense(x) + self.point(x) + self.identity(x))


class LayerScale(nn.Module):
    """CaiT: a learned factor per channel, a residual."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 12), nn.Linear(12, width)
        self.gamma = nn.Parameter(torch.rand(width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gamma * self.fc2(F.gelu(self.fc1(x)))


class SkipInit(nn.Module):
    """One learned number for the whole branch; starts from 1 here."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(width, 6, 3, padding=1), nn.Conv2d(6, width, 1)
        self.alpha = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.alpha * self.conv2(F.elu(self.conv1(x)))


class DropPath(nn.Module):
    """Stochastic depth; in training it keeps every sample here."""

    def __init__(self, keep: float = 1.0) -> None:
        super().__init__()
        self.keep = keep

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        shape = (x.shape[0],) + (1,) * (x.ndim - 1)
        mask = torch.floor(self.keep + torch.rand(shape, dtype=x.dtype, device=x.device))
        return x.div(self.keep) * mask


class StochasticDepth(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.body, self.drop = nn.Sequential(conv_bn(width, 6, 3), nn.Conv2d(6, width, 1)), DropPath()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.body(x))


class Highway(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.plain, self.gate = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        gate = torch.sigmoid(self.gate(x))
        return gate * F.relu(self.plain(x)) + (1 - gate) * x


construct("block_basic", lambda: Between(BasicBlock(8, 8)), IMAGE)
construct("block_basic_downsample", lambda: Between(BasicBlock(8, 12, 2), out=12), IMAGE)
construct("block_bottleneck", lambda: Between(Bottleneck(inner=4)), IMAGE)
construct("block_resnext", lambda: Between(Bottleneck(groups=4)), IMAGE)
construct("block_pre_activation", lambda: Between(PreActivation()), IMAGE)
construct("block_padded_shortcut", lambda: Between(PaddedShortcut(), out=12), IMAGE)
construct("block_dense", lambda: Between(DenseBlock()), IMAGE)
construct("block_dual_path", lambda: Between(DualPath(), out=12), IMAGE)
construct("block_repvgg", lambda: Between(RepVGG()), IMAGE)
construct("block_layer_scale", lambda: BetweenLinear(LayerScale()), TOKENS)
construct("block_skip_init", lambda: Between(SkipInit()), IMAGE)
construct("block_stochastic_depth", lambda: Between(StochasticDepth()), IMAGE)
construct("block_highway", lambda: BetweenLinear(Highway()), vector(5))


# Channels that look at channels


class SE(nn.Module):
    """Squeeze and excitation, in the spelling with linear layers or with 1x1 convolutions."""

    def __init__(self, width: int = 8, hidden: int = 4, convs: bool = False) -> None:
        super().__init__()
        self.pool, self.convs = nn.AdaptiveAvgPool2d(1), convs
        self.fc = nn.Sequential(
            *(nn.Conv2d(width, hidden, 1), nn.ReLU(True), nn.Conv2d(hidden, width, 1), nn.Hardsigmoid())
            if convs
            else (nn.Linear(width, hidden, bias=False), nn.ReLU(True), nn.Linear(hidden, width), nn.Sigmoid())
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.convs:
            return x * self.fc(x.mean((2, 3), keepdim=True))
        b, c, _, _ = x.size()
        y = self.pool(x).view(b, c)
        return x * self.fc(y).view(b, c, 1, 1).expand_as(x)


class CBAM(nn.Module):
    """Two pools share an MLP; then mean and maximum over the channels make a map."""

    def __init__(self, width: int = 8, spatial: bool = True) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Conv2d(width, 4, 1, bias=False), nn.ReLU(), nn.Conv2d(4, width, 1, bias=False))
        self.spatial = nn.Conv2d(2, 1, 3, padding=1, bias=False) if spatial else None

    def forward(self, x: Tensor) -> Tensor:
        average, maximum = F.adaptive_avg_pool2d(x, 1), F.adaptive_max_pool2d(x, 1)
        x = x * torch.sigmoid(self.mlp(average) + self.mlp(maximum))
        if self.spatial is None:
            return x
        both = torch.cat([torch.mean(x, dim=1, keepdim=True), torch.max(x, dim=1, keepdim=True)[0]], dim=1)
        return x * torch.sigmoid(self.spatial(both))


class ECA(nn.Module):
    """A convolution along the channels: every channel reads its neighbours."""

    def __init__(self) -> None:
        super().__init__()
        self.pool, self.conv = nn.AdaptiveAvgPool2d(1), nn.Conv1d(1, 1, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(self.pool(x).squeeze(-1).transpose(-1, -2)).transpose(-1, -2).unsqueeze(-1)
        return x * torch.sigmoid(y).expand_as(x)


class ECANet(nn.Module):
    """ECA behind a block of its own, so that something else can go."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.eca = nn.Conv2d(3, 8, 3), nn.Sequential(conv_bn(8, 6, 3), nn.Conv2d(6, 8, 1)), ECA()
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.eca(self.body(self.stem(x))).mean((2, 3)))


class CoordAttention(nn.Module):
    """Pools of rows and of columns share a convolution and part again."""

    def __init__(self, width: int = 8, inner: int = 6) -> None:
        super().__init__()
        self.conv1, self.bn = nn.Conv2d(width, inner, 1), nn.BatchNorm2d(inner)
        self.conv_h, self.conv_w = nn.Conv2d(inner, width, 1), nn.Conv2d(inner, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        _, _, h, w = x.size()
        rows, columns = x.mean(3, keepdim=True), x.mean(2, keepdim=True).permute(0, 1, 3, 2)
        y = F.hardswish(self.bn(self.conv1(torch.cat([rows, columns], dim=2))))
        rows, columns = torch.split(y, [h, w], dim=2)
        return x * self.conv_w(columns.permute(0, 1, 3, 2)).sigmoid() * self.conv_h(rows).sigmoid()


class SelectiveKernel(nn.Module):
    """SKNet: branches stacked, a softmax between them per channel."""

    def __init__(self, width: int = 8, hidden: int = 6) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(width, width, 3, padding=d, dilation=d) for d in (1, 2)])
        self.fc = nn.Linear(width, hidden)
        self.fcs = nn.ModuleList([nn.Linear(hidden, width) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        feats = torch.stack([conv(x) for conv in self.convs], dim=1)
        z = F.relu(self.fc(feats.sum(1).mean(-1).mean(-1)))
        weights = torch.softmax(torch.stack([fc(z) for fc in self.fcs], dim=1), dim=1)
        return (feats * weights[..., None, None]).sum(dim=1)


class SplitAttention(nn.Module):
    """ResNeSt: splits are channel blocks of one grouped convolution."""

    def __init__(self, width: int = 8, radix: int = 2) -> None:
        super().__init__()
        self.radix, self.width = radix, width
        self.conv = nn.Conv2d(width, width * radix, 3, padding=1, groups=radix)
        self.fc1, self.fc2 = nn.Conv2d(width, 6, 1), nn.Conv2d(6, width * radix, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x))
        batch, channels = x.shape[:2]
        splits = torch.split(x, channels // self.radix, dim=1)
        gap = F.adaptive_avg_pool2d(sum(splits), 1)
        atten = F.softmax(self.fc2(F.relu(self.fc1(gap))).view(batch, self.radix, self.width), dim=1)
        atten = torch.split(atten.reshape(batch, -1, 1, 1), channels // self.radix, dim=1)
        return sum(a * s for a, s in zip(atten, splits, strict=True))


class SpatialGate(nn.Module):
    """SCSE: channels and places, the larger of both."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.channel = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(width, 4, 1), nn.ReLU(), nn.Conv2d(4, width, 1))
        self.place = nn.Conv2d(width, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.max(x * self.channel(x).sigmoid(), x * self.place(x).sigmoid())


class AttentionGate(nn.Module):
    """Attention U-Net: a coarse signal gates a skip."""

    def __init__(self) -> None:
        super().__init__()
        self.skip, self.deep = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 10, 3, 2, 1)
        self.w_g, self.w_x, self.psi = nn.Conv2d(10, 6, 1), nn.Conv2d(8, 6, 1), nn.Conv2d(6, 1, 1)
        self.out = nn.Conv2d(18, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.skip(x))
        g = F.interpolate(F.relu(self.deep(x)), scale_factor=2, mode="bilinear", align_corners=False)
        gate = torch.sigmoid(self.psi(F.relu(self.w_g(g) + self.w_x(x))))
        return self.out(torch.cat([x * gate, g], dim=1))


class FeatureNorm(nn.Module):
    """GRN of ConvNeXt-V2."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma, self.beta = nn.Parameter(torch.ones(1, 1, 1, dim)), nn.Parameter(torch.zeros(1, 1, 1, dim))

    def forward(self, x: Tensor) -> Tensor:
        gx = torch.norm(x, p=2, dim=(1, 2), keepdim=True)
        return self.gamma * (x * gx / (gx.mean(dim=-1, keepdim=True) + 1e-6)) + self.beta + x


class ConvNeXt(nn.Module):
    """Depthwise, then an MLP on channels last, with layer scale or GRN."""

    def __init__(self, dim: int = 8, norm: bool = True, grn: bool = False) -> None:
        super().__init__()
        self.dwconv, self.norm = nn.Conv2d(dim, dim, 3, padding=1, groups=dim), nn.LayerNorm(dim) if norm else None
        self.pwconv1, self.act, self.pwconv2 = nn.Linear(dim, 12), nn.GELU(), nn.Linear(12, dim)
        self.grn = FeatureNorm(12) if grn else None
        self.gamma = None if grn else nn.Parameter(torch.rand(dim))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        x = self.dwconv(x).permute(0, 2, 3, 1)
        if self.norm is not None:
            x = self.norm(x)
        x = self.act(self.pwconv1(x))
        if self.grn is not None:
            x = self.grn(x)
        x = self.pwconv2(x)
        if self.gamma is not None:
            x = self.gamma * x
        return shortcut + x.permute(0, 3, 1, 2)


construct("block_se_linear", lambda: Between(SE()), IMAGE)
construct("block_se_conv", lambda: Between(SE(convs=True)), IMAGE)
construct("block_cbam_channel", lambda: Between(CBAM(spatial=False)), IMAGE)
construct("block_cbam", lambda: Between(CBAM()), IMAGE)
construct("block_eca", ECANet, IMAGE)
construct("block_coordinate_attention", lambda: Between(CoordAttention()), IMAGE)
construct("block_selective_kernel", lambda: Between(SelectiveKernel()), IMAGE)
construct("block_split_attention", lambda: Between(SplitAttention()), IMAGE)
construct("block_scse", lambda: Between(SpatialGate()), IMAGE)
construct("block_attention_gate", AttentionGate, IMAGE)
construct("block_convnext", lambda: Between(ConvNeXt()), IMAGE)
construct("block_convnext_no_norm", lambda: Between(ConvNeXt(norm=False)), IMAGE)
construct("block_convnext_grn", lambda: Between(ConvNeXt(norm=False, grn=True)), IMAGE)
construct("block_convnext_norm_grn", lambda: Between(ConvNeXt(grn=True)), IMAGE, approximate=True)


# Split, cat, shuffle


class C2f(nn.Module):
    """YOLOv8: chunk, a chain that keeps everything, cat."""

    def __init__(self, c1: int = 8, c2: int = 8, n: int = 2, split: bool = False) -> None:
        super().__init__()
        self.c, self.split = c2 // 2, split
        self.cv1, self.cv2 = conv_bn(c1, 2 * self.c), conv_bn((2 + n) * self.c, c2)
        self.m = nn.ModuleList(nn.Sequential(conv_bn(self.c, 6, 3), conv_bn(6, self.c, 3)) for _ in range(n))

    def forward(self, x: Tensor) -> Tensor:
        y = list(self.cv1(x).split((self.c, self.c), 1) if self.split else self.cv1(x).chunk(2, 1))
        y.extend(m(y[-1]) for m in self.m)
        return self.cv2(torch.cat(y, 1))


class CSP(nn.Module):
    """YOLOv5's C3: two ways, one of them deep."""

    def __init__(self, width: int = 8, inner: int = 4) -> None:
        super().__init__()
        self.cv1, self.cv2, self.cv3 = conv_bn(width, inner), conv_bn(width, inner), conv_bn(2 * inner, width)
        self.m = nn.Sequential(conv_bn(inner, 6, 3), conv_bn(6, inner, 3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.cv1(x)
        return self.cv3(torch.cat((y + self.m(y), self.cv2(x)), dim=1))


class SPPF(nn.Module):
    """One pool, applied again and again."""

    def __init__(self, width: int = 8, inner: int = 4) -> None:
        super().__init__()
        self.cv1, self.cv2, self.m = conv_bn(width, inner), conv_bn(4 * inner, width), nn.MaxPool2d(3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = [self.cv1(x)]
        y.extend(self.m(y[-1]) for _ in range(3))
        return self.cv2(torch.cat(y, 1))


class Inception(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.branch1 = conv_bn(width, 4)
        self.branch2 = nn.Sequential(conv_bn(width, 3), conv_bn(3, 5, 3))
        self.branch3 = nn.Sequential(conv_bn(width, 3), conv_bn(3, 4, 5))
        self.branch4 = nn.Sequential(nn.MaxPool2d(3, 1, 1, ceil_mode=True), conv_bn(width, 3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.branch1(x), self.branch2(x), self.branch3(x), self.branch4(x)], 1)


class Fire(nn.Module):
    """SqueezeNet."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.squeeze, self.expand1x1, self.expand3x3 = conv_bn(width, 4), nn.Conv2d(4, 6, 1), nn.Conv2d(4, 6, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.squeeze(x)
        return torch.cat([F.relu(self.expand1x1(x)), F.relu(self.expand3x3(x))], 1)


def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    b, c, h, w = x.size()
    x = x.view(b, groups, c // groups, h, w)
    return torch.transpose(x, 1, 2).contiguous().view(b, c, h, w)


class ShuffleUnit(nn.Module):
    """ShuffleNetV2: half of the channels go through, the other half are worked on, then all are shuffled."""

    def __init__(self, width: int = 8, stride: int = 1) -> None:
        super().__init__()
        half = width // 2
        self.stride, n_in = stride, half if stride == 1 else width
        self.branch1 = nn.Sequential(conv_bn(width, width, 3, 2, width, act=False), conv_bn(width, half))
        self.branch2 = nn.Sequential(conv_bn(n_in, half), conv_bn(half, half, 3, stride, half), conv_bn(half, half))
        if stride == 1:
            self.branch1 = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if self.stride == 1:
            x1, x2 = x.chunk(2, dim=1)
            out = torch.cat((x1, self.branch2(x2)), dim=1)
        else:
            out = torch.cat((self.branch1(x), self.branch2(x)), dim=1)
        return channel_shuffle(out, 2)


class ShuffleGroups(nn.Module):
    """ShuffleNetV1: grouped 1x1, shuffle, depthwise, grouped 1x1."""

    def __init__(self, width: int = 8, groups: int = 2) -> None:
        super().__init__()
        self.groups = groups
        self.conv1, self.conv2 = conv_bn(width, 12, g=groups), conv_bn(12, 12, 3, g=12, act=False)
        self.conv3 = conv_bn(12, width, g=groups, act=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.conv3(self.conv2(channel_shuffle(self.conv1(x), self.groups))))


class Ghost(nn.Module):
    """GhostNet: cheap copies; the surplus is cut off."""

    def __init__(self, n_in: int = 8, oup: int = 8, extra: int = 0) -> None:
        super().__init__()
        self.oup, init = oup, (oup + 1 + extra) // 2
        self.primary, self.cheap = conv_bn(n_in, init), conv_bn(init, init, 3, g=init)

    def forward(self, x: Tensor) -> Tensor:
        x1 = self.primary(x)
        return torch.cat([x1, self.cheap(x1)], dim=1)[:, : self.oup, :, :]


class InvertedResidual(nn.Module):
    """MobileNetV2, and V3 with squeeze and excitation and hard swish."""

    def __init__(self, width: int = 8, hidden: int = 12, v3: bool = False) -> None:
        super().__init__()
        act = nn.Hardswish() if v3 else nn.ReLU6()
        depthwise = [*conv_bn(hidden, hidden, 3, g=hidden, act=False), act]
        squeeze = [SE(hidden, 4, convs=True)] if v3 else []
        self.conv = nn.Sequential(
            *conv_bn(width, hidden, act=False), act, *depthwise, *squeeze, *conv_bn(hidden, width, act=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x)


class Res2Net(nn.Module):
    """Splits that feed each other."""

    def __init__(self, width: int = 8, scale: int = 4, inner: int = 12) -> None:
        super().__init__()
        self.width = inner // scale
        self.conv1, self.conv3 = conv_bn(width, inner), conv_bn(inner, width, act=False)
        self.convs = nn.ModuleList([conv_bn(self.width, self.width, 3) for _ in range(scale - 1)])

    def forward(self, x: Tensor) -> Tensor:
        spx, outs = torch.split(self.conv1(x), self.width, 1), []
        for i, conv in enumerate(self.convs):
            outs.append(conv(spx[i] if i == 0 else outs[-1] + spx[i]))
        return F.relu(self.conv3(torch.cat((*outs, spx[-1]), 1)) + x)


class Octave(nn.Module):
    """High and low frequencies exchange."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.to_high, self.to_low = nn.Conv2d(width, 6, 3, 1, 1), nn.Conv2d(width, 4, 3, 1, 1)
        self.hh, self.hl = nn.Conv2d(6, 6, 3, 1, 1), nn.Conv2d(6, 4, 3, 1, 1)
        self.lh, self.ll = nn.Conv2d(4, 6, 3, 1, 1), nn.Conv2d(4, 4, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        high, low = self.to_high(x), self.to_low(F.avg_pool2d(x, 2))
        up = F.interpolate(self.lh(low), scale_factor=2, mode="nearest")
        high, low = self.hh(high) + up, self.ll(low) + self.hl(F.avg_pool2d(high, 2))
        return torch.cat([F.relu(high), F.interpolate(F.relu(low), scale_factor=2)], 1)


class PartialConv(nn.Module):
    """FasterNet: only the first channels are convolved; in place or with cat."""

    def __init__(self, width: int = 8, inplace: bool = False) -> None:
        super().__init__()
        self.part, self.inplace = width // 4, inplace
        self.conv, self.mlp = nn.Conv2d(self.part, self.part, 3, padding=1, bias=False), conv_bn(width, 12)
        self.out = nn.Conv2d(12, width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.inplace:
            y = x.clone()
            y[:, : self.part] = self.conv(x[:, : self.part])
        else:
            x1, x2 = torch.split(x, [self.part, x.size(1) - self.part], dim=1)
            y = torch.cat((self.conv(x1), x2), 1)
        return x + self.out(self.mlp(y))


class MixConv(nn.Module):
    """Chunks with kernels of different sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.splits = [4, 3, 1]
        self.convs = nn.ModuleList(
            [nn.Conv2d(c, c, k, padding=k // 2, groups=c) for c, k in zip(self.splits, (1, 3, 5), strict=True)]
        )

    def forward(self, x: Tensor) -> Tensor:
        parts = torch.split(x, self.splits, 1)
        return torch.cat([conv(part) for conv, part in zip(self.convs, parts, strict=True)], 1)


class CReLU(nn.Module):
    """A value and its negative side by side."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([F.relu(x), F.relu(-x)], 1)


construct("block_c2f", lambda: Between(C2f()), IMAGE)
construct("block_c2f_split", lambda: Between(C2f(split=True)), IMAGE)
construct("block_csp", lambda: Between(CSP()), IMAGE)
construct("block_sppf", lambda: Between(SPPF()), IMAGE)
construct("block_inception", lambda: Between(Inception(), out=16), IMAGE)
construct("block_fire", lambda: Between(Fire(), out=12), IMAGE)
construct("block_shuffle_v2", lambda: Between(ShuffleUnit()), IMAGE)
construct("block_shuffle_v2_down", lambda: Between(ShuffleUnit(stride=2)), IMAGE)
construct("block_shuffle_v1", lambda: Between(ShuffleGroups()), IMAGE)
construct("block_ghost", lambda: Between(Ghost()), IMAGE)
construct("block_ghost_cut", lambda: Between(Ghost(oup=7, extra=2), out=7), IMAGE)
construct("block_mobile_v2", lambda: Between(InvertedResidual()), IMAGE)
construct("block_mobile_v3", lambda: Between(InvertedResidual(v3=True)), IMAGE)
construct("block_res2net", lambda: Between(Res2Net()), IMAGE)
construct("block_octave", lambda: Between(Octave(), out=10), IMAGE)
construct("block_partial_conv", lambda: Between(PartialConv()), IMAGE)
construct("block_partial_conv_in_place", lambda: Between(PartialConv(inplace=True)), IMAGE)
construct("block_mix_conv", lambda: Between(MixConv()), IMAGE)
construct("block_crelu", lambda: Between(CReLU(), out=16), IMAGE)


# Several scales


class UNet(nn.Module):
    """Down, up by a transposed convolution or by interpolation, a skip."""

    def __init__(self, bilinear: bool = False) -> None:
        super().__init__()
        self.inc, self.down = conv_bn(3, 6, 3), nn.Sequential(nn.MaxPool2d(2), conv_bn(6, 10, 3))
        self.up = nn.ConvTranspose2d(10, 5, 2, 2)
        if bilinear:
            self.up = nn.Sequential(nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(10, 5, 1))
        self.conv, self.outc = conv_bn(11, 6, 3), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.inc(x)
        x = self.up(self.down(skip))
        dy, dx = skip.size(2) - x.size(2), skip.size(3) - x.size(3)
        x = F.pad(x, [dx // 2, dx - dx // 2, dy // 2, dy - dy // 2])
        return self.outc(self.conv(torch.cat([skip, x], dim=1)))


class FPN(nn.Module):
    """Laterals meet the level above; all levels are outputs."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.c1, self.c2, self.c3 = conv_bn(3, 6, 3), conv_bn(6, 8, 3, 2), conv_bn(8, 10, 3, 2)
        self.inner = nn.ModuleList([nn.Conv2d(c, width, 1) for c in (6, 8, 10)])
        self.layer = nn.ModuleList([nn.Conv2d(width, 4, 3, padding=1) for _ in range(3)])

    def forward(self, x: Tensor) -> list[Tensor]:
        levels = [self.c1(x)]
        levels += [self.c2(levels[0])]
        levels += [self.c3(levels[1])]
        last = self.inner[2](levels[2])
        out = [self.layer[2](last)]
        for i in (1, 0):
            lateral = self.inner[i](levels[i])
            last = lateral + F.interpolate(last, size=lateral.shape[-2:], mode="nearest")
            out.insert(0, self.layer[i](last))
        return out


class BiFPN(nn.Module):
    """Levels are added with learned positive weights."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.low, self.high = conv_bn(3, width, 3), conv_bn(width, width, 3, 2)
        self.w, self.conv = nn.Parameter(torch.ones(2)), conv_bn(width, width, 3)
        self.head = nn.Conv2d(width, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        low = self.low(x)
        w = F.relu(self.w)
        weight = w / (torch.sum(w, dim=0) + 1e-4)
        return self.head(self.conv(weight[0] * low + weight[1] * F.interpolate(self.high(low), scale_factor=2)))


class ASPP(nn.Module):
    """Dilated convolutions and the pooled image side by side."""

    def __init__(self, width: int = 8, out: int = 6) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(width, out, 1)])
        self.convs.extend([nn.Conv2d(width, out, 3, padding=d, dilation=d, bias=False) for d in (2, 3)])
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(width, out, 1, bias=False), nn.ReLU())
        self.project = conv_bn(4 * out, width)

    def forward(self, x: Tensor) -> Tensor:
        res = [F.relu(conv(x)) for conv in self.convs]
        res.append(F.interpolate(self.pool(x), size=x.shape[-2:], mode="bilinear", align_corners=False))
        return self.project(torch.cat(res, dim=1))


class PPM(nn.Module):
    """PSPNet: the image pooled to several grids, beside itself."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.features = nn.ModuleList(
            [nn.Sequential(nn.AdaptiveAvgPool2d(bin), nn.Conv2d(width, 4, 1), nn.ReLU()) for bin in (1, 2)]
        )

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[2:]
        return torch.cat([x] + [F.interpolate(f(x), size, mode="bilinear") for f in self.features], 1)


class SPP(nn.Module):
    """He et al.: pools of several sizes, flattened."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = conv_bn(3, 6, 3), nn.Linear(6 * (1 + 4 + 16), 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.fc(torch.cat([F.adaptive_max_pool2d(x, n).view(x.size(0), -1) for n in (1, 2, 4)], 1))


class Hypercolumn(nn.Module):
    """All depths, as large as the image."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.c2, self.c3 = nn.Conv2d(3, 4, 3, 1, 1), nn.Conv2d(4, 6, 3, 2, 1), nn.Conv2d(6, 8, 3, 2, 1)
        self.classify = nn.Sequential(nn.Conv2d(18, 8, 1), nn.ReLU(), nn.Conv2d(8, 2, 1))

    def forward(self, x: Tensor) -> Tensor:
        size, maps = x.shape[2:], []
        for conv in (self.c1, self.c2, self.c3):
            x = F.relu(conv(x))
            maps.append(F.interpolate(x, size=size, mode="bilinear", align_corners=True))
        return self.classify(torch.cat(maps, 1))


class DeepSupervision(nn.Module):
    """Heads at every depth, in training only."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv_bn(3, 8, 3), conv_bn(8, 10, 3, 2)
        self.head_a, self.head_b = nn.Conv2d(8, 2, 1), nn.Conv2d(10, 2, 1)

    def forward(self, x: Tensor) -> Any:
        a = self.a(x)
        main = F.interpolate(self.head_b(self.b(a)), size=x.shape[2:], mode="bilinear")
        return {"out": main, "aux": self.head_a(a)} if self.training else {"out": main}


class Detect(nn.Module):
    """YOLO: boxes and classes of every scale in one convolution, taken apart."""

    def __init__(self, nc: int = 3, anchors: int = 2) -> None:
        super().__init__()
        self.no, self.na = nc + 5, anchors
        self.a, self.b = conv_bn(3, 6, 3, 2), conv_bn(6, 10, 3, 2)
        self.m = nn.ModuleList(nn.Conv2d(c, self.no * self.na, 1) for c in (6, 10))

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        z = []
        for conv, level in zip(self.m, (a, self.b(a)), strict=True):
            bs, _, ny, nx = level.shape
            p = conv(level).view(bs, self.na, self.no, ny, nx).permute(0, 1, 3, 4, 2).contiguous()
            xy, wh, conf = p.sigmoid().split((2, 2, self.no - 4), 4)
            z.append(torch.cat((xy * 2, (wh * 2) ** 2, conf), 4).view(bs, self.na * nx * ny, self.no))
        return torch.cat(z, 1)


class SharedHead(nn.Module):
    """RetinaNet: one head for all scales."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv_bn(3, 8, 3), conv_bn(8, 8, 3, 2)
        self.tower = nn.Sequential(nn.Conv2d(8, 6, 3, 1, 1), nn.ReLU(), nn.Conv2d(6, 2 * 3, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        outs = []
        for level in (a, self.b(a)):
            y = self.tower(level)
            n, _, h, w = y.shape
            outs.append(y.view(n, -1, 3, h, w).permute(0, 3, 4, 1, 2).reshape(n, -1, 3))
        return torch.cat(outs, dim=1)


class PixelShuffleUp(nn.Module):
    """ESPCN: space from channels."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.expand, self.up, self.out = nn.Conv2d(width, 24, 3, padding=1), nn.PixelShuffle(2), nn.Conv2d(6, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(self.up(self.expand(x))))


class Focus(nn.Module):
    """YOLOv5: channels from space."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.conv = conv_bn(4 * width, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(torch.cat((x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]), 1))


construct("scales_unet", UNet, IMAGE)
construct("scales_unet_bilinear", lambda: UNet(True), IMAGE)
construct("scales_fpn", FPN, IMAGE)
construct("scales_bifpn", BiFPN, IMAGE)
construct("scales_aspp", lambda: Between(ASPP()), IMAGE)
construct("scales_ppm", lambda: Between(PPM(), out=16), IMAGE)
construct("scales_spp", SPP, IMAGE)
construct("scales_hypercolumn", Hypercolumn, IMAGE)
construct("scales_deep_supervision", DeepSupervision, IMAGE)
construct("scales_detect", Detect, IMAGE)
construct("scales_shared_head", SharedHead, IMAGE)
construct("scales_pixel_shuffle", lambda: Between(PixelShuffleUp()), IMAGE)
construct("scales_focus", lambda: Between(Focus()), IMAGE)


# Tokens and vectors


class PatchEmbed(nn.Module):
    """ViT: a strided convolution becomes tokens, or patches are cut by view or by unfold."""

    def __init__(self, how: str, dim: int = 8, patch: int = 4) -> None:
        super().__init__()
        self.how, self.patch = how, patch
        self.proj = nn.Conv2d(6, dim, patch, patch) if how == "conv" else nn.Linear(6 * patch * patch, dim)
        self.stem, self.fc1, self.fc2 = nn.Conv2d(3, 6, 1), nn.Linear(dim, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        x, p = F.relu(self.stem(x)), self.patch
        if self.how == "conv":
            x = self.proj(x).flatten(2).transpose(1, 2)
        elif self.how == "view":
            b, c, h, w = x.shape
            x = x.view(b, c, h // p, p, w // p, p).permute(0, 2, 4, 3, 5, 1)
            x = self.proj(x.reshape(b, (h // p) * (w // p), p * p * c))
        else:
            x = self.proj(F.unfold(x, p, stride=p).transpose(1, 2))
        return self.fc2(F.gelu(self.fc1(x))).mean(1)


class PatchMerging(nn.Module):
    """Swin: every second row and column, four of them side by side."""

    def __init__(self, dim: int = 8, norm: bool = False) -> None:
        super().__init__()
        self.dim, self.norm = dim, nn.LayerNorm(4 * dim) if norm else nn.Identity()
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        B, H, W, C = x.shape
        parts = [x[:, 0::2, 0::2, :], x[:, 1::2, 0::2, :], x[:, 0::2, 1::2, :], x[:, 1::2, 1::2, :]]
        x = torch.cat(parts, -1).view(B, -1, 4 * C)
        return self.reduction(self.norm(x)).view(B, H // 2, W // 2, -1).permute(0, 3, 1, 2)


class Mixer(nn.Module):
    """Mixes tokens, then channels."""

    def __init__(self, dim: int = 8, length: int = 6, norm: bool = True) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(dim) if norm else nn.Identity() for _ in range(2))
        self.tokens = nn.Sequential(nn.Linear(length, 7), nn.GELU(), nn.Linear(7, length))
        self.channels = nn.Sequential(nn.Linear(dim, 12), nn.GELU(), nn.Linear(12, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm2(x))


class SpatialGating(nn.Module):
    """gMLP: one half gates the other, along the length."""

    def __init__(self, dim: int = 8, ffn: int = 12, length: int = 6, norm: bool = True) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(dim, ffn), nn.Linear(ffn // 2, dim)
        self.norm = nn.LayerNorm(ffn // 2) if norm else nn.Identity()
        self.spatial = nn.Conv1d(length, length, 1)

    def forward(self, x: Tensor) -> Tensor:
        u, v = F.gelu(self.enter(x)).chunk(2, dim=-1)
        return x + self.leave(u * self.spatial(self.norm(v)))


class GLU(nn.Module):
    """SwiGLU with one matrix or two, or F.glu."""

    def __init__(self, how: str, dim: int = 8, hidden: int = 10) -> None:
        super().__init__()
        self.how, self.hidden = how, hidden
        self.w1 = nn.Linear(dim, hidden if how == "two" else 2 * hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)
        if how == "two":
            self.w3 = nn.Linear(dim, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "two":
            return x + self.w2(F.silu(self.w1(x)) * self.w3(x))
        if self.how == "glu":
            return x + self.w2(F.glu(self.w1(x)))
        gate, up = self.w1(x).split(self.hidden, dim=-1) if self.how == "split" else self.w1(x).chunk(2, dim=-1)
        return x + self.w2(F.silu(gate) * up)


class InterleavedGLU(nn.Module):
    """Gates and values take turns (gpt-oss)."""

    def __init__(self, dim: int = 8, hidden: int = 6) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(dim, 2 * hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        gate, value = y[..., ::2], y[..., 1::2]
        return x + self.down((value + 1) * gate * torch.sigmoid(1.7 * gate))


class Maxout(nn.Module):
    """The largest of several pieces, along a view."""

    def __init__(self, n_in: int = 8, n_out: int = 6, pieces: int = 2) -> None:
        super().__init__()
        self.n_out, self.pieces, self.lin = n_out, pieces, nn.Linear(n_in, n_out * pieces)

    def forward(self, x: Tensor) -> Tensor:
        y = self.lin(x).view(*x.shape[:-1], self.n_out, self.pieces)
        return y.max(dim=-1)[0]


class FiLM(nn.Module):
    """A condition scales and shifts channels."""

    def __init__(self, zipped: bool = False) -> None:
        super().__init__()
        self.zipped = zipped
        self.conv1, self.bn, self.conv2 = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, affine=False), nn.Conv2d(8, 2, 1)
        self.gamma, self.beta, self.both = nn.Linear(5, 8), nn.Linear(5, 8), nn.Linear(5, 16)
        if zipped:
            del self.gamma, self.beta
        else:
            del self.both

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        x = self.bn(self.conv1(x))
        if self.zipped:
            scale, shift = self.both(F.silu(condition))[:, :, None, None].chunk(2, dim=1)
            return self.conv2(F.silu(x * (scale + 1) + shift))
        gamma, beta = self.gamma(condition).unsqueeze(2).unsqueeze(3), self.beta(condition)[..., None, None]
        return self.conv2(F.relu(gamma * x + beta))


class TimeEmbedding(nn.Module):
    """Diffusion: a sinusoidal time, an MLP, added to the channels."""

    def __init__(self, dim: int = 6) -> None:
        super().__init__()
        self.dim, self.mlp = dim, nn.Sequential(nn.Linear(dim, 10), nn.SiLU(), nn.Linear(10, 8))
        self.conv1, self.norm, self.conv2 = nn.Conv2d(3, 8, 3, 1, 1), nn.GroupNorm(4, 8), nn.Conv2d(8, 3, 3, 1, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        half = self.dim // 2
        freqs = torch.exp(-torch.arange(half, device=t.device) / half * 4.0)
        args = t[:, None] * freqs[None, :]
        emb = self.mlp(torch.cat((args.sin(), args.cos()), dim=-1).to(x.dtype))
        return self.conv2(F.silu(self.norm(self.conv1(x)) + emb[:, :, None, None]))


class AdaLN(nn.Module):
    """DiT: six chunks of one layer shift, scale and gate."""

    def __init__(self, dim: int = 8) -> None:
        super().__init__()
        self.x, self.c, self.head = nn.Linear(5, dim), nn.Linear(4, 6), nn.Linear(dim, 3)
        self.norm1, self.norm2 = (nn.LayerNorm(dim, elementwise_affine=False) for _ in range(2))
        self.mix, self.mlp = nn.Linear(dim, dim), nn.Sequential(nn.Linear(dim, 12), nn.GELU(), nn.Linear(12, dim))
        self.ada = nn.Sequential(nn.SiLU(), nn.Linear(6, 6 * dim))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        x = self.x(x)
        s1, b1, g1, s2, b2, g2 = self.ada(self.c(c)).chunk(6, dim=1)
        x = x + g1.unsqueeze(1) * self.mix(self.norm1(x) * (1 + s1.unsqueeze(1)) + b1.unsqueeze(1))
        return self.head(x + g2.unsqueeze(1) * self.mlp(self.norm2(x) * (1 + s2.unsqueeze(1)) + b2.unsqueeze(1)))


for _how in ("conv", "view", "unfold"):
    construct(f"tokens_patch_{_how}", lambda how=_how: PatchEmbed(how), IMAGE)
construct("tokens_patch_merging", lambda: Between(PatchMerging(), out=16), IMAGE)
construct("tokens_patch_merging_norm", lambda: Between(PatchMerging(norm=True), out=16), IMAGE)
construct("tokens_mixer", lambda: BetweenLinear(Mixer()), TOKENS)
construct("tokens_mixer_no_norm", lambda: BetweenLinear(Mixer(norm=False)), TOKENS)
construct("tokens_spatial_gating", lambda: BetweenLinear(SpatialGating()), TOKENS)
construct("tokens_spatial_gating_no_norm", lambda: BetweenLinear(SpatialGating(norm=False)), TOKENS)
for _how in ("two", "glu", "split", "chunk"):
    construct(f"tokens_glu_{_how}", lambda how=_how: BetweenLinear(GLU(how)), TOKENS)
construct("tokens_glu_interleaved", lambda: BetweenLinear(InterleavedGLU()), TOKENS)
construct("vector_maxout", lambda: BetweenLinear(Maxout(), out=6), vector(5))
CONDITIONED = lambda batch: (normal(batch, 3, 8, 8), normal(batch, 5, seed=1))  # noqa: E731
construct("condition_film", FiLM, CONDITIONED)
construct("condition_film_chunk", lambda: FiLM(True), CONDITIONED)
construct("condition_time", TimeEmbedding, lambda batch: (normal(batch, 3, 8, 8), torch.arange(batch) * 3))
construct("condition_ada_ln", AdaLN, lambda batch: (normal(batch, 6, 5), normal(batch, 4)))


# Experts


class MoE(nn.Module):
    """All experts answer; a softmax weighs them, in one of several spellings."""

    def __init__(self, how: str, dim: int = 8, n_experts: int = 3) -> None:
        super().__init__()
        self.how, self.gate = how, nn.Linear(dim, n_experts)
        self.experts = nn.ModuleList(
            [nn.Sequential(nn.Linear(dim, 6), nn.ReLU(), nn.Linear(6, dim)) for _ in range(n_experts)]
        )

    def forward(self, x: Tensor) -> Tensor:
        weights = F.softmax(self.gate(x), dim=-1)
        if self.how == "loop":
            return sum(weights[..., i : i + 1] * expert(x) for i, expert in enumerate(self.experts))
        if self.how == "einsum":
            return torch.einsum("bne,bned->bnd", weights, torch.stack([e(x) for e in self.experts], dim=2))
        outs = torch.stack([expert(x) for expert in self.experts], dim=-1)
        return (outs * weights.unsqueeze(-2)).sum(-1)


class BatchedExperts(nn.Module):
    """Experts are a dimension of two parameters; a batched product."""

    def __init__(self, dim: int = 8, n_experts: int = 3, hidden: int = 6) -> None:
        super().__init__()
        self.router = nn.Linear(dim, n_experts, bias=False)
        self.w_in = nn.Parameter(torch.randn(n_experts, dim, hidden) / 3)
        self.w_out = nn.Parameter(torch.randn(n_experts, hidden, dim) / 3)

    def forward(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        flat = x.reshape(1, b * n, d).expand(self.w_in.size(0), -1, -1)
        out = torch.bmm(F.silu(torch.bmm(flat, self.w_in)), self.w_out)
        return (out * self.router(x).sigmoid().view(b * n, -1).t().unsqueeze(-1)).sum(0).view(b, n, d)


class EinsumExperts(nn.Module):
    """The same by einsum, which lays experts and hidden features side by side in one dimension and takes them apart."""

    SHAPES = {"edh": (3, 8, 6), "ehd": (3, 6, 8), "dhe": (8, 6, 3)}

    def __init__(self, how: str, best: int = 3) -> None:
        super().__init__()
        self.how, self.best, self.gate = how, best, nn.Linear(8, 3)
        self.w_in = nn.Parameter(torch.randn(self.SHAPES[how]) / 3)
        self.b_in = nn.Parameter(torch.randn(3, 6) / 3)
        self.w_out = nn.Parameter(torch.randn(3, 6, 8) / 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(torch.einsum(f"bnd,{self.how}->bneh", x, self.w_in) + self.b_in)
        weights = self.gate(x).softmax(-1)
        if self.best < 3:
            chosen, which = weights.topk(self.best, -1)
            weights = torch.zeros_like(weights).scatter(-1, which, chosen)
        return torch.einsum("bneh,ehd,bne->bnd", hidden, self.w_out, weights)


class SwitchRouting(nn.Module):
    """The best expert alone, by argmax; each computes its own tokens."""

    def __init__(self, dim: int = 8, n_experts: int = 3) -> None:
        super().__init__()
        self.switch = nn.Linear(dim, n_experts)
        self.experts = nn.ModuleList(
            [nn.Sequential(nn.Linear(dim, 6), nn.ReLU(), nn.Linear(6, dim)) for _ in range(n_experts)]
        )

    def forward(self, x: Tensor) -> Tensor:
        flat = x.view(-1, x.size(-1))
        best, route = torch.softmax(self.switch(flat), dim=-1).max(dim=-1)
        out = flat.new_zeros(flat.shape)
        for i, expert in enumerate(self.experts):
            index = torch.eq(route, i).nonzero(as_tuple=True)[0]
            out[index] = expert(flat[index])
        return (out * best.view(-1, 1)).view(x.shape)


class TopK(nn.Module):
    """Mixtral: two of three experts, added where they belong."""

    def __init__(self, dim: int = 8, n_experts: int = 3, top_k: int = 2) -> None:
        super().__init__()
        self.num_experts, self.top_k, self.gate = n_experts, top_k, nn.Linear(dim, n_experts, bias=False)
        self.experts = nn.ModuleList([GLU("two", dim, 6) for _ in range(n_experts)])

    def forward(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        flat = x.view(-1, d)
        weights, chosen = torch.topk(F.softmax(self.gate(flat), dim=1), self.top_k, dim=-1)
        weights = weights / weights.sum(dim=-1, keepdim=True)
        out = torch.zeros((b * n, d), dtype=x.dtype, device=x.device)
        mask = F.one_hot(chosen, num_classes=self.num_experts).permute(2, 1, 0)
        for i, expert in enumerate(self.experts):
            rank, token = torch.where(mask[i])
            out.index_add_(0, token, expert(flat[token]) * weights[token, rank, None])
        return out.reshape(b, n, d)


class HardGate(nn.Module):
    """One-hot of the argmax weighs the stacked experts."""

    def __init__(self, dim: int = 8) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(dim, 2), nn.ModuleList([nn.Linear(dim, 6) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        choice = F.one_hot(self.gate(x).argmax(-1), 2).to(x.dtype)
        outs = torch.stack([expert(x) for expert in self.experts], dim=1)
        return torch.relu(torch.sum(choice.unsqueeze(-1) * outs, dim=1))


class MultiTask(nn.Module):
    """MMoE: a gate and a tower per task."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(5, 8) for _ in range(3)])
        self.gates = nn.ModuleList([nn.Linear(5, 3) for _ in range(2)])
        self.towers = nn.ModuleList([nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 1)) for _ in range(2)])

    def forward(self, x: Tensor) -> list[Tensor]:
        experts = torch.stack([F.relu(e(x)) for e in self.experts], dim=1)
        mixed = [torch.matmul(gate(x).softmax(-1).unsqueeze(1), experts).squeeze(1) for gate in self.gates]
        return [tower(m) for tower, m in zip(self.towers, mixed, strict=True)]


for _how in ("loop", "einsum", "stack"):
    construct(f"experts_{_how}", lambda how=_how: BetweenLinear(MoE(how)), TOKENS)
construct("experts_batched", lambda: BetweenLinear(BatchedExperts()), TOKENS)
for _how in EinsumExperts.SHAPES:
    construct(f"experts_einsum_{_how}", lambda how=_how: BetweenLinear(EinsumExperts(how)), TOKENS)
    construct(f"experts_einsum_{_how}_best", lambda how=_how: BetweenLinear(EinsumExperts(how, 2)), TOKENS)
construct("experts_switch", lambda: BetweenLinear(SwitchRouting()), TOKENS)
construct("experts_top_k", lambda: BetweenLinear(TopK()), TOKENS)
construct("experts_hard_gate", lambda: BetweenLinear(HardGate(), out=6), vector(5))
construct("experts_multi_task", MultiTask, vector(5))


# Codes and pairs


class AutoEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 4 * 4, 6))
        self.decoder_input = nn.Linear(6, 8 * 4 * 4)
        self.decoder = nn.ConvTranspose2d(8, 3, 3, 2, 1, output_padding=1)

    def forward(self, x: Tensor) -> Tensor:
        z = self.encoder(x)
        return self.decoder(F.relu(self.decoder_input(z)).view(-1, 8, 4, 4))


class VAE(nn.Module):
    """Mean and variance from one layer; noise in training, here from a generator of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.stats = nn.Linear(6, 10), nn.Linear(10, 2 * 5)
        self.decoder = nn.Sequential(nn.Linear(5, 10), nn.ReLU(), nn.Linear(10, 6))

    def reparameterize(self, mu: Tensor, logvar: Tensor) -> Tensor:
        if not self.training:
            return mu
        return mu + normal(1) * torch.exp(0.5 * logvar)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mu, logvar = self.stats(F.relu(self.encoder(x))).chunk(2, dim=-1)
        kl = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp(), dim=1)
        return self.decoder(self.reparameterize(mu, logvar)), kl


class VQ(nn.Module):
    """The nearest code, passed straight through."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.codes = nn.Linear(5, 8), nn.Embedding(7, 8)
        self.decoder = nn.Sequential(nn.Linear(8, 10), nn.ReLU(), nn.Linear(10, 5))

    def forward(self, x: Tensor) -> Tensor:
        z = self.encoder(x)
        flat = z.view(-1, z.size(-1))
        table = self.codes.weight
        distance = flat.pow(2).sum(1, keepdim=True) - 2 * flat @ table.t() + table.pow(2).sum(1)
        q = self.codes(distance.argmin(1)).view_as(z)
        return self.decoder(z + (q - z).detach())


class Siamese(nn.Module):
    """Two images, one trunk, a difference or an angle."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.trunk = how, nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.embed, self.out = nn.Linear(6, 8), nn.Linear(8, 1)
        if how not in ("difference", "product"):
            del self.out

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        a, b = self.embed(self.trunk(a)), self.embed(self.trunk(b))
        if self.how == "difference":
            return torch.sigmoid(self.out(torch.abs(a - b)))
        if self.how == "product":
            return self.out(a * b)
        if self.how == "cosine":
            return F.cosine_similarity(a, b)
        if self.how == "clip":
            a, b = a / a.norm(dim=-1, keepdim=True), b / b.norm(dim=-1, keepdim=True)
            return a @ b.t() * 3.0
        return F.pairwise_distance(a, b)


class Triplet(nn.Module):
    """Unit vectors of three images."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 4))

    def forward(self, anchor: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        a, p, n = (F.normalize(self.embed(x), p=2, dim=1) for x in (anchor, positive, negative))
        return F.triplet_margin_loss(a, p, n, margin=1.0, reduction="none")


class Prototypes(nn.Module):
    """Distances to learned prototypes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.prototypes = nn.Linear(6, 8), nn.Parameter(torch.randn(3, 8))

    def forward(self, x: Tensor) -> Tensor:
        return -(torch.cdist(torch.tanh(self.embed(x)), self.prototypes) ** 2)


class CosineHead(nn.Module):
    """ArcFace: unit features meet unit weights."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(6, 10), nn.Linear(10, 8)
        self.weight = nn.Parameter(torch.randn(3, 8))

    def forward(self, x: Tensor) -> Tensor:
        return 8 * F.linear(F.normalize(self.fc2(F.relu(self.fc1(x)))), F.normalize(self.weight))


IMAGES = lambda batch: (normal(batch, 3, 8, 8), normal(batch, 3, 8, 8, seed=1))  # noqa: E731
construct("codes_autoencoder", AutoEncoder, IMAGE)
construct("codes_vae", VAE, vector(6))
construct("codes_vq", VQ, TOKENS)
for _how in ("difference", "product", "cosine", "clip", "distance"):
    construct(f"pairs_{_how}", lambda how=_how: Siamese(how), IMAGES)
construct("pairs_triplet", Triplet, lambda batch: tuple(normal(batch, 6, seed=i) for i in range(3)))
construct("pairs_prototypes", Prototypes, vector(6))
construct("pairs_cosine_head", CosineHead, vector(6))


# Weights that are computed


class WSConv(nn.Conv2d):
    """Weight standardisation in the forward (NFNet)."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.gain = nn.Parameter(torch.ones(self.out_channels, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        mean = self.weight.mean(dim=(1, 2, 3), keepdim=True)
        var = self.weight.var(dim=(1, 2, 3), keepdim=True)
        weight = (self.weight - mean) / torch.sqrt(var * self.weight[0].numel() + 1e-4) * self.gain
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class NFBlock(nn.Module):
    def __init__(self, width: int = 8, conv: type[nn.Conv2d] = WSConv) -> None:
        super().__init__()
        self.conv1, self.conv2 = WSConv(width, 6, 3, padding=1), conv(6, width, 1)
        self.skip_gain = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv2(F.gelu(self.conv1(F.gelu(x) * 1.7 / 1.1)) * 1.7)
        return out * self.skip_gain * 0.2 + x


class MaskedConv(nn.Conv2d):
    """PixelCNN: a buffer hides half of the kernel; written into the weight, or multiplied."""

    def __init__(self, *args: Any, write: bool = False, **options: Any) -> None:
        super().__init__(*args, **options)
        self.write = write
        mask = torch.ones_like(self.weight)
        mask[:, :, self.kernel_size[0] // 2, self.kernel_size[1] // 2 + 1 :] = 0
        mask[:, :, self.kernel_size[0] // 2 + 1 :] = 0
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        if self.write:
            self.weight.data *= self.mask
            return super().forward(x)
        return F.conv2d(x, self.weight * self.mask, self.bias, self.stride, self.padding)


class MaskedLinear(nn.Linear):
    """MADE: units see units of lower degree only."""

    def __init__(self, n_in: int, n_out: int, mask: Tensor) -> None:
        super().__init__(n_in, n_out)
        self.register_buffer("mask", mask.t())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.mask * self.weight, self.bias)


class MADE(nn.Module):
    def __init__(self, n: int = 6, hidden: int = 10) -> None:
        super().__init__()
        first, between = torch.arange(n), torch.arange(hidden) % (n - 1)
        self.l1 = MaskedLinear(n, hidden, (first[:, None] <= between[None, :]).float())
        self.l2 = MaskedLinear(hidden, n, (between[:, None] < first[None, :]).float())

    def forward(self, x: Tensor) -> Tensor:
        return self.l2(F.relu(self.l1(x)))


class LoRA(nn.Module):
    """A frozen layer and its low-rank change: merged, beside, or written as functions."""

    def __init__(self, how: str, n_in: int = 8, n_out: int = 10, r: int = 4, alpha: int = 8) -> None:
        super().__init__()
        self.how, self.scaling = how, alpha / r
        self.base = nn.Linear(n_in, n_out)
        self.base.requires_grad_(False)
        self.A, self.B = nn.Parameter(torch.randn(r, n_in) / 3), nn.Parameter(torch.randn(n_out, r) / 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "merged":
            return F.linear(x, self.base.weight + self.scaling * (self.B @ self.A), self.base.bias)
        if self.how == "functions":
            return self.base(x) + F.linear(F.linear(x, self.A), self.B) * self.scaling
        return self.base(x) + (x @ self.A.transpose(0, 1) @ self.B.transpose(0, 1)) * self.scaling


class DoRA(nn.Module):
    """Magnitude and direction of a row."""

    def __init__(self, n_in: int = 8, n_out: int = 10) -> None:
        super().__init__()
        self.weight, self.m = nn.Parameter(torch.randn(n_out, n_in)), nn.Parameter(torch.rand(n_out, 1))
        self.A, self.B = nn.Parameter(torch.randn(3, n_in)), nn.Parameter(torch.randn(n_out, 3) / 5)

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight + self.B @ self.A
        return F.linear(x, self.m * w / (w.norm(p=2, dim=1, keepdim=True) + 1e-6))


class LowRank(nn.Module):
    """Two thin matrices for a wide one."""

    def __init__(self, n_in: int = 8, n_out: int = 10, rank: int = 5) -> None:
        super().__init__()
        self.U, self.V = nn.Linear(n_in, rank, bias=False), nn.Linear(rank, n_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.V(self.U(x))


class SVDWeight(nn.Module):
    """U diag(s) V as parameters."""

    def __init__(self, n_in: int = 8, n_out: int = 10, rank: int = 5) -> None:
        super().__init__()
        self.U, self.s, self.V = (nn.Parameter(torch.randn(*shape)) for shape in ((n_out, rank), (rank,), (rank, n_in)))

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.U * self.s @ self.V).t() / 4


class EqualisedLinear(nn.Linear):
    """StyleGAN: the weight is scaled by its fan-in at run time."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * (1.0 / self.in_features**0.5), self.bias)


class QuantisedLinear(nn.Linear):
    """Rounded weights, straight-through."""

    def forward(self, x: Tensor) -> Tensor:
        scale = 0.05
        w = self.weight + (torch.round(self.weight / scale) * scale - self.weight).detach()
        return F.linear(x, w, self.bias)


class BinaryLinear(nn.Linear):
    """XNOR-Net: signs, and the mean magnitude of a row."""

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        binary = (w.sign() - w).detach() + w
        return F.linear(x, binary * w.abs().mean(dim=1, keepdim=True), self.bias)


class ModulatedConv(nn.Module):
    """StyleGAN2: a style scales the inputs of a kernel, demodulated, batch folded into groups."""

    def __init__(self, width: int = 6, out: int = 8) -> None:
        super().__init__()
        self.stem, self.style, self.out = nn.Conv2d(3, width, 1), nn.Linear(5, width), nn.Conv2d(out, 2, 1)
        self.weight = nn.Parameter(torch.randn(out, width, 3, 3) / 5)

    def forward(self, x: Tensor, s: Tensor) -> Tensor:
        x = self.stem(x)
        b, c, h, w = x.shape
        weights = self.weight[None] * (self.style(s)[:, None, :, None, None] + 1)
        weights = weights * torch.rsqrt((weights**2).sum(dim=(2, 3, 4), keepdim=True) + 1e-8)
        weights = weights.reshape(b * weights.size(1), c, 3, 3)
        y = F.conv2d(x.reshape(1, b * c, h, w), weights, padding=1, groups=b)
        return self.out(F.leaky_relu(y.reshape(b, -1, h, w), 0.2))


class CondConv(nn.Module):
    """Kernels mixed per sample, batch folded into groups."""

    def __init__(self, n_in: int = 6, n_out: int = 8, experts: int = 3) -> None:
        super().__init__()
        self.n_out, self.stem, self.head = n_out, nn.Conv2d(3, n_in, 1), nn.Conv2d(n_out, 2, 1)
        self.route = nn.Linear(n_in, experts)
        self.weight = nn.Parameter(torch.randn(experts, n_out, n_in, 3, 3) / 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        b, c, h, w = x.shape
        routing = torch.sigmoid(self.route(x.mean((2, 3))))
        kernel = torch.einsum("be,eoikl->boikl", routing, self.weight).reshape(b * self.n_out, c, 3, 3)
        y = F.conv2d(x.reshape(1, b * c, h, w), kernel, padding=1, groups=b)
        return self.head(F.relu(y.view(b, self.n_out, h, w)))


class DynamicFilter(nn.Module):
    """A layer makes a depthwise kernel for each sample."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem, self.head, self.k = nn.Conv2d(3, width, 1), nn.Conv2d(width, 2, 1), 3
        self.make = nn.Sequential(nn.Linear(width, 6), nn.ReLU(), nn.Linear(6, width * self.k * self.k))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        b, c, h, w = x.shape
        kernel = self.make(x.mean((2, 3))).view(b * c, 1, self.k, self.k)
        y = F.conv2d(x.reshape(1, b * c, h, w), kernel, padding=1, groups=b * c)
        return self.head(y.view(b, c, h, w))


class HyperNetwork(nn.Module):
    """A network makes the weights of a linear layer."""

    def __init__(self, n_in: int = 6, n_out: int = 4) -> None:
        super().__init__()
        self.n_in, self.n_out, self.enter = n_in, n_out, nn.Linear(5, n_in)
        self.hyper = nn.Sequential(nn.Linear(3, 10), nn.ReLU(), nn.Linear(10, n_in * n_out + n_out))

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        params, x = self.hyper(z), torch.tanh(self.enter(x))
        weight = params[:, : self.n_in * self.n_out].view(-1, self.n_out, self.n_in)
        return torch.bmm(weight, x.unsqueeze(2)).squeeze(2) + params[:, self.n_in * self.n_out :]


class Involution(nn.Module):
    """A kernel per place, shared by the channels of a group."""

    def __init__(self, width: int = 8, groups: int = 2, k: int = 3) -> None:
        super().__init__()
        self.groups, self.k, self.group_channels = groups, k, width // groups
        self.reduce, self.span = conv_bn(width, 6), nn.Conv2d(6, k * k * groups, 1)
        self.unfold = nn.Unfold(k, 1, k // 2)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        weight = self.span(self.reduce(x)).view(b, self.groups, self.k**2, h, w).unsqueeze(2)
        patches = self.unfold(x).view(b, self.groups, self.group_channels, self.k**2, h, w)
        return (weight * patches).sum(dim=3).view(b, c, h, w)


def linear_block(layer: Callable[[], nn.Module], out: int = 10) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), layer(), nn.Tanh(), nn.Linear(out, 3))


STYLED = lambda batch: (normal(batch, 3, 6, 6), normal(batch, 5, seed=1))  # noqa: E731
construct("weights_standardised", lambda: Between(NFBlock(conv=nn.Conv2d)), IMAGE)
construct("weights_standardised_twice", lambda: Between(NFBlock()), IMAGE, approximate=True)
construct("weights_masked_conv", lambda: Between(MaskedConv(8, 8, 3, padding=1)), IMAGE)
construct("weights_masked_conv_written", lambda: Between(MaskedConv(8, 8, 3, padding=1, write=True)), IMAGE)
construct("weights_made", MADE, vector(6))
for _how in ("merged", "functions", "beside"):
    construct(f"weights_lora_{_how}", linear_block(lambda how=_how: LoRA(how)), vector(6))
construct("weights_dora", linear_block(DoRA), vector(6))
construct("weights_low_rank", linear_block(LowRank), vector(6))
construct("weights_svd", linear_block(SVDWeight), vector(6))
construct("weights_equalised", linear_block(lambda: EqualisedLinear(8, 10)), vector(6))
construct("weights_quantised", linear_block(lambda: QuantisedLinear(8, 10)), vector(6))
construct("weights_binary", linear_block(lambda: BinaryLinear(8, 10)), vector(6))
construct("weights_modulated", ModulatedConv, STYLED)
construct("weights_cond_conv", CondConv, image(3, 6))
construct("weights_dynamic_filter", DynamicFilter, image(3, 6))
construct("weights_hyper_network", HyperNetwork, lambda batch: (normal(batch, 5), normal(batch, 3, seed=1)))
construct("weights_involution", lambda: Between(Involution()), image(3, 6))


# Pooling, sets, graphs


class LearnedPool(nn.Module):
    """GeM: a learned power."""

    def __init__(self) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.ones(1) * 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x.clamp(min=1e-6).pow(self.p), (x.size(-2), x.size(-1))).pow(1.0 / self.p)


class WeightedPool(nn.Module):
    """A learned weight per place, shared by all channels."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8) / 8)

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.weight.softmax(-1)).sum((-2, -1), keepdim=True)


class BilinearPool(nn.Module):
    """The outer product of two feature maps, over all places."""

    def __init__(self, same: bool = False) -> None:
        super().__init__()
        self.same, self.a, self.b = same, nn.Conv2d(3, 6, 3), nn.Conv2d(3, 4, 3)
        self.fc = nn.Sequential(nn.Linear(36 if same else 24, 8), nn.ReLU(), nn.Linear(8, 3))
        if same:
            del self.b

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.a(x)).flatten(2)
        b = a if self.same else F.relu(self.b(x)).flatten(2)
        y = torch.bmm(a, b.transpose(1, 2)) / a.size(2)
        return self.fc(y.view(x.size(0), -1))


class NetVLAD(nn.Module):
    """Soft assignment to clusters, residuals to their centres."""

    def __init__(self, dim: int = 6, clusters: int = 4) -> None:
        super().__init__()
        self.stem, self.assign = nn.Conv2d(3, dim, 3), nn.Conv2d(dim, clusters, 1)
        self.centroids, self.fc = nn.Parameter(torch.rand(clusters, dim)), nn.Linear(clusters * dim, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        n, c = x.shape[:2]
        soft = F.softmax(self.assign(x).view(n, -1, x.size(2) * x.size(3)), dim=1)
        flat = x.view(n, c, -1)
        residual = flat.unsqueeze(1) - self.centroids[None, :, :, None]
        vlad = (residual * soft.unsqueeze(2)).sum(dim=-1)
        return self.fc(vlad.reshape(n, -1))


class Moments(nn.Module):
    """x-vectors: mean and deviation over time."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv1d(5, 8, 3), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x.transpose(1, 2)))
        return self.fc(torch.cat((x.mean(dim=2), x.std(dim=2)), dim=1))


class PointNet(nn.Module):
    """A shared MLP of points, the maximum of all, also beside every point."""

    def __init__(self, segment: bool) -> None:
        super().__init__()
        self.segment, self.conv1, self.bn1 = segment, nn.Conv1d(5, 6, 1), nn.BatchNorm1d(6)
        self.conv2, self.out = nn.Conv1d(6, 8, 1), nn.Conv1d(14, 3, 1) if segment else nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        local = F.relu(self.bn1(self.conv1(x.transpose(2, 1))))
        whole = torch.max(self.conv2(local), 2, keepdim=True)[0]
        if not self.segment:
            return self.out(whole.view(-1, 8))
        return self.out(torch.cat([whole.repeat(1, 1, x.size(1)), local], 1)).transpose(2, 1)


class TNet(nn.Module):
    """Points are turned by a matrix that the network makes; the identity is added."""

    def __init__(self, k: int = 5) -> None:
        super().__init__()
        self.k, self.conv, self.fc = k, nn.Conv1d(k, 8, 1), nn.Linear(8, k * k)
        self.mlp, self.out = nn.Conv1d(k, 6, 1), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        t = self.fc(F.relu(self.conv(x.transpose(1, 2))).max(2)[0])
        t = t.view(-1, self.k, self.k) + torch.eye(self.k, dtype=x.dtype)
        return self.out(F.relu(self.mlp(torch.bmm(x, t).transpose(1, 2))).amax(2))


class DeepSets(nn.Module):
    """phi, a sum, rho; and the equivariant layer."""

    def __init__(self, equivariant: bool = False) -> None:
        super().__init__()
        self.phi, self.rho = nn.Sequential(nn.Linear(5, 8), nn.ReLU()), nn.Sequential(nn.Linear(8, 6), nn.ReLU())
        self.out = nn.Linear(6, 3)
        self.Gamma, self.Lambda = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
        if not equivariant:
            del self.Gamma, self.Lambda
        self.equivariant = equivariant

    def forward(self, x: Tensor) -> Tensor:
        x = self.phi(x)
        if self.equivariant:
            x = F.relu(self.Gamma(x) - self.Lambda(x.max(1, keepdim=True)[0]))
        return self.out(self.rho(x.sum(dim=1)))


class GCN(nn.Module):
    """A dense normalised adjacency, given or from a buffer."""

    def __init__(self, buffer: bool = False) -> None:
        super().__init__()
        self.w1, self.w2, self.out = nn.Linear(5, 8, bias=False), nn.Linear(8, 6), nn.Linear(6, 3)
        if buffer:
            self.register_buffer("adj", (normal(6, 6) > 0).float() + torch.eye(6))

    def forward(self, x: Tensor, adj: Tensor | None = None) -> Tensor:
        adj = self.adj if adj is None else adj
        degree = adj.sum(-1, keepdim=True).clamp(min=1)
        x = F.relu(adj / degree @ self.w1(x))
        return self.out(F.relu(self.w2(torch.matmul(adj / degree, x))).mean(1))


class GAT(nn.Module):
    """Attention along edges: concatenated, or as a sum of two scores; heads side by side."""

    def __init__(self, heads: int = 4, dim: int = 3, concat: bool = False) -> None:
        super().__init__()
        self.heads, self.dim, self.concat = heads, dim, concat
        self.enter, self.W = nn.Linear(5, 6), nn.Linear(6, heads * dim, bias=False)
        self.out = nn.Linear(heads * dim, 3)
        self.a = nn.Parameter(torch.randn(heads, 2 * dim))

    def forward(self, x: Tensor, adj: Tensor) -> Tensor:
        b, n, _ = x.shape
        h = self.W(F.relu(self.enter(x))).view(b, n, self.heads, self.dim).transpose(1, 2)
        if self.concat:
            left, right = h.unsqueeze(3).expand(-1, -1, n, n, -1), h.unsqueeze(2).expand(-1, -1, n, n, -1)
            e = torch.einsum("bhijd,hd->bhij", torch.cat([left, right], dim=-1), self.a)
        else:
            e = (h * self.a[:, None, : self.dim]).sum(-1)[..., :, None]
            e = e + (h * self.a[:, None, self.dim :]).sum(-1)[..., None, :]
        e = F.leaky_relu(e, 0.2).masked_fill(adj.unsqueeze(1) == 0, -1e9)
        return self.out(F.elu((torch.softmax(e, -1) @ h).transpose(1, 2).reshape(b, n, -1)))


class EdgeIndex(nn.Module):
    """Messages along a list of edges: gathered, scattered, a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.message, self.update = nn.Linear(5, 8), nn.Linear(16, 6), nn.Linear(14, 8)
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        x, (src, dst) = F.relu(self.enter(x)), edge_index
        messages = F.relu(self.message(torch.cat([x[src], x[dst]], dim=-1)))
        total = torch.zeros(x.size(0), messages.size(1), dtype=x.dtype).index_add(0, dst, messages)
        return self.out(x + self.update(torch.cat([x, total], dim=-1)))


class GraphSAGE(nn.Module):
    """scatter_add with an expanded index, a mean."""

    def __init__(self) -> None:
        super().__init__()
        self.lin_l, self.lin_r, self.out = nn.Linear(6, 8), nn.Linear(6, 8, bias=False), nn.Linear(8, 3)
        self.enter = nn.Linear(5, 6)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        x, (src, dst) = self.enter(x), edge_index
        index = dst.unsqueeze(-1).expand(-1, x.size(-1))
        total = torch.zeros_like(x).scatter_add_(0, index, x.index_select(0, src))
        count = torch.bincount(dst, minlength=x.size(0)).clamp(min=1).unsqueeze(-1)
        return self.out(F.relu(self.lin_l(total / count) + self.lin_r(x)))


class EdgeConv(nn.Module):
    """DGCNN without a search for neighbours: all pairs, (x_i, x_j - x_i), the maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.conv, self.out = nn.Linear(5, 6), nn.Conv2d(12, 8, 1, bias=False), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        n = x.size(1)
        centre = x.unsqueeze(2).expand(-1, -1, n, -1)
        edges = torch.cat((x.unsqueeze(1) - centre, centre), dim=3).permute(0, 3, 1, 2)
        return self.out(F.leaky_relu(self.conv(edges), 0.2).max(dim=-1)[0].transpose(1, 2))


def graph(batch: int) -> tuple[Tensor, Tensor]:
    adj = (normal(batch, 6, 6, seed=1) > 0).double() + torch.eye(6, dtype=torch.float64)
    return normal(batch, 6, 5), adj


def edges(batch: int) -> tuple[Tensor, Tensor]:
    n = 3 * batch
    src = torch.arange(2 * n) % n
    return normal(n, 5), torch.stack([src, (src * 2 + 1) % n])


def pooled(pool: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1), nn.Sigmoid(), pool(), nn.Flatten(), nn.Linear(8, 3))


construct("pool_gem", pooled(LearnedPool), IMAGE)
construct("pool_weighted", pooled(WeightedPool), IMAGE)
construct("pool_bilinear", BilinearPool, IMAGE)
construct("pool_bilinear_gram", lambda: BilinearPool(True), IMAGE)
construct("pool_net_vlad", NetVLAD, IMAGE)
construct("pool_moments", Moments, TOKENS)
construct("sets_point_net", lambda: PointNet(False), TOKENS)
construct("sets_point_net_segment", lambda: PointNet(True), TOKENS)
construct("sets_t_net", TNet, TOKENS)
construct("sets_deep", DeepSets, TOKENS)
construct("sets_deep_equivariant", lambda: DeepSets(True), TOKENS)
construct("graph_gcn", GCN, graph)
construct("graph_gcn_buffer", lambda: GCN(True), TOKENS)
construct("graph_gat", GAT, graph)
construct("graph_gat_concat", lambda: GAT(concat=True), graph)
construct("graph_edge_index", EdgeIndex, edges)
construct("graph_sage", GraphSAGE, edges)
construct("graph_edge_conv", EdgeConv, TOKENS)


# Invertible


class Coupling(nn.Module):
    """RealNVP: one half scales and shifts the other; the width itself is the data's."""

    def __init__(self, dim: int = 6, hidden: int = 8, swap: bool = False) -> None:
        super().__init__()
        self.d, self.swap = dim // 2, swap
        self.net = nn.Sequential(nn.Linear(self.d, hidden), nn.ReLU(), nn.Linear(hidden, 2 * (dim - self.d)))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x1, x2 = x.chunk(2, dim=1)
        if self.swap:
            x1, x2 = x2, x1
        s, t = self.net(x1).chunk(2, dim=1)
        s = torch.tanh(s)
        y = torch.cat([x1, x2 * torch.exp(s) + t], dim=1)
        return y, s.sum(dim=1)


class Flow(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Coupling(), Coupling(swap=True)])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        log_det = x.new_zeros(x.size(0))
        for layer in self.layers:
            x, ld = layer(x)
            log_det = log_det + ld
        return x, log_det


class MaskedCoupling(nn.Module):
    """A checkerboard buffer says which half."""

    def __init__(self, dim: int = 6, hidden: int = 8) -> None:
        super().__init__()
        self.scale = nn.Sequential(nn.Linear(dim, hidden), nn.Tanh(), nn.Linear(hidden, dim), nn.Tanh())
        self.shift = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, dim))
        self.register_buffer("mask", (torch.arange(dim) % 2).view(1, -1).float())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        kept = x * self.mask
        s, t = self.scale(kept) * (1 - self.mask), self.shift(kept) * (1 - self.mask)
        return kept + (1 - self.mask) * (x * s.exp() + t), s.sum(-1)


class Reversible(nn.Module):
    """RevNet: halves of the channels update each other."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        half = width // 2
        self.f, self.g = (nn.Sequential(conv_bn(half, 6, 3), nn.Conv2d(6, half, 1)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x1, x2 = torch.chunk(x, 2, dim=1)
        y1 = x1 + self.f(x2)
        return torch.cat([y1, x2 + self.g(y1)], dim=1)


class NeuralODE(nn.Module):
    """Euler steps of a layer that is shared."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.f = nn.Sequential(nn.Linear(width + 1, 10), nn.Tanh(), nn.Linear(10, width))

    def forward(self, x: Tensor) -> Tensor:
        for step in range(3):
            t = torch.full_like(x[..., :1], step / 3)
            x = x + self.f(torch.cat([x, t], dim=-1)) / 3
        return x


class FixedPoint(nn.Module):
    """A deep equilibrium: the input is injected into every step."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.W, self.U = nn.Linear(width, width), nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for _ in range(3):
            z = torch.tanh(self.W(z) * 0.5 + self.U(x))
        return z


class ChannelFlip(nn.Module):
    """Glow: a fixed permutation, then a coupling with more channels around it."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.register_buffer("order", torch.tensor([3, 1, 7, 0, 5, 2, 6, 4]))
        self.conv = nn.Conv2d(width, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x[:, self.order].flip(1)))


construct("flow_coupling", Flow, vector(6))
construct("flow_coupling_masked", MaskedCoupling, vector(6))
construct("flow_reversible", lambda: Between(Reversible()), IMAGE)
construct("flow_ode", lambda: BetweenLinear(NeuralODE()), vector(5))
construct("flow_fixed_point", lambda: BetweenLinear(FixedPoint()), vector(5))
construct("flow_permutation", lambda: Between(ChannelFlip(), out=6), IMAGE)
