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
    assert {"hotpath_panel.js", "node_state.js", "saved_layouts.js", "words.js"} <= {path.name for path in SCRIPTS}


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
        ["node", "--check", "--input-type=module", "-"], input=path.read_text("utf-8"), capture_output=True,
        encoding="utf-8",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


REPLACED = """
globalThis.window = {};
const { lostInputs, replace, REPLACEMENTS } = await import("./pack/web/replacements.js");
const said = [];
// As the front end has it: a subgraph's ends have slots that connect themselves, and are no nodes of it.
const slot = (end) => ({ connect: (socket, node) => said.push(`${end} to ${node.type} ${socket.name}`) });
function graphWith(old, links, ends = {}) {
  const connect = (from, node, to) => said.push(`7.${from} to ${node.type} ${node.inputs[to].name}`);
  const nodes = { 7: { id: 7, connect }, 8: { id: 8 } };
  const graph = {
    ...ends,
    getNodeById: (id) => nodes[id], getLink: (id) => links[id],
    add: (node) => (nodes[node.id] = node), remove: (node) => delete nodes[node.id],
    beforeChange: () => said.push("begun"), afterChange: () => said.push("done"),
  };
  nodes[old.id] = Object.assign(old, { graph });
  return nodes;
}
const oldNode = (widths) => ({
  id: 5, type: "ColorMNetVideo", title: "Reel 3", pos: [0, 0], mode: 0,
  widgets: [{ name: "target_width", value: 700 }, { name: "target_height", value: 395 }],
  inputs: [{ name: "video_frames", link: 1 }, { name: "reference_image", link: 3 }, { name: "target_width", link: widths }],
  outputs: [{ links: [2, 4] }, { links: [] }],
});
let fails = false;
window.LiteGraph = { registered_node_types: { ColorMNetVideo: { title: "Old" } }, createNode: (type) => ({
  id: 9, type, inputs: [{ name: "frames" }, { name: "reference" }], outputs: [{ name: "frames" }],
  widgets: [{ name: "colour_size", value: 432, options: { max: 2160, step2: 16 } }],
  findInputSlot(name) { return this.inputs.findIndex((one) => one.name === name); },
  connect(from, target) {
    if (!target || fails) throw "target node is null";
    said.push(`${this.outputs[from].name} to ${target.id}`);
  },
}) };
const links = {
  1: { origin_id: -10, origin_slot: 0 }, 3: { origin_id: 7, origin_slot: 2 }, 6: { origin_id: 7, origin_slot: 3 },
  2: { target_id: -20, target_slot: 1 }, 4: { target_id: 8, target_slot: 0 },
};
const ends = { inputNode: { id: -10, slots: [slot("first")] }, outputNode: { id: -20, slots: [null, slot("second")] } };
const rule = REPLACEMENTS.ColorMNetVideo;
let old = oldNode(null);
let nodes = graphWith(old, links, ends);
let fresh = replace(old, rule);
said.push(Object.keys(nodes).join(), fresh.title, fresh.widgets[0].value);
old = oldNode(6);
graphWith(old, links, ends);
fresh = replace(old, rule);
said.push(lostInputs(old, rule).map((input) => input.name).join(), fresh.widgets[0].value);
fails = true;
old = oldNode(null);
nodes = graphWith(old, links, ends);
try { replace(old, rule); } catch { said.push(Object.keys(nodes).includes("5")); }
console.log(JSON.stringify(said));
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_an_older_node_is_replaced_inside_a_subgraph(tmp_path):
    shutil.copytree(WEB, tmp_path / "pack" / "web", ignore=shutil.ignore_patterns("docs"))
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "app.js").write_text("export const app = { registerExtension() {} };")
    (tmp_path / "package.json").write_text('{"type": "module"}')
    (tmp_path / "run.js").write_text(REPLACED)
    done = subprocess.run(["node", "run.js"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    links = [
        "begun", "first to HotpathColorizeVideo frames", "7.2 to HotpathColorizeVideo reference",
        "second to HotpathColorizeVideo frames", "frames to 8", "done",
    ]  # fmt: skip
    assert json.loads(done.stdout) == [
        *links, "7,8,9", "Reel 3", 400, *links, "target_width", 432, *links[:4], "done", True,
    ]  # fmt: skip


@pytest.mark.parametrize("path", sorted(WEB.glob("**/*.json")), ids=lambda path: path.name)
def test_a_table_is_json(path):
    assert isinstance(json.loads(path.read_text(encoding="utf-8")), dict)


FAMILIES = {
    "InstantID": "^(Hotpath/)?InstantID",
    "faces": "^Hotpath/faces",
    "colour": "^(Hotpath/colorization|ColorMNet|DeepExemplar)",
    "vision-language": "^(Hotpath/vision-language|Comfyui_QwenVL|🧪AILab)",
    "the rest": "^Hotpath/(text to image|acceleration|compare|map)",
    "all": "^Hotpath$",
}


def test_a_family_has_one_colour_of_its_own():
    source = (WEB / "node_families.js").read_text(encoding="utf-8")
    rules = re.findall(r"\[/(\^.*?)/, \"(#\w{6})\"\]", source)
    colours: dict[str, set[str]] = {family: set() for family in FAMILIES}
    for node_id, node in NODE_CLASS_MAPPINGS.items():
        (family,) = (name for name, category in FAMILIES.items() if re.match(category, node.CATEGORY))
        colours[family].add(next(colour for ids, colour in rules if re.match(ids, node_id)))
    assert all(len(found) == 1 for found in colours.values()), colours
    assert len(set.union(*colours.values())) == len(rules) == len(FAMILIES)


SAID = re.compile(r"""say\(\s*(?:\w+(?:\.\w+)* \? )?"((?:[^"\\]|\\.)+)"(?: : "((?:[^"\\]|\\.)+)")?""")


def said_by_the_front_end():
    """Every sentence in a script that is shown in the reader's language, and the fixed names that the server gives."""
    from hotpath.commands.backends import LIBRARIES
    from hotpath.host.known_models import KNOWN_MODELS
    from hotpath.panel import downloads

    found = {text for path in SCRIPTS for match in SAID.findall(path.read_text("utf-8")) for text in match if text}
    panel = (WEB / "hotpath_panel.js").read_text("utf-8")
    found.add(re.search(r'TOOLTIP = "(.+)"', panel).group(1))
    found.add(re.search(r'FORKED =\s+"(.+)"', (WEB / "saved_layouts.js").read_text("utf-8")).group(1))
    families = re.search(r"FAMILIES = \{(.*?)\}", panel, re.DOTALL).group(1)
    found |= set(re.findall(r': "(.+?)"', families)) | set(downloads.UNFINISHED)
    found |= {text for model in KNOWN_MODELS for text in (model.about, model.licence)}
    found |= {library.used_for for library in LIBRARIES} | {"Host", "Device"} | cache_names()
    for path in (WEB / "layouts").glob("*.json"):
        notes = json.loads(path.read_text("utf-8"))["notes"]
        found |= {note for of_node in notes.values() for _, note in of_node.values()}
    return found


def cache_names():
    """Of every cache in the pack, in memory and on the disk."""
    rooms = [path for path in WEB.parent.glob("*/**/*.py") if path.relative_to(WEB.parent).parts[0][0] not in "._"]
    return {name for path in rooms if "tests" not in path.parts for name in CACHE.findall(path.read_text("utf-8"))}


CACHE = re.compile(r'(?:named_cache|listed\(BoundedCache|disk_tier)\(\s*"([^"]+)"')
# Names and figures that are the same in every language.
UNTRANSLATED = {"InstantID", "ColorMNet", "Deep Exemplar", "Qwen-VL", "AILab QwenVL", "Apache-2.0"}


def test_the_front_end_speaks_chinese():
    said, chinese = said_by_the_front_end(), json.loads((WEB / "words" / "zh.json").read_text("utf-8"))
    assert len(said) > 80
    assert said - chinese.keys() <= UNTRANSLATED, "web/words/zh.json lacks these"
    assert chinese.keys() <= said, f"nothing says these any more: {chinese.keys() - said}"
    for english, words in chinese.items():
        assert re.search("[\u3400-\u9fff]", words) or "{" in words or not re.search("[a-z]", words), words
        assert set(re.findall(r"\{\w+\}", english)) == set(re.findall(r"\{\w+\}", words)), english
        assert not re.search("[\u3400-\u9fff][,;:?!(]|[,;:)][\u3400-\u9fff]", words), words


def test_styles_stay_inside_the_panel():
    """Every rule is about the panel or a report of ours, so that no other part of ComfyUI changes."""
    source = re.sub(r"/\*.*?\*/", "", (WEB / "hotpath_panel.css").read_text(encoding="utf-8"), flags=re.DOTALL)
    selectors = [part.strip() for part in re.findall(r"([^{}]+)\{", source)]
    assert selectors and all(
        one.strip().startswith((".hotpath-panel", ".hotpath-report"))
        for s in selectors
        for one in re.split(r",(?![^(]*\))", s)
    )
    assert "url(" not in source and "@import" not in source
