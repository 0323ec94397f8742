"""An identity's tokens as a picture, to see that two people differ and one person's pictures agree."""

from __future__ import annotations

import torch
from torch import Tensor

COLD, NEUTRAL, WARM = (0.16, 0.35, 0.80), (0.97, 0.97, 0.97), (0.80, 0.16, 0.18)


def draw_tokens(tokens: Tensor, width: int = 768, row: int = 16) -> Tensor:
    """Tokens [N, T, C] as one picture [1, H, width, 3] in 0..1: a row of `row` pixels per token, its values side by side.

    Blue is negative, white zero, red positive; full colour at the 99th percentile of the size of all values.
    """
    rows = tokens.detach().float().cpu().flatten(0, 1)
    limit = rows.abs().flatten().quantile(0.99).clamp_min(1e-12)
    columns = torch.nn.functional.interpolate(rows[None], size=width, mode="nearest")[0]
    value = (columns / limit).clamp(-1, 1)[..., None]
    cold, neutral, warm = (torch.tensor(c) for c in (COLD, NEUTRAL, WARM))
    colour = torch.where(value < 0, neutral + (neutral - cold) * value, neutral + (warm - neutral) * value)
    return colour.repeat_interleave(row, dim=0)[None]
