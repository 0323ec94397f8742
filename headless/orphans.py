"""In a ComfyUI that was started for one run: it ends when whoever started it is gone, also where that was killed. And what is
left of both where both were killed.

`launcher` stops its ComfyUI on every way out that Python knows of; `kill -9` and a crash are none. On Windows, where a process
is not told that its parent has ended, `host.tied_processes` sees to it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

from ..host.held import held

log = logging.getLogger("hotpath.headless")

WORK = "hotpath-comfyui-"  # begins the name of the folder that is made for one
AT_WORK = "at-work"  # in it: held by whoever started it, and by the ComfyUI itself
YOUNG = 3600.0  # seconds in which a folder may not be held yet
STARTED_BY = "HOTPATH_STARTED_BY"  # the process id of who started this ComfyUI
STARTED_IN = "HOTPATH_STARTED_IN"  # the folder that was made for it
EVERY = 2.0  # seconds between two looks
GRACE = 10.0  # seconds for it to end by itself


def sweep() -> None:
    """Remove the folders of runs that are over and could not do so: a killed one's, and its ComfyUI was killed too."""
    for mark in Path(tempfile.gettempdir()).glob(f"{WORK}*/{AT_WORK}"):
        with contextlib.suppress(OSError):
            facts = mark.lstat()
            if os.name == "posix" and facts.st_uid != os.getuid():
                continue
            if time.time() - facts.st_mtime < YOUNG:
                continue
            with held(mark) as ours:
                if ours is not None:
                    shutil.rmtree(mark.parent, ignore_errors=True)


def end_with_starter(every: float = EVERY, grace: float = GRACE) -> bool:
    """Watch whoever started this process, if the environment says that it was started for one run; whether it did."""
    starter, folder = os.environ.get(STARTED_BY, ""), os.environ.get(STARTED_IN, "")
    # What this process starts inherits the variables; only its own arguments lead into the folder. Who started it is no proof:
    # it may be gone before this process has come so far.
    if os.name != "posix" or not folder or not any(word.startswith(folder) for word in sys.argv):
        return False

    def watch() -> None:
        while str(os.getppid()) == starter:
            time.sleep(every)
        log.warning("The run that this ComfyUI was started for is gone: it ends too.")
        shutil.rmtree(folder, ignore_errors=True)
        for number in (signal.SIGTERM, signal.SIGKILL):
            # The group is ours alone: `launcher` gives each ComfyUI a session.
            if os.getpgrp() == os.getpid():
                os.killpg(os.getpid(), number)
            else:
                os.kill(os.getpid(), number)
            time.sleep(grace)

    threading.Thread(target=watch, name="hotpath-starter", daemon=True).start()
    return True
