"""A layer of linear attention between its products, in Triton: two launches for one token, four for many.

The convolution, the lengths of keys and queries, the gated delta rule and the norm with its gate. Chunks of 32 tokens are
prepared all at once, each by the inverse of its triangular system, which is put together from the inverses of its
blocks; what then goes from chunk to chunk is a head's matrix, which stays in registers. `delta_rule` is the reference.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor, empty, float32

from ..attention.capabilities import FUSES, float32_products, padded
from .delta_rule import CHUNK, EPSILON

INTERPRETED = bool(triton.knobs.runtime.interpret) if hasattr(triton, "knobs") else False
CHANNELS = 512  # of a program of the convolution
HEADS = 8  # of a program of the norm


@triton.jit(do_not_specialize=["n"])
def _convolve(
    X, SEEN, WEIGHT, BIAS, RESULT, x_token, n, channels, REACH: tl.constexpr, BIASED: tl.constexpr, STEP: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64)
    row, token = place // n, place % n
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    held = channel < channels
    kept = SEEN + (row * channels + channel) * REACH
    total = tl.zeros([BLOCK], tl.float32)
    for tap in tl.static_range(REACH):
        back = token + tap - (REACH - 1)
        x = tl.load(X + (row * n + back) * x_token + channel, mask=held & (back >= 0), other=0.0)
        before = tl.load(kept + REACH + back, mask=held & (back < 0), other=0.0)
        x = tl.where(back >= 0, x, before)
        total += x.to(tl.float32) * tl.load(WEIGHT + channel * REACH + tap, mask=held, other=0.0).to(tl.float32)
        if STEP:  # each value moves one place to the front, where this program has read already
            tl.store(kept + tap, x, mask=held)
    if BIASED:
        total += tl.load(BIAS + channel, mask=held, other=0.0).to(tl.float32)
    wide = total.to(RESULT.dtype.element_ty).to(tl.float32)
    tl.store(RESULT + place * channels + channel, (wide / (1.0 + tl.exp(-wide))).to(RESULT.dtype.element_ty), mask=held)


@triton.jit
def _token_numbers(A, B, A_LOG, DT_BIAS, at, head, real):
    """(decay, rate) of tokens, 0 where they are not real. The rate is rounded as the library rounds it."""
    b = tl.load(B + at, mask=real, other=0.0)
    rate = (1.0 / (1.0 + tl.exp(-b.to(tl.float32)))).to(b.dtype).to(tl.float32)
    a = tl.load(A + at, mask=real, other=0.0).to(tl.float32) + tl.load(DT_BIAS + head).to(tl.float32)
    soft = tl.maximum(a, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(a)))
    decay = -tl.exp(tl.load(A_LOG + head).to(tl.float32)) * soft
    return tl.where(real, decay, 0.0), tl.where(real, rate, 0.0)


@triton.jit(do_not_specialize=["n", "chunks"])
def _prepare(
    MIXED, A, B, A_LOG, DT_BIAS, COUNT, WRITTEN, TAKING, SEES, TOTALS, n, chunks, keys, heads, scale, eps,
    COUNTED: tl.constexpr, KEY: tl.constexpr, PADDED_KEY: tl.constexpr, VALUE: tl.constexpr, PADDED_VALUE: tl.constexpr,
    CHUNK: tl.constexpr, LEVELS: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    chunk, row, head = tl.program_id(0), tl.program_id(1).to(tl.int64) // heads, tl.program_id(1) % heads
    key_head = head // (heads // keys)
    inside = tl.arange(0, CHUNK)
    token = chunk * CHUNK + inside
    real = token < n
    if COUNTED:
        real = real & (token < tl.load(COUNT))
    tokens = MIXED + (row * n + token) * (2 * keys * KEY + heads * VALUE)
    of_key, of_value = tl.arange(0, PADDED_KEY), tl.arange(0, PADDED_VALUE)
    key_mask = real[:, None] & (of_key < KEY)[None, :]
    value_mask = real[:, None] & (of_value < VALUE)[None, :]
    at = tokens[:, None] + key_head * KEY + of_key[None, :]
    q = tl.load(at, mask=key_mask, other=0.0).to(tl.float32)
    k = tl.load(at + keys * KEY, mask=key_mask, other=0.0).to(tl.float32)
    q *= (scale / tl.sqrt(tl.sum(q * q, 1) + eps))[:, None]
    k *= (1.0 / tl.sqrt(tl.sum(k * k, 1) + eps))[:, None]
    decay, rate = _token_numbers(A, B, A_LOG, DT_BIAS, (row * n + token) * heads + head, head, real)
    total = tl.cumsum(decay, 0)
    later, earlier = inside[:, None], inside[None, :]
    between = tl.exp(tl.where(later >= earlier, total[:, None] - total[None, :], float("-inf")))
    sees = tl.dot(q, tl.trans(k), input_precision=PRECISION) * between
    system = tl.dot(k, tl.trans(k), input_precision=PRECISION) * between * rate[:, None]
    # The inverse of 1 + system below the diagonal: of blocks of one it is 1, of two blocks it follows from theirs.
    inverse = tl.where(later == earlier, 1.0, 0.0)
    inverse -= tl.where((later >> 1 == earlier >> 1) & (later > earlier), system, 0.0)
    for level in range(1, LEVELS):
        below = (later >> level > earlier >> level) & (later >> (level + 1) == earlier >> (level + 1))
        beside = tl.dot(tl.where(below, system, 0.0), inverse, input_precision=EXACT)
        inverse -= tl.dot(inverse, beside, input_precision=EXACT)
    value = tl.load(tokens[:, None] + 2 * keys * KEY + head * VALUE + of_value[None, :], mask=value_mask, other=0.0)
    written = tl.dot(inverse, value.to(tl.float32) * rate[:, None], input_precision=PRECISION)
    taking = tl.dot(inverse, k * (rate * tl.exp(total))[:, None], input_precision=PRECISION)
    place = tl.program_id(1).to(tl.int64) * chunks * CHUNK + token
    tl.store(WRITTEN + place[:, None] * VALUE + of_value[None, :], written, mask=(of_value < VALUE)[None, :])
    tl.store(TAKING + place[:, None] * KEY + of_key[None, :], taking, mask=(of_key < KEY)[None, :])
    tl.store(SEES + place[:, None] * CHUNK + inside[None, :], sees)
    tl.store(TOTALS + place, total)


@triton.jit(do_not_specialize=["n", "chunks"])
def _scan(
    MIXED, WRITTEN, TAKING, SEES, TOTALS, STATE, RESULT, n, chunks, keys, heads, scale, eps,
    KEY: tl.constexpr, PADDED_KEY: tl.constexpr, VALUE: tl.constexpr, CHUNK: tl.constexpr, COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(1).to(tl.int64) // heads, tl.program_id(1) % heads
    key_head = head // (heads // keys)
    inside, of_key = tl.arange(0, CHUNK), tl.arange(0, PADDED_KEY)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    a_key, a_column = (of_key < KEY)[None, :], (column < VALUE)[None, :]
    matrix = STATE + (tl.program_id(1).to(tl.int64) * KEY + of_key[:, None]) * VALUE + column[None, :]
    whole = (of_key < KEY)[:, None] & a_column
    state = tl.load(matrix, mask=whole, other=0.0)
    chunk = 0
    while chunk < chunks:  # the interpreter has no range of what is not constant
        token = chunk * CHUNK + inside
        real = (token < n)[:, None]
        place = tl.program_id(1).to(tl.int64) * chunks * CHUNK + token
        at = MIXED + (row * n + token[:, None]) * (2 * keys * KEY + heads * VALUE) + key_head * KEY + of_key[None, :]
        q = tl.load(at, mask=real & a_key, other=0.0).to(tl.float32)
        k = tl.load(at + keys * KEY, mask=real & a_key, other=0.0).to(tl.float32)
        total = tl.load(TOTALS + place)
        end = tl.load(TOTALS + (tl.program_id(1).to(tl.int64) * chunks + chunk) * CHUNK + CHUNK - 1)
        q *= (scale * tl.exp(total) / tl.sqrt(tl.sum(q * q, 1) + eps))[:, None]
        k *= (tl.exp(end - total) / tl.sqrt(tl.sum(k * k, 1) + eps))[:, None]
        taking = tl.load(TAKING + place[:, None] * KEY + of_key[None, :], mask=a_key, other=0.0)
        fresh = tl.load(WRITTEN + place[:, None] * VALUE + column[None, :], mask=a_column, other=0.0)
        fresh -= tl.dot(taking, state, input_precision=PRECISION)
        sees = tl.load(SEES + place[:, None] * CHUNK + inside[None, :])
        read = tl.dot(q, state, input_precision=PRECISION) + tl.dot(sees, fresh, input_precision=PRECISION)
        to = RESULT + ((row * n + token[:, None]) * heads + head) * VALUE + column[None, :]
        tl.store(to, read.to(RESULT.dtype.element_ty), mask=real & a_column)
        state = state * tl.exp(end) + tl.dot(tl.trans(k), fresh, input_precision=PRECISION)
        chunk += 1
    tl.store(matrix, state, mask=whole)


@triton.jit
def _gated(read, gate, weight, eps, WIDTH: tl.constexpr):
    """The norm of what heads read [HEADS, PADDED], with its gate, rounded where the library rounds it."""
    wide = read.to(tl.float32)
    factor = 1.0 / tl.sqrt(tl.sum(wide * wide, 1) / WIDTH + eps)
    normed = (wide * factor[:, None]).to(read.dtype).to(tl.float32)
    normed = (normed * weight.to(tl.float32)[None, :]).to(weight.dtype).to(tl.float32)
    gate = gate.to(tl.float32)
    return normed * (gate / (1.0 + tl.exp(-gate)))


@triton.jit
def _gate_heads(
    READ, GATE, WEIGHT, RESULT, rows, eps, WIDTH: tl.constexpr, PADDED: tl.constexpr, HEADS: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * HEADS + tl.arange(0, HEADS)
    column = tl.arange(0, PADDED)
    held = (row < rows)[:, None] & (column < WIDTH)[None, :]
    at = row[:, None] * WIDTH + column[None, :]
    weight = tl.load(WEIGHT + column, mask=column < WIDTH, other=0.0)
    read, gate = tl.load(READ + at, mask=held, other=0.0), tl.load(GATE + at, mask=held, other=0.0)
    tl.store(RESULT + at, _gated(read, gate, weight, eps, WIDTH).to(RESULT.dtype.element_ty), mask=held)


@triton.jit
def _rewrite(
    MIXED, GATE, A, B, A_LOG, DT_BIAS, WEIGHT, STATE, RESULT, keys, heads, scale, eps, norm_eps,
    KEY: tl.constexpr, PADDED_KEY: tl.constexpr, VALUE: tl.constexpr, PADDED_VALUE: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(1).to(tl.int64), tl.program_id(0)
    key_head = head // (heads // keys)
    of_key, column = tl.arange(0, PADDED_KEY), tl.arange(0, PADDED_VALUE)
    a_key, a_column = of_key < KEY, column < VALUE
    at = MIXED + row * (2 * keys * KEY + heads * VALUE) + key_head * KEY + of_key
    q = tl.load(at, mask=a_key, other=0.0).to(tl.float32)
    k = tl.load(at + keys * KEY, mask=a_key, other=0.0).to(tl.float32)
    q *= scale / tl.sqrt(tl.sum(q * q, 0) + eps)
    k *= 1.0 / tl.sqrt(tl.sum(k * k, 0) + eps)
    of_values = MIXED + row * (2 * keys * KEY + heads * VALUE) + 2 * keys * KEY + head * VALUE
    value = tl.load(of_values + column, mask=a_column, other=0.0).to(tl.float32)
    decay, rate = _token_numbers(A, B, A_LOG, DT_BIAS, row * heads + head, head, True)
    matrix = STATE + ((row * heads + head) * KEY + of_key[:, None]) * VALUE + column[None, :]
    whole = a_key[:, None] & a_column[None, :]
    state = tl.load(matrix, mask=whole, other=0.0) * tl.exp(decay)
    state += k[:, None] * ((value - tl.sum(k[:, None] * state, 0)) * rate)[None, :]
    tl.store(matrix, state, mask=whole)
    read = tl.sum(q[:, None] * state, 0).to(RESULT.dtype.element_ty)
    to = (row * heads + head) * VALUE + column
    gate = tl.load(GATE + to, mask=a_column, other=0.0)
    weight = tl.load(WEIGHT + column, mask=a_column, other=0.0)
    made = _gated(read[None, :], gate[None, :], weight, norm_eps, VALUE)
    made = tl.sum(made, 0)  # of one row
    tl.store(RESULT + to, made.to(RESULT.dtype.element_ty), mask=a_column)


def mixed(x: Tensor, seen: Tensor, weight: Tensor, bias: Tensor | None, step: bool = False) -> Tensor:
    """SiLU of the convolution of x [B, n, channels], behind the inputs in `seen` [B, channels, reach].

    weight: [channels, reach], a kernel for each. step: n is 1, and `seen` moves on by the token. The last axis of x is
    contiguous, and its rows lie one behind the other.
    """
    rows, n, channels = x.shape
    made = empty((rows, n, channels), dtype=x.dtype, device=x.device)
    _convolve[(rows * n, triton.cdiv(channels, CHANNELS))](
        x, seen, weight, weight if bias is None else bias, made, x.stride(1), n, channels,
        REACH=weight.shape[1], BIASED=bias is not None, STEP=step, BLOCK=CHANNELS, num_warps=4, **FUSES,
    )  # fmt: skip
    return made


def read_many(
    made: Tensor, a: Tensor, b: Tensor, a_log: Tensor, dt_bias: Tensor, state: Tensor, count: Tensor | None
) -> Tensor:
    """What tokens read, [B, n, heads, V] in the dtype of `made`; `state` [B, heads, K, V] is rewritten.

    made: [B, n, channels], what `mixed` gives: queries, keys, then values. a, b: [B, n, heads], contiguous. count: [1], how many
    tokens of each row are real.
    """
    rows, heads, key, value = state.shape
    n, keys = made.shape[1], (made.shape[2] - heads * value) // (2 * key)
    chunks = triton.cdiv(n, CHUNK)
    held = rows * heads, chunks * CHUNK

    def room(*width: int) -> Tensor:
        return empty((*held, *width), dtype=float32, device=made.device)

    written, taking, sees, totals = room(value), room(key), room(CHUNK), room()
    result = empty((rows, n, heads, value), dtype=made.dtype, device=made.device)
    sizes = {"KEY": key, "PADDED_KEY": padded(key), "VALUE": value, "CHUNK": CHUNK}
    exact = float32_products(made.device)
    form = form_of(made.element_size(), exact)
    columns = min(form.pop("COLUMNS"), padded(value))
    _prepare[(chunks, rows * heads)](
        made, a, b, a_log, dt_bias, totals if count is None else count, written, taking, sees, totals,
        n, chunks, keys, heads, key**-0.5, EPSILON,
        COUNTED=count is not None, PADDED_VALUE=padded(value), LEVELS=CHUNK.bit_length() - 1, EXACT=exact,
        **form, **sizes, **FUSES,
    )  # fmt: skip
    _scan[(triton.cdiv(value, columns), rows * heads)](
        made, written, taking, sees, totals, state, result, n, chunks, keys, heads, key**-0.5, EPSILON,
        COLUMNS=columns, **form, **sizes, **FUSES,
    )  # fmt: skip
    return result


def form_of(number_bytes: int, exact: str) -> dict[str, Any]:
    """How many tokens are multiplied and divided among programs, so that little leaves the registers.

    exact: as `capabilities.float32_products` says. Behind numbers of half precision TF32 keeps more than they have. COLUMNS: of a
    head's matrix, of a program that goes from chunk to chunk.
    """
    if exact == "ieee":  # no tensor cores for it
        return {"PRECISION": exact, "COLUMNS": 16, "num_warps": 16, "num_stages": 1}
    if number_bytes == 4:
        return {"PRECISION": exact, "COLUMNS": 16, "num_warps": 4, "num_stages": 1}
    return {"PRECISION": "tf32", "COLUMNS": 32, "num_warps": 4, "num_stages": 1}


def gated(read: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The norm of what each head read, with its gate. read, gate: [..., V], contiguous; weight: [V]."""
    width = read.shape[-1]
    rows = read.numel() // width
    result = empty(read.shape, dtype=read.dtype, device=read.device)
    _gate_heads[(triton.cdiv(rows, HEADS),)](
        read, gate, weight, result, rows, eps, WIDTH=width, PADDED=padded(width), HEADS=HEADS, num_warps=4, **FUSES
    )
    return result


def read_one(
    made: Tensor, gate: Tensor, a: Tensor, b: Tensor, a_log: Tensor, dt_bias: Tensor, weight: Tensor, eps: float, state: Tensor
) -> Tensor:  # fmt: skip
    """`read_many` of one token of each row, and `gated`: [B, heads, V].

    made: [B, 1, channels]; gate: [B, heads * V]; a, b: [B, heads], all contiguous.
    """
    rows, heads, key, value = state.shape
    keys = (made.shape[2] - heads * value) // (2 * key)
    result = empty((rows, heads, value), dtype=made.dtype, device=made.device)
    _rewrite[(heads, rows)](
        made, gate, a, b, a_log, dt_bias, weight, state, result, keys, heads, key**-0.5, EPSILON, eps,
        KEY=key, PADDED_KEY=padded(key), VALUE=value, PADDED_VALUE=padded(value), num_warps=8, **FUSES,
    )  # fmt: skip
    return result
