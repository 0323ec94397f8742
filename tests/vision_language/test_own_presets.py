"""Preset prompts of one's own: what is offered, what is refused, and which words are asked."""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from hotpath.nodes import NODE_CLASS_MAPPINGS
from hotpath.nodes import vision_language as nodes
from hotpath.nodes.ailab_qwen_vl import ask, words
from hotpath.vision_language import own_presets, presets
from hotpath.vision_language.asking import Request
from hotpath.vision_language.own_presets import UnusablePreset

MENUS = {
    "AILab_QwenVL": ("required", "preset_prompt", presets.DESCRIPTIONS),
    "AILab_QwenVL_Advanced": ("required", "preset_prompt", presets.DESCRIPTIONS),
    "AILab_QwenVL_PromptEnhancer": ("required", "enhancement_style", presets.STYLES),
    "HotpathVLM": ("optional", "preset", {"none": "", **presets.DESCRIPTIONS}),
    "HotpathCaptionFolder": ("optional", "preset", {"none": "", **presets.DESCRIPTIONS}),
}


@pytest.fixture(autouse=True)
def nothing_was_told() -> None:
    own_presets._tell.cache_clear()


@pytest.fixture
def prompts(headless_host: Any) -> Path:
    folder = headless_host.model_folders("LLM")[0] / "prompts"
    folder.mkdir(parents=True)
    return folder


def asked(preset: str) -> str:
    return ask(preset, "", None, None, 16).prompt


def test_text_files_are_in_every_menu_and_are_asked(
    prompts: Path, monkeypatch: pytest.MonkeyPatch, headless_host: Any
) -> None:
    (prompts / "zine.txt").write_bytes("\ufeffDescribe it\r\nas a zine.\r\n".encode())
    (prompts / "🖼️ Tags.TXT").write_text("Tags of mine.", encoding="utf-8")
    (prompts / "Épée.txt").write_text("Über Ärger.", encoding="utf-16")
    for name, (part, widget, known) in MENUS.items():
        menu = NODE_CLASS_MAPPINGS[name].INPUT_TYPES()[part][widget][0]
        own = ["zine", "Épée"] if "🖼️ Tags" in known else ["zine", "Épée", "🖼️ Tags"]
        assert menu == [*known, *own]
    assert asked("zine") == words("zine", presets.STYLES, "x") == "Describe it\nas a zine."
    assert asked("E\u0301pe\u0301e") == "Über Ärger." and asked("🖼️ Tags") == "Tags of mine."
    assert own_presets.described("tags") == "Tags of mine." and own_presets.described("ZINE").startswith("Describe it")
    assert not headless_host.texts

    requests: list[Request] = []
    monkeypatch.setattr(nodes, "ask", lambda model, request, *_: requests.append(request) or 1 / 0)
    for preset in (["none"], ["zine"], None):
        with pytest.raises(ZeroDivisionError):
            nodes.HotpathVLM().ask(["model"], ["What is it?"], **({} if preset is None else {"preset": preset}))
    assert [request.prompt for request in requests] == ["What is it?", "Describe it\nas a zine.", "What is it?"]
    assert nodes.HotpathVLM.VALIDATE_INPUTS(preset=["of another machine"])


def test_a_run_is_another_when_the_words_are(prompts: Path) -> None:
    file = prompts / "mine.txt"
    changed = (
        lambda: nodes.HotpathVLM.IS_CHANGED(preset=["mine"]),
        lambda: NODE_CLASS_MAPPINGS["AILab_QwenVL"].IS_CHANGED(model_name="m", preset_prompt="mine"),
        lambda: NODE_CLASS_MAPPINGS["AILab_QwenVL_PromptEnhancer"].IS_CHANGED(model_name="m", enhancement_style="mine"),
    )
    before = [key() for key in changed]
    file.write_text("Some words.")
    there = [key() for key in changed]
    file.write_text("Some other words.")
    assert all(len({*keys}) == 3 for keys in zip(before, there, [key() for key in changed], strict=True))
    assert nodes.HotpathVLM.IS_CHANGED() == nodes.HotpathVLM.IS_CHANGED(preset=[None]) == ""


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"a" * (own_presets.LONGEST + 1), r"mine\.txt is longer than 64 KB, which is no prompt: shorten it\."),
        ("Ärger".encode("cp1252"), r"mine\.txt is not in UTF-8: save it in that encoding\."),
        (b"\xff\xfea", r"mine\.txt is not in UTF-8"),
        (b"%PDF\0\0", r"mine\.txt is no text: put a text file there\."),
        (b" \n\xe3\x80\x80", r"mine\.txt is empty: write a prompt into it\."),
    ],
)
def test_a_file_that_is_no_prompt_is_named(prompts: Path, content: bytes, says: str) -> None:
    (prompts / "mine.txt").write_bytes(content)
    assert "mine" in own_presets.menu(presets.DESCRIPTIONS)
    for use in (asked, own_presets.described, lambda name: own_presets.in_place_of("", name)):
        with pytest.raises(UnusablePreset, match=says):
            use("mine")


@pytest.mark.skipif(sys.platform == "win32", reason="files cannot be called so there")
def test_names_that_cannot_be_shown_are_left_out_and_told_once(prompts: Path, caplog: Any) -> None:
    for name in (b"a\nb", b"a\x1b[31m", b"half\xff", "right\u202eleft".encode(), b"None", b" "):
        (Path(os.fsdecode(os.fsencode(prompts) + b"/" + name + b".txt"))).write_text("words", encoding="utf-8")
    (prompts / "._mine.txt").write_bytes(b"\0\x05")
    (prompts / "folder.txt").mkdir()
    (prompts / "gone.txt").symlink_to(prompts / "nowhere")
    os.mkfifo(prompts / "pipe.txt")
    (prompts / "🧑\u200d🎨.txt").write_text("As a painter.", encoding="utf-8")
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert own_presets.menu({}) == ["🧑\u200d🎨"]
    assert len(caplog.records) == 6 and "other than none" in caplog.text
    assert caplog.text.encode()


def test_the_list_of_the_former_pack_is_read(prompts: Path, caplog: Any) -> None:
    styles = {"📝 Enhance": {"system_prompt": "Enhance it."}, "📝 Odd": [], "📝 Mine": {"system_prompt": "My way."}}
    listed = {
        "_preset_prompts": ["🖼️ Tags", "Say what it is.", 5, "❌ None"],
        "qwenvl": {"🖼️ Tags": "Their tags.", "🍿 Scene": " A scene. ", "❌ None": "", "bad": 3, "a\nb": "x"},
        "qwen_text": {"styles": styles},
    }
    (prompts / own_presets.LISTED).write_text(json.dumps(listed), encoding="utf-8")
    own = [own_presets.menu(known)[len(known) :] for known in (presets.DESCRIPTIONS, presets.STYLES)]
    assert own == [["Say what it is.", "🍿 Scene"], ["📝 Mine"]]
    found = [asked(name) for name in ("🖼️ Tags", "🍿 Scene", "Say what it is.")]
    assert found == ["Their tags.", "A scene.", "Say what it is."]
    assert words("📝 Enhance", presets.STYLES, "x") == "Enhance it."
    (prompts / "🍿 Scene.txt").write_text("My scene.", encoding="utf-8")
    assert asked("🍿 Scene") == "My scene."
    odd = b'{"qwenvl": [], "qwen_text": {"styles": 5}, "_preset_prompts": {}}'
    for content in (b"[1]", b"{", b"\xff", odd, b"[" * 99999, b" " * (2 << 20)):
        (prompts / own_presets.LISTED).write_bytes(content)
        assert asked("🖼️ Tags") == presets.DESCRIPTIONS["🖼️ Tags"]
    assert len(caplog.records) == 5 and "The presets in" in caplog.text


def test_a_preset_that_is_not_there_is_told(prompts: Path, headless_host: Any) -> None:
    says = r"^There is no preset 'zine': choose one of the menu, or put zine\.txt into .*prompts\.$"
    with pytest.raises(UnusablePreset, match=says):
        own_presets.in_place_of("What is it?", "zine")
    for own in ("Describe it.", "这是什么？", ""):
        assert asked(own) == own and not headless_host.texts
    assert asked("../zine") == "../zine"
    assert "There is no preset ../zine here, so that this itself is asked" in headless_host.texts[-1][1]
