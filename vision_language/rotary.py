"""Rotary positions of pictures and clips as Qwen2-VL and Qwen2.5-VL were trained with them (arXiv:2409.12191, section 2.1).

What follows a picture or a clip begins after its largest position. Releases of transformers from 5.3 on let it begin after its
height and width instead, among the frames of a clip that lasts longer; those up to 5.5.3 move pictures of Qwen2.5-VL too, and
those before 5.24 cut the seconds between its frames to whole ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .embeddings import VisualItem

TRAINED_SO = ("qwen2_vl", "qwen2_5_vl")  # of others one grid is one frame, where all releases agree


def positions(kinds: Tensor, mask: Tensor, items: Sequence[VisualItem], merge: int, per_second: float | None) -> Tensor:
    """[3, B, T] long: time, row and column of every token; 0 where the mask is.

    kinds: [B, T], 0 for words, 1 for tokens of pictures, 2 for those of clips. items: all of them in order, grids in patches.
    merge: patches of a token along a side. per_second: positions of a second of a clip; None where each of its grids is one.
    """
    made = torch.zeros(3, *kinds.shape, dtype=torch.long)
    waiting = {kind: iter([item for item in items if item.kind == name]) for kind, name in ((1, "image"), (2, "video"))}
    for row, real in enumerate(mask.bool()):
        found, begin, at = kinds[row, real].tolist(), 0, 0
        parts: list[Tensor] = []
        while begin < len(found):
            kind = found[begin]
            if kind == 0:
                end = next((place for place in range(begin, len(found)) if found[place]), len(found))
                part = torch.arange(at, at + end - begin).expand(3, -1)
            else:
                part = at + _grid(next(waiting[kind]), merge, per_second if kind == 2 else None)
                end = begin + part.shape[1]
            parts.append(part)
            begin, at = end, int(part.max()) + 1
        made[:, row, real] = torch.cat(parts, dim=1)
    return made


@contextmanager
def given_to(inner: Any, axes: Tensor) -> Iterator[None]:
    """While inside, the library's network `inner` takes `axes`, [3, 1, T], for the positions of every row of a prompt."""

    def get_rope_index(input_ids: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        rows = len(input_ids)
        behind = int(axes.max()) + 1 - axes.shape[2]
        return axes.to(input_ids.device).expand(-1, rows, -1), input_ids.new_full((rows, 1), behind)

    inner.get_rope_index = get_rope_index
    try:
        yield
    finally:
        del inner.get_rope_index


def _grid(item: VisualItem, merge: int, per_second: float | None) -> Tensor:
    """[3, tokens] from 0 on."""
    times, rows, columns = item.grid[0], item.grid[1] // merge, item.grid[2] // merge
    time = torch.arange(times)
    if per_second is not None:
        time = (time * (per_second * item.step)).long()
    return torch.stack(torch.meshgrid(time, torch.arange(rows), torch.arange(columns), indexing="ij")).flatten(1)
