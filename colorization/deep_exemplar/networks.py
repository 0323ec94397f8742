"""Deep Exemplar's three networks (Zhang et al., "Deep Exemplar-based Video Colorization", CVPR 2019) as one module."""

from __future__ import annotations

import torch
from torch import nn

from .color_net import ColorVidNet
from .vgg import VGG19
from .warp import WarpNet


class DeepExemplar(nn.Module):
    """The three networks. The first two stay in float32 whatever the third computes in: half precision flips matches,
    and every flip changes the whole frame through its instance norms."""

    def __init__(self, vgg: VGG19, warp: WarpNet, color_net: ColorVidNet) -> None:
        super().__init__()
        self.vgg = vgg
        self.warp = warp
        self.color_net = color_net

    @property
    def compute_device(self) -> torch.device:
        # Not `device`: ComfyUI's patcher keeps an attribute of its own under that name.
        return self.color_net.conv10_ab.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.color_net.conv10_ab.weight.dtype
