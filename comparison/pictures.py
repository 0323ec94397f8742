"""What differs between two pictures, to look at."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .pair import FAILED, PASSED, Pair

if TYPE_CHECKING:
    from PIL import Image, ImageDraw, ImageFont

    Font = ImageFont.ImageFont | ImageFont.FreeTypeFont

GAIN = 8  # a difference of an eighth of the range is shown at its brightest
# From no difference to the largest: readable in grey and with any colour vision, as values rise in lightness.
RAMP = ((0.02, 0.02, 0.05), (0.28, 0.06, 0.42), (0.72, 0.21, 0.33), (0.98, 0.55, 0.04), (0.99, 1.0, 0.64))
INK, PAPER, DIM = (27, 28, 31), (247, 246, 243), (99, 102, 109)
STATE_INK = {PASSED: (29, 122, 70), FAILED: (179, 38, 30)}
GAP = 8
NARROWEST = 620  # pixels a side-by-side needs for its caption
READABLE = 1240  # pixels of width from which its caption grows with it, as it is looked at reduced


def difference_map(a: Tensor, b: Tensor) -> Tensor:
    """The largest difference of the channels of two pictures [H, W, 3], times `GAIN`, as colours [H, W, 3]."""
    value = ((a - b).abs().amax(-1) * GAIN).clamp(0, 1) * (len(RAMP) - 1)
    ramp = torch.tensor(RAMP)
    low = value.long().clamp_max(len(RAMP) - 2)
    part = (value - low)[..., None]
    return ramp[low] * (1 - part) + ramp[low + 1] * part


def side_by_side(pair: Pair, label_a: str = "A", label_b: str = "B", longest: int | None = None) -> Tensor:
    """A, B and the difference map next to each other with a caption, [H, W, 3]; where sizes differ, without the map.

    longest: reduce each of the three to this many pixels, if it is larger.
    """
    from PIL import Image, ImageDraw

    panels = [(label_a, as_image(pair.a)), (label_b, as_image(pair.b))]
    if pair.measures is not None:
        panels.append((f"difference x{GAIN}", as_image(difference_map(pair.a, pair.b))))
    if longest is not None:
        for _, panel in panels:
            panel.thumbnail((longest, longest))
    wide = sum(p.width for _, p in panels)
    unit = max(1.0, wide / READABLE)
    font, small = _font(round(15 * unit)), _font(round(13 * unit))
    gap, line = round(GAP * unit), round(22 * unit)
    height, top = max(p.height for _, p in panels), round(28 * unit)
    below = top + height + round(6 * unit)
    size = max(wide + gap * (len(panels) + 1), NARROWEST), below + 3 * line + gap
    canvas = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(canvas)
    x = gap
    for label, panel in panels:
        canvas.paste(panel, (x, top))
        # The last one has the rest of the picture to itself.
        room = canvas.width - x - gap if panel is panels[-1][1] else panel.width
        # Settings and paths differ at their ends.
        draw.text((x, round(6 * unit)), _cut(draw, label, small, room, at_end=False), fill=DIM, font=small)
        x += panel.width + gap
    room = canvas.width - 2 * gap
    heading = _cut(draw, f"{pair.state}: {pair.name}", font, room)
    draw.text((gap, below), heading, fill=STATE_INK.get(pair.state, INK), font=font)
    for number, said in enumerate((pair.numbers(), "  ".join(pair.failures)), 1):
        draw.text((gap, below + number * line), _cut(draw, said, small, room), fill=INK, font=small)
    return torch.from_numpy(np.asarray(canvas, np.float32) / 255)


def stacked(pictures: list[Tensor]) -> Tensor:
    """Pictures [H, W, 3] below each other, as wide as the widest."""
    width = max(p.shape[1] for p in pictures)
    paper = torch.tensor(PAPER) / 255
    rows = []
    for picture in pictures:
        row = paper.expand(picture.shape[0], width, 3).clone()
        row[:, : picture.shape[1]] = picture
        rows.append(row)
    return torch.cat(rows)


def as_image(picture: Tensor) -> Image.Image:
    """[H, W, C] in 0..1 as a PIL picture; what is not finite is black."""
    from PIL import Image

    plain = picture.detach().float().cpu()[..., :3].nan_to_num(0, 0, 0).clamp(0, 1)
    plain = plain.expand(*plain.shape[:2], 3)
    return Image.fromarray((plain.numpy() * 255).round().astype(np.uint8))


def _font(size: int) -> Font:
    from PIL import ImageFont

    return ImageFont.load_default(size)


def _cut(draw: ImageDraw.ImageDraw, text: str, font: Font, room: int, at_end: bool = True) -> str:
    """As much of `text`, on one line, as fits into `room` pixels, of its start or else of its end."""
    shown = text = " ".join(text.splitlines())
    while text and draw.textlength(shown, font=font) > room:
        text = text[:-1] if at_end else text[1:]
        shown = f"{text}..." if at_end else f"...{text}"
    return shown
