"""CUDA graphs: what is recorded does not happen, and a replay does it on the memory of the recording."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from .arguments import leaves
from .streams import Hazard, Memory, Stream, card, cuda_error

if TYPE_CHECKING:
    from .operators import OnCard

NONSENSE = 0x55


@contextlib.contextmanager
def below() -> Iterator[None]:
    """Plain torch, below the simulation."""
    with torch._C._DisableTorchDispatch(), torch.no_grad():
        yield


def tensors_in(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in leaves(value) if isinstance(leaf, torch.Tensor)]


def spoil(tensor: torch.Tensor) -> None:
    """Numbers that nobody should read."""
    if tensor.is_floating_point() or tensor.is_complex():
        tensor.fill_(float("nan"))
    else:
        tensor.fill_(True if tensor.dtype == torch.bool else NONSENSE)


class Capture:
    """What is being recorded. It runs here, to learn the sizes of results, and is undone at the end."""

    def __init__(self, stream: Stream, pool: Any) -> None:
        self.stream, self.pool = stream, pool
        self.thread = threading.get_ident()
        self._steps: list[tuple[Any, Any, Any, Any]] = []
        self._own: dict[int, torch.UntypedStorage] = {}  # allocated while recording
        self._outside: dict[int, weakref.ref[Memory]] = {}
        self._own_memory: set[int] = set()
        self._before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def allocated(self, storage: torch.UntypedStorage, memory: Memory) -> None:
        self._own[storage._cdata] = storage
        self._own_memory.add(id(memory))

    def will_write(self, tensor: OnCard) -> None:
        storage = tensor.inner.untyped_storage()
        if storage._cdata not in self._own and storage._cdata not in self._before:
            self._before[storage._cdata] = (storage, storage.clone())

    def note(self, function: Any, args: Any, kwargs: Any, given: Sequence[OnCard], out: Any) -> None:
        """args, kwargs, out: with CPU tensors."""
        self._steps.append((function, args, kwargs, out))
        for tensor in given:
            if id(tensor.memory) not in self._own_memory:
                self._outside[id(tensor.memory)] = weakref.ref(tensor.memory)

    def end(self) -> None:
        with below():
            for storage, kept in self._before.values():
                storage.copy_(kept)
            for *_, out in self._steps:
                for tensor in tensors_in(out):
                    if tensor.untyped_storage()._cdata in self._own:
                        spoil(tensor)
        self._before.clear()

    def replay(self, stream: Stream) -> None:
        held = [reference() for reference in self._outside.values()]
        for memory in held:
            if memory is None:
                raise Hazard("a graph uses memory that was freed after it was recorded")
            memory.check_read(stream)
        clock = stream.tick()
        with below():
            for function, args, kwargs, out in self._steps:
                again = function(*args, **kwargs)
                for one, kept in zip(tensors_in(again), tensors_in(out), strict=True):
                    if one.data_ptr() != kept.data_ptr():
                        kept.copy_(one)
        for memory in held:
            if memory is not None:
                memory.written = (stream, clock)


class CUDAGraph:
    """Stands for torch.cuda.CUDAGraph."""

    def __init__(self, keep_graph: bool = False) -> None:
        self._made: Capture | None = None
        self._pool: Any = None

    def capture_begin(self, pool: Any = None, capture_error_mode: str = "global", **_: Any) -> None:
        here = card()
        stream = here.stream
        if stream is here.default(stream.device):
            raise cuda_error("CUDA graphs must be captured on a non-default stream.")
        if here.capture is not None or here.captures_into is not None:
            raise cuda_error("another capture is under way")
        self._pool = pool or new_pool()
        here.broken = False
        here.captures_into = self._pool
        here.capture = Capture(stream, self._pool)

    def capture_end(self) -> None:
        here = card()
        made, here.capture = here.capture, None
        if made is None or here.broken:
            # The allocator goes on waiting for the end, as torch's does up to 2.11.
            raise cuda_error("operation failed due to a previous error during capture")
        here.captures_into = None
        made.end()
        self._made = made
        here.graphs += 1

    def replay(self) -> None:
        here = card()
        if self._made is None:
            raise RuntimeError("Called CUDAGraph::replay without a preceding successful capture.")
        if here.captures_here():
            raise cuda_error("a graph is replayed while another one is recorded")
        self._made.replay(here.stream)
        here.replays += 1
        here.operations += 1

    def reset(self) -> None:
        self._made = None

    def pool(self) -> Any:
        return self._pool


def new_pool() -> tuple[int, int]:
    return (0, card().new_number())
