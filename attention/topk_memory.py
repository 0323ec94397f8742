"""Reading a memory of keys by their 30 nearest, without the matrix of all keys against all queries.

The similarity is XMem's (Cheng and Schwing 2022, section 3.2): an anisotropic squared distance, s / sqrt(C) times
-sum(e k^2) + 2 sum(e k q) - sum(e q^2), with shrinkage s per key and selection e per query. `read_top_k` goes over
tiles of queries; `read_top_k_reference` is the definition with the whole matrix.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .topk import topk

SIMILARITIES = 1 << 25  # held at a time: 128 MiB of float32
GROUP = 32
WITHOUT_BAGS = ("mps",)  # until torch 2.10


@dataclass
class MemoryReading:
    """readout [Q, V]; usage [N], how much weight each key got from all queries; nearest [Q], the best similarity, at
    most 0, and 0 for a key equal to the query."""

    readout: Tensor
    usage: Tensor
    nearest: Tensor


def similarity(query: Tensor, selection: Tensor, keys: Tensor, shrinkage: Tensor) -> Tensor:
    """[Q, N] similarities. query, selection [Q, C]; keys [N, C]; shrinkage [N]; all float32."""
    return _query_side(query, selection) @ _key_side(keys, shrinkage).T


def _query_side(query: Tensor, selection: Tensor) -> Tensor:
    own = (selection * query.square()).sum(1, keepdim=True)
    return _aligned(-selection, 2 * query * selection, -own) * query.shape[1] ** -0.5


def _key_side(keys: Tensor, shrinkage: Tensor) -> Tensor:
    """All of the formula in one product: the shrinkage belongs to the key, so it can go inside."""
    scale = shrinkage[:, None]
    return _aligned(keys.square() * scale, keys * scale, scale)


def _aligned(*parts: Tensor) -> Tensor:
    """Side by side, and zeros up to whole 16 bytes: rows that begin anywhere cost a matrix product its wide loads."""
    missing = -sum(part.shape[1] for part in parts) % 4
    return torch.cat((*parts, parts[-1].new_zeros(len(parts[-1]), missing)), dim=1)


def read_top_k(
    query: Tensor,
    selection: Tensor,
    keys: Tensor,
    shrinkage: Tensor,
    values: Tensor,
    top_k: int,
    similarities: int = SIMILARITIES,
) -> MemoryReading:
    """Each query's `top_k` nearest keys, softmax over them, and their values weighted by it.

    query, selection [Q, C] float32; keys [N, C] float32; shrinkage [N] float32; values [N, V] of any float dtype.
    The largest temporary has `similarities` float32, or N if that is more. The softmax subtracts the maximum: far
    keys, whose exponentials all vanish in float32, still give weights that add up to 1.
    """
    if len(keys) == 0:
        raise ValueError("The memory is empty: remember a frame or a reference before reading.")
    usage = torch.zeros(len(keys), dtype=torch.float32, device=keys.device)
    readout = values.new_empty(len(query), values.shape[1])
    nearest = torch.empty(len(query), dtype=torch.float32, device=keys.device)
    key_side = _key_side(keys, shrinkage).T
    tile = max(1, similarities // len(keys))
    for first in range(0, len(query), tile):
        rows = slice(first, first + tile)
        scores = _query_side(query[rows], selection[rows]) @ key_side
        best, index = highest(scores, min(top_k, len(keys)))
        weights = best.softmax(dim=1)
        nearest[rows] = best[:, 0]
        usage.scatter_add_(0, index.flatten(), weights.flatten())
        readout[rows] = _weighted(values, index, weights.to(values.dtype), similarities)
    return MemoryReading(readout, usage, nearest)


def _weighted(values: Tensor, index: Tensor, weights: Tensor, numbers: int) -> Tensor:
    """Sums [Q, V] of the rows `index` [Q, K] of values [N, V], times weights [Q, K]."""
    if values.device.type in WITHOUT_BAGS:
        return weighted_by_gathering(values, index, weights, numbers)
    return F.embedding_bag(index, values, mode="sum", per_sample_weights=weights)


def weighted_by_gathering(values: Tensor, index: Tensor, weights: Tensor, numbers: int) -> Tensor:
    """The same where torch has no embedding bags: at most `numbers` gathered numbers at a time, or one query's."""
    queries = max(1, numbers // max(1, index.shape[1] * values.shape[1]))
    return torch.cat(
        [
            torch.einsum("qk,qkv->qv", share, values[chosen])
            for chosen, share in zip(index.split(queries), weights.split(queries), strict=True)
        ]
    )


def highest(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """`topk` for long rows: [Q, N] to two [Q, count], highest first.

    The highest `count` of a row lie in the `count` groups with the highest maxima: were one in another group, each of
    those groups would hold a higher one. So a pass of maxima, which is as fast as memory, leaves count * GROUP
    candidates to sort.
    """
    whole = scores.shape[1] // GROUP
    if whole <= 2 * count:
        return topk(scores, count)
    maxima = scores[:, : whole * GROUP].unflatten(1, (whole, GROUP)).amax(dim=2)
    chosen = topk(maxima, count)[1]
    within = torch.arange(GROUP, device=scores.device)
    candidates = (chosen[:, :, None] * GROUP + within).flatten(1)
    rest = torch.arange(whole * GROUP, scores.shape[1], device=scores.device)
    candidates = torch.cat((candidates, rest.expand(len(scores), -1)), dim=1)
    values, places = topk(scores.gather(1, candidates), count)
    return values, candidates.gather(1, places)


def read_top_k_reference(
    query: Tensor, selection: Tensor, keys: Tensor, shrinkage: Tensor, values: Tensor, top_k: int
) -> MemoryReading:
    """The definition: the whole matrix, zero but for the top entries of each query, times all values."""
    distance = (selection[:, None] * (keys[None] - query[:, None]).square()).sum(2)
    scores = -distance * shrinkage / query.shape[1] ** 0.5
    best, index = topk(scores, min(top_k, len(keys)))
    affinity = torch.zeros_like(scores).scatter_(1, index, best.softmax(dim=1))
    return MemoryReading((affinity @ values.float()).to(values.dtype), affinity.sum(0), best[:, 0])
