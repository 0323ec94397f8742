"""ColorMNet's decoder: from what memory says to the two colour planes of a frame.

`from_picture` and `add_readout` do all that does not depend on the sensory state, for many frames at once; `forward` is the
recurrent rest.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..winograd import Conv3x3
from .feature_fusion import PLANES, FeatureFusion, PreactivationBlock, gated_update


@dataclass(frozen=True)
class DecoderWidths:
    """Widths of the decoder; the published file has the defaults."""

    fused: int = 512
    reduced: int = 32
    up8: int = 256
    up4: int = 256
    middle: int = 256  # of the hidden update


@dataclass
class DecoderContext:
    """What is known of frames before their sensory state is: sums of the first block and the skip connections.

    entry, skip: [T * planes, fused, h, w]; skip8 [T, fused, 2h, 2w]; skip4 [T, up8, 4h, 4w].
    """

    entry: Tensor
    skip: Tensor
    skip8: Tensor
    skip4: Tensor

    def frame(self, index: int) -> DecoderContext:
        return self.frames(slice(index, index + 1))

    def frames(self, rows: slice) -> DecoderContext:
        """Those of some frames alone."""
        planes = slice(rows.start * PLANES, rows.stop * PLANES)
        return DecoderContext(self.entry[planes], self.skip[planes], self.skip8[rows], self.skip4[rows])


class HiddenUpdater(nn.Module):
    """The sensory memory's update from the decoder's features at three scales."""

    def __init__(self, inputs: tuple[int, int, int], middle: int, hidden: int) -> None:
        super().__init__()
        self.g16_conv = nn.Conv2d(inputs[0], middle, 1)
        self.g8_conv = nn.Conv2d(inputs[1], middle, 1)
        self.g4_conv = nn.Conv2d(inputs[2], middle, 1)
        self.transform = Conv3x3(middle + hidden, 3 * hidden)

    def forward(self, g16: Tensor, g8: Tensor, g4: Tensor, logits: Tensor, hidden: Tensor) -> Tensor:
        g4 = F.avg_pool2d(torch.cat((g4, logits), dim=1), 4)
        g = self.g16_conv(g16) + self.g8_conv(F.avg_pool2d(g8, 2)) + self.g4_conv(g4)
        return gated_update(self.transform(torch.cat((g, hidden.to(g.dtype)), dim=1)), hidden)


class Upsampling(nn.Module):
    """Twice the size, plus the picture's features at that size, through a residual block."""

    def __init__(self, skip: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.skip_conv = Conv3x3(skip, inputs)
        self.out_conv = PreactivationBlock(inputs, outputs)

    def forward(self, skip: Tensor, g: Tensor) -> Tensor:
        """skip: already through `skip_conv`, [B, C, 2h, 2w]; g: [B * planes, C, h, w]."""
        g = F.interpolate(g, scale_factor=2, mode="bilinear", align_corners=False)
        # Both planes see the same picture.
        both = g.unflatten(0, (-1, PLANES)) + skip[:, None]
        return self.out_conv(both.flatten(0, 1))


class Decoder(nn.Module):
    def __init__(self, widths: DecoderWidths, features: tuple[int, int, int], value: int, hidden: int) -> None:
        """features: channels of the picture's features at 1/16, 1/8, 1/4."""
        super().__init__()
        self.value = value
        self.fuser = FeatureFusion(features[0], value + hidden, widths.fused, widths.reduced)
        self.hidden_update = HiddenUpdater((widths.fused, widths.up8, widths.up4 + 1), widths.middle, hidden)
        self.up_16_8 = Upsampling(features[1], widths.fused, widths.up8)
        self.up_8_4 = Upsampling(features[2], widths.up8, widths.up4)
        self.pred = nn.Conv2d(widths.up4, 1, 3, padding=1)

    def from_picture(self, f16: Tensor, f8: Tensor, f4: Tensor) -> DecoderContext:
        """The picture's share, [T, C, ...] each; the features themselves are not needed afterwards."""
        entry, skip = self.fuser.from_picture(f16)
        return DecoderContext(entry, skip, self.up_16_8.skip_conv(f8), self.up_8_4.skip_conv(f4))

    def add_readout(self, context: DecoderContext, readout: Tensor) -> DecoderContext:
        """readout: [T * planes, value, h, w], what working, long-term and short-term memory say."""
        entry, skip = self.fuser.from_plane(readout.to(context.entry.dtype))
        return DecoderContext(context.entry + entry, context.skip + skip, context.skip8, context.skip4)

    def forward(self, context: DecoderContext, hidden: Tensor, update: bool) -> tuple[Tensor, Tensor]:
        """context of one frame, hidden [planes, hidden, h, w] float32.

        Returns logits [1, planes, H, W] at full size, float32, and the hidden state, updated or as it was.
        """
        entry, skip = self.fuser.from_plane(hidden.to(context.entry.dtype), self.value)
        g16 = self.fuser(context.entry + entry, context.skip + skip)
        g8 = self.up_16_8(context.skip8, g16)
        g4 = self.up_8_4(context.skip4, g8)
        logits = self.pred(F.relu(g4))
        if update:
            hidden = self.hidden_update(g16, g8, g4, logits, hidden)
        logits = F.interpolate(logits.float(), scale_factor=4, mode="bilinear", align_corners=False)
        return logits.transpose(0, 1), hidden
