"""What the small captioner says about pictures, for the help pages of the vision-language nodes."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from .node_runs import HERE, node, photo
from .picture_rows import card, labelled, shown, stacked

FOLDER = "hotpath-captioner"


def captioner(name: str = FOLDER) -> tuple[Any, str]:
    return node("HotpathVLMLoader", model=name)


def vlm_loader() -> Image.Image:
    return card("Load Vision-Language Model", captioner()[1])


def captions_of(pictures: list[torch.Tensor], name: str = FOLDER) -> tuple[list[str], str]:
    """The small captioner's words for each, and the node's report. name: of its folder or its GGUF file."""
    model, _ = captioner(name)
    result = node(
        "HotpathVLM",
        model=[model],
        prompt=["Describe this image."],
        images=pictures,
        system=["You are a helpful assistant."],
        one_answer_each=[True],
        max_new_tokens=[16],
        token_budget=["fast"],
    )
    return list(result[1]), str(result[5])


def vlm_answer() -> Image.Image:
    pictures = [photo(f"captioner_shapes_{n}.png") for n in range(1, 5)]
    answers, report = captions_of(pictures)
    row = labelled([(answer[:24], shown(p, 150)) for p, answer in zip(pictures, answers, strict=True)])
    return stacked([row, card("Ask Vision-Language Model", "\n".join(report.splitlines()[:2]), row.width)])


def vlm_boxes() -> Image.Image:
    """How an answer with boxes is read and drawn; the small captioner names no places, so the answer is written here."""
    from ..vision_language import answers
    from ..vision_language.drawing import draw_boxes

    answer = (
        '[{"bbox_2d": [345, 105, 545, 330], "label": "face"}, {"bbox_2d": [545, 610, 930, 1000], "label": "helmet"}]'
    )
    pixels = (photo("astronaut.png")[0] * 255).byte().numpy()
    boxes = answers.find_boxes(answers.find_json(answer), *pixels.shape[:2], None)
    drawn = torch.from_numpy(draw_boxes(pixels, boxes).copy()).float()[None] / 255
    picture = labelled([("boxes drawn on the picture", shown(drawn, 300))])
    return stacked([picture, card("an answer, written by hand", answer, 420)])


def caption_folder() -> Image.Image:
    model, _ = captioner()
    with tempfile.TemporaryDirectory() as written:
        captions, files, report = node(
            "HotpathCaptionFolder",
            model=model,
            folder=str(HERE / "inputs"),
            prompt="Describe this image.",
            system="You are a helpful assistant.",
            max_new_tokens=16,
            token_budget="fast",
            pattern="captioner_*",
            captions_to=written,
        )
    lines = [f"{Path(name).with_suffix('.txt').name}: {text}" for name, text in zip(files, captions, strict=True)]
    return card("Caption Folder", "\n".join([*lines, "", *report.splitlines()[1:3]]))


def prompt_enhancer() -> Image.Image:
    """What the node asks a model: the demo's captioner cannot rewrite prompts."""
    from ..vision_language import presets

    style, instruction = next(iter(presets.STYLES.items()))
    name = style.encode("ascii", "ignore").decode().strip()
    return card(f"QwenVL Prompt Enhancer, style {name}", f"system: {instruction}\n\nprompt: a lighthouse at dusk")
