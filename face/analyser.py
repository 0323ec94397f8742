"""The whole way from pictures to faces, on one device, for any number of pictures of any sizes.

Per part of the call: bytes to the device, letterbox, detector batches whatever the sizes, one copy of all candidates to
the host (the only wait), overlap and choice there, then recogniser batches over the chosen faces and one copy of their
embeddings. Pictures without a face go through again at the next smaller detector size, together.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from .. import host
from ..host.device_work import copies_at_once
from .alignment import invert, similarity, template, warp
from .detection import Candidates, Detector, merge_overlapping
from .faces import DetectionOptions, FaceChoice, FaceError, Faces, call_summary
from .graphs import MOST_BYTES
from .model_folder import ModelFolder
from .pictures import PictureGroup, group_pictures, letterbox
from .recognition import Recogniser
from .remembering import Memory, analyse_in_parts
from .runner import DETECTOR_BYTES_PER_PIXEL, joined

PICTURES_AT_ONCE = 32  # as bytes on the device
PICTURES_AT_A_STEP = 8  # of the detector on an accelerator, which more would not keep busier; fewer of large ones
FACES_AT_ONCE_ON_CPU = 4  # more gain nothing there, and a stop would wait for them


class PictureAnalyser:
    """A detector, and a recogniser that is loaded when an embedding is first asked for."""

    def __init__(
        self,
        folder: ModelFolder,
        detector: Detector,
        load_recogniser: Callable[[], Recogniser],
        fingerprint: str,
        why: list[str],
        remember: bool = True,
    ) -> None:
        """`fingerprint` names files, engine and precision, for the cache; `why` collects what there is to say
        about the engine. A recogniser that is loaded later may add to `why`, and change the fingerprint."""
        self.folder = folder
        self.detector = detector
        self.why = why
        self.remember = remember
        self.fingerprint = fingerprint
        self._load_recogniser = load_recogniser
        self._recogniser: Recogniser | None = None
        self._last = "ready"

    @property
    def device(self) -> torch.device:
        return self.detector.runner.device

    @property
    def recogniser(self) -> Recogniser:
        """Raises FaceError when the model folder has none."""
        if self._recogniser is None:
            if self.folder.recogniser is None:
                raise self.folder.missing_recogniser()
            self._recogniser = self._load_recogniser()
        return self._recogniser

    @property
    def embedding_width(self) -> int:
        """Of the loaded recogniser, else as its file says, which need not be loaded then."""
        if self._recogniser is None and self.folder.recogniser is not None:
            shape = self.folder.recogniser.outputs[0].shape
            if len(shape) == 2 and shape[1] is not None:
                return shape[1]
        return self.recogniser.width

    def analyse(
        self,
        images: Tensor | Sequence[Tensor],
        *,
        choose: FaceChoice | None = None,
        embed: bool = True,
        options: DetectionOptions = DetectionOptions(),  # noqa: B008 - frozen
    ) -> list[Faces]:
        """See `FaceAnalyser.analyse`. Remembered per picture by the MD5 of its pixels and of every setting."""
        began = time.perf_counter()
        embed = embed or (choose is not None and choose.needs_embeddings)
        groups = group_pictures(images, self.device)
        memory = Memory(self.fingerprint, groups, choose, embed, options) if self.remember else None
        result, remembered = analyse_in_parts(
            groups,
            memory,
            # Asking how much memory is free takes as long as a network.
            self._pictures_at_once(options) if sum(map(len, groups)) > PICTURES_AT_A_STEP else PICTURES_AT_A_STEP,
            lambda part: self._analyse_part([group.to(self.device) for group in part], choose, embed, options, memory),
        )
        self._note(result, remembered, options, time.perf_counter() - began)
        return result

    def _pictures_at_once(self, options: DetectionOptions) -> int:
        side = max(self._sizes(options), key=lambda s: s[0] * s[1])
        each = side[0] * side[1] * DETECTOR_BYTES_PER_PIXEL
        free = host.current().free_memory(self.device)
        return max(1, min(PICTURES_AT_ONCE, free // 2 // each))

    def _sizes(self, options: DetectionOptions) -> list[tuple[int, int]]:
        if self.detector.fixed_size is not None:
            return [self.detector.fixed_size]
        if not options.sizes or any(s < 32 or s % 32 for s in options.sizes):
            raise FaceError(f"Detector sizes are multiples of 32 from 32 up, not {list(options.sizes)}.")
        return [(s, s) for s in options.sizes]

    def _analyse_part(
        self,
        part: list[PictureGroup],
        choose: FaceChoice | None,
        embed: bool,
        options: DetectionOptions,
        memory: Memory | None,
    ) -> list[Faces]:
        faces = self._detect(part, options) if memory is None else self._detect_new(part, options, memory)
        late = choose is not None and choose.needs_embeddings
        if choose is not None and not late:
            faces = [choose.apply(one) for one in faces]
        if embed:
            faces = self._embed(part, faces)
        if choose is not None and late:
            faces = [choose.apply(one) for one in faces]
        return faces

    def _detect_new(self, part: list[PictureGroup], options: DetectionOptions, memory: Memory) -> list[Faces]:
        """`_detect` for those whose faces are not known from another choice, or from a call without embeddings."""
        positions = [p for group in part for p in group.positions]
        known = {p: found for p in positions if (found := memory.detection(p)) is not None}
        rows = [(group, [row for row, p in enumerate(group.positions) if p not in known]) for group in part]
        if new := [group.take(missing) for group, missing in rows if missing]:
            for position, faces in zip(
                (p for group in new for p in group.positions), self._detect(new, options), strict=True
            ):
                known[position] = memory.keep_detection(position, faces)
        return [known[p] for p in positions]

    def _detect(self, part: list[PictureGroup], options: DetectionOptions) -> list[Faces]:
        sizes = self._sizes(options)
        owners = [(group, row) for group in part for row in range(len(group))]
        found = [Faces.none(group.size, max(sizes[-1])) for group, _ in owners]
        still = list(range(len(owners)))
        # A CPU gains nothing from a batch of pictures of this size and loses its cache, nor from a common copy.
        together = 1 if self.device.type == "cpu" else len(still)
        for size in sizes:
            missed = []
            for start in range(0, len(still), together):
                asked = still[start : start + together]
                looked = self._candidates(part, [owners[i] for i in asked], size, options.lowest_score)
                for i, (candidates, scale) in zip(asked, looked, strict=True):
                    if len(candidates.scores):
                        found[i] = _merged(candidates, scale, options.overlap, owners[i][0].size, max(size))
                    else:
                        missed.append(i)
            still = missed
            if not still:
                break
        return found

    def _candidates(
        self, part: list[PictureGroup], wanted: list[tuple[PictureGroup, int]], size: tuple[int, int], threshold: float
    ) -> Iterator[tuple[Candidates, float]]:
        """What the detector finds in pictures (group, row), in the order of `part`, and the scale of each; one wait for all."""
        fit = MOST_BYTES // (size[0] * size[1] * DETECTOR_BYTES_PER_PIXEL)
        step = max(1, min(PICTURES_AT_A_STEP, fit))
        canvases, scales = [], []
        for start in range(0, len(wanted), step):
            canvas, own_scales = _canvas(part, wanted[start : start + step], size)
            canvases.append(canvas)
            scales += own_scales
        return zip(self.detector.find(canvases, threshold), scales, strict=True)

    def _embed(self, part: list[PictureGroup], faces: list[Faces]) -> list[Faces]:
        counts = [len(one) for one in faces]
        crops, start = [], 0
        for group in part:
            own = faces[start : start + len(group)]
            rows = [row for row, one in enumerate(own) for _ in range(len(one))]
            if rows:
                crops.append(self.aligned(group.pixels, torch.tensor(rows), torch.cat([one.keypoints for one in own])))
            start += len(own)
        vectors = self._vectors(joined(crops)).cpu() if crops else torch.zeros(0, self.embedding_width)
        return [
            replace(one, embeddings=vector.clone())
            for one, vector in zip(faces, torch.split(vectors, counts), strict=True)
        ]

    def _vectors(self, crops: Tensor) -> Tensor:
        """One embedding a crop; a CPU, which takes its time, hears a stop between a few of them."""
        step = FACES_AT_ONCE_ON_CPU if self.device.type == "cpu" else len(crops)
        parts = []
        for start in range(0, len(crops), step):
            host.current().check_interrupt()
            parts.append(self.recogniser.embed(crops[start : start + step]))
        return joined(parts)

    def aligned(self, pixels: Tensor, rows: Tensor, keypoints: Tensor) -> Tensor:
        """[F, S, S, 3] float RGB 0..255 crops for the recogniser, of `pixels` [n, H, W, 3], where these are.

        rows: [F] which picture each face is in; keypoints: [F, 5, 2], both on the CPU.
        """
        size = self.recogniser.size
        matrices = invert(similarity(keypoints.numpy(), template(size))).astype(np.float32)
        device, at_once = pixels.device, copies_at_once(pixels.device)
        inverse = torch.from_numpy(matrices).to(device, non_blocking=at_once)
        return warp(pixels, rows.to(device, non_blocking=at_once), inverse, size, size).round_()

    def _note(self, result: list[Faces], remembered: int, options: DetectionOptions, seconds: float) -> None:
        sizes = self._sizes(options)
        by_size: dict[int, int] = {}
        for faces in result:
            if len(faces) and faces.detector_size != max(sizes[0]):
                by_size[faces.detector_size] = by_size.get(faces.detector_size, 0) + 1
        retries = "".join(f", {n} only at {size}" for size, n in sorted(by_size.items(), reverse=True))
        self._last = call_summary(result, remembered, seconds, f" at {max(sizes[0])}", retries)

    def report(self) -> str:
        """Engine, device, precision, the last call, and how the engine was chosen."""
        runner = self.detector.runner
        said = [f"Faces by {runner.engine} ({runner.where}), {self.folder.name}: {self._last}.", *self.why]
        if self.folder.recogniser is None:
            said.append("No recogniser file: faces can be found, not identified.")
        for name, used in (("detector", self.detector), ("recogniser", self._recogniser)):
            graphs = getattr(used.runner, "graphs", None) if used is not None else None
            if graphs is not None:
                said.append(f"CUDA graphs of the {name}: {graphs.status}.")
        return " ".join(part for part in (*said, *self.folder.notes) if part)

    def release(self) -> None:
        """Give the device memory of both networks back."""
        self.detector.runner.release()
        if self._recogniser is not None:
            self._recogniser.runner.release()


def _canvas(
    part: list[PictureGroup], wanted: list[tuple[PictureGroup, int]], size: tuple[int, int]
) -> tuple[Tensor, list[float]]:
    """The detector's input for pictures (group, row) in the order of `part`, and the scale of each."""
    canvases, scales = [], []
    for group in part:
        if rows := [row for owner, row in wanted if owner is group]:
            canvas, place = letterbox(group.take(rows).pixels, size)
            canvases.append(canvas)
            scales += [place.scale] * len(rows)
    return joined(canvases), scales


def _merged(candidates: Candidates, scale: float, overlap: float, size: tuple[int, int], detector_size: int) -> Faces:
    """Candidates in canvas pixels as faces in picture pixels, one per person."""
    boxes = candidates.boxes / np.float32(scale)
    kept = merge_overlapping(boxes, overlap)
    return Faces(
        boxes=torch.from_numpy(boxes[kept]),
        keypoints=torch.from_numpy(candidates.points[kept] / np.float32(scale)),
        scores=torch.from_numpy(candidates.scores[kept]),
        embeddings=None,
        size=size,
        detector_size=detector_size,
    )
