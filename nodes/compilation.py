"""Compilation of any native MODEL, and the warm-up that comes before the first picture."""

from __future__ import annotations

from typing import Any

from .. import host
from ..patches.compilation import MODES, REGIONS, CompileSettings, compile_model
from ..patches.warmup import EXAMPLE, parse_sizes, warm_up
from .sockets import HIDDEN, NATIVE_MODEL

CATEGORY = "Hotpath/acceleration"


class HotpathCompile:
    DISPLAY_NAME = "Compile Model"
    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Compiles the repeated blocks of any native model with torch.compile, each kind once for all prompts and sizes. "
        "LoRAs, ControlNets and InstantID keep working; what cannot be compiled runs as it is, and the report says why."
    )
    SEARCH_ALIASES = ["torch.compile", "torch compile", "inductor", "cuda graphs", "speed", "triton"]
    RETURN_TYPES = ("MODEL", "STRING")
    RETURN_NAMES = ("model", "report")
    OUTPUT_TOOLTIPS = (
        "The compiled model. The first step of the first picture waits for the compiler; Warm Up does that beforehand.",
        "Which blocks were found, and what stands in the way. What was compiled comes from Warm Up and Profile Report.",
    )
    FUNCTION = "compile"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": NATIVE_MODEL,
                "mode": (
                    list(MODES),
                    {
                        "default": "default",
                        "tooltip": "default: fused kernels. reduce-overhead: also plays back the whole step as one CUDA graph "
                        "per size, for models that wait for Python (SDXL). max-autotune: also tries kernels, minutes at first. "
                        "cudagraphs: plays back and compiles nothing, ready after two steps.",
                    },
                ),
                "regions": (
                    list(REGIONS),
                    {
                        "default": REGIONS[0],
                        "tooltip": "all blocks: in a UNet the residual blocks too, which takes longer to compile.",
                    },
                ),
                "dynamic": (
                    "BOOLEAN",
                    {
                        "default": True,
                        "tooltip": "One graph for all sizes and prompt lengths. Off: one for each of the first eight, compiled "
                        "when first met; more run as they are.",
                    },
                ),
            },
            "optional": {
                "strict": (
                    "BOOLEAN",
                    {
                        "default": False,
                        "tooltip": "Stop with the reason where a block cannot be compiled, instead of running it as it is.",
                    },
                ),
                "captured_sizes": (
                    "INT",
                    {
                        "default": 4,
                        "min": 1,
                        "max": 64,
                        "tooltip": "How many CUDA graphs reduce-overhead, max-autotune and cudagraphs keep. They share the "
                        "memory of the largest step; each adds a copy of its inputs.",
                    },
                ),
            },
            "hidden": HIDDEN,
        }

    def compile(
        self,
        model: Any,
        mode: str,
        regions: str,
        dynamic: bool,
        strict: bool = False,
        captured_sizes: int = 4,
        unique_id: str | None = None,
    ) -> tuple[Any, str]:
        made, report = compile_model(model, CompileSettings(mode, regions, dynamic, strict, captured_sizes))
        host.current().show_text(report, unique_id)
        return made, report


class HotpathWarmup:
    DISPLAY_NAME = "Warm Up"
    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Runs a few steps of the model at each size before the first picture, so that compiling, recording and choosing "
        "kernels is over by then. Connect the conditioning of the pictures to warm up exactly what they will run."
    )
    SEARCH_ALIASES = ["torch.compile", "first picture slow", "precompile", "warmup"]
    RETURN_TYPES = ("MODEL", "STRING")
    RETURN_NAMES = ("model", "report")
    OUTPUT_TOOLTIPS = (
        "The same model; connect it to the sampler, so that the warm-up comes first.",
        "Seconds and graphs per size.",
    )
    FUNCTION = "warm_up"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "The model as it goes into the sampler, after all patches."}),
                "sizes": (
                    "STRING",
                    {"default": EXAMPLE, "tooltip": "Width x height in pixels, separated by commas."},
                ),
                "batch": (
                    "INT",
                    {"default": 1, "min": 1, "max": 64, "tooltip": "Pictures per batch, as in the latent."},
                ),
            },
            "optional": {
                "positive": (
                    "CONDITIONING",
                    {"tooltip": "The prompt of the pictures. Without it, an empty one is made."},
                ),
                "negative": ("CONDITIONING", {"tooltip": "The negative prompt."}),
                "cfg": (
                    "FLOAT",
                    {
                        "default": 1.0,
                        "min": 0.0,
                        "max": 100.0,
                        "step": 0.1,
                        "tooltip": "As in the sampler. Above 1 prompt and negative run as one batch, which has its own graphs.",
                    },
                ),
            },
            "hidden": HIDDEN,
        }

    @classmethod
    def VALIDATE_INPUTS(cls, sizes: str | None = None) -> bool | str:
        if sizes is None:
            return True  # it comes from another node
        try:
            parse_sizes(sizes)
        except ValueError as error:
            return str(error)
        return True

    def warm_up(
        self,
        model: Any,
        sizes: str,
        batch: int,
        positive: Any = None,
        negative: Any = None,
        cfg: float = 1.0,
        unique_id: str | None = None,
    ) -> tuple[Any, str]:
        _, report = warm_up(model, parse_sizes(sizes), batch, positive, negative, cfg)
        host.current().show_text(report, unique_id)
        return model, report


NODES: dict[str, type[Any]] = {"HotpathCompile": HotpathCompile, "HotpathWarmup": HotpathWarmup}
