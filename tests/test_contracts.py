"""Every compatible node keeps the ids, inputs, order, types, defaults, ranges and outputs of the pack it replaces."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest

CONTRACTS = sorted((Path(__file__).parent / "data" / "contracts").glob("*.json"))


def cases() -> list[Any]:
    return [
        pytest.param(node_id, node, id=f"{path.stem}-{node_id}")
        for path in CONTRACTS
        for node_id, node in json.loads(path.read_text("utf-8"))["nodes"].items()
    ]


@pytest.fixture
def node_classes() -> dict[str, type[Any]]:
    from hotpath.nodes import NODE_CLASS_MAPPINGS

    return NODE_CLASS_MAPPINGS


def socket_type(declared: Any) -> str:
    return "COMBO" if isinstance(declared, list) else str(declared)


@pytest.mark.parametrize(("node_id", "contract"), cases())
def test_contract(
    node_id: str, contract: dict[str, Any], node_classes: dict[str, type[Any]], headless_host: Any
) -> None:
    assert node_id in node_classes, f"{node_id} is missing"
    node = node_classes[node_id]
    assert contract["function"] == node.FUNCTION
    assert callable(getattr(node, node.FUNCTION))
    assert getattr(node, "OUTPUT_NODE", False) == contract["output_node"]

    declared = node.INPUT_TYPES()
    sections = {name: section for section in ("required", "optional") for name in declared.get(section, {})}
    names = list(sections)
    wanted = [entry["name"] for entry in contract["inputs"]]
    assert [n for n in names if n in wanted] == wanted, "the order of inputs"
    extra = [n for n in names if n not in wanted]
    assert all(sections[n] == "optional" for n in extra), f"new inputs must be optional: {extra}"

    widgets = [n for n in names if is_widget(declared[sections[n]][n])]
    wanted_widgets = [entry["name"] for entry in contract["inputs"] if entry["widget"]]
    assert widgets[: len(wanted_widgets)] == wanted_widgets, "new widgets come after the old ones"

    for entry in contract["inputs"]:
        kind, *rest = declared[sections[entry["name"]]][entry["name"]]
        options = rest[0] if rest else {}
        assert socket_type(kind) == entry["type"], entry["name"]
        if "default" in entry:
            assert options.get("default") == entry["default"], entry["name"]
        if entry.get("min") is not None:
            assert options["min"] <= entry["min"], entry["name"]
        if entry.get("max") is not None:
            assert options["max"] >= entry["max"], entry["name"]
        if entry.get("step") is not None and options.get("step") is not None:
            assert options["step"] <= entry["step"], entry["name"]
        if entry.get("options"):
            assert set(entry["options"]) <= set(kind), entry["name"]

    assert list(node.RETURN_TYPES)[: len(contract["outputs"])] == [o["type"] for o in contract["outputs"]]
    if direct := contract.get("direct_call"):
        parameters = [
            p for p in inspect.signature(getattr(node, node.FUNCTION)).parameters.values() if p.name != "self"
        ]
        assert [p.name for p in parameters][: len(direct["parameters"])] == direct["parameters"]
        for parameter in parameters:
            if parameter.name in direct["defaults"]:
                assert parameter.default == direct["defaults"][parameter.name], parameter.name
        for parameter in parameters[len(direct["parameters"]) :]:
            assert parameter.default is not inspect.Parameter.empty or parameter.kind is parameter.VAR_KEYWORD


def is_widget(declaration: Any) -> bool:
    kind, *rest = declaration
    forced = bool(rest and isinstance(rest[0], dict) and rest[0].get("forceInput"))
    return (isinstance(kind, list) or kind in ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")) and not forced


def test_every_node_is_described(node_classes: dict[str, type[Any]], headless_host: Any) -> None:
    for node_id, node in node_classes.items():
        assert getattr(node, "DESCRIPTION", ""), f"{node_id} has no DESCRIPTION"
        assert getattr(node, "DISPLAY_NAME", ""), f"{node_id} has no DISPLAY_NAME"
        tooltips = getattr(node, "OUTPUT_TOOLTIPS", ())
        assert len(tooltips) == len(node.RETURN_TYPES), f"{node_id}: a tooltip for each output"
        declared = node.INPUT_TYPES()
        for section in ("required", "optional"):
            for name, (_, *rest) in declared.get(section, {}).items():
                assert rest and rest[0].get("tooltip"), f"{node_id}.{name} has no tooltip"


def test_every_node_takes_what_it_declares_and_waits_for_nothing_else(
    node_classes: dict[str, type[Any]], headless_host: Any
) -> None:
    """ComfyUI hands each input over by its name, and leaves an optional one out where nothing is linked to it."""
    for node_id, node in node_classes.items():
        inputs = node.INPUT_TYPES()
        given = {*inputs.get("required", {}), *inputs.get("hidden", {})}
        taken = [p for p in inspect.signature(getattr(node, node.FUNCTION)).parameters.values() if p.name != "self"]
        if not any(p.kind is p.VAR_KEYWORD for p in taken):
            assert {*given, *inputs.get("optional", {})} <= {p.name for p in taken}, node_id
        waited_for = {p.name for p in taken if p.default is p.empty and p.kind is not p.VAR_KEYWORD}
        assert waited_for <= given, node_id


def test_without_any_model_every_list_has_something_to_show(
    node_classes: dict[str, type[Any]], headless_host: Any
) -> None:
    """The front end shows and sends nothing for an empty list, and ComfyUI then refuses the node without naming a cure."""
    upload = {("HotpathColorizeFile", "video")}  # it has a button
    for node_id, node in node_classes.items():
        for section in ("required", "optional"):
            for name, spec in node.INPUT_TYPES().get(section, {}).items():
                assert spec[0] or not isinstance(spec[0], list) or (node_id, name) in upload, f"{node_id}.{name}"
        # An input that is not there is told by ComfyUI, unless the check of the node fails first.
        check = getattr(node, "VALIDATE_INPUTS", None)
        missing = (
            [] if check is None else [p for p in inspect.signature(check).parameters.values() if p.default is p.empty]
        )
        assert not missing, node_id


def test_inputs_that_other_nodes_give_stop_no_node_from_being_remembered(
    node_classes: dict[str, type[Any]], headless_host: Any
) -> None:
    """Before a run ComfyUI asks IS_CHANGED and gives None for what is linked; a node that raises then runs every time."""
    asked = 0
    for node in node_classes.values():
        if hasattr(node, "IS_CHANGED"):
            declared = node.INPUT_TYPES()
            names = [name for group in ("required", "optional") for name in declared.get(group, {})]
            node.IS_CHANGED(**dict.fromkeys(names))
            asked += 1
    assert asked > 10
