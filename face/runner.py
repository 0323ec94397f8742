"""What the pipeline asks of a network, whichever engine runs it, and the torch engine's answer."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ..host import Managed
from .onnx_graph import OnnxNetwork

PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

# Bytes of activations per input pixel in float32; fewer pictures go through at once when less memory is free.
# Measured 121 for SCRFD-10G and 767 for R100 (benchmarks/faces.py --memory, on a CPU); the rest is room for the
# workspaces of a GPU's convolutions.
DETECTOR_BYTES_PER_PIXEL = 256
RECOGNISER_BYTES_PER_PIXEL = 1024


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

    def run(self, x: Tensor) -> list[Tensor]:
        pixels = x.shape[0] * x.shape[2] * x.shape[3]
        extra = pixels * self.bytes_per_pixel * self.dtype.itemsize // 4
        with torch.no_grad(), self.managed.resident(extra_bytes=extra) as network:
            return [output.float() for output in network(x.to(self.dtype))]

    def release(self) -> None:
        self.managed.release()
