"""CUDA graphs are captured here, one at a time: cudaMallocAsync, which ComfyUI asks for, allows one capture in a process.

Three things that torch leaves to its caller are done here as well. cuBLAS keeps a workspace for each stream, and a graph has its
address: under torch's own allocator it is made anew within the capture, so that it lies in the graph's memory and lives as long.
And after a capture that broke off, the allocator would wait for its end for ever and free nothing: it is told of the end.
And no garbage is collected meanwhile: what goes with it, an older graph or a kernel of Triton's, may not be freed then and would
end the capture (pytorch 161037).
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch

log = logging.getLogger("hotpath")

Made = TypeVar("Made")

ENDS = ("_cuda_endAllocateToPool", "_cuda_endAllocateCurrentStreamToPool")  # the second in older releases
STREAMS = 64  # tries to find a stream that no living graph was captured on; torch has 32 and gives them out in turn

_capturing = threading.RLock()  # one in another is for torch to refuse
_spare: dict[int, Any] = {}  # by device
_streams: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()  # of graphs


class GraphMemory:
    """Memory that several graphs share: one of them runs at a time, and its results are copied out before the next one runs.

    torch allows that to graphs captured on one stream, as long as one of them lives. device: the current one by default.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device
        self.stream: Any = None
        self.pool: Any = None
        self._graphs: weakref.WeakSet[Any] = weakref.WeakSet()

    def renew_if_left(self) -> None:
        """Take other memory when no graph is left in this: torch frees it then, and cannot capture into it again."""
        if self.stream is None:
            self.stream = torch.cuda.Stream(device=self.device)
        if not self._graphs:
            self.pool = torch.cuda.graph_pool_handle()

    def run(self, function: Callable[[], Made]) -> Made:
        """`function` on the stream where it will be captured, for libraries to have there what they need."""
        with _capturing:
            self.renew_if_left()
            before: Any = torch.cuda.current_stream(self.device)
            self.stream.wait_stream(before)
            try:
                with torch.cuda.stream(self.stream):
                    return function()
            finally:
                before.wait_stream(self.stream)

    def forget(self) -> None:
        """Let no other graph join these: a capture broke off in their memory."""
        self.stream = self.pool = None
        self._graphs = weakref.WeakSet()

    def add(self, graph: Any) -> None:
        self._graphs.add(graph)


def captured(
    function: Callable[[], Made],
    warm_runs: int,
    device: torch.device | None = None,
    memory: GraphMemory | None = None,
) -> tuple[Any, Made]:
    """A CUDA graph of `function`, and what `function` gave while it was captured: every replay writes that anew.

    `function` runs `warm_runs` times before, so that libraries choose their kernels outside of the capture; what it then writes
    is there when this returns. device: the current one by default. memory: what the graph shares with others.
    """
    with _capturing:
        if memory is None:
            memory = GraphMemory(device)
            memory.stream = _spare_stream(device)
        memory.renew_if_left()
        stream, pool = memory.stream, memory.pool
        if not _workspaces_stay():
            stream, warm_runs = _free_stream(device), max(1, warm_runs)
        before: Any = torch.cuda.current_stream(device)
        stream.wait_stream(before)
        try:
            # Around the capture too: torch leaves its stream behind as the current one where a capture fails.
            with torch.cuda.stream(stream):
                for _ in range(warm_runs):
                    function()
                graph = torch.cuda.CUDAGraph()
                with _garbage_kept():
                    made = _capture(function, graph, stream, pool, device)
        except BaseException:
            memory.forget()
            raise
        finally:
            before.wait_stream(stream)
        memory.add(graph)
        _streams[graph] = int(stream.cuda_stream)
    return graph, made


@contextlib.contextmanager
def _garbage_kept() -> Iterator[None]:
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def _capture(function: Callable[[], Made], graph: Any, stream: Any, pool: Any, device: torch.device | None) -> Made:
    own = _own_allocator()
    if own:
        torch._C._cuda_clearCublasWorkspaces()
    reason: RuntimeError | None = None
    try:
        # thread_local: what another thread does with the card meanwhile, such as decoding a preview, is its own affair.
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            try:
                return function()
            except RuntimeError as error:
                reason = error
                raise
    except BaseException as error:
        _end(device, pool)
        if reason is None or error is reason or not isinstance(error, RuntimeError):
            reason = None
            raise
    finally:
        if own:
            torch._C._cuda_clearCublasWorkspaces()
    try:
        # Of a capture that broke off torch only says so. Not from within the handler, where the two would lead to each other,
        # and to all that the function had in memory.
        assert reason is not None
        raise reason
    finally:
        reason = None


def _end(device: torch.device | None, pool: Any) -> None:
    """Have the allocator leave a capture that broke off, where torch itself did not get as far."""
    inner: Any = torch._C
    end = next((getattr(inner, name) for name in ENDS if hasattr(inner, name)), None)
    if end is None:
        return
    with contextlib.suppress(RuntimeError):  # it refuses where nothing is to be ended
        end(_index(device), pool)
        inner._cuda_releasePool(_index(device), pool)


def _own_allocator() -> bool:
    """Whether torch allocates by itself; cudaMallocAsync gives what is allocated in a capture to that graph alone."""
    return torch.cuda.get_allocator_backend() == "native"


def _workspaces_stay() -> bool:
    """Whether a graph that goes leaves the workspaces of its stream to the others: from torch 2.12 on it does not."""
    release = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    return _own_allocator() or release < (2, 12)


def _spare_stream(device: torch.device | None) -> Any:
    """One for all graphs with memory of their own, so that what captures leave behind on a stream is left once."""
    index = _index(device)
    if index not in _spare:
        _spare[index] = torch.cuda.Stream(device=device)
    return _spare[index]


def _index(device: torch.device | None) -> int:
    return torch.cuda.current_device() if device is None or device.index is None else device.index


def _free_stream(device: torch.device | None) -> Any:
    """A stream that no living graph was captured on, if there is one."""
    taken = set(_streams.values())
    stream: Any = None
    for _ in range(STREAMS):
        stream = torch.cuda.Stream(device=device)
        if int(stream.cuda_stream) not in taken:
            break
    return stream


def trim(device: torch.device) -> None:
    """Give back what graphs that are gone, or do not run now, hold on `device`: under cudaMallocAsync the driver keeps it.

    Living graphs get it again when they are replayed.
    """
    if device.type != "cuda" or torch.version.hip is not None or _own_allocator():
        return
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        handle = ctypes.c_int()
        if driver.cuDeviceGet(ctypes.byref(handle), _index(device)) == 0:
            driver.cuDeviceGraphMemTrim(handle)
    except (OSError, AttributeError):  # a driver from before CUDA 11.4 knows neither graphs' memory nor how to trim it
        log.debug("the driver cannot trim the memory of CUDA graphs", exc_info=True)
