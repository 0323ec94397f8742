"""English and Chinese: every text of every node is there, as it stands in the class today."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hotpath.demo import node_texts

ROOT = Path(__file__).resolve().parent.parent
LANGUAGES = ("en", "zh")
FILES = ("main.json", "nodeDefs.json", "commands.json", "settings.json")
HINT = "run `python -m hotpath.demo.node_texts`"


@pytest.fixture(scope="module")
def nodes() -> dict[str, node_texts.NodeText]:
    return node_texts.all_nodes()


def load(language: str, name: str) -> dict[str, Any]:
    return json.loads((node_texts.LOCALES / language / name).read_text("utf-8"))


def test_every_sentence_has_chinese(nodes):
    words = node_texts.chinese()
    missing = [s for s in node_texts.sentences(nodes) if not words.get(s)]
    assert not missing, f"locales/zh.json lacks {len(missing)}: {missing}"


def test_no_chinese_is_left_over(nodes):
    stale = sorted(node_texts.chinese().keys() - set(node_texts.sentences(nodes)))
    assert not stale, f"locales/zh.json keeps {len(stale)} sentences that no node says any more: {stale}"


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_node_definitions_are_the_classes_texts(nodes, language):
    words = None if language == "en" else node_texts.chinese()
    wanted, found = node_texts.node_definitions(nodes, words), load(language, "nodeDefs.json")
    stale = sorted(key for key in wanted.keys() | found.keys() if wanted.get(key) != found.get(key))
    assert not stale, f"{language}: stale or missing {stale}; {HINT}"
    assert node_texts.main_texts(nodes, words).items() <= load(language, "main.json").items(), HINT


def test_chinese_is_chinese():
    """No English sentence slipped through, and no half-width comma inside a Chinese one."""
    for english, chinese in node_texts.chinese().items():
        if english.endswith(".") and " " in english:
            assert re.search("[\u3400-\u9fff]", chinese), chinese
        assert not re.search("[\u3400-\u9fff][,;:?!(]|[,;:)][\u3400-\u9fff]", chinese), chinese


def test_numbers_and_names_survive_the_translation():
    """A figure, a file name or a node's id in the English must stand in the Chinese as well."""
    for english, chinese in node_texts.chinese().items():
        for figure in re.findall(r"(?<![\w.-])\d{2,}(?![\w-])", english):
            assert figure in chinese, (english, chinese)
        for name in re.findall(r"models/\w+|Hotpath[A-Z]\w+", english):
            assert name in chinese, (english, chinese)


def keys(data: Any, path: str = "") -> set[str]:
    if not isinstance(data, dict):
        return {path}
    return {key for name, value in data.items() for key in keys(value, f"{path}/{name}")}


@pytest.mark.parametrize("name", FILES)
def test_both_languages_have_the_same_keys(name):
    present = [(node_texts.LOCALES / language / name).is_file() for language in LANGUAGES]
    assert all(present) or not any(present), f"{name} stands in one language only"
    if all(present):
        english, chinese = (keys(load(language, name)) for language in LANGUAGES)
        assert english == chinese, f"{name}: {sorted(english ^ chinese)}"


def test_points_in_ids_are_written_as_the_front_end_reads_them(nodes):
    english = load("en", "nodeDefs.json")
    assert english["Qwen2_5VL"]["inputs"]["image1"]["tooltip"]
    assert english["Qwen2"]["5VL"]["display_name"] == nodes["Qwen2.5VL"].display_name
