"""Where the time of an answer went: processor, transfer, tower, prefill and decode, each on its own clock.

On CUDA a stage is timed by events on the stream that ran it, so nothing waits in order to be measured. Work of the host is timed
by the wall clock, and so are other devices, which are waited for.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from ..host.device_work import wait_for

STAGES = ("processor", "transfer", "tower", "compile", "prefill", "decode")


@dataclass
class Timing:
    """Seconds by stage. `seconds()` waits for the device once, when everything is done."""

    device: torch.device
    _wall: dict[str, float] = field(default_factory=dict)
    _events: list[tuple[str, Any, Any]] = field(default_factory=list)

    @contextmanager
    def stage(self, name: str, on_device: bool = False) -> Iterator[None]:
        """Add the time of the block to stage `name`; on_device: it queues work rather than doing it."""
        if on_device and self.device.type == "cuda":
            event: Any = torch.cuda.Event
            start, end = event(enable_timing=True), event(enable_timing=True)
            start.record(torch.cuda.current_stream(self.device))
            try:
                yield
            finally:
                end.record(torch.cuda.current_stream(self.device))
                self._events.append((name, start, end))
            return
        if on_device:
            wait_for(self.device)
        began = time.perf_counter()
        try:
            yield
            if on_device:
                wait_for(self.device)
        finally:
            self._wall[name] = self._wall.get(name, 0.0) + time.perf_counter() - began

    def seconds(self) -> dict[str, float]:
        """Seconds of each stage that ran, in the order of STAGES."""
        total = dict(self._wall)
        for name, start, end in self._events:
            end.synchronize()
            total[name] = total.get(name, 0.0) + start.elapsed_time(end) / 1000
        return {name: total[name] for name in STAGES if name in total}
