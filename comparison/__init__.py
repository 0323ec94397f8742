"""How alike are two pictures of the same seed, made in two settings: numbers, thresholds, and a page to look at.

`compare_pair` measures and judges by `Thresholds`, a `Comparison` holds all pairs of a run, a `ComparisonFolder` is it on disk.
SSIM: Wang et al., "Image quality assessment: from error visibility to structural similarity", 2004. LPIPS: Zhang et al.,
"The unreasonable effectiveness of deep features as a perceptual metric", 2018.
"""

from .face_agreement import FaceAgreement, FaceFinder, compare_faces
from .folders import FolderError, pair_files, pictures_in, read_picture
from .pair import REFUSED, Comparison, Pair, Thresholds, compare_batches, compare_pair, incomparable
from .perceptual import Perceptual, load_perceptual
from .pictures import difference_map, side_by_side
from .report import ComparisonFolder, describe, file_name, values

__all__ = [
    "REFUSED",
    "Comparison",
    "ComparisonFolder",
    "FaceAgreement",
    "FaceFinder",
    "FolderError",
    "Pair",
    "Perceptual",
    "Thresholds",
    "compare_batches",
    "compare_faces",
    "compare_pair",
    "describe",
    "difference_map",
    "file_name",
    "incomparable",
    "load_perceptual",
    "pair_files",
    "pictures_in",
    "read_picture",
    "side_by_side",
    "values",
]
