"""Drawn faces with known boxes and key points, for training and scoring the demo's face networks.

A `Person` is a set of colours and proportions; the same person can be drawn at any place, size, angle and light.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

Colour = tuple[int, int, int]
SUPERSAMPLING = 2

# In half heights of the face from its centre: eye, eye, nose, mouth, mouth.
EYE_HEIGHT, NOSE_HEIGHT, MOUTH_HEIGHT = -0.15, 0.18, 0.52


@dataclass(frozen=True)
class Person:
    """Who is drawn. Lengths are in half heights of the face."""

    skin: Colour
    hair: Colour
    iris: Colour
    lips: Colour
    half_width: float
    eye_distance: float  # of each eye from the middle
    eye_size: float
    mouth_half_width: float
    smile: float
    brow: float
    hair_length: float

    @classmethod
    def random(cls, rng: np.random.Generator) -> Person:
        tone = rng.uniform(0.35, 1.08)
        skin = _colour(np.array([226, 176, 145]) * tone + rng.normal(0, 8, 3))
        hairs = [
            (40, 28, 20),
            (90, 58, 34),
            (196, 160, 96),
            (150, 70, 36),
            (165, 160, 156),
            (20, 20, 26),
            (120, 40, 90),
        ]
        irises = [(70, 45, 25), (60, 90, 140), (70, 110, 70), (30, 24, 20)]
        lips = _colour(np.array(skin) * np.array([0.85, 0.5, 0.52]) + rng.normal(0, 10, 3))
        return cls(
            skin=skin,
            hair=_colour(np.array(hairs[rng.integers(len(hairs))]) + rng.normal(0, 10, 3)),
            iris=irises[rng.integers(len(irises))],
            lips=lips,
            half_width=rng.uniform(0.68, 0.86),
            eye_distance=rng.uniform(0.28, 0.37),
            eye_size=rng.uniform(0.09, 0.15),
            mouth_half_width=rng.uniform(0.2, 0.33),
            smile=rng.uniform(-0.02, 0.12),
            brow=rng.uniform(0.03, 0.07),
            hair_length=rng.uniform(-0.2, 1.1),
        )

    def keypoints(self) -> NDArray[np.float64]:
        """[5, 2] in half heights from the centre."""
        return np.array(
            [
                (-self.eye_distance, EYE_HEIGHT),
                (self.eye_distance, EYE_HEIGHT),
                (0.0, NOSE_HEIGHT),
                (-self.mouth_half_width, MOUTH_HEIGHT),
                (self.mouth_half_width, MOUTH_HEIGHT),
            ]
        )


@dataclass(frozen=True, eq=False)
class DrawnFace:
    box: NDArray[np.float32]  # [4] x0 y0 x1 y1
    keypoints: NDArray[np.float32]  # [5, 2]
    person: Person


def _colour(values: NDArray[np.float64]) -> Colour:
    r, g, b = (int(v) for v in np.clip(values, 0, 255))
    return r, g, b


def _shade(colour: Colour, factor: float) -> Colour:
    return _colour(np.array(colour) * factor)


def draw_face(
    picture: Image.Image, person: Person, centre: tuple[float, float], height: float, angle: float = 0.0
) -> DrawnFace:
    """Draw `person` into an RGB picture in place, `height` pixels from hairline to chin, turned by `angle` radians."""
    half = height / 2
    margin = math.ceil(half * 1.9)
    side = 2 * margin
    # A patch of its own, drawn larger: Pillow's shapes are not smoothed.
    left, top = round(centre[0]) - margin, round(centre[1]) - margin
    middle = np.array([centre[0] - left, centre[1] - top])
    scale = SUPERSAMPLING
    patch = Image.new("RGB", (side * scale, side * scale), person.hair)
    mask = Image.new("L", patch.size, 0)
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])

    def at(points: NDArray[np.float64]) -> list[tuple[float, float]]:
        turned = (np.atleast_2d(points) * half @ turn.T + middle) * scale
        return [(float(x), float(y)) for x, y in turned]

    def ellipse(x: float, y: float, rx: float, ry: float) -> list[tuple[float, float]]:
        t = np.linspace(0, 2 * math.pi, 40, endpoint=False)
        return at(np.stack([x + rx * np.cos(t), y + ry * np.sin(t)], 1))

    ink, shape = ImageDraw.Draw(patch), ImageDraw.Draw(mask)
    thick = max(1, int(half * scale * person.brow))
    hair = ellipse(0, -0.25, person.half_width * 1.22, 1.05)
    ink.polygon(hair, fill=person.hair)
    shape.polygon(hair, fill=255)
    if person.hair_length > 0:
        wide = person.half_width * 1.18
        corners = [(-wide, -0.3), (wide, -0.3), (wide, person.hair_length), (-wide, person.hair_length)]
        fall = at(np.array(corners))
        ink.polygon(fall, fill=person.hair)
        shape.polygon(fall, fill=255)
    skin = ellipse(0, 0, person.half_width, 1.0)
    ink.polygon(skin, fill=person.skin)
    shape.polygon(skin, fill=255)
    fringe = np.linspace(-0.9, 0.9, 20) * person.half_width
    ink.polygon(
        at(
            np.concatenate(
                [
                    np.stack([fringe, np.full(20, -1.3)], 1),
                    np.stack([fringe[::-1], -0.62 - 0.25 * np.cos(fringe[::-1] * 1.6)], 1),
                ]
            )
        ),
        fill=person.hair,
    )
    for side_sign in (-1, 1):
        x = side_sign * person.eye_distance
        ink.polygon(ellipse(x, EYE_HEIGHT, person.eye_size * 1.35, person.eye_size * 0.75), fill=(244, 242, 238))
        ink.polygon(ellipse(x, EYE_HEIGHT, person.eye_size * 0.7, person.eye_size * 0.72), fill=person.iris)
        ink.polygon(ellipse(x, EYE_HEIGHT, person.eye_size * 0.34, person.eye_size * 0.36), fill=(12, 10, 10))
        brow = np.array([(x - 0.16, EYE_HEIGHT - 0.2), (x, EYE_HEIGHT - 0.25), (x + 0.16, EYE_HEIGHT - 0.2)])
        ink.line(at(brow), fill=_shade(person.hair, 0.8), width=thick, joint="curve")
    nose = np.array(
        [(-0.02, EYE_HEIGHT + 0.05), (-0.1, NOSE_HEIGHT + 0.03), (0, NOSE_HEIGHT + 0.06), (0.1, NOSE_HEIGHT + 0.03)]
    )
    ink.line(at(nose), fill=_shade(person.skin, 0.72), width=max(1, thick * 2 // 3), joint="curve")
    m = np.linspace(-1, 1, 12)
    upper = np.stack([m * person.mouth_half_width, MOUTH_HEIGHT + person.smile * (1 - m**2) - 0.04 * (1 - m**2)], 1)
    lower = np.stack([m * person.mouth_half_width, MOUTH_HEIGHT + (person.smile + 0.11) * (1 - m**2)], 1)
    ink.polygon(at(np.concatenate([upper, lower[::-1]])), fill=person.lips)
    if person.smile > 0.04:
        teeth = np.stack([m * 0.8 * person.mouth_half_width, MOUTH_HEIGHT + (person.smile + 0.02) * (1 - m**2)], 1)
        ink.polygon(at(np.concatenate([upper * [0.8, 1] + [0, 0.02], teeth[::-1]])), fill=(240, 236, 230))

    small = patch.resize((side, side), Image.Resampling.BOX)
    soft = mask.resize((side, side), Image.Resampling.BOX)
    picture.paste(small, (left, top), soft)
    outline = (np.array(skin) / scale) + [left, top]
    points = (np.array(at(person.keypoints())) / scale) + [left, top]
    # A turned face may have its mouth's corners swap sides; image-left stays first within each pair.
    box = np.concatenate([outline.min(0), outline.max(0)])
    return DrawnFace(box.astype(np.float32), points.astype(np.float32), person)


def drawn_scene(
    rng: np.random.Generator, background: Image.Image, faces: int, smallest: float = 24, largest: float = 0.75
) -> tuple[Image.Image, list[DrawnFace]]:
    """`background` with up to `faces` faces that do not overlap; heights from pixels `smallest` to `largest` of the side."""
    picture = background.convert("RGB").copy()
    side = min(picture.size)
    drawn: list[DrawnFace] = []
    for _ in range(faces):
        height = math.exp(rng.uniform(math.log(smallest), math.log(side * largest)))
        centre = tuple(rng.uniform(height * 0.5, extent - height * 0.5) for extent in picture.size)
        if any(
            abs(centre[0] - (d.box[0] + d.box[2]) / 2) < (height * 1.3 + d.box[2] - d.box[0]) / 2 * 1.2
            and abs(centre[1] - (d.box[1] + d.box[3]) / 2) < (height * 1.3 + d.box[3] - d.box[1]) / 2 * 1.2
            for d in drawn
        ):
            continue
        drawn.append(draw_face(picture, Person.random(rng), (centre[0], centre[1]), height, rng.normal() * 0.2))
    return picture, drawn


def plain_background(rng: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    """A gradient with blurred blobs and lines, so that held-out scenes need no photographs."""
    ends = rng.integers(0, 256, (2, 3))
    ramp = np.linspace(0, 1, size[1])[:, None, None]
    pixels = np.broadcast_to(ends[0] * (1 - ramp) + ends[1] * ramp, (size[1], size[0], 3)).astype(np.uint8)
    picture = Image.fromarray(np.ascontiguousarray(pixels))
    ink = ImageDraw.Draw(picture)
    for _ in range(rng.integers(3, 12)):
        x, y = rng.integers(0, size[0]), rng.integers(0, size[1])
        w, h = rng.integers(8, max(9, size[0] // 2)), rng.integers(8, max(9, size[1] // 2))
        colour = tuple(int(c) for c in rng.integers(0, 256, 3))
        if rng.random() < 0.5:
            ink.ellipse((x - w // 2, y - h // 2, x + w // 2, y + h // 2), fill=colour)
        else:
            ink.rectangle((x - w // 2, y - h // 2, x + w // 2, y + h // 2), fill=colour)
    return picture.filter(ImageFilter.GaussianBlur(float(rng.uniform(0, 4))))
