"""Workers that are ComfyUIs: one started for each GPU of this machine, or those that run at given addresses.

Each is looked after by a thread of this process. One that ends is started again, one that does not answer is waited for.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from ..headless.launcher import LaunchError, LaunchOptions, RunningServer, launched
from ..headless.server import ServerStopped, server_url
from ..headless.server_answers import ServerLost, ServerRefused
from ..headless.server_nodes import ask, offered_nodes
from ..host.own_comfyui import OwnComfyUI
from ..host.whole_paths import FOLDERS
from .comfyui_worker import ComfyUIWorker
from .devices import VISIBLE, Devices
from .jobs import BadMap
from .pool import STARTS, Advanced, Died, Event, Finished, Ready
from .retry import WORKER, WORKFLOW

log = logging.getLogger("hotpath.distributed")

LOOK = 0.1  # seconds between two looks at what is waited for
ASK_EVERY, ASK_SECONDS = 1.0, 10.0
PATIENCE = 600.0  # seconds that a ComfyUI is waited for which was there: in less a machine starts anew
ENDS = 30.0  # seconds for one to end
FOLDER = "comfyui"  # in the folder of the record: what the ComfyUIs write until it is taken away


@dataclass(frozen=True)
class ComfyUIs:
    """Where the workers are: at the addresses `servers`, or started from the ComfyUI in `folder`, with `models` as a
    further folder of models. like: they are as this one, in whose process this is. open_folders: as a host has it."""

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

    def kill(self) -> None:
        if self._server is not None and self._server.process.poll() is None:
            self._server.kill()


class _Life(threading.Thread):
    """One ComfyUI from its start until it is gone or not wanted any more. after: the life before it in its slot, which
    must have given its GPU back."""

    def __init__(self, slot: int, place: Place, pool: ComfyUIPool, after: _Life | None) -> None:
        super().__init__(name=f"hotpath-comfyui-{slot}", daemon=True)
        self.slot, self.place, self.pool, self.after = slot, place, pool, after
        self.jobs: queue.Queue[Mapping[str, Any] | None] = queue.Queue()
        self.unwanted = threading.Event()
        self.worker: ComfyUIWorker | None = None

    def run(self) -> None:
        if self.after is not None:
            self.after.join(ENDS)
            self.after = None
        reason = None
        try:
            with self.place.opened(self.unwanted.is_set) as (url, own):
                reason = self._work(url, own)
        except (LaunchError, ServerLost, ServerStopped) as error:
            reason = str(error)
        except Exception as error:  # or the run would wait for it for ever
            log.exception("the thread of %s ended", self.place.name)
            reason = f"{type(error).__name__}: {error}"
        if reason is not None:
            self._say(Died(self.slot, reason, None))

    def _work(self, url: str, own: Mapping[str, Path]) -> str | None:
        """Run jobs; returns why it does so no more."""
        nodes = offered_nodes(url)
        if missing := self.pool.needed - nodes.keys():
            named = ", ".join(sorted(missing))
            self._give_up(f"{self.place.name} does not have these nodes: {named}. Install their packs there.")
            return None
        self.pool.nodes = self.pool.nodes or nodes
        outputs = frozenset(name for name, node in nodes.items() if node.OUTPUT_NODE)
        self.worker = worker = ComfyUIWorker(url, outputs, None if own else self.pool.input_folder, own)
        self._say(Ready(self.slot))
        while not self.unwanted.is_set() and (payload := self.jobs.get()) is not None:
            try:
                result = worker.run(payload, lambda fraction: self._say(Advanced(self.slot, fraction)))
            except (ServerLost, ServerStopped) as error:
                return self.place.ended() or str(error)
            if not own and result.get("kind") == WORKER:
                self._give_up(f"{self.place.name} computes nothing more and must be started anew: {result['error']}")
                return None
            if not own and result.get("kind") == WORKFLOW:
                result["error"] = f"{self.place.name}: {result['error']}"
            self._say(Finished(self.slot, payload["id"], result))
        return self.place.ended()

    def _give_up(self, reason: str) -> None:
        self._say(Died(self.slot, reason, None, final=True))

    def _say(self, event: Event) -> None:
        if not self.unwanted.is_set():
            self.pool.heard.put((self, event))

    def look(self) -> None:
        """End a life whose ComfyUI has ended; from its silence alone that takes a while to be seen."""
        if self.worker is not None and self.place.ended() is not None:
            self.worker.halt()
            self.jobs.put(None)

    def end(self) -> None:
        """Begin to end it, whatever it does."""
        self.unwanted.set()
        self.jobs.put(None)
        self.place.kill()
        if self.worker is not None:
            self.worker.halt()


class ComfyUIPool:
    """places: one for each slot. needed: the types of all nodes of the workflow. input_folder: where files are that it
    names. folder: what ComfyUIs of ours write into, in a folder that other runs use so, too."""

    def __init__(self, places: Sequence[Place], needed: frozenset[str], input_folder: Path, folder: Path) -> None:
        self.places, self.needed, self.input_folder = list(places), needed, input_folder
        self.folder = folder
        self.slots = len(self.places)
        self.name = f"{self.slots} ComfyUI{'s' if self.slots > 1 else ''}"
        self.nodes: dict[str, type[Any]] = {}  # of the first that has all that are needed
        self.heard: queue.Queue[tuple[_Life, Event]] = queue.Queue()
        self._lives: list[_Life | None] = [None] * self.slots
        self._starts = [0] * self.slots

    def known_nodes(self, interrupted: Callable[[], None]) -> dict[str, type[Any]]:
        """What the first ComfyUI that is there offers. Raises BadMap when none comes, or what `interrupted` raises."""
        for slot, place in enumerate(self.places):
            # Those of this machine begin one after the other: the first finds out whether it can be started at all.
            if slot == 0 or isinstance(place, Address):
                self._begin(slot)
        begun = [life for life in self._lives if life is not None]
        while not self.nodes:
            interrupted()
            if not any(life.is_alive() for life in begun):
                reasons = [event.reason for _, event in list(self.heard.queue) if isinstance(event, Died)]
                raise BadMap("\n".join(dict.fromkeys(reasons)))
            time.sleep(LOOK)
        return self.nodes

    def clear(self) -> None:
        """Remove what killed runs have left; none but this one may be at work on the same results."""
        for left in self.folder.parent.glob("*"):
            if left != self.folder:
                shutil.rmtree(left, ignore_errors=True)

    def start(self) -> None:
        for slot, life in enumerate(self._lives):
            if life is None:
                self._begin(slot)

    def _begin(self, slot: int) -> None:
        self._starts[slot] += 1
        life = self._lives[slot] = _Life(slot, self.places[slot], self, self._lives[slot])
        life.start()

    def submit(self, slot: int, payload: Mapping[str, Any]) -> None:
        life = self._lives[slot]
        assert life is not None
        life.jobs.put(payload)

    def wait(self, timeout: float) -> list[Event]:
        for life in self._lives:
            if life is not None:
                life.look()
        events: list[Event] = []
        end = time.monotonic() + timeout
        while True:
            left = end - time.monotonic()
            try:
                life, event = self.heard.get(timeout=max(0.0, left) if not events else 0)
            except queue.Empty:
                return events
            if life is self._lives[event.slot]:
                events.append(self._seen(event))

    def _seen(self, event: Event) -> Event:
        if isinstance(event, Ready):
            self._starts[event.slot] = 0
        if isinstance(event, Died) and not event.final:
            if self._starts[event.slot] >= STARTS:
                return replace(event, final=True)
            self._begin(event.slot)
        return event

    def renew(self, slot: int) -> None:
        life = self._lives[slot]
        if life is not None:
            life.end()
        self._starts[slot] = 0
        self._begin(slot)

    def close(self) -> None:
        lives = [life for life in self._lives if life is not None]
        for life in lives:
            life.end()
        for life in lives:
            life.join(ENDS)
            if life.is_alive():
                log.warning("%s does not end", life.place.name)
        self._lives = [None] * self.slots


@dataclass(frozen=True)
class Setting:
    """What decides where a map's ComfyUIs are and how they are started. work: the folder of the record."""

    where: ComfyUIs
    devices: Devices
    workers: int
    threads: int
    input_folder: Path
    work: Path


@contextlib.contextmanager
def comfyui_pool(setting: Setting, needed: frozenset[str]) -> Iterator[ComfyUIPool]:
    """The pool, which is closed at the end. Raises BadMap for an address that is none."""
    folder = setting.work / FOLDER / secrets.token_hex(4)
    pool = ComfyUIPool(_places(setting, folder), needed, setting.input_folder, folder)
    try:
        yield pool
    finally:
        pool.close()
        shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # another run's are in it
            folder.parent.rmdir()


def _places(setting: Setting, folder: Path) -> list[Place]:
    if setting.where.servers:
        try:
            urls = list(dict.fromkeys(server_url(text) for text in setting.where.servers))
        except ServerRefused as refused:
            raise BadMap(str(refused)) from None
        return [Address(urls[slot % len(urls)]) for slot in range(max(setting.workers, len(urls)))]
    where = setting.where
    assert where.folder is not None
    # Who may not have whole paths here may not have them there, which is reached from this machine alone.
    limits = {} if where.open_folders is None else {FOLDERS: os.pathsep.join(map(str, where.open_folders))}
    like = where.like.arguments if where.like is not None else ()
    places: list[Place] = []
    for slot, gpu in enumerate(setting.devices.per_worker()):
        environment = limits if setting.devices.other else {**limits, VISIBLE: gpu or ""}
        if setting.threads:
            environment = {**environment, "OMP_NUM_THREADS": str(setting.threads)}
        options = LaunchOptions(
            input_folder=setting.input_folder.resolve() if setting.input_folder.is_dir() else None,
            models=where.models,
            brings_pack=where.like is not None,
            arguments=like if gpu or setting.devices.other else (*like, "--cpu"),
            environment=environment,
        )
        name = f"The ComfyUI on GPU {gpu}" if gpu else f"The ComfyUI of worker {slot + 1}"
        places.append(Started(where.folder, options, folder / str(slot), name))
    return places
