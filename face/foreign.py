"""A FACEANALYSIS object of another pack, such as insightface's own FaceAnalysis, behind our interface."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..host.interruption import interruptibly
from .faces import LOWEST_SCORE, DetectionOptions, FaceAnalyser, FaceChoice, FaceError, Faces, call_summary
from .pictures import PictureGroup, group_pictures
from .remembering import Memory, analyse_in_parts

SETTINGS = ("det_thresh", "det_size", "input_size", "input_sizes")  # of the object or its detector, in any insightface


class ForeignAnalyser:
    """Asks the object picture by picture and detector size by detector size, as the reference InstantID pack does.

    Only `get(bgr)` is needed. `prepare(ctx_id, det_thresh, det_size)` sets the size where it exists, because
    insightface 1.0 and later take no notice of `det_model.input_size`; that attribute is set as well, for older ones.
    An object with neither decides on the size itself and is asked once. Where nobody names a threshold its own counts,
    and afterwards it has the settings it had before: it is other nodes' as well.
    """

    def __init__(self, analysis: Any, why: str = "", fingerprint: str = "") -> None:
        """`fingerprint` names its files and settings, for the cache; without one nothing is remembered, because the
        content of a foreign object is not known. Raises FaceError when the object has no `get`."""
        if not callable(getattr(analysis, "get", None)) or isinstance(analysis, Mapping):
            raise FaceError(
                f"A {type(analysis).__name__} is no face analysis (it has no get(image)); connect the output of a "
                "face analysis loader."
            )
        self.analysis = analysis
        self.why = why
        self._fingerprint = fingerprint
        self._last = "ready"

    def analyse(
        self,
        images: Tensor | Sequence[Tensor],
        *,
        choose: FaceChoice | None = None,
        embed: bool = True,
        options: DetectionOptions = DetectionOptions(),  # noqa: B008 - frozen
    ) -> list[Faces]:
        """See `FaceAnalyser.analyse`. The object embeds every face whatever `embed` says; then that is left out."""
        began = time.perf_counter()
        embed = embed or (choose is not None and choose.needs_embeddings)
        options = replace(options, threshold=self._own_threshold() if options.threshold is None else options.threshold)

        def compute(part: list[PictureGroup]) -> list[Faces]:
            found = []
            for picture in (picture for group in part for picture in group.pixels):
                bgr = np.ascontiguousarray(picture.cpu().numpy()[:, :, ::-1])
                faces = self._look(bgr, options, embed)
                found.append(faces if choose is None else choose.apply(faces))
            return found

        groups = group_pictures(images)
        memory = Memory(self._fingerprint, groups, choose, embed, options) if self._fingerprint else None
        with self._as_it_was():
            result, remembered = analyse_in_parts(groups, memory, 1, compute)
        self._last = call_summary(result, remembered, time.perf_counter() - began)
        return result

    def __getattr__(self, name: str) -> Any:
        """What else other packs ask of a FACEANALYSIS (`get`, `prepare`, `det_model`, `models`) is the object's own."""
        if name.startswith("__") or name == "analysis":
            raise AttributeError(name)
        return getattr(self.analysis, name)

    @property
    def _parts(self) -> list[Any]:
        """What can hold settings: the object and its detector."""
        return [self.analysis, getattr(self.analysis, "det_model", None)]

    def _own_threshold(self) -> float:
        found = (getattr(part, "det_thresh", None) for part in reversed(self._parts))
        return float(next((value for value in found if value is not None), LOWEST_SCORE))

    @contextmanager
    def _as_it_was(self) -> Iterator[None]:
        kept = [
            (part, name, value)
            for part in self._parts
            for name in SETTINGS
            if (value := getattr(part, name, None)) is not None
        ]
        size, threshold = getattr(self.analysis, "det_size", None), self._own_threshold()
        try:
            yield
        finally:
            moved = size is not None and tuple(size) != tuple(getattr(self.analysis, "det_size", None) or ())
            if moved and callable(getattr(self.analysis, "prepare", None)):
                self.analysis.prepare(ctx_id=0, det_thresh=threshold, det_size=size)
            for part, name, value in kept:
                if getattr(part, name, None) is not value:
                    with suppress(AttributeError):  # one that can only be read is what `prepare` made it
                        setattr(part, name, value)

    def _look(self, bgr: NDArray[np.uint8], options: DetectionOptions, embed: bool) -> Faces:
        for size in options.sizes:
            settable = self._set_size(size, options.lowest_score)
            # The search alone: one that is left must not set sizes in what the next run has set.
            if faces := interruptibly(partial(self.analysis.get, bgr)):
                return self._convert(faces, bgr.shape[:2], size, embed)
            if not settable:
                break
        return Faces.none((bgr.shape[0], bgr.shape[1]), size, 0 if embed else None)

    def _set_size(self, size: int, threshold: float) -> bool:
        settable = False
        if callable(getattr(self.analysis, "prepare", None)):
            self.analysis.prepare(ctx_id=0, det_thresh=threshold, det_size=(size, size))
            settable = True
        detector = getattr(self.analysis, "det_model", None)
        if detector is not None and hasattr(detector, "input_size"):
            detector.input_size = (size, size)
            settable = True
        return settable

    def _convert(self, faces: Sequence[Any], size: tuple[int, ...], detector_size: int, embed: bool) -> Faces:
        def stacked(name: str) -> Tensor:
            values = [np.asarray(_value(face, name), np.float32) for face in faces]
            return torch.from_numpy(np.stack(values))

        if any(_value(face, "kps") is None or _value(face, "bbox") is None for face in faces):
            raise FaceError("The connected face analysis gives no key points; load a detector with key points.")
        if embed and any(_value(face, "embedding") is None for face in faces):
            raise FaceError(
                "The connected face analysis gives no embeddings: its model folder has no recogniser (glintr100.onnx "
                "of antelopev2), or it was loaded without it."
            )
        scores = torch.tensor([1.0 if (s := _value(face, "det_score")) is None else float(s) for face in faces])
        return Faces(
            boxes=stacked("bbox")[:, :4],
            keypoints=stacked("kps"),
            scores=scores,
            embeddings=stacked("embedding").flatten(1) if embed else None,
            size=(int(size[0]), int(size[1])),
            detector_size=detector_size,
        )

    def report(self) -> str:
        providers = ""
        session: Any = getattr(getattr(self.analysis, "det_model", None), "session", None)
        if callable(getattr(session, "get_providers", None)):
            providers = f", sessions on {', '.join(session.get_providers())}"
        kind = f"{type(self.analysis).__module__}.{type(self.analysis).__name__}"
        return f"Faces by {kind}{providers}: {self._last}.{' ' + self.why if self.why else ''}"


def _value(face: Any, name: str) -> Any:
    return face.get(name) if isinstance(face, Mapping) else getattr(face, name, None)


def adapt(analysis: Any) -> FaceAnalyser:
    """`analysis` as a FaceAnalyser: ours unchanged, another pack's wrapped. Raises FaceError for anything else."""
    return analysis if isinstance(analysis, FaceAnalyser) else ForeignAnalyser(analysis)
