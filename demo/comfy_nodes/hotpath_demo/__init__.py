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


NODE_CLASS_MAPPINGS = {"HotpathDemoSDXL": DemoSDXL, "HotpathDemoText": DemoText, "HotpathDemoDecode": DemoDecode}
NODE_DISPLAY_NAME_MAPPINGS = {
    "HotpathDemoSDXL": "Tiny SDXL (demo)",
    "HotpathDemoText": "Tiny SDXL Text (demo)",
    "HotpathDemoDecode": "Tiny SDXL Decode (demo)",
}
