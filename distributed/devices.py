"""How many workers, and what each of them computes on."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from ..host.headless import best_device
from .jobs import BadMap

MOST_THREADS = 4  # of torch on the CPU, per worker
# Which GPUs a process may see. On AMD, where both are read, this one has the last word.
VISIBLE = "CUDA_VISIBLE_DEVICES" if torch.version.hip is None else "HIP_VISIBLE_DEVICES"


@dataclass(frozen=True)
class Devices:
    """gpus: those that were chosen, named as the variable VISIBLE names them; empty: none of those. workers: how many.

    other: the accelerator of another kind that all workers share, such as mps.
    """

    gpus: tuple[str, ...]
    indices: tuple[int, ...]
    workers: int
    other: str | None = None

    @property
    def device(self) -> str:
        """The device of a worker that may see all GPUs, as one in this process does."""
        return f"cuda:{self.indices[0]}" if self.indices else self.other or "cpu"

    @property
    def device_apart(self) -> str | None:
        """The device of a worker that sees its own GPU alone; None: that one."""
        return None if self.gpus else self.device

    def per_worker(self) -> list[str | None]:
        """The GPU each worker sees; workers share when there are more of them. Empty hides all."""
        if not self.gpus:
            return [""] * self.workers
        return [self.gpus[worker % len(self.gpus)] for worker in range(self.workers)]


def visible_gpus() -> list[str]:
    """The GPUs this process may use, by the names VISIBLE gives them, else by number."""
    count = torch.cuda.device_count()
    given = os.environ.get(VISIBLE) or os.environ.get("CUDA_VISIBLE_DEVICES", "")
    named = [name.strip() for name in given.split(",") if name.strip()]
    return named[:count] if len(named) >= count else [str(i) for i in range(count)]


def choose_devices(gpus: str = "all", workers: int = 0) -> Devices:
    """gpus: all, none, or numbers by commas. workers: 0 is one per GPU; where there is none, one on the accelerator of
    another kind, else on the CPU. Raises BadMap."""
    if workers < 0:
        raise BadMap("The number of workers must be 0 (one per GPU) or more.")
    there = visible_gpus()
    wanted = gpus.strip().lower()
    other = None
    if wanted in ("none", "cpu", ""):
        indices: list[int] = []
    elif wanted == "all":
        indices = list(range(len(there)))
        best = best_device().type
        other = best if best not in ("cuda", "cpu") else None
    else:
        try:
            indices = list(dict.fromkeys(int(part) for part in wanted.split(",")))
        except ValueError:
            raise BadMap(f"{gpus!r} is no choice of GPUs: write all, none, or numbers such as 0,1.") from None
        missing = [index for index in indices if not 0 <= index < len(there)]
        if missing:
            has = f"this machine has {len(there)}, counted from 0" if there else "this machine has none"
            raise BadMap(f"There is no GPU {missing[0]}: {has}.")
    return Devices(tuple(there[i] for i in indices), tuple(indices), workers or max(1, len(indices)), other)


def choose_threads(asked: int = 0) -> int:
    """Threads of torch on the CPU for every worker. It does not depend on how many workers there are: how a sum is split
    over threads decides how it is rounded, and results must not depend on the number of workers."""
    return asked if asked > 0 else max(1, min(MOST_THREADS, os.cpu_count() or 1))
