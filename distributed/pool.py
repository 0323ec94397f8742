"""What a run asks of its workers, and the simplest of them: one, in this very process.

A pool has numbered slots. It starts a worker in each, again when one dies, and reports what happens as events.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from .retry import WORKER
from .worker import WorkerSettings, WorkflowWorker

AGAIN = "run the same again, and what is finished is kept"
STARTS = 3  # how often in a row the worker of a slot may die before it is ready


@dataclass(frozen=True)
class Ready:
    """The worker in a slot can be given a job."""

    slot: int


@dataclass(frozen=True)
class Advanced:
    """fraction: how much of the slot's job is done, 0..1."""

    slot: int
    fraction: float


@dataclass(frozen=True)
class Finished:
    """A job ended; `result` is what `WorkflowWorker.run` returned."""

    slot: int
    job_id: str
    result: Mapping[str, Any]


@dataclass(frozen=True)
class Died:
    """The worker in a slot is gone, with the job it had. final: no new one is started, and `reason` says why."""

    slot: int
    reason: str
    job_id: str | None
    final: bool = False


Event = Ready | Advanced | Finished | Died


class Pool(Protocol):
    """Workers. All calls come from one thread."""

    name: str
    slots: int

    def start(self) -> None: ...

    def submit(self, slot: int, payload: Mapping[str, Any]) -> None:
        """Give a ready slot its one job."""

    def wait(self, timeout: float) -> list[Event]:
        """What happened, waiting for up to `timeout` seconds for something to happen."""

    def renew(self, slot: int) -> None:
        """Replace the worker of a slot, whatever it does; `Ready` follows, and nothing more of a job it had."""

    def close(self) -> None:
        """End all workers now, whatever they do."""


class InProcessPool:
    """One worker in this process. A job runs inside `wait`; nodes ask `interrupted`, which raises to stop it. `begins` is
    told the job and its attempt before it runs, `advanced` how much of it is done."""

    name = "one worker in this process"
    slots = 1

    def __init__(self, settings: WorkerSettings, interrupted: Callable[[], None] = lambda: None) -> None:
        self.settings = settings
        self.begins: Callable[[str, int], None] = lambda job_id, attempt: None
        self.advanced: Callable[[float], None] = lambda fraction: None
        self._interrupted = interrupted
        self._events: deque[Event] = deque()
        self._payload: Mapping[str, Any] | None = None
        self._threads: int | None = None
        self.worker: WorkflowWorker | None = None
        self.broken = False  # this process can compute nothing more on its GPU, and is not one that can be replaced

    def start(self) -> None:
        self._threads = torch.get_num_threads()
        self.worker = WorkflowWorker(self.settings, lambda fraction: self.advanced(fraction), self._interrupted)
        self._events.append(Ready(0))

    def submit(self, slot: int, payload: Mapping[str, Any]) -> None:
        self._payload = payload

    def wait(self, timeout: float) -> list[Event]:
        if self._payload is not None:
            assert self.worker is not None
            payload, self._payload = self._payload, None
            self.begins(payload["id"], payload["attempt"])
            result = self.worker.run(payload)
            if result.get("kind") == WORKER:
                self.broken = True
                self._events.append(Died(0, f"{result['error']}; {AGAIN}", payload["id"], final=True))
            else:
                self._events.append(Finished(0, payload["id"], result))
        events = list(self._events)
        self._events.clear()
        return events

    def renew(self, slot: int) -> None:
        assert self.worker is not None
        self.worker.let_go()
        self._events.append(Ready(0))

    def close(self) -> None:
        if self._threads is not None and torch.get_num_threads() != self._threads:
            torch.set_num_threads(self._threads)
