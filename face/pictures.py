"""Pictures as the networks take them: 8-bit RGB, grouped by size, and letterboxed exactly as the reference does.

The reference packs truncate floats to bytes and shrink with cv2, which `linear_resize` computes to the last bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..host.device_work import copies_at_once
from .eight_bits import host_memory, truncate
from .faces import FaceError
from .linear_resize import resize_into

MEAN, SCALE = 127.5, 128.0  # of the detector's input


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
        rows, device = list(rows), self.pixels.device
        if rows == list(range(rows[0], rows[0] + len(rows))):
            pixels = self.pixels[rows[0] : rows[0] + len(rows)]
        else:
            pixels = self.pixels[torch.tensor(rows).to(device, non_blocking=copies_at_once(device))]
        return PictureGroup(pixels, tuple(self.positions[r] for r in rows))

    def to(self, device: torch.device) -> PictureGroup:
        # From a card to the CPU nobody would wait for what is copied.
        return PictureGroup(self.pixels.to(device, non_blocking=copies_at_once(device)), self.positions)


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


def letterbox(pixels: Tensor, canvas: tuple[int, int]) -> tuple[Tensor, Placement]:
    """[n, H, W, 3] uint8 to the detector's input [n, 3, h, w] float32, (x - 127.5) / 128, padded with black."""
    place = placement((int(pixels.shape[1]), int(pixels.shape[2])), canvas)
    made = torch.empty((len(pixels), *canvas, 3), device=pixels.device)
    made[:, place.height :] = made[:, :, place.width :] = (0 - MEAN) / SCALE
    resize_into(pixels, made[:, : place.height, : place.width], MEAN, SCALE)
    return made.permute(0, 3, 1, 2), place
