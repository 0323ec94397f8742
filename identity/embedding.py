"""From the face embeddings of one person to the two embeddings the resampler is given."""

from __future__ import annotations

import torch
from torch import Tensor

COMBINE_MODES = ("average", "norm average", "concat")

SEED_MODULUS = 1_000_000_007


def combine_embeddings(embeddings: Tensor, mode: str = "average") -> Tensor:
    """Several pictures of one person, [N, 1, D] raw embeddings, as one: [1, 1, D], or [N, 1, D] for "concat".

    "average" is the mean. "norm average" divides by the norm over the *pictures* (per feature) before the mean; that is
    what the field's node does and what shared workflows rely on. "concat" keeps all of them: 16 tokens each.
    Raises ValueError for another mode.
    """
    if mode not in COMBINE_MODES:
        raise ValueError(f"combine_embeds is {mode!r}; choose one of {', '.join(COMBINE_MODES)}.")
    if embeddings.shape[0] == 1 or mode == "concat":
        return embeddings
    if mode == "norm average":
        norm = torch.norm(embeddings, dim=0, keepdim=True)
        embeddings = embeddings / norm.where(norm > 0, 1)  # a feature that is 0 in every picture stays 0
    return embeddings.mean(dim=0, keepdim=True)


def unconditional_embedding(embedding: Tensor, noise: float) -> Tensor:
    """What the unconditional pass is given, same shape as `embedding`: zeros, or uniform noise in [0, noise).

    The seed is the integer part of the embedding's sum, so one person always gets the same noise. A private generator
    gives the numbers that the field's node draws after seeding torch globally, and leaves torch's alone.
    """
    embedding = embedding.detach().float().cpu()
    if noise <= 0:
        return torch.zeros_like(embedding)
    generator = torch.Generator().manual_seed(int(embedding.sum().item()) % SEED_MODULUS)
    return noise * torch.rand(embedding.shape, generator=generator)
