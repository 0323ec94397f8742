"""The best match of every feature of one picture among the features of another, without their correlation matrix.

Deep Exemplar asks for softmax(theta . phi / 1e-10), which is the argmax. A flipped argmax changes 4x4 pixels and the
statistics of the whole frame after them, so the search is exact: `best_match` multiplies tile by tile in float32 and
keeps the running maximum; `best_match_fused` finds in half precision, in two Triton kernels, which groups of keys can hold
the best, and lets float32 decide among them.
"""

from __future__ import annotations

import logging
import time
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .capabilities import FUSES, float32_products, on_device, one_line, padded

log = logging.getLogger("hotpath.attention")

QUERY_TILE = 4096
KEY_TILE = 8192
GROUP = 64  # keys of which the fused search keeps one number
SETTLED = 32  # queries for which it decides together
PROGRAMS = 1024
MAXIMA = 1 << 28  # bytes of them held at a time
# Twice what half precision can move a product of unit vectors by: 2^-11 of each factor, and the sum's own rounding.
DOUBT = 2 * (2**-10 + 2**-15)


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


def best_match_fused(theta: Tensor, phi: Tensor) -> tuple[Tensor, Tensor]:
    """The same as `best_match` for rows of at most unit length, by the kernels of `best_match_kernel`. No waiting.

    Half-precision products keep of every group of keys the highest. Rounding moves a product of unit vectors by less than
    DOUBT / 2, so the best key lies in a group whose maximum is at most DOUBT under the highest; those are multiplied again
    in float32. Peak memory beside copies of the features: 3/2 of MAXIMA bytes, or of 128 queries' maxima if that is more.
    """
    import triton

    theta, phi = theta.contiguous(), phi.contiguous()
    half_theta, half_phi = theta.half(), phi.half()
    score = torch.empty(len(theta), dtype=torch.float32, device=theta.device)
    index = torch.empty(len(theta), dtype=torch.long, device=theta.device)
    together = max(1, MAXIMA // (4 * triton.cdiv(len(phi), GROUP)) // 128) * 128
    with on_device(theta.device):
        for first in range(0, len(theta), together):
            rows = slice(first, first + together)
            _match_rows(theta[rows], phi, half_theta[rows], half_phi, score[rows], index[rows])
    return score, index


def _match_rows(theta: Tensor, phi: Tensor, half_theta: Tensor, half_phi: Tensor, score: Tensor, index: Tensor) -> None:
    """`best_match_fused` of as many queries as are searched together, written into score and index."""
    import triton

    from .best_match_kernel import group_maxima, settle

    queries, keys, channels = len(theta), len(phi), theta.shape[1]
    groups = triton.cdiv(keys, GROUP)
    maxima = torch.empty(groups, queries, dtype=torch.float32, device=theta.device)
    form = maxima_form(channels, shared_memory(theta.device))
    blocks, steps = triton.cdiv(queries, form["QUERIES"]), triton.cdiv(keys, form["KEYS"])
    # Enough programs for every multiprocessor, and each with as long a run of keys as that leaves.
    form["STEPS"] = triton.cdiv(steps, max(1, min(steps, PROGRAMS // blocks)))
    group_maxima[(blocks, triton.cdiv(steps, form["STEPS"]))](
        half_theta, half_phi, maxima, queries, keys, groups, channels, **form, **FUSES
    )
    tiles = triton.cdiv(queries, SETTLED)
    doubtful = F.pad(maxima >= maxima.amax(0) - DOUBT, (0, tiles * SETTLED - queries))
    doubtful = doubtful.view(groups, tiles, SETTLED).any(2).T.contiguous()
    order = doubtful.to(torch.uint8).sort(dim=1, descending=True, stable=True).indices.to(torch.int32)
    settle[(tiles,)](
        theta, phi, order, doubtful.sum(1, dtype=torch.int32), score, index, queries, keys, groups, channels,
        **settle_form(channels, float32_products(theta.device)), **FUSES,
    )  # fmt: skip


def maxima_form(channels: int, shared: int) -> dict[str, int]:
    """What `group_maxima` is compiled for. shared: bytes of shared memory that a program may have."""
    width = padded(channels)
    if 2 * width * (128 + 2 * 128) <= shared:
        block, step, warps, stages = 128, 128, 8, 2
    elif 2 * width * (64 + 2 * 64) <= shared:
        block, step, warps, stages = 64, 64, 4, 2
    else:  # AMD's, among others, whose registers are fewer too
        block, step, warps, stages = 32, 64, 8, 1
    return {
        "QUERIES": block, "KEYS": step, "GROUP": GROUP, "CHANNELS": width, "num_warps": warps, "num_stages": stages,
    }  # fmt: skip


def settle_form(channels: int, precision: str) -> dict[str, Any]:
    """What `settle` is compiled for."""
    width = padded(channels)
    return {
        "QUERIES": SETTLED, "GROUP": GROUP, "CHANNELS": width, "CHUNK": min(width, 32), "PRECISION": precision,
        "num_warps": 4, "num_stages": 2,
    }  # fmt: skip


def shared_memory(device: torch.device) -> int:
    """Bytes that a program of `device` may have; a consumer card's where torch does not say."""
    if device.type != "cuda":
        return 99 << 10
    return int(getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 64 << 10))


# What was found on this machine, by device and size: (the kernel is faster, sentence).
_measured: dict[tuple[int, int, int, int], tuple[bool, str]] = {}


class MeasuredMatch:
    """The faster of the two searches on CUDA, found by timing both at the first call of a size; `best_match` elsewhere.

    Which is faster hangs on the card's float32 speed and on how alike a picture's places are. `status` says which one runs
    and why.
    """

    def __init__(self) -> None:
        self.status = "not run yet"

    def __call__(self, theta: Tensor, phi: Tensor) -> tuple[Tensor, Tensor]:
        if theta.device.type != "cuda":
            self.status = f"tiled float32: the kernel is for CUDA, this is {theta.device.type}"
            return best_match(theta, phi)
        case = (theta.device.index or 0, len(theta), len(phi), theta.shape[1])
        if case not in _measured:
            _measured[case] = self._measure(theta, phi)
        fused, self.status = _measured[case]
        return best_match_fused(theta, phi) if fused else best_match(theta, phi)

    def _measure(self, theta: Tensor, phi: Tensor) -> tuple[bool, str]:
        """Whether the kernel is faster here and gives the same, and the sentence that says so."""
        seconds, scores = [], []
        for search in (best_match, best_match_fused):
            try:
                score, _ = search(theta, phi)
                torch.cuda.synchronize(theta.device)
                start = time.perf_counter()
                search(theta, phi)
                torch.cuda.synchronize(theta.device)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # Triton is not installed, or does not know this card
                status = f"tiled float32: the kernel does not run ({one_line(error)})"
                log.warning("match of %s: %s", _size(theta, phi), status)
                return False, status
            seconds.append(time.perf_counter() - start)
            scores.append(score)
        if not torch.allclose(scores[0], scores[1], rtol=0, atol=1e-5, equal_nan=True):
            status = "tiled float32: the kernel gives other scores on this card"
            log.warning("match of %s: %s", _size(theta, phi), status)
            return False, status
        faster = seconds[1] < seconds[0]
        name = "fused kernel, half precision first, float32 decides" if faster else "tiled float32"
        status = f"{name}: {1000 * min(seconds):.1f} ms, the other way {1000 * max(seconds):.1f} ms, both exact"
        log.info("match of %s: %s", _size(theta, phi), status)
        return faster, status


def _size(theta: Tensor, phi: Tensor) -> str:
    return f"{len(theta)} by {len(phi)} features of {theta.shape[1]}"


def best_match_reference(theta: Tensor, phi: Tensor) -> tuple[Tensor, Tensor]:
    """The definition, with the whole matrix."""
    found = (theta @ phi.T).max(dim=1)
    return found.values, found.indices
