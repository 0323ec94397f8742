"""Graphs that other nodes' compilers make of a model, kept apart by what our patches do in its attention.

ComfyUI's TorchCompileModel, and other packs' nodes of that kind, drop the guards on `transformer_options`, where patches are. Our
patches reach the UNet as an argument, which is guarded; but where a graph breaks, what comes after the break has only the
options, and would go on with what was made for other patches, or for none. What torch has made is known to it by the
backend, too: so a call with our patches is compiled by a backend of its own for each structure of them.
"""

from __future__ import annotations

import logging
import sys
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch

from .bound_attention import BoundAttention, TokenStep
from .compilation.settings import KEY
from .compilation.wrapping import CORE_KEY, following, through

log = logging.getLogger("hotpath.attention")

SETTINGS = "torch_compile_kwargs"  # where ComfyUI's node notes in a model's options what it gave to torch.compile
NETWORK = "diffusion_model"
MOST = 8  # structures of one compiled model

_apart: weakref.WeakKeyDictionary[Any, OrderedDict[Hashable, Any]] = weakref.WeakKeyDictionary()


class Apart:
    """A backend that compiles as `inner` does, and whose graphs are those of `structure` alone."""

    __name__ = "apart"

    def __init__(self, inner: Any, structure: Hashable) -> None:
        self.inner, self.structure = inner, structure

    def __call__(self, graph: Any, inputs: Any) -> Any:
        return self.inner(graph, inputs)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Apart) and self.structure == other.structure and bool(self.inner == other.inner)

    def __hash__(self) -> int:
        return hash(self.structure)


def structure_of(bound: Mapping[Any, BoundAttention]) -> Hashable:
    """What is fixed when code is traced, of the patches of one call. Sizes that go with the latent's have guards of their own."""

    def of_step(step: Any) -> Hashable:
        if not isinstance(step, TokenStep):
            return type(step), _who(step.callback)
        keys = step.keys
        counts = step.stats is not None, step.counts_out
        return keys.dtype, tuple(keys.shape), len(step.rows), step.mask is not None, *counts

    return tuple(
        (block, None if made.base is None else _who(made.base), *map(of_step, made.steps))
        for block, made in sorted(bound.items(), key=str)
    )


def _who(called: Any) -> Hashable:
    """What is equal for one and the same function or object, and for none that comes after it in its place in memory."""
    called = getattr(called, "__func__", called)  # a method is another object each time
    try:
        made = weakref.ref(called)
        hash(made)
    except TypeError:
        return id(called)
    return made


def kept_apart(executor: Any, options: Mapping[str, Any], bound: Mapping[Any, BoundAttention]) -> Callable[..., Any]:
    """What `executor`, a WrapperExecutor of ComfyUI's, is around; where another node compiles the network, by `Apart`.

    options: the call's `transformer_options`, which have the wrappers under their names.
    """
    from comfy.patcher_extension import WrappersMP

    wrappers = options.get("wrappers", {}).get(WrappersMP.APPLY_MODEL, {})
    inside = following(executor)
    theirs = [wrapper for wrapper in inside if wrapper in wrappers.get(CORE_KEY, ())]
    # Our own Compile Model leaves them out.
    if KEY in wrappers or not (theirs or _is_compiled(getattr(executor.class_obj, NETWORK, None))):
        made: Callable[..., Any] = executor
        return made

    def run(following: Any, *args: Any, **kwargs: Any) -> Any:
        model = following.class_obj
        compiled = getattr(model, NETWORK)
        apart = _compiled_apart(model, compiled, structure_of(bound)) if _is_compiled(compiled) else None
        if apart is None:
            return following(*args, **kwargs)
        setattr(model, NETWORK, apart)
        try:
            return following(*args, **kwargs)
        finally:
            setattr(model, NETWORK, compiled)

    return through(executor, [*theirs, run, *(wrapper for wrapper in inside if wrapper not in theirs)])


def _is_compiled(network: Any) -> bool:
    compiler = sys.modules.get(
        "torch._dynamo.eval_frame"
    )  # where nobody compiles, it is not imported: it takes seconds
    return compiler is not None and isinstance(network, compiler.OptimizedModule)


def _compiled_apart(model: Any, compiled: Any, structure: Hashable) -> Any:
    """The network under `compiled`, compiled as that is for `structure`; None where nobody says how."""
    known = _apart.setdefault(compiled, OrderedDict())
    if structure in known:
        known.move_to_end(structure)
        return known[structure]
    patcher = getattr(model, "current_patcher", None)
    settings = dict(getattr(patcher, "model_options", {}).get(SETTINGS) or {})
    if not settings:
        return None
    options = dict(settings.get("options") or {})
    guards = {name: options.pop(name) for name in ("guard_filter_fn",) if name in options}
    backend, mode, dynamic = settings.get("backend") or "inductor", settings.get("mode"), settings.get("dynamic")
    try:
        if backend == "inductor":
            inner: Any = torch._TorchCompileInductorWrapper(mode, options, dynamic)
        else:
            inner = torch._TorchCompileWrapper(backend, mode, options, dynamic)
    except (AttributeError, TypeError, RuntimeError) as error:  # another torch
        log.warning("the graphs of another node's compiler are not kept apart: %s", error)
        return None
    while len(known) >= MOST:
        known.popitem(last=False)
    made = torch.compile(
        compiled._orig_mod,
        backend=Apart(inner, structure),
        fullgraph=bool(settings.get("fullgraph")),
        dynamic=dynamic,
        options=guards or None,
    )
    known[structure] = made
    return made
