"""The check of Qwen-VL folders for `hotpath selftest`: the fast decode path and the picture cache against the plain path."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from ..attention.capabilities import on_device
from ..host import Host
from ..vision_language import folders
from ..vision_language.answering import AnswerOptions, answer
from ..vision_language.budgets import PRESETS
from ..vision_language.decode_path import choose_path
from ..vision_language.embeddings import EmbeddingCache, look_up
from ..vision_language.generation import PlainRunner, runner
from ..vision_language.loaded_model import LoadedModel, LoadOptions
from ..vision_language.loading import MODELS
from ..vision_language.pictures import Picture
from ..vision_language.prefill import prefill
from ..vision_language.prompts import Question, build
from ..vision_language.sampling import Sampling
from ..vision_language.timing import Timing
from ..vision_language.tower import encode
from .selftest import Absent, Finding, relative_difference, timed

ROUNDING = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 6e-2}
ROOM = 128  # tokens after the question: for the answers below and the repeated runs that time a step


def check_vision_language(host: Host) -> Iterator[Finding]:
    """Every whole folder of a model with a vision tower."""
    found = [folder for folder in folders.scan() if folder.sees and not folders.missing_files(folder)]
    if not found:
        raise Absent(f"there is no vision-language model under {folders.roots()[0]}")
    picture = Picture(np.random.default_rng(0).integers(0, 256, (160, 224, 3), dtype=np.uint8))
    question = Question("Describe this image.", "", (picture,))
    for folder in found:
        model = MODELS.get(folder.name, LoadOptions())
        try:
            yield from _decode_step(model, question)
            yield _known_picture(model, question)
        finally:
            model.release()


@torch.no_grad()
def _decode_step(model: LoadedModel, question: Question) -> Iterator[Finding]:
    timing, cache = Timing(model.device), EmbeddingCache(enabled=False)
    items = look_up(model, question.pictures, (), PRESETS["fast"], cache, timing)
    prompt = build(model, question, items)
    path = choose_path(model, "auto")
    if path.name == "plain":
        path = choose_path(model, "static")
    with model.resident(prompt.length, ROOM), on_device(model.device):
        encode(model, items, cache, timing)
        filled = prefill(model, [prompt], use_prefix=False)
        tokens = filled.logits.argmax(-1)
        fast, path = runner(model, path, filled, ROOM)
        first = fast.run(tokens).float().cpu()
        plain = PlainRunner(model, filled)
        difference = relative_difference(first, plain.run(tokens).float().cpu())
        _, seconds = timed(lambda: fast.run(tokens), model.device)
        _, reference = timed(lambda: plain.run(tokens), model.device)
    label = f"{model.folder.name} on {model.device} as {str(model.dtype).removeprefix('torch.')}"
    yield Finding(
        f"{label}: one token, {path.note}",
        difference,
        ROUNDING[model.dtype],
        seconds=seconds,
        reference_seconds=reference,
    )


def _known_picture(model: LoadedModel, question: Question) -> Finding:
    options = AnswerOptions(16, PRESETS["fast"], decode="plain", reuse_prefix=False)
    made = [answer(model, [question], Sampling(sample=False), options)[0] for _ in range(2)]
    return Finding(
        f"{model.folder.name}: a known picture", float(made[0].raw != made[1].raw), 0.0, "different answers of 1",
        sum(made[1].timing.values()), sum(made[0].timing.values()),
    )  # fmt: skip
