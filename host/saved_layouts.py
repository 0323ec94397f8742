"""Graphs and prompts saved with another layout of the same node ids, recognised and rewritten to the present one.

Saved widget values have no names: what was inserted or removed since shifts all that follows. A layout is told by the
number and the types of its values. The tables are files that the browser's half, web/saved_layouts.js, reads as well:
web/layouts/<pack>.json.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from .shadowed import shadowed

TABLES = Path(__file__).parent.parent / "web" / "layouts"
CONTROL = "control_after_generate"  # the browser's own widget after a seed
CONTROLS = ("fixed", "increment", "decrement", "randomize")


@lru_cache(maxsize=1)
def table() -> dict[str, dict[str, Any]]:
    """All tables in one. By section, each by node id:

    layouts: [[widget, ...], ...], the present one first, then from new to old; rename: {old input: present input};
    values: {input: {old word: present word}}; dropped: [input, ...]; defaults: {input that older prompts lack: value};
    notes: {dropped input: [value that needs no note, note]}.
    """
    merged: dict[str, dict[str, Any]] = {}
    for path in sorted(TABLES.glob("*.json")):
        for section, entries in json.loads(path.read_text(encoding="utf-8")).items():
            merged.setdefault(section, {}).update(entries)
    return merged


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


def named(layout: Sequence[Mapping[str, Any]], values: Sequence[Any], forked: bool = False) -> dict[str, Any] | None:
    """The values by widget name when `layout` explains every one of them, else None.

    A value after the seed may be the browser's own (fixed, randomize, ...). Widgets at the end may be missing. forked: the
    last values need no explanation, where they stand in place of this pack's own inputs.
    """
    found: dict[str, Any] = {}
    rest = list(values)
    for index, widget in enumerate(layout):
        if not rest:
            return found if all(w.get("optional") for w in layout[index:]) else None
        if not accepts(widget, rest[0]):
            return found if forked and widget.get("optional") else None
        found[widget["name"]] = rest.pop(0)
        if widget["name"] == "seed" and rest and rest[0] in CONTROLS:
            found[CONTROL] = rest.pop(0)
    return None if rest and not forked else found


def widget_values(node_id: str, values: Sequence[Any]) -> dict[str, Any] | None:
    """Inputs by their present names for the saved `widgets_values` of a node; None when no known layout fits."""
    for forked in (False, True):
        for layout in table()["layouts"].get(node_id, []):
            if (found := named(layout, values, forked)) is not None:
                return present(node_id, found)
    return None


def present(node_id: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Inputs of a `node_id` under their present names, with the words of older choices translated; what is gone is left out."""
    rules = table()
    renamed, words_of = rules["rename"].get(node_id, {}), rules["values"].get(node_id, {})
    gone = {CONTROL, *rules["dropped"].get(node_id, ())}
    result: dict[str, Any] = {}
    for name, value in inputs.items():
        if name in gone:
            continue
        words = words_of.get(name, {})
        now = renamed.get(name, name)
        # An input that has its present name already is not overwritten by its older one.
        result[name if now in inputs else now] = words.get(value, value) if isinstance(value, str) else value
    return result


def migrate_prompt(prompt: Mapping[str, Any]) -> dict[str, Any]:
    """An API-format prompt whose nodes have their present inputs; a node without a table is left as it is, and so is one whose
    id another pack has in this ComfyUI: to that pack the older inputs may be the present ones."""
    foreign = {node_id for theirs in shadowed(table()["layouts"]).values() for node_id in theirs}
    known, defaults = table()["layouts"].keys() - foreign, table()["defaults"]
    changed: dict[str, Any] = {}
    for key, node in prompt.items():
        kind = node.get("class_type") if isinstance(node, Mapping) else None
        # What has another shape is refused where prompts are checked; the other nodes are migrated.
        if isinstance(kind, str) and kind in known and isinstance(node.get("inputs", {}), Mapping):
            node = {**node, "inputs": {**defaults.get(kind, {}), **present(kind, node.get("inputs", {}))}}
        changed[key] = node
    return changed


def migrate_queued(data: dict[str, Any]) -> dict[str, Any]:
    """What a browser or a program posts to ComfyUI's queue, its prompt migrated; a handler for add_on_prompt_handler."""
    if isinstance(data.get("prompt"), dict):
        data["prompt"] = migrate_prompt(data["prompt"])
    return data
