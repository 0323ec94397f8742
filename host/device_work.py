"""Waiting for a device, where a time is taken or a result is needed, and what torch keeps of its memory."""

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


def give_back_cached(device: torch.device) -> None:
    """Give back the memory of `device` that torch keeps for tensors to come."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()
    elif device.type == "xpu":
        torch.xpu.empty_cache()
