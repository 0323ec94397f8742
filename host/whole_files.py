"""Files that are there whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Where to write what becomes `path` when the block ends well. Otherwise it goes, and what was at `path` stays.

    The name is this writer's own and has no ending by which a list of files would take it. The folder is made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not mkstemp, whose files are readable by their maker alone: who may read what is written is for the umask to say.
    unfinished = path.with_name(f".writing-{uuid4().hex}")
    try:
        yield unfinished
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
