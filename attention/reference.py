"""The definition of attention in float32, and the check of a lossy kernel against it on a slice."""

from __future__ import annotations

import torch
from torch import Tensor

LEAST_COSINE = 0.999
QUERIES, PAIRS = 256, 4
PRODUCTS = 1 << 22  # queries times keys that the check looks at in one go, with a few float32 copies of them in memory


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
    up to 4 pairs of sample and head and 256 queries spread over all of them (fewer where there are more than 16 thousand keys)
    must agree with the reference to a cosine of `least`. Inputs that are not finite themselves prove nothing about a kernel.
    """
    batch, heads, queries, _ = q.shape
    if not _finite(out):
        return "its result has values that are not finite" if all(map(_finite, (q, k, v))) else None
    checked = min(QUERIES, max(16, PRODUCTS // k.shape[2]))
    rows = torch.arange(0, queries, max(1, queries // checked), device=q.device)[:checked]
    if mask is not None:
        mask = mask.expand(batch, heads, queries, k.shape[2])
    sharing = heads // k.shape[1]
    dot = expected_square = got_square = 0.0
    for pair in range(0, batch * heads, max(1, batch * heads // PAIRS)):
        sample, head = divmod(pair, heads)
        b, h, shared = (slice(i, i + 1) for i in (sample, head, head // sharing))
        part = None if mask is None else mask[b, h][:, :, rows]
        reference = attention_reference(q[b, h][:, :, rows], k[b, shared], v[b, shared], part, scale)
        if not _finite(reference):
            return None
        got = out[b, h][:, :, rows]
        if part is not None:
            sees = part if part.dtype == torch.bool else ~torch.isneginf(part)
            got = got.masked_fill(~sees.any(dim=-1, keepdim=True), 0)
        # Summed on the CPU: not every device has float64.
        expected, got = reference.cpu().double(), got.cpu().double()
        dot += float((expected * got).sum())
        expected_square += float(expected.square().sum())
        got_square += float(got.square().sum())
    length = (expected_square * got_square) ** 0.5
    cosine = dot / length if length else float(expected_square == got_square)
    return None if cosine >= least else f"its result has a cosine of {cosine:.5f} to float32, below {least}"


def _finite(x: Tensor) -> bool:
    """Whether all of `x` is finite. A sum needs no copy of x; where it runs over, numbers may be finite all the same."""
    summed = bool(torch.isfinite(x.sum(dtype=torch.float32)))
    return summed or all(bool(torch.isfinite(head).all()) for sample in x for head in sample)
