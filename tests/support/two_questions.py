"""Two questions of different length, as prompts that are ready to be prefilled."""

from __future__ import annotations

from typing import Any

from hotpath.vision_language.budgets import PRESETS
from hotpath.vision_language.embeddings import EmbeddingCache, look_up
from hotpath.vision_language.prompts import Prompt, Question, build
from hotpath.vision_language.timing import Timing
from hotpath.vision_language.tower import encode


def prompts(model: Any, pictures: Any) -> list[Prompt]:
    """With pictures where the model sees."""
    timing, cache, made = Timing(model.device), EmbeddingCache(), []
    shown = ([pictures.a], [pictures.b, pictures.c]) if model.processor is not None else ([], [])
    for text, seen in zip(("Describe.", "Tell me more about it."), shown, strict=True):
        items = look_up(model, seen, [], PRESETS["fast"], cache, timing)
        encode(model, items, cache, timing)
        made.append(build(model, Question(text, "", tuple(seen)), items))
    return made
