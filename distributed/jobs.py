"""From items to jobs: the workflow with the item's value and seeds in it, and an id made of all that decides the result."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..cache import content_key, file_fingerprint
from ..headless.catalog import HIDDEN, declared_inputs
from ..headless.files import INPUT, inside, unmarked
from ..headless.graph import Graph, Link, LooseList, WorkflowError
from ..headless.validation import InvalidWorkflow, NeedsComfyUI, validate
from ..host.saved_layouts import migrate_prompt
from .items import Item
from .seeds import item_seed, seed_inputs

NESTED = "HotpathMap"
WITHOUT_COMFYUI = (
    "Run it with `hotpath map --comfyui FOLDER`, which starts a ComfyUI for each worker, or with `hotpath map --server URL` "
    "on one that runs."
)
# Where the item goes when nobody says: inputs that take an uploaded file, by the kind of item.
UPLOADS = {"picture": ("image_upload",), "video": ("video_upload",)}
TEXTS = ("prompt", "text", "custom_prompt")


class BadMap(ValueError):
    """The mapping cannot begin; the message is a sentence for the person who asked for it."""


@dataclass(frozen=True)
class Job:
    """One run of the workflow. id: the same for the same workflow and item, in every process and on every machine.

    prompt: API JSON. hidden: the result is a part of something larger, and is kept aside until that is whole. files: what
    its values name in the input folder. touched: ids of the nodes that it gives values of its own.
    """

    id: str
    item: Item
    prompt: dict[str, Any] = field(repr=False)
    hidden: bool = False
    files: tuple[Path, ...] = ()
    touched: tuple[str, ...] = ()

    def payload(self, staging: Path, attempt: int) -> dict[str, Any]:
        """What is sent to a worker: plain JSON, paths and no tensors."""
        reads = [str(path) for path in (self.item.file, *self.files) if path is not None]
        return {
            "id": self.id,
            "attempt": attempt,
            "prompt": self.prompt,
            "staging": str(staging),
            "reads": reads,
            "touched": list(self.touched),
        }


@dataclass(frozen=True)
class Target:
    """An input that the item's value goes into."""

    node: str
    input: str

    def __str__(self) -> str:
        return f"{self.node}.{self.input}"


class MapPlan:
    """A workflow, the input that changes from item to item, and what else decides the results.

    seeds: "item" gives every item its own seeds, made of the workflow's; "workflow" leaves the workflow's to all of them.
    input_folder: where constants of the workflow that name a file are looked up, to make their content part of the ids.
    validates: whether `catalog` can check values; a ComfyUI does so itself.
    """

    def __init__(
        self,
        graph: Graph,
        catalog: Mapping[str, type[Any]],
        target: Target | None,
        input_folder: Path,
        seeds: str = "item",
        validates: bool = True,
    ) -> None:
        if seeds not in ("item", "workflow"):
            raise BadMap(f"There are no seeds {seeds!r}; choose item or workflow.")
        present = migrate_prompt(graph.prompt())
        self.graph = Graph.parse(present)
        self.catalog, self.target, self.input_folder, self.validates = catalog, target, input_folder, validates
        files = {
            f"{node.id}.{name}": file_fingerprint(path)
            for node in self.graph.nodes.values()
            for name, value in node.inputs.items()
            if (target is None or (node.id, name) != (target.node, target.input))
            and (path := _named_file(input_folder, value)) is not None
        }
        prompt = {i: {k: v for k, v in node.items() if k != "_meta"} for i, node in self.graph.prompt().items()}
        if target is not None:
            prompt[target.node]["inputs"].pop(target.input, None)
        self.key = content_key(_plain(prompt), files, seeds, str(target))
        # Once and not for every item: what a node declares may be a list of all the files in a folder.
        self._seeds = list(seed_inputs(self.graph, catalog)) if seeds == "item" else []
        self._targets: dict[str, Target] = {}

    @property
    def draws_seeds(self) -> bool:
        """Whether items have seeds of their own."""
        return bool(self._seeds)

    def job(self, item: Item) -> Job:
        """The job of an item. Raises WorkflowError when the item sets an input that the workflow does not have."""
        if item.problem is not None:
            raise WorkflowError(item.problem)
        graph = copy.deepcopy(self.graph)
        changed: dict[str, Any] = {}
        touched: list[str] = []
        if item.value is not None:
            if self.target is None:
                raise WorkflowError("the item has a value, and no input was named that it goes into: give --input.")
            changed[str(self.target)] = graph.nodes[self.target.node].inputs[self.target.input] = item.value
            touched.append(self.target.node)
        for name, value in item.inputs.items():
            target = self._named(name)
            changed[str(target)] = graph.nodes[target.node].inputs[target.input] = value
            touched.append(target.node)
        for node_id, name, least, most in self._seeds:
            # A seed that the item names is the item's own wish.
            if f"{node_id}.{name}" not in changed:
                given = int(graph.nodes[node_id].inputs[name])
                graph.nodes[node_id].inputs[name] = item_seed(given, node_id, item.content, least, most)
        values = {name: value for name, value in changed.items() if item.file is None or value != item.value}
        # A list names its files, and what a name means changes with the file.
        named = {n: path for n, value in values.items() if (path := _named_file(self.input_folder, value)) is not None}
        contents = [{name: file_fingerprint(path) for name, path in named.items()}] if named else []
        key = content_key(self.key, item.content, values, *contents)
        files = tuple(dict.fromkeys(named.values()))
        return Job(key, item, graph.prompt(), bool(item.group), files, tuple(dict.fromkeys(touched)))

    def _named(self, name: str) -> Target:
        if name not in self._targets:
            self._targets[name] = find_target(self.graph, self.catalog, name)
        return self._targets[name]

    def check(self, item: Item) -> None:
        """Refuse what no item could run with. Raises NeedsComfyUI, InvalidWorkflow, WorkflowError.

        What is wrong with this item alone is not raised: it fails by itself, and the others run.
        """
        try:
            job = self.job(item)
        except WorkflowError:
            if item.problem is None:
                raise
            return
        if not self.validates:
            return
        graph = Graph.parse(job.prompt)
        try:
            validate(graph, self.catalog)
        except NeedsComfyUI as needs:
            raise NeedsComfyUI(needs.missing, WITHOUT_COMFYUI) from None
        except InvalidWorkflow as wrong:
            general = [problem for problem in wrong.problems if problem.node_id not in job.touched]
            if general:
                raise InvalidWorkflow(general) from None


def refuse_nested(graph: Graph) -> None:
    """A map in a map would start workers by the square. Raises BadMap."""
    nested = next((node for node in graph.nodes.values() if node.class_type == NESTED), None)
    if nested is not None:
        raise BadMap(f"{nested} maps a workflow itself; a workflow that is mapped must not.")


def find_target(graph: Graph, catalog: Mapping[str, type[Any]], name: str) -> Target:
    """`NODE.INPUT`, the node by id, title or class. The input may be one that the workflow leaves at its default.

    Raises WorkflowError when there is no such input.
    """
    node_name, dot, entry = name.partition(".")
    if not dot or not node_name or not entry:
        raise WorkflowError(f"{name!r} is not NODE.INPUT, such as 1.image or LoadImage.image.")
    node = graph.find(node_name)
    node_class = catalog.get(node.class_type)
    declared = [d.name for d in declared_inputs(node_class).values() if d.section != HIDDEN] if node_class else []
    if entry not in node.inputs and entry not in declared:
        known = ", ".join(dict.fromkeys([*node.inputs, *declared])) or "none"
        raise WorkflowError(f"{node} has no input {entry!r}; it has: {known}.")
    if isinstance(node.inputs.get(entry), Link | LooseList):
        raise WorkflowError(f"input {entry!r} of {node} is linked to another node, so items cannot go into it.")
    return Target(node.id, entry)


def guess_target(graph: Graph, catalog: Mapping[str, type[Any]], kind: str) -> Target:
    """The one input that items of this kind must be meant for; of a positive and a negative prompt the positive. Raises
    BadMap when there is none or more than one."""
    found: list[Target] = []
    for node in graph.nodes.values():
        if node.class_type not in catalog:
            continue
        for name, declaration in declared_inputs(catalog[node.class_type]).items():
            if declaration.section == HIDDEN or isinstance(node.inputs.get(name, Link("", 0)), Link | LooseList):
                continue
            if kind == "text":
                fits = declaration.kind == "STRING" and name in TEXTS
            else:
                fits = any(declaration.options.get(mark) for mark in UPLOADS[kind])
            if fits:
                found.append(Target(node.id, name))
    if len(found) > 1 and kind == "text":
        found = [target for target in found if not _is_negative(graph, target.node)] or found
    if len(found) == 1:
        return found[0]
    listed = ", ".join(f"{t} ({graph.nodes[t.node].class_type})" for t in found)
    many = f"items could go into {listed}" if found else f"no input of the workflow takes a {kind}"
    raise BadMap(f"{many}: name one as NODE.INPUT, with --input or in target of Map Workflow.")


def _is_negative(graph: Graph, node_id: str) -> bool:
    """Whether all that comes of a node goes into inputs called negative."""
    names = {name for node in graph.nodes.values() for name, link in node.links() if link.node == node_id}
    return names == {"negative"}


def _named_file(folder: Path, value: Any) -> Path | None:
    """The file in the input folder that a value names, as `files.input_file` reads it, if it names one."""
    if not isinstance(value, str) or "\n" in value or len(value) > 1024:
        return None
    name, kind = unmarked(value)
    if kind != INPUT:
        return None  # the other folders of a job are its own
    try:
        path = inside(folder, name)
        return path if path.is_file() else None
    except (OSError, ValueError):
        return None


def _plain(value: Any) -> Any:
    """JSON values for a content key, with numbers that are equal in JSON equal here: 1.0 and 1."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
