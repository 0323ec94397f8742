"""How ColorMNet merges features of the picture with features of one colour plane (STCN's fusion block, XMem's GRU).

Both colour planes see the same picture, and the picture is known before its colours are. So every convolution over
"picture and plane" is split in two: the picture's half is computed once, ahead of time and for many frames together,
and only the plane's half waits for the recurrent state. Planes lie in the batch dimension: [B * planes, C, h, w].
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..winograd import Conv3x3

PLANES = 2  # a and b


class Conv(nn.Module):
    """A convolution one level deeper, as the checkpoint's keys are named."""

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class ChannelGate(nn.Module):
    def __init__(self, channels: int, reduced: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Flatten(), nn.Linear(channels, reduced), nn.ReLU(), nn.Linear(reduced, channels))

    def forward(self, x: Tensor) -> Tensor:
        gate = self.mlp(x.mean(dim=(2, 3))) + self.mlp(x.amax(dim=(2, 3)))
        return x * gate.sigmoid()[:, :, None, None]


class SpatialGate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.spatial = Conv(2, 1, 7)

    def forward(self, x: Tensor) -> Tensor:
        pooled = torch.cat((x.amax(dim=1, keepdim=True), x.mean(dim=1, keepdim=True)), dim=1)
        return x * self.spatial(pooled).sigmoid()


class BlockAttention(nn.Module):
    """CBAM (Woo et al. 2018): a gate over channels, then one over places."""

    def __init__(self, channels: int, reduced: int) -> None:
        super().__init__()
        self.ChannelGate = ChannelGate(channels, reduced)
        self.SpatialGate = SpatialGate()

    def forward(self, x: Tensor) -> Tensor:
        return self.SpatialGate(self.ChannelGate(x))


class PreactivationBlock(nn.Module):
    """conv(relu(conv(relu(x)))) + shortcut(x), the shortcut a 3x3 convolution where widths differ."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.downsample = Conv3x3(inputs, outputs) if inputs != outputs else None
        self.conv1 = Conv3x3(inputs, outputs)
        self.conv2 = Conv3x3(outputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(F.relu(self.conv1(F.relu(x))))
        return y + (x if self.downsample is None else self.downsample(x))

    def partial(self, x: Tensor, first: int, bias: bool) -> tuple[Tensor, Tensor]:
        """What the channels from `first` on add to the first convolution and to the shortcut."""
        assert self.downsample is not None
        return self.conv1.partial(F.relu(x), first, bias), self.downsample.partial(x, first, bias)

    def finish(self, entry: Tensor, skip: Tensor) -> Tensor:
        """The block's output from the sums of its partial results."""
        return self.conv2(F.relu(entry)) + skip


class FeatureFusion(nn.Module):
    """cat(picture, plane) -> residual block -> CBAM -> residual block."""

    def __init__(self, picture: int, plane: int, outputs: int, reduced: int) -> None:
        super().__init__()
        self.picture = picture
        self.block1 = PreactivationBlock(picture + plane, outputs)
        self.attention = BlockAttention(outputs, reduced)
        self.block2 = PreactivationBlock(outputs, outputs)

    def from_picture(self, f16: Tensor) -> tuple[Tensor, Tensor]:
        """The picture's half of the first block, repeated for the planes. f16: [B, C, h, w]."""
        entry, skip = self.block1.partial(f16, 0, bias=True)
        return entry.repeat_interleave(PLANES, 0), skip.repeat_interleave(PLANES, 0)

    def from_plane(self, g: Tensor, offset: int = 0) -> tuple[Tensor, Tensor]:
        """What plane channels `offset...` add to it. g: [B * planes, C, h, w]."""
        return self.block1.partial(g, self.picture + offset, bias=False)

    def forward(self, entry: Tensor, skip: Tensor) -> Tensor:
        g = self.block1.finish(entry, skip)
        return self.block2(g + self.attention(g))


def gated_update(values: Tensor, hidden: Tensor) -> Tensor:
    """XMem's GRU: values [B, 3C, h, w] hold forget gate, update gate and candidate; hidden [B, C, h, w].

    Unlike the usual GRU the candidate does not see the forget gate. Computed and kept in float32: the state runs
    through every frame of a film.
    """
    forget, update, candidate = values.float().chunk(3, dim=1)
    forget, update = forget.sigmoid(), update.sigmoid()
    return forget * hidden * (1 - update) + update * candidate.tanh()
