"""The inputs that our colour nodes have in common, and what is read from them."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch

from ..colorization.colormnet.settings import MODES
from ..colorization.edge_filter import FILTERS
from ..colorization.film_options import METHODS, SHOTS, FilmOptions, Reference, read_references
from ..colorization.networks import AUTOMATIC, COLORMNET_LICENCE, PRECISIONS
from ..colorization.pictures import as_frames
from .colour_sockets import checkpoint_input

METHOD = (
    list(METHODS),
    {
        "default": METHODS[0],
        "tooltip": "ColorMNet remembers the whole film and is steadier; its weights are for non-commercial use. Deep "
        "Exemplar matches every frame with the reference alone, and is lighter.",
    },
)
REFERENCE = (
    "IMAGE",
    {"tooltip": "A picture in the colours you want, any size. A batch counts as several references."},
)
COLOUR_SIZE = (
    "INT",
    {
        "default": 432,
        "min": 0,
        "max": 2160,
        "step": 16,
        "tooltip": "Short side at which colours are computed; they are put on the frames' own luminance at full "
        "size. 0: the frames' size. Larger is slower and seldom better.",
    },
)
STRENGTH = (
    "FLOAT",
    {"default": 1.0, "min": 0.0, "max": 2.0, "step": 0.05, "tooltip": "Factor on the chroma: 0 is grey."},
)
EDGE_FILTER = (
    list(FILTERS),
    {
        "default": "guided",
        "tooltip": "Keeps enlarged colours from spilling over edges of the picture. guided is fast; the fast global "
        "smoother is what Deep Exemplar's own programs use, and smooths more.",
    },
)
SHOT_THRESHOLD = (
    "FLOAT",
    {"default": 27.0, "min": 1.0, "max": 255.0, "step": 0.5, "tooltip": "Change of brightness that counts as a cut."},
)
PRECISION = (
    list(PRECISIONS),
    {
        "default": AUTOMATIC,
        "tooltip": "Number format of the networks. Matching, memory keys and the recurrent state are always float32.",
    },
)
COMPILE = (
    "BOOLEAN",
    {"default": False, "tooltip": "torch.compile: a minute or more at the first run of a size, then faster."},
)
CHECKPOINT = f"ColorMNet's file in models/colormnet; Deep Exemplar finds its three by itself. {COLORMNET_LICENCE}"


def film_inputs() -> dict[str, Any]:
    """What films in memory and in files have in common."""
    return {
        "more_references": ("IMAGE", {"tooltip": "Further references, of another size than the first."}),
        "reference_frames": (
            "STRING",
            {
                "default": "",
                "tooltip": "Which frame of the film each reference is, separated by commas; - is only an example. 0, "
                "250, - : the first is frame 0 in colour, the second frame 250, the third is an example.",
            },
        ),
        "colour_size": COLOUR_SIZE,
        "memory_mode": (
            list(MODES),
            {"default": MODES[0], "tooltip": "How much ColorMNet remembers. The report gives the bytes."},
        ),
        "strength": STRENGTH,
        "edge_filter": EDGE_FILTER,
        "temporal_smoothing": (
            "FLOAT",
            {
                "default": 0.0,
                "min": 0.0,
                "max": 0.95,
                "step": 0.05,
                "tooltip": "How much of the last frame's colour stays where the picture does not change.",
            },
        ),
        "shots": (
            list(SHOTS),
            {
                "default": SHOTS[0],
                "tooltip": "At every cut (found by PySceneDetect) forget what came before; reference per shot also takes "
                "the next reference there.",
            },
        ),
        "shot_threshold": SHOT_THRESHOLD,
        "propagate": (
            "BOOLEAN",
            {"default": True, "tooltip": "Deep Exemplar: each frame sees the colours of the one before."},
        ),
        "precision": PRECISION,
        "use_torch_compile": COMPILE,
        "checkpoint": checkpoint_input(CHECKPOINT),
    }


def references_of(first: torch.Tensor, more: torch.Tensor | None, frames: str) -> list[Reference]:
    pictures = [*as_frames(first, "the reference")]
    if more is not None:
        pictures += [*as_frames(more, "more_references")]
    return read_references(pictures, frames)


def options_of(method: str, settings: dict[str, Any]) -> FilmOptions:
    """FilmOptions from the widgets that are options; the others are read by the node."""
    names = {field.name for field in fields(FilmOptions)}
    chosen = {name: value for name, value in settings.items() if name in names}
    return FilmOptions(method=method, compile=settings.get("use_torch_compile", False), **chosen)
