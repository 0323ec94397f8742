"""Graphs saved with another layout of the same node ids: recognised by the values, rewritten to the present layout.

Saved widget values have no names. Three layouts share the ids QwenVL and Qwen2.5VL, two the ids Qwen and Qwen2.5 and
AILab_QwenVL_Advanced; they differ in length and types. The table is a file that the browser's half reads as well:
web/qwen_vl_layouts.json.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

TABLE = Path(__file__).parent.parent / "web" / "qwen_vl_layouts.json"
CONTROLS = ("fixed", "increment", "decrement", "randomize")


@lru_cache(maxsize=1)
def table() -> dict[str, Any]:
    """{"layouts": {id: [[widget, ...], ...]}, "rename": {id: {old input: new input}}, "values": {input: {old: new}}}."""
    return dict(json.loads(TABLE.read_text(encoding="utf-8")))


def accepts(widget: Mapping[str, Any], value: Any) -> bool:
    """Whether `value` can be what `widget` held."""
    kind = widget["type"]
    if kind == "BOOLEAN":
        return isinstance(value, bool)
    if kind in ("INT", "FLOAT"):
        return isinstance(value, int | float) and not isinstance(value, bool)
    if not isinstance(value, str):
        return False
    return "options" not in widget or value in widget["options"]


def named(layout: Sequence[Mapping[str, Any]], values: Sequence[Any]) -> dict[str, Any] | None:
    """The values by widget name when `layout` explains every one of them, else None.

    A value after the seed may be the browser's own (fixed, randomize, ...). Widgets at the end may be missing.
    """
    found: dict[str, Any] = {}
    rest = list(values)
    for index, widget in enumerate(layout):
        if not rest:
            return found if all(w.get("optional") for w in layout[index:]) else None
        if not accepts(widget, rest[0]):
            return None
        found[widget["name"]] = rest.pop(0)
        if widget["name"] == "seed" and rest and rest[0] in CONTROLS:
            found["control_after_generate"] = rest.pop(0)
    return None if rest else found


def widget_values(node_id: str, values: Sequence[Any]) -> dict[str, Any] | None:
    """Inputs by their present names for the saved `widgets_values` of a node; None when no known layout fits."""
    for layout in table()["layouts"].get(node_id, []):
        if (found := named(layout, values)) is not None:
            return present(node_id, found)
    return None


def present(node_id: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Inputs of a `node_id` under their present names, with the words of older choices translated; what is gone is left out."""
    rules = table()
    renamed = rules["rename"].get(node_id, {})
    result: dict[str, Any] = {}
    for name, value in inputs.items():
        if name in rules["dropped"]:
            continue
        words = rules["values"].get(name, {})
        now = renamed.get(name, name)
        # An input that has its present name already is not overwritten by its older one.
        result[name if now in inputs else now] = words.get(value, value) if isinstance(value, str) else value
    return result


def migrate_prompt(prompt: Mapping[str, Any]) -> dict[str, Any]:
    """An API-format prompt whose Qwen nodes have their present input names; every other node is left as it is."""
    known = table()["layouts"]
    changed: dict[str, Any] = {}
    for key, node in prompt.items():
        if isinstance(node, Mapping) and node.get("class_type") in known:
            node = {**node, "inputs": present(node["class_type"], node.get("inputs", {}))}
        changed[key] = node
    return changed
