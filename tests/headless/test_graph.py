"""Workflow files: what is read, what is refused and in which words, order and cycles, values set from outside."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
from hotpath.headless.graph import Graph, Link, WorkflowError
from hotpath.headless.validation import InvalidWorkflow, NeedsComfyUI, types_match, validate


def node(class_type: str, title: str = "", **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs, **({"_meta": {"title": title}} if title else {})}


CHAIN = {
    "3": node("Save", images=["2", 0], prefix="a"),
    "1": node("Load", image="me.png"),
    "2": node("Blur", image=["1", 0], radius=3),
}


class Load:
    RETURN_TYPES = ("IMAGE", "MASK")

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"image": (["me.png", "you.png"],)}}


class Blur:
    RETURN_TYPES = ("IMAGE",)

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {"image": ("IMAGE",), "radius": ("INT", {"min": 0, "max": 9})},
            "optional": {"mask": ("MASK",), "gamma": ("FLOAT", {"min": 0.1, "max": 4.0}), "either": ("IMAGE,MASK",)},
            "hidden": {"unique_id": "UNIQUE_ID"},
        }


class Save:
    RETURN_TYPES = ()
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"images": ("IMAGE",), "prefix": ("STRING", {"default": "x"})}}


CATALOG = {"Load": Load, "Blur": Blur, "Save": Save}


def checked(data: dict[str, Any]) -> Graph:
    graph = Graph.parse(data)
    validate(graph, CATALOG)
    return graph


def problems(data: dict[str, Any], catalog: dict[str, Any] | None = None) -> list[str]:
    with pytest.raises(InvalidWorkflow) as caught:
        validate(Graph.parse(data), catalog or CATALOG)
    return [str(problem) for problem in caught.value.problems]


def test_links_and_values_are_told_apart():
    graph = Graph.parse(CHAIN)
    assert graph.nodes["2"].inputs == {"image": Link("1", 0), "radius": 3}
    assert graph.prompt() == CHAIN


def test_the_order_follows_the_links_and_not_the_file():
    assert Graph.parse(CHAIN).order(["3"]) == ["1", "2", "3"]


def test_a_chain_longer_than_pythons_recursion_limit():
    long = {str(i): node("Blur", image=[str(i - 1), 0], radius=1) for i in range(1, 5000)}
    long["0"] = node("Load", image="me.png")
    assert Graph.parse(long).order(["4999"])[:2] == ["0", "1"]


def test_a_circle_is_named():
    data = {"1": node("Blur", image=["2", 0]), "2": node("Blur", image=["1", 0]), "3": node("Save", images=["2", 0])}
    with pytest.raises(WorkflowError, match=r"circle: #2 Blur -> #1 Blur -> #2 Blur"):
        Graph.parse(data).order(["3"])


def test_a_node_that_needs_itself():
    with pytest.raises(WorkflowError, match="circle: #1 Blur -> #1 Blur"):
        Graph.parse({"1": node("Blur", image=["1", 0])}).order(["1"])


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ([], "API format"),
        ({}, "API format"),
        ({"1": {"inputs": {}}}, "no class_type"),
        ({"1": {"class_type": "A", "inputs": []}}, "not an object"),
        ({"1": node("Blur", image=["7", 0])}, "node '7', which is missing"),
        ({"nodes": [], "links": [], "version": 0.4}, r"Export \(API\)"),
        (
            {"1": node("Blur", image=functools.reduce(lambda inner, _: {"a": inner}, range(300), 1))},
            "nested deeper than",
        ),
    ],
)
def test_what_is_no_workflow_is_refused(data: Any, words: str):
    with pytest.raises(WorkflowError, match=words):
        Graph.parse(data)


def test_files_that_cannot_be_read(tmp_path: Path):
    with pytest.raises(WorkflowError, match="There is no file"):
        Graph.load(tmp_path / "no.json")
    with pytest.raises(WorkflowError, match="folder"):
        Graph.load(tmp_path)
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(WorkflowError, match=r"broken\.json is not JSON"):
        Graph.load(tmp_path / "broken.json")
    (tmp_path / "marked.json").write_bytes(b'\xef\xbb\xbf{"1": {"class_type": "A"}}')
    assert list(Graph.load(tmp_path / "marked.json").nodes) == ["1"], "as PowerShell writes UTF-8"
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(WorkflowError, match=r"deep\.json is not JSON"):
        Graph.load(tmp_path / "deep.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(WorkflowError, match="not JSON"):
        Graph.load(tmp_path / "binary.json")


def test_a_prompt_as_a_server_takes_it(tmp_path: Path):
    (tmp_path / "a.json").write_text(json.dumps({"prompt": CHAIN, "client_id": "x"}))
    assert set(Graph.load(tmp_path / "a.json").nodes) == {"1", "2", "3"}


def test_values_from_outside():
    graph = Graph.parse({**CHAIN, "1": node("Load", title="The person", image="me.png")})
    graph.set_input("2.radius=7")
    graph.set_input("The person.image=you.png")
    graph.set_input("Save.prefix=a=b.c")
    assert graph.nodes["2"].inputs["radius"] == 7
    assert graph.nodes["1"].inputs["image"] == "you.png"
    assert graph.nodes["3"].inputs["prefix"] == "a=b.c"


def test_a_text_stays_a_text():
    graph = Graph.parse(CHAIN)
    graph.set_input("3.prefix=12")
    assert graph.nodes["3"].inputs["prefix"] == "12"


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("radius=3", "not node.input=value"),
        ("2.radius", "not node.input=value"),
        ("9.radius=3", "no node called '9'"),
        ("2.size=3", "no input 'size'"),
        ("2.image=x", "linked"),
    ],
)
def test_values_that_cannot_be_set(assignment: str, words: str):
    with pytest.raises(WorkflowError, match=words):
        Graph.parse(CHAIN).set_input(assignment)


def test_a_name_that_several_nodes_have():
    data = {"1": node("Load", image="a"), "2": node("Load", image="b")}
    with pytest.raises(WorkflowError, match="several nodes are called 'Load'; use an id: #1 Load, #2 Load"):
        Graph.parse(data).set_input("Load.image=c")


def test_a_right_graph_passes_and_values_are_converted():
    data = {**CHAIN, "2": node("Blur", image=["1", 0], radius="4", gamma=1, left_over=["a", "b", "c"])}
    graph = checked(data)
    assert graph.nodes["2"].inputs["radius"] == 4
    assert isinstance(graph.nodes["2"].inputs["gamma"], float)


def test_nodes_that_only_comfyui_has():
    data = {**CHAIN, "7": node("KSampler", seed=1), "8": node("CheckpointLoaderSimple")}
    with pytest.raises(NeedsComfyUI) as caught:
        checked(data)
    text = str(caught.value)
    assert "KSampler (#7), CheckpointLoaderSimple (#8)" in text
    assert "--server" in text and "COMFYUI_PATH" in text


def test_nothing_to_show():
    with pytest.raises(WorkflowError, match="output node"):
        checked({"1": CHAIN["1"]})


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        ({"image": ["1", 0]}, "Blur (#2), input 'radius': it is required (INT)"),
        ({"image": ["1", 0], "radius": 10}, "10 is above the largest value, 9"),
        ({"image": ["1", 0], "radius": -1}, "-1 is below the smallest value, 0"),
        ({"image": ["1", 0], "radius": 1, "gamma": float("nan")}, "below the smallest"),
        ({"image": ["1", 0], "radius": "many"}, "'many' is not a INT"),
        ({"image": ["1", 0], "radius": 1e999}, "inf is not a INT"),
        ({"image": ["1", 1], "radius": 1}, "it takes IMAGE, and Load (#1) gives MASK"),
        ({"image": ["1", 5], "radius": 1}, "has 2 outputs, so there is no output 5"),
        ({"image": ["1", 0], "radius": [1, 2, 3]}, "a list must be a link"),
    ],
)
def test_wrong_inputs_are_named(inputs: dict[str, Any], expected: str):
    (found,) = problems({**CHAIN, "2": node("Blur", **inputs)})
    assert expected in found


def test_all_problems_come_at_once():
    data = {"1": node("Load", image="them.png"), "2": node("Blur", image=["1", 0], radius=99), "3": CHAIN["3"]}
    found = problems(data)
    assert any("'them.png' is not one of: 'me.png', 'you.png'" in p for p in found)
    assert any("99" in p for p in found)


def test_a_part_that_leads_nowhere_is_not_checked():
    checked({**CHAIN, "9": node("Blur", radius=99)})


def test_unions_of_types():
    for output in (0, 1):
        checked({**CHAIN, "2": node("Blur", image=["1", 0], radius=1, either=["1", output])})


class AnyType(str):
    def __ne__(self, other: object) -> bool:
        return False

    __hash__ = str.__hash__


@pytest.mark.parametrize(
    ("produced", "wanted", "fits"),
    [
        ("IMAGE", "IMAGE", True),
        ("IMAGE", "MASK", False),
        ("*", "MASK", True),
        ("IMAGE", "*", True),
        ("IMAGE,MASK", "MASK", True),
        ("IMAGE, MASK", "LATENT,MASK", True),
        (["a", "b"], ["a", "b"], True),
        (["a", "b"], ["a"], False),
        (["a"], "COMBO", True),
        ("STRING", ["a"], False),
        (AnyType("*"), "MASK", True),
        ("IMAGE", AnyType("x"), True),
    ],
)
def test_types_that_fit(produced: Any, wanted: Any, fits: bool):
    assert types_match(produced, wanted) is fits


class Picky(Save):
    @classmethod
    def VALIDATE_INPUTS(cls, prefix, images):
        assert images is None  # its value is not there yet
        return True if prefix.islower() else "prefix must be lower case"


class TakesAll(Blur):
    @classmethod
    def VALIDATE_INPUTS(cls, **values):
        return True


class Typed(Save):
    @classmethod
    def VALIDATE_INPUTS(cls, input_types):
        return True if input_types["images"] == "MASK" else f"got {input_types['images']}"


def test_a_nodes_own_check(monkeypatch):
    catalog = {**CATALOG, "Save": Picky}
    validate(Graph.parse(CHAIN), catalog)
    (found,) = problems({**CHAIN, "3": node("Save", images=["2", 0], prefix="LOUD")}, catalog)
    assert "prefix must be lower case" in found
    monkeypatch.setattr(Picky, "VALIDATE_INPUTS", lambda prefix, images: prefix + 1)
    (found,) = problems(CHAIN, catalog)
    assert "its own check of the inputs failed: TypeError: " in found


def test_a_node_that_checks_everything_itself_is_not_checked_twice():
    data = {**CHAIN, "2": node("Blur", image=["1", 0], radius=99)}
    validate(Graph.parse(data), {**CATALOG, "Blur": TakesAll})


def test_a_node_that_checks_types_itself():
    catalog = {**CATALOG, "Save": Typed}
    validate(Graph.parse({"1": CHAIN["1"], "3": node("Save", images=["1", 1], prefix="a")}), catalog)
    (found,) = problems({"1": CHAIN["1"], "3": node("Save", images=["1", 0], prefix="a")}, catalog)
    assert "got IMAGE" in found
