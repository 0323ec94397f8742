"""What torch's attention on Metal has to be given, so that all of its releases read it right."""

from __future__ import annotations

import torch
from torch import Tensor

FEW_QUERIES = 8  # up to so many, torch takes kernels of its own


def readable_mask(q: Tensor, mask: Tensor | None) -> Tensor | None:
    """`mask` [B or 1, heads or 1, N, K] for queries q [B, heads, N, D] on Metal, of the same meaning.

    The kernels for few queries of torch 2.8 to 2.12 walk over a mask by its heads alone, and read the first sample's for every
    sample where all heads share one (pytorch 184180). Queries that see nothing, such as those of padding, are NaN in older
    releases, and what is NaN in one layer makes all of its sample NaN in the next: these see everything, as nobody reads them.
    """
    if mask is None or mask.dim() != 4 or mask.shape[0] == 1:
        return mask
    if mask.dtype == torch.bool:
        mask = mask | ~mask.any(-1, keepdim=True)
    if q.shape[2] <= FEW_QUERIES and mask.shape[1] != q.shape[1]:
        mask = mask.expand(-1, q.shape[1], -1, -1).contiguous()
    return mask
