"""Float pictures to bytes, in pieces that stay in a core's cache, on all cores.

Whole-picture operations of torch read and write fresh memory three times; on a card that takes longer than both networks.
Threads of our own do it, however many torch has been given.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..host import pinned_memory
from ..host.cores import cores, on_cores

BLOCK = 1 << 18  # floats; with the bytes they become they fit a core's second cache
MOST_PINNED = 256 << 20  # bytes of one call; torch keeps pinned memory and gives it out again

_scratch = threading.local()


def host_memory(shape: Sequence[int], device: torch.device | None) -> Tensor:
    """uint8 on the CPU, where it can be copied to `device` while others work."""
    size = tuple(shape)
    if device is not None and device.type == "cuda" and np.prod(size, dtype=np.int64) <= MOST_PINNED:
        return pinned_memory.empty(size, torch.uint8)
    return torch.empty(size, dtype=torch.uint8)


def truncate(pictures: Sequence[Tensor], out: Sequence[Tensor]) -> int | None:
    """x * 255, clamped to 0..255 and truncated, of float `pictures` into contiguous uint8 `out` of their shapes, on the CPU.

    Returns which picture holds NaN or infinity, the first of them, or None; `out` is then not whole.
    """
    tasks: list[tuple[int, Tensor, Tensor]] = []
    share = -(-sum(picture.numel() for picture in pictures) // (2 * cores()))
    length = max(1, -(-share // BLOCK)) * BLOCK
    for number, (picture, target) in enumerate(zip(pictures, out, strict=True)):
        flat = picture.detach().to(torch.float32).contiguous().reshape(-1)
        tasks += [(number, *pair) for pair in zip(flat.split(length), target.view(-1).split(length), strict=True)]
    whole = on_cores(_truncate, tasks)
    return min((task[0] for task, fine in zip(tasks, whole, strict=True) if not fine), default=None)


def _truncate(task: tuple[int, Tensor, Tensor]) -> bool:
    """False when there is NaN or infinity."""
    source: NDArray[np.float32] = task[1].numpy()
    target: NDArray[np.uint8] = task[2].numpy()
    room = getattr(_scratch, "room", None)
    if room is None:
        room = _scratch.room = np.empty(BLOCK, np.float32)
    with np.errstate(all="ignore"):
        for start in range(0, len(source), BLOCK):
            given = source[start : start + BLOCK]
            scaled = np.multiply(given, np.float32(255), out=room[: len(given)])
            # Pictures seldom leave 0..255; NaN is neither above nor below.
            if not (np.minimum.reduce(scaled) >= 0 and np.maximum.reduce(scaled) <= 255):
                if not np.isfinite(given).all():
                    return False
                np.clip(scaled, 0, 255, out=scaled)
            np.copyto(target[start : start + BLOCK], scaled, casting="unsafe")
    return True
