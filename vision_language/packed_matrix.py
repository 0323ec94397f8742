"""Packed weights as kernels read them, whichever layer keeps them: codes of 2 to 8 bits, their scales, and what else there is."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class PackedMatrix:
    """A weight is (code + first) * scale + low, or table[code] * scale.

    codes: [outputs, any]; int8, float8's bytes as uint8 (`floats`), or the lower 2 or 4 bits (`plane`) of codes side by side in
    uint8, the first ones lowest. high: what is above these, in the same way.
    scale, low: [outputs / scaled_rows, groups], or [outputs] where `group` is 0 and a row has one scale. unit, low_unit:
    [outputs, any], by which they are to be multiplied. No low but a low_unit: it is the upper halves of the bytes of scale.
    """

    codes: Tensor
    scale: Tensor
    outputs: int
    inputs: int
    group: int = 0
    high: Tensor | None = None
    low: Tensor | None = None
    unit: Tensor | None = None
    low_unit: Tensor | None = None
    table: Tensor | None = None
    first: float = 0.0
    plane: int = 8
    floats: bool = False
    scaled_rows: int = 1

    @property
    def high_bits(self) -> int:
        return 0 if self.high is None else self.plane * self.high.shape[1] // self.codes.shape[1]

    @property
    def lows(self) -> int:
        """1 where there are lows, 2 where they are in the bytes of the scales, else 0."""
        return 1 if self.low is not None else 0 if self.low_unit is None else 2

    @property
    def sharing(self) -> int:
        """How many groups share a unit; 0 where there is none."""
        return 0 if self.unit is None else self.scale.shape[1] // self.unit.shape[1]

    @property
    def kind(self) -> tuple[Any, ...]:
        """What one compiled kernel serves."""
        return (
            self.outputs, self.inputs, self.group, self.plane, self.high_bits, self.floats, self.scaled_rows, self.first,
            self.scale.dtype, self.sharing, self.lows, self.table is not None,
        )  # fmt: skip

    def rows(self, start: int, stop: int) -> PackedMatrix:
        """Some outputs of it; start: where its scales begin."""
        scaled, own = slice(start // self.scaled_rows, -(-stop // self.scaled_rows)), slice(start, stop)
        parts: dict[str, Any] = {
            "scale": self.scale[scaled],
            "low": None if self.low is None else self.low[scaled],
            "codes": self.codes[own],
            "high": None if self.high is None else self.high[own],
            "unit": None if self.unit is None else self.unit[own],
            "low_unit": None if self.low_unit is None else self.low_unit[own],
        }
        return replace(self, outputs=stop - start, **parts)

    @property
    def nbytes(self) -> int:
        """What a product reads."""
        return sum(
            part.nbytes
            for part in (self.codes, self.high, self.scale, self.low, self.unit, self.low_unit)
            if part is not None
        )


def bytes_of(codes: Tensor) -> Tensor:
    """float8 as the bytes that it is."""
    return codes if codes.dtype in (torch.int8, torch.uint8) else codes.view(torch.uint8)
