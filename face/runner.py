"""What the pipeline asks of a network, whichever engine runs it, and the torch engine's answer."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from ..host import Managed
from .graphs import Graphs
from .onnx_graph import OnnxNetwork

PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

# Bytes of activations per input pixel in float32; fewer pictures go through at once when less memory is free.
# Measured 121 for SCRFD-10G and 767 for R100 (benchmarks/faces.py --memory, on a CPU); the rest is room for the
# workspaces of a GPU's convolutions.
DETECTOR_BYTES_PER_PIXEL = 256
RECOGNISER_BYTES_PER_PIXEL = 1024

Run = Callable[[Tensor], list[Tensor]]


class Runner(Protocol):
    """A network that takes [N, 3, H, W] float32 on `device` and gives float32 outputs there."""

    device: torch.device
    engine: str  # "torch", "onnxruntime"
    where: str  # such as "cuda:0 fp32" or "CUDAExecutionProvider"

    def run(self, x: Tensor) -> list[Tensor]: ...

    def release(self) -> None:
        """Give the device memory back."""


class TorchRunner:
    """An OnnxNetwork in the host's memory management."""

    engine = "torch"

    def __init__(
        self, network: OnnxNetwork, managed: Managed, device: torch.device, precision: str, bytes_per_pixel: int
    ) -> None:
        self.network, self.managed, self.device = network, managed, device
        self.dtype = PRECISIONS[precision]
        self.bytes_per_pixel = bytes_per_pixel
        self.where = f"{device} {precision}"
        self.graphs: Graphs | None = None
        if device.type == "cuda":
            self.graphs = Graphs()
            # Weak: the graphs hold the network.
            forget = weakref.WeakMethod(self.graphs.forget)
            network.when_moved = lambda: (bound := forget()) and bound()

    def run(self, x: Tensor) -> list[Tensor]:
        with torch.no_grad(), self.managed.resident(extra_bytes=self._activations(x)) as network:
            return self._compute(network, x)

    def replay(self, key: Hashable, step: Callable[[Run, Tensor], Sequence[Tensor]], x: Tensor) -> Tensor:
        """See `replayed`."""
        if self.graphs is None:
            return step(self.run, x)[0]
        nbytes = self._activations(x)
        with torch.no_grad(), self.managed.resident(extra_bytes=nbytes) as network:
            return self.graphs(key, partial(step, partial(self._compute, network)), x, network.addresses(), nbytes)

    def _activations(self, x: Tensor) -> int:
        """Bytes; x: pictures [N, 3, H, W] or [N, H, W, 3]."""
        return x.numel() // 3 * self.bytes_per_pixel * self.dtype.itemsize // 4

    def _compute(self, network: OnnxNetwork, x: Tensor) -> list[Tensor]:
        return [output.float() for output in network(x.to(self.dtype))]

    def release(self) -> None:
        self.managed.release()


def replayed(runner: Runner, key: Hashable, step: Callable[[Run, Tensor], Sequence[Tensor]], x: Tensor) -> Tensor:
    """The first tensor of `step(run, x)`, on CUDA by replaying a graph from the third call of a shape on.

    step: depends on nothing but `key`, `x` and the network, which it calls as `run`; may not wait for the device.
    """
    return runner.replay(key, step, x) if isinstance(runner, TorchRunner) else step(runner.run, x)[0]


def joined(parts: Sequence[Tensor]) -> Tensor:
    """The parts along their first axis; a single one as it is, since torch would copy it."""
    return torch.cat(list(parts)) if len(parts) > 1 else parts[0]
