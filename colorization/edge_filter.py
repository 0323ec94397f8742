"""Smoothing of chroma that stops at the edges of the luminance, in torch on any device.

The fast global smoother (Min et al., IEEE TIP 2014) solves a weighted least-squares problem along rows and columns in
turn, as Deep Exemplar's programs do through OpenCV's contributed modules; the guided filter (He et al., TPAMI 2013)
fits the chroma to the luminance in every window.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

FILTERS = ("none", "guided", "fast_global_smoother")
# Numbers that a CPU makes sums of together: their memory is used again, and caches hold a part of it.
TOGETHER = 1 << 20


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
    across = torch.exp(-(guide[..., :, 1:] - guide[..., :, :-1]).abs() / sigma)
    down = torch.exp(-(guide[..., 1:, :] - guide[..., :-1, :]).abs() / sigma).transpose(-1, -2)
    result = chroma
    for index in range(passes):
        strength = smoothness * 0.25**index
        result = _solve_rows(strength * across, result)
        result = _solve_rows(strength * down, result.transpose(-1, -2)).transpose(-1, -2)
    return result


def _solve_rows(ties: Tensor, values: Tensor) -> Tensor:
    """Solve (1 + sum of ties) u - ties * neighbours = values along the last dimension.

    ties: [T, 1, H, W - 1] between neighbours; values: [T, C, H, W]. The system is diagonally dominant, which keeps both ways
    stable: what a CPU does least work with, and what keeps a graphics card busy.
    """
    return _column_by_column(ties, values) if values.device.type == "cpu" else _reduced(ties, values)


def _column_by_column(ties: Tensor, values: Tensor) -> Tensor:
    """Elimination (Thomas's algorithm): 2 W steps, each over one column of all rows, which lie next to one another."""
    tie = ties.permute(3, 0, 1, 2).contiguous()  # [W - 1, T, 1, H]
    result = values.permute(3, 0, 1, 2).contiguous()
    diagonal = 1 + F.pad(ties, (1, 0)) + F.pad(ties, (0, 1))
    diagonal = diagonal.permute(3, 0, 1, 2).contiguous()
    share = torch.empty_like(tie)  # of the next column in this one, once those before are eliminated
    inverse = diagonal[0].reciprocal()
    result[0].mul_(inverse)
    for index in range(1, len(result)):
        left = tie[index - 1]
        torch.mul(left, inverse, out=share[index - 1])
        inverse = (diagonal[index] - left * share[index - 1]).reciprocal()
        result[index].addcmul_(left.expand_as(result[index]), result[index - 1]).mul_(inverse)
    for index in range(len(result) - 2, -1, -1):
        result[index].addcmul_(share[index].expand_as(result[index]), result[index + 1])
    return result.permute(1, 2, 3, 0)


def _reduced(ties: Tensor, values: Tensor) -> Tensor:
    """Cyclic reduction: every step doubles the distance to the neighbours an equation still contains, so log2(W) steps over
    whole pictures replace 2 W steps over columns."""
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
    means = torch.empty_like(x)
    other = -3 - axis
    lines = max(1, TOGETHER * x.shape[other] // x.numel())
    for given, total in zip(x.split(lines, other), means.split(lines, other), strict=True):
        sums = F.pad(given, (radius, radius) if axis == -1 else (0, 0, radius, radius))
        total.zero_()
        begin, width = 0, 1
        while True:
            if size & width:
                total += sums.narrow(axis, begin, length)
                begin += width
            if 2 * width > size:
                break
            left = sums.shape[axis] - width
            sums = sums.narrow(axis, 0, left) + sums.narrow(axis, width, left)
            width *= 2
        total /= inside if axis == -1 else inside[:, None]
    return means
