"""What an actor does on its machine: run jobs in its own process, or on a ComfyUI that it starts there.

Both answer in plain values, so that what went wrong comes back as the sentence it is and not as a traceback.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..headless.launcher import LaunchError, LaunchOptions
from ..headless.locate import find_comfyui
from ..headless.server import ServerStopped
from ..headless.server_answers import ServerLost
from ..headless.server_nodes import declarations
from .comfyui_places import Started, lacking
from .comfyui_worker import ComfyUIWorker
from .retry import CONNECTION
from .worker import NotShared, WorkerSettings, WorkflowWorker, failed, must_see, unseen_by

ENDS = 10.0  # seconds for a start or a job to be broken off


@dataclass(frozen=True)
class ComfyUISettings:
    """What a worker with a ComfyUI is made with; plain values, as it crosses machines.

    folder: the ComfyUI on that machine; None is the one found there. output: the folder in which it gets one to write into.
    needed: the types of all nodes of the workflow. sees: as `WorkerSettings` has it. The rest is as in `LaunchOptions`.
    """

    folder: str | None
    output: str
    input_folder: str | None = None
    needed: list[str] = field(default_factory=list)
    models: str | None = None
    brings_pack: bool = False
    arguments: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    sees: list[str] = field(default_factory=list)

    def plain(self) -> dict[str, Any]:
        return asdict(self)


class InActor:
    """A worker in the actor's own process."""

    def __init__(self, settings: Mapping[str, Any], tell: Callable[[float], None]) -> None:
        self._settings, self._tell = WorkerSettings(**settings), tell

    def begin(self) -> dict[str, Any]:
        """{}, or {"refused": why, "final": whether it would be so again}."""
        try:
            self._worker = WorkflowWorker(self._settings, self._tell)
        except NotShared as error:
            return {"refused": str(error), "final": True}
        return {}

    def run(self, payload: Mapping[str, Any]) -> dict[str, Any]:
        """As `WorkflowWorker.run`."""
        return self._worker.run(payload)

    def end(self) -> None:
        """It ends with the process."""


class WithComfyUI:
    """A worker that is a ComfyUI of this machine, which only this machine reaches."""

    def __init__(self, settings: Mapping[str, Any], tell: Callable[[float], None]) -> None:
        self._settings, self._tell = ComfyUISettings(**settings), tell
        self._unwanted = threading.Event()
        self._free = threading.Lock()  # held while it starts or runs a job
        self._open = contextlib.ExitStack()
        self._place: Started | None = None
        self._worker: ComfyUIWorker | None = None

    def begin(self) -> dict[str, Any]:
        """{"nodes": as they are declared}, or {"refused": why, "final": whether it would be so again}."""
        settings, name = self._settings, f"The ComfyUI on {socket.gethostname()}"
        try:
            must_see(settings.sees)
            folder = find_comfyui(None if settings.folder is None else Path(settings.folder))
        except (NotShared, FileNotFoundError) as error:
            return {"refused": str(error), "final": True}
        if folder is None:
            host = socket.gethostname()
            cure = "name its folder there with --comfyui, or in COMFYUI_PATH there."
            return {"refused": f"The worker on {host} finds no ComfyUI: {cure}", "final": True}
        if not settings.environment.get("OMP_NUM_THREADS") and os.environ.get("OMP_NUM_THREADS") == "1":
            # Ray gives one thread to whoever holds no cores; a ComfyUI on a GPU has a use for them.
            del os.environ["OMP_NUM_THREADS"]
        with self._free:
            # Not by slot: a machine that is cut off may still write into the folder of the worker before.
            self._place = Started(folder, self._options(), Path(settings.output) / secrets.token_hex(4), name)
            try:
                url, own = self._open.enter_context(self._place.opened(self._unwanted.is_set))
                nodes = declarations(url)
            except (LaunchError, ServerLost) as error:
                self._open.close()
                return {"refused": f"{name}: {error}", "final": False}
            if (why := lacking(name, nodes, frozenset(settings.needed))) is not None:
                self._open.close()
                return {"refused": why, "final": True}
            outputs = frozenset(node for node, entry in nodes.items() if entry.get("output_node"))
            self._worker = ComfyUIWorker(url, outputs, None, own)
        threading.Thread(target=self._watch, args=(self._place, self._worker), daemon=True).start()
        return {"nodes": {node: nodes[node] for node in settings.needed}}

    @staticmethod
    def _watch(place: Started, worker: ComfyUIWorker) -> None:
        """Break its job off when the ComfyUI ends; from its silence alone that takes a while to be seen."""
        place.wait()
        worker.halt()

    def _options(self) -> LaunchOptions:
        settings = self._settings
        return LaunchOptions(
            input_folder=Path(settings.input_folder) if settings.input_folder else None,
            models=Path(settings.models) if settings.models else None,
            brings_pack=settings.brings_pack,
            arguments=settings.arguments,
            environment=dict(settings.environment),
        )

    def run(self, payload: Mapping[str, Any]) -> dict[str, Any]:
        """As `WorkflowWorker.run`, or {"gone": why} when the ComfyUI runs no more jobs."""
        assert self._worker is not None and self._place is not None
        if (unseen := unseen_by(payload)) is not None:
            return failed(CONNECTION, unseen, time.perf_counter())
        with self._free:
            try:
                return self._worker.run(payload, self._tell)
            except (ServerLost, ServerStopped) as error:
                return {"gone": self._place.ended() or str(error)}

    def end(self) -> None:
        """End the ComfyUI now, with what it does."""
        self._unwanted.set()
        if self._place is not None:
            self._place.kill()
        if self._worker is not None:
            self._worker.halt()
        if self._free.acquire(timeout=ENDS):
            try:
                self._open.close()
            finally:
                self._free.release()


PROCESS, COMFYUI = "process", "comfyui"
WORKERS: Mapping[str, Callable[..., InActor | WithComfyUI]] = {PROCESS: InActor, COMFYUI: WithComfyUI}
