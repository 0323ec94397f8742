"""CUDA graphs of the face networks: some hundred small kernels take longer to launch one by one than to run.

A shape is recorded when it comes a second time, beside a plain run that it is compared with. A graph reads the weights where
they were: when the host moves them, all graphs go, with the memory they hold, and counting begins anew.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import host
from ..host.capturing import GraphMemory, captured, trim
from ..host.errors import first_line

log = logging.getLogger("hotpath.face")

TOLERANCE = 1e-2  # of the largest number; a graph that reads wrong memory is off by far more
MOST_GRAPHS = 8  # of a network
IDLE_CALLS = 64  # a graph that was not used for as many may go for another one
MOST_BYTES = 1 << 30  # of activations; graphs of a network share them
WARM_RUNS = 2

# The result, and what it was made of: numbers to compare two runs by, where that is not the result itself.
Step = Callable[[Tensor], Sequence[Tensor]]


class _Graph:
    def __init__(self, step: Step, given: Tensor, memory: GraphMemory) -> None:
        self._step = step  # holds tables that the graph reads
        self.device = given.device
        self.used = 0
        # A recording lives on after the inference mode in which a node made it.
        with torch.inference_mode(False), torch.no_grad():
            self._held = torch.empty_like(given)
            self._held.copy_(given)
            self._graph, self.made = captured(lambda: step(self._held), WARM_RUNS, memory=memory)

    def replay(self, given: Tensor) -> None:
        self._held.copy_(given, non_blocking=True)
        self._graph.replay()


class Graphs:
    """The graphs of one network. `status` says whether there are any, and why not."""

    def __init__(self) -> None:
        self.status = "not recorded yet"
        self._lock = threading.RLock()
        self._memory = GraphMemory()
        self._kept: OrderedDict[Hashable, _Graph] = OrderedDict()
        self._seen: OrderedDict[Hashable, None] = OrderedDict()
        self._weights: Sequence[int] = ()
        self._calls = 0
        self._stream: Any = None
        self._failed = False

    def __len__(self) -> int:
        return len(self._kept)

    def forget(self) -> None:
        """The weights leave, or others come: what was recorded points at nothing."""
        with self._lock:
            held = next(iter(self._kept.values()), None)
            device = None if held is None else held.device
            del held
            self._kept.clear()
            if device is not None:
                trim(device)
            # Recording takes longer than some hundred replays save, so weights that come and go are not worth it.
            self._seen.clear()

    def __call__(self, key: Hashable, step: Step, given: Tensor, weights: Sequence[int], nbytes: int) -> Tensor:
        """The first of what `step` gives for `given`.

        key: all that `step` depends on beside its tensor; weights: where they are; nbytes: of activations in a call.
        """
        with self._lock, torch.cuda.device(given.device):
            if weights != self._weights:
                self.forget()
                self._weights = weights
            key = (key, given.shape, given.stride(), given.dtype)
            self._calls += 1
            graph = self._kept.get(key)
            if graph is None:
                result, *evidence = step(given)
                if self._may_record(key, nbytes, given.device):
                    self._record(key, step, given, evidence or [result])
                return result
            graph.used = self._calls
            self._kept.move_to_end(key)
            self._wait_for_last_call()
            graph.replay(given)
            return graph.made[0].clone()

    def _wait_for_last_call(self) -> None:
        """Graphs write where the last one may still read, if that was on another stream."""
        stream: Any = torch.cuda.current_stream()
        if self._stream is not None and stream != self._stream:
            stream.wait_stream(self._stream)
        self._stream = stream

    def _may_record(self, key: Hashable, nbytes: int, device: torch.device) -> bool:
        if self._failed:
            return False
        if nbytes > MOST_BYTES:
            self.status = self.status if self._kept else "not recorded, the pictures are too large"
            return False
        if key not in self._seen:
            self._seen[key] = None
            while len(self._seen) > 8 * MOST_GRAPHS:
                self._seen.popitem(last=False)
            return False
        if len(self._kept) >= MOST_GRAPHS:
            oldest = next(iter(self._kept))
            if self._calls - self._kept[oldest].used < IDLE_CALLS:
                return False
            del self._kept[oldest]
        if host.current().free_memory(device) < 2 * nbytes:
            self.status = self.status if self._kept else "not recorded, memory is short"
            return False
        return True

    def _record(self, key: Hashable, step: Step, given: Tensor, expected: Sequence[Tensor]) -> None:
        try:
            graph = _Graph(step, given, self._memory)
            self._wait_for_last_call()
            graph.replay(given)
            for one, other in zip(graph.made[-len(expected) :], expected, strict=True):
                if not (one - other).abs().max() <= TOLERANCE * other.abs().max().clamp_min(1e-6):
                    raise RuntimeError("the replay differs from the plain run")
        except RuntimeError as error:
            self.forget()
            self._failed = True
            self.status = f"none: {first_line(error, 160)}"
            log.warning("no CUDA graph of a face network: %s", self.status)
            return
        graph.used = self._calls
        self._kept[key] = graph
        shapes = f", {len(self._kept)} shapes" if len(self._kept) > 1 else ""
        self.status = f"recorded, equal to the plain run{shapes}"
