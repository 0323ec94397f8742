"""The VGG-19 of Deep Exemplar: Caffe's weights and preprocessing, under the project's own layer names."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..winograd import Conv3x3

DEPTHS = (2, 2, 4, 4, 4)  # convolutions between two poolings
# Caffe's mean, blue first, over 255.
MEAN = (0.40760392, 0.45795686, 0.48501961)
# What correspondence is found with: the second convolution of the blocks from the second on.
FEATURES = ("conv2_2", "conv3_2", "conv4_2", "conv5_2")


class VGG19(nn.Module):
    """widths: channels of the five blocks; the published file has the defaults."""

    def __init__(self, widths: Sequence[int] = (64, 128, 256, 512, 512)) -> None:
        super().__init__()
        self.widths = tuple(widths)
        inputs = 3
        for block, (width, depth) in enumerate(zip(self.widths, DEPTHS, strict=True), start=1):
            for index in range(1, depth + 1):
                self.add_module(f"conv{block}_{index}", Conv3x3(inputs, width))
                inputs = width

    def forward(self, rgb: Tensor) -> list[Tensor]:
        """rgb: [B, 3, H, W] in 0..1. Returns the features at 1/2, 1/4, 1/8 and 1/16; what lies behind the last of
        them is not computed."""
        # Numbers, not a tensor of them: its copy to the device would wait for the device.
        blue_first = rgb.flip(1).unbind(1)
        x = torch.stack([(x - mean) * 255 for x, mean in zip(blue_first, MEAN, strict=True)], dim=1)
        found: list[Tensor] = []
        for block, depth in enumerate(DEPTHS, start=1):
            for index in range(1, depth + 1):
                name = f"conv{block}_{index}"
                x = F.relu(self.get_submodule(name)(x))
                if name in FEATURES:
                    found.append(x)
                if name == FEATURES[-1]:
                    return found
            x = F.max_pool2d(x, 2)
        return found
