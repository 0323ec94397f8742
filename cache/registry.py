"""All caches of the pack by name, so that a node, a panel and `hotpath doctor` can show and clear them."""

from __future__ import annotations

import threading
from typing import Any

from .bounded import BoundedCache

_caches: dict[str, BoundedCache[Any]] = {}
_lock = threading.Lock()


def named_cache(name: str, limit: int) -> BoundedCache[Any]:
    """The cache called `name`, made with `limit` bytes the first time it is asked for."""
    with _lock:
        if name not in _caches:
            _caches[name] = BoundedCache(name, limit)
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
