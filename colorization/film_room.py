"""How large a film's frames are in the networks, and how much room on the device its job takes."""

from __future__ import annotations

import torch

from .film_options import FilmOptions
from .frame_budget import colormnet_batch, deep_exemplar_batch
from .pictures import network_size


def computed_size(options: FilmOptions, height: int, width: int) -> tuple[int, int]:
    """Height and width of what the networks see of frames of height x width: of half `colour_size` for Deep Exemplar."""
    small = network_size(height, width, options.colour_size)
    return (max(1, small[0] // 2), max(1, small[1] // 2)) if options.method == "Deep Exemplar" else small


def activations(
    options: FilmOptions, size: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> tuple[int, int]:
    """Frames per batch and bytes of activations for a film whose frames are of `size`, (height, width)."""
    small = computed_size(options, *size)
    if options.method == "Deep Exemplar":
        return deep_exemplar_batch(*small, device)
    return colormnet_batch(*small, dtype, device, options.memory_mode)
