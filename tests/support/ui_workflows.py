"""A workflow as the front end saves it, turned into the API prompt the front end would queue.

Widget values are assigned in the order the server declares inputs in (`/object_info`), with one extra value after a seed,
which is what makes an inserted or reordered input visible.
"""

from __future__ import annotations

from typing import Any

WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
DYNAMIC = "COMFY_DYNAMICCOMBO_V3"  # a choice with inputs of its own, which follow it


def to_prompt(workflow: dict[str, Any], object_info: dict[str, Any]) -> dict[str, Any]:
    """Raises KeyError for a node the server does not have, AssertionError for values that do not fit its widgets."""
    links = {link[0]: (str(link[1]), link[2]) for link in workflow["links"]}
    prompt = {}
    for node in workflow["nodes"]:
        if node["type"] in ("Note", "MarkdownNote", "Reroute"):
            continue
        info = object_info[node["type"]]
        inputs: dict[str, Any] = {}
        connected = {i["name"]: i["link"] for i in node.get("inputs", ()) if i.get("link") is not None}
        values = list(node.get("widgets_values") or [])
        for section in ("required", "optional"):
            for name, (kind, *rest) in info["input"].get(section, {}).items():
                options = rest[0] if rest else {}
                is_widget = isinstance(kind, list) or (kind in WIDGETS and not options.get("forceInput"))
                if kind == DYNAMIC:
                    # A hidden one keeps older prompts valid, and what it holds makes newer ones valid in older releases.
                    _take_dynamic(name, options, values or [options["options"][0]["key"]], inputs)
                    continue
                if is_widget and values:
                    inputs[name] = values.pop(0)
                    if name in ("seed", "noise_seed") or options.get("control_after_generate"):
                        assert values.pop(0) in ("fixed", "randomize", "increment", "decrement")
                    if options.get("image_upload"):
                        assert values.pop(0) == "image"
                elif is_widget and section == "required":
                    inputs[name] = options.get("default", kind[0] if isinstance(kind, list) and kind else None)
                if name in connected:
                    inputs[name] = list(links[connected[name]])
        assert not values, f"{node['type']} has widget values left over: {values}"
        declared = {**info["input"].get("required", {}), **info["input"].get("optional", {})}
        assert connected.keys() <= declared.keys(), (
            f"{node['type']} lost the inputs {connected.keys() - declared.keys()}"
        )
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt


def _take_dynamic(name: str, options: dict[str, Any], values: list[Any], inputs: dict[str, Any]) -> None:
    """A choice whose option has inputs of its own: named choice.input, their values follow the choice's."""
    inputs[name] = values.pop(0)
    chosen = next(option for option in options["options"] if option["key"] == inputs[name])
    for section in ("required", "optional"):
        for inner, (kind, *rest) in chosen.get("inputs", {}).get(section, {}).items():
            if kind == DYNAMIC:
                _take_dynamic(f"{name}.{inner}", rest[0], values, inputs)
            elif values:
                inputs[f"{name}.{inner}"] = values.pop(0)
