"""Pictures as they come in: any channel count, any float mess, any size; and how they are brought to another size."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..host.picture_files import upright

log = logging.getLogger("hotpath.colorization")

_without_antialias: set[str] = set()  # types of devices

GREY_CHROMA = 2.0  # mean |ab| of a reference under which it has no colours to give


def as_frames(images: Tensor, name: str) -> Tensor:
    """ComfyUI's IMAGE as [T, H, W, 3] in 0..1; `name` is the input's, for errors.

    Takes [H, W, C] and [T, H, W, C] with 1, 3 or 4 channels, float or uint8. Alpha is dropped.
    """
    if images.ndim == 3:
        images = images[None]
    if images.ndim != 4 or images.shape[-1] not in (1, 3, 4):
        raise ValueError(
            f"{name} must be pictures of shape [frames, height, width, 1, 3 or 4], not {tuple(images.shape)}."
        )
    if 0 in images.shape:
        raise ValueError(f"There is nothing in {name}: {tuple(images.shape)}. Connect at least one picture.")
    if images.shape[-1] == 1:
        images = images.expand(*images.shape[:-1], 3)
    return images[..., :3]


def to_channels_first(frames: Tensor, device: torch.device) -> Tensor:
    """[T, H, W, 3], float in 0..1 or uint8, to float [T, 3, H, W] in 0..1 on `device`; NaN becomes black."""
    moved = frames.to(device)
    if moved.dtype == torch.uint8:
        return moved.permute(0, 3, 1, 2).float() / 255
    return moved.permute(0, 3, 1, 2).float().nan_to_num(0.0, 1.0, 0.0).clamp(0, 1)


def resized(pictures: Tensor, height: int, width: int, antialias: bool = True) -> Tensor:
    """Bilinear, [T, C, H, W] to height x width; pictures of that size come back as they are.

    Where torch cannot antialias on a device (MPS in older releases), the CPU does it.
    """
    if tuple(pictures.shape[-2:]) == (height, width):
        return pictures
    device = pictures.device
    if antialias and device.type in _without_antialias:
        pictures = pictures.cpu()
    try:
        return F.interpolate(pictures, (height, width), mode="bilinear", align_corners=False, antialias=antialias).to(
            device
        )
    except NotImplementedError:
        if not antialias or device.type in _without_antialias:
            raise
        _without_antialias.add(device.type)
        log.info("antialiased resizing runs on the CPU: this torch has none for %s", device.type)
    return resized(pictures, height, width)


def network_size(height: int, width: int, short_side: int) -> tuple[int, int]:
    """height x width scaled to a short side of `short_side`, even, never enlarged; 0 leaves it as it is."""
    shorter = min(height, width)
    if short_side <= 0 or shorter <= short_side:
        return height, width
    scale = short_side / shorter
    return max(2, round(height * scale / 2) * 2), max(2, round(width * scale / 2) * 2)


def is_grey(lab: Tensor) -> bool:
    """Whether a Lab picture [3, H, W] has next to no colour."""
    return bool(lab[1:].abs().mean() < GREY_CHROMA)


def from_pil(image: Any) -> Tensor:
    """A PIL image, upright and without alpha, as float [H, W, 3] in 0..1."""
    return torch.from_numpy(np.array(upright(image).convert("RGB"))).float() / 255
