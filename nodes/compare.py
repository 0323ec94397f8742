"""Two pictures of one seed, made in two settings: how alike are they, and is that enough?"""

from __future__ import annotations

import json
from typing import Any

import torch

from .. import face, host
from ..comparison import Pair, Thresholds, compare_batches, describe, load_perceptual, side_by_side, values
from .sockets import HIDDEN, number

CATEGORY = "Hotpath/compare"


class HotpathCompare:
    DISPLAY_NAME = "Compare Pictures"
    CATEGORY = CATEGORY
    DESCRIPTION = (
        "Compares two pictures that were made with the same seed in two settings, such as all attention blocks and "
        "fewer: SSIM, PSNR, LPIPS if it is installed, and whether the face is still the same person. Batches "
        "are compared picture by picture."
    )
    SEARCH_ALIASES = ["ssim", "psnr", "lpips", "a/b", "difference", "quality", "face similarity"]
    RETURN_TYPES = ("IMAGE", "STRING", "STRING", "FLOAT", "FLOAT", "BOOLEAN")
    RETURN_NAMES = ("side_by_side", "report", "values", "ssim", "face_cosine", "passed")
    OUTPUT_TOOLTIPS = (
        "A, B and where they differ, one picture per pair.",
        "The verdict and a line per pair.",
        "All numbers of every pair as JSON.",
        "The lowest SSIM of all pairs.",
        "The lowest cosine of all faces; 0 where none was compared.",
        "Whether every pair reaches the thresholds.",
    )
    OUTPUT_NODE = True
    FUNCTION = "compare"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "image_a": ("IMAGE", {"tooltip": "The reference, such as the pictures with all blocks patched."}),
                "image_b": ("IMAGE", {"tooltip": "The other setting, with the same seeds and size."}),
                "min_ssim": number(0.95, -1.0, 1.0, "Lowest SSIM that passes; 1 is the same picture.", 0.005),
                "min_cosine": number(
                    0.98,
                    -1.0,
                    1.0,
                    "Lowest cosine of two faces that passes; counts with faceanalysis connected.",
                    0.005,
                ),
            },
            "optional": {
                "faceanalysis": (
                    "FACEANALYSIS",
                    {"tooltip": "From Load Face Models: also compare who is in the pictures."},
                ),
                "max_lpips": number(
                    1.0, 0.0, 1.0, "Highest LPIPS that passes, if it can be measured; 1 does not judge it.", 0.005
                ),
            },
            "hidden": HIDDEN,
        }

    def compare(
        self,
        image_a: torch.Tensor,
        image_b: torch.Tensor,
        min_ssim: float,
        min_cosine: float,
        faceanalysis: Any = None,
        max_lpips: float = 1.0,
        unique_id: str | None = None,
    ) -> tuple[torch.Tensor, str, str, float, float, bool]:
        here = host.current()
        perceptual, why = load_perceptual()
        notes = [why]
        if faceanalysis is None:
            notes.append("Faces are not compared: connect faceanalysis.")
        pictures: torch.Tensor | None = None
        done = 0

        def draw(pair: Pair) -> None:
            """Into one tensor, pair by pair: all of them at once beside it would be several times what came in."""
            nonlocal pictures, done
            if pair.problem:
                raise ValueError(pair.problem)
            drawn = side_by_side(pair)
            if pictures is None:
                pictures = drawn.new_empty(len(image_a), *drawn.shape)
            pictures[done] = drawn
            done += 1

        result = compare_batches(
            image_a,
            image_b,
            Thresholds(min_ssim, min_cosine, max_lpips if max_lpips < 1 else None),
            face.adapt(faceanalysis) if faceanalysis is not None else None,
            perceptual,
            notes=notes,
            each=draw,
        )
        report = describe(result)
        here.show_text(report, unique_id)
        listed = json.dumps([values(pair) for pair in result.pairs], allow_nan=False)
        assert result.least_ssim is not None and pictures is not None
        return pictures, report, listed, result.least_ssim, result.least_cosine or 0.0, result.passed


NODES: dict[str, type[Any]] = {"HotpathCompare": HotpathCompare}
