"""Operations on the faces of a batch of pictures, as the nodes and the command line offer them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import host
from .alignment import TEMPLATE
from .areas import face_mask, fit_keypoints
from .crops import CropPlaces, crop_places, cut
from .faces import FaceChoice, FaceError, Faces
from .keypoints import draw_keypoints
from .marks import mark_faces
from .pictures import in_float

NAMED = 12  # pictures in a message


def require_faces(faces: Sequence[Faces], choice: FaceChoice | None = None) -> None:
    """Raises FaceError naming the pictures without a face; `choice`: what kept at most one of each picture."""
    missing = [str(i) for i, found in enumerate(faces) if not len(found)]
    if missing:
        listed = ", ".join(missing[:NAMED]) + (f" and {len(missing) - NAMED} more" if len(missing) > NAMED else "")
        pictures = "picture" if len(missing) == 1 else "pictures"
        where = f"{pictures} {listed} of {len(faces)}, counted from 0" if len(faces) > 1 else "the picture"
        if choice is not None and choice.position not in (0, -1):
            raise FaceError(
                f"There is no face at index {choice.position}{' from the left' if choice.kind == 'left to right' else ''} in "
                f"{where}: fewer were found, so choose an index nearer to 0, lower the threshold, or choose 'skip'."
            )
        raise FaceError(
            f"No face was found in {where}: lower the threshold, raise detector_size where faces are small in a large "
            "picture, use a clearer picture, or choose 'skip'."
        )


def describe(faces: Sequence[Faces]) -> str:
    """One line per picture: how many faces, where, with which scores."""
    lines = []
    for i, found in enumerate(faces):
        boxes = "; ".join(
            f"{j}: {box[0]:.0f},{box[1]:.0f} to {box[2]:.0f},{box[3]:.0f} score {float(found.scores[j]):.2f}"
            for j, box in enumerate(found.boxes.tolist())
        )
        lines.append(f"picture {i} ({found.size[1]}x{found.size[0]}): {boxes or 'no face'}")
    return "\n".join(lines)


def average_identity(faces: Sequence[Faces]) -> Tensor:
    """[D] the mean direction of all embeddings. Raises FaceError when there are none."""
    vectors = [found.embeddings for found in faces if found.embeddings is not None and len(found)]
    if not vectors:
        raise FaceError(
            "The identity has no embedded face: connect a picture with a face, with embeddings switched on."
        )
    return F.normalize(torch.cat(vectors), dim=1).mean(0)


def _target(faces: Sequence[Faces], height: int, width: int) -> tuple[int, int]:
    if not faces:
        raise FaceError("There are no pictures: the faces are those of an empty batch.")
    return height or faces[0].size[0], width or faces[0].size[1]


def draw_faces(faces: Sequence[Faces], height: int = 0, width: int = 0, fit: str = "contain") -> Tensor:
    """[B, height, width, 3] key-point drawings, black without a face; 0 takes the size of the first picture."""
    height, width = _target(faces, height, width)
    drawings = torch.empty(len(faces), height, width, 3)
    for drawing, found in zip(drawings, host.each(faces, "key points"), strict=True):
        drawing.copy_(draw_keypoints(height, width, fit_keypoints(found, height, width, fit)))
    return drawings


def mask_faces(faces: Sequence[Faces], height: int, width: int, shape: str, grow: float, feather: float) -> Tensor:
    """[B, height, width] masks, see `face_mask`; 0 takes the size of the first picture."""
    height, width = _target(faces, height, width)
    masks = torch.empty(len(faces), height, width)
    for mask, found in zip(masks, host.each(faces, "masks"), strict=True):
        mask.copy_(face_mask(found, height, width, shape, grow, feather))
    return masks


def mark_pictures(pictures: Tensor, faces: Sequence[Faces]) -> Tensor:
    """[B, H, W, 3] float RGB: the pictures [B, H, W, C] with their faces drawn, see `mark_faces`.

    Those without a face are as they were, and with none in all of them it may be `pictures` itself.
    """
    if not any(map(len, faces)) and pictures.dtype == torch.float32 and pictures.shape[-1] == 3:
        return pictures
    pictures = pictures[None] if pictures.dim() == 3 else pictures
    marked = torch.empty(*pictures.shape[:3], 3)
    for out, picture, found in zip(marked, pictures, host.each(faces, "drawing"), strict=True):
        # Grey is repeated, transparency left out.
        out.copy_(mark_faces(picture, found) if len(found) else in_float(picture)[..., :3])
    return marked


def cut_faces(
    pictures: Tensor, faces: Sequence[Faces], side: int, margin: float, upright: bool, when_none: str
) -> tuple[Tensor, CropPlaces]:
    """Crops of all faces, and one for each picture without.

    when_none: "error"; "skip" gives a black crop; "pass through" the picture itself, shrunk. Both keep the batch aligned
    and are pasted nowhere: their place lies outside of every picture.
    """
    if when_none == "error":
        require_faces(faces)
    places = crop_places([f if len(f) else _nowhere(f) for f in faces], side, margin, upright)
    crops = cut(pictures, places)
    for i, row in enumerate(places.rows):
        if len(faces[row]):
            continue
        crops[i] = 0
        if when_none == "pass through":
            whole = in_float(pictures[row : row + 1]).permute(0, 3, 1, 2)
            small = F.interpolate(whole, size=(side, side), mode="bilinear", antialias=True, align_corners=False)
            crops[i] = small[0].permute(1, 2, 0)
    return crops, places


def _nowhere(faces: Faces) -> Faces:
    """One face far outside of the picture, so that its crop is pasted nowhere."""
    corner = -1e6
    box = torch.tensor([[corner, corner, corner + 100, corner + 100]])
    points = torch.tensor(TEMPLATE)[None] + corner
    return Faces(box, points, torch.zeros(1), None, faces.size, faces.detector_size)


@dataclass(frozen=True)
class Match:
    """How faces compare with an identity."""

    best: list[Faces]  # per picture, the most similar face if it reaches the threshold
    similarity: float  # mean over the pictures of the best cosine, 0 for one without a face
    all_match: bool
    report: str


def match_faces(faces: Sequence[Faces], identity: Sequence[Faces], threshold: float) -> Match:
    """Cosine of every face to the mean of `identity`. Raises FaceError when either side has no embeddings."""
    person = average_identity(identity)
    choice = FaceChoice.best_match(person)
    best, tops, lines = [], [], []
    for i, found in enumerate(faces):
        cosines = found.similarity(person) if len(found) else torch.zeros(0)
        top = float(cosines.max()) if len(found) else 0.0
        tops.append(top)
        best.append(choice.apply(found) if len(found) and top >= threshold else found.select([]))
        listed = ", ".join(f"{j}: {c:.3f}" for j, c in enumerate(cosines.tolist()))
        lines.append(f"picture {i}: {listed or 'no face'}")
    matched = all(len(b) for b in best)
    mean = sum(tops) / len(tops) if tops else 0.0
    summary = (
        f"Mean of the best cosines {mean:.3f}; {sum(len(b) > 0 for b in best)} of {len(best)} reach {threshold:.2f}."
    )
    return Match(best, mean, matched and bool(best), "\n".join([summary, *lines]))
