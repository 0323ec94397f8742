"""An LRU cache in memory with a byte limit, statistics and a lock (cachetools does the ordering)."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from cachetools import LRUCache

Value = TypeVar("Value")

SMALLEST = 1024  # bytes of an entry; what Python needs to hold one, and the tensors in it, is more, however few numbers they have


@dataclass(frozen=True)
class CacheStatistics:
    """What a cache holds and how often it helped, since the start or the last clear."""

    name: str
    entries: int
    nbytes: int
    limit: int
    hits: int
    misses: int
    evictions: int

    @property
    def hit_rate(self) -> float:
        asked = self.hits + self.misses
        return self.hits / asked if asked else 0.0

    def __add__(self, other: CacheStatistics) -> CacheStatistics:
        """Of two caches with one name, such as those of two models."""
        counted = (getattr(self, part.name) + getattr(other, part.name) for part in fields(self)[1:])
        return CacheStatistics(self.name, *counted)

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.entries} entries, {self.nbytes / 2**20:.1f} of {self.limit / 2**20:.0f} MiB, "
            f"{self.hits} hits, {self.misses} misses ({self.hit_rate:.0%}), {self.evictions} evicted"
        )


def size_of(value: Any) -> int:
    """Bytes held by the tensors, arrays, strings and containers in `value`; shared tensors are counted once."""
    return _size_of(value, set())


def _size_of(value: Any, seen: set[int]) -> int:
    if isinstance(value, torch.Tensor):
        storage = value.untyped_storage()
        # A view keeps its whole storage alive, so that is what it costs.
        if storage.data_ptr() in seen:
            return 0
        if storage.data_ptr():
            seen.add(storage.data_ptr())
        return storage.nbytes()
    if isinstance(value, Mapping):
        return sum(_size_of(k, seen) + _size_of(v, seen) for k, v in value.items())
    if isinstance(value, list | tuple | set | frozenset):
        return sum(_size_of(v, seen) for v in value)
    if is_dataclass(value) and not isinstance(value, type):
        return sum(_size_of(getattr(value, f.name), seen) for f in fields(value))
    if isinstance(value, np.ndarray):
        while isinstance(value.base, np.ndarray):  # as with tensors: a view keeps the whole array alive
            value = value.base
        return int(value.nbytes)
    if hasattr(value, "nbytes"):
        return int(value.nbytes)
    return sys.getsizeof(value)


class BoundedCache(Generic[Value]):
    """Values by content key, the least recently used dropped first, never more than `limit` bytes in all.

    A value larger than the limit is not kept. One of next to no bytes, such as the faces of a picture without any, counts as
    SMALLEST. Safe to use from several threads; `get_or_compute` holds no lock while
    it computes, so two threads that miss the same key both compute it and the first one stored wins.
    """

    def __init__(self, name: str, limit: int, size: Callable[[Any], int] = size_of) -> None:
        self.name = name
        self._size = size
        self._store: LRUCache[str, tuple[Value, int]] = LRUCache(limit, getsizeof=lambda entry: entry[1])
        self._lock = threading.RLock()
        self._hits = self._misses = self._evictions = 0

    @property
    def limit(self) -> int:
        return int(self._store.maxsize)

    def get(self, key: str) -> Value | None:
        """The value, now the most recently used; None when it is not there."""
        entry = self._entry(key)
        return entry[0] if entry is not None else None

    def _entry(self, key: str) -> tuple[Value, int] | None:
        with self._lock:
            entry = self._store.get(key)
            if entry is None:
                self._misses += 1
            else:
                self._hits += 1
            return entry

    def put(self, key: str, value: Value) -> Value:
        """Keep `value` unless it alone is over the limit; returns what the cache now holds for `key`."""
        nbytes = max(SMALLEST, self._size(value))
        with self._lock:
            if key in self._store:
                return self._store[key][0]
            if nbytes > self.limit:
                return value
            before = len(self._store)
            self._store[key] = (value, nbytes)
            self._evictions += before + 1 - len(self._store)
            return value

    def get_or_compute(self, key: str, compute: Callable[[], Value]) -> Value:
        """The value for `key`, computed when it is not there. A None that was computed is remembered like any value."""
        entry = self._entry(key)
        return entry[0] if entry is not None else self.put(key, compute())

    def __contains__(self, key: str) -> bool:
        with self._lock:
            return key in self._store

    def __len__(self) -> int:
        with self._lock:
            return len(self._store)

    def resize(self, limit: int) -> None:
        """Change the byte limit; what no longer fits goes, oldest use first."""
        with self._lock:
            before = len(self._store)
            resized = LRUCache[str, tuple[Value, int]](limit, getsizeof=lambda entry: entry[1])
            while self._store:
                key, entry = self._store.popitem()  # the least recently used first
                if entry[1] <= limit:
                    resized[key] = entry
            self._evictions += before - len(resized)
            self._store = resized

    def clear(self) -> None:
        with self._lock:
            self._store.clear()
            self._hits = self._misses = self._evictions = 0

    def statistics(self) -> CacheStatistics:
        with self._lock:
            return CacheStatistics(
                self.name,
                len(self._store),
                int(self._store.currsize),
                self.limit,
                self._hits,
                self._misses,
                self._evictions,
            )
