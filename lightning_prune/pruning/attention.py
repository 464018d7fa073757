"""`nn.MultiheadAttention` whose heads don't add up to the width of its input.

torch's own forward insists that the number of heads times their size is the width of the queries. After some heads
are gone it isn't; the module then gets an instance-level forward that reads all sizes from its weights.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["NarrowAttention", "install_narrow_attention", "remove_narrow_attention"]


class NarrowAttention:
    """The forward of a `nn.MultiheadAttention`, for any number and size of heads.

    An object, which a closure could not be: it is pickled and copied with the module.
    """

    def __init__(self, module: nn.MultiheadAttention, scale: float) -> None:
        self.module = module
        self.scale = scale

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(type(self.module).forward.__get__(self.module))

    @property
    def __code__(self) -> Any:
        return type(self.module).forward.__code__

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """See `nn.MultiheadAttention.forward`; shapes (L, N, E), (N, L, E) with ``batch_first``, or (L, E)."""
        module = self.module
        if is_causal and attn_mask is None:
            raise RuntimeError("Need attn_mask if specifying the is_causal hint.")
        batched, first = query.dim() == 3, query.dim() == 3 and module.batch_first
        if not batched:
            query, key, value = (each.unsqueeze(1) for each in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif first:
            query, key, value = (each.transpose(0, 1) for each in (query, key, value))
        out, weights = self._attend(query, key, value, key_padding_mask, need_weights, attn_mask)
        if weights is not None:
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights.squeeze(0)
        return (out.transpose(0, 1) if first else out if batched else out.squeeze(1)), weights

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        padding: Tensor | None,
        need_weights: bool,
        mask: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        module = self.module
        q, k, v = self._project(query, key, value)
        more = 0
        if module.bias_k is not None and module.bias_v is not None:
            batch = k.size(1)
            k = torch.cat([k, module.bias_k.expand(-1, batch, -1)])
            v = torch.cat([v, module.bias_v.expand(-1, batch, -1)])
            more += 1
        q, k, v = (each.unflatten(2, (module.num_heads, -1)).permute(1, 2, 0, 3) for each in (q, k, v))
        if module.add_zero_attn:
            k, v = (F.pad(each, (0, 0, 0, 1)) for each in (k, v))
            more += 1
        bias = _mask(mask, padding, more, q)
        dropout = module.dropout if module.training else 0.0
        if need_weights:
            scores = (q * self.scale) @ k.transpose(2, 3)
            weights = F.dropout(torch.softmax(scores if bias is None else scores + bias, -1), dropout)
            out = weights @ v
        else:
            weights = None
            out = F.scaled_dot_product_attention(q, k, v, bias, dropout, scale=self.scale)
        return F.linear(out.permute(2, 0, 1, 3).flatten(2), module.out_proj.weight, module.out_proj.bias), weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        module = self.module
        if module.in_proj_weight is not None:
            weights = list(module.in_proj_weight.unflatten(0, (3, -1)).unbind())  # the same rows go from all three
        else:
            weights = [module.q_proj_weight, module.k_proj_weight, module.v_proj_weight]
        biases = [None] * 3 if module.in_proj_bias is None else list(module.in_proj_bias.unflatten(0, (3, -1)).unbind())
        return [F.linear(*each) for each in zip((query, key, value), weights, biases, strict=True)]


def _mask(mask: Tensor | None, padding: Tensor | None, more: int, q: Tensor) -> Tensor | None:
    """Both masks as one that is added to the scores (N, heads, L, S); ``more`` keys at the end are never masked."""
    parts = []
    if mask is not None:  # (L, S) or (N * heads, L, S)
        mask = _added(mask, q, more)
        parts.append(mask if mask.dim() == 2 else mask.unflatten(0, (q.size(0), -1)))
    if padding is not None:  # (N, S)
        parts.append(_added(padding, q, more)[:, None, None])
    return sum(parts[1:], parts[0]) if parts else None


def _added(mask: Tensor, q: Tensor, more: int) -> Tensor:
    if mask.dtype is torch.bool:
        mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(mask, -math.inf)
    return F.pad(mask, (0, more))


def install_narrow_attention(module: nn.MultiheadAttention, scale: float) -> Callable[[], None]:
    """Let a module run with any number of heads.

    Args:
        module: Its weights tell the sizes.
        scale: What queries are multiplied with; that of the dense module, whatever the heads' size becomes.

    Returns:
        What takes it back.
    """
    before = module.__dict__.get("forward")

    def put_back() -> None:
        module.__dict__.pop("forward", None)
        if before is not None:
            module.__dict__["forward"] = before

    if not isinstance(before, NarrowAttention):
        module.__dict__["forward"] = NarrowAttention(module, scale)
    return put_back


def remove_narrow_attention(module: nn.MultiheadAttention) -> None:
    """Give a module its own forward back."""
    if isinstance(module.__dict__.get("forward"), NarrowAttention):
        del module.__dict__["forward"]
