"""How many frames go through a network together, from what the device has free.

Bytes per pixel are peaks of live tensors, counted while the full-width networks ran in float32 and bfloat16.
"""

from __future__ import annotations

import torch

from .. import host
from .colormnet.network import PATCH

COLORMNET_BYTES = 1000  # per padded pixel and frame in the key encoder, float32
COLORMNET_HALF_BYTES = 700
DEEP_EXEMPLAR_BYTES = 800  # per pixel and frame in VGG and correspondence, always float32
COLOR_NET_BYTES = 2200  # per pixel, once: the recurrent network sees one frame

MOST = {"low_memory": 1, "balanced": 8, "high_quality": 8}  # frames by memory mode
# Beyond this a larger batch fills no further multiprocessor, and only crowds out other models.
BUDGET = 4 << 30
CPU_BUDGET = 1 << 30


def colormnet_batch(
    height: int, width: int, dtype: torch.dtype, device: torch.device, mode: str = "balanced"
) -> tuple[int, int]:
    """Frames per batch, and the bytes of activations to make room for."""
    pixels = (height + -height % PATCH) * (width + -width % PATCH)
    per_frame = pixels * (COLORMNET_BYTES if dtype == torch.float32 else COLORMNET_HALF_BYTES)
    return _fitting(per_frame, 0, device, MOST[mode])


def deep_exemplar_batch(height: int, width: int, device: torch.device) -> tuple[int, int]:
    """The same for Deep Exemplar."""
    pixels = height * width
    return _fitting(pixels * DEEP_EXEMPLAR_BYTES, pixels * COLOR_NET_BYTES, device, MOST["balanced"])


def _fitting(per_frame: int, fixed: int, device: torch.device, most: int) -> tuple[int, int]:
    here = host.current()
    budget = min(CPU_BUDGET if device.type == "cpu" else BUDGET, here.free_memory(device) // 2) - fixed
    batch = max(1, min(most, budget // max(per_frame, 1)))
    return batch, batch * per_frame + fixed
