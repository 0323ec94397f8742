"""Text that can be written, names that files can have, and nouns in their number.

JSON and file names may hold half a letter: a surrogate without the other half.
"""

from __future__ import annotations

import os
import re

LONGEST = 255  # bytes of a name, on all file systems that people have
HALF = re.compile("[\ud800-\udfff]")


def readable(text: str) -> str:
    """`text` with a mark in place of every half letter, which neither UTF-8 nor a terminal can hold."""
    return HALF.sub("\ufffd", text)


def can_be_a_name(part: str) -> bool:
    """Whether a file or folder can be called so."""
    try:
        return "\0" not in part and len(os.fsencode(part)) <= LONGEST
    except UnicodeEncodeError:
        return False


def counted(count: int, noun: str) -> str:
    """ "1 face", "2 faces"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
