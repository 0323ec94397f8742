"""Boxes drawn on a picture: outlines, and labels in a font that has their letters, inside the picture and apart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .answers import Box

COLOURS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#9a6324", "#000075")
LONGEST = 100  # letters of a label that are drawn
# Pillow's own has ASCII alone. Pillow finds these in the folders of Linux, Windows and macOS; those without Chinese first.
FONTS = (
    "",
    "DejaVuSans.ttf",
    "LiberationSans-Regular.ttf",
    "arial.ttf",
    "NotoSansCJK-Regular.ttc",
    "NotoSansCJKsc-Regular.otf",
    "NotoSansSC-Regular.otf",
    "SourceHanSansSC-Regular.otf",
    "wqy-microhei.ttc",
    "wqy-zenhei.ttc",
    "DroidSansFallbackFull.ttf",
    "msyh.ttc",
    "simhei.ttf",
    "YuGothM.ttc",
    "msgothic.ttc",
    "malgun.ttf",
    "Hiragino Sans GB.ttc",
    "STHeiti Light.ttc",
    "AppleSDGothicNeo.ttc",
    "Arial Unicode.ttf",
)
NO_LETTER = "\U0010ffff"  # every font draws it as it draws what it lacks
Rectangle = tuple[float, float, float, float]


@lru_cache(maxsize=64)
def font_of(name: str, size: int) -> Any:
    """The font, or None where it is not installed."""
    from PIL import ImageFont

    try:
        # One letter after the other: the other layout needs a library that few have.
        basic = ImageFont.Layout.BASIC
        return ImageFont.truetype(name, size, layout_engine=basic) if name else ImageFont.load_default(size)
    except OSError:
        return None


@lru_cache(maxsize=4096)
def has(name: str, letter: str) -> bool:
    """Whether an installed font has `letter`."""
    font = font_of(name, 20)
    if font is None:
        return False
    if letter == " ":
        return True
    drawn, nothing = font.getmask(letter), font.getmask(NO_LETTER)
    return bool(drawn.size != nothing.size or bytes(drawn) != bytes(nothing))


def written(box: Box, number: int) -> tuple[str, str]:
    """(font, what it draws) for the label of a box: what no font here has is left out, and `number` stands in its place."""
    label = " ".join(box.label[: 2 * LONGEST].split())
    label = "".join(letter for letter in label if letter.isprintable())[:LONGEST]
    name, most = "", -1
    for candidate in FONTS:
        there = sum(has(candidate, letter) for letter in label)
        if there > most:
            name, most = candidate, there
        if most == len(label):
            return name, label
    left = "".join(letter for letter in label if has(name, letter))
    return name, " ".join(f"{number} {left}".split())


def undrawn(boxes: Sequence[Box]) -> dict[int, str]:
    """The labels by the numbers that stand for what cannot be drawn of them."""
    numbered = {number: box.label.strip() for number, box in enumerate(boxes, 1)}
    return {
        number: label
        for number, label in numbered.items()
        if label and written(boxes[number - 1], number) != written(boxes[number - 1], -1)
    }


def draw_boxes(pixels: NDArray[np.uint8], boxes: Sequence[Box]) -> NDArray[np.uint8]:
    """A copy of the picture [H, W, 3] uint8 with every box outlined and named."""
    from PIL import Image, ImageDraw

    picture = Image.fromarray(pixels.copy())
    canvas = ImageDraw.Draw(picture)
    line = max(1, round(min(picture.size) / 200))
    size = max(10, round(min(picture.size) / 32))
    right, bottom = picture.width - 1, picture.height - 1
    numbered = list(enumerate(boxes, 1))
    # Large ones first: a box inside another one, and every name, is seen whole.
    for number, box in sorted(numbered, key=lambda found: _area(found[1]), reverse=True):
        corners = (min(box.left, right), min(box.top, bottom), min(box.right, right), min(box.bottom, bottom))
        canvas.rectangle(corners, outline=COLOURS[(number - 1) % len(COLOURS)], width=line)
    taken = np.empty((0, 4))
    for number, box in numbered:
        if not box.label.strip():
            continue
        name, text = written(box, number)
        font = font_of(name, size)
        text = shortened(text, font, picture.width - 2 * line)
        above, below = font.getmetrics()
        wide, tall = font.getlength(text) + 2 * line, above + below + 2 * line
        plate = place(box, wide, tall, picture.size, taken)
        taken = np.concatenate((taken, [plate]))
        canvas.rectangle(plate, fill=COLOURS[(number - 1) % len(COLOURS)])
        canvas.text((plate[0] + line, plate[1] + line), text, fill="white", font=font)
    return np.asarray(picture, dtype=np.uint8)


def _area(box: Box) -> float:
    return (box.right - box.left) * (box.bottom - box.top)


def shortened(text: str, font: Any, width: float) -> str:
    """`text`, cut to `width` pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text.rstrip() + "..."


def place(box: Box, wide: float, tall: float, size: tuple[int, int], taken: NDArray[np.float64]) -> Rectangle:
    """Where the label of `box` stands in a picture of `size` (width, height): where it covers least of those in `taken`."""
    best, least = (0.0, 0.0, 0.0, 0.0), float("inf")
    for left, top in _corners(box, wide, tall):
        left, top = max(0.0, min(left, size[0] - wide)), max(0.0, min(top, size[1] - tall))
        plate = (left, top, left + wide, top + tall)
        across = np.minimum(taken[:, 2], plate[2]) - np.maximum(taken[:, 0], plate[0])
        down = np.minimum(taken[:, 3], plate[3]) - np.maximum(taken[:, 1], plate[1])
        covered = float((across.clip(min=0) * down.clip(min=0)).sum())
        if covered < least:
            best, least = plate, covered
    return best


def _corners(box: Box, wide: float, tall: float) -> Iterator[tuple[float, float]]:
    """Left and top of a label, the best place first: above the box, at its inside, below it."""
    for left in (box.left, box.right - wide):
        yield from ((left, top) for top in (box.top - tall, box.top, box.bottom, box.bottom - tall))
