"""cv2.resize with INTER_LINEAR, to the last bit: by torch on any device, and in pieces on all cores of a CPU.

cv2 works with 11-bit weights in integers, first along the rows, and takes the plain average of four for exactly half the
size; so does this, and a face's score does not depend on who shrank its picture.
"""

from __future__ import annotations

import threading
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..host.cores import cores, on_cores

WEIGHT_BITS = 11
WEIGHT_ONE = 1 << WEIGHT_BITS
BLOCK = 1 << 17  # numbers in one step; what a step works with fits a core's second cache

Taps = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int32], NDArray[np.int32]]

_scratch = threading.local()


@lru_cache(maxsize=64)
def _taps(source: int, target: int) -> Taps:
    """Per target pixel of one axis: its two source pixels and their integer weights, as cv2 computes them."""
    step = 1.0 / (target / source)
    at = ((np.arange(target, dtype=np.float64) + 0.5) * step - 0.5).astype(np.float32)
    first = np.floor(at).astype(np.int64)
    part = at - first.astype(np.float32)
    outside = (first < 0) | (first >= source - 1)
    first = first.clip(0, source - 1)
    part[outside] = 0.0
    second = np.minimum(first + 1, source - 1)
    near, far = (np.rint(w * np.float32(WEIGHT_ONE)).astype(np.int32) for w in (np.float32(1) - part, part))
    return first, second, near, far


@lru_cache(maxsize=64)
def _taps_on(source: int, target: int, repeats: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Taps on a device, the weights `repeats` times each. Kept there, because sending them makes the host wait."""
    first, second, near, far = _taps(source, target)
    y0, y1, w0, w1 = (
        torch.from_numpy(v).to(device) for v in (first, second, near.repeat(repeats), far.repeat(repeats))
    )
    return y0, y1, w0, w1


@lru_cache(maxsize=64)
def _taps_of_bytes(source: int, target: int, channels: int) -> Taps:
    """Taps along a row of interleaved channels, per byte."""
    first, second, near, far = _taps(source, target)
    start, end = ((at[:, None] * channels + np.arange(channels)).reshape(-1) for at in (first, second))
    return start, end, near.repeat(channels), far.repeat(channels)


def resize_into(pixels: Tensor, out: Tensor, less: float, per: float) -> None:
    """(resized - less) / per of [n, H, W, C] uint8 into [n, height, width, C] float32, whose rows may lie apart.

    The same to the last bit on every device while `less` is a number of halves and `per` a power of two.
    """
    height, width = out.shape[1:3]
    if pixels.device.type != "cpu" or (height, width) == pixels.shape[1:3] or _halves(pixels, height, width):
        torch.sub(resize(pixels, height, width), less, out=out).div_(per)
    else:
        _resize_on_cores(pixels, out, less, per)


def _halves(pixels: Tensor, height: int, width: int) -> bool:
    return (2 * height, 2 * width) == pixels.shape[1:3]


def resize(pixels: Tensor, height: int, width: int) -> Tensor:
    """[n, H, W, C] uint8 to [n, height, width, C] int32 in 0..255."""
    if (height, width) == pixels.shape[1:3]:
        return pixels.to(torch.int32)
    if _halves(pixels, height, width):
        wide = pixels.to(torch.int32)
        rows = wide[:, 0::2] + wide[:, 1::2]
        return (rows[:, :, 0::2] + rows[:, :, 1::2] + 2) >> 2
    count, channels = pixels.shape[0], pixels.shape[3]
    upper, lower, b0, b1 = _taps_on(pixels.shape[1], height, 1, pixels.device)
    # Rows as one axis of width * channels, and in place: three channels alone are too short a run to be quick.
    left, right, a0, a1 = _taps_on(pixels.shape[2], width, channels, pixels.device)

    def blended(rows: Tensor, weights: Tensor) -> Tensor:
        lines = pixels.index_select(1, rows)
        near, far = (lines.index_select(2, x).view(count, height, -1).to(torch.int32) for x in (left, right))
        # The shifts here, and the rounding after the sum, are cv2's.
        line = near.mul_(a0).add_(far.mul_(a1)).bitwise_right_shift_(4)
        return line.mul_(weights[:, None]).bitwise_right_shift_(16)

    both = blended(upper, b0).add_(blended(lower, b1)).add_(2).bitwise_right_shift_(2)
    return both.view(count, height, width, channels)


def _resize_on_cores(pixels: Tensor, out: Tensor, less: float, per: float) -> None:
    """In pieces of pictures, however many threads torch has been given."""
    height = out.shape[1]
    pieces = min(height, max(1, -(-2 * cores() // max(1, len(pixels)))))
    rows = -(-height // pieces)
    on_cores(
        _resize_rows,
        [
            (picture.numpy(), target.numpy(), start, min(start + rows, height), less, per)
            for picture, target in zip(pixels.contiguous(), out, strict=True)
            for start in range(0, height, rows)
        ],
    )


def _resize_rows(task: tuple[NDArray[np.uint8], NDArray[np.float32], int, int, float, float]) -> None:
    picture, target, begin, end, less, per = task
    height, width, channels = target.shape
    upper, lower, b0, b1 = _taps(picture.shape[0], height)
    left, right, a0, a1 = _taps_of_bytes(picture.shape[1], width, channels)
    source, length = picture.reshape(picture.shape[0], -1), width * channels
    step = max(1, BLOCK // length)
    for start in range(begin, end, step):
        stop = min(start + step, end)
        # Rows that are read at all, each once: an enlarged picture reads every row many times.
        used, where = np.unique(np.stack((upper[start:stop], lower[start:stop])), return_inverse=True)
        where = where.reshape(2, -1)
        taken = source[used]
        room = _room(len(used), length)
        sums = _blend(taken, left, a0, room[0])
        sums += _blend(taken, right, a1, room[1])
        sums >>= 4
        near, far = sums[where[0]], sums[where[1]]
        near *= b0[start:stop, None]
        far *= b1[start:stop, None]
        near >>= 16
        far >>= 16
        near += far
        near += 2
        near >>= 2
        made = target[start:stop]
        np.subtract(near.reshape(made.shape), np.float32(less), out=made, dtype=np.float32, casting="unsafe")
        made /= np.float32(per)


def _blend(
    rows: NDArray[np.uint8], at: NDArray[np.int64], weights: NDArray[np.int32], out: NDArray[np.int32]
) -> NDArray[np.int32]:
    return np.multiply(rows.take(at, axis=1, mode="clip"), weights, out=out, dtype=np.int32, casting="unsafe")


def _room(rows: int, length: int) -> NDArray[np.int32]:
    """[2, rows, length], the same memory every time as long as it is enough."""
    held: NDArray[np.int32] | None = getattr(_scratch, "held", None)
    if held is None or held.size < 2 * rows * length:
        held = _scratch.held = np.empty(2 * rows * length, np.int32)
    return held[: 2 * rows * length].reshape(2, rows, length)
