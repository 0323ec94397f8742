"""Hotpath's own vision-language nodes: one shared model, any number of pictures, and a captioner for folders."""

from __future__ import annotations

from typing import Any

import torch

from .. import host
from ..host.whole_paths import allowed
from ..vision_language import folders, presets
from ..vision_language.answering import AnswerOptions
from ..vision_language.asking import FORMATS as ANSWER_FORMATS
from ..vision_language.asking import Request, ask
from ..vision_language.budgets import PRESETS, preset
from ..vision_language.caption_job import FORMATS, CaptionJob, place
from ..vision_language.captioning import FolderCaptioner
from ..vision_language.generation import DECODE_PATHS
from ..vision_language.loaded_model import LoadedModel, LoadOptions
from ..vision_language.loading import ATTENTIONS, DTYPES, MODELS, state_of
from ..vision_language.pictures import from_frames, from_images
from ..vision_language.quantization import QUANTIZATIONS
from ..vision_language.sampling import Sampling

CATEGORY = "Hotpath/vision-language"
THINKING: dict[str, bool | None] = {"as the model does": None, "on": True, "off": False}
CACHES = ("memory", "memory and disk", "off")
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
    {"default": "memory", "tooltip": "Keep what the model saw in a picture, so that asking again skips looking."},
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
    {"default": True, "tooltip": "Off: the weights leave the device when the answer is there."},
)
SEED = (
    "INT",
    {"default": 0, "min": 0, "max": 0xFFFFFFFFFFFFFFFF, "tooltip": "The same seed gives the same text."},
)
MODEL = ("HOTPATH_VLM", {"tooltip": "From Load Vision-Language Model. All nodes that use it share one copy."})


class HotpathVLMLoader:
    DISPLAY_NAME = "Load Vision-Language Model"
    CATEGORY = CATEGORY
    DESCRIPTION = "Loads a Qwen-VL (or Qwen text) model folder once, for every node that uses it."
    SEARCH_ALIASES = ["qwen vl", "vlm", "llm", "load qwen"]
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
                        "tooltip": "Any model folder under models/LLM, or a name that is fetched when it is missing.",
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
                        "tooltip": "int8, int4 and float8 can be compiled; bitsandbytes saves memory but decodes slower.",
                    },
                ),
                "attention": (list(ATTENTIONS), {"default": "auto", "tooltip": "auto is sdpa."}),
                "revision": (
                    "STRING",
                    {"default": "", "tooltip": "A branch, tag or commit to fetch; kept in a folder of its own."},
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
            },
        }

    @classmethod
    def VALIDATE_INPUTS(cls, model: str = "") -> bool:
        # A name from another machine is looked up, or fetched, when the node runs.
        return True

    @classmethod
    def IS_CHANGED(cls, model: str | None = None, revision: str | None = None, **inputs: Any) -> str:
        return state_of(model or "", (revision or "").strip())

    def load(
        self,
        model: str,
        dtype: str = "auto",
        quantization: str = "none",
        attention: str = "auto",
        revision: str = "",
        stream_layers: int = -1,
    ) -> tuple[LoadedModel, str]:
        options = LoadOptions(dtype, quantization, attention, "auto", revision.strip(), stream_layers)
        loaded = MODELS.get(model, options, False)
        report = "\n".join([f"{loaded.folder.name}: {loaded.model_type}, {loaded.dtype}", *loaded.notes])
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
                "system": ("STRING", {"default": "", "multiline": True, "tooltip": "How the model should behave."}),
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
                "temperature": (
                    "FLOAT",
                    {"default": 0.0, "min": 0.0, "max": 2.0, "step": 0.05,
                     "tooltip": "0: always the likeliest token. More: more varied."},
                ),
                "top_p": (
                    "FLOAT",
                    {"default": 0.9, "min": 0.0, "max": 1.0, "step": 0.05,
                     "tooltip": "Only the likeliest tokens that together have this probability."},
                ),
                "top_k": ("INT", {"default": 50, "min": 0, "max": 1000, "tooltip": "Only so many tokens; 0 is all."}),
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
                "fps": (
                    "FLOAT",
                    {"default": 24.0, "min": 0.01, "max": 1000.0, "step": 0.01, "tooltip": "Frames a second of video."},
                ),
                "max_frames": (
                    "INT",
                    {"default": 32, "min": 1, "max": 768, "tooltip": "At most so many frames, evenly spread."},
                ),
                "image_cache": CACHE,
                "reuse_prefix": (
                    "BOOLEAN",
                    {"default": True, "tooltip": "Another question about the same pictures reads only its own words."},
                ),
                "decode": DECODE,
                "keep_model_loaded": KEEP,
            },
            "hidden": {"unique_id": "UNIQUE_ID"},
        }  # fmt: skip

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
            prompt[0],
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
            preset(chosen["token_budget"]),
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


class HotpathCaptionFolder:
    DISPLAY_NAME = "Caption Folder"
    CATEGORY = CATEGORY
    DESCRIPTION = "Writes a caption beside every picture of a folder, in batches; stops and goes on where it was."
    SEARCH_ALIASES = ["batch caption", "dataset", "lora captions", "tagger"]
    RETURN_TYPES = ("STRING", "STRING", "STRING")
    RETURN_NAMES = ("captions", "files", "report")
    OUTPUT_IS_LIST = (True, True, False)
    OUTPUT_TOOLTIPS = (
        "The captions of all pictures that have one, from now or before.",
        "Their pictures.",
        "Counts, failures, and where the time went.",
    )
    FUNCTION = "caption"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": MODEL,
                "folder": ("STRING", {"default": "", "tooltip": "A folder of pictures; a name lies in the input folder."}),
                "prompt": (
                    "STRING",
                    {"default": presets.DESCRIPTIONS["🖼️ Detailed Description"], "multiline": True,
                     "tooltip": "What the captions should tell."},
                ),
            },
            "optional": {
                "system": ("STRING", {"default": "", "multiline": True, "tooltip": "How the model should behave."}),
                "output": (
                    list(FORMATS),
                    {"default": "txt", "tooltip": "txt: a file beside each picture. jsonl: one captions.jsonl."},
                ),
                "batch_size": ("INT", {"default": 8, "min": 1, "max": 256, "tooltip": "Pictures at a time."}),
                "overwrite": ("BOOLEAN", {"default": False, "tooltip": "Off: pictures with a caption are skipped."}),
                "recursive": ("BOOLEAN", {"default": False, "tooltip": "Also the folders in the folder."}),
                "before": (
                    "STRING",
                    {"default": "", "tooltip": "Written before every caption as it stands: a trigger word, a comma and a "
                     "space."},
                ),
                "after": ("STRING", {"default": "", "tooltip": "Written after every caption as it stands."}),
                "token_budget": BUDGET,
                "max_new_tokens": ("INT", {"default": 256, "min": 1, "max": 32768, "tooltip": "The longest caption."}),
                "temperature": (
                    "FLOAT",
                    {"default": 0.0, "min": 0.0, "max": 2.0, "step": 0.05,
                     "tooltip": "0: always the likeliest token. More: more varied."},
                ),
                "seed": SEED,
                "image_cache": (CACHE[0], {**CACHE[1], "default": "off"}),
                "decode": DECODE,
                "keep_model_loaded": KEEP,
                "pattern": ("STRING", {"default": "", "tooltip": "Only file names that fit, such as portrait_*."}),
                "captions_to": (
                    "STRING",
                    {"default": "", "tooltip": "A folder for the captions; a name lies in the output folder. Empty: beside "
                     "the pictures."},
                ),
                "thinking": (
                    list(THINKING),
                    {"default": "off", "tooltip": "off keeps a thinking model from thinking; thoughts count as tokens, too."},
                ),
            },
            "hidden": {"unique_id": "UNIQUE_ID"},
        }  # fmt: skip

    @classmethod
    def IS_CHANGED(cls, **inputs: Any) -> float:
        # The folder may have new pictures.
        return float("nan")

    def caption(
        self,
        model: LoadedModel,
        folder: str,
        prompt: str,
        system: str = "",
        output: str = "txt",
        batch_size: int = 8,
        overwrite: bool = False,
        recursive: bool = False,
        before: str = "",
        after: str = "",
        token_budget: str = "balanced",
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        seed: int = 0,
        image_cache: str = "off",
        decode: str = "auto",
        keep_model_loaded: bool = True,
        pattern: str = "",
        captions_to: str = "",
        thinking: str = "off",
        unique_id: str | None = None,
    ) -> dict[str, Any]:
        here = host.current()
        job = CaptionJob(
            allowed(place(here.input_folder(), folder)),
            prompt,
            system,
            output,
            recursive,
            overwrite,
            batch_size,
            before,
            after,
            allowed(place(here.output_folder(), captions_to)) if captions_to.strip() else None,
            pattern,
            THINKING[thinking],
        )
        options = AnswerOptions(
            max_new_tokens,
            preset(token_budget),
            cache_images=image_cache != "off",
            cache_on_disk=image_cache == "memory and disk",
            decode=decode,
            keep_loaded=keep_model_loaded,
            node_id=unique_id,
        )
        summary = FolderCaptioner(model, job, Sampling(temperature > 0, temperature, seed=seed), options).run()
        captions = summary.all_captions()
        return {
            "ui": {"text": [summary.report()]},
            # ComfyUI cannot run what is connected to an empty list.
            "result": (list(captions.values()) or [""], list(map(str, captions)) or [""], summary.report()),
        }  # fmt: skip


NODES = {
    "HotpathVLMLoader": HotpathVLMLoader,
    "HotpathVLM": HotpathVLM,
    "HotpathCaptionFolder": HotpathCaptionFolder,
}
