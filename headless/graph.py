"""A workflow in ComfyUI's API format: nodes by id, each with a class and inputs that are values or links.

`Graph.load` reads the JSON and says what is wrong with it when it is not one; `Graph.order` sorts nodes so that each
comes after what it needs. What the inputs mean is checked in `validation`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DEEPEST = 64


class WorkflowError(ValueError):
    """The file is not a workflow that can be run; the message is a sentence for the person who gave it."""


@dataclass(frozen=True)
class Link:
    """Output number `output` of node `node`."""

    node: str
    output: int


@dataclass(frozen=True)
class LooseList:
    """A list that is no link. Only an input that the node declares makes it an error."""

    values: list[Any]


@dataclass
class Node:
    """One node: `inputs` holds plain JSON values and `Link`s."""

    id: str
    class_type: str
    inputs: dict[str, Any]
    title: str = ""

    def links(self) -> Iterator[tuple[str, Link]]:
        for name, value in self.inputs.items():
            if isinstance(value, Link):
                yield name, value

    def __str__(self) -> str:
        shown = f"{self.class_type} (#{self.id})"
        return f"{shown}, titled {self.title!r}" if self.title and self.title != self.class_type else shown


@dataclass
class Graph:
    """Nodes by id, in the order of the file."""

    nodes: dict[str, Node] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path) -> Graph:
        """Read a workflow file. Raises WorkflowError with the file's name in it."""
        try:
            data = json.loads(path.read_text(encoding="utf-8-sig"))  # as PowerShell and older Notepads write it
        except FileNotFoundError:
            raise WorkflowError(f"There is no file {path}.") from None
        except OSError as error:
            if path.is_dir():  # which Windows says in other words
                raise WorkflowError(f"{path} is a folder; name a workflow file in it.") from None
            raise WorkflowError(f"{path} cannot be read: {error.strerror or error}.") from None
        except (ValueError, RecursionError) as error:
            raise WorkflowError(f"{path.name} is not JSON: {error}.") from None
        try:
            return cls.parse(data)
        except WorkflowError as error:
            raise WorkflowError(f"{path.name}: {error}") from None

    @classmethod
    def parse(cls, data: Any) -> Graph:
        """Make a graph of the decoded JSON: a mapping of id to {class_type, inputs}, or that under the key "prompt"."""
        if isinstance(data, Mapping) and isinstance(data.get("nodes"), list) and "links" in data:
            raise WorkflowError(
                "this is a workflow in the editor's format, which does not say everything that is needed to run it. "
                "Open it in ComfyUI and use Workflow > Export (API)."
            )
        if isinstance(data, Mapping) and isinstance(data.get("prompt"), Mapping) and "class_type" not in data["prompt"]:
            data = data["prompt"]
        if not isinstance(data, Mapping) or not data:
            raise WorkflowError('a workflow in API format is an object {"<id>": {"class_type": ..., "inputs": ...}}.')
        if _deeper_than(DEEPEST, data):
            raise WorkflowError(f"its values are nested deeper than {DEEPEST} levels, which no node's are.")
        nodes: dict[str, Node] = {}
        for node_id, entry in data.items():
            if not isinstance(entry, Mapping) or not isinstance(entry.get("class_type"), str):
                raise WorkflowError(f"node {node_id!r} has no class_type, so nobody knows what it is.")
            inputs = entry.get("inputs", {})
            if not isinstance(inputs, Mapping):
                raise WorkflowError(f"the inputs of node {node_id!r} are not an object.")
            meta = entry.get("_meta")
            title = str(meta.get("title", "")) if isinstance(meta, Mapping) else ""
            values = {str(name): _value(value) for name, value in inputs.items()}
            nodes[str(node_id)] = Node(str(node_id), entry["class_type"], values, title)
        graph = cls(nodes)
        for node in graph.nodes.values():
            for name, link in node.links():
                if link.node not in graph.nodes:
                    raise WorkflowError(f"input {name!r} of {node} is linked to node {link.node!r}, which is missing.")
        return graph

    def prompt(self) -> dict[str, Any]:
        """The graph as API JSON, the shape that ComfyUI stores in the pictures it saves."""

        def plain(value: Any) -> Any:
            if isinstance(value, Link):
                return [value.node, value.output]
            if isinstance(value, LooseList):
                return value.values
            return {"__value__": value} if isinstance(value, list) else value

        return {
            node.id: {
                "class_type": node.class_type,
                "inputs": {name: plain(value) for name, value in node.inputs.items()},
                **({"_meta": {"title": node.title}} if node.title else {}),
            }
            for node in self.nodes.values()
        }

    def set_input(self, assignment: str) -> None:
        """Apply `node.input=value`: the node by id, title or class (if only one has it), the value as JSON or text."""
        target, equals, text = assignment.partition("=")
        name, dot, entry = target.partition(".")
        if not equals or not dot or not name or not entry:
            raise WorkflowError(f"{assignment!r} is not node.input=value, such as 3.weight=0.6 or 1.image=me.png.")
        node = self.find(name)
        if entry not in node.inputs:
            known = ", ".join(node.inputs) or "none"
            raise WorkflowError(f"{node} has no input {entry!r} in this workflow; it has: {known}.")
        if isinstance(node.inputs[entry], Link):
            raise WorkflowError(f"input {entry!r} of {node} is linked to another node, so it cannot be set.")
        if isinstance(node.inputs[entry], str):
            node.inputs[entry] = text
            return
        try:
            node.inputs[entry] = json.loads(text)
        except json.JSONDecodeError:
            node.inputs[entry] = text

    def find(self, name: str) -> Node:
        """The node with this id, or the only one with this title or class."""
        if name in self.nodes:
            return self.nodes[name]
        found = [node for node in self.nodes.values() if name in (node.title, node.class_type)]
        if len(found) == 1:
            return found[0]
        listed = ", ".join(f"#{node.id} {node.class_type}" for node in found or self.nodes.values())
        many = "several nodes are called" if found else "there is no node called"
        raise WorkflowError(f"{many} {name!r}; use an id: {listed}.")

    def order(self, targets: Iterable[str], follow: Callable[[Node], Iterable[str]] | None = None) -> list[str]:
        """Ids of `targets` and all they need, each after its own sources. Raises WorkflowError on a cycle.

        follow: which nodes a node waits for; by default all it is linked to.
        """
        waits = follow or (lambda node: [link.node for _, link in node.links()])
        done: dict[str, None] = {}
        for target in targets:
            # An explicit stack: a long chain must not meet Python's recursion limit.
            path: dict[str, Iterator[str]] = {}
            if target not in done:
                path[target] = iter(waits(self.nodes[target]))
            while path:
                current = next(reversed(path))
                source = next(path[current], None)
                if source is None:
                    path.pop(current)
                    done[current] = None
                elif source in path:
                    circle = [*list(path)[list(path).index(source) :], source]
                    shown = " -> ".join(f"#{i} {self.nodes[i].class_type}" for i in circle)
                    raise WorkflowError(f"these nodes wait for each other in a circle: {shown}.")
                elif source not in done:
                    path[source] = iter(waits(self.nodes[source]))
        return list(done)


def _deeper_than(most: int, data: Any) -> bool:
    """Whether objects and lists lie in each other more than `most` times. What copies or compares values calls itself."""
    level = [data]
    for _ in range(most):
        level = [inner for outer in level if isinstance(outer, Mapping | list) for inner in _inside(outer)]
        if not level:
            return False
    return True


def _inside(outer: Mapping[str, Any] | list[Any]) -> Iterable[Any]:
    return outer.values() if isinstance(outer, Mapping) else outer


def _value(value: Any) -> Any:
    """A link for [id, output], the wrapped list for {"__value__": [...]}, else the value itself."""
    if isinstance(value, Mapping) and "__value__" in value:
        return value["__value__"]
    if not isinstance(value, list):
        return value
    if len(value) == 2 and isinstance(value[0], str | int) and isinstance(value[1], int) and value[1] >= 0:
        return Link(str(value[0]), value[1])
    return LooseList(value)
