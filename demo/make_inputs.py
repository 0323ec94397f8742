"""Writes the pictures in demo/inputs that are drawn: a depth map of a head and shoulders, a later frame in colour.

python -m hotpath.demo.make_inputs
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from .colorize_scenes import held_out_clip

INPUTS = Path(__file__).resolve().parent / "inputs"
LATER_FRAME = 12


def depth_of_a_bust(side: int = 512) -> Image.Image:
    """Near is bright: an ellipsoid for the head, one for the shoulders, a wall that leans away behind them."""
    y, x = np.mgrid[0:side, 0:side] / side

    def ellipsoid(cx: float, cy: float, rx: float, ry: float, depth: float) -> np.ndarray:
        return depth * np.sqrt(np.clip(1 - ((x - cx) / rx) ** 2 - ((y - cy) / ry) ** 2, 0, None))

    near = np.maximum(0.55 + ellipsoid(0.5, 0.36, 0.16, 0.22, 0.45), 0.5 + ellipsoid(0.5, 1.0, 0.42, 0.4, 0.35))
    figure = (ellipsoid(0.5, 0.36, 0.16, 0.22, 1) > 0) | (ellipsoid(0.5, 1.0, 0.42, 0.4, 1) > 0)
    return Image.fromarray((np.where(figure, near, 0.12 + 0.12 * y) * 255).clip(0, 255).astype(np.uint8))


def main() -> None:
    depth_of_a_bust().convert("RGB").save(INPUTS / "depth_bust.png", optimize=True)
    frame = held_out_clip()[LATER_FRAME].permute(1, 2, 0).mul(255).round().byte().numpy()
    Image.fromarray(frame).save(INPUTS / f"colorize_reference_{LATER_FRAME}.png", optimize=True)


if __name__ == "__main__":
    main()
