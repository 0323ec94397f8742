"""Matrices as a file stores them, before they become layers: their outputs and inputs in any order, some rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .types import TYPES, BlockType, dense

STEP = 1 << 22  # weights that are read at a time


@dataclass(frozen=True)
class Matrix:
    """Some outputs of a layer as a file stores them. blocks: [blocks, bytes] uint8, row after row.

    groups: the order in which the inputs are meant, by the groups that share a scale; None for that of the file.
    factor: [outputs] float32, by which the numbers are to be multiplied, if by any.
    """

    kind: BlockType
    blocks: Tensor
    outputs: int
    inputs: int
    groups: Tensor | None = None
    factor: Tensor | None = None

    def rows(self, order: Tensor) -> Matrix:
        """Its outputs in another order."""
        blocks = self.blocks.view(self.outputs, -1)[order].view(-1, self.kind.nbytes)
        return replace(self, blocks=blocks, factor=None if self.factor is None else self.factor[order])

    def columns(self, order: Tensor) -> Matrix:
        """Its inputs in another order: that of as many runs of one length. Unpacked where a group lies in two of them."""
        runs, kind = len(order), self.kind
        if kind.plain is None and (self.inputs // runs) % kind.group == 0:
            each = self.inputs // runs // kind.group
            return replace(self, groups=(order.unsqueeze(1) * each + torch.arange(each)).flatten())
        if kind.plain is None:
            plain = self.dense(torch.float32).view(torch.uint8).view(-1, 4)
            return Matrix(TYPES[0], plain, self.outputs, self.inputs).columns(order)
        blocks = self.blocks.reshape(self.outputs, runs, -1)[:, order].reshape(-1, kind.nbytes)
        return replace(self, blocks=blocks)

    def dense(self, dtype: torch.dtype, first: int = 0, last: int | None = None, step: int = 1) -> Tensor:
        """The weights of rows first to last, every `step`th of them, [rows, inputs]."""
        rows = self.blocks.view(self.outputs, -1, self.kind.nbytes)[first:last:step]
        made = torch.empty(len(rows), self.inputs, dtype=dtype)
        factors = torch.ones(0) if self.factor is None else self.factor[first:last:step].unsqueeze(1)
        for start, part in steps(rows, self.inputs):
            into = made[start : start + len(part)]
            numbers = dense(self.kind, part.reshape(-1, self.kind.nbytes))
            if self.groups is not None:
                numbers = numbers.view(len(part), len(self.groups), -1)[:, self.groups]
            numbers = numbers.reshape(into.shape)
            into.copy_(numbers if self.factor is None else numbers * factors[start : start + len(part)])
        return made


def steps(rows: Tensor, inputs: int) -> Iterator[tuple[int, Tensor]]:
    """Some rows at a time, and which is the first of them."""
    start = 0
    for part in rows.split(max(1, STEP // max(1, inputs))):
        yield start, part
        start += len(part)
