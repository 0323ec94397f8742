"""Layers with the weights of a file as it stores them: its whole numbers and their scales, in an order that torch can multiply.

The numbers of all types fit into 4 or 8 bits, so what a file holds is kept to the last bit, but for scales that are rounded
to float16. On a CPU, where unpacking for each product is slow, torch's kernels take what they can read: groups of 32 of 4
bits as they are, and other types as int8 with one scale a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from .. import cpu_kernels
from ..projections import rows_of
from ..quantization import PACKED, Int4OnCpu, ScaledLinear, in_parts, pack, product
from .types import TYPES, BlockType, Codes, dense

KERNEL_GROUP = 32  # of torch's int4 kernel for CPUs
LARGEST_HALF, SMALLEST_HALF = 60000.0, 6e-5  # of scales that are kept in float16
STEP = 1 << 22  # weights that are read at a time
SAMPLE = 64  # rows by which the error is measured

GROUPED, KERNEL, ROWS, PLAIN, ANEW = "groups", "int4 kernel", "int8 rows", "plain", "anew"


@dataclass(frozen=True)
class Matrix:
    """Some outputs of a layer as a file stores them. blocks: [blocks, bytes] uint8, row after row.

    groups: the order in which the inputs are meant, by the groups that share a scale; None for that of the file.
    """

    kind: BlockType
    blocks: Tensor
    outputs: int
    inputs: int
    groups: Tensor | None = None

    def rows(self, order: Tensor) -> Matrix:
        """Its outputs in another order."""
        blocks = self.blocks.view(self.outputs, -1)[order].view(-1, self.kind.nbytes)
        return replace(self, blocks=blocks)

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
        for part, into in zip(_parts(rows, self.inputs), _parts(made, self.inputs), strict=True):
            numbers = dense(self.kind, part.reshape(-1, self.kind.nbytes))
            if self.groups is not None:
                numbers = numbers.view(len(part), len(self.groups), -1)[:, self.groups]
            into.copy_(numbers.reshape(into.shape))
        return made


def _parts(rows: Tensor, inputs: int) -> Sequence[Tensor]:
    return rows.split(max(1, STEP // max(1, inputs)))


class GroupedLinear(nn.Module):
    """Whole numbers of 4 or 8 bits, with a scale and maybe a low for each group of inputs of each output."""

    weight: Tensor  # [out, in / 2] uint8, or [out, in] int8
    scale: Tensor  # [out, groups]
    low: Tensor | None

    def __init__(self, matrices: Sequence[Matrix], bias: Tensor | None) -> None:
        """matrices: all of one type, the outputs of the layer one after the other."""
        super().__init__()
        kind = matrices[0].kind
        self.out_features, self.in_features = sum(matrix.outputs for matrix in matrices), matrices[0].inputs
        self.bits, self.first = 4 if kind.bits <= 4 else 8, kind.first
        weights, scales, lows = [], [], []
        for matrix in matrices:
            for rows in _parts(matrix.blocks.view(matrix.outputs, -1, kind.nbytes), self.in_features):
                codes = _codes(matrix, rows)
                weights.append(self._narrow(codes.values))
                scales.append(codes.scale)
                if codes.low is not None:
                    lows.append(codes.low)
        scale = torch.cat(scales)
        self.group = self.in_features // scale.shape[1]
        low = torch.cat(lows) if lows else None
        dtype = torch.float16 if _half_serves(scale) and (low is None or _half_serves(low)) else torch.float32
        self.register_buffer("weight", torch.cat(weights))
        self.register_buffer("scale", scale.to(dtype))
        self.register_buffer("low", None if low is None else low.to(dtype))
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def _narrow(self, values: Tensor) -> Tensor:
        """[rows, groups, weights of a group] as they are kept. 4 bits: two to a byte, counted from the smallest."""
        flat = values.flatten(1)
        if self.bits == 8:
            # Numbers without a sign are of 5 bits here.
            return flat.to(torch.int8)
        counted = (flat - self.first).to(torch.uint8) if self.first else flat
        return counted[:, 0::2] | (counted[:, 1::2] << 4)

    def codes(self, start: int, stop: int) -> Tensor:
        """[stop - start, inputs]: 4 bits uint8 from 0 on, 8 bits int8."""
        return self._spread(self.weight[start:stop])

    def codes_of(self, rows: Tensor) -> Tensor:
        return self._spread(self.weight[rows])

    def _spread(self, packed: Tensor) -> Tensor:
        return packed if self.bits == 8 else torch.stack((packed & 15, packed >> 4), dim=2).view(len(packed), -1)

    def _dense(self, codes: Tensor, scale: Tensor, low: Tensor | None) -> Tensor:
        counted = codes.view(*scale.shape, self.group).float()
        if self.bits == 4 and self.first:
            counted = counted + self.first
        made = counted * scale.float().unsqueeze(2)
        if low is not None:
            made = made + low.float().unsqueeze(2)
        return made.flatten(1)

    def some(self, rows: Tensor) -> Tensor:
        """The weights of `rows`, float32."""
        return self._dense(self.codes_of(rows), self.scale[rows], None if self.low is None else self.low[rows])

    def forward(self, x: Tensor) -> Tensor:
        return self.rows(x, 0, self.out_features)

    def rows(self, x: Tensor, start: int, stop: int) -> Tensor:
        y = in_parts(self._unpacked, x, start, stop, self.in_features)
        return y if self.bias is None else y + self.bias[start:stop]

    def _unpacked(self, x: Tensor, start: int, stop: int) -> Tensor:
        low = None if self.low is None else self.low[start:stop]
        return product(x, self._dense(self.codes(start, stop), self.scale[start:stop], low).to(x.dtype))


class StackedLinear(nn.Module):
    """The outputs of several layers one after the other: what a file stores in different types."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.sizes = [int(layer.out_features) for layer in layers]  # type: ignore[arg-type]
        self.out_features, self.in_features = sum(self.sizes), layers[0].in_features

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([layer(x) for layer in self.layers], dim=-1)

    def rows(self, x: Tensor, start: int, stop: int) -> Tensor:
        made, begins = [], 0
        for layer, size in zip(self.layers, self.sizes, strict=True):
            first, last = max(start - begins, 0), min(stop - begins, size)
            if first < last:
                made.append(rows_of(layer, x, first, last))
            begins += size
        return made[0] if len(made) == 1 else torch.cat(made, dim=-1)


def _codes(matrix: Matrix, rows: Tensor) -> Codes:
    """The codes of rows [n, blocks of a row, bytes]; values: [n, groups of a row, weights of a group]."""
    kind, order = matrix.kind, matrix.groups
    assert kind.codes is not None
    found = kind.codes(rows.reshape(-1, kind.nbytes))
    length, count = found.values.shape[-1], len(rows)
    values, scale = found.values.reshape(count, -1, length), found.scale.reshape(count, -1)
    low = None if found.low is None else found.low.reshape(count, -1)
    if order is None:
        return Codes(values, scale, low)
    return Codes(values[:, order], scale[:, order], None if low is None else low[:, order])


def _half_serves(scale: Tensor) -> bool:
    """Whether float16 holds `scale` as well as the products need: its largest numbers to eleven bits."""
    largest = float(scale.abs().max())
    return largest == 0 or SMALLEST_HALF < largest < LARGEST_HALF


def layout(kind: BlockType, outputs: int, method: str, device: torch.device) -> str:
    """How weights of `kind` are kept. method: what was asked for, none or one of PACKED; weights of as many bits stay."""
    if method in PACKED:
        stays = kind.plain is None and (kind.bits <= 4 if method == "int4" else method == "int8" and kind.bits > 4)
        if not stays:
            return ANEW
    if kind.plain is not None:
        return PLAIN
    if device.type != "cpu":
        return GROUPED
    affine = kind.bits == 4 and kind.group % KERNEL_GROUP == 0
    if affine and outputs % cpu_kernels.STEP == 0 and not cpu_kernels.why_not("int4"):
        return KERNEL
    return GROUPED if cpu_kernels.why_not("int8") else ROWS


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
        if len(kinds) == 1 or set(kept) <= {PLAIN} or set(kept) <= {ANEW}:
            return self._made(matrices, kept[0], bias)
        parts = None if bias is None else bias.split([matrix.outputs for matrix in matrices])
        return StackedLinear(
            [
                self._made(
                    [matrix],
                    layout(matrix.kind, matrix.outputs, self.method, self.device),
                    None if parts is None else parts[number].clone(),
                )
                for number, matrix in enumerate(matrices)
            ]
        )

    def _made(self, matrices: Sequence[Matrix], kept: str, bias: Tensor | None) -> nn.Module:
        for matrix in matrices:
            key = (matrix.kind.name, kept)
            self.kinds[key] = self.kinds.get(key, 0) + matrix.blocks.numel()
        if kept in (GROUPED, KERNEL):
            made = GroupedLinear(matrices, bias)
            if kept == GROUPED:
                self._measure(matrices, made.some)
                return made
            if made.low is None:
                made.low = made.scale.float() * made.first
            packed = Int4OnCpu(made)
            groups = packed.groups.transpose(0, 1).float()
            self._measure(matrices, lambda rows: _by_kernel(made.codes_of(rows), groups[rows]))
            return packed
        whole = [matrix.dense(self.dtype) for matrix in matrices]
        layer = plain_linear(whole.pop() if len(whole) == 1 else torch.cat(whole), bias)
        if kept == PLAIN:
            return layer
        anew = pack(layer, self.method if kept == ANEW else "int8", self.device)
        if isinstance(anew, ScaledLinear):
            self._measure(matrices, lambda rows: anew.weight[rows].float() * anew.scale[rows].float().unsqueeze(1))
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
