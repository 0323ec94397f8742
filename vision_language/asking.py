"""What `HotpathVLM` does: one question or one per picture, answers as text, JSON or boxes with the drawn pictures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from . import answers, presets
from .answering import Answer, AnswerOptions, answer
from .loaded_model import LoadedModel
from .pictures import Clip, Picture
from .prompts import Question
from .sampling import Sampling

FORMATS = ("text", "json", "boxes")


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
    """values: the parsed JSON of each answer, None where there is none. drawn: pictures with their boxes, uint8."""

    answers: list[Answer]
    values: list[Any] = field(default_factory=list)
    drawn: list[NDArray[np.uint8]] = field(default_factory=list)
    report: str = ""

    def json(self) -> str:
        found = self.values[0] if len(self.values) == 1 else self.values
        return json.dumps(found, ensure_ascii=False, indent=1)

    def images(self) -> list[torch.Tensor]:
        """The drawn pictures as ComfyUI IMAGEs, [1, H, W, 3] float 0..1; one black one when there are none."""
        if not self.drawn:
            return [torch.zeros(1, 64, 64, 3)]
        return [torch.from_numpy(pixels.copy()).float().div(255).unsqueeze(0) for pixels in self.drawn]


def ask(model: LoadedModel, request: Request, sampling: Sampling, options: AnswerOptions) -> Reply:
    """Answer `request`; what the model saw of a picture decides how its boxes are read."""
    questions = request.questions()
    if len(questions) == 1:
        made = answer(model, questions, sampling, options)
    else:
        if options.answers > 1:
            raise ValueError("Several answers and one answer for each picture do not go together: choose one of them.")
        size = max(1, request.batch_size)
        made = []
        for start in range(0, len(questions), size):
            batch = answer(model, questions[start : start + size], sampling, replace(options, stream=False))
            made += batch
    reply = Reply(made, report="\n".join(dict.fromkeys(part.report for part in made)))
    if request.format == "text":
        reply.drawn = [picture.pixels for picture in request.pictures]
        return reply
    reply.values = [answers.find_json(part.text) for part in made]
    missing = sum(value is None for value in reply.values)
    if missing:
        reply.report += f"\n{missing} of {len(made)} answers hold no JSON"
    if request.format == "boxes":
        reply.drawn = drawn(model, questions, reply, options.answers)
    else:
        reply.drawn = [picture.pixels for picture in request.pictures]
    return reply


def drawn(
    model: LoadedModel, questions: Sequence[Question], reply: Reply, per_question: int
) -> list[NDArray[np.uint8]]:
    """The first picture of every question with the boxes of its first answer."""
    pictures: list[NDArray[np.uint8]] = []
    for index, question in enumerate(questions):
        if not question.pictures:
            continue
        found = reply.answers[index * per_question]
        pixels = question.pictures[0].pixels
        seen = None
        if model.model_type == "qwen2_5_vl":
            patch = int(model.config.vision_config.patch_size)
            seen = (found.items[0].grid[1] * patch, found.items[0].grid[2] * patch)
        boxes = answers.find_boxes(reply.values[index * per_question], pixels.shape[0], pixels.shape[1], seen)
        pictures.append(answers.draw_boxes(pixels, boxes))
    return pictures
