"""The products of one token with packed weights, in Triton: `fused_decode_kernel` for codes of 4 or 8 bits and their scales.

Packed weights are read as they lie, and become numbers in registers only. What stands around a product is done as there.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..attention.capabilities import FUSES
from .packed_matrix import PackedMatrix

WHOLE_ROW = 128  # inputs that are looked at together where all of a row have one scale
FLOAT8_SCALE = 256.0  # by which a float8 (e4m3) is larger than the float16 that its bits make


@triton.jit
def _add(
    total, CODES, HIGH, SCALE, LOW, TABLE, output, first_group, asked, stride, high_stride, groups, x, y,
    GROUP: tl.constexpr, SCALED_ROWS: tl.constexpr, HALVES: tl.constexpr, HIGH_BITS: tl.constexpr, FLOATS: tl.constexpr,
    SCALES: tl.constexpr, LOWS: tl.constexpr, TABLED: tl.constexpr, FIRST: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """`total` [outputs, groups, codes or bytes of a group], and what some outputs and groups of inputs add to it."""
    WIDTH: tl.constexpr = GROUP // 2 if HALVES else GROUP
    place = first_group * WIDTH + tl.arange(0, BLOCK_G * WIDTH)
    # 64 bits: an output head may have more than 2^31 weights.
    at = output.to(tl.int64)[:, None] * stride + place[None, :]
    held = asked[:, None] & (place < stride)[None, :]
    codes = tl.load(CODES + at, mask=held, other=0, eviction_policy="evict_first")
    codes = tl.reshape(codes, (BLOCK_N, BLOCK_G, WIDTH))
    if HALVES:
        lower, upper = codes & 15, codes >> 4
        if HIGH_BITS > 0:
            # A byte holds the upper bits of as many codes as it has room for, the first ones lowest.
            SHARING: tl.constexpr = 4 // HIGH_BITS
            place = first_group * (WIDTH // SHARING) + tl.arange(0, BLOCK_G * WIDTH // SHARING)
            at = output.to(tl.int64)[:, None] * high_stride + place[None, :]
            held = asked[:, None] & (place < high_stride)[None, :]
            more = tl.load(HIGH + at, mask=held, other=0, eviction_policy="evict_first")
            if HIGH_BITS == 2:
                more = tl.join(more & 15, more >> 4)
            else:
                more = tl.join(tl.join(more & 3, (more >> 4) & 3), tl.join((more >> 2) & 3, more >> 6))
            more = tl.reshape(more, (BLOCK_N, BLOCK_G, WIDTH))
            lower |= (more & ((1 << HIGH_BITS) - 1)) << 4
            upper |= (more >> HIGH_BITS) << 4
        if TABLED:
            lower = tl.load(TABLE + lower.to(tl.int32))
            upper = tl.load(TABLE + upper.to(tl.int32))
        made = lower.to(tl.float32) * x[None, :, :] + upper.to(tl.float32) * y[None, :, :]
    elif FLOATS:
        # By hand, since not every card has them: the same digits behind an exponent of 5 bits are a float16.
        bits = ((codes & 128).to(tl.uint16) << 8) | ((codes & 127).to(tl.uint16) << 7)
        made = bits.to(tl.float16, bitcast=True).to(tl.float32) * x[None, :, :]
    else:
        made = codes.to(tl.float32) * x[None, :, :]
    if not SCALES:
        return total + made
    group = first_group + tl.arange(0, BLOCK_G)
    scale_at = (output // SCALED_ROWS)[:, None] * groups + group[None, :]
    wanted = asked[:, None] & (group < groups)[None, :]
    scale = tl.load(SCALE + scale_at, mask=wanted, other=0.0).to(tl.float32)
    total += made * scale[:, :, None]
    if LOWS or FIRST != 0:
        low = scale * FIRST
        if LOWS:
            low += tl.load(LOW + scale_at, mask=wanted, other=0.0).to(tl.float32)
        total += low[:, :, None] * (x + y)[None, :, :] if HALVES else low[:, :, None] * x[None, :, :]
    return total


@triton.jit
def _packed_product(
    X, CODES, HIGH, SCALE, LOW, TABLE, BIAS, NORM, ADDED, RESULT, outputs, inputs, stride, high_stride, groups, eps, factor,
    NORMED: tl.constexpr, GATED: tl.constexpr, ADDS: tl.constexpr, BIASED: tl.constexpr,
    GROUP: tl.constexpr, SCALED_ROWS: tl.constexpr, HALVES: tl.constexpr, HIGH_BITS: tl.constexpr, FLOATS: tl.constexpr,
    SCALES: tl.constexpr, LOWS: tl.constexpr, TABLED: tl.constexpr, FIRST: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    WIDTH: tl.constexpr = GROUP // 2 if HALVES else GROUP
    output = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    asked = output < outputs
    total = tl.zeros((BLOCK_N, BLOCK_G, WIDTH), tl.float32)
    other = tl.zeros((BLOCK_N, BLOCK_G, WIDTH), tl.float32)
    squares = tl.zeros((BLOCK_G, GROUP), tl.float32)
    for step in range(STEPS):
        first_group = step * BLOCK_G
        place = (first_group + tl.arange(0, BLOCK_G))[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        inside = place < inputs
        x = tl.load(X + place, mask=inside, other=0.0).to(tl.float32)
        if NORMED:
            squares += x * x
            x = x * tl.load(NORM + place, mask=inside, other=0.0).to(tl.float32)
        if HALVES:
            first, second = tl.split(tl.reshape(x, (BLOCK_G, GROUP // 2, 2)))
        else:
            first, second = x, x
        total = _add(
            total, CODES, HIGH, SCALE, LOW, TABLE, output, first_group, asked, stride, high_stride, groups,
            first, second,
            GROUP, SCALED_ROWS, HALVES, HIGH_BITS, FLOATS, SCALES, LOWS, TABLED, FIRST, BLOCK_N, BLOCK_G,
        )  # fmt: skip
        if GATED:
            other = _add(
                other, CODES, HIGH, SCALE, LOW, TABLE, output + outputs, first_group, asked, stride, high_stride, groups,
                first, second,
                GROUP, SCALED_ROWS, HALVES, HIGH_BITS, FLOATS, SCALES, LOWS, TABLED, FIRST, BLOCK_N, BLOCK_G,
            )  # fmt: skip
    made = tl.sum(tl.sum(total, 2), 1) * factor
    if not SCALES:
        made *= tl.load(SCALE + output, mask=asked, other=0.0).to(tl.float32)
    if NORMED:
        normed = 1.0 / tl.sqrt(tl.sum(tl.sum(squares, 1), 0) / inputs + eps)
        made *= normed
    if BIASED:
        made += tl.load(BIAS + output, mask=asked, other=0.0).to(tl.float32)
    if GATED:
        up = tl.sum(tl.sum(other, 2), 1) * factor
        if not SCALES:
            up *= tl.load(SCALE + output + outputs, mask=asked, other=0.0).to(tl.float32)
        if NORMED:
            up *= normed
        made = made / (1.0 + tl.exp(-made)) * up
    if ADDS:
        made += tl.load(ADDED + output, mask=asked, other=0.0).to(tl.float32)
    tl.store(RESULT + output, made.to(RESULT.dtype.element_ty), mask=asked)


def packed_product(
    x: Tensor,
    matrix: PackedMatrix,
    result: Tensor,
    config: tuple[int, int, int],
    bias: Tensor | None = None,
    norm: Tensor | None = None,
    eps: float = 0.0,
    added: Tensor | None = None,
    gated: bool = False,
) -> None:
    """`fused_decode_kernel.product` for packed weights, one launch. config: outputs of a program, inputs at a time, warps."""
    outputs = matrix.outputs // 2 if gated else matrix.outputs
    block_n, block_k, warps = config
    form = form_of(matrix)
    groups = triton.cdiv(matrix.inputs, form["GROUP"])
    block_g = max(1, block_k // form["GROUP"])
    nothing = x  # what is not read may be anything
    read = [
        nothing if part is None else part
        for part in (matrix.high, matrix.scale, matrix.low, matrix.table, bias, norm, added)
    ]
    _packed_product[(triton.cdiv(outputs, block_n),)](
        x, matrix.codes, *read, result, outputs, matrix.inputs, matrix.codes.shape[1],
        0 if matrix.high is None else matrix.high.shape[1], groups, eps, FLOAT8_SCALE if matrix.floats else 1.0,
        NORMED=norm is not None, GATED=gated, ADDS=added is not None, BIASED=bias is not None, **form,
        BLOCK_N=block_n, BLOCK_G=block_g, STEPS=triton.cdiv(groups, block_g), num_warps=warps, **FUSES,
    )  # fmt: skip


def form_of(matrix: PackedMatrix) -> dict[str, Any]:
    """What the kernel is compiled for, of a kind of packed weights."""
    return {
        "GROUP": matrix.group or WHOLE_ROW,
        "SCALED_ROWS": matrix.scaled_rows,
        "HALVES": matrix.halves,
        "HIGH_BITS": matrix.high_bits,
        "FLOATS": matrix.floats,
        "SCALES": matrix.group > 0,
        "LOWS": matrix.low is not None,
        "TABLED": matrix.table is not None,
        "FIRST": matrix.first,
    }
