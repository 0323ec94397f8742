"""Attention inside torch.compile: exact kernels of torch stay in the graph, everything else is one opaque operator.

Choosing looks at measurements, libraries and locks, which no graph can hold. So tracing calls `choose` as a constant:
its answer stays in that graph for good. The operator `hotpath::attend` chooses when it runs, once per real size, and
there measures and checks as outside of graphs.
"""

from __future__ import annotations

import itertools
import sys
import threading
import weakref
from typing import Optional

import torch
from torch import Tensor

from .capabilities import NO_MASK, AttentionCall, dtype_name, mask_kind
from .events import AttentionEvent, AttentionLog
from .torch_backends import TORCH_BACKENDS
from .torch_backends import sdpa as torch_picks

IN_GRAPH = {backend.name: backend.run for backend in TORCH_BACKENDS if backend.in_graph}
# Indexing makes a size that the graph left open into a number: a graph for one head size is what there is to choose for.
WIDTHS = tuple(range(4097))

_prepared = False
_logs: weakref.WeakValueDictionary[str, AttentionLog] = weakref.WeakValueDictionary()
_numbers = threading.Lock()
_next_number = itertools.count(1)


def number_of(record: AttentionLog) -> str:
    """A number by which a graph, which holds no objects, finds `record`. Remembered by the log.

    As text: a number would be one more size that the graph leaves open.
    """
    with _numbers:
        record.number = record.number or str(next(_next_number))
        _logs[record.number] = record
    return record.number


def prepare() -> None:
    """Let torch's compiler treat `choose` as a constant. To be called before tracing; costs nothing without a compiler.

    Loading the compiler takes seconds, so this waits until somebody else has.
    """
    global _prepared
    if not _prepared and "torch._dynamo" in sys.modules:
        torch.compiler.assume_constant_result(choose)
        _prepared = True


def choose(
    device: str,
    dtype: torch.dtype,
    shared: int,
    width: int,
    value_width: int,
    mask: str,
    backend: str,
    strict: bool,
    exact: bool,
    number: str,
) -> str:
    """The backend for a graph: a name in IN_GRAPH, or "" for the operator. Sizes are open, so they do not count."""
    from .dispatch import AttentionPolicy, AttentionUnavailable, dispatcher

    call = AttentionCall(torch.device(device), dtype, 1, 2 if shared else 1, 1, 16, 16, width, value_width, mask)
    try:
        name, reason = dispatcher().traced(call, AttentionPolicy(backend, strict), exact)
    except AttentionUnavailable:
        return ""  # the operator raises it when it runs, where it reaches the user as it is
    if name == "flex" and call.device.type == "cpu":
        # Inductor writes C++ for it that names sizes which it does not declare.
        name, reason = "" if strict else "sdpa", "flex: torch cannot compile it for a CPU where sizes are open"
    if name not in IN_GRAPH:
        return ""
    record = _logs.get(number)
    if record is not None:
        where = f"width {width}, {dtype_name(dtype)}, {mask}"
        record.note(AttentionEvent(backend, name, reason, where, compiled=True))
    return name


@torch.library.custom_op("hotpath::attend", mutates_args=())
def attend_operator(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Optional[Tensor],  # noqa: UP045  (torch reads this annotation)
    scale: Optional[float],  # noqa: UP045
    backend: str,
    strict: bool,
    exact: bool,
    number: str,
) -> Tensor:
    """The dispatcher as an operator. The result is laid out [B, N, H, D] in memory, as models use it next."""
    from .dispatch import AttentionPolicy, dispatcher

    policy, record = AttentionPolicy(backend, strict), _logs.get(number)
    out = dispatcher().attend(q, k, v, mask, scale, policy=policy, record=record, exact=exact)
    return out.transpose(1, 2).contiguous().transpose(1, 2)


@attend_operator.register_fake
def _shape_of_result(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float | None,
    backend: str,
    strict: bool,
    exact: bool,
    number: str,
) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3]).transpose(1, 2)


def attend_traced(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float | None,
    backend: str,
    strict: bool,
    exact: bool,
    number: str,
) -> Tensor:
    """`attend` as torch traces it. Tensors as in `capabilities.Run`."""
    if _prepared:
        kind = NO_MASK if mask is None else mask_kind(mask, q.dtype)
        shared = 0 if q.shape[1] == k.shape[1] else 1
        name = choose(
            str(q.device),
            q.dtype,
            shared,
            WIDTHS[q.shape[3]],
            WIDTHS[v.shape[3]],
            kind,
            backend,
            strict,
            exact,
            number,
        )
        if name:
            return IN_GRAPH[name](q, k, v, mask, scale)
    elif backend == "auto":
        return torch_picks(q, k, v, mask, scale)
    out: Tensor = attend_operator(q, k, v, mask, scale, backend, strict, exact, number)
    return out
