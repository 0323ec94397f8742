"""Waiting for a device, where a time is taken, a result is needed or memory is read, and what torch keeps of its memory."""

from __future__ import annotations

import torch


def wait_for(device: torch.device) -> None:
    """Return when `device` has done what it was given. What it was given on the CPU is done already."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    elif device.type == "xpu":
        torch.xpu.synchronize(device)


def copies_at_once(device: torch.device) -> bool:
    """Whether a copy to `device` without waiting has read ordinary memory when it returns: CUDA's, and ROCm's, has.

    There, waiting would be for everything that runs on the device. Elsewhere (Metal, Intel's cards) the copy may read memory
    that is free again by then (pytorch 189690, torch-xpu-ops 5217).
    """
    return device.type == "cuda"


def give_back_cached(device: torch.device) -> None:
    """Give back the memory of `device` that torch keeps for tensors to come."""
    if device.type == "cuda":
        # Of every card, but up to 2.14 torch waits for the current one alone before it unmaps segments (pytorch 196258).
        for index in range(torch.cuda.device_count()):
            if torch.cuda.memory_reserved(index):
                torch.cuda.synchronize(index)
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()
    elif device.type == "xpu":
        torch.xpu.empty_cache()
