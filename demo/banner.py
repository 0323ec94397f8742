"""Draws docs/images/banner.png, the picture over the pack's page in ComfyUI's registry, in the icon's style.

python -m hotpath.demo.banner
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont

TARGET = Path(__file__).resolve().parent.parent / "docs" / "images" / "banner.png"
WIDTH, HEIGHT = 1260, 540  # 21:9, as the registry shows it
SCALE = 2  # drawn larger, for smooth edges
CELL = 90
BACKGROUND, CELLS = (20, 21, 26), (46, 49, 60)
COLD, WARM, HOT = (96, 120, 255), (255, 92, 96), (255, 200, 64)
PATH = [(0, 5), (2, 5), (2, 4), (4, 4), (4, 3), (7, 3), (7, 2), (9, 2), (9, 1), (12, 1)]
FEATURES = "InstantID  ·  faces  ·  film colour  ·  Qwen-VL  ·  Z-Image"


def at(cell: tuple[int, int]) -> tuple[float, float]:
    return (60 + cell[0] * CELL) * SCALE, (45 + cell[1] * CELL) * SCALE


def colour(part: float) -> tuple[int, int, int]:
    first, last, share = (COLD, WARM, part * 2) if part < 0.5 else (WARM, HOT, part * 2 - 1)
    return tuple(round(a + (b - a) * share) for a, b in zip(first, last, strict=True))


def path_layer(width: int, strength: float) -> Image.Image:
    layer = Image.new("RGB", (WIDTH * SCALE, HEIGHT * SCALE))
    canvas = ImageDraw.Draw(layer)
    steps = 60
    total = len(PATH) - 1
    for index, (start, end) in enumerate(pairwise(PATH)):
        (x0, y0), (x1, y1) = at(start), at(end)
        for step in range(steps):
            part = (index + step / steps) / total
            shade = tuple(round(c * strength) for c in colour(part))
            a, b = step / steps, (step + 1.5) / steps
            ends = (x0 + (x1 - x0) * a, y0 + (y1 - y0) * a, x0 + (x1 - x0) * b, y0 + (y1 - y0) * b)
            canvas.line(ends, fill=shade, width=width * SCALE)
    return layer


def draw() -> Image.Image:
    picture = Image.new("RGB", (WIDTH * SCALE, HEIGHT * SCALE), BACKGROUND)
    canvas = ImageDraw.Draw(picture)
    side = 15 * SCALE
    for column in range(13):
        for row in range(6):
            if column < 7 and row < 3:
                continue  # the name stands there
            x, y = at((column, row))
            canvas.rounded_rectangle((x - side, y - side, x + side, y + side), 6 * SCALE, fill=CELLS)
    glow = path_layer(34, 0.75).filter(ImageFilter.GaussianBlur(22 * SCALE))
    picture = ImageChops.add(picture, glow)
    line = path_layer(14, 1.0)
    picture.paste(line, mask=line.convert("L").point(lambda v: 255 if v > 20 else 0))
    canvas = ImageDraw.Draw(picture)
    for corner in PATH:
        x, y = at(corner)
        for radius, fill in ((15, "white"), (9, BACKGROUND)):
            canvas.ellipse([c + s * radius * SCALE for s in (-1, 1) for c in (x, y)], fill=fill)
    name, below = ImageFont.load_default(size=112 * SCALE), ImageFont.load_default(size=25 * SCALE)
    canvas.text(
        (56 * SCALE, 42 * SCALE), "Hotpath", fill="white", font=name, stroke_width=2 * SCALE, stroke_fill="white"
    )
    canvas.text((62 * SCALE, 186 * SCALE), FEATURES, fill=(190, 192, 200), font=below)
    return picture.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)


if __name__ == "__main__":
    draw().save(TARGET, optimize=True)
