"""What a run is measured by, moments and spans between them, and the table of numbers that they resolve to."""

from __future__ import annotations

import functools
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from ..host.device_work import wait_for

# Stages, as tables and charts name them.
ENCODE, DECODE, ENCODE_IMAGE = "text encode", "decode", "image encode"
PREPARE, STEP, FINISH = "before the first step", "step", "after the last step"


@dataclass
class Moment:
    """A point in time: on the host, and in the GPU's queue. behind: the GPU had older work of this sampling to do."""

    host: float
    event: Any = None
    device: str = "CPU"
    behind: bool = False

    @classmethod
    def now(cls, device: torch.device | None) -> Moment:
        if device is None or device.type == "cpu":
            return cls(time.perf_counter())
        if device.type != "cuda":
            wait_for(device)
            return cls(time.perf_counter(), device=device.type.upper())
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(device))
        return cls(time.perf_counter(), event, "CUDA")


@dataclass
class Span:
    """From `start` to `end`, something of `stage`.

    model: the part of it inside the model, as (start, end) pairs. spared: how many of those a step cache answered.
    """

    stage: str
    start: Moment
    end: Moment
    graphs: int = 0  # compiled meanwhile
    model: list[tuple[Moment, Moment]] = field(default_factory=list)
    spared: int = 0


@dataclass(frozen=True)
class Row:
    """One line of the table. seconds: what it took; host_seconds: what Python needed for it, where a GPU ran beside.

    start: seconds after the run began. model_seconds: of `seconds`, inside the model. model_host_seconds: of `host_seconds`.
    behind: in one of its calls the GPU still had older work to do. spared: of `calls`, those that a step cache answered.
    """

    stage: str
    start: float
    seconds: float
    host_seconds: float | None
    model_seconds: float
    calls: int
    graphs: int
    model_host_seconds: float | None = None
    behind: bool = False
    spared: int = 0

    @property
    def skipped(self) -> bool:
        """Whether a step cache answered instead of the model."""
        return self.spared >= self.calls

    @property
    def waits_for_python(self) -> bool:
        if self.host_seconds is None or not self.model_host_seconds or self.behind or self.skipped:
            return False
        return self.host_seconds > 0.95 * self.seconds and self.model_host_seconds > 0.95 * self.model_seconds


@dataclass(frozen=True)
class Profile:
    """A run, resolved to numbers."""

    rows: tuple[Row, ...]
    total: float
    device: str
    notes: tuple[str, ...]
    overhead: float

    @property
    def steps(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.stage == STEP)

    @property
    def samplings(self) -> tuple[tuple[Row, ...], ...]:
        """The steps of each sampling that got to one."""
        found: list[list[Row]] = []
        for row in self.rows:
            if row.stage == PREPARE or not found:
                found.append([])
            if row.stage == STEP:
                found[-1].append(row)
        return tuple(tuple(steps) for steps in found if steps)

    @property
    def gap(self) -> float:
        """Seconds in none of the stages: other nodes, loading, saving."""
        return max(0.0, self.total - sum(row.seconds for row in self.rows))

    def as_dict(self) -> dict[str, Any]:
        return {
            "device": self.device,
            "total_seconds": self.total,
            "gap_seconds": self.gap,
            "overhead_seconds": self.overhead,
            "stages": [asdict(row) for row in self.rows],
            "notes": list(self.notes),
        }


def resolve(spans: list[Span], notes: tuple[str, ...] = ()) -> Profile:
    """Spans as rows in order, times of the GPU where there is one."""
    events = [span.end.event for span in spans if span.end.event is not None]
    for event in events:  # stages may have run on several devices; what is over costs nothing
        event.synchronize()
    spans = sorted(spans, key=lambda span: span.start.host)
    if not spans:
        return Profile((), 0.0, "", notes, 0.0)
    origin = spans[0].start
    rows = []
    for span in spans:
        seconds = _between(span.start, span.end)
        on_gpu = span.start.event is not None
        rows.append(
            Row(
                span.stage,
                span.start.host - origin.host,
                seconds,
                span.end.host - span.start.host if on_gpu else None,
                sum(_between(*part) for part in span.model),
                max(1, len(span.model)),
                span.graphs,
                sum(end.host - start.host for start, end in span.model) if on_gpu else None,
                any(start.behind for start, _ in span.model),
                span.spared,
            )
        )
    moments = sum(2 + 2 * len(span.model) for span in spans)
    last = max(row.start + max(row.seconds, row.host_seconds or 0.0) for row in rows)
    device = "CUDA" if events else next((s.start.device for s in spans if s.start.device != "CPU"), "CPU")
    return Profile(tuple(rows), last, device, notes, moments * cost_of_a_moment(bool(events)))


def _between(start: Moment, end: Moment) -> float:
    if start.event is not None and end.event is not None:
        return float(start.event.elapsed_time(end.event)) / 1000
    return end.host - start.host


@functools.cache
def cost_of_a_moment(cuda: bool) -> float:
    """Seconds that noting one moment takes on this machine, measured."""
    device = torch.device("cuda") if cuda else None
    Moment.now(device)
    start = time.perf_counter()
    for _ in range(200):
        Moment.now(device)
    return (time.perf_counter() - start) / 200
