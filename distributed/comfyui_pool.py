"""Workers that are ComfyUIs: one started for each GPU of this machine, or those that run at given addresses.

Each is looked after by a thread of this process. One that ends is started again, one that does not answer is waited for.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..headless.launcher import LaunchError
from ..headless.server import ServerStopped
from ..headless.server_answers import ServerLost
from ..headless.server_nodes import offered_nodes
from .comfyui_places import Address, Place, Setting, clear_left, lacking, places, work_folder
from .comfyui_worker import ComfyUIWorker
from .jobs import BadMap
from .pool import STARTS, Advanced, Died, Event, Finished, Ready
from .retry import WORKER, WORKFLOW

log = logging.getLogger("hotpath.distributed")

LOOK = 0.1  # seconds between two looks at what is waited for
ENDS = 30.0  # seconds for one to end


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
        if (why := lacking(self.place.name, nodes, self.pool.needed)) is not None:
            self._give_up(why)
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
        clear_left(self.folder)

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


@contextlib.contextmanager
def comfyui_pool(setting: Setting, needed: frozenset[str]) -> Iterator[ComfyUIPool]:
    """The pool, which is closed at the end. Raises BadMap for an address that is none."""
    with work_folder(setting.work) as folder:
        pool = ComfyUIPool(places(setting, folder), needed, setting.input_folder, folder)
        try:
            yield pool
        finally:
            pool.close()
