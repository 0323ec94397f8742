"""A batch that halves itself when the device runs out of memory, and remembers that it did."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from typing import TypeVar

from .. import host
from ..host.device_work import give_back_cached
from ..host.errors import is_out_of_memory

log = logging.getLogger("hotpath.colorization")

Result = TypeVar("Result")


class BatchSize:
    """How many items of `what` go through the device together; at least `smallest`."""

    def __init__(self, size: int, what: str, smallest: int = 1) -> None:
        self.size = max(smallest, size)
        self.what = what
        self.smallest = smallest
        self.notes: list[str] = []

    def run(self, compute: Callable[[int], Result]) -> Result:
        """`compute(size)`, again with half the size while it runs out of memory. It must not have changed anything."""
        while True:
            try:
                return compute(self.size)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or self.size <= self.smallest:
                    raise
            # Outside the handler: the traceback of the error keeps the tensors of its frames alive.
            self._halve()

    def map(self, count: int, compute: Callable[[slice], Result]) -> list[Result]:
        """`compute` over `count` items, part by part in their order, each of at most `size`; one that does not fit is halved."""
        results: list[Result] = []
        done = 0
        while done < count:
            host.current().check_interrupt()

            def part(size: int, first: int = done) -> tuple[Result, int]:
                stop = min(first + size, count)
                return compute(slice(first, stop)), stop

            result, done = self.run(part)
            results.append(result)
        return results

    def _halve(self) -> None:
        before, self.size = self.size, max(self.smallest, self.size // 2)
        note = f"out of memory: {self.what} halved from {before} to {self.size}"
        log.warning("%s", note)
        self.notes.append(note)
        gc.collect()
        give_back_cached(host.current().device())
