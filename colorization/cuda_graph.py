"""One CUDA graph for a step that runs thousands of times on tensors of the same shapes.

The recurrent part of a film is hundreds of small kernels per frame, and launching them takes longer than running them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger("hotpath.colorization")

TOLERANCE = 2e-2  # of the largest number; a graph that reads wrong memory is off by far more


class GraphedStep:
    """`function` of tensors to a tuple of tensors, replayed from a graph after its first call on CUDA.

    The first call runs plainly, captures, replays, and compares: a capture that fails or differs is not used, and
    `status` says why. On other devices it always runs plainly.
    """

    def __init__(self, function: Callable[..., tuple[Tensor, ...]], device: torch.device) -> None:
        self._function = function
        self._wanted = device.type == "cuda"
        self._graph: Any = None
        self._inputs: list[Tensor] = []
        self._outputs: tuple[Tensor, ...] = ()
        self.status = "not captured yet" if self._wanted else f"none: CUDA only, this is {device.type}"

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        if not self._wanted:
            return self._function(*tensors)
        if self._graph is None:
            expected = self._function(*tensors)
            self._capture(tensors, expected)
            return expected
        if [t.shape for t in tensors] != [t.shape for t in self._inputs]:
            return self._function(*tensors)
        return self._replay(tensors)

    def _replay(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        for held, given in zip(self._inputs, tensors, strict=True):
            held.copy_(given)
        self._graph.replay()
        # The next replay writes over the outputs.
        return tuple(output.clone() for output in self._outputs)

    def _capture(self, tensors: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
        try:
            self._inputs = [tensor.clone() for tensor in tensors]
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(2):
                    self._function(*self._inputs)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._outputs = self._function(*self._inputs)
            self._graph = graph
            replayed = self._replay(tensors)
            for one, other in zip(replayed, expected, strict=True):
                if (one - other).abs().max() > TOLERANCE * other.abs().max().clamp_min(1e-6):
                    raise RuntimeError("the replay differs from the plain run")
            self.status = "captured, equal to the plain run"
        except RuntimeError as error:
            self._wanted, self._graph, self._inputs, self._outputs = False, None, [], ()
            self.status = f"none: {str(error).splitlines()[0][:160]}"
            log.warning("no CUDA graph: %s", self.status)
