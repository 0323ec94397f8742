"""Frames on their way to the device and pictures on their way back, beside the computing.

On CUDA both directions have a stream of their own and go through pinned memory, so that one portion arrives and another
one leaves while a third is computed. Nothing here waits for the device but `Download.wait`. What is under way is as
much as the caller has begun and not taken: two portions in every job of this package.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..host import pinned_memory


class Copies(Protocol):
    """How tensors move between host and device. Marks are places in a queue that can be waited for.

    from_any_thread: others than the thread that computes may use the device meanwhile.
    """

    from_any_thread: bool

    def host_memory(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Memory that can be copied from and to while others compute."""

    def to_device(self, host: Tensor) -> tuple[Tensor, Any]:
        """Begin a copy. From any thread."""

    def arrived(self, tensor: Tensor, mark: Any) -> Tensor:
        """What `to_device` began, on the device and complete for what is queued from now on."""

    def to_host(self, host: Tensor, tensor: Tensor) -> Any:
        """Begin a copy of `tensor`, as what is queued so far leaves it."""

    def mark(self) -> Any:
        """The end of what is queued so far."""

    def host_waits(self, mark: Any) -> None: ...


class DirectCopies:
    """Every copy is done when the call returns: the CPU, and devices without streams."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        # Metal ends the process where two threads give it work (pytorch issue 197805).
        self.from_any_thread = device.type != "mps"

    def host_memory(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.empty(tuple(shape), dtype=dtype)

    def to_device(self, host: Tensor) -> tuple[Tensor, None]:
        return host.to(self.device) if self.from_any_thread else host, None

    def arrived(self, tensor: Tensor, mark: None) -> Tensor:
        return tensor.to(self.device)

    def to_host(self, host: Tensor, tensor: Tensor) -> None:
        host.copy_(tensor)

    def mark(self) -> None:
        return

    def host_waits(self, mark: None) -> None:
        return


class CudaCopies:
    """A stream in each direction: on a common one, frames would wait behind pictures that wait for the computing."""

    from_any_thread = True

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.inward: Any = torch.cuda.Stream(device)
        self.outward: Any = torch.cuda.Stream(device)

    def host_memory(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        # torch gives it out again when the copies that use it have happened.
        return pinned_memory.empty(shape, dtype)

    def to_device(self, host: Tensor) -> tuple[Tensor, Any]:
        with torch.cuda.stream(self.inward):
            tensor = host.to(self.device, non_blocking=True)
        return tensor, self._after(self.inward)

    def arrived(self, tensor: Tensor, mark: Any) -> Tensor:
        computing: Any = torch.cuda.current_stream(self.device)
        computing.wait_event(mark)
        tensor.record_stream(computing)
        return tensor

    def to_host(self, host: Tensor, tensor: Tensor) -> Any:
        self.outward.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.outward):
            host.copy_(tensor, non_blocking=True)
        tensor.record_stream(self.outward)
        return self._after(self.outward)

    def mark(self) -> Any:
        return self._after(torch.cuda.current_stream(self.device))

    def host_waits(self, mark: Any) -> None:
        mark.synchronize()

    def _after(self, stream: Any) -> Any:
        # Blocking: the thread that waits sleeps, where it would keep a core busy that decodes.
        event: Any = torch.cuda.Event(blocking=True)
        event.record(stream)
        return event


def copies_for(device: torch.device) -> Copies:
    return CudaCopies(device) if device.type == "cuda" else DirectCopies(device)


@dataclass(frozen=True)
class Upload:
    """Frames on their way; `Copies.arrived` gives them."""

    tensor: Tensor
    mark: Any


class Download:
    """Pictures on their way: parts are queued by `put`, and `wait` gives the whole."""

    def __init__(self, copies: Copies, shape: Sequence[int], dtype: torch.dtype) -> None:
        self._copies = copies
        self._host = copies.host_memory(shape, dtype)
        self._mark: Any = None

    def put(self, rows: slice, tensor: Tensor) -> None:
        """Queue the copy of `tensor` to `rows`."""
        self._mark = self._copies.to_host(self._host[rows], tensor)

    def wait(self) -> Tensor:
        """The pictures on the CPU. From any thread."""
        self._copies.host_waits(self._mark)
        return self._host


def upload(copies: Copies, frames: Tensor) -> Upload:
    """Start the way of `frames`, on the CPU or on the device already. From any thread."""
    if isinstance(copies, DirectCopies) or frames.device.type != "cpu":
        return Upload(*copies.to_device(frames))
    host = copies.host_memory(frames.shape, frames.dtype)
    host.copy_(frames)
    return Upload(*copies.to_device(host))


def download(copies: Copies, tensor: Tensor) -> Download:
    """Start the way back of a whole tensor."""
    leaving = Download(copies, tensor.shape, tensor.dtype)
    leaving.put(slice(None), tensor)
    return leaving
