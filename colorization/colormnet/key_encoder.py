"""ColorMNet's key encoder (section 3.1 of the paper): ResNet features guided by DINOv2's through channel attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...products.metal import readable
from ..winograd import Conv3x3
from .dinov2 import Attention, VisionTransformer
from .resnet import Bottleneck, grey_convolution, stage


@dataclass(frozen=True)
class EncoderWidths:
    """Widths of the key encoder; the published file has the defaults."""

    stem: int = 64
    planes: tuple[int, int, int] = (64, 128, 256)
    outputs: tuple[int, int, int] = (256, 512, 1024)
    depths: tuple[int, int, int] = (3, 4, 6)
    vit_width: int = 384
    vit_depth: int = 12
    vit_hidden: int = 1536
    vit_patch: int = 14
    vit_grid: int = 37
    vit_levels: int = 4
    heads: int = 8
    fused: tuple[int, int, int] = (2048, 1024, 512)  # of the queries and keys, at 1/16, 1/8 and 1/4


class ChannelNorm(nn.Module):
    """Layer norm over the channels of [B, C, H, W]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = F.layer_norm(x.permute(0, 2, 3, 1), self.weight.shape, self.weight, self.bias, 1e-6)
        return y.permute(0, 3, 1, 2)


class CrossChannelAttention(nn.Module):
    """Attention between the channels of two maps: an image-sized sum per pair of channels, softmax over channels."""

    def __init__(self, channels: int, inner: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.to_q = nn.Conv2d(channels, inner, 1)
        self.to_q_dw = nn.Conv2d(inner, inner, 3, padding=1, groups=inner)
        self.to_k = nn.Conv2d(channels, inner, 1)
        self.to_k_dw = nn.Conv2d(inner, inner, 3, padding=1, groups=inner)
        self.to_v = nn.Conv2d(channels, inner, 1)
        self.to_v_dw = nn.Conv2d(inner, inner, 3, padding=1, groups=inner)
        self.to_out = nn.Sequential(nn.Conv2d(inner, channels, 1))

    def forward(self, guide: Tensor, features: Tensor) -> Tensor:
        """guide, features: [B, C, H, W]; queries come from the guide."""
        q = self._normalised(self.to_q_dw(self.to_q(guide)))
        k = self._normalised(self.to_k_dw(self.to_k(features)))
        v = self.to_v_dw(self.to_v(features)).flatten(2)
        attention = ((q @ k.transpose(-2, -1)).float() * self.temperature.float()).softmax(dim=-1)
        # Out = projection . attention . v: the two small matrices first, so v is read once.
        weight, bias = self.to_out[0].get_parameter("weight"), self.to_out[0].get_parameter("bias")
        projection = weight.reshape(len(weight), self.heads, -1).transpose(0, 1).to(attention.dtype)
        mixing = (projection @ attention).transpose(1, 2).flatten(2)
        y = torch.baddbmm(bias.view(1, -1, 1), mixing.to(v.dtype), v)
        return y.view(guide.shape)

    def _normalised(self, x: Tensor) -> Tensor:
        """[B, heads, C / heads, H * W], unit length over the image. The squares of half-precision maps overflow, so
        the norm is summed in float32, without a float32 copy of the map."""
        flat = x.reshape(len(x), self.heads, -1, x.shape[-2] * x.shape[-1])
        norm = torch.linalg.vector_norm(flat, dim=-1, keepdim=True, dtype=torch.float32)
        return flat * norm.clamp_min(1e-12).reciprocal().to(flat.dtype)


class GuidedFusion(nn.Module):
    """ResNet features at one scale, attended to by DINOv2 features brought to the same scale."""

    def __init__(self, guide: int, channels: int, inner: int, heads: int) -> None:
        super().__init__()
        self.encode_enc = Conv3x3(guide, channels)
        self.norm1 = ChannelNorm(channels)
        self.norm2 = ChannelNorm(channels)
        self.crossattn = CrossChannelAttention(channels, inner, heads)
        self.norm3 = ChannelNorm(channels)

    def forward(self, guide: Tensor, features: Tensor) -> Tensor:
        """guide: [B, G, h, w] at 1/16; features: [B, C, s*h, s*w]."""
        scale = features.shape[-1] // guide.shape[-1]
        encoded = convolve_enlarged(guide, self.encode_enc, scale)
        mixed = self.crossattn(self.norm1(encoded), self.norm2(features)) + encoded
        return F.relu(self.norm3(mixed))


def convolve_enlarged(x: Tensor, conv: Conv3x3, scale: int) -> Tensor:
    """conv3x3 of the bilinear enlargement of x by `scale`, mostly computed at the small size.

    Enlarging works on each channel alone, so it commutes with the 1x1 product of each of the nine taps: the products
    are made small, enlarged, shifted and added. Exact up to rounding, 1 / scale^2 of the multiplications.
    """
    if scale == 1:
        return conv(x)
    height, width = x.shape[-2] * scale, x.shape[-1] * scale
    total: Tensor | None = None
    for row in range(3):
        for column in range(3):
            tap = F.conv2d(x, readable(conv.weight[:, :, row : row + 1, column : column + 1]))
            tap = F.interpolate(tap, scale_factor=scale, mode="bilinear", align_corners=False)
            if total is None:
                total = tap.new_zeros(tap.shape) if conv.bias is None else conv.bias.view(1, -1, 1, 1).expand_as(tap)
                total = total.clone(memory_format=torch.contiguous_format)
            # Output (y, x) reads enlarged (y + row - 1, x + column - 1); outside is zero.
            down, right = row - 1, column - 1
            total[..., max(0, -down) : height - max(0, down), max(0, -right) : width - max(0, right)] += tap[
                ..., max(0, down) : height - max(0, -down), max(0, right) : width - max(0, -right)
            ]
    assert total is not None
    return total


class SemanticEncoder(nn.Module):
    """DINOv2's last blocks, mixed by a 1x1 convolution and brought from 1/14 to 1/16 of the picture."""

    def __init__(self, widths: EncoderWidths) -> None:
        super().__init__()
        self.levels = widths.vit_levels
        self.backbone = VisionTransformer(
            widths.vit_width, widths.vit_depth, widths.vit_hidden, widths.vit_patch, widths.vit_grid
        )
        channels = widths.vit_width * widths.vit_levels
        self.conv3 = nn.Conv2d(channels, channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)

    def forward(
        self, luminance: Tensor, size: tuple[int, int], position: Tensor | None, attention: Attention
    ) -> Tensor:
        tokens = torch.cat(self.backbone(luminance, self.levels, position, attention), dim=1)
        tokens = F.relu(self.bn3(self.conv3(tokens)))
        return F.interpolate(tokens, size=size, mode="bilinear", align_corners=False)


class KeyEncoder(nn.Module):
    """luminance [B, 1, H, W] in -1..1, H and W multiples of 112, to features at 1/16, 1/8 and 1/4."""

    def __init__(self, widths: EncoderWidths) -> None:
        super().__init__()
        planes, outputs, depths = widths.planes, widths.outputs, widths.depths
        self.conv1 = nn.Conv2d(3, widths.stem, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(widths.stem)
        self.res2 = stage(Bottleneck, widths.stem, planes[0], outputs[0], depths[0], 1)
        self.layer2 = stage(Bottleneck, outputs[0], planes[1], outputs[1], depths[1], 2)
        self.layer3 = stage(Bottleneck, outputs[1], planes[2], outputs[2], depths[2], 2)
        self.network2 = SemanticEncoder(widths)
        guide = widths.vit_width * widths.vit_levels
        self.fuse1 = GuidedFusion(guide, outputs[2], widths.fused[0], widths.heads)
        self.fuse2 = GuidedFusion(guide, outputs[1], widths.fused[1], widths.heads)
        self.fuse3 = GuidedFusion(guide, outputs[0], widths.fused[2], widths.heads)

    def forward(
        self,
        luminance: Tensor,
        position: Tensor | None = None,
        attention: Attention = F.scaled_dot_product_attention,
    ) -> tuple[Tensor, Tensor, Tensor]:
        x = F.relu(self.bn1(grey_convolution(self.conv1, luminance)))
        f4 = self.res2(F.max_pool2d(x, 3, 2, 1))
        f8 = self.layer2(f4)
        f16 = self.layer3(f8)
        guide = self.network2(luminance, (f16.shape[-2], f16.shape[-1]), position, attention)
        return self.fuse1(guide, f16), self.fuse2(guide, f8), self.fuse3(guide, f4)


class KeyProjection(nn.Module):
    """Keys, shrinkage and selection of the memory (XMem, section 3.2), from the features at 1/16."""

    def __init__(self, inputs: int, key_width: int) -> None:
        super().__init__()
        self.key_proj = Conv3x3(inputs, key_width)
        self.d_proj = nn.Conv2d(inputs, 1, 3, padding=1)
        self.e_proj = Conv3x3(inputs, key_width)

    def forward(self, f16: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """key [B, C, h, w], shrinkage [B, 1, h, w] >= 1, selection [B, C, h, w] in 0..1, all float32."""
        shrinkage = self.d_proj(f16).float() ** 2 + 1
        return self.key_proj(f16).float(), shrinkage, self.e_proj(f16).float().sigmoid()
