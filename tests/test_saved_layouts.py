"""Widget values and prompts of older layouts: every table against the nodes it speaks of, and both of its readers."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hotpath.host import saved_layouts, shadowed
from hotpath.nodes import NODE_CLASS_MAPPINGS
from saved_values import SAVED, named, saved_names, widget_values

ROOT = Path(__file__).resolve().parent.parent
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN")
TABLE = saved_layouts.table()


def widgets(node_id: str) -> dict[str, tuple[str, dict[str, Any]]]:
    """Name to (section, options) of what has a widget, in the order of the browser."""
    found = {}
    declared = NODE_CLASS_MAPPINGS[node_id].INPUT_TYPES()
    for section in ("required", "optional"):
        for name, spec in declared.get(section, {}).items():
            if isinstance(spec[0], list) or spec[0] in WIDGETS:
                options = dict(spec[1]) if len(spec) > 1 else {}
                if isinstance(spec[0], list):
                    options.setdefault("default", spec[0][0] if spec[0] else None)
                found[name] = (section, options)
    return found


@pytest.mark.parametrize("node_id", TABLE["layouts"])
def test_a_table_is_true_of_its_node(node_id):
    layouts = TABLE["layouts"][node_id]
    ours = widgets(node_id)
    assert [widget["name"] for widget in layouts[0]] == list(ours), "the first layout is the present one"
    renamed, gone = TABLE["rename"].get(node_id, {}), set(TABLE["dropped"].get(node_id, ()))
    for layout in layouts[1:]:
        now = {renamed.get(widget["name"], widget["name"]) for widget in layout} - gone
        assert now <= set(ours), f"{now - set(ours)} are no inputs now: rename or drop them"
        lacking = {name for name, (section, _) in ours.items() if section == "required"} - now
        assert lacking <= set(TABLE["defaults"].get(node_id, {})), "an older prompt would be refused for what it lacks"
    for name, value in TABLE["defaults"].get(node_id, {}).items():
        assert ours[name][1]["default"] == value
    assert set(TABLE["notes"].get(node_id, {})) <= gone


def test_every_table_is_read():
    source = (ROOT / "web" / "saved_layouts.js").read_text(encoding="utf-8")
    for path in (ROOT / "web" / "layouts").glob("*.json"):
        assert f'"{path.stem}"' in source.partition("const TABLES")[2].partition(";")[0]


@pytest.mark.parametrize(("node_id", "values", "expected", "notes"), SAVED)
def test_saved_values_find_their_names(node_id, values, expected, notes):
    found = widget_values(node_id, values)
    assert found is not None and expected.items() <= found.items()
    assert set(found) <= set(widgets(node_id))


SEED, TEXT = {"name": "seed", "type": "INT"}, {"name": "text", "type": "STRING"}
MODE = {"name": "mode", "type": "COMBO", "options": ["fast", "slow"]}
ADDED = {"name": "added", "type": "BOOLEAN", "optional": True}


@pytest.mark.parametrize(
    ("layout", "values", "found", "forked"),
    [
        ([SEED, TEXT], [1, "x"], {"seed": 1, "text": "x"}, ...),
        ([SEED, TEXT], [1, "fixed", "x"], {"seed": 1, saved_layouts.CONTROL: "fixed", "text": "x"}, ...),
        ([SEED], [1], {"seed": 1}, ...),
        ([TEXT, MODE], ["fixed", "fast"], {"text": "fixed", "mode": "fast"}, ...),
        ([TEXT, TEXT | {"name": "more"}], ["a", "fixed"], {"text": "a", "more": "fixed"}, ...),
        ([SEED, TEXT], [1], None, ...),
        ([SEED, ADDED], [1], {"seed": 1}, ...),
        ([SEED, ADDED, TEXT], [1], None, ...),
        ([SEED], [True], None, ...),
        ([ADDED], [1], None, {}),
        ([TEXT], [1], None, ...),
        ([MODE], ["other"], None, ...),
        ([SEED, ADDED], [1, "odd"], None, {"seed": 1}),
        ([SEED, TEXT], [1, 5], None, ...),
        ([SEED, ADDED], [1, True, "more"], None, {"seed": 1, "added": True}),
    ],
)
def test_values_are_named_where_all_of_them_are_explained(layout, values, found, forked):
    assert named(layout, values) == found
    assert named(layout, values, True) == (found if forked is ... else forked)


def test_older_names_and_words_become_the_present_ones(monkeypatch):
    rules = {
        "layouts": {"N": []},
        "rename": {"N": {"old": "new"}},
        "values": {"N": {"mode": {"quick": "fast"}}},
        "dropped": {"N": ["gone"]},
        "defaults": {},
    }
    monkeypatch.setattr(saved_layouts, "table", lambda: rules)
    older = {"old": "quick", "mode": "quick", "gone": 1, saved_layouts.CONTROL: "fixed"}
    assert saved_layouts.present("N", older) == {"new": "quick", "mode": "fast"}
    assert saved_layouts.present("N", {"mode": ["3", 0], "old": 1, "new": 2}) == {"mode": ["3", 0], "old": 1, "new": 2}
    assert saved_layouts.present("N", {"mode": "slow"}) == {"mode": "slow"}
    other = {"1": {"class_type": "LoadImage", "inputs": {saved_layouts.CONTROL: "fixed"}}}
    assert saved_layouts.migrate_prompt(other) == other


def test_an_older_prompt_has_all_it_needs():
    prompt = {
        "1": {
            "class_type": "DeepExColorVideoNode",
            "inputs": {"video_frames": ["2", 0], "target_width": 64, "wls_filter_on": True, "lambda_value": 500.0},
        },
        "2": {"class_type": "LoadImage", "inputs": {"image": "a.png"}},
    }
    data = saved_layouts.migrate_queued({"prompt": prompt, "client_id": "me"})
    assert data["prompt"]["1"]["inputs"] == {
        "video_frames": ["2", 0],
        "target_width": 64,
        "use_torch_compile": False,
        "use_sage_attention": False,
    }
    assert data["prompt"]["2"] == prompt["2"] and data["client_id"] == "me"
    assert saved_layouts.migrate_queued({"client_id": "me"}) == {"client_id": "me"}


def test_a_node_of_another_shape_leaves_the_others_to_be_migrated():
    older = {"class_type": "DeepExColorVideoNode", "inputs": {"target_width": 64, "lambda_value": 500.0}}
    odd = [5, None, {}, {"class_type": ["a"]}, {"class_type": {}}, *({**older, "inputs": i} for i in (None, [1], "a"))]
    prompt = {str(i): node for i, node in enumerate([*odd, older])}
    found = saved_layouts.migrate_prompt(prompt)
    assert list(found.values())[:-1] == odd
    assert "lambda_value" not in found[str(len(odd))]["inputs"]


def test_a_pack_that_has_an_id_of_ours_gets_what_it_was_sent(monkeypatch, caplog):
    theirs = type("Theirs", (), {"__module__": "/packs/older.nodes", "RELATIVE_PYTHON_MODULE": "custom_nodes.older"})
    ours = NODE_CLASS_MAPPINGS["ColorMNetVideo"]
    measured = type("Measured", (ours,), {"__module__": "/packs/measuring"})
    registered = {"DeepExColorVideoNode": theirs, "Qwen": theirs, "ColorMNetVideo": measured, "LoadImage": theirs}
    monkeypatch.setitem(sys.modules, "nodes", SimpleNamespace(NODE_CLASS_MAPPINGS=registered))
    older = {name: {"class_type": name, "inputs": {"post_processor": "none"}} for name in list(registered)[::2]}
    found = saved_layouts.migrate_queued({"prompt": older})["prompt"]
    assert found["DeepExColorVideoNode"] == older["DeepExColorVideoNode"]
    assert "post_processor" not in found["ColorMNetVideo"]["inputs"]
    assert shadowed.shadowed(NODE_CLASS_MAPPINGS) == {"older": ["DeepExColorVideoNode", "Qwen"]}
    shadowed.tell_shadowed(NODE_CLASS_MAPPINGS)
    assert "DeepExColorVideoNode, Qwen are not this pack's but those of the pack older" in caplog.text


def test_a_value_that_is_there_is_kept():
    prompt = {"1": {"class_type": "AILab_QwenVL", "inputs": {"attention_mode": "sdpa"}}}
    assert saved_layouts.migrate_prompt(prompt)["1"]["inputs"]["attention_mode"] == "sdpa"


def in_the_browser(tmp_path: Path, cases: list[list[Any]]) -> list[Any]:
    """What the browser's half makes of [node id, values, widgets, names or null]."""
    source = (ROOT / "web" / "saved_layouts.js").read_text(encoding="utf-8")
    source = source.replace('import { app } from "../../scripts/app.js";', "const app = { registerExtension() {} };")
    source = source.replace('import { declaredHere } from "./node_families.js";', "")
    (tmp_path / "saved_layouts.mjs").write_text(source, encoding="utf-8")
    tables = [json.loads(path.read_text("utf-8")) for path in sorted((ROOT / "web" / "layouts").glob("*.json"))]
    (tmp_path / "run.mjs").write_text(
        "import { merged, migrated } from './saved_layouts.mjs';\n"
        f"const table = merged({json.dumps(tables)}); const cases = {json.dumps(cases)};\n"
        "console.log(JSON.stringify(cases.map((given) => migrated(table, ...given))));\n",
        encoding="utf-8",
    )
    made = subprocess.run(["node", "run.mjs"], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True)
    return list(json.loads(made.stdout))


def shown_widgets(node_id: str) -> list[dict[str, Any]]:
    names = list(widgets(node_id))
    if "seed" in names:
        names.insert(names.index("seed") + 1, saved_layouts.CONTROL)
    return [{"name": name, "value": "as it was"} for name in names]


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
@pytest.mark.parametrize("by_name", [False, True])
def test_the_browsers_half_agrees(tmp_path, by_name):
    cases = [
        [node_id, values, shown_widgets(node_id), saved_names(node_id, values) if by_name else None]
        for node_id, values, _, _ in SAVED
    ]
    for (node_id, values, expected, notes), (_, _, shown, _), change in zip(
        SAVED, cases, in_the_browser(tmp_path, cases), strict=True
    ):
        if not expected:
            assert change is None  # the present layout is left alone
            continue
        python = widget_values(node_id, values)
        browser = {w["name"]: v for w, v in zip(shown, change["values"], strict=True) if v != "as it was"}
        browser.pop(saved_layouts.CONTROL, None)
        assert browser == python
        assert len(change["notes"]) == notes and all(note.startswith("Th") for note in change["notes"])


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_names_say_more_than_the_kinds_of_values(tmp_path):
    """Two numbers that changed places look alike; a text of the front end's own on a node is no value; a few may be missing."""
    shown = shown_widgets("DeepExColorImageNode")
    names = {widget["name"]: number for number, widget in enumerate(shown)}
    turned = {"target_height": 432, "target_width": 768, **dict(list(names.items())[2:])}
    written = {**names, "$$node-text-preview": "done"}
    part = dict(list(names.items())[:2])
    cases = [["DeepExColorImageNode", list(one.values()), shown, one] for one in (turned, written, part)]
    change, *none = in_the_browser(tmp_path, cases)
    assert change["values"][:2] == [768, 432] and change["notes"] == []
    assert none == [None, None]
