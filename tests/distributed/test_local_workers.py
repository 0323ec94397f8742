"""Workers in processes of their own: the same results, deaths survived, stopped at once, killed without damage."""

from __future__ import annotations

import io
import json
import os
import queue
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from hotpath.distributed import devices, local_pool, worker_process
from hotpath.distributed.jobs import BadMap
from hotpath.distributed.local_pool import LocalPool
from hotpath.distributed.mapping import run_map
from hotpath.distributed.pool import Died, Ready
from hotpath.distributed.worker import WorkerSettings, WorkflowWorker
from map_workflows import COPY, listed, made, picture

posix = pytest.mark.skipif(os.name != "posix", reason="signals are sent as POSIX has them")
SLOW = 1400  # side of a picture that takes a good part of a second to write


class Killer:
    """Kills the first worker it sees at work, and lets the next one hang."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pool: LocalPool | None = None
        self.killed: int | None = None
        self.stopped: int | None = None
        start = LocalPool.start

        def watched(pool: LocalPool) -> None:
            self.pool = pool
            start(pool)

        monkeypatch.setattr(LocalPool, "start", watched)

    def changed(self, status) -> None:
        assert self.pool is not None
        for slot in status.running:
            pid = self.pool.pids()[slot]
            if self.killed is None and pid is not None:
                self.killed = pid
                os.kill(pid, signal.SIGKILL)
            elif self.stopped is None and pid not in (None, self.killed):
                self.stopped = pid
                os.kill(pid, signal.SIGSTOP)


@posix
def test_two_processes_one_killed_one_hanging_give_what_this_one_gives(
    pictures, request_for, monkeypatch, headless_host
):
    for i in range(3):
        picture(pictures / f"slow{i}.png", 50 + i, SLOW)
    (pictures / "bad.png").write_text("no picture")
    killer = Killer(monkeypatch)
    together = run_map(request_for(pictures, "two", workers=2, minutes=0.2), killer)
    for pid in (killer.killed, killer.stopped):
        assert pid is not None and not psutil.pid_exists(pid)
    status = together.status
    assert (status.done, status.failed, status.retried) == (8, 1, 2), (
        "only the bad picture fails; the jobs of the killed and the hanging worker are repeated"
    )
    assert "2 processes of this machine" in together.report()
    alone = run_map(request_for(pictures, "one"))
    assert made(together.folder) == made(alone.folder)
    keys = ("item", "name", "status", "files", "texts")
    assert [[line[k] for k in keys] for line in listed(together.folder)] == [
        [line[k] for k in keys] for line in listed(alone.folder)
    ]
    assert sum(line["attempts"] - 1 for line in listed(together.folder)) == 2  # of one item or of two


def command(folder: Path, *more: str) -> subprocess.Popen:
    environment = {
        **os.environ,
        "COMFYUI_PATH": "none",
        "OMP_NUM_THREADS": "1",
        "HOTPATH_MODELS": str(folder / "models"),
    }
    root = Path(local_pool.PACK)
    return subprocess.Popen(
        [sys.executable, str(root), "map", str(folder / "w.json"), "--over", "in", "--output-folder", "out", *more],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(condition, seconds: float = 90.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.long
@posix
def test_killed_then_stopped_then_finished(tmp_path, headless_host, request_for):
    """kill -9 of the run, Ctrl-C of the next one, and a third that finishes: every picture once, and whole."""
    inputs = headless_host.input_folder()
    headless_host._input = tmp_path
    for i in range(6):
        picture(tmp_path / "in" / f"p{i:02}.png", i, SLOW)
    (tmp_path / "w.json").write_text(json.dumps(COPY))
    out = tmp_path / "out"

    first = command(tmp_path, "--workers", "2", "--gpus", "none")
    wait_for(lambda: len(made(out)) >= 1)
    workers = psutil.Process(first.pid).children(recursive=True)
    assert len(workers) == 2
    first.kill()
    first.communicate()
    _, alive = psutil.wait_procs(workers, timeout=60)
    assert not alive, "a worker does not outlive its run"
    after_kill = made(out)

    second = command(tmp_path, "--workers", "1", "--gpus", "none")
    wait_for(lambda: len(made(out)) > len(after_kill))
    workers = psutil.Process(second.pid).children(recursive=True)
    asked = time.monotonic()
    second.send_signal(signal.SIGINT)
    _, said = second.communicate(timeout=120)
    took = time.monotonic() - asked
    assert second.returncode == 130 and "the same command goes on from there" in said
    assert took < 30.0, f"{took:.1f} s"  # the machine may be busy; six pictures take longer still
    assert not psutil.wait_procs(workers, timeout=30)[1]
    assert {name: content for name, content in made(out).items() if name in after_kill} == after_kill
    states = [line["status"] for line in listed(out)]
    assert states.count("done") == len(made(out)) < 6

    third = run_map(request_for(tmp_path / "in"))
    assert third.status.skipped == len([s for s in states if s == "done"])
    assert third.whole and len(made(out)) == 6
    headless_host._input = inputs
    assert not list(out.glob(".*.part"))


def test_half_a_message_ends_a_worker_too(monkeypatch):
    """A run that is killed while it writes leaves one behind, and the worker would wait for the rest for ever."""
    ended: list[bool] = []
    monkeypatch.setattr(worker_process, "_end", lambda: ended.append(True))
    jobs: queue.Queue = queue.Queue()
    with pytest.raises(ValueError, match="Unterminated"):
        worker_process._listen(io.BytesIO(b'{"id": "whole"}\n{"id": "ha'), jobs)
    assert ended == [True] and jobs.get_nowait() == {"id": "whole"}


@posix
def test_a_worker_takes_what_it_started_with_it():
    code = (
        "import subprocess, sys\n"
        "from hotpath.distributed.worker_process import _end\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(300)'])\n"
        "print(child.pid, flush=True)\n"
        "_end()\n"
    )
    worker = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True)
    assert worker.stdout is not None
    child = int(worker.stdout.readline())
    worker.wait(30)
    wait_for(lambda: not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE, 10.0)


@pytest.mark.long
def test_workers_that_cannot_begin_end_the_run(pictures, request_for, monkeypatch):
    """As on a machine without the shared storage: the worker says what it does not see."""
    pool = LocalPool(WorkerSettings(str(pictures), sees=[str(pictures / "nothing")]), [None])
    pool.start()
    events: list = []
    wait_for(lambda: events.extend(pool.wait(0.1)) or events)
    pool.close()
    assert isinstance(events[0], Died) and events[0].final
    assert "does not see" in events[0].reason and "shared storage" in events[0].reason
    assert not [event for event in events if isinstance(event, Ready)]


def test_which_gpu_each_worker_sees(monkeypatch):
    monkeypatch.setattr(devices.torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(devices, "VISIBLE", "CUDA_VISIBLE_DEVICES")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert devices.choose_devices().per_worker() == ["0", "1", "2"]
    assert devices.choose_devices("2,0").per_worker() == ["2", "0"]
    assert devices.choose_devices("1", 2).per_worker() == ["1", "1"]
    assert devices.choose_devices("none", 2).per_worker() == ["", ""]
    assert devices.choose_devices("none").device == "cpu" and devices.choose_devices("1").device == "cuda:1"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-af,6")
    assert devices.choose_devices("1,2").per_worker() == ["GPU-af", "6"]
    with pytest.raises(BadMap, match="There is no GPU 3: this machine has 3, counted from 0"):
        devices.choose_devices("3")
    with pytest.raises(BadMap, match="no choice of GPUs"):
        devices.choose_devices("one")


def test_a_worker_does_not_collect_the_texts_of_jobs_that_failed(pictures, tmp_path):
    worker = WorkflowWorker(WorkerSettings(str(pictures), device="cpu"))
    missing = {"1": {"class_type": "LoadImage", "inputs": {"image": "nothing.png"}}}
    for attempt in range(3):
        worker.host.show_text("half a report", "1")  # as a node does that then fails
        answer = worker.run({"id": "a", "prompt": missing, "staging": str(tmp_path / f"a-{attempt}")})
        assert answer["status"] == "failed" and worker.host.texts == []


def test_on_amd_the_variable_that_has_the_last_word_counts(monkeypatch, tmp_path):
    monkeypatch.setattr(devices.torch.cuda, "device_count", lambda: 2)
    for module in (devices, local_pool):
        monkeypatch.setattr(module, "VISIBLE", "HIP_VISIBLE_DEVICES")
    monkeypatch.setenv("HIP_VISIBLE_DEVICES", "5,7")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert devices.choose_devices().per_worker() == ["5", "7"]
    monkeypatch.delenv("HIP_VISIBLE_DEVICES")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,4")
    assert devices.choose_devices().per_worker() == ["3", "4"]
    seen: list[str] = []

    def start(*_, env, **__):
        seen.append(env["HIP_VISIBLE_DEVICES"])
        raise OSError("no more processes")

    monkeypatch.setattr(local_pool.subprocess, "Popen", start)
    with pytest.raises(OSError, match="no more"):
        LocalPool(WorkerSettings(str(tmp_path)), ["7"]).start()
    assert seen == ["7"]


@pytest.mark.parametrize(("best", "device"), [("mps", "mps"), ("xpu", "xpu"), ("cpu", "cpu")])
def test_where_there_is_no_cuda_the_accelerator_is_used(monkeypatch, best, device):
    monkeypatch.setattr(devices.torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(devices, "best_device", lambda: torch.device(best))
    chosen = devices.choose_devices(workers=2)
    assert (chosen.device, chosen.device_apart, chosen.per_worker()) == (device, device, ["", ""])
    assert devices.choose_devices("none").device_apart == "cpu"


def test_threads_do_not_depend_on_the_number_of_workers(monkeypatch):
    monkeypatch.setattr(devices.os, "cpu_count", lambda: 64)
    assert devices.choose_threads() == 4 and devices.choose_threads(7) == 7
