"""How the weights of a file are kept in layers, by their type and the device, and how far from the file's numbers that is.

Codes are taken over as they are, in an order that kernels read, with their scales, or the places of words in a book; of the few
types that no kernel reads the blocks are kept. On a CPU, where unpacking for each product is slow, torch's kernels take what they
can read: groups of 32 of 4 bits as they are, and other types as int8 with one scale a row.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import cpu_kernels
from ..quantization import PACKED, Int4OnCpu, ScaledLinear, pack
from .linears import BlockLinear, GroupedLinear, StackedLinear, WordLinear
from .matrix import Matrix
from .types import BlockType

KERNEL_GROUP = 32  # of torch's int4 kernel for CPUs
SAMPLE = 64  # rows by which the error is measured

GROUPED, BLOCKS, KERNEL, ROWS, PLAIN, ANEW = "groups", "blocks", "int4 kernel", "int8 rows", "plain", "anew"


def layout(kind: BlockType, outputs: int, method: str, device: torch.device) -> str:
    """How weights of `kind` are kept. method: what was asked for, none or one of PACKED; weights of as many bits stay."""
    if method in PACKED:
        stays = kind.plain is None and (kind.bits <= 4 if method == "int4" else method == "int8" and kind.bits > 4)
        if not stays:
            return ANEW
    if kind.plain is not None:
        return PLAIN
    unpacked = GROUPED if kind.bits else BLOCKS
    if device.type != "cpu":
        return unpacked
    affine = kind.bits == 4 and kind.table is None and kind.group % KERNEL_GROUP == 0
    if affine and outputs % cpu_kernels.STEP == 0 and not cpu_kernels.why_not("int4"):
        return KERNEL
    return unpacked if cpu_kernels.why_not("int8") else ROWS


@dataclass
class Deviation:
    """How far weights are from those of the file: squares over some of the rows of every matrix."""

    off: float = 0.0
    whole: float = 0.0

    def add(self, kept: Tensor, meant: Tensor) -> None:
        self.off += float((kept.double() - meant.double()).square().sum())
        self.whole += float(meant.double().square().sum())

    @property
    def share(self) -> float:
        return (self.off / self.whole) ** 0.5 if self.whole else 0.0


class Packer:
    """Makes the layers of a network out of a file's matrices, and keeps the account for the report.

    method: none, or one of PACKED. kinds: bytes in the file by type and by how the weights are kept.
    """

    def __init__(self, method: str, device: torch.device, dtype: torch.dtype) -> None:
        self.method, self.device, self.dtype = method, device, dtype
        self.kinds: dict[tuple[str, str], int] = {}
        self.deviation = Deviation()

    @property
    def packs(self) -> bool:
        """Whether some weights are no plain numbers."""
        return any(kept != PLAIN for _, kept in self.kinds)

    def add(self, other: Packer) -> None:
        """Take over the account of `other`."""
        for key, count in other.kinds.items():
            self.kinds[key] = self.kinds.get(key, 0) + count
        self.deviation.off += other.deviation.off
        self.deviation.whole += other.deviation.whole

    def plain(self, matrices: Sequence[Matrix]) -> bool:
        """Whether their weights are kept as plain numbers."""
        return all(layout(matrix.kind, matrix.outputs, self.method, self.device) == PLAIN for matrix in matrices)

    def layer(self, matrices: Sequence[Matrix], biases: Sequence[Tensor] | None = None) -> nn.Module:
        """A layer with the outputs of `matrices` one after the other, and their biases."""
        kinds = {matrix.kind for matrix in matrices}
        outputs = sum(matrix.outputs for matrix in matrices)
        kept = [layout(kind, outputs, self.method, self.device) for kind in kinds]
        bias = None if biases is None else torch.cat([part.to(self.dtype) for part in biases])
        if len(kinds) == 1 or (len(set(kept)) == 1 and kept[0] in (PLAIN, ANEW, ROWS)):
            return self._made(matrices, kept[0], bias)
        alike = [list(group) for _, group in itertools.groupby(matrices, lambda matrix: matrix.kind)]
        sizes = [sum(matrix.outputs for matrix in group) for group in alike]
        parts = [None] * len(sizes) if bias is None else [part.clone() for part in bias.split(sizes)]
        return StackedLinear(
            [
                self._made(group, layout(group[0].kind, size, self.method, self.device), part)
                for group, size, part in zip(alike, sizes, parts, strict=True)
            ]
        )

    def _made(self, matrices: Sequence[Matrix], kept: str, bias: Tensor | None) -> nn.Module:
        for matrix in matrices:
            key = (matrix.kind.name, kept)
            self.kinds[key] = self.kinds.get(key, 0) + matrix.blocks.numel()
        if kept == BLOCKS:
            as_stored = all(matrix.groups is None and matrix.factor is None for matrix in matrices)
            blocks = (WordLinear if matrices[0].kind.words is not None and as_stored else BlockLinear)(matrices, bias)
            self._measure(matrices, blocks.some)
            return blocks
        if kept in (GROUPED, KERNEL):
            made = GroupedLinear(matrices, bias)
            if kept == GROUPED:
                self._measure(matrices, made.some)
                return made
            stored = made.matrix
            codes, (scale, low) = stored.whole(), stored.scales()
            packed = Int4OnCpu(made, codes, scale, scale * made.first if low is None else low)
            groups = packed.groups.transpose(0, 1).float()
            self._measure(matrices, lambda rows: _by_kernel(codes[rows], groups[rows]))
            return packed
        whole = [matrix.dense(self.dtype) for matrix in matrices]
        layer = plain_linear(whole.pop() if len(whole) == 1 else torch.cat(whole), bias)
        if kept == PLAIN:
            return layer
        anew = pack(layer, self.method if kept == ANEW else "int8", self.device)
        if isinstance(anew, ScaledLinear):
            # As bytes: torch 2.5 picks no float8 by index on a CPU.
            held, number = anew.weight.view(torch.uint8), anew.weight.dtype
            self._measure(
                matrices, lambda rows: held[rows].view(number).float() * anew.scale[rows].float().unsqueeze(1)
            )
        return anew

    def _measure(self, matrices: Sequence[Matrix], some: Callable[[Tensor], Tensor]) -> None:
        """some: the weights of some rows of a layer, as it has them."""
        first = 0
        for matrix in matrices:
            step = max(1, matrix.outputs // SAMPLE)
            rows = torch.arange(0, matrix.outputs, step)
            self.deviation.add(some(first + rows), matrix.dense(torch.float32, 0, None, step))
            first += matrix.outputs


def _by_kernel(codes: Tensor, groups: Tensor) -> Tensor:
    """The weights that torch's int4 kernel has. codes: [rows, inputs]; groups: [rows, groups, 2], scales and middles."""
    counted = codes.view(*groups.shape[:2], -1).float() - 8
    return (counted * groups[..., :1] + groups[..., 1:]).flatten(1)


def plain_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    made.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        made.bias = nn.Parameter(bias, requires_grad=False)
    return made
