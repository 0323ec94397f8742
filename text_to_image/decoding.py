"""Latents to pictures, and pictures to latents, one at a time; in tiles only where the whole does not fit.

Tiles cost overlap and can show seams, so they are a means against a full device and nothing else: room is made first.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import host
from ..host.errors import is_out_of_memory

if TYPE_CHECKING:
    from .loading import ZImage

log = logging.getLogger("hotpath.text_to_image")

TILING = ("auto", "never", "always")
# Feature maps of the widest full-size layer that live at once: the input of a residual block, its normalised and
# activated copies, the output, and a convolution's workspace of about the same size.
LIVE_MAPS = 5

Made = TypeVar("Made")


@dataclass(frozen=True)
class DecodePlan:
    """Whether pictures are decoded in tiles, and why."""

    tiled: bool
    note: str


def activation_bytes(model: ZImage, width: int, height: int) -> int:
    """Bytes the decoder needs beside its weights for one picture of width x height pixels; an estimate."""
    config = model.checkpoint.config("vae")
    channels = list(config.get("block_out_channels", (128, 256, 512, 512)))
    # The last upsampling hands the next-to-narrowest width to the full size.
    widest = channels[min(1, len(channels) - 1)]
    itemsize = model.vae_dtype.itemsize
    maps = LIVE_MAPS * widest * width * height * itemsize
    if model.vae_device.type == "cuda" or not config.get("mid_block_add_attention", True):
        return maps
    tokens = (width // model.latent_scale) * (height // model.latent_scale)
    return maps + 4 * tokens * channels[-1] * itemsize


def plan(model: ZImage, tiling: str, width: int, height: int, tile: int) -> DecodePlan:
    """The plan for pictures of width x height pixels with the VAE resident; tile: the side of its tiles, in pixels.

    The transformer and the text encoder have left by then if there was no room beside them; the host is asked for more
    before it settles for tiles.
    """
    if tiling not in TILING:
        raise ValueError(f"{tiling!r} is no tiling: choose one of {', '.join(TILING)}.")
    if max(width, height) <= tile:
        return DecodePlan(False, f"whole: the picture is no larger than a tile of {tile} pixels")
    if tiling != "auto":
        return DecodePlan(tiling == "always", f"{'in tiles' if tiling == 'always' else 'whole'}, as asked")
    needed = activation_bytes(model, width, height)
    here = host.current()
    free = here.free_memory(model.vae_device)
    if free < needed:
        here.make_room(needed, model.vae_device)
        free = here.free_memory(model.vae_device)
    fits = free >= needed
    compared = f"about {_mib(needed)} are needed and {_mib(free)} are free"
    return DecodePlan(not fits, f"{'whole' if fits else 'in tiles'}: {compared}")


def _mib(nbytes: int) -> str:
    return f"{nbytes / 2**20:,.0f} MiB"


def decode(
    model: ZImage, latents: Tensor, tiling: str = "auto", on_picture: Callable[[], None] = lambda: None
) -> tuple[Tensor, str]:
    """Pictures [B, H, W, 3], float32 RGB in 0..1 on the CPU, from scaled latents [B, C, h, w]; and how, for the report."""
    height, width = (side * model.latent_scale for side in latents.shape[-2:])
    pictures: list[Tensor] = []
    with model.vae.resident(activation_bytes(model, width, height)) as vae:
        chosen = plan(model, tiling, width, height, int(vae.tile_sample_min_size))
        for one in latents.split(1):
            decoded, chosen = _in_room(partial(decode_one, model, vae, one), chosen, tiling)
            pictures.append((decoded.float() / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).cpu())
            on_picture()
    return torch.cat(pictures), chosen.note


def _in_room(run: Callable[[bool], Made], chosen: DecodePlan, tiling: str) -> tuple[Made, DecodePlan]:
    """`run` (told whether in tiles) under the plan; in tiles when the whole runs out of memory and that is not forbidden."""
    try:
        return run(chosen.tiled), chosen
    except RuntimeError as error:
        if chosen.tiled or tiling == "never" or not is_out_of_memory(error):
            raise
    # Out here, because an error that is being handled keeps alive what was computed until it came.
    chosen = DecodePlan(True, "in tiles: whole it ran out of memory")
    log.warning("the VAE works %s", chosen.note)
    return run(True), chosen


def decode_one(model: ZImage, vae: Any, latents: Tensor, tiled: bool) -> Tensor:
    """RGB [1, 3, H, W] in about -1..1 from scaled latents [1, C, h, w]."""
    plain = unscaled(model, latents).to(model.vae_device, model.vae_dtype)
    return _switched(vae, tiled).decode(plain, return_dict=False)[0]


def _switched(vae: Any, tiled: bool) -> Any:
    """The VAE with its switch for tiles so; the one that everybody shares stays as it is."""
    own = copy.copy(vae)
    own.use_tiling = tiled
    return own


def unscaled(model: ZImage, latents: Tensor) -> Tensor:
    """Latents as the VAE, and ComfyUI's LATENT, have them."""
    return latents / model.scaling_factor + model.shift_factor


def encode(
    model: ZImage, pictures: Tensor, generators: Sequence[torch.Generator | None], tiling: str = "auto"
) -> Tensor:
    """Scaled latents [B, C, h, w] (float32, on the device) of pictures [1 or B, H, W, 3] in 0..1, for B generators.

    Drawn from the VAE's distribution with the picture's own generator, on the CPU; its middle for a generator of None.
    """
    height, width = pictures.shape[1:3]
    found: list[Tensor] = []
    with model.vae.resident(activation_bytes(model, width, height)) as vae:
        chosen = DecodePlan(tiling == "always", "")
        for number, private in enumerate(generators):
            if number < len(pictures):
                host.current().check_interrupt()
                pixels = pictures[number : number + 1].permute(0, 3, 1, 2).to(model.vae_device, model.vae_dtype) * 2 - 1
                spread, chosen = _in_room(partial(_spread, vae, pixels), chosen, tiling)
            sample = spread.mode() if private is None else spread.sample(generator=private)
            found.append((sample.float().to(model.device) - model.shift_factor) * model.scaling_factor)
    return torch.cat(found)


def _spread(vae: Any, pixels: Tensor, tiled: bool) -> Any:
    """The distribution of the plain latents of pixels [1, 3, H, W] in -1..1."""
    return _switched(vae, tiled).encode(pixels).latent_dist


def fit_pictures(pictures: Tensor, width: int, height: int) -> Tensor:
    """Pictures [B, H, W, C] scaled to cover width x height, the middle kept."""
    scale = max(width / pictures.shape[2], height / pictures.shape[1])
    # First without what is sure to be cut off: a strip that covers a square can have a hundred times its pixels.
    margin = 6 * max(1.0, 1 / scale)  # the filter below reads that much around it
    rows = _middle(pictures.shape[1], height / scale + margin)
    columns = _middle(pictures.shape[2], width / scale + margin)
    pictures = pictures[:, rows, columns]
    size = (max(height, round(pictures.shape[1] * scale)), max(width, round(pictures.shape[2] * scale)))
    planes = pictures.permute(0, 3, 1, 2).float()
    if tuple(planes.shape[-2:]) != size:
        planes = F.interpolate(planes, size=size, mode="bicubic", antialias=True).clamp(0, 1)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return planes[:, :, top : top + height, left : left + width].permute(0, 2, 3, 1)


def _middle(side: int, kept: float) -> slice:
    """The middle `kept` of `side` pixels, or a pixel more; the same number is cut off at both ends."""
    cut = max(0, int((side - kept) / 2))
    return slice(cut, side - cut)
