"""Attention of many queries to the few keys of an image prompt, added to what text attention gave.

`out + weight * mask * softmax(q k^T / sqrt(d)) v`: the second half of IP-Adapter's decoupled cross-attention (Ye et
al., 2023, eq. 5), for the 16 tokens of an identity.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

Attention = Callable[[Tensor, Tensor, Tensor, int], Tensor]
"""(q, k, v, heads) -> out, all [B, N, heads * D]."""


def scaled_dot_product(q: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """Plain multi-head attention over [B, N, heads * D]."""

    def split(x: Tensor) -> Tensor:
        return x.unflatten(-1, (heads, -1)).transpose(1, 2)

    return F.scaled_dot_product_attention(split(q), split(key), split(value)).transpose(1, 2).flatten(2)


def attend_tokens(
    q: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    heads: int,
    weight: float = 1.0,
    mask: Tensor | None = None,
    attention: Attention = scaled_dot_product,
) -> Tensor:
    """out + weight * mask * attention(q, key, value), a new tensor like `out`.

    q, out: [B, N, heads * D]. key, value: [B, T, heads * D], in q's dtype and on its device.
    mask: [B, N, 1] float32 or None; the product is taken in its precision.
    attention: what the host attends with, so that text and identity go through the same code.
    """
    delta = attention(q, key, value, heads) * weight
    if mask is not None:
        delta = delta * mask
    return out + delta.to(out.dtype)
