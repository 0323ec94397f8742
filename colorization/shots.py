"""Finding cuts in a film that arrives in portions, with PySceneDetect."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

LOOKED_AT = 256  # longer side of the pictures the detector sees
THRESHOLD = 27.0
SHORTEST = 12  # frames; a flash is no shot


@dataclass(frozen=True)
class Segment:
    """Frames first..stop-1 of a portion, all of one shot. cut: whether that shot starts here.

    seen: the last of them as the detector saw it, [h, w] uint8; None without a detector.
    """

    first: int
    stop: int
    cut: bool = False
    seen: Tensor | None = None


class ShotDetector:
    """PySceneDetect's content detector over luminance. threshold: mean change of 255 that counts as a cut. first: number of
    the first frame that it will see.

    Raises ImportError with the cure when PySceneDetect is not installed.
    """

    def __init__(self, threshold: float = THRESHOLD, first: int = 0) -> None:
        try:
            from scenedetect import FrameTimecode
            from scenedetect.detectors import ContentDetector
        except ImportError as error:
            raise ImportError(
                "Shot detection needs PySceneDetect, which is not installed. Install it with `pip install scenedetect "
                "opencv-python-headless`, or set shots to off."
            ) from error
        mode = inspect.signature(ContentDetector).parameters["filter_mode"].default
        # Suppressing short shots reports a cut when it is seen; merging them would report it frames later.
        self._detector: Any = ContentDetector(
            threshold=threshold, min_scene_len=SHORTEST, luma_only=True, filter_mode=type(mode).SUPPRESS
        )
        # Up to 0.6 detectors counted in whole numbers, since then in timecodes.
        counted = "frame_num" in inspect.signature(self._detector.process_frame).parameters
        self._stamp: Any = int if counted else lambda frame: FrameTimecode(frame, 25.0)
        self._next = first
        self.last_cut = first  # that it found, or the first frame that it saw

    def go_on(self, frame: int, last_cut: int, seen: Tensor) -> None:
        """Look at a film from `frame` on, as if from its beginning: `seen` is the picture before it and `last_cut` the last
        cut, of a detector that went there. Only for a detector that has seen nothing yet."""
        # That is all it remembers.
        self._detector.process_frame(self._stamp(last_cut), _in_colour(seen))
        self._next, self.last_cut = frame, last_cut

    def cuts(self, frames: Tensor) -> list[int]:
        """Which of the next frames start a new shot, counted from the first frame of these. frames: [T, H, W, 3],
        float in 0..1 or uint8. The first frame of a film is none."""
        return [segment.first for segment in self.segments(frames) if segment.cut]

    def segments(self, frames: Tensor) -> list[Segment]:
        """The next frames, cut up."""
        start = self._next
        found: list[int] = []
        pictures: list[Tensor] = []
        for frame in frames:
            pictures.append(_small(frame))
            cuts = self._detector.process_frame(self._stamp(self._next), _in_colour(pictures[-1]))
            found += [self._number(cut) for cut in cuts]
            self._next += 1
        self.last_cut = found[-1] if found else self.last_cut
        inner = [cut - start for cut in found if cut >= start and cut > 0]
        stops = [*(cut for cut in inner if cut > 0), len(frames)]
        return [Segment(first, stop, first in inner, pictures[stop - 1]) for first, stop in pairwise([0, *stops])]

    def _number(self, cut: Any) -> int:
        return cut if isinstance(cut, int) else int(cut.frame_num)


def _small(frame: Tensor) -> Tensor:
    """A frame as the detector wants it, but for the channels: [h, w] uint8 on the CPU."""
    scale = max(1.0, max(frame.shape[:2]) / LOOKED_AT)
    size = max(1, round(frame.shape[0] / scale)), max(1, round(frame.shape[1] / scale))
    levels = frame.float() if frame.dtype == torch.uint8 else frame.float().nan_to_num().clamp(0, 1) * 255
    grey = levels.mean(dim=-1)[None, None]
    return F.interpolate(grey, size, mode="area")[0, 0].round().to(torch.uint8).cpu()


def _in_colour(picture: Tensor) -> Any:
    """[h, w, 3] as an array; grey, so the order of channels is nothing."""
    return picture[..., None].expand(-1, -1, 3).contiguous().numpy()
