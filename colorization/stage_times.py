"""Time per stage of a job, on CUDA without stopping the device to read the clock."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..host.device_work import wait_for


class StageTimes:
    """Seconds by stage name. On CUDA pairs of events are recorded and read when asked, so nothing waits for them. Elsewhere a
    stage lasts until the device has done it."""

    MOST_PENDING = 4096  # event pairs; older ones have long happened and are summed up then

    def __init__(self, device: torch.device) -> None:
        self._events = device.type == "cuda"
        self._device = device
        self._seconds: dict[str, float] = {}
        self._pending: list[tuple[str, Any, Any]] = []
        self._lock = threading.Lock()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        if self._events:
            event: Any = torch.cuda.Event
            start, stop = event(enable_timing=True), event(enable_timing=True)
            start.record(torch.cuda.current_stream(self._device))
            yield
            stop.record(torch.cuda.current_stream(self._device))
            self._pending.append((name, start, stop))
            if len(self._pending) > self.MOST_PENDING:
                self._settle()
            return
        wait_for(self._device)  # for what is not this stage's
        before = time.perf_counter()
        yield
        wait_for(self._device)
        self._add(name, time.perf_counter() - before)

    @contextmanager
    def beside(self, name: str) -> Iterator[None]:
        """A stage of another thread, by the clock; it overlaps with the others."""
        before = time.perf_counter()
        try:
            yield
        finally:
            self._add(name, time.perf_counter() - before)

    def seconds(self) -> dict[str, float]:
        """Seconds so far by stage, in the order the stages first ran. Waits for the device."""
        self._settle()
        return dict(self._seconds)

    def _add(self, name: str, seconds: float) -> None:
        with self._lock:
            self._seconds[name] = self._seconds.get(name, 0.0) + seconds

    def _settle(self) -> None:
        for name, start, stop in self._pending:
            stop.synchronize()
            self._add(name, start.elapsed_time(stop) / 1000)
        self._pending.clear()
