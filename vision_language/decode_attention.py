"""Attention of one new token of each row over its static cache: torch's own, or the kernel that cuts the cache into parts.

Which of the two is faster depends on the card, the batch and the bucket, so that is measured when their buffers are
made, inside a CUDA graph as it will run. A kernel that differs from torch, or fails, is not used, and the reason is told.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention.choice import fastest
from ..attention.metal import readable_mask
from ..attention.torch_backends import misled_by_cudnn, sdpa_with
from ..host.capturing import captured
from ..products.operators import operator

log = logging.getLogger("hotpath.vision_language")

TORCH, EFFICIENT, PARTS = "torch", "torch's memory-efficient", "in parts"
CALLS, REPLAYS = 16, 5
TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def attend_reference(q: Tensor, keys: Tensor, values: Tensor, bias: Tensor, slot: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D) + bias) v, a new tensor like `q`.

    q: [B, H, G, D], the G queries that share key head H; keys, values: [B, H, length, D]; bias: [B, 1, 1, length], -inf
    where nothing is seen. slot: [1], the last place that is filled; everything after it has a bias of -inf.
    """
    mask = readable_mask(q, bias) if q.device.type == "mps" else bias
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)


def attend_efficient(q: Tensor, keys: Tensor, values: Tensor, bias: Tensor, slot: Tensor) -> Tensor:
    """`attend_reference` by one kernel of torch's, on cards where the one that torch picks is wrong."""
    return _efficient(q, keys, values, bias, None)


def attend_in_parts(q: Tensor, keys: Tensor, values: Tensor, bias: Tensor, slot: Tensor) -> Tensor:
    """`attend_reference` by the kernel, on CUDA. One opaque operator to a compiler."""
    made: Tensor = ATTEND_FILLED(q, keys, values, bias, slot)
    return made


_efficient = sdpa_with("EFFICIENT_ATTENTION")
ATTEND: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    TORCH: attend_reference,
    EFFICIENT: attend_efficient,
    PARTS: attend_in_parts,
}


def why_not(dtype: torch.dtype, groups: int, dim: int) -> str:
    """Why the kernel cannot run these; '' when it can."""
    try:
        from .decode_attention_kernel import MAX_GROUPS, MAX_HEAD_DIM
    except Exception as error:  # not installed, or too old to know what the kernel asks of it
        return f"Triton does not serve ({type(error).__name__}: {error})"
    if dtype not in TOLERANCE:
        return f"the kernel takes float16, bfloat16 and float32, not {dtype}"
    if groups > MAX_GROUPS or dim > MAX_HEAD_DIM:
        return f"{groups} queries {dim} wide, the kernel takes up to {MAX_GROUPS} and {MAX_HEAD_DIM}"
    return ""


def choose(shape: tuple[int, int, int, int], length: int, device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """(a name in ATTEND, why). shape: [B, H, G, D] of the queries; length: of the cache. Waits for the device."""
    if device.type != "cuda":
        return TORCH, ""
    plain = EFFICIENT if misled_by_cudnn(device) else TORCH
    if reason := why_not(dtype, shape[2], shape[3]):
        return plain, reason
    generator = torch.Generator(device=device).manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=device, dtype=dtype)

    rows, heads = shape[:2]
    kept = (rows, heads, length, shape[3])
    bias = torch.zeros((rows, 1, 1, length), device=device, dtype=dtype)
    slot = torch.full((1,), length * 3 // 4, device=device)
    bias[..., length * 3 // 4 + 1 :] = float("-inf")
    tensors = (random(*shape), random(*kept), random(*kept), bias, slot)
    try:
        wanted, found = ATTEND[plain](*tensors), attend_in_parts(*tensors)
        if not torch.allclose(found, wanted, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype]):
            worst = float((found - wanted).abs().max())
            return plain, f"the kernel that cuts the cache into parts is off by {worst:.2g} on this card"
        times = {name: milliseconds(functools.partial(ATTEND[name], *tensors), device) for name in (plain, PARTS)}
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # no compiler, a driver too old, a card that Triton does not know
        log.warning("decode attention is torch's, because the kernel failed", exc_info=True)
        return plain, f"the kernel failed ({type(error).__name__})"
    choice = fastest(times)
    log.info("decode attention, %s over %d: %s", list(shape), length, choice.describe())
    return choice.backend, choice.describe()


def milliseconds(run: Callable[[], Any], device: torch.device) -> float:
    """Of one call among many in a CUDA graph, where starting a kernel from the host costs nothing."""

    def many() -> None:
        for _ in range(CALLS):
            run()

    graph, _ = captured(many, 1, device)
    event: Any = torch.cuda.Event
    spans = []
    for _ in range(REPLAYS):
        start, end = event(enable_timing=True), event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        spans.append(start.elapsed_time(end) / CALLS)
    return min(spans)


def _run(q: Tensor, keys: Tensor, values: Tensor, bias: Tensor, slot: Tensor) -> Tensor:
    from .decode_attention_kernel import attend_filled

    return attend_filled(q, keys, values, bias, slot)


ATTEND_FILLED = operator(
    "attend_filled",
    "Tensor q, Tensor keys, Tensor values, Tensor bias, Tensor slot",
    _run,
    lambda q, *_: q.new_empty(q.shape),
)
