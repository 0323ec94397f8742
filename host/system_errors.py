"""What the operating system refused, told as a sentence with its cure; Python's own text is a number and a name."""

from __future__ import annotations

import errno
import os
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT)
CLOSED = (errno.EACCES, errno.EPERM)
FAILING = (errno.EIO, errno.ESTALE)
NO_FOLDER = (errno.ENOTDIR, errno.EEXIST)


class SystemRefused(OSError):
    """What the system refused, in a sentence; `errno` is the system's number."""

    def __str__(self) -> str:
        return str(self.strerror)


def sentence(error: BaseException, place: Path | None = None) -> str:
    """What was refused and the cure, of an error of the system; empty where its own words are as good.

    place: what was written or read, where the error does not name it.
    """
    if not isinstance(error, OSError) or error.errno is None:
        return ""
    if isinstance(error, SystemRefused):
        return str(error)
    path = error.filename2 or error.filename or place
    if isinstance(path, bytes):
        path = os.fsdecode(path)
    if not isinstance(path, str | Path):
        path = None  # a number, of a file that is open
    if error.errno in FULL:
        return f"The disk {f'with {path} ' if path else ''}is full: free some space on it and run it again."
    if error.errno in FAILING:
        return (
            f"The disk {f'with {path} ' if path else ''}does not work as it should ({error.strerror}): see whether it is "
            "connected and sound, and run it again."
        )
    if error.errno == errno.EMFILE:
        return "This process may open no more files: start it with a higher limit, such as `ulimit -n 4096`."
    if path is None:
        return ""
    if error.errno in CLOSED and os.name == "nt":  # where files that are open are locked
        return f"{path} is closed to the user who runs this, or open in another program: close that, or choose another place."
    if error.errno in CLOSED:
        return f"{path} is closed to the user who runs this: give that user the right to it, or choose another place."
    if error.errno == errno.EROFS:
        return f"{path} is on a disk that can only be read: choose another place."
    if error.errno == errno.ENAMETOOLONG:
        return f"{path} is too long a name for its disk: choose a shorter one."
    if error.errno in NO_FOLDER:
        return f"There is a file where {path} needs a folder: choose another place, or move that file away."
    return ""
