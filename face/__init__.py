"""Faces: found, aligned and embedded for whole batches on one device; torch in, torch out.

analyser = load_analyser(host.current().model_folders("insightface"))
faces = analyser.analyse(images, choose=FaceChoice.largest())
"""

from .faces import (
    CHOICES,
    LADDER,
    DetectionOptions,
    FaceAnalyser,
    FaceChoice,
    FaceError,
    Faces,
    choose_face,
)
from .foreign import adapt
from .keypoints import draw_keypoints
from .loading import ENGINES, load_analyser
from .model_folder import model_names
from .runner import PRECISIONS

__all__ = [
    "CHOICES",
    "ENGINES",
    "LADDER",
    "PRECISIONS",
    "DetectionOptions",
    "FaceAnalyser",
    "FaceChoice",
    "FaceError",
    "Faces",
    "adapt",
    "choose_face",
    "draw_keypoints",
    "load_analyser",
    "model_names",
]
