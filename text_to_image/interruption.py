"""Interrupts within a step: the transformer's lists of blocks ask the host between any two blocks.

The check stands outside the blocks, so that a compiled block is one graph with it as without it. A GPU works far behind
the program that feeds it; the lists keep that distance to a few blocks, or an interrupt would be heard when everything is
under way already.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from .. import host

LISTS = ("noise_refiner", "context_refiner", "layers")
LEAD = 8  # blocks the program may be ahead of the GPU; enough that the GPU never waits


class Lead:
    """How far the program is ahead of the device: each `step` marks a place, and waits for the one LEAD places back.

    mark: makes an event that is recorded where the device is to pass.
    """

    def __init__(self, mark: Callable[[], Any]) -> None:
        self._mark = mark
        self._ahead: deque[Any] = deque()

    def step(self) -> None:
        self._ahead.append(self._mark())
        if len(self._ahead) > LEAD:
            self._ahead.popleft().synchronize()


def recorded_event(device: torch.device) -> torch.cuda.Event:
    event = torch.cuda.Event()
    # Of this device: the current one may be another, which has nothing to do and would never be waited for.
    event.record(torch.cuda.current_stream(device))
    return event


class WatchedBlocks(nn.ModuleList):
    """A ModuleList that checks for an interrupt before it hands out a block; names and weights are the list's own."""

    def __iter__(self) -> Iterator[nn.Module]:
        check = host.current().check_interrupt
        lead: Lead | None = None
        for block in super().__iter__():
            check()
            yield block
            # Here again when the block's work is queued.
            if lead is None and (weight := next(block.parameters(), None)) is not None and weight.is_cuda:
                lead = Lead(partial(recorded_event, weight.device))
            if lead is not None:
                lead.step()


def watch(transformer: Any) -> None:
    """Let every list of blocks of `transformer` check for interrupts while it is run, in place."""
    for name in LISTS:
        setattr(transformer, name, WatchedBlocks(getattr(transformer, name)))
