"""DINOv2's vision transformer (Oquab et al. 2023), as far as ColorMNet uses it: the last blocks' patch features."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .resnet import grey_convolution

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(q, k, v), each [B, heads, N, D], to the same shape: softmax(q k^T / sqrt(D)) v."""

HEAD_WIDTH = 64  # every DINOv2 model has 64 channels per head
EPS = 1e-6


class LayerScale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class SelfAttention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = max(1, width // HEAD_WIDTH)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, attention: Attention) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        y = attention(q, k, v)
        return self.proj(y.transpose(1, 2).reshape(batch, tokens, width))


class Feedforward(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class TransformerBlock(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=EPS)
        self.attn = SelfAttention(width)
        self.ls1 = LayerScale(width)
        self.norm2 = nn.LayerNorm(width, eps=EPS)
        self.mlp = Feedforward(width, hidden)
        self.ls2 = LayerScale(width)

    def forward(self, x: Tensor, attention: Attention) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x), attention))
        return x + self.ls2(self.mlp(self.norm2(x)))


class PatchEmbedding(nn.Module):
    def __init__(self, width: int, patch: int) -> None:
        super().__init__()
        self.patch = patch
        self.proj = nn.Conv2d(3, width, patch, patch)


class VisionTransformer(nn.Module):
    """width, depth, hidden: of the blocks; grid: side of the square the position embedding was trained on."""

    def __init__(self, width: int, depth: int, hidden: int, patch: int, grid: int) -> None:
        super().__init__()
        self.grid = grid
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid * grid, width))
        # Only masked training reads it; the published checkpoint carries it.
        self.mask_token = nn.Parameter(torch.zeros(1, width))
        self.patch_embed = PatchEmbedding(width, patch)
        self.blocks = nn.ModuleList(TransformerBlock(width, hidden) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=EPS)

    def position_embedding(self, rows: int, columns: int) -> Tensor:
        """[1, 1 + rows * columns, width] for a grid of patches, class token first.

        The size is given to the bicubic resampling as a factor, (n + 0.1) / grid, as DINOv2 does: its sampling
        points then differ from those of an exact target size, and by enough to change the features.
        """
        if (rows, columns) == (self.grid, self.grid):
            return self.pos_embed
        embedding = self.pos_embed.float()
        patches = embedding[:, 1:].view(1, self.grid, self.grid, -1).permute(0, 3, 1, 2)
        factors = ((rows + 0.1) / self.grid, (columns + 0.1) / self.grid)
        patches = F.interpolate(patches, scale_factor=factors, mode="bicubic", antialias=False)
        if patches.shape[-2:] != (rows, columns):
            raise RuntimeError(f"The position embedding came out as {tuple(patches.shape[-2:])}, not {rows}x{columns}.")
        patches = patches.flatten(2).transpose(1, 2)
        return torch.cat((embedding[:, :1], patches), dim=1).to(self.pos_embed.dtype)

    def forward(
        self,
        luminance: Tensor,
        levels: int,
        position: Tensor | None = None,
        attention: Attention = F.scaled_dot_product_attention,
    ) -> list[Tensor]:
        """luminance: [B, 1, H, W], multiples of the patch. Returns the last `levels` blocks' normalised patch tokens,
        each [B, width, H / patch, W / patch]."""
        x = grey_convolution(self.patch_embed.proj, luminance)
        rows, columns = x.shape[-2:]
        x = x.flatten(2).transpose(1, 2)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        x = x + (self.position_embedding(rows, columns) if position is None else position)
        features: list[Tensor] = []
        for index, block in enumerate(self.blocks):
            x = block(x, attention)
            if index >= len(self.blocks) - levels:
                tokens = self.norm(x)[:, 1:]
                features.append(tokens.transpose(1, 2).unflatten(2, (rows, columns)))
        return features


def grid_side(position_tokens: int) -> int:
    """Side of the square grid behind `position_tokens` (class token included)."""
    side = math.isqrt(position_tokens - 1)
    if side * side != position_tokens - 1:
        raise ValueError(f"{position_tokens} position tokens are not a square and a class token.")
    return side
