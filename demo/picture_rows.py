"""How the pictures of help pages are laid out: rows with a line under each picture, and cards with what a node said."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont

LARGEST = 60_000  # bytes
WIDTH = 640
GAP = 8
HEIGHT = 200
PAPER, INK, DIM, CARD, ACCENT = "#16171c", "#eceae6", "#9b9ca3", "#22242b", "#ff8a5c"


def shown(tensor: torch.Tensor, height: int = HEIGHT) -> Image.Image:
    """The first picture of a batch, or a mask, at one height."""
    one = tensor[0] if tensor.ndim == 4 or (tensor.ndim == 3 and tensor.shape[-1] != 3) else tensor
    pixels = (one.clamp(0, 1) * 255).round().byte().cpu().numpy()
    picture = Image.fromarray(pixels).convert("RGB")
    way = Image.Resampling.NEAREST if picture.height < 120 else Image.Resampling.LANCZOS
    return picture.resize((max(1, round(picture.width * height / picture.height)), height), way)


def font(size: int) -> Any:
    return ImageFont.load_default(size=size)


def card(title: str, text: str, width: int = WIDTH) -> Image.Image:
    """A node's name and what it said, as it stands under the node."""
    lines = [piece for line in text.splitlines() for piece in textwrap.wrap(line, width // 8) or [""]]
    picture = Image.new("RGB", (width, 46 + 20 * len(lines)), PAPER)
    canvas = ImageDraw.Draw(picture)
    canvas.rounded_rectangle((0, 0, width - 1, picture.height - 1), 10, fill=CARD)
    canvas.rectangle((0, 0, 4, picture.height), fill=ACCENT)
    canvas.text((16, 10), title, fill=ACCENT, font=font(15))
    for row, line in enumerate(lines):
        canvas.text((16, 36 + 20 * row), line, fill=INK, font=font(14))
    return picture


def labelled(pictures: Sequence[tuple[str, Image.Image]]) -> Image.Image:
    """Pictures in a row, each with a line under it."""
    width = sum(p.width for _, p in pictures) + GAP * (len(pictures) - 1)
    height = max(p.height for _, p in pictures)
    row = Image.new("RGB", (width, height + 24), PAPER)
    canvas, x = ImageDraw.Draw(row), 0
    for label, picture in pictures:
        row.paste(picture, (x, 0))
        canvas.text((x + 2, height + 5), label, fill=DIM, font=font(13))
        x += picture.width + GAP
    return row


def stacked(rows: Sequence[Image.Image]) -> Image.Image:
    width = max(row.width for row in rows)
    sheet = Image.new("RGB", (width, sum(r.height for r in rows) + GAP * (len(rows) - 1)), PAPER)
    y = 0
    for row in rows:
        sheet.paste(row, (0, y))
        y += row.height + GAP
    return sheet


def save(picture: Image.Image, path: Path) -> int:
    """As JPEG of at most LARGEST bytes; its size. Raises ValueError when it cannot be made that small."""
    if picture.width > WIDTH:
        picture = picture.resize((WIDTH, round(picture.height * WIDTH / picture.width)), Image.Resampling.LANCZOS)
    path.parent.mkdir(parents=True, exist_ok=True)
    for quality in (90, 84, 76, 66):
        picture.save(path, quality=quality, optimize=True)
        if path.stat().st_size <= LARGEST:
            return path.stat().st_size
    raise ValueError(f"{path.name} has {path.stat().st_size} bytes at the lowest quality; show less on it.")
