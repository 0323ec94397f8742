"""Pictures with their faces marked: a box, five points, and a label with index and score for each.

A label stands where it hides nothing: beside its box or inside it, within the picture, clear of other faces and labels, and
smaller where there is no room for its full size.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .faces import Faces
from .pictures import in_float

MARKS = ((80, 220, 100), (255, 170, 40), (90, 160, 255), (240, 90, 200))
POINT_COLOURS = ((255, 70, 70), (70, 255, 70), (70, 70, 255), (255, 255, 70), (255, 70, 255))
SMALLEST = 10  # pixels of text
CROWD = 8  # faces; of more, labels are in proportion to the faces and not to the picture

Rectangle = tuple[float, float, float, float]  # x0 y0 x1 y1


def mark_faces(picture: Tensor, faces: Faces) -> Tensor:
    """[H, W, 3] float RGB: the picture [H, W, C] in 0..1 with each face's box, key points, index and score drawn."""
    from PIL import Image, ImageDraw

    picture = in_float(picture.detach())
    rgb = picture[..., :3] if picture.shape[-1] >= 3 else picture[..., :1].expand(*picture.shape[:2], 3)
    image = Image.fromarray((rgb.cpu().clamp(0, 1).numpy() * 255).astype(np.uint8))
    ink = ImageDraw.Draw(image)
    thick = max(1, round(max(image.size) / 400))
    # A weak detection may have its sides the wrong way round.
    boxes = [(min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)) for x0, y0, x1, y1 in faces.boxes.tolist()]
    for i, (box, points) in enumerate(zip(boxes, faces.keypoints.tolist(), strict=True)):
        # Thinner on a face that lines of the picture's own width would fill.
        own = max(1, min(thick, round(min(box[2] - box[0], box[3] - box[1]) / 24)))
        ink.rectangle(box, outline=MARKS[i % len(MARKS)], width=own)
        for (px, py), colour in zip(points, POINT_COLOURS, strict=True):
            ink.ellipse((px - 1.5 * own, py - 1.5 * own, px + 1.5 * own, py + 1.5 * own), fill=colour)
    _label(ink, image.size, boxes, faces, thick)
    return torch.from_numpy(np.array(image)).float() / 255.0


def _label(ink: Any, size: tuple[int, int], boxes: list[Rectangle], faces: Faces, thick: int) -> None:
    """Draw the labels of all faces into a picture of `size` (width, height), whose boxes are drawn."""
    taken = np.array([_within(box, size) for box in boxes]).reshape(-1, 4)
    full = max(SMALLEST, max(size) // 40)
    if len(boxes) > CROWD:
        full = max(SMALLEST, min(full, round(0.3 * float(np.median(taken[:, 3] - taken[:, 1])))))
    text_sizes = sorted({max(SMALLEST, round(full * part)) for part in (1, 0.75, 0.5, 0.35, 0)}, reverse=True)
    for i, points in enumerate(faces.keypoints.numpy()):
        others = np.delete(taken, i, 0)
        least, best = np.inf, None
        for text_size in text_sizes:
            pad = max(1, text_size // 8)
            font = _font(text_size)
            text = f"{i}  {float(faces.scores[i]):.2f}"
            left, top, right, bottom = ink.textbbox((0, 0), text, font=font)
            if (wide := right - left + 2 * pad) > size[0]:
                if text_size > text_sizes[-1]:
                    continue
                text = f"{i}"
                left, top, right, bottom = ink.textbbox((0, 0), text, font=font)
                wide = right - left + 2 * pad
            tall = bottom - top + 2 * pad
            for place in _places(tuple(taken[i]), size, wide, tall, points):
                if (hidden := _shared(place, others)) < least:
                    least = hidden
                    best = place, text, font, (pad - left, pad - top)
            if least == 0:
                break
        if best is not None:
            place, text, font, shift = best
            ink.rectangle(place, fill=MARKS[i % len(MARKS)])
            ink.text((place[0] + shift[0], place[1] + shift[1]), text, fill=(0, 0, 0), font=font)
            taken = np.concatenate([taken, np.array(place)[None]])


def _places(
    box: Rectangle, size: tuple[int, int], wide: float, tall: float, points: NDArray[np.float32]
) -> Iterator[Rectangle]:
    """Where a label may stand, the most obvious place first; `box` and `size` (width, height) as in `_label`."""
    x0, y0, x1, y1 = box

    def at(x: float, y: float) -> Rectangle:
        x, y = max(0, min(x, size[0] - wide)), max(0, min(y, size[1] - tall))
        return x, y, x + wide, y + tall

    if y0 >= tall:
        yield at(x0, y0 - tall)
    inside = at(x0, y0)
    over = (points >= inside[:2]).all(1) & (points <= inside[2:]).all(1)
    if wide <= x1 - x0 and tall * 4 <= y1 - y0 and not over.any():
        yield inside
    if y1 + tall <= size[1]:
        yield at(x0, y1)
    if x1 + wide <= size[0]:
        yield at(x1, y0)
    if x0 >= wide:
        yield at(x0 - wide, y0)
    yield inside


def _within(box: Rectangle, size: tuple[int, int]) -> Rectangle:
    """The part of the box in a picture of `size` (width, height)."""
    x0, x1 = (min(max(x, 0.0), size[0] - 1.0) for x in box[::2])
    y0, y1 = (min(max(y, 0.0), size[1] - 1.0) for y in box[1::2])
    return x0, y0, x1, y1


def _shared(place: Rectangle, others: NDArray[np.float64]) -> float:
    """Square pixels that `place` has in common with all of `others` [N, 4]."""
    low, high = np.maximum(others[:, :2], place[:2]), np.minimum(others[:, 2:], place[2:])
    return float((high - low).clip(0).prod(1).sum())


@lru_cache(maxsize=16)
def _font(size: int) -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size)
