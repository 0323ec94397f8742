"""torch.compile for one function, with the plain function as the way out and a sentence on what happened."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from ..host.compiling import ask_at_each_operation, compiled_call, inductor, stop_asking
from ..host.errors import kind_and_line

log = logging.getLogger("hotpath.colorization")


class MaybeCompiled:
    """Calls `function`, compiled if asked for. A compiler that is missing or fails is reported once, not raised: the
    film is coloured either way, only slower.

    Sizes are fixed in a graph. torch keeps a few for each code object and runs what comes later as it is, so each of
    these has a code object of its own, and says when there was no graph for a size.
    """

    def __init__(
        self, function: Callable[..., Any], wanted: bool, name: str, backend: Callable[..., Any] | None = None
    ) -> None:
        self._plain = function
        self._wanted = wanted
        self.name = name
        self.status = "compiled" if wanted else "not compiled: not asked for"
        self._graphs: list[int] = []  # operations in each
        self._met: set[object] = set()
        # torch keeps a backend where no garbage collector looks: if it led to the function, the network would never be freed.
        compiler, graphs = backend or inductor(), self._graphs

        def counted(graph: Any, inputs: Any, **options: Any) -> Any:
            stop_asking(graph)
            graphs.append(len(graph.graph.nodes))
            return compiler(graph, inputs, **options)

        self._call = function
        if not wanted:
            return
        from torch._dynamo.comptime import comptime

        def run(*args: Any) -> Any:
            comptime(ask_at_each_operation)
            return function(*args)

        run.__code__ = run.__code__.replace(co_name=f"hotpath_{name.replace(' ', '_')}")
        self._call = torch.compile(run, dynamic=False, backend=counted)

    def __call__(self, *args: Any) -> Any:
        if not self._wanted:
            return self._plain(*args)
        before, sizes = len(self._graphs), tuple(tensor.shape for tensor in args if isinstance(tensor, torch.Tensor))
        try:
            with compiled_call():
                result = self._call(*args)
        except Exception as error:
            if _is_from_compiler(error):
                self._wanted = False
                self.status = f"not compiled: {kind_and_line(error)}"
                log.warning("%s runs %s", self.name, self.status)
                return self._plain(*args)
            raise
        if sizes not in self._met:
            self._met.add(sizes)
            if len(self._graphs) == before:
                self.status = f"compiled for {before} sizes of frames, and as it is for others: torch keeps no more"
                log.warning("%s is %s", self.name, self.status)
        return result


def _is_from_compiler(error: BaseException) -> bool:
    """Whether the compiler raised, and not the function: out of memory and wrong shapes are for the caller."""
    return type(error).__module__.startswith(("torch._dynamo", "torch._inductor", "triton"))
