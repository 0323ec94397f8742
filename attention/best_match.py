"""The best match of every feature of one picture among the features of another, without their correlation matrix.

Deep Exemplar asks for softmax(theta . phi / 1e-10), which is the argmax. A flipped argmax changes 4x4 pixels and the
statistics of the whole frame after them, so the search is exact: `best_match` multiplies tile by tile in float32 and
keeps the running maximum; `best_match_prefiltered` looks for candidates in half precision first, scores those again
in float32, and repeats in float32 whatever the rounding leaves in doubt.
"""

from __future__ import annotations

import logging
import time

import torch
from torch import Tensor

log = logging.getLogger("hotpath.attention")

QUERY_TILE = 4096
KEY_TILE = 8192
CANDIDATES = 8


def best_match(
    theta: Tensor, phi: Tensor, query_tile: int = QUERY_TILE, key_tile: int = KEY_TILE
) -> tuple[Tensor, Tensor]:
    """theta [N, C], phi [M, C], float32. Returns each row's highest product with a row of phi, [N], and which, [N].

    Of equal products the first counts. The largest temporary is query_tile x key_tile float32.
    """
    score = theta.new_empty(len(theta))
    index = torch.empty(len(theta), dtype=torch.long, device=theta.device)
    for first in range(0, len(theta), query_tile):
        rows = slice(first, first + query_tile)
        best, where = _tile_maximum(theta[rows], phi[:key_tile])
        for start in range(key_tile, len(phi), key_tile):
            found, place = _tile_maximum(theta[rows], phi[start : start + key_tile])
            better = found > best
            best = torch.where(better, found, best)
            where = torch.where(better, place + start, where)
        score[rows], index[rows] = best, where
    return score, index


def _tile_maximum(theta: Tensor, phi: Tensor) -> tuple[Tensor, Tensor]:
    found = (theta @ phi.T).max(dim=1)
    return found.values, found.indices


def best_match_prefiltered(
    theta: Tensor, phi: Tensor, dtype: torch.dtype = torch.float16, candidates: int = CANDIDATES
) -> tuple[Tensor, Tensor]:
    """The same as `best_match` for rows of unit length, with most of the arithmetic in `dtype`.

    Rounding both rows to `dtype` and the product once more moves a product of unit vectors by less than the bound
    below. So when the last candidate lies further than twice the bound under the best one, nothing outside the
    candidates can win, and the candidates' float32 products decide. The other rows are matched again in float32.
    """
    doubt = 2 * 4 * torch.finfo(dtype).eps
    half_phi = phi.to(dtype)
    score = theta.new_empty(len(theta))
    index = torch.empty(len(theta), dtype=torch.long, device=theta.device)
    settled = torch.empty(len(theta), dtype=torch.bool, device=theta.device)
    for first in range(0, len(theta), QUERY_TILE):
        rows = slice(first, first + QUERY_TILE)
        rough, where = _half_candidates(theta[rows].to(dtype), half_phi, candidates)
        exact = torch.einsum("nc,nkc->nk", theta[rows], phi[where])
        # Lowest index first, so that `max` settles ties as `best_match` does.
        where, order = where.sort(dim=1)
        found = exact.gather(1, order).max(dim=1)
        score[rows] = found.values
        index[rows] = where.gather(1, found.indices[:, None])[:, 0]
        settled[rows] = (rough[:, 0] - rough[:, -1] > doubt) | (where.shape[1] == len(phi))
    open_rows = (~settled).nonzero()[:, 0]
    if len(open_rows):
        score[open_rows], index[open_rows] = best_match(theta[open_rows], phi)
    return score, index


def _half_candidates(theta: Tensor, phi: Tensor, candidates: int) -> tuple[Tensor, Tensor]:
    best: Tensor | None = None
    index: Tensor | None = None
    for start in range(0, len(phi), KEY_TILE):
        found = (theta @ phi[start : start + KEY_TILE].T).float()
        values, where = found.topk(min(candidates, found.shape[1]), dim=1)
        where = where + start
        if best is not None and index is not None:
            values = torch.cat((best, values), dim=1)
            where = torch.cat((index, where), dim=1)
            values, order = values.topk(min(candidates, values.shape[1]), dim=1)
            where = where.gather(1, order)
        best, index = values, where
    assert best is not None and index is not None
    return best, index


# What was found on this machine, by device and size: (half-precision candidates are faster, sentence).
_measured: dict[tuple[int, int, int, int], tuple[bool, str]] = {}


class MeasuredMatch:
    """The faster of the two searches on CUDA, found by timing both at the first call of a size; `best_match` elsewhere.

    Which is faster hangs on the card's float32 speed. `status` says which one runs and why.
    """

    def __init__(self) -> None:
        self.status = "not run yet"

    def __call__(self, theta: Tensor, phi: Tensor) -> tuple[Tensor, Tensor]:
        if theta.device.type != "cuda":
            self.status = f"tiled float32: half-precision candidates are for CUDA, this is {theta.device.type}"
            return best_match(theta, phi)
        case = (theta.device.index or 0, len(theta), len(phi), theta.shape[1])
        if case not in _measured:
            _measured[case] = self._measure(theta, phi)
        prefilter, self.status = _measured[case]
        return best_match_prefiltered(theta, phi) if prefilter else best_match(theta, phi)

    def _measure(self, theta: Tensor, phi: Tensor) -> tuple[bool, str]:
        """Whether the half-precision candidates are faster here, and the sentence that says so."""
        seconds = []
        for search in (best_match, best_match_prefiltered):
            search(theta, phi)
            torch.cuda.synchronize(theta.device)
            start = time.perf_counter()
            search(theta, phi)
            torch.cuda.synchronize(theta.device)
            seconds.append(time.perf_counter() - start)
        faster = seconds[1] < seconds[0]
        name = "half-precision candidates, float32 decision" if faster else "tiled float32"
        status = f"{name}: {1000 * min(seconds):.1f} ms, the other way {1000 * max(seconds):.1f} ms, both exact"
        log.info("match of %s: %s", _size(theta, phi), status)
        return faster, status


def _size(theta: Tensor, phi: Tensor) -> str:
    return f"{len(theta)} by {len(phi)} features of {theta.shape[1]}"


def best_match_reference(theta: Tensor, phi: Tensor) -> tuple[Tensor, Tensor]:
    """The definition, with the whole matrix."""
    found = (theta @ phi.T).max(dim=1)
    return found.values, found.indices
