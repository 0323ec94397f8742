"""Faces: found, aligned and embedded for whole batches on one device; torch in, torch out.

analyser = load_analyser(host.current().model_folders("insightface"))
faces = analyser.analyse(images, choose=FaceChoice.largest())
"""

from .areas import SHAPES
from .batches import (
    Match,
    average_identity,
    cut_faces,
    describe,
    draw_faces,
    mark_pictures,
    mask_faces,
    match_faces,
    require_faces,
)
from .crops import CropPlaces, paste
from .engine_diagnosis import diagnose, why_the_cpu
from .faces import (
    BEST_MATCH,
    CHOICES,
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
from .marks import mark_faces
from .model_folder import model_names
from .onnxruntime_engine import PROVIDERS
from .runner import PRECISIONS

__all__ = [
    "BEST_MATCH",
    "CHOICES",
    "ENGINES",
    "PRECISIONS",
    "PROVIDERS",
    "SHAPES",
    "CropPlaces",
    "DetectionOptions",
    "FaceAnalyser",
    "FaceChoice",
    "FaceError",
    "Faces",
    "Match",
    "adapt",
    "average_identity",
    "choose_face",
    "cut_faces",
    "describe",
    "diagnose",
    "draw_faces",
    "draw_keypoints",
    "load_analyser",
    "mark_faces",
    "mark_pictures",
    "mask_faces",
    "match_faces",
    "model_names",
    "paste",
    "require_faces",
    "why_the_cpu",
]
