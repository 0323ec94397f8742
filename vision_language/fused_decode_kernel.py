"""The products of one token with a decoder's matrices, in Triton: every weight is read once, with what stands around it.

A decode step is as fast as its weights are read, so what torch does between two products (norms, SiLU, residual sums,
rotary embedding, the write into the cache) is done where the numbers are anyway. The factor of an RMS norm is the same for
all of a row: it is applied to the sum, so that reading weights does not wait for it.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = bool(triton.knobs.runtime.interpret) if hasattr(triton, "knobs") else False


@triton.jit
def _product(
    X, WEIGHT, BIAS, NORM, ADDED, RESULT, outputs, inputs, eps,
    NORMED: tl.constexpr, GATED: tl.constexpr, ADDS: tl.constexpr, BIASED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    output = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    # 64 bits: an output head may have more than 2^31 weights.
    row = WEIGHT + output.to(tl.int64)[:, None] * inputs
    second = row + outputs * inputs.to(tl.int64)
    asked = (output < outputs)[:, None]
    total = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    other = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    squares = tl.zeros((BLOCK_K,), tl.float32)
    for step in range(STEPS):
        place = step * BLOCK_K + tl.arange(0, BLOCK_K)
        here = place < inputs
        weight = tl.load(row + place[None, :], mask=asked & here[None, :], other=0.0, eviction_policy="evict_first")
        x = tl.load(X + place, mask=here, other=0.0).to(tl.float32)
        if NORMED:
            squares += x * x
            x = x * tl.load(NORM + place, mask=here, other=0.0).to(tl.float32)
        total += weight.to(tl.float32) * x[None, :]
        if GATED:
            weight = tl.load(
                second + place[None, :], mask=asked & here[None, :], other=0.0, eviction_policy="evict_first"
            )
            other += weight.to(tl.float32) * x[None, :]
    made = tl.sum(total, 1)
    if NORMED:
        factor = 1.0 / tl.sqrt(tl.sum(squares, 0) / inputs + eps)
        made = made * factor
    held = output < outputs
    if BIASED:
        made += tl.load(BIAS + output, mask=held, other=0.0).to(tl.float32)
    if GATED:
        up = tl.sum(other, 1)
        if NORMED:
            up = up * factor
        made = made / (1.0 + tl.exp(-made)) * up
    if ADDS:
        made += tl.load(ADDED + output, mask=held, other=0.0).to(tl.float32)
    tl.store(RESULT + output, made.to(RESULT.dtype.element_ty), mask=held)


@triton.jit
def _place(
    QKV, COS, SIN, Q_NORM, K_NORM, QUERIES, KEYS, VALUES, SLOT, eps, length, query_heads, heads,
    DIM: tl.constexpr, PADDED_DIM: tl.constexpr, NORMED: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    dim = tl.arange(0, PADDED_DIM)
    held = dim < DIM
    HALF: tl.constexpr = DIM // 2
    partner = tl.where(dim < HALF, dim + HALF, dim - HALF)
    x = tl.load(QKV + head * DIM + dim, mask=held, other=0.0).to(tl.float32)
    y = tl.load(QKV + head * DIM + partner, mask=held, other=0.0).to(tl.float32)
    if NORMED:
        factor = 1.0 / tl.sqrt(tl.sum(x * x, 0) / DIM + eps)
        asks = head < query_heads
        q, k = tl.load(Q_NORM + dim, mask=held, other=0.0), tl.load(K_NORM + dim, mask=held, other=0.0)
        turned_x = x * factor * tl.where(asks, q, k).to(tl.float32)
        q, k = tl.load(Q_NORM + partner, mask=held, other=0.0), tl.load(K_NORM + partner, mask=held, other=0.0)
        turned_y = y * factor * tl.where(asks, q, k).to(tl.float32)
    else:
        turned_x, turned_y = x, y
    cos = tl.load(COS + dim, mask=held, other=0.0).to(tl.float32)
    sin = tl.load(SIN + dim, mask=held, other=0.0).to(tl.float32)
    turned = turned_x * cos + tl.where(dim < HALF, -turned_y, turned_y) * sin
    slot = tl.load(SLOT)
    key = head - query_heads
    value = key - heads
    tl.store(QUERIES + head * DIM + dim, turned.to(QUERIES.dtype.element_ty), mask=held & (head < query_heads))
    at = (key.to(tl.int64) * length + slot) * DIM
    tl.store(KEYS + at + dim, turned.to(KEYS.dtype.element_ty), mask=held & (key >= 0) & (key < heads))
    at = (value.to(tl.int64) * length + slot) * DIM
    tl.store(VALUES + at + dim, x.to(VALUES.dtype.element_ty), mask=held & (value >= 0))


def product(
    x: Tensor,
    weight: Tensor,
    result: Tensor,
    config: tuple[int, int, int],
    bias: Tensor | None = None,
    norm: Tensor | None = None,
    eps: float = 0.0,
    added: Tensor | None = None,
    gated: bool = False,
) -> None:
    """result = added + f(norm(x) weight^T + bias), one launch. x: [inputs]; weight: [outputs, inputs], contiguous.

    gated: the second half of the weight's rows is `up`, and the result is SiLU(gate) * up, of half the outputs.
    result may be `added`. config: outputs of a program, inputs at a time, warps.
    """
    outputs, inputs = weight.shape
    outputs = outputs // 2 if gated else outputs
    block_n, block_k, warps = config
    nothing = x  # what is not read may be anything
    _product[(triton.cdiv(outputs, block_n),)](
        x, weight, nothing if bias is None else bias, nothing if norm is None else norm,
        nothing if added is None else added, result, outputs, inputs, eps,
        NORMED=norm is not None, GATED=gated, ADDS=added is not None, BIASED=bias is not None,
        BLOCK_N=block_n, BLOCK_K=block_k, STEPS=triton.cdiv(inputs, block_k), num_warps=warps,
    )  # fmt: skip


def place(
    qkv: Tensor, cos: Tensor, sin: Tensor, q_norm: Tensor | None, k_norm: Tensor | None, eps: float,
    queries: Tensor, keys: Tensor, values: Tensor, slot: Tensor,
) -> None:  # fmt: skip
    """Norm and rotate the heads of qkv [(query heads + 2 heads) * D] into queries [1, heads, G, D] and the caches at `slot`.

    keys, values: [1, heads, length, D]; cos, sin: [D]; slot: [1].
    """
    _, heads, length, dim = keys.shape
    query_heads = queries.shape[1] * queries.shape[2]
    _place[(query_heads + 2 * heads,)](
        qkv, cos, sin, qkv if q_norm is None else q_norm, qkv if k_norm is None else k_norm, queries, keys, values, slot,
        eps, length, query_heads, heads,
        DIM=dim, PADDED_DIM=triton.next_power_of_2(dim), NORMED=q_norm is not None, num_warps=1,
    )  # fmt: skip
