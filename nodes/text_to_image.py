"""Text to image on Hugging Face-format Z-Image folders: the loader, LoRA files, and the node that draws."""

from __future__ import annotations

import sys
from typing import Any

import torch

from .. import host
from ..cache import file_fingerprint
from ..text_to_image import compilation, decoding, folders, precision, previews, prompts, stream_attention
from ..text_to_image.adapters import Adapter
from ..text_to_image.denoising import Guidance
from ..text_to_image.generation import Pipeline, generate
from ..text_to_image.loading import DTYPES, MODELS, LoadOptions, ZImage
from ..text_to_image.requests import Request
from .sockets import HIDDEN, number

CATEGORY = "Hotpath/text to image"
PIPELINE = "HOTPATH_T2I"
LORAS = "loras"
PUBLISHED = "Z-Image-Turbo"  # shown where there is no checkpoint yet, so that the report says what belongs where
FLUX_CHANNELS = 16


class HotpathZImageLoader:
    DISPLAY_NAME = "Load Z-Image Checkpoint"
    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Loads a Hugging Face-format Z-Image folder (with model_index.json) once, for every node that uses it."
    )
    SEARCH_ALIASES = ["z-image", "zimage", "diffusers", "load pipeline", "text to image"]
    RETURN_TYPES = (PIPELINE, "STRING")
    RETURN_NAMES = ("pipeline", "report")
    OUTPUT_TOOLTIPS = ("The checkpoint, for Z-Image and Z-Image LoRA.", "What will run, and why.")
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "checkpoint": (
                    folders.scan() or [PUBLISHED],
                    {
                        "tooltip": "A folder under models/diffusers, diffusion_models or checkpoints with a model_index.json."
                    },
                ),
            },
            "optional": {
                "dtype": (
                    ["auto", *DTYPES],
                    {"default": "auto", "tooltip": "auto: bfloat16 where the device has it, float32 on the CPU."},
                ),
                "attention": (
                    list(stream_attention.BACKENDS),
                    {
                        "default": "auto",
                        "tooltip": "auto: the exact one that measures fastest. Others run where they can.",
                    },
                ),
                "compile": (
                    list(compilation.MODES),
                    {
                        "default": "none",
                        "tooltip": "regional: the first picture waits for the compiler, then every prompt and size is faster.",
                    },
                ),
                "precision": (
                    list(precision.PRECISIONS),
                    {
                        "default": "none",
                        "tooltip": "float8 and int8 are for speed together with regional compile; pictures differ slightly.",
                    },
                ),
            },
        }

    @classmethod
    def VALIDATE_INPUTS(cls, checkpoint: str | None = "") -> bool | str:
        if checkpoint is None:
            return True  # it comes from another node
        try:
            folders.find(checkpoint)
        except (folders.UnusableCheckpoint, host.ModelNotFound) as error:
            return str(error)
        return True

    @classmethod
    def IS_CHANGED(cls, checkpoint: str | None = "", **inputs: Any) -> str:
        if checkpoint is None:
            return ""  # it comes from another node, and changes with that
        return folders.find(checkpoint).identity(*folders.COMPONENTS)

    def load(
        self,
        checkpoint: str,
        dtype: str = "auto",
        attention: str = "auto",
        compile: str = "none",
        precision: str = "none",
    ) -> tuple[Pipeline, str]:
        model = MODELS.get(checkpoint or "", LoadOptions(dtype, attention, compile, precision))
        return Pipeline(model), model.describe()


class HotpathZImageLora:
    DISPLAY_NAME = "Z-Image LoRA"
    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Puts a LoRA file on a Z-Image checkpoint. Several may follow each other; the checkpoint stays as it is."
    )
    SEARCH_ALIASES = ["adapter", "style", "load lora", "diffusers"]
    RETURN_TYPES = (PIPELINE,)
    RETURN_NAMES = ("pipeline",)
    OUTPUT_TOOLTIPS = ("The checkpoint with the file on it; the one that came in is unchanged.",)
    FUNCTION = "add"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "pipeline": (PIPELINE, {"tooltip": "From Load Z-Image Checkpoint, or another Z-Image LoRA."}),
                "lora": (
                    host.current().model_files(LORAS, (".safetensors",)) or [""],
                    {"tooltip": "A safetensors file in models/loras, trained for Z-Image."},
                ),
                "strength": number(1.0, -10.0, 10.0, "1 is as trained, 0 is without.", 0.05),
            }
        }

    @classmethod
    def IS_CHANGED(cls, lora: str | None = "", **inputs: Any) -> str:
        if lora is None:
            return ""  # it comes from another node, and changes with that
        return file_fingerprint(host.current().model_path(LORAS, lora))

    def add(self, pipeline: Pipeline, lora: str, strength: float) -> tuple[Pipeline]:
        return (pipeline.with_adapter(Adapter(host.current().model_path(LORAS, lora or ""), strength)),)


class HotpathZImage:
    DISPLAY_NAME = "Z-Image"
    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Draws pictures from a prompt. Each picture depends on its own seed alone, not on the batch it came with."
    )
    SEARCH_ALIASES = ["text to image", "t2i", "zimage", "generate", "img2img", "inpaint", "sampler"]
    RETURN_TYPES = ("IMAGE", "LATENT", "STRING")
    RETURN_NAMES = ("images", "latent", "report")
    OUTPUT_TOOLTIPS = (
        "The pictures.",
        "Their latents, for VAE Decode with the same VAE, or a second pass.",
        "What ran and why, seeds, and where the time went.",
    )
    FUNCTION = "draw"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        side = {"min": 16, "max": 8192, "step": 16}
        return {
            "required": {
                "pipeline": (PIPELINE, {"tooltip": "From Load Z-Image Checkpoint, with or without LoRA files on it."}),
                "prompt": (
                    "STRING",
                    {"default": "", "multiline": True, "dynamicPrompts": True, "tooltip": "What the picture shows."},
                ),
                "negative": (
                    "STRING",
                    {"default": "", "multiline": True, "dynamicPrompts": True,
                     "tooltip": "What to avoid. Only read if guidance is over 0."},
                ),
                "width": ("INT", {"default": 1024, **side, "tooltip": "In pixels, a multiple of 16."}),
                "height": ("INT", {"default": 1024, **side, "tooltip": "In pixels, a multiple of 16."}),
                "steps": (
                    "INT",
                    {"default": 8, "min": 1, "max": 200, "tooltip": "8 for Z-Image-Turbo, 28 to 50 for Z-Image."},
                ),
                "guidance": number(
                    0.0, 0.0, 30.0,
                    "As diffusers counts: 0 for Turbo, 3 to 5 for Z-Image. It is the CFG of KSampler less 1, and "
                    "over 0 doubles the time.", 0.1,
                ),
                "seed": (
                    "INT",
                    {"default": 0, "min": 0, "max": 0xFFFFFFFFFFFFFFFF, "control_after_generate": True,
                     "tooltip": "Seed of the first picture; the next ones count up from it."},
                ),
                "batch_size": ("INT", {"default": 1, "min": 1, "max": 4096, "tooltip": "How many pictures."}),
            },
            "optional": {
                "image": ("IMAGE", {"tooltip": "A picture to draw over: one for all, or one for each. It is cropped "
                 "to width x height."}),
                "mask": ("MASK", {"tooltip": "Where the image is drawn over; elsewhere it stays, as the VAE gives it."}),
                "strength": number(0.6, 0.01, 1.0, "With an image: how much of it is drawn anew. 1 keeps nothing."),
                "cfg_normalization": (
                    "FLOAT",
                    {"default": 0.0, "min": 0.0, "max": 10.0, "step": 0.05,
                     "tooltip": "Over 0: guidance may make a prediction at most this many times as long."},
                ),
                "cfg_truncation": (
                    "FLOAT",
                    {"default": 1.0, "min": 0.0, "max": 1.0, "step": 0.01,
                     "tooltip": "Part of the schedule after which guidance stops; it halves the time of the rest. 1: never."},
                ),
                "pictures_at_a_time": (
                    "INT",
                    {"default": 1, "min": 1, "max": 64,
                     "tooltip": "1: the same picture in any batch, to the last bit. More: faster for small pictures."},
                ),
                "vae_tiling": (
                    list(decoding.TILING),
                    {"default": "auto", "tooltip": "auto: whole pictures, in tiles only where the device has no room."},
                ),
                "prompt_cache": (
                    list(prompts.CACHES),
                    {"default": "memory", "tooltip": "A prompt that was read before needs no text encoder."},
                ),
                "control_image": (
                    "IMAGE",
                    {"tooltip": "Edges, depth or a pose to follow, for checkpoints with a ControlNet."},
                ),
                "control_strength": (
                    "FLOAT",
                    {"default": 0.75, "min": 0.0, "max": 2.0, "step": 0.05, "tooltip": "How closely the control "
                     "image is followed."},
                ),
                "keep_outside": (
                    "BOOLEAN",
                    {"default": False,
                     "tooltip": "With a mask: put the image's own pixels back outside it, which the VAE changes a little."},
                ),
            },
            "hidden": HIDDEN,
        }  # fmt: skip

    def draw(
        self,
        pipeline: Pipeline,
        prompt: str,
        negative: str,
        width: int,
        height: int,
        steps: int,
        guidance: float,
        seed: int,
        batch_size: int,
        image: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        strength: float = 0.6,
        cfg_normalization: float = 0.0,
        cfg_truncation: float = 1.0,
        pictures_at_a_time: int = 1,
        vae_tiling: str = "auto",
        prompt_cache: str = "memory",
        control_image: torch.Tensor | None = None,
        control_strength: float = 0.75,
        keep_outside: bool = False,
        unique_id: str | None = None,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor], str]:
        request = Request(
            prompt,
            negative,
            width,
            height,
            steps,
            Guidance(guidance, cfg_normalization, cfg_truncation),
            seed,
            batch_size,
            image,
            mask,
            strength,
            control_image,
            control_strength,
            pictures_at_a_time=pictures_at_a_time,
            tiling=vae_tiling,
            prompt_cache=prompt_cache,
            keep_outside=keep_outside,
        )
        drawn = generate(pipeline, request, preview_for(pipeline.model), unique_id)
        return drawn.pictures, {"samples": drawn.latents}, drawn.report


class ComfyUIPreview:
    """ComfyUI's own previewer, as the person chose it in ComfyUI's settings."""

    def __init__(self, previewer: Any) -> None:
        self._previewer = previewer

    def picture(self, latents: torch.Tensor) -> Any:
        return self._previewer.decode_latent_to_preview(latents)


def preview_for(model: ZImage) -> previews.Preview | None:
    """How pictures are shown while they are drawn here; None where nobody asked to see them."""
    here = host.current()
    if "comfy.model_management" not in sys.modules or not here.name.startswith("ComfyUI"):
        return previews.of_model(model) if getattr(here, "on_preview", None) is not None else None
    import comfy.latent_formats
    import latent_preview

    known = comfy.latent_formats.Flux()
    previewer = latent_preview.get_previewer(model.device, known)
    if previewer is None:
        return None
    # Z-Image's autoencoder is Flux's, and ComfyUI has a map for it; a checkpoint with another one gets its own.
    return ComfyUIPreview(previewer) if model.latent_channels == FLUX_CHANNELS else previews.of_model(model)


NODES = {
    "HotpathZImageLoader": HotpathZImageLoader,
    "HotpathZImageLora": HotpathZImageLora,
    "HotpathZImage": HotpathZImage,
}
