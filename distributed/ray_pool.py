"""Workers as Ray actors: each holds one GPU, or a share of one, or CPU cores, on any machine of the cluster.

What crosses machines is JSON with paths; pictures, films and models are read where they are needed.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .bootstrap import load_pack
from .pool import STARTS, Advanced, Died, Event, Finished, Ready
from .ray_actor import HotpathWorker
from .worker import WorkerSettings

log = logging.getLogger("hotpath.distributed")

PACK = Path(__file__).resolve().parent.parent
ASK_EVERY = 1.0  # seconds between two questions for the progress of a job
PATIENCE = 180.0  # seconds until somebody is told that the cluster has no room for a worker


class RayPool:
    """workers: how many actors. gpus, cpus: what each of them holds; a share of a GPU is allowed."""

    def __init__(
        self, ray: Any, settings: WorkerSettings, workers: int, gpus: float, cpus: float, patience: float = PATIENCE
    ) -> None:
        self._ray, self.settings, self.slots = ray, settings, workers
        self.name = (
            f"{workers} Ray actor{'s' if workers > 1 else ''} with {f'{gpus:g} GPU' if gpus else f'{cpus:g} CPU'} each"
        )
        # Two at a time: a job, and the question how far it is.
        options = {"num_gpus": gpus, "num_cpus": cpus, "max_restarts": 0, "max_task_retries": 0, "max_concurrency": 2}
        self._class = ray.remote(**options)(HotpathWorker)
        self._actors: list[Any] = [None] * workers
        self._jobs: list[str | None] = [None] * workers
        self._starts = [0] * workers
        self._started_at = [0.0] * workers
        self._asked_at = [0.0] * workers
        self._patience = patience
        # What Ray owes us: reference -> (slot, what for).
        self._waiting: dict[Any, tuple[int, str]] = {}

    def start(self) -> None:
        from ray import cloudpickle

        # By value: the machine an actor goes to may not be able to import this pack, or know it by another name.
        modules = [sys.modules[part.__module__] for part in (HotpathWorker, load_pack)]
        for module in modules:
            cloudpickle.register_pickle_by_value(module)
        try:
            for slot in range(self.slots):
                self._start(slot)
        finally:
            for module in modules:
                cloudpickle.unregister_pickle_by_value(module)

    def pids(self) -> list[int | None]:
        """Process ids by slot, on whatever machine; asks the actors."""
        return [self._ray.get(actor.pid.remote()) if actor is not None else None for actor in self._actors]

    def _start(self, slot: int) -> None:
        self._starts[slot] += 1
        self._started_at[slot] = time.monotonic()
        actor = self._class.remote(str(PACK), self.settings.plain())
        self._actors[slot] = actor
        self._waiting[actor.pid.remote()] = (slot, "ready")

    def submit(self, slot: int, payload: Mapping[str, Any]) -> None:
        self._jobs[slot] = payload["id"]
        self._asked_at[slot] = time.monotonic()
        self._waiting[self._actors[slot].run.remote(dict(payload))] = (slot, "result")

    def wait(self, timeout: float) -> list[Event]:
        if not self._waiting:
            time.sleep(timeout)
            return []
        self._ask_for_progress()
        references = list(self._waiting)
        done, _ = self._ray.wait(references, num_returns=1, timeout=timeout)
        if done:
            # Whatever else is there by now comes along without waiting.
            done, _ = self._ray.wait(references, num_returns=len(references), timeout=0)
        events: list[Event] = []
        for reference in done:
            if reference in self._waiting:
                events += self._take(reference)
        return events + self._without_room()

    def _take(self, reference: Any) -> list[Event]:
        slot, meaning = self._waiting.pop(reference)
        try:
            value = self._ray.get(reference)
        except Exception as error:  # whatever Ray raises for an actor that is gone, unreachable or could not start
            return [self._lost(slot, error)]
        if meaning == "ready":
            self._starts[slot] = 0
            return [Ready(slot)]
        if meaning == "progress":
            return [Advanced(slot, float(value))] if self._jobs[slot] is not None else []
        job, self._jobs[slot] = self._jobs[slot], None
        assert job is not None
        return [Finished(slot, job, value)]

    def _lost(self, slot: int, error: Exception) -> Died:
        self._forget(slot)
        job, self._jobs[slot] = self._jobs[slot], None
        refused = _refusal(error)
        if refused is not None:
            return Died(slot, refused, job, final=True)
        reason = f"the worker died ({type(error).__name__})"
        if self._starts[slot] >= STARTS:
            return Died(slot, f"{reason}, {STARTS} times before it was ready", job, final=True)
        self._start(slot)
        return Died(slot, reason, job)

    def _forget(self, slot: int) -> None:
        actor, self._actors[slot] = self._actors[slot], None
        self._waiting = {ref: entry for ref, entry in self._waiting.items() if entry[0] != slot}
        if actor is not None:
            self._ray.kill(actor, no_restart=True)

    def _ask_for_progress(self) -> None:
        now = time.monotonic()
        asked = {slot for slot, meaning in self._waiting.values() if meaning == "progress"}
        for slot, job in enumerate(self._jobs):
            if job is not None and slot not in asked and now - self._asked_at[slot] >= ASK_EVERY:
                self._asked_at[slot] = now
                self._waiting[self._actors[slot].fraction.remote()] = (slot, "progress")

    def _without_room(self) -> list[Event]:
        """Slots that the cluster could not place for so long that it will not: those are given up."""
        events: list[Event] = []
        now = time.monotonic()
        for slot in {slot for slot, meaning in self._waiting.values() if meaning == "ready"}:
            if now - self._started_at[slot] > self._patience:
                self._forget(slot)
                events.append(
                    Died(slot, f"the cluster had no room for it for {self._patience:.0f} s", None, final=True)
                )
        return events

    def renew(self, slot: int) -> None:
        self._forget(slot)
        self._starts[slot], self._jobs[slot] = 0, None
        self._start(slot)

    def close(self) -> None:
        for slot in range(self.slots):
            self._forget(slot)


def _refusal(error: Exception) -> str | None:
    """The sentence of a worker that could not begin on its machine, out of Ray's account of it."""
    for line in str(error).splitlines():
        for name in ("NotShared: ", "ImportError: ", "ModuleNotFoundError: "):
            if name in line:
                return line.partition(name)[2].strip()
    return None
