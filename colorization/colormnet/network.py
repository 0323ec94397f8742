"""ColorMNet (Yang, Dong, Tang, Pan: "ColorMNet", ECCV 2024), all of its networks and none of its memory.

Key encoder, value encoder, local attention and decoder under the published checkpoint's names. Stateless: `session`
decides what is remembered, and everything that depends on luminance alone takes many frames at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...attention.local_window import AUTOMATIC, local_window_attention
from .decoder import Decoder, DecoderContext, DecoderWidths
from .dinov2 import Attention
from .feature_fusion import PLANES
from .key_encoder import EncoderWidths, KeyEncoder, KeyProjection
from .value_encoder import ValueEncoder, ValueWidths

PATCH = 112  # frames are padded to multiples of both 14 (DINOv2) and 16 (ResNet)


@dataclass(frozen=True)
class ColorMNetWidths:
    """Every width of the network. The defaults are the published file's; `checkpoint.widths_of` reads them off one."""

    encoder: EncoderWidths = field(default_factory=EncoderWidths)
    values: ValueWidths = field(default_factory=ValueWidths)
    decoder: DecoderWidths = field(default_factory=DecoderWidths)
    key: int = 64
    window: int = 15  # side of the local attention's window


@dataclass
class FrameKeys:
    """What the key encoder knows of T frames: key and selection [T, C, h, w], shrinkage [T, 1, h, w], all float32;
    f16 [T, C, h, w] and the decoder's share of the picture in the network's dtype."""

    key: Tensor
    shrinkage: Tensor
    selection: Tensor
    f16: Tensor
    context: DecoderContext

    def last(self) -> FrameKeys:
        """The last frame's alone."""
        last = self.context.frame(len(self.key) - 1)
        return FrameKeys(self.key[-1:], self.shrinkage[-1:], self.selection[-1:], self.f16[-1:], last)


class Depthwise(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 5, padding=2, groups=channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class LocalAttention(nn.Module):
    """Attention of every place to the 15x15 places around it in the last remembered frame (section 3.3)."""

    def __init__(self, key: int, value: int, window: int) -> None:
        super().__init__()
        self.window = window
        self.relative_emb_k = nn.Conv2d(key, window * window, 1)
        self.dw_conv = Depthwise(value)
        self.projection = nn.Linear(value, value)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, backend: str = AUTOMATIC) -> Tensor:
        """query [T, C, h, w] float32; key [1, C, h, w] float32; value [1, V, h, w]. Returns [T, V, h, w]."""
        # The bias is added to float32 logits, so its convolution runs in float32 too.
        weight, bias = self.relative_emb_k.weight.float(), self.relative_emb_k.bias
        position = F.conv2d(query, weight, None if bias is None else bias.float())
        y = local_window_attention(query * query.shape[1] ** -0.5, key, value, position, self.window, backend)
        y = self.dw_conv(y.to(self.projection.weight.dtype))
        return self.projection(y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ColorMNet(nn.Module):
    def __init__(self, widths: ColorMNetWidths | None = None) -> None:
        super().__init__()
        self.widths = widths = widths or ColorMNetWidths()
        encoder, values = widths.encoder, widths.values
        features = (encoder.outputs[2], encoder.outputs[1], encoder.outputs[0])
        self.key_encoder = KeyEncoder(encoder)
        self.value_encoder = ValueEncoder(values, features[0])
        self.key_proj = KeyProjection(features[0], widths.key)
        self.short_term_attn = LocalAttention(widths.key, PLANES * values.value, widths.window)
        self.decoder = Decoder(widths.decoder, features, values.value, values.hidden)

    @property
    def dtype(self) -> torch.dtype:
        return self.key_encoder.conv1.weight.dtype

    @property
    def compute_device(self) -> torch.device:
        # Not `device`: ComfyUI's patcher keeps an attribute of its own under that name.
        return self.key_encoder.conv1.weight.device

    def position_embedding(self, height: int, width: int) -> Tensor:
        """DINOv2's for frames of height x width; the same for all frames, so computed once by the caller."""
        vit = self.key_encoder.network2.backbone
        return vit.position_embedding(height // vit.patch_embed.patch, width // vit.patch_embed.patch)

    def encode_keys(
        self,
        luminance: Tensor,
        position: Tensor | None = None,
        attention: Attention = F.scaled_dot_product_attention,
    ) -> FrameKeys:
        """luminance: [T, 1, H, W] in -1..1, H and W multiples of 112. attention: DINOv2's, exact unless told otherwise."""
        f16, f8, f4 = self.key_encoder(luminance.to(self.dtype), position, attention)
        key, shrinkage, selection = self.key_proj(f16)
        return FrameKeys(key, shrinkage, selection, f16, self.decoder.from_picture(f16, f8, f4))

    def encode_value(self, luminance: Tensor, chroma: Tensor, f16: Tensor) -> Tensor:
        """One frame: luminance [1, 1, H, W], chroma [1, 2, H, W] in -1..1. Returns [2, value, h, w]."""
        return self.value_encoder(luminance.to(self.dtype), chroma.to(self.dtype), f16)

    def reinforce(self, value: Tensor, hidden: Tensor) -> Tensor:
        """The hidden state after a memory frame. value [2, V, h, w], hidden [2, C, h, w] float32."""
        return self.value_encoder.hidden_reinforce(value, hidden)

    def decode(self, context: DecoderContext, hidden: Tensor, update: bool) -> tuple[Tensor, Tensor]:
        """Chroma [1, 2, H, W] in -1..1 and the hidden state of one frame; see `Decoder`."""
        logits, hidden = self.decoder(context, hidden, update)
        return logits.tanh(), hidden
