"""Pictures as the networks take them: 8-bit RGB, grouped by size, and letterboxed exactly as the reference does.

The reference packs truncate floats to bytes and shrink with cv2's INTER_LINEAR, which works with 11-bit weights in
integers. `letterbox` computes those integers, so a score does not depend on who resized.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .eight_bits import host_memory, truncate
from .faces import FaceError

WEIGHT_BITS = 11
WEIGHT_ONE = 1 << WEIGHT_BITS


@dataclass(frozen=True)
class PictureGroup:
    """Pictures of one size."""

    pixels: Tensor  # [n, H, W, 3] uint8 RGB
    positions: tuple[int, ...]  # where each stood in the call

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def size(self) -> tuple[int, int]:
        return int(self.pixels.shape[1]), int(self.pixels.shape[2])

    def take(self, rows: Sequence[int]) -> PictureGroup:
        """Some of the pictures; without a copy when it is all of them or a run of them."""
        rows = list(rows)
        if rows == list(range(rows[0], rows[0] + len(rows))):
            pixels = self.pixels[rows[0] : rows[0] + len(rows)]
        else:
            pixels = self.pixels[torch.tensor(rows).to(self.pixels.device, non_blocking=True)]
        return PictureGroup(pixels, tuple(self.positions[r] for r in rows))

    def to(self, device: torch.device) -> PictureGroup:
        return PictureGroup(self.pixels.to(device, non_blocking=True), self.positions)


def group_pictures(images: Tensor | Sequence[Tensor], device: torch.device | None = None) -> list[PictureGroup]:
    """8-bit pictures by size, from [B, H, W, C] or a list of [H, W, C]: uint8, or float in 0..1; C of 1, 3 or 4.

    Floats are truncated (x * 255, clamped, floor), a missing axis of a single picture is added, grey is repeated and
    alpha dropped. Pictures on the CPU stay there; what is made of them can be copied to `device` at once. Raises
    FaceError for no pictures, pictures without pixels, other shapes, and NaN.
    """
    if isinstance(images, Tensor):
        batch = images[None] if images.dim() == 3 else images
        if batch.dim() == 4 and batch.shape[0] > 0:
            return [PictureGroup(_to_bytes(batch, range(len(batch)), device), tuple(range(len(batch))))]
        if batch.dim() != 4:
            raise FaceError(f"Pictures are a tensor of [B, H, W, C], not of {list(images.shape)}.")
    if len(images) == 0:
        raise FaceError("There are no pictures to look for faces in: the image batch is empty.")
    alike: dict[tuple[Any, ...], list[int]] = {}
    pictures: list[Tensor] = []
    for position, picture in enumerate(images):
        if picture.dim() == 4 and picture.shape[0] == 1:
            picture = picture[0]
        if picture.dim() != 3:
            raise FaceError(f"Picture {position} has the shape {list(picture.shape)} where [H, W, C] is needed.")
        pictures.append(picture)
        alike.setdefault((*picture.shape[:2], picture.device), []).append(position)
    return [
        PictureGroup(_to_bytes([pictures[p] for p in positions], positions, device), tuple(positions))
        for positions in alike.values()
    ]


def _to_bytes(pictures: Tensor | Sequence[Tensor], positions: Sequence[int], device: torch.device | None) -> Tensor:
    """[n, H, W, 3] uint8 of pictures [H, W, C] of one size on one device."""
    for position, picture in zip(positions, pictures, strict=True):
        height, width, channels = picture.shape
        if height < 1 or width < 1:
            raise FaceError(f"Picture {position} has no pixels ({width} x {height}).")
        if channels not in (1, 3, 4):
            raise FaceError(
                f"Picture {position} has {channels} channels; grey (1), RGB (3) and RGBA (4) can be looked at."
            )
    if not isinstance(pictures, Tensor) and len({(picture.shape[-1], picture.dtype) for picture in pictures}) > 1:
        return torch.cat([_to_bytes([one], [at], None) for one, at in zip(pictures, positions, strict=True)])
    rgb = [picture.detach()[..., :3] for picture in pictures]
    broken = None
    if rgb[0].dtype == torch.uint8:
        made = pictures.detach()[..., :3] if isinstance(pictures, Tensor) else torch.stack(rgb)
    elif rgb[0].device.type == "cpu":
        made = host_memory((len(rgb), *rgb[0].shape), device)
        broken = truncate(rgb, list(made))
    else:
        # One pass over the pixels: a sum is NaN or infinite as soon as one pixel is.
        finite = torch.isfinite(torch.stack([picture.float().sum() for picture in rgb])).tolist()
        broken = finite.index(False) if False in finite else None
        made = torch.stack([picture.float().mul(255.0).clamp_(0, 255).to(torch.uint8) for picture in rgb])
    if broken is not None:
        raise FaceError(
            f"Picture {positions[broken]} holds NaN or infinity, so it cannot be looked at; check what made it."
        )
    return made.expand(*made.shape[:3], 3)


def in_float(pictures: Tensor) -> Tensor:
    """Pictures of any dtype as float32 in 0..1; bytes are taken as 0..255."""
    return pictures.float().div_(255.0) if pictures.dtype == torch.uint8 else pictures.float()


@dataclass(frozen=True)
class Placement:
    """Where a picture lies in its canvas: top left, `height` x `width`; canvas pixels per picture pixel is `scale`."""

    height: int
    width: int
    scale: float


def placement(size: tuple[int, int], canvas: tuple[int, int]) -> Placement:
    """The largest fit of a picture (height, width) in the canvas (height, width), sides truncated to whole pixels."""
    ratio = size[0] / size[1]
    if ratio > canvas[0] / canvas[1]:
        height, width = canvas[0], int(canvas[0] / ratio)
    else:
        height, width = int(canvas[1] * ratio), canvas[1]
    # The reference fails on pictures so narrow that a side becomes 0; one pixel is the least that can hold anything.
    height, width = max(height, 1), max(width, 1)
    return Placement(height, width, height / size[0])


@lru_cache(maxsize=64)
def _taps(source: int, target: int, repeats: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Per target pixel of one axis: its two source pixels [target] and their integer weights [target * repeats], as cv2
    computes them.

    Kept on the device, because sending them there makes the host wait.
    """
    step = 1.0 / (target / source)
    at = ((np.arange(target, dtype=np.float64) + 0.5) * step - 0.5).astype(np.float32)
    first = np.floor(at).astype(np.int64)
    part = at - first.astype(np.float32)
    outside = (first < 0) | (first >= source - 1)
    first = first.clip(0, source - 1)
    part[outside] = 0.0
    second = np.minimum(first + 1, source - 1)
    weights = [np.rint(w * np.float32(WEIGHT_ONE)).astype(np.int32) for w in (np.float32(1) - part, part)]
    y0, y1, w0, w1 = (torch.from_numpy(v).to(device) for v in (first, second, *(w.repeat(repeats) for w in weights)))
    return y0, y1, w0, w1


def resize(pixels: Tensor, height: int, width: int) -> Tensor:
    """[n, H, W, 3] uint8 to [n, height, width, 3] int32 in 0..255, as cv2.resize with INTER_LINEAR does."""
    if (height, width) == tuple(pixels.shape[1:3]):
        return pixels.to(torch.int32)
    if (2 * height, 2 * width) == tuple(pixels.shape[1:3]):
        # cv2 takes the plain average of four for exactly half the size.
        wide = pixels.to(torch.int32)
        rows = wide[:, 0::2] + wide[:, 1::2]
        return (rows[:, :, 0::2] + rows[:, :, 1::2] + 2) >> 2
    count, channels = pixels.shape[0], pixels.shape[3]
    upper, lower, b0, b1 = _taps(pixels.shape[1], height, 1, pixels.device)
    # Rows as one axis of width * channels, and in place: three channels alone are too short a run to be quick.
    left, right, a0, a1 = _taps(pixels.shape[2], width, channels, pixels.device)

    def blended(rows: Tensor, weights: Tensor) -> Tensor:
        lines = pixels.index_select(1, rows)
        near, far = (lines.index_select(2, x).view(count, height, -1).to(torch.int32) for x in (left, right))
        # The shifts here, and the rounding after the sum, are cv2's.
        line = near.mul_(a0).add_(far.mul_(a1)).bitwise_right_shift_(4)
        return line.mul_(weights[:, None]).bitwise_right_shift_(16)

    both = blended(upper, b0).add_(blended(lower, b1)).add_(2).bitwise_right_shift_(2)
    return both.view(count, height, width, channels)


def letterbox(pixels: Tensor, canvas: tuple[int, int]) -> tuple[Tensor, Placement]:
    """[n, H, W, 3] uint8 to the detector's input [n, 3, h, w] float32, (x - 127.5) / 128, padded with black."""
    place = placement((int(pixels.shape[1]), int(pixels.shape[2])), canvas)
    small = resize(pixels, place.height, place.width)
    made = torch.full((len(pixels), *canvas, 3), -127.5 / 128.0, device=pixels.device)
    # Exact in any order: a whole number and a half, and a power of two.
    torch.sub(small, 127.5, out=made[:, : place.height, : place.width]).div_(128.0)
    return made.permute(0, 3, 1, 2), place
