"""A decoder layer for the tokens of one question over the buffers of the decode step: by torch, by our kernels between its
products, and for layers that are not dense by the library's parts.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import decode_products, fused_decode
from .decoding import rms_norm, rotate
from .linear_attention import many
from .mixed_decoding import feed_forward, projected, rotate_first

log = logging.getLogger("hotpath.vision_language")


def prefill_layer(
    layer: Any, x: Tensor, delta: Tensor | None, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, places: Tensor,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """A `DecodeLayer` for n tokens of one row: (x, what is to be added to it), as x + delta came in.

    x, delta: [n, hidden]; cos, sin: [n, D]; keys, values: [1, heads, length, D], written at `places` [n]. mask: as `attend`
    takes it, to see what the cache holds as well; None sees only these tokens, each those before it.
    """
    n, heads, groups, dim = len(x), layer.heads, layer.groups, layer.head_dim
    x = x if delta is None else x + delta
    qkv = layer.qkv(rms_norm(x, layer.norm_in.weight, layer.eps))
    q, k, v = qkv.split((heads * groups * dim, heads * dim, heads * dim), dim=-1)
    q, k, v = q.view(n, heads * groups, dim), k.view(n, heads, dim), v.view(n, heads, dim)
    if layer.q_norm is not None and layer.k_norm is not None:
        q, k = rms_norm(q, layer.q_norm.weight, layer.eps), rms_norm(k, layer.k_norm.weight, layer.eps)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    keys.index_copy_(2, places, rotate(k, cos, sin).transpose(0, 1).unsqueeze(0))
    values.index_copy_(2, places, v.transpose(0, 1).unsqueeze(0))
    x = x + layer.out(attend(rotate(q, cos, sin).transpose(0, 1), keys, values, mask))
    gate, up = layer.gate_up(rms_norm(x, layer.norm_mid.weight, layer.eps)).chunk(2, dim=-1)
    return x, layer.down(F.silu(gate) * up)


def fused_layer(
    layer: Any, x: Tensor, delta: Tensor | None, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, places: Tensor,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`prefill_layer`, with our kernels between the products."""
    from .prefill_kernels import gate_rows, norm_rows, place_rows

    x, normed = norm_rows(x, delta, layer.norm_in.weight, layer.eps)
    q_norm = None if layer.q_norm is None else layer.q_norm.weight
    k_norm = None if layer.k_norm is None else layer.k_norm.weight
    queries = place_rows(layer.qkv(normed), cos, sin, q_norm, k_norm, layer.eps, layer.groups, keys, values, places)
    x, normed = norm_rows(x, layer.out(attend(queries, keys, values, mask)), layer.norm_mid.weight, layer.eps)
    return x, layer.down(gate_rows(layer.gate_up(normed)))


def mixed_layer(
    layer: Any, x: Tensor, delta: Tensor | None, cos: Tensor, sin: Tensor, first: Tensor, second: Tensor, places: Tensor,
    mask: Tensor | None, count: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`prefill_layer` of a `MixedLayer`. first, second: its keys and values, or its states. count: [1], how many are real."""
    x = x if delta is None else x + delta
    normed = layer.norm_in(x)
    if layer.attends:
        seen = _attend_gated(layer.mix, normed, cos, sin, first, second, places, mask)
    else:
        seen = many(layer.mix.linear, normed.unsqueeze(0), first, second, count=count).squeeze(0)
    x = x + seen
    return x, feed_forward(layer.mlp, layer.norm_mid(x))


def _attend_gated(
    mix: Any, x: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, places: Tensor, mask: Tensor | None
) -> Tensor:
    part, n, dim = mix.attention, len(x), mix.head_dim
    q, k, v = projected(part, x)
    q = q.reshape(n, mix.heads * mix.groups, -1)
    gate: Tensor | None = None
    if mix.gated:
        q, gate = q.chunk(2, dim=-1)
    k, v = k.reshape(n, mix.heads, dim), v.reshape(n, mix.heads, dim)
    if getattr(part, "q_norm", None) is not None:
        q, k = part.q_norm(q), part.k_norm(k)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    keys.index_copy_(2, places, rotate_first(k, cos, sin).transpose(0, 1).unsqueeze(0))
    values.index_copy_(2, places, v.transpose(0, 1).unsqueeze(0))
    seen = attend(rotate_first(q, cos, sin).transpose(0, 1), keys, values, mask)
    if gate is not None:
        seen = seen * gate.reshape(n, -1).sigmoid()
    made: Tensor = part.o_proj(seen)
    return made


def attend(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """[n, query heads * D]. q: [query heads, n, D]; keys, values: [1, heads, length, D], from the first on if no mask.

    mask: [groups * n, positions], to be added, the rows of the queries that share a key head one below the other.
    """
    heads, dim = keys.shape[1], keys.shape[3]
    groups, n = q.shape[0] // heads, q.shape[1]
    if mask is None:
        k, v = keys[0, :, :n], values[0, :, :n]
        if groups > 1:
            k, v = (t.unsqueeze(1).expand(heads, groups, n, dim).reshape(heads * groups, n, dim) for t in (k, v))
        seen = F.scaled_dot_product_attention(q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0), is_causal=True)
        return seen[0].transpose(0, 1).reshape(n, heads * groups * dim)
    # Queries that share a key head stand one below the other, so that no key is copied.
    q, positions = q.reshape(1, heads, groups * n, dim), mask.shape[1]
    seen = F.scaled_dot_product_attention(q, keys[:, :, :positions], values[:, :, :positions], attn_mask=mask)
    return seen.view(heads, groups, n, dim).permute(2, 0, 1, 3).reshape(n, heads * groups * dim)


@functools.cache
def kernels_missing(device: torch.device, dtype: torch.dtype, dim: int, normed: bool) -> str:
    """Why torch's operators stand between the products; '' where our kernels do. Tried once, against torch. Waits.

    dim: width of a head. normed: heads have norms of their own, as Qwen3's; the kernel is another one without.
    """
    if device.type != "cuda" or dtype not in decode_products.TOLERANCE:
        return f"there are none for {dtype} on {device.type}"
    try:
        from . import prefill_kernels

        if prefill_kernels.INTERPRETED and not fused_decode.allow_interpreter:
            return "Triton interprets, which is for tests"
        for found, wanted in trial(device, dtype, dim, normed):
            decode_products.check(found, wanted)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # no compiler, a card that Triton does not know, numbers that are off
        log.warning("prefill: torch's operators, because our kernels failed", exc_info=True)
        return f"{type(error).__name__}: {error}"
    return ""


def trial(device: torch.device, dtype: torch.dtype, dim: int, normed: bool) -> list[tuple[Tensor, Tensor]]:
    """What our kernels make of some numbers, and torch."""
    from .prefill_kernels import gate_rows, norm_rows, place_rows

    generator = torch.Generator(device=device).manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device, dtype=dtype)

    rows, width, heads, groups, length = 5, 2 * dim + 8, 2, 2, 9
    x, delta, weight, norms = random(rows, width), random(rows, width), random(width), random(2, dim)
    qkv, gate_up = random(rows, (groups + 2) * heads * dim), random(rows, 2 * width)
    angles = torch.rand(rows, dim, generator=generator, device=device)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    places = torch.arange(rows, device=device) + 2
    keys, values = random(1, heads, length, dim), random(1, heads, length, dim)
    total, of_rows = norm_rows(x, delta, weight, 1e-6)
    q_norm, k_norm = norms if normed else (None, None)
    queries = place_rows(qkv, cos, sin, q_norm, k_norm, 1e-6, groups, keys, values, places)
    q, k, v = (part.view(rows, -1, dim) for part in qkv.split((heads * groups * dim, heads * dim, heads * dim), dim=-1))
    if normed:
        q, k = rms_norm(q, norms[0], 1e-6), rms_norm(k, norms[1], 1e-6)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    gate, up = gate_up.chunk(2, dim=-1)
    return [
        (total, x + delta),
        (of_rows, rms_norm(x + delta, weight, 1e-6)),
        (queries, rotate(q, cos, sin).transpose(0, 1)),
        (keys[0, :, 2 : 2 + rows], rotate(k, cos, sin).transpose(0, 1)),
        (values[0, :, 2 : 2 + rows], v.transpose(0, 1)),
        (gate_rows(gate_up), F.silu(gate) * up),
    ]
