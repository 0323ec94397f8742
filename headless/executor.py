"""Runs a checked graph in this process: our V1 classes, ComfyUI's calling rules, its caching by inputs.

A node runs when what it needs is there; lazy inputs are computed only when `check_lazy_status` asks for them. A result
is reused, in later runs too, while the node's class, values, IS_CHANGED answer and everything upstream stay the same.
"""

from __future__ import annotations

import logging
import math
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from .. import host as hosts
from ..cache import content_key
from ..host.headless import HeadlessHost
from ..host.saved_layouts import migrate_prompt
from ..host.system_errors import sentence
from . import calls
from .catalog import HIDDEN, InputDeclaration, available_nodes, declared_inputs
from .graph import Graph, Link, LooseList, Node
from .validation import validate

log = logging.getLogger("hotpath.headless")


@dataclass
class NodeRun:
    """What happened at one node. `ui` is what ComfyUI would show: {"images": [...], "text": [...]}."""

    node: Node
    seconds: float
    cached: bool
    ui: dict[str, list[Any]] = field(default_factory=dict)


@dataclass
class RunResult:
    """The nodes that finished, in order, and the time all of it took."""

    runs: dict[str, NodeRun] = field(default_factory=dict)
    seconds: float = 0.0
    values: dict[str, list[list[Any]]] = field(default_factory=dict, repr=False)

    def shown(self, kind: str) -> list[Any]:
        """All `ui` entries of a kind ("images", "text"), in the order they came."""
        return [entry for run in self.runs.values() for entry in run.ui.get(kind, [])]


class NodeFailed(RuntimeError):
    """A node raised. `finished` holds what was done before; `__cause__` is the node's own exception."""

    def __init__(self, node: Node, error: BaseException, finished: RunResult) -> None:
        self.node = node
        self.finished = finished
        reason = sentence(error) or str(error) or type(error).__name__
        super().__init__(f"{node}: {reason}")


class RunStopped(hosts.Interrupted):
    """The user stopped the run. `finished` holds what was done before."""

    def __init__(self, node: Node | None, finished: RunResult) -> None:
        self.node = node
        self.finished = finished
        super().__init__(f"Stopped at {node}." if node is not None else "Stopped.")


class Observer(Protocol):
    """Is told what the executor does."""

    def started(self, node: Node, position: int, total: int) -> None: ...
    def finished(self, run: NodeRun, position: int, total: int) -> None: ...


@dataclass
class _Remembered:
    outputs: list[list[Any]]
    ui: dict[str, list[Any]]
    output_node: bool


class Executor:
    """Runs graphs on a headless host and remembers results from run to run.

    keep=False drops a result as soon as its last consumer has it, for one run over large values such as films.
    """

    def __init__(
        self,
        host: HeadlessHost,
        catalog: Mapping[str, type[Any]] | None = None,
        observer: Observer | None = None,
        keep: bool = True,
    ) -> None:
        self.host = host
        self.catalog = dict(catalog) if catalog is not None else available_nodes()
        self.observer = observer
        self.keep = keep
        self._remembered: dict[str, _Remembered] = {}
        self._objects: dict[tuple[str, str], Any] = {}

    def run(self, graph: Graph) -> RunResult:
        """Validate and run. Raises WorkflowError before anything ran, NodeFailed or RunStopped afterwards."""
        before = hosts.use(self.host)
        try:
            prompt = graph.prompt()
            # As the server does when a prompt arrives: nodes saved with an older layout get their present inputs.
            if (present := migrate_prompt(prompt)) != prompt:
                graph = Graph.parse(present)
            targets = validate(graph, self.catalog)
            return _Run(self, graph, targets).execute()
        finally:
            self.host.node_id = None
            hosts.use(before)

    def forget_output_nodes(self) -> None:
        """Run output nodes again even if nothing changed, as when the folder they write into is another one now."""
        for signature in [s for s, remembered in self._remembered.items() if remembered.output_node]:
            del self._remembered[signature]

    def object_for(self, node: Node) -> Any:
        """The instance for this id and class, the same one from run to run as in ComfyUI."""
        key = (node.id, node.class_type)
        if key not in self._objects:
            self._objects[key] = self.catalog[node.class_type]()
        return self._objects[key]


class _Run:
    """One run over one graph."""

    def __init__(self, executor: Executor, graph: Graph, targets: list[str]) -> None:
        self.executor = executor
        self.graph = graph
        self.targets = targets
        self.prompt = graph.prompt()
        order = graph.order(targets)
        self.declared: dict[str, dict[str, InputDeclaration]] = {
            i: declared_inputs(executor.catalog[graph.nodes[i].class_type]) for i in order
        }
        self.asked: dict[str, set[str]] = {i: set() for i in order}
        self.values: dict[str, list[list[Any]]] = {}
        self.signatures = self._signatures(order)
        self.result = RunResult()
        self.total = len(order)
        # How many nodes still want the result of a node; only counted down when results are not kept.
        self.wanted = {i: 0 for i in order}
        for i in order:
            for source in {link.node for _, link in graph.nodes[i].links()}:
                self.wanted[source] += 1
        # As ComfyUI does: what this graph has no use for is forgotten.
        live = set(self.signatures.values())
        for signature in [s for s in executor._remembered if s not in live]:
            del executor._remembered[signature]
        kept = {(i, graph.nodes[i].class_type) for i in order}
        for key in [k for k in executor._objects if k not in kept]:
            del executor._objects[key]

    def execute(self) -> RunResult:
        started = time.perf_counter()
        current: Node | None = None
        try:
            for target in self.targets:
                stack = [target]
                while stack:
                    current = self.graph.nodes[stack[-1]]
                    if current.id in self.values or current.id in self.result.runs:
                        stack.pop()
                        continue
                    missing = self._missing(current)
                    if missing:
                        stack.extend(reversed(missing))
                        continue
                    self.executor.host.check_interrupt()
                    if self._run_node(current):
                        stack.pop()
        except KeyboardInterrupt as stop:
            self.result.seconds = time.perf_counter() - started
            raise RunStopped(current, self.result) from stop
        except Exception as error:
            self.result.seconds = time.perf_counter() - started
            if current is None or isinstance(error, NodeFailed):
                raise
            log.debug("%s failed", current, exc_info=error)
            raise NodeFailed(current, error, self.result) from error
        self.result.seconds = time.perf_counter() - started
        self.result.values = self.values
        return self.result

    def _missing(self, node: Node) -> list[str]:
        """Nodes to run first. None when the result is remembered: then nothing upstream is needed."""
        if self.signatures[node.id] in self.executor._remembered:
            return []
        waits: dict[str, None] = {}
        for name, link in node.links():
            declaration = self.declared[node.id].get(name)
            if declaration is None or declaration.raw_link:
                continue
            if (not declaration.lazy or name in self.asked[node.id]) and link.node not in self.values:
                waits[link.node] = None
        return list(waits)

    def _run_node(self, node: Node) -> bool:
        """Run one node, or take its remembered result; False when it asked for a lazy input first."""
        executor, host = self.executor, self.executor.host
        position = len(self.result.runs) + 1
        remembered = executor._remembered.get(self.signatures[node.id])
        if remembered is not None:
            self._finish(NodeRun(node, 0.0, True, remembered.ui), remembered.outputs, position)
            return True
        inputs = self._inputs(node)
        instance = executor.object_for(node)
        if self._asks_for_more(node, instance, inputs):
            return False
        if executor.observer is not None:
            executor.observer.started(node, position, self.total)
        host.node_id = node.id
        texts_before = len(host.texts)
        started = time.perf_counter()
        answers = calls.call_over_lists(instance, instance.FUNCTION, inputs, host.check_interrupt)
        seconds = time.perf_counter() - started
        results, ui = [], {}  # type: list[tuple[Any, ...]], dict[str, list[Any]]
        for answer in answers:
            outputs, shown = calls.split_result(answer)
            results.append(outputs)
            for key, entries in shown.items():
                ui.setdefault(key, []).extend(entries)
        # Under a node a text replaces the one before, so of an answer that grew word by word the last is meant.
        last = next((text for node_id, text in reversed(host.texts[texts_before:]) if node_id == node.id), None)
        if last is not None and last not in ui.get("text", []):
            ui.setdefault("text", []).append(last)
        del host.texts[texts_before:]
        merged = calls.merge_outputs(results, executor.catalog[node.class_type])
        if executor.keep:
            writes = bool(getattr(executor.catalog[node.class_type], "OUTPUT_NODE", False))
            executor._remembered[self.signatures[node.id]] = _Remembered(merged, ui, writes)
        self._finish(NodeRun(node, seconds, False, ui), merged, position)
        return True

    def _finish(self, run: NodeRun, outputs: list[list[Any]], position: int) -> None:
        self.values[run.node.id] = outputs
        self.result.runs[run.node.id] = run
        if not self.executor.keep:
            for source in {link.node for _, link in run.node.links()}:
                self.wanted[source] -= 1
                if not self.wanted[source]:
                    self.values.pop(source, None)
            if not self.wanted[run.node.id]:
                self.values.pop(run.node.id, None)
        if self.executor.observer is not None:
            self.executor.observer.finished(run, position, self.total)

    def _inputs(self, node: Node) -> dict[str, list[Any]]:
        """Arguments as lists: None for a lazy input not computed, nothing for what the node does not declare."""
        found: dict[str, list[Any]] = {}
        declared = self.declared[node.id]
        for name, value in node.inputs.items():
            declaration = declared.get(name)
            if declaration is None or declaration.section == HIDDEN or isinstance(value, LooseList):
                continue
            if not isinstance(value, Link):
                found[name] = [value]
            elif declaration.raw_link:
                found[name] = [[value.node, value.output]]
            elif value.node in self.values:
                outputs = self.values[value.node]
                if value.output >= len(outputs):
                    source = self.graph.nodes[value.node]
                    raise ValueError(f"{source} gave {len(outputs)} outputs, and input {name!r} takes {value.output}.")
                found[name] = outputs[value.output]
            else:
                found[name] = [None]
        for name, declaration in declared.items():
            if declaration.section == HIDDEN:
                found[name] = [self._hidden(declaration.kind, node)]
        return found

    def _hidden(self, kind: str, node: Node) -> Any:
        match kind:
            case "UNIQUE_ID":
                return node.id
            case "PROMPT":
                return self.prompt
            case _:  # EXTRA_PNGINFO, DYNPROMPT and the account keys belong to a server
                return None

    def _asks_for_more(self, node: Node, instance: Any, inputs: dict[str, list[Any]]) -> bool:
        if not hasattr(instance, "check_lazy_status"):
            return False
        linked = {name for name, link in node.links() if link.node not in self.values}
        answers = calls.call_over_lists(instance, "check_lazy_status", inputs)
        names = {name for answer in answers if isinstance(answer, list) for name in answer}
        more = (names & linked) - self.asked[node.id]
        self.asked[node.id] |= more
        return bool(more)

    def _signatures(self, order: list[str]) -> dict[str, str]:
        found: dict[str, str] = {}
        for node_id in order:
            node = self.graph.nodes[node_id]
            node_class = self.executor.catalog[node.class_type]
            declared = self.declared[node_id]
            parts: list[Any] = [node.class_type, self._is_changed(node, node_class)]
            if "UNIQUE_ID" in [d.kind for d in declared.values() if d.section == HIDDEN] or getattr(
                node_class, "NOT_IDEMPOTENT", False
            ):
                parts.append(node_id)
            for name in sorted(node.inputs):
                value = node.inputs[name]
                if isinstance(value, Link):
                    parts.append([name, "link", found[value.node], value.output])
                elif name in declared:
                    parts.append([name, "value", value.values if isinstance(value, LooseList) else value])
            found[node_id] = content_key(*parts)
        return found

    def _is_changed(self, node: Node, node_class: type[Any]) -> Any:
        """The node's IS_CHANGED answer over its constants; an answer that equals nothing makes it run every time."""
        if not hasattr(node_class, "IS_CHANGED"):
            return None
        try:
            answers = calls.call_over_lists(node_class, "IS_CHANGED", self._inputs(node))
            if any(isinstance(answer, float) and math.isnan(answer) for answer in answers):
                return uuid.uuid4().hex
            content_key(answers)
            return answers
        except Exception as error:
            log.warning("%s: IS_CHANGED failed (%s), so it runs again.", node, error)
            return uuid.uuid4().hex
