"""What is drawn, and whether a checkpoint can draw it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from . import decoding
from .denoising import Guidance
from .loading import ZImage
from .prompts import CACHES, MAX_TOKENS

NO_GUIDANCE = Guidance()


@dataclass(frozen=True)
class Request:
    """What is drawn. width, height: pixels, multiples of `ZImage.step_of_size`. seed: of the first picture.

    image: [1 or B, H, W, 3] in 0..1 to draw over, with `strength` (over 0 to 1) of the schedule.
    mask: [1 or B, H, W] or [H, W], 1 where it is drawn, stretched to the image when it has another size.
    keep_outside: elsewhere the image's own pixels are put back, which the VAE changes a little.
    control: [1 or B, H, W, 3], edges, depth or a pose that a checkpoint with a ControlNet draws after, with the weight
    `control_strength`.
    pictures_at_a_time: 1 makes a picture independent of its company to the last bit; more is faster for small pictures.
    tiling, prompt_cache: one of decoding.TILING, prompts.CACHES.
    """

    prompt: str
    negative: str = ""
    width: int = 1024
    height: int = 1024
    steps: int = 8
    guidance: Guidance = NO_GUIDANCE
    seed: int = 0
    pictures: int = 1
    image: Tensor | None = None
    mask: Tensor | None = None
    strength: float = 0.6
    control: Tensor | None = None
    control_strength: float = 0.75
    max_tokens: int = MAX_TOKENS
    pictures_at_a_time: int = 1
    tiling: str = "auto"
    prompt_cache: str = "memory"
    keep_outside: bool = False


def check(request: Request, model: ZImage) -> None:
    """Raises ValueError, in one sentence, for a request that cannot be drawn."""
    for name, text in (("prompt", request.prompt), ("negative prompt", request.negative)):
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise ValueError(
                f"The {name} holds half a letter (a lone surrogate), which no tokenizer reads: type it again."
            )
    side = model.step_of_size
    for name, size, longest in (
        ("height", request.height, model.tallest),
        ("width", request.width, model.widest),
    ):
        if size % side or size <= 0:
            near = max(side, round(size / side) * side)
            raise ValueError(f"The {name} {size} is no multiple of {side}, which this checkpoint needs: try {near}.")
        if size > longest:
            raise ValueError(f"The {name} {size} is over {longest}, the largest this checkpoint has positions for.")
    if request.steps < 1 or request.pictures < 1 or request.pictures_at_a_time < 1:
        raise ValueError("Steps, pictures and pictures at a time are 1 or more.")
    if not 1 <= request.max_tokens <= model.longest_prompt:
        raise ValueError(
            f"A prompt has 1 to {model.longest_prompt} tokens here, and {request.max_tokens} were asked for."
        )
    for what, asked, known in (
        ("tiling", request.tiling, decoding.TILING),
        ("prompt cache", request.prompt_cache, CACHES),
    ):
        if asked not in known:
            raise ValueError(f"{asked!r} is no {what}: choose one of {', '.join(known)}.")
    if not 0.0 <= request.guidance.scale < math.inf:
        raise ValueError(
            f"Guidance {request.guidance.scale} is no number from 0 up: 0 is none, and more follows the prompt closer."
        )
    if not 0.0 < request.strength <= 1.0:
        raise ValueError(f"A strength of {request.strength} draws nothing: choose over 0 to 1.")
    if request.mask is not None and request.image is None:
        raise ValueError("A mask needs an image that it lies on: connect one.")
    _check_tensor("image", request.image, ("pictures", "height", "width", "RGB"), request.pictures)
    _check_tensor("mask", request.mask, ("pictures", "height", "width"), request.pictures)
    _check_tensor("control image", request.control, ("pictures", "height", "width", "RGB"), request.pictures)
    if request.control is not None and not model.checkpoint.controlled:
        raise ValueError(
            f"{model.checkpoint.name} has no ControlNet to draw after a control image: choose a ZImageControlNetPipeline."
        )


def _check_tensor(name: str, given: Tensor | None, axes: tuple[str, ...], pictures: int) -> None:
    """Raises ValueError for what has other axes, another number of pictures, no pixels, or NaN; alpha is no fault."""
    if given is None:
        return
    found = list(given.shape)
    shape = [1, *found] if name == "mask" and given.ndim == 2 else found
    if len(shape) != len(axes) or ("RGB" in axes and shape[-1] < 3) or 0 in shape[1:]:
        raise ValueError(f"The {name} is a tensor of {found} where [{', '.join(axes)}] is needed: connect another.")
    if shape[0] not in (1, pictures):
        raise ValueError(f"{shape[0]} {name}s for {pictures} pictures: connect one, or one for each.")
    if not given.isfinite().all():
        raise ValueError(f"The {name} holds values that are not finite (NaN): look at what made it.")
