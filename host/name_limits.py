"""Names that no file can have, anywhere or on Windows: a workflow from another system, or a person, may ask for one."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable

LONGEST = 255  # bytes of a name, on all file systems that people have
LETTERS = re.compile(r'[<>:"|?*\x00-\x1f]')
DEVICES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)\s*(\..*)?", re.IGNORECASE | re.ASCII)


def can_be_a_name(part: str) -> bool:
    """Whether a file or folder can be called so, Windows' own rules apart."""
    try:
        return "\0" not in part and len(os.fsencode(part)) <= LONGEST
    except UnicodeEncodeError:  # half a letter
        return False


def refuse_on_windows(parts: Iterable[str]) -> None:
    """Raises ValueError on Windows for parts of a path that cannot be names there.

    Windows itself takes what follows a colon for a hidden stream of another file, and a device's name for the device.
    """
    for part in parts if os.name == "nt" else ():
        if (letter := LETTERS.search(part)) is not None:
            raise ValueError(f"{part!r} cannot be a file's name on Windows, because of {letter[0]!r}: leave that out.")
        if DEVICES.fullmatch(part):
            raise ValueError(f"{part!r} cannot be a file's name on Windows, where it is a device: choose another.")
