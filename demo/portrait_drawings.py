"""Drawn portraits with words for their colours, for training and scoring the demo's InstantID.

A portrait is one or two of the people of `face_drawings` in a shirt, before a plain background. A sample has what
InstantID is given: the embedding of another drawing of the same person, the key points and the words.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

from ..face.alignment import invert, similarity, template, warp
from ..face.keypoints import draw_keypoints
from .comfy_nodes.hotpath_demo.portraits import COLOURS
from .face_drawings import Person, draw_face, plain_background

SIDE, CROP = 128, 112
NAMES = tuple(COLOURS)
FOUR = 4  # drawn larger, for smooth edges
Random = np.random.Generator


@dataclass(frozen=True)
class Portrait:
    """picture: [H, W, 3] uint8. keypoints: [5, 2] of each person, left to right. text: all the words that fit it."""

    picture: NDArray[np.uint8]
    keypoints: NDArray[np.float32]
    people: tuple[Person, ...]
    text: str


def _near(rng: Random, colour: tuple[int, int, int]) -> NDArray[np.float64]:
    return np.clip(np.array(colour) + rng.normal(0, 5, 3), 0, 255)


def draw_shirt(
    picture: Image.Image, person: Person, centre: tuple[float, float], height: float, colour: NDArray[np.float64]
) -> None:
    """Neck and shoulders below where the face will be."""
    half = height / 2
    size = (picture.width * FOUR, picture.height * FOUR)
    x, y = centre

    def box(cx: float, cy: float, rx: float, ry: float) -> tuple[float, ...]:
        return tuple(
            v * FOUR for v in (x + (cx - rx) * half, y + (cy - ry) * half, x + (cx + rx) * half, y + (cy + ry) * half)
        )

    for shapes, fill in (
        ([box(0, 1.95, 1.32, 0.75), box(0, 3.9, 1.32, 1.95)], colour),
        ([box(0, 1.0, 0.3, 0.42)], np.array(person.skin) * 0.86),
    ):
        mask = Image.new("L", size, 0)
        ink = ImageDraw.Draw(mask)
        for number, shape in enumerate(shapes):
            (ink.rectangle if number else ink.ellipse)(shape, fill=255)
        picture.paste(tuple(int(v) for v in fill), mask=mask.resize(picture.size, Image.Resampling.BOX))


def draw_portrait(
    people: tuple[Person, ...],
    places: list[tuple[float, float, float, float]],
    rng: Random,
    size: tuple[int, int] = (SIDE, SIDE),
    shirt: str = "",
    background: str = "",
) -> Portrait:
    """places: x, y of the face's centre, its height and its angle, for each of the people. Colours are drawn by lot."""
    shirt = shirt or NAMES[rng.integers(len(NAMES))]
    background = background or NAMES[rng.integers(len(NAMES))]
    width, height = size
    ramp = np.linspace(1.04, 0.94, height)[:, None, None] * _near(rng, COLOURS[background])
    picture = Image.fromarray(np.clip(np.broadcast_to(ramp, (height, width, 3)), 0, 255).astype(np.uint8))
    points = []
    for person, (x, y, tall, angle) in zip(people, places, strict=True):
        draw_shirt(picture, person, (x, y), tall, _near(rng, COLOURS[shirt]))
        points.append(draw_face(picture, person, (x, y), tall, angle).keypoints)
    text = f"portrait, {shirt} shirt, {background} background"
    return Portrait(np.array(picture), np.stack(points), people, text)


def random_portrait(rng: Random, two: bool) -> Portrait:
    """One person somewhere, or one in each half."""
    places = []
    for number in range(2 if two else 1):
        tall = float(rng.uniform(0.32, 0.43) if two else math.exp(rng.uniform(math.log(0.36), math.log(0.68)))) * SIDE
        room = SIDE / 2 if two else SIDE
        x = float(
            rng.uniform(0.44, 0.56) * room + number * room if two else rng.uniform(0.56 * tall, SIDE - 0.56 * tall)
        )
        y = float(rng.uniform(0.58 * tall, min(SIDE - 0.56 * tall, 0.62 * SIDE)))
        places.append((x, y, tall, float(np.clip(rng.normal() * 0.12, -0.35, 0.35))))
    return draw_portrait(tuple(Person.random(rng) for _ in places), places, rng)


def reference_crop(person: Person, rng: Random) -> Tensor:
    """[112, 112, 3] float 0..255: another drawing of the person, cut out as the recogniser takes it."""
    side = 160
    picture = plain_background(rng, (side, side))
    tall = float(rng.uniform(50, 130))
    x, y = rng.uniform(tall * 0.5, side - tall * 0.5, 2)
    face = draw_face(picture, person, (float(x), float(y)), tall, float(rng.normal() * 0.15))
    points = face.keypoints + rng.normal(0, 0.01 * tall, (5, 2)).astype(np.float32)
    inverse = invert(similarity(points[None].astype(np.float32), template(CROP))).astype(np.float32)
    pixels = torch.from_numpy(np.array(picture))[None]
    return warp(pixels, torch.zeros(1, dtype=torch.long), torch.from_numpy(inverse), CROP, CROP)[0]


def pose_drawing(rng: Random, keypoints: NDArray[np.float32]) -> Tensor:
    """[SIDE/2, SIDE/2, 3] uint8, the halved key point drawing, made at another size and resized as a ControlNet does."""
    larger = float(rng.choice([1.0, 1.5, 2.0, 3.0, 4.0]))
    drawn = draw_keypoints(round(SIDE * larger), round(SIDE * larger), torch.from_numpy(keypoints * np.float32(larger)))
    fitted = torch.nn.functional.interpolate(drawn.movedim(-1, 0)[None], size=(SIDE, SIDE), mode="nearest-exact")
    return (torch.nn.functional.avg_pool2d(fitted, 2)[0].movedim(0, -1) * 255).round().byte()
