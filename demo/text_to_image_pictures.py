"""What the text-to-image nodes say, on a tiny Z-Image checkpoint of random weights, for their help pages."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file

from .. import host
from .node_runs import node
from .picture_rows import card, stacked
from .z_image_model import write_checkpoint

NAME = "Z-Image-tiny"
PROMPT = "a red fox in the snow"
OTHER = "a birch forest"


def _loaded(**options: Any) -> Any:
    folder = host.current().model_folders("diffusers")[0] / NAME
    if not folder.is_dir():
        write_checkpoint(folder)
    return node("HotpathZImageLoader", checkpoint=NAME, **options)


def _drawn(pipeline: Any, **changes: Any) -> str:
    inputs = {
        "prompt": PROMPT, "negative": "", "width": 128, "height": 96, "steps": 8, "guidance": 0.0, "seed": 7,
        "batch_size": 1,
    }  # fmt: skip
    return str(node("HotpathZImage", pipeline=pipeline, **{**inputs, **changes})[2])


def z_image_loader() -> Image.Image:
    return card("Load Z-Image Checkpoint", _loaded(precision="float8")[1])


def z_image_lora() -> Image.Image:
    """Two files on one checkpoint."""
    pipeline = _loaded()[0]
    loras = host.current().model_folders("loras")[0]
    loras.mkdir(parents=True, exist_ok=True)
    for number, (name, layer, strength) in enumerate((("ink", "to_q", 0.8), ("snow", "to_v", 0.5))):
        seeded = torch.Generator().manual_seed(number)
        key = f"transformer.layers.0.attention.{layer}"
        halves = {f"{key}.lora_A.weight": (4, 96), f"{key}.lora_B.weight": (96, 4)}
        save_file({k: torch.randn(size, generator=seeded) for k, size in halves.items()}, loras / f"{name}.safetensors")
        (pipeline,) = node("HotpathZImageLora", pipeline=pipeline, lora=f"{name}.safetensors", strength=strength)
    return card("Z-Image, behind two Z-Image LoRA", _drawn(pipeline))


def z_image() -> Image.Image:
    """The first picture of a prompt, and the next one."""
    pipeline = _loaded()[0]
    first = _drawn(pipeline, prompt=OTHER)
    return stacked([card("Z-Image", first), card("Z-Image, another seed", _drawn(pipeline, prompt=OTHER, seed=8))])
