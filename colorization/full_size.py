"""Frames at their own size: their luminance, and what they become with colours on it."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from .batch_size import BatchSize
from .colour_space import luminance_of, with_luminance
from .pictures import to_channels_first
from .strips import by_strips

PIXELS_TOGETHER = 1 << 23
CPU_PIXELS_TOGETHER = 1 << 21  # more is only more memory to fetch from the system


def conversions(height: int, width: int, device: torch.device) -> BatchSize:
    """How many frames of this size are converted together."""
    pixels = CPU_PIXELS_TOGETHER if device.type == "cpu" else PIXELS_TOGETHER
    return BatchSize(pixels // (height * width), "full-size frames at a time")


def luminance_of_frames(frames: Tensor, device: torch.device) -> Tensor:
    """frames: [T, H, W, 3], float in 0..1 or uint8. Returns L in 0..100, [T, 1, H, W], on `device`."""
    arrived = frames.to(device)
    if device.type == "cpu":
        return by_strips(_luminance_once, arrived, rows=-3)
    return luminance_of(to_channels_first(arrived, device))


def _luminance_once(frames: Tensor) -> Tensor:
    """The same for a CPU, where an answer about the frames is not waited for: most films are black and white, and have no
    more than 256 levels."""
    first = frames[..., 0]
    if not all(torch.equal(first, frames[..., other]) for other in (1, 2)):
        return luminance_of(to_channels_first(frames, frames.device))
    if frames.dtype == torch.uint8:
        return _luminance_of_levels().index_select(0, first.flatten().int()).view(first.shape).unsqueeze(1)
    return luminance_of(to_channels_first(first.unsqueeze(-1), frames.device))


@lru_cache(maxsize=1)
def _luminance_of_levels() -> Tensor:
    """[256] L of the greys."""
    return luminance_of(torch.arange(256).view(1, 1, 1, -1) / 255).flatten()


def frames_of(luminance: Tensor, chroma: Tensor, dtype: torch.dtype) -> Tensor:
    """sRGB [T, H, W, 3] of L [T, 1, H, W] in 0..100 and ab [T, 2, H, W]: in 0..1, or in 0..255 where dtype is uint8."""

    def work(light: Tensor, ab: Tensor) -> Tensor:
        rgb = with_luminance(light, ab).permute(0, 2, 3, 1)
        return (rgb * 255).round().to(dtype) if dtype == torch.uint8 else rgb

    return by_strips(work, luminance, chroma, made=-3)
