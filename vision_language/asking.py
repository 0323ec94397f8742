"""What `HotpathVLM` does: one question or one per picture, answers as text, JSON or boxes with the drawn pictures."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..host.interruption import is_stop
from . import answers, drawing, presets
from .answering import Answer, AnswerOptions, BatchSize, answer
from .loaded_model import LoadedModel
from .pictures import Clip, Picture, three_channels
from .prompts import Question
from .sampling import Sampling

log = logging.getLogger("hotpath.vision_language")

FORMATS = ("text", "json", "boxes")
HOPELESS = 8  # pictures that fail at the start, and none that does not: the others would too


@dataclass(frozen=True)
class Request:
    """one_each: every picture is asked about on its own (with the clips), `batch_size` at a time; else all in one question."""

    prompt: str
    system: str = ""
    pictures: tuple[Picture, ...] = ()
    clips: tuple[Clip, ...] = ()
    thinking: bool | None = None
    format: str = "text"
    one_each: bool = False
    batch_size: int = 8

    def questions(self) -> list[Question]:
        asked = {"text": "", "json": presets.JSON_REQUEST, "boxes": presets.BOXES_REQUEST}
        if self.format not in asked:
            raise ValueError(f"{self.format!r} is no answer format: choose {', '.join(FORMATS)}.")
        prompt = "\n\n".join(part for part in (self.prompt.strip(), asked[self.format]) if part)
        if self.one_each and self.pictures:
            return [Question(prompt, self.system, (picture,), self.clips, self.thinking) for picture in self.pictures]
        return [Question(prompt, self.system, self.pictures, self.clips, self.thinking)]


@dataclass
class Reply:
    """values: the parsed JSON of each answer, None where there is none. drawn: pictures with their boxes, uint8, by index."""

    answers: list[Answer]
    values: list[Any] = field(default_factory=list)
    drawn: dict[int, NDArray[np.uint8]] = field(default_factory=dict)
    report: str = ""

    def json(self) -> str:
        found = self.values[0] if len(self.values) == 1 else self.values
        return json.dumps(found, ensure_ascii=False, indent=1)

    def images(self, given: Sequence[torch.Tensor | None] = ()) -> list[torch.Tensor]:
        """A ComfyUI IMAGE, [1, H, W, 3] float 0..1, for each of `given`, the batches that were asked about: the picture as it
        came, or as it was drawn on. One black one when there are none."""
        batches = [batch for batch in given if batch is not None]
        shown = [batch[index : index + 1] for batch in batches for index in range(len(batch))]
        for index, pixels in self.drawn.items():
            shown[index] = torch.from_numpy(pixels.copy()).float().div(255).unsqueeze(0)
        return [three_channels(picture) for picture in shown] or [torch.zeros(1, 64, 64, 3)]


def ask(model: LoadedModel, request: Request, sampling: Sampling, options: AnswerOptions) -> Reply:
    """Answer `request`; what the model saw of a picture decides how its boxes are read.

    Of several questions those that fail get an empty answer, and the report says why. Raises when all of them do.
    """
    questions = request.questions()
    failed: dict[int, Exception] = {}
    if len(questions) == 1:
        made = _light(answer(model, questions, sampling, options))
    else:
        if options.answers > 1:
            raise ValueError("Several answers and one answer for each picture do not go together: choose one of them.")
        made, failed = _one_each(model, questions, sampling, replace(options, stream=False), request.batch_size)
    reply = Reply(made, report="\n".join(dict.fromkeys(part.report for part in made if part.report)))
    for index, error in failed.items():
        reply.report += f"\npicture {index + 1} was not answered: {type(error).__name__}: {error}"
    if request.format == "text":
        return reply
    reply.values = [answers.find_json(part.text) for part in made]
    missing = sum(value is None for value in reply.values)
    if missing:
        reply.report += f"\n{missing} of {len(made)} answers hold no JSON"
    if request.format == "boxes":
        reply.drawn = drawn(model, questions, reply, options.answers)
    return reply


def _light(made: Sequence[Answer]) -> list[Answer]:
    """Answers without what the model saw, which is on its device and as large as the pictures are many."""
    return [
        replace(part, items=[replace(item, features=None, patches=None, pixels=None) for item in part.items])
        for part in made
    ]


def _one_each(
    model: LoadedModel, questions: Sequence[Question], sampling: Sampling, options: AnswerOptions, size: int
) -> tuple[list[Answer], dict[int, Exception]]:
    """An answer to each question, `size` at a time; of a batch that fails, to those of its questions that do not."""
    fitting = BatchSize()
    made: list[Answer] = []
    failed: dict[int, Exception] = {}
    for start in range(0, len(questions), max(1, size)):
        batch = questions[start : start + max(1, size)]
        found = _tried(model, batch, sampling, options, fitting)
        if isinstance(found, Exception) and len(batch) > 1:
            log.warning("a batch of %d failed (%s); its pictures are asked about one by one", len(batch), found)
            tries = [_tried(model, [question], sampling, options, fitting) for question in batch]
        else:
            tries = [found] if isinstance(found, Exception) else [[part] for part in found]
        for index, one in enumerate(tries, start):
            if isinstance(one, Exception):
                failed[index] = one
                made.append(Answer("", "", "", 0, False))
            else:
                made += one
        if len(failed) == len(made) and len(made) >= min(HOPELESS, len(questions)):
            raise failed[0]
    if failed:
        log.warning("%d of %d pictures were not answered; the report says why", len(failed), len(questions))
    return made, failed


def _tried(
    model: LoadedModel,
    questions: Sequence[Question],
    sampling: Sampling,
    options: AnswerOptions,
    fitting: BatchSize,
) -> list[Answer] | Exception:
    try:
        return _light(answer(model, questions, sampling, options, None, fitting))
    except Exception as error:
        if is_stop(error):
            raise
        failure = error.with_traceback(None)  # which holds what the batch had on the device
    model.drop_device_state()
    return failure


def drawn(
    model: LoadedModel, questions: Sequence[Question], reply: Reply, per_question: int
) -> dict[int, NDArray[np.uint8]]:
    """The first picture of every question, by its place among all, with the boxes of its first answer."""
    pictures: dict[int, NDArray[np.uint8]] = {}
    at = 0
    for index, question in enumerate(questions):
        if not question.pictures:
            continue
        found = reply.answers[index * per_question]
        pixels = question.pictures[0].pixels
        seen = None
        if model.model_type == "qwen2_5_vl" and found.items:
            patch = int(model.config.vision_config.patch_size)
            seen = (found.items[0].grid[1] * patch, found.items[0].grid[2] * patch)
        boxes = answers.find_boxes(reply.values[index * per_question], pixels.shape[0], pixels.shape[1], seen)
        if boxes:
            pictures[at] = drawing.draw_boxes(pixels, boxes)
            if left_out := drawing.undrawn(boxes):
                names = "; ".join(f"{number} {label}" for number, label in left_out.items())
                reply.report += (
                    f"\nno font here has the letters of {names}: install one that has them, such as Noto Sans CJK"
                )
        at += len(question.pictures)
    return pictures
