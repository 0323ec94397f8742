"""How much the device that networks compute on holds."""

from __future__ import annotations

import torch


def memory_of(device: torch.device) -> int | None:
    """Bytes that a device has in all; None where nobody knows."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    return torch.cuda.mem_get_info(device)[1]
