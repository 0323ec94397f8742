"""One person, ready for attention: tokens, and the keys and values of every block, computed once.

Sampling needs neither the resampler nor the 1.4 GB of projections, only their result: 10.6 MB for SDXL at half
precision. It is kept on the CPU, copied to a device when sampling starts there and dropped when it ends.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import host
from ..cache import content_key, named_cache
from ..host import Managed, pinned_memory
from .adapter import InstantIDAdapter
from .embedding import combine_embeddings, unconditional_embedding

COND, UNCOND = 0, 1
CACHE_BYTES = 512 << 20  # about 45 people at half precision
ROOM = 12 << 30  # SDXL with a ControlNet in half precision, and what it computes with


class PreparedIdentity:
    """Tokens and per-block keys and values of one person. Immutable, apart from its copies on devices.

    cond, uncond: tokens [N, T, context_dim] on the CPU (N > 1 after "concat").
    Rows of `keys` and `values` are COND and UNCOND.
    """

    def __init__(self, cond: Tensor, uncond: Tensor, blocks: Sequence[tuple[Tensor, Tensor]]) -> None:
        self.cond = cond
        self.uncond = uncond
        # One flat tensor: one allocation and one copy per device instead of 140.
        self._shapes = [tuple(k.shape) for k, _ in blocks]
        self._master = _on_cpu(torch.cat([t.reshape(-1) for pair in blocks for t in pair]))
        self._copies: dict[tuple[torch.device, torch.dtype], list[tuple[Tensor, Tensor]]] = {}
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        return self._master.nbytes + self.cond.nbytes + self.uncond.nbytes

    @property
    def dtype(self) -> torch.dtype:
        """What the keys and values are kept in on the CPU."""
        return self._master.dtype

    def __len__(self) -> int:
        return len(self._shapes)

    def tokens(self, index: int) -> int:
        """Keys that block `index` has for this person."""
        return self._shapes[index][1]

    def keys_values(self, index: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values [2, T, width] of block `index` on `device` in `dtype`; row COND, row UNCOND."""
        with self._lock:
            copies = self._copies.get((device, dtype))
            if copies is None:
                copies = self._copies[(device, dtype)] = self._views(self._master.to(device=device, dtype=dtype))
        return copies[index]

    def _views(self, flat: Tensor) -> list[tuple[Tensor, Tensor]]:
        views: list[tuple[Tensor, Tensor]] = []
        at = 0
        for shape in self._shapes:
            size = shape[0] * shape[1] * shape[2]
            views.append((flat[at : at + size].view(shape), flat[at + size : at + 2 * size].view(shape)))
            at += 2 * size
        return views

    def __deepcopy__(self, _: dict[int, Any]) -> PreparedIdentity:
        """Itself: other packs copy the options of a MODEL deeply, and what never changes need not be held twice."""
        return self

    def drop_copies(self) -> None:
        """Give back what was copied for sampling; the next use copies again."""
        with self._lock:
            self._copies.clear()


def prepare(
    adapter: InstantIDAdapter,
    managed: Managed,
    embeddings: Tensor,
    combine: str = "average",
    noise: float = 0.0,
    dtype: torch.dtype = torch.float32,
) -> PreparedIdentity:
    """Tokens and keys and values for the face embeddings [N, 1, D] of one person, from the cache when it was done before.

    managed: the adapter in the host's memory management. It stays on a card with ROOM to spare, so that the next
    face need not wait for its weights, until the host needs the memory; elsewhere it leaves when this is done.
    combine, noise: see `embedding`. Raises ValueError when the embeddings are not of the width the adapter takes.
    """
    if embeddings.shape[-1] != adapter.embedding_dim:
        raise ValueError(
            f"The face embeddings are {embeddings.shape[-1]} wide, {adapter.name} takes {adapter.embedding_dim}: use the "
            "face model the adapter was trained with (antelopev2 for InstantID)."
        )
    if not torch.isfinite(embeddings).all():
        raise ValueError("The face embeddings hold values that are not finite (NaN); use another picture of the face.")
    computed_in = next(adapter.parameters()).dtype
    key = content_key("instantid", adapter.fingerprint, computed_in, embeddings, combine, float(noise), dtype)
    cache = named_cache("InstantID identities", CACHE_BYTES)
    return cache.get_or_compute(key, lambda: _compute(adapter, managed, embeddings, combine, noise, dtype))


@torch.no_grad()
def _compute(
    adapter: InstantIDAdapter, managed: Managed, embeddings: Tensor, combine: str, noise: float, dtype: torch.dtype
) -> PreparedIdentity:
    embedding = combine_embeddings(embeddings.float().cpu(), combine)
    unconditional = unconditional_embedding(embedding, noise)
    with managed.resident(keep=_has_room(managed)) as network:
        weights = next(network.parameters())
        faces = [e.to(weights.device, weights.dtype) for e in (embedding, unconditional)]
        # A card waits for Python here, so both go through together. Elsewhere each goes on its own: a larger batch may round
        # differently, and goldens are compared to the last digits.
        together = weights.is_cuda
        if together:
            cond, uncond = network.image_proj_model(torch.cat(faces)).chunk(2)
        else:
            cond, uncond = (network.image_proj_model(face) for face in faces)
        # [N, T, C] becomes one sequence of N * T tokens, as attention has always read it.
        tokens = torch.stack((cond.flatten(0, 1), uncond.flatten(0, 1)))
        blocks = []
        for index in adapter.numbers:
            if together:
                keys, values = network.project(index, tokens)
            else:
                keys, values = (torch.stack(t) for t in zip(*(network.project(index, t) for t in tokens), strict=True))
            blocks.append((keys.to(dtype), values.to(dtype)))
        made = PreparedIdentity(cond.to("cpu", dtype), uncond.to("cpu", dtype), blocks)
    return made


def _has_room(managed: Managed) -> bool:
    """Whether the adapter may stay on its device: a card that keeps ROOM free beside it."""
    if managed.device.type != "cuda":
        return False
    size = sum(parameter.nbytes for parameter in managed.module.parameters())
    return host.current().free_memory(managed.device) > ROOM + size


def _on_cpu(flat: Tensor) -> Tensor:
    """A copy on the CPU, by way of memory that a card copies to at full speed and that torch keeps for the next one."""
    if not flat.is_cuda:
        return flat.cpu()
    return pinned_memory.empty(flat.shape, flat.dtype).copy_(flat).clone()
