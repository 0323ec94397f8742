"""What the streams of a film say of themselves."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

from ..host.video_opening import decodable


def video_stream(container: Any, path: Path) -> Any:
    """Raises ValueError for a file without pictures, and for one whose pictures cannot be decoded."""
    if not container.streams.video:
        raise ValueError(f"{path.name} holds no video.")
    return decodable(container.streams.video[0], path)


def frame_rate(stream: Any) -> Fraction:
    """Pictures per second."""
    return Fraction(stream.average_rate or stream.guessed_rate or 1)


def bit_depth(stream: Any) -> int:
    components = stream.format.components if stream.format is not None else ()
    return max((component.bits for component in components), default=8)
