"""Numbers about two pictures of one size: SSIM, PSNR, and plain differences."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

SMALLEST = 11  # pixels: the window of SSIM
SIGMA = 1.5  # of its Gaussian


class Incomparable(ValueError):
    """Two pictures that cannot be compared; the message says why."""


@dataclass(frozen=True)
class Measures:
    """Of B against A. ssim: -1..1, 1 for equal pictures. psnr: dB, inf for equal pictures. The others: 0..1."""

    ssim: float
    psnr: float
    mean_difference: float
    max_difference: float

    @property
    def identical(self) -> bool:
        return self.max_difference == 0


def as_rgb(picture: Tensor, name: str) -> Tensor:
    """`picture` [H, W, C] of 1, 3 or 4 channels as float [H, W, 3] on the CPU, cut to 0..1; transparency is left out.

    Raises Incomparable for another shape and for values that are not finite.
    """
    if drawable(picture) is not picture:
        raise Incomparable(f"{name} is no picture: its shape is {tuple(picture.shape)}, not height, width, 1, 3 or 4.")
    plain = picture.detach().float().cpu()[..., :3]
    if not torch.isfinite(plain).all():
        raise Incomparable(f"{name} holds values that are not finite (NaN): the run that made it went wrong.")
    return plain.clamp(0, 1).expand(*plain.shape[:2], 3)


def drawable(picture: Tensor) -> Tensor:
    """`picture` where it has the shape of one, else a small black one, to have something to show."""
    is_picture = picture.ndim == 3 and picture.shape[-1] in (1, 3, 4) and 0 not in picture.shape
    return picture if is_picture else torch.zeros(SMALLEST, SMALLEST, 3)


def measure(a: Tensor, b: Tensor) -> Measures:
    """Compare two pictures [H, W, 3] from `as_rgb`. Raises Incomparable for other sizes and for tiny pictures."""
    if a.shape != b.shape:
        raise Incomparable(f"The sizes differ: A is {_size(a)}, B is {_size(b)}. Render both at one size.")
    if min(a.shape[:2]) < SMALLEST:
        raise Incomparable(f"The pictures are {_size(a)}; to compare structures they need {SMALLEST} pixels each way.")
    first, second = a.numpy().astype(np.float64), b.numpy().astype(np.float64)
    difference = np.abs(first - second)
    mean_square = float(np.mean(difference**2))
    try:
        from skimage.metrics import structural_similarity
    except (ImportError, ValueError):
        # An extra; without it, or with one that was built for an older numpy, a comparison goes on.
        ssim = structural_similarity_by_torch(a, b)
    else:
        ssim = float(
            structural_similarity(
                # The paper's own window, and the mean over the channels.
                first,
                second,
                channel_axis=-1,
                data_range=1.0,
                gaussian_weights=True,
                sigma=SIGMA,
                use_sample_covariance=False,
            )
        )
    return Measures(
        ssim=ssim,
        psnr=-10 * math.log10(mean_square) if mean_square > 0 else math.inf,
        mean_difference=float(difference.mean()),
        max_difference=float(difference.max()),
    )


def structural_similarity_by_torch(a: Tensor, b: Tensor) -> float:
    """SSIM of two pictures [H, W, C] in 0..1, the number that scikit-image gives: Wang et al. 2004, a Gaussian window of
    11 pixels, the mean over the pixels whose window lies inside, and over the channels."""
    x, y = (picture.permute(2, 0, 1)[:, None].double() for picture in (a, b))
    at = torch.arange(SMALLEST, dtype=torch.float64) - SMALLEST // 2
    window = torch.exp(-(at**2) / (2 * SIGMA**2))
    window /= window.sum()

    def blurred(z: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(z, window.view(1, 1, -1, 1)), window.view(1, 1, 1, -1))

    mean_x, mean_y = blurred(x), blurred(y)
    spread = blurred(x * x) - mean_x**2 + blurred(y * y) - mean_y**2
    shared = blurred(x * y) - mean_x * mean_y
    small, smaller = 0.03**2, 0.01**2  # the paper's K2 and K1, for a range of 1
    top = (2 * mean_x * mean_y + smaller) * (2 * shared + small)
    return float((top / ((mean_x**2 + mean_y**2 + smaller) * (spread + small))).mean())


def _size(picture: Tensor) -> str:
    return f"{picture.shape[1]}x{picture.shape[0]}"
