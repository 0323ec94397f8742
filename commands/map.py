"""`hotpath map`: a workflow over many items, on the GPUs of this machine, of a Ray cluster, or on ComfyUIs that run."""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from .. import host as hosts
from ..distributed.comfyui_places import ComfyUIs
from ..distributed.items import PICTURES, VIDEOS, BadItems, FolderItems, ItemSource, ListItems, open_items
from ..distributed.jobs import BadMap
from ..distributed.mapping import MapOptions, MapOutcome, MapRequest, run_map
from ..distributed.ray_cluster import ClusterOptions
from ..distributed.scheduler import DiskFull
from ..distributed.status import Status
from ..headless.catalog import available_nodes
from ..headless.graph import Graph, WorkflowError
from ..headless.interrupts import stopped_by_ctrl_c
from ..headless.launcher import ended_by_signal
from ..headless.locate import find_comfyui
from ..host import Interrupted
from ..host.headless import HeadlessHost
from .console import complain, note, say
from .models_folder import headless_host

FAILED, REFUSED, INTERRUPTED = 1, 2, 130
DRAWN_EVERY, SAID_EVERY = 0.2, 30.0  # seconds, on a terminal and elsewhere


def run(options: argparse.Namespace) -> int:
    """Exit code: 0 every item has its result, 1 some have none, 2 refused before anything ran, 130 stopped."""
    try:
        graph = Graph.load(options.workflow)
        for assignment in options.set or ():
            graph.set_input(assignment)
        comfyui = _comfyui(options, graph)
        input_folder = _input_folder(options, comfyui)
        here = headless_host(options.models, input_folder, options.output_folder, show_progress=not options.quiet)
        before = hosts.use(here)
        try:
            # It reads standard input, which a Ctrl-C ends at once.
            request = replace(_request(options, graph, here), comfyui=comfyui)
            with ended_by_signal(), stopped_by_ctrl_c(here), _Line(options.quiet) as line:
                outcome = run_map(request, line, here.check_interrupt)
        finally:
            hosts.use(before)
    except (BadMap, BadItems, WorkflowError, FileNotFoundError) as error:
        complain(str(error))
        return REFUSED
    except DiskFull as error:
        complain(str(error))
        return FAILED
    except (Interrupted, KeyboardInterrupt):
        note("Stopped. What is finished is kept; the same command goes on from there.", "yellow")
        return INTERRUPTED
    return _report(outcome)


def _request(options: argparse.Namespace, graph: Graph, here: HeadlessHost) -> MapRequest:
    cluster = ClusterOptions(options.address, options.token_file)
    return MapRequest(
        graph,
        _source(options, here.input_folder()),
        here.input_folder(),
        options.output_folder,
        here.cache_folder(),
        options.input,
        options.shots,
        *here.all_model_folders(),
        MapOptions(
            options.executor,
            options.workers,
            options.gpus,
            options.policy,
            options.retries,
            options.seeds,
            options.threads,
            restart=options.restart,
            minutes=options.minutes,
            cluster=cluster,
            repeat=options.repeat,
        ),
    )


def _comfyui(options: argparse.Namespace, graph: Graph) -> ComfyUIs | None:
    """What is asked for, else one that is found when the workflow needs it."""
    if options.server:
        return ComfyUIs(servers=tuple(options.server))
    wanted = options.comfyui is not None
    if not wanted and not options.headless:
        known = available_nodes()
        wanted = any(node.class_type not in known for node in graph.nodes.values())
    if not wanted:
        return None
    if options.executor == "ray":  # where it is on the machines of the cluster only those know
        folder = options.comfyui
        if folder is not None and not str(folder).startswith("~"):  # whose home that is, each machine says
            folder = folder.absolute()
        note(f"Starting the ComfyUI in {folder or 'its place'} for each worker ...", "dim")
        return ComfyUIs(folder=folder, models=options.models)
    folder = find_comfyui(options.comfyui)
    if folder is None:
        return None
    note(f"Starting the ComfyUI in {folder} for each worker ...", "dim")
    return ComfyUIs(folder=folder, models=options.models)


def _input_folder(options: argparse.Namespace, comfyui: ComfyUIs | None) -> Path:
    """--input-folder, else the current folder, or the folder that is mapped over when it lies elsewhere; for lines, which
    name no files, that of the ComfyUI which is started."""
    if options.input_folder is not None:
        return Path(options.input_folder)
    if comfyui is not None and comfyui.folder is not None and _is_list(options.over):
        return comfyui.folder / "input"
    over = Path(options.over).expanduser().resolve()
    here = Path.cwd()
    if over.is_relative_to(here):
        return here
    if over.is_dir():
        return over
    return over.parent if over.suffix.lower() in (*PICTURES, *VIDEOS) else here


def _is_list(over: str) -> bool:
    return over == "-" or (
        Path(over).suffix.lower() not in (*PICTURES, *VIDEOS) and not Path(over).expanduser().is_dir()
    )


def _source(options: argparse.Namespace, input_folder: Path) -> ItemSource:
    if options.over == "-":
        return ListItems(sys.stdin.read())
    films = options.shots or options.items == "videos"
    path = Path(options.over).expanduser()
    if path.is_dir():
        suffixes = VIDEOS if films else PICTURES
        return FolderItems(path, input_folder, suffixes, options.recursive, options.output_folder)
    return open_items(options.over, input_folder)


def _report(outcome: MapOutcome) -> int:
    note(outcome.report(), None if outcome.whole else "yellow")
    for film in outcome.films:
        if film.failed is None:
            say(str(film.path))
    say(str(outcome.results))
    return 0 if outcome.whole else FAILED


class _Line:
    """One line for all workers, on standard error: drawn again and again on a terminal, else said now and then."""

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet
        self._bar: Any = None
        self._drawn = time.monotonic()

    def __enter__(self) -> _Line:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def changed(self, status: Status) -> None:
        terminal = sys.stderr.isatty()
        if self._quiet or time.monotonic() - self._drawn < (DRAWN_EVERY if terminal else SAID_EVERY):
            return
        self._drawn = time.monotonic()
        if not terminal:
            note(status.line(), "dim")
            return
        from tqdm import tqdm

        if self._bar is None:
            shape = "{percentage:3.0f}%|{bar}| {desc}" if status.total else "{desc}"
            self._bar = tqdm(total=status.total, leave=False, bar_format=shape)
        self._bar.n = min(status.position, status.total) if status.total else status.position
        self._bar.set_description_str(status.line())
