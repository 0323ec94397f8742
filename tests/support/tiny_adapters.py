"""InstantID adapters of a few numbers, their files, and the tokens that the formula gives."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from hotpath.identity import InstantIDAdapter
from torch import Tensor

State = dict[str, Tensor]

WIDTHS = (32, 48, 32)


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_state(
    dim: int = 48,
    depth: int = 2,
    heads: int = 2,
    queries: int = 16,
    faces: int = 24,
    context: int = 64,
    inner: int = 96,
    widths: tuple[int, ...] = WIDTHS,
    seed: int = 0,
) -> dict[str, State]:
    """What an ip-adapter.bin holds, in any size."""
    generator = rng(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) / math.sqrt(shape[-1])

    def norm(prefix: str, width: int) -> State:
        return {f"{prefix}.weight": 1 + 0.2 * noise(width), f"{prefix}.bias": noise(width)}

    resampler: State = {
        "latents": noise(1, queries, dim),
        "proj_in.weight": noise(dim, faces),
        "proj_in.bias": noise(dim),
        "proj_out.weight": noise(context, dim),
        "proj_out.bias": noise(context),
        **norm("norm_out", context),
    }
    for layer in range(depth):
        resampler |= {
            **norm(f"layers.{layer}.0.norm1", dim),
            **norm(f"layers.{layer}.0.norm2", dim),
            f"layers.{layer}.0.to_q.weight": noise(heads * 64, dim),
            f"layers.{layer}.0.to_kv.weight": noise(heads * 128, dim),
            f"layers.{layer}.0.to_out.weight": noise(dim, heads * 64),
            **norm(f"layers.{layer}.1.0", dim),
            f"layers.{layer}.1.1.weight": noise(inner, dim),
            f"layers.{layer}.1.3.weight": noise(dim, inner),
        }
    blocks = {
        f"{2 * n + 1}.to_{kind}_ip.weight": noise(width, context) for n, width in enumerate(widths) for kind in "kv"
    }
    return {"image_proj": resampler, "ip_adapter": blocks}


def flat(state: dict[str, State]) -> State:
    return {f"{part}.{key}": value.clone() for part, weights in state.items() for key, value in weights.items()}


def make_adapter(fingerprint: str = "f", **sizes: Any) -> InstantIDAdapter:
    state = make_state(**sizes)
    return InstantIDAdapter(state["image_proj"], state["ip_adapter"], "tiny.bin", fingerprint)


def reference_tokens(state: State, embedding: Tensor, heads: int) -> Tensor:
    """The resampler written out plainly, in float64, one head at a time; embedding [B, N, D]."""
    w = {key: value.double() for key, value in state.items()}

    def layer_norm(x: Tensor, prefix: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        variance = (centred**2).mean(-1, keepdim=True)
        return centred / torch.sqrt(variance + 1e-5) * w[f"{prefix}.weight"] + w[f"{prefix}.bias"]

    def gelu(x: Tensor) -> Tensor:
        return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))

    results = []
    for row in embedding.double():
        x = row @ w["proj_in.weight"].T + w["proj_in.bias"]
        latents = w["latents"][0]
        depth = sum(key.endswith(".0.to_q.weight") for key in w)
        for i in range(depth):
            p = f"layers.{i}.0"
            features, queries = layer_norm(x, f"{p}.norm1"), layer_norm(latents, f"{p}.norm2")
            q = queries @ w[f"{p}.to_q.weight"].T
            k, v = (torch.cat([features, queries]) @ w[f"{p}.to_kv.weight"].T).split(heads * 64, dim=1)
            attended = []
            for h in range(heads):
                part = slice(64 * h, 64 * h + 64)
                scores = q[:, part] @ k[:, part].T / 8  # sqrt(64)
                attended.append(torch.softmax(scores, dim=1) @ v[:, part])
            latents = latents + torch.cat(attended, dim=1) @ w[f"{p}.to_out.weight"].T
            p = f"layers.{i}.1"
            hidden = gelu(layer_norm(latents, f"{p}.0") @ w[f"{p}.1.weight"].T)
            latents = latents + hidden @ w[f"{p}.3.weight"].T
        results.append(layer_norm(latents @ w["proj_out.weight"].T + w["proj_out.bias"], "norm_out"))
    return torch.stack(results).float()


def nested_pickle(state: dict[str, State], path: Path) -> None:
    torch.save(state, path)


CPU = torch.device("cpu")
