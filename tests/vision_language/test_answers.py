"""Thoughts, JSON and boxes in an answer."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
from hotpath.vision_language import answers, asking
from hotpath.vision_language.budgets import OLD_PRESETS, PRESETS, PROCESSOR, Budget, TokenPixels, fitted, preset
from hotpath.vision_language.pictures import Picture
from hotpath.vision_language.prompts import Question

QWEN3 = TokenPixels(32, 65536, 16777216)
QWEN25 = TokenPixels(28, 3136, 12845056)


@pytest.mark.parametrize(
    ("text", "opened", "wanted"),
    [
        ("Hello.", False, ("", "Hello.")),
        ("<think>hm</think>\n\nHello.", False, ("hm", "Hello.")),
        ("hm\n</think>\n\nHello.", True, ("hm", "Hello.")),
        ("a</think>b</think>c", True, ("a</think>b", "c")),
        ("never ends", True, ("never ends", "")),
        ("<think>never ends", False, ("never ends", "")),
        ("<think>a</think>b <think>c</think>d", False, ("a\n\nc", "b d")),
        ("Yes. <think>a</think>b", False, ("a", "Yes. b")),
        ("a</think>b\n<think>\ncut off", True, ("a\n\ncut off", "b")),
        ("a <think> b</think>c", True, ("a  b", "c")),
        ("a</think>Write <think> first.", True, ("a", "Write <think> first.")),
        ("", False, ("", "")),
    ],
)
def test_thoughts(text, opened, wanted):
    assert answers.split_thoughts(text, opened) == wanted


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ('{"a": 1}', {"a": 1}),
        ('Sure:\n```json\n[{"a": 1}]\n```\nDone.', [{"a": 1}]),
        ('```\n{"a": [1, 2]}\n```', {"a": [1, 2]}),
        ('The answer is {"a": "}"} as you see', {"a": "}"}),
        ("a set {x} and then [1, 2]", [1, 2]),
        ('[{"a": 1}, {"a": 2}, {"a": ', [{"a": 1}, {"a": 2}]),
        ('```json\n[{"a": 1},\n{"b"', [{"a": 1}]),
        ("no json at all", None),
        ("", None),
        ("[", None),
        (
            '```json\n{"description": "A cat.\nIt sleeps.", "tags": ["cat", "sofa"]}\n```',
            {"description": "A cat.\nIt sleeps.", "tags": ["cat", "sofa"]},
        ),
        ('{"label": "a,] cat", "bbox_2d": [10, 20, 30, 40,], }', {"label": "a,] cat", "bbox_2d": [10, 20, 30, 40]}),
        ('[{"a": [1, 2],}, {"a": [3,', [{"a": [1, 2]}]),
        # Never a piece of what was cut off.
        ('{"caption": "a cat", "tags": ["a", "b"], "details": "it is', None),
        ('Here: {"caption": "a "quoted" cat", "tags": ["a", "b"]}', None),
        ("{'caption': 'a cat', 'tags': ['a', 1]}", None),
        ('[{"bbox_2d": [1, 2, 3, 4', None),
        ("[[1, 2, 3", None),
        ("[1, 2, 3", [1, 2]),
        ("[0.5, 1.", [0.5]),
        ("[[[1, 2], [3, 4]], [[5", [[[1, 2], [3, 4]]]),
        ("[[[1, 2], [3", None),
        ("[null, true,]", [None, True]),
        ("[true story] [1]", [1]),
        ('```json\n{"a": ["x"\n```\nI mean\n```json\n{"a": ["y"]}\n```', {"a": ["y"]}),
    ],
)
def test_json(text, wanted):
    assert answers.find_json(text) == wanted


def test_boxes_of_both_conventions():
    value = [{"bbox_2d": [100, 200, 500, 1000], "label": "cat"}]
    (box,) = answers.find_boxes(value, 400, 800, None)
    assert (box.left, box.top, box.right, box.bottom, box.label) == (80, 80, 400, 400, "cat")
    (box,) = answers.find_boxes(value, 1000, 1000, (500, 500))
    assert (box.left, box.top, box.right, box.bottom) == (200, 400, 1000, 1000)


@pytest.mark.parametrize(
    "value",
    [
        None,
        "x",
        5,
        [],
        {},
        [1, 2, 3],
        [{"bbox_2d": [1, 2, 3]}],
        [{"bbox_2d": "no"}],
        [{"bbox_2d": [1, 2, None, 4]}],
        [[]],
        {"colour": [255, 0, 0, 255]},
        {"bbox_2d": [True, 2, 3, 4]},
    ],
)
def test_what_is_no_box_is_left_out(value):
    assert answers.find_boxes(value, 10, 10, None) == []


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        ({"objects": [{"bbox_2d": [1, 2, 3, 4], "label": "x"}]}, [(1, "x")]),
        ([[1, 2, 3, 4], [5, 6, 7, 8]], [(1, ""), (5, "")]),
        ({"bbox_2d": [[1, 2, 3, 4], [5, 6, 7, 8]], "label": "x"}, [(1, "x"), (5, "x")]),
        ({"boxes": [[1, 2, 3, 4]], "size": [5, 6, 7, 8]}, [(1, "")]),
        ({"cats": [{"box": [1, 2, 3, 4]}], "dogs": {"one": {"bbox": [5, 6, 7, 8], "name": "y"}}}, [(1, ""), (5, "y")]),
    ],
)
def test_boxes_are_found_wherever_they_stand(value, wanted):
    assert [(box.left, box.label) for box in answers.find_boxes(value, 1000, 1000, None)] == wanted


def test_boxes_are_ordered_and_kept_inside():
    (box,) = answers.find_boxes([900, 2000, -50, 100], 100, 100, None)
    assert (box.left, box.top, box.right, box.bottom) == (0, 10, 90, 100)
    (box,) = answers.find_boxes([3000, -50, 500, 900], 60, 80, (600, 1000))
    assert (box.left, box.top, box.right, box.bottom) == (40, 0, 80, 60)


@pytest.mark.parametrize(("kind", "corners"), [("qwen2_5_vl", [14, 28, 42, 112]), ("qwen3_vl", [100, 200, 300, 800])])
def test_boxes_are_drawn_where_the_model_saw_them(monkeypatch, kind, corners):
    """Qwen2.5-VL counts the pixels of what it was shown, here 140x140 of a picture of 40x50, the others to 1000."""
    monkeypatch.setattr(asking.drawing, "draw_boxes", lambda pixels, boxes: boxes)
    model = SimpleNamespace(model_type=kind, config=SimpleNamespace(vision_config=SimpleNamespace(patch_size=14)))
    picture = Picture(np.zeros((40, 50, 3), np.uint8))
    questions = [Question("Where?"), Question("Where?", "", (picture, picture)), Question("Where?", "", (picture,))]
    reply = asking.Reply([SimpleNamespace(items=[SimpleNamespace(grid=(1, 10, 10))])] * 3, [corners, corners, []])
    ((place, (box,)),) = asking.drawn(model, questions, reply, 1).items()
    assert place == 0 and (box.left, box.top, box.right, box.bottom) == (5, 8, 15, 32)


@pytest.mark.parametrize(("name", "tokens"), [("fast", 256), ("balanced", 512), ("high", 768), ("ultra", 1024)])
@pytest.mark.parametrize("sizes", [QWEN3, QWEN25])
def test_presets_count_tokens_of_the_loaded_model(name, tokens, sizes):
    shortest, longest = preset(name).edges(sizes)
    assert longest == tokens * sizes.side**2
    for height, width in ((1024, 1024), (1080, 1920), (2160, 3840), (4320, 7680)):
        tall, wide = fitted(height, width, sizes.side, shortest, longest)
        spent = tall * wide // sizes.side**2
        assert 0.9 * tokens <= spent <= tokens or (height, width) == (1024, 1024)
        assert spent <= tokens
    # No enlarging: a small picture costs what it has.
    tall, wide = fitted(256, 256, sizes.side, shortest, longest)
    assert tall * wide <= 270 * 270


@pytest.mark.parametrize(
    ("name", "wanted"), [("fast", (196, 180)), ("balanced", (361, 364)), ("high", (576, 576)), ("ultra", (784, 777))]
)
def test_old_presets_count_old_pixels(name, wanted):
    """The tokens a Qwen3-VL spends on 1024 x 1024 and on 1080p when a token is counted as 28 x 28 pixels."""
    edges = OLD_PRESETS[name].edges(QWEN3)
    spent = [np.prod(fitted(h, w, 32, *edges)) // 1024 for h, w in ((1024, 1024), (1080, 1920))]
    assert tuple(spent) == wanted
    assert OLD_PRESETS[name].edges(QWEN25) == OLD_PRESETS[name].edges(QWEN3)


def test_native_and_untouched_budgets():
    assert PRESETS["native"].edges(QWEN3) == (1024, 16777216)
    assert PROCESSOR.edges(QWEN3) == (65536, 16777216)
    assert PRESETS["native"].halved(QWEN3).most == 8192
    assert preset("fast").halved(QWEN3).edges(QWEN3)[1] == 128 * 1024
    enlarging = Budget("mine", 300, 400).halved(QWEN3)
    assert (enlarging.name, enlarging.least, enlarging.most) == ("mine, halved", 200, 200)
    assert Budget("mine", 100, 400).halved(QWEN3).least == 100 and Budget("mine", None, 400).halved(QWEN3).least == 0


@pytest.mark.parametrize(
    ("height", "width", "large", "small"),
    [
        (20, 30, (128, 160), (32, 32)),
        (20, 150, (64, 352), (32, 160)),
        (333, 30, (448, 64), (320, 32)),
        (333, 1920, (320, 1920), (96, 608)),
        (1080, 150, (1088, 160), (672, 64)),
        (1080, 1920, (1088, 1920), (192, 320)),
    ],
)
def test_frames_get_the_sizes_that_transformers_gives_pictures(height, width, large, small):
    """Of its Qwen2-VL processor's smart_resize."""
    assert fitted(height, width, 32, 16384, 16777216) == large and fitted(height, width, 32, 1024, 65536) == small


def test_bad_sizes():
    with pytest.raises(ValueError, match="too narrow"):
        fitted(1, 1000, 32, 1024, 1 << 20)
    with pytest.raises(ValueError, match="no token budget"):
        preset("huge")
    assert fitted(3, 5, 32, 1024, 1 << 20) == (32, 32)


def test_json_that_ran_away():
    assert answers.find_json("[" * 5000) is None
    assert answers.find_json('{"a": ' * 5000) is None
    assert answers.find_json('{"size": NaN}') is None
    cut_off = answers.find_json('[{"label": "a \\ud83d"}, {"lab')
    assert cut_off == [{"label": "a ?"}]
    json.dumps(cut_off, ensure_ascii=False).encode()


def test_corners_that_ran_away_are_no_box():
    huge = [{"bbox_2d": [0, 0, 10**400, 5]}, {"bbox_2d": [float("nan"), 0, 1, 1]}, {"bbox_2d": [1, float("inf"), 2, 3]}]
    nested = []
    for _ in range(5000):
        nested = [nested]
    assert answers.find_boxes(huge, 100, 100, None) == answers.find_boxes(nested, 100, 100, None) == []
