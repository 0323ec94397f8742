"""How large a film's frames are in the networks, and how much room on the device its job takes."""

from __future__ import annotations

import torch

from .colormnet.network import PATCH, ColorMNetWidths
from .colormnet.settings import ColorMNetSettings
from .film_options import FilmOptions
from .frame_budget import colormnet_batch, deep_exemplar_batch
from .full_size import conversions
from .pictures import network_size

# Per pixel, the peak of live tensors between chroma at network size and 8 bits, whatever the filter.
CONVERTED_BYTES = 115
STRIDE = 16  # of the features that ColorMNet remembers


def computed_size(options: FilmOptions, height: int, width: int) -> tuple[int, int]:
    """Height and width of what the networks see of frames of height x width: of half `colour_size` for Deep Exemplar."""
    small = network_size(height, width, options.colour_size)
    return (max(1, small[0] // 2), max(1, small[1] // 2)) if options.deep_exemplar else small


def activations(
    options: FilmOptions, size: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> tuple[int, int]:
    """Frames per batch and bytes of activations for a film whose frames are of `size`, (height, width)."""
    small = computed_size(options, *size)
    if options.deep_exemplar:
        return deep_exemplar_batch(*small, device)
    return colormnet_batch(*small, dtype, device, options.memory_mode)


def full_size_room(size: tuple[int, int], portion: int, bytes_per_number: int, device: torch.device) -> tuple[int, int]:
    """Bytes of full-size frames, (height, width), that are held while the networks run, and beside them while they are
    converted. portion: frames on the device at a time, while as many more are on their way."""
    pixels = size[0] * size[1]
    frames = 2 * 3 * bytes_per_number * portion * pixels
    luminance = 4 * portion * pixels
    return frames + luminance, CONVERTED_BYTES * min(conversions(*size, device).size, portion) * pixels


def memory_room(mode: str, size: tuple[int, int], widths: ColorMNetWidths, dtype: torch.dtype, references: int) -> int:
    """Bytes of ColorMNet's memory at its fullest, for frames that are of `size` in the network."""
    places = -(-size[0] // PATCH) * -(-size[1] // PATCH) * (PATCH // STRIDE) ** 2
    settings = ColorMNetSettings.for_mode(mode)
    return settings.nbytes(places, widths.key, widths.values.value, dtype.itemsize, max(1, references))
