"""The real scheduler on workers that only exist in time: what more GPUs, another policy, stragglers or deaths would do.

An event queue and a clock that jumps. Nothing computes, so hours of sixty-four GPUs take seconds; what comes out is an
estimate from the job times that are put in, and no measurement.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .items import Item
from .jobs import Job
from .policy import make_policy
from .pool import Died, Event, Finished, Ready
from .retry import RetryPlan
from .scheduler import DEPTH, NoWorkers, Scheduler
from .status import Status

NOWHERE = Path("nowhere")


@dataclass(frozen=True)
class Cluster:
    """workers: how many. start: seconds until one is ready. serial: seconds that the run itself needs per job, during
    which it does nothing else. speeds: of each worker, 1.0 where none is given. deaths: a worker's chance per second to
    die. straggler: (chance, factor) that a job takes `factor` as long."""

    workers: int
    start: float = 0.0
    serial: float = 0.0
    speeds: Sequence[float] = ()
    deaths: float = 0.0
    straggler: tuple[float, float] = (0.0, 1.0)


@dataclass
class SimulatedPool:
    """Workers in simulated time; `now` is its clock."""

    cluster: Cluster
    durations: Callable[[str], float]
    rng: random.Random
    time: float = 0.0
    died: int = 0
    name: str = "simulated workers"
    _events: list[tuple[float, int, int, Event]] = field(default_factory=list)
    _generation: list[int] = field(default_factory=list)
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    def __post_init__(self) -> None:
        self.slots = self.cluster.workers
        self._generation = [0] * self.slots

    def now(self) -> float:
        return self.time

    def start(self) -> None:
        for slot in range(self.slots):
            self._after(self.cluster.start, slot, Ready(slot))

    def _after(self, seconds: float, slot: int, event: Event) -> None:
        heapq.heappush(self._events, (self.time + seconds, next(self._numbers), self._generation[slot], event))

    def submit(self, slot: int, payload: Mapping[str, Any]) -> None:
        self.time += self.cluster.serial
        seconds = self.durations(payload["id"]) / (self.cluster.speeds[slot] if self.cluster.speeds else 1.0)
        chance, factor = self.cluster.straggler
        if self.rng.random() < chance:
            seconds *= factor
        dies = self.rng.expovariate(self.cluster.deaths) if self.cluster.deaths else float("inf")
        if dies < seconds:
            self._after(dies, slot, Died(slot, "it died", payload["id"]))
        else:
            result = {"status": "done", "texts": [], "seconds": seconds}
            self._after(seconds, slot, Finished(slot, payload["id"], result))

    def wait(self, timeout: float) -> list[Event]:
        end = self.time + timeout
        while self._events:
            due, _, generation, event = self._events[0]
            if due > end and len(self._events) < self.slots:
                break  # somebody idles and may be given work before
            heapq.heappop(self._events)
            if generation != self._generation[event.slot]:
                continue
            self.time = max(self.time, due)
            if isinstance(event, Died):
                self.died += 1
                self._after(self.cluster.start, event.slot, Ready(event.slot))
            return [event]
        self.time = max(self.time, end)
        return []

    def renew(self, slot: int) -> None:
        self._generation[slot] += 1
        self._after(self.cluster.start, slot, Ready(slot))

    def close(self) -> None:
        self._events.clear()


@dataclass
class CountingStore:
    """Keeps numbers and no results."""

    kept: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)

    def done(self, job: Job) -> bool:
        return False

    def staging(self, job: Job, attempt: int) -> Path:
        return NOWHERE

    def full(self) -> bool:
        return False

    def deaths(self, job: Job) -> int:
        return 0

    def discard(self, staging: Path) -> None:
        """There is nothing."""

    def keep(self, job: Job, staging: Path, texts: list[tuple[bool, str]], seconds: float, attempts: int) -> None:
        self.kept.append(job.id)

    def fail(self, job: Job, error: str, attempts: int, seconds: float = 0.0) -> None:
        self.failed[job.id] = error

    def refuse(self, job: Job, error: str, attempts: int, seconds: float = 0.0) -> None:
        self.fail(job, error, attempts, seconds)


@dataclass(frozen=True)
class Outcome:
    """seconds: simulated, from the first start to the last result."""

    seconds: float
    done: int
    failed: int
    died: int


def simulate(cluster: Cluster, durations: Sequence[float], policy: str, seed: int = 0) -> Outcome:
    """Run jobs of these seconds, in order."""
    rng = random.Random(seed)
    pool = SimulatedPool(cluster, lambda job_id: durations[int(job_id)], rng)
    store = CountingStore()
    plan = RetryPlan(rng=random.Random(seed + 1))
    chooser = make_policy(policy, random.Random(seed + 2))
    status = Status(len(durations), clock=pool.now)
    scheduler = Scheduler(pool, store, chooser, plan, status, depth=DEPTH, clock=pool.now)
    jobs = (Job(str(i), Item(str(i), str(i)), {}) for i in range(len(durations)))
    with contextlib.suppress(NoWorkers):
        scheduler.run(jobs)
    return Outcome(pool.time, len(store.kept), len(store.failed), pool.died)
