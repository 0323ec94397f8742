"""The AILab QwenVL nodes of shared workflows: same ids, inputs, order and results, without their leaks."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from typing import Any

import torch

from .. import host
from ..vision_language import presets
from ..vision_language.answering import AnswerOptions, answer
from ..vision_language.budgets import PRESETS, PROCESSOR, Budget
from ..vision_language.loaded_model import LoadOptions
from ..vision_language.loading import MODELS, state_of
from ..vision_language.pictures import DEFAULT_FPS, from_frames, from_images
from ..vision_language.prompts import Question
from ..vision_language.sampling import Sampling
from .vision_sockets import model_choice

CATEGORY = "🧪AILab/QwenVL"
AS_BEFORE = "as before"
VISION_MODELS = (
    *(
        f"Qwen3-VL-{size}-{kind}{suffix}"
        for size in ("2B", "4B", "8B", "32B")
        for suffix in ("", "-FP8")
        for kind in ("Instruct", "Thinking")
    ),
    "Qwen2.5-VL-3B-Instruct",
    "Qwen2.5-VL-7B-Instruct",
    "unsloth/Qwen3.5-4B",
    "unsloth/Qwen3.6-27B",
    "unsloth/Qwen3.8-27B",
)
TEXT_MODELS = ("Qwen3-0.6B", "qwen3-4b-Z-Image-Engineer", "Qwen3-4B-Instruct-2507")
QUANTIZATION = (
    ["4-bit (VRAM-friendly)", "8-bit (Balanced)", "None (FP16)"],
    {
        "default": "None (FP16)",
        "tooltip": "8-bit: int8 weights. 4-bit: bitsandbytes if it is installed, else int4. Both save memory.",
    },
)
ATTENTION = (
    ["auto", "sage", "flash_attention_2", "sdpa"],
    {"default": "auto", "tooltip": "auto is sdpa. The node shows what ran, and why."},
)
SEED = (
    "INT",
    {"default": 1, "min": 1, "max": 0xFFFFFFFFFFFFFFFF, "tooltip": "The same seed gives the same text."},
)
KEEP = (
    "BOOLEAN",
    {"default": True, "tooltip": "On: the weights stay on the device until ComfyUI needs the room."},
)
COMPILE = (
    "BOOLEAN",
    {
        "default": False,
        "tooltip": "Compile the decode step, also on a CPU. Off: what is fastest here; the report says which.",
    },
)
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


def devices() -> list[str]:
    found = ["auto", "cpu", "mps"]
    return found + [f"cuda:{index}" for index in range(torch.cuda.device_count())]


def tokens(default: int, most: int) -> tuple[str, dict[str, Any]]:
    return ("INT", {"default": default, "min": 1, "max": most, "tooltip": "The longest answer, in tokens."})


def number(default: float, least: float, most: float, tooltip: str) -> tuple[str, dict[str, Any]]:
    return ("FLOAT", {"default": default, "min": least, "max": most, "step": 0.05, "tooltip": tooltip})


def budget(name: str) -> Budget:
    return PROCESSOR if name == AS_BEFORE else PRESETS[name]


class _AILabNode:
    CATEGORY = CATEGORY
    FUNCTION = "process"
    RETURN_TYPES: tuple[str, ...] = ("STRING",)
    RETURN_NAMES: tuple[str, ...] = ("RESPONSE",)
    OUTPUT_TOOLTIPS = ("What the model answered.",)

    @classmethod
    def VALIDATE_INPUTS(
        cls, model_name: str = "", device: str = "", preset_prompt: str = "", enhancement_style: str = ""
    ) -> bool:
        # Names and devices of other machines are looked up at run time; a preset of an older list is its own text.
        return True

    @classmethod
    def IS_CHANGED(cls, model_name: str | None = None, **inputs: Any) -> str:
        return state_of(model_name or "")


def run(
    model_name: str, question: Question, load: LoadOptions, sampling: Sampling, options: AnswerOptions
) -> tuple[str]:
    needs_sight = bool(question.pictures or question.clips)
    with MODELS.borrowed(model_name, load, needs_sight) as loaded:
        made = answer(loaded, [question], sampling, options)[0]
    host.current().show_text(f"{made.raw}\n\n{made.report}", options.node_id)
    return (made.raw,)


def words(preset: str, known: Mapping[str, str], own: str) -> str:
    """What a preset asks for; one of the oldest list is its own text. own: the input for somebody's own words."""
    preset = presets.EARLIER.get(preset, preset)
    if (
        preset not in known and unicodedata.category((preset or " ")[0]) == "So"
    ):  # a name as this pack's forks give them
        host.current().warn(
            f"{preset} is a preset of another pack, whose words are not known here: write them into {own}."
        )
    return known.get(preset, preset)


def ask(preset_prompt: str, custom_prompt: str, image: Any, video: Any, frame_count: int) -> Question:
    prompt = custom_prompt.strip() or words(preset_prompt, presets.DESCRIPTIONS, "custom_prompt")
    if image is not None and len(image) > 1:
        host.current().warn(
            f"image holds {len(image)} pictures, of which this node looks at the first: Ask Vision-Language Model answers each "
            "with one_answer_each."
        )
    pictures = from_images(None if image is None else image[:1])
    return Question(prompt, "", tuple(pictures), tuple(from_frames(video, DEFAULT_FPS, frame_count)))


class AILabQwenVL(_AILabNode):
    DISPLAY_NAME = "QwenVL"
    DESCRIPTION = (
        "Describe a picture or a video with a Qwen vision-language model and a preset prompt. In new workflows, use "
        "Ask Vision-Language Model (HotpathVLM)."
    )
    SEARCH_ALIASES = ["qwen vl", "caption", "describe image"]

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model_name": model_choice(VISION_MODELS, True, VISION_MODELS[0]),
                "quantization": QUANTIZATION,
                "attention_mode": ATTENTION,
                "preset_prompt": (
                    list(presets.DESCRIPTIONS),
                    {"default": presets.DEFAULT_DESCRIPTION, "tooltip": "What to ask for."},
                ),
                "custom_prompt": CUSTOM,
                "max_tokens": tokens(512, 32768),
                "keep_model_loaded": KEEP,
                "seed": SEED,
            },
            "optional": {
                "image": ("IMAGE", {"tooltip": "A picture; the first one of a batch."}),
                "video": ("IMAGE", {"tooltip": "Frames of a video; the model sees 16 of them, evenly spread."}),
                "token_budget": BUDGET,
            },
            "hidden": {"unique_id": "UNIQUE_ID"},
        }

    def process(
        self,
        model_name: str,
        quantization: str,
        preset_prompt: str,
        custom_prompt: str,
        attention_mode: str,
        max_tokens: int,
        keep_model_loaded: bool,
        seed: int,
        image: torch.Tensor | None = None,
        video: torch.Tensor | None = None,
        token_budget: str = AS_BEFORE,
        unique_id: str | None = None,
    ) -> tuple[str]:
        return run(
            model_name,
            ask(preset_prompt, custom_prompt, image, video, 16),
            LoadOptions(quantization=quantization, attention=attention_mode),
            Sampling(True, 0.6, 0.9, None, None, 1.2, seed=seed),
            AnswerOptions(max_tokens, budget(token_budget), keep_loaded=keep_model_loaded, node_id=unique_id),
        )


class AILabQwenVLAdvanced(_AILabNode):
    DISPLAY_NAME = "QwenVL (Advanced)"
    DESCRIPTION = (
        "Describe a picture or a video with a Qwen vision-language model, with every setting. In new workflows, use "
        "Ask Vision-Language Model (HotpathVLM)."
    )
    SEARCH_ALIASES = ["qwen vl", "caption", "describe image"]

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model_name": model_choice(VISION_MODELS, True, VISION_MODELS[0]),
                "quantization": QUANTIZATION,
                "attention_mode": ATTENTION,
                "use_torch_compile": COMPILE,
                "device": (devices(), {"default": "auto", "tooltip": "auto is where ComfyUI computes."}),
                "preset_prompt": (
                    list(presets.DESCRIPTIONS),
                    {"default": presets.DEFAULT_DESCRIPTION, "tooltip": "What to ask for."},
                ),
                "custom_prompt": CUSTOM,
                "max_tokens": tokens(512, 32768),
                "temperature": number(0.6, 0.0, 2.0, "Higher is more varied; 0 is always the likeliest token."),
                "top_p": number(0.9, 0.0, 1.0, "Only the likeliest tokens that together have this probability."),
                "num_beams": (
                    "INT",
                    {"default": 1, "min": 1, "max": 8, "tooltip": "Over 1: beam search, without sampling; slower."},
                ),
                "repetition_penalty": number(1.2, 0.5, 2.0, "Over 1: used tokens become less likely."),
                "frame_count": (
                    "INT",
                    {"default": 16, "min": 1, "max": 768, "tooltip": "How many frames of the video the model sees."},
                ),
                "keep_model_loaded": KEEP,
                "seed": SEED,
            },
            "optional": {
                "image": ("IMAGE", {"tooltip": "A picture; the first one of a batch."}),
                "video": ("IMAGE", {"tooltip": "Frames of a video."}),
                "token_budget": BUDGET,
            },
            "hidden": {"unique_id": "UNIQUE_ID"},
        }

    def process(
        self,
        model_name: str,
        quantization: str,
        attention_mode: str,
        use_torch_compile: bool,
        device: str,
        preset_prompt: str,
        custom_prompt: str,
        max_tokens: int,
        temperature: float,
        top_p: float,
        num_beams: int,
        repetition_penalty: float,
        frame_count: int,
        keep_model_loaded: bool,
        seed: int,
        image: torch.Tensor | None = None,
        video: torch.Tensor | None = None,
        token_budget: str = AS_BEFORE,
        unique_id: str | None = None,
    ) -> tuple[str]:
        return run(
            model_name,
            ask(preset_prompt, custom_prompt, image, video, frame_count),
            LoadOptions(quantization=quantization, attention=attention_mode, device=device),
            Sampling(num_beams == 1, temperature, top_p, None, None, repetition_penalty, num_beams, seed),
            AnswerOptions(
                max_tokens,
                budget(token_budget),
                decode="compiled" if use_torch_compile else "auto",
                keep_loaded=keep_model_loaded,
                node_id=unique_id,
            ),
        )


class AILabPromptEnhancer(_AILabNode):
    DISPLAY_NAME = "QwenVL Prompt Enhancer"
    DESCRIPTION = (
        "Rewrite a prompt for an image generator with a Qwen model. In new workflows, use Ask Vision-Language Model "
        "(HotpathVLM)."
    )
    SEARCH_ALIASES = ["prompt enhancer", "llm"]
    RETURN_NAMES = ("ENHANCED_OUTPUT",)
    OUTPUT_TOOLTIPS = ("The rewritten prompt.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model_name": model_choice((*TEXT_MODELS, *VISION_MODELS), None, TEXT_MODELS[0]),
                "quantization": QUANTIZATION,
                "attention_mode": ATTENTION,
                "use_torch_compile": COMPILE,
                "device": (devices(), {"default": "auto", "tooltip": "auto is where ComfyUI computes."}),
                "prompt_text": ("STRING", {"default": "", "multiline": True, "tooltip": "The prompt to rewrite."}),
                "enhancement_style": (
                    list(presets.STYLES),
                    {"default": presets.DEFAULT_STYLE, "tooltip": "How to rewrite it."},
                ),
                "custom_system_prompt": (
                    "STRING",
                    {"default": "", "multiline": True, "tooltip": "Your own instruction, instead of the style."},
                ),
                "max_tokens": tokens(256, 32768),
                "temperature": number(0.7, 0.0, 2.0, "Higher is more varied; 0 is always the likeliest token."),
                "top_p": number(0.9, 0.0, 1.0, "Only the likeliest tokens that together have this probability."),
                "repetition_penalty": number(1.1, 0.5, 2.0, "Over 1: used tokens become less likely."),
                "keep_model_loaded": KEEP,
                "seed": SEED,
            },
            "hidden": {"unique_id": "UNIQUE_ID"},
        }

    def process(
        self,
        model_name: str,
        quantization: str,
        attention_mode: str,
        use_torch_compile: bool,
        device: str,
        prompt_text: str,
        enhancement_style: str,
        custom_system_prompt: str,
        max_tokens: int,
        temperature: float,
        top_p: float,
        repetition_penalty: float,
        keep_model_loaded: bool,
        seed: int,
        unique_id: str | None = None,
    ) -> tuple[str]:
        instruction = custom_system_prompt.strip() or words(enhancement_style, presets.STYLES, "custom_system_prompt")
        prompt = f"{instruction}\n\n{prompt_text.strip() or presets.EMPTY_ENHANCEMENT}"
        return run(
            model_name,
            Question(prompt),
            LoadOptions(quantization=quantization, attention=attention_mode, device=device),
            Sampling(True, temperature, top_p, None, None, repetition_penalty, seed=seed),
            AnswerOptions(
                max_tokens,
                decode="compiled" if use_torch_compile else "auto",
                keep_loaded=keep_model_loaded,
                node_id=unique_id,
            ),
        )


NODES = {
    "AILab_QwenVL": AILabQwenVL,
    "AILab_QwenVL_Advanced": AILabQwenVLAdvanced,
    "AILab_QwenVL_PromptEnhancer": AILabPromptEnhancer,
}
