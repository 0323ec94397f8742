"""Boxes drawn on a picture, and their labels."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from hotpath.vision_language import asking, drawing
from hotpath.vision_language.answers import Box
from hotpath.vision_language.pictures import Picture
from hotpath.vision_language.prompts import Question

BLACK = np.zeros((60, 80, 3), dtype=np.uint8)


def test_drawing_touches_only_a_copy():
    drawn = drawing.draw_boxes(BLACK, [Box(10, 20, 70, 50, "Ä 猫")])
    assert BLACK.sum() == 0
    assert drawn[40, 10].tolist() == [0xE6, 0x19, 0x4B]
    assert drawn[45, 65].sum() == 0


@pytest.mark.parametrize(
    "box", [Box(0, 58, 80, 60, "low"), Box(75, 0, 80, 60, "right"), Box(79, 59, 79, 59, "x" * 500)]
)
def test_a_label_stands_in_the_picture(box):
    plain, named = (drawing.draw_boxes(BLACK, [b]) for b in (Box(box.left, box.top, box.right, box.bottom, ""), box))
    plate = named.min(axis=2) > 150
    assert plate.sum() > 10, "the letters are white"
    rows, columns = plate.nonzero()
    assert rows.max() < 59 and columns.max() < 79 and (plain != named).any()
    assert plain[59, 79].any() or plain[:, 79].any(), "the far edge is seen"


def test_labels_stand_apart():
    corners = [(10.0, 10.0), (12.0, 11.0), (10.0, 10.0)]
    taken = np.empty((0, 4))
    for left, top in corners:
        plate = drawing.place(Box(left, top, left + 40, top + 40, ""), 30, 8, (80, 60), taken)
        apart = (
            (taken[:, 2] <= plate[0])
            | (taken[:, 0] >= plate[2])
            | (taken[:, 3] <= plate[1])
            | (taken[:, 1] >= plate[3])
        )
        assert apart.all()
        taken = np.concatenate((taken, [plate]))


def test_letters_are_drawn_by_a_font_that_has_them(monkeypatch):
    assert drawing.has("", "a") and not drawing.has("", "猫") and not drawing.has("no such font.ttf", "a")
    ascii_only = lambda name, letter: letter.isascii() and not name  # noqa: E731
    monkeypatch.setattr(drawing, "has", ascii_only)
    boxes = [Box(0, 0, 9, 9, "猫 cat"), Box(0, 0, 9, 9, "dog"), Box(0, 0, 9, 9, " \n"), Box(0, 0, 9, 9, "犬\x00")]
    assert [drawing.written(box, n) for n, box in enumerate(boxes, 1)][:2] == [("", "1 cat"), ("", "dog")]
    assert drawing.undrawn(boxes) == {1: "猫 cat", 4: "犬\x00"}
    monkeypatch.setattr(drawing, "has", lambda name, letter: name == "msyh.ttc" or ascii_only(name, letter))
    assert drawing.written(boxes[0], 1) == ("msyh.ttc", "猫 cat") and drawing.undrawn(boxes) == {}


def test_letters_that_no_font_has_are_told(monkeypatch):
    monkeypatch.setattr(drawing, "has", lambda name, letter: letter.isascii())
    reply = asking.Reply(
        [SimpleNamespace(items=[])], [[{"bbox_2d": [0, 0, 500, 500], "label": "猫"}]], report="as it was"
    )
    model, question = SimpleNamespace(model_type="qwen3_vl"), Question("?", "", (Picture(BLACK),))
    assert asking.drawn(model, [question], reply, 1)[0].sum() > 0
    assert reply.report.startswith("as it was\nno font here has the letters of 1 猫: install one")
