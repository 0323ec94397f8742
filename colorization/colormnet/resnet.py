"""The residual trunks of ColorMNet: ResNet-50 for keys and ResNet-18 for values, both without their last stage."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..winograd import Conv3x3


class BasicBlock(nn.Module):
    """Two 3x3 convolutions (He et al. 2015, figure 5 left)."""

    def __init__(self, inputs: int, planes: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(inputs, planes, stride)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = Conv3x3(planes, outputs, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = shortcut(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 (figure 5 right); the stride sits on the 3x3."""

    def __init__(self, inputs: int, planes: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = conv3x3(planes, planes, stride)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample = shortcut(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


def conv3x3(inputs: int, outputs: int, stride: int) -> nn.Conv2d:
    if stride == 1:
        return Conv3x3(inputs, outputs, bias=False)
    return nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)


def shortcut(inputs: int, outputs: int, stride: int) -> nn.Sequential | None:
    if stride == 1 and inputs == outputs:
        return None
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


def stage(
    block: type[BasicBlock] | type[Bottleneck], inputs: int, planes: int, outputs: int, depth: int, stride: int
) -> nn.Sequential:
    """`depth` blocks; the first changes the width and the size."""
    first = block(inputs, planes, outputs, stride)
    return nn.Sequential(first, *(block(outputs, planes, outputs, 1) for _ in range(depth - 1)))


def grey_convolution(conv: nn.Conv2d, luminance: Tensor, *others: Tensor) -> Tensor:
    """`conv` over (L, L, L, *others) without the two copies of L: its first three planes are added up instead."""
    weight = conv.weight[:, :3].sum(1, keepdim=True)
    inputs = luminance
    if others:
        weight = torch.cat((weight, conv.weight[:, 3:]), dim=1)
        inputs = torch.cat((luminance, *others), dim=1)
    return F.conv2d(inputs, weight, conv.bias, conv.stride, conv.padding)
