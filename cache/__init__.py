"""Content keys and bounded stores, shared by every family.

`keys` turns parameters, tensors and files into MD5 keys; `bounded.BoundedCache` is an LRU in memory with a byte limit
and statistics; `disk.DiskCache` keeps tensors across restarts. Every cache is listed in `registry`, so that one
node and one command can show and clear them all.
"""

from .bounded import BoundedCache, CacheStatistics
from .keys import content_key, file_fingerprint
from .registry import all_caches, all_statistics, all_tiers, clear_all, disk_tier, limit_all, listed, named_cache

__all__ = [
    "BoundedCache",
    "CacheStatistics",
    "all_caches",
    "all_statistics",
    "all_tiers",
    "clear_all",
    "content_key",
    "disk_tier",
    "file_fingerprint",
    "limit_all",
    "listed",
    "named_cache",
]
