"""Local window attention with logits from spatial-correlation-sampler, the extension that ColorMNet's original asks for.

Optional: it has to be compiled, and on an H200 it was no faster than unfolding. Its gates are strict, because what it
cannot do ends the process instead of raising: half precision on a CPU aborts.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

from .capabilities import dtype_name
from .local_window import sum_values

DTYPES = {"cpu": (torch.float32, torch.float64), "cuda": (torch.float32, torch.float64, torch.float16)}


def sampler_unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the extension cannot correlate `dtype` on `device`, with the cure; None when it can."""
    if device.type not in DTYPES:
        return f"it computes on cpu and cuda, this is {device.type}"
    if dtype not in DTYPES[device.type]:
        known = ", ".join(map(dtype_name, DTYPES[device.type]))
        return f"on {device.type} it computes {known}, this is {dtype_name(dtype)}"
    found = _library()
    if isinstance(found, str):
        return found
    if device.type == "cuda" and not _runs_on_cuda(device.index or 0):
        return "this build of it has no CUDA part; install it where nvcc is"
    return None


@functools.cache
def _library() -> Any:
    """The extension's function, or why there is none."""
    try:
        return importlib.import_module("spatial_correlation_sampler").spatial_correlation_sample
    except ImportError as error:
        if error.name == "spatial_correlation_sampler":
            return "it is not installed; `pip install spatial-correlation-sampler` compiles it"
        return f"it cannot be imported ({error}); it must be compiled for this torch"


@functools.cache
def _runs_on_cuda(index: int) -> bool:
    """A build without CUDA raises there."""
    one = torch.ones(1, 1, 1, 1, device=f"cuda:{index}")
    try:
        return bool(_library()(one, one, patch_size=1).item() == 1)
    except RuntimeError:
        return False


def local_window_sampler(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, window: int) -> Tensor:
    """The same as `local_window.local_window_banded`; where `sampler_unavailable` says nothing against it."""
    frames, _, height, width = query.shape
    # [T, window, window, H, W], offsets row by row.
    logits = _library()(query.contiguous(), key.expand(frames, -1, -1, -1).contiguous(), patch_size=window)
    band = (logits + bias.unflatten(1, (window, window))).permute(0, 3, 4, 1, 2)
    radius = window // 2
    offset = torch.arange(window, device=query.device) - radius
    rows = torch.arange(height, device=query.device)[:, None] + offset
    columns = torch.arange(width, device=query.device)[:, None] + offset
    inside = ((rows >= 0) & (rows < height))[:, None, :, None] & ((columns >= 0) & (columns < width))[None, :, None, :]
    return sum_values(band.masked_fill(~inside, float("-inf")), value, window)
