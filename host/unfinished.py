"""Names of files that are not whole yet, and which of them nobody will finish.

Such a name begins with that of the process that writes. Each holds a file of this name in a folder for temporary files of this
machine: where that is there and not held, its writer is gone. Of a writer on another machine, or in a container with such a
folder of its own, there is none: what it left goes by age.
"""

from __future__ import annotations

import atexit
import os
import platform
import re
import stat
import tempfile
import time
from contextlib import ExitStack, suppress
from functools import cache
from pathlib import Path
from uuid import uuid4

from .held import held, is_held

WRITING = ".writing-"  # begins the name of what is not whole yet
ABANDONED = 86400.0  # seconds after which nobody writes to it any more, whoever did
OF_A_WRITER = re.compile(re.escape(WRITING) + "([0-9a-f]{32})-")


def unfinished_name(ending: str = "") -> str:
    """A name that nobody else has."""
    return f"{WRITING}{_writer()}{uuid4().hex}{ending}"


def sweep(folder: Path, now: float) -> None:
    """Remove what writers that are gone left in `folder`. now: by the clock of its disk."""
    gone: dict[str, bool] = {}
    for left in folder.glob(f"{WRITING}*"):
        with suppress(OSError):
            if (named := OF_A_WRITER.match(left.name)) is not None and named[1] not in gone:
                gone[named[1]] = _is_gone(named[1])
            if (named is not None and gone[named[1]]) or now - left.stat().st_mtime > ABANDONED:
                left.unlink()


def _is_gone(writer: str) -> bool:
    place = _place()
    return place is not None and _writer() != "" and is_held(place / writer) is False


@cache
def _writer() -> str:
    """This process, as its files are named; "" where nothing can tell others that it lives."""
    place = _place()
    if place is None:
        return ""
    name = uuid4().hex
    stack = ExitStack()
    try:
        for other in place.iterdir():
            if time.time() - other.lstat().st_mtime > ABANDONED and is_held(other) is False:
                other.unlink()
        stack.enter_context(held(place / name))
    except OSError:
        return ""
    atexit.register(stack.close)
    return f"{name}-" if is_held(place / name) else ""  # on a disk without locks nobody is seen to hold it


@cache
def _place() -> Path | None:
    """Where writers on this machine hold their files; None where it cannot be this user's alone."""
    user = os.getuid() if hasattr(os, "getuid") else ""
    try:
        machine = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        machine = re.sub(r"\W", "-", platform.node())
    # The machine's name, too: a folder for temporary files may be one that several share.
    place = Path(tempfile.gettempdir(), f"hotpath-writers-{user}-{machine}")
    try:
        place.mkdir(mode=0o700, exist_ok=True)
        facts = place.lstat()
    except OSError:
        return None
    ours = user in ("", facts.st_uid) and (os.name != "posix" or not facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH))
    return place if stat.S_ISDIR(facts.st_mode) and ours else None
