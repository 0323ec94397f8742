"""The highest numbers of rows, and where they stand, also where torch's own kernels for it are wrong.

Those of torch 2.13 for Intel's cards give numbers that are not the highest, places outside of the row, or end the process
(pytorch 191871, torch-xpu-ops 4303, 4312 and 4839), and some drivers make wrong code of the others (torch-xpu-ops 3777).
"""

from __future__ import annotations

from torch import Tensor

SORTED = ("xpu",)  # types of devices on which whole rows are sorted instead


def topk(rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` highest along the last dimension, highest first, and their places."""
    if rows.device.type in SORTED:
        values, places = rows.sort(dim=-1, descending=True)
        return values[..., :count], places[..., :count]
    values, places = rows.topk(count, dim=-1)
    return values, places
