"""Deep Exemplar's correspondence network (Zhang et al., CVPR 2019, section 3.1): comparable features of two pictures.

Its original compares every place of the frame with every place of the reference in one matrix and takes a softmax so
sharp that it is the argmax. Here the two sides are separate: the reference's features are computed once, the frames'
in batches, and `attention.best_match` finds the argmax.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..winograd import Conv3x3


class ResidualBlock(nn.Module):
    """Two reflected 3x3 convolutions with instance norm; one PReLU slope serves both."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = Conv3x3(channels, channels, padding=0)
        self.prelu = nn.PReLU()
        self.conv2 = Conv3x3(channels, channels, padding=0)

    def forward(self, x: Tensor) -> Tensor:
        y = self.prelu(F.instance_norm(self.conv1(_reflected(x))))
        y = F.instance_norm(self.conv2(_reflected(y)))
        return self.prelu(y + x)


def head(inputs: int, middle: int, outputs: int, stride: int = 1, between: int = 1, after: int = 1) -> nn.Sequential:
    """Two reflected convolutions with instance norm and PReLU, with nearest enlargements between and after them.

    The order of the layers gives the checkpoint's key names.
    """
    layers: list[nn.Module] = [
        nn.ReflectionPad2d(1),
        Conv3x3(inputs, middle, padding=0),
        nn.InstanceNorm2d(middle),
        nn.PReLU(),
    ]
    if between > 1:
        layers.append(nn.Upsample(scale_factor=between))
    layers += [
        nn.ReflectionPad2d(1),
        Conv3x3(middle, outputs, padding=0) if stride == 1 else nn.Conv2d(middle, outputs, 3, stride),
        nn.InstanceNorm2d(outputs),
        nn.PReLU(),
    ]
    if after > 1:
        layers.append(nn.Upsample(scale_factor=after))
    return nn.Sequential(*layers)


class WarpNet(nn.Module):
    """features: channels of VGG's four maps; middles: inside the heads; width: of each head's output; inner: of what
    is compared. The defaults are the published file's."""

    def __init__(
        self,
        features: Sequence[int] = (128, 256, 512, 512),
        middles: Sequence[int] = (128, 128, 256, 256),
        width: int = 64,
        inner: int = 256,
    ) -> None:
        super().__init__()
        self.layer2_1 = head(features[0], middles[0], width, stride=2)
        self.layer3_1 = head(features[1], middles[1], width)
        self.layer4_1 = head(features[2], middles[2], width, after=2)
        self.layer5_1 = head(features[3], middles[3], width, between=2, after=2)
        self.layer = nn.Sequential(*(ResidualBlock(4 * width) for _ in range(3)))
        self.theta = nn.Conv2d(4 * width, inner, 1)
        self.phi = nn.Conv2d(4 * width, inner, 1)

    def frame_features(self, vgg: Sequence[Tensor]) -> Tensor:
        """vgg: VGG's four maps of frames. Returns unit vectors [B, inner, h, w] at 1/4."""
        return _unit(self.theta(self._features(vgg)))

    def reference_features(self, vgg: Sequence[Tensor]) -> Tensor:
        """The same for references."""
        return _unit(self.phi(self._features(vgg)))

    def _features(self, vgg: Sequence[Tensor]) -> Tensor:
        heads = (self.layer2_1, self.layer3_1, self.layer4_1, self.layer5_1)
        maps = [layer(_normalised(x)) for layer, x in zip(heads, vgg, strict=True)]
        missing = maps[0].shape[-2] - maps[3].shape[-2]
        if missing:
            # Heights of 8 more than a multiple of 16 lose half a row at 1/16: two rows of 1/4, one on either side.
            maps[3] = F.pad(maps[3], (0, 0, 1, 1), mode="replicate")
        return self.layer(torch.cat(maps, dim=1))


def legal_size(height: int, width: int) -> tuple[int, int]:
    """The smallest size WarpNet takes that holds height x width: the width a multiple of 16, the height of 8.

    At least 32 each way: reflection needs two rows at 1/16.
    """
    return max(32, -(-height // 8) * 8), max(32, -(-width // 16) * 16)


def _reflected(x: Tensor) -> Tensor:
    return F.pad(x, (1, 1, 1, 1), mode="reflect")


def _normalised(x: Tensor) -> Tensor:
    return x / (x.norm(dim=1, keepdim=True) + sys.float_info.epsilon)


def _unit(x: Tensor) -> Tensor:
    """Centred over the picture, then unit length at every place."""
    return _normalised(x - x.mean(dim=(2, 3), keepdim=True))
