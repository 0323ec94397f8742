"""ComfyUI nodes that stand in for large checkpoints in Hotpath's demo and tests.

Two models of SDXL's layout: one of random weights for numbers (`tiny_sdxl`), one that was trained to draw portraits
(`portraits`), which takes the place of the loaders in example workflows.
"""

from __future__ import annotations

from typing import Any

import torch

from . import portraits, tiny_sdxl

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


class DemoCheckpoint:
    """Takes the place of Load Checkpoint when an example workflow runs in the demo."""

    RETURN_TYPES = ("MODEL", "CLIP", "VAE")
    FUNCTION = "load"
    CATEGORY = CATEGORY

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"ckpt_name": ("STRING", {"default": ""})}}

    def load(self, ckpt_name: str) -> tuple[Any, portraits.PortraitText, portraits.PortraitPixels]:
        return portraits.load_sdxl(), portraits.PortraitText(), portraits.PortraitPixels()


class DemoControlNet:
    """Takes the place of Load ControlNet Model: IdentityNet for InstantID's name, for others a network that adds nothing."""

    RETURN_TYPES = ("CONTROL_NET",)
    FUNCTION = "load"
    CATEGORY = CATEGORY

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"control_net_name": ("STRING", {"default": "instantid"})}}

    def load(self, control_net_name: str) -> tuple[Any]:
        return (portraits.load_identity_net(trained="instantid" in control_net_name.lower()),)


NODE_CLASS_MAPPINGS = {
    "HotpathDemoSDXL": DemoSDXL,
    "HotpathDemoText": DemoText,
    "HotpathDemoDecode": DemoDecode,
    "HotpathDemoCheckpoint": DemoCheckpoint,
    "HotpathDemoControlNet": DemoControlNet,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "HotpathDemoCheckpoint": "Portrait SDXL for Load Checkpoint (demo)",
    "HotpathDemoControlNet": "Portrait ControlNet (demo)",
    "HotpathDemoSDXL": "Tiny SDXL (demo)",
    "HotpathDemoText": "Tiny SDXL Text (demo)",
    "HotpathDemoDecode": "Tiny SDXL Decode (demo)",
}
