"""A strip of what the demo made, side by side: for the top of its page, and for the README."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .demo import DemoResult

HEIGHT, WIDEST, GAP = 240, 300, 8
NAME = "strip.jpg"
# Workflow and the beginning of a file's name, in the order of the strip.
SHOWN = (
    ("identity_from_photo", "identity_faces"),
    ("instantid_posed", "instantid_posed"),
    ("instantid_two_people", "instantid_two_people"),
    ("faces_find_and_match", "faces_marked"),
    ("colorize_held_out_film", "colorize_held_out"),
    ("colorize_transfer", "colorize_transfer"),
)


def write_strip(folder: Path, results: Sequence[DemoResult]) -> Path | None:
    """Write `folder`/strip.jpg from the pictures that were made; None when there are none of those shown."""
    from PIL import Image

    made = {result.name: result.outcome.files for result in results if result.state == "done"}
    paths = [
        next((f.path for f in made.get(name, ()) if f.kind == "image" and f.path.name.startswith(start)), None)
        for name, start in SHOWN
    ]
    pictures = []
    for path in filter(None, paths):
        with Image.open(path) as opened:
            picture = opened.convert("RGB")
        width = max(1, round(picture.width * HEIGHT / picture.height))
        picture = picture.resize((width, HEIGHT), Image.Resampling.LANCZOS)
        pictures.append(picture.crop((0, 0, min(width, WIDEST), HEIGHT)))
    if not pictures:
        return None
    strip = Image.new("RGB", (sum(p.width for p in pictures) + GAP * (len(pictures) - 1), HEIGHT), "white")
    x = 0
    for picture in pictures:
        strip.paste(picture, (x, 0))
        x += picture.width + GAP
    target = folder / NAME
    strip.save(target, quality=88, optimize=True)
    return target
