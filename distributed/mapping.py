"""A workflow over many items, from the request to the list of results. What the command and the node both call."""

from __future__ import annotations

import itertools
import json
import logging
import math
import secrets
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..cache import content_key
from ..headless.catalog import available_nodes
from ..headless.graph import Graph, WorkflowError
from ..host.errors import is_full
from .comfyui_places import ComfyUIs, Setting
from .comfyui_pool import ComfyUIPool, comfyui_pool
from .devices import Devices, choose_devices, choose_threads
from .film import Merged, ShotItems, film_node, merge_films, whole_film
from .items import FolderItems, Item, ItemSource, Repeated
from .jobs import BadMap, Job, MapPlan, Target, find_target, guess_target, refuse_nested
from .local_pool import LocalPool
from .manifest import Manifest
from .policy import POLICIES, make_policy
from .pool import InProcessPool, Pool
from .ray_cluster import ClusterOptions
from .ray_placing import Cluster, RayComfyUIs, ray_comfyuis, ray_pool
from .results import ResultStore
from .retry import RetryPlan
from .scheduler import DEPTH, DiskFull, NoWorkers, Scheduler
from .status import Observer, Status, clock_time
from .worker import WorkerSettings

log = logging.getLogger("hotpath.distributed")

EXECUTORS = ("local", "ray")
SHOWN_FAILURES = 10


@dataclass(frozen=True)
class MapOptions:
    """How a workflow is mapped.

    workers: 0 is one per GPU, or one on the CPU. gpus: all, none, or numbers by commas. retries: further attempts after
    an error that can pass. seeds: item gives each item its own, workflow leaves the workflow's. threads: of torch on the
    CPU per worker, 0 chooses. minutes: that an attempt may take until its worker is replaced, 0 for any time. in_process:
    whether a single local worker may be this process itself, which cannot be replaced. repeat: how often each item is run,
    every time with other seeds.
    """

    executor: str = "local"
    workers: int = 0
    gpus: str = "all"
    policy: str = "least_busy"
    retries: int = 2
    seeds: str = "item"
    threads: int = 0
    depth: int = DEPTH
    restart: bool = False
    minutes: float = 0.0
    in_process: bool = True
    cluster: ClusterOptions = field(default_factory=ClusterOptions)
    repeat: int = 1

    def __post_init__(self) -> None:
        if self.executor not in EXECUTORS:
            raise BadMap(f"There is no executor {self.executor!r}; choose one of {', '.join(EXECUTORS)}.")
        if self.policy not in POLICIES:
            raise BadMap(f"There is no policy {self.policy!r}; choose one of {', '.join(POLICIES)}.")
        if self.retries < 0:
            raise BadMap("The number of retries must be 0 or more.")
        if self.repeat < 1:
            raise BadMap("The number of times that an item is run must be 1 or more.")
        if not 0 <= self.minutes < math.inf:
            raise BadMap("The minutes of an attempt must be 0, for any time, or more.")


@dataclass(frozen=True)
class MapRequest:
    """graph: the workflow. source: the items, whose files lie in input_folder. target: NODE.INPUT that an item goes into;
    None finds the only input that fits. shots: the items are films, done shot by shot. models, kind_folders: as
    `HeadlessHost` takes them. cache_folder: where the token of a Ray cluster that is started here is kept. open_folders: where
    whole paths in the workflow may lead, None for anywhere. keeps_workflows: as a host has it. comfyui: what runs the jobs, if
    workers that need no ComfyUI shall not."""

    graph: Graph
    source: ItemSource
    input_folder: Path
    output_folder: Path
    cache_folder: Path
    target: str | None = None
    shots: bool = False
    models: tuple[Path, ...] = ()
    kind_folders: Mapping[str, list[Path]] = field(default_factory=dict)
    options: MapOptions = field(default_factory=MapOptions)
    open_folders: tuple[Path, ...] | None = None
    keeps_workflows: bool = True
    comfyui: ComfyUIs | None = None


@dataclass
class MapOutcome:
    """What came of it. results: results.jsonl. slots: workers that were asked for. lost: why there are no workers left,
    if that ended the run."""

    status: Status
    folder: Path
    results: Path
    workers: str
    slots: int = 1
    films: list[Merged] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    lost: str | None = None

    @property
    def whole(self) -> bool:
        """Whether every item has its result."""
        return self.lost is None and not self.status.failed and not any(film.failed for film in self.films)

    def report(self) -> str:
        status = self.status
        seconds = status.clock() - status.started
        before = f", {status.skipped} there already" if status.skipped else ""
        # A machine of a cluster that takes no part is noticed by nobody, as the others do its work.
        fewer = f", {status.peak} of which came to work" if status.done and status.peak < self.slots else ""
        lines = [
            f"{status.done} done{before}, {status.failed} failed, in {clock_time(seconds)} by {self.workers}{fewer}"
            + (f"; {status.retried} attempts were repeated" if status.retried else "")
        ]
        lines += [self.lost] if self.lost else []
        lines += self.failures
        if status.failed > len(self.failures):
            lines.append(f"... and {status.failed - len(self.failures)} more; all are in {self.results.name}")
        lines += [film.line() for film in self.films]
        return "\n".join(lines)


def run_map(
    request: MapRequest, observer: Observer | None = None, interrupted: Callable[[], None] = lambda: None
) -> MapOutcome:
    """Run every item that has no result yet. interrupted: raises to stop; what is done is then kept and listed.

    The host that is current must see the same input folder. Raises BadMap and WorkflowError before anything runs, and
    DiskFull.
    """
    try:
        return _run_map(request, observer, interrupted)
    except (OSError, sqlite3.OperationalError, DiskFull) as error:
        if not (isinstance(error, DiskFull) or is_full(error)):
            raise
        raise DiskFull(
            f"There is no room left for the results in {request.output_folder} ({error}): make room and run the same "
            "again; what is finished is kept."
        ) from error


def _run_map(request: MapRequest, observer: Observer | None, interrupted: Callable[[], None]) -> MapOutcome:
    options = request.options
    devices = choose_devices(options.gpus, options.workers)
    refuse_nested(request.graph)
    if request.comfyui is None:
        return _mapped(request, devices, available_nodes(), None, observer, interrupted)
    if options.executor == "ray" and request.comfyui.servers:
        raise BadMap("ComfyUIs that run are queued on from here: leave --executor ray out with --server.")
    _first(request)  # before anything is started for nothing
    needed = frozenset(node.class_type for node in request.graph.nodes.values())
    with _comfyuis(request, request.comfyui, devices, needed) as pool:
        return _mapped(request, devices, pool.known_nodes(interrupted), pool, observer, interrupted)


@contextmanager
def _comfyuis(
    request: MapRequest, where: ComfyUIs, devices: Devices, needed: frozenset[str]
) -> Iterator[ComfyUIPool | RayComfyUIs]:
    options = request.options
    work = ResultStore.manifest_path(request.output_folder).parent
    setting = Setting(where, devices, options.workers, options.threads, request.input_folder, work)
    if options.executor == "ray":
        with ray_comfyuis(_cluster(request, devices), setting, needed) as on_cluster:
            yield on_cluster
    else:
        with comfyui_pool(setting, needed) as here:
            yield here


def _mapped(
    request: MapRequest,
    devices: Devices,
    catalog: Mapping[str, type[Any]],
    ready: ComfyUIPool | RayComfyUIs | None,
    observer: Observer | None,
    interrupted: Callable[[], None],
) -> MapOutcome:
    """catalog: the nodes that the workers have. ready: the workers, unless they are to be made here."""
    options, output, source = request.options, request.output_folder.resolve(), request.source
    target = _target(request, catalog)
    plan = MapPlan(request.graph, catalog, target, request.input_folder, options.seeds, validates=ready is None)
    films = film_node(request.graph, catalog, target) if request.shots and target is not None else None
    plan.check(_first(request))
    if options.repeat > 1 and (films is not None or not plan.draws_seeds):
        why = "shots of a film have one result" if films is not None else "no seed in it differs from item to item"
        raise BadMap(f"The workflow would give the same {options.repeat} times: {why}.")
    with Manifest.open(ResultStore.manifest_path(output), plan.key, options.restart) as manifest:
        store = ResultStore(output, manifest)
        if isinstance(source, FolderItems):
            source = source.knowing(manifest)
        if options.repeat > 1:
            source = Repeated(source, options.repeat)
        if films is not None:
            source = ShotItems(source, films, store.work, lambda film: whole_film(film, store) is not None)
        status = Status(source.count())
        outcome = MapOutcome(status, output, output / "results.jsonl", "nobody")
        with _workers(request, devices, ready, store.work, interrupted) as pool:
            outcome.workers, outcome.slots = pool.name, pool.slots
            policy, retry = make_policy(options.policy), RetryPlan(options.retries)
            limit = options.minutes * 60 or None
            scheduler = Scheduler(pool, store, policy, retry, status, observer, interrupted, options.depth, limit=limit)
            if isinstance(pool, InProcessPool):
                pool.begins, pool.advanced = manifest.begin, lambda fraction: scheduler.tell(0, fraction)
            try:
                scheduler.run(_jobs(iter(source), plan, store, manifest, status))
            except NoWorkers as lost:
                outcome.lost = str(lost)
            finally:
                try:
                    store.clean()
                finally:
                    # What broke this process is counted as what killed one, or the list would begin with it for ever.
                    if not (isinstance(pool, InProcessPool) and pool.broken):
                        manifest.none_runs()
                # A film that was whole before has no items now; what the list says of it stays.
                if status.over or not outcome.results.is_file():
                    store.export()
        if films is not None:

            def workflow(film: Item) -> dict[str, str]:
                return {"prompt": json.dumps(plan.job(film).prompt)} if request.keeps_workflows else {}

            outcome.films = list(merge_films(request.source, store, manifest, films.suffix, interrupted, workflow))
        failed = (item for item in manifest.items() if item.job is not None and item.job.error)
        outcome.failures = [f"{f.shown}: {f.job.error}" for f in itertools.islice(failed, SHOWN_FAILURES) if f.job]
    return outcome


def _first(request: MapRequest) -> Item:
    """The first item. Raises BadMap when there is none, or when the next run would take results for items."""
    source, output = request.source, request.output_folder.resolve()
    first = next(iter(source), None)
    if first is None:
        raise BadMap(f"There is nothing to map over: {_nothing_in(source)}.")
    if isinstance(source, FolderItems) and source.folder == output:
        raise BadMap(
            f"Results would go into the folder that is mapped over, {output}, and the next run would take them for items: "
            "choose another output folder."
        )
    return first


def _nothing_in(source: ItemSource) -> str:
    """What was looked at in vain, and what it should hold."""
    if not isinstance(source, FolderItems):
        return "the list holds no item; empty lines and those that begin with # are none"
    deeper = "" if source.recursive else "; folders in it are not looked at"
    return f"{source.folder} holds no {source.kind} ({', '.join(source.suffixes)}){deeper}"


def _target(request: MapRequest, catalog: Mapping[str, type[Any]]) -> Target | None:
    if request.target:
        return find_target(request.graph, catalog, request.target)
    try:
        return guess_target(request.graph, catalog, request.source.kind)
    except BadMap:
        # A list of objects names its inputs itself.
        first = next(iter(request.source), None)
        if first is not None and first.value is None and first.inputs and not request.shots:
            return None
        raise


def _jobs(
    items: Iterator[Item], plan: MapPlan, store: ResultStore, manifest: Manifest, status: Status
) -> Iterator[Job]:
    """A job for each item, noted in the manifest; an item that cannot become one is recorded as failed."""
    for position, item in enumerate(items):
        shown = str(item.value if item.value is not None else item.label)
        problem: str | None = None
        try:
            job = plan.job(item)
        except (WorkflowError, ValueError) as error:
            job, problem = Job(content_key(plan.key, item.content, "refused"), item, {}), str(error)
        job = _labelled_apart(job, store, manifest)
        manifest.list_item(position, store.label(job), shown, job.id, item.group)
        if problem is None:
            yield job
        else:
            store.fail(job, problem, 0)
            status.failed += 1


def _labelled_apart(job: Job, store: ResultStore, manifest: Manifest) -> Job:
    """The job, with a number in its label when another one of this run is called the same: neither result may take the
    other's place. Items come in a fixed order, so the number is the same in the next run."""
    label, number = job.item.label, 2
    while manifest.lists_another(store.label(job), job.id):
        job = replace(job, item=replace(job.item, label=f"{label}-{number}"))
        number += 1
    return job


@contextmanager
def _beacon(folder: Path) -> Iterator[Path]:
    """A file that a worker must see beside the results; else it is on a machine without the shared storage."""
    path = folder / f"beacon-{secrets.token_hex(4)}"
    try:
        path.write_text("Workers look for this file.\n", encoding="ascii")
        yield path
    finally:
        path.unlink(missing_ok=True)


@contextmanager
def _workers(
    request: MapRequest,
    devices: Devices,
    ready: ComfyUIPool | RayComfyUIs | None,
    work: Path,
    interrupted: Callable[[], None],
) -> Iterator[Pool]:
    if ready is not None:
        ready.clear()
        yield ready
        return
    with _beacon(work) as beacon, _pool(request, devices, beacon, interrupted) as pool:
        yield pool


@contextmanager
def _pool(request: MapRequest, devices: Devices, beacon: Path, interrupted: Callable[[], None]) -> Iterator[Pool]:
    options = request.options
    inputs = request.input_folder.resolve()
    settings = WorkerSettings(
        str(inputs),
        [str(folder.resolve()) for folder in request.models],
        {kind: [str(folder) for folder in folders] for kind, folders in request.kind_folders.items()},
        devices.device_apart,
        choose_threads(options.threads),
        # A list of prompts needs no input folder.
        [str(beacon), *([str(inputs)] if inputs.is_dir() else [])],
        None if request.open_folders is None else [str(folder.resolve()) for folder in request.open_folders],
        request.keeps_workflows,
    )
    if options.executor == "local":
        if options.in_process and devices.workers == 1 and not options.minutes:
            yield InProcessPool(replace(settings, device=devices.device), interrupted)
        else:
            yield LocalPool(settings, devices.per_worker())
        return
    with ray_pool(_cluster(request, devices), settings) as pool:
        yield pool


def _cluster(request: MapRequest, devices: Devices) -> Cluster:
    options = request.options
    return Cluster(options.cluster, devices, options.gpus, options.workers, request.cache_folder)
