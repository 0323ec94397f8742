"""The fused form of `token_attention`, in Triton: one read of q, one of out, one write, all identities in one launch.

The few keys and values of an image prompt stay in registers while the queries stream past, as in FlashAttention (Dao et
al., 2022): with a single key block, as a rule; only keys too many or too wide for the registers come in several.

What it costs at SDXL's main shape (2 samples of 4096 queries, 10 heads of 64, 16 tokens, half precision), computed, not
measured: 31.5 MB read and written, 6.6 us at an H200's 4.8 TB/s; 0.34 GFLOP, which tensor cores do in under 1 us. Memory is
the floor, also where half of the bytes are still in the card's cache.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .capabilities import float32_products

log = logging.getLogger("hotpath.attention")

MAX_TOKENS = 128
MAX_HEAD_DIM = 256
MAX_PLANS = 512  # a run needs about four; sizes that change all day must not pile up

# (queries per program, warps), of which `configs_for` takes those that fit. The first of them is used where nothing may be
# measured: while a CUDA graph is recorded.
CONFIGS = ((64, 4), (32, 2), (64, 2), (128, 4), (128, 8), (32, 4), (64, 8), (32, 8), (16, 4), (16, 8))
MEASURED_LAUNCHES = 8
INTERPRETED = bool(triton.knobs.runtime.interpret) if hasattr(triton, "knobs") else False  # it cannot multiply bfloat16


@triton.jit(do_not_specialize_on_alignment=["ROWS", "WEIGHTS", "MASK", "STATS"])
def _attend_tokens(
    Q,
    OUT,
    RESULT,
    KEYS,
    VALUES,
    ROWS,
    WEIGHTS,
    MASK,
    STATS,
    scale,
    queries,
    batch,
    q_sample,
    q_query,
    out_sample,
    out_query,
    mask_identity,
    mask_sample,
    IDENTITIES: tl.constexpr,
    TOKENS: tl.constexpr,
    PADDED_TOKENS: tl.constexpr,
    TOKEN_BLOCK: tl.constexpr,
    DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_STATS: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    head, sample = tl.program_id(1), tl.program_id(2)
    width = tl.num_programs(1) * DIM
    query = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    dim = tl.arange(0, PADDED_DIM)
    here = (query < queries)[:, None] & (dim < DIM)[None, :]
    # 64 bits: a batch of long sequences has more than 2^31 elements.
    at_sample, at_query = sample.to(tl.int64), query.to(tl.int64)
    q_at = at_sample * q_sample + at_query[:, None] * q_query + head * DIM + dim[None, :]
    out_at = at_sample * out_sample + at_query[:, None] * out_query + head * DIM + dim[None, :]
    q = tl.load(Q + q_at, mask=here, other=0.0)
    if WIDEN:
        q = q.to(tl.float32)
    out = tl.load(OUT + out_at, mask=here, other=0.0).to(tl.float32)
    total = out
    for identity in range(IDENTITIES):
        weight = tl.load(WEIGHTS + identity * batch + sample)
        if weight != 0.0:
            row = tl.load(ROWS + identity * batch + sample).to(tl.int64)
            highest = tl.full([BLOCK], float("-inf"), tl.float32)
            whole = tl.zeros([BLOCK], tl.float32)
            attended = tl.zeros([BLOCK, PADDED_DIM], tl.float32)
            for first in range(0, PADDED_TOKENS, TOKEN_BLOCK):
                token = first + tl.arange(0, TOKEN_BLOCK)
                held = (token < TOKENS)[:, None] & (dim < DIM)[None, :]
                kv_at = row * TOKENS * width + token[:, None] * width + head * DIM + dim[None, :]
                keys = tl.load(KEYS + kv_at, mask=held, other=0.0)
                values = tl.load(VALUES + kv_at, mask=held, other=0.0)
                if WIDEN:
                    keys, values = keys.to(tl.float32), values.to(tl.float32)
                logits = tl.dot(q, tl.trans(keys), input_precision=PRECISION) * scale
                logits = tl.where((token < TOKENS)[None, :], logits, float("-inf"))
                # A block without a token cannot come first, so the highest is finite from the first block on.
                higher = tl.maximum(highest, tl.max(logits, 1))
                decay = tl.exp(highest - higher)
                share = tl.exp(logits - higher[:, None])
                whole = whole * decay + tl.sum(share, 1)
                attended = tl.dot(share.to(values.dtype), values, attended * decay[:, None], input_precision=PRECISION)
                highest = higher
            attended = attended * (weight / whole)[:, None]
            if HAS_MASK:
                mask_at = identity * mask_identity + sample * mask_sample + query
                attended = attended * tl.load(MASK + mask_at, mask=query < queries, other=0.0)[:, None]
            total += attended
    result_at = (at_sample * queries + at_query)[:, None] * width + head * DIM + dim[None, :]
    tl.store(RESULT + result_at, total.to(RESULT.dtype.element_ty), mask=here)
    if HAS_STATS:
        # Queries past the end attend too, evenly to all tokens.
        added = tl.where(here, total - out, 0.0)
        tl.atomic_add(STATS, tl.sum(added * added))
        tl.atomic_add(STATS + 1, tl.sum(out * out))


_plans: dict[tuple[Any, ...], Callable[..., None]] = {}
_lock = threading.Lock()


def why_not(dtype: torch.dtype, tokens: int, head_dim: int) -> str:
    """Why the kernel cannot run these; "" when it can."""
    if tokens > MAX_TOKENS:
        return f"{tokens} tokens, the kernel takes up to {MAX_TOKENS}"
    if head_dim > MAX_HEAD_DIM:
        return f"heads {head_dim} wide, the kernel takes up to {MAX_HEAD_DIM}"
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"{dtype}, the kernel takes float16, bfloat16 and float32"
    return ""


def attend_tokens_fused(
    q: Tensor,
    out: Tensor,
    keys: Tensor,
    values: Tensor,
    rows: Tensor,
    weights: Tensor,
    heads: int,
    mask: Tensor | None = None,
    stats: Tensor | None = None,
) -> Tensor:
    """`token_attention.attend_tokens` in one launch. No synchronisation; the result is the only allocation.

    q and out may be strided in batch and sequence; keys and values are contiguous. mask: [P, 1 or B, N] float32.
    """
    if q.stride(-1) != 1:
        q = q.contiguous()
    if out.stride(-1) != 1:
        out = out.contiguous()
    result = torch.empty(out.shape, dtype=out.dtype, device=out.device)
    if result.numel() == 0:
        return result
    # Triton wants a pointer also where none is read.
    tensors = (
        q, out, result, keys, values, rows, weights, weights if mask is None else mask, weights if stats is None else stats
    )  # fmt: skip
    # All that Triton compiles for; of the pointers that is whether they are aligned to 16 bytes.
    addresses = q.data_ptr() | out.data_ptr() | result.data_ptr() | keys.data_ptr() | values.data_ptr()
    key = (
        q.shape, q.stride(), out.stride(), q.dtype, out.dtype, q.device, keys.shape, keys.dtype, rows.shape, heads,
        None if mask is None else mask.stride(), mask is not None and mask.shape[1] > 1, stats is not None, addresses & 15,
    )  # fmt: skip
    if q.is_cuda and q.device.index != torch.cuda.current_device():
        with torch.cuda.device(q.device):
            (_plans.get(key) or _make_plan(key, tensors, heads, mask, stats is not None))(*tensors)
    else:
        (_plans.get(key) or _make_plan(key, tensors, heads, mask, stats is not None))(*tensors)
    return result


def _make_plan(
    key: tuple[Any, ...], tensors: tuple[Tensor, ...], heads: int, mask: Tensor | None, has_stats: bool
) -> Callable[..., None]:
    """The fastest of `CONFIGS` for this shape, measured once."""
    q, out, keys, rows = tensors[0], tensors[1], tensors[3], tensors[5]
    batch, queries, width = q.shape
    dim, tokens = width // heads, keys.shape[1]
    constants = (
        dim**-0.5, queries, batch, q.stride(0), q.stride(1), out.stride(0), out.stride(1),
        0 if mask is None else mask.stride(0), 0 if mask is None or mask.shape[1] == 1 else mask.stride(1),
        rows.shape[0], tokens, _padded(tokens), token_block(tokens, dim, q.element_size()), dim, _padded(dim), mask is not None,
        has_stats, INTERPRETED and q.dtype == torch.bfloat16, float32_products(q.device),
    )  # fmt: skip
    configs = configs_for(dim, q.element_size(), float32_products(q.device))
    capturing = q.is_cuda and torch.cuda.is_current_stream_capturing()
    # Trials must not count into a running measurement.
    trial = (*tensors[:8], torch.zeros(2, device=q.device))
    first_only = capturing or INTERPRETED or not q.is_cuda  # what the interpreter takes tells nothing
    plans = list(_candidates(trial, constants, (queries, heads, batch), configs, first_only))
    plan = plans[0] if len(plans) == 1 else min(plans, key=lambda p: _milliseconds(p, trial))
    if not capturing:
        with _lock:
            if len(_plans) >= MAX_PLANS:
                _plans.clear()
            _plans[key] = plan
    return plan


def token_block(tokens: int, head_dim: int, element_size: int) -> int:
    """How many tokens are in registers at a time. element_size: bytes of one element of q."""
    return min(_padded(tokens), 16 if element_size > 2 else max(16, 8192 // _padded(head_dim)), 64)


def configs_for(head_dim: int, element_size: int, precision: str) -> list[tuple[int, int]]:
    """Those of `CONFIGS` whose queries fill the registers and do not overflow them, which costs more than it saves.
    precision: as `capabilities.float32_products` says."""
    width = _padded(head_dim)
    narrow, half = width <= 64, element_size <= 2
    # Elements of q that a thread holds, at most.
    most = (64 if width <= 128 else 32) if half else (32 if narrow and precision != "ieee" else 16)
    return [(block, warps) for block, warps in CONFIGS if most <= 4 * block * width // (32 * warps) <= 4 * most]


def _padded(size: int) -> int:
    """The next power of two, and at least what a tensor core multiplies."""
    return max(16, 1 << (size - 1).bit_length())


def _candidates(
    tensors: tuple[Tensor, ...],
    constants: tuple[Any, ...],
    extent: tuple[int, int, int],
    configs: list[tuple[int, int]],
    first_only: bool,
) -> Iterator[Callable[..., None]]:
    queries, heads, batch = extent
    for block, warps in configs:
        grid = (triton.cdiv(queries, block), heads, batch)
        options = {"BLOCK": block, "num_warps": warps, "num_stages": 1}
        try:
            compiled = _attend_tokens[grid](*tensors, *constants, **options)
        except triton.runtime.errors.OutOfResources as error:
            log.debug("token attention: %d queries per program do not fit (%s)", block, error)
            continue
        if compiled is None:  # the interpreter compiles nothing
            yield functools.partial(_interpret, grid, constants, options)
        else:
            yield _direct(compiled[grid], (*constants, block))
        if first_only:
            return


def _direct(launch: Callable[..., None], constants: tuple[Any, ...]) -> Callable[..., None]:
    """Launch what is compiled already: Triton's own call looks at every argument again each time."""
    return lambda *tensors: launch(*tensors, *constants)


def _interpret(
    grid: tuple[int, int, int], constants: tuple[Any, ...], options: dict[str, int], *tensors: Tensor
) -> None:
    _attend_tokens[grid](*tensors, *constants, **options)


def _milliseconds(plan: Callable[..., None], tensors: tuple[Tensor, ...]) -> float:
    """Median of a few launches, by events: waits for the device, once per shape."""
    times = []
    for _ in range(MEASURED_LAUNCHES):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        plan(*tensors)
        end.record()
        times.append((start, end))
    torch.cuda.synchronize()
    return sorted(start.elapsed_time(end) for start, end in times)[MEASURED_LAUNCHES // 2]
