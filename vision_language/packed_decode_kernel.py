"""The products of one token with packed weights, in Triton: `fused_decode_kernel` for codes of 2 to 8 bits and their scales.

Packed weights are read as they lie, and become numbers in registers only. What stands around a product is done as there.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..attention.capabilities import FUSES
from .fused_decode_kernel import INTERPRETED as INTERPRETED
from .packed_matrix import PackedMatrix

UNPACKED = (4, 1024)  # outputs and inputs of a program that only unpacks
WHOLE_ROW = 128  # inputs that are looked at together where all of a row have one scale
FLOAT8_SCALE = 256.0  # by which a float8 (e4m3) is larger than the float16 that its bits make


@triton.jit
def _pairs(
    CODES, output, asked, first_group, stride,
    BITS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """Every other code of so many bits, and those between, uint8 [outputs, groups, WIDTH]. Codes lie side by side in bytes."""
    SHARING: tl.constexpr = 4 // BITS  # pairs in a byte
    place = first_group * (WIDTH // SHARING) + tl.arange(0, BLOCK_G * WIDTH // SHARING)
    at = output[:, None] * stride + place[None, :]
    held = asked[:, None] & (place < stride)[None, :]
    codes = tl.load(CODES + at, mask=held, other=0, eviction_policy="evict_first")
    if BITS == 2:
        codes = tl.join(codes & 15, codes >> 4)
    if BITS == 1:
        codes = tl.join(tl.join(codes & 3, (codes >> 4) & 3), tl.join((codes >> 2) & 3, codes >> 6))
    codes = tl.reshape(codes, (BLOCK_N, BLOCK_G, WIDTH))
    return codes & ((1 << BITS) - 1), codes >> BITS


@triton.jit
def _spelled(
    CODES, HIGH, SIGNS, TABLE, output, first_group, asked, stride, high_stride,
    GROUP: tl.constexpr, HIGH_BITS: tl.constexpr, WORD: tl.constexpr, MOVED: tl.constexpr, SIGNED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """What words in a book stand for before they are scaled, float32 [outputs, groups, GROUP]."""
    word = first_group * (GROUP // WORD) + tl.arange(0, BLOCK_G * (GROUP // WORD))
    held = asked[:, None] & (word < stride)[None, :]
    place = tl.load(CODES + output[:, None] * stride + word[None, :], mask=held, other=0).to(tl.int32)
    more = place
    if HIGH_BITS > 0:
        SHARING: tl.constexpr = 8 // HIGH_BITS
        more = tl.load(HIGH + output[:, None] * high_stride + (word // SHARING)[None, :], mask=held, other=0).to(
            tl.int32
        )
        more = (more >> ((word % SHARING) * HIGH_BITS)[None, :]) & ((1 << HIGH_BITS) - 1)
        place |= (more & 7) << 8
    letter = tl.arange(0, WORD)
    numbers = tl.load(TABLE + place[:, :, None] * WORD + letter[None, None, :]).to(tl.float32)
    if MOVED:
        numbers += (1 - 2 * (more >> 3)).to(tl.float32)[:, :, None]
    if SIGNED:
        TOGETHER: tl.constexpr = 8 // WORD
        at = output[:, None] * (stride // TOGETHER) + (word // TOGETHER)[None, :]
        signs = tl.load(SIGNS + at, mask=held, other=0).to(tl.int32) >> ((word % TOGETHER) * WORD)[None, :]
        numbers = tl.where(((signs[:, :, None] >> letter[None, None, :]) & 1) == 1, -numbers, numbers)
    return tl.reshape(numbers, (BLOCK_N, BLOCK_G, GROUP))


@triton.jit
def _numbers(
    CODES, HIGH, SIGNS, TABLE, output, first_group, asked, stride, high_stride,
    GROUP: tl.constexpr, PLANE: tl.constexpr, HIGH_BITS: tl.constexpr, FLOATS: tl.constexpr, TABLED: tl.constexpr,
    WORD: tl.constexpr, MOVED: tl.constexpr, SIGNED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """What codes stand for before they are scaled, float32: every other one and those between, or all of them twice."""
    if WORD > 0:
        spelled = _spelled(
            CODES, HIGH, SIGNS, TABLE, output, first_group, asked, stride, high_stride,
            GROUP, HIGH_BITS, WORD, MOVED, SIGNED, BLOCK_N, BLOCK_G,
        )  # fmt: skip
        return spelled, spelled
    elif PLANE < 8:
        lower, upper = _pairs(CODES, output, asked, first_group, stride, PLANE, GROUP // 2, BLOCK_N, BLOCK_G)
        if HIGH_BITS > 0:
            more, still_more = _pairs(
                HIGH, output, asked, first_group, high_stride, HIGH_BITS, GROUP // 2, BLOCK_N, BLOCK_G
            )
            lower |= more << PLANE
            upper |= still_more << PLANE
        if TABLED:
            lower = tl.load(TABLE + lower.to(tl.int32))
            upper = tl.load(TABLE + upper.to(tl.int32))
        return lower.to(tl.float32), upper.to(tl.float32)
    else:
        place = first_group * GROUP + tl.arange(0, BLOCK_G * GROUP)
        at = output[:, None] * stride + place[None, :]
        held = asked[:, None] & (place < stride)[None, :]
        codes = tl.load(CODES + at, mask=held, other=0, eviction_policy="evict_first")
        if FLOATS:
            # By hand, since not every card has them: the same digits behind an exponent of 5 bits are a float16.
            bits = ((codes & 128).to(tl.uint16) << 8) | ((codes & 127).to(tl.uint16) << 7)
            codes = bits.to(tl.uint16).to(tl.float16, bitcast=True)  # Triton 3.1 shifts into 32 bits
        numbers = tl.reshape(codes.to(tl.float32), (BLOCK_N, BLOCK_G, GROUP))
        return numbers, numbers


@triton.jit
def _scales(
    SCALE, LOW, UNIT, LOW_UNIT, output, first_group, asked, groups,
    SCALED_ROWS: tl.constexpr, LOWS: tl.constexpr, UNITS: tl.constexpr, WORD: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """Scales and lows, float32 [outputs, groups]; twice the scales where there are no lows."""
    group = first_group + tl.arange(0, BLOCK_G)
    wanted = asked[:, None] & (group < groups)[None, :]
    at = (output // SCALED_ROWS)[:, None] * groups + group[None, :]
    if WORD > 0:  # halves of bytes, of which odd numbers are made
        stored = tl.load(SCALE + output[:, None] * (groups // 2) + (group // 2)[None, :], mask=wanted, other=0)
        scale = 1.0 + 2.0 * ((stored >> ((group % 2) * 4).to(tl.uint8)[None, :]) & 15).to(tl.float32)
    else:
        stored = tl.load(SCALE + at, mask=wanted, other=0)
        scale = (stored & 15).to(tl.float32) if LOWS == 2 else stored.to(tl.float32)
    low = scale
    if LOWS > 0:
        low = (stored >> 4 if LOWS == 2 else tl.load(LOW + at, mask=wanted, other=0)).to(tl.float32)
    if UNITS > 0:
        at = output[:, None] * (groups // UNITS) + (group // UNITS)[None, :]
        scale *= tl.load(UNIT + at, mask=wanted, other=0.0).to(tl.float32)
        if LOWS > 0:
            low *= tl.load(LOW_UNIT + at, mask=wanted, other=0.0).to(tl.float32)
    return scale, low


@triton.jit
def _add(
    total, CODES, HIGH, SIGNS, SCALE, LOW, UNIT, LOW_UNIT, TABLE, output, first_group, asked, stride, high_stride, groups, x, y,
    GROUP: tl.constexpr, SCALED_ROWS: tl.constexpr, PLANE: tl.constexpr, HIGH_BITS: tl.constexpr, FLOATS: tl.constexpr,
    SCALES: tl.constexpr, LOWS: tl.constexpr, UNITS: tl.constexpr, TABLED: tl.constexpr, FIRST: tl.constexpr,
    WORD: tl.constexpr, MOVED: tl.constexpr, SIGNED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """`total` [outputs, groups, codes or pairs of a group], and what some outputs and groups of inputs add to it."""
    lower, upper = _numbers(
        CODES, HIGH, SIGNS, TABLE, output, first_group, asked, stride, high_stride,
        GROUP, PLANE, HIGH_BITS, FLOATS, TABLED, WORD, MOVED, SIGNED, BLOCK_N, BLOCK_G,
    )  # fmt: skip
    made = lower * x[None, :, :]
    if PLANE < 8:
        made += upper * y[None, :, :]
    if not SCALES:
        return total + made
    scale, low = _scales(
        SCALE,
        LOW,
        UNIT,
        LOW_UNIT,
        output,
        first_group,
        asked,
        groups,
        SCALED_ROWS,
        LOWS,
        UNITS,
        WORD,
        BLOCK_G,
    )
    total += made * scale[:, :, None]
    if LOWS > 0 or FIRST != 0:
        if FIRST != 0:
            low = scale * FIRST + low if LOWS > 0 else scale * FIRST
        total += low[:, :, None] * (x + y)[None, :, :] if PLANE < 8 else low[:, :, None] * x[None, :, :]
    return total


@triton.jit
def _packed_product(
    X, CODES, HIGH, SIGNS, SCALE, LOW, UNIT, LOW_UNIT, TABLE, BIAS, NORM, ADDED, CHOSEN, RESULT,
    outputs, inputs, stride, high_stride, groups, slots, sharing, eps, factor,
    NORMED: tl.constexpr, GATED: tl.constexpr, ADDS: tl.constexpr, BIASED: tl.constexpr, CHOOSES: tl.constexpr,
    SEVERAL: tl.constexpr,
    GROUP: tl.constexpr, SCALED_ROWS: tl.constexpr, PLANE: tl.constexpr, HIGH_BITS: tl.constexpr, FLOATS: tl.constexpr,
    SCALES: tl.constexpr, LOWS: tl.constexpr, UNITS: tl.constexpr, TABLED: tl.constexpr, FIRST: tl.constexpr,
    WORD: tl.constexpr, MOVED: tl.constexpr, SIGNED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    WIDTH: tl.constexpr = GROUP // 2 if PLANE < 8 else GROUP
    ROW_SCALES: tl.constexpr = not SCALES and PLANE == 8
    block = tl.program_id(0)
    if SEVERAL:
        # Those that read the same weights run side by side.
        slot = block % slots
        block = block // slots
        X += slot // sharing * inputs
        RESULT += slot * outputs
    output = block * BLOCK_N + tl.arange(0, BLOCK_N)
    asked = output < outputs
    row = output.to(tl.int64)  # 64 bits: an output head may have more than 2^31 weights
    if CHOOSES:
        row += tl.load(CHOSEN + slot).to(tl.int64) * (2 * outputs if GATED else outputs)
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
        if PLANE < 8:
            first, second = tl.split(tl.reshape(x, (BLOCK_G, GROUP // 2, 2)))
        else:
            first, second = x, x
        total = _add(
            total, CODES, HIGH, SIGNS, SCALE, LOW, UNIT, LOW_UNIT, TABLE, row, first_group, asked, stride, high_stride, groups,
            first, second,
            GROUP, SCALED_ROWS, PLANE, HIGH_BITS, FLOATS, SCALES, LOWS, UNITS, TABLED, FIRST, WORD, MOVED,
            SIGNED, BLOCK_N, BLOCK_G,
        )  # fmt: skip
        if GATED:
            other = _add(
                other, CODES, HIGH, SIGNS, SCALE, LOW, UNIT, LOW_UNIT, TABLE, row + outputs, first_group, asked, stride,
                high_stride, groups, first, second,
                GROUP, SCALED_ROWS, PLANE, HIGH_BITS, FLOATS, SCALES, LOWS, UNITS, TABLED, FIRST, WORD, MOVED,
            SIGNED, BLOCK_N, BLOCK_G,
            )  # fmt: skip
    made = tl.sum(tl.sum(total, 2), 1) * factor
    if ROW_SCALES:
        made *= tl.load(SCALE + row, mask=asked, other=0.0).to(tl.float32)
    if NORMED:
        normed = 1.0 / tl.sqrt(tl.sum(tl.sum(squares, 1), 0) / inputs + eps)
        made *= normed
    if BIASED:
        made += tl.load(BIAS + output, mask=asked, other=0.0).to(tl.float32)
    if GATED:
        up = tl.sum(tl.sum(other, 2), 1) * factor
        if ROW_SCALES:
            up *= tl.load(SCALE + row + outputs, mask=asked, other=0.0).to(tl.float32)
        if NORMED:
            up *= normed
        made = made / (1.0 + tl.exp(-made)) * up
    if ADDS:
        made += tl.load(ADDED + output, mask=asked, other=0.0).to(tl.float32)
    tl.store(RESULT + output, made.to(RESULT.dtype.element_ty), mask=asked)


@triton.jit
def _unpack(
    CODES, HIGH, SIGNS, SCALE, LOW, UNIT, LOW_UNIT, TABLE, RESULT, outputs, inputs, stride, high_stride, groups, factor,
    GROUP: tl.constexpr, SCALED_ROWS: tl.constexpr, PLANE: tl.constexpr, HIGH_BITS: tl.constexpr, FLOATS: tl.constexpr,
    SCALES: tl.constexpr, LOWS: tl.constexpr, UNITS: tl.constexpr, TABLED: tl.constexpr, FIRST: tl.constexpr,
    WORD: tl.constexpr, MOVED: tl.constexpr, SIGNED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    output = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    asked = output < outputs
    first_group = tl.program_id(0) * BLOCK_G
    lower, upper = _numbers(
        CODES, HIGH, SIGNS, TABLE, output, first_group, asked, stride, high_stride,
        GROUP, PLANE, HIGH_BITS, FLOATS, TABLED, WORD, MOVED, SIGNED, BLOCK_N, BLOCK_G,
    )  # fmt: skip
    scale, low = _scales(
        SCALE,
        LOW,
        UNIT,
        LOW_UNIT,
        output,
        first_group,
        asked,
        groups,
        SCALED_ROWS,
        LOWS,
        UNITS,
        WORD,
        BLOCK_G,
    )
    scale *= factor
    made = (lower + FIRST) * scale[:, :, None]
    if LOWS > 0:
        made += low[:, :, None]
    if PLANE < 8:
        other = (upper + FIRST) * scale[:, :, None]
        if LOWS > 0:
            other += low[:, :, None]
        made = tl.join(made, other)
    made = tl.reshape(made, (BLOCK_N, BLOCK_G * GROUP))
    place = first_group * GROUP + tl.arange(0, BLOCK_G * GROUP)
    at = output[:, None] * inputs + place[None, :]
    tl.store(RESULT + at, made.to(RESULT.dtype.element_ty), mask=asked[:, None] & (place < inputs)[None, :])


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
    chosen: Tensor | None = None,
) -> None:
    """`fused_decode_kernel.product` for packed weights, one launch. config: outputs of a program, inputs at a time, warps.

    x may be several rows, [rows, inputs], result: [rows, outputs]; nothing is added then. chosen: [slots] experts, of each of
    which the matrix has so many outputs; x: a row for as many slots; result: [slots, outputs].
    """
    outputs = matrix.outputs // 2 if gated else matrix.outputs
    block_n, block_k, warps = config
    form = form_of(matrix)
    groups = triton.cdiv(matrix.inputs, form["GROUP"])
    block_g = max(1, block_k // form["GROUP"])
    around = [x if part is None else part for part in (bias, norm, added, chosen)]  # what is not read may be anything
    rows = len(x) if x.dim() > 1 else 1
    slots = rows if chosen is None else len(chosen)
    _packed_product[(triton.cdiv(outputs, block_n) * slots,)](
        x, *_stored(matrix), *around, result, outputs, *_sizes(matrix, groups), slots, slots // rows, eps,
        FLOAT8_SCALE if matrix.floats else 1.0,
        NORMED=norm is not None, GATED=gated, ADDS=added is not None, BIASED=bias is not None, CHOOSES=chosen is not None,
        SEVERAL=slots > 1 or chosen is not None, **form,
        BLOCK_N=block_n, BLOCK_G=block_g, STEPS=triton.cdiv(groups, block_g), num_warps=warps, **FUSES,
    )  # fmt: skip


def unpack(matrix: PackedMatrix, dtype: torch.dtype) -> Tensor:
    """The weights of a matrix whose scales are of groups, [outputs, inputs], one launch."""
    form = form_of(matrix)
    groups = triton.cdiv(matrix.inputs, form["GROUP"])
    block_n, block_g = UNPACKED[0], max(1, UNPACKED[1] // form["GROUP"])
    result = torch.empty(matrix.outputs, matrix.inputs, dtype=dtype, device=matrix.codes.device)
    _unpack[(triton.cdiv(groups, block_g), triton.cdiv(matrix.outputs, block_n))](
        *_stored(matrix), result, matrix.outputs, *_sizes(matrix, groups), FLOAT8_SCALE if matrix.floats else 1.0, **form,
        BLOCK_N=block_n, BLOCK_G=block_g, num_warps=4, **FUSES,
    )  # fmt: skip
    return result


def _stored(matrix: PackedMatrix) -> list[Tensor]:
    """The parts of a matrix, as kernels take them."""
    parts = (matrix.high, matrix.signs, matrix.scale, matrix.low, matrix.unit, matrix.low_unit, matrix.table)
    return [matrix.codes, *(matrix.codes if part is None else part for part in parts)]


def _sizes(matrix: PackedMatrix, groups: int) -> tuple[int, int, int, int]:
    return matrix.inputs, matrix.codes.shape[1], 0 if matrix.high is None else matrix.high.shape[1], groups


def form_of(matrix: PackedMatrix) -> dict[str, Any]:
    """What the kernel is compiled for, of a kind of packed weights."""
    return {
        "GROUP": matrix.group or WHOLE_ROW,
        "SCALED_ROWS": matrix.scaled_rows,
        "PLANE": matrix.plane,
        "HIGH_BITS": matrix.high_bits(),
        "FLOATS": matrix.floats,
        "SCALES": matrix.group > 0,
        "LOWS": matrix.lows,
        "UNITS": matrix.sharing,
        "TABLED": matrix.table is not None,
        "FIRST": matrix.first,
        "WORD": matrix.word,
        "MOVED": matrix.moved,
        "SIGNED": matrix.signs is not None,
    }
