"""Custom nodes for a real ComfyUI under test: a FACEANALYSIS of another pack, and a node that waits to be interrupted."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from foreign_faces import ForeignFaceAnalysis


class ForeignFaces:
    RETURN_TYPES = ("FACEANALYSIS",)
    FUNCTION = "load"
    CATEGORY = "test"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {}}

    def load(self) -> tuple[Any]:
        return (ForeignFaceAnalysis(),)


class Slow:
    """A minute of doing nothing, with progress."""

    RETURN_TYPES = ()
    FUNCTION = "work"
    OUTPUT_NODE = True
    CATEGORY = "test"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"image": ("IMAGE",)}}

    def work(self, image: Any) -> dict[str, Any]:
        import comfy.utils

        bar = comfy.utils.ProgressBar(600)
        for _ in range(600):
            time.sleep(0.1)
            bar.update(1)
        return {}


NODE_CLASS_MAPPINGS = {"TestForeignFaces": ForeignFaces, "Slow": Slow}
