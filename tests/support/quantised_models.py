"""Small models to quantise, how far their pictures may be off, and a LoRA for one of their layers."""

from __future__ import annotations

import json

import torch
from tiny_native_models import Z_IMAGE, Tiny, make_z_image
from tiny_native_models import tiny as tiny_on

LAYER = "layers.1.attention.qkv"
KEY = f"diffusion_model.{LAYER}.weight"
# Relative error of the picture after two steps; e4m3 has 3 bits of mantissa, int8 has 127 steps to the largest weight.
TOLERANCE = {"fp8": 0.05, "fp8_weights": 0.04, "int8": 0.015, "int8_rotated": 0.015, "int8_weights": 0.01}


def tiny(name: str, dtype: torch.dtype = torch.float32) -> Tiny:
    """On the CPU, also where there is a GPU: the numbers here are the reference's."""
    return tiny_on(name, dtype, "cpu")


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm())


def layer(model, name: str = LAYER):
    """A module of `model` as it is when loaded."""
    import comfy.model_management as management

    management.load_models_gpu([model])
    return model.model.diffusion_model.get_submodule(name)


def weights(model) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.model.diffusion_model.state_dict().items()}


def lora(scale: float = 0.3) -> dict:
    generator = torch.Generator().manual_seed(9)
    up, down = torch.randn(768, 4, generator=generator), torch.randn(4, 256, generator=generator)
    embedder = torch.randn(256, 64, generator=generator)
    return {
        KEY: ("diff", (scale * up @ down / 32,)),
        "diffusion_model.x_embedder.weight": ("diff", (scale * embedder / 8,)),
    }


def fp8_file(layers: tuple[str, ...] = ()):
    """A MODEL as ComfyUI loads a checkpoint: `layers` stored as quantised fp8, or without any all of it plain fp8."""
    import comfy.model_patcher
    import comfy.supported_models
    import comfy.utils

    state = weights(make_z_image())
    for name in layers:
        weight = state[f"{name}.weight"]
        scale = weight.abs().max() / 448
        configuration = json.dumps({"format": "float8_e4m3fn"}).encode()
        state |= {
            f"{name}.weight": (weight / scale).to(torch.float8_e4m3fn),
            f"{name}.weight_scale": scale,
            f"{name}.comfy_quant": torch.tensor(list(configuration), dtype=torch.uint8),
        }
    stored = torch.float32 if layers else torch.float8_e4m3fn
    config = comfy.supported_models.ZImage({**Z_IMAGE, "dtype": stored})
    config.quant_config = comfy.utils.detect_layer_quantization(state, "") if layers else None
    config.set_inference_dtype(stored, torch.float32)
    cpu = torch.device("cpu")
    model = config.get_model(dict(state), "", cpu)
    model.load_model_weights(dict(state), "")
    return comfy.model_patcher.CoreModelPatcher(model.eval(), cpu, cpu)
