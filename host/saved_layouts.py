"""Prompts saved with other inputs of the same node ids, rewritten to the present ones.

The tables, web/layouts/<pack>.json, are read by web/saved_layouts.js as well, for graphs: their widget values have no names,
so that a layout is told by the number and the types of its values.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from .shadowed import shadowed

TABLES = Path(__file__).parent.parent / "web" / "layouts"
CONTROL = "control_after_generate"  # the browser's own widget after a seed


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
