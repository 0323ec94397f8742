"""The loop of a run: items in, jobs to workers, results into the manifest, failures again or on record.

At most `depth` jobs per worker are known at a time (back-pressure), whatever the number of items. What a worker had when
it died is given to another. Nothing here knows what a worker is; `benchmarks/distributed.py` runs it on simulated ones.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from .jobs import BadMap, Job
from .policy import Policy
from .pool import Advanced, Died, Event, Finished, Pool, Ready
from .results import CannotKeep
from .retry import DISK, ITEM, MEMORY, WORKER, WORKFLOW, RetryPlan
from .second_opinions import SecondOpinions
from .status import Observer, Status, Unobserved

log = logging.getLogger("hotpath.distributed")

TICK = 0.1  # seconds at most between two looks at the interrupt
DEPTH = 2
PATIENT = 64  # jobs at most that wait for another attempt while others are begun
WITHOUT_ROOM = 3  # jobs in a row for which a worker has no room on its own disk, until it is given no more


class DiskFull(RuntimeError):
    """There is no room for results; the message is a sentence for the person. What is finished is kept."""


class NoWorkers(RuntimeError):
    """Every worker is lost for good; the message says why the last one was."""


class Store(Protocol):
    """Where results go; `results.ResultStore` is the one."""

    def done(self, job: Job) -> bool: ...
    def staging(self, job: Job, attempt: int) -> Path: ...
    def discard(self, staging: Path) -> None: ...
    def full(self) -> bool: ...
    def deaths(self, job: Job) -> int: ...
    def keep(self, job: Job, staging: Path, texts: list[tuple[bool, str]], seconds: float, attempts: int) -> object: ...
    def fail(self, job: Job, error: str, attempts: int, seconds: float = 0.0) -> None: ...
    def refuse(self, job: Job, error: str, attempts: int, seconds: float = 0.0) -> None: ...


@dataclass
class _Task:
    job: Job
    attempt: int = 1
    twins: list[Job] = field(default_factory=list)  # items with the same content, under other names
    avoid: set[int] = field(default_factory=set)  # slots without room on their disks, or with something broken


@dataclass(order=True)
class _Waiting:
    """A job that waits for its next attempt."""

    due: float
    number: int
    task: _Task = field(compare=False)


class Scheduler:
    """One run over `jobs`. interrupted: raises when the person wants to stop; it is asked at every turn. limit: seconds
    that an attempt may take until its worker is replaced; None for any time."""

    def __init__(
        self,
        pool: Pool,
        store: Store,
        policy: Policy,
        retry: RetryPlan,
        status: Status,
        observer: Observer | None = None,
        interrupted: Callable[[], None] = lambda: None,
        depth: int = DEPTH,
        clock: Callable[[], float] = time.monotonic,
        limit: float | None = None,
    ) -> None:
        self.pool, self.store, self.policy, self.retry = pool, store, policy, retry
        self.status, self.observer = status, observer or Unobserved()
        self.interrupted, self.depth, self.clock, self.limit = interrupted, max(1, depth), clock, limit
        self._queues: list[deque[_Task]] = [deque() for _ in range(pool.slots)]
        self._running: list[_Task | None] = [None] * pool.slots
        self._begun = [0.0] * pool.slots
        self._ready = [False] * pool.slots
        self._gone = [False] * pool.slots
        self._without_room: list[set[str]] = [set() for _ in range(pool.slots)]
        self._opinions = SecondOpinions(pool.slots)
        self._pending: deque[_Task] = deque()
        self._later: list[_Waiting] = []
        self._known: dict[str, _Task] = {}
        self._numbers = itertools.count()
        self._twins = 0

    @property
    def known(self) -> int:
        """Jobs that are held in memory: waiting, queued, running, or waiting for their twin."""
        return len(self._known) + self._twins

    def tell(self, slot: int, fraction: float) -> None:
        """How much of a slot's job is done; for a worker in this process, which reports while it works."""
        self._handle(Advanced(slot, fraction))
        self.observer.changed(self.status)

    def run(self, jobs: Iterator[Job]) -> Status:
        """Until every job has ended. Raises NoWorkers, DiskFull, BadMap when no item can run, or what `interrupted` raises;
        what is finished is then kept."""
        exhausted = False
        try:
            # Inside, for the workers that did start when one cannot.
            self.pool.start()
            while True:
                self.interrupted()
                before = self.status.skipped
                exhausted = exhausted or self._pull(jobs)
                self._retry_due()
                self._hand_out()
                if exhausted and not self._known:
                    return self.status
                # While there is a list of what is done to go through, nothing is waited for.
                for event in self.pool.wait(TICK if exhausted or self.status.skipped == before else 0.0):
                    self._handle(event)
                self._end_late()
                self.observer.changed(self.status)
        finally:
            self.status.running.clear()
            self.pool.close()

    def _pull(self, jobs: Iterator[Job]) -> bool:
        """Take jobs until there is enough to do; True when there are no more."""
        limit = self.depth * max(1, sum(not gone for gone in self._gone)) + min(len(self._later), PATIENT)
        while len(self._known) + self._twins < limit:
            job = next(jobs, None)
            if job is None:
                return True
            if job.id in self._known:
                self._known[job.id].twins.append(job)
                self._twins += 1
            elif self._known_end(job):
                # A long list of what is done already must not hold up those who wait.
                if self.status.over % 64 == 0:
                    return False
            else:
                task = _Task(job, max(1, deaths := self.store.deaths(job)))
                self._known[job.id] = task
                if deaths:
                    self._failed(task, WORKER, "the run died while it ran this")
                else:
                    self._pending.append(task)
        return False

    def _known_end(self, job: Job) -> bool:
        """Whether an item needs no run, as its result is here or may not have the item's name; it is counted then."""
        try:
            if not self.store.done(job):
                return False
            self.status.skipped += 1
        except CannotKeep as refused:
            self.store.refuse(job, str(refused), 0)
            self.status.failed += 1
        return True

    def _retry_due(self) -> None:
        while self._later and self._later[0].due <= self.clock():
            # Before the others, so that the run does not end with a chain of second attempts.
            self._pending.appendleft(heapq.heappop(self._later).task)

    def _hand_out(self) -> None:
        waits: list[_Task] = []
        while self._pending:
            task = self._pending.popleft()
            slot = self.policy.choose(self._loads(task), self.depth)
            if slot is not None:
                self._queues[slot].append(task)
                continue
            waits.append(task)
            if not task.avoid:
                break
        self._pending.extendleft(reversed(waits))
        for slot, queue in enumerate(self._queues):
            if queue and self._ready[slot] and self._running[slot] is None and not self._held(slot):
                task = queue.popleft()
                self._running[slot], self._begun[slot] = task, self.clock()
                self.status.running[slot] = 0.0
                self.pool.submit(slot, task.job.payload(self.store.staging(task.job, task.attempt), task.attempt))

    def _loads(self, task: _Task) -> list[int | None]:
        """What each worker has to do; None for those that this one cannot go to now."""
        # When there is nobody else, a worker may have found room meanwhile.
        avoid = task.avoid if any(not gone and slot not in task.avoid for slot, gone in enumerate(self._gone)) else ()
        return [
            None
            if self._gone[slot] or not ready or slot in avoid or self._held(slot)
            else len(queue) + (running is not None)
            for slot, (ready, queue, running) in enumerate(zip(self._ready, self._queues, self._running, strict=True))
        ]

    def _held(self, slot: int) -> bool:
        """Whether a worker is given nothing, as another one has its last item; without another it would be for ever."""
        return self._opinions.in_doubt(slot) and self._others(slot)

    def _others(self, slot: int) -> bool:
        """Whether there is a worker besides this one that is not in doubt itself."""
        return any(
            not gone and other != slot and not self._opinions.in_doubt(other) for other, gone in enumerate(self._gone)
        )

    def _handle(self, event: Event) -> None:
        match event:
            case Ready(slot):
                self._ready[slot] = True
                self.status.has_workers(sum(self._ready))
            case Advanced(slot, fraction):
                if slot in self.status.running:
                    self.status.running[slot] = max(self.status.running[slot], fraction)
            case Finished(slot, job_id, result):
                task = self._running[slot]
                if task is not None and task.job.id == job_id:
                    self._free(slot)
                    self._ended(slot, task, result)
            case Died(slot, reason, _, final):
                self._died(slot, reason, final)

    def _end_late(self) -> None:
        """A job that waits for ever would keep its worker for ever, and the run."""
        if self.limit is None:
            return
        for slot, task in enumerate(self._running):
            if task is not None and self.clock() - self._begun[slot] > self.limit:
                self._free(slot)
                self._ready[slot] = False
                self.status.has_workers(sum(self._ready))
                self.pool.renew(slot)
                self.store.discard(self.store.staging(task.job, task.attempt))
                self._failed(task, WORKER, f"it was not done after {self.limit / 60:g} minutes", self.limit)

    def _free(self, slot: int) -> None:
        self._running[slot] = None
        self.status.running.pop(slot, None)

    def _ended(self, slot: int, task: _Task, result: object) -> None:
        assert isinstance(result, dict)
        staging = self.store.staging(task.job, task.attempt)
        if result["status"] == "done":
            texts = [(bool(final), str(text)) for final, text in result["texts"]]
            try:
                self.store.keep(task.job, staging, texts, float(result["seconds"]), task.attempt)
            except CannotKeep as refused:
                self.store.discard(staging)
                self.store.refuse(task.job, str(refused), task.attempt, float(result["seconds"]))
                self.status.failed += 1
                twins, task.twins = task.twins, []
                self._finish(task, done=False)
                if twins:
                    # They have names of their own.
                    heir = self._known[task.job.id] = _Task(twins[0], twins=twins[1:])
                    self._pending.append(heir)
                    self._twins -= 1
                return
            self.status.done += 1
            self._without_room[slot].clear()
            to_blame = self._opinions.done(slot, task.job.id)
            self._finish(task, done=True)
            if to_blame is not None:
                self._replace(to_blame)
            return
        kind, error = str(result["kind"]), str(result["error"])
        if kind == WORKFLOW:
            raise BadMap(error)
        # Asked before anything is removed, which would make room.
        if kind == DISK and self.store.full():
            # The item is not to blame, and the others would fare no better.
            raise DiskFull(error)
        self.store.discard(staging)
        if kind in (MEMORY, WORKER):
            self._ready[slot] = False
            self.pool.renew(slot)
        if kind == WORKER:
            task.avoid.add(slot)
        if kind == ITEM and self._opinions.failed(slot, task.job.id, self._others(slot)):
            log.warning("worker %d: %s: %s; another worker tries it", slot, task.job.item.label, error)
            task.avoid.add(slot)
            self._give_back(slot)
            self._pending.appendleft(task)
            return
        if kind == DISK:
            task.avoid.add(slot)
            self._without_room[slot].add(task.job.id)
        self._failed(task, kind, error, float(result["seconds"]))
        if kind == DISK and len(self._without_room[slot]) >= WITHOUT_ROOM:
            # It would go through all items, as none holds it up for long.
            self._died(slot, error, final=True)

    def _failed(self, task: _Task, kind: str, error: str, seconds: float = 0.0) -> None:
        if self.retry.again(kind, task.attempt):
            wait = self.retry.wait(task.attempt)
            log.warning("%s: %s; attempt %d follows in %.1f s", task.job.item.label, error, task.attempt + 1, wait)
            task.attempt += 1
            self.status.retried += 1
            heapq.heappush(self._later, _Waiting(self.clock() + wait, next(self._numbers), task))
            return
        if task.attempt > 1:
            error = f"{error} (attempt {task.attempt} of {self.retry.retries + 1})"
        self.store.fail(task.job, error, task.attempt, seconds)
        self.status.failed += 1
        self._finish(task, done=False)

    def _finish(self, task: _Task, done: bool) -> None:
        self.status.ended()
        self._opinions.forget(task.job.id)
        del self._known[task.job.id]
        self._twins -= len(task.twins)
        for twin in task.twins:
            if not (done and self._known_end(twin)):
                self.status.failed += 1

    def _died(self, slot: int, reason: str, final: bool) -> None:
        log.warning("worker %d: %s", slot, reason)
        self._ready[slot] = False
        self.status.has_workers(sum(self._ready))
        self._give_back(slot)
        task = self._running[slot]
        if task is not None:
            self._free(slot)
            self.store.discard(self.store.staging(task.job, task.attempt))
        self._gone[slot] |= final
        if all(self._gone):
            # What it ran is not on record as failed: nobody knows, and the next run goes on with it.
            raise NoWorkers(f"There are no workers left. The last one: {reason}")
        if task is not None:
            self._failed(task, WORKER, f"{reason} while it ran this")

    def _give_back(self, slot: int) -> None:
        """What a worker had not begun goes to whoever is free first."""
        self._pending.extendleft(reversed(self._queues[slot]))
        self._queues[slot].clear()

    def _replace(self, slot: int) -> None:
        """A worker failed what another one finished: another takes its place, and when that does the same, none."""
        if self._gone[slot]:
            return
        if self._opinions.replaced_before(slot):
            self._died(slot, "it failed items that other workers finish, as the one before it did", final=True)
            return
        log.warning("worker %d failed items that other workers finish: another takes its place", slot)
        self._ready[slot] = False
        self.pool.renew(slot)
        # It has one when there was nobody without doubts to wait for.
        if (task := self._running[slot]) is not None:
            self._free(slot)
            self.store.discard(self.store.staging(task.job, task.attempt))
            self._failed(task, WORKER, "its worker was replaced")
