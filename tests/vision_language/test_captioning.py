"""Folders of pictures: batches, resuming, failures; and the demo captioner, which really names what is drawn."""

from __future__ import annotations

import errno
import gc
import json
import shutil
import weakref
from dataclasses import replace

import numpy as np
import pytest
from film_files import frames, write_film
from hotpath.demo import train_captioner
from hotpath.host import Interrupted
from hotpath.vision_language.answering import AnswerOptions
from hotpath.vision_language.budgets import PRESETS
from hotpath.vision_language.caption_job import CaptionJob, files_in, place
from hotpath.vision_language.captioning import FolderCaptioner
from hotpath.vision_language.loaded_model import LoadOptions
from hotpath.vision_language.loading import MODELS
from hotpath.vision_language.pictures import read_clip
from hotpath.vision_language.prompts import Question
from hotpath.vision_language.sampling import Sampling
from PIL import Image

GREEDY = Sampling(sample=False)
DEMO = train_captioner.FOLDER
OPTIONS = AnswerOptions(16, PRESETS["fast"])


@pytest.fixture
def captioner(llm):
    shutil.copytree(DEMO, llm / "hotpath-captioner")
    return MODELS.get("hotpath-captioner", LoadOptions())


@pytest.fixture
def drawings(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    made = {}
    for index in range(5):
        drawing = train_captioner.draw(np.random.default_rng(777_000 + index))
        drawing.picture.save(folder / f"p{index}.png")
        made[folder / f"p{index}.png"] = drawing.caption
    return made


def test_the_demo_captioner_names_what_is_drawn(captioner, tmp_path):
    """Held-out pictures, through the loading, processing, batching and decoding that any model goes through."""
    folder = tmp_path / "held-out"
    folder.mkdir()
    wanted = {}
    for index in range(60):
        drawing = train_captioner.draw(np.random.default_rng(555_000 + index))
        drawing.picture.save(folder / f"{index:03}.png")
        wanted[folder / f"{index:03}.png"] = drawing.caption
    job = CaptionJob(folder, "Describe this image.", train_captioner.SYSTEM, batch_size=20)
    summary = FolderCaptioner(captioner, job, GREEDY, AnswerOptions(16, PRESETS["fast"], decode="static")).run()
    right = sum(summary.captions[path] == caption for path, caption in wanted.items())
    assert right >= 57, f"{right} of 60"
    assert sum(f.stat().st_size for f in DEMO.iterdir()) < 6 * 2**20


def test_a_video_gets_one_caption(captioner, drawings, ask):
    paths = list(drawings)
    folder = paths[0].parent
    for path in paths[1:]:
        path.unlink()
    long, short, broken = (folder / name for name in ("long.mp4", "short.MKV", "broken.webm"))
    write_film(long, frames(6, 32, 48), sound=False, rate=2)
    write_film(short, frames(2, 48, 32, seed=1), sound=False, rate=2)
    broken.write_bytes(b"no video")
    brief = AnswerOptions(3, PRESETS["fast"])
    job = CaptionJob(folder, "Describe this image.", media="pictures and videos", max_frames=3)
    summary = FolderCaptioner(captioner, job, GREEDY, brief).run()
    assert set(summary.captions) == {paths[0], long, short}
    assert "cannot be read as a video" in summary.failed[broken]
    for path, seen in ((long, 3), (short, 2)):
        clip = read_clip(path, 2.0, 3)
        assert len(clip.frames) == seen and clip.seconds()[-1] == (2.0 if path is long else 0.5)
        alone = ask(captioner, Question(job.prompt, "", (), (clip,)), max_new_tokens=3)
        assert path.with_suffix(".txt").read_text(encoding="utf-8") == alone.text
    assert FolderCaptioner(captioner, replace(job, media="videos"), GREEDY, OPTIONS).run().skipped == 2
    assert FolderCaptioner(captioner, replace(job, media="pictures"), GREEDY, OPTIONS).run().skipped == 1
    with pytest.raises(ValueError, match="'films' is nothing to caption: choose pictures, videos,"):
        FolderCaptioner(captioner, replace(job, media="films"), GREEDY, OPTIONS)


def test_captions_lie_beside_the_pictures_and_a_second_run_does_nothing(captioner, drawings):
    folder = next(iter(drawings)).parent
    job = CaptionJob(folder, "Caption this picture.", batch_size=2, before="shapes, ")
    summary = FolderCaptioner(captioner, job, GREEDY, OPTIONS).run()
    for path, caption in drawings.items():
        assert path.with_suffix(".txt").read_text(encoding="utf-8") == f"shapes, {caption}"
    assert len(summary.captions) == 5 and not summary.failed
    again = FolderCaptioner(captioner, job, GREEDY, OPTIONS).run()
    assert again.skipped == 5 and not again.captions
    one = next(iter(drawings)).with_suffix(".txt")
    one.unlink()
    assert list(FolderCaptioner(captioner, job, GREEDY, OPTIONS).run().captions) == [one.with_suffix(".png")]
    assert not list(folder.glob(".*"))


def test_jsonl_resumes_after_a_cut_line(captioner, drawings):
    folder = next(iter(drawings)).parent
    first, second = list(drawings)[:2]
    (folder / "captions.jsonl").write_text(
        json.dumps({"file": first.name, "caption": "kept"}) + "\n" + json.dumps({"file": second.name, "error": "x"})
        + "\n" + '{"file": "p3.png", "capt\n'
    )  # fmt: skip
    job = CaptionJob(folder, "Caption this picture.", output="jsonl")
    summary = FolderCaptioner(captioner, job, GREEDY, OPTIONS).run()
    assert summary.skipped == 1 and len(summary.captions) == 4
    lines = [
        json.loads(line)
        for line in (folder / "captions.jsonl").read_text().splitlines()
        if "capt\n" not in line and line.endswith("}")
    ]
    found = {line["file"]: line["caption"] for line in lines if "caption" in line}
    assert found == {path.name: caption for path, caption in drawings.items()} | {first.name: "kept"}
    assert not list(folder.glob("*.txt"))


def test_a_bad_picture_is_recorded_and_the_others_go_on(captioner, drawings):
    folder = next(iter(drawings)).parent
    (folder / "broken.png").write_bytes(b"no picture")
    (folder / "thin.png").write_bytes(b"")
    Image.new("RGB", (2000, 2)).save(folder / "narrow.png")
    Image.new("RGB", (96, 96)).save(folder / "p0.jpg")
    job = CaptionJob(folder, "Caption this picture.", output="both", batch_size=3)
    summary = FolderCaptioner(captioner, job, GREEDY, OPTIONS).run()
    assert {path.name for path in summary.failed} == {"broken.png", "thin.png", "narrow.png", "p0.png"}
    assert "same caption file p0.txt" in summary.failed[folder / "p0.png"]
    assert len(summary.captions) == 5
    lines = [json.loads(line) for line in (folder / "captions.jsonl").read_text().splitlines()]
    assert {line["file"] for line in lines if "error" in line} >= {"broken.png", "thin.png", "narrow.png"}
    assert "broken.png: it is no picture that can be read" in summary.report()
    assert FolderCaptioner(captioner, job, GREEDY, OPTIONS).run().failed.keys() == summary.failed.keys()
    again = [json.loads(line)["file"] for line in (folder / "captions.jsonl").read_text().splitlines()]
    assert len(again) == len(set(again)) == len(lines)


def test_a_batch_that_fails_is_tried_one_by_one(captioner, drawings, monkeypatch):
    from hotpath.vision_language import captioning

    real, sizes = captioning.answer, []

    def picky(model, questions, *rest):
        sizes.append(len(questions))
        if len(questions) > 1 or len(sizes) == 2:
            raise RuntimeError("the device is full")
        return real(model, questions, *rest)

    monkeypatch.setattr(captioning, "answer", picky)
    folder = next(iter(drawings)).parent
    summary = FolderCaptioner(captioner, CaptionJob(folder, "Caption this picture."), GREEDY, OPTIONS).run()
    assert sizes == [5, 1, 1, 1, 1, 1]
    assert len(summary.captions) == 4 and "device is full" in next(iter(summary.failed.values()))


def test_what_a_failed_batch_held_is_free_for_its_pictures(captioner, drawings, monkeypatch):
    from hotpath.vision_language import answering

    real, held, alive = answering.start, [], []

    def full(model, path, prompts, *rest):
        alive.append(sum(it() is not None for it in held))
        begun = real(model, path, prompts, *rest)
        held.append(weakref.ref(begun.logits))
        if len(prompts) > 1:
            held.append(weakref.ref(begun.runner))
            raise RuntimeError("the device is full")
        return begun

    monkeypatch.setattr(answering, "start", full)
    folder = next(iter(drawings)).parent
    gc.collect()
    gc.disable()
    try:
        summary = FolderCaptioner(captioner, CaptionJob(folder, "Caption this picture."), GREEDY, OPTIONS).run()
    finally:
        gc.enable()
    assert len(summary.captions) == 5 and alive == [0] * 6


def test_an_interrupted_job_keeps_what_was_written(captioner, drawings, headless_host, monkeypatch):
    from hotpath.host import Interrupted

    folder = next(iter(drawings)).parent
    job = CaptionJob(folder, "Caption this picture.", batch_size=2)
    work = FolderCaptioner(captioner, job, GREEDY, OPTIONS)
    write = work._write

    def stopping(path, caption, summary):
        write(path, caption, summary)
        headless_host.stop()

    monkeypatch.setattr(work, "_write", stopping)
    with pytest.raises(Interrupted):
        work.run()
    assert len(list(folder.glob("*.txt"))) == 2
    headless_host.clear_stop()
    assert FolderCaptioner(captioner, job, GREEDY, OPTIONS).run().skipped == 2


def test_where_folders_lie(tmp_path):
    assert place(tmp_path, " set ") == tmp_path / "set"
    assert place(tmp_path, str(tmp_path / "other")) == tmp_path / "other"
    assert place(tmp_path, "") == tmp_path
    with pytest.raises(ValueError, match="leads out of"):
        place(tmp_path, "a/../../b")
    for name in ("a\0b", "\ud800", "x" * 256):
        with pytest.raises(ValueError, match="is no name that a folder can have"):
            place(tmp_path, name)


def test_only_names_that_fit(captioner, drawings):
    folder = next(iter(drawings)).parent
    job = CaptionJob(folder, "Caption this picture.", pattern="p[12].*")
    assert [path.name for path in FolderCaptioner(captioner, job, GREEDY, OPTIONS).run().captions] == [
        "p1.png",
        "p2.png",
    ]


def test_captions_can_go_elsewhere(captioner, drawings, tmp_path):
    folder = next(iter(drawings)).parent
    (folder / "deep").mkdir()
    (folder / "p0.png").rename(folder / "deep" / "p0.png")
    job = CaptionJob(folder, "Caption this picture.", output="both", recursive=True, target=tmp_path / "captions")
    assert len(FolderCaptioner(captioner, job, GREEDY, OPTIONS).run().captions) == 5
    assert (tmp_path / "captions" / "deep" / "p0.txt").read_text() == drawings[folder / "p0.png"]
    assert (tmp_path / "captions" / "captions.jsonl").is_file()
    assert not list(folder.rglob("*.txt"))
    assert FolderCaptioner(captioner, job, GREEDY, OPTIONS).run().skipped == 5


def test_jobs_that_cannot_start(captioner, tmp_path):
    for job, words in (
        (CaptionJob(tmp_path / "absent", "x"), "no folder"),
        (CaptionJob(tmp_path, "x", output="xml"), "no output"),
        (CaptionJob(tmp_path, "x", batch_size=0), "batch size"),
        (CaptionJob(tmp_path, " "), "prompt is empty"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=words):
            FolderCaptioner(captioner, job, GREEDY, OPTIONS).run()
    nothing = FolderCaptioner(captioner, CaptionJob(tmp_path, "x"), GREEDY, OPTIONS).run()
    assert nothing.captions == {} and f"No picture was found in {tmp_path}" in nothing.report()


def test_a_pattern_that_no_name_is_as_long_as(tmp_path):
    """One of a million letters kept the whole process busy for twenty seconds."""
    with pytest.raises(ValueError, match="The pattern is longer than 1000 letters"):
        CaptionJob(tmp_path, "?", pattern="A" * 1001).check()


def test_a_search_through_a_whole_disk_stops(tmp_path, headless_host):
    (tmp_path / "set").mkdir()
    headless_host.stop()
    with pytest.raises(Interrupted):
        files_in(tmp_path, True)


def test_hidden_folders_are_left_out(tmp_path):
    for name in ("a.png", ".ipynb_checkpoints/a-checkpoint.png", "set/.thumbs/b.png", "set/b.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert [path.relative_to(tmp_path).as_posix() for path in files_in(tmp_path, True)] == ["a.png", "set/b.png"]


def test_captions_that_were_cut_off_are_named(captioner, drawings, monkeypatch):
    from hotpath.vision_language import captioning

    real, batches = captioning.answer, []

    def first_is_short(model, questions, sampling, options, *rest):
        batches.append(len(questions))
        most = 2 if len(batches) == 1 else options.max_new_tokens
        made = real(model, questions, sampling, replace(options, max_new_tokens=most), *rest)
        return [replace(part, notes=(f"a note of batch {len(batches)}",)) for part in made]

    monkeypatch.setattr(captioning, "answer", first_is_short)
    folder = next(iter(drawings)).parent
    job = CaptionJob(folder, "Caption this picture.", output="both", batch_size=2)
    summary = FolderCaptioner(captioner, job, GREEDY, OPTIONS).run()
    assert summary.unfinished == [folder / "p0.png", folder / "p1.png"]
    assert "2 cut off at max_new_tokens: p0.png, p1.png" in summary.report()
    assert all(f"a note of batch {n}" in summary.report() for n in (1, 2, 3))
    lines = [json.loads(line) for line in (folder / "captions.jsonl").read_text().splitlines()]
    assert [line["file"] for line in lines if line.get("cut_off")] == ["p0.png", "p1.png"]
    again = FolderCaptioner(captioner, job, GREEDY, OPTIONS).run()
    assert again.all_captions() == summary.captions and list(again.all_captions()) == list(drawings)


def test_a_thinking_model_is_kept_from_thinking_or_told_to_be_short(captioner, drawings, monkeypatch):
    from hotpath.vision_language import captioning
    from hotpath.vision_language.prompts import render

    monkeypatch.setattr(captioner.processor, "chat_template", captioner.processor.chat_template + "{{ '<think>\n' }}")
    real, asked = captioning.answer, []

    def lost_in_thought(model, questions, *rest):
        asked.append(render(model, questions[0]))
        made = real(model, questions, *rest)
        if asked[-1].endswith("<think>\n"):
            made = [replace(part, text="", thoughts="Hm, so", tokens=1256, finished=False) for part in made]
        return made

    monkeypatch.setattr(captioning, "answer", lost_in_thought)
    job = CaptionJob(next(iter(drawings)).parent, "Caption this picture.", pattern="p0*")
    thinking = FolderCaptioner(captioner, replace(job, thinking=None), GREEDY, OPTIONS).run()
    (why,) = thinking.failed.values()
    assert why.startswith("its thoughts did not end within 1,256 tokens: raise max_new_tokens")
    assert len(FolderCaptioner(captioner, job, GREEDY, OPTIONS).run().captions) == 1
    assert asked[1].endswith("</think>\n\n")


@pytest.mark.parametrize("reads", [False, True])
def test_only_a_template_that_reads_the_switch_is_told_whether_to_think(captioner, monkeypatch, reads):
    from hotpath.vision_language.prompts import Question, render

    processor, told = captioner.processor, []
    if reads:
        monkeypatch.setattr(processor, "chat_template", processor.chat_template + "{{ enable_thinking }}")
    real = processor.apply_chat_template
    monkeypatch.setattr(processor, "apply_chat_template", lambda *a, **k: told.append(k) or real(*a, **k))
    written = render(captioner, Question("Say it.", thinking=False))
    assert ("enable_thinking" in told[0]) == reads == written.endswith("False")


def test_one_caption_that_cannot_be_written_stops_no_other(captioner, drawings, tmp_path, monkeypatch):
    folder = next(iter(drawings)).parent
    (folder / "p1.txt").mkdir()
    (folder / "p2.txt").write_text("by hand")
    job = CaptionJob(folder, "Caption this picture.", batch_size=1)
    summary = FolderCaptioner(captioner, job, GREEDY, OPTIONS).run()
    assert [path.name for path in summary.captions] == ["p0.png", "p3.png", "p4.png"]
    assert list(summary.failed) == [folder / "p1.png"] and "could not be written" in summary.report()
    assert summary.all_captions()[folder / "p2.png"] == "by hand" and (folder / "p2.txt").read_text() == "by hand"
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="No caption can be written into"):
        FolderCaptioner(captioner, replace(job, target=tmp_path / "file"), GREEDY, OPTIONS).run()

    work = FolderCaptioner(captioner, replace(job, overwrite=True), GREEDY, OPTIONS)
    for number in (
        errno.ENOSPC,
        errno.EIO,
        errno.ESTALE,
    ):  # a disk that is full, fails, or went away takes none of the others

        def refuse(*_, number=number):
            raise OSError(number, "refused")

        monkeypatch.setattr(work, "_write", refuse)
        with pytest.raises(OSError, match="refused"):
            work.run()
