"""An attention mask at the resolution of each block, for the frames of each call; resized once per shape."""

from __future__ import annotations

import math
import threading

import torch
import torch.nn.functional as F
from torch import Tensor

from ..identity.blocks import Block
from .model_call import ModelCall

COARSE = {"input": {4: 2, 5: 2}, "output": {3: 2, 4: 2, 5: 2}}  # the other blocks see a quarter of the latent
MAX_SHAPES = 64  # a run uses a handful: resolutions of the UNet times window positions


def read_mask(mask: Tensor | None) -> Tensor | None:
    """A MASK input as [M, H, W] float; [H, W], [M, 1, H, W], [M, H, W, 1] and booleans are understood.

    Raises ValueError for another shape, no pixels, and values that are not finite, which would give black pictures.
    """
    if mask is None:
        return None
    found = list(mask.shape)
    if mask.ndim == 4 and 1 in (mask.shape[1], mask.shape[3]):
        mask = mask.squeeze(1 if mask.shape[1] == 1 else 3)
    elif mask.ndim == 2:
        mask = mask[None]
    if mask.ndim != 3 or mask.numel() == 0:
        raise ValueError(f"The mask is a tensor of {found} where [pictures, height, width] is needed; connect a MASK.")
    mask = mask if mask.is_floating_point() else mask.float()
    if not torch.isfinite(mask).all():
        raise ValueError("The mask holds values that are not finite (NaN); make it anew.")
    return mask


def fit_batch(source: Tensor, size: int) -> Tensor:
    """`source` with `size` rows: the last one repeated, or the first ones kept."""
    if source.shape[0] < size:
        return torch.cat((source, source[-1:].expand(size - source.shape[0], *source.shape[1:])))
    return source[:size]


def block_length(block: Block, height: int, width: int) -> int:
    """Queries of an SDXL block for a latent of height x width. Packs that scale inside the UNet change it."""
    scale = COARSE.get(block[0], {}).get(block[1], 4)
    return math.ceil(height / scale) * math.ceil(width / scale)


class AttentionMask:
    """A mask [M, H, W] in 0..1, asked for per block. Keeps what it made until `drop_copies`."""

    def __init__(self, mask: Tensor) -> None:
        if mask.ndim == 2:
            mask = mask[None]
        self._mask = mask.detach().float().cpu()
        self._made: dict[tuple[object, ...], Tensor] = {}
        self._lock = threading.Lock()

    def at(self, call: ModelCall, length: int) -> Tensor:
        """[B, length] float32 for a block of `length` queries in `call`."""
        chunk = call.batch // len(call.roles)
        key = (call.height, call.width, length, chunk, len(call.roles), call.window, call.device)
        with self._lock:
            made = self._made.get(key)
            if made is None:
                if len(self._made) >= MAX_SHAPES:
                    self._made.clear()
                made = self._make(call, chunk, length).to(call.device).repeat(len(call.roles), 1)
                self._made[key] = made
        return made

    def _make(self, call: ModelCall, chunk: int, length: int) -> Tensor:
        mask = self._mask
        if mask.shape[0] > 1 and call.window is not None and call.full_length is not None:
            mask = fit_batch(mask, call.full_length)[list(call.window)]
        # The block's own height is not known here: it follows from the aspect ratio, rounded up when uneven.
        height = max(1, int(call.height / math.sqrt(call.height * call.width / length)))
        height += int(length % height != 0)
        width = max(1, length // height)
        mask = F.interpolate(mask[:, None], size=(height, width), mode="bilinear")[:, 0]
        mask = fit_batch(mask, chunk).flatten(1)
        # Extreme aspect ratios round to another number of tokens.
        missing = length - mask.shape[1]
        if missing > 0:
            mask = F.pad(mask, (missing // 2, missing - missing // 2))
        elif missing < 0:
            start = -missing // 2
            mask = mask[:, start : start + length]
        return mask

    def __deepcopy__(self, _: dict[int, object]) -> AttentionMask:
        """Itself: other packs copy the options of a MODEL deeply, and a lock cannot be copied."""
        return self

    def drop_copies(self) -> None:
        with self._lock:
            self._made.clear()
