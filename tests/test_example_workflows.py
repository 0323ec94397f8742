"""The example workflows: what ComfyUI lists of them, what is in them, and that each of them runs."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from example_workflows import EXAMPLES, FOLDER, SUFFIX, get, run_example, twin_of, twin_path

NAMES = [path.stem for path in EXAMPLES]
WANTED = {
    "caption_pictures", "captions_of_a_folder", "colorize_film", "colorize_film_with_colormnet", "colorize_in_chunks",
    "colorize_many_references", "colorize_video_file", "find_boxes", "instantid_basic", "instantid_depth_controlnet",
    "instantid_face_second_pass", "instantid_identity", "instantid_posed", "instantid_two_people", "restore_a_film",
}  # fmt: skip
LARGEST_THUMBNAIL = 60_000
# For a checkout that is not installed: `import hotpath` as the tests have it.
IMPORTS = f"import sys; sys.path.insert(0, {str(FOLDER.parent / 'tests')!r}); import conftest; del sys.path[0]\n"
NOTES = ("Note", "MarkdownNote")


def workflow(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{name}.json").read_text("utf-8"))


def test_the_promised_examples_are_there():
    assert set(NAMES) >= WANTED, sorted(WANTED - set(NAMES))


def test_nothing_clutters_the_template_browser():
    """ComfyUI lists every .json of this folder as a template, and none of the folder below."""
    assert not list(FOLDER.glob(f"*{SUFFIX}"))
    assert {path.name.removesuffix(SUFFIX) for path in (FOLDER / "api").iterdir()} == set(NAMES)
    assert {path.stem for path in FOLDER.glob("*.jpg")} == set(NAMES), "a thumbnail for each, and for nothing else"


@pytest.mark.parametrize("name", NAMES)
def test_an_example_tells_what_to_do(name):
    nodes = workflow(name)["nodes"]
    notes = [node["widgets_values"][0] for node in nodes if node["type"] in NOTES]
    assert notes and len(notes[0]) > 150, "a note inside the graph says what to do"
    assert notes[0].startswith("#"), "with a heading"
    missing = [node["type"] for node in nodes if node["type"].startswith("HotpathDemo")]
    assert not missing, (
        f"{missing} exist in the demo only: name ComfyUI's loaders, demo/stand_ins.json has the small ones"
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_thumbnail_is_a_small_square(name):
    path = FOLDER / f"{name}.jpg"
    with Image.open(path) as picture:
        assert picture.width == picture.height >= 300
        assert max(picture.convert("L").getextrema()) > 60, "nothing can be seen on it"
    assert path.stat().st_size <= LARGEST_THUMBNAIL


@pytest.mark.parametrize("name", NAMES)
def test_links_fit_their_sockets(name):
    data = workflow(name)
    nodes = {node["id"]: node for node in data["nodes"]}
    assert data["last_node_id"] >= max(nodes) and len(nodes) == len(data["nodes"])
    for link, source, output, target, slot, kind in data["links"]:
        assert link in nodes[source]["outputs"][output]["links"], (link, "is not in its output")
        assert nodes[target]["inputs"][slot]["link"] == link, (link, "is not in its input")
        assert nodes[source]["outputs"][output]["type"] == kind
    known = {link[0] for link in data["links"]}
    for node in data["nodes"]:
        assert {i["link"] for i in node.get("inputs", ()) if i.get("link") is not None} <= known


@pytest.mark.parametrize("name", NAMES)
def test_no_node_lies_on_another(name):
    boxes = [(*node["pos"], *node["size"], node["type"]) for node in workflow(name)["nodes"]]
    for i, (x, y, w, h, kind) in enumerate(boxes):
        for x2, y2, w2, h2, other in boxes[i + 1 :]:
            apart = x + w <= x2 or x2 + w2 <= x or y + h <= y2 or y2 + h2 <= y
            assert apart, f"{kind} and {other} overlap"


@pytest.fixture(scope="module")
def server(demo_comfyui: Any) -> Any:
    return demo_comfyui


@pytest.fixture(scope="module")
def object_info(server: Any) -> dict[str, Any]:
    return get(server, "/object_info")


@pytest.mark.comfy
@pytest.mark.xdist_group("demo_comfyui")
class TestInComfyUI:
    def test_the_template_browser_lists_them(self, server):
        assert sorted(get(server, "/workflow_templates")["comfyui-hotpath"]) == NAMES
        address = f"{server.url}/api/workflow_templates/comfyui-hotpath/{NAMES[0]}.jpg"
        with urllib.request.urlopen(address, timeout=60) as answer:
            assert answer.headers["Content-Type"] == "image/jpeg"

    @pytest.mark.parametrize("name", NAMES)
    def test_the_twin_is_the_workflow(self, object_info, name):
        path = FOLDER / f"{name}.json"
        twin = json.loads(twin_path(path).read_text("utf-8"))
        assert twin == twin_of(path, object_info), "run `python tests/make_example_files.py`"

    # map_captions starts workers of its own, a process each.
    @pytest.mark.parametrize(
        "name", [pytest.param(name, marks=[pytest.mark.long] * (name == "map_captions")) for name in NAMES]
    )
    def test_it_runs(self, server, name, tmp_path: Path):
        before = server.log.stat().st_size
        outcome = run_example(server, FOLDER / f"{name}.json", tmp_path)
        assert outcome.files or any(text.strip() for _, text in outcome.texts), "it shows nothing"
        for file in outcome.files:
            assert file.path.stat().st_size > 0
            if file.kind == "image":
                with Image.open(file.path) as picture:
                    picture.load()
        assert b"Traceback" not in server.log.read_bytes()[before:]

    def test_both_languages_are_served(self, server):
        texts = get(server, "/i18n")
        assert texts["en"]["nodeDefs"]["HotpathVLM"]["display_name"] == "Ask Vision-Language Model"
        assert texts["zh"]["nodeDefs"]["HotpathVLM"]["display_name"] == "询问视觉语言模型"

    def test_help_pages_and_their_pictures_are_served(self, server):
        base = f"{server.url}/extensions/comfyui-hotpath/docs"
        with urllib.request.urlopen(f"{base}/HotpathInstantID.md", timeout=60) as answer:
            assert answer.read().startswith(b"# InstantID")
        with urllib.request.urlopen(f"{base}/images/blocks.jpg", timeout=60) as answer:
            assert answer.headers["Content-Type"] == "image/jpeg"

    @pytest.mark.parametrize(
        ("kind", "number"), [("bash", 0), ("python", 0), pytest.param("python", 1, marks=pytest.mark.long)]
    )
    def test_the_guides_examples_run(self, server, tmp_path: Path, kind: str, number: int):
        """The blocks of docs/api.md, as they stand, in a folder with the files they name."""
        guide = (FOLDER.parent / "docs" / "api.md").read_text("utf-8")
        block = re.findall(rf"^```{kind}\n(.*?)^```", guide, re.MULTILINE | re.DOTALL)[number]
        if kind == "bash" and (shutil.which("curl") is None or shutil.which("bash") is None):
            pytest.skip("needs bash and curl")
        shutil.copy(twin_path(FOLDER / "faces_find_and_match.json"), tmp_path)
        shutil.copy(FOLDER.parent / "demo" / "inputs" / "astronaut.png", tmp_path / "portrait.png")
        command = (
            ["bash", "-euo", "pipefail", "-c", block] if kind == "bash" else [sys.executable, "-c", IMPORTS + block]
        )
        done = subprocess.run(
            command, cwd=tmp_path, env={**os.environ, "SERVER": server.url}, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stdout + done.stderr
        pictures = list(tmp_path.rglob("*marked*.png"))
        assert pictures and all(Image.open(path).size == (640, 448) for path in pictures)
