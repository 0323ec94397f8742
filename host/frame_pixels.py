"""The pixels of a decoded frame as RGB, the same with every PyAV: releases differ in what they take from a frame's tags."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

# ffmpeg's numbers: the matrix of RGB, colours of which nothing is said, and the range 0..255
RGB, UNSAID, FULL = 0, 2, 2
ALWAYS_FULL = ("yuvj", "gray", "ya8", "ya16")


def rgb_of(
    frame: Any, width: int, height: int, matrix: int | None = None, deep: bool = False, **scaling: Any
) -> NDArray[Any]:
    """[height, width, 3], uint8, or uint16 if `deep`. matrix: ffmpeg's number, where the frame's own is not to be believed.

    scaling: further arguments of PyAV's `reformat`.
    """
    full = int(frame.color_range) == FULL or frame.format.is_rgb or frame.format.name.startswith(ALWAYS_FULL)
    return np.asarray(
        without_light(frame).to_ndarray(
            # Not rgb48le: FFmpeg 8.0 gives 0 there for most of the colours of 4:2:0 with more than 8 bits (PyAV #2192).
            format="gbrp16le" if deep else "rgb24",
            width=width,
            height=height,
            # PyAV up to 16 looks at a matrix and a range only where they are others than those of the result.
            src_colorspace=int(frame.colorspace) if matrix is None else matrix,
            dst_colorspace=RGB,
            src_color_range="JPEG" if full else "MPEG",
            dst_color_range="JPEG",
            **scaling,
        )
    )


def without_light(frame: Any) -> Any:
    """The frame, with nothing said of primaries and transfer. No conversion here looks at them, but PyAV 17 refuses those
    that it does not know, such as the reserved ones of broadcasts (PyAV #2208)."""
    if hasattr(frame, "color_trc"):
        frame.color_primaries = frame.color_trc = UNSAID
    return frame
