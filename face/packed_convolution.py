"""Convolutions on a CPU, with their weights in the order in which oneDNN computes.

torch brings them into that order anew in every call; for ArcFace and one face that is a quarter of the time. The weights
of the module stay as they are, so it may move to a device at any time; the packed ones are a second copy in memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .onnx_operators import Attributes, padded_for_conv


def can_pack(x: Tensor) -> bool:
    """Whether `x`, the input of a network, is computed by oneDNN."""
    return bool(
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and not torch.is_grad_enabled()
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and not torch.compiler.is_compiling()
        and hasattr(torch.ops.mkldnn, "_reorder_convolution_weight")
    )


class PackedConvolution:
    """One Conv node over two dimensions. Packs for the first size that it meets; other sizes are right, too.

    relu: whether the ReLU that follows is done with it.
    """

    def __init__(self, attributes: Attributes, x: Tensor, weight: Tensor, relu: bool = False) -> None:
        self.then = "relu" if relu else "none"
        x, self.padding = padded_for_conv(attributes, x, weight)
        self.strides = list(attributes.get("strides", [1, 1]))
        self.dilations = list(attributes.get("dilations", [1, 1]))
        self.groups = int(attributes.get("group", 1))
        self.attributes = attributes
        self.kernel = weight
        self.weight: Tensor = torch.ops.mkldnn._reorder_convolution_weight(
            weight.detach(), self.padding, self.strides, self.dilations, self.groups, list(x.shape)
        )

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        x, padding = padded_for_conv(self.attributes, x, self.kernel)
        made: Tensor = torch.ops.mkldnn._convolution_pointwise(
            x, self.weight, bias, padding, self.strides, self.dilations, self.groups, self.then, [], ""
        )
        return made
