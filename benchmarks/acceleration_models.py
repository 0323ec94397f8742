"""Models of true size with random weights for benchmarks/acceleration.py, and their tiny twins."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

Z_IMAGE: dict[str, Any] = {
    "image_model": "lumina2",
    "patch_size": 2,
    "in_channels": 16,
    "dim": 3840,
    "cap_feat_dim": 2560,
    "n_layers": 30,
    "n_heads": 30,
    "n_kv_heads": 30,
    "axes_dims": [32, 48, 48],
    "axes_lens": [1536, 512, 512],
    "rope_theta": 256.0,
    "ffn_dim_multiplier": 8.0 / 3.0,
    "multiple_of": 256,
    "qk_norm": True,
    "z_image_modulation": True,
    "time_scale": 1000.0,
    "pad_tokens_multiple": 32,
}
# Not narrower than 1024: diffusers' embedding of the timestep is that wide whatever the rest is.
TINY_Z_IMAGE = {**Z_IMAGE, "dim": 1152, "cap_feat_dim": 64, "n_layers": 1, "n_heads": 12, "n_kv_heads": 12,
                "axes_dims": [32, 32, 32]}  # fmt: skip

SDXL: dict[str, Any] = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "num_res_blocks": [2, 2, 2],
    "channel_mult": [1, 2, 4],
    "transformer_depth": [0, 0, 2, 2, 10, 10],
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
    "transformer_depth_middle": 10,
    "num_heads": -1,
    "num_head_channels": 64,
    "context_dim": 2048,
    "adm_in_channels": 2816,
    "num_classes": "sequential",
    "use_spatial_transformer": True,
    "use_linear_in_transformer": True,
    "use_temporal_attention": False,
    "legacy": False,
}
TINY_SDXL = {**SDXL, "model_channels": 32, "context_dim": 64, "transformer_depth": [0, 0, 1, 1, 2, 2],
             "transformer_depth_output": [0, 0, 0, 1, 1, 1, 2, 2, 2], "transformer_depth_middle": 2}  # fmt: skip
POOLED = 1280

SD15: dict[str, Any] = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": [1, 2, 4, 4],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    "transformer_depth_middle": 1,
    "num_heads": 8,
    "num_head_channels": -1,
    "context_dim": 768,
    "adm_in_channels": None,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": False,
    "use_temporal_attention": False,
    "legacy": False,
}
CPU_Z_IMAGE = {**Z_IMAGE, "n_layers": 3}  # of the same width, so that a step takes seconds and not minutes


def fill(module: torch.nn.Module, seed: int) -> None:
    """Random weights that keep activations near 1. Normal, not zero: a GPU runs faster on zeros than on anything else."""
    weights = list(module.parameters())
    generator = torch.Generator(weights[0].device).manual_seed(seed)
    for weight in weights:
        noise = torch.randn(weight.shape, generator=generator, device=weight.device, dtype=weight.dtype)
        if weight.ndim == 1:
            weight.data = noise.mul_(0.05).add_(1 if weight.shape[0] > 64 else 0)
        else:
            weight.data = noise.mul_(0.7 / weight[0].numel() ** 0.5)


def native(kind: str, config: dict[str, Any], dtype: torch.dtype, seed: int) -> Any:
    """A ModelPatcher over `kind` ("ZImage", "SDXL") as ComfyUI builds it from a checkpoint of that kind."""
    import comfy.model_management as management
    import comfy.model_patcher
    import comfy.supported_models

    made = getattr(comfy.supported_models, kind)({**config, "dtype": dtype})
    made.set_inference_dtype(dtype, None)
    device = management.get_torch_device()
    model = made.get_model({}, "", device)
    model.diffusion_model.to(device)
    fill(model.diffusion_model, seed)
    return comfy.model_patcher.ModelPatcher(
        model.eval(), load_device=device, offload_device=management.unet_offload_device()
    )


def diffusers_twin(patcher: Any, config: dict[str, Any]) -> torch.nn.Module:
    """diffusers' Z-Image transformer on the very weights of `patcher`, mapped by ComfyUI's own table; nothing is copied."""
    import comfy.utils
    from diffusers import ZImageTransformer2DModel

    model = patcher.model.diffusion_model
    with torch.device("meta"):
        twin = ZImageTransformer2DModel(
            dim=config["dim"], n_layers=config["n_layers"], n_heads=config["n_heads"], n_kv_heads=config["n_kv_heads"],
            cap_feat_dim=config["cap_feat_dim"], axes_dims=config["axes_dims"], axes_lens=config["axes_lens"],
        )  # fmt: skip
    weights = model.state_dict()
    mapped = {}
    for name, source in comfy.utils.z_image_to_diffusers(config).items():
        key, part = source if isinstance(source, tuple) else (source, None)
        if key in weights:
            mapped[name] = weights[key] if part is None else weights[key].narrow(*part)
    twin.load_state_dict({name: mapped[name] for name in twin.state_dict()}, strict=True, assign=True)
    return twin.eval().requires_grad_(False)


def prompt(seed: int, tokens: int, width: int, pooled: int | None = None) -> list[list[Any]]:
    """A CONDITIONING of random embeddings."""
    generator = torch.Generator().manual_seed(seed)
    extra = {} if pooled is None else {"pooled_output": torch.randn(1, pooled, generator=generator)}
    return [[torch.randn(1, tokens, width, generator=generator), extra]]


def with_identity(patcher: Any) -> Any:
    """`patcher` with a random InstantID identity in every cross-attention block, as Apply InstantID leaves it."""
    from hotpath.identity.blocks import SDXL_BLOCKS
    from hotpath.identity.prepared import PreparedIdentity
    from hotpath.patches.identity_attention import PatchSettings, add_identity
    from hotpath.patches.sdxl_layout import cross_attention_blocks

    generator = torch.Generator().manual_seed(7)
    present = cross_attention_blocks(patcher)
    blocks = []
    for block in SDXL_BLOCKS:
        width = present[block].to_k.out_features if block in present else 8
        blocks.append(tuple(torch.randn(2, 16, width, generator=generator).half() for _ in range(2)))
    tokens = torch.zeros(1, 16, 8)
    made = patcher.clone()
    # It ends before the last step, so that a range is part of what is measured.
    settings = PatchSettings(0.8, sigma_end=float(patcher.get_model_object("model_sampling").percent_to_sigma(0.9)))
    add_identity(
        made, PreparedIdentity(tokens, tokens, blocks), settings, None, [b for b in SDXL_BLOCKS if b in present]
    )
    return made


@dataclass(frozen=True)
class Case:
    """What is sampled: a prompt by seed and length, at a size in pixels."""

    name: str
    seed: int
    tokens: int
    width: int
    height: int


def cases(tiny: bool) -> tuple[Case, Case, Case]:
    if tiny:
        return (
            Case("first", 1, 40, 64, 64),
            Case("second prompt", 2, 75, 64, 64),
            Case("second size", 1, 40, 64, 96),
        )
    return (
        Case("first", 1, 60, 1024, 1024),
        Case("second prompt", 2, 150, 1024, 1024),
        Case("second size", 1, 60, 832, 1216),
    )


def cpu_cases() -> tuple[Case, Case, Case]:
    return (
        Case("first", 1, 77, 512, 512),
        Case("second prompt", 2, 154, 512, 512),
        Case("second size", 1, 77, 448, 576),
    )
