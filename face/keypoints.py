"""The five key points of a face as InstantID's ControlNet was trained to see them.

Limbs from the nose to the other four points as thin ellipses at 60 % brightness, discs of radius 10 on top, on black
(InstantID, arXiv:2401.07519, and its published drawing code's parameters).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .faces import FaceError
from .raster import Colour, ellipse_outline, fill_circle, fill_convex_polygon

COLOURS: tuple[Colour, ...] = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 0, 255))
LIMBS = ((0, 2), (1, 2), (3, 2), (4, 2))
LIMB_HALF_WIDTH = 4
LIMB_BRIGHTNESS = 0.6
DISC_RADIUS = 10
LIMIT = 1 << 20  # pixels from the origin; further out nothing is a picture any more


def draw_keypoints(height: int, width: int, keypoints: Tensor) -> Tensor:
    """[height, width, 3] float RGB in 0..1 of the key points [5, 2] or, one face over the other, [N, 5, 2] in pixels.

    Equal to the reference drawing to the pixel. Of several faces all limbs are drawn first, so that a face's discs are
    never dimmed. Raises FaceError for sizes below one pixel and for coordinates that are no numbers.
    """
    if height < 1 or width < 1:
        raise FaceError(f"A key-point picture of {width} x {height} has no pixels; give it a width and a height.")
    faces = keypoints.detach().float().cpu().reshape(-1, 5, 2).numpy()
    if not np.isfinite(faces).all() or (np.abs(faces) > LIMIT).any():
        raise FaceError("The key points are not all pixel coordinates (NaN, infinite or millions of pixels away).")
    canvas: NDArray[np.uint8] = np.zeros((height, width, 3), np.uint8)
    for points in faces:
        for start, end in LIMBS:
            x, y = points[[start, end], 0], points[[start, end], 1]
            # float32 throughout, as numpy computes it on a detector's key points: a double lands on other integers.
            length = ((x[0] - x[1]) ** 2 + (y[0] - y[1]) ** 2) ** 0.5
            angle = math.degrees(math.atan2(y[0] - y[1], x[0] - x[1]))
            outline = ellipse_outline(
                (int(np.mean(x)), int(np.mean(y))), (int(length / 2), LIMB_HALF_WIDTH), int(angle)
            )
            fill_convex_polygon(canvas, outline, COLOURS[start])
    canvas = (canvas * LIMB_BRIGHTNESS).astype(np.uint8)
    for points in faces:
        for point, colour in zip(points, COLOURS, strict=True):
            fill_circle(canvas, (int(point[0]), int(point[1])), DISC_RADIUS, colour)
    return torch.from_numpy(canvas).float() / 255.0
