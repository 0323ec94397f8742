"""Exact attention: torch's four kernels, flash-attn 2 and 3, xformers and FlexAttention.

Kernels of torch are asked for by a context. That context changes flags of the whole process while it lasts, so two
threads must not interleave theirs: the later one to leave would restore what it found, the other's choice. Hence the lock.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import sys
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .capabilities import (
    BOOL_MASK,
    FLOAT_MASK,
    FLOATS,
    HALVES,
    NO_MASK,
    OTHER_FLOAT_MASK,
    AttentionCall,
    Backend,
    DeviceFacts,
    Run,
    dtype_name,
    one_line,
)
from .metal import readable_mask
from .reference import share_heads

_kernel_flags = threading.Lock()
SINGLE_QUERIES = ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH")  # kernels that are right for them everywhere
EVERYWHERE = ("cuda", "hip", "cpu", "mps", "xpu")
ANY_MASK = (NO_MASK, BOOL_MASK, FLOAT_MASK, OTHER_FLOAT_MASK)
# Numbers of a mask for one head that a call of torch's can have: its memory-efficient kernel counts them in 32 bits (pytorch
# 187227), with what rounds its rows up.
LARGEST_MASK, ROUNDED_UP = 1 << 32, 16


_broken: dict[str, str] = {}  # libraries that are there and fail: trying can take seconds, and every new size asks


def import_fault(module: str, cure: str) -> str | None:
    """Why `module` cannot be imported, with the cure; None when it can."""
    if module in _broken and module not in sys.modules:
        return _broken[module]
    try:
        importlib.import_module(module)
        return None
    except ModuleNotFoundError as error:
        if error.name == module.partition(".")[0]:
            return f"{error.name} is not installed ({cure})"
        needed = (error.name or str(error)).partition(".")[0]
        _broken[module] = f"{module} needs {needed} (pip install {needed})"
    except Exception as error:  # a library built for another torch or CUDA may raise anything
        _broken[module] = f"the import of {module} fails: {one_line(error)}"
    return _broken[module]


def contiguous_rows(*tensors: Tensor) -> list[Tensor]:
    """The tensors with their last dimension side by side in memory, which most kernels ask for."""
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]


def heads_apart(x: Tensor) -> Tensor:
    """`x` [B, H, M, D] with each head in memory of its own.

    For the last of 32 or 64 queries and one more, torch's memory-efficient kernel reads past the mask where all heads are one in
    memory (pytorch 191937).
    """
    return x.contiguous() if x.shape[1] > 1 and x.stride(1) == 0 else x


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """torch's scaled dot product attention, with the kernel torch picks."""
    if mask is not None:
        k, v = heads_apart(k), heads_apart(v)
        rows = LARGEST_MASK // (k.shape[2] + ROUNDED_UP)
        if mask.shape[2] > rows:
            parts = zip(q.split(rows, 2), mask.split(rows, 2), strict=True)
            return torch.cat([sdpa(some, k, v, seen, scale) for some, seen in parts], dim=2)
    if mask is not None and mask.is_floating_point() and mask.dtype != q.dtype:
        # Torch takes float32 as well, and kernels of it misread that: a CPU's in float64, cuDNN's in half (pytorch 191612).
        mask = mask.to(q.dtype)
    if q.device.type == "mps":
        # Shared heads: torch 2.8 to 2.10 read past its memory there (pytorch 174861).
        mask, k, v = readable_mask(q, mask), share_heads(k, q.shape[1]), share_heads(v, q.shape[1])
    if q.shape[1] == k.shape[1]:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    if mask is not None:
        # Not every kernel takes a mask and shared heads at once, and torch then raises where it could repeat.
        return F.scaled_dot_product_attention(
            q, share_heads(k, q.shape[1]), share_heads(v, q.shape[1]), attn_mask=mask, scale=scale
        )
    return F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=True)


@contextlib.contextmanager
def kernels_allowed(*names: str) -> Iterator[None]:
    """torch's scaled dot product attention takes one of these kernels, names of torch.nn.attention.SDPBackend. Not for what is
    compiled."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with _kernel_flags, sdpa_kernel([getattr(SDPBackend, name) for name in names]):
        yield


@functools.cache
def misled_by_cudnn(device: torch.device) -> bool:
    """Whether torch takes cuDNN on `device` for single queries and is given wrong numbers (pytorch 193893)."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device)[0] == 10


def sdpa_with(kernel: str) -> Run:
    """torch's scaled dot product attention with one kernel: a name of torch.nn.attention.SDPBackend."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    chosen = getattr(SDPBackend, kernel)

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
        q, k, v = contiguous_rows(q, k, v)
        if chosen == SDPBackend.EFFICIENT_ATTENTION:
            k, v = share_heads(k, q.shape[1]), share_heads(v, q.shape[1])
        if torch.compiler.is_compiling():
            # Tracing is serialised by torch, and what is traced carries the kernel and not the flags.
            with sdpa_kernel(chosen):
                return sdpa(q, k, v, mask, scale)
        with _kernel_flags, sdpa_kernel(chosen):
            return sdpa(q, k, v, mask, scale)

    return run


def kernels_in_graphs() -> bool:
    """Whether torch can trace the context that asks for a kernel: it can since that takes an order of kernels (2.6)."""
    from torch.nn.attention import sdpa_kernel

    return "set_priority" in inspect.signature(sdpa_kernel).parameters


def _flash_of_torch(call: AttentionCall, device: DeviceFacts) -> str | None:
    if device.type == "cpu":
        return None
    if call.dtype not in HALVES:
        return f"on CUDA it computes float16 and bfloat16, this is {dtype_name(call.dtype)}"
    return None if call.mask == NO_MASK else f"on CUDA it takes no mask, this has a {call.mask}"


def _cudnn(call: AttentionCall, device: DeviceFacts) -> str | None:
    widest = 256 if (device.capability or (0, 0)) >= (9, 0) else 128
    return None if call.width <= widest else f"its head size ends at {widest} on {device.name}, this is {call.width}"


def flash_attention_2(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    from flash_attn import flash_attn_func

    q, k, v = contiguous_rows(*(x.transpose(1, 2) for x in (q, k, v)))
    out: Tensor = flash_attn_func(q, k, v, softmax_scale=scale)
    return out.transpose(1, 2)


def flash_attention_3(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    from flash_attn_interface import flash_attn_func

    q, k, v = contiguous_rows(*(x.transpose(1, 2) for x in (q, k, v)))
    out = flash_attn_func(q, k, v, softmax_scale=scale)
    # Releases differ: some return the log-sum-exp beside the result.
    first: Tensor = out[0] if isinstance(out, tuple) else out
    return first.transpose(1, 2)


def xformers_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    from xformers.ops import memory_efficient_attention

    k, v = share_heads(k, q.shape[1]), share_heads(v, q.shape[1])
    out: Tensor = memory_efficient_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale=scale)
    return out.transpose(1, 2)


def _xformers_library() -> str | None:
    return import_fault("xformers.ops", "pip install xformers, the build for your torch")


def _xformers_bug(call: AttentionCall, device: DeviceFacts) -> str | None:
    version = str(getattr(importlib.import_module("xformers"), "__version__", ""))
    if version.startswith("0.0.2") and not version.startswith("0.0.20") and call.batch * call.heads > 65535:
        return f"xformers {version} fails for over 65535 samples times heads (pip install -U xformers)"
    return None


@functools.cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


def flex(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """FlexAttention with the mask as a score modification. Outside CUDA it runs uncompiled, with the whole q k^T."""
    from torch.nn.attention.flex_attention import flex_attention

    score = None
    if mask is not None:
        rows = mask.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
        if mask.dtype == torch.bool:

            def score(value: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
                return torch.where(rows[b, h, i, j], value, -torch.inf)
        else:

            def score(value: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
                return value + rows[b, h, i, j]

    compiled = q.device.type == "cuda" and not torch.compiler.is_compiling()
    attention: Any = _compiled_flex() if compiled else flex_attention
    grouped = q.shape[1] != k.shape[1]
    out: Tensor = attention(q, k, v, score_mod=score, scale=scale, enable_gqa=grouped)
    return out


TORCH_BACKENDS = (
    Backend(
        "sdpa", "torch, which picks the kernel", sdpa, in_graph=True, devices=EVERYWHERE, dtypes=FLOATS,
        unequal_width=True, masks=ANY_MASK, gradient=True,
    ),
    Backend(
        "sdpa_cudnn", "cuDNN through torch", sdpa_with("CUDNN_ATTENTION"), in_graph=kernels_in_graphs(), least_capability=(8, 0),
        width_multiple=8, masks=(NO_MASK, BOOL_MASK, FLOAT_MASK), gradient=True, further=_cudnn,
    ),
    Backend(
        "sdpa_flash", "FlashAttention 2 in torch", sdpa_with("FLASH_ATTENTION"), in_graph=kernels_in_graphs(),
        devices=("cuda", "cpu"), least_capability=(8, 0), dtypes=FLOATS, largest_width=256,
        masks=(NO_MASK, BOOL_MASK, FLOAT_MASK), gradient=True, further=_flash_of_torch,
    ),
    Backend(
        "sdpa_efficient", "memory-efficient attention in torch", sdpa_with("EFFICIENT_ATTENTION"), in_graph=kernels_in_graphs(),
        least_capability=(5, 0), dtypes=FLOATS, unequal_width=True, masks=(NO_MASK, BOOL_MASK, FLOAT_MASK),
        gradient=True,
        further=lambda call, device: (
            "bfloat16 needs compute capability 8.0"
            if call.dtype == torch.bfloat16 and (device.capability or (0, 0)) < (8, 0)
            else None
        ),
    ),
    Backend(
        "sdpa_math", "plain products in torch", sdpa_with("MATH"), in_graph=kernels_in_graphs(), devices=EVERYWHERE,
        dtypes=FLOATS, unequal_width=True, masks=ANY_MASK, gradient=True,
    ),
    Backend(
        "flash3", "flash-attn 3", flash_attention_3, architectures=((9, 0),), largest_width=256, width_multiple=8,
        distributions=("flash-attn-3", "flash_attn_3"),
        library=lambda: import_fault("flash_attn_interface", "it is built from the flash-attention repository, folder hopper"),
    ),
    Backend(
        "flash2", "flash-attn 2", flash_attention_2, least_capability=(8, 0), largest_width=256, width_multiple=8,
        distributions=("flash-attn",),
        library=lambda: import_fault("flash_attn", "pip install flash-attn --no-build-isolation"),
    ),
    Backend(
        "xformers", "xformers", xformers_attention, library=_xformers_library, least_capability=(5, 0), dtypes=FLOATS,
        largest_width=256, width_multiple=8, further=_xformers_bug, distributions=("xformers",),
    ),
    Backend(
        "flex", "FlexAttention, compiled by torch", flex, in_graph=True, devices=("cuda", "cpu"),
        least_capability=(7, 0), dtypes=FLOATS, unequal_width=True, masks=ANY_MASK,
        library=lambda: import_fault("torch.nn.attention.flex_attention", "it comes with torch 2.5"),
    ),
)  # fmt: skip
