"""Steadier chroma from frame to frame: an average that lets go where the picture changes."""

from __future__ import annotations

from collections.abc import Container, Mapping

import torch
from torch import Tensor

TOLERANCE = 4.0  # change of L, in 0..100, at which the last frame counts 1/e


class ChromaSmoother:
    """amount: 0 for none, to under 1; how much of the last frame's chroma stays where the luminance stays."""

    def __init__(self, amount: float) -> None:
        self.amount = amount
        self._luminance: Tensor | None = None
        self._chroma: Tensor | None = None

    def __call__(self, luminance: Tensor, chroma: Tensor, known: Container[int] = ()) -> Tensor:
        """The next frames of one shot: luminance [T, 1, h, w] in 0..100 and chroma [T, 2, h, w]. known: which of them stay
        as they are."""
        if self.amount == 0:
            return chroma
        frames: list[Tensor] = []
        for index in range(len(chroma)):
            now, colours = luminance[index : index + 1], chroma[index : index + 1]
            if index not in known and self._luminance is not None and self._chroma is not None:
                keep = self.amount * torch.exp(-(now - self._luminance).abs() / TOLERANCE)
                colours = colours + keep * (self._chroma - colours)
            self._luminance, self._chroma = now, colours
            frames.append(colours)
        return torch.cat(frames)

    def forget(self) -> None:
        self._luminance = self._chroma = None

    def state(self) -> dict[str, Tensor]:
        if self._luminance is None or self._chroma is None:
            return {}
        return {"luminance": self._luminance.clone(), "chroma": self._chroma.clone()}

    def load(self, state: Mapping[str, Tensor], device: torch.device) -> None:
        self._luminance = state["luminance"].to(device) if "luminance" in state else None
        self._chroma = state["chroma"].to(device) if "chroma" in state else None
