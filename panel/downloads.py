"""Downloads that the panel asks for: known files only, one after the other, each with its progress and a way to stop it."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .. import host
from ..host import known_models
from ..host.downloads import DownloadError, DownloadStopped, ProgressCallback
from ..host.interface import Host
from ..host.known_models import KnownModel
from ..host.model_store import archive_mates, find, obtain

log = logging.getLogger("hotpath.panel")

WAITING, RUNNING, STOPPING = "waiting", "running", "stopping"
DONE, FAILED, STOPPED = "done", "failed", "stopped"
UNFINISHED = (WAITING, RUNNING, STOPPING)

Obtain = Callable[[Sequence[KnownModel], Host, ProgressCallback | None], list[Path]]


class Refused(ValueError):
    """The request is not carried out; the message says why. `status` is the HTTP status that fits."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


@dataclass
class Download:
    """One download. `models` are the names of all that it brings; done and total are bytes, total None while unknown."""

    name: str
    models: list[str]
    state: str = WAITING
    done: int = 0
    total: int | None = None
    bytes_per_second: float = 0.0
    message: str = ""


class DownloadDesk:
    """Takes orders by the name of a known model. Its thread ends with the process; a half file is continued later."""

    def __init__(self, obtain: Obtain = obtain) -> None:
        self._obtain = obtain
        self._lock = threading.Lock()
        self._orders: queue.Queue[tuple[Download, list[KnownModel]]] = queue.Queue()
        self._downloads: dict[str, Download] = {}
        self._thread: threading.Thread | None = None

    def start(self, name: str, accept_licence: bool = False) -> dict[str, Any]:
        """Order the known model `name`. Raises Refused: unknown, here already, under way, or its licence not accepted."""
        model = known(name)
        here = host.current()
        if (path := find(model, here)) is not None:
            raise Refused(f"{name} is here already: {path}.", 409)
        if model.non_commercial and not accept_licence:
            raise Refused(f"{name} may not be used commercially ({model.licence}): accept its licence first.", 403)
        models = archive_mates(model, here)
        with self._lock:
            for other in self._downloads.values():
                if name in other.models and other.state in UNFINISHED:
                    raise Refused(f"{name} is being downloaded already.", 409)
            download = Download(name, [m.name for m in models])
            for m in download.models:
                self._downloads.pop(m, None)
            self._downloads[name] = download
            self._orders.put((download, models))
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="hotpath-downloads", daemon=True)
                self._thread.start()
        return asdict(download)

    def cancel(self, name: str) -> dict[str, Any]:
        """Stop the download that brings `name`. Raises Refused when there is none."""
        known(name)
        with self._lock:
            for download in self._downloads.values():
                if name in download.models and download.state in UNFINISHED:
                    download.state = STOPPED if download.state == WAITING else STOPPING
                    return asdict(download)
        raise Refused(f"{name} is not being downloaded.", 409)

    def states(self) -> list[dict[str, Any]]:
        """Every download of this process, in the order they were asked for."""
        with self._lock:
            return [asdict(download) for download in self._downloads.values()]

    def _work(self) -> None:
        while True:
            download, models = self._orders.get()
            with self._lock:
                if download.state != WAITING:
                    continue
                download.state = RUNNING
            state, message = self._bring(download, models)
            with self._lock:
                download.state, download.message = state, message

    def _bring(self, download: Download, models: list[KnownModel]) -> tuple[str, str]:
        began: tuple[float, int] | None = None

        def report(done: int, total: int | None) -> None:
            nonlocal began
            now = time.monotonic()
            began = began or (now, done)
            with self._lock:
                download.done, download.total = done, total
                if now > began[0]:
                    download.bytes_per_second = (done - began[1]) / (now - began[0])
                if download.state == STOPPING:
                    raise DownloadStopped("Stopped; what has come is kept, and the next download goes on from there.")

        names = ", ".join(download.models)
        try:
            paths = self._obtain(models, host.current(), report)
        except DownloadStopped as stopped:
            return STOPPED, str(stopped)
        except DownloadError as error:
            log.warning("%s was not downloaded: %s", names, error)
            return FAILED, str(error)
        except Exception as error:  # the thread must outlive whatever a file system or a library comes up with
            log.exception("%s was not downloaded", names)
            return FAILED, f"{names} was not downloaded because of {type(error).__name__}: {error}"
        return DONE, ", ".join(str(path) for path in paths)


def known(name: str) -> KnownModel:
    """The known model with exactly this name. Raises Refused."""
    for model in known_models.KNOWN_MODELS:
        if model.name == name:
            return model
    raise Refused("There is no known model file of that name, and only known ones are downloaded.", 404)
