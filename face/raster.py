"""OpenCV's filled convex polygon, ellipse outline and filled circle, to the pixel, in integers.

The key-point drawing is an input of a ControlNet, so it has to be the one the reference pack draws with cv2; cv2 itself
is not needed to run. Rules follow the documented behaviour of `ellipse2Poly`, `fillConvexPoly` and `circle` with
8-connected lines and no fractional bits; tests/test_face_keypoints.py compares them with cv2.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Canvas = NDArray[np.uint8]  # [H, W, 3]
Point = tuple[int, int]  # x, y
Colour = tuple[int, int, int]

FRACTION = 16  # bits behind the point of an edge's x
ONE = 1 << FRACTION

# cv2 keeps the sine of whole degrees as float32 with seven digits; rounding differs from math.sin.
SINES: list[float] = [float(np.float32(round(math.sin(math.radians(d)), 7))) for d in range(451)]


def ellipse_outline(centre: Point, axes: tuple[int, int], angle: int) -> list[Point]:
    """The ellipse as a polygon in steps of one degree, rotated by `angle` degrees, repeated points dropped."""
    angle %= 360
    cosine, sine = SINES[450 - angle], SINES[angle]
    outline: list[Point] = []
    for degree in range(361):
        x, y = axes[0] * SINES[450 - degree], axes[1] * SINES[degree]
        # round() and cvRound both take the even neighbour of a half.
        point = round(centre[0] + x * cosine - y * sine), round(centre[1] + x * sine + y * cosine)
        if not outline or outline[-1] != point:
            outline.append(point)
    return outline if len(outline) > 1 else [centre, centre]


def _clip_line(width: int, height: int, a: Point, b: Point) -> tuple[Point, Point] | None:
    """The part of the line inside the canvas, with cv2's rounding towards zero; None when there is none."""
    (x1, y1), (x2, y2) = a, b
    right, bottom = width - 1, height - 1

    def outside_x(x: int) -> int:
        return (x < 0) + (x > right) * 2

    def outside(x: int, y: int) -> int:
        return outside_x(x) + (y < 0) * 4 + (y > bottom) * 8

    c1, c2 = outside(x1, y1), outside(x2, y2)
    if c1 & c2 == 0 and c1 | c2:
        if c1 & 12:
            edge = 0 if c1 < 8 else bottom
            x1 += int(float(edge - y1) * (x2 - x1) / (y2 - y1))
            y1, c1 = edge, outside_x(x1)
        if c2 & 12:
            edge = 0 if c2 < 8 else bottom
            x2 += int(float(edge - y2) * (x2 - x1) / (y2 - y1))
            y2, c2 = edge, outside_x(x2)
        if c1 & c2 == 0 and c1 | c2:
            if c1:
                edge = 0 if c1 == 1 else right
                y1 += int(float(edge - x1) * (y2 - y1) / (x2 - x1))
                x1, c1 = edge, 0
            if c2:
                edge = 0 if c2 == 1 else right
                y2 += int(float(edge - x2) * (y2 - y1) / (x2 - x1))
                x2, c2 = edge, 0
    return None if c1 | c2 else ((x1, y1), (x2, y2))


def draw_line(canvas: Canvas, a: Point, b: Point, colour: Colour) -> None:
    """An 8-connected Bresenham line, always walked from left to right."""
    height, width = canvas.shape[:2]
    clipped = _clip_line(width, height, a, b)
    if clipped is None:
        return
    (x, y), (x2, y2) = clipped
    if x2 < x:
        x, y, x2, y2 = x2, y2, x, y
    dx, dy, down = x2 - x, abs(y2 - y), 1 if y2 >= y else -1
    steep = dy > dx
    if steep:
        dx, dy = dy, dx
    error = dx - 2 * dy
    for _ in range(dx + 1):
        canvas[y, x] = colour
        diagonal = error < 0
        error += (2 * dx if diagonal else 0) - 2 * dy
        if steep:
            y += down
            x += diagonal
        else:
            x += 1
            y += down if diagonal else 0


def fill_convex_polygon(canvas: Canvas, outline: list[Point], colour: Colour) -> None:
    """Fill a convex polygon in place: its outline as lines, then rows between the two edges down from the top."""
    height, width = canvas.shape[:2]
    xs, ys = [p[0] for p in outline], [p[1] for p in outline]
    if max(xs) < 0 or max(ys) < 0 or min(xs) >= width or min(ys) >= height:
        return
    count = len(outline)
    for i in range(count):
        draw_line(canvas, outline[i - 1], outline[i], colour)
    if count < 3:
        return
    top, last = min(ys), min(max(ys), height - 1)
    first = ys.index(top)
    # Per edge: position in the outline, walking direction, x and its step per row in fixed point, row where it ends.
    at, step = [first, first], (1, count - 1)
    x, slope, until = [-ONE, -ONE], [0, 0], [top, top]
    left_over = count
    for y in range(top, last + 1):
        for side in (0, 1):
            if y < until[side]:
                continue
            start = at[side]
            end = (start + step[side]) % count
            while left_over > 0:
                left_over -= 1
                if ys[end] > y:
                    rows, run = ys[end] - y, (xs[end] - xs[start]) * ONE
                    # C division rounds towards zero.
                    numerator, denominator = 2 * run + rows, 2 * rows
                    slope[side] = abs(numerator) // denominator * (1 if numerator >= 0 else -1)
                    x[side], until[side], at[side] = xs[start] * ONE, ys[end], end
                    break
                start, end = end, (end + step[side]) % count
        if y >= 0:
            begin, stop = (min(x) + ONE // 2) >> FRACTION, (max(x) + ONE // 2) >> FRACTION
            if stop >= 0 and begin < width:
                canvas[y, max(begin, 0) : min(stop, width - 1) + 1] = colour
        x[0] += slope[0]
        x[1] += slope[1]


@lru_cache(maxsize=8)
def _disc(radius: int) -> dict[int, int]:
    """Half the length of each row of a filled circle, by row from the centre (midpoint circle)."""
    rows: dict[int, int] = {}
    error, dx, dy, plus, minus = 0, radius, 0, 1, 2 * radius - 1
    while dx >= dy:
        for row, half in ((dy, dx), (dx, dy)):
            rows[row] = max(rows.get(row, 0), half)
        dy += 1
        error += plus
        plus += 2
        if error > 0:
            error -= minus
            dx -= 1
            minus -= 2
    return rows


def fill_circle(canvas: Canvas, centre: Point, radius: int, colour: Colour) -> None:
    """Fill a circle in place, cut at the borders."""
    height, width = canvas.shape[:2]
    x, y = centre
    for row, half in _disc(radius).items():
        begin, stop = max(x - half, 0), min(x + half, width - 1)
        if begin > stop:
            continue
        for line in {y - row, y + row}:
            if 0 <= line < height:
                canvas[line, begin : stop + 1] = colour
