"""Writes for the person at the terminal: results to standard output, everything else to standard error."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Sequence
from typing import TextIO

# A title in somebody's workflow, a file name or an answer must not write to the terminal's title, clipboard or screen.
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
STYLES = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33"}


def say(text: str = "", style: str | None = None) -> None:
    """One line of result."""
    _write(sys.stdout, text, style)


def note(text: str = "", style: str | None = None) -> None:
    """One line about what happens; not part of a result that is piped on."""
    _write(sys.stderr, text, style)


def complain(text: str) -> None:
    """An error, for the person."""
    _write(sys.stderr, f"hotpath: {text}", "red")


def _write(stream: TextIO, text: str, style: str | None) -> None:
    if stream.isatty():
        text = CONTROLS.sub("\ufffd", text)
    if style is not None and shows_styles(stream):
        text = f"\033[{STYLES[style]}m{text}\033[0m"
    encoding = stream.encoding or "utf-8"
    # A console that cannot show a letter must not end the program.
    stream.write(text.encode(encoding, "replace").decode(encoding) + "\n")
    stream.flush()


def shows_styles(stream: TextIO) -> bool:
    """Whether `stream` is a terminal that takes escape sequences; the old console of Windows prints them."""
    if not stream.isatty() or "NO_COLOR" in os.environ:
        return False
    return os.name != "nt" or any(name in os.environ for name in ("WT_SESSION", "TERM", "ANSICON"))


def table(rows: Iterable[Sequence[object]], headings: Sequence[str]) -> str:
    """Columns as wide as their widest cell; the last one is not padded."""
    cells = [list(headings), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(headings))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])
