"""What a colour job says about itself: frames, speed, time per stage, which engine ran and why, memory."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence

import torch

from ..host.fresh_memory import ProcessorTime
from .stage_times import StageTimes


class JobReport:
    """Collects while a job runs; `text` is what the node shows."""

    def __init__(self, title: str, device: torch.device) -> None:
        self.title = title
        self.device = device
        self.frames = 0
        self.facts: list[tuple[str, str]] = []
        self.notes: list[str] = []
        self._start = time.perf_counter()
        self._memory = PeakMemory(device)
        self._processor = ProcessorTime(device)

    def fact(self, name: str, value: str) -> None:
        self.facts.append((name, value))

    def note(self, text: str) -> None:
        """A sentence the user should read; the same one is kept once."""
        if text not in self.notes:
            self.notes.append(text)

    def text(
        self, times: StageTimes | None = None, engines: Mapping[str, str] | None = None, more: Sequence[str] = ()
    ) -> str:
        seconds = max(time.perf_counter() - self._start, 1e-9)
        lines = [self.title, f"frames: {self.frames} in {seconds:.2f} s ({self.frames / seconds:.2f} fps)"]
        lines += [f"{name}: {value}" for name, value in self.facts]
        lines += [f"{name}: {value}" for name, value in (engines or {}).items()]
        if times is not None:
            lines += [f"time in {name}: {spent:.2f} s" for name, spent in times.seconds().items()]
        lines.append(self._memory.text())
        notes = dict.fromkeys([*self.notes, *more, self._processor.advice()])
        lines += [f"note: {text}" for text in notes if text]
        return "\n".join(lines)


class PeakMemory:
    """Device memory a job adds at its peak; on the CPU the process's peak, which torch does not count by itself."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def text(self) -> str:
        if self._device.type == "cuda":
            allocated = torch.cuda.max_memory_allocated(self._device) / 2**20
            reserved = torch.cuda.max_memory_reserved(self._device) / 2**20
            return f"peak memory: {allocated:.0f} MiB allocated, {reserved:.0f} MiB reserved on {self._device}"
        try:
            import resource
        except ImportError:  # not on Windows
            return f"peak memory: not counted on {self._device.type} here"
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        # macOS counts bytes, Linux kilobytes.
        scale = 2**20 if sys.platform == "darwin" else 2**10
        return f"peak memory: {peak / scale:.0f} MiB, the whole process on {self._device.type}"
