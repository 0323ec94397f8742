"""ComfyUI's fused operators, written out where the compiler makes better code of their arithmetic.

comfy-kitchen has query and key norms, rotary embeddings and modulations as operators of its own, which a compiler cannot
look into: what comes before and after is written to memory and read again, and where comfy-kitchen has no kernel for a
machine each operator is a dozen passes in float32. A graph gets the formulas of its `eager` backend instead, of which
Inductor makes one kernel for a block's queries and keys together.

Only the graph that is compiled changes. Operators that write into what they are given stay as they are.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node, Proxy
from torch.fx.proxy import GraphAppendingTracer
from torch.nn import functional

NAMESPACE = "comfy_kitchen"


class LeftAsItIs(Exception):
    """Why an operator stays in a graph."""


@dataclass(frozen=True)
class Given:
    """A tensor: `here` in the graph that is written, `seen` what is known of it. Outside of graphs both are the tensor."""

    here: Any
    seen: Tensor

    @property
    def width(self) -> int:
        """How wide its rows are: a number, also where Dynamo left it open; it is the same in every call."""
        return int(self.seen.shape[-1])


def _check_rotations(freqs: Given, pairs: int) -> None:
    shape = freqs.seen.shape
    if len(shape) < 3 or tuple(int(size) for size in shape[-3:]) != (pairs, 2, 2):
        raise LeftAsItIs("its rotations are not one matrix for each pair")


def rotated(x: Given, freqs: Given) -> Any:
    """x: [..., D], a pair are two neighbours. freqs: [..., D / 2, 2, 2], a matrix for each pair. Like x."""
    _check_rotations(freqs, x.width // 2)
    matrices, length, positions = freqs.here, x.seen.shape, freqs.seen.shape
    if len(length) > 2 and len(positions) > 2 and length[2] != 1 and positions[2] > length[2]:
        matrices = matrices.narrow(2, 0, x.here.size(2))  # as comfy-kitchen does with more positions than tokens
    pairs = x.here.to(freqs.seen.dtype).unflatten(-1, (-1, 1, 2))
    turned = matrices.select(-1, 0) * pairs.select(-1, 0) + matrices.select(-1, 1) * pairs.select(-1, 1)
    return turned.flatten(-2).to(x.seen.dtype)


def rotated_halves(x: Given, freqs: Given, width: int = 0) -> Any:
    """As `rotated`, where a pair are one number of the first and one of the second half of the first `width` numbers."""
    width = width or x.width
    _check_rotations(freqs, width // 2)
    first = x.here if width == x.width else x.here.narrow(-1, 0, width)
    halves = first.to(freqs.seen.dtype).unflatten(-1, (2, -1))
    columns = freqs.here.transpose(-1, -3)  # [..., 2 of the pair, 2 of the result, D / 2]
    turned = columns.select(-3, 0) * halves.narrow(-2, 0, 1) + columns.select(-3, 1) * halves.narrow(-2, 1, 1)
    turned = turned.flatten(-2).to(x.seen.dtype)
    if width == x.width:
        return turned
    return torch.cat((turned, x.here.narrow(-1, width, x.width - width)), -1)


def normed(x: Given, scale: Given, epsilon: float) -> Given:
    """The root mean square norm of the rows of x."""
    return Given(functional.rms_norm(x.here, (x.width,), scale.here, epsilon), x.seen)


def _rms_rope1(x: Given, freqs_cis: Given, scale: Given, epsilon: float = 1e-6) -> Any:
    return rotated(normed(x, scale, epsilon), freqs_cis)


def _rms_rope(
    q: Given, k: Given, freqs_cis: Given, q_scale: Given, k_scale: Given | None = None, epsilon: float = 1e-6
) -> Any:
    return _rms_rope1(q, freqs_cis, q_scale, epsilon), _rms_rope1(k, freqs_cis, k_scale or q_scale, epsilon)


def _rms_rope_split_half1(x: Given, freqs_cis: Given, scale: Given, epsilon: float = 1e-6, rot_dim: int = 0) -> Any:
    return rotated_halves(normed(x, scale, epsilon), freqs_cis, rot_dim)


def _rms_rope_split_half(
    q: Given, k: Given, freqs_cis: Given, q_scale: Given, k_scale: Given | None = None,
    epsilon: float = 1e-6, rot_dim: int = 0,
) -> Any:  # fmt: skip
    made = _rms_rope_split_half1
    return made(q, freqs_cis, q_scale, epsilon, rot_dim), made(k, freqs_cis, k_scale or q_scale, epsilon, rot_dim)


def _apply_rope(xq: Given, xk: Given, freqs_cis: Given) -> Any:
    return rotated(xq, freqs_cis), rotated(xk, freqs_cis)


def _apply_rope1(x: Given, freqs_cis: Given) -> Any:
    return rotated(x, freqs_cis)


def _apply_rope_split_half(xq: Given, xk: Given, freqs_cis: Given) -> Any:
    return rotated_halves(xq, freqs_cis), rotated_halves(xk, freqs_cis)


def _apply_rope_split_half1(x: Given, freqs_cis: Given) -> Any:
    return rotated_halves(x, freqs_cis)


def _adaln(x: Given, scale: Given, shift: Given, eps: float) -> Any:
    return functional.layer_norm(x.here, (x.width,), eps=eps) * (1 + scale.here) + shift.here


def _rms_adaln(x: Given, scale: Given, shift: Given, eps: float) -> Any:
    return functional.rms_norm(x.here, (x.width,), eps=eps) * (1 + scale.here) + shift.here


# The operator by its name, with its parameters' names.
FORMS: dict[str, Callable[..., Any]] = {
    "rms_rope": _rms_rope,
    "rms_rope1": _rms_rope1,
    "rms_rope_split_half": _rms_rope_split_half,
    "rms_rope_split_half1": _rms_rope_split_half1,
    "apply_rope": _apply_rope,
    "apply_rope1": _apply_rope1,
    "apply_rope_split_half": _apply_rope_split_half,
    "apply_rope_split_half1": _apply_rope_split_half1,
    "adaln": _adaln,
    "rms_adaln": _rms_adaln,
}


def write_out(graph: GraphModule) -> dict[str, str]:
    """Write out the operators in `graph`, Dynamo's own, in place: which there were, and what became of each."""
    found: dict[str, str] = {}
    for node in list(graph.graph.nodes):
        name = _operator(node)
        if name not in FORMS:
            continue
        before = set(graph.graph.nodes)
        try:
            _write(graph.graph, node, name)
            found[name] = "written out"
        except LeftAsItIs as reason:
            for added in reversed([other for other in graph.graph.nodes if other not in before]):
                graph.graph.erase_node(added)
            found[name] = f"left as it is, {reason}"
    if found:
        graph.recompile()
    return found


def _operator(node: Node) -> str:
    """The name of the operator of comfy-kitchen that `node` calls, or ""."""
    target: Any = node.target
    if node.op != "call_function":
        return ""
    if isinstance(target, torch._ops.OpOverload):
        target = target.overloadpacket
    if not isinstance(target, torch._ops.OpOverloadPacket):
        return ""
    namespace, _, name = target._qualified_op_name.partition("::")
    return name if namespace == NAMESPACE else ""


def _write(graph: torch.fx.Graph, node: Node, name: str) -> None:
    form = FORMS[name]
    try:
        bound = inspect.signature(form).bind(*node.args, **node.kwargs)
    except TypeError as error:
        raise LeftAsItIs("this comfy-kitchen has other parameters") from error
    bound.apply_defaults()
    tracer = GraphAppendingTracer(graph)
    given = {key: _given(value, tracer) for key, value in bound.arguments.items()}
    if kernel := _kernel(name, {key: getattr(value, "seen", value) for key, value in given.items()}):
        raise LeftAsItIs(f"comfy-kitchen has a {kernel} kernel for it")
    with graph.inserting_before(node):
        made = form(**given)
    if not isinstance(made, tuple):
        node.replace_all_uses_with(made.node)
    else:
        users = list(node.users)
        if any(user.target is not operator.getitem for user in users):
            raise LeftAsItIs("its results are used as one")
        for user in users:
            user.replace_all_uses_with(made[user.args[1]].node)  # type: ignore[index]
            graph.erase_node(user)
    graph.erase_node(node)


def _given(value: Any, tracer: GraphAppendingTracer) -> Any:
    if not isinstance(value, Node):
        return value
    seen = value.meta.get("example_value")
    if isinstance(seen, Tensor):
        return Given(Proxy(value, tracer), seen)
    if isinstance(seen, torch.SymInt):
        return int(seen)
    if isinstance(seen, torch.SymFloat):
        return Proxy(value, tracer)
    raise LeftAsItIs(f"nothing is known of {value.name}")


def _kernel(name: str, arguments: dict[str, Any]) -> str:
    """The backend of comfy-kitchen that has a norm and rotation in one pass for these arguments, or ""."""
    if not name.startswith("rms_rope"):
        return ""  # what is not the whole of it is better in one kernel with its neighbours
    try:
        from comfy_kitchen.exceptions import BackendError
        from comfy_kitchen.registry import registry
    except ImportError:
        return ""
    try:
        backend: str = registry.get_capable_backend(name, arguments)
    except BackendError:
        return ""
    return "" if backend == "eager" else backend
