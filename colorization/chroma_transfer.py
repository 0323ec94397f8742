"""The chroma of one picture on the luminance of another of the same scene."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import host
from .colour_space import rgb_to_lab
from .edge_filter import apply_filter
from .full_size import frames_of, luminance_of_frames
from .pictures import as_frames, resized, to_channels_first


def transfer_chroma(
    luminance: Tensor, colours: Tensor, strength: float, edge_filter: str, device: torch.device
) -> Tensor:
    """luminance [T, H, W, C] and colours [T or 1, h, w, C] IMAGEs. Returns [T, H, W, 3] in 0..1 on the CPU.

    The colours are stretched over the picture; edge_filter: of `edge_filter.FILTERS`, guided by the luminance.
    """
    pictures = as_frames(luminance, "the luminance pictures")
    painted = as_frames(colours, "the colour pictures")
    if len(painted) not in (1, len(pictures)):
        raise ValueError(
            f"There are {len(painted)} colour pictures for {len(pictures)} luminance pictures; connect one, or as many."
        )
    height, width = pictures.shape[1:3]
    result = torch.empty(len(pictures), height, width, 3)
    with torch.inference_mode():
        for index in host.each(range(len(pictures)), "colours"):
            light = luminance_of_frames(pictures[index : index + 1], device)
            if index < len(painted):
                source = to_channels_first(painted[index : index + 1], device)
                chroma = resized(rgb_to_lab(source)[:, 1:], height, width)
            filtered = apply_filter(edge_filter, light, chroma) * strength
            result[index] = frames_of(light, filtered, torch.float32)[0].cpu()
    return result
