"""Checks a graph before anything runs, by the rules ComfyUI validates a queued prompt with.

Values are converted as ComfyUI converts them (an INT given as "3" becomes 3), so that a graph which passes here gives
a node the same arguments there.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .. import nodes
from ..host.errors import kind_and_line
from .calls import call_over_lists
from .catalog import HIDDEN, InputDeclaration, declared_inputs
from .graph import Graph, Link, LooseList, Node, WorkflowError

SHOWN_CHOICES = 12


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, at a node and, where it has one, at an input."""

    node_id: str
    node: str
    input: str | None
    message: str

    def __str__(self) -> str:
        return f"{self.node}, input {self.input!r}: {self.message}" if self.input else f"{self.node}: {self.message}"


class InvalidWorkflow(WorkflowError):
    """The graph cannot run; `problems` says why, one entry per cause."""

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = problems
        lines = "\n".join(f"  - {problem}" for problem in problems)
        super().__init__(f"the workflow cannot run:\n{lines}")


QUEUE_IT = (
    "Queue it on a ComfyUI that runs with `--server http://127.0.0.1:8188`, or name a ComfyUI folder in COMFYUI_PATH or "
    "with `--comfyui FOLDER` and it is started for you."
)


class NeedsComfyUI(WorkflowError):
    """The graph uses nodes which do not exist without ComfyUI; `missing` lists them, `cure` is what to do then."""

    def __init__(self, missing: list[Node], cure: str = QUEUE_IT) -> None:
        self.missing = missing
        named = ", ".join(f"{node.class_type} (#{node.id})" for node in missing)
        count = "one node that is" if len(missing) == 1 else f"{len(missing)} nodes that are"
        text = f"the workflow uses {count} not there without ComfyUI: {named}. {cure}"
        if nodes.FAILED_FAMILIES:
            failed = "; ".join(f"{family}: {reason}" for family, reason in nodes.FAILED_FAMILIES.items())
            text += f" Node families of this pack that could not be loaded: {failed}."
        super().__init__(text)


def validate(graph: Graph, catalog: Mapping[str, type[Any]]) -> list[str]:
    """Check what the output nodes need, convert the values in place and return the ids of the output nodes.

    Raises NeedsComfyUI, InvalidWorkflow or (for a circle) WorkflowError.
    """
    missing = [node for node in graph.nodes.values() if node.class_type not in catalog]
    if missing:
        raise NeedsComfyUI(missing)
    outputs = [node.id for node in graph.nodes.values() if getattr(catalog[node.class_type], "OUTPUT_NODE", False)]
    if not outputs:
        raise WorkflowError(
            "nothing in the workflow shows or saves a result; add an output node such as SaveImage or PreviewImage."
        )
    problems: list[Problem] = []
    for node_id in graph.order(outputs):
        problems.extend(_check_node(graph.nodes[node_id], graph, catalog))
    if problems:
        raise InvalidWorkflow(problems)
    return outputs


def _check_node(node: Node, graph: Graph, catalog: Mapping[str, type[Any]]) -> list[Problem]:
    node_class = catalog[node.class_type]
    declared = declared_inputs(node_class)
    own_check = getattr(node_class, "VALIDATE_INPUTS", None)
    spec = inspect.getfullargspec(own_check) if own_check is not None else None
    # ComfyUI leaves out its own check of a value that the node checks itself.
    checked_by_node = set(spec.args) if spec is not None else set()
    checks_all = spec is not None and spec.varkw is not None
    problems: list[Problem] = []
    received: dict[str, Any] = {}

    def wrong(name: str | None, message: str) -> None:
        problems.append(Problem(node.id, str(node), name, message))

    for name, declaration in declared.items():
        if declaration.section == HIDDEN:
            continue
        if name not in node.inputs:
            if declaration.required:
                wrong(name, f"it is required ({declaration.kind_name}) and nothing is connected or set.")
            continue
        value = node.inputs[name]
        if isinstance(value, Link):
            source = graph.nodes[value.node]
            produced = list(getattr(catalog[source.class_type], "RETURN_TYPES", ()))
            if value.output >= len(produced):
                wrong(name, f"{source} has {len(produced)} outputs, so there is no output {value.output}.")
                continue
            received[name] = produced[value.output]
            if "input_types" not in checked_by_node and not types_match(received[name], declaration.kind):
                wrong(name, f"it takes {declaration.kind_name}, and {source} gives {_type_name(received[name])}.")
            continue
        if isinstance(value, LooseList):
            wrong(name, 'a list must be a link [node id, output number]; a list of values is {"__value__": [...]}.')
            continue
        try:
            node.inputs[name] = value = _convert(value, declaration)
        except (TypeError, ValueError, OverflowError):  # JSON has numbers without end: 1e999 is infinite
            wrong(name, f"{value!r} is not a {declaration.kind_name}.")
            continue
        if name not in checked_by_node and not checks_all and (message := _range_problem(value, declaration)):
            wrong(name, message)
    if own_check is not None and not problems:
        problems.extend(_ask_node(node, node_class, declared, checked_by_node, checks_all, received))
    return problems


def types_match(produced: Any, wanted: Any) -> bool:
    """Whether an output of type `produced` may go into an input of type `wanted`; both may be "A,B" unions or "*"."""
    # Asked with != on purpose: packs make "any" types of str subclasses that override only __ne__.
    if not produced != wanted:  # noqa: SIM202
        return True
    if "*" in (produced, wanted):
        return True
    if isinstance(produced, list | tuple):
        return wanted == "COMBO"
    if not isinstance(produced, str) or not isinstance(wanted, str):
        return False
    offered = {kind.strip() for kind in produced.split(",")}
    accepted = {kind.strip() for kind in wanted.split(",")}
    return "*" in offered | accepted or bool(offered & accepted)


def _type_name(kind: Any) -> str:
    return "COMBO" if isinstance(kind, list | tuple) else str(kind)


def _convert(value: Any, declaration: InputDeclaration) -> Any:
    match declaration.kind:
        case "INT":
            return int(value)
        case "FLOAT":
            return float(value)
        case "STRING":
            return str(value)
        case "BOOLEAN":
            return bool(value)
        case _:
            return value


def _range_problem(value: Any, declaration: InputDeclaration) -> str | None:
    options = declaration.options
    if declaration.kind in ("INT", "FLOAT"):
        if "min" in options and not value >= options["min"]:
            return f"{value} is below the smallest value, {options['min']}."
        if "max" in options and not value <= options["max"]:
            return f"{value} is above the largest value, {options['max']}."
    choices = declaration.choices
    if choices is None:
        return None
    chosen = value if options.get("multiselect") and isinstance(value, list) else [value]
    unknown = [v for v in chosen if v not in choices]
    if not unknown:
        return None
    if not choices:
        return f"{unknown[0]!r} was asked for, and there is nothing to choose from: the folder behind it is empty."
    listed = ", ".join(repr(choice) for choice in choices[:SHOWN_CHOICES])
    more = f" and {len(choices) - SHOWN_CHOICES} more" if len(choices) > SHOWN_CHOICES else ""
    return f"{unknown[0]!r} is not one of: {listed}{more}."


def _ask_node(
    node: Node,
    node_class: type[Any],
    declared: Mapping[str, InputDeclaration],
    names: set[str],
    all_names: bool,
    received: Mapping[str, Any],
) -> list[Problem]:
    """Call VALIDATE_INPUTS with the constants it asks for; a linked input is None, as its value is not there yet."""
    arguments: dict[str, list[Any]] = {}
    for name, value in node.inputs.items():
        if name in declared and (name in names or all_names):
            arguments[name] = [None if isinstance(value, Link) else value]
    for name, declaration in declared.items():
        if declaration.section == HIDDEN and name in names:
            arguments[name] = [node.id if declaration.kind == "UNIQUE_ID" else None]
    if "input_types" in names:
        arguments["input_types"] = [dict(received)]
    if not arguments:
        return []
    try:
        answers = call_over_lists(node_class, "VALIDATE_INPUTS", arguments)
    except Exception as error:  # of a value that is of no kind it expects, such as null for the name of a file
        return [Problem(node.id, str(node), None, f"its own check of the inputs failed: {kind_and_line(error)}.")]
    return [
        Problem(node.id, str(node), None, str(answer) if answer is not False else "its own check of the inputs failed.")
        for answer in answers
        if answer is not True
    ]
