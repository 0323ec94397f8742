"""Attention of many queries to the few keys of image prompts, added to what text attention gave.

`out + sum over identities of weight * mask * softmax(q k^T / sqrt(d)) v`: the second half of IP-Adapter's decoupled
cross-attention (Ye et al., 2023, eq. 5), for the 16 tokens of each identity. Everything that may change between two
pictures is a tensor, so that compiled models and CUDA graphs follow it.

Three ways to the same numbers: the kernel in `token_attention_kernel`, `attend_tokens_reference` in plain torch, and,
while torch.compile traces, one opaque operator that takes either of them when it runs.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .capabilities import one_line
from .first_results import compare
from .reference import attention_reference

log = logging.getLogger("hotpath.attention")

Attention = Callable[[Tensor, Tensor, Tensor, int], Tensor]
"""(q, k, v, heads) -> out, all [B, N, heads * D]."""

_failed: dict[torch.device, str] = {}


def scaled_dot_product(q: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """Plain multi-head attention over [B, N, heads * D]."""

    def split(x: Tensor) -> Tensor:
        return x.unflatten(-1, (heads, -1)).transpose(1, 2)

    return F.scaled_dot_product_attention(split(q), split(key), split(value)).transpose(1, 2).flatten(2)


def by_products(q: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """`scaled_dot_product` of few keys in float32, for Intel's cards: the kernel that torch takes there leaves some of its output
    unwritten (torch-xpu-ops 5179)."""
    parts = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, key, value))
    return attention_reference(*parts).transpose(1, 2).flatten(2).to(q.dtype)


def attend_tokens(
    q: Tensor,
    out: Tensor,
    keys: Tensor,
    values: Tensor,
    rows: Tensor,
    weights: Tensor,
    heads: int,
    mask: Tensor | None = None,
    stats: Tensor | None = None,
    attention: Attention = scaled_dot_product,
) -> Tensor:
    """out + sum_p weights[p] * mask[p] * attention(q, keys[rows[p]], values[rows[p]]), a new tensor like `out`.

    q, out: [B, N, heads * D]. keys, values: [R, T, heads * D] in q's dtype. All are on one device.
    rows: [P, B] int32, for identity p and sample b its row in keys and values. weights: [P, B] float32; 0 adds nothing.
    mask: [P, 1 or B, N] float32, or None.
    stats: [2] float32 or None; the sums of squares of what was added and of `out` are added to it.
    attention: what the host attends with where the kernel does not run, so that text and identity go the same way.
    Raises ValueError for rows or weights of another batch.
    """
    if torch.compiler.is_compiling():
        if stats is None:
            made: Tensor = torch.ops.hotpath.attend_tokens(q, out, keys, values, rows, weights, mask, heads)
        else:
            made = torch.ops.hotpath.attend_tokens_measured(q, out, keys, values, rows, weights, mask, stats, heads)
        return made
    return _run(q, out, keys, values, rows, weights, heads, mask, stats, attention)


def attend_text_and_tokens(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    rows: Tensor,
    weights: Tensor,
    heads: int,
    mask: Tensor | None = None,
    stats: Tensor | None = None,
) -> Tensor | None:
    """`attend_tokens` to what q attends to in k and v, the text's, in one launch; None where that is not served.

    k, v: [B, T, heads * D] in q's dtype. The text's part is exact attention in half precision with sums in float32, as of
    the kernels that torch chooses from. The others: as of `attend_tokens`.
    """
    if not q.is_cuda or torch.compiler.is_compiling() or k.dtype != q.dtype or k.shape[0] != q.shape[0]:
        return None
    head_dim = q.shape[2] // heads
    if why_not_fused(q.device, q.dtype, keys.shape[1], head_dim) or not rows.shape[1] == weights.shape[1] == q.shape[0]:
        return None
    from .token_attention_kernel import attend_tokens_fused, why_not_text

    if why_not_text(q.device, q.dtype, head_dim, k.shape[1]):
        return None
    try:
        made = attend_tokens_fused(q, None, keys, values, rows, weights, heads, mask, stats, (k, v))

        def reference() -> tuple[Tensor, None]:
            text = scaled_dot_product(q, k, v, heads)
            return attend_tokens_reference(q, text, keys, values, rows, weights, heads, mask), None

        compare(made, ("text", q.device, q.dtype, *q.shape[1:], heads, keys.shape[1], k.shape[1]), reference)
        return made
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        _note_failure(q.device, error)
        return None


def attend_tokens_reference(
    q: Tensor,
    out: Tensor,
    keys: Tensor,
    values: Tensor,
    rows: Tensor,
    weights: Tensor,
    heads: int,
    mask: Tensor | None = None,
    stats: Tensor | None = None,
    attention: Attention = scaled_dot_product,
) -> Tensor:
    """`attend_tokens` in plain torch, summed in float32; contiguous, as the kernel's result is."""
    if q.device.type == "xpu":
        attention = by_products
    total = out.float()
    for identity, identity_rows in enumerate(rows):
        attended = attention(q, keys[identity_rows], values[identity_rows], heads) * weights[identity, :, None, None]
        if mask is not None:
            attended = attended * mask[identity, :, :, None]
        total = total + attended
    if stats is not None:
        added = total - out
        stats += torch.stack((added.square().sum(), out.float().square().sum()))
    return total.to(out.dtype).contiguous()


def _run(
    q: Tensor,
    out: Tensor,
    keys: Tensor,
    values: Tensor,
    rows: Tensor,
    weights: Tensor,
    heads: int,
    mask: Tensor | None,
    stats: Tensor | None,
    attention: Attention,
) -> Tensor:
    # The kernel would read past their end, and what comes of that is no reason against the kernel.
    if not rows.shape[1] == weights.shape[1] == q.shape[0]:
        raise ValueError(
            f"rows are of {rows.shape[1]} samples, weights of {weights.shape[1]}, and q has {q.shape[0]}: give each one its own."
        )
    if q.is_cuda and not why_not_fused(q.device, q.dtype, keys.shape[1], q.shape[2] // heads):
        from .token_attention_kernel import attend_tokens_fused

        try:
            made = attend_tokens_fused(q, out, keys, values, rows, weights, heads, mask, stats)
            compare(
                made,
                ("tokens", q.device, q.dtype, *q.shape[1:], heads, keys.shape[1]),
                lambda: (attend_tokens_reference(q, out, keys, values, rows, weights, heads, mask), out),
            )
            return made
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # no compiler, a driver too old, a card that Triton does not know
            _note_failure(q.device, error)
    return attend_tokens_reference(q, out, keys, values, rows, weights, heads, mask, stats, attention)


def _note_failure(device: torch.device, error: Exception) -> None:
    _failed[device] = f"the kernel failed on {device} ({one_line(error)})"
    why_not_fused.cache_clear()
    log.warning("token attention runs in plain torch: %s", _failed[device])


@functools.cache
def why_not_fused(device: torch.device, dtype: torch.dtype, tokens: int, head_dim: int) -> str:
    """Why the fused kernel does not serve these; "" when it does."""
    if device.type != "cuda":
        return f"the kernel needs a GPU that Triton serves, this is {device.type}"
    if device in _failed:
        return _failed[device]
    try:
        from .token_attention_kernel import why_not
    except Exception as error:  # not installed, or too old to know what the kernel asks of it
        return f"Triton does not serve ({one_line(error)})"
    reason = why_not(dtype, tokens, head_dim)
    log.info("token attention on %s in %s: %s", device, dtype, f"plain torch, {reason}" if reason else "fused kernel")
    return reason


def _register_operators() -> None:
    """`attend_tokens` as opaque operators: a compiled model keeps one graph and never sees inside."""
    shared = "Tensor q, Tensor out, Tensor keys, Tensor values, Tensor rows, Tensor weights, Tensor? mask"

    def attend(q, out, keys, values, rows, weights, mask, heads):  # type: ignore[no-untyped-def]
        return _run(q, out, keys, values, rows, weights, heads, mask, None, scaled_dot_product)

    def measure(q, out, keys, values, rows, weights, mask, stats, heads):  # type: ignore[no-untyped-def]
        return _run(q, out, keys, values, rows, weights, heads, mask, stats, scaled_dot_product)

    def shape_of_result(q, out, *_):  # type: ignore[no-untyped-def]
        return out.new_empty(out.shape)

    library = torch.library.Library("hotpath", "FRAGMENT")
    for name, arguments, implementation in (
        ("attend_tokens", shared, attend),
        ("attend_tokens_measured", f"{shared}, Tensor(a!) stats", measure),
    ):
        library.define(f"{name}({arguments}, int heads) -> Tensor")
        library.impl(name, implementation, "CompositeExplicitAutograd")
        torch.library.register_fake(f"hotpath::{name}", shape_of_result, lib=library)
    _libraries.append(library)


_libraries: list[Any] = []  # an operator lives as long as the library that defined it
if not hasattr(torch.ops.hotpath, "attend_tokens"):  # another copy of the pack may have been loaded before
    _register_operators()
