"""Results by content: a picture that was looked at with the same settings is not looked at again."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .. import host
from ..cache import content_key, named_cache
from ..host.cores import on_cores
from .faces import DetectionOptions, FaceChoice, Faces
from .pictures import PictureGroup

RESULTS_LIMIT = 64 << 20  # bytes
PIECES = 4  # of a picture, hashed side by side


def picture_keys(
    fingerprint: str,
    groups: list[PictureGroup],
    choose: FaceChoice | None,
    embed: bool,
    options: DetectionOptions,
) -> dict[int, str]:
    """MD5 of each picture's pixels and every setting, by the picture's position in the call."""
    choice = None if choose is None else (choose.kind, choose.position, choose.identity)
    settings = content_key(fingerprint, choice, embed, options.lowest_score, options.overlap, options.sizes)
    entries = [(p, picture) for group in groups for p, picture in zip(group.positions, group.pixels.cpu(), strict=True)]
    pieces = [piece for _, picture in entries for piece in torch.tensor_split(picture, PIECES)]
    digests = iter(on_cores(content_key, pieces))
    return {position: content_key(settings, [next(digests) for _ in range(PIECES)]) for position, _ in entries}


def analyse_in_parts(
    groups: list[PictureGroup],
    keys: dict[int, str],
    at_once: int,
    compute: Callable[[list[PictureGroup]], list[Faces]],
) -> tuple[list[Faces], int]:
    """The faces of all pictures in order, `at_once` pictures of any sizes computed together, and how many were remembered.

    `keys` is empty when nothing is to be remembered. Checks for an interrupt between the parts. What is returned is the
    caller's own: packs that take our analyser for insightface's scale boxes and normalise embeddings in place.
    """
    count = sum(len(group.positions) for group in groups)
    cache = named_cache("faces", RESULTS_LIMIT)
    found: list[Faces | None] = [cache.get(keys[i]) if keys else None for i in range(count)]
    remembered = sum(faces is not None for faces in found)
    with host.tracked(host.current(), count, "faces") as bar:
        bar.update(remembered)
        missing = [(group, row) for group in groups for row, p in enumerate(group.positions) if found[p] is None]
        for start in range(0, len(missing), at_once):
            chosen = missing[start : start + at_once]
            part = [
                group.take([row for owner, row in chosen if owner is group])
                for group in groups
                if any(owner is group for owner, _ in chosen)
            ]
            positions = [p for group in part for p in group.positions]
            for position, faces in zip(positions, compute(part), strict=True):
                found[position] = cache.put(keys[position], faces) if keys else faces
            bar.update(len(positions))
    return [faces.copy() if keys else faces for faces in found if faces is not None], remembered
