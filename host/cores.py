"""Work on pieces of pictures on all cores: numpy and hashlib let go of the interpreter while they read."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

MOST_THREADS = 16

Piece = TypeVar("Piece")
Made = TypeVar("Made")

_threads: ThreadPoolExecutor | None = None
_starting = threading.Lock()


def cores() -> int:
    """How many this process may use, and uses."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(MOST_THREADS, usable))


def on_cores(function: Callable[[Piece], Made], pieces: Sequence[Piece]) -> list[Made]:
    """`function` of each piece, in order. It may not call this again."""
    threads = cores()
    if len(pieces) < 2 or threads < 2:
        return [function(piece) for piece in pieces]
    return list(_pool(threads).map(function, pieces))


def _pool(threads: int) -> ThreadPoolExecutor:
    global _threads
    with _starting:
        if _threads is None:
            _threads = ThreadPoolExecutor(threads, thread_name_prefix="hotpath-cores")
        return _threads


def _forget_threads() -> None:
    """In a forked child there are none."""
    global _threads, _starting
    _threads, _starting = None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)
