"""The Qwen nodes of shared workflows: QwenVL, Qwen2.5VL, Qwen2VL, Qwen and Qwen2.5, with their ids, inputs and order.

Inputs that older layouts of these ids do not have are optional here, so that a prompt of any layout runs; graphs of the
browser are migrated by web/saved_layouts.js, API prompts by host/saved_layouts.py. The nodes with more are in
`vision_language.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..host.whole_paths import allowed
from ..vision_language import folders
from ..vision_language.answering import AnswerOptions
from ..vision_language.budgets import OLD_PRESETS, PRESETS
from ..vision_language.loaded_model import LoadOptions
from ..vision_language.loading import state_of
from ..vision_language.pictures import Clip, from_images, read_clip
from ..vision_language.prompts import Question
from ..vision_language.sampling import Sampling
from .sockets import HIDDEN, number
from .vision_sockets import model_choice, one_answer

CATEGORY = "Comfyui_QwenVL"
SYSTEM = "You are a helpful assistant."
QUANTIZATION = (
    ["none", "4bit", "8bit"],
    {
        "default": "none",
        "tooltip": "8bit: int8 weights. 4bit: bitsandbytes if it is installed, else int4. Both save memory; int8 "
        "and int4 also answer faster on a CPU.",
    },
)
ATTENTION = (
    ["auto", "flash_attention_2", "sdpa", "eager"],
    {"default": "auto", "tooltip": "auto is sdpa. The node shows what ran, and why."},
)
KEEP = (
    "BOOLEAN",
    {"default": False, "tooltip": "Off: the weights leave the device as soon as the answer is there. On: they stay "
     "until ComfyUI needs the room."},
)  # fmt: skip
SEED = (
    "INT",
    {"default": -1, "min": -1, "max": 0xFFFFFFFFFFFFFFFF,
     "tooltip": "The same seed gives the same text. -1 draws a new one at every run."},
)  # fmt: skip
SAMPLING: dict[str, Any] = {
    "do_sample": ("BOOLEAN", {"default": True, "tooltip": "Off: always the likeliest token, whatever the seed."}),
    "temperature": (
        "FLOAT",
        {"default": 0.7, "min": 0.0, "max": 2.0, "step": 0.05, "tooltip": "0 is the same as do_sample off."},
    ),
    "top_p": (
        "FLOAT",
        {"default": 0.9, "min": 0.0, "max": 1.0, "step": 0.05,
         "tooltip": "Only the likeliest tokens that together have this probability."},
    ),
    "top_k": ("INT", {"default": 50, "min": 0, "max": 200, "step": 1, "tooltip": "Only this many of the likeliest "
     "tokens; 0 is all."}),
    "min_p": (
        "FLOAT",
        {"default": 0.0, "min": 0.0, "max": 1.0, "step": 0.05,
         "tooltip": "Only tokens at least this likely, as a fraction of the likeliest."},
    ),
    "repetition_penalty": (
        "FLOAT",
        {"default": 1.0, "min": 1.0, "max": 2.0, "step": 0.05, "tooltip": "Over 1: used tokens become less likely."},
    ),
    "max_new_tokens": (
        "INT", {"default": 512, "min": 1, "max": 32768, "step": 1, "tooltip": "The longest answer, in tokens."},
    ),
    "seed": SEED,
}  # fmt: skip
STRIP = (
    "BOOLEAN",
    {"default": False, "tooltip": "Leave out what a thinking model writes before its answer."},
)


def multiline(default: str, tooltip: str) -> tuple[str, dict[str, Any]]:
    return ("STRING", {"default": default, "multiline": True, "tooltip": tooltip})


def first_picture(image: torch.Tensor | None) -> torch.Tensor | None:
    """These nodes always looked at the first picture of a batch only; `HotpathVLM` looks at all."""
    return None if image is None else image[:1]


class _QwenNode:
    """What the five nodes share: category, output, and when they run again."""

    CATEGORY = CATEGORY
    FUNCTION = "inference"
    RETURN_TYPES: tuple[str, ...] = ("STRING",)
    RETURN_NAMES: tuple[str, ...] = ("text",)
    OUTPUT_TOOLTIPS = ("What the model answered.",)

    @classmethod
    def VALIDATE_INPUTS(cls, model: str = "") -> bool:
        # Naming the input takes it out of ComfyUI's check of the list: names of other machines are looked up at run time.
        return True

    @classmethod
    def IS_CHANGED(
        cls, seed: int | None = -1, model: str | None = None, video_path: str | None = None, **inputs: Any
    ) -> Any:
        # One that comes from another node is not known yet (None), and changes with that node.
        if seed is not None and seed < 0:
            return float("nan")
        # Other files under the same names are another question, too.
        files = f"{state_of(model or '')} {file_state((video_path or '').strip())}".strip()
        return f"{seed} {files}" if files else seed


def file_state(path: str) -> str:
    """Size and time of a file; "" where there is none."""
    try:
        facts = Path(path).stat() if path else None
    except (OSError, ValueError):
        facts = None
    return "" if facts is None else f"{facts.st_size} {facts.st_mtime_ns}"


class QwenVLNode(_QwenNode):
    DISPLAY_NAME = "QwenVL (Vision-Language)"
    DESCRIPTION = (
        "Ask a Qwen vision-language model about up to four pictures and a video. In new workflows, use Ask "
        "Vision-Language Model (HotpathVLM)."
    )
    SEARCH_ALIASES = ["qwen vl", "caption", "describe image", "vlm", "image to text"]

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        picture = ("IMAGE", {"tooltip": "A picture; the first one of a batch."})
        return {
            "required": {},
            "optional": {
                "system": multiline(SYSTEM, "How the model should behave."),
                "text": multiline("", "What to ask about the pictures."),
                "model": model_choice(folders.VISION_MODELS, True, "Qwen3-VL-4B-Instruct"),
                "quantization": QUANTIZATION,
                "attention_mode": ATTENTION,
                "image_quality": (
                    ["fast", "balanced", "high", "ultra"],
                    {"default": "balanced", "tooltip": "How much of a picture the model sees; see token_budget."},
                ),
                "enable_image_cache": (
                    "BOOLEAN",
                    {
                        "default": True,
                        "tooltip": "Keep what the model saw in a picture, so that asking again skips the vision tower.",
                    },
                ),
                "keep_model_loaded": KEEP,
                "bypass": ("BOOLEAN", {"default": False, "tooltip": "Pass the text on instead of asking the model."}),
                **SAMPLING,
                **{f"image{i}": picture for i in (1, 2, 3, 4)},
                "video_path": (
                    "STRING",
                    {"default": "", "tooltip": "A video file; the model sees one frame per second."},
                ),
                "image": ("IMAGE", {"tooltip": "The same as image1, as older workflows call it."}),
                "token_budget": (
                    ["pixels (as before)", "tokens"],
                    {
                        "default": "pixels (as before)",
                        "tooltip": "pixels: image_quality counts 28x28 pixels, which is a quarter fewer tokens on "
                        "Qwen3-VL, and small pictures are enlarged. tokens: 256, 512, 768 or 1024 tokens on any model.",
                    },
                ),
                "strip_thoughts": STRIP,
            },
            "hidden": HIDDEN,
        }

    def inference(
        self,
        system: str = SYSTEM,
        text: str = "",
        model: str = "Qwen3-VL-4B-Instruct",
        quantization: str = "none",
        attention_mode: str = "auto",
        image_quality: str = "balanced",
        enable_image_cache: bool = True,
        keep_model_loaded: bool = False,
        bypass: bool = False,
        do_sample: bool = True,
        temperature: float = 0.7,
        top_p: float = 0.9,
        top_k: int = 50,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        max_new_tokens: int = 512,
        seed: int = -1,
        image1: torch.Tensor | None = None,
        image2: torch.Tensor | None = None,
        image3: torch.Tensor | None = None,
        image4: torch.Tensor | None = None,
        video_path: str = "",
        image: torch.Tensor | None = None,
        token_budget: str = "pixels (as before)",
        strip_thoughts: bool = False,
        unique_id: str | None = None,
    ) -> tuple[str]:
        if bypass:
            return (text,)
        shown = [image if image1 is None else image1, image2, image3, image4]
        pictures = [picture for batch in shown for picture in from_images(first_picture(batch))]
        clips: list[Clip] = [read_clip(allowed(Path(video_path.strip())))] if video_path.strip() else []
        return one_answer(
            model,
            Question(text, system, tuple(pictures), tuple(clips)),
            LoadOptions(quantization=quantization, attention=attention_mode),
            Sampling(do_sample, temperature, top_p, top_k, min_p, repetition_penalty, seed=seed),
            AnswerOptions(
                max_new_tokens,
                (PRESETS if token_budget == "tokens" else OLD_PRESETS)[image_quality],
                cache_images=enable_image_cache,
                keep_loaded=keep_model_loaded,
                node_id=unique_id,
            ),
            strip_thoughts,
        )


class Qwen25VLNode(QwenVLNode):
    DISPLAY_NAME = "Qwen2.5-VL (Vision-Language)"


class QwenTextNode(_QwenNode):
    DISPLAY_NAME = "Qwen (Text)"
    DESCRIPTION = "Ask a Qwen text model. In new workflows, use Ask Vision-Language Model (HotpathVLM)."
    SEARCH_ALIASES = ["qwen", "llm", "prompt enhancer"]

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {},
            "optional": {
                "system": multiline(SYSTEM, "How the model should behave."),
                "prompt": multiline("", "What to ask."),
                "model": model_choice(folders.TEXT_MODELS, False, "Qwen3-4B-Instruct-2507"),
                "quantization": QUANTIZATION,
                "attention_mode": ATTENTION,
                "keep_model_loaded": KEEP,
                "bypass": ("BOOLEAN", {"default": False, "tooltip": "Pass the prompt on instead of asking the model."}),
                **SAMPLING,
                "strip_thoughts": STRIP,
            },
            "hidden": HIDDEN,
        }

    def inference(
        self,
        system: str = SYSTEM,
        prompt: str = "",
        model: str = "Qwen3-4B-Instruct-2507",
        quantization: str = "none",
        attention_mode: str = "auto",
        keep_model_loaded: bool = False,
        bypass: bool = False,
        do_sample: bool = True,
        temperature: float = 0.7,
        top_p: float = 0.9,
        top_k: int = 50,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        max_new_tokens: int = 512,
        seed: int = -1,
        strip_thoughts: bool = False,
        unique_id: str | None = None,
    ) -> tuple[str]:
        if bypass:
            return (prompt,)
        return one_answer(
            model,
            Question(prompt, system),
            LoadOptions(quantization=quantization, attention=attention_mode),
            Sampling(do_sample, temperature, top_p, top_k, min_p, repetition_penalty, seed=seed),
            AnswerOptions(max_new_tokens, keep_loaded=keep_model_loaded, node_id=unique_id),
            strip_thoughts,
        )


class Qwen25TextNode(QwenTextNode):
    DISPLAY_NAME = "Qwen2.5 (Text)"


class Qwen2VLNode(_QwenNode):
    DISPLAY_NAME = "Qwen2VL"
    DESCRIPTION = (
        "Ask a Qwen2-VL model about a picture: the first of the Qwen nodes, with its inputs. In new workflows, use "
        "Ask Vision-Language Model (HotpathVLM)."
    )
    SEARCH_ALIASES = ["qwen2 vl", "caption"]
    RETURN_NAMES = ("STRING",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "text": multiline("", "What to ask about the picture."),
                "model": model_choice(folders.OLD_VISION_MODELS, True, "Qwen2-VL-7B-Instruct"),
                "quantization": QUANTIZATION,
                "keep_model_loaded": KEEP,
                "temperature": number(0.7, 0, 1, "0: always the likeliest token.", 0.1),
                "max_new_tokens": (
                    "INT",
                    {"default": 512, "min": 1, "max": 32768, "step": 1, "tooltip": "The longest answer, in tokens."},
                ),
                "seed": SEED,
            },
            "optional": {"image": ("IMAGE", {"tooltip": "A picture; the first one of a batch."})},
            "hidden": HIDDEN,
        }

    def inference(
        self,
        text: str,
        model: str,
        quantization: str,
        keep_model_loaded: bool,
        temperature: float,
        max_new_tokens: int,
        seed: int,
        image: torch.Tensor | None = None,
        unique_id: str | None = None,
    ) -> tuple[str]:
        return one_answer(
            model,
            Question(text, "", tuple(from_images(first_picture(image)))),
            LoadOptions(quantization=quantization),
            # Everything but the temperature is the model folder's own, as it always was here.
            Sampling(None, temperature, None, None, None, None, seed=seed),
            AnswerOptions(
                max_new_tokens, OLD_PRESETS["ultra"], keep_loaded=keep_model_loaded, node_id=unique_id
            ),
        )  # fmt: skip


NODES = {
    "Qwen2.5VL": Qwen25VLNode,
    "QwenVL": QwenVLNode,
    "Qwen2.5": Qwen25TextNode,
    "Qwen": QwenTextNode,
    "Qwen2VL": Qwen2VLNode,
}
