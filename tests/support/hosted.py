"""What hosts are given in tests: files of a kind of its own, and a small network."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

KIND = "hotpath_test_kind"


def touch(path: Path, content: bytes = b"x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


class Network(nn.Module):
    """A parameter of its own beside sub-modules, and a buffer: what memory management likes to leave behind."""

    def __init__(self) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.ones(1, 3), requires_grad=False)
        self.linear = nn.Linear(3, 2).requires_grad_(False)
        self.register_buffer("mean", torch.ones(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x + self.latents) - self.mean
