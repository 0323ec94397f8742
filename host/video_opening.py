"""Opening a video file for reading, whoever wrote it."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def opened(path: Path) -> Any:
    """The file as a container of PyAV. Names in old files are in any encoding; what cannot be read of them is replaced.

    Raises OSError or ValueError when it is none.
    """
    import av

    try:
        try:
            return av.open(str(path), metadata_errors="replace")
        except TypeError:  # PyAV 19 reads them all, and has no word for it
            return av.open(str(path))
    except (OSError, ValueError):
        raise
    except av.error.FFmpegError as error:  # such as PyAV's own EOFError, which is neither
        raise ValueError(f"{path.name} is damaged or cut off: {error}") from error
