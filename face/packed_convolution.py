"""Convolutions on a CPU, with their weights in the order in which oneDNN computes.

torch brings them into that order anew in every call; for ArcFace and one face that is a quarter of the time. The order
belongs to a size: with weights packed for half the side a convolution can take ten times as long. The weights of the
module stay as they are, so it may move to a device at any time; the packed ones are a second copy in memory.
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


class PackedConvolutions:
    """The Conv nodes over two dimensions of one network, packed for inputs of one size."""

    def __init__(self, size: torch.Size, keep: bool = True) -> None:
        """size: of the network's input, [N, C, H, W]; keep: the packed weights, for the next call."""
        self.size, self.keep = size, keep
        self._made: dict[int, _PackedConvolution] = {}

    def __len__(self) -> int:
        return len(self._made)

    def __call__(
        self,
        position: int,
        attributes: Attributes,
        relu: bool,
        x: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """What the node at `position` of the graph computes; relu: with the ReLU that follows it."""
        assert x is not None and weight is not None
        made = self._made.get(position)
        if made is None:
            made = _PackedConvolution(attributes, x, weight, relu)
            if self.keep:
                self._made[position] = made
        return made(x, bias)


class _PackedConvolution:
    def __init__(self, attributes: Attributes, x: Tensor, weight: Tensor, relu: bool) -> None:
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
