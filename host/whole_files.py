"""Files that are there whole or not at all."""

from __future__ import annotations

import errno
import itertools
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import is_full
from .system_errors import SystemRefused, sentence
from .unfinished import WRITING, sweep, unfinished_name

HELD = (0.05, 0.1, 0.2, 0.4, 0.8)  # seconds to wait for a file that another program holds
REFUSED = (errno.EINVAL, errno.EBADF, errno.ENOTSUP)  # to make something durable
MANY = 10_000  # folders that are remembered
_swept: set[Path] = set()


@contextmanager
def refusal_told(path: Path) -> Iterator[None]:
    """What the system refuses inside is raised as a SystemRefused with the place and the cure; other errors as they are."""
    try:
        yield
    except Exception as error:
        if path.name.startswith(WRITING):  # whoever gives it its name tells of that
            raise
        if is_full(error):
            told = f"The disk with {path.parent} is full, so {path.name} was not written: free some space and run it again."
            raise SystemRefused(errno.ENOSPC, told) from error
        # Of what is open, the system's error names nothing; a name that is there for a moment says nothing to people.
        if not isinstance(error, OSError) or isinstance(error, SystemRefused):
            raise
        if error.filename is not None and WRITING not in str(error.filename):
            raise
        if told := sentence(OSError(error.errno, error.strerror, str(path))):
            raise SystemRefused(error.errno, told) from error
        raise


@contextmanager
def whole_file(path: Path, ending: str = "") -> Iterator[Path]:
    """Where to write what becomes `path` when the block ends well. Otherwise it goes, and what was at `path` stays.

    The name is this writer's own. ending: of it, for a library that goes by that; without one, no list of files takes it for
    what it is not yet. The folder is made. What writers that were killed left in it goes, when a process writes there for the
    first time.
    """
    with unfinished_file(path, ending) as unfinished:
        yield unfinished
        put_in_place(unfinished, path)


def new_file(names: Iterator[Path], write: Callable[[Path], object], ending: str = "") -> Path:
    """Have `write` make a file, as in a block of `whole_file`, and give it the first of `names` that is free then. Returns the
    name. The names are of one folder."""
    first = next(names)
    with unfinished_file(first, ending) as unfinished:
        write(unfinished)
        return named(unfinished, itertools.chain((first,), names))


def named(source: Path, names: Iterator[Path]) -> Path:
    """The first of `names` that nobody has, also no other process that takes such names at this moment: `source` has it now,
    and all of it is on the disk."""
    sync(source)
    return next(path for path in names if _is_named(source, path))


def _is_named(source: Path, target: Path) -> bool:
    """Whether `source` has the name `target` now, which nobody had."""
    try:
        os.link(source, target)
    except FileExistsError:
        return False
    except OSError:  # a disk on which a file has one name
        if target.exists():
            return False
        put_in_place(source, target)
    return True


@contextmanager
def unfinished_file(path: Path, ending: str = "") -> Iterator[Path]:
    """As `whole_file`, but who uses it has to give the file its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not mkstemp, whose files are readable by their maker alone: who may read what is written is for the umask to say.
    unfinished = path.with_name(unfinished_name(ending))
    try:
        with refusal_told(path):
            yield unfinished
    finally:
        remove(unfinished)
    if path.parent not in _swept:
        if len(_swept) >= MANY:
            _swept.clear()
        _swept.add(path.parent)
        with suppress(OSError):
            sweep(path.parent, path.stat().st_mtime)


def remove(path: Path) -> None:
    """Delete what came to nothing, if that goes: where a disk fails, why it came to nothing must not be hidden."""
    with suppress(OSError):
        path.unlink()


def put_in_place(source: Path, target: Path) -> None:
    """As Path.replace, of a file when all of it is on the disk: after a power cut there would be a name with nothing behind it.
    On Windows a viewer or a virus scanner may hold a file for a moment."""
    for wait in HELD if os.name == "nt" else ():
        try:
            _move(source, target)
            return
        except PermissionError:
            time.sleep(wait)
    _move(source, target)


def _move(source: Path, target: Path) -> None:
    if source.is_file():
        sync(source)
    source.replace(target)


def sync(path: Path) -> None:
    """Make the content of a file durable, where the disk can."""
    handle = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in REFUSED:
            raise
    finally:
        os.close(handle)
