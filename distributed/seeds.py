"""Seeds that follow from the item and the workflow, never from the worker, the order or the batch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

from ..headless.catalog import HIDDEN, declared_inputs
from ..headless.graph import Graph, Link

NAMES = ("seed", "noise_seed")
WIDEST = (1 << 64) - 1


def item_seed(given: int, node_id: str, content: str, least: int = 0, most: int = WIDEST) -> int:
    """The seed of one item at one node, in least..most; `given` is what the workflow says, so another one gives others."""
    source = f"{given}/{node_id}/{content}".encode()
    number = int.from_bytes(hashlib.blake2b(source, digest_size=8).digest(), "little")
    return least + number % (most - least + 1)


def seed_inputs(graph: Graph, catalog: Mapping[str, type[Any]]) -> Iterator[tuple[str, str, int, int]]:
    """(node id, input, least, most) of every seed that the workflow holds as a value."""
    for node in graph.nodes.values():
        if node.class_type not in catalog:
            continue
        for name, declaration in declared_inputs(catalog[node.class_type]).items():
            value = node.inputs.get(name)
            if name not in NAMES or declaration.section == HIDDEN or declaration.kind != "INT":
                continue
            if isinstance(value, Link | bool) or not isinstance(value, int):
                continue
            # A least below 0, such as -1, stands for "draw one", which no two runs would agree on.
            least = max(0, int(declaration.options.get("min", 0)))
            yield node.id, name, least, max(least, int(declaration.options.get("max", WIDEST)))
