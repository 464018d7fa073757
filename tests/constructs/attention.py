"""Attention, in the spellings that people use."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from constructs.registry import construct, image, normal, tokens

TOKENS = tokens(6, 5)
IMAGE = image(3, 8)


def between(block: Callable[[], nn.Module], dim: int = 8) -> Callable[[], nn.Module]:
    """A block of tokens between two linear layers."""
    return lambda: nn.Sequential(nn.Linear(5, dim), nn.Tanh(), block(), nn.Linear(dim, 3))


def between_convs(block: Callable[[], nn.Module], dim: int = 8) -> Callable[[], nn.Module]:
    """A block of images between two convolutions."""
    return lambda: nn.Sequential(nn.Conv2d(3, dim, 3, 2, 1), nn.ReLU(), block(), nn.Conv2d(dim, 2, 1))


# torch's own


class SDPA(nn.Module):
    """Projections around F.scaled_dot_product_attention."""

    def __init__(self, dim: int = 8, num_heads: int = 2, kv_heads: int | None = None, **options: Any) -> None:
        super().__init__()
        self.num_heads, self.kv_heads, self.head_dim = num_heads, kv_heads or num_heads, dim // num_heads
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(dim, self.kv_heads * self.head_dim)
        self.v_proj = nn.Linear(dim, self.kv_heads * self.head_dim)
        self.out_proj = nn.Linear(dim, dim)
        self.options = options

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q = self.q_proj(x).view(b, n, self.num_heads, self.head_dim).transpose(1, 2)
        k = self.k_proj(x).view(b, n, self.kv_heads, self.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(b, n, self.kv_heads, self.head_dim).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, **self.options)
        return self.out_proj(y.transpose(1, 2).reshape(b, n, self.num_heads * self.head_dim))


class MaskedSDPA(SDPA):
    """A mask that is a buffer."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        self.options = {"attn_mask": self.mask}
        return super().forward(x)


class OneHeadSDPA(nn.Module):
    """No heads: (N, L, E) right into the function."""

    def __init__(self, dim: int = 8, scale: float | None = None) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(dim, 6), nn.Linear(dim, 6), nn.Linear(dim, dim)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x), scale=self.scale)


ALLOWED = torch.ones(6, 6, dtype=torch.bool).tril()
construct("sdpa", between(SDPA), TOKENS)
construct("sdpa_scale", between(lambda: SDPA(scale=0.3)), TOKENS)
construct("sdpa_causal", between(lambda: SDPA(is_causal=True)), TOKENS)
construct("sdpa_four_heads", between(lambda: SDPA(num_heads=4)), TOKENS)
construct("sdpa_bool_mask", between(lambda: MaskedSDPA(ALLOWED)), TOKENS)
construct("sdpa_added_mask", between(lambda: MaskedSDPA(normal(6, 6))), TOKENS)
construct("sdpa_gqa", between(lambda: SDPA(num_heads=4, kv_heads=2, enable_gqa=True)), TOKENS)
construct("sdpa_one_head", between(OneHeadSDPA), TOKENS)
construct("sdpa_one_head_scale", between(lambda: OneHeadSDPA(scale=0.5)), TOKENS)


class SelfMHA(nn.Module):
    """nn.MultiheadAttention on one input."""

    def __init__(self, dim: int = 8, call: dict[str, Any] | None = None, **options: Any) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(dim, 2, **{"batch_first": True} | options)
        self.call = call or {}

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.attn(x, x, x, **self.call)
        return x + y


class ReturnedWeights(nn.Module):
    """Weights are an output of the model."""

    def __init__(self, average: bool) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(5, 8), nn.Linear(8, 3)
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.average = average

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embed(x)
        y, weights = self.attn(x, x, x, average_attn_weights=self.average)
        return self.head(y), weights


class CrossMHA(nn.Module):
    """Keys and values of other widths than the queries."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.key, self.value = nn.Linear(5, 8), nn.Linear(4, 6), nn.Linear(4, 10)
        self.attn = nn.MultiheadAttention(8, 2, kdim=6, vdim=10, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        x = self.embed(x)
        return self.head(x + self.attn(x, self.key(memory), self.value(memory), need_weights=False)[0])


class PaddedMHA(nn.Module):
    """A padding mask that comes with the input."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(5, 8), nn.Linear(8, 3)
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        x = self.embed(x)
        mask = torch.arange(x.size(1)) >= lengths[:, None]
        return self.head(self.attn(x, x, x, key_padding_mask=mask, need_weights=False)[0])


class SequenceFirst(nn.Module):
    """batch_first=False and a causal mask made in the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(5, 8), nn.Linear(8, 3)
        self.attn = nn.MultiheadAttention(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).transpose(0, 1)
        mask = nn.Transformer.generate_square_subsequent_mask(len(x), dtype=x.dtype)
        return self.head(self.attn(x, x, x, attn_mask=mask, is_causal=True)[0].transpose(0, 1))


def lengths(batch: int) -> tuple[Tensor, Tensor]:
    return normal(batch, 6, 5), torch.arange(batch) % 5 + 2


construct("mha", between(SelfMHA), TOKENS)
construct("mha_no_weights", between(lambda: SelfMHA(call={"need_weights": False})), TOKENS)
construct("mha_no_bias", between(lambda: SelfMHA(bias=False)), TOKENS)
construct("mha_bias_kv", between(lambda: SelfMHA(add_bias_kv=True)), TOKENS)
construct("mha_zero_attn", between(lambda: SelfMHA(add_zero_attn=True)), TOKENS)
construct("mha_bool_mask", between(lambda: SelfMHA(call={"attn_mask": ~ALLOWED})), TOKENS)
construct("mha_sequence_first", SequenceFirst, TOKENS)
construct("mha_kdim_vdim", CrossMHA, lambda batch: (normal(batch, 6, 5), normal(batch, 7, 4)))
construct("mha_padding_mask", PaddedMHA, lengths)
construct("mha_weights_returned", lambda: ReturnedWeights(True), TOKENS)
construct("mha_weights_per_head_returned", lambda: ReturnedWeights(False), TOKENS)


class Seq2Seq(nn.Module):
    """Embeddings of two inputs around a decoder layer, a decoder or a transformer."""

    def __init__(self, core: nn.Module, causal: bool = False) -> None:
        super().__init__()
        self.source, self.target, self.head = nn.Linear(4, 8), nn.Linear(5, 8), nn.Linear(8, 3)
        self.core, self.causal = core, causal

    def forward(self, src: Tensor, tgt: Tensor) -> Tensor:
        src, tgt = self.source(src), self.target(tgt)
        mask = nn.Transformer.generate_square_subsequent_mask(tgt.size(1), dtype=tgt.dtype) if self.causal else None
        if isinstance(self.core, nn.Transformer):
            return self.head(self.core(src, tgt, tgt_mask=mask))
        return self.head(self.core(tgt, src, tgt_mask=mask))


class PaddedEncoder(nn.Module):
    """An encoder with a padding mask, averaged over what is not padding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(5, 8), nn.Linear(8, 3)
        layer = nn.TransformerEncoderLayer(8, 2, 12, 0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        padding = torch.arange(x.size(1)) >= lengths[:, None]
        x = self.encoder(self.embed(x), src_key_padding_mask=padding)
        x = x.masked_fill(padding[..., None], 0.0)
        return self.head(x.sum(1) / lengths[:, None])


def encoder_layer(**options: Any) -> nn.Module:
    return nn.TransformerEncoderLayer(8, 2, 12, 0.0, **{"batch_first": True} | options)


def encoder(**options: Any) -> nn.Module:
    return nn.TransformerEncoder(encoder_layer(**options), 2, nn.LayerNorm(8), enable_nested_tensor=False)


def decoder_layer(**options: Any) -> nn.Module:
    return nn.TransformerDecoderLayer(8, 2, 12, 0.0, batch_first=True, **options)


def transformer(**options: Any) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no nested tensors with norm_first
        return nn.Transformer(8, 2, 1, 1, 12, 0.0, batch_first=True, **options)


PAIR = lambda batch: (normal(batch, 7, 4), normal(batch, 6, 5))  # noqa: E731
construct("encoder_layer", between(encoder_layer), TOKENS)
construct("encoder_layer_norm_first", between(lambda: encoder_layer(norm_first=True)), TOKENS)
construct("encoder_layer_gelu_no_bias", between(lambda: encoder_layer(activation="gelu", bias=False)), TOKENS)
construct("encoder_layer_sequence_first", between(lambda: encoder_layer(batch_first=False)), TOKENS)
construct("encoder", between(encoder), TOKENS)
construct("encoder_norm_first", between(lambda: encoder(norm_first=True, activation=F.silu)), TOKENS)
construct("encoder_padding", PaddedEncoder, lengths)
construct("decoder_layer", lambda: Seq2Seq(decoder_layer()), PAIR)
construct("decoder_layer_norm_first_causal", lambda: Seq2Seq(decoder_layer(norm_first=True), True), PAIR)
construct("decoder", lambda: Seq2Seq(nn.TransformerDecoder(decoder_layer(), 2), True), PAIR)
construct("transformer", lambda: Seq2Seq(transformer()), PAIR)
construct("transformer_norm_first_causal", lambda: Seq2Seq(transformer(norm_first=True), True), PAIR)


# Written by hand: how the heads are split


class Attention(nn.Module):
    """Projections and sizes; the rest is up to the one who writes it."""

    def __init__(self, dim: int = 8, num_heads: int = 2) -> None:
        super().__init__()
        self.dim, self.num_heads, self.head_dim = dim, num_heads, dim // num_heads
        self.scale = self.head_dim**-0.5
        self.q, self.k, self.v = nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)

    def split(self, x: Tensor) -> Tensor:
        return x.view(x.size(0), -1, self.num_heads, self.head_dim).transpose(1, 2)

    def merge(self, x: Tensor) -> Tensor:
        return self.proj(x.transpose(1, 2).flatten(2))

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return q @ k.transpose(-2, -1) * self.scale

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
        return x + self.merge(self.scores(q, k).softmax(-1) @ v)


class ViewTranspose(Attention):
    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.size()
        q = self.q(x).view(batch, length, self.num_heads, self.head_dim).transpose(1, 2)
        k = self.k(x).view(batch, length, self.num_heads, self.head_dim).transpose(1, 2)
        v = self.v(x).view(batch, length, self.num_heads, self.head_dim).transpose(1, 2)
        attn = torch.matmul(q, k.transpose(2, 3)) / math.sqrt(self.head_dim)
        out = torch.matmul(F.softmax(attn, dim=-1), v)
        return self.proj(out.transpose(1, 2).contiguous().view(batch, length, self.num_heads * self.head_dim))


class SizesInForward(Attention):
    """As in minGPT: every size from the input."""

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.size()
        k = self.k(x).view(B, T, self.num_heads, C // self.num_heads).transpose(1, 2)
        q = self.q(x).view(B, T, self.num_heads, C // self.num_heads).transpose(1, 2)
        v = self.v(x).view(B, T, self.num_heads, C // self.num_heads).transpose(1, 2)
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        y = F.softmax(att, dim=-1) @ v
        return self.proj(y.transpose(1, 2).contiguous().view(B, T, C))


class Numbers(Attention):
    """Every size is a number."""

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).reshape(-1, 6, 2, 4).permute(0, 2, 1, 3)
        k = self.k(x).reshape(-1, 6, 2, 4).permute(0, 2, 3, 1)
        v = self.v(x).reshape(-1, 6, 2, 4).permute(0, 2, 1, 3)
        y = torch.softmax(q @ k / 2.0, -1) @ v
        return self.proj(y.permute(0, 2, 1, 3).reshape(-1, 6, 8))


class Unflatten(Attention):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (self.num_heads, -1)).swapaxes(1, 2) for f in (self.q, self.k, self.v))
        return self.proj((F.softmax(q @ k.mT * self.scale, -1) @ v).movedim(1, 2).flatten(-2))


class Einsum(Attention):
    def forward(self, x: Tensor) -> Tensor:
        b, n, h = x.size(0), x.size(1), self.num_heads
        q, k, v = (f(x).view(b, n, h, self.head_dim) for f in (self.q, self.k, self.v))
        attn = torch.einsum("bqhd,bkhd->bhqk", q * self.scale, k).softmax(-1)
        return self.proj(torch.einsum("bhqk,bkhd->bqhd", attn, v).reshape(b, n, -1))


class Folded(Attention):
    """Heads folded into the batch."""

    def fold(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        x = x.view(b, n, self.num_heads, self.head_dim).permute(0, 2, 1, 3)
        return x.reshape(b * self.num_heads, n, self.head_dim)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.fold(self.q(x)), self.fold(self.k(x)), self.fold(self.v(x))
        y = torch.bmm(F.softmax(torch.bmm(q, k.transpose(1, 2)) * self.scale, dim=-1), v)
        y = y.view(b, self.num_heads, n, self.head_dim).permute(0, 2, 1, 3).reshape(b, n, -1)
        return self.proj(y)


class ChunkedHeads(Attention):
    """As in "Attention is all you need" by Kyubyong: cat(split(...))."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (torch.cat(f(x).split(self.head_dim, dim=2), dim=0) for f in (self.q, self.k, self.v))
        y = torch.softmax(torch.bmm(q, k.transpose(1, 2)) / self.head_dim**0.5, 2) @ v
        return self.proj(torch.cat(y.chunk(self.num_heads, dim=0), dim=2))


class Fused(nn.Module):
    """Queries, keys and values from one layer, taken apart by ``take``."""

    def __init__(self, take: str, dim: int = 8, num_heads: int = 2, bias: bool = True) -> None:
        super().__init__()
        self.take, self.dim, self.num_heads, self.head_dim = take, dim, num_heads, dim // num_heads
        self.scale = self.head_dim**-0.5
        self.qkv = nn.Linear(dim, dim * 3, bias=bias)
        self.proj = nn.Linear(dim, dim)

    def parts(self, qkv: Tensor) -> Any:
        b, n, h, d = qkv.size(0), qkv.size(1), self.num_heads, self.head_dim
        if self.take == "unbind":  # timm
            return qkv.reshape(b, n, 3, h, d).permute(2, 0, 3, 1, 4).unbind(0)
        if self.take == "index":  # timm before that
            qkv = qkv.reshape(b, n, 3, h, qkv.size(-1) // 3 // h).permute(2, 0, 3, 1, 4)
            return qkv[0], qkv[1], qkv[2]
        if self.take == "heads_first":  # (h, 3, d): GPT-NeoX, BLOOM
            return [part.transpose(1, 2) for part in qkv.view(b, n, h, 3 * d).chunk(3, -1)]
        if self.take == "channels_outside":
            return qkv.view(b, n, h, d, 3).transpose(1, 2).unbind(-1)
        if self.take == "chunk":
            parts = qkv.chunk(3, dim=-1)
        elif self.take == "split":
            parts = qkv.split(self.dim, dim=2)
        elif self.take == "slices":
            parts = qkv[..., : self.dim], qkv[..., self.dim : 2 * self.dim], qkv[..., 2 * self.dim :]
        else:
            parts = qkv[:, :, :8], qkv[:, :, 8:16], qkv[:, :, -8:]
        return [part.view(b, n, h, d).transpose(1, 2) for part in parts]

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.parts(self.qkv(x))
        y = F.softmax(q * self.scale @ k.transpose(-2, -1), dim=-1) @ v
        return self.proj(y.transpose(1, 2).reshape(x.size(0), x.size(1), -1))


class OneHead(nn.Module):
    """No heads, and the width of queries and keys is nobody else's."""

    def __init__(self, dim: int = 8, inner: int = 6, scaled: bool = False) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(dim, inner, bias=False), nn.Linear(dim, inner), nn.Linear(dim, dim)
        self.scaled = scaled

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        scores = q @ k.transpose(-2, -1)
        if self.scaled:
            scores = scores / math.sqrt(q.size(-1))
        return scores.softmax(-1) @ v


class Head(nn.Module):
    def __init__(self, dim: int, head_size: int) -> None:
        super().__init__()
        self.key, self.query, self.value = (nn.Linear(dim, head_size, bias=False) for _ in range(3))
        self.register_buffer("tril", torch.tril(torch.ones(6, 6)))

    def forward(self, x: Tensor) -> Tensor:
        _, T, _ = x.shape
        k, q = self.key(x), self.query(x)
        wei = q @ k.transpose(-2, -1) * k.shape[-1] ** -0.5
        wei = F.softmax(wei.masked_fill(self.tril[:T, :T] == 0, float("-inf")), dim=-1)
        return wei @ self.value(x)


class HeadList(nn.Module):
    """As in nanoGPT's lecture: a module per head."""

    def __init__(self, dim: int = 8, num_heads: int = 2) -> None:
        super().__init__()
        self.heads = nn.ModuleList([Head(dim, dim // num_heads) for _ in range(num_heads)])
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(torch.cat([h(x) for h in self.heads], dim=-1))


class HeadParameters(nn.Module):
    """Projections are parameters with a dimension of heads."""

    def __init__(self, dim: int = 8, heads: int = 3, size: int = 4) -> None:
        super().__init__()
        self.wq, self.wk, self.wv = (nn.Parameter(torch.randn(heads, dim, size) / 3) for _ in range(3))
        self.wo = nn.Parameter(torch.randn(heads, size, dim) / 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (torch.einsum("bnc,hcd->bhnd", x, w) for w in (self.wq, self.wk, self.wv))
        y = torch.softmax(torch.einsum("bhid,bhjd->bhij", q, k) * 0.5, -1) @ v
        return torch.einsum("bhnd,hdc->bnc", y, self.wo)


construct("heads_view_transpose", between(ViewTranspose), TOKENS)
construct("heads_sizes_in_forward", between(SizesInForward), TOKENS)
construct("heads_numbers", between(Numbers), TOKENS)
construct("heads_unflatten", between(Unflatten), TOKENS)
construct("heads_einsum", between(lambda: Einsum(8, 4)), TOKENS)
construct("heads_folded_bmm", between(Folded), TOKENS)
construct("heads_split_cat", between(ChunkedHeads), TOKENS)
for _take in ("unbind", "index", "heads_first", "channels_outside", "chunk", "split", "slices", "numbers"):
    construct(f"heads_qkv_{_take}", between(lambda take=_take: Fused(take)), TOKENS)
construct("heads_qkv_no_bias", between(lambda: Fused("unbind", bias=False)), TOKENS)
construct("heads_none", between(OneHead), TOKENS)
construct("heads_none_scaled", between(lambda: OneHead(scaled=True)), TOKENS)
construct("heads_module_list", between(HeadList), TOKENS)
construct("heads_parameters", between(HeadParameters), TOKENS)


# Other ways to attend


class LinearAttention(Attention):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(F.elu(self.q(x)) + 1), self.split(F.elu(self.k(x)) + 1), self.split(self.v(x))
        kv = k.transpose(-2, -1) @ v
        norm = q @ k.sum(2).unsqueeze(-1) + 1e-6
        return self.merge(q @ kv / norm)


class SoftmaxLinearAttention(Attention):
    """Softmax over the features of queries, over the length of keys (lucidrains)."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
        context = torch.einsum("bhnd,bhne->bhde", k.softmax(dim=-2), v)
        return self.merge(torch.einsum("bhnd,bhde->bhne", q.softmax(dim=-1) * self.scale, context))


class GroupedQuery(nn.Module):
    def __init__(self, repeat: str, dim: int = 8, heads: int = 4, kv_heads: int = 2) -> None:
        super().__init__()
        self.repeat, self.heads, self.kv_heads, self.head_dim = repeat, heads, kv_heads, dim // heads
        self.q_proj = nn.Linear(dim, heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(dim, kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(dim, kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(heads * self.head_dim, dim, bias=False)

    def repeat_kv(self, x: Tensor) -> Tensor:
        times = self.heads // self.kv_heads
        if self.repeat == "interleave":
            return x.repeat_interleave(times, dim=1)
        batch, kv_heads, length, head_dim = x.shape
        x = x[:, :, None, :, :].expand(batch, kv_heads, times, length, head_dim)
        return x.reshape(batch, kv_heads * times, length, head_dim)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q = self.q_proj(x).view(b, n, self.heads, self.head_dim).transpose(1, 2)
        k = self.repeat_kv(self.k_proj(x).view(b, n, self.kv_heads, self.head_dim).transpose(1, 2))
        v = self.repeat_kv(self.v_proj(x).view(b, n, self.kv_heads, self.head_dim).transpose(1, 2))
        y = torch.softmax(q @ k.transpose(2, 3) / math.sqrt(self.head_dim), dim=-1) @ v
        return self.o_proj(y.transpose(1, 2).reshape(b, n, -1))


class GroupedEinsum(nn.Module):
    """Groups of heads stay a dimension of their own."""

    def __init__(self, dim: int = 8) -> None:
        super().__init__()
        self.q, self.kv, self.proj = nn.Linear(dim, 12), nn.Linear(dim, 12), nn.Linear(12, dim)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).view(*x.shape[:2], 2, 2, 3)
        k, v = self.kv(x).view(*x.shape[:2], 2, 6).chunk(2, -1)
        a = torch.einsum("bqgrd,bkgd->bgrqk", q, k).softmax(-1)
        return self.proj(torch.einsum("bgrqk,bkgd->bqgrd", a, v).flatten(2))


class MultiQuery(Attention):
    """One head of keys and values for all."""

    def __init__(self) -> None:
        super().__init__()
        del self.k, self.v
        self.kv = nn.Linear(self.dim, 2 * self.head_dim)

    def forward(self, x: Tensor) -> Tensor:
        k, v = self.kv(x).unsqueeze(1).chunk(2, dim=-1)
        return self.merge(self.scores(self.split(self.q(x)), k).softmax(-1) @ v)


class Cross(Attention):
    """Queries of one input, keys and values of another."""

    def __init__(self) -> None:
        super().__init__(8, 2)
        del self.k, self.v
        self.embed, self.context, self.head = nn.Linear(5, 8), nn.Linear(4, 10), nn.Linear(8, 3)
        self.to_kv = nn.Linear(10, 16, bias=False)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = self.embed(x)
        k, v = self.to_kv(torch.relu(self.context(context))).chunk(2, dim=-1)
        attn = self.scores(self.split(self.q(x)), self.split(k)).softmax(dim=-1)
        return self.head(x + self.merge(attn @ self.split(v)))


class PoolingQuery(nn.Module):
    """A learned query reads the sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(5, 8), nn.Linear(8, 3)
        self.query = nn.Parameter(torch.randn(1, 1, 8))
        self.k, self.v = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.embed(x))
        query = self.query.expand(x.size(0), -1, -1)
        weights = torch.softmax(query @ self.k(x).transpose(1, 2), -1)
        return self.head((weights @ self.v(x)).squeeze(1))


class PoolingScore(nn.Module):
    """A score per token, as for sentences."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(5, 8), nn.Linear(8, 3)
        self.score = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        weights = torch.softmax(self.score(x), dim=1)
        return self.head(torch.sum(weights * x, dim=1))


class Latents(nn.Module):
    """Perceiver: an array of learned latents."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(5, 8), nn.Linear(6, 3)
        self.latents = nn.Parameter(torch.randn(4, 6))
        self.q, self.k, self.v = nn.Linear(6, 6), nn.Linear(8, 6), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        z = self.latents.unsqueeze(0).repeat(len(x), 1, 1)
        z = z + torch.softmax(self.q(z) @ self.k(x).mT / 6**0.5, -1) @ self.v(x)
        return self.head(z.mean(1))


class ObjectQueries(nn.Module):
    """DETR: queries are an embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.query_embed = nn.Conv2d(3, 8, 3, 2, 1), nn.Embedding(5, 8)
        self.row, self.col = nn.Parameter(torch.rand(4, 4)), nn.Parameter(torch.rand(4, 4))
        self.decoder = nn.MultiheadAttention(8, 2, batch_first=True)
        self.classes, self.boxes = nn.Linear(8, 3), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.backbone(x)
        H, W = h.shape[-2:]
        pos = torch.cat([self.col[:W].unsqueeze(0).repeat(H, 1, 1), self.row[:H].unsqueeze(1).repeat(1, W, 1)], -1)
        memory = pos.flatten(0, 1).unsqueeze(0) + h.flatten(2).permute(0, 2, 1)
        out, _ = self.decoder(self.query_embed.weight.unsqueeze(0).expand(len(x), -1, -1), memory, memory)
        return {"logits": self.classes(out), "boxes": self.boxes(out).sigmoid()}


def rotate_half(x: Tensor) -> Tensor:
    x1, x2 = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return torch.cat((-x2, x1), dim=-1)


def angles(length: int, dim: int) -> Tensor:
    return torch.outer(torch.arange(length), 100.0 ** (-torch.arange(0, dim, 2) / dim))


class RotaryHalves(Attention):
    """LLaMA in transformers."""

    def __init__(self) -> None:
        super().__init__()
        emb = torch.cat((angles(6, self.head_dim),) * 2, dim=-1)
        self.register_buffer("cos", emb.cos(), persistent=False)
        self.register_buffer("sin", emb.sin(), persistent=False)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        q, k = (t * self.cos[: t.size(2)] + rotate_half(t) * self.sin[: t.size(2)] for t in (q, k))
        return super().scores(q, k)


class RotaryInterleaved(Attention):
    """GPT-J: pairs lie side by side; angles made in the forward."""

    def rotate(self, x: Tensor) -> Tensor:
        theta = angles(x.size(2), self.head_dim).to(x)
        x1, x2 = x[..., ::2], x[..., 1::2]
        pair = torch.stack((x1 * theta.cos() - x2 * theta.sin(), x2 * theta.cos() + x1 * theta.sin()), dim=-1)
        return pair.flatten(-2)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return super().scores(self.rotate(q), self.rotate(k))


class RotaryComplex(Attention):
    """LLaMA by Meta."""

    def __init__(self) -> None:
        super().__init__()
        theta = angles(6, self.head_dim)
        self.register_buffer("freqs_cis", torch.polar(torch.ones_like(theta), theta))

    def rotate(self, x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * self.freqs_cis).flatten(3)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return super().scores(self.rotate(q), self.rotate(k))


class RotaryPartial(Attention):
    """Only the first half of a head turns."""

    def __init__(self) -> None:
        super().__init__(16, 2)
        self.rotary_ndims = self.head_dim // 2

    def rotate(self, x: Tensor) -> Tensor:
        turn, stay = x[..., : self.rotary_ndims], x[..., self.rotary_ndims :]
        emb = torch.cat((angles(x.size(2), self.rotary_ndims),) * 2, -1).to(x)
        return torch.cat((turn * emb.cos() + rotate_half(turn) * emb.sin(), stay), dim=-1)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return super().scores(self.rotate(q), self.rotate(k))


construct("attention_linear", between(LinearAttention), TOKENS)
construct("attention_linear_softmax", between(SoftmaxLinearAttention), TOKENS)
construct("attention_gqa_interleave", between(lambda: GroupedQuery("interleave")), TOKENS)
construct("attention_gqa_expand", between(lambda: GroupedQuery("expand")), TOKENS)
construct("attention_gqa_einsum", between(GroupedEinsum), TOKENS)
construct("attention_mqa", between(MultiQuery), TOKENS)
construct("attention_cross", Cross, lambda batch: (normal(batch, 6, 5), normal(batch, 7, 4)))
construct("attention_pool_query", PoolingQuery, TOKENS)
construct("attention_pool_score", PoolingScore, TOKENS)
construct("attention_latents", Latents, TOKENS)
construct("attention_object_queries", ObjectQueries, IMAGE)
construct("rotary_halves", between(RotaryHalves), TOKENS)
construct("rotary_interleaved", between(RotaryInterleaved), TOKENS)
construct("rotary_complex", between(RotaryComplex), TOKENS)
construct("rotary_partial", between(RotaryPartial, 16), TOKENS)


class Alibi(Attention):
    def __init__(self) -> None:
        super().__init__(8, 4)
        self.register_buffer("slopes", 2.0 ** -torch.arange(1, self.num_heads + 1))

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        place = torch.arange(k.size(2), device=k.device)
        bias = -(place[None, :] - place[:, None]).abs() * self.slopes.view(-1, 1, 1)
        return super().scores(q, k) + bias


class RelativeBias(Attention):
    """Swin: a table of biases by distance, a column per head."""

    def __init__(self) -> None:
        super().__init__(8, 4)
        self.length = 6
        self.table = nn.Parameter(torch.randn(2 * self.length - 1, self.num_heads))
        place = torch.arange(self.length)
        self.register_buffer("index", place[:, None] - place[None, :] + self.length - 1)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        bias = self.table[self.index.view(-1)].view(self.length, self.length, -1)
        return super().scores(q, k) + bias.permute(2, 0, 1).contiguous().unsqueeze(0)


class T5Bias(Attention):
    """An embedding of distance, clipped."""

    def __init__(self) -> None:
        super().__init__(8, 4)
        self.relative = nn.Embedding(7, self.num_heads)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        place = torch.arange(q.size(2))
        distance = (place[None, :] - place[:, None]).clamp(-3, 3) + 3
        return q @ k.mT + self.relative(distance).permute(2, 0, 1)


class ShawBias(Attention):
    """Relative positions meet the queries."""

    def __init__(self) -> None:
        super().__init__()
        self.relative = nn.Parameter(torch.randn(6, 6, self.head_dim))

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return (q @ k.mT + torch.einsum("bhqd,qkd->bhqk", q, self.relative)) * self.scale


class TalkingHeads(Attention):
    """Linear layers over the heads, before and after the softmax."""

    def __init__(self) -> None:
        super().__init__(8, 4)
        self.before, self.after = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
        attn = self.before(self.scores(q, k).permute(0, 2, 3, 1)).softmax(dim=2)
        attn = self.after(attn).permute(0, 3, 1, 2)
        return self.merge(attn @ v)


class HeadConv(Attention):
    """A 1x1 convolution over the heads."""

    def __init__(self) -> None:
        super().__init__(8, 4)
        self.mix = nn.Conv2d(4, 4, 1, bias=False)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return self.mix(super().scores(q, k))


class QKNorm(Attention):
    """Each head's queries and keys are normed."""

    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__(8, 2)
        self.q_norm, self.k_norm = norm(self.head_dim), norm(self.head_dim)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return super().scores(self.q_norm(q), self.k_norm(k))


class Cosine(Attention):
    """SwinV2: cosines and a learned scale per head."""

    def __init__(self) -> None:
        super().__init__(8, 4)
        self.logit_scale = nn.Parameter(torch.log(10 * torch.ones(4, 1, 1)))

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        cosine = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        return cosine * torch.clamp(self.logit_scale, max=math.log(100.0)).exp()


class HeadGates(Attention):
    """Each head has a gate that reads the token."""

    def __init__(self) -> None:
        super().__init__(8, 4)
        self.gate = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.scores(self.split(self.q(x)), self.split(self.k(x))).softmax(-1) @ self.split(self.v(x))
        return self.merge(y * self.gate(x).sigmoid().transpose(1, 2).unsqueeze(-1))


class HeadScales(Attention):
    """Each head has a learned factor."""

    def __init__(self) -> None:
        super().__init__(8, 4)
        self.gamma = nn.Parameter(torch.rand(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.scores(self.split(self.q(x)), self.split(self.k(x))).softmax(-1) @ self.split(self.v(x))
        return self.merge(y * self.gamma[None, :, None, None])


class Differential(nn.Module):
    """The difference of two attentions."""

    def __init__(self, dim: int = 8, num_heads: int = 2) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, dim // num_heads // 2
        self.q, self.k, self.v, self.proj = (nn.Linear(dim, dim) for _ in range(4))
        self.factor = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k = (f(x).view(b, n, 2 * self.num_heads, self.head_dim).transpose(1, 2) for f in (self.q, self.k))
        v = self.v(x).view(b, n, self.num_heads, 2 * self.head_dim).transpose(1, 2)
        attn = torch.softmax(q @ k.mT * self.head_dim**-0.5, -1).view(b, self.num_heads, 2, n, n)
        attn = attn[:, :, 0] - self.factor * attn[:, :, 1]
        return self.proj((attn @ v).transpose(1, 2).reshape(b, n, -1))


class SigmoidScores(Attention):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
        return self.merge(torch.sigmoid(self.scores(q, k) - math.log(x.size(1))) @ v)


class ForwardMask(Attention):
    """A causal mask made in the forward, in one of several ways."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        s, n = super().scores(q, k), q.size(-2)
        if self.how == "tril":
            return s.masked_fill(torch.tril(torch.ones(n, n)) == 0, float("-inf"))
        if self.how == "triu":
            return s + torch.triu(torch.full((n, n), float("-inf")), diagonal=1)
        if self.how == "where":
            allowed = torch.ones(n, n, dtype=torch.bool).tril().view(1, 1, n, n)
            return torch.where(allowed, s, torch.finfo(s.dtype).min)
        place = torch.arange(n)  # sliding window
        return s.masked_fill((place[:, None] - place[None, :]).abs() > 1, torch.finfo(s.dtype).min)


class Additive(nn.Module):
    """Bahdanau: v(tanh(W q + U k))."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(5, 8), nn.Linear(8, 3)
        self.W, self.U, self.v = nn.Linear(8, 6, bias=False), nn.Linear(8, 6), nn.Linear(6, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        energy = self.v(torch.tanh(self.W(h).unsqueeze(2) + self.U(h).unsqueeze(1))).squeeze(-1)
        return self.head(torch.bmm(energy.softmax(-1), h))


class Luong(nn.Module):
    """A bilinear score, and context beside the query."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.query = nn.Linear(5, 8), nn.Linear(5, 6)
        self.general, self.combine, self.head = nn.Linear(6, 8, bias=False), nn.Linear(14, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        memory, q = self.embed(x), torch.tanh(self.query(x[:, -1:]))
        weights = F.softmax(torch.bmm(self.general(q), memory.permute(0, 2, 1)), dim=2)
        return self.head(torch.tanh(self.combine(torch.cat((torch.bmm(weights, memory), q), 2)))).squeeze(1)


class Linformer(Attention):
    """Keys and values are projected along the length."""

    def __init__(self) -> None:
        super().__init__()
        self.E, self.F = nn.Parameter(torch.randn(6, 4) / 2), nn.Linear(6, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        k = torch.einsum("bnd,nk->bkd", self.k(x), self.E)
        v = self.F(self.v(x).transpose(1, 2)).transpose(1, 2)
        return self.merge(self.scores(self.split(self.q(x)), self.split(k)).softmax(-1) @ self.split(v))


class ClassToken(Attention):
    """A token is put in front; only it goes on."""

    def __init__(self) -> None:
        super().__init__()
        self.cls_token, self.pos_embed = nn.Parameter(torch.randn(1, 1, 8)), nn.Parameter(torch.randn(1, 7, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1) + self.pos_embed
        return super().forward(x)[:, 0]


class External(nn.Module):
    """Two layers are the memory; normed twice over."""

    def __init__(self, dim: int = 8, size: int = 6) -> None:
        super().__init__()
        self.mk, self.mv = nn.Linear(dim, size, bias=False), nn.Linear(size, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        attn = torch.softmax(self.mk(x), dim=1)
        return self.mv(attn / (1e-9 + attn.sum(dim=2, keepdim=True)))


class Retention(Attention):
    """Decay instead of a softmax, a norm per head."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(2, 8)
        self.register_buffer("gamma", 1 - 2.0 ** -(3 + torch.arange(2)))

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        place = torch.arange(n)
        decay = (self.gamma.view(-1, 1, 1) ** (place[:, None] - place[None, :]).clamp(min=0)).tril()
        y = (self.scores(self.split(self.q(x)), self.split(self.k(x))) * decay) @ self.split(self.v(x))
        y = y.transpose(1, 2).reshape(b * n, c)
        return self.proj(self.norm(y).view(b, n, c))


construct("attention_alibi", between(Alibi), TOKENS)
construct("attention_relative_table", between(RelativeBias), TOKENS)
construct("attention_t5_bias", between(T5Bias), TOKENS)
construct("attention_shaw", between(ShawBias), TOKENS)
construct("attention_talking_heads", between(TalkingHeads), TOKENS)
construct("attention_head_conv", between(HeadConv), TOKENS)
construct("attention_qk_layer_norm", between(lambda: QKNorm(nn.LayerNorm)), TOKENS)
construct("attention_qk_rms_norm", between(lambda: QKNorm(nn.RMSNorm)), TOKENS)
construct("attention_cosine", between(Cosine), TOKENS)
construct("attention_head_gates", between(HeadGates), TOKENS)
construct("attention_head_scales", between(HeadScales), TOKENS)
construct("attention_differential", between(Differential), TOKENS)
construct("attention_sigmoid", between(SigmoidScores), TOKENS)
for _how in ("tril", "triu", "where", "window"):
    construct(f"attention_mask_{_how}", between(lambda how=_how: ForwardMask(how)), TOKENS)
construct("attention_additive", Additive, TOKENS)
construct("attention_luong", Luong, TOKENS)
construct("attention_linformer", between(Linformer), TOKENS)
construct("attention_class_token", between(ClassToken), TOKENS)
construct("attention_external", between(External), TOKENS)
construct("attention_retention", between(Retention), TOKENS)


# Over images


class Window(nn.Module):
    """Swin: windows of 2x2, shifted, with biases by distance."""

    def __init__(self, dim: int = 8, num_heads: int = 2, shift: int = 1) -> None:
        super().__init__()
        self.dim, self.num_heads, self.window, self.shift = dim, num_heads, 2, shift
        self.scale = (dim // num_heads) ** -0.5
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.bias = nn.Parameter(torch.randn(num_heads, 4, 4))

    def partition(self, x: Tensor) -> Tensor:
        B, H, W, C = x.shape
        x = x.view(B, H // self.window, self.window, W // self.window, self.window, C)
        return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, self.window * self.window, C)

    def reverse(self, windows: Tensor, H: int, W: int) -> Tensor:
        B = windows.shape[0] // (H * W // self.window // self.window)
        x = windows.view(B, H // self.window, W // self.window, self.window, self.window, -1)
        return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(B, H, W, -1)

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        _, H, W, C = x.shape
        windows = self.partition(torch.roll(x, (-self.shift, -self.shift), dims=(1, 2)))
        B_, N, C = windows.shape
        qkv = self.qkv(windows).reshape(B_, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0] * self.scale, qkv[1], qkv[2]
        attn = (q @ k.transpose(-2, -1) + self.bias.unsqueeze(0)).softmax(-1)
        y = self.reverse(self.proj((attn @ v).transpose(1, 2).reshape(B_, N, C)), H, W)
        return (x + torch.roll(y, (self.shift, self.shift), dims=(1, 2))).permute(0, 3, 1, 2)


class XCA(nn.Module):
    """Attention among channels: q^T k."""

    def __init__(self, dim: int = 8, num_heads: int = 2) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.temperature = nn.Parameter(torch.ones(num_heads, 1, 1))
        self.qkv, self.proj = nn.Linear(dim, dim * 3), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 4, 1)
        q, k, v = qkv.unbind(0)
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        attn = (q @ k.transpose(-2, -1) * self.temperature).softmax(dim=-1)
        return self.proj((attn @ v).permute(0, 3, 1, 2).reshape(B, N, C))


class ChannelAttention(nn.Module):
    """DANet: a Gram matrix of channels."""

    def __init__(self) -> None:
        super().__init__()
        self.beta = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.size()
        flat = x.view(b, c, -1)
        energy = torch.bmm(flat, flat.permute(0, 2, 1))
        attention = torch.softmax(energy.max(-1, keepdim=True)[0].expand_as(energy) - energy, dim=-1)
        return self.beta * torch.bmm(attention, flat).view(b, c, h, w) + x


class NonLocal(nn.Module):
    """Wang et al., 2018: embedded Gaussian, inner width halved."""

    def __init__(self, channels: int = 8, norm: bool = False) -> None:
        super().__init__()
        self.inter = channels // 2
        self.g, self.theta, self.phi = (nn.Conv2d(channels, self.inter, 1) for _ in range(3))
        self.W = nn.Sequential(nn.Conv2d(self.inter, channels, 1), nn.BatchNorm2d(channels) if norm else nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        batch = x.size(0)
        g = self.g(x).view(batch, self.inter, -1).permute(0, 2, 1)
        theta = self.theta(x).view(batch, self.inter, -1).permute(0, 2, 1)
        phi = self.phi(x).view(batch, self.inter, -1)
        y = torch.matmul(F.softmax(torch.matmul(theta, phi), dim=-1), g)
        y = y.permute(0, 2, 1).contiguous().view(batch, self.inter, *x.size()[2:])
        return self.W(y) + x


class SelfAttentionGAN(nn.Module):
    """SAGAN: queries of an eighth of the width, a learned gate."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.query, self.key = nn.Conv2d(channels, channels // 4, 1), nn.Conv2d(channels, channels // 4, 1)
        self.value, self.gamma = nn.Conv2d(channels, channels, 1), nn.Parameter(torch.rand(1))

    def forward(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        q = self.query(x).view(B, -1, H * W).permute(0, 2, 1)
        attn = F.softmax(torch.bmm(q, self.key(x).view(B, -1, H * W)), dim=-1)
        out = torch.bmm(self.value(x).view(B, -1, H * W), attn.permute(0, 2, 1)).view(B, C, H, W)
        return self.gamma * out + x


class ConvProjection(nn.Module):
    """CvT, PVT: keys and values come from a strided convolution, heads in the channels."""

    def __init__(self, dim: int = 8, num_heads: int = 2) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.q, self.kv, self.proj = nn.Conv2d(dim, dim, 1), nn.Conv2d(dim, 2 * dim, 2, 2), nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        q = self.q(x).view(b, self.num_heads, self.head_dim, h * w)
        k, v = (t.reshape(b, self.num_heads, self.head_dim, -1) for t in self.kv(x).chunk(2, dim=1))
        attn = torch.softmax(q.transpose(-2, -1) @ k * self.head_dim**-0.5, -1)
        y = torch.einsum("bhij,bhdj->bhdi", attn, v)
        return self.proj(y.reshape(b, -1, h, w))


class SpatialReduction(nn.Module):
    """PVT: tokens become an image again, shrink, and are normed."""

    def __init__(self, dim: int = 8, num_heads: int = 2) -> None:
        super().__init__()
        self.num_heads, self.scale = num_heads, (dim // num_heads) ** -0.5
        self.q, self.kv, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.sr, self.norm = nn.Conv2d(dim, dim, 2, 2), nn.LayerNorm(dim)

    def forward(self, image: Tensor) -> Tensor:
        B, C, H, W = image.shape
        x = image.flatten(2).transpose(1, 2)
        q = self.q(x).reshape(B, H * W, self.num_heads, C // self.num_heads).permute(0, 2, 1, 3)
        x_ = x.permute(0, 2, 1).reshape(B, C, H, W)
        x_ = self.norm(self.sr(x_).reshape(B, C, -1).permute(0, 2, 1))
        kv = self.kv(x_).reshape(B, -1, 2, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        attn = (q @ kv[0].transpose(-2, -1) * self.scale).softmax(dim=-1)
        y = self.proj((attn @ kv[1]).transpose(1, 2).reshape(B, H * W, C))
        return y.transpose(1, 2).reshape(B, C, H, W)


class Axial(nn.Module):
    """Rows, then columns; a head is a channel group."""

    def __init__(self, dim: int = 8) -> None:
        super().__init__()
        self.qkv = nn.ModuleList([nn.Conv1d(dim, 3 * dim, 1) for _ in range(2)])

    def attend(self, x: Tensor, qkv: nn.Module) -> Tensor:
        b, c, n, m = x.shape
        rows = x.permute(0, 2, 1, 3).reshape(b * n, c, m)
        q, k, v = qkv(rows).chunk(3, dim=1)
        y = v @ torch.softmax(q.transpose(1, 2) @ k, dim=-1).transpose(1, 2)
        return y.view(b, n, c, m).permute(0, 2, 1, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(x, self.qkv[0])
        return x + self.attend(x.transpose(2, 3), self.qkv[1]).transpose(2, 3)


class GlobalContext(nn.Module):
    """GCNet: one map for all, then a bottleneck."""

    def __init__(self, channels: int = 8, hidden: int = 6) -> None:
        super().__init__()
        self.mask = nn.Conv2d(channels, 1, 1)
        self.transform = nn.Sequential(
            nn.Conv2d(channels, hidden, 1), nn.LayerNorm([hidden, 1, 1]), nn.ReLU(True), nn.Conv2d(hidden, channels, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.size()
        mask = self.mask(x).view(b, 1, h * w).softmax(dim=2).unsqueeze(-1)
        context = torch.matmul(x.view(b, c, h * w).unsqueeze(1), mask)
        return x + self.transform(context.view(b, c, 1, 1))


construct("image_window", between_convs(lambda: Window(shift=0)), IMAGE)
construct("image_window_shifted", between_convs(Window), IMAGE)
construct("attention_xca", between(XCA), TOKENS)
construct("image_channel_gram", between_convs(ChannelAttention), IMAGE, approximate=True)
construct("image_non_local", between_convs(NonLocal), IMAGE)
construct("image_non_local_norm", between_convs(lambda: NonLocal(norm=True)), IMAGE)
construct("image_sagan", between_convs(SelfAttentionGAN, 16), IMAGE)
construct("image_conv_projection", between_convs(ConvProjection), IMAGE)
construct("image_spatial_reduction", between_convs(SpatialReduction), IMAGE)
construct("image_axial", between_convs(Axial), IMAGE)
construct("image_global_context", between_convs(GlobalContext), IMAGE)
