"""The guides: links lead somewhere, messages are really raised, figures were really measured, every page is in the index."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from checkout_files import files
from hotpath.nodes import NODE_CLASS_MAPPINGS

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = [*sorted(DOCS.glob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
NOT_CODE = {"tests", "benchmarks", "demo", "demo_output", "build"}
OURS = "https://github.com/hotpath-nodes/comfyui-hotpath/blob/main/"


@cache
def said() -> tuple[str, ...]:
    """Every text in the code, with "..." where an f-string has a value."""
    found: list[str] = []

    def text(node: ast.AST) -> str | None:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return node.value
        if isinstance(node, ast.JoinedStr):
            return "".join(part.value if isinstance(part, ast.Constant) else "..." for part in node.values)
        return None

    for path in files("*.py"):
        parts = path.relative_to(ROOT).parts
        if parts[0] in NOT_CODE or parts[0].startswith("."):
            continue
        found += [s for node in ast.walk(ast.parse(path.read_text("utf-8"))) if (s := text(node)) is not None]
    return tuple(found)


def messages() -> list[str]:
    rows = re.findall(r"^\| (`.+?`) \|", (DOCS / "troubleshooting.md").read_text("utf-8"), re.MULTILINE)
    return [row.strip("`") for row in rows]


def pieces(message: str) -> list[str]:
    return [piece.strip() for piece in re.split(r"\.\.\.|%s", message) if piece.strip(" .,:;()'")]


@pytest.mark.parametrize("message", messages())
def test_a_message_of_the_guide_is_raised_somewhere(message):
    wanted = pieces(message)
    assert wanted and sum(map(len, wanted)) >= 12, "too little to search for"

    def holds(text: str) -> bool:
        at = 0
        for piece in wanted:
            at = text.find(piece, at)
            if at < 0:
                return False
            at += len(piece)
        return True

    assert any(map(holds, said())), "nothing in the code says so"


def test_the_guide_has_many_messages():
    assert len(messages()) > 35


def links(path: Path) -> list[str]:
    text = re.sub(r"^```.*?^```", "", path.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"\]\(([^)\s]+)\)", text)


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(path):
    for link in links(path):
        target, _, heading = link.partition("#")
        if target.startswith(OURS):
            assert (ROOT / unquote(target.removeprefix(OURS))).exists(), link
        elif not target.startswith(("http://", "https://", "mailto:")):
            found = (path.parent / unquote(target)).resolve() if target else path
            assert found.exists() and found.is_relative_to(ROOT), link
            if heading:
                titles = re.findall(r"^#+ (.+)$", found.read_text("utf-8"), re.MULTILINE)
                assert heading in {re.sub(r"[^\w\- ]", "", t.lower()).replace(" ", "-") for t in titles}, link


def test_every_page_is_in_the_index():
    linked = {(DOCS / link.partition("#")[0]).resolve() for link in links(DOCS / "README.md")}
    missing = [path.name for path in DOCS.glob("*.md") if path.name != "README.md" and path.resolve() not in linked]
    assert not missing, f"docs/README.md does not link {missing}"


def test_pictures_of_the_guides_are_there_and_small():
    for path in PAGES:
        for picture in re.findall(r"!\[[^\]]+\]\((?!http)([^)]+)\)", path.read_text("utf-8")):
            assert (path.parent / picture).stat().st_size < 300_000, picture
        assert not re.search(r"!\[\]", path.read_text("utf-8")), f"{path.name}: a picture without words"


def test_the_moving_guide_names_every_node_for_saved_graphs():
    text = (DOCS / "moving_over.md").read_text("utf-8")
    missing = [key for key in NODE_CLASS_MAPPINGS if not key.startswith("Hotpath") and f"`{key}`" not in text]
    assert not missing, missing


def test_the_readme_names_every_node():
    text = (ROOT / "README.md").read_text("utf-8")
    missing = [key for key in NODE_CLASS_MAPPINGS if f"`{key}`" not in text]
    assert not missing, f"README.md does not name {missing}"
    named = set(re.findall(r"`(Hotpath[A-Za-z]+)`", text))
    assert named <= NODE_CLASS_MAPPINGS.keys(), named - NODE_CLASS_MAPPINGS.keys()


def test_the_guides_call_of_a_class_runs(headless_host):
    (block,) = [
        b
        for b in re.findall(r"^```python\n(.*?)^```", (DOCS / "api.md").read_text("utf-8"), re.M | re.S)
        if "FUNCTION" in b
    ]
    found: dict[str, Any] = {}
    exec(block.replace("host.use(", "(lambda _: None)("), found)
    assert found["outputs"][0].shape == (1, 96, 128, 3)


FIGURE = re.compile(r"\b\d+(?:\.\d+)? ?(?:ms|fps|x faster|% (?:less|more|faster|slower))\b|\b\d+(?:\.\d+)?x\b")


def test_speed_figures_stand_in_the_results():
    """A time, a rate or a factor in a guide stands in benchmarks/RESULTS.md, word for word."""
    results = (ROOT / "benchmarks" / "RESULTS.md").read_text("utf-8")
    for path in [DOCS / "performance.md", ROOT / "README.md"]:
        for figure in FIGURE.findall(path.read_text("utf-8")):
            assert figure in results, f"{path.name} says {figure}, which was not measured"
