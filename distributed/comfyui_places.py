"""Where ComfyUIs are that work for a map: at an address, or started from a folder of this machine."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from ..headless.launcher import LaunchOptions, RunningServer, launched
from ..headless.server import server_url
from ..headless.server_answers import ServerLost, ServerRefused
from ..headless.server_nodes import ask
from ..host.own_comfyui import OwnComfyUI
from ..host.whole_paths import FOLDERS
from .devices import VISIBLE, Devices, choose_threads
from .jobs import BadMap

ASK_EVERY, ASK_SECONDS = 1.0, 10.0
PATIENCE = 600.0  # seconds that a ComfyUI is waited for which was there: in less a machine starts anew
FOLDER = "comfyui"  # in the folder of the record: what the ComfyUIs write until it is taken away


@dataclass(frozen=True)
class ComfyUIs:
    """Where the workers are: at the addresses `servers`, or started from the ComfyUI in `folder`, with `models` as a
    further folder of models. folder: None is the one that a machine of a cluster finds. like: they are as this one, in whose
    process this is. open_folders: as a host has it."""

    servers: tuple[str, ...] = ()
    folder: Path | None = None
    models: Path | None = None
    like: OwnComfyUI | None = None
    open_folders: tuple[Path, ...] | None = None


class Place(Protocol):
    """Where a worker is. `name` is what it is called in messages."""

    name: str

    def opened(self, unwanted: Callable[[], bool]) -> contextlib.AbstractContextManager[tuple[str, Mapping[str, Path]]]:
        """The address of a ComfyUI that answers, and its folders when nobody else uses it. unwanted: asked while that is
        waited for. Raises ServerLost, LaunchError."""

    def ended(self) -> str | None:
        """How it ended; None while it is there, as far as can be seen."""

    def kill(self) -> None:
        """End it now, if it is ours."""


class Address:
    """A ComfyUI that runs, here or elsewhere."""

    def __init__(self, url: str) -> None:
        self.url, self.name = url, f"The ComfyUI at {url}"
        self._was_there = False

    @contextlib.contextmanager
    def opened(self, unwanted: Callable[[], bool]) -> Iterator[tuple[str, Mapping[str, Path]]]:
        end = time.monotonic() + (PATIENCE if self._was_there else 0.0)
        while True:
            try:
                ask(self.url, "/system_stats", ASK_SECONDS)
                if self._was_there:  # its memory ran out, or it was started anew
                    ask(self.url, "/free", ASK_SECONDS, {"unload_models": True, "free_memory": True})
                break
            except ServerLost:
                if unwanted() or time.monotonic() > end:
                    raise
            time.sleep(ASK_EVERY)
        self._was_there = True
        yield self.url, {}

    def ended(self) -> str | None:
        return None

    def kill(self) -> None:
        """It is not ours."""


class Started:
    """A ComfyUI of our own. folder: its output folder."""

    def __init__(self, comfyui: Path, options: LaunchOptions, folder: Path, name: str) -> None:
        self.comfyui, self.name = comfyui, name
        self.folder, self.options = folder, replace(options, output_folder=folder)
        self._server: RunningServer | None = None

    @contextlib.contextmanager
    def opened(self, unwanted: Callable[[], bool]) -> Iterator[tuple[str, Mapping[str, Path]]]:
        shutil.rmtree(self.folder, ignore_errors=True)
        with launched(self.comfyui, replace(self.options, unwanted=unwanted)) as self._server:
            yield self._server.url, {"output": self.folder, "temp": self._server.temp_folder}

    def ended(self) -> str | None:
        if self._server is None or (code := self._server.process.poll()) is None:
            return None
        how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
        return f"{self.name} {how}; its log ends with: {self._server.log_tail().strip().splitlines()[-1].strip()}"

    def wait(self) -> None:
        """Until it has ended, if it was started."""
        if self._server is not None:
            self._server.process.wait()

    def kill(self) -> None:
        if self._server is not None and self._server.process.poll() is None:
            self._server.kill()


@dataclass(frozen=True)
class Setting:
    """What decides where a map's ComfyUIs are and how they are started. threads: of torch on the CPU, 0 chooses. work: the
    folder of the record."""

    where: ComfyUIs
    devices: Devices
    workers: int
    threads: int
    input_folder: Path
    work: Path


def places(setting: Setting, folder: Path) -> list[Place]:
    """A place for each worker. folder: what those that are started write into. Raises BadMap for an address that is none."""
    where = setting.where
    if where.servers:
        try:
            urls = list(dict.fromkeys(server_url(text) for text in where.servers))
        except ServerRefused as refused:
            raise BadMap(str(refused)) from None
        return [Address(urls[slot % len(urls)]) for slot in range(max(setting.workers, len(urls)))]
    assert where.folder is not None
    started: list[Place] = []
    for slot, gpu in enumerate(setting.devices.per_worker()):
        cpu = not gpu and not setting.devices.other
        options = launch_options(where, setting.input_folder, cpu, setting.threads)
        if not setting.devices.other:
            options.environment[VISIBLE] = gpu or ""
        name = f"The ComfyUI on GPU {gpu}" if gpu else f"The ComfyUI of worker {slot + 1}"
        started.append(Started(where.folder, options, folder / str(slot), name))
    return started


def launch_options(where: ComfyUIs, input_folder: Path, cpu: bool, threads: int) -> LaunchOptions:
    """How a ComfyUI is started that works for a map. threads: as `Setting` has them; on a GPU it chooses itself."""
    # Who may not have whole paths here may not have them there, which is reached from this machine alone.
    environment = {} if where.open_folders is None else {FOLDERS: os.pathsep.join(map(str, where.open_folders))}
    if threads or cpu:
        environment["OMP_NUM_THREADS"] = str(choose_threads(threads))
    like = where.like.arguments if where.like is not None else ()
    return LaunchOptions(
        input_folder=input_folder.resolve() if input_folder.is_dir() else None,
        models=where.models,
        brings_pack=where.like is not None,
        arguments=(*like, "--cpu") if cpu else like,
        environment=environment,
    )


def lacking(name: str, nodes: Mapping[str, object], needed: frozenset[str]) -> str | None:
    """Why the ComfyUI called `name` cannot run the workflow, as a sentence; None when it has all the nodes."""
    missing = ", ".join(sorted(needed - nodes.keys()))
    return f"{name} does not have these nodes: {missing}. Install their packs there." if missing else None


@contextlib.contextmanager
def work_folder(record: Path) -> Iterator[Path]:
    """A folder for what the ComfyUIs of this run write, in the folder of the record; removed at the end."""
    folder = record / FOLDER / secrets.token_hex(4)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # another run's are in it
            folder.parent.rmdir()


def clear_left(folder: Path) -> None:
    """Remove what killed runs have left beside `folder`; none but its run may be at work on the same results."""
    for left in folder.parent.glob("*"):
        if left != folder:
            shutil.rmtree(left, ignore_errors=True)
