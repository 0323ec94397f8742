"""An SDXL UNet and an IdentityNet with SDXL's own layout, 70 cross-attention blocks, and small widths.

For tests and the demo: the weights are random from a seed, so no file is needed and two machines get the same numbers.
Widths: 32, 64 and 128 channels instead of 320, 640 and 1280; a context of 64 instead of 2048.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch

CONTEXT = 64
POOLED = 1280  # SDXL's own: its size and crop embedding is built for it
CHANNELS = 32

# SDXL's, as ComfyUI detects it from a checkpoint, but for the widths.
UNET_CONFIG: dict[str, Any] = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": CHANNELS,
    "num_res_blocks": [2, 2, 2],
    "channel_mult": [1, 2, 4],
    "transformer_depth": [0, 0, 2, 2, 10, 10],
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
    "transformer_depth_middle": 10,
    "num_heads": -1,
    "num_head_channels": 64,
    "context_dim": CONTEXT,
    "adm_in_channels": 2816,
    "num_classes": "sequential",
    "use_spatial_transformer": True,
    "use_linear_in_transformer": True,
    "use_temporal_attention": False,
    "legacy": False,
}


def fill(module: torch.nn.Module, seed: int) -> None:
    """Random weights of a size that keeps activations near 1 through 70 blocks; the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(module.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1:
            value = 1 + 0.05 * noise if name.endswith("weight") else 0.02 * noise
        else:
            value = noise * (0.7 / parameter[0].numel() ** 0.5)
        parameter.data = value.to(parameter)


def patcher_over(model: Any) -> Any:
    """A ModelPatcher over one of ComfyUI's models, of the kind that its own loaders make."""
    import comfy.model_management
    import comfy.model_patcher

    # Before DynamicVRAM there was one kind.
    kind = getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)
    return kind(
        model.eval(),
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )


def make_sdxl(seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A ModelPatcher over a tiny SDXL. `changes` go into the UNet's configuration (for layouts that are not SDXL's)."""
    import comfy.supported_models

    config = comfy.supported_models.SDXL({**UNET_CONFIG, **changes, "dtype": dtype})
    config.set_inference_dtype(dtype, None)
    model = config.get_model({}, "", torch.device("cpu"))
    fill(model.diffusion_model, seed)
    return patcher_over(model)


def make_identity_net(seed: int = 1, dtype: torch.dtype = torch.float32) -> Any:
    """A ControlNet with the tiny SDXL's layout. Its outputs are not zero, as a trained one's are not."""
    import comfy.cldm.cldm
    import comfy.controlnet
    import comfy.model_management
    import comfy.ops

    config = {k: v for k, v in UNET_CONFIG.items() if k not in ("out_channels", "transformer_depth_output")}
    network = comfy.cldm.cldm.ControlNet(
        **config, hint_channels=3, dtype=dtype, device="cpu", operations=comfy.ops.disable_weight_init
    )
    fill(network, seed)
    return comfy.controlnet.ControlNet(
        network.eval(), load_device=comfy.model_management.get_torch_device(), manual_cast_dtype=None
    )


def encode_text(text: str, tokens: int = 77, context: int = CONTEXT) -> list[list[Any]]:
    """A CONDITIONING for the tiny SDXL that depends on `text` and nothing else."""
    seed = int.from_bytes(hashlib.md5(text.encode(), usedforsecurity=False).digest()[:4], "little")
    generator = torch.Generator().manual_seed(seed)
    pooled = torch.randn(1, POOLED, generator=generator)
    return [[torch.randn(1, tokens, context, generator=generator), {"pooled_output": pooled}]]


def make_adapter_state(
    seed: int = 2, dim: int = 128, depth: int = 2, faces: int = 512, context: int = CONTEXT, channels: int = CHANNELS
) -> dict[str, dict[str, torch.Tensor]]:
    """The contents of an `ip-adapter.bin` that fits the tiny SDXL: {"image_proj": ..., "ip_adapter": ...}."""
    generator = torch.Generator().manual_seed(seed)

    def weight(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) / shape[-1] ** 0.5

    def norm(prefix: str, width: int) -> dict[str, torch.Tensor]:
        noise = torch.randn(2, width, generator=generator)
        return {f"{prefix}.weight": 1 + 0.1 * noise[0], f"{prefix}.bias": 0.1 * noise[1]}

    resampler = {
        "latents": torch.randn(1, 16, dim, generator=generator) / dim**0.5,
        "proj_in.weight": weight(dim, faces),
        "proj_in.bias": 0.1 * weight(dim),
        "proj_out.weight": weight(context, dim),
        "proj_out.bias": 0.1 * weight(context),
        **norm("norm_out", context),
    }
    for i in range(depth):
        resampler |= {
            **norm(f"layers.{i}.0.norm1", dim),
            **norm(f"layers.{i}.0.norm2", dim),
            f"layers.{i}.0.to_q.weight": weight(dim, dim),
            f"layers.{i}.0.to_kv.weight": weight(2 * dim, dim),
            f"layers.{i}.0.to_out.weight": weight(dim, dim),
            **norm(f"layers.{i}.1.0", dim),
            f"layers.{i}.1.1.weight": weight(4 * dim, dim),
            f"layers.{i}.1.3.weight": weight(dim, 4 * dim),
        }
    middle, deep = 2 * channels, 4 * channels
    widths = [middle] * 4 + [deep] * 20 + [deep] * 30 + [middle] * 6 + [deep] * 10  # input, output, middle
    projections = {
        f"{2 * n + 1}.to_{kind}_ip.weight": weight(width, context) for n, width in enumerate(widths) for kind in "kv"
    }
    return {"image_proj": resampler, "ip_adapter": projections}
