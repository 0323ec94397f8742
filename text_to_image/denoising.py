"""The denoising loop of Z-Image: flow matching from noise to latents, with guidance as diffusers' pipeline defines it.

Each run has its own schedule and its own generators. Prompt and negative prompt are computed one after the other, so that
sequences are never padded to a common length and attention never needs a mask.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MAX_SEED = (1 << 64) - 1
TRAIN_STEPS = 1000

Network = Callable[[list[Tensor], Tensor, list[Tensor]], list[Tensor]]
OnStep = Callable[[int, Tensor], None]


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance: positive + scale * (positive - negative).

    scale: 0 draws without a negative prompt. It is one less than the CFG of ComfyUI's KSampler. normalization: over 0, a
    prediction's length is at most that many times the positive one's. truncation: part of the schedule (0 noise, 1
    picture) after which guidance stops; 1 never.
    """

    scale: float = 0.0
    normalization: float = 0.0
    truncation: float = 1.0


@dataclass(frozen=True)
class Source:
    """What is drawn over. latents: [B, C, h, w], scaled; noise: of the same shape, what was added to them.

    mask: bool [B, 1, h, w], true where it is drawn and false where the source stays; None draws everywhere.
    """

    latents: Tensor
    noise: Tensor
    mask: Tensor | None = None

    def part(self, pictures: slice) -> Source:
        """What those of the pictures are drawn over."""
        return Source(self.latents[pictures], self.noise[pictures], None if self.mask is None else self.mask[pictures])


def seeds(first: int, pictures: int) -> list[int]:
    """The seed of each picture: it depends on the first seed and the picture's place alone."""
    return [(first + i) & MAX_SEED for i in range(pictures)]


def generator(seed: int) -> torch.Generator:
    """A private generator on the CPU, where the same seed gives the same noise on every machine."""
    made = torch.Generator("cpu")
    made.manual_seed(seed)
    return made


def noise(generators: Sequence[torch.Generator], shape: tuple[int, int, int]) -> Tensor:
    """float32 noise [len(generators), *shape] on the CPU, each picture's from its own generator."""
    return torch.stack([torch.randn(shape, generator=g, dtype=torch.float32) for g in generators])


def shift(tokens: int, config: Any) -> float:
    """How far the schedule leans towards noise for a picture of `tokens` tokens, where the schedule depends on it."""
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    least, most = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    slope = (most - least) / (high - low)
    return float(tokens * slope + least - slope * low)


def prepare(scheduler: Any, steps: int, tokens: int, device: torch.device, strength: float = 1.0) -> Tensor:
    """Set `scheduler` up for one run and return its timesteps, one at least; strength under 1 leaves out the first ones."""
    sigmas = torch.linspace(1.0, 1.0 / steps, steps).tolist()
    scheduler.set_timesteps(sigmas=sigmas, mu=shift(tokens, scheduler.config), device=device)
    begin = int(max(steps - min(steps * strength, steps), 0))
    scheduler.set_begin_index(begin)
    return scheduler.timesteps[begin:]


def denoise(
    network: Network,
    scheduler: Any,
    timesteps: Tensor,
    latents: Tensor,
    positive: Tensor,
    negative: Tensor | None,
    guidance: Guidance,
    dtype: torch.dtype,
    on_step: OnStep,
    source: Source | None = None,
) -> Tensor:
    """Latents [B, C, h, w] (float32, scaled) of B pictures of one prompt, from `latents`, which is noise at the start.

    positive, negative: hidden states [tokens, width]. on_step: called after each step with its number and what the latents
    would be without their noise, as far as that can be told by then.
    """
    pictures = latents.shape[0]
    # Told from the schedule beforehand: reading a number from the device in the loop would make every step wait.
    progress = ((TRAIN_STEPS - timesteps.float()) / TRAIN_STEPS).tolist()
    for i, t in enumerate(timesteps):
        time = (TRAIN_STEPS - t.expand(pictures)) / TRAIN_STEPS
        noisy = list(latents.to(dtype).unsqueeze(2).unbind(0))
        predicted = network(noisy, time, [positive] * pictures)
        scale = guidance.scale if progress[i] <= guidance.truncation else 0.0
        if scale > 0.0 and negative is not None:
            against = network(noisy, time, [negative] * pictures)
            predicted = [
                _guided(p.float(), n.float(), scale, guidance.normalization)
                for p, n in zip(predicted, against, strict=True)
            ]
        velocity = -torch.stack([p.float() for p in predicted]).squeeze(2)
        estimate = latents - t / TRAIN_STEPS * velocity
        latents = scheduler.step(velocity, t, latents, return_dict=False)[0]
        if source is not None and source.mask is not None:
            kept = source.latents
            if i + 1 < len(timesteps):  # as noisy as the rest is now
                kept = scheduler.scale_noise(kept, timesteps[i + 1 : i + 2], source.noise)
            latents = torch.where(source.mask, latents, kept)
        on_step(i, estimate)
    return latents


def _guided(positive: Tensor, negative: Tensor, scale: float, normalization: float) -> Tensor:
    guided = positive + scale * (positive - negative)
    if normalization > 0.0:
        most = torch.linalg.vector_norm(positive) * normalization
        # As a product, because a comparison in Python would wait for the device.
        guided = guided * torch.clamp(most / torch.linalg.vector_norm(guided), max=1.0)
    return guided
