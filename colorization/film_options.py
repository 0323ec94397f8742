"""How a film is coloured and after which pictures, as people say it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..attention.dispatch import POLICIES
from ..attention.local_window import AUTOMATIC, BACKENDS
from .colormnet.settings import MODES
from .colour_space import rgb_to_lab
from .edge_filter import FILTERS
from .pictures import as_frames, to_channels_first

METHODS = ("ColorMNet", "Deep Exemplar")
SHOTS = ("off", "reset", "reference per shot")


@dataclass(frozen=True)
class FilmOptions:
    """How a film is coloured.

    colour_size: short side of the picture whose colours are computed; 0 for the frames' own size. Deep Exemplar's
    networks see half of it, as they were trained. strength: factor on the chroma. temporal_smoothing: 0..1, how much
    of the last frame's chroma stays where the luminance stays. shots: forget everything at a cut, or also take the
    next reference. propagate: Deep Exemplar's feedback of the last frame. attention: of ColorMNet's DINOv2, by any backend
    of the pack; auto is the fastest exact one. local_attention: the way to ColorMNet's 15x15 attention.
    """

    method: str = "ColorMNet"
    colour_size: int = 432
    memory_mode: str = "balanced"
    strength: float = 1.0
    edge_filter: str = "none"
    temporal_smoothing: float = 0.0
    shots: str = "off"
    shot_threshold: float = 27.0
    propagate: bool = True
    compile: bool = False
    attention: str = "auto"
    local_attention: str = AUTOMATIC

    def __post_init__(self) -> None:
        for name, value, choices in (
            ("method", self.method, METHODS),
            ("memory mode", self.memory_mode, MODES),
            ("edge filter", self.edge_filter, FILTERS),
            ("shots", self.shots, SHOTS),
            ("attention", self.attention, POLICIES),
            ("local attention", self.local_attention, BACKENDS),
        ):
            if value not in choices:
                raise ValueError(f"There is no {name} {value!r}; choose one of {', '.join(choices)}.")
        if not 0 <= self.temporal_smoothing < 1:
            raise ValueError(f"temporal_smoothing must be from 0 to under 1, not {self.temporal_smoothing}.")
        if not 0 <= self.strength < math.inf:
            raise ValueError(f"strength is a factor on the chroma, 0 or more, not {self.strength}.")
        if self.colour_size < 0:
            raise ValueError(f"colour_size must be 0, for the frames' own size, or more, not {self.colour_size}.")
        if not 0 < self.shot_threshold <= 255:
            raise ValueError(f"shot_threshold must be above 0 and at most 255, not {self.shot_threshold}.")

    @property
    def deep_exemplar(self) -> bool:
        """Whether it is that one of the two methods."""
        return self.method == "Deep Exemplar"

    def deciding(self) -> dict[str, Any]:
        """The options that decide what the film looks like, by name: not the ways to compute the same, nor those that the
        method does not know."""
        idle = {
            "compile",
            "attention",
            "local_attention",
            "memory_mode" if self.deep_exemplar else "propagate",
        }
        if self.shots == "off":
            idle.add("shot_threshold")
        return {name: value for name, value in asdict(self).items() if name not in idle}


@dataclass(frozen=True)
class Reference:
    """A picture whose colours are wanted. lab: [3, h, w], any size. frame: the frame of the film that it is in
    colour, or None for an example."""

    lab: Tensor
    frame: int | None = None


def read_references(pictures: Sequence[Tensor], frames: str = "") -> list[Reference]:
    """pictures: each [H, W, C]. frames: the film's frame that each of them is, by commas; empty or "-" for none."""
    written = [part.strip() for part in frames.split(",")] if frames.strip() else []
    if len(written) > len(pictures):
        raise ValueError(f"reference_frames names {len(written)} frames for {len(pictures)} reference pictures.")
    numbers: list[int | None] = []
    for part in written:
        if part in ("", "-"):
            numbers.append(None)
        elif part.isdecimal() and int(part) not in numbers:
            numbers.append(int(part))
        elif part.isdecimal():
            raise ValueError(f"reference_frames names frame {int(part)} twice; a frame has one reference.")
        else:
            raise ValueError(f"reference_frames must be whole numbers by commas, or - for none; {part!r} is not one.")
    numbers += [None] * (len(pictures) - len(numbers))
    cpu = torch.device("cpu")
    labs = [rgb_to_lab(to_channels_first(as_frames(picture, "a reference"), cpu))[0] for picture in pictures]
    return [Reference(lab, frame) for lab, frame in zip(labs, numbers, strict=True)]


def unreached(references: Sequence[Reference], frames: int) -> list[str]:
    """A sentence for every reference that is a frame behind the last of a film of `frames`."""
    return [
        f"Reference {number} is frame {reference.frame}, counted from 0, and the film has {frames}: it was an example only."
        for number, reference in enumerate(references, start=1)
        if reference.frame is not None and reference.frame >= frames
    ]


def outside(references: Sequence[Reference], first: int, stop: int, method: str) -> list[str]:
    """The same of a part of a film, its frames first..stop-1. Deep Exemplar goes on with the reference of a frame before."""
    return [
        f"Reference {number} is frame {reference.frame}, counted from 0, and this part has the frames {first} to {stop - 1}: "
        "it was an example only."
        for number, reference in enumerate(references, start=1)
        if reference.frame is not None
        and (reference.frame >= stop or (reference.frame < first and method != "Deep Exemplar"))
    ]
