"""The two Deep Exemplar nodes of shared workflows: same ids, inputs, order and outputs as the pack they come from.

Sizes stay what was asked for (they were silently rounded to multiples of 32), and the networks are the published ones
again (enlargement and padding in the matching network had been changed, which changed every colour).
"""

from __future__ import annotations

from typing import Any

import torch

from ..colorization.compatible import DeepExemplarJob, run_deep_exemplar
from ..colorization.networks import load_deep_exemplar
from .colour_sockets import FRAMES, CompatibleImageNode, CompatibleVideoNode, compile_input, shown
from .sockets import HIDDEN

SAGE_NOTE = (
    "use_sage_attention does nothing: Deep Exemplar has no attention layer. Its match of frame and reference is an "
    "exact search for the best of 256-channel features, done tile by tile."
)

REFERENCE = ("IMAGE", {"tooltip": "A picture in the colours you want, ideally of the same scene."})
SIZE = {"min": 16, "max": 4096}
WIDTH = (
    "INT",
    {
        "default": 768,
        **SIZE,
        "tooltip": "Width of the result. Frames are scaled to cover it and cropped at the middle.",
    },
)
HEIGHT = ("INT", {"default": 432, **SIZE, "tooltip": "Height of the result."})
USE_TORCH_COMPILE = compile_input("VGG and the colour network")
USE_SAGE_ATTENTION = ("BOOLEAN", {"default": False, "tooltip": SAGE_NOTE})


class DeepExColorImageNode(CompatibleImageNode):
    DISPLAY_NAME = "Deep Exemplar Image Colorization (Original)"
    CATEGORY = "DeepExemplar/Image"
    DESCRIPTION = (
        "Colours pictures after a reference picture, each on its own (Deep Exemplar, CVPR 2019). In new workflows, "
        "use Colorize Images (Hotpath), which does not crop."
    )
    OUTPUT_TOOLTIPS = ("The pictures in colour, of the target size.", "What ran, how fast, and why.")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "image_to_colorize": ("IMAGE", {"tooltip": "One picture, or a batch."}),
                "reference_image": REFERENCE,
                "target_width": WIDTH,
                "target_height": HEIGHT,
                "use_torch_compile": USE_TORCH_COMPILE,
                "use_sage_attention": USE_SAGE_ATTENTION,
            },
            "hidden": HIDDEN,
        }

    def colorize_image(
        self,
        image_to_colorize: torch.Tensor,
        reference_image: torch.Tensor,
        target_width: int,
        target_height: int,
        use_torch_compile: bool = False,
        use_sage_attention: bool = False,
        unique_id: str | None = None,
    ) -> tuple[torch.Tensor, str]:
        notes = (SAGE_NOTE,) if use_sage_attention else ()
        job = DeepExemplarJob(target_height, target_width, True, False, use_torch_compile, notes)
        done = run_deep_exemplar(load_deep_exemplar("float32"), image_to_colorize, reference_image, job)
        return shown(done, unique_id)


class DeepExColorVideoNode(CompatibleVideoNode):
    DISPLAY_NAME = "Deep Exemplar Video Colorization (Original)"
    CATEGORY = "DeepExemplar/Video"
    DESCRIPTION = (
        "Colours a film after a reference picture (Deep Exemplar, CVPR 2019). In new workflows, use Colorize Video "
        "(Hotpath), which does not crop."
    )
    OUTPUT_TOOLTIPS = ("The frames in colour, of the target size.", "What ran, how fast, and why.")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "video_frames": FRAMES,
                "reference_image": REFERENCE,
                "frame_propagate": (
                    "BOOLEAN",
                    {
                        "default": True,
                        "tooltip": "Each frame sees the colours of the one before, which keeps them steady. Off: every "
                        "frame on its own.",
                    },
                ),
                "use_half_resolution": (
                    "BOOLEAN",
                    {
                        "default": True,
                        "tooltip": "The networks see half the size, as they were trained; chroma is enlarged and "
                        "raised by a quarter. Off: full size, several times slower, not raised.",
                    },
                ),
                "target_width": WIDTH,
                "target_height": HEIGHT,
                "use_torch_compile": USE_TORCH_COMPILE,
                "use_sage_attention": USE_SAGE_ATTENTION,
            },
            "hidden": HIDDEN,
        }

    def colorize_video(
        self,
        video_frames: torch.Tensor,
        reference_image: torch.Tensor,
        frame_propagate: bool,
        use_half_resolution: bool,
        target_width: int,
        target_height: int,
        use_torch_compile: bool = False,
        use_sage_attention: bool = False,
        unique_id: str | None = None,
    ) -> tuple[torch.Tensor, str]:
        notes = (SAGE_NOTE,) if use_sage_attention else ()
        job = DeepExemplarJob(
            target_height, target_width, use_half_resolution, frame_propagate, use_torch_compile, notes
        )
        done = run_deep_exemplar(load_deep_exemplar("float32"), video_frames, reference_image, job)
        return shown(done, unique_id)


NODES: dict[str, type[Any]] = {
    "DeepExColorImageNode": DeepExColorImageNode,
    "DeepExColorVideoNode": DeepExColorVideoNode,
}
