"""Convolutions on a CPU, with their weights in the order in which oneDNN computes.

torch brings them into that order anew in every call; for ArcFace and one face that is a quarter of the time. The order
belongs to a size: with weights packed for half the side a convolution can take ten times as long.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def available() -> bool:
    """Whether this torch has oneDNN, with the way to order weights ahead."""
    mkldnn = torch.backends.mkldnn
    return bool(mkldnn.is_available() and mkldnn.enabled and hasattr(torch.ops.mkldnn, "_reorder_convolution_weight"))


def can_pack(x: Tensor) -> bool:
    """Whether `x`, the input of a network, is computed by oneDNN."""
    plain = x.device.type == "cpu" and x.dtype == torch.float32
    return plain and not torch.is_grad_enabled() and not torch.compiler.is_compiling() and available()


class PackedConvolution:
    """One convolution over two dimensions, packed for inputs of one size: a second copy of its weights."""

    def __init__(
        self,
        weight: Tensor,
        size: torch.Size,
        padding: Sequence[int],
        strides: Sequence[int],
        dilations: Sequence[int],
        groups: int = 1,
        relu: bool = False,
    ) -> None:
        """weight: [O, C / groups, h, w]; size: of the input, [N, C, H, W]; relu: with the ReLU that follows it."""
        self.size = size
        self._settings = (list(padding), list(strides), list(dilations), groups)
        self._then = "relu" if relu else "none"
        self._weight: Tensor = torch.ops.mkldnn._reorder_convolution_weight(
            weight.detach(), *self._settings, list(size)
        )

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        made: Tensor = torch.ops.mkldnn._convolution_pointwise(
            x, self._weight, bias, *self._settings, self._then, [], ""
        )
        return made
