"""What is on disk: nothing lost, nothing twice, nothing of others touched, one run at a time."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hotpath.distributed import items, results, worker
from hotpath.distributed.items import FolderItems, Item, JsonLinesItems, ListItems
from hotpath.distributed.jobs import BadMap, Job
from hotpath.distributed.manifest import Manifest, ManifestInUse
from hotpath.distributed.mapping import MapOutcome, run_map
from hotpath.distributed.results import ResultStore
from hotpath.distributed.status import Status
from hotpath.host import Interrupted
from map_workflows import COPY, listed, made, picture

TEXT = {"1": {"class_type": "PreviewAny", "inputs": {"source": "nothing"}}}


def test_the_report_says_when_workers_took_no_part_and_how_many_failed(tmp_path):
    """As a machine of a cluster that had no room: the others do its work, and nobody would notice."""
    status = Status(3, done=3, peak=1)
    outcome = MapOutcome(status, tmp_path, tmp_path / "results.jsonl", "4 Ray actors", 4)
    assert "by 4 Ray actors, 1 of which came to work" in outcome.report()
    status.peak = 4
    assert len(outcome.report().splitlines()) == 1 and "came to work" not in outcome.report()
    status.failed, outcome.failures = 12, ["a: no face."]
    assert outcome.report().splitlines()[1:] == ["a: no face.", "... and 11 more; all are in results.jsonl"]


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
def test_a_result_that_cannot_have_its_name_fails_alone(pictures, request_for, headless_host, monkeypatch):
    """One is in the way of a folder, one so long that no number can be added. Others with the same content have theirs."""
    monkeypatch.setattr(Path, "exists", lambda path: os.path.exists(path))  # noqa: PTH110 - what Python 3.14 calls
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
