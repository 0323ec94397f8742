"""What takes the place of large models when an example workflow runs in the demo or in a test.

The examples are written for the models people have; `demo/stand_ins.json` names a small node for each of ComfyUI's
loaders, and small values for inputs. Everything between loader and result runs as it stands in the workflow.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .graph import Graph, Link, Node

MAP = "HotpathMap"


@dataclass(frozen=True)
class StandIns:
    """nodes: class to class. values: "Class.input" to value, used where the workflow has a value and no link.
    not_here: workflow to the reason why the demo cannot run it."""

    nodes: Mapping[str, str] = field(default_factory=dict)
    values: Mapping[str, Any] = field(default_factory=dict)
    not_here: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> StandIns:
        """From a file; one that is missing changes nothing."""
        return cls(**json.loads(path.read_text("utf-8"))) if path.is_file() else cls()

    def apply(self, graph: Graph) -> Graph:
        """A copy of `graph` with the small nodes and values."""

        def small(node: Node) -> Node:
            inputs = {
                name: value if isinstance(value, Link) else self.values.get(f"{node.class_type}.{name}", value)
                for name, value in node.inputs.items()
            }
            nested = inputs.get("workflow_text")
            if node.class_type == MAP and isinstance(nested, str) and nested.strip():
                # The models are in the workflow that is mapped.
                inputs["workflow_text"] = json.dumps(self.apply(Graph.parse(json.loads(nested))).prompt())
            return Node(node.id, self.nodes.get(node.class_type, node.class_type), inputs, node.title)

        return Graph({node.id: small(node) for node in graph.nodes.values()})
