"""Tensors on disk by content key: safetensors files in a folder with a byte limit, the least recently used go first.

The second tier of a cache that must outlive the process. Files appear whole or not at all, every read checks that the
file holds exactly the entry that was asked for, and what fails the check is deleted and reported as a miss. What the disk
refuses, or memory does not hold, is a miss and no more: whoever asks can go on without.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from .bounded import CacheStatistics
from .keys import content_key

log = logging.getLogger("hotpath.cache")

SUFFIX = ".safetensors"
FORMAT = "1"
WRITING = ".writing-"  # begins the name of what is not whole yet
ABANDONED = 3600.0  # seconds after which nobody writes to it any more
AHEAD = 3600.0  # seconds that the clock of a file server may be ahead of ours


@dataclass(frozen=True)
class DiskEntry:
    """What one file holds: named tensors on the CPU, and the small facts that were stored with them."""

    tensors: dict[str, torch.Tensor]
    facts: dict[str, str]


class DiskCache:
    """A folder of tensors by key.

    description: the whole content that a key was made of, in words. It is stored and compared on every read, so that
    two contents whose keys are equal by accident, or by intent, never answer for each other.
    Safe to use from several threads and from several processes on one folder.
    """

    def __init__(self, folder: Path, limit: int, name: str = "") -> None:
        self.folder = folder
        self.limit = limit
        self.name = name or folder.name
        self._lock = threading.Lock()
        self.hits = self.misses = self.trimmed = 0

    def _path(self, key: str) -> Path:
        if not key or not all(c.isalnum() or c in "-_" for c in key):
            raise ValueError(f"{key!r} is no cache key: it must be made of letters, digits, - and _.")
        return self.folder / f"{key}{SUFFIX}"

    def get(self, key: str, description: str = "") -> DiskEntry | None:
        """The entry, now the most recently used; None when it is missing, damaged or about something else."""
        path = self._path(key)
        entry = _read(path, key, description)
        if entry is None:
            self.misses += 1
            return None
        self.hits += 1
        try:
            os.utime(path)
        except OSError:
            log.debug("cache: the time of %s could not be set", path.name)
        return entry

    def put(
        self,
        key: str,
        tensors: Mapping[str, torch.Tensor],
        facts: Mapping[str, str] | None = None,
        description: str = "",
    ) -> bool:
        """Write an entry; False when it alone is over the limit or the disk refuses (which is logged, not raised)."""
        from safetensors.torch import save

        path = self._path(key)
        if sum(t.nbytes for t in tensors.values()) > self.limit:
            return False
        temporary: Path | None = None
        try:
            whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
            stored = {
                "format": FORMAT,
                "key": key,
                "description": description,
                "checksum": content_key(whole),
                "facts": json.dumps(dict(facts or {})),
            }
            payload = save(whole, metadata=stored)
            self.folder.mkdir(parents=True, exist_ok=True)
            handle, begun = tempfile.mkstemp(dir=self.folder, prefix=WRITING)
            temporary = Path(begun)
            with os.fdopen(handle, "wb") as file:
                file.write(payload)
            temporary.replace(path)
        except (OSError, MemoryError) as error:
            log.warning("cache: %s was not written, because of %s: %s", path.name, type(error).__name__, error)
            if temporary is not None:
                _remove(temporary)
            return False
        self.trim()
        try:
            return path.is_file()
        except OSError:  # a share that went away
            return False

    def entries(self) -> list[Path]:
        """The files, least recently used first."""
        return [path for path, _ in self._files()]

    def _files(self) -> list[tuple[Path, int]]:
        """The files with their bytes, least recently used first."""
        found: list[tuple[float, Path, int]] = []
        latest = time.time() + AHEAD
        for path in self._named(f"*{SUFFIX}"):
            try:
                facts = path.stat()
            except OSError:  # another process trimmed it
                continue
            # By a time from before the clock was set back, a file would outlive all that is written from now on.
            used = facts.st_mtime if facts.st_mtime <= latest else 0.0
            found.append((used, path, facts.st_size))
        return [(path, size) for _, path, size in sorted(found)]

    def _named(self, pattern: str) -> list[Path]:
        try:
            return list(self.folder.glob(pattern))
        except OSError as error:  # a share that is away
            log.debug("cache: %s was not looked into, because %s", self.folder, error)
            return []

    def nbytes(self) -> int:
        return sum(size for _, size in self._files())

    def __len__(self) -> int:
        return len(self._files())

    def statistics(self) -> CacheStatistics:
        files = self._files()
        return CacheStatistics(
            self.name, len(files), sum(size for _, size in files), self.limit, self.hits, self.misses, self.trimmed
        )

    def trim(self) -> int:
        """Delete the least recently used files until the folder is within its limit; returns how many went."""
        with self._lock:
            self._sweep()
            files = self._files()
            total, gone = sum(size for _, size in files), 0
            for path, size in files:
                if total <= self.limit:
                    break
                if _remove(path):
                    total -= size
                    gone += 1
            self.trimmed += gone
            return gone

    def _sweep(self) -> None:
        """Remove what a process that was killed had begun to write."""
        for path in self._named(f"{WRITING}*"):
            try:
                old = abs(time.time() - path.stat().st_mtime) > ABANDONED
            except OSError:  # it was finished meanwhile
                continue
            if old:
                _remove(path)

    def clear(self) -> int:
        """Delete every entry; returns how many went."""
        gone = sum(_remove(path) for path in self.entries())
        self.hits = self.misses = self.trimmed = 0
        return gone


def _read(path: Path, key: str, description: str) -> DiskEntry | None:
    """What the file holds, if it is the entry of `key` and `description`; one that is damaged, or of another key, is deleted."""
    from safetensors.torch import load

    try:
        # Read once: safe_open opens the file by name a second time for its tensors, and a writer may have put another entry in
        # its place by then.
        data = path.read_bytes()
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        stored = dict(header.get("__metadata__") or {})
        tensors = load(data)
    except FileNotFoundError:
        return None
    except (OSError, MemoryError) as error:  # locked by another program, a share that is away: it may be whole
        log.warning("cache: %s was not read, because of %s: %s", path.name, type(error).__name__, error)
        return None
    except Exception as error:  # safetensors raises its own type
        why = f"{type(error).__name__}: {error}"
    else:
        if stored.get("format") != FORMAT or stored.get("key") != key:
            why = "it was written for another key"
        elif stored.get("checksum") != content_key(tensors):
            why = "its tensors do not match their checksum"
        elif stored.get("description") != description:
            log.info("cache: %s holds another content under the same key; it is not used", path.name)
            return None
        else:
            return DiskEntry(tensors, json.loads(stored.get("facts", "{}")))
    log.warning("cache: %s is dropped, because %s", path.name, why)
    _remove(path)
    return None


def _remove(path: Path) -> bool:
    """Whether `path` is gone; one that is open elsewhere, or on a folder that may only be read, stays."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        log.debug("cache: %s stays, because %s", path.name, error)
        return False
    return True
