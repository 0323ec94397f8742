"""How a run stands, for a progress line: what is done, what runs, how long the rest takes."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

WINDOW = 64  # finished jobs that the present speed is judged by


@dataclass
class Status:
    """total: items, None while nobody has counted them. workers: ready now; peak: the most that were. running: how much of
    each running job is done, by slot."""

    total: int | None = None
    done: int = 0
    skipped: int = 0
    failed: int = 0
    retried: int = 0
    workers: int = 0
    peak: int = 0
    running: dict[int, float] = field(default_factory=dict)
    clock: Callable[[], float] = time.monotonic
    _ends: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))

    def __post_init__(self) -> None:
        self.started = self.clock()
        self._ends.append(self.started)

    def has_workers(self, ready: int) -> None:
        """How many are ready from now on."""
        self.workers, self.peak = ready, max(self.peak, ready)

    def ended(self) -> None:
        """A job came to an end now."""
        self._ends.append(self.clock())

    @property
    def over(self) -> int:
        """Items that need nothing more in this run."""
        return self.done + self.skipped + self.failed

    @property
    def position(self) -> float:
        """The same with the running ones counted by what is done of them."""
        return self.over + sum(self.running.values())

    def rate(self) -> float:
        """Jobs a second over the last ones; 0 before the first."""
        if len(self._ends) < 2:
            return 0.0
        return (len(self._ends) - 1) / max(self._ends[-1] - self._ends[0], 1e-9)

    def remaining(self) -> float | None:
        """Seconds until the end; None while that cannot be told."""
        rate = self.rate()
        if self.total is None or not rate:
            return None
        return max(0.0, self.total - self.position) / rate

    def line(self) -> str:
        parts = [f"{self.over} of {self.total}" if self.total is not None else f"{self.over}"]
        if self.skipped:
            parts.append(f"{self.skipped} there already")
        parts.append(f"{len(self.running)} running on {self.workers} worker{'' if self.workers == 1 else 's'}")
        if self.failed:
            parts.append(f"{self.failed} failed")
        rate = self.rate()
        if rate:
            parts.append(f"{rate:.1f} a second" if rate >= 1 else f"{rate * 60:.1f} a minute")
        left = self.remaining()
        if left is not None:
            parts.append(f"{clock_time(left)} left")
        return ", ".join(parts)


def clock_time(seconds: float) -> str:
    """1:02 or 3:01:02."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Observer(Protocol):
    """Is told how a run goes on; may raise to stop it."""

    def changed(self, status: Status) -> None: ...


class Unobserved:
    """Tells nobody."""

    def changed(self, status: Status) -> None:
        """Nothing to do."""
