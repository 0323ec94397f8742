"""Which worker gets the next job. A policy sees only how many jobs each worker has."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Protocol

POLICIES = ("least_busy", "round_robin", "random")


class Policy(Protocol):
    """loads: jobs that each worker has, None for one that is not there. depth: how many it may have."""

    def choose(self, loads: Sequence[int | None], depth: int) -> int | None:
        """Number of the worker for the next job; None: it waits."""


class LeastBusy:
    """A job goes to a worker only when one is free, so nothing ever waits behind a long job."""

    def choose(self, loads: Sequence[int | None], depth: int) -> int | None:
        return next((worker for worker, load in enumerate(loads) if load == 0), None)


class RoundRobin:
    """Every worker in turn, however long its last job takes."""

    def __init__(self) -> None:
        self._next = 0

    def choose(self, loads: Sequence[int | None], depth: int) -> int | None:
        for step in range(len(loads)):
            worker = (self._next + step) % len(loads)
            load = loads[worker]
            if load is None:
                continue
            if load >= depth:
                return None
            self._next = worker + 1
            return worker
        return None


class Random:
    """A worker by lot; a job that drew a full one waits for it."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._drawn: int | None = None

    def choose(self, loads: Sequence[int | None], depth: int) -> int | None:
        there = [worker for worker, load in enumerate(loads) if load is not None]
        if not there:
            return None
        if self._drawn is None or self._drawn not in there:
            self._drawn = self._rng.choice(there)
        worker = self._drawn
        if (loads[worker] or 0) >= depth:
            return None
        self._drawn = None
        return worker


def make_policy(name: str, rng: random.Random | None = None) -> Policy:
    """Raises ValueError for a name that is none."""
    match name:
        case "least_busy":
            return LeastBusy()
        case "round_robin":
            return RoundRobin()
        case "random":
            return Random(rng or random.Random())
    raise ValueError(f"There is no policy {name!r}; choose one of {', '.join(POLICIES)}.")
