"""A worker that is a ComfyUI: a job is a prompt in its queue, so every node can be in it that is installed there."""

from __future__ import annotations

import asyncio
import logging
import shutil
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..cache import content_key
from ..headless.graph import Graph, Node, WorkflowError
from ..headless.outcome import Outcome
from ..headless.server import ServerRun, ServerStopped
from ..headless.server_answers import FailedOnServer, ServerError, ServerLost, ServerRefused
from ..headless.server_files import PREVIEWS
from ..host.whole_files import sync
from .results import OUTPUT
from .retry import ITEM, WORKFLOW, failure_kind, told_kind
from .worker import failed, keep_previews

log = logging.getLogger("hotpath.distributed")

TOLD_EVERY = 0.2  # seconds between two messages about the progress of a job
# An input that no node has: what it says makes ComfyUI run a node again whose result it has kept.
AGAIN = "hotpath_map"
REMEMBERED = 10_000  # what ran last; of older things only those come again that every job has


@dataclass
class ComfyUIWorker:
    """Runs jobs one after the other on the ComfyUI at `url`.

    outputs: class types of its output nodes. input_folder: files that a workflow names are uploaded from there; None when
    the server reads it itself. own: its "output" and "temp" folders when nobody else uses it. What it writes there is
    taken away.
    """

    url: str
    outputs: frozenset[str]
    input_folder: Path | None = None
    own: Mapping[str, Path] = field(default_factory=dict)
    _run: ServerRun | None = None
    _halted: bool = False
    _ran: OrderedDict[str, None] = field(default_factory=OrderedDict)

    def halt(self) -> None:
        """Stop the running job from another thread; `run` raises ServerStopped or ServerLost then."""
        self._halted = True
        if self._run is not None:
            self._run.halt()

    def run(self, payload: Mapping[str, Any], tell: Callable[[float], None]) -> dict[str, Any]:
        """As `WorkflowWorker.run`. Raises ServerLost when the server is gone, and ServerStopped after `halt`."""
        started = time.perf_counter()
        made = Path(payload["staging"]) / OUTPUT
        try:
            made.mkdir(parents=True, exist_ok=True)
            graph = self._fresh(payload)
            self._run = ServerRun(self.url, graph, made, self.input_folder, _Told(tell), self.own)
            if self._halted:
                self._run.halt()
            outcome = asyncio.run(self._run.execute())
            texts = self._take(outcome, made, graph)
        except (ServerLost, ServerStopped):
            self._sweep()
            raise
        except (ServerError, WorkflowError, OSError) as error:
            self._sweep()
            return failed(_kind(error, payload), str(error), started)
        finally:
            self._run = None
        return {"status": "done", "texts": texts, "seconds": time.perf_counter() - started}

    def _fresh(self, payload: Mapping[str, Any]) -> Graph:
        """The graph, with a mark at each output node that ran just so before. ComfyUI would only name the files it wrote
        then, and those are with the results of that job."""
        graph = Graph.parse(payload["prompt"])
        if not self.own:
            return graph
        for node in graph.nodes.values():
            if node.class_type in self.outputs:
                needs = (graph.nodes[i] for i in graph.order([node.id]))
                ran = content_key([[n.id, n.class_type, str(n.inputs)] for n in needs])
                if ran in self._ran:
                    node.inputs[AGAIN] = f"{payload['id']}-{payload['attempt']}"
                self._ran[ran] = None
                self._ran.move_to_end(ran)
        while len(self._ran) > REMEMBERED:
            self._ran.popitem(last=False)
        return graph

    def _take(self, outcome: Outcome, made: Path, graph: Graph) -> list[list[Any]]:
        """Put all that the job made into `made`; returns its texts, each with whether it comes from the workflow's end."""
        asked = {link.node for node in graph.nodes.values() for _, link in node.links()}
        texts = [[node.id not in asked, text] for node, text in outcome.texts]
        previews = [file.path for file in outcome.files if file.temporary]
        if "temp" not in self.own:  # they were fetched beside the results
            previews = [Path(shutil.move(path, made.parent / path.name)) for path in previews]
            shutil.rmtree(made / PREVIEWS, ignore_errors=True)
        for path, name in self._written():  # also what no node shows: captions beside pictures, say
            (made / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.move(path, made / name)
        if not any(final for final, _ in texts):
            keep_previews(made, previews)
        for path in previews:
            path.unlink(missing_ok=True)
        for path in made.rglob("*"):
            if path.is_file():
                sync(path)
        return texts

    def _written(self) -> list[tuple[Path, Path]]:
        """What lies in the server's own output folder, and its name there."""
        if (folder := self.own.get("output")) is None:
            return []
        return [(path, path.relative_to(folder)) for path in sorted(folder.rglob("*")) if path.is_file()]

    def _sweep(self) -> None:
        """Remove what a job left that came to nothing, or the next one would have it among its results."""
        for path, _ in self._written():
            path.unlink(missing_ok=True)


class _Told:
    """Tells how much of a job is done, by its nodes."""

    def __init__(self, tell: Callable[[float], None]) -> None:
        self._tell, self._last = tell, 0.0
        self._begun, self._total = 0, 1

    def started(self, node: Node, position: int, total: int) -> None:
        self._begun, self._total = position, max(1, total)
        self._say(0.0)

    def progress(self, node: Node, done: float, total: float) -> None:
        self._say(done / total if total else 0.0)

    def _say(self, within: float) -> None:
        now = time.monotonic()
        if now - self._last >= TOLD_EVERY:
            self._last = now
            self._tell(min(1.0, (self._begun - 1 + min(1.0, within)) / self._total))


def _kind(error: Exception, payload: Mapping[str, Any]) -> str:
    """What kind of failure it is, as `retry` has them."""
    if isinstance(error, ServerRefused):
        # Refused for nodes that are the same for all items: the others would fare no better.
        return ITEM if error.nodes and error.nodes & set(payload["touched"]) else WORKFLOW
    if isinstance(error, FailedOnServer):
        return told_kind(error.kind, error.reason)
    return failure_kind(error)
