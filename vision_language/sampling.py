"""Choosing the next token on the device: greedy, or temperature, top-k, top-p and min-p with a private generator.

The filters are those of Holtzman et al. 2020 (top-p), Fan et al. 2018 (top-k), Nguyen et al. 2024 (min-p) and Keskar et
al. 2019 (repetition penalty), applied in the order that transformers applies them. A draw is the arg max of
probabilities over exponential noise, which needs no copy to the host.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..attention.topk import topk

SEED_LIMIT = 2**63
LEAST_TEMPERATURE = 1e-6  # below it logits run over the range of float32, and a draw is the likeliest token anyway
LARGEST_TOP_K = 1024  # up to here the likeliest are picked out first, and nothing of the vocabulary's length is sorted
EQUALS = 32  # picked out beyond top_k, for tokens as likely as the last of them, which all stay


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. None leaves a setting to the model folder's generation_config.json.

    temperature 0, or sample=False, is greedy. seed: -1 draws a new one, which the report tells.
    """

    sample: bool | None = True
    temperature: float | None = 0.7
    top_p: float | None = 0.9
    top_k: int | None = 50
    min_p: float | None = 0.0
    repetition_penalty: float | None = 1.0
    beams: int = 1
    seed: int = 0

    def resolved(self, defaults: Any) -> Sampling:
        """Every None filled from `defaults` (a GenerationConfig, or anything with such attributes)."""

        def pick(mine: Any, name: str, neutral: Any) -> Any:
            if mine is not None:
                return mine
            found = getattr(defaults, name, None)
            return neutral if found is None else found

        sample = bool(pick(self.sample, "do_sample", False))
        temperature = float(pick(self.temperature, "temperature", 1.0))
        return Sampling(
            sample=sample and temperature >= LEAST_TEMPERATURE and self.beams == 1,
            temperature=temperature,
            top_p=float(pick(self.top_p, "top_p", 1.0)),
            top_k=int(pick(self.top_k, "top_k", 50)),
            min_p=float(pick(self.min_p, "min_p", 0.0)),
            repetition_penalty=float(pick(self.repetition_penalty, "repetition_penalty", 1.0)),
            beams=self.beams,
            seed=self.seed if self.seed >= 0 else secrets.randbelow(2**32),
        )

    @property
    def penalises(self) -> bool:
        """Whether a token's chance depends on those before it."""
        return self.repetition_penalty not in (None, 1.0)

    def __str__(self) -> str:
        penalty = f", repetition penalty {self.repetition_penalty:g}" if self.penalises else ""
        if self.beams > 1:
            return f"{self.beams} beams{penalty}"
        if not self.sample:
            return f"greedy{penalty}"
        return (
            f"temperature {self.temperature:g}, top-p {self.top_p:g}, top-k {self.top_k}, min-p {self.min_p:g}"
            f"{penalty}, seed {self.seed}"
        )


def penalise(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Divide the logits of tokens that occurred (multiply negative ones). logits: [B, V]; seen: [B, V] bool."""
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def filtered(logits: Tensor, sampling: Sampling) -> Tensor:
    """Logits over temperature with everything that the filters exclude at -inf. [B, V] float32."""
    logits = logits / float(sampling.temperature or 1.0)
    excluded = float("-inf")
    if sampling.top_k and sampling.top_k < logits.shape[-1]:
        smallest = topk(logits, sampling.top_k)[0][:, -1:]
        logits = logits.masked_fill(logits < smallest, excluded)
    if sampling.top_p is not None and sampling.top_p < 1:
        order, index = logits.sort(dim=-1)  # rising: the tail that goes is at the front
        tail = order.softmax(dim=-1).cumsum(dim=-1) <= 1 - sampling.top_p
        tail[:, -1] = False
        logits = logits.masked_fill(tail.scatter(1, index, tail), excluded)
    if sampling.min_p:
        probabilities = logits.softmax(dim=-1)
        least = sampling.min_p * probabilities.amax(dim=-1, keepdim=True)
        logits = logits.masked_fill(probabilities < least, excluded)
    return logits


def drawn(logits: Tensor, noise: Tensor) -> Tensor:
    """[B], an index drawn by the probabilities that logits [B, V] mean; noise: [B, V], exponential."""
    # No noise of 0: it would make 0/0 of a token that the filters excluded.
    return (logits.softmax(dim=-1) / noise.clamp_min(1e-20)).argmax(dim=-1)


def likeliest(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """(logits, token ids) of what `filtered` leaves, [B, top_k and a few], the likeliest last; the others at -inf.

    The same numbers without sorting the vocabulary, for 0 < top_k <= LARGEST_TOP_K.
    """
    excluded = float("-inf")
    top_k = int(sampling.top_k or 0)
    logits = logits / float(sampling.temperature or 1.0)
    logits, ids = topk(logits, min(top_k + EQUALS, logits.shape[-1]))
    if top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits[:, top_k - 1 : top_k], excluded)
    logits, ids = logits.flip(-1), ids.flip(-1)
    if sampling.top_p is not None and sampling.top_p < 1:
        tail = logits.softmax(dim=-1).cumsum(dim=-1) <= 1 - sampling.top_p
        tail[:, -1] = False
        logits = logits.masked_fill(tail, excluded)
    if sampling.min_p:
        probabilities = logits.softmax(dim=-1)
        logits = logits.masked_fill(probabilities < sampling.min_p * probabilities[:, -1:], excluded)
    return logits, ids


class Sampler:
    """The next token of every row of a batch, row i drawn from its own generator seeded with seeds[i].

    So the answer of a row does not depend on which rows stand beside it, and torch's own generators are never touched.
    """

    def __init__(
        self,
        sampling: Sampling,
        device: torch.device,
        seeds: Sequence[int],
        prompt: Tensor | None = None,
        vocabulary: int = 0,
    ) -> None:
        """prompt: ids [B or 1, T] on `device`, of `vocabulary` tokens; needed where `sampling` penalises repetitions."""
        self.sampling = sampling
        self.generators = [torch.Generator(device=device).manual_seed(seed % SEED_LIMIT) for seed in seeds]
        self.seen: Tensor | None = None
        if sampling.penalises:
            if prompt is None:
                raise ValueError("A repetition penalty needs the prompt.")
            self.seen = torch.zeros(len(seeds), vocabulary, dtype=torch.bool, device=device)
            self.seen.scatter_(1, prompt.expand(len(seeds), -1), True)

    def __call__(self, logits: Tensor) -> Tensor:
        """logits: [B, V], any float type; returns token ids [B] on the same device."""
        logits = logits.float()
        if self.seen is not None:
            logits = penalise(logits, self.seen, float(self.sampling.repetition_penalty or 1.0))
        if self.sampling.sample:
            noise = torch.empty_like(logits)
            for row, generator in zip(noise, self.generators, strict=True):
                row.exponential_(generator=generator)
            if 0 < (self.sampling.top_k or 0) <= LARGEST_TOP_K:
                kept, ids = likeliest(logits, self.sampling)
                tokens = ids.gather(1, drawn(kept, noise.gather(1, ids)).unsqueeze(1)).squeeze(1)
            else:
                tokens = drawn(filtered(logits, self.sampling), noise)
        else:
            tokens = logits.argmax(dim=-1)
        if self.seen is not None:
            self.seen.scatter_(1, tokens.unsqueeze(1), True)
        return tokens
