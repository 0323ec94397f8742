"""ComfyUI nodes that stand in for large checkpoints in Hotpath's demo and tests: a tiny SDXL, its text and its decoder."""

from __future__ import annotations

from typing import Any

import torch

from . import tiny_sdxl

CATEGORY = "Hotpath/demo"


class DemoSDXL:
    """A tiny SDXL and IdentityNet with random weights, in place of the checkpoint and ControlNet loaders."""

    RETURN_TYPES = ("MODEL", "CONTROL_NET")
    FUNCTION = "load"
    CATEGORY = CATEGORY

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"seed": ("INT", {"default": 0, "min": 0, "max": 2**31})}}

    def load(self, seed: int) -> tuple[Any, Any]:
        return tiny_sdxl.make_sdxl(seed), tiny_sdxl.make_identity_net(seed + 1)


class DemoText:
    """A text encoder for the tiny SDXL: another text gives another conditioning."""

    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "encode"
    CATEGORY = CATEGORY

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"text": ("STRING", {"default": "", "multiline": True})}}

    def encode(self, text: str) -> tuple[Any]:
        return (tiny_sdxl.encode_text(text),)


class DemoDecode:
    """A latent as a picture: three of its channels, enlarged eight times. The tiny SDXL has no VAE."""

    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "decode"
    CATEGORY = CATEGORY

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"samples": ("LATENT",)}}

    def decode(self, samples: dict[str, torch.Tensor]) -> tuple[torch.Tensor]:
        latent = samples["samples"][:, :3].float()
        low, high = latent.amin(dim=(1, 2, 3), keepdim=True), latent.amax(dim=(1, 2, 3), keepdim=True)
        shown = (latent - low) / (high - low).clamp_min(1e-6)
        return (torch.nn.functional.interpolate(shown, scale_factor=8.0, mode="nearest").movedim(1, -1).cpu(),)


class TinyText:
    """The text encoder as an object, for ComfyUI's own CLIP Text Encode."""

    def tokenize(self, text: str, **_: Any) -> str:
        return text

    def encode_from_tokens_scheduled(self, tokens: str, **_: Any) -> Any:
        return tiny_sdxl.encode_text(tokens)


class TinyPixels:
    """Pixels for latents, for ComfyUI's own VAE Decode and VAE Encode: eight by eight pixels are one place."""

    def decode(self, samples: torch.Tensor, **_: Any) -> torch.Tensor:
        return DemoDecode().decode({"samples": samples})[0]

    def encode(self, pixels: torch.Tensor, **_: Any) -> torch.Tensor:
        colours = torch.nn.functional.avg_pool2d(pixels[..., :3].movedim(-1, 1).float(), 8) * 4 - 2
        return torch.cat([colours, colours.mean(1, keepdim=True)], dim=1)


class DemoCheckpoint:
    """Takes the place of Load Checkpoint when an example workflow runs in the demo."""

    RETURN_TYPES = ("MODEL", "CLIP", "VAE")
    FUNCTION = "load"
    CATEGORY = CATEGORY

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"ckpt_name": ("STRING", {"default": ""})}}

    def load(self, ckpt_name: str) -> tuple[Any, TinyText, TinyPixels]:
        return tiny_sdxl.make_sdxl(0), TinyText(), TinyPixels()


class DemoControlNet:
    """Takes the place of Load ControlNet Model: another name gives another network."""

    RETURN_TYPES = ("CONTROL_NET",)
    FUNCTION = "load"
    CATEGORY = CATEGORY

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"control_net_name": ("STRING", {"default": ""})}}

    def load(self, control_net_name: str) -> tuple[Any]:
        return (tiny_sdxl.make_identity_net(1 + len(control_net_name) % 7),)


NODE_CLASS_MAPPINGS = {
    "HotpathDemoSDXL": DemoSDXL,
    "HotpathDemoText": DemoText,
    "HotpathDemoDecode": DemoDecode,
    "HotpathDemoCheckpoint": DemoCheckpoint,
    "HotpathDemoControlNet": DemoControlNet,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "HotpathDemoCheckpoint": "Tiny SDXL for Load Checkpoint (demo)",
    "HotpathDemoControlNet": "Tiny ControlNet (demo)",
    "HotpathDemoSDXL": "Tiny SDXL (demo)",
    "HotpathDemoText": "Tiny SDXL Text (demo)",
    "HotpathDemoDecode": "Tiny SDXL Decode (demo)",
}
