"""Text that can be written. JSON and file names may hold half a letter: a surrogate without the other half."""

from __future__ import annotations

import re

HALF = re.compile("[\ud800-\udfff]")


def readable(text: str) -> str:
    """`text` with a mark in place of every half letter, which neither UTF-8 nor a terminal can hold."""
    return HALF.sub("\ufffd", text)
