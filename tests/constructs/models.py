"""Small complete networks, as users write them: sizes as numbers, attributes, outputs of all kinds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from constructs.registry import construct, image, indices, normal, signal, vector

# Convolutional


class LeNet(nn.Module):
    """The article's, as it is written there."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 5)
        self.pool = nn.MaxPool2d(2, 2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 5 * 5, 30)
        self.fc2 = nn.Linear(30, 20)
        self.fc3 = nn.Linear(20, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.conv1(x)))
        x = self.pool(F.relu(self.conv2(x)))
        x = x.view(-1, 16 * 5 * 5)
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x))
        return self.fc3(x)


class MnistExample(nn.Module):
    """PyTorch's example, with a log-softmax at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 8, 3, 1), nn.Conv2d(8, 12, 3, 1)
        self.dropout1, self.dropout2 = nn.Dropout(0.0), nn.Dropout(0.0)
        self.fc1, self.fc2 = nn.Linear(108, 16), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(x))
        x = F.relu(self.conv2(x))
        x = self.dropout1(F.max_pool2d(x, 2))
        x = torch.flatten(x, 1)
        x = self.dropout2(F.relu(self.fc1(x)))
        return F.log_softmax(self.fc2(x), dim=1)


class AlexNet(nn.Module):
    def __init__(self, num_classes: int = 5) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, kernel_size=5, stride=2, padding=2),
            nn.ReLU(inplace=True),
            nn.LocalResponseNorm(3),
            nn.MaxPool2d(kernel_size=3, stride=2),
            nn.Conv2d(8, 12, kernel_size=3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(12, 8, kernel_size=3, padding=1),
            nn.ReLU(inplace=True),
        )
        self.avgpool = nn.AdaptiveAvgPool2d((2, 2))
        self.classifier = nn.Sequential(
            nn.Dropout(0.0), nn.Linear(8 * 2 * 2, 16), nn.ReLU(inplace=True), nn.Linear(16, num_classes)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.avgpool(self.features(x))
        x = x.view(x.size(0), 8 * 2 * 2)
        return self.classifier(x)


CONFIG = [6, "M", 8, 8, "M"]


class VGG(nn.Module):
    """Layers from a list."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for width in CONFIG:
            if isinstance(width, str):
                layers += [nn.MaxPool2d(2, 2)]
            else:
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
                channels = width
        self.features, self.classifier = nn.Sequential(*layers), nn.Linear(channels * 2 * 2, 4)

    def forward(self, x: Tensor) -> Tensor:
        out = self.features(x)
        return self.classifier(out.view(out.size(0), -1))


class BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, in_planes: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride=1, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_planes != self.expansion * planes:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_planes, self.expansion * planes, 1, stride=stride, bias=False),
                nn.BatchNorm2d(self.expansion * planes),
            )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return F.relu(out)


class ResNet(nn.Module):
    """kuangliu's, of three stages."""

    def __init__(self, num_classes: int = 5) -> None:
        super().__init__()
        self.in_planes = 6
        self.conv1, self.bn1 = nn.Conv2d(3, 6, 3, stride=1, padding=1, bias=False), nn.BatchNorm2d(6)
        self.layer1 = self._make_layer(6, 1, stride=1)
        self.layer2 = self._make_layer(8, 2, stride=2)
        self.layer3 = self._make_layer(10, 1, stride=2)
        self.linear = nn.Linear(10, num_classes)

    def _make_layer(self, planes: int, num_blocks: int, stride: int) -> nn.Sequential:
        layers = []
        for s in [stride] + [1] * (num_blocks - 1):
            layers.append(BasicBlock(self.in_planes, planes, s))
            self.in_planes = planes
        return nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        out = F.avg_pool2d(out, 2)
        out = out.view(out.size(0), -1)
        return self.linear(out)


class InceptionOutputs(NamedTuple):
    logits: Tensor
    aux: Tensor | None


class InceptionNet(nn.Module):
    """A named tuple; the auxiliary head runs in training."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.branch1x1 = nn.Conv2d(6, 4, 1)
        self.branch3x3_1, self.branch3x3_2 = nn.Conv2d(6, 4, 1), nn.Conv2d(4, 5, 3, padding=1)
        self.branch_pool = nn.Conv2d(6, 3, 1)
        self.aux, self.fc = nn.Linear(12 * 4, 5), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> InceptionOutputs:
        x = F.relu(self.stem(x))
        branches = [
            self.branch1x1(x),
            self.branch3x3_2(F.relu(self.branch3x3_1(x))),
            self.branch_pool(F.avg_pool2d(x, kernel_size=3, stride=1, padding=1)),
        ]
        x = F.relu(torch.cat(branches, 1))
        aux = self.aux(F.adaptive_avg_pool2d(x, (2, 2)).flatten(1)) if self.training else None
        return InceptionOutputs(self.fc(x.mean((2, 3))), aux)


construct("model_lenet", LeNet, image(3, 32))
construct("model_mnist", MnistExample, image(1, 10))
construct("model_alexnet", AlexNet, image(3, 16))
construct("model_vgg", VGG, image(3, 8))
construct("model_resnet", ResNet, image(3, 8))
construct("model_inception", InceptionNet, image(3, 6))


class DoubleConv(nn.Module):
    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.double_conv = nn.Sequential(
            nn.Conv2d(n_in, n_out, 3, padding=1, bias=False),
            nn.BatchNorm2d(n_out),
            nn.ReLU(inplace=True),
            nn.Conv2d(n_out, n_out, 3, padding=1, bias=False),
            nn.BatchNorm2d(n_out),
            nn.ReLU(inplace=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.double_conv(x)


class UNet(nn.Module):
    """Two levels, written out."""

    def __init__(self) -> None:
        super().__init__()
        self.inc, self.down1, self.down2 = DoubleConv(3, 4), DoubleConv(4, 8), DoubleConv(8, 12)
        self.up1, self.conv1 = nn.ConvTranspose2d(12, 8, kernel_size=2, stride=2), DoubleConv(16, 8)
        self.up2, self.conv2 = nn.ConvTranspose2d(8, 4, kernel_size=2, stride=2), DoubleConv(8, 4)
        self.outc = nn.Conv2d(4, 2, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        x1 = self.inc(x)
        x2 = self.down1(F.max_pool2d(x1, 2))
        x3 = self.down2(F.max_pool2d(x2, 2))
        x = self.conv1(torch.cat([x2, self.up1(x3)], dim=1))
        x = self.conv2(torch.cat([x1, self.up2(x)], dim=1))
        return self.outc(x)


class Conv(nn.Module):
    def __init__(self, c1: int, c2: int, k: int = 1, s: int = 1) -> None:
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(c1, c2, k, s, k // 2, bias=False), nn.BatchNorm2d(c2), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


class C2f(nn.Module):
    def __init__(self, c1: int, c2: int, n: int = 1) -> None:
        super().__init__()
        self.c = int(c2 * 0.5)
        self.cv1, self.cv2 = Conv(c1, 2 * self.c), Conv((2 + n) * self.c, c2)
        self.m = nn.ModuleList(nn.Sequential(Conv(self.c, self.c, 3), Conv(self.c, self.c, 3)) for _ in range(n))

    def forward(self, x: Tensor) -> Tensor:
        y = list(self.cv1(x).chunk(2, 1))
        for m in self.m:
            y.append(y[-1] + m(y[-1]))
        return self.cv2(torch.cat(y, 1))


class DFLDetect(nn.Module):
    """YOLOv8's head: a distribution over distances, integrated by a fixed convolution."""

    def __init__(self, nc: int, ch: tuple[int, ...]) -> None:
        super().__init__()
        self.nc, self.reg_max = nc, 4
        self.no = nc + self.reg_max * 4
        self.cv2 = nn.ModuleList(nn.Sequential(Conv(c, 6, 3), nn.Conv2d(6, 4 * self.reg_max, 1)) for c in ch)
        self.cv3 = nn.ModuleList(nn.Sequential(Conv(c, 5, 3), nn.Conv2d(5, nc, 1)) for c in ch)
        self.dfl = nn.Conv2d(self.reg_max, 1, 1, bias=False).requires_grad_(False)
        self.dfl.weight.data[:] = torch.arange(self.reg_max, dtype=torch.float).view(1, self.reg_max, 1, 1)

    def forward(self, x: list[Tensor]) -> Any:
        levels = [torch.cat((self.cv2[i](level), self.cv3[i](level)), 1) for i, level in enumerate(x)]
        if self.training:
            return levels
        both = torch.cat([level.view(level.shape[0], self.no, -1) for level in levels], 2)
        box, cls = both.split((self.reg_max * 4, self.nc), 1)
        b, _, a = box.shape
        distance = self.dfl(box.view(b, 4, self.reg_max, a).transpose(2, 1).softmax(1)).view(b, 4, a)
        left_top, right_bottom = distance.chunk(2, 1)
        return torch.cat((left_top + right_bottom, right_bottom - left_top, cls.sigmoid()), 1)


class YOLO(nn.Module):
    """Backbone, neck and head, run from a list with the indices to read."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.ModuleList(
            [
                Conv(3, 4, 3, 2),
                C2f(4, 8),
                Conv(8, 12, 3, 2),
                C2f(12, 12),
                nn.Upsample(None, 2, "nearest"),
                C2f(20, 8),
            ]
        )
        self.detect = DFLDetect(3, (8, 12))

    def forward(self, x: Tensor) -> Any:
        y = []
        for i, layer in enumerate(self.model):
            x = layer(torch.cat([x, y[1]], 1)) if i == 5 else layer(x)
            y.append(x)
        return self.detect([y[5], y[3]])


class Generator(nn.Module):
    """DCGAN: transposed convolutions up from a vector."""

    def __init__(self, nz: int = 6, ngf: int = 4) -> None:
        super().__init__()
        self.main = nn.Sequential(
            nn.ConvTranspose2d(nz, ngf * 2, 4, 1, 0, bias=False),
            nn.BatchNorm2d(ngf * 2),
            nn.ReLU(True),
            nn.ConvTranspose2d(ngf * 2, ngf, 4, 2, 1, bias=False),
            nn.BatchNorm2d(ngf),
            nn.ReLU(True),
            nn.ConvTranspose2d(ngf, 3, 4, 2, 1, bias=False),
            nn.Tanh(),
        )

    def forward(self, z: Tensor) -> Tensor:
        return self.main(z.view(-1, 6, 1, 1))


class ConditionalGenerator(nn.Module):
    """Noise and a label, an image by view."""

    def __init__(self) -> None:
        super().__init__()
        self.label_emb, self.init_size = nn.Embedding(4, 5), 4
        self.l1 = nn.Linear(6 + 5, 8 * self.init_size**2)
        self.conv_blocks = nn.Sequential(
            nn.BatchNorm2d(8),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(8, 6, 3, stride=1, padding=1),
            nn.BatchNorm2d(6, 0.8),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(6, 3, 3, stride=1, padding=1),
            nn.Tanh(),
        )

    def forward(self, noise: Tensor, labels: Tensor) -> Tensor:
        out = self.l1(torch.cat((self.label_emb(labels), noise), -1))
        out = out.view(out.shape[0], 8, self.init_size, self.init_size)
        return self.conv_blocks(out)


class Discriminator(nn.Module):
    """Strided convolutions and one number."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 4, 2, 1), nn.Conv2d(6, 10, 4, 2, 1, bias=False)
        self.norm, self.last = nn.InstanceNorm2d(10, affine=True), nn.Conv2d(10, 1, 2, 1, 0, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.conv1(x), 0.2, inplace=True)
        x = F.leaky_relu(self.norm(self.conv2(x)), 0.2, inplace=True)
        return torch.sigmoid(self.last(x)).view(-1, 1).squeeze(1)


class ConvMixer(nn.Module):
    def __init__(self, dim: int = 8, depth: int = 2) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, dim, kernel_size=2, stride=2), nn.GELU(), nn.BatchNorm2d(dim))
        self.depthwise = nn.ModuleList(
            [
                nn.Sequential(nn.Conv2d(dim, dim, 3, groups=dim, padding="same"), nn.GELU(), nn.BatchNorm2d(dim))
                for _ in range(depth)
            ]
        )
        self.pointwise = nn.ModuleList(
            [nn.Sequential(nn.Conv2d(dim, dim, 1), nn.GELU(), nn.BatchNorm2d(dim)) for _ in range(depth)]
        )
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten(), nn.Linear(dim, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for depthwise, pointwise in zip(self.depthwise, self.pointwise, strict=True):
            x = pointwise(depthwise(x) + x)
        return self.head(x)


construct("model_unet", UNet, image(3, 8))
construct("model_yolo", YOLO, image(3, 8))
construct("model_dcgan_generator", Generator, vector(6))
construct(
    "model_conditional_generator", ConditionalGenerator, lambda batch: (normal(batch, 6), torch.arange(batch) % 4)
)
construct("model_discriminator", Discriminator, image(3, 8))
construct("model_conv_mixer", ConvMixer, image(3, 8))


# Transformers


class ViTBlock(nn.Module):
    def __init__(self, dim: int, heads: int, mlp: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, (dim // heads) ** -0.5
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, dim * 3), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, mlp), nn.GELU(), nn.Dropout(0.0), nn.Linear(mlp, dim))

    def attend(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        attn = (q @ k.transpose(-2, -1)) * self.scale
        return self.proj((attn.softmax(dim=-1) @ v).transpose(1, 2).reshape(B, N, C))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """A class token and learned positions."""

    def __init__(self, dim: int = 8, depth: int = 2, num_classes: int = 5) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, dim, kernel_size=4, stride=4)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.randn(1, 4 + 1, dim) * 0.02)
        self.blocks = nn.Sequential(*[ViTBlock(dim, 2, 12) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        B = x.shape[0]
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.cls_token.expand(B, -1, -1), x), dim=1)
        x = self.blocks(x + self.pos_embed)
        return self.head(self.norm(x)[:, 0])


class CausalSelfAttention(nn.Module):
    def __init__(self, n_embd: int, n_head: int, block_size: int) -> None:
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(n_embd, 3 * n_embd), nn.Linear(n_embd, n_embd)
        self.register_buffer("bias", torch.tril(torch.ones(block_size, block_size)).view(1, 1, block_size, block_size))
        self.n_head, self.n_embd = n_head, n_embd

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.size()
        q, k, v = self.c_attn(x).split(self.n_embd, dim=2)
        k = k.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        q = q.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = att.masked_fill(self.bias[:, :, :T, :T] == 0, float("-inf"))
        y = F.softmax(att, dim=-1) @ v
        return self.c_proj(y.transpose(1, 2).contiguous().view(B, T, C))


class GPT(nn.Module):
    """nanoGPT: a causal buffer, a head tied to the embedding."""

    def __init__(self, vocab: int = 12, n_embd: int = 8, n_layer: int = 2) -> None:
        super().__init__()
        self.transformer = nn.ModuleDict({"wte": nn.Embedding(vocab, n_embd), "wpe": nn.Embedding(8, n_embd)})
        self.h = nn.ModuleList(
            [
                nn.ModuleDict(
                    {
                        "ln_1": nn.LayerNorm(n_embd),
                        "attn": CausalSelfAttention(n_embd, 2, 8),
                        "ln_2": nn.LayerNorm(n_embd),
                        "mlp": nn.Sequential(nn.Linear(n_embd, 12), nn.GELU("tanh"), nn.Linear(12, n_embd)),
                    }
                )
                for _ in range(n_layer)
            ]
        )
        self.ln_f, self.lm_head = nn.LayerNorm(n_embd), nn.Linear(n_embd, vocab, bias=False)
        self.transformer["wte"].weight = self.lm_head.weight

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        pos = torch.arange(0, idx.size(1), dtype=torch.long, device=idx.device)
        x = self.transformer["wte"](idx) + self.transformer["wpe"](pos)
        for block in self.h:
            x = x + block["attn"](block["ln_1"](x))
            x = x + block["mlp"](block["ln_2"](x))
        logits = self.lm_head(self.ln_f(x))
        loss = None if targets is None else F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1))
        return logits, loss


class RMSNorm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


class LlamaLayer(nn.Module):
    """Grouped queries, rotary positions, SwiGLU."""

    def __init__(self, dim: int = 8, heads: int = 4, kv_heads: int = 2, hidden: int = 12) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, dim // heads
        self.q_proj, self.o_proj = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.k_proj, self.v_proj = (nn.Linear(dim, kv_heads * self.head_dim, bias=False) for _ in range(2))
        self.gate_proj, self.up_proj = nn.Linear(dim, hidden, bias=False), nn.Linear(dim, hidden, bias=False)
        self.down_proj, self.norm1, self.norm2 = nn.Linear(hidden, dim, bias=False), RMSNorm(dim), RMSNorm(dim)

    def rotate(self, x: Tensor) -> Tensor:
        angle = torch.arange(x.size(2), dtype=x.dtype)[:, None] * torch.ones(self.head_dim, dtype=x.dtype)
        half = torch.cat((-x[..., self.head_dim // 2 :], x[..., : self.head_dim // 2]), dim=-1)
        return x * angle.cos() + half * angle.sin()

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        h = self.norm1(x)
        q = self.rotate(self.q_proj(h).view(b, n, self.heads, self.head_dim).transpose(1, 2))
        k = self.rotate(self.k_proj(h).view(b, n, self.kv_heads, self.head_dim).transpose(1, 2))
        v = self.v_proj(h).view(b, n, self.kv_heads, self.head_dim).transpose(1, 2)
        k, v = (t.repeat_interleave(self.heads // self.kv_heads, dim=1) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o_proj(y.transpose(1, 2).reshape(b, n, self.heads * self.head_dim))
        h = self.norm2(x)
        return x + self.down_proj(F.silu(self.gate_proj(h)) * self.up_proj(h))


class Llama(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens, self.layers = nn.Embedding(12, 8), nn.ModuleList([LlamaLayer() for _ in range(2)])
        self.norm, self.lm_head = RMSNorm(8), nn.Linear(8, 12, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed_tokens(input_ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(x))


construct("model_vit", ViT, image(3, 8))
construct("model_gpt", GPT, indices(6, 12))
construct("model_gpt_loss", GPT, lambda batch: {"idx": indices(6)(batch), "targets": indices(6)(batch)})
construct("model_llama", Llama, indices(6, 12))


@dataclass
class BertConfig:
    """As in transformers."""

    vocab_size: int = 12
    hidden_size: int = 8
    num_attention_heads: int = 2
    intermediate_size: int = 12
    num_labels: int = 3


@dataclass
class ClassifierOutput:
    """As in transformers."""

    logits: Tensor
    hidden_states: tuple[Tensor, ...] | None = None


class BertSelfAttention(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.num_attention_heads = config.num_attention_heads
        self.attention_head_size = int(config.hidden_size / config.num_attention_heads)
        self.all_head_size = self.num_attention_heads * self.attention_head_size
        self.query, self.key, self.value = (nn.Linear(config.hidden_size, self.all_head_size) for _ in range(3))

    def transpose_for_scores(self, x: Tensor) -> Tensor:
        new_x_shape = (*x.size()[:-1], self.num_attention_heads, self.attention_head_size)
        return x.view(new_x_shape).permute(0, 2, 1, 3)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        key, value = self.transpose_for_scores(self.key(hidden)), self.transpose_for_scores(self.value(hidden))
        scores = torch.matmul(self.transpose_for_scores(self.query(hidden)), key.transpose(-1, -2))
        scores = scores / math.sqrt(self.attention_head_size) + mask
        context = torch.matmul(nn.functional.softmax(scores, dim=-1), value).permute(0, 2, 1, 3).contiguous()
        return context.view((*context.size()[:-2], self.all_head_size))


class BertLayer(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.attention, self.attention_dense = (
            BertSelfAttention(config),
            nn.Linear(config.hidden_size, config.hidden_size),
        )
        self.intermediate = nn.Linear(config.hidden_size, config.intermediate_size)
        self.output = nn.Linear(config.intermediate_size, config.hidden_size)
        self.norm1, self.norm2 = (nn.LayerNorm(config.hidden_size, eps=1e-12) for _ in range(2))

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        hidden = self.norm1(self.attention_dense(self.attention(hidden, mask)) + hidden)
        return self.norm2(self.output(F.gelu(self.intermediate(hidden))) + hidden)


class Bert(nn.Module):
    """A dictionary in, a dataclass out."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config = config
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=0)
        self.position_embeddings = nn.Embedding(8, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(2, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=1e-12)
        self.layer = nn.ModuleList([BertLayer(config) for _ in range(2)])
        self.pooler, self.classifier = nn.Linear(8, 10), nn.Linear(10, config.num_labels)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, output_hidden_states: bool = False
    ) -> ClassifierOutput:
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        dtype = self.word_embeddings.weight.dtype
        extended = (1.0 - mask[:, None, None, :].to(dtype)) * torch.finfo(dtype).min
        position = torch.arange(input_ids.size(1)).expand((1, -1))
        hidden = self.word_embeddings(input_ids) + self.position_embeddings(position)
        hidden = self.LayerNorm(hidden + self.token_type_embeddings(torch.zeros_like(input_ids)))
        states: tuple[Tensor, ...] = (hidden,)
        for layer in self.layer:
            hidden = layer(hidden, extended)
            states = (*states, hidden)
        logits = self.classifier(torch.tanh(self.pooler(hidden[:, 0])))
        return ClassifierOutput(logits, states if output_hidden_states else None)


def bert_inputs(batch: int) -> dict[str, Tensor]:
    mask = torch.ones(batch, 6, dtype=torch.long)
    mask[0, 4:] = 0
    return {"input_ids": indices(6, 12)(batch), "attention_mask": mask}


def window_partition(x: Tensor, size: int) -> Tensor:
    B, H, W, C = x.shape
    x = x.view(B, H // size, size, W // size, size, C)
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, size, size, C)


def window_reverse(windows: Tensor, size: int, H: int, W: int) -> Tensor:
    B = int(windows.shape[0] / (H * W / size / size))
    x = windows.view(B, H // size, W // size, size, size, -1)
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(B, H, W, -1)


class SwinBlock(nn.Module):
    """Windows of 2x2, shifted ones with a mask from a buffer, biases from a table."""

    def __init__(self, dim: int, num_heads: int, resolution: int, shift: int) -> None:
        super().__init__()
        self.num_heads, self.resolution, self.window, self.shift = num_heads, resolution, 2, shift
        self.scale = (dim // num_heads) ** -0.5
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, dim * 3), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 12), nn.GELU(), nn.Linear(12, dim))
        self.table = nn.Parameter(torch.randn(9, num_heads))
        place = torch.stack(torch.meshgrid(torch.arange(2), torch.arange(2), indexing="ij")).flatten(1)
        relative = place[:, :, None] - place[:, None, :] + 1
        self.register_buffer("index", relative[0] * 3 + relative[1])
        mask = None
        if shift:
            regions = torch.zeros(1, resolution, resolution, 1)
            spans = (slice(0, -2), slice(-2, -1), slice(-1, None))
            for number, (rows, columns) in enumerate((r, c) for r in spans for c in spans):
                regions[:, rows, columns, :] = number
            regions = window_partition(regions, 2).view(-1, 4)
            mask = (regions.unsqueeze(1) - regions.unsqueeze(2)).ne(0) * -100.0
        self.register_buffer("attn_mask", mask)

    def attend(self, x: Tensor) -> Tensor:
        B_, N, C = x.shape
        qkv = self.qkv(x).reshape(B_, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        attn = (q * self.scale) @ k.transpose(-2, -1)
        bias = self.table[self.index.view(-1)].view(4, 4, -1).permute(2, 0, 1).contiguous()
        attn = attn + bias.unsqueeze(0)
        if self.attn_mask is not None:
            nW = self.attn_mask.shape[0]
            attn = attn.view(B_ // nW, nW, self.num_heads, N, N) + self.attn_mask.unsqueeze(1).unsqueeze(0)
            attn = attn.view(-1, self.num_heads, N, N)
        return self.proj((attn.softmax(-1) @ v).transpose(1, 2).reshape(B_, N, C))

    def forward(self, x: Tensor) -> Tensor:
        H = W = self.resolution
        B, _, C = x.shape
        shortcut = x
        x = torch.roll(self.norm1(x).view(B, H, W, C), shifts=(-self.shift, -self.shift), dims=(1, 2))
        windows = self.attend(window_partition(x, self.window).view(-1, self.window * self.window, C))
        x = window_reverse(windows.view(-1, self.window, self.window, C), self.window, H, W)
        x = shortcut + torch.roll(x, shifts=(self.shift, self.shift), dims=(1, 2)).view(B, H * W, C)
        return x + self.mlp(self.norm2(x))


class Swin(nn.Module):
    """One stage, a merging of patches, one block more."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed, self.patch_norm = nn.Conv2d(3, 8, 2, 2), nn.LayerNorm(8)
        self.blocks = nn.ModuleList([SwinBlock(8, 2, 4, 0), SwinBlock(8, 2, 4, 1)])
        self.merge_norm, self.reduction = nn.LayerNorm(32), nn.Linear(32, 16, bias=False)
        self.last, self.norm, self.head = SwinBlock(16, 4, 2, 0), nn.LayerNorm(16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_norm(self.patch_embed(x).flatten(2).transpose(1, 2))
        for block in self.blocks:
            x = block(x)
        x = x.view(-1, 4, 4, x.size(-1))
        x = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], -1)
        x = self.last(self.reduction(self.merge_norm(x.flatten(1, 2))))
        x = F.adaptive_avg_pool1d(self.norm(x).transpose(1, 2), 1)
        return self.head(torch.flatten(x, 1))


construct("model_bert", lambda: Bert(BertConfig()), bert_inputs)
construct("model_bert_hidden", lambda: Bert(BertConfig()), lambda b: bert_inputs(b) | {"output_hidden_states": True})
construct("model_swin", Swin, image(3, 8))


class MixerBlock(nn.Module):
    def __init__(self, dim: int, patches: int, token_dim: int, channel_dim: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.token_mix = nn.Sequential(nn.Linear(patches, token_dim), nn.GELU(), nn.Linear(token_dim, patches))
        self.channel_mix = nn.Sequential(nn.Linear(dim, channel_dim), nn.GELU(), nn.Linear(channel_dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.token_mix(self.norm1(x).permute(0, 2, 1)).permute(0, 2, 1)
        return x + self.channel_mix(self.norm2(x))


class MLPMixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch_size, self.embed = 4, nn.Linear(3 * 4 * 4, 8)
        self.blocks = nn.ModuleList([MixerBlock(8, 4, 6, 12) for _ in range(2)])
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        p = self.patch_size
        x = x.reshape(b, c, h // p, p, w // p, p).permute(0, 2, 4, 3, 5, 1).reshape(b, -1, p * p * c)
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(dim=1))


class CaptionDecoder(nn.Module):
    """An image encoder and torch's own transformer decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.ReLU(), nn.Conv2d(6, 8, 3, 2, 1))
        self.embed, self.pos = nn.Embedding(12, 8), nn.Parameter(torch.randn(1, 8, 8) * 0.1)
        layer = nn.TransformerDecoderLayer(8, 2, 12, 0.0, batch_first=True)
        self.decoder, self.fc = nn.TransformerDecoder(layer, 2), nn.Linear(8, 12)

    def forward(self, images: Tensor, captions: Tensor) -> Tensor:
        memory = self.encoder(images).flatten(2).permute(0, 2, 1)
        tgt = self.embed(captions) * math.sqrt(8) + self.pos[:, : captions.size(1)]
        mask = torch.triu(torch.ones(captions.size(1), captions.size(1), dtype=torch.bool), diagonal=1)
        return self.fc(self.decoder(tgt, memory, tgt_mask=mask))


# Sequences, points, tables


class CharRNN(nn.Module):
    """Hidden state in and out."""

    def __init__(self, vocab: int = 12, hidden_size: int = 8, n_layers: int = 2) -> None:
        super().__init__()
        self.hidden_size, self.n_layers = hidden_size, n_layers
        self.encoder = nn.Embedding(vocab, 6)
        self.rnn = nn.GRU(6, hidden_size, n_layers, batch_first=True)
        self.fc, self.decoder = nn.Linear(hidden_size, 10), nn.Linear(10, vocab)

    def init_hidden(self, batch_size: int) -> Tensor:
        weight = next(self.parameters())
        return weight.new_zeros(self.n_layers, batch_size, self.hidden_size)

    def forward(self, x: Tensor, hidden: Tensor | None = None) -> Tensor:
        if hidden is None:
            hidden = self.init_hidden(x.size(0))
        out, hidden = self.rnn(self.encoder(x), hidden)
        out = F.relu(self.fc(out.contiguous().view(-1, self.hidden_size)))
        return self.decoder(out).view(x.size(0), -1, 12)


class Seq2Seq(nn.Module):
    """A bidirectional encoder, a decoder that attends, teacher forcing."""

    def __init__(self, enc: int = 6, dec: int = 8) -> None:
        super().__init__()
        self.src_embed, self.tgt_embed = nn.Embedding(12, 7), nn.Embedding(10, 7)
        self.encoder, self.bridge = nn.GRU(7, enc, bidirectional=True, batch_first=True), nn.Linear(enc * 2, dec)
        self.attn, self.v = nn.Linear(enc * 2 + dec, dec), nn.Linear(dec, 1, bias=False)
        self.decoder = nn.GRUCell(7 + enc * 2, dec)
        self.fc_out = nn.Linear(enc * 2 + dec + 7, 10)

    def attention(self, hidden: Tensor, outputs: Tensor) -> Tensor:
        hidden = hidden.unsqueeze(1).repeat(1, outputs.shape[1], 1)
        energy = torch.tanh(self.attn(torch.cat((hidden, outputs), dim=2)))
        return F.softmax(self.v(energy).squeeze(2), dim=1)

    def forward(self, src: Tensor, tgt: Tensor) -> Tensor:
        outputs, hidden = self.encoder(self.src_embed(src))
        hidden = torch.tanh(self.bridge(torch.cat((hidden[-2, :, :], hidden[-1, :, :]), dim=1)))
        logits = []
        for t in range(tgt.size(1)):
            embedded = self.tgt_embed(tgt[:, t])
            weighted = torch.bmm(self.attention(hidden, outputs).unsqueeze(1), outputs).squeeze(1)
            hidden = self.decoder(torch.cat((embedded, weighted), dim=1), hidden)
            logits.append(self.fc_out(torch.cat((hidden, weighted, embedded), dim=1)))
        return torch.stack(logits, dim=1)


class WaveNet(nn.Module):
    def __init__(self, residual: int = 6, skip: int = 8) -> None:
        super().__init__()
        self.causal = nn.Conv1d(3, residual, 2)
        self.filters, self.gates = nn.ModuleList(), nn.ModuleList()
        self.residuals, self.skips = nn.ModuleList(), nn.ModuleList()
        for dilation in (1, 2):
            self.filters.append(nn.Conv1d(residual, 8, 2, dilation=dilation))
            self.gates.append(nn.Conv1d(residual, 8, 2, dilation=dilation))
            self.residuals.append(nn.Conv1d(8, residual, 1))
            self.skips.append(nn.Conv1d(8, skip, 1))
        self.end1, self.end2 = nn.Conv1d(skip, 6, 1), nn.Conv1d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.causal(x)
        skip: Any = 0
        for i in range(len(self.filters)):
            residual = x
            x = torch.tanh(self.filters[i](x)) * torch.sigmoid(self.gates[i](x))
            s = self.skips[i](x)
            skip = s if i == 0 else skip[:, :, -s.size(2) :] + s
            x = self.residuals[i](x)
            x = x + residual[:, :, -x.size(2) :]
        return self.end2(F.relu(self.end1(F.relu(skip))))


class PointNet(nn.Module):
    """A transform of the points, a shared MLP, a maximum, a classifier; sizes by view."""

    def __init__(self) -> None:
        super().__init__()
        self.stn_conv, self.stn_fc1, self.stn_fc2 = nn.Conv1d(3, 8, 1), nn.Linear(8, 6), nn.Linear(6, 9)
        self.conv1, self.conv2 = nn.Conv1d(3, 6, 1), nn.Conv1d(6, 10, 1)
        self.bn1, self.bn2 = nn.BatchNorm1d(6), nn.BatchNorm1d(10)
        self.fc1, self.fc2 = nn.Linear(10, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        t = torch.max(F.relu(self.stn_conv(x)), 2, keepdim=True)[0].view(-1, 8)
        t = self.stn_fc2(F.relu(self.stn_fc1(t)))
        trans = (t + torch.eye(3, dtype=x.dtype).view(1, 9).repeat(x.size(0), 1)).view(-1, 3, 3)
        x = torch.bmm(x.transpose(2, 1), trans).transpose(2, 1)
        x = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        x = torch.max(x, 2, keepdim=True)[0].view(-1, 10)
        return F.log_softmax(self.fc2(F.relu(self.fc1(x))), dim=1), trans


class Tabular(nn.Module):
    """fastai: embeddings of categories beside normed numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.embeds = nn.ModuleList([nn.Embedding(ni, nf) for ni, nf in ((4, 3), (5, 4), (3, 2))])
        self.bn_cont = nn.BatchNorm1d(5)
        self.n_emb, self.n_cont = sum(e.embedding_dim for e in self.embeds), 5
        self.layers = nn.Sequential(
            nn.Linear(self.n_emb + self.n_cont, 12, bias=False),
            nn.ReLU(inplace=True),
            nn.BatchNorm1d(12),
            nn.Linear(12, 8, bias=False),
            nn.ReLU(inplace=True),
            nn.BatchNorm1d(8),
            nn.Linear(8, 2),
        )

    def forward(self, x_cat: Tensor, x_cont: Tensor) -> Tensor:
        x = torch.cat([e(x_cat[:, i]) for i, e in enumerate(self.embeds)], 1)
        return self.layers(torch.cat([x, self.bn_cont(x_cont)], 1))


class DeepFM(nn.Module):
    """Pairs of embeddings: half of (square of sum - sum of squares), and a deep part."""

    def __init__(self, fields: int = 4, dim: int = 6) -> None:
        super().__init__()
        self.embedding, self.linear = nn.Embedding(12, dim), nn.Embedding(12, 1)
        self.embed_output_dim = fields * dim
        self.mlp = nn.Sequential(nn.Linear(self.embed_output_dim, 10), nn.BatchNorm1d(10), nn.ReLU(), nn.Linear(10, 1))

    def forward(self, x: Tensor) -> Tensor:
        e = self.embedding(x)
        pairs = 0.5 * (torch.sum(e, dim=1) ** 2 - torch.sum(e**2, dim=1)).sum(dim=1, keepdim=True)
        out = self.linear(x).sum(1) + pairs + self.mlp(e.view(-1, self.embed_output_dim))
        return torch.sigmoid(out.squeeze(1))


class MatrixFactorisation(nn.Module):
    """NCF: a product of two embeddings, and an MLP of two others."""

    def __init__(self) -> None:
        super().__init__()
        self.user_gmf, self.item_gmf = nn.Embedding(6, 8), nn.Embedding(7, 8)
        self.user_mlp, self.item_mlp = nn.Embedding(6, 5), nn.Embedding(7, 5)
        self.mlp, self.out = nn.Sequential(nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU()), nn.Linear(14, 1)

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        gmf = self.user_gmf(user) * self.item_gmf(item)
        mlp = self.mlp(torch.cat([self.user_mlp(user), self.item_mlp(item)], dim=-1))
        return torch.sigmoid(self.out(torch.cat([gmf, mlp], dim=-1))).view(-1)


class ActorCritic(nn.Module):
    """A shared trunk, a policy and a value; dueling heads."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 10), nn.Tanh())
        self.mean, self.log_std, self.value = nn.Linear(10, 2), nn.Parameter(torch.zeros(2)), nn.Linear(10, 1)
        self.advantage = nn.Sequential(nn.Linear(10, 7), nn.ReLU(), nn.Linear(7, 4))

    def forward(self, x: Tensor) -> dict[str, Any]:
        h = self.trunk(x)
        value, advantage = self.value(h), self.advantage(h)
        q = value + advantage - advantage.mean(dim=1, keepdim=True)
        return {"policy": (self.mean(h), self.log_std.exp().expand(len(x), 2)), "value": value.squeeze(-1), "q": q}


class SpeechCommands(nn.Module):
    """M5: waves to classes with 1d convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.pool1 = nn.Conv1d(1, 6, 8, 2), nn.BatchNorm1d(6), nn.MaxPool1d(2)
        self.conv2, self.bn2, self.fc1 = nn.Conv1d(6, 8, 3), nn.BatchNorm1d(8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool1(F.relu(self.bn1(self.conv1(x))))
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.avg_pool1d(x, x.shape[-1]).permute(0, 2, 1)
        return F.log_softmax(self.fc1(x), dim=2)


construct("model_mixer", MLPMixer, image(3, 8))
construct("model_caption", CaptionDecoder, lambda batch: (image(3, 8)(batch), indices(5, 12)(batch)))
construct("model_char_rnn", CharRNN, indices(6, 12))
construct("model_seq2seq", Seq2Seq, lambda batch: (indices(6, 12)(batch), indices(4, 10)(batch)))
construct("model_wavenet", WaveNet, signal(3, 10))
construct("model_point_net", PointNet, signal(3, 7))
construct("model_tabular", Tabular, lambda batch: (torch.arange(3 * batch).view(batch, 3) % 3, normal(batch, 5)))
construct("model_deep_fm", DeepFM, indices(4, 12))
construct(
    "model_ncf", MatrixFactorisation, lambda batch: {"user": torch.arange(batch), "item": torch.arange(batch) + 2}
)
construct("model_actor_critic", ActorCritic, vector(6))
construct("model_speech", SpeechCommands, signal(1, 40))
