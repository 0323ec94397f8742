"""A map asked for from within a graph: names in the host's folders become a request, results become the node's outputs.

A graph may come from anybody, so everything it names lies in the input or the output folder, further ComfyUIs are as this one
and get no further than it, and which cluster is spoken to is said by the server's environment and not by the graph.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .. import host
from ..colorization.file_names import inside
from ..headless.catalog import available_nodes
from ..headless.graph import Graph, WorkflowError
from .comfyui_places import ComfyUIs
from .items import PICTURES, VIDEOS, BadItems, FolderItems, ItemSource, JsonLinesItems, ListItems, OneFile
from .jobs import BadMap
from .mapping import MapOptions, MapOutcome, MapRequest, run_map
from .ray_cluster import ClusterOptions
from .status import Status

FOLDER = "workflows"  # in the input folder: workflows in API format
INLINE = "the text below"
OVER = ("lines", "JSON lines", "pictures of a folder", "videos of a folder", "shots of a film")
ADDRESS = "HOTPATH_RAY_ADDRESS"  # of a cluster, set by who runs the server
TICKS = 1000  # of the progress bar
SHOWN_EVERY = 0.5  # seconds
MOST_WORKERS = 16  # that a graph may start on this machine, where it has fewer cores
EVERYTHING = 1 << 50  # bytes to ask for, so that all models leave a device


@dataclass(frozen=True)
class MapForm:
    """What the node was given. workflow: a file below input/workflows, or INLINE for `workflow_text`. items: lines, or the
    name of a folder or film in the input folder, as `over` says. name: of the folder for the results, in the output folder.
    """

    workflow: str
    workflow_text: str
    over: str
    items: str
    target: str = ""
    name: str = "map"
    recursive: bool = False
    free_memory: bool = True
    options: MapOptions = field(default_factory=MapOptions)


def map_in_graph(form: MapForm, node_id: str | None) -> tuple[list[str], str, str]:
    """Results by item, the folder they are in, and the report. A result is the text an item gave, else the paths of its
    files by lines; nothing for one that failed."""
    here = host.current()
    cluster = ClusterOptions(os.environ.get(ADDRESS) or None)
    most = max(MOST_WORKERS, os.cpu_count() or 1)
    if cluster.address is None and form.options.workers > most:
        raise BadMap(f"{form.options.workers} workers are more than this machine has room for: choose {most} at most.")
    # A job in this process would make its own host current for everybody: ComfyUI's server goes on answering meanwhile.
    options = replace(form.options, in_process=here.name == "headless", cluster=cluster)
    (models, kinds), further = here.all_model_folders(), here.open_folders()
    graph = _graph(form)
    open_folders = None if further is None else (here.output_folder(), here.temp_folder(), *further)
    request = MapRequest(
        graph,
        _source(form),
        here.input_folder(),
        inside(here.output_folder(), form.name),
        here.cache_folder(),
        form.target.strip() or None,
        form.over == "shots of a film",
        models,
        kinds,
        options,
        open_folders,
        here.keeps_workflows(),
        _comfyuis(graph, here, open_folders),
    )
    device = here.device()
    if form.free_memory and device.type != "cpu" and options.gpus != "none" and cluster.address is None:
        here.make_room(EVERYTHING, device)
    with _Shown(here, node_id) as shown:
        outcome = run_map(request, shown, here.check_interrupt)
    report = outcome.report()
    here.show_text(report, node_id)
    if outcome.lost is not None and not outcome.status.done:
        raise RuntimeError(report)
    return list(_results(outcome)), str(outcome.folder), report


def _graph(form: MapForm) -> Graph:
    if form.workflow != INLINE:
        return Graph.load(inside(host.current().input_folder() / FOLDER, form.workflow, (".json",)))
    if not form.workflow_text.strip():
        raise WorkflowError("There is no workflow: choose a file, or put one in API format into workflow_text.")
    try:
        return Graph.parse(json.loads(form.workflow_text))
    except (ValueError, RecursionError) as error:
        raise WorkflowError(f"workflow_text: {error}") from None


def _source(form: MapForm) -> ItemSource:
    """The items, whose names lie in the input folder."""
    if form.over not in OVER:
        raise BadItems(f"There is no {form.over!r} to map over; choose one of {', '.join(OVER)}.")
    folder = host.current().input_folder().resolve()
    if form.over == "lines":
        return ListItems(form.items)
    name = form.items.strip()
    place = folder if name in ("", ".") else inside(folder, name)
    match form.over:
        case "JSON lines":
            return JsonLinesItems(place)
        case "shots of a film":
            return OneFile(place, folder)
    suffixes = PICTURES if form.over == "pictures of a folder" else VIDEOS
    return FolderItems(place, folder, suffixes, form.recursive)


def _comfyuis(graph: Graph, here: host.Host, open_folders: tuple[Path, ...] | None) -> ComfyUIs | None:
    """ComfyUIs like this one, for a workflow that needs them."""
    own, known = here.own_comfyui(), available_nodes()
    if own is None or all(node.class_type in known for node in graph.nodes.values()):
        return None
    return ComfyUIs(folder=own.folder, like=own, open_folders=open_folders)


def _results(outcome: MapOutcome) -> Iterator[str]:
    if outcome.films:
        yield from (str(film.path) for film in outcome.films if film.failed is None)
        return
    with outcome.results.open(encoding="utf-8") as lines:
        for line in lines:
            yield _result(json.loads(line), outcome.folder)


def _result(line: dict[str, Any], folder: Path) -> str:
    files, texts = line.get("files", []), line.get("texts", [])
    if texts and all(name.endswith(".txt") for name in files):
        return "\n\n".join(texts)
    return "\n".join(str(folder / name) for name in files)


class _Shown:
    """A run on the node: a bar, and the line below it."""

    def __init__(self, here: host.Host, node_id: str | None) -> None:
        self._host, self._node_id = here, node_id
        self._bar: Any = None
        self._ticks = 0
        self._at = 0.0

    def __enter__(self) -> _Shown:
        self._bar = self._host.progress(TICKS, "map")
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def changed(self, status: Status) -> None:
        now = time.monotonic()
        if now - self._at < SHOWN_EVERY:
            return
        self._at = now
        if status.total:
            ticks = min(TICKS, int(TICKS * status.position / status.total))
            self._bar.update(max(0, ticks - self._ticks))
            self._ticks = max(ticks, self._ticks)
        self._host.show_text(status.line(), self._node_id)
