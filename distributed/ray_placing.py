"""Workers of a Ray cluster: how many there are, what each of them holds, and what it is made with."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..headless.server_nodes import as_classes
from . import ray_cluster
from .comfyui_places import Setting, clear_left, launch_options, work_folder
from .devices import Devices
from .jobs import BadMap
from .pool import Died, Event
from .ray_cluster import ClusterOptions
from .ray_pool import RayPool
from .ray_worker import ComfyUISettings
from .worker import WorkerSettings

LOOK = 0.1  # seconds between two looks at what is waited for


@dataclass(frozen=True)
class Cluster:
    """options: how it is reached, or started. devices: of this machine. gpus: as asked for. workers: 0 is one per GPU.
    token_folder: where the token of one that is started here is kept."""

    options: ClusterOptions
    devices: Devices
    gpus: str
    workers: int
    token_folder: Path


@dataclass(frozen=True)
class _Shares:
    ray: Any
    workers: int
    gpus: float
    cpus: float


@contextmanager
def _shares(cluster: Cluster) -> Iterator[_Shares]:
    """Connected to it, what each worker holds. Raises BadMap as `ray_cluster.connected`."""
    options, devices, wanted = cluster.options, cluster.devices, cluster.gpus.strip().lower()
    if options.address is None:
        cores = max(os.cpu_count() or 1, devices.workers)
        options = replace(options, cpus=options.cpus or cores, gpus=len(devices.gpus))
    elif wanted not in ("all", "none"):
        raise BadMap("A cluster places its workers itself: give --workers, and all or none for --gpus.")
    with ray_cluster.connected(options, cluster.token_folder, devices.gpus) as ray:
        gpus = float(len(devices.gpus))
        if options.address is not None and wanted == "all":
            gpus = float(ray.cluster_resources().get("GPU", 0))
        workers = cluster.workers or max(1, int(gpus))
        # Rounded down, so that the shares of a GPU fit into it.
        share = 1.0 if gpus >= workers else int(gpus / workers * 1000) / 1000
        yield _Shares(ray, workers, share if gpus else 0.0, 0.0 if gpus else 1.0)


@contextmanager
def ray_pool(cluster: Cluster, settings: WorkerSettings) -> Iterator[RayPool]:
    """Workers for nodes that need no ComfyUI."""
    with _shares(cluster) as shares:
        if shares.gpus:
            settings = replace(settings, device=None)
        elif cluster.options.address is not None:
            settings = replace(settings, device="cpu")
        yield RayPool(shares.ray, settings, shares.workers, shares.gpus, shares.cpus)


class RayComfyUIs(RayPool):
    """Workers with a ComfyUI each. folder: what those write into, in a folder that other runs use so, too."""

    def __init__(self, shares: _Shares, settings: ComfyUISettings, folder: Path) -> None:
        super().__init__(shares.ray, settings, shares.workers, shares.gpus, shares.cpus)
        self.folder = folder
        self._nodes: dict[str, type[Any]] = {}
        self._early: list[Event] = []  # what happened before anybody asked

    def _begun(self, answer: Mapping[str, Any]) -> None:
        self._nodes = self._nodes or as_classes(answer["nodes"])

    def known_nodes(self, interrupted: Callable[[], None]) -> dict[str, type[Any]]:
        """The workflow's nodes, as the first ComfyUI declares them. Raises BadMap when none comes, or what `interrupted`
        raises."""
        self._start(0)  # it finds out whether they can be started at all
        while not self._nodes:
            interrupted()
            happened = super().wait(LOOK)
            self._early += happened
            gone = {event.slot: event.reason for event in self._early if isinstance(event, Died) and event.final}
            if len(gone) == self.slots:
                raise BadMap("\n".join(dict.fromkeys(gone.values())))
            if gone:
                self.start()
        return self._nodes

    def wait(self, timeout: float) -> list[Event]:
        early, self._early = self._early, []
        return early or super().wait(timeout)

    def clear(self) -> None:
        """Remove what killed runs have left; none but this one may be at work on the same results."""
        clear_left(self.folder)


@contextmanager
def ray_comfyuis(cluster: Cluster, setting: Setting, needed: frozenset[str]) -> Iterator[RayComfyUIs]:
    """ComfyUIs that the workers start, each on its machine. setting: as for those of this machine."""
    with _shares(cluster) as shares, work_folder(setting.work) as folder:
        on_cpu = not shares.gpus and (cluster.options.address is not None or setting.devices.other is None)
        where = setting.where
        options = launch_options(where, setting.input_folder, on_cpu, setting.threads)
        # A worker that sees it sees the results' folder, too.
        folder.mkdir(parents=True)
        settings = ComfyUISettings(
            str(where.folder) if where.folder is not None else None,
            str(folder.resolve()),
            str(options.input_folder) if options.input_folder is not None else None,
            sorted(needed),
            str(where.models.resolve()) if where.models is not None else None,
            options.brings_pack,
            list(options.arguments),
            options.environment,
            [str(folder.resolve()), *([str(options.input_folder)] if options.input_folder is not None else [])],
        )
        pool = RayComfyUIs(shares, settings, folder)
        try:
            yield pool
        finally:
            pool.close()
