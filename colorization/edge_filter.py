"""Smoothing of chroma that stops at the edges of the luminance, in torch on any device.

The fast global smoother (Min et al., IEEE TIP 2014) solves a weighted least-squares problem along rows and columns in
turn, as Deep Exemplar's programs do through OpenCV's contributed modules; the guided filter (He et al., TPAMI 2013)
fits the chroma to the luminance in every window.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

FILTERS = ("none", "guided", "fast_global_smoother")
# Pixels that a CPU filters together: their memory is used again, and caches hold it.
TOGETHER = 1 << 19


def apply_filter(name: str, guide: Tensor, chroma: Tensor) -> Tensor:
    """`name` of FILTERS with its usual parameters. guide: L [T, 1, H, W] in 0..100; chroma: [T, 2, H, W]."""
    if name == "none":
        return chroma
    if name == "guided":
        return guided_filter(guide / 100, chroma, radius=max(2, min(guide.shape[-2:]) // 100), epsilon=1e-4)
    if name == "fast_global_smoother":
        return fast_global_smoother(eight_bits(guide), chroma)
    raise ValueError(f"There is no edge filter {name!r}; choose one of {', '.join(FILTERS)}.")


def eight_bits(luminance: Tensor) -> Tensor:
    """L in 0..100 to whole numbers in 0..255, truncated, as Deep Exemplar makes its guide."""
    return (luminance * 255 / 100).clamp(0, 255).floor()


def fast_global_smoother(
    guide: Tensor, chroma: Tensor, smoothness: float = 500.0, sigma: float = 4.0, passes: int = 3
) -> Tensor:
    """guide: [T, 1, H, W] in 0..255; chroma: [T, C, H, W]. Returns chroma of the same shape.

    Neighbours are tied by smoothness * exp(-difference / sigma); every pass is four times weaker than the one before,
    as in OpenCV.
    """
    strengths = [smoothness * 0.25**index for index in range(passes)]
    if guide.device.type == "cpu":
        frames = max(1, 2 * TOGETHER // guide[0].numel())
        portions = zip(guide.split(frames), chroma.split(frames), strict=True)
        return torch.cat([_eliminated(*portion, strengths, sigma) for portion in portions])
    across = _ties(guide, -1, sigma)
    down = _ties(guide, -2, sigma).transpose(-1, -2)
    result = chroma
    for strength in strengths:
        result = _reduced(strength * across, result)
        result = _reduced(strength * down, result.transpose(-1, -2)).transpose(-1, -2)
    return result


def _ties(guide: Tensor, dimension: int, sigma: float) -> Tensor:
    return torch.exp(-guide.diff(dim=dimension).abs() / sigma)


def _eliminated(guide: Tensor, chroma: Tensor, strengths: list[float], sigma: float) -> Tensor:
    """[T, 1, H, W] and [T, C, H, W]. The line that is solved along comes first, so that a step is over numbers that lie next
    to one another."""
    across = _ties(guide.permute(3, 0, 1, 2).contiguous(), 0, sigma)
    down = _ties(guide.permute(2, 0, 1, 3).contiguous(), 0, sigma)
    for strength in strengths:
        lines = chroma.permute(3, 0, 1, 2).clone(memory_format=torch.contiguous_format)
        _eliminate((strength * across).numpy(), lines.numpy())
        lines = lines.permute(3, 1, 2, 0).clone(memory_format=torch.contiguous_format)
        _eliminate((strength * down).numpy(), lines.numpy())
        chroma = lines.permute(1, 2, 0, 3)
    return chroma


def _eliminate(ties: Any, values: Any) -> None:
    """Solve (1 + sum of ties) u - ties * neighbours = values along the first dimension, by Thomas's algorithm; u is put in
    the place of values, [N, T, C, M]. ties: [N - 1, T, 1, M] between neighbours.

    NumPy, as 2 N steps over a few thousand numbers each are mostly calls, which take torch several times as long.
    """
    diagonal = np.ones((len(values), *ties.shape[1:]), ties.dtype)
    diagonal[1:] += ties
    diagonal[:-1] += ties
    shares = np.empty_like(ties)  # of the next line in this one, once those before are eliminated
    inverse, product, before = 1 / diagonal[0], np.empty_like(values[0]), values[0]
    before *= inverse
    for tie, share, own, line in zip(ties, shares, diagonal[1:], values[1:], strict=True):
        np.multiply(tie, inverse, out=share)
        np.multiply(tie, share, out=inverse)
        np.subtract(own, inverse, out=inverse)
        np.reciprocal(inverse, out=inverse)
        np.multiply(tie, before, out=product)
        line += product
        line *= inverse
        before = line
    for share, line, after in zip(shares[::-1], values[-2::-1], values[:0:-1], strict=True):
        np.multiply(share, after, out=product)
        line += product


def _reduced(ties: Tensor, values: Tensor) -> Tensor:
    """The solution of the same along the last dimension, for a graphics card, which log2(W) steps over whole pictures keep
    busy: cyclic reduction, in which every step doubles the distance to the neighbours that an equation still contains.

    ties: [T, 1, H, W - 1]; values: [T, C, H, W]. The system is diagonally dominant, which keeps both ways stable.
    """
    width = values.shape[-1]
    left = -F.pad(ties, (1, 0))  # coefficient of the neighbour before
    right = -F.pad(ties, (0, 1))
    diagonal = 1 - left - right
    distance = 1
    while distance < width:
        before = -left / _shifted(diagonal, distance, 1.0)
        after = -right / _shifted(diagonal, -distance, 1.0)
        values = values + before * _shifted(values, distance, 0.0) + after * _shifted(values, -distance, 0.0)
        diagonal = diagonal + before * _shifted(right, distance, 0.0) + after * _shifted(left, -distance, 0.0)
        left, right = before * _shifted(left, distance, 0.0), after * _shifted(right, -distance, 0.0)
        distance *= 2
    return values / diagonal


def _shifted(x: Tensor, distance: int, outside: float) -> Tensor:
    """x at column i - distance, `outside` where there is none."""
    if distance > 0:
        return F.pad(x[..., :-distance], (distance, 0), value=outside)
    return F.pad(x[..., -distance:], (0, -distance), value=outside)


def guided_filter(guide: Tensor, chroma: Tensor, radius: int, epsilon: float) -> Tensor:
    """guide: [T, 1, H, W] in 0..1; chroma: [T, C, H, W]; epsilon: variance of the guide that counts as an edge."""
    if guide.device.type != "cpu":
        return _guided(guide, chroma, radius, epsilon)
    height, width = guide.shape[-2:]
    step, seen = max(TOGETHER // width, 8 * radius), 2 * radius  # two windows, one over the other
    filtered = torch.empty_like(chroma)
    for frame, light, ab in zip(filtered.split(1), guide.split(1), chroma.split(1), strict=True):
        for first in range(0, height, step):
            stop = min(first + step, height)
            rows = slice(max(0, first - seen), stop + seen)
            part = _guided(light[..., rows, :], ab[..., rows, :], radius, epsilon)
            frame[..., first:stop, :] = part[..., first - rows.start : stop - rows.start, :]
    return filtered


def _guided(guide: Tensor, chroma: Tensor, radius: int, epsilon: float) -> Tensor:
    mean_guide = _box(guide, radius)
    mean_chroma = _box(chroma, radius)
    variance = _box(guide * guide, radius) - mean_guide**2
    covariance = _box(guide * chroma, radius) - mean_guide * mean_chroma
    slope = covariance / (variance.clamp_min(0) + epsilon)
    offset = mean_chroma - slope * mean_guide
    return _box(slope, radius) * guide + _box(offset, radius)


def _box(x: Tensor, radius: int) -> Tensor:
    """Mean over a window of 2 * radius + 1, cut off at the border."""
    if x.device.type == "cpu":
        return _doubled_means(_doubled_means(x, radius, -2), radius, -1)
    size = 2 * radius + 1
    x = F.avg_pool2d(x, (size, 1), 1, (radius, 0), count_include_pad=False)
    return F.avg_pool2d(x, (1, size), 1, (0, radius), count_include_pad=False)


def _doubled_means(x: Tensor, radius: int, axis: int) -> Tensor:
    """`_box` along one axis from sums over 1, 2, 4... pixels, each of two of the last ones: additions grow with the logarithm
    of the radius only."""
    length, size = x.shape[axis], 2 * radius + 1
    place = torch.arange(length)
    inside = (place + radius).clamp_max(length - 1) - (place - radius).clamp_min(0) + 1
    sums = F.pad(x, (radius, radius) if axis == -1 else (0, 0, radius, radius))
    total = torch.zeros_like(x)
    begin, width = 0, 1
    while True:
        if size & width:
            total += sums.narrow(axis, begin, length)
            begin += width
        if 2 * width > size:
            return total.div_(inside if axis == -1 else inside[:, None])
        left = sums.shape[axis] - width
        sums = sums.narrow(axis, 0, left) + sums.narrow(axis, width, left)
        width *= 2
