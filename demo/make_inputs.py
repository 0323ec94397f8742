"""Writes the pictures in demo/inputs that are drawn: portraits, a depth map of a head and shoulders, a later frame in colour.

python -m hotpath.demo.make_inputs
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from .colorize_scenes import held_out_clip
from .face_drawings import Person
from .portrait_drawings import draw_portrait

INPUTS = Path(__file__).resolve().parent / "inputs"
LATER_FRAME = 12
SIDE = 512


def depth_of_a_bust() -> Image.Image:
    """Near is bright: an ellipsoid for the head, one for the shoulders, a wall that leans away behind them."""
    y, x = np.mgrid[0:SIDE, 0:SIDE] / SIDE

    def ellipsoid(cx: float, cy: float, rx: float, ry: float, depth: float) -> np.ndarray:
        return depth * np.sqrt(np.clip(1 - ((x - cx) / rx) ** 2 - ((y - cy) / ry) ** 2, 0, None))

    near = np.maximum(0.55 + ellipsoid(0.5, 0.36, 0.16, 0.22, 0.45), 0.5 + ellipsoid(0.5, 1.0, 0.42, 0.4, 0.35))
    figure = (ellipsoid(0.5, 0.36, 0.16, 0.22, 1) > 0) | (ellipsoid(0.5, 1.0, 0.42, 0.4, 1) > 0)
    return Image.fromarray((np.where(figure, near, 0.12 + 0.12 * y) * 255).clip(0, 255).astype(np.uint8))


ANA = Person(
    skin=(236, 178, 150), hair=(196, 160, 96), iris=(60, 90, 140), lips=(200, 84, 84), half_width=0.74,
    eye_distance=0.33, eye_size=0.13, mouth_half_width=0.29, smile=0.1, brow=0.04, hair_length=0.95,
)  # fmt: skip
BEN = Person(
    skin=(128, 88, 66), hair=(24, 22, 26), iris=(40, 28, 22), lips=(112, 54, 48), half_width=0.84,
    eye_distance=0.34, eye_size=0.11, mouth_half_width=0.26, smile=0.02, brow=0.065, hair_length=-0.2,
)  # fmt: skip
SAM = Person(
    skin=(214, 160, 126), hair=(150, 70, 36), iris=(70, 110, 70), lips=(186, 84, 74), half_width=0.78,
    eye_distance=0.31, eye_size=0.12, mouth_half_width=0.25, smile=0.06, brow=0.05, hair_length=0.3,
)  # fmt: skip


def portraits() -> dict[str, Image.Image]:
    """Two people, a third with the head tilted to take a pose from, and a picture of two for their places.

    Faces are as large as the demo's detector knows them: less than a third of the picture.
    """
    rng = np.random.default_rng(5)
    drawn = {
        "portrait_ana": draw_portrait((ANA,), [(256, 210, 152, 0.05)], rng, (SIDE, SIDE), "teal", "grey"),
        "portrait_ben": draw_portrait((BEN,), [(256, 214, 156, -0.06)], rng, (SIDE, SIDE), "white", "blue"),
        "portrait_tilted": draw_portrait((SAM,), [(296, 206, 148, 0.26)], rng, (SIDE, SIDE), "green", "yellow"),
        "portrait_two": draw_portrait((SAM, SAM), [(140, 230, 148, 0.1), (372, 204, 152, -0.08)], rng, (SIDE, SIDE)),
    }
    return {name: Image.fromarray(portrait.picture) for name, portrait in drawn.items()}


def main() -> None:
    for name, picture in portraits().items():
        picture.save(INPUTS / f"{name}.png", optimize=True)
    depth_of_a_bust().convert("RGB").save(INPUTS / "depth_bust.png", optimize=True)
    frame = held_out_clip()[LATER_FRAME].permute(1, 2, 0).mul(255).round().byte().numpy()
    Image.fromarray(frame).save(INPUTS / f"colorize_reference_{LATER_FRAME}.png", optimize=True)


if __name__ == "__main__":
    main()
