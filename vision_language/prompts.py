"""A question turned into token ids: system message, pictures, then text, through the model folder's own chat template.

The places of visual tokens are written from the grids alone, so a picture whose features are cached
needs no pixels. Text that a user typed cannot open a place for a picture or end a turn.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..host.letters import readable
from .embeddings import VisualItem
from .loaded_model import LoadedModel
from .pictures import Clip, Picture

log = logging.getLogger("hotpath.vision_language")

CONTROL = re.compile(r"<\|(im_start|im_end|endoftext|vision_start|vision_end|vision_pad|image_pad|video_pad)\|>")
PADS = re.compile(r"(?:<\|image_pad\|>)+|(?:<\|video_pad\|>)+")
VISION_PLACE = re.compile(r"<\|vision_start\|><\|(image|video)_pad\|><\|vision_end\|>")


class PromptTooLong(ValueError):
    """The question does not fit into the model's context."""


@dataclass(frozen=True)
class Question:
    """What is asked: one user turn with any pictures and clips, after an optional system message.

    thinking: None leaves it to the model's template; False keeps a thinking model from thinking.
    """

    prompt: str
    system: str = ""
    pictures: tuple[Picture, ...] = ()
    clips: tuple[Clip, ...] = ()
    thinking: bool | None = None


@dataclass
class Prompt:
    """Token ids of one question with the pictures and clips that stand in it.

    ids: [1, T]; kinds: [1, T], 0 text, 1 image, 2 video. prefix: how many leading tokens another question about the
    same pictures shares (0 without pictures).
    """

    ids: Tensor
    kinds: Tensor
    items: list[VisualItem] = field(default_factory=list)
    prefix: int = 0
    opens_thinking: bool = False

    @property
    def length(self) -> int:
        return int(self.ids.shape[1])


def harmless(text: str) -> str:
    """User text with the template's control words broken, so that they are read as the letters they are, and without half
    letters, which no tokenizer takes."""
    return CONTROL.sub(lambda found: f"<| {found.group(1)} |>", readable(text))


def render(model: LoadedModel, question: Question) -> str:
    """The conversation as the template writes it, with one place for each picture and clip."""
    text = harmless(question.prompt)
    messages: list[dict[str, Any]] = []
    seeing = model.processor is not None
    if question.system.strip():
        system = harmless(question.system)
        messages.append({"role": "system", "content": [{"type": "text", "text": system}] if seeing else system})
    if seeing:
        parts: list[dict[str, Any]] = [{"type": "image"} for _ in question.pictures]
        parts += [{"type": "video"} for _ in question.clips]
        messages.append({"role": "user", "content": [*parts, {"type": "text", "text": text}]})
    else:
        messages.append({"role": "user", "content": text})
    writer = model.processor if seeing and getattr(model.processor, "chat_template", None) else model.tokenizer
    # Of a switch that the template does not read, the library warns at every picture.
    switched = question.thinking is not None and "enable_thinking" in str(getattr(writer, "chat_template", None))
    extra = {"enable_thinking": question.thinking} if switched else {}
    written = str(writer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **extra))
    if question.thinking is False and written.rstrip().endswith("<think>"):
        # A model that always thinks: its thoughts are closed before they begin.
        written = written.rstrip() + "\n\n</think>\n\n"
    return written


def place(model: LoadedModel, item: VisualItem) -> str:
    """The text that stands for a picture or clip: a pad for each of its tokens; Qwen3-VL dates every pair of frames."""
    time, height, width = item.grid
    merge = int(model.config.vision_config.spatial_merge_size) ** 2
    opened, closed = "<|vision_start|>", "<|vision_end|>"
    if item.kind == "image":
        return opened + "<|image_pad|>" * (time * height * width // merge) + closed
    if "Qwen3VL" not in type(model.processor).__name__:
        return opened + "<|video_pad|>" * (time * height * width // merge) + closed
    return "".join(
        f"<{second:.1f} seconds>{opened}" + "<|video_pad|>" * (height * width // merge) + closed
        for second in item.seconds
    )


def tokenized(model: LoadedModel, written: str) -> Tensor:
    """Ids [1, T] of `written`. Of a row of pads only the first is read: the others have its id."""
    counts = [len(found.group()) // len("<|image_pad|>") for found in PADS.finditer(written)]
    short = PADS.sub(lambda found: found.group()[: len("<|image_pad|>")], written)
    ids: Tensor = model.tokenizer(short, return_tensors="pt", add_special_tokens=False)["input_ids"]
    if not counts:
        return ids
    pads = (ids[0] == model.config.image_token_id) | (ids[0] == model.config.video_token_id)
    repeats = torch.ones_like(ids[0])
    repeats[pads] = torch.tensor(counts)
    return ids.repeat_interleave(repeats, dim=1)


def build(model: LoadedModel, question: Question, items: Sequence[VisualItem]) -> Prompt:
    """Token ids for `question` with `items` in the order pictures, clips.

    Raises PromptTooLong when they do not fit into the context.
    """
    written = render(model, question)
    left = {"image": [i for i in items if i.kind == "image"], "video": [i for i in items if i.kind == "video"]}
    expected = {kind: len(found) for kind, found in left.items()}
    shown = {kind: sum(m.group(1) == kind for m in VISION_PLACE.finditer(written)) for kind in left}
    if shown != expected:
        raise ValueError(
            f"The chat template of {model.folder.name} shows {shown['image']} of {expected['image']} pictures and "
            f"{shown['video']} of {expected['video']} clips: the folder needs the template of its -VL model."
        )
    written = VISION_PLACE.sub(lambda found: place(model, left[found.group(1)].pop(0)), written)
    ids = tokenized(model, written)
    kinds = torch.zeros_like(ids)
    prefix = 0
    if items:
        kinds[ids == model.config.image_token_id] = 1
        kinds[ids == model.config.video_token_id] = 2
        # The closing mark after the last visual token belongs to the picture.
        prefix = min(int(kinds[0].nonzero()[-1]) + 2, ids.shape[1] - 1)
    if ids.shape[1] >= model.context_length:
        visual = int((kinds > 0).sum())
        seen = f" ({visual:,} of them pictures)" if visual else ""
        smaller = ", or choose a smaller token budget" if visual else ""
        raise PromptTooLong(
            f"The question has {ids.shape[1]:,} tokens{seen}, more than the context of {model.folder.name}, "
            f"{model.context_length:,}: shorten the prompt{smaller}."
        )
    return Prompt(ids, kinds, list(items), prefix, written.rstrip().endswith("<think>"))
