"""Views, joins, cuts, permutations and everything else that moves channels about."""

from __future__ import annotations

from typing import Any

import torch
from networks import Net
from torch import Tensor, nn
from torch.nn import functional as F

from constructs.registry import construct, conv_net, image, linear_net, parameter, signal, tokens, vector

SMALL = image(side=6)

# Views

for name, op in (
    ("permute_back", lambda x: x.permute(0, 2, 3, 1).permute(0, 3, 1, 2)),
    ("transpose_space", lambda x: x.transpose(2, 3)),
    ("movedim", lambda x: torch.movedim(torch.movedim(x, 1, -1).contiguous(), -1, 1)),
    ("swapaxes", lambda x: x.swapaxes(1, 2).swapaxes(1, 2)),
    ("contiguous_channels_last", lambda x: x.contiguous(memory_format=torch.channels_last)),
    ("clone", lambda x: x.clone()),
    ("flatten_unflatten", lambda x: x.flatten(2).unflatten(2, (6, 6))),
    ("view_as", lambda x: x.reshape(len(x), -1).view_as(x)),
    ("squeeze_unsqueeze", lambda x: x.unsqueeze(1).squeeze(1)),
    ("none_index", lambda x: x[:, None, :, None].squeeze(3)[:, 0]),
    ("rearranged_batch", lambda x: x.permute(1, 0, 2, 3).reshape(x.size(1), -1).view(x.size(1), x.size(0), 6, 6).transpose(0, 1)),
    ("expand_batch", lambda x: x.mean(0, keepdim=True).expand_as(x) + x),
    ("split_space", lambda x: torch.cat(x.split(3, dim=2), dim=2)),
    ("chunk_space", lambda x: sum(x.chunk(2, dim=3))),
    ("roll_space", lambda x: x.roll((1, 2), (2, 3))),
    ("flip_space", lambda x: x.flip(-1)),
    ("rot90", lambda x: torch.rot90(x, 1, (2, 3))),
    ("slice_space", lambda x: x[..., 1:, :-1]),
    ("slice_space_strided", lambda x: x[:, :, ::2, 1::2]),
    ("narrow_space", lambda x: x.narrow(2, 1, 4)),
    ("select_space", lambda x: x.select(3, 2).unsqueeze(-1)),
    ("window_partition", lambda x: x.view(len(x), -1, 2, 3, 2, 3).permute(0, 2, 4, 1, 3, 5).reshape(-1, x.size(1), 3, 3).mean((2, 3), keepdim=True).view(len(x), 4, -1, 1).transpose(1, 2)),
    ("space_to_batch", lambda x: x.unfold(2, 2, 2).unfold(3, 2, 2).flatten(4).mean(-1)),
    ("meshgrid_of_positions", lambda x: x + torch.arange(6, device=x.device).to(x) / 6),
    ("triu_space", lambda x: x.triu()),
    ("diagonal_space", lambda x: x.diagonal(dim1=2, dim2=3).unsqueeze(-1)),
    ("unbind_space", lambda x: torch.stack(list(x.unbind(2))[::-1], dim=2)),
    ("index_batch", lambda x: x[torch.arange(len(x) - 1, -1, -1)]),
):  # fmt: skip
    construct(name, conv_net(op), SMALL)

construct(
    "flatten",
    lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(96, 8), nn.ReLU(), nn.Linear(8, 2)),
    SMALL,
)
construct(
    "flatten_channels_last",
    lambda: Net(
        lambda n, x: n.b(torch.tanh(n.a(x)).permute(0, 2, 3, 1).flatten(1)), a=nn.Conv2d(3, 6, 3), b=nn.Linear(96, 2)
    ),
    SMALL,
)
construct(
    "unflatten",
    lambda: nn.Sequential(nn.Linear(8, 24), nn.Tanh(), nn.Unflatten(1, (6, 2, 2)), nn.Conv2d(6, 2, 2)),
    vector(8),
)
construct(
    "decoder_view",
    lambda: Net(lambda n, z: n.b(F.relu(n.a(z)).view(-1, 6, 2, 2)), a=nn.Linear(8, 24), b=nn.ConvTranspose2d(6, 2, 2)),
    vector(8),
)
construct(
    "channels_as_batch",
    lambda: Net(lambda n, x: n.c(n.b(torch.tanh(n.a(x)).flatten(0, 1).unsqueeze(1)).view(len(x), -1, 6, 6)),
                a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(1, 1, 3, padding=1, bias=False), c=nn.Conv2d(8, 2, 1)),
    SMALL,
)  # fmt: skip
construct(
    "tokens_of_patches",
    lambda: Net(lambda n, x: n.b(torch.tanh(n.a(x)).flatten(2).transpose(1, 2) + n.position),
                a=nn.Conv2d(3, 8, 2, stride=2), position=parameter(1, 9, 8), b=nn.Linear(8, 2)),
    SMALL,
)  # fmt: skip
construct(
    "class_token",
    lambda: Net(lambda n, x: n.b(torch.cat([n.token.expand(len(x), -1, -1), torch.tanh(n.a(x))], 1))[:, 0],
                a=nn.Linear(8, 6), token=parameter(1, 1, 6), b=nn.Linear(6, 2)),
    tokens(),
)  # fmt: skip

# The channels repeated, rearranged, padded

for name, op, width, reads in (
    ("pixel_shuffle", lambda x: F.pixel_shuffle(x, 2), 16, 4),
    ("pixel_unshuffle", lambda x: F.pixel_unshuffle(x, 2), 8, 32),
    ("space_to_depth_by_hand", lambda x: torch.cat([x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]], 1), 8, 32),
    ("depth_to_space_by_hand", lambda x: x.view(len(x), 4, 2, 2, 6, 6).permute(0, 1, 4, 2, 5, 3).reshape(len(x), 4, 12, 12), 16, 4),
    ("channel_shuffle", lambda x: x.view(x.size(0), 4, x.size(1) // 4, 6, 6).transpose(1, 2).reshape(x.size(0), -1, 6, 6), 16, 16),
    ("channel_shuffle_literal", lambda x: x.view(-1, 4, 4, 6, 6).transpose(1, 2).reshape(-1, 16, 6, 6), 16, 16),
    ("channel_shuffle_module", lambda x: nn.ChannelShuffle(4)(x), 16, 16),
    ("repeat_channels", lambda x: x.repeat(1, 2, 1, 1), 8, 16),
    ("tile_channels", lambda x: x.tile((2, 1, 1)), 8, 16),
    ("repeat_interleave_channels", lambda x: x.repeat_interleave(2, dim=1), 8, 16),
    ("expand_channels", lambda x: x.unsqueeze(2).expand(-1, -1, 2, -1, -1).flatten(1, 2), 8, 16),
    ("flip_channels", lambda x: x.flip(1), 8, 8),
    ("flip_channels_added", lambda x: x + x.flip(1), 8, 8),
    ("roll_half_the_channels", lambda x: x.roll(4, 1), 8, 8),
    ("pad_channels_zero", lambda x: F.pad(x, (0, 0, 0, 0, 2, 2)), 8, 12),
    ("pad_channels_value", lambda x: F.pad(x, (0, 0, 0, 0, 1, 0), value=0.5), 8, 9),
    ("unfold", lambda x: F.unfold(x, 3, padding=1).view(len(x), -1, 6, 6), 6, 54),
    ("fold", lambda x: F.fold(x.flatten(2)[..., :9], (6, 6), 2, stride=2), 16, 4),
    ("unfold_fold", lambda x: F.fold(F.unfold(x, 2, stride=2), 6, 2, stride=2), 8, 8),
):  # fmt: skip
    construct(name, conv_net(op, width, reads), SMALL)
# Positions written in code, and a layer behind them
for name, op, width, reads in (
    ("index_list", lambda x: x[:, [6, 2, 3, 1, 5, 0, 7, 4]], 8, 8),
    ("index_list_partial", lambda x: x[:, [0, 2, 4, 5, 6, 7]], 8, 6),
    ("index_twice", lambda x: x[:, [0, 1, 2, 3, 4, 5, 6, 7, 7, 6]], 8, 10),
    ("index_mask", lambda x: x[:, torch.tensor([True, False] * 4)], 8, 4),
    ("index_select_constant", lambda x: x.index_select(1, torch.tensor([7, 6, 5, 4, 3, 2, 1, 0])), 8, 8),
    ("unbind_and_stack", lambda x: torch.stack([*x.unbind(1)[::2], *x.unbind(1)[1::2]], 1), 8, 8),
):
    construct(name, conv_net(op, width, reads, tail=True), SMALL)
for name, op in (
    ("pad_constant", lambda x: F.pad(x, (1, 1, 1, 1), value=0.5)),
    ("pad_reflect", lambda x: F.pad(x, (1, 2, 1, 0), mode="reflect")),
    ("pad_replicate", lambda x: F.pad(x, (1, 2, 1, 0), mode="replicate")),
    ("pad_circular", lambda x: F.pad(x, (1, 1, 1, 1), mode="circular")),
    ("pad_negative", lambda x: F.pad(x, (-1, 0, 0, -2))),
    ("zero_pad_module", lambda x: nn.ZeroPad2d(1)(x)),
):
    construct(name, conv_net(op), SMALL)

# Cuts


class Cut(nn.Module):
    """Channels cut in pieces that are used in different ways."""

    def __init__(self, pieces: Any, *widths: int, channels: int = 8) -> None:
        super().__init__()
        self.pieces = pieces
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.readers = nn.ModuleList([nn.Conv2d(width, 4, 1) for width in widths])

    def forward(self, x: Tensor) -> Tensor:
        pieces = self.pieces(torch.tanh(self.stem(x)))
        outs = [reader(piece) for reader, piece in zip(self.readers, pieces, strict=False)]
        return torch.cat(outs, 1)


for name, pieces, widths, channels in (
    ("split", lambda x: x.split(4, 1), (4, 4), 8),
    ("split_list", lambda x: torch.split(x, [6, 10], dim=1), (6, 10), 16),
    ("split_uneven", lambda x: x.split(5, 1), (5, 5, 2), 12),
    ("split_half_of_size", lambda x: x.split(x.size(1) // 2, 1), (4, 4), 8),
    ("chunk_2", lambda x: x.chunk(2, 1), (4, 4), 8),
    ("chunk_3", lambda x: x.chunk(3, 1), (4, 4, 4), 12),
    ("chunk_4", lambda x: x.chunk(4, 1), (4, 4, 4, 4), 16),
    ("chunk_uneven", lambda x: x.chunk(3, 1), (4, 4, 2), 10),
    ("chunk_one_unused", lambda x: x.chunk(3, 1), (4, 4), 12),
    ("tensor_split", lambda x: torch.tensor_split(x, 2, dim=1), (4, 4), 8),
    ("tensor_split_points", lambda x: torch.tensor_split(x, (3, 7), dim=1), (3, 4, 3), 10),
    ("hsplit", lambda x: torch.hsplit(x, 2), (4, 4), 8),
    ("slices", lambda x: (x[:, :4], x[:, 4:]), (4, 4), 8),
    ("slices_of_literals", lambda x: (x[:, :5], x[:, 5:8], x[:, 8:]), (5, 3, 4), 12),
    ("slices_negative", lambda x: (x[:, :-3], x[:, -3:]), (5, 3), 8),
    ("slices_strided", lambda x: (x[:, ::2], x[:, 1::2]), (4, 4), 8),
    ("slices_overlapping", lambda x: (x[:, :6], x[:, 2:]), (6, 6), 8),
    ("slice_first_dropped", lambda x: (x[:, 1:],), (7,), 8),
    ("slice_and_all", lambda x: (x[:, :4], x), (4, 8), 8),
    ("narrow", lambda x: (x.narrow(1, 0, 5), torch.narrow(x, 1, 5, 3)), (5, 3), 8),
    ("select", lambda x: (x.select(1, 0).unsqueeze(1), x[:, 1:]), (1, 7), 8),
    ("view_then_select", lambda x: (x.view(len(x), 2, -1, 6, 6)[:, 0], x.view(len(x), 2, -1, 6, 6)[:, 1]), (4, 4), 8),
    ("unflatten_unbind", lambda x: x.unflatten(1, (2, 4)).unbind(1), (4, 4), 8),
):  # fmt: skip
    construct(
        name, lambda pieces=pieces, widths=widths, channels=channels: Cut(pieces, *widths, channels=channels), SMALL
    )
for name, op, reads in (
    ("chunks_multiplied", lambda x: x.chunk(2, 1)[0] * torch.sigmoid(x.chunk(2, 1)[1]), 4),
    ("chunks_swapped", lambda x: torch.cat(x.chunk(2, 1)[::-1], 1), 8),
    ("slice_added", lambda x: torch.cat([x[:, :4] + x[:, 4:], x[:, 4:]], 1), 8),
    ("slice_processed", lambda x: torch.cat([x[:, :3], F.avg_pool2d(x[:, 3:], 3, 1, 1)], 1), 8),
    ("strided_interleaved", lambda x: torch.stack([-x[:, 1::2], x[:, ::2]], 2).flatten(1, 2), 8),
    ("shift_channels", lambda x: torch.cat([x[:, :2].roll(1, 2), x[:, 2:4].roll(-1, 2), x[:, 4:]], 1), 8),
    ("res2net", lambda x: torch.cat([x[:, :4], torch.tanh(x[:, :4] + x[:, 4:])], 1), 8),
):
    construct(name, conv_net(op, 8, reads), SMALL)
construct("chunks_of_four_added", conv_net(lambda x: sum(x.chunk(4, 1)), 16, 4), SMALL)


class CrossStage(nn.Module):
    """A CSP block: split, a branch with blocks, and everything joined."""

    def __init__(self) -> None:
        super().__init__()
        self.cv1, self.cv2 = nn.Conv2d(3, 8, 1), nn.Conv2d(16, 6, 1)
        self.m = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(2))
        self.out = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = list(F.silu(self.cv1(x)).chunk(2, 1))
        y.extend(F.silu(m(y[-1])) for m in self.m)
        return self.out(F.silu(self.cv2(torch.cat(y, 1))))


construct("cross_stage", CrossStage, SMALL)

# Joins


class Join(nn.Module):
    """Two branches joined by a function."""

    def __init__(self, join: Any, one: int, two: int, reads: int) -> None:
        super().__init__()
        self.join = join
        self.one, self.two = nn.Linear(8, one), nn.Linear(8, two)
        self.leave = nn.Linear(reads, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(self.join(torch.tanh(self.one(x)), torch.relu(self.two(x))))


for name, join, one, two, reads in (
    ("cat", lambda a, b: torch.cat([a, b], -1), 6, 4, 10),
    ("cat_with_itself", lambda a, b: torch.cat([a, b, a], -1), 4, 5, 13),
    ("hstack", lambda a, b: torch.hstack([a, b]), 6, 4, 10),
    ("column_stack", lambda a, b: torch.column_stack((a, b)), 6, 4, 10),
    ("vstack", lambda a, b: sum(torch.vstack([a, b]).chunk(2, 0)), 6, 6, 6),
    ("stack_flattened", lambda a, b: torch.stack([a, b], 1).flatten(1), 6, 6, 12),
    ("stack_interleaved", lambda a, b: torch.stack([a, b], -1).reshape(a.size(0), -1), 6, 6, 12),
    ("stack_mean", lambda a, b: torch.stack([a, b]).mean(0), 6, 6, 6),
    ("stack_max", lambda a, b: torch.stack([a, b], 1).amax(1), 6, 6, 6),
    ("cat_tokens", lambda a, b: torch.cat([a[:, None], b[:, None]], 1).sum(1), 6, 6, 6),
    ("add", lambda a, b: a + b, 6, 6, 6),
    ("multiply", lambda a, b: a * b, 6, 6, 6),
    ("add_to_one", lambda a, b: a + b, 6, 1, 6),
    ("lerp", lambda a, b: torch.lerp(a, b, 0.3), 6, 6, 6),
    ("addcmul", lambda a, b: torch.addcmul(a, a, b, value=0.5), 6, 6, 6),
    ("cat_with_constant", lambda a, b: torch.cat([a, torch.ones(len(a), 1, dtype=a.dtype), b], -1), 6, 4, 11),
    ("highway", lambda a, b: torch.sigmoid(a) * b + (1 - torch.sigmoid(a)) * a, 6, 6, 6),
):
    construct(name, lambda join=join, a=one, b=two, reads=reads: Join(join, a, b, reads), vector(8))

# Positions held in buffers


class Rearranged(nn.Module):
    """A fixed order of the channels, held in a buffer."""

    def __init__(self, op: Any, order: list[int], persistent: bool = True, width: int = 8) -> None:
        super().__init__()
        self.op = op
        self.a, self.b = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(len(order), 2, 1)
        self.register_buffer("perm", torch.tensor(order), persistent=persistent)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.op(torch.tanh(self.a(x)), self.perm))


ORDER = [3, 0, 6, 1, 7, 4, 2, 5]
for name, op, order, persistent in (
    ("permutation_buffer", lambda x, perm: x[:, perm], ORDER, True),
    ("permutation_not_persistent", lambda x, perm: x[:, perm], ORDER, False),
    ("permutation_index_select", lambda x, perm: torch.index_select(x, 1, perm), ORDER, True),
    ("permutation_partial", lambda x, perm: x[:, perm], [1, 3, 4, 5, 6], True),
    ("permutation_and_itself", lambda x, perm: x[:, perm] + x, [1, 0, 3, 2, 5, 4, 7, 6], True),
    ("gather_channels", lambda x, perm: x.gather(1, perm.view(1, -1, 1, 1).expand(len(x), -1, 6, 6)), ORDER, True),
    ("take_along_channels", lambda x, perm: x.take_along_dim(perm.view(1, -1, 1, 1), 1), ORDER, True),
    ("index_add_channels", lambda x, perm: torch.zeros_like(x).index_add(1, perm, x), [1, 0, 3, 2, 5, 4, 7, 6], True),
):
    construct(name, lambda op=op, order=order, persistent=persistent: Rearranged(op, order, persistent), SMALL)


# Positions written in code


def turned(*shape: int) -> Tensor:
    return torch.tensor([7, 6, 5, 4, 3, 2, 1, 0]).view(*shape)


for name, op, reads in (
    ("permutation_list", lambda x: x[:, [3, 0, 6, 1, 7, 4, 2, 5]], 8),
    ("permutation_range", lambda x: x[:, range(7, -1, -1)], 8),
    ("permutation_tensor", lambda x: x[:, torch.tensor(ORDER)], 8),
    ("permutation_arange", lambda x: x[:, torch.arange(x.size(1) - 1, -1, -1)], 8),
    ("list_of_some", lambda x: x[:, [0, 2, 4, 6]], 4),
    ("list_with_repeats", lambda x: x[:, [0, 1, 1, 2, 3, 4, 4, 5, 6, 7]], 10),
    ("lists_side_by_side", lambda x: torch.cat([x[:, [0, 2, 5]], x[:, [1, -1, 3]].neg()], 1), 6),
    ("mask_list", lambda x: x[:, torch.tensor([True, False, True, True] * 2)], 6),
    ("index_select_turned", lambda x: torch.index_select(x, 1, turned(-1)), 8),
    ("index_select_some", lambda x: x.index_select(dim=-3, index=torch.tensor([0, 3, 4, 6])), 4),
    ("gather_constant", lambda x: x.gather(1, turned(1, -1, 1, 1).expand(len(x), -1, *x.shape[2:])), 8),
    ("take_along_constant", lambda x: torch.take_along_dim(x, turned(1, -1, 1, 1), dim=1), 8),
    ("repeat_interleave_by_tensor", lambda x: x.repeat_interleave(torch.tensor([1, 2] * 4), 1), 12),
):
    construct(name, conv_net(op, reads=reads), SMALL)


class HeldList(nn.Module):
    """The positions are a list, or a tensor that is no buffer."""

    def __init__(self, order: Any) -> None:
        super().__init__()
        self.a, self.b, self.order = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 1), order

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x))[:, self.order])


construct("permutation_list_held", lambda: HeldList([3, 0, 6, 1, 7, 4, 2, 5]), SMALL)
construct("permutation_tensor_held", lambda: HeldList(torch.tensor(ORDER)), SMALL)


class ListBranches(nn.Module):
    """Channels are dealt out to branches by lists, each time that the block runs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 1)
        self.branches = nn.ModuleList([nn.Conv2d(3, 4, 1), nn.Conv2d(5, 4, 1)])
        self.dealt = [[0, 2, 4], [1, 3, 5, 6, 7]]

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.a(x))
        for _ in range(2):
            x = torch.tanh(
                torch.cat([branch(x[:, dealt]) for branch, dealt in zip(self.branches, self.dealt, strict=True)], 1)
            )
        return self.b(x)


construct("channels_dealt_by_lists", ListBranches, SMALL)
construct(
    "chosen_by_buffer",
    lambda: Net(
        lambda n, x: n.b(torch.tanh(n.a(x))[:, n.chosen]),
        a=nn.Conv2d(3, 8, 3),
        b=nn.Conv2d(4, 2, 1),
        buffers={"chosen": torch.tensor([True, False] * 4)},
    ),
    SMALL,
)
for name, op, reads in (
    ("maxout_by_pooling", lambda x: F.max_pool3d(x.unsqueeze(1), (2, 1, 1)).squeeze(1), 4),
    ("mean_of_pairs_by_pooling", lambda x: F.avg_pool1d(x.flatten(2).mT, 2).mT.unflatten(2, (6, 6)), 4),
    ("pooling_of_one_channel", lambda x: F.max_pool3d(x, (1, 2, 2)), 8),
    ("complex_from_two", lambda x: torch.view_as_real(torch.complex(x, 2 * x)).sum(-1), 8),
    ("complex_from_polar", lambda x: torch.polar(x.abs(), x).real, 8),
    ("eye_written", lambda x: torch.einsum("bchw,cd->bdhw", x, torch.eye(8, dtype=x.dtype)), 8),
    ("triangle_of_ones", lambda x: torch.einsum("bchw,cd->bdhw", x, torch.ones(8, 8, dtype=x.dtype).triu()), 8),
    ("directions", lambda x: torch.linalg.cross(x[:, :, :3], x[:, :, 3:], dim=2), 8),
    ("quantile_of_space", lambda x: x - x.flatten(2).quantile(0.5, -1)[..., None, None], 8),
    ("squeezed_in_place", lambda x: x * x.mean((2, 3), keepdim=True).clone().squeeze_(-1).unsqueeze_(-1), 8),
    ("buckets", lambda x: x * (torch.bucketize(x, torch.tensor([-0.5, 0.0, 0.5], dtype=x.dtype)) + 1), 8),
    ("searched", lambda x: x * torch.searchsorted(torch.tensor([-0.5, 0.5], dtype=x.dtype), x), 8),
    ("pad_channels_to_a_width", lambda x: F.pad(x, (0, 0, 0, 0, 0, 12 - x.size(1))), 12),
    ("expand_as_of_sum", lambda x: x.sum(1, keepdim=True).expand_as(x), 8),
):
    construct(name, conv_net(op, reads=reads), SMALL)
construct(
    "neighbours_by_pooling",
    conv_net(lambda x: F.avg_pool3d(x.unsqueeze(1), (3, 1, 1), 1, (1, 0, 0)).squeeze(1)),
    SMALL,
    approximate=True,
)


construct(
    "permutation_inverse",  # the inverse is no buffer, so it can't be made to count anew
    lambda: Rearranged(lambda x, perm: torch.tanh(x[:, perm])[:, perm.argsort()], ORDER),
    SMALL,
    frozen=True,
)


class SplitByIndex(nn.Module):
    """The channels to convolve, and the others, as two lists of positions (PConv, HardNet, pruned ResNets)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.convolved, self.kept = [0, 3, 4, 7], [1, 2, 5, 6]
        self.conv, self.out = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        return self.out(torch.cat([torch.tanh(self.conv(x[:, self.convolved])), x[:, self.kept]], 1))


construct("index_lists_split", SplitByIndex, SMALL)
construct(
    "gather_tokens",
    lambda: Net(lambda n, x: n.b(torch.tanh(n.a(x)).gather(1, n.order.view(1, -1, 1).expand(len(x), 6, 6))),
                a=nn.Linear(8, 6), b=nn.Linear(6, 2), buffers={"order": torch.tensor([5, 3, 1, 0, 2, 4])}),
    tokens(),
)  # fmt: skip
construct(
    "gather_token_by_argmax",
    lambda: Net(lambda n, x: n.b(torch.tanh(n.a(x))[torch.arange(len(x)), x[:, :, 0].argmax(1)]),
                a=nn.Linear(8, 6), b=nn.Linear(6, 2)),
    tokens(),
)  # fmt: skip
construct(
    "sorted_tokens",
    lambda: Net(lambda n, x: n.b(torch.tanh(n.a(x)).sort(1).values), a=nn.Linear(8, 6), b=nn.Linear(6, 2)),
    tokens(),
)
construct(
    "sorted_channels",
    lambda: nn.Sequential(
        nn.Linear(8, 6), nn.Tanh(), Net(lambda n, x: x.sort(-1).values), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)
    ),
    tokens(),
)
construct(
    "top_k_tokens",
    lambda: Net(
        lambda n, x: n.b(torch.tanh(n.a(x)).topk(3, dim=1).values.mean(1)), a=nn.Linear(8, 6), b=nn.Linear(6, 2)
    ),
    tokens(),
)
construct(
    "scatter_tokens",
    lambda: Net(lambda n, x: n.b(torch.zeros(len(x), 4, 6, dtype=x.dtype).index_add(1, n.segment, torch.tanh(n.a(x)))),
                a=nn.Linear(8, 6), b=nn.Linear(6, 2), buffers={"segment": torch.tensor([0, 0, 1, 2, 3, 3])}),
    tokens(),
)  # fmt: skip
construct(
    "roll_tokens",
    linear_net(lambda x: torch.cat([x.roll(1, 1)[..., :4], x.roll(-1, 1)[..., 4:]], -1)),
    tokens(),
)
construct("shift_tokens", linear_net(lambda x: F.pad(x, (0, 0, 1, -1))), tokens())
construct("concat_shifted_tokens", linear_net(lambda x: torch.cat([x[:, :-1], x[:, 1:]], -1), 6, 12), tokens())
construct("merge_patches", linear_net(lambda x: torch.cat([x[:, 0::2], x[:, 1::2]], -1), 6, 12), tokens())
construct("merge_patches_by_view", linear_net(lambda x: x.reshape(len(x), 3, -1), 6, 12), tokens())
construct(
    "frames_by_unfold",
    lambda: Net(lambda n, x: n.b(torch.tanh(n.a(x)).unfold(2, 3, 1).transpose(1, 2).flatten(2)),
                a=nn.Conv1d(3, 8, 1), b=nn.Linear(24, 2)),
    signal(),
)  # fmt: skip
construct(
    "as_strided",
    conv_net(lambda x: torch.as_strided(x.contiguous(), x.shape, x.contiguous().stride()), tail=True),
    SMALL,
)


# Writing where a mask of channels says


def set_by_mask(net: Any, x: Tensor) -> Tensor:
    x = torch.tanh(net.a(x)).clone()
    x[:, net.mask] = 0.5
    return net.b(x)


def scaled_by_mask(net: Any, x: Tensor) -> Tensor:
    x = torch.tanh(net.a(x)).clone()
    x[:, net.mask] *= 2.0
    x[:, ~net.mask] += x[:, ~net.mask].sin()
    return net.b(x)


def rows_by_mask(net: Any, x: Tensor) -> Tensor:
    x = torch.tanh(net.a(x)).clone()
    x[..., torch.tensor([True, False] * 3)] = x[..., 1::2]
    return net.b(x)


for _name, _run in (("set", set_by_mask), ("scaled", scaled_by_mask), ("rows", rows_by_mask)):
    construct(
        f"mask_{_name}",
        lambda run=_run: Net(
            run,
            buffers={"mask": torch.tensor([True, False, False, True] * 2)},
            a=nn.Conv2d(3, 8, 1),
            b=nn.Conv2d(8, 2, 1),
        ),
        SMALL,
    )


# Rounding to a grid, and the same function for each example

per_channel = torch.fake_quantize_per_channel_affine

for _name, _op in (
    ("fake_quantize", lambda n, x: torch.fake_quantize_per_tensor_affine(x, 0.1, 3, -128, 127)),
    ("fake_quantize_tensor", lambda n, x: torch.fake_quantize_per_tensor_affine(x, n.scale[:1], n.zero[:1], -128, 127)),
    ("fake_quantize_channels", lambda n, x: per_channel(x.float(), n.scale.float(), n.zero, 1, -128, 127).double()),
    ("vmap", lambda n, x: torch.vmap(lambda each: F.softplus(each) * 2 - each)(x)),
    ("vmap_numbered", lambda n, x: torch.vmap(lambda each, number: each * number)(x, torch.arange(len(x)))),
    (
        "vmap_product",
        lambda n, x: torch.vmap(lambda each: torch.einsum("chw,c->hw", each, n.weight))(x).unsqueeze(1) + x,
    ),
):
    construct(
        _name,
        lambda op=_op: Net(
            lambda n, x: n.b(op(n, torch.tanh(n.a(x)))),
            buffers={"scale": torch.full((8,), 0.1), "zero": torch.arange(8, dtype=torch.int32)},
            a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(8, 2, 1), weight=parameter(8),
        ),
        SMALL,
    )  # fmt: skip
