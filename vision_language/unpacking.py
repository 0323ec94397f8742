"""Packed weights as numbers, for products of more rows than the kernels of a decode step take: by one launch, or by torch."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..attention.capabilities import one_line
from ..attention.first_results import compare
from .packed_matrix import PackedMatrix

log = logging.getLogger("hotpath.vision_language")

_failed: dict[torch.device, str] = {}

allow_interpreter = False


def unpacked(layer: Any, start: int, stop: int, dtype: torch.dtype, by_torch: Callable[[], Tensor]) -> Tensor:
    """The weights of the outputs start to stop, [stop - start, inputs] in `dtype`; start: where its scales begin.

    layer: one with a `matrix`. by_torch: the same by torch's operators, for where the kernel does not serve; the first result of
    a kind is compared with it.
    """
    if torch.compiler.is_compiling() or why_not(layer.weight.device):
        return by_torch()
    matrix: PackedMatrix = layer.matrix
    try:
        from .packed_decode_kernel import unpack

        made = unpack(matrix.rows(start, stop), dtype)
        compare(made, ("unpack", made.device, dtype, *matrix.kind, stop - start), lambda: (by_torch(), None))
        return made
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # no compiler, a driver too old, a card that Triton does not know, numbers that are off
        _failed[matrix.codes.device] = f"the kernel failed on {matrix.codes.device} ({one_line(error)})"
        log.warning("packed weights are unpacked by torch: %s", _failed[matrix.codes.device])
        return by_torch()


def why_not(device: torch.device) -> str:
    """Why torch unpacks; "" where the kernel does."""
    if device.type != "cuda":
        return f"the kernel needs a GPU that Triton serves, this is {device.type}"
    if device in _failed:
        return _failed[device]
    try:
        from .fused_decode_kernel import INTERPRETED
    except Exception as error:  # not installed, or too old
        return f"Triton does not serve ({one_line(error)})"
    return "Triton interprets, which is for tests" if INTERPRETED and not allow_interpreter else ""
