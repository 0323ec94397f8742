"""Which films this process made, so that a workflow whose film is gone runs again, and no other does.

ComfyUI asks a node before a run what its result depends on, and keeps the result under that answer: one that looked at the
result itself would be another after the run than before, and the whole film would be coloured a second time.
"""

from __future__ import annotations

import threading
from pathlib import Path

from ..cache import file_fingerprint

_lock = threading.Lock()
_made: dict[Path, tuple[Path, str]] = {}  # by the film made: its source, and the source's fingerprint
_lost: dict[Path, int] = {}


def note_made(film: Path, source: Path) -> None:
    """`film` is whole, and was made of `source` as that is now."""
    with _lock:
        _made[film] = (source, file_fingerprint(source))


def times_lost(film: Path | None) -> int:
    """How often `film` was found gone, or its source another one, after this process had made it; None: any film."""
    with _lock:
        for path in list(_made) if film is None else [film] * (film in _made):
            source, fingerprint = _made[path]
            if not path.is_file() or not source.is_file() or file_fingerprint(source) != fingerprint:
                del _made[path]
                _lost[path] = _lost.get(path, 0) + 1
        return sum(_lost.values()) if film is None else _lost.get(film, 0)
