"""A custom node for a real ComfyUI under test: a FACEANALYSIS of another pack, and a node that waits to be interrupted."""

from __future__ import annotations

import sys
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


NODE_CLASS_MAPPINGS = {"TestForeignFaces": ForeignFaces}
