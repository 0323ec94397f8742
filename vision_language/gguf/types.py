"""How ggml stores numbers: the types of tensors, the length of their blocks, and what they mean.

Every type but the plain ones keeps whole numbers in groups: a weight is code * scale, or code * scale + low, with a scale and
a low for each group of inputs. The arithmetic is that of ggml-quants.c, in float32, so the weights are ggml's to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from . import codebooks
from .blocks import Codes, Reader, Words, bits, groups, half, nibbles, one_by_one, pairs, signed

SUPER = 256  # weights of a block of the K types


@dataclass(frozen=True)
class BlockType:
    """values, nbytes: of a block. codes: reads blocks [n, nbytes] uint8. group: codes of one scale.

    bits: of a code, where layers take codes over; 0 where they keep the blocks, in which codes are shorter or stand for several
    numbers. first: the least number that a code stands for, of less than 8 bits. plain: for numbers as torch has them.
    """

    name: str
    values: int
    nbytes: int
    codes: Reader | None = None
    bits: int = 0
    first: int = 0
    group: int = 32
    plain: torch.dtype | None = None

    @property
    def known(self) -> bool:
        return self.codes is not None or self.plain is not None or self.words is not None

    @property
    def table(self) -> Tensor | None:
        """What its codes are looked up in, on the CPU; None where they are numbers."""
        looked_up = self.name in codebooks.READERS or self.words is not None
        return codebooks.table(self.name) if looked_up else None

    @property
    def words(self) -> Callable[[Tensor], Words] | None:
        """Reads places in a book of words, where that is how it keeps weights."""
        return codebooks.WORD_READERS.get(self.name)

    def read(self, blocks: Tensor, table: Tensor | None) -> Codes:
        """table: its own, on the device of the blocks."""
        if self.words is not None:
            assert table is not None
            return self.words(blocks).codes(table)
        assert self.codes is not None
        return self.codes(blocks) if table is None else self.codes(blocks, table)


def dense(kind: BlockType, blocks: Tensor) -> Tensor:
    """The weights of blocks [n, bytes] uint8, [n, weights of a block] float32."""
    if kind.plain is not None:
        return blocks.reshape(-1).view(kind.plain).view(len(blocks), -1).float()
    return kind.read(blocks, kind.table).dense()


def _q4_0(b: Tensor) -> Codes:
    return Codes(groups(signed(nibbles(b[:, 2:], 16), 8), 32), half(b[:, :2]))


def _q4_1(b: Tensor) -> Codes:
    return Codes(groups(nibbles(b[:, 4:], 16), 32), half(b[:, :2]), half(b[:, 2:4]))


def _q5_0(b: Tensor) -> Codes:
    codes = nibbles(b[:, 6:], 16) | (one_by_one(b[:, 2:6]) << 4)
    return Codes(groups(signed(codes, 16), 32), half(b[:, :2]))


def _q5_1(b: Tensor) -> Codes:
    codes = nibbles(b[:, 8:], 16) | (one_by_one(b[:, 4:8]) << 4)
    return Codes(groups(codes, 32), half(b[:, :2]), half(b[:, 2:4]))


def _q8_0(b: Tensor) -> Codes:
    return Codes(groups(b[:, 2:].contiguous().view(torch.int8), 32), half(b[:, :2]))


def _q2_k(b: Tensor) -> Codes:
    scales = b[:, :16]
    codes = groups(pairs(b[:, 16:80], 32), 16)
    return Codes(codes, (scales & 15).float(), (scales >> 4).float(), half(b[:, 80:82]), -half(b[:, 82:84]))


def _q3_k(b: Tensor) -> Codes:
    packed = b[:, 96:108]
    scales = nibbles(packed[:, :8], 8) | (pairs(packed[:, 8:], 4) << 4)
    # A bit that is missing takes 4 away.
    codes = pairs(b[:, 32:96], 32).to(torch.int8) + 4 * bits(b[:, :32], 32).to(torch.int8) - 4
    return Codes(groups(codes, 16), signed(scales, 32).float(), unit=half(b[:, 108:110]))


def _six_bits(packed: Tensor) -> tuple[Tensor, Tensor]:
    """(scales, lows) of the eight groups of a block, of 6 bits each, from 12 bytes."""
    first, second, rest = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = torch.cat((first & 63, (rest & 15) | ((first >> 2) & 48)), dim=1)
    lows = torch.cat((second & 63, (rest >> 4) | ((second >> 2) & 48)), dim=1)
    return scales.float(), lows.float()


def _q4_k(b: Tensor) -> Codes:
    scales, lows = _six_bits(b[:, 4:16])
    return Codes(groups(nibbles(b[:, 16:], 32), 32), scales, lows, half(b[:, :2]), -half(b[:, 2:4]))


def _q5_k(b: Tensor) -> Codes:
    scales, lows = _six_bits(b[:, 4:16])
    codes = nibbles(b[:, 48:], 32) | (bits(b[:, 16:48], 32) << 4)
    return Codes(groups(codes, 32), scales, lows, half(b[:, :2]), -half(b[:, 2:4]))


def _q6_k(b: Tensor) -> Codes:
    codes = nibbles(b[:, :128], 64) | (pairs(b[:, 128:192], 32) << 4)
    scales = b[:, 192:208].contiguous().view(torch.int8).float()
    return Codes(groups(signed(codes, 32), 16), scales, unit=half(b[:, 208:210]))


def _one_scale(values: Tensor, scale: Tensor) -> Codes:
    """Of weights that share a scale, in groups of 32, so that their inputs can be put in another order."""
    cut = groups(values, 32)
    return Codes(cut, scale.expand(-1, cut.shape[1]))


def _q1_0(b: Tensor) -> Codes:
    return _one_scale(2 * one_by_one(b[:, 2:]).to(torch.int8) - 1, half(b[:, :2]))


def _q2_0(b: Tensor) -> Codes:
    return _one_scale(signed(pairs(b[:, 2:], 1), 1), half(b[:, :2]))


def _thirds(part: Tensor, run: int, count: int) -> Tensor:
    """Of every `run` bytes the first digit to the base of 3, then the second, and so on: [n, count x bytes] uint8."""
    cut = part.reshape(len(part), -1, 1, run)
    # The digits are behind the point: what is before it runs over.
    digits = [((cut * 3**place).to(torch.int16) * 3) >> 8 for place in range(count)]
    return torch.cat(digits, dim=2).to(torch.int8).reshape(len(part), -1)


def _tq1_0(b: Tensor) -> Codes:
    digits = torch.cat((_thirds(b[:, :32], 32, 5), _thirds(b[:, 32:48], 16, 5), _thirds(b[:, 48:52], 4, 4)), dim=1)
    return _one_scale(digits - 1, half(b[:, 52:54]))


def _tq2_0(b: Tensor) -> Codes:
    return _one_scale(signed(pairs(b[:, :64], 32), 1), half(b[:, 64:66]))


def _looked_up(name: str, values: int, nbytes: int, group: int = 32, bits: int = 0) -> BlockType:
    return BlockType(name, values, nbytes, codebooks.READERS.get(name), bits, group=group)


TYPES: dict[int, BlockType] = {
    0: BlockType("F32", 1, 4, plain=torch.float32),
    1: BlockType("F16", 1, 2, plain=torch.float16),
    30: BlockType("BF16", 1, 2, plain=torch.bfloat16),
    2: BlockType("Q4_0", 32, 18, _q4_0, 4, -8),
    3: BlockType("Q4_1", 32, 20, _q4_1, 4),
    6: BlockType("Q5_0", 32, 22, _q5_0, 5, -16),
    7: BlockType("Q5_1", 32, 24, _q5_1, 5),
    8: BlockType("Q8_0", 32, 34, _q8_0, 8),
    10: BlockType("Q2_K", SUPER, 84, _q2_k, 2, group=16),
    11: BlockType("Q3_K", SUPER, 110, _q3_k, 3, -4, 16),
    12: BlockType("Q4_K", SUPER, 144, _q4_k, 4),
    13: BlockType("Q5_K", SUPER, 176, _q5_k, 5),
    14: BlockType("Q6_K", SUPER, 210, _q6_k, 6, -32, 16),
    20: _looked_up("IQ4_NL", 32, 18, bits=4),
    23: _looked_up("IQ4_XS", SUPER, 136, bits=4),
    39: _looked_up("MXFP4", 32, 17, bits=4),
    40: _looked_up("NVFP4", 64, 36, 16, 4),
    # Of these layers keep the places of words in a book, or the blocks.
    16: _looked_up("IQ2_XXS", SUPER, 66),
    17: _looked_up("IQ2_XS", SUPER, 74, 16),
    18: _looked_up("IQ3_XXS", SUPER, 98),
    19: _looked_up("IQ1_S", SUPER, 50),
    21: _looked_up("IQ3_S", SUPER, 110),
    22: _looked_up("IQ2_S", SUPER, 82, 16),
    29: _looked_up("IQ1_M", SUPER, 56, 16),
    34: BlockType("TQ1_0", SUPER, 54, _tq1_0),
    35: BlockType("TQ2_0", SUPER, 66, _tq2_0),
    41: BlockType("Q1_0", 128, 18, _q1_0),
    42: BlockType("Q2_0", 64, 18, _q2_0),
    # Named when they are refused.
    9: BlockType("Q8_1", 32, 36),
    15: BlockType("Q8_K", SUPER, 292),
    24: BlockType("I8", 1, 1),
    25: BlockType("I16", 1, 2),
    26: BlockType("I32", 1, 4),
    27: BlockType("I64", 1, 8),
    28: BlockType("F64", 1, 8),
}
