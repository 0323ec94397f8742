"""How ggml stores numbers: the types of tensors, the length of their blocks, and what they mean.

Every type but the plain ones keeps whole numbers in groups: a weight is code * scale, or code * scale + low, with a scale and
a low for each group of inputs. The arithmetic is that of ggml-quants.c, in float32, so the weights are ggml's to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

SUPER = 256  # weights of a block of the K types
IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


@dataclass(frozen=True)
class Codes:
    """Some weights as they are stored. values: [blocks, groups, weights of a group], whole numbers of 8 bits.

    scale, low: [blocks, groups] float32; no low where it is 0 for all.
    """

    values: Tensor
    scale: Tensor
    low: Tensor | None = None

    def dense(self) -> Tensor:
        """[blocks, weights of a block] float32."""
        made = self.values.float() * self.scale.unsqueeze(-1)
        if self.low is not None:
            made += self.low.unsqueeze(-1)
        return made.flatten(1)


Reader = Callable[[Tensor], Codes]


@dataclass(frozen=True)
class BlockType:
    """values, nbytes: of a block. codes: reads blocks [n, nbytes] uint8. bits: what a code needs. group: codes of one scale.

    first: the least number that a code stands for, so that code - first is never negative. plain: for numbers as torch has them.
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
        return self.codes is not None or self.plain is not None


def dense(kind: BlockType, blocks: Tensor) -> Tensor:
    """The weights of blocks [n, bytes] uint8, [n, weights of a block] float32."""
    if kind.plain is not None:
        return blocks.reshape(-1).view(kind.plain).view(len(blocks), -1).float()
    assert kind.codes is not None
    return kind.codes(blocks).dense()


def _half(part: Tensor) -> Tensor:
    """Two bytes of each block, as a float16 number: [n, 1] float32."""
    return part.contiguous().view(torch.float16).float()


def _nibbles(part: Tensor, run: int) -> Tensor:
    """Of every `run` bytes the lower halves, then the upper ones: [n, 2 x bytes] uint8."""
    cut = part.reshape(len(part), -1, 1, run)
    return torch.cat((cut & 15, cut >> 4), dim=2).reshape(len(part), -1)


def _pairs(part: Tensor, run: int) -> Tensor:
    """Of every `run` bytes the lowest two bits, then the next two, and so on: [n, 4 x bytes] uint8."""
    cut = part.reshape(len(part), -1, 1, run)
    return torch.cat([(cut >> shift) & 3 for shift in (0, 2, 4, 6)], dim=2).reshape(len(part), -1)


def _bits(part: Tensor, run: int) -> Tensor:
    """Of every `run` bytes the lowest bit, then the next one, and so on: [n, 8 x bytes] uint8."""
    cut = part.reshape(len(part), -1, 1, run)
    return torch.cat([(cut >> shift) & 1 for shift in range(8)], dim=2).reshape(len(part), -1)


def _one_by_one(part: Tensor) -> Tensor:
    """The bits of each byte, the lowest first: [n, 8 x bytes] uint8."""
    shifts = torch.arange(8, dtype=torch.uint8)
    return ((part.unsqueeze(-1) >> shifts) & 1).reshape(len(part), -1)


def _signed(codes: Tensor, middle: int) -> Tensor:
    return codes.to(torch.int8) - middle


def _groups(values: Tensor, length: int) -> Tensor:
    return values.reshape(len(values), -1, length)


def _q4_0(b: Tensor) -> Codes:
    return Codes(_groups(_signed(_nibbles(b[:, 2:], 16), 8), 32), _half(b[:, :2]))


def _q4_1(b: Tensor) -> Codes:
    return Codes(_groups(_nibbles(b[:, 4:], 16), 32), _half(b[:, :2]), _half(b[:, 2:4]))


def _q5_0(b: Tensor) -> Codes:
    codes = _nibbles(b[:, 6:], 16) | (_one_by_one(b[:, 2:6]) << 4)
    return Codes(_groups(_signed(codes, 16), 32), _half(b[:, :2]))


def _q5_1(b: Tensor) -> Codes:
    codes = _nibbles(b[:, 8:], 16) | (_one_by_one(b[:, 4:8]) << 4)
    return Codes(_groups(codes, 32), _half(b[:, :2]), _half(b[:, 2:4]))


def _q8_0(b: Tensor) -> Codes:
    return Codes(_groups(b[:, 2:].contiguous().view(torch.int8), 32), _half(b[:, :2]))


def _q2_k(b: Tensor) -> Codes:
    scales = b[:, :16]
    scale, low = _half(b[:, 80:82]) * (scales & 15).float(), _half(b[:, 82:84]) * (scales >> 4).float()
    return Codes(_groups(_pairs(b[:, 16:80], 32), 16), scale, -low)


def _q3_k(b: Tensor) -> Codes:
    packed = b[:, 96:108]
    scales = _nibbles(packed[:, :8], 8) | (_pairs(packed[:, 8:], 4) << 4)
    # A bit that is missing takes 4 away.
    codes = _pairs(b[:, 32:96], 32).to(torch.int8) + 4 * _bits(b[:, :32], 32).to(torch.int8) - 4
    return Codes(_groups(codes, 16), _half(b[:, 108:110]) * _signed(scales, 32).float())


def _six_bits(packed: Tensor) -> tuple[Tensor, Tensor]:
    """(scales, lows) of the eight groups of a block, of 6 bits each, from 12 bytes."""
    first, second, rest = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = torch.cat((first & 63, (rest & 15) | ((first >> 2) & 48)), dim=1)
    lows = torch.cat((second & 63, (rest >> 4) | ((second >> 2) & 48)), dim=1)
    return scales.float(), lows.float()


def _q4_k(b: Tensor) -> Codes:
    scales, lows = _six_bits(b[:, 4:16])
    return Codes(_groups(_nibbles(b[:, 16:], 32), 32), _half(b[:, :2]) * scales, -(_half(b[:, 2:4]) * lows))


def _q5_k(b: Tensor) -> Codes:
    scales, lows = _six_bits(b[:, 4:16])
    codes = _nibbles(b[:, 48:], 32) | (_bits(b[:, 16:48], 32) << 4)
    return Codes(_groups(codes, 32), _half(b[:, :2]) * scales, -(_half(b[:, 2:4]) * lows))


def _q6_k(b: Tensor) -> Codes:
    codes = _nibbles(b[:, :128], 64) | (_pairs(b[:, 128:192], 32) << 4)
    scales = b[:, 192:208].contiguous().view(torch.int8).float()
    return Codes(_groups(_signed(codes, 32), 16), _half(b[:, 208:210]) * scales)


def _iq4(codes: Tensor) -> Tensor:
    return torch.tensor(IQ4_VALUES, dtype=torch.int8)[codes.int()]


def _iq4_nl(b: Tensor) -> Codes:
    return Codes(_groups(_iq4(_nibbles(b[:, 2:], 16)), 32), _half(b[:, :2]))


def _iq4_xs(b: Tensor) -> Codes:
    low = b[:, 4:8]
    low = torch.stack((low & 15, low >> 4), dim=2).flatten(1)
    high = b[:, 2:4]
    high = torch.stack([(high >> shift) & 3 for shift in (0, 2, 4, 6)], dim=2).flatten(1)
    scales = _signed(low | (high << 4), 32).float()
    return Codes(_groups(_iq4(_nibbles(b[:, 8:], 16)), 32), _half(b[:, :2]) * scales)


TYPES: dict[int, BlockType] = {
    0: BlockType("F32", 1, 4, plain=torch.float32),
    1: BlockType("F16", 1, 2, plain=torch.float16),
    30: BlockType("BF16", 1, 2, plain=torch.bfloat16),
    2: BlockType("Q4_0", 32, 18, _q4_0, 4, -8),
    3: BlockType("Q4_1", 32, 20, _q4_1, 4),
    6: BlockType("Q5_0", 32, 22, _q5_0, 5, -16),
    7: BlockType("Q5_1", 32, 24, _q5_1, 5),
    8: BlockType("Q8_0", 32, 34, _q8_0, 8, -128),
    10: BlockType("Q2_K", SUPER, 84, _q2_k, 2, group=16),
    11: BlockType("Q3_K", SUPER, 110, _q3_k, 3, -4, 16),
    12: BlockType("Q4_K", SUPER, 144, _q4_k, 4),
    13: BlockType("Q5_K", SUPER, 176, _q5_k, 5),
    14: BlockType("Q6_K", SUPER, 210, _q6_k, 6, -32, 16),
    # The codes of these stand for numbers of 8 bits.
    20: BlockType("IQ4_NL", 32, 18, _iq4_nl, 8, -128),
    23: BlockType("IQ4_XS", SUPER, 136, _iq4_xs, 8, -128),
    # Named when they are refused.
    9: BlockType("Q8_1", 32, 36),
    15: BlockType("Q8_K", SUPER, 292),
    16: BlockType("IQ2_XXS", SUPER, 66),
    17: BlockType("IQ2_XS", SUPER, 74),
    18: BlockType("IQ3_XXS", SUPER, 98),
    19: BlockType("IQ1_S", SUPER, 50),
    21: BlockType("IQ3_S", SUPER, 110),
    22: BlockType("IQ2_S", SUPER, 82),
    24: BlockType("I8", 1, 1),
    25: BlockType("I16", 1, 2),
    26: BlockType("I32", 1, 4),
    27: BlockType("I64", 1, 8),
    28: BlockType("F64", 1, 8),
    29: BlockType("IQ1_M", SUPER, 56),
    34: BlockType("TQ1_0", SUPER, 54),
    35: BlockType("TQ2_0", SUPER, 66),
    39: BlockType("MXFP4", 32, 17),
    40: BlockType("NVFP4", 64, 36),
}
