"""All caches of the pack by name, so that a node, a panel and `hotpath doctor` can show and clear them."""

from __future__ import annotations

import threading
from typing import Any

from .bounded import BoundedCache

_caches: dict[str, BoundedCache[Any]] = {}
_lock = threading.Lock()
_limit: int | None = None


def limit_all(limit: int | None) -> None:
    """Give every cache `limit` bytes, also those that are made later; None: those that are made later get their own."""
    global _limit
    with _lock:
        _limit = limit
    if limit is not None:
        for cache in all_caches():
            cache.resize(limit)


def named_cache(name: str, limit: int) -> BoundedCache[Any]:
    """The cache called `name`, made the first time it is asked for, with `limit` bytes unless `limit_all` said more."""
    with _lock:
        if name not in _caches:
            _caches[name] = BoundedCache(name, limit if _limit is None else _limit)
        return _caches[name]


def all_caches() -> list[BoundedCache[Any]]:
    with _lock:
        return [_caches[name] for name in sorted(_caches)]


def clear_all(name: str | None = None) -> int:
    """Empty the cache called `name`, or all of them; returns the number of entries that went."""
    gone = 0
    for cache in all_caches():
        if name is None or cache.name == name:
            gone += len(cache)
            cache.clear()
    return gone
