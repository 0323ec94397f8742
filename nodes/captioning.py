"""The node that captions the pictures or videos of a folder, with the model of Load Vision-Language Model."""

from __future__ import annotations

from typing import Any

from .. import host
from ..host.whole_paths import allowed
from ..vision_language import budgets, own_presets, presets
from ..vision_language.answering import AnswerOptions
from ..vision_language.caption_job import FORMATS, MEDIA, CaptionJob, place
from ..vision_language.captioning import FolderCaptioner
from ..vision_language.loaded_model import LoadedModel
from ..vision_language.sampling import Sampling
from .sockets import HIDDEN
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
    preset_choice,
)


class HotpathCaptionFolder:
    DISPLAY_NAME = "Caption Folder"
    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Writes a caption beside every picture or video of a folder, in batches. If it is stopped, it continues "
        "where it was."
    )
    SEARCH_ALIASES = ["batch caption", "dataset", "lora captions", "tagger", "video captions"]
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
                "folder": ("STRING", {"default": "", "tooltip": "A folder of pictures: a name in the input folder, "
                 "or a whole path."}),
                "prompt": (
                    "STRING",
                    {"default": presets.DESCRIPTIONS["🖼️ Detailed Description"], "multiline": True,
                     "tooltip": "What the captions should tell."},
                ),
            },
            "optional": {
                "system": SYSTEM,
                "output": (
                    list(FORMATS),
                    {"default": "txt", "tooltip": "txt: a file beside each picture. jsonl: one captions.jsonl."},
                ),
                "batch_size": ("INT", {"default": 8, "min": 1, "max": 256, "tooltip": "Pictures at a time."}),
                "overwrite": ("BOOLEAN", {"default": False, "tooltip": "Off: pictures with a caption are skipped."}),
                "recursive": ("BOOLEAN", {"default": False, "tooltip": "Include subfolders."}),
                "before": (
                    "STRING",
                    {"default": "", "tooltip": "Written before every caption exactly as given, such as a trigger "
                     "word with a comma and a space."},
                ),
                "after": ("STRING", {"default": "", "tooltip": "Written after every caption exactly as given."}),
                "token_budget": BUDGET,
                "max_new_tokens": ("INT", {"default": 256, "min": 1, "max": 32768, "tooltip": "The longest caption."}),
                "temperature": TEMPERATURE,
                "seed": SEED,
                "image_cache": (CACHE[0], {**CACHE[1], "default": "off"}),
                "decode": DECODE,
                "keep_model_loaded": KEEP,
                "pattern": ("STRING", {"default": "", "tooltip": "Only matching file names, such as portrait_*."}),
                "captions_to": (
                    "STRING",
                    {"default": "", "tooltip": "A folder for the captions: a name in the output folder, or a whole "
                     "path. Empty: beside the pictures."},
                ),
                "thinking": (
                    list(THINKING),
                    {"default": "off", "tooltip": "off keeps a thinking model from thinking; thoughts count as "
                     "tokens too."},
                ),
                "media": (
                    list(MEDIA),
                    {"default": "pictures", "tooltip": "What gets captions. A video gets one, as trainers of video models "
                     "read it."},
                ),
                "max_frames": (
                    "INT",
                    {"default": 16, "min": 1, "max": 768, "tooltip": "At most this many frames of a video: two per "
                     "second, evenly spread."},
                ),
                "preset": preset_choice(),
            },
            "hidden": HIDDEN,
        }  # fmt: skip

    @classmethod
    def VALIDATE_INPUTS(cls, preset: Any = own_presets.NONE) -> bool:
        # One of another machine is looked up when the node runs.
        return True

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
        media: str = "pictures",
        max_frames: int = 16,
        preset: str = own_presets.NONE,
        unique_id: str | None = None,
    ) -> dict[str, Any]:
        here = host.current()
        job = CaptionJob(
            allowed(place(here.input_folder(), folder)),
            own_presets.in_place_of(prompt, preset),
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
            media,
            max_frames,
        )
        options = AnswerOptions(
            max_new_tokens,
            budgets.preset(token_budget),
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


NODES: dict[str, type[Any]] = {"HotpathCaptionFolder": HotpathCaptionFolder}
