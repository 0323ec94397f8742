"""CUDA graphs for a step that runs thousands of times on tensors of the same few shapes.

The recurrent part of a film is hundreds of small kernels per frame, and launching them takes longer than running them.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..attention.capabilities import on_device
from ..host.capturing import GraphMemory, captured
from ..host.errors import first_line

log = logging.getLogger("hotpath.colorization")

TOLERANCE = 2e-2  # of the largest number; a graph that reads wrong memory is off by far more
WARM_RUNS = 2
MOST_SHAPES = 4  # a film has one; every graph keeps the memory of its step

Step = Callable[..., tuple[Tensor, ...]]


class Recording(Protocol):
    """A step with the tensors it reads and writes; `replay` computes the second from the first."""

    @property
    def inputs(self) -> Sequence[Tensor]: ...

    @property
    def outputs(self) -> Sequence[Tensor]: ...

    def replay(self) -> None: ...


Record = Callable[[Step, Sequence[Tensor]], Recording]


class CudaRecording:
    """`function` of copies of `tensors`, captured.

    device: theirs, whichever is the current one. memory: what recordings share. They may: one runs at a time, and what it
    leaves is copied at once.
    """

    def __init__(
        self, function: Step, tensors: Sequence[Tensor], device: torch.device, memory: GraphMemory | None = None
    ) -> None:
        self._device = device
        self.inputs = [tensor.clone() for tensor in tensors]
        self._graph, self.outputs = captured(lambda: function(*self.inputs), WARM_RUNS, device, memory)

    def replay(self) -> None:
        with on_device(self._device):
            self._graph.replay()


class GraphedStep:
    """`function` of tensors to a tuple of tensors, replayed from a graph from the second call of each shape on.

    The first call of a shape runs plainly, records, and compares a replay with a plain run, both on other numbers than were
    recorded: one that computed nothing would still hold those. A recording that fails or differs ends all recording, and
    `status` says why. record: makes a Recording; CUDA's by default, and none elsewhere. memory: what
    the steps of one job share.
    """

    def __init__(
        self,
        function: Step,
        device: torch.device,
        record: Record | None = None,
        memory: GraphMemory | None = None,
    ) -> None:
        self._function = function
        on_cuda = functools.partial(CudaRecording, device=device, memory=memory) if device.type == "cuda" else None
        self._record: Record | None = record or on_cuda
        self._recordings: dict[tuple[Any, ...], Recording] = {}
        self.status = "not captured yet" if self._record else f"none: CUDA only, this is {device.type}"

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        if self._record is None:
            return self._function(*tensors)
        shapes = tuple((tensor.shape, tensor.dtype) for tensor in tensors)
        recording = self._recordings.get(shapes)
        if recording is not None:
            return _replay(recording, tensors)
        result = self._function(*tensors)
        if len(self._recordings) < MOST_SHAPES:
            self._capture(shapes, tensors)
        else:
            self.status = f"captured for {MOST_SHAPES} shapes, which is the most; others run plainly"
        return result

    def _capture(self, shapes: tuple[Any, ...], tensors: Sequence[Tensor]) -> None:
        assert self._record is not None
        try:
            recording = self._record(self._function, tensors)
            replayed = _replay(recording, [tensor.flip(-1) * 0.75 + 0.1 for tensor in tensors])
            for one, other in zip(replayed, self._function(*recording.inputs), strict=True):
                if not (one - other).abs().max() <= TOLERANCE * other.abs().max().clamp_min(1e-6):
                    raise RuntimeError("the replay differs from the plain run")
            self._recordings[shapes] = recording
            count = len(self._recordings)
            self.status = "captured, equal to the plain run" + (f", {count} shapes" if count > 1 else "")
        except RuntimeError as error:
            self._record = None
            self._recordings.clear()
            self.status = f"none: {first_line(error, 160)}"
            log.warning("no CUDA graph: %s", self.status)


def _replay(recording: Recording, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    for held, given in zip(recording.inputs, tensors, strict=True):
        held.copy_(given)
    recording.replay()
    # The next replay writes over the outputs.
    return tuple(output.clone() for output in recording.outputs)
