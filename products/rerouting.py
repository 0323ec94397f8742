"""The linear layers of any network, multiplied by oneDNN for the length of a call, from its own weights as they are.

For networks that run on many rows at a time, as diffusion models do: there, bringing the weights into oneDNN's order for
each product costs little and no memory. Nothing of the network is changed.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.overrides import TorchFunctionMode

from .linear import LARGE, MANY_ROWS, product, why_not
from .operators import operator

PLAIN = (Tensor, nn.Parameter)


def serves(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """Whether `linear` gives this product to oneDNN: in float32, large, of many rows, and with no gradient wanted."""
    return (
        type(x) in PLAIN
        and type(weight) in PLAIN
        and _is_large(weight)
        and x.dtype == torch.float32
        and x.device.type == "cpu"
        and x.shape[-1:] == weight.shape[1:]
        and x.numel() >= MANY_ROWS * weight.shape[1]
        # oneDNN reads a bias as if its numbers lay side by side.
        and (bias is None or (type(bias) in PLAIN and bias.dtype == torch.float32 and bias.is_contiguous()))
        and not torch.is_grad_enabled()
    )


def _is_large(weight: Any) -> bool:
    return (
        isinstance(weight, Tensor)
        and not hasattr(weight, "__tensor_flatten__")  # quantised ones say a dtype that they do not have
        and weight.ndim == 2
        and weight.numel() >= LARGE
        and weight.dtype == torch.float32
        and weight.device.type == "cpu"
        and weight.layout == torch.strided
    )


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """torch's `linear`, with its names: input [..., K], weight [O, K], bias [O] or None to [..., O]."""
    return product(input, weight, bias) if serves(input, weight, bias) else F.linear(input, weight, bias)


class Rerouting(TorchFunctionMode):
    """While it is entered, what this thread asks of torch's `linear` is `linear`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear and not torch.compiler.is_compiling():
            return linear(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


class _Aside:
    def __init__(self, mode: Rerouting) -> None:
        self._mode = mode

    def __enter__(self) -> None:
        self._mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def __exit__(self, *_: object) -> None:
        self._mode.__enter__()  # type: ignore[no-untyped-call]


def aside() -> AbstractContextManager[Any]:
    """What to enter where a compiler may trace: it knows no classes under such a mode. `reroute` does the same in its graph."""
    current = getattr(torch.overrides, "_get_current_function_mode", lambda: None)()
    return _Aside(current) if isinstance(current, Rerouting) else nullcontext()


def rerouted(device: torch.device) -> tuple[Callable[[], AbstractContextManager[Any]], str]:
    """What to enter while a network runs on `device`, each time anew, and a line about it for a report: "" but on a CPU."""
    if device.type != "cpu":
        return nullcontext, ""
    if reason := why_not(torch.float32, ordered=False):
        return nullcontext, f"linear layers in float32 are multiplied by torch itself, because {reason}"
    return Rerouting, "linear layers in float32 are multiplied by oneDNN, which is faster on this CPU"


def reroute(graph: GraphModule) -> int:
    """Let a graph of Dynamo's ask `linear` where its float32 layers on a CPU are large, in place, if oneDNN's are faster.

    As an operator that Inductor does not look into, which knows no such product but of weights that never change.
    Returns how many there are.
    """
    found = [
        node
        for node in graph.graph.nodes
        if node.op == "call_function"
        and node.target is F.linear
        and len(node.args) > 1
        and _is_large(getattr(node.args[1], "meta", {}).get("example_value"))
    ]
    if not found or why_not(torch.float32, ordered=False):
        return 0
    as_operator = operator("linear", "Tensor x, Tensor weight, Tensor? bias=None", linear, _result)
    for node in found:
        node.target = as_operator
    graph.recompile()
    return len(found)


def _result(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])
