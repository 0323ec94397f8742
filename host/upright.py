"""How a picture file is turned to be shown upright: photos of phones lie on their side in the file."""

from __future__ import annotations

from typing import Any

ORIENTATION = 0x0112


def upright(image: Any) -> Any:
    """A picture of Pillow as its EXIF wants it shown. EXIF that cannot be read costs the turn and not the picture.

    Not Pillow's exif_transpose, which also writes the EXIF anew and fails where that cannot be: numbers of another kind than
    its tags have, as some cameras and editors leave them (Pillow #7839, #8605, #8965), end it in any release.
    """
    from PIL.Image import Transpose

    image.load()
    try:
        turn = {
            2: Transpose.FLIP_LEFT_RIGHT,
            3: Transpose.ROTATE_180,
            4: Transpose.FLIP_TOP_BOTTOM,
            5: Transpose.TRANSPOSE,
            6: Transpose.ROTATE_270,
            7: Transpose.TRANSVERSE,
            8: Transpose.ROTATE_90,
        }.get(image.getexif().get(ORIENTATION))
    except Exception:  # SyntaxError, TypeError, struct.error: Pillow has no one word for broken EXIF
        return image
    return image if turn is None else image.transpose(turn)
