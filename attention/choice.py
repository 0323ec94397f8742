"""Which exact kernel is fastest for a size on this machine: measured once, kept in memory and in a file.

A file belongs to one device name and one set of versions, since either changes the answer. Sizes are put in classes an
eighth of an octave wide, so that a prompt one token longer is not measured anew.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import math
import os
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from .capabilities import AttentionCall, DeviceFacts

log = logging.getLogger("hotpath.attention")

FORMAT = 1
LARGEST = 512  # choices kept per device, the least recently measured go first
REPEATS = 3
WRITING = ".writing-"  # begins the name of what is not whole yet
ABANDONED = 3600.0  # seconds after which nobody writes to it any more
MARGIN = 0.97  # a kernel further down the list must win by 3 %, or noise would decide


@dataclass(frozen=True)
class Choice:
    """backend: the fastest. milliseconds: of each that was tried."""

    backend: str
    milliseconds: Mapping[str, float]

    def describe(self) -> str:
        others = ", ".join(f"{name} {ms:.3f}" for name, ms in self.milliseconds.items() if name != self.backend)
        return f"fastest of {len(self.milliseconds)}: {self.milliseconds[self.backend]:.3f} ms" + (
            f" ({others})" if others else ""
        )


def size_class(length: int) -> int:
    """`length` rounded up to 4 significant bits; exact up to 16."""
    step = 1 << max(0, length.bit_length() - 4)
    return -(-length // step) * step


def class_of(call: AttentionCall) -> str:
    """What a choice is kept under. Whether lengths are multiples of 8 is part of it: kernels differ there."""
    aligned = "aligned" if call.queries % 8 == 0 and call.keys % 8 == 0 else "unaligned"
    return " ".join(
        str(part).removeprefix("torch.")
        for part in (
            call.dtype, call.batch, call.heads, call.key_heads, size_class(call.queries), size_class(call.keys),
            call.width, call.value_width, call.mask.replace(" ", "-"), aligned, *(["gradient"] if call.gradient else ()),
        )
    )  # fmt: skip


class MeasuredChoices:
    """Choices by device and class of call. Safe to use from several threads, and from several processes on one folder.

    folder: where the files lie; None keeps everything in memory. versions: of all that could change the answer.
    """

    def __init__(self, folder: Path | None = None, versions: Mapping[str, str] | None = None) -> None:
        self.folder = folder
        self.versions = dict(versions or {})
        self._known: dict[str, dict[str, Choice]] = {}
        self._lock = threading.Lock()

    def get(self, call: AttentionCall, device: DeviceFacts) -> Choice | None:
        with self._lock:
            return self._of(device).get(class_of(call))

    def largest(self, call: AttentionCall, device: DeviceFacts) -> Choice | None:
        """The choice for the largest product of lengths among calls of the same dtype, width and mask, whatever the sizes.

        For code that is being compiled for sizes it does not know yet.
        """
        best: tuple[int, Choice] | None = None
        same = class_of(call).split()
        with self._lock:
            for key, choice in self._of(device).items():
                parts = key.split()
                if len(parts) != len(same) or (parts[0], parts[6:9]) != (same[0], same[6:9]):
                    continue
                size = int(parts[4]) * int(parts[5])
                if best is None or size > best[0]:
                    best = size, choice
        return best[1] if best is not None else None

    def put(self, call: AttentionCall, device: DeviceFacts, choice: Choice) -> None:
        """Remember `choice`, also on disk; a disk that refuses is logged, and the choice still holds here."""
        with self._lock:
            known = self._of(device)
            known.pop(class_of(call), None)
            known[class_of(call)] = choice
            while len(known) > LARGEST:
                del known[next(iter(known))]
            if self.folder is not None:
                self._write(device, known)

    def forget(self) -> None:
        """Drop what is in memory; files are read again."""
        with self._lock:
            self._known.clear()

    def file(self, device: DeviceFacts) -> Path | None:
        if self.folder is None:
            return None
        identity = json.dumps([FORMAT, device.name, device.capability, sorted(self.versions.items())])
        slug = "".join(c if c.isalnum() else "-" for c in device.name.lower())[:48].strip("-") or device.type
        return self.folder / f"{slug}-{hashlib.md5(identity.encode(), usedforsecurity=False).hexdigest()[:12]}.json"

    def _of(self, device: DeviceFacts) -> dict[str, Choice]:
        identity = f"{device.name} {device.capability}"
        if identity not in self._known:
            self._known[identity] = self._read(self.file(device))
        return self._known[identity]

    def _read(self, path: Path | None) -> dict[str, Choice]:
        if path is None:
            return {}
        try:
            entries = json.loads(path.read_text(encoding="utf-8"))["choices"]
            return {key: _choice_of(entry) for key, entry in entries.items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            log.warning("attention: %s is measured anew, because its file is unreadable: %s", path.name, error)
            return {}

    def _write(self, device: DeviceFacts, known: dict[str, Choice]) -> None:
        path = self.file(device)
        assert path is not None
        # Another process may have measured other sizes meanwhile; what we measured ourselves is newer.
        merged = {**self._read(path), **known}
        kept = dict(list(merged.items())[-LARGEST:])
        payload = {
            "format": FORMAT,
            "device": device.name,
            "versions": self.versions,
            "choices": {key: {"backend": c.backend, "milliseconds": dict(c.milliseconds)} for key, c in kept.items()},
        }
        temporary: str | None = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            for left in path.parent.glob(f"{WRITING}*"):
                if time.time() - left.stat().st_mtime > ABANDONED:  # by who was killed
                    left.unlink(missing_ok=True)
            handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=WRITING)
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(payload, file, indent=1)
            Path(temporary).replace(path)
        except OSError as error:
            log.warning("attention: %s was not written, because %s", path.name, error)
            if temporary is not None:
                Path(temporary).unlink(missing_ok=True)


def _choice_of(entry: object) -> Choice:
    if not isinstance(entry, dict):
        raise TypeError("a choice must be an object")
    milliseconds = {str(name): float(ms) for name, ms in entry["milliseconds"].items()}
    if entry["backend"] not in milliseconds or not all(math.isfinite(ms) for ms in milliseconds.values()):
        raise ValueError("a choice must have been measured")
    return Choice(str(entry["backend"]), milliseconds)


def milliseconds(run: Callable[[], object], device: torch.device) -> float:
    """Of the fastest of a few runs, after one that is not counted (it may compile)."""
    run()
    if device.type != "cuda":
        spans = []
        for _ in range(REPEATS):
            start = time.perf_counter()
            run()
            spans.append(1000 * (time.perf_counter() - start))
        return min(spans)
    run()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(REPEATS + 1)]
    with torch.cuda.device(device):
        events[0].record()
        for event in events[1:]:
            run()
            event.record()
        events[-1].synchronize()
    return float(min(a.elapsed_time(b) for a, b in itertools.pairwise(events)))


def fastest(times: Mapping[str, float]) -> Choice:
    """The first in order that nothing later beats by the margin."""
    names = list(times)
    best = names[0]
    for name in names[1:]:
        if times[name] < MARGIN * times[best]:
            best = name
    return Choice(best, dict(times))
