"""Which errors can pass, and how long to wait before the next attempt.

A picture that cannot be read fails the same way every time; a worker that died, memory that ran out, a connection that
broke may go better. Waits double, with jitter from a private generator (Brooker, "Exponential Backoff And Jitter").
"""

from __future__ import annotations

import errno
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from ..host.errors import is_full, is_out_of_memory
from ..host.system_errors import FULL

MEMORY, CONNECTION, WORKER, ITEM, DISK = "memory", "connection", "worker", "item", "disk"
WORKFLOW = "workflow"  # no item of it can run
PASSING = frozenset({MEMORY, CONNECTION, WORKER, DISK})  # a disk of the worker, as others have their own
PASSING_ERRNOS = frozenset(
    getattr(errno, name)
    for name in (
        "EAGAIN", "EBUSY", "EHOSTDOWN", "EHOSTUNREACH", "EMFILE", "ENETDOWN", "ENETRESET", "ENETUNREACH", "ENFILE",
        "ENOBUFS", "ESTALE", "ETIMEDOUT",
    )
    if hasattr(errno, name)
)  # fmt: skip
HELD = (32, 33)  # Windows' numbers for a file that another program, such as a virus scanner, has open for a moment
# After these a process computes nothing more on that GPU; of others `worker.answers` finds it out.
BROKEN = re.compile(
    "(CUDA|HIP) error: .*(an illegal memory access|device-side assert|unspecified launch failure|misaligned address"
    "|an illegal instruction|uncorrectable ECC error)"
)


def failure_kind(error: BaseException) -> str:
    """memory, connection, disk for one without room, worker for one whose GPU is broken for it, or item for what will not
    pass. Looks at causes too: a node's error wraps the first one."""
    for cause in _chain(error):
        if is_out_of_memory(cause):
            return MEMORY
        if isinstance(cause, RuntimeError) and BROKEN.match(str(cause)):
            return WORKER
        if is_full(cause):
            return DISK
        if isinstance(cause, ConnectionError | TimeoutError):
            return CONNECTION
        if isinstance(cause, OSError) and (cause.errno in PASSING_ERRNOS or getattr(cause, "winerror", None) in HELD):
            return CONNECTION
    return ITEM


def told_kind(kind: str, reason: str) -> str:
    """The same of an error that another process tells of, by the name of its Python type and what it said."""
    said = RuntimeError(reason)
    if kind.rpartition(".")[2] in ("MemoryError", "OutOfMemoryError") or is_out_of_memory(said):
        return MEMORY
    if BROKEN.search(reason):
        return WORKER
    if any(f"[Errno {number}]" in reason for number in FULL) or is_full(said):
        return DISK
    if any(f"[WinError {number}]" in reason for number in HELD):
        return CONNECTION
    return ITEM


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)


@dataclass
class RetryPlan:
    """retries: further attempts after the first. base, longest: seconds of the first and of any wait."""

    retries: int = 2
    base: float = 1.0
    longest: float = 60.0
    rng: random.Random = field(default_factory=random.Random)

    def again(self, kind: str, attempt: int) -> bool:
        """Whether a job that failed its attempt number `attempt` (from 1) is tried again."""
        return kind in PASSING and attempt <= self.retries

    def wait(self, attempt: int) -> float:
        """Seconds before the attempt after number `attempt`: half of it fixed, half by lot."""
        whole = min(self.longest, self.base * 2.0 ** (attempt - 1))
        return whole * (0.5 + 0.5 * self.rng.random())
