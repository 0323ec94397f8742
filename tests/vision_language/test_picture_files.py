"""Picture files of all kinds, good and bad, and names that are no letters."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
from hotpath.vision_language import captioning
from hotpath.vision_language.answering import Answer, AnswerOptions
from hotpath.vision_language.caption_job import CaptionJob
from hotpath.vision_language.captioning import FolderCaptioner
from hotpath.vision_language.embeddings import process_picture
from hotpath.vision_language.pictures import Picture, read_picture
from hotpath.vision_language.sampling import Sampling
from PIL import Image

RAMP = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)


@pytest.mark.parametrize(
    ("top", "kind"), [(1.0, np.float32), (255.0, np.float32), (65535.0, np.int32), (65535, np.uint16)]
)
def test_numbers_of_all_ranges_are_seen(tmp_path, top, kind):
    Image.fromarray((RAMP * top).astype(kind)).save(tmp_path / "x.tif")
    seen = read_picture(tmp_path / "x.tif").pixels
    assert seen.shape == (8, 8, 3) and np.abs(seen[..., 1] - RAMP * 255).max() <= 1


def test_what_is_wrong_with_a_picture_is_told_with_its_cure(tmp_path, monkeypatch):
    path = tmp_path / "x.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:900])
    with pytest.raises(ValueError, match=r"damaged \(.+\): replace the file"):
        read_picture(path)
    path.write_bytes(whole[:60] + b"\0" * 40 + whole[100:])
    with pytest.raises(ValueError, match=r"damaged \(.+\): replace the file"):
        read_picture(path)
    path.write_bytes(whole)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match="more pixels than can be read safely: put a smaller copy"):
        read_picture(path)


def test_a_strip_is_refused_in_our_words():
    strip = Picture(np.zeros((2, 2000, 3), dtype=np.uint8))
    with pytest.raises(ValueError, match="2000 x 2 is too narrow"):
        process_picture(None, strip, (0, 0), "", "")  # type: ignore[arg-type]


@pytest.mark.skipif(sys.platform != "linux", reason="names are letters on other systems")
def test_a_name_that_is_no_utf8_has_its_line_and_is_done(tmp_path, monkeypatch):
    for name in (b"a\xff.png", b"a\xfe.png", b"a.jfif"):
        Image.new("RGB", (8, 8)).save(tmp_path / name.decode("utf-8", "surrogateescape"), "PNG")
    said = Answer("a cat", "a cat", "", 2, True)
    monkeypatch.setattr(captioning, "look_up", lambda *_: [])
    monkeypatch.setattr(captioning, "answer", lambda model, questions, *_: [said] * len(questions))
    job = CaptionJob(tmp_path, "?", output="both", before="\ud83d ")
    model = type("Model", (), {"device": None})()
    first, again = (FolderCaptioner(model, job, Sampling(), AnswerOptions()).run() for _ in range(2))  # type: ignore[arg-type]
    assert len(first.captions) == 3 and not first.failed
    assert again.skipped == 3 and not again.captions
    lines = [json.loads(line) for line in (tmp_path / "captions.jsonl").read_text("utf-8").splitlines()]
    assert {line["file"] for line in lines} == {"a\\udcff.png", "a\\udcfe.png", "a.jfif"}
    assert {line["caption"] for line in lines} == {"\ufffd a cat"}
