"""A small picture of latents while they are drawn: a linear map from latent channels to RGB.

ComfyUI publishes such maps for the autoencoders it knows; for others the map is fitted to the autoencoder itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .decoding import decode_one

if TYPE_CHECKING:
    from .loading import ZImage

FIT_SEED = 0
FIT_SIDE = 16  # latents on a side of what is decoded for a fit


class Preview(Protocol):
    """How a small picture is made of latents that are being drawn."""

    def picture(self, latents: Tensor) -> Any:
        """A PIL image, or None, of the first of scaled latents [B, C, h, w]."""


@dataclass(frozen=True)
class LinearPreview:
    """rgb = latents . factors + bias, in -1..1. factors: [C, 3]; bias: [3]; both for scaled latents."""

    factors: Tensor
    bias: Tensor

    def picture(self, latents: Tensor) -> Any:
        """A PIL image of the first of latents [B, C, h, w], one pixel a latent."""
        from PIL import Image

        first = latents[0].detach().float()
        rgb = torch.einsum("chw,cr->hwr", first, self.factors.to(first)) + self.bias.to(first)
        pixels = ((rgb + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu().numpy()
        return Image.fromarray(pixels)


def of_model(model: ZImage) -> LinearPreview:
    """The map fitted to the VAE of `model`, made once for each checkpoint that is loaded."""
    if model.preview is None:
        with model.vae.resident() as vae:
            model.preview = fitted(lambda latents: decode_one(model, vae, latents, False), model.latent_channels)
    return model.preview


def fitted(decode: Any, channels: int) -> LinearPreview:
    """The linear map that is nearest, in least squares, to what `decode` makes of smooth random latents.

    decode: latents [1, C, h, w], scaled -> RGB [1, 3, H, W] in -1..1.
    """
    random = torch.randn(
        1, channels, FIT_SIDE // 4, FIT_SIDE // 4, generator=torch.Generator("cpu").manual_seed(FIT_SEED)
    )
    # Smooth, because the colour of an area is asked for, and not the texture that noise decodes to.
    latents = F.interpolate(random, size=(FIT_SIDE, FIT_SIDE), mode="bicubic", align_corners=False)
    decoded = F.adaptive_avg_pool2d(decode(latents).float().cpu(), FIT_SIDE)
    rows = latents[0].flatten(1).T
    rows = torch.cat([rows, torch.ones(len(rows), 1)], dim=1)
    # Ridge: a channel that hardly shows must not get a huge factor.
    gram = rows.T @ rows + 1e-3 * len(rows) * torch.eye(channels + 1)
    solved = torch.linalg.solve(gram, rows.T @ decoded[0].flatten(1).T)
    return LinearPreview(solved[:-1], solved[-1])
