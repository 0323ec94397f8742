"""What a node says of itself: help pages with everything on them, tooltips, description, aliases, category."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote

import pytest
from hotpath.demo import node_texts
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
OURS = "https://github.com/hotpath-nodes/comfyui-hotpath/blob/main/"
LARGEST_PICTURE = 60_000  # bytes
NODES = node_texts.all_nodes()
# Nodes of other packs that people look for by name; each names the node that new graphs should take.
OLD_CATEGORIES = ("InstantID", "ColorMNet/", "DeepExemplar/", "Comfyui_QwenVL", "🧪AILab/QwenVL")
ONLY_ONES = {"InstantIDModelLoader"}  # our own nodes take it too
CHINESE = node_texts.chinese_wording()
# Chinese that others use for the same things; the locales and ComfyUI's own Chinese have the words on the right.
ONE_WORD_EACH = {"蒙版": "遮罩", "掩码": "遮罩", "令牌": "token", "潜空间": "Latent", "插件": "节点包"}


WITH_CHINESE = [n for n in NODES if (node_texts.HELP / n / "zh.md").is_file()]


def page(node_id: str) -> Path:
    return node_texts.HELP / f"{node_id}.md"


def chinese_page(node_id: str) -> Path:
    """Where ComfyUI's front end asks for it before it takes the English one."""
    return node_texts.HELP / node_id / "zh.md"


def both_proses(node_id: str) -> tuple[str, str]:
    """What is told in English, without its breaks of lines, and in Chinese."""
    english, translated = page(node_id).read_text("utf-8"), chinese_page(node_id).read_text("utf-8")
    return " ".join(node_texts.prose(english).split()), node_texts.prose(translated)


def links(text: str) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)\)", text)


def test_every_node_has_a_page():
    missing = [node_id for node_id in NODES if not page(node_id).is_file()]
    assert not missing, f"web/docs lacks <NodeId>.md of {missing}"


def test_no_page_is_left_of_a_node_that_is_gone():
    assert {path.stem for path in node_texts.HELP.glob("*.md")} <= NODES.keys()


@pytest.mark.parametrize("node_id", [n for n in NODES if page(n).is_file()])
def test_the_page_tells_everything(node_id):
    text, node = page(node_id).read_text("utf-8"), NODES[node_id]
    assert text.startswith("# "), "a title first"
    for one in node.inputs:
        assert f"**{one.name}**" in text, f"the input {one.name} is not named"
    for name, _ in node.outputs:
        assert f"**{name}**" in text, f"the output {name} is not named"
    assert text == node_texts.with_list(text, node), "stale: run `python -m hotpath.demo.node_texts`"
    assert re.search(r"^## Cost\n\n\S", text, re.MULTILINE), "what it costs is not told"
    assert re.search(r"!\[[^\]]+\]\(images/", text), "no picture, or one without words for those who cannot see it"
    prose = text.split(node_texts.BEGIN)[0]
    assert len(prose) > 200, "hardly anything is told about it"


def test_every_node_has_a_chinese_page():
    missing = [node_id for node_id in NODES if not chinese_page(node_id).is_file()]
    assert not missing, f"web/docs lacks <NodeId>/zh.md of {missing}"


def test_no_translated_page_is_left_of_a_node_that_is_gone():
    left = [p for p in node_texts.HELP.glob("*/*") if p.parent.name != "images" and p.parent.name not in NODES]
    assert not left, f"pages of nodes that are gone: {left}"
    assert {p.name for p in node_texts.HELP.glob("*/*.md")} == {"zh.md"}, "a language that nothing keeps in step"


@pytest.mark.parametrize("node_id", WITH_CHINESE)
def test_the_chinese_page_is_fresh(node_id):
    english, text = page(node_id).read_text("utf-8"), chinese_page(node_id).read_text("utf-8")
    assert text == node_texts.with_list(text, NODES[node_id], CHINESE), "stale: run `python -m hotpath.demo.node_texts`"
    marks = node_texts.TRANSLATED.findall(text)
    assert len(marks) == 1, (
        f"{len(marks)} lines 'translated from'; with none, `python -m hotpath.demo.node_texts` adds one"
    )
    assert marks == [node_texts.prose_hash(english)], (
        f"the prose of web/docs/{node_id}.md changed since web/docs/{node_id}/zh.md was translated from it: bring the "
        "Chinese in step, delete its line 'translated from' and run `python -m hotpath.demo.node_texts`"
    )


@pytest.mark.parametrize("node_id", WITH_CHINESE)
def test_the_chinese_page_tells_the_same(node_id):
    node, (english, chinese) = NODES[node_id], both_proses(node_id)
    assert chinese.startswith(f"# {CHINESE.say(node.display_name)}\n"), "the title is the name in locales/zh"
    assert re.search(r"^## 开销\n\n\S", chinese, re.MULTILINE), "what it costs is not told"
    assert links(chinese) == links(english), "other pictures or links"
    for address in links(english):
        english, chinese = english.replace(address, ""), chinese.replace(address, "")
    told = {one.name for one in node.inputs} | {name for name, _ in node.outputs}
    bold = [set(re.findall(r"\*\*([^*]+)\*\*", text)) & told for text in (english, chinese)]
    assert bold[0] == bold[1], "other inputs and outputs are spoken of"
    for kept in [*re.findall(r"`[^`]+`", english), *re.findall(r"(?<![\w.-])\d{2,}(?![\w-])|Hotpath[A-Z]\w+", english)]:
        assert kept in chinese, f"{kept} is not told"
    spoken_of = set(re.findall(r"(?<!\*)\*([^*]+)\*(?!\*)", english))
    for other in NODES.values():
        # The prose leaves the pack's name out of titles that carry it.
        if other.display_name.removesuffix(" (Hotpath)") in spoken_of:
            assert f"“{CHINESE.say(other.display_name)}”" in chinese, (
                f"{other.display_name} is not named as in locales/zh"
            )


@pytest.mark.parametrize("node_id", WITH_CHINESE)
def test_the_chinese_page_reads_as_chinese(node_id):
    _, chinese = both_proses(node_id)
    for address in links(chinese):
        chinese = chinese.replace(f"({address})", "")
    assert not re.search(r"[^\n]\n(?!\n|- )", chinese), "a break of a line inside a paragraph is shown as a space"
    half_width = re.findall(r".?[\u3400-\u9fff][,;:?!(]|[,;:)][\u3400-\u9fff].?", chinese)
    assert not half_width, f"half-width signs beside Chinese: {half_width}"
    for inside in re.findall(r"\*\*([^*]+)\*\*", chinese):
        assert inside[0].isalnum() and inside[-1].isalnum(), (
            f"beside Chinese, Markdown does not see **{inside}** as bold"
        )
    for paragraph in re.split(r"\n+", chinese):
        assert re.search("[\u3400-\u9fff]|^# ", paragraph), f"still English: {paragraph}"
    others = {word: ours for word, ours in ONE_WORD_EACH.items() if word in chinese}
    assert not others, f"words that the locales have another one for: {others}"


def test_names_with_two_meanings_have_two_words():
    places = {n.place(side, name): (n, side, name) for n in NODES.values() for side, name in n.names()}
    assert places.keys() >= node_texts.HOMONYMS, f"no such input or output: {node_texts.HOMONYMS - places.keys()}"
    for place in node_texts.HOMONYMS:
        node, side, name = places[place]
        assert node.shown(side, name, str) == name, "English needs no second word"
        assert node.shown(side, name, CHINESE.say) != CHINESE.say(name), f"{place}: the same word, so it needs no place"


def test_a_translation_is_marked_with_what_it_was_translated_from():
    node = next(iter(NODES.values()))
    english = node_texts.with_list("# Title\n\nProse on\ntwo lines.\n", node)
    translated = node_texts.with_source("# 标题\n\n正文。\n", english)
    assert node_texts.TRANSLATED.findall(translated) == [node_texts.prose_hash(english)]
    assert node_texts.prose(translated) == "# 标题\n\n正文。"
    assert node_texts.prose_hash("# Title\n\nProse on two\nlines.\n") == node_texts.prose_hash(english), (
        "only lines differ"
    )
    changed = english.replace("two", "three")
    assert node_texts.prose_hash(changed) != node_texts.prose_hash(english)
    assert node_texts.with_source(translated, changed) == translated, (
        "the tool cannot know that the Chinese was revised"
    )


@pytest.mark.parametrize("path", sorted(node_texts.HELP.glob("*.md")), ids=lambda p: p.stem)
def test_links_and_pictures_are_there(path):
    for link in links(path.read_text("utf-8")):
        if link.startswith(OURS):
            assert (ROOT / unquote(link.removeprefix(OURS)).partition("#")[0]).is_file(), link
        elif not link.startswith(("http://", "https://")):
            # The front end reads them below /extensions/<pack>/docs/, which is this folder.
            assert (node_texts.HELP / link).resolve().is_relative_to(node_texts.HELP), link
            assert (node_texts.HELP / link).is_file(), link


def test_pictures_are_small_and_used():
    used = {link for path in node_texts.HELP.glob("*.md") for link in links(path.read_text("utf-8"))}
    for path in (node_texts.HELP / "images").iterdir():
        assert path.stat().st_size <= LARGEST_PICTURE, f"{path.name}: {path.stat().st_size} bytes"
        assert f"images/{path.name}" in used, f"{path.name} is on no page"
        with Image.open(path) as picture:
            assert picture.width <= 1000 and max(picture.convert("L").getextrema()) > 60, f"{path.name} is dark or huge"


@pytest.mark.parametrize("node_id", list(NODES))
def test_texts_on_the_node(node_id):
    node = NODES[node_id]
    assert node.display_name != "" and len(node.description) > 20, "DISPLAY_NAME or DESCRIPTION"
    assert node.aliases and all(node.aliases), "SEARCH_ALIASES"
    assert all(alias.lower() != node.display_name.lower() for alias in node.aliases), "an alias that adds nothing"
    silent = [one.name for one in node.inputs if len(one.tooltip) < 5]
    assert not silent, f"inputs without a tooltip: {silent}"
    silent = [name for name, tooltip in node.outputs if len(tooltip) < 5]
    assert not silent, f"outputs without a tooltip: {silent}"


@pytest.mark.parametrize("node_id", list(NODES))
def test_categories(node_id):
    node = NODES[node_id]
    if node_id.startswith("Hotpath"):
        assert node.category.split("/")[0] == "Hotpath" and node.category.count("/") <= 1
    else:
        assert node.category.startswith(OLD_CATEGORIES), node.category


@pytest.mark.parametrize("node_id", [n for n in NODES if not n.startswith("Hotpath") and n not in ONLY_ONES])
def test_a_node_for_saved_graphs_names_a_better_one(node_id):
    better = [n.display_name for key, n in NODES.items() if key.startswith("Hotpath")]
    assert any(name in NODES[node_id].description for name in better), NODES[node_id].description
    text = page(node_id).read_text("utf-8")
    assert any(key in text or f"*{n.display_name}*" in text for key, n in NODES.items() if key.startswith("Hotpath"))
    if NODES[node_id].deprecated:
        assert "deprecated" in text.lower()


def test_titles_differ():
    """Two nodes of ours with one title cannot be told apart in a search."""
    titles = [n.display_name for key, n in NODES.items() if key.startswith("Hotpath")]
    assert len(titles) == len(set(titles)), titles


def test_a_page_without_marks_gets_its_list():
    node = next(iter(NODES.values()))
    once = node_texts.with_list("# Title\n\nProse.\n", node)
    assert once.startswith("# Title\n\nProse.") and f"**{node.inputs[0].name}**" in once
    assert node_texts.with_list(once, node) == once
