"""A FACEANALYSIS object as another pack would give it: deterministic faces from the pixels, and nothing but the interface."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np


class ForeignFaceAnalysis:
    """`get(bgr)` finds one face in a picture that is not uniform, none in a uniform one.

    largest_size: the largest detector size that finds anything; larger ones miss (a close-up face).
    """

    def __init__(self, largest_size: int = 640, width: int = 512) -> None:
        self.det_model = SimpleNamespace(input_size=(640, 640))
        self.models: dict[str, Any] = {"detection": self.det_model, "recognition": None}
        self.largest_size = largest_size
        self.width = width
        self.calls = 0

    def prepare(self, ctx_id: int = 0, det_thresh: float = 0.5, det_size: tuple[int, int] = (640, 640)) -> None:
        self.det_model.input_size = det_size

    def get(self, bgr: np.ndarray, max_num: int = 0) -> list[dict[str, Any]]:
        self.calls += 1
        assert bgr.dtype == np.uint8
        assert bgr.ndim == 3
        if bgr.min() == bgr.max() or self.det_model.input_size[0] > self.largest_size:
            return []
        height, width = bgr.shape[:2]
        seed = int(bgr.astype(np.int64).sum() % (2**31))
        rng = np.random.default_rng(seed)
        x, y = rng.uniform(0.15, 0.3, 2) * (width, height)
        w, h = rng.uniform(0.4, 0.6, 2) * (width, height)
        template = np.array([[0.3, 0.4], [0.7, 0.4], [0.5, 0.6], [0.35, 0.8], [0.65, 0.8]])
        kps = (template + rng.normal(0, 0.03, (5, 2))) * (w, h) + (x, y)
        face = {
            "bbox": np.array([x, y, x + w, y + h], np.float32),
            "kps": kps.astype(np.float32),
            "embedding": rng.normal(0, 1.1, self.width).astype(np.float32),
            "det_score": 0.9,
        }
        small = dict(face, bbox=np.array([0, 0, w / 4, h / 4], np.float32), embedding=-face["embedding"])
        return [small, face]  # a second, smaller face first: the largest must be chosen
