"""How Deep Exemplar's own programs bring a picture to a size: cover, crop, 8 bits, exactly as scikit-image does.

Only the compatible nodes need it; our own nodes never crop.
"""

from __future__ import annotations

import torch
from torch import Tensor


def cover_and_crop(pictures: Tensor, height: int, width: int) -> Tensor:
    """pictures: [T, 3, H, W] whole numbers in 0..255 as float. Scaled to cover height x width, cut from the middle,
    truncated to whole numbers. Pictures of the right size come back as they are.
    """
    rows, columns = pictures.shape[-2:]
    if (rows, columns) == (height, width):
        return pictures
    if rows / columns == height / width and rows == height:
        return pictures
    scale = (width, columns) if rows / columns > height / width else (height, rows)
    size = int(rows * scale[0] / scale[1]), int(columns * scale[0] / scale[1])
    # Rounding may leave the other side a pixel short of what is cut out.
    size = max(size[0], height), max(size[1], width)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    # MPS has no float64, and whole numbers must come out whole before they are truncated.
    exact = pictures.double() if pictures.device.type != "mps" else pictures.cpu().double()
    down = resampling_matrix(rows, size[0])[top : top + height].to(exact.device)
    across = resampling_matrix(columns, size[1])[left : left + width].to(exact.device)
    resized = down @ exact @ across.T
    return resized.clamp(0, 255).floor().to(pictures)


def resampling_matrix(inputs: int, outputs: int) -> Tensor:
    """[outputs, inputs] float64: scikit-image's `resize` along one axis (order 1, anti-aliasing, mode "reflect").

    A Gaussian of (inputs / outputs - 1) / 2 pixels when it shrinks, cut at four sigma, then linear interpolation
    between pixel centres; both mirror the picture about its border pixels' centres.
    """
    identity = torch.eye(inputs, dtype=torch.float64)
    centre = (torch.arange(outputs, dtype=torch.float64) + 0.5) * (inputs / outputs) - 0.5
    low = centre.floor().long()
    share = centre - low
    interpolation = identity[_mirrored(low, inputs)] * (1 - share)[:, None]
    interpolation += identity[_mirrored(low + 1, inputs)] * share[:, None]
    sigma = max(0.0, (inputs / outputs - 1) / 2)
    if sigma < 1e-15:
        return interpolation
    radius = int(4 * sigma + 0.5)
    distance = torch.arange(-radius, radius + 1)
    weights = torch.exp(-0.5 * (distance / sigma).double() ** 2)
    weights /= weights.sum()
    blur = torch.zeros(inputs, inputs, dtype=torch.float64)
    for offset, weight in zip(distance.tolist(), weights.tolist(), strict=True):
        blur += weight * identity[_mirrored(torch.arange(inputs) + offset, inputs)]
    return interpolation @ blur


def _mirrored(index: Tensor, length: int) -> Tensor:
    """Indices outside 0..length-1 mirrored about the first and the last, which are not repeated."""
    if length == 1:
        return torch.zeros_like(index)
    period = 2 * (length - 1)
    folded = index.remainder(period)
    return torch.where(folded < length, folded, period - folded)
