"""Stages of `card.py --together`: they get ready at the same time and measure one at a time.

Reading, tracing and compiling leave a card idle for most of a stage, so the stages do that side by side. What is measured
stands inside `alone()`: it waits for its turn, stops all other stages and everything that they started, and lets them go
on afterwards. Without `--together` it does nothing.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

FOLDER = "HOTPATH_TOGETHER"  # where the stages' process ids stand, one file for each, and the lock
LOCK = "lock"
SETTLE = 0.4  # seconds in which the card ends what stopped processes had queued
_depth = 0


def announce(folder: Path, name: str, pid: int) -> None:
    """Stage `name` is process `pid`, to be stopped while another one measures."""
    written = folder / f".{name}"
    written.write_text(str(pid))
    written.replace(folder / f"{name}.pid")


def withdraw(folder: Path, name: str) -> None:
    (folder / f"{name}.pid").unlink(missing_ok=True)


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """No other stage uses the card or the processor meanwhile. May be nested."""
    global _depth
    place = os.environ.get(FOLDER)
    if not place or _depth:
        yield
        return
    import fcntl

    folder = Path(place)
    with (folder / LOCK).open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        stopped = _signal_others(folder, signal.SIGSTOP)
        _depth += 1
        try:
            if stopped:
                time.sleep(SETTLE)
            yield
        finally:
            _depth -= 1
            _signal_others(folder, signal.SIGCONT)


def wake(folder: Path) -> None:
    """All stages go on, unless one measures: for the one that starts them, when a stage that may have measured is gone."""
    import fcntl

    with (folder / LOCK).open("a") as lock, contextlib.suppress(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _signal_others(folder, signal.SIGCONT)


def _signal_others(folder: Path, number: signal.Signals) -> int:
    """To all stages but this process's, with their children; how many processes were told."""
    import psutil

    told = 0
    for file in folder.glob("*.pid"):
        with contextlib.suppress(OSError, ValueError, psutil.Error):
            stage = psutil.Process(int(file.read_text()))
            family = [stage, *stage.children(recursive=True)]
            if any(process.pid == os.getpid() for process in family):
                continue
            for process in family:
                with contextlib.suppress(psutil.Error, OSError):
                    process.send_signal(number)
                    told += 1
    return told
