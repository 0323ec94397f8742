"""What several families of vision-language nodes have alike; none imports another one, since each must register alone."""

from __future__ import annotations

from typing import Any

import torch

from .. import host
from ..vision_language import folders, own_presets, presets
from ..vision_language.answering import AnswerOptions, answer
from ..vision_language.budgets import PRESETS
from ..vision_language.decode_path import DECODE_PATHS
from ..vision_language.loaded_model import LoadOptions
from ..vision_language.loading import MODELS
from ..vision_language.prompts import Question
from ..vision_language.sampling import Sampling

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


def devices() -> list[str]:
    """Those of this machine, and what other machines have one of."""
    found = ["auto", "cpu", "mps"]
    for kind, module in (("cuda", torch.cuda), ("xpu", torch.xpu)):
        found += [f"{kind}:{index}" for index in range(module.device_count())]
    return found


def preset_choice() -> tuple[list[str], dict[str, Any]]:
    """The preset prompts, those of the nodes and one's own."""
    return (
        [own_presets.NONE, *own_presets.menu(presets.DESCRIPTIONS)],
        {
            "default": own_presets.NONE,
            "tooltip": "A preset in place of prompt. Text files in models/LLM/prompts are presets of your own.",
        },
    )


def model_choice(known: tuple[str, ...], sees: bool | None, default: str) -> tuple[list[str], dict[str, Any]]:
    """The folders that are there and the models that are fetched. sees: with a vision tower, without one, or either."""
    return (
        folders.choices(known, sees),
        {
            "default": default,
            "tooltip": "A folder or a GGUF file under models/LLM, or a model that is fetched when it is missing.",
        },
    )


def one_answer(
    model: str,
    question: Question,
    load: LoadOptions,
    sampling: Sampling,
    options: AnswerOptions,
    strip_thoughts: bool = False,
) -> tuple[str]:
    """What the nodes of shared workflows give, with the report under the node."""
    needs_sight = bool(question.pictures or question.clips)
    with MODELS.borrowed(model, load, needs_sight) as loaded:
        made = answer(loaded, [question], sampling, options)[0]
    text = made.text if strip_thoughts else made.raw
    host.current().show_text(f"{text}\n\n{made.report}", options.node_id)
    return (text,)
