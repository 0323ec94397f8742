"""Convolutions on Metal, whose weights torch reads there as if they lay in its plain order, whatever theirs is.

That is so from macOS 15 on, until pytorch 192303 (August 2026), and what comes out looks like a result.
"""

from __future__ import annotations

import torch
from torch import Tensor


def order_on(device: torch.device) -> torch.memory_format:
    """How the pictures and weights of a network lie in memory where it computes on `device`."""
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


def readable(weight: Tensor) -> Tensor:
    """`weight`, a part of another tensor, for a convolution on its device. Elsewhere libraries copy it as they like it."""
    return weight.contiguous() if weight.device.type == "mps" else weight
