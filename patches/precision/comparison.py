"""How far a changed model's outputs are from the original's, on the user's own latent and prompt.

One call of each model per noise level, through ComfyUI's whole sampling stack, so that LoRAs, ControlNets and wrappers
take part. What is compared is the model's denoised prediction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

PARTS = (0.1, 0.5, 0.9)  # of the schedule: early, middle, late
SEED = 0


@dataclass(frozen=True)
class OutputError:
    """Of one prediction: relative error ||a - b|| / ||a||, cosine, and PSNR in dB over the original's own range."""

    sigma: float
    relative: float
    cosine: float
    psnr: float

    def describe(self) -> str:
        return f"sigma {self.sigma:.3f}: relative error {self.relative:.4f}, cosine {self.cosine:.6f}, PSNR {self.psnr:.1f} dB"


def output_error(original: Tensor, other: Tensor, sigma: float) -> OutputError:
    """original, other: of one shape, any dtype."""
    a, b = original.double().flatten(), other.double().flatten()
    difference = (a - b).norm()
    relative = float(difference / a.norm().clamp_min(1e-30))
    cosine = float(torch.dot(a, b) / (a.norm() * b.norm()).clamp_min(1e-30))
    span = float(a.max() - a.min())
    mean_square = float(difference) ** 2 / a.numel()
    psnr = float("inf") if mean_square == 0 else 10 * float(torch.log10(torch.tensor(span**2 / mean_square)))
    return OutputError(sigma, relative, cosine, psnr)


def predictions(model: Any, latent: Tensor, positive: Any, sigmas: Sequence[float]) -> list[Tensor]:
    """The denoised prediction of `model` for `latent` with fixed noise at each sigma, on the CPU, float32."""
    import comfy.sample
    import comfy.samplers

    found: list[Tensor] = []

    def once(
        denoiser: Any, x: Tensor, sigmas: Tensor, extra_args: Any = None, callback: Any = None, disable: Any = None
    ) -> Tensor:
        out: Tensor = denoiser(x, sigmas[:1].expand(x.shape[0]), **(extra_args or {}))
        found.append(out.float().cpu())
        return out

    latent = comfy.sample.fix_empty_latent_channels(model, latent)
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(SEED)).to(latent.dtype)
    for sigma in sigmas:
        comfy.sample.sample_custom(
            model, noise, 1.0, comfy.samplers.KSAMPLER(once), torch.tensor([sigma, 0.0]), positive, positive, latent,
            disable_pbar=True, seed=SEED,
        )  # fmt: skip
    return found


def compare(original: Any, other: Any, latent: dict[str, Any], positive: Any) -> list[OutputError]:
    """Errors of the MODEL `other` against `original` at three noise levels.

    latent: a ComfyUI LATENT, of which the first sample is used. positive: a CONDITIONING.
    """
    sampling = original.get_model_object("model_sampling")
    sigmas = [float(sampling.percent_to_sigma(part)) for part in PARTS]
    sample = latent["samples"]
    if getattr(sample, "is_nested", False):
        raise ValueError(
            "The comparison takes a latent of one stream, not of picture and sound together: connect no latent here."
        )
    before = predictions(original, sample[:1], positive, sigmas)
    after = predictions(other, sample[:1], positive, sigmas)
    return [output_error(a, b, sigma) for a, b, sigma in zip(before, after, sigmas, strict=True)]


def describe(errors: Sequence[OutputError]) -> str:
    return "\n".join(("Against the original, on this latent and prompt:", *(f"  {e.describe()}" for e in errors)))
