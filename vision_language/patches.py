"""From the pixels of a picture to the patches that the tower reads, on the card: 8 bits are sent, not 32 for each frame.

The library's image processor makes float patches on one thread of the host, twice as many as there are pixels, and they
have to be copied to the card. Here the host only resizes, as the library does; the card looks every 8-bit value up in a
table that the library's own normalisation filled, so the patches are the library's to the last bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

KNOWN = ("Qwen2VLImageProcessor", "Qwen2VLImageProcessorFast")
BICUBIC = 3
VALUES = 256


def serves(worker: Any, device: torch.device) -> bool:
    """Whether the card makes the patches of `worker`, an image processor, whose steps are those that are known here."""
    return (
        device.type == "cuda"
        and type(worker).__name__ in KNOWN
        and hasattr(worker, "rescale_and_normalize")
        and bool(worker.do_resize and worker.do_rescale and worker.do_normalize)
        and int(worker.resample) == BICUBIC
    )


def resized(worker: Any, pixels: NDArray[np.uint8], size: Sequence[int]) -> Tensor:
    """[3, H, W] uint8 of the size that the processor gives a picture [H, W, 3] within `size`, its pixel limits."""
    from torchvision.transforms.v2 import functional as vision
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    factor = int(worker.patch_size) * int(worker.merge_size)
    height, width = smart_resize(*pixels.shape[:2], factor, int(size[0]), int(size[1]))
    picture = torch.from_numpy(pixels if pixels.flags.writeable else pixels.copy()).permute(2, 0, 1)
    if (height, width) == tuple(picture.shape[1:]):
        return picture
    return vision.resize(
        picture.contiguous(), [height, width], interpolation=vision.InterpolationMode.BICUBIC, antialias=True
    )


def grid_of(worker: Any, picture: Tensor) -> tuple[int, int, int]:
    side = int(worker.patch_size)
    return 1, picture.shape[1] // side, picture.shape[2] // side


def values(worker: Any) -> Tensor:
    """[3, 256] float32: what the library makes of every 8-bit value in every channel."""
    every = torch.arange(VALUES, dtype=torch.uint8).expand(1, 3, 1, VALUES).contiguous()
    # Looked up by them, in what the library remembers; some releases have read them as lists.
    mean, std = (tuple(read) if isinstance(read, list) else read for read in (worker.image_mean, worker.image_std))
    made: Tensor = worker.rescale_and_normalize(every, True, worker.rescale_factor, True, mean, std)
    return made[0, :, 0].float()


def patches(worker: Any, picture: Tensor, table: Tensor) -> Tensor:
    """[patches, channels * frames * side * side] of a picture [3, H, W] uint8, in the dtype of `table` [3, 256].

    The order is the processor's: patches that one visual token merges stand together, and a picture is every frame.
    """
    side, merge, frames = int(worker.patch_size), int(worker.merge_size), int(worker.temporal_patch_size)
    channels, height, width = picture.shape
    down, across = height // side, width // side
    cut = picture.reshape(channels, down // merge, merge, side, across // merge, merge, side)
    cut = cut.permute(1, 4, 2, 5, 0, 3, 6).reshape(down * across, channels, side * side)
    places = cut.int() + torch.arange(0, channels * VALUES, VALUES, dtype=torch.int, device=picture.device).view(-1, 1)
    made = table.reshape(-1).index_select(0, places.reshape(-1)).view(down * across, channels, 1, side * side)
    return made.expand(-1, -1, frames, -1).reshape(down * across, -1)
