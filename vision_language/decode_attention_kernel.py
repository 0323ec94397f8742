"""Attention of one new token over a long cache, in Triton: the cache is cut into parts that run side by side.

One token has few queries, and a program for each key head would leave most of a card idle while it walks the cache. Here
every part gives its own softmax and sum, and a second kernel joins them by their maxima: the split of Flash-Decoding
(Dao et al., 2023). Only what is filled is read, wherever the cache ends; how much that is stands on the device.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor, empty, float32

from ..attention.capabilities import FUSES

MAX_HEAD_DIM = 256
MAX_GROUPS = 64
MAX_PARTS = 64
BLOCK = 64  # positions at a time
PROGRAMS = 264  # two for each multiprocessor of the largest cards; smaller ones run them in turns
INTERPRETED = bool(triton.knobs.runtime.interpret) if hasattr(triton, "knobs") else False  # it cannot multiply bfloat16


@triton.jit
def _attend_part(
    Q, KEYS, VALUES, BIAS, SLOT, SUMS, MAXIMA, SHARES, scale, heads, length, parts,
    GROUPS: tl.constexpr, PADDED_GROUPS: tl.constexpr, DIM: tl.constexpr, PADDED_DIM: tl.constexpr,
    BLOCK: tl.constexpr, STEPS: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    row_head, part = tl.program_id(0), tl.program_id(1)
    row = row_head // heads
    group, dim = tl.arange(0, PADDED_GROUPS), tl.arange(0, PADDED_DIM)
    asked = (group < GROUPS)[:, None] & (dim < DIM)[None, :]
    q = tl.load(Q + (row_head * GROUPS + group)[:, None] * DIM + dim[None, :], mask=asked, other=0.0)
    if WIDEN:
        q = q.to(tl.float32)
    filled = tl.load(SLOT).to(tl.int32) + 1
    each = tl.cdiv(tl.cdiv(filled, parts), BLOCK) * BLOCK
    start = part * each
    stop = tl.minimum(start + each, filled)
    # 64 bits: a long batch has more than 2^31 elements.
    base = row_head.to(tl.int64) * length * DIM
    highest = tl.full((PADDED_GROUPS,), float("-inf"), tl.float32)
    share = tl.zeros((PADDED_GROUPS,), tl.float32)
    total = tl.zeros((PADDED_GROUPS, PADDED_DIM), tl.float32)
    for step in range(STEPS):  # a number, so that loads run ahead; what lies past the end is not loaded
        place = start + step * BLOCK + tl.arange(0, BLOCK)
        here = place < stop
        at = base + place[:, None] * DIM + dim[None, :]
        held = here[:, None] & (dim < DIM)[None, :]
        keys = tl.load(KEYS + at, mask=held, other=0.0)
        values = tl.load(VALUES + at, mask=held, other=0.0)
        bias = tl.load(BIAS + row * length + place, mask=here, other=float("-inf")).to(tl.float32)
        if WIDEN:
            keys, values = keys.to(tl.float32), values.to(tl.float32)
        logits = tl.dot(q, tl.trans(keys), input_precision="ieee") * scale + bias[None, :]
        above = tl.maximum(highest, tl.max(logits, 1))
        # Nothing but padding so far: any number will do, and the difference of two infinities would not.
        ground = tl.where(above == float("-inf"), 0.0, above)
        weight = tl.exp(logits - ground[:, None])
        fade = tl.exp(highest - ground)
        share = share * fade + tl.sum(weight, 1)
        total = total * fade[:, None] + tl.dot(weight.to(values.dtype), values, input_precision="ieee")
        highest = above
    at_part = (row_head * parts + part) * GROUPS + group
    tl.store(MAXIMA + at_part, highest, mask=group < GROUPS)
    tl.store(SHARES + at_part, share, mask=group < GROUPS)
    tl.store(SUMS + at_part[:, None] * DIM + dim[None, :], total, mask=asked)


@triton.jit
def _join_parts(
    SUMS, MAXIMA, SHARES, RESULT, parts,
    GROUPS: tl.constexpr, DIM: tl.constexpr, PADDED_DIM: tl.constexpr, PADDED_PARTS: tl.constexpr,
):  # fmt: skip
    row_head, group = tl.program_id(0), tl.program_id(1)
    part, dim = tl.arange(0, PADDED_PARTS), tl.arange(0, PADDED_DIM)
    at = (row_head * parts + part) * GROUPS + group
    maxima = tl.load(MAXIMA + at, mask=part < parts, other=float("-inf"))
    fade = tl.exp(maxima - tl.max(maxima, 0))
    share = tl.sum(tl.load(SHARES + at, mask=part < parts, other=0.0) * fade, 0)
    held = (part < parts)[:, None] & (dim < DIM)[None, :]
    sums = tl.load(SUMS + at[:, None] * DIM + dim[None, :], mask=held, other=0.0)
    result = tl.sum(sums * fade[:, None], 0) / share
    tl.store(RESULT + (row_head * GROUPS + group) * DIM + dim, result.to(RESULT.dtype.element_ty), mask=dim < DIM)


def parts_of(rows: int, heads: int, length: int) -> int:
    """Into how many parts a cache is cut: enough programs for a whole card, but no part shorter than a block."""
    wanted = min(MAX_PARTS, -(-PROGRAMS // (rows * heads)), -(-length // BLOCK))
    return 1 << (wanted.bit_length() - 1)


def attend_filled(q: Tensor, keys: Tensor, values: Tensor, bias: Tensor, slot: Tensor) -> Tensor:
    """`decode_attention.attend_reference` in two launches, without waiting. Keys, values and bias are contiguous."""
    rows, heads, groups, dim = q.shape
    length = keys.shape[2]
    parts = parts_of(rows, heads, length)
    q = q.contiguous()
    sums = empty((rows, heads, parts, groups, dim), dtype=float32, device=q.device)
    maxima, shares = empty((2, rows, heads, parts, groups), dtype=float32, device=q.device)
    result = empty(q.shape, dtype=q.dtype, device=q.device)
    padded_dim = max(16, triton.next_power_of_2(dim))
    _attend_part[(rows * heads, parts)](
        q, keys, values, bias, slot, sums, maxima, shares, dim**-0.5, heads, length, parts,
        GROUPS=groups, PADDED_GROUPS=max(16, triton.next_power_of_2(groups)), DIM=dim, PADDED_DIM=padded_dim,
        BLOCK=BLOCK, STEPS=triton.cdiv(triton.cdiv(length, parts), BLOCK), WIDEN=INTERPRETED, num_warps=4, num_stages=2,
        **FUSES,
    )  # fmt: skip
    _join_parts[(rows * heads, groups)](
        sums,
        maxima,
        shares,
        result,
        parts,
        GROUPS=groups,
        DIM=dim,
        PADDED_DIM=padded_dim,
        PADDED_PARTS=parts,
        num_warps=4,
        **FUSES,
    )
    return result
