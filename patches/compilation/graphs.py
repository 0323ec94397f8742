"""One kind of block, compiled once for all blocks of the kind.

Dynamo keeps its graphs with the code object of the compiled function, so each kind gets a function with a code object
of its own: the limit on recompilations counts per kind, and another pack that compiles the same blocks meets its own
graphs. Guards on a block of ComfyUI's code are left out, because `regional` checks its state when it can have changed;
weights are inputs of the graph, so that a LoRA, an eviction or another block of the kind brings other tensors and no new
graph.
"""

from __future__ import annotations

import functools
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from torch import nn

from ...host.compiling import ask_at_each_operation, compiled_call, inductor, stop_asking
from ...products.rerouting import reroute
from ..attention_override import OVERRIDE
from .blocks import attributes_used, tensors_in
from .options import NotTraceable
from .settings import CompileSettings
from .written_out import write_out

log = logging.getLogger("hotpath.compile")

REMEMBERED = 256  # kinds of calls that are known again

Backend = Callable[[torch.fx.GraphModule, list[Any]], Callable[..., Any]]


def named_backend(name: str, settings: CompileSettings) -> Backend:
    """A backend by Dynamo's name for it, such as "inductor", "aot_eager" or "eager"."""
    if name == "inductor":
        return inductor(settings.inductor_options())
    from torch._dynamo.backends.registry import lookup_backend

    return lookup_backend(name)


@functools.cache
def start_workers() -> None:
    """Start the processes in which Inductor compiles kernels, once, without waiting for them.

    They import torch first. Inductor itself starts them with its first graph, whose kernels it then compiles one after the
    other in this process, since there is nobody else yet.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        return  # nothing is compiled
    try:
        from torch._inductor.async_compile import AsyncCompile, maybe_warm_pool
    except ImportError:
        return  # another torch: Inductor sees to it with the first graph
    maybe_warm_pool()
    if hasattr(AsyncCompile, "use_process_pool") and torch._inductor.config.compile_threads != 1:
        AsyncCompile.use_process_pool()  # asks them to answer; as soon as they have, they get the kernels


def compile_errors() -> tuple[type[Exception], ...]:
    """What torch raises when a function cannot be traced or compiled; not what the function itself raises when it runs."""
    from torch._dynamo import exc

    found: list[type[Exception]] = [exc.TorchDynamoException]
    try:
        from torch._inductor.exc import InductorError
    except ImportError:
        pass
    else:
        found.append(InductorError)
    return tuple(found)


@functools.cache
def limit_errors() -> tuple[type[Exception], ...]:
    """What torch raises when it has made as many graphs of one function as it makes; the names differ by release."""
    from torch._dynamo import exc

    names = ("FailOnRecompileLimitHit", "RecompileLimitExceeded", "FailOnCacheLimitHit", "CacheLimitExceeded")
    return tuple(getattr(exc, name) for name in names if hasattr(exc, name))


_ABOUT_THE_BLOCK = re.compile(r"(L\['block'\]|block)($|[.\[])")  # torch writes the name of a local in either form


def _keep_guard(entry: Any) -> bool:
    return _ABOUT_THE_BLOCK.match(entry.name) is None


def _guard_options() -> dict[str, Any]:
    # Older torch has no filter; there, guards on the blocks are checked at every call.
    if not hasattr(torch.compiler, "skip_guard_on_inbuilt_nn_modules_unsafe"):
        return {}
    return {"guard_filter_fn": lambda entries: [_keep_guard(entry) for entry in entries]}


class Compilation:
    """Compiles the graphs of one kind with `backend`, and counts.

    torch keeps this where no garbage collector looks, so it leads to nothing but its numbers: what it led to, a kind and all
    that is compiled of it, would never be freed.
    """

    def __init__(self, title: str, backend: Backend, foreign: bool) -> None:
        self.title = title
        self.foreign = foreign
        self.graphs = 0
        self.seconds = 0.0
        self.operators: dict[str, str] = {}
        self._backend = backend
        self._lock = threading.Lock()

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any], **_: Any) -> Callable[..., Any]:
        stop_asking(graph)
        start = time.perf_counter()
        operators = write_out(graph)
        if not self.foreign:  # operators of ours take no weights of another pack's own class
            reroute(graph)
        made = self._backend(graph, inputs)
        with self._lock:
            self.operators |= operators
            self.graphs += 1
            self.seconds += time.perf_counter() - start
        log.debug("%s: graph %d compiled in %.2f s", self.title, self.graphs, time.perf_counter() - start)
        return made


class CompiledKind:
    """The graphs of one kind of block.

    foreign: code of another pack is in it, which may change at any time what a graph took for constants: ComfyUI-GGUF keeps the
    LoRAs on its weights (KJNodes #289), AnimateDiff-Evolved sets scales for each step. Guards on the block are kept for it.

    graphs: how many were compiled (the first included). seconds: spent compiling. operators: of those that the compiler
    cannot look into, what became of each. reason: why the kind runs as it is, or None while it is compiled.
    """

    def __init__(
        self,
        title: str,
        forward: Callable[..., Any],
        settings: CompileSettings,
        backend: Backend,
        foreign: bool = False,
    ) -> None:
        self.title = title
        self.blocks: set[str] = set()
        self.reason: str | None = None
        self._compilation = Compilation(title, backend, foreign)
        self._dynamic = settings.dynamic
        self._marked: set[Any] = set()
        self._beyond: set[Any] = set()  # calls that met torch's limit; asked again, torch would warn at each

        from torch._dynamo.comptime import comptime

        def run(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
            comptime(ask_at_each_operation)
            return forward(block, *args, **kwargs)

        # A code object of its own, see above. The name shows in torch's logs.
        run.__code__ = run.__code__.replace(co_name=f"hotpath_{title}")
        self._run = torch.compile(
            run,
            fullgraph=True,
            dynamic=settings.dynamic,
            backend=self._compilation,
            options=(None if foreign else _guard_options()) or None,
        )

    @property
    def graphs(self) -> int:
        return self._compilation.graphs

    @property
    def seconds(self) -> float:
        return self._compilation.seconds

    @property
    def operators(self) -> dict[str, str]:
        return self._compilation.operators

    def __call__(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run `block` compiled. Raises one of `compile_errors` when the kind cannot be, NotTraceable when this call cannot."""
        if self._beyond and _sizes((args, kwargs)) in self._beyond:
            raise NotTraceable(self._full)
        if self._dynamic:
            self._mark_sizes((args, kwargs))
        try:
            with compiled_call():
                return self._run(block, *args, **kwargs)
        except limit_errors() as error:
            if len(self._beyond) >= REMEMBERED:
                self._beyond.clear()
            self._beyond.add(_sizes((args, kwargs)))
            raise NotTraceable(self._full) from error

    @property
    def _full(self) -> str:
        cure = "" if self._dynamic else "; with dynamic one graph serves all sizes"
        return f"torch makes no more than {self.graphs} graphs of it, and this call needs another{cure}"

    def _mark_sizes(self, arguments: Any) -> None:
        """Let every size stand for itself in a graph that may be compiled now.

        Otherwise torch takes two sizes that are equal by chance for one and the same: a graph made from a square picture
        would serve square ones only. Sizes that the block requires to be equal are found equal all the same.
        """
        looks = tuple(_looks(arguments))
        if looks in self._marked:
            return
        if len(self._marked) >= REMEMBERED:
            self._marked.clear()
        self._marked.add(looks)
        for tensor in tensors_in(arguments):
            for dim, size in enumerate(tensor.shape):
                if size > 1:
                    torch._dynamo.maybe_mark_dynamic(tensor, dim)


def _looks(value: Any) -> Iterator[Hashable]:
    """What another graph may be made for, sizes apart: of tensors, also the order that their numbers lie in."""
    if isinstance(value, torch.Tensor):
        order = None if value.is_contiguous() else tuple(sorted(range(value.dim()), key=value.stride))
        yield value.dtype, tuple(size == 1 for size in value.shape), order
    elif isinstance(value, dict):
        for key, part in value.items():
            yield key
            # What it has counted changes with every call.
            yield from (id(part),) if key == OVERRIDE else _looks(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _looks(part)
    elif (attributes := attributes_used(value)) is not None:
        yield from _looks(attributes)
    else:
        yield (type(value), value if isinstance(value, (bool, int, str)) else None)


def usual_order(value: Any) -> Any:
    """`value` as a block's own output would lie, if it is tokens [B, N, C] turned from a picture or cut out of more.

    So the first block of a model gets them (Wan, CogVideoX). They are copied once in a step; otherwise that block alone would
    need a graph.
    """
    if not isinstance(value, torch.Tensor) or value.dim() != 3 or 1 in value.shape[1:]:
        return value
    turned = value.stride(2) > 1
    cut = value.stride()[1:] == (value.shape[2], 1) and value.stride(0) > 0
    return value.contiguous() if turned or cut else value


def _sizes(arguments: Any) -> Any:
    return tuple((tensor.dtype, tensor.shape) for tensor in tensors_in(arguments))
