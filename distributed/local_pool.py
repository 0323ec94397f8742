"""Workers in processes of this machine, one per GPU or as many as asked for on the CPU.

They are started by path and not forked or spawned by `multiprocessing`: that would run the main program again in each of
them, and the main program may be ComfyUI.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..host import fresh_memory, tied_processes
from .devices import VISIBLE
from .pool import STARTS, Advanced, Died, Event, Finished, Ready
from .worker import WorkerSettings

log = logging.getLogger("hotpath.distributed")

PACK = Path(__file__).resolve().parent.parent
# Bars of libraries in workers would run through the one line of the run.
QUIET = {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
GRACE = 5.0  # seconds for a killed process to be gone


class LocalPool:
    """gpus: for each worker the GPU that it sees, as VISIBLE wants it named; None: as this process does."""

    def __init__(self, settings: WorkerSettings, gpus: Sequence[str | None]) -> None:
        self.settings, self.gpus = settings, list(gpus)
        self.slots = len(self.gpus)
        self.name = f"{self.slots} process{'es' if self.slots > 1 else ''} of this machine"
        self._heard: queue.Queue[tuple[int, int, dict[str, Any] | None]] = queue.Queue()
        self._processes: list[subprocess.Popen[bytes] | None] = [None] * self.slots
        self._starts = [0] * self.slots
        self._generation = [0] * self.slots
        self._jobs: list[str | None] = [None] * self.slots
        self._refusals: list[str | None] = [None] * self.slots

    def start(self) -> None:
        for slot in range(self.slots):
            self._start(slot)

    def pids(self) -> list[int | None]:
        """Process ids by slot."""
        return [process.pid if process is not None else None for process in self._processes]

    def _start(self, slot: int) -> None:
        self._starts[slot] += 1
        self._generation[slot] += 1
        environment = {**QUIET, **fresh_memory.environment(), **os.environ}
        if self.gpus[slot] is not None:
            environment[VISIBLE] = str(self.gpus[slot])
        if self.settings.threads:
            # Also for libraries that read it when they load.
            environment["OMP_NUM_THREADS"] = str(self.settings.threads)
        # A Ctrl-C at the terminal is for the run alone. On Windows: and no window where the program around has none.
        alone = ("CREATE_NEW_PROCESS_GROUP", "CREATE_NO_WINDOW")
        flags = sum(getattr(subprocess, name, 0) for name in alone)
        process = subprocess.Popen(
            [sys.executable, str(PACK / "distributed" / "bootstrap.py"), str(PACK)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            creationflags=flags,
            start_new_session=os.name == "posix",
        )
        tied_processes.tie(process)
        self._processes[slot] = process
        self._send(slot, self.settings.plain())
        reader = threading.Thread(
            target=self._read, args=(slot, self._generation[slot], process), name=f"hotpath-worker-{slot}", daemon=True
        )
        reader.start()

    def _read(self, slot: int, generation: int, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        with process.stdout as lines:
            for line in lines:
                try:
                    self._heard.put((slot, generation, json.loads(line)))
                except ValueError:
                    log.warning("worker %d said something that is no message: %r", slot, line[:200])
        process.wait()
        self._heard.put((slot, generation, None))

    def _send(self, slot: int, message: Mapping[str, Any]) -> None:
        process = self._processes[slot]
        assert process is not None and process.stdin is not None
        try:
            process.stdin.write(json.dumps(message).encode() + b"\n")
            process.stdin.flush()
        except OSError as error:  # it has just died, which its reader reports
            log.debug("worker %d cannot be reached: %s", slot, error)

    def submit(self, slot: int, payload: Mapping[str, Any]) -> None:
        self._jobs[slot] = payload["id"]
        self._send(slot, payload)

    def wait(self, timeout: float) -> list[Event]:
        events: list[Event] = []
        end = time.monotonic() + timeout
        while True:
            left = end - time.monotonic()
            try:
                slot, generation, message = self._heard.get(timeout=max(0.0, left) if not events else 0)
            except queue.Empty:
                return events
            if generation == self._generation[slot]:
                events += self._interpret(slot, message)

    def _interpret(self, slot: int, message: dict[str, Any] | None) -> list[Event]:
        if message is None:
            return [self._died(slot)]
        if "ready" in message:
            self._starts[slot] = 0
            return [Ready(slot)]
        if "progress" in message:
            return [Advanced(slot, float(message["progress"]))]
        if "result" in message:
            self._jobs[slot] = None
            return [Finished(slot, message["id"], message["result"])]
        self._refusals[slot] = str(message.get("refused"))
        return []

    def _died(self, slot: int) -> Died:
        process, self._processes[slot] = self._processes[slot], None
        assert process is not None
        _close(process)
        job, self._jobs[slot] = self._jobs[slot], None
        refusal = self._refusals[slot]
        if refusal is not None:
            return Died(slot, refusal, job, final=True)
        reason = f"the worker {_ending(process.returncode)}"
        if self._starts[slot] >= STARTS:
            return Died(slot, f"{reason}, {STARTS} times before it was ready", job, final=True)
        self._start(slot)
        return Died(slot, reason, job)

    def renew(self, slot: int) -> None:
        process = self._processes[slot]
        if process is not None:
            _kill(process)
            _close(process)
        self._starts[slot], self._jobs[slot] = 0, None
        self._start(slot)

    def close(self) -> None:
        running = [process for process in self._processes if process is not None]
        for process in running:
            _kill(process)
        for process in running:
            try:
                process.wait(GRACE)
            except subprocess.TimeoutExpired:  # it waits for a device that does not answer
                log.warning("worker process %d does not end", process.pid)
            _close(process)
        self._processes = [None] * self.slots
        self._generation = [g + 1 for g in self._generation]


def _kill(process: subprocess.Popen[bytes]) -> None:
    """The worker and all it has started."""
    try:
        if os.name == "posix":
            os.killpg(process.pid, signal.SIGKILL)
        else:
            tied_processes.end(process)
    except (ProcessLookupError, PermissionError):
        process.kill()


def _close(process: subprocess.Popen[bytes]) -> None:
    if process.stdin is not None:
        try:
            process.stdin.close()
        except OSError:
            log.debug("the pipe to a worker was broken")


def _ending(code: int | None) -> str:
    if code is None:
        return "ended"
    if code < 0:
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        # The kernel's out-of-memory killer leaves no other trace.
        more = ", perhaps for want of memory" if name == "SIGKILL" else ""
        return f"was killed by {name}{more}"
    return f"ended with exit code {code}"
