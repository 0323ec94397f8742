"""Hotpath for ComfyUI: InstantID, face tools, film colorization and vision-language nodes.

ComfyUI imports this file and reads the mappings below. They are built on first access, so that importing the
package from a bare checkout (tests, type checkers, the command line) costs nothing and needs nothing.
"""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "WEB_DIRECTORY", "__version__"]

WEB_DIRECTORY = "./web"

_LAZY = ("NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS")


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from . import nodes

        return getattr(nodes, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
