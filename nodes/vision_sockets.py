"""Inputs that our vision-language nodes declare alike; no family imports another one, since each must register alone."""

from __future__ import annotations

from typing import Any

from ..vision_language import folders
from ..vision_language.budgets import PRESETS
from ..vision_language.decode_path import DECODE_PATHS

CATEGORY = "Hotpath/vision-language"
THINKING: dict[str, bool | None] = {"as the model does": None, "on": True, "off": False}
CACHES = ("memory", "memory and disk", "off")
SYSTEM = ("STRING", {"default": "", "multiline": True, "tooltip": "How the model should behave."})
TEMPERATURE = (
    "FLOAT",
    {
        "default": 0.0,
        "min": 0.0,
        "max": 2.0,
        "step": 0.05,
        "tooltip": "0: always the likeliest token. Higher: more varied.",
    },
)
BUDGET = (
    list(PRESETS),
    {
        "default": "balanced",
        "tooltip": "Visual tokens a picture may cost: fast 256, balanced 512, high 768, ultra 1024, native as many as "
        "the model allows. Pictures are never enlarged.",
    },
)
CACHE = (
    list(CACHES),
    {
        "default": "memory",
        "tooltip": "Keep what the model saw in a picture, so that asking again skips the vision tower.",
    },
)
DECODE = (
    list(DECODE_PATHS),
    {
        "default": "auto",
        "tooltip": "auto: our own kernels, or compiled layers, in one CUDA graph where that runs, static on a CPU, else plain. "
        "plain is the library's own path.",
    },
)
KEEP = (
    "BOOLEAN",
    {"default": True, "tooltip": "Off: the weights leave the device as soon as the answer is there."},
)
SEED = (
    "INT",
    {"default": 0, "min": 0, "max": 0xFFFFFFFFFFFFFFFF, "tooltip": "The same seed gives the same text."},
)
MODEL = ("HOTPATH_VLM", {"tooltip": "From Load Vision-Language Model. All nodes that use it share one copy."})


def model_choice(known: tuple[str, ...], sees: bool | None, default: str) -> tuple[list[str], dict[str, Any]]:
    """The folders that are there and the models that are fetched. sees: with a vision tower, without one, or either."""
    return (
        folders.choices(known, sees),
        {"default": default, "tooltip": "A folder under models/LLM, or a model that is downloaded if it is missing."},
    )
