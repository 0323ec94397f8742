"""How Deep Exemplar's own programs bring a picture to a size: cover, crop, 8 bits, exactly as scikit-image does.

Only the compatible nodes need it; our own nodes never crop.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

TOGETHER = 16  # outputs of one product: fewer are many small ones, more multiply with zeros
ROUNDING = 1e-9


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
    exact = pictures if pictures.device.type != "mps" else pictures.cpu()
    resized = _along_rows(exact, products(rows, size[0], top, height, exact.device))
    resized = _along_rows(resized.transpose(-1, -2), products(columns, size[1], left, width, exact.device))
    # What a blur's rounding leaves under a whole number is that number: flat areas must not lose a level here and there.
    rounding = ROUNDING if size[0] < rows else 0.0
    return (resized.transpose(-1, -2) + rounding).clamp(0, 255).floor().to(pictures)


def _along_rows(pictures: Tensor, parts: Sequence[Product]) -> Tensor:
    """[..., inputs, W] to float64 [..., outputs, W]."""
    return torch.cat([part.matrix @ pictures[..., part.inputs, :].double() for part in parts], dim=-2)


@dataclass(frozen=True)
class Product:
    """Some neighbouring outputs: matrix [outputs, inputs] float64 times the neighbouring inputs that they are made of."""

    inputs: slice
    matrix: Tensor


@functools.lru_cache(maxsize=8)
def products(inputs: int, outputs: int, first: int, count: int, device: torch.device) -> tuple[Product, ...]:
    """Outputs first..first + count - 1 of an axis that is brought from `inputs` to `outputs` pixels."""
    index, weight = (x[first : first + count] for x in taps(inputs, outputs))
    parts: list[Product] = []
    for near, share in zip(index.split(TOGETHER), weight.split(TOGETHER), strict=True):
        lowest, highest = int(near.min()), int(near.max())
        matrix = torch.zeros(len(near), highest + 1 - lowest, dtype=torch.float64)
        matrix.scatter_add_(1, near - lowest, share)
        parts.append(Product(slice(lowest, highest + 1), matrix.to(device)))
    return tuple(parts)


def taps(inputs: int, outputs: int) -> tuple[Tensor, Tensor]:
    """Which inputs make each output, and how much each counts, [outputs, taps] and float64: scikit-image's `resize` along
    one axis (order 1, anti-aliasing, mode "reflect").

    A Gaussian of (inputs / outputs - 1) / 2 pixels when it shrinks, cut at four sigma, then linear interpolation
    between pixel centres; both mirror the picture about its border pixels' centres.
    """
    centre = (torch.arange(outputs, dtype=torch.float64) + 0.5) * (inputs / outputs) - 0.5
    low = centre.floor().long()
    share = (centre - low)[:, None]
    between = torch.stack((_mirrored(low, inputs), _mirrored(low + 1, inputs)), dim=1)
    shares = torch.cat((1 - share, share), dim=1)
    sigma = max(0.0, (inputs / outputs - 1) / 2)
    if sigma < 1e-15:
        return between, shares
    radius = int(4 * sigma + 0.5)
    distance = torch.arange(-radius, radius + 1)
    blur = torch.exp(-0.5 * (distance / sigma).double() ** 2)
    blur /= blur.sum()
    index = _mirrored(between[:, :, None] + distance, inputs)
    return index.flatten(1), (shares[:, :, None] * blur).flatten(1)


def _mirrored(index: Tensor, length: int) -> Tensor:
    """Indices outside 0..length-1 mirrored about the first and the last, which are not repeated."""
    if length == 1:
        return torch.zeros_like(index)
    period = 2 * (length - 1)
    folded = index.remainder(period)
    return torch.where(folded < length, folded, period - folded)
