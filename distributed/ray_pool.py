"""Workers as Ray actors: each holds one GPU, or a share of one, or CPU cores, on any machine of the cluster.

What crosses machines is JSON with paths; pictures, films and models are read where they are needed.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .bootstrap import load_pack
from .pool import STARTS, Advanced, Died, Event, Finished, Ready
from .ray_actor import HotpathWorker
from .ray_worker import COMFYUI, ENDS, PROCESS, ComfyUISettings
from .worker import WorkerSettings

log = logging.getLogger("hotpath.distributed")

PACK = Path(__file__).resolve().parent.parent
ASK_EVERY = 1.0  # seconds between two questions for the progress of a job
PATIENCE = 180.0  # seconds until somebody is told that the cluster has no room for a worker
PLACED, READY, RESULT, PROGRESS = "placed", "ready", "result", "progress"  # what an answer of an actor means


class RayPool:
    """workers: how many actors. gpus, cpus: what each of them holds; a share of a GPU is allowed. settings: of workers in the
    actors themselves, or with a ComfyUI each."""

    def __init__(
        self,
        ray: Any,
        settings: WorkerSettings | ComfyUISettings,
        workers: int,
        gpus: float,
        cpus: float,
        patience: float = PATIENCE,
    ) -> None:
        self._ray, self.settings, self.slots = ray, settings, workers
        self._kind = COMFYUI if isinstance(settings, ComfyUISettings) else PROCESS
        holds = f"{gpus:g} GPU" if gpus else f"{cpus:g} CPU"
        with_comfyui = " and a ComfyUI" if self._kind == COMFYUI else ""
        self.name = f"{workers} Ray actor{'s' if workers > 1 else ''} with {holds}{with_comfyui} each"
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
        for slot, started in enumerate(self._started_at):
            if not started:
                self._start(slot)

    def pids(self) -> list[int | None]:
        """Process ids by slot, on whatever machine; asks the actors."""
        return [self._ray.get(actor.pid.remote()) if actor is not None else None for actor in self._actors]

    def _start(self, slot: int) -> None:
        self._starts[slot] += 1
        self._started_at[slot] = time.monotonic()
        with _by_value():
            actor = self._class.remote(str(PACK), self._kind, self.settings.plain())
        self._actors[slot] = actor
        self._waiting[actor.pid.remote()] = (slot, PLACED)

    def submit(self, slot: int, payload: Mapping[str, Any]) -> None:
        self._jobs[slot] = payload["id"]
        self._asked_at[slot] = time.monotonic()
        self._waiting[self._actors[slot].run.remote(dict(payload))] = (slot, RESULT)

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
            return [self._lost(slot, f"the worker died ({type(error).__name__})")]
        if meaning == PLACED:
            self._waiting[self._actors[slot].begin.remote()] = (slot, READY)
            return []
        if meaning == READY:
            if "refused" in value:
                return [self._lost(slot, value["refused"], final=value["final"])]
            self._starts[slot] = 0
            self._begun(value)
            return [Ready(slot)]
        if meaning == PROGRESS:
            return [Advanced(slot, float(value))] if self._jobs[slot] is not None else []
        if "gone" in value:
            return [self._lost(slot, value["gone"])]
        job, self._jobs[slot] = self._jobs[slot], None
        assert job is not None
        return [Finished(slot, job, value)]

    def _begun(self, answer: Mapping[str, Any]) -> None:
        """A worker is ready, and this is what it says of itself."""

    def _lost(self, slot: int, reason: str, final: bool = False) -> Died:
        self._forget(slot)
        job, self._jobs[slot] = self._jobs[slot], None
        if final:
            return Died(slot, reason, job, final=True)
        if self._starts[slot] >= STARTS:
            return Died(slot, f"{reason}, {STARTS} times before it was ready", job, final=True)
        self._start(slot)
        return Died(slot, reason, job)

    def _forget(self, slot: int) -> None:
        actor, self._actors[slot] = self._actors[slot], None
        placed = (slot, PLACED) not in self._waiting.values()
        self._waiting = {ref: entry for ref, entry in self._waiting.items() if entry[0] != slot}
        if actor is not None:
            if placed:
                self._end([actor])
            self._ray.kill(actor, no_restart=True)

    def _end(self, actors: Sequence[Any]) -> None:
        """Let them end their ComfyUIs: one would hold its GPU for a while after its actor is gone."""
        if self._kind == COMFYUI and actors:
            ends = [actor.end.remote() for actor in actors]
            self._ray.wait(ends, num_returns=len(ends), timeout=ENDS)

    def _ask_for_progress(self) -> None:
        now = time.monotonic()
        asked = {slot for slot, meaning in self._waiting.values() if meaning == PROGRESS}
        for slot, job in enumerate(self._jobs):
            if job is not None and slot not in asked and now - self._asked_at[slot] >= ASK_EVERY:
                self._asked_at[slot] = now
                self._waiting[self._actors[slot].fraction.remote()] = (slot, PROGRESS)

    def _without_room(self) -> list[Event]:
        """Slots that the cluster could not place for so long that it will not: those are given up."""
        events: list[Event] = []
        now = time.monotonic()
        for slot in {slot for slot, meaning in self._waiting.values() if meaning == PLACED}:
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
        not_placed = {slot for slot, meaning in self._waiting.values() if meaning == PLACED}
        actors = {slot: actor for slot, actor in enumerate(self._actors) if actor is not None}
        self._end([actor for slot, actor in actors.items() if slot not in not_placed])
        for actor in actors.values():
            self._ray.kill(actor, no_restart=True)
        self._waiting.clear()
        self._actors = [None] * self.slots


@contextmanager
def _by_value() -> Iterator[None]:
    """The machine an actor goes to may not be able to import this pack, or know it by another name."""
    from ray import cloudpickle

    modules = [sys.modules[part.__module__] for part in (HotpathWorker, load_pack)]
    for module in modules:
        cloudpickle.register_pickle_by_value(module)
    try:
        yield
    finally:
        for module in modules:
            cloudpickle.unregister_pickle_by_value(module)
