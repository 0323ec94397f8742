"""The transformer's attention, set for each of its modules: its backend, and rotary embedding in real numbers.

diffusers' own `set_attention_backend` also changes a process-wide default that its reset does not undo, so it is never
called. Rotations are written as real products, which the compiler fuses; diffusers' complex ones it cannot.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .. import host
from ..attention import compiled
from ..attention.dispatch import BACKENDS as REGISTERED
from ..attention.dispatch import CHAINS, NHD, POLICIES, AttentionPolicy, attend, keep_choices_in
from ..attention.events import AttentionLog

BACKENDS = POLICIES


@dataclass(frozen=True)
class AttentionChoice:
    """The attention of one transformer, and the log of what computed it."""

    policy: AttentionPolicy
    record: AttentionLog = field(compare=False)

    def lines(self) -> list[str]:
        """What ran where in the last run, and why; at most the three most frequent."""
        told = [line for line in self.record.report().splitlines()[1:] if "calls" in line or "compiled" in line]
        return [f"attention {self.policy.backend}: {line}" for line in told[:3]]


def is_exact(asked: str) -> bool:
    """Whether all that `asked` can mean is exact: pictures are then the same but for rounding."""
    names = CHAINS.get(asked, (asked,))
    return all(backend.exact for backend in REGISTERED if backend.name in names)


def choose(asked: str) -> AttentionChoice:
    """The choice for one of BACKENDS. Raises ValueError for another word."""
    keep_choices_in(host.current().cache_folder())
    return AttentionChoice(AttentionPolicy(asked), AttentionLog(asked))


def make_traceable(choice: AttentionChoice) -> None:
    """Let compiled blocks find the log of `choice`, and choose a backend as they are traced."""
    import torch._dynamo  # noqa: F401 - loads the compiler, which `prepare` waits for

    compiled.prepare()
    compiled.number_of(choice.record)


class RealRotations(nn.Module):
    """The transformer's table of rotations, handed out as real numbers: positions [N, axes] -> [N, D/2, 2]."""

    def __init__(self, table: Any) -> None:
        super().__init__()
        self.table = table

    def forward(self, positions: Tensor) -> Tensor:
        return torch.view_as_real(self.table(positions))


def rotate(x: Tensor, rotations: Tensor) -> Tensor:
    """Rotary position embedding. x: [B, N, H, D]; rotations: [B, N, D/2, 2], cosine and sine."""
    cos, sin = rotations.unsqueeze(2).unbind(-1)
    pairs = x.float().unflatten(-1, (-1, 2))
    a, b = pairs[..., 0], pairs[..., 1]
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2).type_as(x)


class StreamAttention(nn.Module):
    """The attention of one of Z-Image's blocks: projections, norms of queries and keys, rotation, attention.

    Takes over the layers of diffusers' module under their names; what that module does besides, for other models, takes
    longer in Python than a small picture's attention.
    """

    def __init__(self, attention: Any, choice: AttentionChoice) -> None:
        super().__init__()
        self.heads = attention.heads
        self.to_q, self.to_k, self.to_v, self.to_out = attention.to_q, attention.to_k, attention.to_v, attention.to_out
        self.norm_q, self.norm_k = attention.norm_q, attention.norm_k
        self.policy, self.record = choice.policy, choice.record

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, freqs_cis: Tensor | None = None
    ) -> Tensor:
        """hidden_states: [B, N, width]; attention_mask: bool [B, N] or None; freqs_cis: rotations [B, N, D/2, 2]."""
        query = self.to_q(hidden_states).unflatten(-1, (self.heads, -1))
        key = self.to_k(hidden_states).unflatten(-1, (self.heads, -1))
        value = self.to_v(hidden_states).unflatten(-1, (self.heads, -1))
        if self.norm_q is not None:
            query = self.norm_q(query)
        if self.norm_k is not None:
            key = self.norm_k(key)
        if freqs_cis is not None:
            query, key = rotate(query, freqs_cis), rotate(key, freqs_cis)
        if attention_mask is not None and attention_mask.ndim == 2:
            attention_mask = attention_mask[:, None, None, :]
        out = attend(query, key, value, attention_mask, layout=NHD, policy=self.policy, record=self.record)
        return self.to_out[0](out.flatten(2, 3).to(query.dtype))


def install(transformer: Any, choice: AttentionChoice) -> int:
    """Give every block of `transformer` its attention under the choice, in place; returns how many there are.

    Only for the transformer of this pack's own copy: its blocks then expect rotations in real numbers.
    """
    blocks = [module for module in transformer.modules() if hasattr(module, "attention")]
    for block in blocks:
        block.attention = StreamAttention(block.attention, choice)
    transformer.rope_embedder = RealRotations(transformer.rope_embedder)
    return len(blocks)
