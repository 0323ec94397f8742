"""A small trained SDXL that draws portraits, with its IdentityNet, its text and its pixels: InstantID to look at on a CPU.

SDXL's layout with all 70 cross-attention blocks, 24, 48 and 72 channels wide. Weights are those of a shallower network:
the ten transformers in a row are one, ten times with a tenth of its output, which is nearly the same sum. So the file is
small, and training (`demo/train_portraits.py`) runs the ten only at its end. IdentityNet's transformers are there and add
nothing: it sets place and pose, looks come by attention alone.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import tiny_sdxl

CONTEXT = 64
POOLED = 1280
LATENT_SCALE = 0.13025  # ComfyUI multiplies SDXL's latents by it before they reach the network
WEIGHTS = Path(__file__).resolve().parents[2] / "models" / "portraits" / "demo_portraits.safetensors"

UNET_CONFIG: dict[str, Any] = {
    **tiny_sdxl.UNET_CONFIG,
    "model_channels": 24,
    "channel_mult": [1, 2, 3],
    "num_head_channels": 24,
    "context_dim": CONTEXT,
}
# As they are trained: one transformer in each row of the UNet, none in IdentityNet, which learns from the drawing alone.
SHALLOW = {
    "transformer_depth": [0, 0, 1, 1, 1, 1],
    "transformer_depth_output": [0, 0, 0, 1, 1, 1, 1, 1, 1],
    "transformer_depth_middle": 1,
}
POSE_ONLY = {"transformer_depth": [0] * 6, "transformer_depth_middle": 0}

# Text -------------------------------------------------------------------------------------------------------------

COLOURS = {
    "red": (206, 52, 48), "orange": (236, 132, 36), "yellow": (240, 208, 72), "green": (66, 148, 78),
    "teal": (32, 140, 150), "blue": (56, 98, 196), "purple": (126, 76, 168), "pink": (236, 140, 172),
    "white": (238, 236, 230), "grey": (136, 138, 142), "black": (34, 34, 40),
}  # fmt: skip
THINGS = ("shirt", "background")
# What the example workflows say, in those words.
SYNONYMS = {
    "gray": "grey", "astronaut": "orange shirt", "suit": "shirt", "sweater": "shirt", "wall": "background",
    "window": "white background", "dusk": "purple background", "sky": "blue background",
}  # fmt: skip


def phrases(text: str) -> dict[str, str]:
    """What a text says of the shirt and the background: {"shirt": "red", ...}. Every other word is passed over."""
    found: dict[str, str] = {}
    colour = ""
    for word in re.findall(r"[a-z]+", text.lower()):
        for known in SYNONYMS.get(word, word).split():
            if known in COLOURS:
                colour = known
            elif known in THINGS and colour:
                found[known] = colour
                colour = ""
    return found


@cache
def _token(phrase: str) -> Tensor:
    seed = int.from_bytes(hashlib.md5(phrase.encode(), usedforsecurity=False).digest()[:4], "little")
    return torch.randn(CONTEXT, generator=torch.Generator().manual_seed(seed))


def embed_text(text: str) -> tuple[Tensor, Tensor]:
    """Tokens [3, 64], one for a portrait and one for each thing, and the pooled vector [1280], which holds them all."""
    said = phrases(text)
    tokens = torch.stack([_token("portrait"), *(_token(f"{said.get(thing, 'any')} {thing}") for thing in THINGS)])
    return tokens, F.pad(tokens.flatten(), (0, POOLED - tokens.numel()))


def encode_text(text: str) -> list[list[Any]]:
    """A CONDITIONING for the portrait model."""
    tokens, pooled = embed_text(text)
    return [[tokens[None], {"pooled_output": pooled[None]}]]


# Pixels -----------------------------------------------------------------------------------------------------------


class _Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.silu(self.first(F.silu(x))))


class PixelCoder(nn.Module):
    """Pictures [B, 3, H, W] in 0..1 to latents [B, 4, H/8, W/8] of about unit size, and back."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(8), nn.Conv2d(192, width, 1), _Residual(width), nn.SiLU(), nn.Conv2d(width, 4, 1)
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(4, width, 3, padding=1), _Residual(width), _Residual(width), _Residual(width),
            nn.Conv2d(width, 96, 1), nn.PixelShuffle(2), _Residual(24), _Residual(24),
            nn.SiLU(), nn.Conv2d(24, 48, 3, padding=1), nn.PixelShuffle(4),
        )  # fmt: skip

    def encode(self, pictures: Tensor) -> Tensor:
        return self.encoder(pictures * 2 - 1)

    def decode(self, latents: Tensor) -> Tensor:
        return self.decoder(latents) * 0.5 + 0.5


# The UNet and the IdentityNet -------------------------------------------------------------------------------------


def operations() -> Any:
    """ComfyUI's layers, with group norms of eight channels: SDXL's 32 groups would be of one channel here."""
    import comfy.ops

    class PortraitOperations(comfy.ops.manual_cast):  # type: ignore[misc, name-defined]
        class GroupNorm(comfy.ops.manual_cast.GroupNorm):  # type: ignore[misc, name-defined]
            def __init__(self, num_groups: int, num_channels: int, **options: Any) -> None:
                super().__init__(num_channels // 8, num_channels, **options)

    return PortraitOperations


def make_unet(**changes: Any) -> nn.Module:
    """The UNet without weights; `SHALLOW` as changes for the network that is trained."""
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    config = {**UNET_CONFIG, **changes}
    return UNetModel(**config, dtype=torch.float32, device="cpu", operations=operations())


def make_control_net(**changes: Any) -> nn.Module:
    """The IdentityNet without weights, but for its hint block's."""
    from comfy.cldm.cldm import ControlNet

    config = {**UNET_CONFIG, **changes}
    config = {k: v for k, v in config.items() if k not in ("out_channels", "transformer_depth_output")}
    network = ControlNet(**config, hint_channels=3, dtype=torch.float32, device="cpu", operations=operations())
    set_hint_block(network.input_hint_block)
    return network


BIAS = 6.0  # silu(x + 6) is x + 6 to a quarter of a percent


@torch.no_grad()
def set_hint_block(block: nn.Module) -> None:
    """Weights of all layers but the last: halve the drawing, then lay its 4x4 cells into 48 channels (four times as strong).

    Only what comes after it is trained, which saves the most expensive layers of the whole network. The last is zero until
    then: ComfyUI's layers come with what was in memory.
    """
    convolutions = [layer for layer in block if isinstance(layer, nn.Conv2d)]
    for layer in convolutions:
        layer.weight.zero_()
        layer.bias.zero_()
    channels = 3
    for number, layer in enumerate(convolutions[:-1]):
        if layer.stride[0] == 1:
            for c in range(channels):
                layer.weight[c, c, 1, 1] = 1
        elif number == 2:
            for c in range(channels):
                layer.weight[c, c, 1:, 1:] = 0.25
        else:
            gain = 4.0 if number == 6 else 1.0
            for place in range(4):
                for c in range(channels):
                    layer.weight[place * channels + c, c, 1 + place // 2, 1 + place % 2] = gain
            channels *= 4
        if number == 0:
            layer.bias[:channels] = BIAS
    convolutions[-2].bias[:channels] = -4 * BIAS


def hint_features(hint: Tensor) -> Tensor:
    """[B, 3, H, W] drawings in 0..1 to the first 48 channels [B, 48, H/8, W/8] that the last layer of the block is given."""

    def cells(x: Tensor) -> Tensor:
        return torch.cat([x[:, :, place // 2 :: 2, place % 2 :: 2] for place in range(4)], dim=1)

    x = F.avg_pool2d(F.silu(F.silu(hint + BIAS)), 2)
    x = cells(F.silu(F.silu(x)))
    return F.silu(4 * (cells(F.silu(F.silu(x))) - BIAS))


OUTPUTS = ("attn1.to_out.0.", "attn2.to_out.0.", "ff.net.2.")
_TRANSFORMER = re.compile(r"(.*transformer_blocks\.)(\d+)\.(.*)")


def deepened(state: dict[str, Tensor], depths: dict[str, int]) -> dict[str, Tensor]:
    """The state of the deep network. depths: transformers that stand in a row, by the part of their keys before the number.

    Transformer i of N is number i * n // N of n, with n/N of its output.
    """
    counts: dict[str, int] = {}
    for key in state:
        if match := _TRANSFORMER.fullmatch(key):
            counts[match[1]] = max(counts.get(match[1], 0), int(match[2]) + 1)
    deep: dict[str, Tensor] = {}
    for key, value in state.items():
        match = _TRANSFORMER.fullmatch(key)
        if match is None:
            deep[key] = value
            continue
        few, many = counts[match[1]], depths[match[1]]
        if match[3].startswith(OUTPUTS):
            value = value * (few / many)
        for i in range(many):
            if i * few // many == int(match[2]):
                deep[f"{match[1]}{i}.{match[3]}"] = value
    return deep


def depths_of(network: nn.Module) -> dict[str, int]:
    """How many transformers stand in a row, by the part of their keys before the number."""
    return {
        f"{name}.": len(module)  # type: ignore[arg-type]
        for name, module in network.named_modules()
        if name.endswith("transformer_blocks")
    }


def cross_attentions(network: nn.Module) -> Iterator[tuple[str, int, nn.Module]]:
    """(row, number, cross-attention) in the adapter's order: input, output, middle."""
    rows = [(name, module) for name, module in network.named_modules() if name.endswith("transformer_blocks")]
    for part in ("input_blocks", "output_blocks", "middle_block"):
        for name, row in rows:
            if name.startswith(part):
                for number, transformer in enumerate(row):  # type: ignore[arg-type]
                    yield f"{name}.", number, transformer.attn2


# Loading ----------------------------------------------------------------------------------------------------------


@cache
def _weights() -> dict[str, Tensor]:
    from safetensors.torch import load_file

    stored = load_file(WEIGHTS)
    # Matrices are 8-bit, with a scale for each row.
    return {
        key: value.float() * stored[f"{key}.scale"] if f"{key}.scale" in stored else value.float()
        for key, value in stored.items()
        if not key.endswith(".scale")
    }


def _part(name: str) -> dict[str, Tensor]:
    return {key.removeprefix(name): value for key, value in _weights().items() if key.startswith(name)}


def load_sdxl() -> Any:
    """A ModelPatcher over the trained UNet."""
    import comfy.supported_models

    config = comfy.supported_models.SDXL({**UNET_CONFIG, "dtype": torch.float32})
    config.unet_config["num_head_channels"] = UNET_CONFIG["num_head_channels"]  # ComfyUI sets SDXL's 64
    config.custom_operations = operations()
    config.set_inference_dtype(torch.float32, None)
    # The key by which ComfyUI knows checkpoints that predict velocity.
    model = config.get_model({"v_pred": torch.tensor([])}, "", torch.device("cpu"))
    network = model.diffusion_model
    network.load_state_dict(deepened(_part("unet."), depths_of(network)))
    return tiny_sdxl.patcher_over(model)


def load_identity_net(trained: bool = True) -> Any:
    """The trained IdentityNet, or one of the same layout that adds nothing."""
    import comfy.controlnet
    import comfy.model_management

    network = make_control_net()
    # Without weights a layer holds what was in memory before.
    untrained = {
        k: v if trained and k.startswith("input_hint_block") else torch.zeros_like(v)
        for k, v in network.state_dict().items()
    }
    network.load_state_dict({**untrained, **(_part("control.") if trained else {})})
    return comfy.controlnet.ControlNet(
        network.eval(), load_device=comfy.model_management.get_torch_device(), manual_cast_dtype=None
    )


class PortraitText:
    """The text encoder as an object, for ComfyUI's own CLIP Text Encode."""

    def clone(self) -> PortraitText:
        return PortraitText()

    def tokenize(self, text: str, **_: Any) -> str:
        return text

    def encode_from_tokens_scheduled(self, tokens: str, **_: Any) -> Any:
        return encode_text(tokens)


class PortraitPixels:
    """The trained coder as a VAE, for ComfyUI's own VAE Decode and VAE Encode."""

    def __init__(self) -> None:
        self.coder = PixelCoder()
        self.coder.load_state_dict(_part("pixels."))
        self.coder.eval().requires_grad_(False)

    def decode(self, samples: Tensor, **_: Any) -> Tensor:
        return self.coder.decode(samples.float().cpu() * LATENT_SCALE).clamp(0, 1).movedim(1, -1)

    def encode(self, pixels: Tensor, **_: Any) -> Tensor:
        pictures = pixels[..., :3].movedim(-1, 1).float().cpu()
        height, width = (max(8, side // 8 * 8) for side in pictures.shape[-2:])
        return self.coder.encode(pictures[..., :height, :width]) / LATENT_SCALE
