"""Interrupts during what asks nobody: a long call of a library, a file of gigabytes, a network on a slow processor.

Each asks the current host every fraction of a second. A library that cannot be stopped goes on to its end unseen.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from . import current, tracked

Result = TypeVar("Result")

POLL = 0.1  # seconds between two questions to the host
CHUNK = 16 << 20  # bytes read between two questions: a tenth of a second from a disk that turns
WORTH_A_BAR = 256 << 20  # bytes that may take longer than a second to read
WORTH_A_QUESTION = 1 << 16  # weights; layers with fewer are quick on anything


def is_stop(error: BaseException) -> bool:
    """Whether `error` is the user's stop, which older versions of ComfyUI raise as an ordinary exception."""
    return isinstance(error, KeyboardInterrupt) or type(error).__name__ == "InterruptProcessingException"


def interruptibly(call: Callable[[], Result], meanwhile: Callable[[], None] | None = None) -> Result:
    """What `call` returns or raises. It runs in a thread of its own, with this thread's context variables.

    When the host is interrupted meanwhile, this raises at once. `call` is not stopped: what it gives is dropped. It
    must do no harm when it ends later: hold what it reads, and not ask the host, for that stop would be a later run's.
    torch's settings of a thread, such as grad mode, do not come along.
    meanwhile: called in this thread every POLL seconds, to show how far `call` is.
    """
    check = current().check_interrupt
    check()
    future: Future[Result] = Future()
    context = contextvars.copy_context()

    def work() -> None:
        try:
            future.set_result(context.run(call))
        except BaseException as error:  # whatever it is, the thread that waits raises it
            future.set_exception(error)

    threading.Thread(target=work, name="hotpath-call", daemon=True).start()
    while not wait([future], timeout=POLL).done:
        check()
        if meanwhile is not None:
            meanwhile()
    return future.result()


def read_ahead(path: Path) -> None:
    """Bring a file into the system's file cache, with a bar, so that a loader that asks nobody finds all of it there.

    A file for which half of the free memory is too small is left to its loader: its start would be gone again at its end.
    """
    here = current()
    size = path.stat().st_size
    if size > here.free_memory(torch.device("cpu")) // 2:
        return
    buffer = memoryview(bytearray(min(size, CHUNK)))
    with path.open("rb", buffering=0) as file:
        if size < WORTH_A_BAR:
            while file.readinto(buffer):
                here.check_interrupt()
            return
        with tracked(here, -(-size // CHUNK), path.name) as bar:
            while file.readinto(buffer):
                bar.update()


def let_layers_ask(network: nn.Module) -> None:
    """From now on, each large layer of `network` asks before it computes, except in compiled code.

    For a network on a CPU, where one pass can take many seconds. An accelerator is far behind the program that feeds it.
    """
    for layer in network.modules():
        large = sum(weight.numel() for weight in layer.parameters(recurse=False)) >= WORTH_A_QUESTION
        if large and _ask not in layer._forward_pre_hooks.values():
            layer.register_forward_pre_hook(_ask)


def _ask(*_: Any) -> None:
    if not torch.compiler.is_compiling():
        current().check_interrupt()
