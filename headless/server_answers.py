"""What a ComfyUI server answers when it does not do as asked, as sentences that name node and input."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from .graph import Graph, Node

SHOWN_VALUE = 60  # characters of an input's value that are worth showing


class ServerError(RuntimeError):
    """The server could not be reached, refused the workflow, or failed in it; the message names node and input."""


class ServerRefused(ServerError):
    """Nothing was run: the address is none, or the server did not take the workflow. nodes: ids of those that it refused;
    empty when it names none."""

    def __init__(self, message: str, nodes: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.nodes = frozenset(nodes)


class ServerLost(ServerError):
    """The server does not answer, or no longer knows the run. Another attempt may go better."""


class FailedOnServer(ServerError):
    """A node raised an error; `kind` is its Python type there, `reason` what it said."""

    def __init__(self, message: str, kind: str, reason: str) -> None:
        super().__init__(message)
        self.kind, self.reason = kind, reason


def refusal(answer: Mapping[str, Any], graph: Graph) -> str:
    """Why the server did not take the prompt, one line per node and input."""
    error = answer.get("error") or {}
    if isinstance(error, str):
        error = {"message": error}
    lines = []
    for node_id, entry in (answer.get("node_errors") or {}).items():
        for reason in entry.get("errors", []):
            name = (reason.get("extra_info") or {}).get("input_name")
            place = _named(graph, node_id, str(entry.get("class_type")))
            where = f"{place}, input {name!r}" if name else place
            lines.append(f"  - {where}: {reason.get('message')} ({reason.get('details')})")
    if not lines:
        node_id = str((error.get("extra_info") or {}).get("node_id", ""))
        at = f"{_named(graph, node_id, '')}: " if node_id in graph.nodes else ""
        return f"The server refused the workflow. {at}{error.get('message', 'It gave no reason.')}"
    return "The server refused the workflow:\n" + "\n".join(lines)


def plain_names(answer: Mapping[str, Any], prompt: Mapping[str, Any]) -> bool:
    """Rename in `prompt` what the server misses by a plain name: `format.codec`, which depends on the choice of a format,
    was `codec` beside the format in an older ComfyUI. Whether there was any.
    """
    found = False
    for node_id, entry in (answer.get("node_errors") or {}).items():
        inputs = prompt.get(node_id, {}).get("inputs", {})
        for reason in entry.get("errors", []):
            name = (reason.get("extra_info") or {}).get("input_name")
            held = [key for key in inputs if key.endswith(f".{name}")]
            if reason.get("type") == "required_input_missing" and len(held) == 1:
                inputs[name] = inputs.pop(held[0])
                found = True
    return found


def failure(data: Mapping[str, Any], graph: Graph) -> FailedOnServer:
    """What went wrong in which node, and the values that it was given."""
    node = _named(graph, str(data.get("node_id")), str(data.get("node_type")))
    message = str(data.get("exception_message", "")).strip() or str(data.get("exception_type"))
    given = {
        name: values[0] if isinstance(values, list) and len(values) == 1 else values
        for name, values in (data.get("current_inputs") or {}).items()
    }
    plain = {n: v for n, v in given.items() if isinstance(v, str | int | float | bool) and len(str(v)) <= SHOWN_VALUE}
    shown = ", ".join(f"{name}={value!r}" for name, value in plain.items())
    told = f"{node} failed on the server: {message}" + (f"\n  its inputs: {shown}" if shown else "")
    return FailedOnServer(told, str(data.get("exception_type", "")), message)


def _named(graph: Graph, node_id: str, class_type: str) -> str:
    return str(graph.nodes.get(node_id, Node(node_id, class_type, {})))
