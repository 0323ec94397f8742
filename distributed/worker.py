"""What every worker is, wherever it runs: a headless executor that keeps models loaded from job to job."""

from __future__ import annotations

import gc
import logging
import shutil
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..cache import clear_all
from ..headless.executor import Executor, NodeRun
from ..headless.graph import Graph, Node
from ..headless.outcome import outcome_of
from ..host.device_work import give_back_cached
from ..host.headless import HeadlessHost
from ..host.whole_files import sync
from .results import OUTPUT, TEMP
from .retry import CONNECTION, DISK, ITEM, MEMORY, WORKER, failure_kind

log = logging.getLogger("hotpath.distributed")

TOLD_EVERY = 0.2  # seconds between two messages about the progress of a job


class NotShared(RuntimeError):
    """A worker does not see the files of the run."""


@dataclass(frozen=True)
class WorkerSettings:
    """What a worker is made with; plain values, as it crosses processes and machines.

    models: model folders, the first to be searched first; kind_folders: further ones by kind. threads: of torch on the
    CPU, the same on all workers, since sums are rounded by how they are split; 0 leaves it. sees: what a worker must be
    able to see: the input folder, and a file that the run has just put beside the results. open_folders, keeps_workflows: as
    a host has them, whose prompt it was.
    """

    input_folder: str
    models: list[str] = field(default_factory=list)
    kind_folders: dict[str, list[str]] = field(default_factory=dict)
    device: str | None = None
    threads: int = 0
    sees: list[str] = field(default_factory=list)
    open_folders: list[str] | None = None
    keeps_workflows: bool = True

    def plain(self) -> dict[str, Any]:
        return asdict(self)


class WorkerHost(HeadlessHost):
    """A headless host whose output folder changes from job to job and whose progress bars are told to the run."""

    def __init__(
        self, settings: WorkerSettings, tell: Callable[[float], None], interrupted: Callable[[], None]
    ) -> None:
        models = [Path(folder) for folder in settings.models]
        super().__init__(
            models=models[0] if models else None,
            input_folder=Path(settings.input_folder),
            device=settings.device,
            extra_models=models[1:],
            show_progress=False,
            kind_folders={kind: [Path(f) for f in folders] for kind, folders in settings.kind_folders.items()},
        )
        self._tell, self._interrupted = tell, interrupted
        self._open_folders = settings.open_folders
        self._keeps_workflows = settings.keeps_workflows
        self._told = 0.0
        self._nodes = (0, 1)  # finished, all

    def open_folders(self) -> list[Path] | None:
        return None if self._open_folders is None else [Path(folder) for folder in self._open_folders]

    def keeps_workflows(self) -> bool:
        return self._keeps_workflows

    def check_interrupt(self) -> None:
        self._interrupted()

    def use_folder(self, staging: Path) -> None:
        self._output, self._temp = staging / OUTPUT, staging / TEMP
        self.texts.clear()  # of a job that failed: nobody asks for them any more

    def progress(self, total: int, label: str = "") -> _NodeProgress:  # type: ignore[override]
        return _NodeProgress(self, total)

    def tell(self, within: float) -> None:
        """within: how much of the running node is done, 0..1."""
        now = time.monotonic()
        if now - self._told >= TOLD_EVERY:
            self._told = now
            done, total = self._nodes
            self._tell(min(1.0, (done + min(1.0, within)) / max(1, total)))

    # The executor's observer.
    def started(self, node: Node, position: int, total: int) -> None:
        self._nodes = (position - 1, total)
        self.tell(0.0)

    def finished(self, run: NodeRun, position: int, total: int) -> None:
        self._nodes = (position, total)


class _NodeProgress:
    """The progress bar of a node, as a part of its job's."""

    def __init__(self, host: WorkerHost, total: int) -> None:
        self._host, self._total, self._done = host, total, 0

    def update(self, steps: int = 1, preview: Any = None) -> None:
        self._done += steps
        self._host.tell(self._done / max(1, self._total))
        self._host.check_interrupt()

    def close(self) -> None:
        """The job ends by itself."""


class WorkflowWorker:
    """Runs jobs one after the other. tell: is given how much of the running job is done, 0..1. interrupted: raises to
    stop it; a worker in a process of its own is ended instead."""

    def __init__(
        self,
        settings: WorkerSettings,
        tell: Callable[[float], None] = lambda fraction: None,
        interrupted: Callable[[], None] = lambda: None,
    ) -> None:
        """Raises NotShared when this machine does not see the run's folders."""
        self.settings = settings
        if settings.threads and torch.get_num_threads() != settings.threads:
            torch.set_num_threads(settings.threads)
        must_see(settings.sees)
        self.host = WorkerHost(settings, tell, interrupted)
        self.executor = Executor(self.host, observer=self.host)

    def run(self, payload: Mapping[str, Any]) -> dict[str, Any]:
        """Run a job's payload; returns its result as plain JSON. A stop of the host is raised, nothing else is.

        {"status": "done", "texts": [[whether it comes from where the workflow ends, text]], "seconds"} or
        {"status": "failed", "kind": as in `retry`, "error": a sentence, "seconds"}.
        """
        started = time.perf_counter()
        if (unseen := unseen_by(payload)) is not None:
            return failed(CONNECTION, unseen, started)
        staging = Path(payload["staging"])
        try:
            (staging / OUTPUT).mkdir(parents=True, exist_ok=True)
            self.host.use_folder(staging)
            # What an output node wrote lies in the folder of the job that it ran for.
            self.executor.forget_output_nodes()
            graph = Graph.parse(payload["prompt"])
            result = self.executor.run(graph)
            made = outcome_of(result, self.host)
            # What a node says whose answer goes on to another one, such as its report, is not what the workflow is for.
            asked = {link.node for node in graph.nodes.values() for _, link in node.links()}
            ends = {i for i, run in result.runs.items() if i not in asked and self._is_output(run.node)}
            texts = [[node.id in ends, text] for node, text in made.texts]
            if not any(final for final, _ in texts):
                keep_previews(staging / OUTPUT, [file.path for file in made.files if file.temporary])
            # Here and not in the run, which would wait for one disk after the other.
            for path in (staging / OUTPUT).rglob("*"):
                if path.is_file():
                    sync(path)
        except Exception as error:
            kind = failure_kind(error)
            if kind in (ITEM, MEMORY) and not answers(self.host.device()):
                kind = WORKER
            if kind == MEMORY:
                self.let_go()
            log.info("job %s failed (%s)", payload.get("id"), kind, exc_info=error)
            said = str(error) or type(error).__name__
            if kind == DISK:
                said = f"The worker on {socket.gethostname()} has no room left on a disk: {said}"
            if kind == WORKER:
                said = f"The GPU of the worker on {socket.gethostname()} computes nothing more for it: {said}"
            return failed(kind, said, started)
        return {"status": "done", "texts": texts, "seconds": time.perf_counter() - started}

    def let_go(self) -> None:
        """Give memory back: results, models and caches."""
        self.executor = Executor(self.host, self.executor.catalog, self.host)
        clear_all()
        gc.collect()
        give_back_cached(self.host.device())

    def _is_output(self, node: Node) -> bool:
        return bool(getattr(self.executor.catalog[node.class_type], "OUTPUT_NODE", False))


def must_see(paths: Sequence[str]) -> None:
    """Raises NotShared when this machine does not see one of the paths."""
    for path in paths:
        if not Path(path).exists():
            raise NotShared(
                f"The worker on {socket.gethostname()} does not see {path}. Workers of other machines need the input "
                "and the output folder on shared storage, at the same paths."
            )


def unseen_by(payload: Mapping[str, Any]) -> str | None:
    """The file of a job that this machine does not see, in a sentence; None when it sees them all."""
    unseen = next((path for path in payload.get("reads", ()) if not Path(path).is_file()), None)
    if unseen is None:
        return None
    where = f"The worker on {socket.gethostname()} does not see {unseen}"
    return f"{where}: it needs shared storage, at the same path."


def failed(kind: str, error: str, started: float) -> dict[str, Any]:
    """The result of a job that came to nothing; `started` by time.perf_counter."""
    return {"status": "failed", "kind": kind, "error": error, "seconds": time.perf_counter() - started}


def keep_previews(folder: Path, previews: Sequence[Path]) -> None:
    """Move previews to the results of a job that saved none; without them it would have run for nothing."""
    if any(path.is_file() for path in folder.rglob("*")):
        return
    for path in previews:
        if path.is_file():
            shutil.move(path, folder / path.name)  # it may lie on another disk


def answers(device: torch.device) -> bool:
    """Whether a device still computes for this process. After an illegal access or an assertion of a kernel a GPU gives the
    same error for whatever it is asked next, until the process ends."""
    if device.type != "cuda" or not torch.cuda.is_initialized():
        return True
    try:
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        log.debug("%s answers nothing more", device, exc_info=error)
        return False
    return True
