"""Packed weights as kernels read them, whichever layer keeps them: codes of 2 to 8 bits, their scales, and what else there is."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

PLAIN = 16  # as `plane`: weights that are numbers as they lie


class PackedMatrix(NamedTuple):
    """A weight is (code + first) * scale + low, or table[code] * scale; or `word` weights at a time are a word of a book.

    codes: [outputs, any]; int8, float8's bytes as uint8 (`floats`), or the lower 2 or 4 bits (`plane`) of codes side by side in
    uint8, the first ones lowest. high: what is above these, in the same way.
    Of words: codes, the lower 8 bits of places in the book (`table`, [words, word] int8), high, what is above these, and where
    words are `moved`, whether by 1 down or up; signs: [outputs, inputs / 8] uint8, a bit for each weight that is negative; scale:
    [outputs, groups / 2] uint8, the first in the lower half, 0 for 1, 1 for 3 and so on.
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
    signs: Tensor | None = None
    word: int = 0
    moved: bool = False

    def high_bits(self) -> int:  # no property, which torch 2.5 does not compile
        if self.high is None:
            return 0
        return (8 if self.word else self.plane) * self.high.shape[1] // self.codes.shape[1]

    @property
    def lows(self) -> int:
        """1 where there are lows, 2 where they are in the bytes of the scales, else 0."""
        return 1 if self.low is not None else 0 if self.low_unit is None else 2

    @property
    def sharing(self) -> int:
        """How many groups share a unit; 0 where there is none."""
        return 0 if self.unit is None else self.inputs // self.group // self.unit.shape[1]

    @property
    def kind(self) -> tuple[Any, ...]:
        """What one compiled kernel serves."""
        return (
            self.outputs, self.inputs, self.group, self.plane, self.high_bits(), self.floats, self.scaled_rows, self.first,
            self.scale.dtype, self.sharing, self.lows, self.table is not None, self.word, self.moved,
        )  # fmt: skip

    @property
    def nbytes(self) -> int:
        """What a product reads."""
        scale = None if self.plane == PLAIN else self.scale
        parts = (self.codes, self.high, self.signs, scale, self.low, self.unit, self.low_unit)
        return sum(part.nbytes for part in parts if part is not None)

    def rows(self, start: int, stop: int) -> PackedMatrix:
        """Some outputs of it; start: where its scales begin."""
        scaled = slice(start // self.scaled_rows, -(-stop // self.scaled_rows))
        return self._cut(slice(start, stop), scaled, stop - start)

    def take(self, rows: Tensor | slice) -> PackedMatrix:
        """Any outputs of it, where each has scales of its own."""
        count = len(rows) if isinstance(rows, Tensor) else len(range(self.outputs)[rows])
        return self._cut(rows, rows, count)

    def _cut(self, own: Any, scaled: Any, count: int) -> PackedMatrix:
        def cut(part: Tensor | None, which: Any) -> Tensor | None:
            return None if part is None else part[which]

        # Not by _replace, which torch 2.5 does not compile.
        return PackedMatrix(
            self.codes[own], self.scale[scaled], count, self.inputs, self.group, cut(self.high, own), cut(self.low, scaled),
            cut(self.unit, own), cut(self.low_unit, own), self.table, self.first, self.plane, self.floats, self.scaled_rows,
            cut(self.signs, own), self.word, self.moved,
        )  # fmt: skip

    def whole(self) -> Tensor:
        """The codes of planes, uint8 [outputs, inputs and what fills the last group]."""
        lower = apart(self.codes, self.plane)
        return lower if self.high is None else lower | (apart(self.high, self.high_bits()) << self.plane)

    def spelled(self) -> Tensor:
        """The weights of words before they are scaled, int8 [outputs, inputs]."""
        assert self.table is not None
        places, down = self.codes.int(), None
        if self.high is not None:
            more = apart(self.high, self.high_bits()).int()
            places, down = places | ((more & 7) << 8), more >> 3
        found = self.table.view(-1, self.word).index_select(0, places.flatten()).view(*places.shape, self.word)
        if self.moved and down is not None:
            found = found + (1 - 2 * down.to(torch.int8)).unsqueeze(2)
        found = found.flatten(1)
        return found if self.signs is None else found * (1 - 2 * apart(self.signs, 1).to(torch.int8))

    def scales(self) -> tuple[Tensor, Tensor | None]:
        """(scale, low) of groups as numbers, float32."""
        scale, low = self.scale, self.low
        if self.word:
            scale = 1 + 2 * apart(scale, 4)
        if low is None and self.low_unit is not None:
            scale, low = scale & 15, scale >> 4
        return _times(scale, self.unit), None if low is None else _times(low, self.low_unit)

    def dense(self) -> Tensor:
        """The weights by torch's operators, float32 [outputs, inputs]: the reference of the kernels."""
        if self.plane == PLAIN:
            return self.codes.float()
        if self.word:
            codes = self.spelled()
        elif self.plane < 8:
            codes = self.whole()
            if self.table is not None:
                codes = self.table.index_select(0, codes.flatten().int()).view(codes.shape)
        else:
            codes = self.codes.view(torch.float8_e4m3fn) if self.floats else self.codes
        made = codes.float()
        if not self.group:
            return made * self.scale.float().unsqueeze(1)
        scale, low = self.scales()
        if self.scaled_rows > 1:
            scale = scale.repeat_interleave(self.scaled_rows, dim=0)[: self.outputs]
        made = torch.nn.functional.pad(made, (0, scale.shape[1] * self.group - made.shape[1]))
        made = made.view(self.outputs, scale.shape[1], self.group)
        if self.first:
            made = made + self.first
        made = made * scale.unsqueeze(2)
        if low is not None:
            made = made + low.unsqueeze(2)
        return made.flatten(1)[:, : self.inputs]


def plain_matrix(weight: Tensor) -> PackedMatrix:
    """Weights that are numbers, [outputs, inputs]."""
    return PackedMatrix(weight, weight, weight.shape[0], weight.shape[1], plane=PLAIN)


def bytes_of(codes: Tensor) -> Tensor:
    """float8 as the bytes that it is."""
    return codes if codes.dtype in (torch.int8, torch.uint8) else codes.view(torch.uint8)


def side_by_side(codes: Tensor, bits: int) -> Tensor:
    """Numbers of so many bits, uint8 [rows, any], as many to a byte as it holds, the first ones lowest."""
    made, *others = codes.view(len(codes), -1, 8 // bits).unbind(2)
    for place, part in enumerate(others, 1):
        made = made | (part << (bits * place))
    return made


def apart(packed: Tensor, bits: int) -> Tensor:
    """`side_by_side` undone."""
    shifts = range(0, 8, bits)
    return torch.stack([(packed >> shift) & ((1 << bits) - 1) for shift in shifts], dim=2).view(len(packed), -1)


def _times(part: Tensor, unit: Tensor | None) -> Tensor:
    """Scales or lows as numbers, float32."""
    if unit is None:
        return part.float()
    return (part.float().unflatten(1, (unit.shape[1], -1)) * unit.float().unsqueeze(2)).flatten(1)
