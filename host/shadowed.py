"""Which of our node ids another pack has: ComfyUI keeps the class that was registered last, and says nothing."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable

log = logging.getLogger("hotpath.nodes")

PACK = f"{__name__.rsplit('.', 2)[0]}."
NAMED = 6  # ids that a line of the log tells by name


def shadowed(ids: Iterable[str]) -> dict[str, list[str]]:
    """Of `ids`, those for which ComfyUI runs a class that is not of this copy, by the folder of the pack that has them."""
    registered = getattr(sys.modules.get("nodes"), "NODE_CLASS_MAPPINGS", {})
    found: dict[str, list[str]] = {}
    for node_id in ids:
        node_class = registered.get(node_id)
        # A class made from ours, as by a pack that measures nodes, is ours still.
        if node_class is None or any(base.__module__.startswith(PACK) for base in node_class.__mro__):
            continue
        pack = str(getattr(node_class, "RELATIVE_PYTHON_MODULE", node_class.__module__))
        found.setdefault(pack.removeprefix("custom_nodes."), []).append(node_id)
    return found


def tell_shadowed(ids: Iterable[str]) -> None:
    """Log each pack that shadows nodes of ours; for when all packs are loaded."""
    for pack, theirs in shadowed(ids).items():
        more = f" and {len(theirs) - NAMED} more" if len(theirs) > NAMED else ""
        log.warning(
            "Hotpath: %s%s are not this pack's but those of the pack %s, which has the same ids. Disable one of the two and "
            "restart.",
            ", ".join(theirs[:NAMED]),
            more,
            pack,
        )
