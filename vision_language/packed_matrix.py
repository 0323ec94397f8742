"""Packed weights as kernels read them, whichever layer keeps them: codes of 4 to 8 bits, their scales, and what else there is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class PackedMatrix:
    """A weight is (code + first) * scale + low, or table[code] * scale.

    codes: [outputs, any]; int8, uint8 with two codes to a byte (the lower half first), or float8's bytes as uint8 (`floats`).
    high: what codes of 5 or 6 bits have above the four of `codes`, uint8 [outputs, any], the first codes in the lowest bits.
    scale, low: [outputs / scaled_rows, groups], or [outputs] where `group` is 0 and a row has one scale.
    """

    codes: Tensor
    scale: Tensor
    outputs: int
    inputs: int
    group: int = 0
    high: Tensor | None = None
    low: Tensor | None = None
    table: Tensor | None = None
    first: float = 0.0
    halves: bool = False
    floats: bool = False
    scaled_rows: int = 1

    @property
    def high_bits(self) -> int:
        return 0 if self.high is None else 4 * self.high.shape[1] // self.codes.shape[1]

    @property
    def kind(self) -> tuple[Any, ...]:
        """What one compiled kernel serves."""
        return (
            self.outputs, self.inputs, self.group, self.halves, self.floats, self.scaled_rows, self.first, self.scale.dtype,
            self.high_bits, self.low is not None, self.table is not None,
        )  # fmt: skip

    @property
    def nbytes(self) -> int:
        """What a product reads."""
        return sum(part.nbytes for part in (self.codes, self.high, self.scale, self.low) if part is not None)


def bytes_of(codes: Tensor) -> Tensor:
    """float8 as the bytes that it is."""
    return codes if codes.dtype in (torch.int8, torch.uint8) else codes.view(torch.uint8)
