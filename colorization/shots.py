"""Finding cuts in a film that arrives in portions, with PySceneDetect."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

LOOKED_AT = 256  # longer side of the pictures the detector sees
THRESHOLD = 27.0
SHORTEST = 12  # frames; a flash is no shot


class ShotDetector:
    """PySceneDetect's content detector over luminance. threshold: mean change of 255 that counts as a cut.

    Raises ImportError with the cure when PySceneDetect is not installed.
    """

    def __init__(self, threshold: float = THRESHOLD, shortest: int = SHORTEST) -> None:
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
            threshold=threshold, min_scene_len=shortest, luma_only=True, filter_mode=type(mode).SUPPRESS
        )
        # Up to 0.6 detectors counted in whole numbers, since then in timecodes.
        counted = "frame_num" in inspect.signature(self._detector.process_frame).parameters
        self._stamp: Any = int if counted else lambda frame: FrameTimecode(frame, 25.0)
        self._next = 0

    def cuts(self, frames: Tensor) -> list[int]:
        """Which of the next frames start a new shot, counted from the first frame of these. frames: [T, H, W, 3],
        float in 0..1 or uint8. The first frame of a film is none."""
        start = self._next
        found: list[int] = []
        for picture in _small(frames):
            found += [self._number(cut) for cut in self._detector.process_frame(self._stamp(self._next), picture)]
            self._next += 1
        return [cut - start for cut in found if cut >= start and cut > 0]

    def _number(self, cut: Any) -> int:
        return cut if isinstance(cut, int) else int(cut.get_frames() if hasattr(cut, "get_frames") else cut.frame_num)


def _small(frames: Tensor) -> Any:
    """Frames as the detector wants them: [T, h, w, 3] uint8 arrays; grey, so the order of channels is nothing."""
    scale = max(1.0, max(frames.shape[1:3]) / LOOKED_AT)
    size = max(1, round(frames.shape[1] / scale)), max(1, round(frames.shape[2] / scale))
    for frame in frames:
        levels = frame.float() if frame.dtype == torch.uint8 else frame.float().nan_to_num().clamp(0, 1) * 255
        grey = levels.mean(dim=-1)[None, None]
        shrunk = F.interpolate(grey, size, mode="area")[0, 0].round().to(torch.uint8)
        yield shrunk[..., None].expand(-1, -1, 3).contiguous().cpu().numpy()
