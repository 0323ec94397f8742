"""sRGB and CIE Lab on any torch device, as the colorizers' training data was made.

Both networks were trained on scikit-image's conversions (D65, 2 degree observer, its rounded matrices), so these
functions repeat its formulas instead of the exact sRGB constants. Pictures are channels first: [..., 3, H, W].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .strips import by_strips

XYZ_FROM_RGB = (
    (0.412453, 0.357580, 0.180423),
    (0.212671, 0.715160, 0.072169),
    (0.019334, 0.119193, 0.950227),
)
# The inverse of XYZ_FROM_RGB, to the eight digits both projects compute with.
RGB_FROM_XYZ = (
    (3.24048134, -1.53715152, -0.49853633),
    (-0.96925495, 1.87599, 0.04155593),
    (0.05564664, -0.20404134, 1.05731107),
)
WHITE = (0.95047, 1.0, 1.08883)

LUMINANCE_CENTRE = 50.0
# ColorMNet's networks see (L - 50) / 50 and ab / 110.
LUMINANCE_SCALE = 50.0
CHROMA_SCALE = 110.0


def rgb_to_lab(rgb: Tensor) -> Tensor:
    """rgb: [..., 3, H, W] float sRGB in 0..1. Returns Lab of the same shape: L in 0..100, ab about -110..110."""
    return by_strips(_rgb_to_lab, rgb)


def luminance_of(rgb: Tensor) -> Tensor:
    """L of `rgb_to_lab` alone: [..., 3, H, W] in 0..1, or [..., 1, H, W] where all three are the same, to [..., 1, H, W] in
    0..100."""
    return by_strips(_luminance_of, rgb)


def lab_to_rgb(lab: Tensor) -> Tensor:
    """lab: [..., 3, H, W], L in 0..100. Returns sRGB in 0..1; colours outside sRGB are clipped."""
    return by_strips(_lab_to_rgb, lab)


def with_luminance(luminance: Tensor, chroma: Tensor) -> Tensor:
    """sRGB in 0..1 of L [..., 1, H, W] in 0..100 and ab [..., 2, H, W]."""
    return by_strips(lambda light, ab: _lab_to_rgb(torch.cat((light, ab.to(light.dtype)), dim=-3)), luminance, chroma)


def normalise_luminance(luminance: Tensor) -> Tensor:
    """L in 0..100 to the -1..1 that ColorMNet sees."""
    return (luminance - LUMINANCE_CENTRE) / LUMINANCE_SCALE


def _rgb_to_lab(rgb: Tensor) -> Tensor:
    linear = torch.where(rgb > 0.04045, ((rgb + 0.055) / 1.055).clamp_min(0) ** 2.4, rgb / 12.92)
    xyz = _scaled(_mix(linear, XYZ_FROM_RGB), [1 / white for white in WHITE])
    f = torch.where(xyz > 0.008856, xyz.clamp_min(0) ** (1 / 3), 7.787 * xyz + 16 / 116)
    x, y, z = f.unbind(-3)
    return torch.stack((116 * y - 16, 500 * (x - y), 200 * (y - z)), dim=-3)


def _luminance_of(rgb: Tensor) -> Tensor:
    linear = torch.where(rgb > 0.04045, ((rgb + 0.055) / 1.055).clamp_min(0) ** 2.4, rgb / 12.92)
    y = _mix(linear.expand(*rgb.shape[:-3], 3, -1, -1), XYZ_FROM_RGB[1:2])
    return 116 * torch.where(y > 0.008856, y.clamp_min(0) ** (1 / 3), 7.787 * y + 16 / 116) - 16


def _lab_to_rgb(lab: Tensor) -> Tensor:
    luminance, a, b = lab.unbind(-3)
    y = (luminance + 16) / 116
    x = a / 500 + y
    z = (y - b / 200).clamp_min(0)
    f = torch.stack((x, y, z), dim=-3)
    xyz = _scaled(torch.where(f > 0.2068966, f**3, (f - 16 / 116) / 7.787), WHITE)
    linear = _mix(xyz, RGB_FROM_XYZ)
    gamma = 1.055 * linear.clamp_min(0.0031308) ** (1 / 2.4) - 0.055
    # The straight piece is the lower one below 0.0031308, and the higher one above, where it ends.
    return torch.minimum(gamma, linear * 12.92).clamp(0, 1)


def _mix(channels: Tensor, rows: tuple[tuple[float, ...], ...]) -> Tensor:
    """A 3-column matrix applied to dimension -3, in the channels' own precision (a GEMM might use TF32)."""
    first, second, third = channels.unbind(-3)
    return torch.stack([first * r[0] + second * r[1] + third * r[2] for r in rows], dim=-3)


def _scaled(channels: Tensor, factors: Sequence[float]) -> Tensor:
    """Dimension -3 by a number each. As a tensor the numbers would be copied to the device, which waits for it."""
    return torch.stack([x * factor for x, factor in zip(channels.unbind(-3), factors, strict=True)], dim=-3)
