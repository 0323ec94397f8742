"""What the nodes of the AILab QwenVL pack declare and do alike, those of folders and those of GGUF files."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from typing import Any

from .. import host
from ..vision_language import own_presets, presets
from ..vision_language.budgets import PRESETS, PROCESSOR, Budget
from ..vision_language.loading import state_of
from ..vision_language.pictures import DEFAULT_FPS, from_frames, from_images
from ..vision_language.prompts import Question
from . import sockets

CATEGORY = "🧪AILab/QwenVL"
AS_BEFORE = "as before"
SEED = (
    "INT",
    {"default": 1, "min": 1, "max": 0xFFFFFFFFFFFFFFFF, "tooltip": "The same seed gives the same text."},
)
KEEP = (
    "BOOLEAN",
    {"default": True, "tooltip": "On: the weights stay on the device until ComfyUI needs the room."},
)
DEVICE_TOOLTIP = "auto is where ComfyUI computes."
IMAGE = ("IMAGE", {"tooltip": "A picture; the first one of a batch."})
TOP_P_TOOLTIP = "Only the likeliest tokens that together have this probability."
TEMPERATURE_TOOLTIP = "Higher is more varied; 0 is always the likeliest token."
PENALTY_TOOLTIP = "Over 1: used tokens become less likely."
BUDGET = (
    [AS_BEFORE, *PRESETS],
    {
        "default": AS_BEFORE,
        "tooltip": "Visual tokens a picture may cost: fast 256, balanced 512, high 768, ultra 1024.",
    },
)
CUSTOM = (
    "STRING",
    {"default": "", "multiline": True, "tooltip": "Your own prompt, instead of the preset."},
)


def preset() -> tuple[list[str], dict[str, Any]]:
    tooltip = "What to ask for. Text files in models/LLM/prompts are presets of your own."
    return own_presets.menu(presets.DESCRIPTIONS), {"default": presets.DEFAULT_DESCRIPTION, "tooltip": tooltip}


def style() -> tuple[list[str], dict[str, Any]]:
    tooltip = "How to rewrite it. Text files in models/LLM/prompts are styles of your own."
    return own_presets.menu(presets.STYLES), {"default": presets.DEFAULT_STYLE, "tooltip": tooltip}


def tokens(default: int, most: int) -> tuple[str, dict[str, Any]]:
    return ("INT", {"default": default, "min": 1, "max": most, "tooltip": "The longest answer, in tokens."})


def number(default: float, least: float, most: float, tooltip: str) -> tuple[str, dict[str, Any]]:
    return sockets.number(default, least, most, tooltip, 0.05)


def budget(name: str) -> Budget:
    return PROCESSOR if name == AS_BEFORE else PRESETS[name]


class AILabNode:
    CATEGORY = CATEGORY
    FUNCTION = "process"
    RETURN_TYPES: tuple[str, ...] = ("STRING",)
    RETURN_NAMES: tuple[str, ...] = ("RESPONSE",)
    OUTPUT_TOOLTIPS = ("What the model answered.",)

    @classmethod
    def VALIDATE_INPUTS(
        cls,
        model_name: str = "",
        device: str = "",
        preset_prompt: str = "",
        enhancement_style: str = "",
        preset_system_prompt: str = "",
    ) -> bool:
        # Names and devices of other machines are looked up at run time; a preset of an older list is its own text.
        return True

    @classmethod
    def IS_CHANGED(cls, model_name: str | None = None, **inputs: Any) -> str:
        names = ("preset_prompt", "enhancement_style", "preset_system_prompt")
        own = own_presets.state(next((inputs[name] for name in names if inputs.get(name)), None))
        return state_of(model_name or "") + own


def words(preset: str, known: Mapping[str, str], own: str) -> str:
    """What a preset asks for; one of the oldest list is its own text. own: the input for somebody's own words."""
    for name in (preset, presets.EARLIER.get(preset, preset)):
        if (found := own_presets.words(name, known)) is not None:
            return found
    if _is_a_name(preset):
        host.current().warn(
            f"There is no preset {preset} here, so that this itself is asked: write its words into {own}, or into {preset}.txt "
            f"in {own_presets.place()}."
        )
    return preset


def _is_a_name(preset: str) -> bool:
    """Whether it is no text as the oldest list has them: it begins with a sign, as forks of that pack have it, or is no
    sentence."""
    text = preset.strip()
    return bool(text) and (unicodedata.category(text[0]) == "So" or unicodedata.category(text[-1]) != "Po")


def ask(preset_prompt: str, custom_prompt: str, image: Any, video: Any, frame_count: int) -> Question:
    prompt = custom_prompt.strip() or words(preset_prompt, presets.DESCRIPTIONS, "custom_prompt")
    if image is not None and len(image) > 1:
        host.current().warn(
            f"image holds {len(image)} pictures, of which this node looks at the first: Ask Vision-Language Model answers each "
            "with one_answer_each."
        )
    pictures = from_images(None if image is None else image[:1])
    return Question(prompt, "", tuple(pictures), tuple(from_frames(video, DEFAULT_FPS, frame_count)))
