"""How a frame of a video file is turned to be shown upright: films of phones lie on their side in the file."""

from __future__ import annotations

import struct
from typing import Any


def turned(frame: Any) -> tuple[bool, int]:
    """Whether left and right change places, and the quarter turns to the left after it, of the frame's display matrix."""
    found = frame.side_data.get("DISPLAYMATRIX")
    if found is None:
        return False, 0
    # A pixel at (x, y), y downwards, is shown at (a x + c y, b x + d y).
    a, b, _, c, d = struct.unpack("=9i", bytes(found)[:36])[:5]
    mirrored = a * d - b * c < 0
    if mirrored:
        a, b = -a, -b
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return mirrored, 0 if a + d >= 0 else 2
    return mirrored, 1 if c - b > 0 else 3
