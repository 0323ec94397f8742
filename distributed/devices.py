"""How many workers, and what each of them computes on."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from .jobs import BadMap

MOST_THREADS = 4  # of torch on the CPU, per worker


@dataclass(frozen=True)
class Devices:
    """gpus: those that were chosen, named as CUDA_VISIBLE_DEVICES names them; empty: the CPU. workers: how many."""

    gpus: tuple[str, ...]
    indices: tuple[int, ...]
    workers: int

    @property
    def device(self) -> str | None:
        """The device of a worker that may see all GPUs, as one in this process does."""
        return f"cuda:{self.indices[0]}" if self.indices else "cpu"

    def per_worker(self) -> list[str | None]:
        """The GPU each worker sees; workers share when there are more of them. Empty hides all."""
        if not self.gpus:
            return [""] * self.workers
        return [self.gpus[worker % len(self.gpus)] for worker in range(self.workers)]


def visible_gpus() -> list[str]:
    """The GPUs this process may use, by the names CUDA_VISIBLE_DEVICES gives them, else by number."""
    count = torch.cuda.device_count()
    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return named[:count] if len(named) >= count else [str(i) for i in range(count)]


def choose_devices(gpus: str = "all", workers: int = 0) -> Devices:
    """gpus: all, none, or numbers by commas. workers: 0 is one per GPU, or one on the CPU. Raises BadMap."""
    if workers < 0:
        raise BadMap("The number of workers must be 0 (one per GPU) or more.")
    there = visible_gpus()
    wanted = gpus.strip().lower()
    if wanted in ("none", "cpu", ""):
        indices: list[int] = []
    elif wanted == "all":
        indices = list(range(len(there)))
    else:
        try:
            indices = list(dict.fromkeys(int(part) for part in wanted.split(",")))
        except ValueError:
            raise BadMap(f"{gpus!r} is no choice of GPUs: write all, none, or numbers such as 0,1.") from None
        missing = [index for index in indices if not 0 <= index < len(there)]
        if missing:
            has = f"this machine has {len(there)}, counted from 0" if there else "this machine has none"
            raise BadMap(f"There is no GPU {missing[0]}: {has}.")
    return Devices(tuple(there[i] for i in indices), tuple(indices), workers or max(1, len(indices)))


def choose_threads(asked: int = 0) -> int:
    """Threads of torch on the CPU for every worker. It does not depend on how many workers there are: how a sum is split
    over threads decides how it is rounded, and results must not depend on the number of workers."""
    return asked if asked > 0 else max(1, min(MOST_THREADS, os.cpu_count() or 1))
