"""Colorizers of a few thousand weights, random but the same every time, and a models folder that holds them."""

from __future__ import annotations

from pathlib import Path

import torch
from hotpath.colorization.colormnet.decoder import DecoderWidths
from hotpath.colorization.colormnet.key_encoder import EncoderWidths
from hotpath.colorization.colormnet.network import ColorMNet, ColorMNetWidths
from hotpath.colorization.colormnet.value_encoder import ValueWidths
from hotpath.colorization.deep_exemplar.color_net import ColorVidNet
from hotpath.colorization.deep_exemplar.vgg import VGG19
from hotpath.colorization.deep_exemplar.warp import WarpNet
from torch import Tensor

TINY = ColorMNetWidths(
    EncoderWidths(
        stem=4, planes=(2, 2, 4), outputs=(4, 8, 8), depths=(1, 1, 1), vit_width=8, vit_depth=4, vit_hidden=8,
        vit_grid=4, heads=2, fused=(8, 8, 4),
    ),
    ValueWidths(stem=4, outputs=(4, 4, 8), depths=(1, 1, 1), value=8, reduced=2, hidden=4),
    DecoderWidths(fused=8, reduced=2, up8=4, up4=4, middle=4),
    key=4,
    window=5,
)  # fmt: skip


def colormnet_state(*louder: str) -> dict[str, Tensor]:
    """A small ColorMNet's weights; those named in `louder` are eight times as large."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        state = ColorMNet(TINY).state_dict()
    for name in louder:
        state[name] *= 8
    return state


def deep_exemplar_parts() -> tuple[VGG19, WarpNet, ColorVidNet]:
    """VGG, matching network and colour network."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return VGG19((4, 6, 8, 8, 8)), WarpNet((6, 8, 8, 8), (4, 4, 6, 6), 4, 12), ColorVidNet(4, (4, 6, 8, 8), 6)


def save_models(models: Path) -> Path:
    """Both methods' files in `models`, under names nobody published."""
    from safetensors.torch import save_file

    for folder in ("colormnet", "deep_exemplar"):
        (models / folder).mkdir()
    save_file(colormnet_state("decoder.pred.weight"), models / "colormnet" / "mine.safetensors")
    for name, part in zip("abc", deep_exemplar_parts(), strict=True):
        torch.save(part.state_dict(), models / "deep_exemplar" / f"{name}.pth")
    return models
