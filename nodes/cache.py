"""What the pack remembers between runs: shown, limited and cleared."""

from __future__ import annotations

from typing import Any

from .. import host
from ..cache import all_statistics, clear_all, limit_all
from .sockets import HIDDEN

ALL = "all"
KEEP = "nothing"


class AnyType(str):
    """A socket type that fits every other."""

    def __ne__(self, other: object) -> bool:
        return False


ANY = AnyType("*")


class HotpathCache:
    DISPLAY_NAME = "Hotpath Cache"
    CATEGORY = "Hotpath"
    DESCRIPTION = (
        "Shows Hotpath's caches (faces, identities, prompts, colour networks and so on), and clears them if asked."
    )
    SEARCH_ALIASES = ["memory", "clear cache", "statistics"]
    RETURN_TYPES = ("STRING",)
    RETURN_NAMES = ("report",)
    OUTPUT_TOOLTIPS = ("Entries, bytes, hits and misses of each cache.",)
    OUTPUT_NODE = True
    FUNCTION = "manage"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "clear": (
                    [KEEP, ALL],
                    {"default": KEEP, "tooltip": "Clear every cache before the report, also those on the disk."},
                ),
            },
            "optional": {
                "after": (ANY, {"tooltip": "Runs once this is there."}),
                "limit_mib": (
                    "INT",
                    {
                        "default": 0,
                        "min": 0,
                        "max": 1 << 20,
                        "tooltip": "New limit in MiB for each cache in memory; 0 keeps the limits as they are.",
                    },
                ),
            },
            "hidden": HIDDEN,
        }

    @classmethod
    def IS_CHANGED(cls, **_: Any) -> float:
        return float("nan")  # statistics are never up to date

    def manage(self, clear: str, after: Any = None, limit_mib: int = 0, unique_id: str | None = None) -> tuple[str]:
        gone = clear_all(disk=True) if clear == ALL else None
        return (self.report(gone, limit_mib, unique_id),)

    @staticmethod
    def report(gone: int | None, limit_mib: int = 0, unique_id: str | None = None) -> str:
        """What is remembered, after `gone` entries were cleared if any were to be."""
        if limit_mib:
            limit_all(limit_mib << 20)
        lines = [str(seen) for seen in all_statistics()] or ["nothing is remembered yet"]
        if gone is not None:
            lines.insert(0, f"{gone} entries cleared")
        report = "\n".join(lines)
        host.current().show_text(report, unique_id)
        return report


class InstantIDCacheManager:
    """The cache node of a branch of the InstantID pack, for graphs that were saved with it."""

    DISPLAY_NAME = "InstantID Cache Manager"
    CATEGORY = "InstantID"
    DESCRIPTION = "Kept for older workflows; Hotpath Cache shows more."
    SEARCH_ALIASES = ["clear cache", "memory"]
    DEPRECATED = True
    RETURN_TYPES = ("STRING", ANY)
    RETURN_NAMES = ("cache_stats", "passthrough")
    OUTPUT_TOOLTIPS = (*HotpathCache.OUTPUT_TOOLTIPS, "What was connected to passthrough.")
    OUTPUT_NODE = True
    FUNCTION = "manage_cache"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "clear_cache": (["false", "true"], {"tooltip": "Clear every cache in memory before the report."})
            },
            "optional": {"passthrough": (ANY, {"tooltip": "Makes this node run at that point of the workflow."})},
        }

    def manage_cache(self, clear_cache: str, passthrough: Any = None) -> tuple[str, Any]:
        # What it stands in for had nothing on the disk: a workflow saved with "true" would delete that with every run.
        return HotpathCache.report(clear_all() if clear_cache == "true" else None), passthrough


NODES: dict[str, type[Any]] = {"HotpathCache": HotpathCache, "InstantIDCacheManager": InstantIDCacheManager}
