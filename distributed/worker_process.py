"""A worker in a process of its own. It talks over its standard input and output, a line of JSON each; everything that
libraries print goes to standard error. It ends when its input ends, so no worker outlives the run that started it.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
from typing import Any, BinaryIO


def main() -> None:
    """Read the settings, say `ready`, then answer one job after the other."""
    messages, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    # From here on nobody else reads the messages or writes among the answers.
    os.dup2(2, 1)
    with open(os.devnull, "rb") as nothing:  # noqa: PTH123 - the descriptor is wanted
        os.dup2(nothing.fileno(), 0)
    sys.stdout = sys.stderr
    # Ctrl-C is for the run; it ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    speaker = Speaker(answers)
    jobs: queue.Queue[dict[str, Any]] = queue.Queue()
    settings = json.loads(messages.readline())
    threading.Thread(target=_listen, args=(messages, jobs), daemon=True).start()
    try:
        from .worker import WorkerSettings, WorkflowWorker

        worker = WorkflowWorker(WorkerSettings(**settings), lambda fraction: speaker.say({"progress": fraction}))
    except Exception as error:
        speaker.say({"refused": f"{type(error).__name__}: {error}"})
        return
    speaker.say({"ready": os.getpid()})
    while True:
        payload = jobs.get()
        speaker.say({"result": worker.run(payload), "id": payload["id"]})


class Speaker:
    """Writes messages, whole, from any thread."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._lock = threading.Lock()

    def say(self, message: dict[str, Any]) -> None:
        line = json.dumps(message, ensure_ascii=True).encode() + b"\n"
        try:
            with self._lock:
                self._stream.write(line)
                self._stream.flush()
        except OSError:  # nobody listens any more
            _end()


def _listen(messages: BinaryIO, jobs: queue.Queue[dict[str, Any]]) -> None:
    try:
        for line in messages:
            jobs.put(json.loads(line))
    finally:  # also after half a message, when the run was killed while it wrote
        _end()


def _end() -> None:
    """The run is gone: this process and what nodes have started in it end now."""
    if os.name == "posix" and os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    # Not sys.exit: a kernel or a download of the running job would hold the process.
    os._exit(0)
