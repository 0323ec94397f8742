"""Files that are held while somebody works on what they stand for. The system lets go of them, however their process ends.

Process ids would not do: in another container, or on another machine with the same folder, they are somebody else's.
"""

from __future__ import annotations

import errno
import os
import struct
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

TAKEN = (errno.EACCES, errno.EAGAIN)  # what the system says where another one holds a file
GONE = (errno.ENOENT, errno.ESTALE)  # and where another machine has deleted it
PATIENCE = 30.0  # seconds for another one to add to a file; one that takes longer was halted
EVERY = 0.01  # seconds between two looks
WAITS = (
    0.05,
    0.1,
    0.2,
    0.4,
    0.8,
)  # seconds for what keeps Windows from opening a file: a virus scanner, or that it is deleted
FAR = 0x7FFF0000  # the byte that is held on Windows, where nobody else can read what is held: behind all that is read


@contextmanager
def held(path: Path) -> Iterator[int | None]:
    """Hold `path`, which is there until the block ends; its folder is made. Gives the number of the open file, or None where
    somebody else holds it. Where a disk knows no locks, as some shares, everybody does."""
    try:
        while True:
            file = _opened(path)
            try:
                if not _lock(file):
                    yield None
                    return
                if not _is_at(path, file):  # it was another one's until now, who has deleted it
                    continue
                try:
                    yield file.fileno()
                    return
                finally:
                    if sys.platform != "win32":
                        with suppress(OSError):
                            path.unlink()
            finally:
                with suppress(OSError):  # a disk that fails must not hide what it has broken off
                    file.close()
    finally:
        if sys.platform == "win32":  # which deletes nothing that is open, by whomever
            with suppress(OSError):
                path.unlink()


def is_held(path: Path) -> bool | None:
    """Whether anybody holds `path`, which stays; None where that cannot be told, or it is not there."""
    try:
        with path.open("r+b") as file:
            ours = _tried(file)
            return None if ours is None else not ours
    except OSError:
        return None


@contextmanager
def opened_alone(path: Path) -> Iterator[BinaryIO]:
    """The file at `path`, which is made with its folder, open to be read and added to, by one at a time of all who open it so:
    the others wait."""
    end = time.monotonic() + PATIENCE
    while True:
        with _opened(path) as file:
            if time.monotonic() > end or (_lock(file) and _is_at(path, file)):
                try:
                    yield file
                finally:
                    _unlock(file)
                return
        time.sleep(EVERY)


def delete(path: Path, file: BinaryIO) -> None:
    """Delete what `opened_alone` has open, if that goes."""
    if sys.platform == "win32":  # which deletes nothing that is open
        _unlock(file)
        file.close()
    with suppress(OSError):
        path.unlink()


def _opened(path: Path) -> BinaryIO:
    path.parent.mkdir(parents=True, exist_ok=True)
    for wait in WAITS if sys.platform == "win32" else ():
        try:
            return path.open("a+b")
        except PermissionError:
            time.sleep(wait)
    return path.open("a+b")


def _lock(file: BinaryIO) -> bool:
    """Whether it is ours until it is closed, or there are no locks."""
    return _tried(file) is not False


def _tried(file: BinaryIO) -> bool | None:
    """Whether it is ours until it is closed; None where there are no locks, or none any more."""
    try:
        if sys.platform == "win32":
            file.seek(FAR)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        elif not _lock_of_a_server(file, fcntl.F_WRLCK):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in TAKEN else None
    return True


def _lock_of_a_server(file: BinaryIO, kind: int) -> bool:
    """Set (or remove) the kind of lock that NFS and SMB servers hold for their clients, and some cluster disks know alone, where
    there is one that ends as flock's do. Otherwise who works on the server itself would not see who works on the share. Raises
    OSError where another one holds it."""
    if sys.platform == "linux" and hasattr(fcntl, "F_OFD_SETLK"):
        try:
            fcntl.fcntl(file, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", kind, os.SEEK_SET, 0, 0, 0))
            return True
        except OSError as error:
            if error.errno in TAKEN:
                raise
    return False


def _unlock(file: BinaryIO) -> None:
    """Also for processes that were forked meanwhile, which would hold it as long as they live."""
    if file.closed:
        return
    file.flush()
    with suppress(OSError):
        if sys.platform == "win32":
            file.seek(FAR)
            msvcrt.locking(file.fileno(), msvcrt.LK_UNLCK, 1)
        elif not _lock_of_a_server(file, fcntl.F_UNLCK):
            fcntl.flock(file, fcntl.LOCK_UN)


def _is_at(path: Path, file: BinaryIO) -> bool:
    """Whether nobody has replaced or deleted it since it was opened."""
    if sys.platform == "win32":  # which lets nobody do so
        return True
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except OSError as error:
        if error.errno not in GONE:
            raise
        return False
