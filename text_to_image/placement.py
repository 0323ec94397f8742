"""The device that networks compute on: how much it holds, and making it the current one."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def memory_of(device: torch.device) -> int | None:
    """Bytes that a device has in all; None where nobody knows."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    return torch.cuda.mem_get_info(device)[1]


def current(device: torch.device) -> AbstractContextManager[Any]:
    """`device` as the current one, which kernels that are called without a tensor's device run on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
