"""Which optional libraries work here, found out in a process of its own.

Looking means importing: that takes seconds, and a library built for another torch can end the process that imports it,
which must not be the one in which somebody's pictures are made.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from .. import host
from ..attention.capabilities import device_facts
from ..attention.dispatch import dispatcher

log = logging.getLogger("hotpath.panel")

PACK = Path(__file__).resolve().parent.parent
COMMAND = (sys.executable, str(PACK), "doctor", "--libraries")
TIMEOUT = 180.0


class LibraryReport:
    """What `hotpath doctor --libraries` answers; asked once, and again on request."""

    def __init__(self, command: tuple[str, ...] = COMMAND, timeout: float = TIMEOUT) -> None:
        self._command = command
        self._timeout = timeout
        self._lock = threading.Lock()
        self._found: dict[str, Any] | None = None

    def read(self, again: bool = False) -> dict[str, Any]:
        """`backends`, `face_engines` and `unmet_requirements`, or `error` with a sentence. Blocks for seconds."""
        with self._lock:
            if self._found is None or again or "error" in self._found:
                self._found = self._ask()
            return self._found

    def _ask(self) -> dict[str, Any]:
        try:
            done = subprocess.run(
                self._command,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                encoding="utf-8",
                errors="replace",
                timeout=self._timeout,
                check=False,
                creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),  # ComfyUI's desktop program has no console
            )
        except subprocess.TimeoutExpired:
            return {"error": f"Looking at the libraries took longer than {self._timeout:.0f} s; try again later."}
        except OSError as error:
            return {"error": f"Python could not be started to look at the libraries: {error}."}
        try:
            found = json.loads(done.stdout)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            log.warning("doctor --libraries ended with %d: %s", done.returncode, done.stderr[-2000:])
            return {
                "error": f"Looking at the libraries ended with code {done.returncode}: one of them is broken. "
                "`hotpath doctor` in a terminal tells which."
            }
        return found


def attention_backends() -> list[dict[str, Any]]:
    """Every attention backend of this process: what it is, and why it cannot be used on the device, or None."""
    device = device_facts(host.current().device())
    found = []
    for backend in dispatcher().backends.values():
        reason = backend.unavailable(device)
        found.append({"name": backend.name, "what": backend.what, "exact": backend.exact, "reason": reason})
    return found
