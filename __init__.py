"""Hotpath for ComfyUI: InstantID, face tools, film colorization and vision-language nodes.

ComfyUI imports this file and reads the mappings below. They are built on first access, so that importing the
package from a bare checkout (tests, type checkers, the command line) costs nothing and needs nothing.
"""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "WEB_DIRECTORY", "__version__"]

WEB_DIRECTORY = "./web"

_joined = False
_LAZY = ("NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS")


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from . import nodes

        _join_server()
        return getattr(nodes, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _join_server() -> None:
    """Where ComfyUI's server is in this process: prompts of older layouts run, warnings reach nodes, the panel is there."""
    global _joined
    if _joined:
        return
    _joined = True
    try:
        from .host.comfyui import prompt_server, send_warning

        server = prompt_server()
        if server is not None:
            from . import nodes, panel
            from .headless.orphans import end_with_starter
            from .host import node_warnings, saved_layouts, shadowed

            end_with_starter()

            server.add_on_prompt_handler(saved_layouts.migrate_queued)
            node_warnings.install(send_warning)
            panel.attach(server, __version__)

            async def tell(_: Any) -> None:
                shadowed.tell_shadowed(nodes.NODE_CLASS_MAPPINGS)

            server.app.on_startup.append(tell)  # all packs are loaded then
    except Exception as error:
        # The nodes work without these. A library that is not installed has been named with the nodes that miss it.
        import logging

        from .host.errors import missing_library

        if not missing_library(error):
            logging.getLogger("hotpath").exception("Hotpath could not join ComfyUI's server")
