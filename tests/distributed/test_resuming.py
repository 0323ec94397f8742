"""What is on disk: nothing lost, nothing twice, nothing of others touched, one run at a time."""

from __future__ import annotations

import errno
import json
import os
import sqlite3
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hotpath.distributed import items, results, scheduler, worker
from hotpath.distributed.items import FolderItems, Item, JsonLinesItems, ListItems
from hotpath.distributed.jobs import BadMap, Job
from hotpath.distributed.manifest import Manifest, ManifestInUse
from hotpath.distributed.mapping import MapOutcome, run_map
from hotpath.distributed.results import ResultStore
from hotpath.distributed.scheduler import DiskFull
from hotpath.distributed.status import Status
from hotpath.headless.core_nodes import LoadImage
from hotpath.host import Interrupted
from map_workflows import COPY, listed, made, picture

TEXT = {"1": {"class_type": "PreviewAny", "inputs": {"source": "nothing"}}}


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


def test_the_report_says_when_workers_took_no_part(tmp_path):
    """As a machine of a cluster that had no room: the others do its work, and nobody would notice."""
    status = Status(3, done=3, peak=1)
    outcome = MapOutcome(status, tmp_path, tmp_path / "results.jsonl", "4 Ray actors", 4)
    assert "by 4 Ray actors, 1 of which came to work" in outcome.report()
    status.peak = 4
    assert "came to work" not in outcome.report()


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


@pytest.mark.skipif(os.name != "posix", reason="names of 255 bytes are POSIX's")
def test_names_as_long_as_a_name_can_be(pictures, request_for):
    """And one of them a copy of another, whose result is copied."""
    for end in "ab":
        (pictures / (end * 251 + ".png")).write_bytes((pictures / "p0.png").read_bytes())
    outcome = run_map(request_for(pictures))
    assert outcome.whole and len(made(outcome.folder)) == 7


def test_a_worker_of_an_earlier_run_writes_elsewhere(tmp_path):
    """One on a machine that was cut off goes on with its job until it learns that the run is over."""
    job, path = Job("j1", Item("a", "c"), {}), ResultStore.manifest_path(tmp_path / "out")
    stagings = []
    for _ in range(2):
        with Manifest.open(path, "w") as manifest:
            stagings.append(ResultStore(tmp_path / "out", manifest).staging(job, 1))
    assert stagings[0] != stagings[1]


class Watch:
    """Stops a run once `after` items are done."""

    def __init__(self, after: int) -> None:
        self.after, self.done = after, 0

    def changed(self, status) -> None:
        self.done = status.done

    def check(self) -> None:
        if self.done >= self.after:
            raise Interrupted("Stopped on request.")


def test_a_run_its_list_and_its_files(pictures, request_for):
    (pictures / "bad.png").write_text("no picture")
    (pictures / "copy.png").write_bytes((pictures / "p0.png").read_bytes())
    outcome = run_map(request_for(pictures))
    assert (outcome.status.done, outcome.status.skipped, outcome.status.failed) == (5, 1, 1)
    assert not outcome.whole
    assert "in/bad.png: LoadImage (#1): bad.png is not a picture that can be read." in outcome.report()
    lines = listed(outcome.folder)
    assert [line["name"] for line in lines] == ["bad", "copy", "p0", "p1", "p2", "p3", "p4"]
    assert lines[0]["status"] == "failed" and lines[0]["files"] == []
    assert [line["files"] for line in lines[1:]] == [[f"{name}.png"] for name in ("copy", "p0", "p1", "p2", "p3", "p4")]
    assert sorted(made(outcome.folder)) == ["copy.png", "p0.png", "p1.png", "p2.png", "p3.png", "p4.png"]
    assert not list((outcome.folder / ".hotpath-map").glob("beacon*"))
    assert not (outcome.folder / ".hotpath-map" / "staging").exists()


def test_nothing_is_done_twice(pictures, request_for):
    first = run_map(request_for(pictures))
    before = {path: path.stat().st_mtime_ns for path in first.folder.glob("*.png")}
    again = run_map(request_for(pictures))
    assert (again.status.done, again.status.skipped) == (0, 5) and again.whole
    assert {path: path.stat().st_mtime_ns for path in first.folder.glob("*.png")} == before
    picture(pictures / "new.png", 99)
    (first.folder / "p1.png").unlink()
    picture(pictures / "p2.png", 98)
    whole = made(run_map(request_for(pictures, "other")).folder)
    third = run_map(request_for(pictures))
    assert (third.status.done, third.status.skipped) == (3, 3), "a new one, a deleted result, a changed picture"
    assert made(third.folder) == whole


def test_an_interrupt_leaves_what_is_done(pictures, request_for):
    watch = Watch(2)
    with pytest.raises(Interrupted):
        run_map(request_for(pictures), watch, watch.check)
    folder = request_for(pictures).output_folder
    states = [line["status"] for line in listed(folder)]
    assert states.count("done") == 2 and states.count("waiting") >= 1
    assert len(made(folder)) == 2
    rest = run_map(request_for(pictures))
    assert (rest.status.done, rest.status.skipped) == (3, 2)
    assert made(rest.folder) == made(run_map(request_for(pictures, "at once")).folder)


def test_text_becomes_a_file_beside_the_list(request_for, tmp_path):
    outcome = run_map(request_for(ListItems("a cat\nzwei Hunde\na cat"), graph=TEXT, target="1.source"))
    files = made(outcome.folder)
    assert sorted(files.values()) == [b"a cat\n", b"zwei Hunde\n"]
    assert all(name.startswith(("a-cat-", "zwei-hunde-")) for name in files)
    assert [line["texts"] for line in listed(outcome.folder)] == [["a cat"], ["zwei Hunde"], ["a cat"]]


def test_what_is_only_shown_is_kept(pictures, request_for, monkeypatch):
    """A workflow that ends in a preview computed everything and left nothing."""
    for name in ("p1.png", "p3.png", "p4.png"):
        (pictures / name).unlink()
    shown = {"1": COPY["1"], "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}}}
    outcome = run_map(request_for(pictures, graph=shown))
    assert outcome.whole and list(made(outcome.folder)) == ["p0.png", "p2.png"]
    both = {**COPY, "3": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}}}
    assert len(made(run_map(request_for(pictures, "both", both)).folder)) == 2, "what is saved is all that is kept"
    said = {**shown, "3": {"class_type": "PreviewAny", "inputs": {"source": "words"}}}
    assert sorted(made(run_map(request_for(pictures, "said", said)).folder))[0] == "p0.txt"
    monkeypatch.setattr(worker, "keep_previews", lambda *_: None)
    outcome = run_map(request_for(pictures, "nothing", shown))
    assert outcome.status.failed == 2 and "gave neither a file nor a text for p0: end it in a node" in outcome.report()


def test_lines_of_a_list_fail_alone(request_for, tmp_path):
    (tmp_path / "l.jsonl").write_text('{"1.source": "one"}\nbroken\n{"7.source": "x"}\n{"PreviewAny.source": "two"}\n')
    outcome = run_map(request_for(JsonLinesItems(tmp_path / "l.jsonl"), graph=TEXT))
    lines = listed(outcome.folder)
    assert [line["status"] for line in lines] == ["done", "failed", "failed", "done"]
    assert "line 2 is not JSON" in lines[1]["error"] and "there is no node called '7'" in lines[2]["error"]


def test_unchanged_pictures_are_not_read_again(pictures, request_for, monkeypatch):
    """Going through what is done of a large folder costs names and times, not all its bytes."""
    monkeypatch.setattr(items, "FRESH", 0.0)
    run_map(request_for(pictures))
    read: list[str] = []
    digest = items.file_digest
    monkeypatch.setattr(items, "file_digest", lambda path: (read.append(path.name), digest(path))[1])
    picture(pictures / "p3.png", 77)
    again = run_map(request_for(pictures))
    assert read.count("p3.png") == 1 and set(read) == {"p0.png", "p3.png"}, "the first one is looked at beforehand"
    assert (again.status.done, again.status.skipped) == (1, 4)


def test_a_picture_that_was_just_written_is_read_again(pictures, headless_host, tmp_path):
    """It may be written once more with the same time, which nothing would show."""
    path = ResultStore.manifest_path(tmp_path / "out")
    with Manifest.open(path, "w") as manifest:
        found = [item.content for item in FolderItems(pictures, headless_host.input_folder()).knowing(manifest)]
        rows = manifest._db.execute("SELECT count(*) FROM digests").fetchone()
    assert len(set(found)) == 5 and rows == (0,)


def test_results_do_not_go_among_the_items(pictures, request_for, tmp_path):
    with pytest.raises(BadMap, match="the next run would take them for items"):
        run_map(replace(request_for(pictures), output_folder=pictures))
    assert len(list(pictures.iterdir())) == 5


def test_an_output_folder_that_is_none(pictures, request_for, tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(BadMap, match=r"Nothing can be written to .*out: "):
        run_map(request_for(pictures))


@pytest.mark.skipif(os.name != "posix", reason="names of 255 bytes are POSIX's")
def test_a_result_that_cannot_have_its_name_fails_alone(pictures, request_for, headless_host):
    """One is in the way of a folder, one so long that no number can be added. Others with the same content have theirs."""
    for name in ("sub/x.png", "then/x.png"):
        picture(pictures / name, 71)
    picture(pictures / ("a" * 251 + ".png"), 72)
    picture(pictures / "sub" / "p0.png", 0)
    source = FolderItems(pictures, headless_host.input_folder(), recursive=True)
    out = request_for(source).output_folder
    out.mkdir()
    (out / "sub").write_text("mine")
    (out / ("a" * 251 + ".png")).write_text("mine")
    first = run_map(request_for(source))
    assert (first.status.done, first.status.skipped, first.status.failed) == (6, 0, 3)
    found = {line["name"]: (line["status"], line["files"]) for line in listed(out)}
    assert found["p0"] == ("done", ["p0.png"]) and found["then/x"] == ("done", ["then/x.png"])
    assert found["sub/p0"] == found["sub/x"] == ("failed", [])
    assert "The result sub/x cannot be put into" in first.report() and "File name too long" in first.report()
    assert (out / "sub").read_text() == "mine"
    for name in ("sub", "a" * 251 + ".png"):
        (out / name).unlink()
    second = run_map(request_for(source))
    assert (second.status.done, second.status.skipped) == (1, 8) and second.whole
    names = [*(f"p{i}" for i in range(5)), "sub/p0", "sub/x", "then/x", "a" * 251]
    assert sorted(made(out)) == sorted(f"{name}.png" for name in names)


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


def test_files_of_others_are_never_touched(pictures, request_for):
    folder = request_for(pictures).output_folder
    mine = picture(folder / "p1.png", 1234)
    before = mine.read_bytes()
    outcome = run_map(request_for(pictures))
    assert mine.read_bytes() == before
    assert "p1-2.png" in made(folder)
    assert run_map(request_for(pictures)).status.skipped == 5
    assert [line["files"] for line in listed(outcome.folder)][1] == ["p1-2.png"]


def test_many_files_of_an_item_go_into_a_folder(pictures, request_for):
    graph = {**COPY, "3": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "sub/again"}}}
    outcome = run_map(request_for(pictures, graph=graph))
    assert sorted(made(outcome.folder))[:2] == ["p0/copy_00001_.png", "p0/sub/again_00001_.png"]
    assert len(made(outcome.folder)) == 10


def test_an_unchanged_output_node_writes_for_every_item(pictures, request_for, headless_host):
    """A branch that no item reaches is not computed again, but its file belongs to every item."""
    picture(headless_host.input_folder() / "same.png", 5)
    graph = {
        **COPY,
        "3": {"class_type": "LoadImage", "inputs": {"image": "same.png"}},
        "4": {"class_type": "SaveImage", "inputs": {"images": ["3", 0], "filename_prefix": "same"}},
    }
    outcome = run_map(request_for(pictures, graph=graph, target="1.image"))
    assert sorted(made(outcome.folder)) == sorted(f"p{i}/{n}_00001_.png" for i in range(5) for n in ("copy", "same"))


def test_another_workflow_is_refused_and_restart_replaces(pictures, request_for):
    run_map(request_for(pictures))
    other = json.loads(json.dumps(COPY))
    other["2"]["inputs"]["filename_prefix"] = "else"
    with pytest.raises(BadMap, match=r"holds results of another workflow.*--restart"):
        run_map(request_for(pictures, graph=other))
    outcome = run_map(request_for(pictures, graph=other, restart=True))
    assert outcome.status.done == 5 and len(made(outcome.folder)) == 5


def test_a_restart_replaces_results_of_another_kind(pictures, request_for):
    """Where a picture was is a text then, and not both; what was not begun anew is waiting."""
    text = {"1": COPY["1"], "2": {"class_type": "PreviewAny", "inputs": {"source": ["1", 1]}}}
    run_map(request_for(pictures))
    outcome = run_map(request_for(pictures, graph=text, restart=True))
    assert sorted(made(outcome.folder)) == [f"p{i}.txt" for i in range(5)]
    watch = Watch(2)
    with pytest.raises(Interrupted):
        run_map(request_for(pictures, graph=text, restart=True), watch, watch.check)
    states = [line["status"] for line in listed(outcome.folder)]
    assert states.count("done") == 2 and set(states) == {"done", "waiting"}
    assert run_map(request_for(pictures, graph=text)).status.done == 3


def test_two_runs_in_one_folder(pictures, request_for):
    request = request_for(pictures)
    path = ResultStore.manifest_path(request.output_folder)
    with Manifest.open(path, "x"):
        code = (
            "import sqlite3, sys\n"
            f"db = sqlite3.connect({str(path)!r}, timeout=0, isolation_level=None)\n"
            "try:\n    db.execute('BEGIN EXCLUSIVE')\nexcept sqlite3.OperationalError as e:\n    sys.exit(str(e))\n"
        )
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert "locked" in other.stderr
        with pytest.raises(ManifestInUse, match="Another run works in"):
            run_map(request)
    with Manifest.open(path, "x"):
        """The lock ends with the run."""


def test_a_damaged_record_is_named(pictures, request_for):
    request = request_for(pictures)
    path = ResultStore.manifest_path(request.output_folder)
    path.parent.mkdir(parents=True)
    path.write_bytes(b"not a database, " * 100)
    with pytest.raises(BadMap, match=r"manifest\.sqlite, is damaged .* delete it"):
        run_map(request)


@pytest.mark.parametrize("texts", ["CAST(x'ff' AS TEXT)", "'[\"cut off'"])
def test_damage_that_is_found_while_it_runs_is_named(tmp_path, texts):
    path = tmp_path / "manifest.sqlite"
    with (
        pytest.raises(BadMap, match=r"manifest\.sqlite, is damaged .* delete it"),
        Manifest.open(path, "w") as manifest,
    ):
        manifest.begin("j", 1)
        manifest._db.execute(f"UPDATE jobs SET texts = {texts}")
        manifest.job("j")


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


def test_a_list_cannot_lead_out_of_the_output_folder(tmp_path):
    with Manifest.open(ResultStore.manifest_path(tmp_path / "out"), "w") as manifest:
        store = ResultStore(tmp_path / "out", manifest)
        job = Job("j", Item("../../etc/x", "c"), {})
        (store.staging(job, 1) / "output").mkdir(parents=True)
        (store.staging(job, 1) / "output" / "x.png").write_text("x")
        with pytest.raises(ValueError, match="leads out of"):
            store.keep(job, store.staging(job, 1), [], 1.0, 1)


@pytest.mark.parametrize("kept", ["moves", "name", "another's name", "statement"])
def test_a_record_from_elsewhere_reaches_nothing_outside(tmp_path, kept):
    """Whoever can put files into the output folder, as a browser can, can put a record there."""
    folder, secret = tmp_path / "out", tmp_path / "secret.png"
    secret.write_text("mine")
    path = ResultStore.manifest_path(folder)
    with Manifest.open(path, "w") as manifest:
        record = results.JobRecord("j1", "committing", 1, 1.0, None, [], [".png"])
        moves = [("../secret.png", "../stolen.png")] if kept == "moves" else []
        manifest.begin_commit(record, "a", "../secret", moves)
        if kept != "moves":
            manifest.end_commit("j1")
    if kept == "statement":
        with sqlite3.connect(path) as db:
            db.execute("CREATE TRIGGER t AFTER INSERT ON items BEGIN DELETE FROM jobs; END")
        db.close()
    said = "more than tables" if kept == "statement" else "names '../secret.png', which lies outside"
    with pytest.raises(BadMap, match=said), Manifest.open(path, "w") as manifest:
        ResultStore(folder, manifest).done(Job("j1", Item("b" if kept == "another's name" else "a", "c"), {}))
    assert [file.name for file in tmp_path.glob("*.png")] == ["secret.png"] and secret.read_text() == "mine"
    assert [file.name for file in folder.iterdir()] == [results.WORK]


def test_the_record_is_a_plain_database(pictures, request_for):
    outcome = run_map(request_for(pictures))
    with sqlite3.connect(ResultStore.manifest_path(outcome.folder)) as db:
        assert db.execute("SELECT count(*) FROM jobs WHERE state = 'done'").fetchone() == (5,)
    db.close()


def test_an_empty_folder(request_for, headless_host):
    folder = headless_host.input_folder() / "empty"
    folder.mkdir(parents=True)
    with pytest.raises(BadMap, match=r"nothing to map over: .*empty holds no picture \(\.png"):
        run_map(request_for(FolderItems(folder, headless_host.input_folder())))
