"""The fused form of `token_attention`, in Triton: one read of q, one of out, one write, all identities in one launch.

The few keys and values of an image prompt stay in registers while the queries stream past, as in FlashAttention (Dao et
al., 2022) with a single key block; there is nothing to carry from block to block, so the softmax is the plain one.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

log = logging.getLogger("hotpath.attention")

MAX_TOKENS = 128
MAX_HEAD_DIM = 256
MAX_PLANS = 512  # a run needs about four; sizes that change all day must not pile up

# (queries per program, warps). The first is used where nothing may be measured: while a CUDA graph is recorded.
CONFIGS = ((64, 4), (32, 2), (64, 2), (128, 4), (128, 8), (32, 4))
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
    DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_STATS: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    head, sample = tl.program_id(1), tl.program_id(2)
    width = tl.num_programs(1) * DIM
    query = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    dim = tl.arange(0, PADDED_DIM)
    token = tl.arange(0, PADDED_TOKENS)
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
    held = (token < TOKENS)[:, None] & (dim < DIM)[None, :]
    for identity in range(IDENTITIES):
        weight = tl.load(WEIGHTS + identity * batch + sample)
        if weight != 0.0:
            row = tl.load(ROWS + identity * batch + sample).to(tl.int64)
            kv_at = row * TOKENS * width + token[:, None] * width + head * DIM + dim[None, :]
            keys = tl.load(KEYS + kv_at, mask=held, other=0.0)
            values = tl.load(VALUES + kv_at, mask=held, other=0.0)
            if WIDEN:
                keys, values = keys.to(tl.float32), values.to(tl.float32)
            logits = tl.dot(q, tl.trans(keys), input_precision="ieee") * scale
            logits = tl.where((token < TOKENS)[None, :], logits, float("-inf"))
            share = tl.exp(logits - tl.max(logits, 1)[:, None])
            attended = tl.dot(share.to(values.dtype), values, input_precision="ieee")
            attended = attended * (weight / tl.sum(share, 1))[:, None]
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
    batch, queries, width = q.shape
    result = torch.empty((batch, queries, width), dtype=out.dtype, device=out.device)
    if result.numel() == 0:
        return result
    identities, tokens, dim = rows.shape[0], keys.shape[1], width // heads
    unused = weights  # Triton wants a pointer where none is read
    arguments = (
        q, out, result, keys, values, rows, weights, unused if mask is None else mask, unused if stats is None else stats,
        dim**-0.5, queries, batch, q.stride(0), q.stride(1), out.stride(0), out.stride(1),
        0 if mask is None else mask.stride(0), 0 if mask is None or mask.shape[1] == 1 else mask.stride(1),
        identities, tokens, max(16, triton.next_power_of_2(tokens)), dim, max(16, triton.next_power_of_2(dim)),
        mask is not None, stats is not None, INTERPRETED and q.dtype == torch.bfloat16,
    )  # fmt: skip
    if q.is_cuda and q.device.index != torch.cuda.current_device():
        with torch.cuda.device(q.device):
            _launch(arguments, heads)
    else:
        _launch(arguments, heads)
    return result


def _launch(arguments: tuple[Any, ...], heads: int) -> None:
    q, out, result, keys, values = arguments[:5]
    aligned = not (q.data_ptr() | out.data_ptr() | result.data_ptr() | keys.data_ptr() | values.data_ptr()) & 15
    key = (q.dtype, out.dtype, keys.dtype, q.device, heads, aligned, arguments[9:])
    plan = _plans.get(key)
    if plan is None:
        plan = _make_plan(key, arguments, heads)
    plan(*arguments)


def _make_plan(key: tuple[Any, ...], arguments: tuple[Any, ...], heads: int) -> Callable[..., None]:
    q = arguments[0]
    batch, queries = q.shape[:2]
    capturing = q.is_cuda and torch.cuda.is_current_stream_capturing()
    # Trials must not count into a running measurement.
    trial = (*arguments[:8], torch.zeros(2, device=q.device), *arguments[9:])
    plans = list(_candidates(trial, batch, queries, heads, first_only=capturing or not q.is_cuda))
    plan = plans[0] if len(plans) == 1 else min(plans, key=lambda p: _milliseconds(p, trial))
    if not capturing:
        with _lock:
            if len(_plans) >= MAX_PLANS:
                _plans.clear()
            _plans[key] = plan
    return plan


def _candidates(
    arguments: tuple[Any, ...], batch: int, queries: int, heads: int, first_only: bool
) -> Iterator[Callable[..., None]]:
    for block, warps in CONFIGS:
        grid = (triton.cdiv(queries, block), heads, batch)
        try:
            compiled = _attend_tokens[grid](*arguments, BLOCK=block, num_warps=warps, num_stages=1)
        except triton.runtime.errors.OutOfResources as error:
            log.debug("token attention: %d queries per program do not fit (%s)", block, error)
            continue
        yield _direct(compiled, grid, block, warps)
        if first_only:
            return


def _direct(compiled: Any, grid: tuple[int, int, int], block: int, warps: int) -> Callable[..., None]:
    """Launch what is compiled already: Triton's own call looks at every argument again each time."""
    if hasattr(compiled, "__getitem__"):
        runner = compiled[grid]
        return lambda *arguments: runner(*arguments, block)
    # The interpreter compiles nothing.
    return lambda *arguments: _attend_tokens[grid](*arguments, BLOCK=block, num_warps=warps, num_stages=1)


def _milliseconds(plan: Callable[..., None], arguments: tuple[Any, ...]) -> float:
    """Median of a few launches, by events: waits for the device, once per shape."""
    times = []
    for _ in range(MEASURED_LAUNCHES):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        plan(*arguments)
        end.record()
        times.append((start, end))
    torch.cuda.synchronize()
    return sorted(start.elapsed_time(end) for start, end in times)[MEASURED_LAUNCHES // 2]
