"""Every node family the pack offers, and the mappings ComfyUI reads.

A family is one module beside this file with `NODES`, a dict of node id to class. Each registers on its own: a family
whose import fails is logged with its traceback and named in `FAILED_FAMILIES`, and the others still load.
"""

from __future__ import annotations

import importlib
import logging
import traceback
from typing import Any

log = logging.getLogger("hotpath")

FAMILIES: tuple[str, ...] = (
    "instantid",
    "identity",
    "people",
    "telemetry",
    "faces",
    "compare",
    "cache",
    "colormnet",
    "deep_exemplar",
    "colorize",
    "qwen_vl",
    "ailab_qwen_vl",
    "vision_language",
    "map",
    "text_to_image",
    "acceleration",
    "compilation",
    "profiling",
)

NODE_CLASS_MAPPINGS: dict[str, type[Any]] = {}
NODE_DISPLAY_NAME_MAPPINGS: dict[str, str] = {}
FAILED_FAMILIES: dict[str, str] = {}


def register(family: str) -> None:
    """Import `nodes/<family>.py` and add its `NODES`; on failure, log why and leave the other families alone."""
    try:
        module = importlib.import_module(f".{family}", __name__)
        found: dict[str, type[Any]] = dict(module.NODES)
    except Exception as error:
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
        NODE_CLASS_MAPPINGS[node_id] = node_class
        NODE_DISPLAY_NAME_MAPPINGS[node_id] = getattr(node_class, "DISPLAY_NAME", node_id)


for _family in FAMILIES:
    register(_family)
