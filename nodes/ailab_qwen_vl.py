"""The AILab QwenVL nodes of shared workflows: same ids, inputs, order and results, without their leaks."""

from __future__ import annotations

from typing import Any

import torch

from ..vision_language import presets
from ..vision_language.answering import AnswerOptions
from ..vision_language.loaded_model import LoadOptions
from ..vision_language.prompts import Question
from ..vision_language.sampling import Sampling
from .ailab_sockets import (
    AS_BEFORE,
    BUDGET,
    CUSTOM,
    DEVICE_TOOLTIP,
    IMAGE,
    KEEP,
    PENALTY_TOOLTIP,
    SEED,
    TEMPERATURE_TOOLTIP,
    TOP_P_TOOLTIP,
    AILabNode,
    ask,
    budget,
    number,
    preset,
    style,
    tokens,
    words,
)
from .sockets import HIDDEN
from .vision_sockets import devices, model_choice, one_answer

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
COMPILE = (
    "BOOLEAN",
    {
        "default": False,
        "tooltip": "Compile the decode step, also on a CPU. Off: what is fastest here; the report says which.",
    },
)


class AILabQwenVL(AILabNode):
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
                "preset_prompt": preset(),
                "custom_prompt": CUSTOM,
                "max_tokens": tokens(512, 32768),
                "keep_model_loaded": KEEP,
                "seed": SEED,
            },
            "optional": {
                "image": IMAGE,
                "video": ("IMAGE", {"tooltip": "Frames of a video; the model sees 16 of them, evenly spread."}),
                "token_budget": BUDGET,
            },
            "hidden": HIDDEN,
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
        return one_answer(
            model_name,
            ask(preset_prompt, custom_prompt, image, video, 16),
            LoadOptions(quantization=quantization, attention=attention_mode),
            Sampling(True, 0.6, 0.9, None, None, 1.2, seed=seed),
            AnswerOptions(max_tokens, budget(token_budget), keep_loaded=keep_model_loaded, node_id=unique_id),
        )


class AILabQwenVLAdvanced(AILabNode):
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
                "device": (devices(), {"default": "auto", "tooltip": DEVICE_TOOLTIP}),
                "preset_prompt": preset(),
                "custom_prompt": CUSTOM,
                "max_tokens": tokens(512, 32768),
                "temperature": number(0.6, 0.0, 2.0, TEMPERATURE_TOOLTIP),
                "top_p": number(0.9, 0.0, 1.0, TOP_P_TOOLTIP),
                "num_beams": (
                    "INT",
                    {"default": 1, "min": 1, "max": 8, "tooltip": "Over 1: beam search, without sampling; slower."},
                ),
                "repetition_penalty": number(1.2, 0.5, 2.0, PENALTY_TOOLTIP),
                "frame_count": (
                    "INT",
                    {"default": 16, "min": 1, "max": 768, "tooltip": "How many frames of the video the model sees."},
                ),
                "keep_model_loaded": KEEP,
                "seed": SEED,
            },
            "optional": {
                "image": IMAGE,
                "video": ("IMAGE", {"tooltip": "Frames of a video."}),
                "token_budget": BUDGET,
            },
            "hidden": HIDDEN,
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
        return one_answer(
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


class AILabPromptEnhancer(AILabNode):
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
                "device": (devices(), {"default": "auto", "tooltip": DEVICE_TOOLTIP}),
                "prompt_text": ("STRING", {"default": "", "multiline": True, "tooltip": "The prompt to rewrite."}),
                "enhancement_style": style(),
                "custom_system_prompt": (
                    "STRING",
                    {"default": "", "multiline": True, "tooltip": "Your own instruction, instead of the style."},
                ),
                "max_tokens": tokens(256, 32768),
                "temperature": number(0.7, 0.0, 2.0, TEMPERATURE_TOOLTIP),
                "top_p": number(0.9, 0.0, 1.0, TOP_P_TOOLTIP),
                "repetition_penalty": number(1.1, 0.5, 2.0, PENALTY_TOOLTIP),
                "keep_model_loaded": KEEP,
                "seed": SEED,
            },
            "hidden": HIDDEN,
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
        return one_answer(
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
