"""The perceiver resampler that turns a face embedding into image-prompt tokens.

Alayrac et al., "Flamingo" (2022), section 3.1, in the form IP-Adapter-Plus and InstantID ship it: latent queries attend
to the embedding and to themselves, then a feed-forward layer, `depth` times. Module names are the checkpoint's keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

HEAD_DIM = 64  # not in the file; the same in every published resampler


class PerceiverAttention(nn.Module):
    """Latents [B, Q, D] attend to the features [B, N, D] and to themselves."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        inner = heads * HEAD_DIM
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_kv = nn.Linear(dim, inner * 2, bias=False)
        self.to_out = nn.Linear(inner, dim, bias=False)

    def forward(self, features: Tensor, latents: Tensor) -> Tensor:
        features, latents = self.norm1(features), self.norm2(latents)
        q = self._split(self.to_q(latents))
        k, v = (self._split(t) for t in self.to_kv(torch.cat((features, latents), dim=-2)).chunk(2, dim=-1))
        # Scaling q and k each by d^-1/4 keeps the product inside half precision's range.
        scale = HEAD_DIM**-0.25
        weights = ((q * scale) @ (k * scale).transpose(-2, -1)).float().softmax(dim=-1).to(v.dtype)
        return self.to_out((weights @ v).transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, HEAD_DIM)).transpose(1, 2)


def feed_forward(dim: int, inner: int) -> nn.Sequential:
    return nn.Sequential(
        nn.LayerNorm(dim), nn.Linear(dim, inner, bias=False), nn.GELU(), nn.Linear(inner, dim, bias=False)
    )


class Resampler(nn.Module):
    """Face embeddings [B, N, embedding_dim] -> tokens [B, queries, output_dim]. Widths come from `from_state`."""

    def __init__(
        self, dim: int, depth: int, heads: int, queries: int, embedding_dim: int, output_dim: int, inner: int
    ) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(1, queries, dim) / dim**0.5)
        self.proj_in = nn.Linear(embedding_dim, dim)
        self.proj_out = nn.Linear(dim, output_dim)
        self.norm_out = nn.LayerNorm(output_dim)
        self.layers = nn.ModuleList(
            nn.ModuleList((PerceiverAttention(dim, heads), feed_forward(dim, inner))) for _ in range(depth)
        )

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> Resampler:
        """The resampler whose widths and depth are those of `state`, loaded strictly.

        Raises KeyError for a missing key and RuntimeError for keys or shapes that do not fit.
        """
        if state["latents"].ndim != 3 or state["proj_in.weight"].ndim != 2:
            found = {key: tuple(state[key].shape) for key in ("latents", "proj_in.weight")}
            raise RuntimeError(f"latents must be [1, queries, dim] and proj_in.weight [dim, embedding], not {found}")
        _, queries, dim = state["latents"].shape
        # Counted, not taken from the highest number: a gap is then a missing key, and a huge number costs nothing.
        depth = len({key.split(".")[1] for key in state if key.startswith("layers.")})
        with torch.device("meta"):
            net = cls(
                dim=dim,
                depth=depth,
                heads=state["layers.0.0.to_q.weight"].shape[0] // HEAD_DIM,
                queries=queries,
                embedding_dim=state["proj_in.weight"].shape[1],
                output_dim=state["proj_out.weight"].shape[0],
                inner=state["layers.0.1.1.weight"].shape[0],
            )
        net.load_state_dict(dict(state), strict=True, assign=True)
        return net

    @property
    def embedding_dim(self) -> int:
        return self.proj_in.in_features

    @property
    def output_dim(self) -> int:
        return self.proj_out.out_features

    def forward(self, embedding: Tensor) -> Tensor:
        latents = self.latents.expand(embedding.shape[0], -1, -1)
        features = self.proj_in(embedding)
        for layer in self.layers:
            attention, feed = cast(nn.ModuleList, layer)
            latents = attention(features, latents) + latents
            latents = feed(latents) + latents
        return self.norm_out(self.proj_out(latents))
