"""Renders one workflow after another in one place: in this process, on a server, or in a ComfyUI started for it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..headless.catalog import available_nodes
from ..headless.executor import Executor
from ..headless.graph import Graph
from ..headless.interrupts import stopped_by_ctrl_c
from ..headless.launcher import LaunchOptions, launched
from ..headless.locate import find_comfyui
from ..headless.outcome import Outcome, outcome_of
from ..headless.server import run_on_server
from ..headless.server_files import PREVIEWS
from ..headless.validation import NeedsComfyUI
from .models_folder import headless_host

Render = Callable[[Graph], Outcome]


@dataclass(frozen=True)
class Place:
    """Where to render, as the command line says it; `folder` takes what the workflows save."""

    folder: Path
    server: str | None = None
    comfyui: Path | None = None
    headless: bool = False
    input_folder: Path | None = None
    models: Path | None = None
    device: str | None = None


@contextlib.contextmanager
def rendering(place: Place, graphs: Sequence[Graph], announce: Callable[[str], None]) -> Iterator[Render]:
    """Yields what renders a graph; what it has in common with the one before is not computed again.

    graphs: some that will be rendered, to tell whether they need a ComfyUI. Raises NeedsComfyUI when there is none.
    """
    if place.server is not None:
        url = place.server
        yield lambda graph: run_on_server(url, graph, place.folder, place.input_folder)
        return
    comfyui = find_comfyui(place.comfyui) if place.comfyui is not None else None
    if comfyui is None:
        known = available_nodes()
        missing = [node for graph in graphs for node in graph.nodes.values() if node.class_type not in known]
        if missing:
            comfyui = None if place.headless else find_comfyui()
            if comfyui is None:
                raise NeedsComfyUI(missing)
    if comfyui is None:
        with _here(place) as render:
            yield render
        return
    announce(f"Starting the ComfyUI in {comfyui} ...")
    options = LaunchOptions(
        input_folder=place.input_folder.resolve() if place.input_folder is not None else None, models=place.models
    )
    with launched(comfyui, options) as server:
        yield lambda graph: run_on_server(server.url, graph, place.folder)


@contextlib.contextmanager
def _here(place: Place) -> Iterator[Render]:
    host = headless_host(
        place.models,
        input_folder=place.input_folder or Path.cwd(),
        output_folder=place.folder,
        device=place.device,
        show_progress=False,
        temp_folder=place.folder / PREVIEWS,
    )
    executor = Executor(host)
    with stopped_by_ctrl_c(host):
        yield lambda graph: outcome_of(executor.run(graph), host)
