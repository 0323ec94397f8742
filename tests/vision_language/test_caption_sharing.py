"""Several runs on one folder: each picture is described once, whoever is killed meanwhile."""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
from hotpath import cli
from hotpath.host import Interrupted, held
from hotpath.host.unfinished import WRITING
from hotpath.vision_language import caption_sharing, captioning
from hotpath.vision_language.answering import AnswerOptions
from hotpath.vision_language.budgets import PRESETS
from hotpath.vision_language.caption_job import CaptionJob, begin
from hotpath.vision_language.caption_list import append
from hotpath.vision_language.caption_sharing import RECORD, taking_part
from hotpath.vision_language.captioning import FolderCaptioner
from hotpath.vision_language.loading import MODELS
from hotpath.vision_language.sampling import Sampling
from PIL import Image

MODEL = SimpleNamespace(device="cpu", drop_device_state=lambda: None)
KILLED = """
import sys
from pathlib import Path
from hotpath.vision_language.caption_job import CaptionJob, begin
from hotpath.vision_language.caption_sharing import taking_part
job = CaptionJob(Path(sys.argv[1]), "Describe.", output="both")
with taking_part(job) as shares:
    shares.wait_for(begin(job)[1])
    print(len(shares.take(4)), flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def folder(tmp_path, headless_host):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index in range(24):
        Image.new("RGB", (8, 8)).save(folder / f"p{index:02}.png")
    return folder


@pytest.fixture
def described(monkeypatch):
    """The names of what a model was asked about, which calls each picture what its file is called. A name in `without` has no
    answer, and one in `broken` raises in the threads named there."""
    asked = SimpleNamespace(names=[], without=set(), broken={}, sizes=[])
    of_question = {}
    prepare = FolderCaptioner._prepare

    def remembered(self, paths):
        ready, failed = prepare(self, paths)
        of_question.update({id(question): path.name for path, (question, _) in ready.items()})
        return ready, failed

    def answer(model, questions, *_):
        names = [of_question[id(question)] for question in questions]
        if asked.broken.get(threading.current_thread().name, set()) & set(names):
            raise RuntimeError("the card is broken")
        asked.names += names
        asked.sizes.append(len(names))
        time.sleep(0.01)
        texts = ["" if name in asked.without else f"it is {name}" for name in names]
        return [SimpleNamespace(text=it, thoughts="", tokens=1, finished=True, report="", notes=()) for it in texts]

    monkeypatch.setattr(FolderCaptioner, "_prepare", remembered)
    monkeypatch.setattr(captioning, "answer", answer)
    monkeypatch.setattr(captioning, "look_up", lambda *_: [])
    monkeypatch.setattr(captioning, "Timing", lambda _: None)
    monkeypatch.setattr(captioning, "LOOK", 0.02)
    return asked


def run(job, shares=None):
    return FolderCaptioner(MODEL, job, Sampling(), AnswerOptions(16, PRESETS["fast"])).run(shares)


def together(*jobs):
    """What each of the jobs came to, all begun at once, in threads called by their number."""
    found = [None] * len(jobs)
    start = threading.Barrier(len(jobs))

    def work(index):
        start.wait()
        found[index] = run(jobs[index])

    threads = [threading.Thread(target=work, args=(index,), name=str(index)) for index in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def names_in_list(folder):
    return [json.loads(line)["file"] for line in (folder / "captions.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("overwrite", [False, True])
def test_runs_share_a_folder(folder, described, overwrite):
    job = CaptionJob(folder, "Describe.", output="both", overwrite=overwrite)
    pictures = sorted(path.name for path in folder.glob("*.png"))
    for name in pictures[:3]:
        (folder / name).with_suffix(".txt").write_text("old")
        append(folder, {"file": name, "caption": "old"})
    found = together(*(replace(job, batch_size=size) for size in (1, 2, 3, 2)))
    waited = pictures if overwrite else pictures[3:]
    assert Counter(described.names) == Counter(waited)
    for summary in found:
        assert len(summary.captions) + len(summary.elsewhere) == len(waited) and not summary.failed
        assert list(summary.all_captions()) == [folder / name for name in pictures]
        assert f"{len(summary.elsewhere)} captioned by other runs meanwhile" in summary.report()
        assert all(text == f"it is {path.name}" for path, text in summary.elsewhere.items())
    assert names_in_list(folder) == pictures and not list(folder.glob(".*"))
    assert all((folder / name).with_suffix(".txt").read_text() == f"it is {name}" for name in waited)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="kills as POSIX does")
def test_what_a_killed_run_had_begun_is_taken_over(folder, described, headless_host, caplog, monkeypatch):
    job = CaptionJob(folder, "Describe.", output="both", batch_size=3)
    pictures = sorted(path.name for path in folder.glob("*.png"))
    command = [sys.executable, "-c", KILLED, str(folder)]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout is not None and other.stdout.readline() == b"4\n"
    monkeypatch.setattr(captioning, "PATIENCE", 0.05)

    def end():
        (folder / pictures[0]).with_suffix(".txt").write_text("written")  # which it had no time to tell of
        append(folder, {"file": pictures[0], "caption": "written"})
        other.kill()

    with caplog.at_level(logging.WARNING):
        threading.Timer(0.6, end).start()
        summary = run(job)
    assert "busy with 4 pictures for long, such as p00.png" in caplog.text
    assert any("waiting for 4 that other runs have begun: p00.png" in text for _, text in headless_host.texts)
    other.communicate()
    assert sorted(described.names) == pictures[1:] and described.names[-3:] == pictures[1:4]
    assert summary.present == {folder / pictures[0]: "written"} and "waiting" not in summary.report()
    assert names_in_list(folder) == pictures and not list(folder.glob(".*"))


def test_one_who_waits_can_be_stopped(folder, described, headless_host, monkeypatch):
    job = CaptionJob(folder, "Describe.")
    with taking_part(job) as shares:
        shares.wait_for(begin(job)[1])
        assert len(shares.take(100)) == 24
        monkeypatch.setattr(captioning.time, "sleep", lambda _: headless_host.stop())
        with pytest.raises(Interrupted):
            run(job)
    assert not described.names and not list(folder.glob(".*"))


def test_what_fails_in_one_run_is_left_to_others(folder, described):
    """Else one broken card would go through a whole folder. What a model has no caption for is not asked again."""
    described.broken = {"0": {path.name for path in folder.glob("*")}}
    described.without = {"p05.png"}
    job = CaptionJob(folder, "Describe.", batch_size=2)
    broken, whole = together(job, job)
    assert len(described.names) == 24 and len(whole.captions) == 23 and not broken.captions
    assert {path.name for path in whole.failed} == {"p05.png"}
    assert not broken.failed.keys() & broken.elsewhere.keys(), "what others did later is done"
    assert len(broken.failed) + len(broken.elsewhere) == 24


def test_two_who_failed_do_not_wait_for_each_other(folder):
    job = CaptionJob(folder, "Describe.", pattern="p0[01]*")
    with taking_part(job) as first, taking_part(job) as second:
        for shares in (first, second):
            shares.wait_for(begin(job)[1])
        (one,), (two,) = [shares.take(1) for shares in (first, second)]
        first.leave([one])
        second.leave([two])
        assert first.take(1) == [] and second.take(1) == [one] and first.take(1) == [two]
        second.done(one)
        second.end()
        assert first.take(1) == [] and not first.left


@pytest.mark.parametrize("output", ["txt", "jsonl", "both"])
def test_what_has_its_caption_by_now_is_not_described(folder, described, output):
    job = CaptionJob(folder, "Describe.", output=output)
    summary, waiting = begin(job)
    run(job)
    with taking_part(job) as shares:
        shares.wait_for(waiting)
        assert shares.take(8) == [] and not shares.left and shares.note_in(summary) == 24
    assert list(summary.present) == waiting and len(described.names) == 24


def test_the_last_pictures_are_spread(folder):
    job = CaptionJob(folder, "Describe.")
    with taking_part(job) as first, taking_part(job) as second, taking_part(replace(job, output="jsonl")):
        for shares in (first, second):
            shares.wait_for(begin(job)[1])
        assert len(first.take(8)) == 8 and len(first.take(8, ahead=True)) == 8
        assert first.take(8, ahead=True) == []
        assert [len(second.take(8)) for _ in range(4)] == [4, 2, 1, 1]
        assert first.take(8) == [] and len(first.left) == 8
        second.end()
        assert first.take(8) == [path for path in sorted(folder.iterdir()) if path.suffix == ".png"][16:]


def test_who_asks_otherwise_shares_nothing_that_is_written_anew(folder):
    job = CaptionJob(folder, "Describe.", overwrite=True)
    alike = replace(job, batch_size=3, pattern="*.png", recursive=True)
    for other in (replace(job, prompt="Name it."), replace(job, overwrite=False)):
        assert other.work != job.work
    assert alike.work == job.work and replace(job, overwrite=False, prompt="Name it.").work == "txt"


def test_what_others_do_while_a_model_is_loaded_is_done(folder, described, monkeypatch, capsys):
    def load(*_):
        run(CaptionJob(folder, "Describe.", output="jsonl", overwrite=True))
        return MODEL

    append(folder, {"file": "p07.png", "caption": "old"})
    monkeypatch.setattr(MODELS, "get", load)
    options = ["--prompt", "Describe.", "--format", "jsonl", "--overwrite"]
    assert cli.main(["caption", str(folder), "--model", "x", *options]) == 0
    assert len(described.names) == 24 and "24 captioned by other runs meanwhile" in capsys.readouterr().out
    assert names_in_list(folder) == sorted(described.names) and not list(folder.glob(".*"))


def test_what_killed_runs_left_goes_also_when_nothing_waits(folder, described, capsys):
    for path in folder.glob("*.png"):
        path.with_suffix(".txt").write_text("old")
    for name in (RECORD, f"{RECORD}-{'0' * 32}"):
        (folder / name).write_text(
            '{"run": "' + "0" * 32 + '", "work": "txt", "begins": true, "takes": ["p00.png"]}\n{"run'
        )
    (folder / f"{WRITING}x").touch()
    os.utime(folder / f"{WRITING}x", (1, 1))
    kept = folder / f"{RECORD}-mine"
    kept.touch()
    assert cli.main(["caption", str(folder), "--model", "x"]) == 0
    assert list(folder.glob(".*")) == [kept] and "24 skipped" in capsys.readouterr().out


@pytest.mark.parametrize(
    "line", [b'{"run": "../../x", "work": "txt", "takes": ["p00.png"]}', b"[1]", b"\xff", b'{"run']
)
def test_a_record_is_not_trusted(folder, described, line):
    job = CaptionJob(folder, "Describe.", pattern="p0*")
    with taking_part(job) as shares:
        with (folder / RECORD).open("ab") as file:
            file.write(line)
        summary = run(job, shares)
    assert len(summary.captions) == 10 and not list(folder.parent.glob("x"))


@pytest.mark.skipif(os.name != "posix", reason="locks as POSIX has them")
def test_on_a_disk_without_locks_nothing_is_lost(folder, described, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(held, "fcntl", SimpleNamespace(**vars(held.fcntl) | {"flock": refuse, "fcntl": refuse}))
    for summary in together(*[CaptionJob(folder, "Describe.", batch_size=2)] * 3):
        assert len(summary.all_captions()) == 24
    assert set(described.names) == {path.name for path in folder.glob("*.png")}


def test_a_disk_that_is_full_loses_no_report(folder, described, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(caption_sharing.Shares, "end", full)
    summary = run(CaptionJob(folder, "Describe.", output="jsonl"))
    assert len(summary.captions) == 24 and "captions.jsonl keeps older lines too" in summary.report()
