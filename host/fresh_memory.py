"""What it costs on Linux that memory of large tensors goes back to the system, and what is done about it.

A tensor of megabytes comes fresh from the system, which maps and clears it page by page at its first use: with networks on a
CPU that can take a third of the time. An allocator that keeps memory for the next tensor ends it, but must be named before a
process starts. Processes of our own ask for pages of 2 MiB instead, five hundred times as few; torch reads
`THP_MEM_ALLOC_ENABLE` once, at its first tensor.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # it must not be loaded before `ask`
    import torch

NAME = "THP_MEM_ALLOC_ENABLE"
STATE = Path("/sys/kernel/mm/transparent_hugepage/enabled")
ALLOCATOR = "libtcmalloc_minimal.so.4"
PACKAGES = "package libtcmalloc-minimal4 on Debian and Ubuntu, gperftools-libs on Fedora"
NOTABLE = 0.1  # share of the processor's time that the system takes
LEAST_SECONDS = 5.0  # of that time, for a share to mean something


def possible() -> bool:
    """Whether this system gives huge pages to who asks."""
    try:
        return sys.platform == "linux" and "[never]" not in STATE.read_text(encoding="ascii")
    except OSError:
        return False


def ask() -> None:
    """Ask for huge pages, for this process, which must not have a tensor yet, and for those that it starts."""
    os.environ.update(environment())


def environment() -> dict[str, str]:
    """What is added to the environment of a process; what stands there already stays."""
    return {} if NAME in os.environ or not possible() else {NAME: "1"}


def advice(user: float, system: float) -> str:
    """What to do about processor seconds of which the system took `system`; "" where that is little or nothing helps."""
    share = system / max(1e-9, user + system)
    kept = "malloc" in os.environ.get("LD_PRELOAD", "")
    if user + system < LEAST_SECONDS or share < NOTABLE or kept or sys.platform != "linux":
        return ""
    return (
        f"{100 * share:.0f} % of the processor's time went to the system, which fetches memory for every large tensor anew: "
        f"start the program with LD_PRELOAD={ALLOCATOR} in the environment, which keeps it ({PACKAGES})"
    )


class ProcessorTime:
    """What this process's work on `device` spends from now on; of other devices than a CPU it says nothing, nor of work that
    torch compiled meanwhile: that starts programs, which are the system's work too."""

    def __init__(self, device: torch.device) -> None:
        self._start = os.times() if device.type == "cpu" else None
        self._graphs = _graphs()

    def spent(self) -> tuple[float, float]:
        """Seconds of the program, and of the system for it."""
        if self._start is None or self._graphs != _graphs():
            return 0.0, 0.0
        now = os.times()
        return now.user - self._start.user, now.system - self._start.system

    def advice(self) -> str:
        return advice(*self.spent())


def _graphs() -> int:
    """How many torch compiled in this process."""
    utils = sys.modules.get("torch._dynamo.utils")
    return 0 if utils is None else int(utils.counters["stats"].get("unique_graphs", 0))
