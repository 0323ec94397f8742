"""Files that are there whole or not at all."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from .errors import is_full
from .system_errors import SystemRefused

HELD = (0.05, 0.1, 0.2, 0.4, 0.8)  # seconds to wait for a file that another program holds


@contextmanager
def told_when_full(path: Path) -> Iterator[None]:
    """An error inside that says the disk is full is raised as a SystemRefused with the place and the cure."""
    try:
        yield
    except Exception as error:
        if not is_full(error):
            raise
        sentence = (
            f"The disk with {path.parent} is full, so {path.name} was not written: free some space and run it again."
        )
        raise SystemRefused(errno.ENOSPC, sentence) from error


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Where to write what becomes `path` when the block ends well. Otherwise it goes, and what was at `path` stays.

    The name is this writer's own and has no ending by which a list of files would take it. The folder is made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not mkstemp, whose files are readable by their maker alone: who may read what is written is for the umask to say.
    unfinished = path.with_name(f".writing-{uuid4().hex}")
    try:
        with told_when_full(path):
            yield unfinished
            put_in_place(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def put_in_place(source: Path, target: Path) -> None:
    """As Path.replace; on Windows a viewer or a virus scanner may hold a file for a moment."""
    for wait in HELD if os.name == "nt" else ():
        try:
            source.replace(target)
            return
        except PermissionError:
            time.sleep(wait)
    source.replace(target)
