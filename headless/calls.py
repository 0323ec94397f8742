"""Calls a node the way ComfyUI does: every input is a list, and a node runs once per entry unless it wants lists.

INPUT_IS_LIST hands the lists over whole. OUTPUT_IS_LIST says which outputs are lists already; the others are collected
into one list, an entry per call.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def call_over_lists(
    node: Any, function: str, inputs: Mapping[str, list[Any]], before_each: Callable[[], None] | None = None
) -> list[Any]:
    """Results of `node.function(**...)`, one per call; a shorter list repeats its last entry.

    Raises ValueError when an input is an empty list, because then there is nothing to call the node with.
    """
    method = getattr(node, function)
    if getattr(node, "INPUT_IS_LIST", False):
        calls: list[dict[str, Any]] = [dict(inputs)]
    else:
        empty = [name for name, values in inputs.items() if not values]
        if empty:
            raise ValueError(f"input {empty[0]!r} received an empty list, so there is nothing to run the node on.")
        count = max((len(values) for values in inputs.values()), default=1)
        calls = [{name: values[min(i, len(values) - 1)] for name, values in inputs.items()} for i in range(count)]
    results: list[Any] = []
    for arguments in calls:
        if before_each is not None:
            before_each()
        result = method(**arguments)
        results.append(asyncio.run(_await(result)) if inspect.isawaitable(result) else result)
    return results


async def _await(result: Any) -> Any:
    return await result


def split_result(result: Any) -> tuple[tuple[Any, ...], dict[str, list[Any]]]:
    """Outputs and `ui` entries of one call. Raises TypeError for a node that grows new nodes, which needs ComfyUI."""
    if isinstance(result, Mapping):
        if "expand" in result:
            raise TypeError("this node replaces itself by other nodes while it runs, which only ComfyUI can do.")
        shown = {key: list(values) for key, values in dict(result.get("ui") or {}).items()}
        return tuple(result.get("result") or ()), shown
    if result is None:
        return (), {}
    if not isinstance(result, tuple | list):
        raise TypeError(f"the node returned a {type(result).__name__}; a tuple with one entry per output is needed.")
    return tuple(result), {}


def merge_outputs(results: Sequence[tuple[Any, ...]], node_class: Any) -> list[list[Any]]:
    """One list per output from the results of all calls."""
    if not results or not results[0]:
        return []
    width = len(results[0])
    lists = list(getattr(node_class, "OUTPUT_IS_LIST", None) or [False] * width)
    lists += [False] * (width - len(lists))
    merged: list[list[Any]] = []
    for i in range(width):
        if lists[i]:
            merged.append([value for result in results for value in result[i]])
        else:
            merged.append([result[i] for result in results])
    return merged
