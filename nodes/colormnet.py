"""The two ColorMNet nodes of shared workflows: same ids, inputs, order and outputs as the pack they come from.

Mended here: films over 1,990 frames, batches of references, and options that were read by nothing now say so. What
changes pictures keeps its old default and has a switch at the end. The nodes with the right defaults are in `colorize`.
"""

from __future__ import annotations

from typing import Any

import torch

from ..colorization.colormnet.settings import MODES
from ..colorization.compatible import ColorMNetJob, run_colormnet
from ..colorization.networks import AUTOMATIC, COLORMNET_LICENCE, load_colormnet
from .colour_sockets import (
    FRAMES,
    AnyCheckpoint,
    CompatibleImageNode,
    CompatibleVideoNode,
    checkpoint_input,
    compile_input,
    shown,
)
from .sockets import HIDDEN, number

ENCODERS = ["resnet50", "vgg19", "dinov2_vits", "dinov2_vitb", "dinov2_vitl", "clip_vitb"]
ENCODER_NOTE = (
    "feature_encoder does nothing: ColorMNet's weights contain the two encoders they were trained with, ResNet-50 and "
    "DINOv2 ViT-S, and were trained with no others."
)
TEXT_NOTE = "text_guidance does nothing: no weights were ever trained to steer ColorMNet by text."

REFERENCE = (
    "IMAGE",
    {"tooltip": "A picture in the colours you want. Several in one batch are all remembered."},
)
TARGET = {"min": 64, "max": 2048, "step": 32}
WIDTH = (
    "INT",
    {
        "default": 768,
        **TARGET,
        "tooltip": "Width that the network sees. At the frames' own width and height, nothing is resized.",
    },
)
HEIGHT = ("INT", {"default": 432, **TARGET, "tooltip": "Height the network sees."})
USE_FP16 = (
    "BOOLEAN",
    {
        "default": True,
        "tooltip": "Half precision on a graphics card; memory keys and the recurrent state stay float32. Off: float32 "
        "throughout. A CPU always computes in float32.",
    },
)
USE_TORCH_COMPILE = compile_input("the key encoder and the decoder")
ORIGINAL_LUMINANCE = (
    "BOOLEAN",
    {
        "default": False,
        "tooltip": "Put the colours on the frames' own luminance. Off: as before, the network-sized picture is "
        "enlarged to the frames' size, which blurs it if the target is smaller.",
    },
)
CHECKPOINT = (
    "A file in models/colormnet. Automatic takes the published DINOv2FeatureV6_LocalAtten_s2_154000, or else the first "
    "ColorMNet checkpoint there."
)


class ColorMNetVideo(CompatibleVideoNode, AnyCheckpoint):
    DISPLAY_NAME = "ColorMNet Video Colorization (New)"
    CATEGORY = "ColorMNet/Video"
    DESCRIPTION = (
        "Colours a film after a reference picture (ColorMNet, ECCV 2024). "
        f"In new workflows, use Colorize Video (Hotpath). {COLORMNET_LICENCE}"
    )
    OUTPUT_TOOLTIPS = ("The frames in colour, of their own size.", "What ran, how fast, and what was left out and why.")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "video_frames": FRAMES,
                "reference_image": REFERENCE,
                "target_width": WIDTH,
                "target_height": HEIGHT,
                "memory_mode": (
                    list(MODES),
                    {
                        "default": "balanced",
                        "tooltip": "How much is remembered: a frame in 5 (low_memory: 10, high_quality: 3), at most 10 "
                        "(5, 15) frames and 10000 (5000, 15000) older places. The report gives the bytes.",
                    },
                ),
                "feature_encoder": (ENCODERS, {"default": "resnet50", "tooltip": ENCODER_NOTE}),
                "use_fp16": USE_FP16,
                "use_torch_compile": USE_TORCH_COMPILE,
            },
            "optional": {
                "text_guidance": ("STRING", {"default": "", "multiline": False, "tooltip": TEXT_NOTE}),
                "text_guidance_weight": number(0.3, 0.0, 1.0, TEXT_NOTE, 0.05),
                "original_luminance": ORIGINAL_LUMINANCE,
                "checkpoint": checkpoint_input(CHECKPOINT),
            },
            "hidden": HIDDEN,
        }

    def colorize_video(
        self,
        video_frames: torch.Tensor,
        reference_image: torch.Tensor,
        target_width: int,
        target_height: int,
        memory_mode: str = "balanced",
        feature_encoder: str = "resnet50",
        use_fp16: bool = True,
        use_torch_compile: bool = False,
        text_guidance: str = "",
        text_guidance_weight: float = 0.3,
        original_luminance: bool = False,
        checkpoint: str = AUTOMATIC,
        unique_id: str | None = None,
    ) -> tuple[torch.Tensor, str]:
        job = ColorMNetJob(
            target_height, target_width, memory_mode, original_luminance, False, use_torch_compile,
            notes=(ENCODER_NOTE, TEXT_NOTE) if text_guidance.strip() else (ENCODER_NOTE,),
        )  # fmt: skip
        network = load_colormnet(checkpoint, AUTOMATIC if use_fp16 else "float32")
        return shown(run_colormnet(network, video_frames, reference_image, job), unique_id)


class ColorMNetImage(CompatibleImageNode, AnyCheckpoint):
    DISPLAY_NAME = "ColorMNet Image Colorization (New)"
    CATEGORY = "ColorMNet/Image"
    DESCRIPTION = (
        "Colours pictures after a reference picture, each on its own (ColorMNet). "
        f"In new workflows, use Colorize Images (Hotpath). {COLORMNET_LICENCE}"
    )
    OUTPUT_TOOLTIPS = ("The pictures in colour, of their own size.", "What ran, how fast, and why.")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "image": ("IMAGE", {"tooltip": "One picture, or a batch of pictures that need not belong together."}),
                "reference_image": REFERENCE,
                "target_width": WIDTH,
                "target_height": HEIGHT,
                "use_fp16": USE_FP16,
                "use_torch_compile": USE_TORCH_COMPILE,
            },
            "optional": {"original_luminance": ORIGINAL_LUMINANCE, "checkpoint": checkpoint_input(CHECKPOINT)},
            "hidden": HIDDEN,
        }

    def colorize_image(
        self,
        image: torch.Tensor,
        reference_image: torch.Tensor,
        target_width: int,
        target_height: int,
        use_fp16: bool = True,
        use_torch_compile: bool = False,
        original_luminance: bool = False,
        checkpoint: str = AUTOMATIC,
        unique_id: str | None = None,
    ) -> tuple[torch.Tensor, str]:
        job = ColorMNetJob(
            target_height, target_width, original_luminance=original_luminance, stills=True, compile=use_torch_compile
        )
        network = load_colormnet(checkpoint, AUTOMATIC if use_fp16 else "float32")
        return shown(run_colormnet(network, image, reference_image, job), unique_id)


NODES: dict[str, type[Any]] = {"ColorMNetVideo": ColorMNetVideo, "ColorMNetImage": ColorMNetImage}
