"""The definition of attention in float32, and the check of a lossy kernel against it on a slice."""

from __future__ import annotations

import torch
from torch import Tensor

LEAST_COSINE = 0.999
QUERIES, PAIRS = 256, 4


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """softmax(scale q k^T + mask) v with every step in float32, [B, H, N, D'] float32. A bool mask is True where a key
    takes part; a query for which none does gets zeros. Holds all of q k^T: for slices and tests.
    """
    k, v = share_heads(k, q.shape[1]), share_heads(v, q.shape[1])
    logits = q.float() @ k.float().transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask.float()
    weights = logits.softmax(dim=-1)
    empty = torch.isneginf(logits).all(dim=-1, keepdim=True)
    return weights.masked_fill(empty, 0) @ v.float()


def share_heads(x: Tensor, heads: int) -> Tensor:
    """[B, H', M, D] repeated to [B, heads, M, D], each head for heads / H' neighbouring query heads."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def fault(
    out: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, least: float = LEAST_COSINE
) -> str | None:
    """What is wrong with `out` as the attention of q, k, v; None when it is finite and close. Waits for the device.

    All of `out` must be finite, also for queries that may look at no key: NaN there spreads over everything in the next
    layer, where a masked key has weight 0 and 0 NaN is NaN. What finite value they get is the kernel's affair. A slice of
    up to 4 pairs of sample and head and 256 queries spread over all of them must agree with the reference to a cosine of
    `least`. Inputs that are not finite themselves prove nothing about a kernel.
    """
    batch, heads, queries, _ = q.shape
    if not bool(torch.isfinite(out).all()):
        sound = all(bool(torch.isfinite(x).all()) for x in (q, k, v))
        return "its result has values that are not finite" if sound else None
    if mask is not None:
        blind = ~(mask if mask.dtype == torch.bool else ~torch.isneginf(mask)).any(dim=-1, keepdim=True)
        out = out.masked_fill(blind, 0)
    rows = torch.arange(0, queries, max(1, queries // QUERIES), device=q.device)[:QUERIES]
    k, v = share_heads(k, heads), share_heads(v, heads)
    if mask is not None:
        mask = mask.expand(batch, heads, queries, k.shape[2])
    dot = expected_square = got_square = 0.0
    for pair in range(0, batch * heads, max(1, batch * heads // PAIRS)):
        b, h = slice(pair // heads, pair // heads + 1), slice(pair % heads, pair % heads + 1)
        part = None if mask is None else mask[b, h][:, :, rows]
        expected = attention_reference(q[b, h][:, :, rows], k[b, h], v[b, h], part, scale).double()
        got = out[b, h][:, :, rows].double()
        if not bool(torch.isfinite(expected).all()):
            return None
        dot += float((expected * got).sum())
        expected_square += float(expected.square().sum())
        got_square += float(got.square().sum())
    length = (expected_square * got_square) ** 0.5
    cosine = dot / length if length else float(expected_square == got_square)
    return None if cosine >= least else f"its result has a cosine of {cosine:.5f} to float32, below {least}"
