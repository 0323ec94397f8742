"""The convolutions of an ONNX network on a CPU, packed for inputs of one size.

The weights of the module stay as they are, so it may move to a device at any time; the packed ones are a second copy in
memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..products.convolution import PackedConvolution
from .onnx_operators import Attributes, conv, padded_for_conv


class PackedConvolutions:
    """The Conv nodes over two dimensions of one network, packed for inputs of one size."""

    def __init__(self, size: torch.Size, keep: bool = True) -> None:
        """size: of the network's input, [N, C, H, W]; keep: the packed weights, for the next call."""
        self.size, self.keep = size, keep
        self._made: dict[int, PackedConvolution] = {}

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
        if x.shape[1] == 1:  # torch reads the output of one column in the wrong order
            made_plainly = conv(attributes, x, weight, bias)
            return made_plainly.relu_() if relu else made_plainly
        x, padding = padded_for_conv(attributes, x, weight)
        made = self._made.get(position)
        if made is None:
            strides, dilations = attributes.get("strides", [1, 1]), attributes.get("dilations", [1, 1])
            groups = int(attributes.get("group", 1))
            made = PackedConvolution(weight, x.shape, padding, strides, dilations, groups, relu)
            if self.keep:
                self._made[position] = made
        return made(x, bias)
