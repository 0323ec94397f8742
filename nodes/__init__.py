"""Every node family the pack offers, and the mappings ComfyUI reads.

A family is one module beside this file with `NODES`, a dict of node id to class. Each registers on its own: a family
whose import fails is logged with its traceback and named in `FAILED_FAMILIES`, and the others still load. Libraries that
are not installed are no fault of a family: one message at the end names them and the command that installs them.
"""

from __future__ import annotations

import importlib
import logging
import traceback
from typing import Any

from ..host.errors import install_requirements, missing_library
from .door import guard

log = logging.getLogger("hotpath")

FAMILIES: tuple[str, ...] = (
    "instantid",
    "identity",
    "people",
    "telemetry",
    "faces",
    "face_regions",
    "compare",
    "cache",
    "colormnet",
    "deep_exemplar",
    "colorize",
    "color_states",
    "qwen_vl",
    "ailab_qwen_vl",
    "ailab_qwen_vl_gguf",
    "ailab_downloader",
    "vision_language",
    "captioning",
    "map",
    "text_to_image",
    "acceleration",
    "compilation",
    "profiling",
)

NODE_CLASS_MAPPINGS: dict[str, type[Any]] = {}
NODE_DISPLAY_NAME_MAPPINGS: dict[str, str] = {}
FAILED_FAMILIES: dict[str, str] = {}

_missing: set[str] = set()  # libraries that nodes/ cannot be imported without


def register(family: str) -> None:
    """Import `nodes/<family>.py` and add its `NODES`; on failure, log why and leave the other families alone."""
    try:
        module = importlib.import_module(f".{family}", __name__)
        found: dict[str, type[Any]] = dict(module.NODES)
    except Exception as error:
        library = missing_library(error)
        if library:
            _missing.add(library)
            FAILED_FAMILIES[family] = f"{library} is not installed: {install_requirements()}"
            return
        FAILED_FAMILIES[family] = f"{type(error).__name__}: {error}"
        log.error(
            "Hotpath: the %s nodes are missing, because %s: %s\n%s",
            family.replace("_", " "),
            type(error).__name__,
            error,
            traceback.format_exc(),
        )
        return
    for node_id, node_class in found.items():
        guard(node_class)
        NODE_CLASS_MAPPINGS[node_id] = node_class
        NODE_DISPLAY_NAME_MAPPINGS[node_id] = getattr(node_class, "DISPLAY_NAME", node_id)


def register_all() -> None:
    for family in FAMILIES:
        register(family)
    if _missing:
        log.error(
            "Hotpath: %d of %d kinds of nodes are missing, because %s %s not installed. Run %s and start ComfyUI again.",
            len(FAILED_FAMILIES),
            len(FAMILIES),
            ", ".join(sorted(_missing)),
            "is" if len(_missing) == 1 else "are",
            install_requirements(),
        )


register_all()
