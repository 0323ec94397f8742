"""The fused form of `token_attention`, in Triton: one read of q, one of out, one write, all identities in one launch.

The few keys and values of an image prompt stay in registers while the queries stream past, as in FlashAttention (Dao et
al., 2022): with a single key block, as a rule; only keys too many or too wide for the registers come in several. The text's
attention, whose keys are few too, may be computed in the same launch: then `out` is never written and read, and where a model
waits for Python to launch, an identity costs nothing, because one launch has taken the place of another.

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

from .capabilities import FUSES, device_facts, float32_products, padded

log = logging.getLogger("hotpath.attention")

MAX_TOKENS = 128
MAX_HEAD_DIM = 256
MAX_TEXT = 1024  # keys of the text; for longer ones a kernel that keeps more of them near is faster
MAX_TEXT_HEAD_DIM = 64  # wider ones do not fit the registers beside the text
TEXT_BLOCK = 32  # of the text's tokens in registers at a time: 77, CLIP's number, fill three well
MAX_PLANS = 512  # a run needs about four; sizes that change all day must not pile up

# (queries per program, warps), of which `configs_for` takes those that fit. The first of them is used where nothing may be
# measured: while a CUDA graph is recorded.
CONFIGS = ((64, 4), (32, 2), (64, 2), (128, 4), (128, 8), (32, 4), (64, 8), (32, 8), (16, 4), (16, 8))
MEASURED_LAUNCHES = 8
RELEASE = tuple(int(part) for part in triton.__version__.split(".")[:2])
# What is compiled is launched with all arguments. Before Triton 3.3, which is torch 2.7's, it wanted none of the constants.
LAUNCHED_ALIKE = RELEASE >= (3, 3)
INTERPRETED = bool(triton.knobs.runtime.interpret) if hasattr(triton, "knobs") else False  # it cannot multiply bfloat16

# Older ones cannot be told that alignment differs from call to call, and the compiler of 3.1 aborts over the text's part.
if RELEASE < (3, 2):
    raise ImportError(f"the kernel needs torch 2.6 or newer, whose Triton is 3.2; this is Triton {triton.__version__}")


@triton.jit
def _attend_block(
    q, KEYS, VALUES, start, first, tokens, width, column, highest, whole, attended, scale,
    DIM: tl.constexpr, PADDED_DIM: tl.constexpr, TOKEN_BLOCK: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Softmax over the keys so far and over these: `highest` logit, `whole` sum and `attended` values, as they are then."""
    dim = tl.arange(0, PADDED_DIM)
    token = first + tl.arange(0, TOKEN_BLOCK)
    held = (token < tokens)[:, None] & (dim < DIM)[None, :]
    at = start + token[:, None] * width + column + dim[None, :]
    keys = tl.load(KEYS + at, mask=held, other=0.0)
    values = tl.load(VALUES + at, mask=held, other=0.0)
    if WIDEN:
        keys, values = keys.to(tl.float32), values.to(tl.float32)
    logits = tl.dot(q, tl.trans(keys), input_precision=PRECISION) * scale
    logits = tl.where((token < tokens)[None, :], logits, float("-inf"))
    # A block without a token cannot come first, so the highest is finite from the first block on.
    higher = tl.maximum(highest, tl.max(logits, 1))
    decay = tl.exp(highest - higher)
    share = tl.exp(logits - higher[:, None])
    whole = whole * decay + tl.sum(share, 1)
    attended = tl.dot(share.to(values.dtype), values, attended * decay[:, None], input_precision=PRECISION)
    return higher, whole, attended


@triton.jit(do_not_specialize=["text_tokens"], do_not_specialize_on_alignment=["ROWS", "WEIGHTS", "MASK", "STATS"])
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
    TEXT_KEYS,
    TEXT_VALUES,
    text_tokens,
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
    TEXT_BLOCK: tl.constexpr,
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
    q = tl.load(Q + q_at, mask=here, other=0.0)
    if WIDEN:
        q = q.to(tl.float32)
    if TEXT_BLOCK > 0:
        highest = tl.full([BLOCK], float("-inf"), tl.float32)
        whole = tl.zeros([BLOCK], tl.float32)
        attended = tl.zeros([BLOCK, PADDED_DIM], tl.float32)
        first = text_tokens * 0
        while first < text_tokens:  # the interpreter has no range of what is not constant
            highest, whole, attended = _attend_block(
                q, TEXT_KEYS, TEXT_VALUES, at_sample * text_tokens * width, first, text_tokens, width, head * DIM,
                highest, whole, attended, scale, DIM, PADDED_DIM, TEXT_BLOCK, WIDEN, PRECISION,
            )  # fmt: skip
            first += TEXT_BLOCK
        out = attended / whole[:, None]
    else:
        out_at = at_sample * out_sample + at_query[:, None] * out_query + head * DIM + dim[None, :]
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
                highest, whole, attended = _attend_block(
                    q, KEYS, VALUES, row * TOKENS * width, first, TOKENS, width, head * DIM, highest, whole, attended, scale,
                    DIM, PADDED_DIM, TOKEN_BLOCK, WIDEN, PRECISION,
                )  # fmt: skip
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
        tl.atomic_add(STATS + 1, tl.sum(tl.where(here, out * out, 0.0)))


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


def why_not_text(device: torch.device, dtype: torch.dtype, head_dim: int, text_tokens: int) -> str:
    """Why the kernel does not compute the text's attention too; "" when it does."""
    card = device_facts(device)
    if card.capability is not None and card.capability < (8, 0):
        # Without them the text does not fit the registers, by kilobytes for each thread.
        return f"{card.name}: Triton uses tensor cores from compute capability 8.0 on, torch's own attention before"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"{dtype}: the kernel attends to the text in half precision"
    if head_dim > MAX_TEXT_HEAD_DIM:
        return f"heads {head_dim} wide, the kernel takes up to {MAX_TEXT_HEAD_DIM} beside the text"
    if not 0 < text_tokens <= MAX_TEXT:
        return f"{text_tokens} keys of the text, the kernel takes 1 to {MAX_TEXT}"
    return ""


def attend_tokens_fused(
    q: Tensor,
    out: Tensor | None,
    keys: Tensor,
    values: Tensor,
    rows: Tensor,
    weights: Tensor,
    heads: int,
    mask: Tensor | None = None,
    stats: Tensor | None = None,
    text: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """`token_attention.attend_tokens` in one launch. No synchronisation; the result is the only allocation.

    q and out may be strided in batch and sequence; keys and values are contiguous. mask: [P, 1 or B, N] float32.
    text: keys and values of the text, [B, T, heads * D], instead of `out`, which is then what q attends to in them.
    """
    if q.stride(-1) != 1:
        q = q.contiguous()
    if out is not None and out.stride(-1) != 1:
        out = out.contiguous()
    result = torch.empty(q.shape, dtype=q.dtype if out is None else out.dtype, device=q.device)
    if result.numel() == 0:
        return result
    # Triton wants a pointer also where none is read.
    base = q if out is None else out
    text_keys, text_values = (keys, values) if text is None else (text[0].contiguous(), text[1].contiguous())
    tensors = (
        q, base, result, keys, values, rows, weights, weights if mask is None else mask, weights if stats is None else stats,
        text_keys, text_values, 0 if text is None else text_keys.shape[1],
    )  # fmt: skip
    # All that Triton compiles for; of the pointers that is whether they are aligned to 16 bytes.
    addresses = q.data_ptr() | base.data_ptr() | result.data_ptr() | keys.data_ptr() | values.data_ptr()
    if text is not None:
        addresses |= text_keys.data_ptr() | text_values.data_ptr()
    key = (
        q.shape, q.stride(), base.stride(), q.dtype, result.dtype, q.device, keys.shape, keys.dtype, rows.shape, heads,
        None if mask is None else mask.stride(), mask is not None and mask.shape[1] > 1, stats is not None, text is not None,
        addresses & 15,
    )  # fmt: skip
    if q.is_cuda and q.device.index != torch.cuda.current_device():
        with torch.cuda.device(q.device):
            (_plans.get(key) or _make_plan(key, tensors, heads, mask, stats is not None, text is not None))(*tensors)
    else:
        (_plans.get(key) or _make_plan(key, tensors, heads, mask, stats is not None, text is not None))(*tensors)
    return result


def _make_plan(
    key: tuple[Any, ...], tensors: tuple[Any, ...], heads: int, mask: Tensor | None, has_stats: bool, has_text: bool
) -> Callable[..., None]:
    """The fastest of `CONFIGS` for this shape, measured once, with as much text as there is then."""
    q, out, keys, rows = tensors[0], tensors[1], tensors[3], tensors[5]
    batch, queries, width = q.shape
    dim, tokens = width // heads, keys.shape[1]
    constants = (
        dim**-0.5, queries, batch, q.stride(0), q.stride(1), out.stride(0), out.stride(1),
        0 if mask is None else mask.stride(0), 0 if mask is None or mask.shape[1] == 1 else mask.stride(1),
        rows.shape[0], tokens, padded(tokens), token_block(tokens, dim, q.element_size()), dim, padded(dim), mask is not None,
        has_stats, TEXT_BLOCK if has_text else 0, INTERPRETED and q.dtype == torch.bfloat16, float32_products(q.device),
    )  # fmt: skip
    configs = configs_for(dim, q.element_size(), float32_products(q.device))
    capturing = q.is_cuda and torch.cuda.is_current_stream_capturing()
    # Trials must not count into a running measurement.
    trial = (*tensors[:8], torch.zeros(2, device=q.device), *tensors[9:])
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
    return min(padded(tokens), 16 if element_size > 2 else max(16, 8192 // padded(head_dim)), 64)


def configs_for(head_dim: int, element_size: int, precision: str) -> list[tuple[int, int]]:
    """Those of `CONFIGS` whose queries fill the registers and do not overflow them, which costs more than it saves.
    precision: as `capabilities.float32_products` says."""
    width = padded(head_dim)
    narrow, half = width <= 64, element_size <= 2
    # Elements of q that a thread holds, at most.
    most = (64 if width <= 128 else 32) if half else (32 if narrow and precision != "ieee" else 16)
    fitting = [(block, warps) for block, warps in CONFIGS if most <= 4 * block * width // (32 * warps) <= 4 * most]
    # Products of float32 on a Hopper's matrix units by more than one group of four warps: Triton 3.6 makes code of them that
    # reads past its memory.
    return fitting if half else [(block, warps) for block, warps in fitting if block < 64 or (block, warps) == (64, 4)]


def _candidates(
    tensors: tuple[Any, ...],
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
            compiled = _attend_tokens[grid](*tensors, *constants, **options, **FUSES)
        except triton.runtime.errors.OutOfResources as error:
            log.debug("token attention: %d queries per program do not fit (%s)", block, error)
            continue
        if compiled is None or not LAUNCHED_ALIKE:  # the interpreter compiles nothing
            yield functools.partial(_launch, grid, constants, options)
        else:
            yield _direct(compiled[grid], (*constants, block))
        if first_only:
            return


def _direct(launch: Callable[..., None], constants: tuple[Any, ...]) -> Callable[..., None]:
    """Launch what is compiled already: Triton's own call looks at every argument again each time."""
    return lambda *arguments: launch(*arguments, *constants)


def _launch(grid: tuple[int, int, int], constants: tuple[Any, ...], options: dict[str, int], *arguments: Any) -> None:
    _attend_tokens[grid](*arguments, *constants, **options, **FUSES)


def _milliseconds(plan: Callable[..., None], tensors: tuple[Any, ...]) -> float:
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
