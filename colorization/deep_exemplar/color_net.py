"""Deep Exemplar's colour network (section 3.2): a frame, its matched colours and the last frame, to chroma."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..winograd import Conv3x3

INPUTS = 7  # L, matched a and b, similarity, last frame's L, a and b
CHROMA_RANGE = 128.0
HALF_SIZE_GAIN = (
    1.25  # of chroma at half the size of the result: so the network was trained, and its programs enlarge it
)


def halving(channels: int) -> nn.Conv2d:
    """Every second pixel, scaled by a number per channel."""
    return nn.Conv2d(channels, channels, 1, 2, bias=False, groups=channels)


def doubling(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Upsample(scale_factor=2), Conv3x3(inputs, outputs))


class ColorVidNet(nn.Module):
    """stem: of the first convolution; widths: at full size, 1/2, 1/4 and 1/8; last: of the way back at full size.

    The defaults are the published file's.
    """

    def __init__(self, stem: int = 32, widths: Sequence[int] = (64, 128, 256, 512), last: int = 128) -> None:
        super().__init__()
        w1, w2, w3, w4 = widths
        self.conv1_1 = nn.Sequential(Conv3x3(INPUTS, stem), nn.ReLU(), Conv3x3(stem, w1))
        self.conv1_2 = Conv3x3(w1, w1)
        self.conv1_2norm_ss = halving(w1)
        self.conv2_1, self.conv2_2 = Conv3x3(w1, w2), Conv3x3(w2, w2)
        self.conv2_2norm_ss = halving(w2)
        self.conv3_1, self.conv3_2, self.conv3_3 = Conv3x3(w2, w3), Conv3x3(w3, w3), Conv3x3(w3, w3)
        self.conv3_3norm_ss = halving(w3)
        self.conv4_1, self.conv4_2, self.conv4_3 = Conv3x3(w3, w4), Conv3x3(w4, w4), Conv3x3(w4, w4)
        self.conv5_1, self.conv5_2, self.conv5_3 = Conv3x3(w4, w4, 2), Conv3x3(w4, w4, 2), Conv3x3(w4, w4, 2)
        self.conv6_1, self.conv6_2, self.conv6_3 = Conv3x3(w4, w4, 2), Conv3x3(w4, w4, 2), Conv3x3(w4, w4, 2)
        self.conv7_1, self.conv7_2, self.conv7_3 = Conv3x3(w4, w4), Conv3x3(w4, w4), Conv3x3(w4, w4)
        self.conv8_1 = doubling(w4, w3)
        self.conv3_3_short = Conv3x3(w3, w3)
        self.conv8_2, self.conv8_3 = Conv3x3(w3, w3), Conv3x3(w3, w3)
        self.conv9_1 = doubling(w3, w2)
        self.conv2_2_short = Conv3x3(w2, w2)
        self.conv9_2 = Conv3x3(w2, w2)
        self.conv10_1 = doubling(w2, last)
        self.conv1_2_short = Conv3x3(w1, last)
        self.conv10_2 = Conv3x3(last, last)
        self.conv10_ab = nn.Conv2d(last, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, 7, H, W], H and W multiples of 8; L centred at 0, ab in Lab units. Returns ab in -128..128."""
        full = self._block(x, "conv1_1", "conv1_2")
        half = self._block(self.conv1_2norm_ss(full), "conv2_1", "conv2_2")
        quarter = self._block(self.conv2_2norm_ss(half), "conv3_1", "conv3_2", "conv3_3")
        deep = self._block(self.conv3_3norm_ss(quarter), "conv4_1", "conv4_2", "conv4_3")
        for block in (5, 6, 7):
            deep = self._block(deep, *(f"conv{block}_{index}" for index in (1, 2, 3)))
        y = F.relu(self.conv8_1(deep) + self.conv3_3_short(quarter))
        y = self._block(y, "conv8_2", "conv8_3")
        y = F.relu(self.conv9_1(y) + self.conv2_2_short(half))
        y = self._block(y, "conv9_2")
        y = F.relu(self.conv10_1(y) + self.conv1_2_short(full))
        y = F.leaky_relu(self.conv10_2(y), 0.2)
        return torch.tanh(self.conv10_ab(y).float()) * CHROMA_RANGE

    def _block(self, x: Tensor, *names: str) -> Tensor:
        for name in names:
            x = F.relu(self.get_submodule(name)(x))
        return F.instance_norm(x)
