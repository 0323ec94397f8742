"""Interrupts within a step: the transformer's lists of blocks ask the host between any two blocks.

The check stands outside the blocks, so that a compiled block is one graph with it as without it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from .. import host

LISTS = ("noise_refiner", "context_refiner", "layers")


class WatchedBlocks(nn.ModuleList):
    """A ModuleList that checks for an interrupt before it hands out a block; names and weights are the list's own."""

    def __iter__(self) -> Iterator[nn.Module]:
        check = host.current().check_interrupt
        for block in super().__iter__():
            check()
            yield block


def watch(transformer: Any) -> None:
    """Let every list of blocks of `transformer` check for interrupts while it is run, in place."""
    for name in LISTS:
        setattr(transformer, name, WatchedBlocks(getattr(transformer, name)))
