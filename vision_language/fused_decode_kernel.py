"""The products of one token with a decoder's matrices, in Triton: every weight is read once, with what stands around it.

A decode step is as fast as its weights are read, so what torch does between two products (norms, SiLU, residual sums) is done
where the numbers are anyway. The factor of an RMS norm is the same for all of a row: it is applied to the sum, so that reading
weights does not wait for it.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..attention.capabilities import FUSES

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
        BLOCK_N=block_n, BLOCK_K=block_k, STEPS=triton.cdiv(inputs, block_k), num_warps=warps, **FUSES,
    )  # fmt: skip
