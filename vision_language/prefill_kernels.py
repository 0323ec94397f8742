"""What stands between the products of a prefill, in Triton: one launch where torch has five to fifteen.

RMS norm with the residual sum before it, the heads' norms with rotary embedding and the write into the cache, and SiLU with
its gate. Numbers are rounded where torch rounds them, so that a prefill does not depend on who made it.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor, empty, empty_like

from ..attention.capabilities import FUSES

INTERPRETED = bool(triton.knobs.runtime.interpret) if hasattr(triton, "knobs") else False
GATE_BLOCK = 1024


@triton.jit
def _norm_rows(X, DELTA, WEIGHT, SUM, RESULT, width, eps, ADDS: tl.constexpr, PADDED: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * width
    place = tl.arange(0, PADDED)
    held = place < width
    x = tl.load(X + row + place, mask=held, other=0.0)
    if ADDS:
        x = (x.to(tl.float32) + tl.load(DELTA + row + place, mask=held, other=0.0).to(tl.float32)).to(x.dtype)
        tl.store(SUM + row + place, x, mask=held)
    wide = x.to(tl.float32)
    factor = 1.0 / tl.sqrt(tl.sum(wide * wide, 0) / width + eps)
    normed = (wide * factor).to(x.dtype).to(tl.float32)
    weight = tl.load(WEIGHT + place, mask=held, other=0.0).to(tl.float32)
    tl.store(RESULT + row + place, (normed * weight).to(RESULT.dtype.element_ty), mask=held)


@triton.jit
def _place_rows(
    QKV, COS, SIN, Q_NORM, K_NORM, QUERIES, KEYS, VALUES, PLACES, eps, length, rows, query_heads, heads,
    DIM: tl.constexpr, PADDED_DIM: tl.constexpr, NORMED: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0), tl.program_id(1)
    dim = tl.arange(0, PADDED_DIM)
    held = dim < DIM
    HALF: tl.constexpr = DIM // 2
    partner = tl.where(dim < HALF, dim + HALF, dim - HALF)
    at = QKV + (row.to(tl.int64) * (query_heads + 2 * heads) + head) * DIM
    x, y = tl.load(at + dim, mask=held, other=0.0), tl.load(at + partner, mask=held, other=0.0)
    plain = x
    if NORMED:
        wide = x.to(tl.float32)
        factor = 1.0 / tl.sqrt(tl.sum(wide * wide, 0) / DIM + eps)
        asks = head < query_heads
        q, k = tl.load(Q_NORM + dim, mask=held, other=0.0), tl.load(K_NORM + dim, mask=held, other=0.0)
        normed = (wide * factor).to(x.dtype).to(tl.float32)
        x = (normed * tl.where(asks, q, k).to(tl.float32)).to(x.dtype)
        q, k = tl.load(Q_NORM + partner, mask=held, other=0.0), tl.load(K_NORM + partner, mask=held, other=0.0)
        normed = (y.to(tl.float32) * factor).to(y.dtype).to(tl.float32)
        y = (normed * tl.where(asks, q, k).to(tl.float32)).to(y.dtype)
    cos = tl.load(COS + row * DIM + dim, mask=held, other=0.0).to(tl.float32)
    sin = tl.load(SIN + row * DIM + dim, mask=held, other=0.0).to(tl.float32)
    other = tl.where(dim < HALF, -y.to(tl.float32), y.to(tl.float32))
    straight = (x.to(tl.float32) * cos).to(x.dtype).to(tl.float32)
    turned = straight + (other * sin).to(x.dtype).to(tl.float32)
    place = tl.load(PLACES + row)
    key = head - query_heads
    value = key - heads
    to = QUERIES + (head.to(tl.int64) * rows + row) * DIM + dim
    tl.store(to, turned.to(QUERIES.dtype.element_ty), mask=held & (head < query_heads))
    to = KEYS + (key.to(tl.int64) * length + place) * DIM + dim
    tl.store(to, turned.to(KEYS.dtype.element_ty), mask=held & (key >= 0) & (key < heads))
    to = VALUES + (value.to(tl.int64) * length + place) * DIM + dim
    tl.store(to, plain.to(VALUES.dtype.element_ty), mask=held & (value >= 0))


@triton.jit
def _gate_rows(GATE_UP, RESULT, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    held = place < width
    gate = tl.load(GATE_UP + row * 2 * width + place, mask=held, other=0.0)
    up = tl.load(GATE_UP + row * 2 * width + width + place, mask=held, other=0.0).to(tl.float32)
    wide = gate.to(tl.float32)
    gated = (wide / (1.0 + tl.exp(-wide))).to(gate.dtype).to(tl.float32)
    tl.store(RESULT + row * width + place, (gated * up).to(RESULT.dtype.element_ty), mask=held)


def norm_rows(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(x + delta, its RMS norm times `weight`); x, delta: [n, width], contiguous."""
    rows, width = x.shape
    result = empty_like(x)
    total = x if delta is None else empty_like(x)
    _norm_rows[(rows,)](
        x, x if delta is None else delta, weight, total, result, width, eps,
        ADDS=delta is not None, PADDED=triton.next_power_of_2(width), num_warps=8, **FUSES,
    )  # fmt: skip
    return total, result


def place_rows(
    qkv: Tensor, cos: Tensor, sin: Tensor, q_norm: Tensor | None, k_norm: Tensor | None, eps: float, groups: int,
    keys: Tensor, values: Tensor, places: Tensor,
) -> Tensor:  # fmt: skip
    """Rotated queries [heads * groups, n, D]; keys and values of `qkv` go into the caches at `places`.

    qkv: [n, (groups + 2) * heads * D]; cos, sin: [n, D]; keys, values: [1, heads, length, D]; places: [n].
    """
    _, heads, length, dim = keys.shape
    rows = len(qkv)
    queries = empty((heads * groups, rows, dim), dtype=qkv.dtype, device=qkv.device)
    _place_rows[(rows, heads * (groups + 2))](
        qkv, cos, sin, qkv if q_norm is None else q_norm, qkv if k_norm is None else k_norm, queries, keys, values,
        places, eps, length, rows, heads * groups, heads,
        DIM=dim, PADDED_DIM=triton.next_power_of_2(dim), NORMED=q_norm is not None, num_warps=1, **FUSES,
    )  # fmt: skip
    return queries


def gate_rows(gate_up: Tensor) -> Tensor:
    """SiLU(gate) * up of [n, 2 * width], contiguous."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    result = empty((rows, width), dtype=gate_up.dtype, device=gate_up.device)
    _gate_rows[(rows, triton.cdiv(width, GATE_BLOCK))](gate_up, result, width, BLOCK=GATE_BLOCK, num_warps=4, **FUSES)
    return result
