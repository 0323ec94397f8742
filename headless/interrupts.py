"""Ctrl-C for a headless run: the first asks the running node to stop, the second stops the program."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..host.headless import HeadlessHost


@contextmanager
def stopped_by_ctrl_c(host: HeadlessHost) -> Iterator[None]:
    """Turn SIGINT into `host.stop()` while inside; nothing outside the main thread, where signals cannot be set."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked = False

    def on_signal(number: int, frame: Any) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        host.stop()

    before = signal.signal(signal.SIGINT, on_signal)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        host.clear_stop()
