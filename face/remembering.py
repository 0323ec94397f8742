"""Results by content: a picture that was looked at with the same settings is not looked at again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from .. import host
from ..cache import content_key, named_cache
from ..host.cores import on_cores
from .faces import DetectionOptions, FaceChoice, Faces
from .pictures import PictureGroup

RESULTS_LIMIT = 64 << 20  # bytes
PIECES = 4  # of a picture, hashed side by side


class Memory:
    """What is known about the pictures of one call, by the MD5 of their pixels and of every setting.

    The faces of a picture before one is chosen, with embeddings or without, serve every choice; those with embeddings
    serve who asks for none.
    """

    def __init__(
        self,
        fingerprint: str,
        groups: list[PictureGroup],
        choose: FaceChoice | None,
        embed: bool,
        options: DetectionOptions,
    ) -> None:
        """`fingerprint`: what a result depends on besides pictures and settings."""
        self._cache = named_cache("faces", RESULTS_LIMIT)
        self._choose, self._embed = choose, embed
        choice = None if choose is None else (choose.kind, choose.position, choose.identity)
        looked = content_key(fingerprint, options.lowest_score, options.overlap, options.sizes)
        self._wanted = content_key(looked, choice, embed)
        self._whole = {embedded: content_key(looked, None, embedded) for embedded in (False, True)}
        entries = [
            (p, picture) for group in groups for p, picture in zip(group.positions, group.pixels.cpu(), strict=True)
        ]
        pieces = [piece for _, picture in entries for piece in torch.tensor_split(picture, PIECES)]
        digests = iter(on_cores(content_key, pieces))
        self._pixels = {position: content_key([next(digests) for _ in range(PIECES)]) for position, _ in entries}

    def result(self, position: int) -> Faces | None:
        """What the call asks about the picture at `position`, where it can be told without looking."""
        found = self._get(position, self._wanted)
        if found is not None:
            return found
        whole = self._get(position, self._whole[self._embed])
        if whole is None and not self._embed and (embedded := self._get(position, self._whole[True])) is not None:
            whole = replace(embedded, embeddings=None)
        if whole is None or self._choose is None:
            return whole
        return self._choose.apply(whole)

    def keep(self, position: int, faces: Faces) -> Faces:
        """Remember the result; returns it."""
        return self._put(position, self._wanted, faces)

    def detection(self, position: int) -> Faces | None:
        """All faces of the picture, without embeddings."""
        return self._get(position, self._whole[False])

    def keep_detection(self, position: int, faces: Faces) -> Faces:
        return self._put(position, self._whole[False], faces)

    def _get(self, position: int, settings: str) -> Faces | None:
        found: Faces | None = self._cache.get(content_key(settings, self._pixels[position]))
        return found

    def _put(self, position: int, settings: str, faces: Faces) -> Faces:
        kept: Faces = self._cache.put(content_key(settings, self._pixels[position]), faces)
        return kept


def analyse_in_parts(
    groups: list[PictureGroup],
    memory: Memory | None,
    at_once: int,
    compute: Callable[[list[PictureGroup]], list[Faces]],
) -> tuple[list[Faces], int]:
    """The faces of all pictures in order, `at_once` pictures of any sizes computed together, and how many were remembered.

    `memory` is None when nothing is to be remembered. Checks for an interrupt between the parts. What is returned is the
    caller's own: packs that take our analyser for insightface's scale boxes and normalise embeddings in place.
    """
    count = sum(len(group.positions) for group in groups)
    found: list[Faces | None] = [memory.result(i) if memory is not None else None for i in range(count)]
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
                found[position] = memory.keep(position, faces) if memory is not None else faces
            bar.update(len(positions))
    return [faces.copy() if memory is not None else faces for faces in found if faces is not None], remembered
