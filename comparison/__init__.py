"""How alike are two pictures of the same seed, made in two settings: numbers, thresholds, and a page to look at.

`compare_pair` measures, `Thresholds` judges, `Comparison` holds all pairs of a run, `write_comparison` puts them on disk.
SSIM: Wang et al., "Image quality assessment: from error visibility to structural similarity", 2004. LPIPS: Zhang et al.,
"The unreasonable effectiveness of deep features as a perceptual metric", 2018.
"""

from .face_agreement import FaceAgreement, FaceFinder, compare_faces
from .folders import FolderError, pair_files, read_picture
from .pair import Comparison, Pair, Thresholds, compare_batches, compare_pair
from .perceptual import Perceptual, load_perceptual
from .pictures import difference_map, side_by_side
from .report import describe, write_comparison

__all__ = [
    "Comparison",
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
    "load_perceptual",
    "pair_files",
    "read_picture",
    "side_by_side",
    "write_comparison",
]
