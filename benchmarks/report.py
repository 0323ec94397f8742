"""What every benchmark tells beside its numbers: when, where and how it ran; and the file that results are added to."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import sys
from datetime import date
from pathlib import Path

import torch
from checkout import ROOT


def processor(device: torch.device) -> str:
    """The name of the card, or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def setting(device: torch.device) -> str:
    """The day, and what of the machine numbers depend on."""
    load = f"load average {os.getloadavg()[0]:.1f}, " if hasattr(os, "getloadavg") else ""
    cpu = f"{os.cpu_count()} cores of which torch uses {torch.get_num_threads()}"
    return f"{date.today()}, {processor(device)}, {cpu}, {load}torch {torch.__version__}"


def versions(*packages: str) -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def command() -> str:
    """As it was typed, but for paths, which say where it ran and nothing about what."""
    given = ("DIR" if Path(part).name != part else part for part in sys.argv[1:])
    return shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *given])


def add_to_results(text: str) -> None:
    """A section of its own at the end of RESULTS.md."""
    path = ROOT / "benchmarks" / "RESULTS.md"
    path.write_text(f"{path.read_text('utf-8').rstrip()}\n\n{text.strip()}\n", "utf-8")
