"""Sizes written in code, raw parameters and buffers, control flow, calls and outputs of every shape, hooks."""

from __future__ import annotations

import collections
import dataclasses
from typing import Any

import torch
from networks import Net
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from constructs.registry import construct, conv_net, image, linear_net, normal, parameter, tokens, vector

SMALL = image(side=6)

# Sizes in code


class Literal(nn.Module):
    """As every tutorial writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 16, 2)
        self.fc1, self.fc2 = nn.Linear(16 * 3 * 3, 10), nn.Linear(10, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv2(F.relu(self.conv1(x))))
        x = x.view(-1, 16 * 3 * 3)
        return self.fc2(F.relu(self.fc1(x)))


class Attributes(nn.Module):
    """Sizes kept in attributes of the module, one of them computed."""

    def __init__(self, channels: int = 8, hidden_dim: int = 10) -> None:
        super().__init__()
        self.channels, self.hidden_dim = channels, hidden_dim
        self.flat_features = channels * 16
        self.conv = nn.Conv2d(3, channels, 3)
        self.up, self.down = nn.Linear(self.flat_features, hidden_dim), nn.Linear(2 * hidden_dim, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.conv(x)).reshape(-1, self.flat_features)
        x = torch.tanh(self.up(x)).view(-1, 1, self.hidden_dim).expand(-1, 2, self.hidden_dim)
        return self.down(x.reshape(x.shape[0], 2 * self.hidden_dim))


class NumFlatFeatures(nn.Module):
    """The product of the sizes, by the old tutorial's method."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 6, 3), nn.Linear(96, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.conv(x))
        return self.fc(x.view(-1, self.num_flat_features(x)))

    def num_flat_features(self, x: Tensor) -> int:
        features = 1
        for size in x.size()[1:]:
            features *= size
        return features


class Asserted(nn.Module):
    """A check of the width, against the layer's own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.a(x))
        if x.shape[1] != self.b.in_channels:
            raise ValueError(f"expected {self.b.in_channels} channels, got {x.shape[1]}")
        return self.b(x)


class Accumulator(nn.Module):
    """A tensor of zeros of a written size, filled in a loop."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = 6
        self.a, self.again, self.b = nn.Linear(8, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros(x.size(0), self.hidden, dtype=x.dtype, device=x.device)
        for step in range(x.size(1)):
            h = torch.tanh(self.a(x[:, step]) + self.again(h))
        return self.b(h)


class NewZeros(nn.Module):
    """``new_zeros`` with an attribute, and rows written into it."""

    def __init__(self) -> None:
        super().__init__()
        self.c = 8
        self.a, self.b = nn.Conv2d(3, self.c, 1), nn.Conv2d(self.c, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        out = x.new_zeros(b, self.c, h + 2, w + 2)
        out[:, :, 1:-1, 1:-1] = torch.tanh(self.a(x))
        return self.b(out)


class PaddedShortcut(nn.Module):
    """ResNet's option A: the shortcut is strided and padded with channels of zeros."""

    def __init__(self, by_cat: bool) -> None:
        super().__init__()
        self.by_cat = by_cat
        self.stem, self.wide = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 16, 3, 2, 1)
        self.norm, self.head = nn.BatchNorm2d(16), nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        short = x[:, :, ::2, ::2]
        if self.by_cat:
            zeros = torch.zeros(short.size(0), 8, short.size(2), short.size(3), dtype=x.dtype)
            short = torch.cat([short, zeros], 1)
        else:
            short = F.pad(short, (0, 0, 0, 0, 4, 4))
        return self.head(F.relu(self.norm(self.wide(x)) + short))


construct("literal_view", Literal, SMALL)
construct("sizes_in_attributes", Attributes, SMALL)
construct(
    "divided_by_out_channels",
    lambda: Net(
        lambda n, x: n.c(torch.tanh(n.b(n.a(x).tanh() / n.a.out_features**0.5))),
        a=nn.Linear(8, 6),
        b=nn.Linear(6, 6),
        c=nn.Linear(6, 2),
    ),
    vector(8),
)
construct("num_flat_features", NumFlatFeatures, SMALL)
construct("asserted_width", Asserted, SMALL)
construct("zeros_hidden_state", Accumulator, tokens())
construct("new_zeros_filled", NewZeros, SMALL)
construct("padded_shortcut", lambda: PaddedShortcut(by_cat=False), SMALL)
construct("padded_shortcut_by_cat", lambda: PaddedShortcut(by_cat=True), SMALL)
for name, op, reads in (
    ("split_literal_used_as_sizes", lambda x: torch.cat([t * k for k, t in enumerate(x.split([2, 6], 1), 1)], 1), 8),
    ("slice_literal", lambda x: torch.cat([x[:, :3] * 2, x[:, 3:8]], 1), 8),
    ("view_five_dims", lambda x: x.view(-1, 2, 4, 6, 6).mean(3).reshape(-1, 8, 6, 1), 8),
    ("view_heads", lambda x: x.view(x.shape[0], 4, 2, -1).sum(1).view(-1, 2, 6, 6).repeat(1, 4, 1, 1), 8),
    ("ones_added", lambda x: x + torch.ones(1, 8, 1, 1, dtype=x.dtype), 8),
    ("arange_scaled", lambda x: x * torch.arange(8).view(1, 8, 1, 1), 8),
    ("linspace_added", lambda x: x + torch.linspace(0, 1, x.shape[1], dtype=x.dtype).view(-1, 1, 1), 8),
    ("eye_product", lambda x: torch.einsum("bchw,cd->bdhw", x, torch.eye(8, dtype=x.dtype)), 8),
    ("full_concatenated", lambda x: torch.cat([x, torch.full((len(x), 2, 6, 6), 0.5, dtype=x.dtype)], 1), 10),
    ("coordinates_concatenated", lambda x: torch.cat([x, torch.ones_like(x[:, :2]).cumsum(2) / 6], 1), 10),
    ("zeros_like_added", lambda x: torch.zeros_like(x) + x, 8),
    ("empty_filled", lambda x: torch.empty(len(x), 8, 6, 6, dtype=x.dtype).copy_(x), 8),
    ("divided_by_width", lambda x: x / x.size(1) ** 0.5, 8),
    ("masked_by_position", lambda x: x * (torch.arange(8) < 4).view(1, -1, 1, 1), 8),
    ("numel_mean", lambda x: x * (x.numel() // x.shape[0] // 36 / 8), 8),
    ("loop_over_channels", lambda x: torch.stack([x[:, i] * (1 + i / 8) for i in range(x.size(1))], 1), 8),
    ("loop_over_groups", lambda x: torch.cat([g - g.mean((2, 3), keepdim=True) for g in x.split(2, 1)], 1), 8),
    ("loop_literal", lambda x: torch.cat([x[:, 2 * i : 2 * i + 2].tanh() for i in range(4)], 1), 8),
):
    # what is scaled by the width, or written by position, need not be exact: the layer behind it is
    construct(name, conv_net(op, 8, reads, tail=True), SMALL)


class Filled(nn.Module):
    """Branches write their halves into one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 6, 1)
        self.out = nn.Conv2d(10, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros(x.size(0), 10, x.size(2), x.size(3), dtype=x.dtype)
        h[:, :4] = torch.tanh(self.one(x))
        h[:, 4:] = torch.tanh(self.two(x))
        return self.out(h)


class Broadcast(nn.Module):
    """A code that is expanded over the image to a written size, and joined with it."""

    def __init__(self) -> None:
        super().__init__()
        self.code, self.conv, self.out = nn.Linear(8, 5), nn.Conv2d(3, 6, 1), nn.Conv2d(11, 2, 1)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        z = torch.tanh(self.code(z))[:, :, None, None].expand(-1, 5, 6, 6)
        return self.out(torch.cat([torch.relu(self.conv(x)), z], 1))


construct("halves_written", Filled, SMALL)
construct("code_broadcast", Broadcast, lambda batch: (SMALL(batch), vector(8)(batch)))

# Raw parameters and buffers


class LayerScale(nn.Module):
    """A residual branch scaled by channel."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.stem, self.body, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, 1, 1), nn.Conv2d(8, 2, 1)
        self.gamma = nn.Parameter(1e-1 * torch.ones(shape))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        gamma = self.gamma if self.gamma.dim() > 1 else self.gamma.view(1, -1, 1, 1)
        return self.head(x + gamma * torch.tanh(self.body(x)))


construct("layer_scale", lambda: LayerScale((8,)), SMALL)
construct("layer_scale_4d", lambda: LayerScale((1, 8, 1, 1)), SMALL)
construct("scalar_scale", lambda: LayerScale((1, 1, 1, 1)), SMALL)


class Stored(nn.Module):
    """Something of the channels' size that is registered."""

    def __init__(self, op: Any, persistent: bool = True, **buffers: Tensor) -> None:
        super().__init__()
        self.op = op
        self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 1), nn.Conv2d(6, 2, 1)
        for name, value in buffers.items():
            self.register_buffer(name, value.clone(), persistent)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.tanh(self.b(self.op(self, torch.tanh(self.a(x))))))


for name, op, persistent, buffers in (
    ("mean_and_std_buffers", lambda n, x: (x - n.mean) / n.std, True, {"mean": normal(1, 8, 1, 1), "std": 1 + normal(1, 8, 1, 1).abs()}),
    ("buffer_not_persistent", lambda n, x: x * n.scale.view(-1, 1, 1), False, {"scale": torch.ones(8)}),
    ("buffer_of_rank_one", lambda n, x: x + n.shift[None, :, None, None], True, {"shift": torch.ones(8)}),
    ("mask_buffer", lambda n, x: x * n.mask, True, {"mask": (torch.arange(8) % 3 > 0).double().view(8, 1, 1)}),
    ("bool_mask_buffer", lambda n, x: x.masked_fill(n.mask, 0.0), True, {"mask": (torch.arange(8) % 3 == 0).view(8, 1, 1)}),
    ("integer_buffer", lambda n, x: x * n.shifts.view(-1, 1, 1), True, {"shifts": torch.arange(1, 9)}),
    ("matrix_buffer", lambda n, x: torch.einsum("bchw,dc->bdhw", x, n.mix), True, {"mix": normal(8, 8)}),
    ("scalar_buffer", lambda n, x: x * n.temperature, True, {"temperature": torch.tensor(0.7)}),
    ("position_buffer", lambda n, x: x + n.position[:, :, :6, :6], True, {"position": normal(1, 8, 9, 9)}),
    ("buffer_by_lookup", lambda n, x: x * n.table[torch.arange(8)].view(-1, 1, 1), True, {"table": torch.ones(8)}),
):  # fmt: skip
    construct(name, lambda op=op, persistent=persistent, buffers=buffers: Stored(op, persistent, **buffers), SMALL)


class RunningMean(nn.Module):
    """A moving average that the forward itself updates."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.in_place = in_place
        self.a, self.b = nn.Linear(8, 6), nn.Linear(6, 2)
        self.register_buffer("ema", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.a(x))
        if self.training:
            with torch.no_grad():
                mean = x.mean((0, 1))
                if self.in_place:
                    self.ema.mul_(0.9).add_(mean, alpha=0.1)
                else:
                    self.ema = 0.9 * self.ema + 0.1 * mean
        return self.b(x - self.ema)


construct("running_mean", lambda: RunningMean(in_place=True), tokens())
construct("running_mean_assigned", lambda: RunningMean(in_place=False), tokens())


class ParameterList(nn.Module):
    """Parameters in a list and in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList([parameter(8, 6), parameter(6, 7)])
        self.biases = nn.ParameterDict({"one": parameter(6), "two": parameter(7)})
        self.out = nn.Linear(7, 2)

    def forward(self, x: Tensor) -> Tensor:
        for weight, bias in zip(self.weights, self.biases.values(), strict=True):
            x = torch.tanh(x @ weight + bias)
        return self.out(x)


construct("parameter_list", ParameterList, tokens())
construct(
    "frozen_weights",
    lambda: nn.Sequential(
        nn.Conv2d(3, 8, 1).requires_grad_(False), nn.ReLU(), nn.Conv2d(8, 6, 1), nn.ReLU(), nn.Conv2d(6, 2, 1)
    ),
    SMALL,
)
construct("learned_query", lambda: Net(lambda n, x: n.b(torch.tanh(n.a(x)) * torch.sigmoid(n.a(x) @ n.w)),
                                       a=nn.Linear(8, 6), w=parameter(6, 6), b=nn.Linear(6, 2)), tokens())  # fmt: skip

# Control flow, gradients switched off, in place


class Branching(nn.Module):
    """Another layer where the data say so."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.two = nn.Linear(8, 6), nn.Linear(6, 5), nn.Linear(6, 5)
        self.out = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        layer = self.one if x.mean() > 0 else self.two
        return self.out(torch.tanh(layer(torch.tanh(self.stem(x)))))


class EarlyExit(nn.Module):
    """A second block only where the first is not sure."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Linear(8, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.one(x))
        out = self.head(h)
        if out.softmax(-1).max().item() < 0.99:
            out = out + self.head(torch.tanh(self.two(h)))
        return out


class LayerDrop(nn.Module):
    """Blocks that are looped over, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleDict({f"block{i}": nn.Conv2d(6, 6, 3, padding=1) for i in range(3)})
        self.stem, self.head = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for i in range(len(self.blocks)):
            x = x + F.dropout(F.relu(self.blocks[f"block{i}"](x)), 0.0, self.training)
        return self.head(x)


construct("branching_on_data", Branching, vector(8))
construct("early_exit", EarlyExit, vector(8))
construct("blocks_by_name", LayerDrop, SMALL)


def no_grad(x: Tensor) -> Tensor:
    with torch.no_grad():
        scale = x.abs().amax((2, 3), keepdim=True)
    return x / (1 + scale)


def written(x: Tensor) -> Tensor:
    x = x.clone()
    x[:, :4] = x[:, :4] * 2
    x[:, 4:] += 0.5
    return x


def written_in_space(x: Tensor) -> Tensor:
    x = x.clone()
    x[:, :, 0] = 0
    x[..., -1].mul_(2)
    return x


def written_by_mask(x: Tensor) -> Tensor:
    x = x.clone()
    x[x < 0] = 0.1
    return x


def half_precision(x: Tensor) -> Tensor:
    return x.float().tanh().double()


for name, op in (
    ("no_grad_inside", no_grad),
    ("detach_inside", lambda x: x * torch.sigmoid(x.detach())),
    ("straight_through", lambda x: x + (x.round() - x).detach()),
    ("relu_in_place", lambda x: F.relu_(x.clone())),
    ("add_in_place", lambda x: x.clone().add_(x.square(), alpha=0.5)),
    ("mul_in_place_broadcast", lambda x: x.clone().mul_(x.mean((2, 3), keepdim=True))),
    ("out_argument", lambda x: x + torch.tanh(x.detach(), out=torch.empty_like(x))),
    ("slices_written", written),
    ("space_written", written_in_space),
    ("mask_written", written_by_mask),
    ("masked_fill_in_place", lambda x: x.clone().masked_fill_(x > 0.5, 0.0)),
    ("cast_inside", half_precision),
    ("functional_dropout_none", lambda x: F.dropout(F.dropout2d(x, 0.0, True), p=0.0)),
    ("checkpointed", lambda x: checkpoint(torch.tanh, x, use_reentrant=False)),
    ("item_scale", lambda x: x * (1 + float(x.detach().square().sum())) ** 0),
    ("unused_computation", lambda x: (x.mean(1), x)[1]),
    ("vmapped", lambda x: torch.vmap(torch.tanh)(x)),
    ("nan_to_num", lambda x: torch.nan_to_num(x)),
    ("len_and_ndim", lambda x: x.view(len(x), *x.shape[1:]) if x.ndim == 4 and x.is_floating_point() else x),
):
    construct(name, conv_net(op), SMALL)
construct("isfinite_checked", conv_net(lambda x: x if bool(torch.isfinite(x).all()) else x * 0), SMALL)


class Checkpointed(nn.Module):
    """A block that is computed again in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block, self.head = (
            nn.Linear(8, 6),
            nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 6)),
            nn.Linear(6, 2),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        return self.head(x + checkpoint(self.block, x, use_reentrant=False))


construct("checkpointed_block", Checkpointed, tokens())

# Inputs and outputs


class Multiple(nn.Module):
    """Several inputs, several outputs."""

    def __init__(self, form: Any) -> None:
        super().__init__()
        self.form = form
        self.one, self.two = nn.Linear(8, 6), nn.Linear(6, 5)
        self.joined = nn.Linear(11, 7)
        self.heads = nn.ModuleList([nn.Linear(7, 2), nn.Linear(7, 3)])

    def forward(self, a: Tensor, b: Tensor | None = None) -> Any:
        b = a[:, :6] if b is None else b
        h = torch.tanh(self.joined(torch.cat([torch.tanh(self.one(a)), torch.relu(self.two(b))], -1)))
        return self.form(*[head(h) for head in self.heads])


@dataclasses.dataclass
class Output:
    logits: Tensor
    boxes: Tensor | None = None


Named = collections.namedtuple("Named", ["logits", "boxes"])


def both(batch: int) -> tuple[Tensor, Tensor]:
    return normal(batch, 8), normal(batch, 6, seed=1)


construct("several_inputs", lambda: Multiple(lambda x, y: (x, y)), both)
construct("optional_input", lambda: Multiple(lambda x, y: [x, y]), vector(8))
construct(
    "dict_of_inputs", lambda: Multiple(lambda x, y: {"x": x, "y": y}), lambda b: dict(zip("ab", both(b), strict=True))
)
construct("dataclass_output", lambda: Multiple(Output), both)
construct("named_tuple_output", lambda: Multiple(Named), both)
construct("nested_output", lambda: Multiple(lambda x, y: {"out": (x, [y, None]), "name": "it"}), both)
construct("one_output_dropped", lambda: Multiple(lambda x, y: x), both)


class NestedInput(nn.Module):
    """A dict in a list as input, keyword-only arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(8, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, batch: list[dict[str, Tensor]], *, scale: float = 1.0) -> Tensor:
        return self.out(torch.tanh(self.a(batch[0]["x"])) + scale * torch.tanh(self.b(batch[1]["y"])))


class Auxiliary(nn.Module):
    """A second head that runs in training only."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3)
        self.fc, self.aux = (
            nn.Linear(6, 2),
            nn.Sequential(nn.Conv2d(8, 5, 1), nn.ReLU(), nn.Flatten(), nn.Linear(5 * 16, 2)),
        )

    def forward(self, x: Tensor) -> Any:
        h = torch.tanh(self.conv1(x))
        out = self.fc(torch.relu(self.conv2(h)).mean((2, 3)))
        return (out, self.aux(h)) if self.training else out


class LiteralAuxiliary(Auxiliary):
    def __init__(self) -> None:
        super().__init__()
        self.aux = nn.Linear(8 * 16, 2)

    def forward(self, x: Tensor) -> Any:
        h = torch.tanh(self.conv1(x))
        out = self.fc(torch.relu(self.conv2(h)).mean((2, 3)))
        return (out, self.aux(h.view(-1, 8 * 16))) if self.training else out


class FeaturesReturned(nn.Module):
    """The middle layer's output is an output too: only the layer before it can be pruned."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 1), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.b(torch.tanh(self.a(x))))
        return self.c(h), h


construct("nested_input", NestedInput, lambda b: ([{"x": normal(b, 8)}, {"y": normal(b, 6, seed=1)}],))
construct(
    "keyword_only_input", NestedInput, lambda b: {"batch": [{"x": normal(b, 8)}, {"y": normal(b, 6)}], "scale": 0.5}
)
construct("auxiliary_head", Auxiliary, SMALL)
construct("auxiliary_head_literal", LiteralAuxiliary, SMALL)
construct("features_returned", FeaturesReturned, SMALL)

# Hooks, functions of one's own, what nobody has heard of


class Scaled(torch.autograd.Function):
    """With a backward of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(x)
        return gradient * s * (1 + x * (1 - s))


def hooked() -> nn.Module:
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Tanh(), nn.Conv2d(8, 6, 1), nn.Tanh(), nn.Conv2d(6, 2, 1))
    net[0].register_forward_hook(lambda module, args, output: output * 2)
    net[2].register_forward_pre_hook(lambda module, args: (args[0] + 0.1,))
    net[2].register_full_backward_hook(lambda module, grads, outputs: None)
    return net


class Recorder(nn.Module):
    """Keeps its features, as extractors do, through a hook."""

    def __init__(self) -> None:
        super().__init__()
        self.features: dict[str, Tensor] = {}
        self.a, self.b, self.c = nn.Linear(8, 6), nn.Linear(6, 5), nn.Linear(5, 2)
        self.a.register_forward_hook(self.keep)

    def keep(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.features["a"] = output.detach()

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.relu(self.b(torch.relu(self.a(x)))))


@torch.library.custom_op("constructs::reverse", mutates_args=())
def reverse(x: Tensor) -> Tensor:
    """An operation that no rule can know."""
    return x.flip(1).clone()


reverse.register_autograd(lambda ctx, gradient: gradient.flip(1))

construct("own_autograd_function", conv_net(Scaled.apply), SMALL)
construct("hooks", hooked, SMALL)
construct("recording_hook", Recorder, vector(8))
construct(
    "unknown_operation",
    lambda: Net(lambda n, x: n.c(torch.tanh(n.b(reverse(torch.tanh(n.a(x)))))), a=nn.Conv2d(3, 8, 1),
                b=nn.Conv2d(8, 6, 1), c=nn.Conv2d(6, 2, 1)),
    SMALL,
)  # fmt: skip
construct("unknown_operation_alone", conv_net(reverse), SMALL, frozen=True)
construct("inverse", linear_net(lambda x: torch.linalg.inv(x.mT @ x + torch.eye(8)), tail=True), tokens())
construct("singular_values", linear_net(lambda x: torch.linalg.svdvals(x), 8, 6, tail=True), tokens())
construct(
    "everything_returned",
    lambda: Net(lambda n, x: (n.a(x), n.b(n.a(x))), a=nn.Linear(8, 6), b=nn.Linear(6, 2)),
    vector(8),
    frozen=True,
)
construct("one_layer", lambda: nn.Sequential(nn.Linear(8, 6), nn.ReLU()), vector(8), frozen=True)
construct(
    "unused_layer",
    lambda: Net(lambda n, x: n.b(torch.tanh(n.a(x))), a=nn.Linear(8, 6), b=nn.Linear(6, 2), never=nn.Linear(6, 6)),
    vector(8),
)
