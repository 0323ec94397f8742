"""What blocks of packed weights come to: whole numbers with their scales; and how bits are taken out of bytes.

Nothing here makes a tensor out of numbers of the host, so all of it runs where the blocks are, also while a graph is recorded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Codes:
    """Some weights as they are stored. values: [blocks, groups, weights of a group], whole numbers of 8 bits.

    scale, low: [blocks, groups] float32; no low where it is 0 for all. unit, low_unit: [blocks, 1] float32, what 1 of a scale and
    of a low stands for where these are whole numbers, too.
    """

    values: Tensor
    scale: Tensor
    low: Tensor | None = None
    unit: Tensor | None = None
    low_unit: Tensor | None = None

    def spread(self) -> Codes:
        """Without units."""
        scale = self.scale if self.unit is None else self.scale * self.unit
        low = self.low if self.low is None or self.low_unit is None else self.low * self.low_unit
        return Codes(self.values, scale, low)

    def dense(self) -> Tensor:
        """[blocks, weights of a block] float32."""
        found = self.spread()
        made = found.values * found.scale.unsqueeze(-1)
        if found.low is not None:
            made += found.low.unsqueeze(-1)
        return made.flatten(1)


@dataclass(frozen=True)
class Words:
    """Some weights as their places in a book of words of four or eight.

    places: [blocks, words] int32. signs: [blocks, weights / 8] uint8, a bit for each weight that is negative, if any can be.
    down: [blocks, words] uint8, whether a word is moved down by 1, and not up; None where none is moved.
    steps: [blocks, groups] uint8, up to 15: scales are 1 + 2 * steps, of `unit` [blocks, 1] float32.
    """

    places: Tensor
    steps: Tensor
    unit: Tensor
    signs: Tensor | None = None
    down: Tensor | None = None

    def codes(self, book: Tensor) -> Codes:
        """book: [words, weights of a word] int8."""
        # Faster than an index between brackets.
        words = book.index_select(0, self.places.flatten()).view(*self.places.shape, -1)
        if self.down is not None:
            words = words + (1 - 2 * self.down.to(torch.int8)).unsqueeze(2)
        values = words.flatten(1)
        if self.signs is not None:
            values = values * (1 - 2 * one_by_one(self.signs).to(torch.int8))
        return Codes(groups(values, values.shape[1] // self.steps.shape[1]), 1 + 2 * self.steps.float(), unit=self.unit)


Reader = Callable[
    ..., Codes
]  # of blocks [n, bytes] uint8, and of the table that their type looks numbers up in, if any


def half(part: Tensor) -> Tensor:
    """Two bytes of each block, as a float16 number: [n, 1] float32."""
    return part.contiguous().view(torch.float16).float()


def nibbles(part: Tensor, run: int) -> Tensor:
    """Of every `run` bytes the lower halves, then the upper ones: [n, 2 x bytes] uint8."""
    cut = part.reshape(len(part), -1, 1, run)
    return torch.cat((cut & 15, cut >> 4), dim=2).reshape(len(part), -1)


def pairs(part: Tensor, run: int) -> Tensor:
    """Of every `run` bytes the lowest two bits, then the next two, and so on: [n, 4 x bytes] uint8."""
    cut = part.reshape(len(part), -1, 1, run)
    return torch.cat([(cut >> shift) & 3 for shift in (0, 2, 4, 6)], dim=2).reshape(len(part), -1)


def bits(part: Tensor, run: int) -> Tensor:
    """Of every `run` bytes the lowest bit, then the next one, and so on: [n, 8 x bytes] uint8."""
    cut = part.reshape(len(part), -1, 1, run)
    return torch.cat([(cut >> shift) & 1 for shift in range(8)], dim=2).reshape(len(part), -1)


def one_by_one(part: Tensor) -> Tensor:
    """The bits of each byte, the lowest first: [n, 8 x bytes] uint8."""
    shifts = torch.arange(8, dtype=torch.uint8, device=part.device)
    return ((part.unsqueeze(-1) >> shifts) & 1).reshape(len(part), -1)


def signed(codes: Tensor, middle: int) -> Tensor:
    return codes.to(torch.int8) - middle


def groups(values: Tensor, length: int) -> Tensor:
    return values.reshape(len(values), -1, length)
