"""From five key points to ArcFace's aligned crop.

The template is that of ArcFace (arXiv:1801.07698). The least-squares similarity is solved in closed form over complex
numbers (Umeyama 1991 without reflections): with centred points p and template d, the factor is sum(conj(p) d) / |p|^2.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .faces import FaceError

TEMPLATE_SIZE = 112
SAMPLES_AT_ONCE = 1 << 19  # each takes about 160 bytes while it is computed
TEMPLATE = np.array(
    [(38.2946, 51.6963), (73.5318, 51.5014), (56.0252, 71.7366), (41.5493, 92.3655), (70.7299, 92.2041)], np.float32
)


def similarity(keypoints: NDArray[np.float32], target: NDArray[np.float32]) -> NDArray[np.float64]:
    """[N, 2, 3] matrices that take key points [N, 5, 2] to `target` [5, 2], rotation, one scale and a shift.

    Five equal points have no direction; they are only shifted (scale 1).
    """
    points, wanted = keypoints.astype(np.float64), np.broadcast_to(target.astype(np.float64), keypoints.shape)
    from_mean, to_mean = points.mean(1, keepdims=True), wanted.mean(1, keepdims=True)
    p, d = points - from_mean, wanted - to_mean
    norm = (p**2).sum((1, 2))
    flat = norm < 1e-12
    norm = np.where(flat, 1.0, norm)
    real = np.where(flat, 1.0, (p * d).sum((1, 2)) / norm)
    imaginary = np.where(flat, 0.0, (p[..., 0] * d[..., 1] - p[..., 1] * d[..., 0]).sum(1) / norm)
    linear = np.stack([np.stack([real, -imaginary], 1), np.stack([imaginary, real], 1)], 1)
    shift = to_mean.transpose(0, 2, 1) - linear @ from_mean.transpose(0, 2, 1)
    return np.concatenate([linear, shift], 2)


def template(size: int) -> NDArray[np.float32]:
    """The template for a square crop of `size` pixels; multiples of 128 carry insightface's margin of 8 in 128."""
    if size % 112 == 0:
        return TEMPLATE * np.float32(size / 112)
    if size % 128 == 0:
        return TEMPLATE * np.float32(size / 128) + np.array([8.0 * size / 128, 0], np.float32)
    raise FaceError(f"There is no alignment template for crops of {size} pixels, only for multiples of 112 and 128.")


def invert(matrices: NDArray[np.float64]) -> NDArray[np.float64]:
    """The inverses [N, 2, 3] of affine matrices [N, 2, 3]."""
    linear = np.linalg.inv(matrices[:, :, :2])
    return np.concatenate([linear, -linear @ matrices[:, :, 2:]], 2)


def warp(pixels: Tensor, rows: Tensor, inverse: Tensor, height: int, width: int, repeat_edge: bool = False) -> Tensor:
    """[F, height, width, C] float32: crops by bilinear sampling, integer coordinates on pixels.

    pixels: [n, H, W, C] of any dtype; rows: [F] which picture each crop comes from; inverse: [F, 2, 3] float32 from
    crop to picture. Outside of the picture is black, or its edge repeated. Four gathers, so no picture is copied once
    per face, and strip by strip: an address of eight bytes for each sample of a large crop would fill the memory.
    """
    pixels = pixels.contiguous()  # once, and not for every strip
    lines = max(1, SAMPLES_AT_ONCE // max(1, len(inverse) * width))
    if lines >= height:
        return _strip(pixels, rows, inverse, range(height), width, repeat_edge)
    out = torch.empty(len(inverse), height, width, pixels.shape[-1], device=pixels.device)
    for start in range(0, height, lines):
        strip = range(start, min(start + lines, height))
        out[:, start : start + lines] = _strip(pixels, rows, inverse, strip, width, repeat_edge)
    return out


def _strip(pixels: Tensor, rows: Tensor, inverse: Tensor, lines: range, width: int, repeat_edge: bool) -> Tensor:
    """The `lines` of what `warp` gives."""
    source_height, source_width, channels = pixels.shape[1:]
    y = torch.arange(lines.start, lines.stop, device=pixels.device, dtype=torch.float32)[:, None]
    x = torch.arange(width, device=pixels.device, dtype=torch.float32)
    a = inverse[:, :, :, None, None]
    at = a[:, :, 0] * x + a[:, :, 1] * y + a[:, :, 2]  # [F, 2, lines, width]: x, then y
    near = at.floor()
    part_x, part_y = at.sub_(near)[..., None].unbind(1)
    # Far outside is as good as just outside, and fits an integer.
    near = near.clamp_(-2, max(source_height, source_width) + 1).long()
    # The left and the right, the upper and the lower pixels of every sample at once: launches count on a device.
    xs, ys = torch.stack([near, near + 1]).unbind(2)
    inside_x, inside_y = xs.clamp(0, source_width - 1), ys.clamp(0, source_height - 1)
    inside = (inside_y == ys)[:, None] & (inside_x == xs)
    base = (rows * (source_height * source_width))[:, None, None]
    index = inside_y.mul_(source_width).add_(base)[:, None] + inside_x  # [2, 2, F, lines, width]
    # By `index_select`, which copies pixels whole where indexing takes each of their numbers by itself.
    values = pixels.view(-1, channels).index_select(0, index.view(-1)).view(*index.shape, channels).float()
    if not repeat_edge:
        values.mul_(inside[..., None])
    upper, lower = torch.lerp(values[:, 0], values[:, 1], part_x)
    return torch.lerp(upper, lower, part_y)
