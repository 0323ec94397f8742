"""Whether the people in two pictures are still the same: ArcFace cosines between faces at the same places."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


class FaceFinder(Protocol):
    """What finds and embeds faces; the pack's own analysers, or another pack's behind `face.adapt`."""

    def analyse(self, images: Tensor, *, embed: bool = True) -> Sequence[Any]:
        """Per picture of [B, H, W, 3]: `boxes` [N, 4], `embeddings` [N, D], and a length."""


@dataclass(frozen=True)
class FaceAgreement:
    """Faces in A and in B, and the cosine of each pair of them."""

    in_a: int
    in_b: int
    cosines: tuple[float, ...] = ()

    @property
    def least(self) -> float | None:
        """The lowest cosine, None where no face could be compared."""
        return min(self.cosines, default=None)

    @property
    def problem(self) -> str:
        """A sentence when faces are in one picture only, in neither, or not equally many; empty otherwise."""
        if not self.in_a and not self.in_b:
            return "No face was found in A or B, so the face cosine is not judged."
        if self.in_a == self.in_b:
            return ""
        if not self.in_a or not self.in_b:
            here, gone = ("A", "B") if self.in_a else ("B", "A")
            return f"There is a face in {here} and none in {gone}."
        return f"Faces: {self.in_a} in A, {self.in_b} in B; those at the same places were compared."

    @property
    def lost(self) -> bool:
        """Whether one picture has faces and the other has none."""
        return bool(self.in_a) != bool(self.in_b)


def compare_faces(finder: FaceFinder, a: Tensor, b: Tensor) -> FaceAgreement:
    """Find and pair the faces of two pictures [H, W, 3]: the same seed puts them at nearly the same places.

    Pairs are made by overlap, the largest first; a face without a counterpart is paired with nobody, except when each
    picture has exactly one face: then these two are compared wherever they are.
    """
    found_a, found_b = (finder.analyse(picture[None].contiguous(), embed=True)[0] for picture in (a, b))
    pairs = _pairs(found_a.boxes, found_b.boxes)
    cosines = (
        float(torch.nn.functional.cosine_similarity(found_a.embeddings[i], found_b.embeddings[j], dim=0))
        for i, j in pairs
    )
    # An embedding that is not finite is like nobody's; compared as it is, it would pass every threshold.
    return FaceAgreement(len(found_a), len(found_b), tuple(c if math.isfinite(c) else -1.0 for c in cosines))


def _pairs(a: Tensor, b: Tensor) -> list[tuple[int, int]]:
    if len(a) == len(b) == 1:
        return [(0, 0)]
    overlap = _overlap(a, b)
    pairs: list[tuple[int, int]] = []
    while overlap.numel() and float(overlap.max()) > 0:
        i, j = divmod(int(overlap.argmax()), overlap.shape[1])
        pairs.append((i, j))
        overlap[i], overlap[:, j] = 0, 0
    return pairs


def _overlap(a: Tensor, b: Tensor) -> Tensor:
    """[N, M] intersection over union of boxes."""
    low = torch.maximum(a[:, None, :2], b[None, :, :2])
    high = torch.minimum(a[:, None, 2:], b[None, :, 2:])
    shared = (high - low).clamp_min(0).prod(-1)
    areas = [(box[:, 2:] - box[:, :2]).clamp_min(0).prod(-1) for box in (a, b)]
    return shared / (areas[0][:, None] + areas[1][None] - shared).clamp_min(1e-9)
