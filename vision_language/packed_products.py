"""Products with packed weights on a card: of few rows, and of the experts that were chosen for some, by a kernel that unpacks in
registers; for more rows the weights as numbers, by one launch. What a kernel does not serve is torch's.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention.capabilities import on_device, one_line
from ..attention.first_results import compare
from ..products.operators import operator
from .packed_matrix import PackedMatrix

log = logging.getLogger("hotpath.vision_language")

CONFIGS = ((4, 1024, 4), (8, 512, 4), (4, 512, 2), (2, 2048, 4))  # outputs of a program, inputs at a time, warps
SHORT_CONFIGS = ((4, 1024, 4), (8, 1024, 4), (4, 2048, 4), (8, 512, 2))  # of several codes to a byte
FEW_ROWS = 4  # each reads packed weights anew, which is less than weights that were unpacked for all of them
SERVED = ("cuda",)  # types of devices
LOOKED_AT = 1 << 24  # weights of the first result of a kind
DTYPES = (torch.float16, torch.bfloat16, torch.float32)

_failed: dict[torch.device, str] = {}

allow_interpreter = False


def few_rows_product(layer: Any, x: Tensor, start: int, stop: int) -> Tensor | None:
    """x [..., inputs] times the outputs start to stop of a layer with a `matrix`, and their bias; None where x has more rows, or
    none, or torch multiplies."""
    if x.device.type not in SERVED or not layer.kernel_reads or not 0 < x.numel() <= FEW_ROWS * layer.in_features:
        return None
    if not torch.compiler.is_compiling() and (x.dtype not in DTYPES or why_not(x.device)):
        return None
    matrix: PackedMatrix = layer.matrix
    if (start, stop) != (0, layer.out_features):
        matrix = matrix.rows(start, stop)
    bias = None if layer.bias is None else layer.bias[start:stop]
    made: Tensor = PACKED_PRODUCT(x.reshape(-1, layer.in_features), None, bias, False, *matrix)
    return made.view(*x.shape[:-1], stop - start)


def chosen_product(matrix: PackedMatrix, count: int, x: Tensor, chosen: Tensor, gated: bool = False) -> Tensor:
    """Of each slot its row of x times the outputs of its expert, [slots, outputs]; half of these where one half gates the other.

    matrix: the outputs of `count` experts, one behind the other. chosen: [slots]. x: [rows, inputs], a row for as many slots.
    """
    codes, scale, outputs, *others = matrix  # not by _replace, which torch 2.5 does not compile
    made: Tensor = PACKED_PRODUCT(x, chosen, None, gated, codes, scale, outputs // count, *others)
    return made


def unpacked(layer: Any, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """The weights of the outputs start to stop, [stop - start, inputs] in `dtype`; start: where its scales begin.

    layer: one with a `matrix`. The first result of a kind is compared with torch's.
    """
    if torch.compiler.is_compiling() or why_not(layer.weight.device):
        numbers: Tensor = layer.matrix.rows(start, stop).dense()
        return numbers.to(dtype)
    matrix: PackedMatrix = layer.matrix
    try:
        from .packed_decode_kernel import unpack

        with on_device(matrix.codes.device):
            made = unpack(matrix.rows(start, stop), dtype)
        some = _looked_at(matrix, stop - start)
        kind = ("unpack", made.device, dtype, *matrix.kind, stop - start)
        compare(made[:some], kind, lambda: (matrix.rows(start, start + some).dense().to(dtype), None))
        return made
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # no compiler, a driver too old, a card that Triton does not know, numbers that are off
        _note_failure(matrix.codes.device, error)
        return matrix.rows(start, stop).dense().to(dtype)


def why_not(device: torch.device) -> str:
    """Why torch unpacks; "" where the kernel does."""
    if device.type != "cuda":
        return f"the kernel needs a GPU that Triton serves, this is {device.type}"
    if device in _failed:
        return _failed[device]
    interpreted, reason = _triton()
    return "Triton interprets, which is for tests" if interpreted and not allow_interpreter else reason


@functools.cache  # what cannot be imported is looked for anew each time, which every layer would wait for
def _triton() -> tuple[bool, str]:
    """Whether Triton interprets, and why it does not serve; "" where it does."""
    try:
        from .packed_decode_kernel import INTERPRETED
    except Exception as error:  # not installed, or too old
        return False, f"Triton does not serve ({one_line(error)})"
    return INTERPRETED, ""


def configs(matrix: PackedMatrix) -> tuple[tuple[int, int, int], ...]:
    """How the work may be divided, the first as a rule."""
    return SHORT_CONFIGS if matrix.plane < 8 else CONFIGS


def _looked_at(matrix: PackedMatrix, outputs: int) -> int:
    """How many of the outputs are compared: unpacked by torch they take several times four bytes a weight."""
    whole = LOOKED_AT // matrix.inputs // matrix.scaled_rows * matrix.scaled_rows
    return min(outputs, max(matrix.scaled_rows, whole))


def _note_failure(device: torch.device, error: Exception) -> None:
    _failed[device] = f"the kernel failed on {device} ({one_line(error)})"
    log.warning("packed weights are unpacked by torch: %s", _failed[device])


def _run(x: Tensor, chosen: Tensor | None, bias: Tensor | None, gated: bool, *parts: Any) -> Tensor:
    matrix = PackedMatrix(*parts)
    if x.dtype in DTYPES and not why_not(x.device):
        try:
            from .packed_decode_kernel import packed_product

            slots = len(x) if chosen is None else len(chosen)
            made = x.new_empty(slots, matrix.outputs // 2 if gated else matrix.outputs)
            with on_device(x.device):
                packed_product(x, matrix, made, configs(matrix)[0], bias, gated=gated, chosen=chosen)
            kind = ("packed", x.device, x.dtype, *matrix.kind, gated, chosen is None, slots == 1)
            if chosen is not None:
                compare(made, kind, lambda: (by_torch(x, matrix, chosen, bias, gated), None))
            else:
                some = _looked_at(matrix, matrix.outputs)
                first = None if bias is None else bias[:some]
                compare(made[:, :some], kind, lambda: (by_torch(x, matrix.rows(0, some), None, first, False), None))
            return made
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # as above
            _note_failure(x.device, error)
    return by_torch(x, matrix, chosen, bias, gated)


def by_torch(x: Tensor, matrix: PackedMatrix, chosen: Tensor | None, bias: Tensor | None, gated: bool) -> Tensor:
    """What the kernel computes. Arguments as of `chosen_product`; without `chosen` each row of x meets the same weights."""
    if chosen is None:
        made = F.linear(x, matrix.dense().to(x.dtype), None if bias is None else bias.to(x.dtype))
    else:
        places = torch.arange(matrix.outputs, device=x.device)
        rows = (chosen.unsqueeze(1) * matrix.outputs + places).flatten()
        weights = matrix.take(rows).dense().to(x.dtype).view(len(chosen), matrix.outputs, -1)
        given = x.repeat_interleave(len(chosen) // len(x), 0)
        made = (weights @ given.unsqueeze(-1)).squeeze(-1)
    if gated:
        gate, up = made.chunk(2, dim=-1)
        made = F.silu(gate) * up
    return made


def layer_by_torch(layer: Any, x: Tensor) -> Tensor:
    """A layer with a `matrix` by torch's operators, some of its outputs at a time."""
    matrix: PackedMatrix = layer.matrix
    step = _looked_at(matrix, matrix.outputs)
    parts = [matrix.rows(first, min(first + step, matrix.outputs)) for first in range(0, matrix.outputs, step)]
    made = torch.cat([by_torch(x, part, None, None, False) for part in parts], dim=1)
    return made if layer.bias is None else made + layer.bias.to(x.dtype)


def _shape_of_result(
    x: Tensor, chosen: Tensor | None, bias: Any, gated: bool, codes: Any, scale: Any, outputs: int, *_: Any
) -> Tensor:
    return x.new_empty(len(x) if chosen is None else len(chosen), outputs // 2 if gated else outputs)


PACKED_PRODUCT = operator(
    "packed_product",
    "Tensor x, Tensor? chosen, Tensor? bias, bool gated, Tensor codes, Tensor scale, SymInt outputs, SymInt inputs, int group, "
    "Tensor? high, Tensor? low, Tensor? unit, Tensor? low_unit, Tensor? table, float first, int plane, bool floats, "
    "int scaled_rows, Tensor? signs, int word, bool moved",
    _run,
    _shape_of_result,
)
