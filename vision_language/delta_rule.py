"""The gated delta rule (Yang et al., Gated Delta Networks, 2025, eq. 10) in torch: the reference, and the way on a CPU.

What a layer knows of earlier tokens is one matrix a head. A token lets all of it fade, and rewrites what it holds for the
token's key. Many tokens are taken in chunks, whose rewritings are one triangular system (section 3.3 there).

Everywhere: q, k: [B, key heads, n, K], of length one, q scaled. v: [B, heads, n, V]; the value heads that share a key head stand
side by side. decay, rate: [B, heads, n], the logarithm of what is kept of the state, and how much of what it holds for a key
is rewritten. state: [B, heads, K, V], rewritten in place. All are float32. What the tokens read is [B, heads, n, V].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 32
SEGMENT = 4 * CHUNK  # tokens of which chunks are prepared at a time: as many as a CPU's caches hold
EPSILON = 1e-6  # of the lengths of keys and queries


def length_one(x: Tensor) -> Tensor:
    """[..., D], each vector over its length."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + EPSILON)


def delta_rule(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, rate: Tensor, state: Tensor) -> Tensor:
    """What n tokens read, one after the other."""
    if q.shape[2] == 1:
        return _one(q, k, v, decay, rate, state)
    made = []
    for start in range(0, q.shape[2], SEGMENT):
        here = slice(start, start + SEGMENT)
        made.append(_in_chunks(q[:, :, here], k[:, :, here], v[:, :, here], decay[:, :, here], rate[:, :, here], state))
    return torch.cat(made, dim=2)


def _one(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, rate: Tensor, state: Tensor) -> Tensor:
    groups = v.shape[1] // k.shape[1]
    q, k = (part.repeat_interleave(groups, 1) for part in (q, k))
    state.mul_(decay.exp().unsqueeze(-1))
    state.addcmul_(k.transpose(-1, -2), (v - k @ state) * rate.unsqueeze(-1))
    return q @ state


def _in_chunks(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, rate: Tensor, state: Tensor) -> Tensor:
    rows, heads, n, value_dim = v.shape
    keys, key_dim = k.shape[1], k.shape[3]
    chunk = min(CHUNK, n)
    left = -n % chunk
    q, k, v = (F.pad(part, (0, 0, 0, left)) for part in (q, k, v))
    decay, rate = (F.pad(part, (0, left)).view(rows, keys, heads // keys, -1, chunk) for part in (decay, rate))
    q, k = (part.reshape(rows, keys, 1, -1, chunk, key_dim) for part in (q, k))
    v = v.reshape(rows, keys, heads // keys, -1, chunk, value_dim)
    known = state.view(rows, keys, heads // keys, key_dim, value_dim)
    total = decay.cumsum(-1)  # since the chunk began
    later = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device).triu(1)
    between = (total.unsqueeze(-1) - total.unsqueeze(-2)).masked_fill(later, float("-inf")).exp()
    kept, rate = total.exp().unsqueeze(-1), rate.unsqueeze(-1)
    # What each token of a chunk writes were the state before the chunk empty, and the keys by which that state takes from it.
    system = (k @ k.transpose(-1, -2)) * between * rate
    given = torch.cat((v * rate, k * (rate * kept)), dim=-1)
    solved = torch.linalg.solve_triangular(system, given, upper=False, unitriangular=True)
    written, taking = solved.split((value_dim, key_dim), dim=-1)
    seen = (q @ k.transpose(-1, -2)) * between
    q, k = q * kept, (k * (total[..., -1:] - total).exp().unsqueeze(-1)).transpose(-1, -2)
    whole = kept[..., -1:, :]
    made = torch.empty_like(v)
    for place in range(v.shape[3]):
        fresh = written[:, :, :, place] - taking[:, :, :, place] @ known
        made[:, :, :, place] = q[:, :, :, place] @ known + seen[:, :, :, place] @ fresh
        known.mul_(whole[:, :, :, place]).add_(k[:, :, :, place] @ fresh)
    return made.view(rows, heads, -1, value_dim)[:, :, :n]
