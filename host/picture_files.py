"""Picture files as people have them: opened whatever lies beside the picture in them, and turned as they are to be shown."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

PNG = b"\x89PNG\r\n\x1a\n"
PACKED = (b"iCCP", b"iTXt", b"zTXt")  # a PNG's colour profile and texts
ORIENTATION = 0x0112


def open_picture(path: Path) -> Any:
    """The file, opened by Pillow; raises what that raises. A PNG comes without its colour profile and packed texts: of more than
    1 MB, as screens that were measured and some programs have them, Pillow refuses them and the picture with them (Pillow
    #2445, #8363), which ComfyUI opens."""
    from PIL import Image

    with path.open("rb") as file:
        data = memoryview(PNG + file.read() if file.read(len(PNG)) == PNG else b"")
    kept, at = [data[: len(PNG)]], len(PNG)
    while at < len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        if data[at + 4 : at + 8] not in PACKED:
            kept.append(data[at:end])
        at = end
    whole = sum(map(len, kept)) == len(data)
    return Image.open(path if whole else io.BytesIO(b"".join(kept)))


def upright(image: Any) -> Any:
    """A picture of Pillow as its EXIF wants it shown: photos of phones lie on their side in the file. EXIF that cannot be read
    costs the turn and not the picture.

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
