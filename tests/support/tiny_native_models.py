"""Z-Image and Flux as ComfyUI builds them natively, with small widths and random weights from a seed, for tests.

`make_z_image(seed)`, `make_flux(seed)` and the demo's `tiny_sdxl.make_sdxl(seed)` give ModelPatchers; `Tiny` bundles
one with the latent and the conditioning that fit it, and samples.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch

# As detected from a Z-Image-Turbo checkpoint but for the widths: 3840, 30 heads of 128, 30 layers, captions of 2560.
Z_IMAGE: dict[str, Any] = {
    "image_model": "lumina2",
    "patch_size": 2,
    "in_channels": 16,
    "dim": 256,  # the least: its modulation is 256 wide
    "cap_feat_dim": 64,
    "n_layers": 3,
    "n_heads": 4,
    "n_kv_heads": 4,
    "axes_dims": [16, 24, 24],
    "axes_lens": [1536, 512, 512],
    "rope_theta": 256.0,
    "ffn_dim_multiplier": 8.0 / 3.0,
    "multiple_of": 64,
    "qk_norm": True,
    "z_image_modulation": True,
    "time_scale": 1000.0,
    "pad_tokens_multiple": 32,
}
# Flux dev's, but for the widths: 3072, 24 heads of 128, 19 double and 38 single blocks, text of 4096.
FLUX: dict[str, Any] = {
    "image_model": "flux",
    "guidance_embed": True,
    "in_channels": 16,
    "out_channels": 16,
    "vec_in_dim": 32,
    "context_in_dim": 64,
    "hidden_size": 128,
    "mlp_ratio": 4.0,
    "num_heads": 2,
    "depth": 2,
    "depth_single_blocks": 2,
    "axes_dim": [16, 24, 24],
    "theta": 10000,
    "patch_size": 2,
    "qkv_bias": True,
    "txt_ids_dims": [],
}
# The least UNet with transformers of both widths at places that SDXL has them in, for tests that trace it whole.
LEAST_SDXL: dict[str, Any] = {
    "num_res_blocks": [0, 3, 1],
    "transformer_depth": [0, 0, 1, 0],  # input 4
    "transformer_depth_output": [0, 0, 0, 1, 0, 0, 1],  # output 3 and 0
    "transformer_depth_middle": 1,
}


def _patcher(config: Any, seed: int) -> Any:
    model = config.get_model({}, "", torch.device("cpu"))
    from hotpath_demo import tiny_sdxl  # there only with a ComfyUI

    tiny_sdxl.fill(model.diffusion_model, seed)
    return tiny_sdxl.patcher_over(model)


def make_z_image(seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A ModelPatcher over a tiny Z-Image: a fused qkv of 768 x 256, head width 64, three layers and four refiners."""
    import comfy.supported_models

    if not hasattr(comfy.supported_models, "ZImage"):
        pytest.skip("this ComfyUI has no Z-Image of its own")
    config = comfy.supported_models.ZImage({**Z_IMAGE, **changes, "dtype": dtype})
    config.set_inference_dtype(dtype, None)
    return _patcher(config, seed)


def make_flux(seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A ModelPatcher over a tiny Flux: two double and two single blocks, head width 64."""
    import comfy.supported_models
    from comfy.ldm.flux.model import FluxParams

    known = {field.name for field in dataclasses.fields(FluxParams)}
    given = {key: value for key, value in FLUX.items() if key in known or key == "image_model"}
    config = comfy.supported_models.Flux({**given, **changes, "dtype": dtype})
    config.set_inference_dtype(dtype, None)
    return _patcher(config, seed)


def encode(text: str, tokens: int, width: int, pooled: int | None = None) -> list[list[Any]]:
    """A CONDITIONING that depends on `text` and nothing else."""
    seed = int.from_bytes(hashlib.md5(text.encode(), usedforsecurity=False).digest()[:4], "little")
    generator = torch.Generator().manual_seed(seed)
    extra = {} if pooled is None else {"pooled_output": torch.randn(1, pooled, generator=generator)}
    return [[torch.randn(1, tokens, width, generator=generator), extra]]


@dataclass
class Tiny:
    """A tiny model and what it is sampled with. cfg 1 leaves the negative out, as the distilled models do."""

    name: str
    model: Any
    text: Callable[[str, int], list[list[Any]]]  # (prompt, tokens)
    channels: int
    cfg: float

    def latent(self, batch: int = 1, height: int = 16, width: int = 16) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(5)
        return {"samples": torch.randn(batch, self.channels, height, width, generator=generator)}

    def sample(
        self,
        model: Any = None,
        prompt: str = "a portrait",
        tokens: int = 20,
        size: tuple[int, int] = (16, 16),
        batch: int = 1,
        steps: int = 2,
    ) -> torch.Tensor:
        """The denoised latent of `model` (this one by default), [batch, channels, *size]."""
        import comfy.sample

        latent = torch.zeros(batch, self.channels, *size)
        noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(11))
        return comfy.sample.sample(
            self.model if model is None else model, noise, steps, self.cfg, "euler", "simple",
            self.text(prompt, tokens), self.text("blurry", tokens), latent, disable_pbar=True, seed=11,
        )  # fmt: skip


@cache
def tiny(name: str, dtype: torch.dtype = torch.float32, device: str | None = None) -> Tiny:
    """Of `name` sdxl, least_sdxl, z_image or flux. One per process, for tests that leave the model as it is.

    device: where it computes, ComfyUI's choice by default.
    """
    text_width, pooled = FLUX["context_in_dim"], FLUX["vec_in_dim"]
    if name in ("sdxl", "least_sdxl"):
        from hotpath_demo import tiny_sdxl

        changes = LEAST_SDXL if name == "least_sdxl" else {}
        made = Tiny(name, tiny_sdxl.make_sdxl(dtype=dtype, **changes), tiny_sdxl.encode_text, 4, 4.0)
    elif name == "z_image":
        made = Tiny(name, make_z_image(dtype=dtype), lambda text, n: encode(text, n, Z_IMAGE["cap_feat_dim"]), 16, 1.0)
    elif name == "flux":
        made = Tiny(name, make_flux(dtype=dtype), lambda text, n: encode(text, n, text_width, pooled), 16, 1.0)
    else:
        raise ValueError(f"there is no tiny {name}")
    if device is not None:
        made.model.load_device = torch.device(device)
    return made
