"""ColorMNet's value encoder: what is remembered of a frame and its colours."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..winograd import Conv3x3
from .feature_fusion import PLANES, FeatureFusion, gated_update
from .resnet import BasicBlock, grey_convolution, stage


@dataclass(frozen=True)
class ValueWidths:
    """Widths of the value encoder; the published file has the defaults."""

    stem: int = 64
    outputs: tuple[int, int, int] = (64, 128, 256)
    depths: tuple[int, int, int] = (2, 2, 2)
    value: int = 512
    reduced: int = 32  # bottleneck of the channel gate
    hidden: int = 64


class HiddenReinforcer(nn.Module):
    """The deep update of the sensory memory, from a memory frame's own value."""

    def __init__(self, value: int, hidden: int) -> None:
        super().__init__()
        self.transform = Conv3x3(value + hidden, 3 * hidden)

    def forward(self, value: Tensor, hidden: Tensor) -> Tensor:
        return gated_update(self.transform(torch.cat((value, hidden.to(value.dtype)), dim=1)), hidden)


class ValueEncoder(nn.Module):
    def __init__(self, widths: ValueWidths, f16: int) -> None:
        super().__init__()
        outputs, depths = widths.outputs, widths.depths
        self.conv1 = nn.Conv2d(3 + PLANES, widths.stem, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(widths.stem)
        self.layer1 = stage(BasicBlock, widths.stem, outputs[0], outputs[0], depths[0], 1)
        self.layer2 = stage(BasicBlock, outputs[0], outputs[1], outputs[1], depths[1], 2)
        self.layer3 = stage(BasicBlock, outputs[1], outputs[2], outputs[2], depths[2], 2)
        self.fuser = FeatureFusion(f16, outputs[2], widths.value, widths.reduced)
        self.hidden_reinforce = HiddenReinforcer(widths.value, widths.hidden)

    def forward(self, luminance: Tensor, chroma: Tensor, f16: Tensor) -> Tensor:
        """luminance [B, 1, H, W], chroma [B, 2, H, W] in -1..1, f16 [B, C, h, w]. Returns [B * 2, value, h, w].

        Each plane sees itself first and the other one second.
        """
        own = chroma.reshape(-1, 1, *chroma.shape[-2:])
        other = chroma.flip(1).reshape(-1, 1, *chroma.shape[-2:])
        x = grey_convolution(self.conv1, luminance.repeat_interleave(PLANES, 0), own, other)
        x = F.relu(F.max_pool2d(self.bn1(x), 3, 2, 1))
        x = self.layer3(self.layer2(self.layer1(x)))
        x = F.interpolate(x, f16.shape[-2:], mode="bilinear", align_corners=False)
        entry, skip = self.fuser.from_picture(f16)
        own_entry, own_skip = self.fuser.from_plane(x)
        return self.fuser(entry + own_entry, skip + own_skip)
