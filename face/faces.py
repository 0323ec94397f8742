"""What is known about the faces of one picture, how one of them is chosen, and what every engine can do.

Key points follow ArcFace's five: the eye and the mouth corner on the left of the picture come first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from ..host.letters import counted

LOWEST_SCORE = 0.5  # that counts as a face, where nobody says otherwise
LADDER = tuple(range(640, 191, -64))  # 640, 576, ... 192: the detector sizes the reference InstantID pack tries


class FaceError(ValueError):
    """A picture, a file or a setting the face engine cannot work with; the message says which, and the cure."""


@dataclass(frozen=True, eq=False)  # tensors have no single truth to compare by
class Faces:
    """The faces of one picture. All tensors are float32 on the CPU; pixel coordinates are of that picture."""

    boxes: Tensor  # [N, 4] x0 y0 x1 y1
    keypoints: Tensor  # [N, 5, 2] eye, eye, nose, mouth, mouth, image-left first
    scores: Tensor  # [N] 0..1, the best first as they come from a detector
    embeddings: Tensor | None  # [N, D] raw ArcFace, not normalised; None when nobody asked for them
    size: tuple[int, int]  # height, width of the picture
    detector_size: int  # side at which the detector found them, or the last one tried

    def __len__(self) -> int:
        return int(self.boxes.shape[0])

    @classmethod
    def none(cls, size: tuple[int, int], detector_size: int, width: int | None = None) -> Faces:
        """A picture without faces; `width` is that of the embeddings, None when none were asked for."""
        return cls(
            boxes=torch.zeros(0, 4),
            keypoints=torch.zeros(0, 5, 2),
            scores=torch.zeros(0),
            embeddings=None if width is None else torch.zeros(0, width),
            size=size,
            detector_size=detector_size,
        )

    def select(self, indices: Sequence[int]) -> Faces:
        """These faces only, in this order."""
        chosen = torch.tensor(list(indices), dtype=torch.long)
        return replace(
            self,
            boxes=self.boxes[chosen],
            keypoints=self.keypoints[chosen],
            scores=self.scores[chosen],
            embeddings=None if self.embeddings is None else self.embeddings[chosen],
        )

    def copy(self) -> Faces:
        """These faces in memory of their own, for whoever may change them in place."""
        return self.select(range(len(self)))

    @property
    def areas(self) -> Tensor:
        """[N] box areas in square pixels."""
        return (self.boxes[:, 2] - self.boxes[:, 0]) * (self.boxes[:, 3] - self.boxes[:, 1])

    def similarity(self, identity: Tensor) -> Tensor:
        """[N] cosine of each face's embedding to `identity` [D]. Raises FaceError when there are no embeddings."""
        if self.embeddings is None:
            raise FaceError("These faces carry no embeddings to compare; find them with embeddings switched on.")
        wanted = identity.detach().float().cpu().reshape(-1)
        if wanted.numel() != self.embeddings.shape[1]:
            raise FaceError(
                f"The identity has {wanted.numel()} numbers and this recogniser makes {self.embeddings.shape[1]}: "
                "both must come from the same recogniser."
            )
        return torch.nn.functional.cosine_similarity(self.embeddings, wanted[None], dim=1)


BEST_MATCH = "best match"
CHOICES = ("largest", "highest score", "left to right", "centre", "index", BEST_MATCH)


@dataclass(frozen=True, eq=False)
class FaceChoice:
    """Which face of a picture is kept. Make one with the class methods, or by name with `choose_face`."""

    kind: str
    position: int = 0  # of "left to right" and "index"; negative counts from the end
    identity: Tensor | None = None  # [D] of "best match"

    def __post_init__(self) -> None:
        if self.kind not in CHOICES:
            raise FaceError(f"{self.kind!r} is no way to choose a face; it is one of: {', '.join(CHOICES)}.")
        if self.needs_embeddings and self.identity is None:
            raise FaceError("The best match needs an identity to compare with; connect an embedding.")

    @classmethod
    def largest(cls) -> FaceChoice:
        """The largest box; among equal ones the last, as the reference pack's stable sort has it."""
        return cls("largest")

    @classmethod
    def highest_score(cls) -> FaceChoice:
        return cls("highest score")

    @classmethod
    def left_to_right(cls, index: int = 0) -> FaceChoice:
        """The face at `index`, counted from the left by box centre; -1 is the rightmost."""
        return cls("left to right", index)

    @classmethod
    def centre(cls) -> FaceChoice:
        """The face whose box centre is nearest to the centre of the picture."""
        return cls("centre")

    @classmethod
    def index(cls, index: int) -> FaceChoice:
        """The face at `index` in the detector's order, the highest score first; -1 is the last."""
        return cls("index", index)

    @classmethod
    def best_match(cls, identity: Tensor) -> FaceChoice:
        """The face whose embedding has the highest cosine to `identity` [D]."""
        return cls(BEST_MATCH, 0, identity)

    @property
    def needs_embeddings(self) -> bool:
        return self.kind == BEST_MATCH

    def order(self, faces: Faces) -> list[int]:
        """All faces, the preferred one first."""
        count = len(faces)
        if self.kind == "largest":
            return sorted(range(count), key=faces.areas.tolist().__getitem__)[::-1]
        if self.kind == "highest score":
            scores = faces.scores.tolist()
            return sorted(range(count), key=lambda i: -scores[i])
        centres = ((faces.boxes[:, :2] + faces.boxes[:, 2:]) / 2).tolist()
        if self.kind == "left to right":
            return sorted(range(count), key=lambda i: centres[i][0])
        if self.kind == "centre":
            height, width = faces.size
            return sorted(
                range(count), key=lambda i: (centres[i][0] - width / 2) ** 2 + (centres[i][1] - height / 2) ** 2
            )
        if self.kind == BEST_MATCH:
            assert self.identity is not None
            cosines = faces.similarity(self.identity).tolist()
            return sorted(range(count), key=lambda i: -cosines[i])
        return list(range(count))

    def apply(self, faces: Faces) -> Faces:
        """At most one face; none when there is none, or none at the position that was asked for."""
        if not len(faces):
            return faces
        order = self.order(faces)
        position = self.position + len(order) if self.position < 0 else self.position
        return faces.select([order[position]] if 0 <= position < len(order) else [])


def choose_face(kind: str, position: int = 0, identity: Tensor | None = None) -> FaceChoice:
    """The choice called `kind` (one of CHOICES). Raises FaceError for another name or a missing identity."""
    return FaceChoice(kind, position if kind in ("left to right", "index") else 0, identity)


@dataclass(frozen=True)
class DetectionOptions:
    """How faces are looked for. The defaults are those of the reference InstantID pack."""

    threshold: float | None = None  # lowest score that counts as a face; None: the analyser's own, of ours 0.5
    overlap: float = 0.4  # boxes whose IoU is above this are one face
    sizes: tuple[int, ...] = LADDER  # sides tried in order, each only on the pictures still without a face

    @classmethod
    def from_side(cls, side: int, threshold: float | None = None) -> DetectionOptions:
        """`side` is tried first, then the reference's: at a large one a face that fills its picture may be missed."""
        return cls(threshold, sizes=tuple(dict.fromkeys((side, *LADDER))))

    @property
    def lowest_score(self) -> float:
        """The threshold of our analysers."""
        return LOWEST_SCORE if self.threshold is None else self.threshold


def call_summary(result: Sequence[Faces], remembered: int, seconds: float, where: str = "", found: str = "") -> str:
    """What a call found, for a report. where: behind the number of pictures; found: behind that of faces."""
    without = sum(not len(faces) for faces in result)
    return (
        f"{counted(len(result), 'picture')}{where}, {counted(sum(map(len, result)), 'face')}{found}"
        + (f", {counted(without, 'picture')} without a face" if without else "")
        + (f", {remembered} remembered" if remembered else "")
        + f", {seconds * 1000:.0f} ms"
    )


@runtime_checkable
class FaceAnalyser(Protocol):
    """Anything that finds faces: our engines, or a foreign FACEANALYSIS object behind `adapt`."""

    def analyse(
        self,
        images: Tensor | Sequence[Tensor],
        *,
        choose: FaceChoice | None = None,
        embed: bool = True,
        options: DetectionOptions = ...,
    ) -> list[Faces]:
        """The faces of each picture, in order.

        images: [B, H, W, C] or a list of [H, W, C], float RGB in 0..1, C of 1, 3 or 4. `choose` keeps at most one
        face per picture, None keeps all. Raises FaceError for pictures without pixels, with NaN, or of another shape.
        """

    def report(self) -> str:
        """One line: what ran where, and why."""
