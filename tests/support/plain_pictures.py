"""Pictures of one colour, and of noise."""

from __future__ import annotations

import torch


def noise(seed: int, height: int = 40, width: int = 48) -> torch.Tensor:
    return torch.rand(height, width, 3, generator=torch.Generator().manual_seed(seed))


def flat(value: float, height: int = 24, width: int = 20) -> torch.Tensor:
    return torch.full((height, width, 3), value)
