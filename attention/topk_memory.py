"""Reading a memory of keys by their 30 nearest, without the matrix of all keys against all queries.

The similarity is XMem's (Cheng and Schwing 2022, section 3.2): an anisotropic squared distance, s / sqrt(C) times
-sum(e k^2) + 2 sum(e k q) - sum(e q^2), with shrinkage s per key and selection e per query. `read_top_k` goes over
tiles of queries and keys and keeps the best so far; `read_top_k_reference` is the definition with the whole matrix.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

QUERY_TILE = 2048
KEY_TILE = 8192  # QUERY_TILE x KEY_TILE float32 products are 64 MiB


@dataclass
class MemoryReading:
    """readout [Q, V]; usage [N], how much weight each key got from all queries; nearest [Q], the best similarity, at
    most 0, and 0 for a key equal to the query."""

    readout: Tensor
    usage: Tensor
    nearest: Tensor


def similarity(query: Tensor, selection: Tensor, keys: Tensor, shrinkage: Tensor) -> Tensor:
    """[Q, N] similarities. query, selection [Q, C]; keys [N, C]; shrinkage [N]; all float32."""
    weighted = torch.cat((-selection, 2 * query * selection), dim=1)
    products = weighted @ torch.cat((keys.square(), keys), dim=1).T
    own = (selection * query.square()).sum(1, keepdim=True)
    return (products - own) * (shrinkage * query.shape[1] ** -0.5)


def read_top_k(
    query: Tensor,
    selection: Tensor,
    keys: Tensor,
    shrinkage: Tensor,
    values: Tensor,
    top_k: int,
    query_tile: int = QUERY_TILE,
    key_tile: int = KEY_TILE,
) -> MemoryReading:
    """Each query's `top_k` nearest keys, softmax over them, and their values weighted by it.

    query, selection [Q, C] float32; keys [N, C] float32; shrinkage [N] float32; values [N, V] of any float dtype.
    The largest temporary is query_tile x key_tile float32. The softmax subtracts the maximum: far keys, whose
    exponentials all vanish in float32, still give weights that add up to 1.
    """
    usage = torch.zeros(len(keys), dtype=torch.float32, device=keys.device)
    readout = values.new_empty(len(query), values.shape[1])
    nearest = torch.empty(len(query), dtype=torch.float32, device=keys.device)
    for first in range(0, len(query), query_tile):
        rows = slice(first, first + query_tile)
        best, index = _nearest(query[rows], selection[rows], keys, shrinkage, top_k, key_tile)
        weights = best.softmax(dim=1)
        nearest[rows] = best[:, 0]
        usage.scatter_add_(0, index.flatten(), weights.flatten())
        readout[rows] = F.embedding_bag(index, values, mode="sum", per_sample_weights=weights.to(values.dtype))
    return MemoryReading(readout, usage, nearest)


def _nearest(
    query: Tensor, selection: Tensor, keys: Tensor, shrinkage: Tensor, top_k: int, key_tile: int
) -> tuple[Tensor, Tensor]:
    """The `top_k` highest similarities of each query, highest first, and the keys they belong to."""
    best: Tensor | None = None
    index: Tensor | None = None
    for first in range(0, len(keys), key_tile):
        tile = slice(first, first + key_tile)
        found = similarity(query, selection, keys[tile], shrinkage[tile])
        values, where = found.topk(min(top_k, found.shape[1]), dim=1)
        where = where + first
        if best is None or index is None:
            best, index = values, where
            continue
        best = torch.cat((best, values), dim=1)
        best, order = best.topk(min(top_k, best.shape[1]), dim=1)
        index = torch.cat((index, where), dim=1).gather(1, order)
    if best is None or index is None:
        raise ValueError("The memory is empty: remember a frame or a reference before reading.")
    return best, index


def read_top_k_reference(
    query: Tensor, selection: Tensor, keys: Tensor, shrinkage: Tensor, values: Tensor, top_k: int
) -> MemoryReading:
    """The definition: the whole matrix, zero but for the top entries of each query, times all values."""
    distance = (selection[:, None] * (keys[None] - query[:, None]).square()).sum(2)
    scores = -distance * shrinkage / query.shape[1] ** 0.5
    best, index = scores.topk(min(top_k, len(keys)), dim=1)
    affinity = torch.zeros_like(scores).scatter_(1, index, best.softmax(dim=1))
    return MemoryReading((affinity @ values.float()).to(values.dtype), affinity.sum(0), best[:, 0])
