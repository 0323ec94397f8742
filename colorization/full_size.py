"""Frames at their own size: their luminance, and what they become with colours on it."""

from __future__ import annotations

import torch
from torch import Tensor

from .batch_size import BatchSize
from .colour_space import luminance_of, with_luminance
from .pictures import to_channels_first
from .strips import by_strips

PIXELS_TOGETHER = 1 << 23


def conversions(height: int, width: int) -> BatchSize:
    """How many frames of this size are converted together."""
    return BatchSize(PIXELS_TOGETHER // (height * width), "full-size frames at a time")


def luminance_of_frames(frames: Tensor, device: torch.device) -> Tensor:
    """frames: [T, H, W, 3], float in 0..1 or uint8. Returns L in 0..100, [T, 1, H, W], on `device`."""
    return by_strips(lambda part: luminance_of(to_channels_first(part, device)), frames.to(device), rows=-3)


def frames_of(luminance: Tensor, chroma: Tensor, dtype: torch.dtype) -> Tensor:
    """sRGB [T, H, W, 3] of L [T, 1, H, W] in 0..100 and ab [T, 2, H, W]: in 0..1, or in 0..255 where dtype is uint8."""

    def work(light: Tensor, ab: Tensor) -> Tensor:
        rgb = with_luminance(light, ab).permute(0, 2, 3, 1)
        return (rgb * 255).round().to(dtype) if dtype == torch.uint8 else rgb

    return by_strips(work, luminance, chroma, made=-3)
