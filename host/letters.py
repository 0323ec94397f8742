"""Text for people: letters that can be written, and nouns in their number."""

from __future__ import annotations

import re

HALF = re.compile("[\ud800-\udfff]")


def readable(text: str) -> str:
    """`text` with a mark in place of every half letter: a surrogate without its other half, which JSON and file names may hold,
    and neither UTF-8 nor a terminal can."""
    return HALF.sub("\ufffd", text)


def counted(count: int, noun: str) -> str:
    """ "1 face", "2 faces"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
