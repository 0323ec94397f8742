"""Compilation that hears an interrupt: torch's compiler works in a thread of its own while the caller asks the host.

Lowering a graph and compiling its kernels takes seconds, of which many are spent waiting for other processes, where no
exception arrives. Tracing stays in the caller's thread, which asks between two operations.
"""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

import torch

from . import current
from .interruption import POLL, interruptibly, is_stop

Backend = Callable[..., Callable[..., Any]]

# What torch's compiler keeps per thread about the graph that is compiled. What a release lacks is passed over.
PER_THREAD = (
    ("torch._guards", "_TLS"),
    ("torch._dynamo.utils", "_metrics_context_tls"),
    ("torch.fx.experimental.symbolic_shapes", "TLS"),
    ("torch._subclasses.meta_utils", "tls"),  # that inference mode is off meanwhile, for graphs that write to an input
)

_one_at_a_time = threading.Lock()  # one that nobody waits for any more ends before the next begins
_inside = threading.local()  # in a thread that compiles: `left`, an event that says that nobody waits for it


class Left(Exception):
    """Ends a compilation that nobody waits for."""


class StopOnItsWay(BaseException):
    """Carries a stop through torch's compiler, which takes every ordinary exception for a failure of its own.

    In older ComfyUIs a stop is one.
    """

    def __init__(self, stop: Exception) -> None:
        super().__init__(stop)
        self.stop = stop


def ask_at_each_operation(traced: Any) -> None:
    """For `torch._dynamo.comptime.comptime` in a function that is traced: ask the host before each operation from there on.

    traced: Dynamo's ComptimeContext. Compiled code holds nothing of this. The backend begins with `stop_asking`, and the
    call is inside of `compiled_call`.
    """
    graph, check = traced.graph(), current().check_interrupt
    create = graph.create_node

    def asking(*args: Any, **kwargs: Any) -> Any:
        try:
            check()
        except Exception as error:
            raise StopOnItsWay(error) from None
        return create(*args, **kwargs)

    graph.create_node = asking


def stop_asking(graph: torch.fx.GraphModule) -> None:
    """The graph is whole: compilers that change it may not be stopped half-way."""
    graph.graph.__dict__.pop("create_node", None)


def interruptible_backend(backend: Backend) -> Backend:
    """`backend` (a function of Dynamo's graph and its inputs), left by its caller as soon as the host is interrupted.

    The compilation that was left goes on unseen: to the end of its tracing, or where kernels are made already to its end,
    which fills the compiler's caches on disk. The next one waits for it, and can be interrupted as well; so should whoever
    runs what was compiled before, see `compiled_call`, which is also where the stop comes out. Where gradients are wanted,
    the caller compiles, and hears nothing meanwhile.
    """

    def compiled(graph: torch.fx.GraphModule, inputs: list[Any], **options: Any) -> Callable[..., Any]:
        # A backend that compiles a part by itself, or one that may compile the way back as well, for which torch takes a
        # lock that this thread holds.
        if _compiles() or _wants_gradients(graph, inputs):
            return backend(graph, inputs, **options)
        settings, left = _settings_of_this_thread(), threading.Event()

        def work() -> Callable[..., Any]:
            with _one_at_a_time, settings():
                _inside.left = left
                _end_if_left()
                return backend(graph, inputs, **options)

        try:
            return interruptibly(work)
        except BaseException as error:
            left.set()
            if isinstance(error, Exception) and is_stop(error):
                raise StopOnItsWay(error) from None
            raise

    return compiled


def _compiles() -> bool:
    return hasattr(_inside, "left")


def _end_if_left() -> None:
    if _compiles() and _inside.left.is_set():
        raise Left


@contextmanager
def compiled_call() -> Iterator[None]:
    """What to enter around each call of what is compiled, or will be in that call.

    Waits for a compilation that was left, see `until_nothing_compiles`. A stop while the call compiles arrives as what the
    host raises. Another error holds nothing of what the call had in memory.
    """
    until_nothing_compiles()
    try:
        yield
    except StopOnItsWay as error:
        raise error.stop from None
    except Exception as error:
        # A frame of torch's refers to the error that refers to it and so to all its callers. The model that is sampled would go
        # as garbage, of which ComfyUI cannot take the weights off the card any more.
        traceback.clear_frames(error.__traceback__)
        raise


def until_nothing_compiles() -> None:
    """Wait for a compilation that was left, if there is one; the host is asked meanwhile.

    While one thread of the process traces a graph, torch takes a compiled function that another thread calls for a part of
    that graph, and refuses it.
    """
    if not _one_at_a_time.locked() or _compiles():
        return
    check = current().check_interrupt
    while _one_at_a_time.locked():
        check()
        time.sleep(POLL)


def inductor(options: dict[str, Any] | None = None) -> Backend:
    """torch's own compiler with `options` of its configuration, as an interruptible backend.

    One for all that have the same options: Dynamo uses no graph again that another backend made, and keeps eight of a
    function.
    """
    return _inductor(tuple(sorted((options or {}).items())))


@cache
def _inductor(options: tuple[tuple[str, Any], ...]) -> Backend:
    patches = dict(options)

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        from torch._inductor.compile_fx import compile_fx, compile_fx_inner

        def lower(*args: Any, **kwargs: Any) -> Any:
            _end_if_left()
            return compile_fx_inner(*args, **kwargs)

        made: Callable[..., Any] = compile_fx(graph, inputs, lower, patches)  # type: ignore[assignment]
        return made

    return interruptible_backend(backend)


def _wants_gradients(graph: torch.fx.GraphModule, inputs: list[Any]) -> bool:
    tensors = (*inputs, *graph.parameters())
    return torch.is_grad_enabled() and any(getattr(tensor, "requires_grad", False) for tensor in tensors)


def _settings_of_this_thread() -> Callable[[], Any]:
    """What a compiler reads of its thread, to be set in another one."""
    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    autocast = [
        (device, torch.get_autocast_dtype(device)) for device in ("cpu", "cuda") if torch.is_autocast_enabled(device)
    ]
    stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None
    places = [getattr(sys.modules.get(module), name, None) for module, name in PER_THREAD]
    states = [(place, dict(vars(place))) for place in places if place is not None]

    @contextmanager
    def settings() -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(inference))
            stack.enter_context(torch.set_grad_enabled(grad))
            for device, dtype in autocast:
                stack.enter_context(torch.autocast(device, dtype))
            if stream is not None:
                stack.enter_context(torch.cuda.stream(stream))  # the device as well
            for place, state in states:
                vars(place).update(state)
            yield

    return settings
