"""The front end's files: they parse, never turn data into markup or code, and load nothing from elsewhere."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from hotpath.nodes import NODE_CLASS_MAPPINGS

WEB = Path(__file__).resolve().parent.parent / "web"
SCRIPTS = sorted(WEB.glob("**/*.js"))
MARKUP = re.compile(
    r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|setTimeout\(\s*[\"'`]"
)
IMPORT = re.compile(r"""(?:from|import)\s*\(?\s*["']([^"']+)["']""")


def test_there_are_scripts():
    assert {"hotpath_panel.js", "node_state.js", "saved_layouts.js"} <= {path.name for path in SCRIPTS}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_script_keeps_the_rules(path):
    source = path.read_text(encoding="utf-8")
    assert MARKUP.search(source) is None, "data never becomes markup or code: use panel_elements.js"
    for name in IMPORT.findall(source):
        assert name in ("../../scripts/app.js", "../../scripts/api.js") or (path.parent / name).is_file(), name
    assert source.startswith("//"), "the first lines say what the file is for"
    assert len(source.splitlines()) <= 450 and max(map(len, source.splitlines())) <= 130


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_script_parses(path):
    done = subprocess.run(
        ["node", "--check", "--input-type=module", "-"], input=path.read_text("utf-8"), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", sorted(WEB.glob("**/*.json")), ids=lambda path: path.name)
def test_a_table_is_json(path):
    assert isinstance(json.loads(path.read_text(encoding="utf-8")), dict)


def test_every_colour_is_some_nodes():
    source = (WEB / "node_families.js").read_text(encoding="utf-8")
    rules = [rule.replace("\\/", "/") for rule in re.findall(r"\[/(\^.*?)/, \"#", source)]
    categories = {node.CATEGORY for node in NODE_CLASS_MAPPINGS.values()}
    assert len(rules) == 6
    for rule in rules:
        before, names = re.fullmatch(r"\^([^(]*)(?:\((.*)\))?", rule).groups()
        for name in (names or "").split("|"):
            assert any(re.match(before + name, category) for category in categories), before + name


def test_styles_stay_inside_the_panel():
    """Every rule is about the panel, so that no other part of ComfyUI changes."""
    source = re.sub(r"/\*.*?\*/", "", (WEB / "hotpath_panel.css").read_text(encoding="utf-8"), flags=re.DOTALL)
    selectors = [part.strip() for part in re.findall(r"([^{}]+)\{", source)]
    assert selectors and all(
        one.strip().startswith(".hotpath-panel") for s in selectors for one in re.split(r",(?![^(]*\))", s)
    )
    assert "url(" not in source and "@import" not in source
