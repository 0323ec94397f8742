"""Hotpath's own vision-language nodes: one shared model, and questions about any number of pictures."""

from __future__ import annotations

from typing import Any

import torch

from .. import host
from ..vision_language import budgets, folders, own_presets, presets
from ..vision_language.answering import AnswerOptions
from ..vision_language.asking import FORMATS as ANSWER_FORMATS
from ..vision_language.asking import Request, ask
from ..vision_language.load_choices import ATTENTIONS, DTYPES
from ..vision_language.loaded_model import LoadedModel, LoadOptions
from ..vision_language.loading import MODELS, state_of
from ..vision_language.pictures import from_frames, from_images
from ..vision_language.quantization import QUANTIZATIONS
from ..vision_language.sampling import Sampling
from .sockets import HIDDEN, number
from .vision_sockets import (
    BUDGET,
    CACHE,
    CATEGORY,
    DECODE,
    KEEP,
    MODEL,
    SEED,
    SYSTEM,
    TEMPERATURE,
    THINKING,
    devices,
    preset_choice,
)


class HotpathVLMLoader:
    DISPLAY_NAME = "Load Vision-Language Model"
    CATEGORY = CATEGORY
    DESCRIPTION = "Loads a Qwen-VL (or Qwen text) model, a folder or a GGUF file, once for every node that uses it."
    SEARCH_ALIASES = ["qwen vl", "vlm", "llm", "load qwen", "gguf"]
    RETURN_TYPES = ("HOTPATH_VLM", "STRING")
    RETURN_NAMES = ("model", "report")
    OUTPUT_TOOLTIPS = ("The model.", "What was loaded, and how.")
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        known = (*folders.VISION_MODELS, *folders.OLD_VISION_MODELS, *folders.TEXT_MODELS)
        return {
            "required": {
                "model": (
                    folders.choices(known, None),
                    {
                        "default": "Qwen3-VL-4B-Instruct",
                        "tooltip": "A folder or a GGUF file under models/LLM, or a model that is fetched when it is missing.",
                    },
                ),
            },
            "optional": {
                "dtype": (
                    ["auto", *DTYPES],
                    {"default": "auto", "tooltip": "auto: bfloat16 where the device has it, float32 on the CPU."},
                ),
                "quantization": (
                    list(QUANTIZATIONS),
                    {
                        "default": "none",
                        "tooltip": "int8, int4 and float8 can be compiled; bitsandbytes saves memory but decodes slower. "
                        "none: as stored, also what a GGUF file has packed.",
                    },
                ),
                "attention": (list(ATTENTIONS), {"default": "auto", "tooltip": "auto is sdpa."}),
                "revision": (
                    "STRING",
                    {"default": "", "tooltip": "A branch, tag or commit to download; it is kept in a folder of its "
                     "own."},
                ),
                "stream_layers": (
                    "INT",
                    {
                        "default": -1,
                        "min": -1,
                        "max": 256,
                        "tooltip": "Decoder layers that stay in CPU memory, for models larger than the device; slow. "
                        "-1: as many as do not fit.",
                    },
                ),
                "repository": (
                    "STRING",
                    {"default": "", "tooltip": "A repository of the hub, as owner/name, or a file of one, as "
                     "owner/name/file.gguf, in place of model: a fine-tune, say. It is fetched when it is missing."},
                ),
                "device": (
                    devices(),
                    {"default": "auto", "tooltip": "Where it computes. auto is where ComfyUI does; another card keeps that one "
                     "free for pictures."},
                ),
            },
        }  # fmt: skip

    @classmethod
    def VALIDATE_INPUTS(cls, model: str = "", device: str = "") -> bool:
        # What another machine has is looked up, or fetched, when the node runs.
        return True

    @classmethod
    def IS_CHANGED(
        cls, model: str | None = None, revision: str | None = None, repository: str | None = None, **inputs: Any
    ) -> str:
        return state_of((repository or "").strip() or model or "", (revision or "").strip())

    def load(
        self,
        model: str,
        dtype: str = "auto",
        quantization: str = "none",
        attention: str = "auto",
        revision: str = "",
        stream_layers: int = -1,
        repository: str = "",
        device: str = "auto",
    ) -> tuple[LoadedModel, str]:
        options = LoadOptions(dtype, quantization, attention, device, revision.strip(), stream_layers)
        loaded = MODELS.get(repository.strip() or model, options, False)
        where = "" if device == "auto" else f", on {loaded.device}"
        report = "\n".join([f"{loaded.folder.name}: {loaded.model_type}, {loaded.dtype}{where}", *loaded.notes])
        return loaded, report


class HotpathVLM:
    DISPLAY_NAME = "Ask Vision-Language Model"
    CATEGORY = CATEGORY
    DESCRIPTION = "Ask about any number of pictures and a video: text, thoughts, JSON, boxes, several answers."
    SEARCH_ALIASES = [
        "qwen vl",
        "caption",
        "describe image",
        "vlm",
        "vqa",
        "bounding boxes",
        "image to text",
        "video caption",
        "ocr",
    ]
    RETURN_TYPES = ("STRING", "STRING", "STRING", "STRING", "IMAGE", "STRING")
    RETURN_NAMES = ("answer", "answers", "thoughts", "json", "picture", "report")
    OUTPUT_IS_LIST = (False, True, False, False, True, False)
    OUTPUT_TOOLTIPS = (
        "The first answer.",
        "All answers, as a list.",
        "What a thinking model wrote before its answer.",
        "The JSON in the answer, when the format is json or boxes.",
        "The pictures; with format boxes, the boxes drawn on them.",
        "What ran and why, tokens, and where the time went.",
    )
    FUNCTION = "ask"
    OUTPUT_NODE = True
    # Pictures of different sizes come as a list; all of them stand in the question.
    INPUT_IS_LIST = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": MODEL,
                "prompt": ("STRING", {"default": presets.EMPTY_PROMPT, "multiline": True, "tooltip": "The question."}),
            },
            "optional": {
                "images": ("IMAGE", {"tooltip": "Pictures: a batch, a list, or both. All are shown to the model."}),
                "video": ("IMAGE", {"tooltip": "The frames of a video."}),
                "system": SYSTEM,
                "answer_format": (
                    list(ANSWER_FORMATS),
                    {"default": "text", "tooltip": "json and boxes ask for JSON and read it; boxes are drawn."},
                ),
                "token_budget": BUDGET,
                "thinking": (
                    list(THINKING),
                    {"default": "as the model does", "tooltip": "off keeps a thinking model from thinking."},
                ),
                "max_new_tokens": (
                    "INT",
                    {"default": 512, "min": 1, "max": 131072, "tooltip": "The longest answer, thoughts included."},
                ),
                "temperature": TEMPERATURE,
                "top_p": (
                    "FLOAT",
                    {"default": 0.9, "min": 0.0, "max": 1.0, "step": 0.05,
                     "tooltip": "Only the likeliest tokens that together have this probability."},
                ),
                "top_k": ("INT", {"default": 50, "min": 0, "max": 1000, "tooltip": "Only this many of the likeliest "
                 "tokens; 0 is all."}),
                "repetition_penalty": (
                    "FLOAT",
                    {"default": 1.0, "min": 0.5, "max": 2.0, "step": 0.05, "tooltip": "Over 1: fewer repetitions."},
                ),
                "seed": SEED,
                "answers": ("INT", {"default": 1, "min": 1, "max": 64, "tooltip": "How many answers to the question."}),
                "one_answer_each": (
                    "BOOLEAN",
                    {"default": False, "tooltip": "Ask about every picture on its own, several at a time."},
                ),
                "batch_size": ("INT", {"default": 8, "min": 1, "max": 256, "tooltip": "Pictures at a time, then."}),
                "fps": number(24.0, 0.01, 1000.0, "Frames a second of video."),
                "max_frames": (
                    "INT",
                    {"default": 32, "min": 1, "max": 768, "tooltip": "At most this many frames, evenly spread."},
                ),
                "image_cache": CACHE,
                "reuse_prefix": (
                    "BOOLEAN",
                    {"default": True, "tooltip": "Another question about the same pictures reads only its own words."},
                ),
                "decode": DECODE,
                "keep_model_loaded": KEEP,
                "preset": preset_choice(),
            },
            "hidden": HIDDEN,
        }  # fmt: skip

    @classmethod
    def VALIDATE_INPUTS(cls, preset: Any = own_presets.NONE) -> bool:
        # One of another machine is looked up when the node runs.
        return True

    @classmethod
    def IS_CHANGED(cls, preset: Any = None, **inputs: Any) -> str:
        # Of this node every input is a list.
        return own_presets.state(preset[0] if isinstance(preset, list) and preset else None)

    def ask(
        self,
        model: list[LoadedModel],
        prompt: list[str],
        images: list[torch.Tensor] | None = None,
        video: list[torch.Tensor] | None = None,
        **settings: list[Any],
    ) -> dict[str, Any]:
        # With INPUT_IS_LIST every widget comes as a list of one.
        declared = self.INPUT_TYPES()["optional"]
        chosen = {name: spec[1].get("default") for name, spec in declared.items()}
        chosen |= {name: value[0] for name, value in settings.items() if value}
        request = Request(
            own_presets.in_place_of(prompt[0], chosen["preset"]),
            chosen["system"],
            tuple(picture for batch in images or [] for picture in from_images(batch)),
            tuple(clip for batch in video or [] for clip in from_frames(batch, chosen["fps"], chosen["max_frames"])),
            THINKING[chosen["thinking"]],
            chosen["answer_format"],
            chosen["one_answer_each"],
            chosen["batch_size"],
        )
        temperature = chosen["temperature"]
        sampling = Sampling(
            temperature > 0,
            temperature,
            chosen["top_p"],
            chosen["top_k"],
            0.0,
            chosen["repetition_penalty"],
            seed=chosen["seed"],
        )
        options = AnswerOptions(
            chosen["max_new_tokens"],
            budgets.preset(chosen["token_budget"]),
            answers=chosen["answers"],
            cache_images=chosen["image_cache"] != "off",
            cache_on_disk=chosen["image_cache"] == "memory and disk",
            reuse_prefix=chosen["reuse_prefix"],
            decode=chosen["decode"],
            keep_loaded=chosen["keep_model_loaded"],
            node_id=chosen.get("unique_id"),
        )
        reply = ask(model[0], request, sampling, options)
        if len(prompt) > 1:
            reply.report += f"\n{len(prompt)} prompts came as a list; the first was asked"
        texts = [part.text for part in reply.answers]
        host.current().show_text(f"{texts[0]}\n\n{reply.report}", options.node_id)
        thoughts = reply.answers[0].thoughts
        return {
            "ui": {"text": texts},
            "result": (texts[0], texts, thoughts, reply.json(), reply.images(images or ()), reply.report),
        }


NODES = {
    "HotpathVLMLoader": HotpathVLMLoader,
    "HotpathVLM": HotpathVLM,
}
