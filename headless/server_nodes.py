"""The nodes that a ComfyUI which runs has, as far as their declarations go, in the shape of our own catalog."""

from __future__ import annotations

import http.client
import json
import urllib.request
from collections.abc import Mapping
from typing import Any

from .server_answers import ServerLost

ANSWER_SECONDS = 120.0  # every pack lists the model folders for it


def offered_nodes(url: str) -> dict[str, type[Any]]:
    """The nodes of the server at `url`, as `as_classes` gives them. Raises ServerLost."""
    return as_classes(declarations(url))


def declarations(url: str) -> dict[str, Any]:
    """How the server at `url` declares its nodes, by id, as JSON. Raises ServerLost."""
    return dict(ask(url, "/object_info", ANSWER_SECONDS))


def as_classes(declared: Mapping[str, Any]) -> dict[str, type[Any]]:
    """Classes by id with INPUT_TYPES, RETURN_TYPES and OUTPUT_NODE; they cannot be run."""
    return {name: _declared(entry) for name, entry in declared.items()}


def ask(url: str, path: str, timeout: float, body: Any = None) -> Any:
    """What the server at `url` answers to GET `path`, or to POST with a body, decoded from JSON; None for nothing. Raises
    ServerLost."""
    # As everywhere: a proxy that the environment names does not know the machines of this network.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"{url}{path}", data, {"Content-Type": "application/json"})
    try:
        with opener.open(request, timeout=timeout) as answer:
            return json.loads(answer.read() or b"null")
    except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
        raise ServerLost(f"The ComfyUI at {url} does not answer: {error}.") from error
    except ValueError:
        raise ServerLost(f"What answers at {url} is no ComfyUI.") from None


def _declared(entry: Mapping[str, Any]) -> type[Any]:
    inputs = {
        section: {name: kind for name, kind in entries.items() if kind}
        for section, entries in (entry.get("input") or {}).items()
        if isinstance(entries, Mapping)
    }
    members = {
        "INPUT_TYPES": classmethod(lambda cls: inputs),
        "RETURN_TYPES": tuple(entry.get("output") or ()),
        "OUTPUT_NODE": bool(entry.get("output_node")),
    }
    return type("NodeOfServer", (), members)
