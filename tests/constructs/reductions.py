"""Pools, interpolation, sums and their like, over space and over channels; softmax, cumulative sums, Fourier."""

from __future__ import annotations

import torch
from networks import Net
from torch import Tensor, nn
from torch.nn import functional as F

from constructs.registry import construct, conv_net, image, linear_net, signal, tokens, volume

SMALL = image(side=6)

# Over space

for name, op in (
    ("max_pool", lambda x: F.max_pool2d(x, 2)),
    ("max_pool_overlapping", lambda x: F.max_pool2d(x, 3, 2, 1, ceil_mode=True)),
    ("avg_pool", lambda x: F.avg_pool2d(x, 2)),
    ("avg_pool_padded", lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False)),
    ("lp_pool", lambda x: F.lp_pool2d(x + 2, 2, 2)),
    ("adaptive_avg_pool", lambda x: F.adaptive_avg_pool2d(x, (2, 3))),
    ("adaptive_avg_pool_to_one", lambda x: F.adaptive_avg_pool2d(x, 1)),
    ("adaptive_max_pool", lambda x: F.adaptive_max_pool2d(x, 2)),
    ("max_unpool", lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2)),
    ("interpolate_nearest", lambda x: F.interpolate(x, scale_factor=2)),
    ("interpolate_nearest_size", lambda x: F.interpolate(x, size=(9, 4))),
    ("interpolate_bilinear", lambda x: F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=True)),
    ("interpolate_bilinear_size", lambda x: F.interpolate(x, size=x.shape[2] + 3, mode="bilinear")),
    ("interpolate_bicubic", lambda x: F.interpolate(x, size=(7, 5), mode="bicubic")),
    ("interpolate_area", lambda x: F.interpolate(x, size=3, mode="area")),
    ("upsample_module", lambda x: nn.Upsample(scale_factor=2, mode="nearest-exact")(x)),
    ("sum_space", lambda x: x.sum((2, 3), keepdim=True)),
    ("mean_space", lambda x: x.mean((-2, -1))[..., None, None]),
    ("mean_one_dim", lambda x: x.mean(3, keepdim=True) + x.mean(2, keepdim=True)),
    ("amax_space", lambda x: x.amax((2, 3), keepdim=True)),
    ("max_with_index_space", lambda x: x.flatten(2).max(-1, keepdim=True)[0].unsqueeze(-1)),
    ("min_space", lambda x: torch.min(x, dim=2, keepdim=True).values),
    ("var_space", lambda x: x.var((2, 3), keepdim=True)),
    ("std_space", lambda x: (x + 0.01 * torch.arange(6)).std((2, 3), keepdim=True)),
    ("var_mean_space", lambda x: sum(torch.var_mean(x, dim=(2, 3), keepdim=True))),
    ("prod_space", lambda x: (1 + x / 9).prod(2, keepdim=True)),
    ("logsumexp_space", lambda x: x.logsumexp((2, 3), keepdim=True)),
    ("norm_space", lambda x: (x + 2).norm(dim=(2, 3), keepdim=True)),
    ("vector_norm_space", lambda x: torch.linalg.vector_norm(x + 2, ord=3, dim=2, keepdim=True)),
    ("median_space", lambda x: x.flatten(2).median(2, keepdim=True).values.unsqueeze(3)),
    ("gem_pool", lambda x: F.avg_pool2d(x.clamp(min=1e-3).pow(3), x.shape[2:]).pow(1 / 3)),
    ("softmax_space", lambda x: x.flatten(2).softmax(-1).view_as(x)),
    ("spatial_attention_pool", lambda x: (x * x.flatten(2).softmax(-1).view_as(x)).sum((2, 3), keepdim=True)),
    ("cumsum_space", lambda x: x.cumsum(2)),
    ("fft_space", lambda x: torch.fft.ifft2(torch.fft.fft2(x) * 0.5).real),
):
    construct(name, conv_net(op), SMALL)
for name, op in (
    ("max_pool1d", lambda x: F.max_pool1d(x, 2)),
    ("avg_pool1d", lambda x: F.avg_pool1d(x, 3, 1, 1)),
    ("adaptive_max_pool1d", lambda x: F.adaptive_max_pool1d(x, 3)),
    ("interpolate_linear", lambda x: F.interpolate(x, size=5, mode="linear")),
    ("lp_pool1d", lambda x: F.lp_pool1d(x + 2, 2, 2)),
):
    construct(
        name,
        lambda op=op: Net(lambda n, x: n.b(op(torch.tanh(n.a(x)))), a=nn.Conv1d(3, 8, 1), b=nn.Conv1d(8, 2, 1)),
        signal(),
    )
construct("statistics_pool", conv_net(lambda x: torch.cat([x.mean(2), x.std(2)], 1).unsqueeze(2), 6, 12), SMALL)
for name, op in (
    ("max_pool3d", lambda x: F.max_pool3d(x, 2)),
    ("avg_pool3d", lambda x: F.avg_pool3d(x, 2)),
    ("adaptive_avg_pool3d", lambda x: F.adaptive_avg_pool3d(x, 1)),
    ("interpolate_trilinear", lambda x: F.interpolate(x, scale_factor=2, mode="trilinear")),
):
    construct(
        name,
        lambda op=op: Net(lambda n, x: n.b(op(torch.tanh(n.a(x)))), a=nn.Conv3d(3, 8, 1), b=nn.Conv3d(8, 2, 1)),
        volume(),
    )


class SpatialTransformer(nn.Module):
    """Features sampled where a small network says."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.where = nn.Conv2d(3, 8, 1), nn.Linear(8, 6)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        theta = self.where(x.mean((2, 3))).view(-1, 2, 3)
        grid = F.affine_grid(theta, list(x.shape), align_corners=False)
        return self.head(F.grid_sample(x, grid, align_corners=False))


class Warp(nn.Module):
    """Features sampled at positions of their own image."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        grid = x[:, :2].permute(0, 2, 3, 1).tanh()
        return self.head(F.grid_sample(F.relu(self.stem(x)), grid, padding_mode="border", align_corners=True))


class SoftArgmax(nn.Module):
    """The expected position of each channel's heat map."""

    def __init__(self) -> None:
        super().__init__()
        self.maps, self.out = nn.Conv2d(3, 6, 1), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        p = self.maps(x).flatten(2).softmax(2).view(-1, 6, 6, 6)
        steps = torch.linspace(-1, 1, 6, dtype=x.dtype)
        return self.out(torch.stack([(p.sum(2) * steps).sum(2), (p.sum(3) * steps).sum(2)], 2).flatten(1))


class SpatialAttention(nn.Module):
    """CBAM's: a map from the mean and the maximum over the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 8, 1), nn.Conv2d(2, 1, 3, padding=1)
        self.next, self.head = nn.Conv2d(8, 6, 1), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        pooled = torch.cat([x.mean(1, keepdim=True), x.max(1, keepdim=True)[0]], 1)
        return self.head(F.relu(self.next(x * torch.sigmoid(self.conv(pooled)))))


construct("spatial_transformer", SpatialTransformer, SMALL)
construct("grid_sample", Warp, SMALL)
construct("soft_argmax", SoftArgmax, SMALL)
construct("spatial_attention", SpatialAttention, SMALL)

# Over channels

for name, op in (
    ("sum_channels", lambda x: x.sum(1, keepdim=True)),
    ("norm_channels", lambda x: x.norm(dim=1, keepdim=True)),
    ("vector_norm_channels", lambda x: torch.linalg.vector_norm(x, dim=1, keepdim=True)),
    ("sum_of_squares_channels", lambda x: x.pow(2).sum(1, keepdim=True).sqrt()),
    ("sum_everything", lambda x: x.sum((1, 2, 3)).view(-1, 1, 1, 1)),
    ("sum_of_halves", lambda x: (x[:, :4] * x[:, 4:]).sum(1, keepdim=True)),
):
    construct(name, conv_net(op, 8, 1), SMALL)
for name, op in (
    ("mean_channels", lambda x: x.mean(1, keepdim=True)),
    ("amax_channels", lambda x: x.amax(1, keepdim=True)),
    ("max_channels", lambda x: x.max(dim=1, keepdim=True).values),
    ("min_channels", lambda x: x.amin(1, keepdim=True)),
    ("var_channels", lambda x: x.var(1, keepdim=True)),
    ("std_channels", lambda x: x.std(dim=1, unbiased=False, keepdim=True)),
    ("prod_channels", lambda x: (1 + x).prod(1, keepdim=True)),
    ("logsumexp_channels", lambda x: torch.logsumexp(x, 1, keepdim=True)),
    ("mean_everything", lambda x: x.mean((1, 2, 3)).view(-1, 1, 1, 1)),
    ("median_channels", lambda x: x.median(1, keepdim=True).values),
):
    construct(name, conv_net(op, 8, 1), SMALL, approximate=True)
    construct(f"{name}_then_more", conv_net(op, 8, 1, tail=True), SMALL)
for name, op, reads in (
    ("mean_across_groups", lambda x: x.unflatten(1, (2, -1)).mean(1), 4),
    ("subtract_the_mean", lambda x: x - x.mean((2, 3), keepdim=True), 8),
    ("divide_by_the_sum", lambda x: x / (1 + x.square().sum(1, keepdim=True)), 8),
    ("cumsum_channels", lambda x: x.cumsum(1), 8),
    ("squash", lambda x: x * x.norm(dim=1, keepdim=True) / (1 + x.square().sum(1, keepdim=True)), 8),
):
    construct(name, conv_net(op, 8, reads), SMALL)
for name, op in (
    ("softmax_channels", lambda x: x.softmax(1)),
    ("softmax_2d", lambda x: nn.Softmax2d()(x)),
    ("log_softmax_channels", lambda x: F.log_softmax(x, dim=1)),
    ("subtract_the_channel_mean", lambda x: x - x.mean(1, keepdim=True)),
    ("difference_channels", lambda x: F.pad(x.diff(dim=1), (0, 0, 0, 0, 1, 0))),
    ("max_pool_channels", lambda x: F.max_pool1d(x.flatten(2).mT, 3, 1, 1).mT.view_as(x)),
    ("conv_over_channels", lambda x: F.conv1d(x.flatten(2).mT.reshape(-1, 1, 8), x.new_ones(1, 1, 3), padding=1).view(len(x), 6, 6, 8).permute(0, 3, 1, 2)),
    ("fft_channels", lambda x: torch.fft.fft(x, dim=1).abs()),
    ("top_channels", lambda x: x * (x >= x.topk(4, dim=1).values[:, -1:]).to(x.dtype)),
    ("argmax_channels", lambda x: x * (x.argmax(1, keepdim=True) > 3)),
):  # fmt: skip
    construct(name, conv_net(op, 8, 8, tail=True), SMALL)
for name, op in (
    ("softmax_features", lambda x: x.softmax(-1)),
    ("mse_mean", lambda x: x * F.mse_loss(x, torch.zeros_like(x))),
    ("smooth_l1_mean", lambda x: x * F.smooth_l1_loss(x, x.cos(), beta=0.3)),
    ("bce_sum", lambda x: x * F.binary_cross_entropy_with_logits(x, x.sigmoid(), reduction="sum") / 99),
    ("gumbel_like", lambda x: torch.softmax((x + 0.1) / 0.5, -1)),
):
    construct(name, linear_net(op, tail=True), tokens())
for name, op in (
    ("softmax_tokens", lambda x: x.softmax(1)),
    ("mse_sum", lambda x: x * F.mse_loss(x, x.square(), reduction="sum")),
    ("huber_each", lambda x: F.huber_loss(x, x.square(), reduction="none", delta=0.4)),
    ("cumsum_tokens", lambda x: x.cumsum(1)),
    ("cummax_tokens", lambda x: x.cummax(1).values),
    ("cumprod_tokens", lambda x: (1 + x / 9).cumprod(1)),
    ("mean_tokens", lambda x: x.mean(1)),
    ("max_tokens", lambda x: x.max(1).values),
    ("last_token", lambda x: x[:, -1]),
    ("difference_tokens", lambda x: x.diff(dim=1)),
    ("running_mean_tokens", lambda x: x.cumsum(1) / torch.arange(1, x.size(1) + 1).view(-1, 1)),
    ("fft_tokens", lambda x: torch.fft.irfft(torch.fft.rfft(x, dim=1), n=x.size(1), dim=1)),
    ("masked_mean_tokens", lambda x: (x * (torch.arange(6) < 4).view(1, -1, 1)).sum(1) / 4),
):
    construct(name, linear_net(op), tokens())
construct("sum_in_groups", conv_net(lambda x: x.view(len(x), 4, 4, 6, 6).sum(2), 16, 4), SMALL)
construct("sum_across_groups", conv_net(lambda x: x.view(len(x), 4, 4, 6, 6).sum(1), 16, 4), SMALL)
construct(
    "fourier_mixing",
    lambda: Net(lambda n, x: n.c(torch.relu(n.b(torch.fft.fft2(torch.tanh(n.a(x))).real))),
                a=nn.Linear(8, 8), b=nn.Linear(8, 6), c=nn.Linear(6, 2)),
    tokens(),
)  # fmt: skip
construct(
    "attention_pool",
    lambda: Net(lambda n, x: n.b((torch.softmax(n.score(torch.tanh(n.a(x))), 1) * n.a(x)).sum(1)),
                a=nn.Linear(8, 6), score=nn.Linear(6, 1), b=nn.Linear(6, 2)),
    tokens(),
)  # fmt: skip
