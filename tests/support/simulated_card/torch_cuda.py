"""What stands for the functions of torch.cuda, and where torch has to be told that there is a card."""

from __future__ import annotations

import functools
import os
import threading
import types
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from .arguments import mapped
from .graphs import CUDAGraph, new_pool
from .operators import ATTENTION, OnCard, Simulation, implementations, launched, run
from .streams import TOTAL, Card, Event, Stream, card, device_of, is_made, make_card, on_device, on_stream

NAME = "Simulated H200"


def install(devices: int = 1) -> Card:
    """Put `devices` cards into this process and every thread of it that starts from now on; again, nothing happens."""
    if is_made():
        return card()
    if torch.cuda.is_available():
        raise RuntimeError("there is a real card: nothing to simulate")
    os.environ["TRITON_INTERPRET"] = "1"
    # Dynamo lists the functions of torch.cuda when it is first asked: those are to be torch's own.
    from torch._dynamo import trace_rules

    trace_rules.get_torch_obj_rule_map()
    made = make_card(devices)
    torch._C._ensureCUDADeviceGuardSet()
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") comes here as a copy
    cuda: Any = torch.cuda
    for name, value in _functions(made).items():
        setattr(cuda, name, value)
    cuda.memory.mem_get_info = cuda.mem_get_info
    cuda.graphs.CUDAGraph = CUDAGraph
    changed: Any = torch
    changed.Generator = Generator
    for change in (
        _captures,
        _numbers,
        _data,
        _attention,
        _tracing,
        _compiling,
        _operators_of_the_pack,
        _triton,
        _threads,
    ):
        change(made)
    Simulation().__enter__()
    return made


class Generator(torch.Generator):
    """One of the card's draws what the CPU's draws."""

    def __new__(cls, device: Any = "cpu") -> Any:
        return super().__new__(cls, "cpu")

    def __init__(self, device: Any = "cpu") -> None:
        self._place = torch.device(device)

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return device_of(self._place) if self._place.type == "cuda" else self._place


def _functions(card: Card) -> dict[str, Any]:
    def nothing() -> Callable[..., None]:
        return lambda *_, **__: None  # each its own: dynamo knows functions by identity

    def memory_stats(device: Any = None) -> dict[str, int]:
        kinds = ("active_bytes", "reserved_bytes", "allocated_bytes")
        now = {f"{kind}.all.current": card.held for kind in kinds}
        return {**now, **{f"{kind}.all.peak": card.peak for kind in kinds}, "num_alloc_retries": 0, "num_ooms": 0}

    def set_debug(mode: int | str) -> None:
        card.debug = {"default": 0, "warn": 1, "error": 2}[mode] if isinstance(mode, str) else mode

    def synchronize(device: Any = None) -> None:
        card.wait("torch.cuda.synchronize()")
        card.host_waits_for_all()

    def properties(device: Any = None) -> Any:
        return types.SimpleNamespace(
            name=NAME, major=9, minor=0, total_memory=TOTAL, multi_processor_count=132, warp_size=32,
            max_threads_per_multi_processor=2048, regs_per_multiprocessor=65536, L2_cache_size=50 << 20,
            shared_memory_per_multiprocessor=233472, shared_memory_per_block_optin=232448, gcnArchName="", uuid="simulated",
            is_integrated=0,
        )  # fmt: skip

    def register(address: int, size: int, flags: int) -> int:
        return 712 if card.registered.setdefault(address, size) != size else 0  # registered already, otherwise

    def unregister(address: int) -> int:
        return 713 if card.registered.pop(address, None) is None else 0  # never registered

    cudart = types.SimpleNamespace(
        cudaHostRegister=register, cudaHostUnregister=unregister, cudaGetErrorString=str,
        cudaError=types.SimpleNamespace(success=0),
    )  # fmt: skip
    silent = (
        "_lazy_init", "_lazy_call", "init", "empty_cache", "ipc_collect", "manual_seed", "manual_seed_all", "seed_all",
        "set_rng_state", "set_rng_state_all", "_sleep",
    )  # fmt: skip
    return {
        **{name: nothing() for name in silent},
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_is_in_bad_fork": lambda: False,
        "is_bf16_supported": lambda *_, **__: True,
        "device_count": lambda: card.count,
        "current_device": lambda: card.index,
        "set_device": lambda device: setattr(card, "index", device_of(device).index),
        "get_device_name": lambda device=None: NAME,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_properties": properties,
        "get_arch_list": lambda: ["sm_80", "sm_90"],
        "mem_get_info": lambda device=None: (TOTAL - card.held, TOTAL),
        "memory_allocated": lambda device=None: card.held,
        "memory_reserved": lambda device=None: card.held,
        "max_memory_allocated": lambda device=None: card.peak,
        "max_memory_reserved": lambda device=None: card.peak,
        "reset_peak_memory_stats": lambda device=None: setattr(card, "peak", card.held),
        "memory_stats": memory_stats,
        "synchronize": synchronize,
        "get_rng_state": lambda device=None: torch.zeros(16, dtype=torch.uint8),
        "get_rng_state_all": list,
        "Stream": Stream,
        "Event": Event,
        "stream": on_stream,
        "StreamContext": on_stream,
        "current_stream": lambda device=None: card.stream if device is None else card.stream_of(device_of(device)),
        "default_stream": lambda device=None: card.default(device_of(device)),
        "device": on_device,
        "device_of": lambda tensor: on_device(tensor.device if tensor.is_cuda else None),
        "CUDAGraph": CUDAGraph,
        "graph_pool_handle": new_pool,
        "is_current_stream_capturing": lambda: card.capture_on(card.stream) is not None,
        "set_sync_debug_mode": set_debug,
        "get_sync_debug_mode": lambda: card.debug,
        "get_allocator_backend": lambda: "native",
        "cudart": lambda: cudart,
        "utilization": lambda device=None: 0,
    }


def _captures(card: Card) -> None:
    """What ends a capture for the allocator, where the capture itself could not."""

    def end(_: int, pool: Any) -> None:
        if card.captures_into != pool:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        card.captures_into = None

    inner: Any = torch._C
    inner._cuda_endAllocateToPool = end
    inner._cuda_releasePool = lambda *_: None
    inner._cuda_clearCublasWorkspaces = lambda: card.launches.update(["workspaces cleared"])


def _numbers(_: Card) -> None:
    """`torch.tensor` of a list that holds tensors of the card: one wait each."""
    plain = torch.tensor
    # What `with torch.device(...)` concerns, found out once: by the names as they are now.
    torch.utils._device._device_constructors()

    @functools.wraps(plain)
    def tensor(data: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(data, (list, tuple)):
            data = mapped(lambda leaf: leaf.tolist() if isinstance(leaf, OnCard) else leaf, data)
        return plain(data, *args, **kwargs)

    torch.tensor = tensor


def _data(_: Card) -> None:
    """`parameter.data = tensor` may change sides: the object stays, what it is changes."""
    plain: Any = torch._C.TensorBase.data  # type: ignore[attr-defined]

    def put(self: Any, value: Any) -> None:
        if not isinstance(value, OnCard) and not isinstance(self, OnCard):
            plain.__set__(self, value)
            return
        with torch.no_grad():
            made: Any = value.detach()
        if isinstance(self, torch.nn.Parameter):
            made = torch.nn.Parameter(made, self.requires_grad)
        kept = {name: held for name, held in self.__dict__.items() if name not in ("inner", "memory", "_is_param")}
        self.__dict__.clear()
        self.__dict__.update({**kept, **made.__dict__})
        self.__class__ = type(made)
        torch._C._swap_tensor_impl(self, made)

    changed: Any = torch.Tensor
    changed.data = property(lambda self: plain.__get__(self), put)


def _attention(_: Card) -> None:
    """Attention comes whole: torch would ask the absent driver which of its kernels to take."""
    plain = torch.nn.functional.scaled_dot_product_attention

    def attend(query: Any, *args: Any, **kwargs: Any) -> Any:
        return run(ATTENTION, (query, *args), kwargs) if isinstance(query, OnCard) else plain(query, *args, **kwargs)

    for place in (torch.nn.functional, torch._C._nn):
        place.scaled_dot_product_attention = attend  # type: ignore[attr-defined]


def _tracing(_: Card) -> None:
    """Models of the host's are exported by torch's tracer, which does not know modes."""
    import torch.onnx

    for place, name in ((torch.onnx, "export"), (torch.jit, "trace")):
        plain = getattr(place, name)

        def apart(*args: Any, plain: Any = plain, **kwargs: Any) -> Any:
            with _disable_current_modes():
                return plain(*args, **kwargs)

        setattr(place, name, apart)


def _compiling(card: Card) -> None:
    def compile(model: Any = None, **options: Any) -> Any:
        if model is None:
            return lambda given: compile(given, **options)
        card.compiled.append(model)
        return model

    torch.compile = compile
    torch.nn.Module.compile = lambda self, *_, **__: card.compiled.append(self)  # type: ignore[method-assign]


def _operators_of_the_pack(_: Card) -> None:
    """They are run with the card's tensors, so that they choose as on a card."""
    plain = torch.library.Library.impl

    def impl(self: Any, op_name: Any, fn: Any, dispatch_key: str = "", **options: Any) -> Any:
        if self.ns == "hotpath" and isinstance(op_name, str) and dispatch_key != "Meta":
            implementations[f"hotpath::{op_name.split('::')[-1]}"] = fn
        return plain(self, op_name, fn, dispatch_key, **options)

    torch.library.Library.impl = impl  # type: ignore[method-assign]


def _triton(_: Card) -> None:
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    from quick_interpreter import hurry

    hurry()
    plain = interpreter.GridExecutor.__call__

    def call(self: Any, *args: Any, **kwargs: Any) -> None:
        launched(getattr(self.fn, "__name__", "kernel"), functools.partial(plain, self), args, kwargs)

    interpreter.GridExecutor.__call__ = call


def _threads(_: Card) -> None:
    plain = threading.Thread.run

    def start(self: threading.Thread) -> None:
        torch._C._set_only_lift_cpu_tensors(True)  # a thread's own, as modes are
        with Simulation():
            plain(self)

    threading.Thread.run = start  # type: ignore[method-assign]
