"""Memory of the machine that is locked for the cards: they copy from and to it at full speed, while others work.

There is an end to it, and then the system refuses: of half the machine's memory on Windows, of less on Windows' Linux. Who asks
for some gets ordinary memory then, which only copies more slowly.
"""

from __future__ import annotations

import functools
import logging
import os
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import current

log = logging.getLogger("hotpath.host")

PORTABLE = 1  # cudaHostRegisterPortable: locked for every card
# Of the machine's memory on Windows, the host's own included. With more, copies from ordinary memory fail as well, whosever they
# are, as if the card had no memory left (ComfyUI 13221).
SHARE = 0.4

_locked: dict[int, int] = {}  # bytes by address, of `lock`


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor on the CPU for copies that a card makes meanwhile. torch keeps the memory and gives it out again."""
    try:
        return torch.empty(tuple(shape), dtype=dtype, pin_memory=True)
    except RuntimeError:
        _tell_of_slow_copies()
        return torch.empty(tuple(shape), dtype=dtype)


def pinned(tensor: Tensor) -> Tensor:
    """A copy of `tensor`, of the CPU, for a card to copy meanwhile; itself where there is no memory for that."""
    try:
        return tensor.pin_memory()
    except RuntimeError:
        _tell_of_slow_copies()
        return tensor


def lock(memory: Tensor) -> None:
    """Let the cards read `memory` by themselves, as long as it lives. Not torch's, which takes up to twice what is asked for."""
    hosts = current().locked_memory()
    if not torch.cuda.is_available() or not memory.nbytes or hosts is None:
        return
    if sum(list(_locked.values())) + hosts + memory.nbytes > most():
        _tell_of_slow_copies()
        return
    driver: Any = torch.cuda.cudart()
    address = memory.data_ptr()
    if int(driver.cudaHostRegister(address, memory.nbytes, PORTABLE)):
        _forget_refusal()
        _tell_of_slow_copies()
        return
    _locked[address] = memory.nbytes
    weakref.finalize(memory, _unlock, driver, address).atexit = False


def most() -> float:
    """Bytes that may be locked in all: elsewhere than on Windows, what the system lets be."""
    if os.name != "nt":
        return float("inf")
    try:
        import psutil  # type: ignore[import-untyped,unused-ignore]
    except ImportError:
        return 0
    return SHARE * float(psutil.virtual_memory().total)


def _unlock(driver: Any, address: int) -> None:
    _locked.pop(address, None)
    driver.cudaHostUnregister(address)


@functools.cache  # once for all that asks
def _tell_of_slow_copies() -> None:
    log.warning("some copies to the card and back are slow, because no more memory can be pinned")


def _forget_refusal() -> None:
    """The driver keeps a refusal, and torch would take it for a failure of the next kernel."""
    try:
        torch.zeros(1, device="cuda").add_(1)
        torch.cuda.synchronize()
    except RuntimeError:
        log.debug("the driver's refusal to pin memory", exc_info=True)
