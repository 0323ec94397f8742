"""Layers with the weights of a file: as whole numbers with scales or places in a book, as kernels read them, or as its blocks."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..packed_matrix import PackedMatrix, side_by_side
from ..packed_products import few_rows_product, unpacked
from ..projections import rows_of
from ..quantization import in_parts, product
from .blocks import Codes
from .matrix import Matrix, steps

LARGEST_HALF, SMALLEST_HALF = 60000.0, 6e-5  # of scales that are kept in float16
AT_ONCE = 1 << 24  # weights that are unpacked at a time on a device


class UnpackedLinear(nn.Module):
    """A layer whose weights are unpacked for every product, some rows at a time."""

    kernel_reads = False
    weight: Tensor
    in_features: int
    out_features: int
    bias: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        return self.rows(x, 0, self.out_features)

    def rows(self, x: Tensor, start: int, stop: int) -> Tensor:
        if (made := few_rows_product(self, x, start, stop)) is not None:
            return made
        y = in_parts(self._unpacked, x, start, stop, self.in_features, AT_ONCE)
        return y if self.bias is None else y + self.bias[start:stop]

    @abstractmethod
    def _unpacked(self, x: Tensor, start: int, stop: int) -> Tensor:
        """x times the rows start to stop."""


class MatrixLinear(UnpackedLinear):
    """A layer whose weights kernels read as they lie."""

    kernel_reads = True

    @property
    @abstractmethod
    def matrix(self) -> PackedMatrix:
        """The weights where they are now."""

    def some(self, rows: Tensor | slice) -> Tensor:
        """The weights of `rows`, float32."""
        return self.matrix.take(rows).dense()

    def _unpacked(self, x: Tensor, start: int, stop: int) -> Tensor:
        return product(x, unpacked(self, start, stop, x.dtype))


class GroupedLinear(MatrixLinear):
    """Whole numbers of 2 to 6 or 8 bits, or of a table, with a scale and maybe a low for each group of inputs of each output.

    Scales and lows are numbers, or whole numbers of a unit that several groups share; those of 4 bits share the bytes of `scale`.
    """

    weight: Tensor  # [out, in x plane / 8] uint8, the lower 2 or 4 bits (`plane`) of codes side by side; of 8 bits [out, in] int8
    high: Tensor | None  # [out, in x (bits - plane) / 8] uint8, what is above these
    scale: Tensor  # [out, groups]
    low: Tensor | None
    unit: Tensor | None  # [out, any]
    low_unit: Tensor | None
    table: Tensor | None  # [16] int8, what codes of 4 bits stand for

    def __init__(self, matrices: Sequence[Matrix], bias: Tensor | None) -> None:
        """matrices: all of one type, the outputs of the layer one after the other."""
        super().__init__()
        kind = matrices[0].kind
        self.out_features, self.in_features = sum(matrix.outputs for matrix in matrices), matrices[0].inputs
        self.bits, self.first = kind.bits, kind.first
        self.plane = 4 if self.bits >= 4 else 2
        found: dict[str, list[Tensor]] = {name: [] for name in ("weight", "high", "scale", "low", "unit", "low_unit")}
        # What reorders or scales a matrix is done to scales that are numbers.
        units = all(matrix.groups is None and matrix.factor is None for matrix in matrices)
        for matrix in matrices:
            for start, rows in steps(matrix.blocks.view(matrix.outputs, -1, kind.nbytes), self.in_features):
                codes = _codes(matrix, rows, start, units)
                counted = codes.values.flatten(1)
                if self.bits < 8:
                    counted = (counted - self.first).to(torch.uint8)
                    found["weight"].append(side_by_side(counted & (1 << self.plane) - 1, self.plane))
                    if self.bits > self.plane:
                        found["high"].append(side_by_side(counted >> self.plane, self.bits - self.plane))
                else:
                    found["weight"].append(counted)
                for name in ("scale", "low", "unit", "low_unit"):
                    if (part := getattr(codes, name)) is not None:
                        found[name].append(part)
        made = {name: torch.cat(some) if some else None for name, some in found.items()}
        scale, low, unit, low_unit = (made[name] for name in ("scale", "low", "unit", "low_unit"))
        assert scale is not None
        self.group = self.in_features // scale.shape[1]
        dtype = torch.float16 if _half_serves(scale) and (low is None or _half_serves(low)) else torch.float32
        if unit is not None:
            dtype = torch.int8
            if self.bits == 2 and low is not None:  # scales and lows of 4 bits
                scale, low, dtype = scale + 16 * low, None, torch.uint8
        self.register_buffer("weight", made["weight"])
        self.register_buffer("high", made["high"])
        self.register_buffer("scale", scale.to(dtype))
        self.register_buffer("low", None if low is None else low.to(dtype))
        self.register_buffer("unit", None if unit is None else unit.half())
        self.register_buffer("low_unit", None if low_unit is None else low_unit.half())
        self.register_buffer("table", None if kind.table is None else kind.table.clone())
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @property
    def matrix(self) -> PackedMatrix:
        return PackedMatrix(
            self.weight, self.scale, self.out_features, self.in_features, self.group, self.high, self.low, self.unit,
            self.low_unit, self.table, float(self.first), self.plane if self.bits < 8 else 8,
        )  # fmt: skip


class WordLinear(MatrixLinear):
    """Places of words in a book, and their signs, with a scale for each group of inputs: whole numbers of a unit."""

    weight: Tensor  # [out, words] uint8, the lower 8 bits of places
    high: Tensor | None  # [out, any] uint8, what is above these, and where words are moved, which way
    signs: Tensor | None  # [out, in / 8] uint8
    scale: Tensor  # [out, groups / 2] uint8
    unit: Tensor  # [out, blocks of a row]
    table: Tensor  # [words, weights of a word] int8

    def __init__(self, matrices: Sequence[Matrix], bias: Tensor | None) -> None:
        """matrices: all of one type, their inputs in the order of the file."""
        super().__init__()
        kind = matrices[0].kind
        assert kind.words is not None and kind.table is not None
        self.out_features, self.in_features = sum(matrix.outputs for matrix in matrices), matrices[0].inputs
        found: dict[str, list[Tensor]] = {name: [] for name in ("weight", "high", "signs", "scale", "unit")}
        above = (len(kind.table) - 1).bit_length() - 8
        for matrix in matrices:
            for _, rows in steps(matrix.blocks.view(matrix.outputs, -1, kind.nbytes), self.in_features):
                words = kind.words(rows.reshape(-1, kind.nbytes))
                self.moved = words.down is not None
                places = words.places.view(len(rows), -1)
                found["weight"].append((places & 255).to(torch.uint8))
                if words.down is not None:
                    more = (places >> 8).to(torch.uint8) | (words.down.view(len(rows), -1) << 3)
                    found["high"].append(side_by_side(more, 4))
                elif above:
                    found["high"].append(side_by_side((places >> 8).to(torch.uint8), above))
                if words.signs is not None:
                    found["signs"].append(words.signs.reshape(len(rows), -1))
                found["scale"].append(side_by_side(words.steps.reshape(len(rows), -1), 4))
                found["unit"].append(words.unit.view(len(rows), -1))
        for name, parts in found.items():
            self.register_buffer(name, torch.cat(parts) if parts else None)
        self.group = self.in_features // (2 * self.scale.shape[1])
        if torch.equal(self.unit.half().float(), self.unit):
            self.unit = self.unit.half()
        self.register_buffer("table", kind.table.clone())
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    @property
    def matrix(self) -> PackedMatrix:
        return PackedMatrix(
            self.weight, self.scale, self.out_features, self.in_features, self.group, self.high, unit=self.unit,
            table=self.table, signs=self.signs, word=self.table.shape[1], moved=self.moved,
        )  # fmt: skip


class BlockLinear(UnpackedLinear):
    """The blocks of a file as they are, unpacked for every product: no more memory than the file has."""

    weight: Tensor  # [out, bytes of a row] uint8
    table: Tensor | None  # what its type looks numbers up in
    order: Tensor | None  # of the groups of inputs
    factor: Tensor | None  # [out]

    def __init__(self, matrices: Sequence[Matrix], bias: Tensor | None) -> None:
        """matrices: all of one type and order, the outputs of the layer one after the other."""
        super().__init__()
        first = matrices[0]
        self.kind = first.kind
        self.out_features, self.in_features = sum(matrix.outputs for matrix in matrices), first.inputs
        # Copies: a file that stays mapped cannot be deleted everywhere.
        self.register_buffer("weight", torch.cat([matrix.blocks.view(matrix.outputs, -1) for matrix in matrices]))
        self.register_buffer("table", None if self.kind.table is None else self.kind.table.clone())
        self.register_buffer("order", None if first.groups is None else first.groups.clone())
        factors = [torch.ones(m.outputs) if m.factor is None else m.factor for m in matrices]
        scaled = any(matrix.factor is not None for matrix in matrices)
        self.register_buffer("factor", torch.cat(factors) if scaled else None)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def _dense(self, rows: Tensor, factor: Tensor | None) -> Tensor:
        found = self.kind.read(rows.reshape(-1, self.kind.nbytes), self.table).dense()
        if self.order is not None:
            found = found.view(len(rows), len(self.order), -1)[:, self.order]
        found = found.reshape(len(rows), self.in_features)
        return found if factor is None else found * factor.unsqueeze(1)

    def some(self, rows: Tensor) -> Tensor:
        """The weights of `rows`, float32."""
        return self._dense(self.weight[rows], None if self.factor is None else self.factor[rows])

    def _unpacked(self, x: Tensor, start: int, stop: int) -> Tensor:
        factor = None if self.factor is None else self.factor[start:stop]
        return product(x, self._dense(self.weight[start:stop], factor).to(x.dtype))


class PackedEmbedding(nn.Module):
    """Rows of a packed layer by their numbers: only those that are asked for are unpacked."""

    def __init__(self, layer: MatrixLinear | BlockLinear, dtype: torch.dtype, shared: bool) -> None:
        """shared: the layer is the network's output head, too, and moves with it."""
        super().__init__()
        self.layer = None if shared else layer
        # In a tuple, or its weights would be in the state dict twice.
        self._shared = (layer,)
        self.dtype = dtype

    @property
    def device(self) -> torch.device:
        return self._shared[0].weight.device

    def forward(self, numbers: Tensor) -> Tensor:
        rows = self._shared[0].some(numbers.flatten())
        return rows.view(*numbers.shape, rows.shape[1]).to(self.dtype)


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


def _codes(matrix: Matrix, rows: Tensor, start: int, units: bool) -> Codes:
    """The codes of rows [n, blocks of a row, bytes] from `start` on, of a table those that are looked up in it.

    values: [n, groups of a row, weights of a group]; the others [n, groups or blocks of a row].
    """
    kind, order = matrix.kind, matrix.groups
    counted = None if kind.table is None else torch.arange(len(kind.table), dtype=torch.int8)
    found = kind.read(rows.reshape(-1, kind.nbytes), counted)
    if not units:
        found = found.spread()
    values = found.values.reshape(len(rows), -1, found.values.shape[-1])
    others = (found.scale, found.low, found.unit, found.low_unit)
    scale, low, unit, low_unit = (None if part is None else part.reshape(len(rows), -1) for part in others)
    assert scale is not None
    if order is not None:
        values, scale, low = values[:, order], scale[:, order], None if low is None else low[:, order]
    if matrix.factor is not None:
        factor = matrix.factor[start : start + len(rows)].unsqueeze(1)
        scale, low = scale * factor, None if low is None else low * factor
    return Codes(values, scale, low, unit, low_unit)


def _half_serves(scale: Tensor) -> bool:
    """Whether float16 holds `scale` as well as the products need: its largest numbers to eleven bits."""
    largest = float(scale.abs().max())
    return largest == 0 or SMALLEST_HALF < largest < LARGEST_HALF
