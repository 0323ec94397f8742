"""The Triton kernel behind `local_window.local_window_triton`; imported only where Triton is.

What it costs for five frames of 1920x1080 (8820 places of 64 channels each, a 15x15 window, 1024 half-precision values),
computed, not measured: each input read and each output written once are 162 MB (bias 40, result 90), 34 us at an H200's
4.8 TB/s. Its products are 43 GFLOP in half precision and three times 11 GFLOP in TF32, 0.2 ms there at half of the
card's peak: the tensor cores are the floor, not memory.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def local_window_kernel(
    q_pointer,
    k_pointer,
    v_pointer,
    bias_pointer,
    out_pointer,
    height,
    width,
    channels,
    value_channels,
    WINDOW: tl.constexpr,
    TILE: tl.constexpr,
    REACH: tl.constexpr,
    CHANNELS: tl.constexpr,
    SLICE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: TILE queries of row `y` of one frame, SLICE channels of the value.

    q [T, H, W, C], k [H, W, C], v [H, W, V], bias [T, H, W, WINDOW^2], out [T, H, W, V]. REACH >= TILE + WINDOW - 1
    keys of a row cover the windows of the whole tile; key j lies in the window of query i where 0 <= j - i < WINDOW.
    PRECISION: of float32 products, as `capabilities.float32_products` says. Plain "tf32" would cost the softmax three
    digits; "ieee" runs outside the tensor cores.
    """
    radius: tl.constexpr = WINDOW // 2
    first = tl.program_id(0) * TILE
    frame = tl.program_id(1) // height
    y = tl.program_id(1) % height
    x = first + tl.arange(0, TILE)
    c = tl.arange(0, CHANNELS)
    slice_ = tl.program_id(2) * SLICE + tl.arange(0, SLICE)
    query = (frame * height + y) * width + x
    q = tl.load(
        q_pointer + query[:, None] * channels + c[None, :],
        mask=(x < width)[:, None] & (c < channels)[None, :],
        other=0.0,
    )
    reach = tl.arange(0, REACH)
    key_x = first - radius + reach
    offset = reach[None, :] - tl.arange(0, TILE)[:, None]
    in_row = (key_x >= 0) & (key_x < width)
    in_window = (offset >= 0) & (offset < WINDOW) & in_row[None, :] & (x < width)[:, None]

    highest = tl.full([TILE], -1e30, tl.float32)
    total = tl.zeros([TILE], tl.float32)
    summed = tl.zeros([TILE, SLICE], tl.float32)
    # Masks instead of a branch: only then are the loads of the next row under way while this one is computed.
    for row in range(WINDOW):
        key_y = y + row - radius
        in_map = (key_y >= 0) & (key_y < height)
        held = in_row & in_map
        taking_part = in_window & in_map
        key = key_y * width + key_x
        k = tl.load(
            k_pointer + key[None, :] * channels + c[:, None], mask=held[None, :] & (c < channels)[:, None], other=0.0
        )
        bias = tl.load(
            bias_pointer + query[:, None] * (WINDOW * WINDOW) + row * WINDOW + offset, mask=taking_part, other=0.0
        )
        logits = tl.dot(q, k, bias, input_precision=PRECISION)
        logits = tl.where(taking_part, logits, -1e30)
        higher = tl.maximum(highest, tl.max(logits, axis=1))
        decay = tl.exp(highest - higher)
        weights = tl.where(taking_part, tl.exp(logits - higher[:, None]), 0.0)
        total = total * decay + tl.sum(weights, axis=1)
        v = tl.load(
            v_pointer + key[:, None] * value_channels + slice_[None, :],
            mask=held[:, None] & (slice_ < value_channels)[None, :],
            other=0.0,
        )
        summed = tl.dot(weights.to(v.dtype), v, summed * decay[:, None], input_precision=PRECISION)
        highest = higher
    # Queries past the end of the row took part in nothing; they are not stored.
    out = summed / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(
        out_pointer + query[:, None] * value_channels + slice_[None, :],
        out.to(out_pointer.dtype.element_ty),
        mask=(x < width)[:, None] & (slice_ < value_channels)[None, :],
    )
