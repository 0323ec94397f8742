"""What full disks, dying workers and crashes leave: no item is blamed for them, and nothing is lost."""

from __future__ import annotations

import errno
import os
import sqlite3
import stat
from pathlib import Path

import pytest
import torch
from hotpath.distributed import mapping, results, scheduler, worker
from hotpath.distributed.items import Item
from hotpath.distributed.jobs import Job
from hotpath.distributed.manifest import Manifest
from hotpath.distributed.mapping import run_map
from hotpath.distributed.results import ResultStore
from hotpath.distributed.scheduler import DiskFull
from hotpath.headless.core_nodes import LoadImage
from hotpath.host import Interrupted
from map_workflows import listed, made


@pytest.mark.skipif(os.name != "posix", reason="folders are made durable on POSIX")
@pytest.mark.parametrize(("number", "passes"), [(errno.EINVAL, True), (errno.ENOTSUP, True), (errno.EIO, False)])
def test_a_file_system_that_cannot_make_folders_durable(pictures, request_for, monkeypatch, number, passes):
    """As network shares and FUSE mounts do; a disk that fails is another matter."""
    real = os.fsync

    def refuse(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(number, os.strerror(number))
        real(handle)

    monkeypatch.setattr(os, "fsync", refuse)
    if passes:
        assert run_map(request_for(pictures)).whole
    else:
        with pytest.raises(OSError, match=os.strerror(number)):
            run_map(request_for(pictures))


def test_a_copy_is_on_disk_before_it_has_its_name(pictures, request_for, monkeypatch):
    """Or a power cut would leave an empty file that counts as done."""
    (pictures / "twin.png").write_bytes((pictures / "p0.png").read_bytes())
    steps: list[str] = []
    sync, move = results.sync, results.put_in_place
    monkeypatch.setattr(results, "sync", lambda path: (steps.append(path.name), sync(path)))
    monkeypatch.setattr(
        results, "put_in_place", lambda old, new: (steps.append(f"{old.name} {new.name}"), move(old, new))
    )
    assert run_map(request_for(pictures)).status.skipped == 1
    at = steps.index("copy.part twin.png")
    assert steps[at - 1] == "copy.part"
    assert not (request_for(pictures).output_folder / ".hotpath-map" / "copy.part").exists()


@pytest.mark.parametrize("place", ["where results are staged", "where they are recorded"])
def test_a_full_disk_ends_the_run_and_blames_no_item(pictures, request_for, monkeypatch, place):
    """Half-way: what was finished stays, and the same run goes on when there is room."""
    seen: list[Path] = []
    sync, commit = worker.sync, Manifest.begin_commit

    def full(path):
        seen.append(path)
        if len(seen) > 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        sync(path)

    def full_record(self, *parts):
        seen.append(Path())
        if len(seen) > 2:
            raise sqlite3.OperationalError("database or disk is full")
        commit(self, *parts)

    def no_room(path):
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT), str(path))

    if place == "where results are staged":
        monkeypatch.setattr(worker, "sync", full)
        monkeypatch.setattr(results, "sync", no_room)
    else:
        monkeypatch.setattr(Manifest, "begin_commit", full_record)
    with pytest.raises(DiskFull, match=r"no room left for the results in .*out \(.*: make room and run the same again"):
        run_map(request_for(pictures))
    assert len(seen) == 3, "the others are not tried"
    assert [line["status"] for line in listed(request_for(pictures).output_folder)].count("failed") == 0
    monkeypatch.undo()
    outcome = run_map(request_for(pictures))
    assert (outcome.status.skipped, outcome.status.done, len(made(outcome.folder))) == (2, 3, 5)


def test_a_full_disk_elsewhere_is_the_failure_of_the_worker(pictures, request_for, monkeypatch):
    """As of one machine's temporary folder: another attempt goes well, and no trace of the question is left."""
    seen: list[Path] = []
    sync = worker.sync

    def full_once(path):
        seen.append(path)
        if len(seen) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/tmp/scratch")
        sync(path)

    monkeypatch.setattr(worker, "sync", full_once)
    monkeypatch.setattr(scheduler.RetryPlan, "wait", lambda self, attempt: 0.0)
    outcome = run_map(request_for(pictures))
    assert outcome.whole and (outcome.status.done, outcome.status.retried) == (5, 1)
    assert not list((outcome.folder / ".hotpath-map").glob("probe*"))


def test_what_was_half_kept_is_not_left_behind(tmp_path, monkeypatch):
    """The second of two files has no room for its name: the next attempt replaces the first one."""
    folder, job = tmp_path / "out", Job("j1", Item("a", "c"), {})
    with Manifest.open(ResultStore.manifest_path(folder), "w") as manifest:
        store = ResultStore(folder, manifest)
        for attempt in (1, 2):
            output = store.staging(job, attempt) / "output"
            output.mkdir(parents=True)
            for name in ("1.png", "2.png"):
                (output / name).write_text(f"{name} {attempt}")
            if attempt == 1:
                (folder / "a" / "2.png").mkdir(parents=True)
                real = ResultStore._make_way
                monkeypatch.setattr(ResultStore, "_make_way", lambda *_: "a")
                with pytest.raises(results.CannotKeep, match="The result a cannot be put into"):
                    store.keep(job, store.staging(job, 1), [], 1.0, 1)
                store.refuse(job, "no", 1)
                monkeypatch.setattr(ResultStore, "_make_way", real)
                (folder / "a" / "2.png").rmdir()
            else:
                store.keep(job, store.staging(job, 2), [], 1.0, 2)
        assert made(folder) == {"a/1.png": b"1.png 2", "a/2.png": b"2.png 2"}


def test_a_record_that_cannot_be_written_any_more_is_told(pictures, request_for, monkeypatch):
    def fail(*_):
        raise sqlite3.OperationalError("disk I/O error")

    monkeypatch.setattr(Manifest, "begin_commit", fail)
    with pytest.raises(OSError, match=r"manifest\.sqlite, cannot be written \(disk I/O error\): see whether its disk"):
        run_map(request_for(pictures))


def test_no_half_list_and_no_beacon_is_left(monkeypatch, tmp_path):
    def half(self, *_, **__):
        self.touch()
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", half)
        with pytest.raises(OSError, match="Input/output"), mapping._beacon(tmp_path):
            pass
        assert not list(tmp_path.glob("beacon-*"))
    monkeypatch.setattr(results.json, "dumps", lambda *_, **__: 1 / 0)
    with Manifest.open(ResultStore.manifest_path(tmp_path), "w") as manifest:
        manifest.list_item(0, "a", "a", "j")
        with pytest.raises(ZeroDivisionError):
            ResultStore(tmp_path, manifest).export()
    assert made(tmp_path) == {}


class DiesError(BaseException):
    """The process is gone: nothing after it is done."""


def test_an_item_that_kills_the_run_is_given_up(pictures, request_for, monkeypatch):
    """A single worker is the run itself, and the next run must not die of the same item for ever."""
    monkeypatch.setattr(Manifest, "none_runs", lambda self: None)
    monkeypatch.setattr(scheduler.RetryPlan, "wait", lambda self, attempt: 0.0)
    run = worker.WorkflowWorker.run

    def deadly(self, payload):
        if payload["prompt"]["1"]["inputs"]["image"] == "in/p2.png":
            raise DiesError
        return run(self, payload)

    monkeypatch.setattr(worker.WorkflowWorker, "run", deadly)
    for _ in range(2):
        with pytest.raises(DiesError):
            run_map(request_for(pictures, retries=1))
    outcome = run_map(request_for(pictures, retries=1))
    assert outcome.status.failed == 1 and len(made(outcome.folder)) == 4
    assert outcome.failures == ["in/p2.png: the run died while it ran this (attempt 2 of 2)"]


def test_an_item_is_not_to_blame_for_a_disk_that_refuses(pictures, request_for, monkeypatch):
    """Nor when nothing can be cleaned up after the run."""

    def refuse(*_):
        raise OSError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(ResultStore, "keep", refuse)
        patch.setattr(ResultStore, "_recover", lambda self: None)
        patch.setattr(ResultStore, "clean", refuse)
        with pytest.raises(OSError, match="Read-only"):
            run_map(request_for(pictures, retries=0))
    assert run_map(request_for(pictures, retries=0)).whole


def test_a_gpu_that_computes_nothing_more_ends_the_run(pictures, request_for, monkeypatch):
    """After an illegal access every item would fail at once. This process cannot be replaced, so the item counts as one
    that killed it."""
    broken: list[str] = []
    load = LoadImage.load_image

    def illegal(self, image):
        if image == "in/p2.png":
            broken.append(image)
        if broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return load(self, image)

    monkeypatch.setattr(LoadImage, "load_image", illegal)
    monkeypatch.setattr(worker, "answers", lambda device: not broken)
    monkeypatch.setattr(scheduler.RetryPlan, "wait", lambda self, attempt: 0.0)
    for _ in range(2):
        outcome = run_map(request_for(pictures, retries=1))
        assert outcome.lost is not None and outcome.lost.endswith("run the same again, and what is finished is kept")
        assert outcome.status.failed == 0 and not outcome.whole
        broken.clear()
    outcome = run_map(request_for(pictures, retries=1))
    assert outcome.status.failed == 1 and sorted(made(outcome.folder)) == ["p0.png", "p1.png", "p3.png", "p4.png"]


def test_a_device_that_gives_its_error_again_is_broken(monkeypatch):
    def asked(device):
        raise RuntimeError("CUDA error: device-side assert triggered")

    card = torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    assert worker.answers(card)
    monkeypatch.setattr(torch.cuda, "synchronize", asked)
    assert not worker.answers(card) and worker.answers(torch.device("cpu"))


def test_what_is_stopped_is_not_to_blame(pictures, request_for, monkeypatch):
    def stopped(self, payload):
        raise Interrupted("Stopped on request.")

    with monkeypatch.context() as patched:
        patched.setattr(worker.WorkflowWorker, "run", stopped)
        for _ in range(4):
            with pytest.raises(Interrupted):
                run_map(request_for(pictures, retries=0))
    assert run_map(request_for(pictures, retries=0)).whole


@pytest.mark.parametrize("moment", ["before the moves", "between the moves", "before it is confirmed"])
def test_a_crash_while_a_result_becomes_final(tmp_path, moment, monkeypatch):
    """Each moment of a power cut: afterwards the result is there once, whole, or the job is to be done again."""
    folder, job = tmp_path / "out", Job("j1", Item("a", "c"), {})

    def stage(store: ResultStore) -> Path:
        staging = store.staging(job, 1)
        for name in ("one.png", "two.png"):
            (staging / "output").mkdir(parents=True, exist_ok=True)
            (staging / "output" / name).write_text(name)
        return staging

    class PowerCutError(BaseException):
        pass

    def cut(*_):
        raise PowerCutError

    with pytest.raises(PowerCutError), Manifest.open(ResultStore.manifest_path(folder), "w") as manifest:
        store = ResultStore(folder, manifest)
        staging = stage(store)
        if moment == "before the moves":
            monkeypatch.setattr(store, "_move", cut)
        elif moment == "between the moves":
            move = store._move
            monkeypatch.setattr(store, "_move", lambda moves: (move(moves[:1]), cut()))
        else:
            monkeypatch.setattr(manifest, "end_commit", cut)
        store.keep(job, staging, [], 1.0, 1)
    with Manifest.open(ResultStore.manifest_path(folder), "w") as manifest:
        store = ResultStore(folder, manifest)
        assert store.done(job)
        assert made(folder) == {"a/one.png": b"one.png", "a/two.png": b"two.png"}
        assert not manifest.committing()


@pytest.mark.parametrize("moment", ["between two copies", "after the old result is gone"])
def test_a_crash_while_a_result_is_copied_to_another_name(tmp_path, moment, monkeypatch):
    """Afterwards there is one copy, whole, under the item's own name, and nothing of what went by that name before."""
    folder = tmp_path / "out"
    job, other = Job("j1", Item("a", "c"), {}), Job("j0", Item("b", "d"), {})

    def staged(store: ResultStore, job: Job) -> Path:
        output = store.staging(job, 1) / "output"
        output.mkdir(parents=True)
        for name in ("one.png", "two.png"):
            (output / name).write_text(f"{name} {job.id}")
        return store.staging(job, 1)

    class PowerCutError(BaseException):
        pass

    name = "b" if moment == "after the old result is gone" else "new"
    twin = Job("j1", Item(name, "c"), {})
    with pytest.raises(PowerCutError), Manifest.open(ResultStore.manifest_path(folder), "w") as manifest:
        store = ResultStore(folder, manifest)
        for each in (job, other):
            store.keep(each, staged(store, each), [], 1.0, 1)
        copy, copied = store._copy, []

        def cut(source, target):
            if copied or moment == "after the old result is gone":
                raise PowerCutError
            copied.append(target)
            copy(source, target)

        monkeypatch.setattr(store, "_copy", cut)
        store.done(twin)
    with Manifest.open(ResultStore.manifest_path(folder), "w") as manifest:
        assert ResultStore(folder, manifest).done(twin)
        found = {key: content for key, content in made(folder).items() if name == "b" or not key.startswith("b/")}
        assert found == {f"{label}/{n}.png": f"{n}.png j1".encode() for label in ("a", name) for n in ("one", "two")}


def test_a_result_that_was_lost_with_its_staging_is_done_again(tmp_path):
    folder, job = tmp_path / "out", Job("j1", Item("a", "c"), {})
    path = ResultStore.manifest_path(folder)
    with Manifest.open(path, "w") as manifest:
        ResultStore(folder, manifest)
        record = results.JobRecord("j1", "committing", 1, 1.0, None, [], [".png"])
        manifest.begin_commit(record, "a", "a", [("gone.png", "a.png")])
    with Manifest.open(path, "w") as manifest:
        assert not ResultStore(folder, manifest).done(job)
        assert manifest.job("j1") is None
