"""The GGUF nodes of the AILab QwenVL pack: same ids, inputs, order and results, without llama.cpp.

What they set up in llama.cpp and this pack has no use for says so on the node.
"""

from __future__ import annotations

from typing import Any

import torch

from .. import host
from ..vision_language import answers, download, folders, presets
from ..vision_language.answering import Answer, AnswerOptions, answer
from ..vision_language.budgets import Budget
from ..vision_language.gguf.known import TEXT_MODELS, VISION_MODELS
from ..vision_language.loaded_model import LoadedModel, LoadOptions
from ..vision_language.loading import MODELS
from ..vision_language.prompts import Question
from ..vision_language.sampling import Sampling
from .ailab_sockets import (
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
    number,
    preset,
    style,
    tokens,
    words,
)
from .sockets import HIDDEN
from .vision_sockets import devices

# What llama-cpp-python takes of itself, which the original nodes leave it to.
USUAL_TOP_K, USUAL_MIN_P = 40, 0.05
IMAGE_TOKENS = 4096
FRAMES = 16
DEFAULT_MODEL = "Qwen3VL-4B-Instruct-Q4_K_M.gguf"


def file_choice(known: list[str], sees: bool | None, default: str) -> tuple[list[str], dict[str, Any]]:
    """The GGUF files that are there and those that are fetched."""
    return (
        folders.choices(known, sees, files_only=True),
        {"default": default, "tooltip": "A GGUF file under models/LLM, or one that is fetched when it is missing."},
    )


def whole(default: int, least: int, most: int, step: int, tooltip: str) -> tuple[str, dict[str, Any]]:
    return ("INT", {"default": default, "min": least, "max": most, "step": step, "tooltip": tooltip})


def sampled(temperature: float, top_p: float, repetition_penalty: float, seed: int, top_k: int = 0) -> Sampling:
    return Sampling(True, temperature, top_p, top_k or USUAL_TOP_K, USUAL_MIN_P, repetition_penalty, seed=seed)


def bare(made: Answer) -> str:
    """The answer without the thoughts before it, if there is one, and without marks of code around it."""
    return answers.unfenced(made.text or made.raw)


def describe(
    model_name: str, question: Question, load: LoadOptions, sampling: Sampling, options: AnswerOptions
) -> tuple[str]:
    asked = Question(question.prompt, presets.ANSWER_ALONE, question.pictures, question.clips, thinking=False)
    with MODELS.borrowed(model_name, load, bool(asked.pictures or asked.clips)) as loaded:
        made = answer(loaded, [asked], sampling, options)[0]
    host.current().show_text(f"{bare(made)}\n\n{made.report}", options.node_id)
    return (bare(made),)


def on_device(model_name: str, device: str, gpu_layers: int, must_see: bool) -> LoadOptions:
    """gpu_layers: so many of the model's layers stay on the device, and the others in CPU memory; -1 as many as there is room
    for, 0 computes on the CPU."""
    if gpu_layers == 0 or device == "cpu":
        return LoadOptions(device="cpu")
    if gpu_layers < 0:
        return LoadOptions(device=device)
    layers = int(download.locate(model_name, "", must_see).config.get("num_hidden_layers") or 0)
    return LoadOptions(device=device, stream_layers=max(0, layers - gpu_layers))


class AILabQwenVLGGUF(AILabNode):
    DISPLAY_NAME = "QwenVL (GGUF)"
    DESCRIPTION = (
        "Describe a picture or a video with a Qwen vision-language model in a GGUF file and a preset prompt. In new "
        "workflows, use Ask Vision-Language Model (HotpathVLM)."
    )
    SEARCH_ALIASES = ["qwen vl", "gguf", "llama.cpp", "caption", "describe image"]

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model_name": file_choice(list(VISION_MODELS), True, DEFAULT_MODEL),
                "preset_prompt": preset(),
                "custom_prompt": CUSTOM,
                "max_tokens": tokens(512, 32768),
                "keep_model_loaded": KEEP,
                "seed": SEED,
            },
            "optional": {
                "image": IMAGE,
                "video": ("IMAGE", {"tooltip": "Frames of a video; the model sees 16 of them, evenly spread."}),
            },
            "hidden": HIDDEN,
        }

    def process(
        self,
        model_name: str,
        preset_prompt: str,
        custom_prompt: str,
        max_tokens: int,
        keep_model_loaded: bool,
        seed: int,
        image: torch.Tensor | None = None,
        video: torch.Tensor | None = None,
        unique_id: str | None = None,
    ) -> tuple[str]:
        return describe(
            model_name,
            ask(preset_prompt, custom_prompt, image, video, FRAMES),
            LoadOptions(),
            sampled(0.6, 0.9, 1.2, seed),
            AnswerOptions(
                max_tokens,
                Budget("image_max_tokens", None, IMAGE_TOKENS),
                keep_loaded=keep_model_loaded,
                node_id=unique_id,
            ),
        )


class AILabQwenVLGGUFAdvanced(AILabNode):
    DISPLAY_NAME = "QwenVL Advanced (GGUF)"
    DESCRIPTION = (
        "Describe a picture or a video with a Qwen vision-language model in a GGUF file, with every setting. In new "
        "workflows, use Ask Vision-Language Model (HotpathVLM)."
    )
    SEARCH_ALIASES = ["qwen vl", "gguf", "llama.cpp", "caption", "describe image"]

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model_name": file_choice(list(VISION_MODELS), True, DEFAULT_MODEL),
                "device": (devices(), {"default": "auto", "tooltip": DEVICE_TOOLTIP}),
                "preset_prompt": preset(),
                "custom_prompt": CUSTOM,
                "max_tokens": tokens(512, 32768),
                "temperature": number(0.6, 0.0, 2.0, TEMPERATURE_TOOLTIP),
                "top_p": number(0.9, 0.0, 1.0, TOP_P_TOOLTIP),
                "repetition_penalty": number(1.2, 0.5, 2.0, PENALTY_TOOLTIP),
                "frame_count": (
                    "INT",
                    {"default": 16, "min": 1, "max": 768, "tooltip": "How many frames of the video the model sees."},
                ),
                "ctx": whole(
                    8192, 1024, 262144, 512,
                    "Does nothing: there is always room for as many tokens as the question and its answer have.",
                ),
                "n_batch": whole(512, 64, 32768, 64, "Does nothing: how much of a question is read at a time is chosen here."),
                "gpu_layers": whole(
                    -1, -1, 200, 1,
                    "Layers that stay on the device, the others in CPU memory; slow. -1: as many as there is room for. 0: "
                    "computes on the CPU.",
                ),
                "image_max_tokens": whole(4096, 256, 1024000, 256, "Visual tokens that a picture may cost at most."),
                "top_k": whole(0, 0, 32768, 1, "Only so many of the likeliest tokens; 0 is 40, as llama.cpp has it."),
                "pool_size": whole(
                    4194304, 1048576, 10485760, 524288, "Does nothing: it is a buffer of llama.cpp, which is not used."
                ),
                "keep_model_loaded": KEEP,
                "seed": SEED,
            },
            "optional": {"image": IMAGE, "video": ("IMAGE", {"tooltip": "Frames of a video."})},
            "hidden": HIDDEN,
        }  # fmt: skip

    def process(
        self,
        model_name: str,
        device: str,
        preset_prompt: str,
        custom_prompt: str,
        max_tokens: int,
        temperature: float,
        top_p: float,
        repetition_penalty: float,
        frame_count: int,
        ctx: int,
        n_batch: int,
        gpu_layers: int,
        image_max_tokens: int,
        top_k: int,
        pool_size: int,
        keep_model_loaded: bool,
        seed: int,
        image: torch.Tensor | None = None,
        video: torch.Tensor | None = None,
        unique_id: str | None = None,
    ) -> tuple[str]:
        question = ask(preset_prompt, custom_prompt, image, video, frame_count)
        return describe(
            model_name,
            question,
            on_device(model_name, device, gpu_layers, bool(question.pictures or question.clips)),
            sampled(temperature, top_p, repetition_penalty, seed, top_k),
            AnswerOptions(
                max_tokens,
                Budget("image_max_tokens", None, image_max_tokens),
                keep_loaded=keep_model_loaded,
                node_id=unique_id,
            ),
        )


class AILabGGUFPromptEnhancer(AILabNode):
    DISPLAY_NAME = "QwenVL Prompt Enhancer (GGUF)"
    DESCRIPTION = (
        "Rewrite a prompt for an image generator with a Qwen model in a GGUF file. In new workflows, use Ask "
        "Vision-Language Model (HotpathVLM)."
    )
    SEARCH_ALIASES = ["prompt enhancer", "llm", "gguf", "llama.cpp"]
    RETURN_NAMES = ("ENHANCED_OUTPUT",)
    OUTPUT_TOOLTIPS = ("The rewritten prompt.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model_name": file_choice(list(TEXT_MODELS), None, next(iter(TEXT_MODELS))),
                "prompt_text": ("STRING", {"default": "", "multiline": True, "tooltip": "The prompt to rewrite."}),
                "preset_system_prompt": style(),
                "custom_system_prompt": (
                    "STRING",
                    {"default": "", "multiline": True, "tooltip": "Your own instruction, instead of the style."},
                ),
                "max_tokens": tokens(256, 32768),
                "temperature": number(0.7, 0.0, 2.0, TEMPERATURE_TOOLTIP),
                "top_p": number(0.9, 0.0, 1.0, TOP_P_TOOLTIP),
                "repetition_penalty": number(1.1, 0.5, 2.0, PENALTY_TOOLTIP),
                "english_output": (
                    "BOOLEAN",
                    {"default": False, "tooltip": "Ask once more, for the result in English."},
                ),
                "device": (
                    [*devices(), "cuda"],
                    {"default": "auto", "tooltip": DEVICE_TOOLTIP},
                ),
                "seed": SEED,
            },
            "hidden": HIDDEN,
        }

    def process(
        self,
        model_name: str,
        prompt_text: str,
        preset_system_prompt: str,
        custom_system_prompt: str,
        max_tokens: int,
        temperature: float,
        top_p: float,
        repetition_penalty: float,
        english_output: bool,
        device: str,
        seed: int,
        unique_id: str | None = None,
    ) -> tuple[str]:
        style = custom_system_prompt.strip() or words(preset_system_prompt, presets.STYLES, "custom_system_prompt")
        options = AnswerOptions(max_tokens, node_id=unique_id)

        def asked(loaded: LoadedModel, system: str, prompt: str, sampling: Sampling) -> Answer:
            return answer(loaded, [Question(prompt, system, thinking=False)], sampling, options)[0]

        with MODELS.borrowed(model_name, LoadOptions(device=device), must_see=False) as loaded:
            made = asked(
                loaded,
                f"{style}\n\n{presets.PROMPT_ALONE}",
                prompt_text.strip() or presets.EMPTY_ENHANCEMENT,
                sampled(temperature, top_p, repetition_penalty, seed),
            )
            if english_output and bare(made).strip():
                made = asked(loaded, presets.INTO_ENGLISH, bare(made), sampled(0.3, 0.95, 1.05, seed + 1))
        host.current().show_text(f"{bare(made)}\n\n{made.report}", unique_id)
        return (bare(made),)


NODES = {
    "AILab_QwenVL_GGUF": AILabQwenVLGGUF,
    "AILab_QwenVL_GGUF_Advanced": AILabQwenVLGGUFAdvanced,
    "AILab_QwenVL_GGUF_PromptEnhancer": AILabGGUFPromptEnhancer,
}
