"""Interrupts inside what is one call: loading weights, the vision tower, the prefill of a long prompt.

Networks: their blocks ask the host before they begin. Decoding asks at every token and is compiled or captured, where a
question would break the graph, so the questions are taken away again. Loading: the library's own bar asks, and shows.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from .. import host

LEAST = 2  # modules in a list, for it to be the blocks of something


def block_lists(network: nn.Module) -> list[nn.ModuleList]:
    """The outermost lists of blocks of `network`, such as the layers of its tower and of its decoder."""
    found: list[nn.ModuleList] = []
    for child in network.children():
        if isinstance(child, nn.ModuleList) and len(child) >= LEAST:
            found.append(child)
        else:
            found.extend(block_lists(child))
    return found


@contextmanager
def interruptible(network: nn.Module) -> Iterator[None]:
    """While inside, every block of `network` checks for an interrupt before it runs."""
    check = host.current().check_interrupt

    def ask(*_: Any) -> None:
        check()

    handles = [block.register_forward_pre_hook(ask) for blocks in block_lists(network) for block in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Asking:
    """A bar of the library over something countable, which also moves the host's bar. That one checks for interrupts."""

    def __init__(self, bar: Any, total: int) -> None:
        self._bar = bar
        self._total = total

    def __iter__(self) -> Iterator[Any]:
        with host.tracked(host.current(), self._total, "weights") as progress:
            for entry in self._bar:
                progress.update()
                yield entry

    def __getattr__(self, name: str) -> Any:
        return getattr(self._bar, name)


@contextmanager
def interruptible_loading() -> Iterator[None]:
    """While inside, bars that transformers makes in this thread show on the host and check for an interrupt.

    Releases of transformers without a hook for their bars load as ever.
    """
    from transformers.utils import logging as library

    hook = getattr(library, "set_tqdm_hook", None)
    if hook is None:
        yield
        return
    mine = threading.get_ident()
    before: list[Callable[..., Any] | None] = []

    def make(factory: Callable[..., Any], arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        outer = before[0]
        bar = outer(factory, arguments, options) if outer is not None else factory(*arguments, **options)
        if threading.get_ident() != mine or not arguments or not hasattr(arguments[0], "__len__"):
            return bar
        return _Asking(bar, len(arguments[0]))

    before.append(hook(make))
    try:
        yield
    finally:
        hook(before[0])
