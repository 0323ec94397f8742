"""captions.jsonl: one line a picture, whoever writes there at the same time."""

from __future__ import annotations

import json
import os
import threading

import pytest
from hotpath.vision_language import caption_list
from hotpath.vision_language.answering import AnswerOptions
from hotpath.vision_language.budgets import PRESETS
from hotpath.vision_language.caption_job import CaptionJob
from hotpath.vision_language.caption_list import append, compact, listed
from hotpath.vision_language.captioning import FolderCaptioner
from hotpath.vision_language.sampling import Sampling


def test_a_list_holds_each_picture_once(tmp_path):
    path = tmp_path / "captions.jsonl"
    lines = [
        {"file": "a.png", "error": "broken"},
        {"file": "b.png", "caption": "old"},
        {"file": "a.png", "caption": "mended"},
        {"file": "b.png", "caption": "new"},
        {"file": "b.png", "error": "not this time"},
        {"file": "c.png", "error": "twice"},
        {"file": "c.png", "error": "thrice"},
    ]
    # Of other tools, of a person, and bytes that are no text: theirs stay as they are. What a run was cut off at goes.
    others = [
        b'{"image": "a.png", "text": "by  hand"}', b'{"image":"b.png","text":"x"}', b'{"file": "a.png", "tags": ["t"]}',
        b"# a note", b"", b"\xff\xfe",
    ]  # fmt: skip
    ours = [json.dumps(line).encode() for line in lines]
    path.write_bytes(b"\n".join([*others[:2], *ours, *others[2:], b'{"file": "d.pn']))
    compact(path)
    assert path.read_bytes().split(b"\n") == [*others[:2], ours[2], ours[3], ours[6], *others[2:], b""]
    assert listed(tmp_path) == {"a.png": "mended", "b.png": "new"}
    before = path.stat().st_mtime_ns
    compact(path)
    compact(tmp_path / "none.jsonl")
    assert path.stat().st_mtime_ns == before


def test_a_list_that_several_wrote_is_in_the_folders_order(tmp_path):
    names = ["b.png", "a/b.png", "a.png", "a-b.png"]
    path = tmp_path / "captions.jsonl"
    ours = {name: json.dumps({"file": name, "caption": "x"}) for name in names}
    path.write_text("\n".join([ours["b.png"], "# a note", *[ours[name] for name in names[1:]], '{"image": "0.png"}']))
    compact(path)
    in_order = [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path / name for name in names)]
    assert in_order == ["a/b.png", "a-b.png", "a.png", "b.png"]
    first, *others = [ours[name] for name in in_order]
    assert path.read_text().splitlines() == [first, "# a note", *others, '{"image": "0.png"}']


@pytest.mark.skipif(os.name != "posix", reason="locks as POSIX has them")
def test_what_another_run_adds_while_a_list_is_compacted_stays(tmp_path, monkeypatch):
    path, write = tmp_path / "captions.jsonl", caption_list.whole_file
    for _ in range(2):
        append(tmp_path, {"file": "a.png", "caption": "a"})
    adding = threading.Thread(target=append, args=(tmp_path, {"file": "b.png", "caption": "b"}))

    def meanwhile(path):
        adding.start()
        adding.join(0.05)
        return write(path)

    monkeypatch.setattr(caption_list, "whole_file", meanwhile)
    compact(path)
    adding.join()
    monkeypatch.undo()
    assert listed(tmp_path) == {"a.png": "a", "b.png": "b"} and path.read_bytes().count(b"\n") == 2


def test_a_line_after_one_that_was_cut_off_is_a_line(tmp_path):
    (tmp_path / "captions.jsonl").write_text('{"file": "a.png", "capt')
    append(tmp_path, {"file": "b.png", "caption": "one\u2028line"})
    append(tmp_path, {"file": "c.png", "caption": "x"})
    assert listed(tmp_path) == {"b.png": "one\u2028line", "c.png": "x"}
    assert (tmp_path / "captions.jsonl").read_bytes().count(b"\n") == 3


def test_a_list_that_cannot_be_made_shorter_loses_nothing(tmp_path, headless_host, monkeypatch):
    (tmp_path / "a.png").touch()
    for text in ("old", "new"):
        append(tmp_path, {"file": "a.png", "caption": text})

    def refuse(path):
        raise PermissionError(13, "it is used by another process", str(path))

    monkeypatch.setattr(caption_list, "whole_file", refuse)
    job = CaptionJob(tmp_path, "Describe.", output="jsonl")
    summary = FolderCaptioner(None, job, Sampling(), AnswerOptions(16, PRESETS["fast"])).run()
    assert summary.skipped == 1 and "captions.jsonl keeps older lines too" in summary.report()
    assert listed(tmp_path) == {"a.png": "new"}
