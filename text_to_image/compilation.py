"""Regional compilation: one graph for all blocks of the transformer, for every prompt length and picture size.

Only the blocks are compiled, once, with sizes that may change; the blocks of one list differ in their weights alone, which
are inputs of the graph. The context refiner stays as it is: it sees some 32 caption tokens, and a first call with so few
would let the compiler tune the shared graph for them instead of for the thousands of a picture.
"""

from __future__ import annotations

import importlib.util
import logging
from dataclasses import dataclass
from typing import Any

import torch

from ..host.compiling import inductor

log = logging.getLogger("hotpath.text_to_image")

INDUCTOR = inductor()
# What torchao recommends for graphs with its layers.
PACKED = {
    "coordinate_descent_check_all_directions": True,
    "coordinate_descent_tuning": True,
    "force_fuse_int_mm_with_mul": True,
}
MODES = ("none", "regional")
COMPILED_LISTS = ("noise_refiner", "layers")


@dataclass(frozen=True)
class CompilationPlan:
    """What is compiled, with which backend of torch.compile, and the line for the report."""

    mode: str
    note: str
    backend: Any = INDUCTOR


def plan(asked: str, device: torch.device, packed: bool = False) -> CompilationPlan:
    """The plan for one of MODES on `device`. packed: by torchao. Raises ValueError for another word."""
    if asked not in MODES:
        raise ValueError(f"{asked!r} is no compile mode: choose {' or '.join(MODES)}.")
    if asked == "none":
        return CompilationPlan("none", "")
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return CompilationPlan("none", "compile: none instead of regional, because the triton package is not installed")
    backend = inductor(PACKED) if packed else INDUCTOR
    return CompilationPlan("regional", "compile: regional, one graph for all blocks, prompts and sizes", backend)


def apply(transformer: Any, plan: CompilationPlan) -> int:
    """Mark the blocks for compilation, in place (it happens at their first call); returns how many."""
    if plan.mode == "none":
        return 0
    blocks = [block for name in COMPILED_LISTS for block in getattr(transformer, name)]
    for block in blocks:
        block.compile(fullgraph=True, dynamic=True, backend=plan.backend)
    return len(blocks)


def undo(transformer: Any) -> None:
    """Run the blocks uncompiled from now on."""
    for name in COMPILED_LISTS:
        for block in getattr(transformer, name):
            block._compiled_call_impl = None


def is_compiler_error(error: BaseException) -> bool:
    """Whether `error` is the compiler's own (no C++ compiler, an operator it cannot lower), and not the network's."""
    names = {f"{kind.__module__}.{kind.__name__}" for kind in type(error).__mro__}
    return any(name.startswith(("torch._dynamo.exc.", "torch._inductor.exc.", "triton.compiler")) for name in names)
