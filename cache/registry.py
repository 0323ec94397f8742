"""All caches of the pack by name, so that a node, a panel and `hotpath doctor` can show and clear them."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .bounded import BoundedCache, CacheStatistics
from .disk import DiskCache

_caches: dict[str, BoundedCache[Any]] = {}
_held: weakref.WeakSet[BoundedCache[Any]] = weakref.WeakSet()  # by something that lives shorter, such as a model
_tiers: dict[str, tuple[Callable[[], Path], int]] = {}
_disks: dict[str, DiskCache] = {}
_lock = threading.Lock()
_limit: int | None = None


def limit_all(limit: int | None) -> None:
    """Give every cache in memory `limit` bytes, also those that are made later; None: those that are made later get their
    own."""
    global _limit
    with _lock:
        _limit = limit
    if limit is not None:
        for cache in all_caches():
            cache.resize(limit if cache.name in _caches else min(limit, cache.limit))


def named_cache(name: str, limit: int) -> BoundedCache[Any]:
    """The cache called `name`, made the first time it is asked for, with `limit` bytes unless `limit_all` said more."""
    with _lock:
        if name not in _caches:
            _caches[name] = BoundedCache(name, limit if _limit is None else _limit)
        return _caches[name]


def listed(cache: BoundedCache[Any]) -> BoundedCache[Any]:
    """`cache` itself, shown and cleared with the others as long as somebody holds it. `limit_all` can only lower its limit."""
    with _lock:
        limit = _limit
        _held.add(cache)
    if limit is not None and limit < cache.limit:
        cache.resize(limit)
    return cache


def disk_tier(name: str, folder: Callable[[], Path], limit: int) -> Callable[[], DiskCache]:
    """Makes a folder of entries known, also before anything used it. Returns what gives its cache, where it is now."""
    with _lock:
        _tiers[name] = (folder, limit)
    return lambda: _disk(name)


def _disk(name: str) -> DiskCache:
    folder, limit = _tiers[name]
    where = folder()
    with _lock:
        if name not in _disks or _disks[name].folder != where:
            _disks[name] = DiskCache(where, limit, name)
        return _disks[name]


def all_caches() -> list[BoundedCache[Any]]:
    """Those in memory, sorted by name."""
    with _lock:
        return sorted([*_caches.values(), *_held], key=lambda cache: cache.name)


def all_tiers() -> list[BoundedCache[Any] | DiskCache]:
    """Those in memory, then the folders on the disk that have an entry."""
    return [*all_caches(), *(disk for disk in map(_disk, sorted(_tiers)) if len(disk))]


def all_statistics() -> list[CacheStatistics]:
    """Of all tiers; caches of one name, one for each model that has them, count together."""
    found: dict[str, CacheStatistics] = {}
    for cache in all_tiers():
        seen = cache.statistics()
        found[seen.name] = found[seen.name] + seen if seen.name in found else seen
    return list(found.values())


def clear_all(name: str | None = None, disk: bool = False) -> int:
    """Empty the cache called `name`, or all of them; returns the number of entries that went.

    disk: what outlives the process as well.
    """
    gone = 0
    for cache in all_tiers() if disk else all_caches():
        if name is None or cache.name == name:
            before = len(cache)
            cache.clear()
            gone += before - len(cache)
    return gone
