"""A CUDA device that is not there: what runs on a card runs here on the CPU, and what a card would take amiss is raised.

    simulated_cuda.install()        # before ComfyUI, triton or the pack is imported; for the whole process
    card = simulated_cuda.card()

Tensors on it are of class `OnCard`: they say `cuda:0` and hold a CPU tensor. Everything else of torch is real, so that the
branches for CUDA run as they stand, among them streams, events, CUDA graphs, pinned copies, memory counting and Triton's
kernels (through its interpreter). What it finds, as a card or a race detector would:

- operators given tensors of several devices, NumPy views of device memory, generators of another device;
- waits of the host (`card.waits`), also as errors under `torch.cuda.set_sync_debug_mode("error")` and within a capture;
- reading on one stream what another one writes with no event between them, host memory read before its copy was waited
  for or changed before it was made, memory freed while another stream uses it without `record_stream` (`Hazard`);
- graphs: nothing runs while recording, a replay reads and writes the memory of the recording, reading memory that was freed
  since is a `Hazard`; random numbers and new CPU tensors in a capture are refused as on a card.

What it cannot: speed, the card's own rounding, torch.compile for CUDA (functions run uncompiled here, and `card.compiled`
counts them), fragmentation.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import types
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map

TOTAL = 143 << 30  # bytes an H200 has
GARBAGE = 0xA5


class Hazard(AssertionError):
    """Something that goes wrong on a card now and then."""


class _Memory:
    """One allocation on the card: who wrote it last, who read it since, where it came from."""

    def __init__(self, size: int, stream: Stream, pool: Any = None) -> None:
        self.size = size
        self.home = stream
        self.pool = pool
        self.written: tuple[Stream, int] | None = None
        self.read: dict[Stream, int] = {}
        self.recorded: set[Stream] = set()
        card().allocate(size)

    def __del__(self) -> None:
        if _card is not None:
            _card.release(self)


class Stream:
    """A queue of the card. `clock` counts its operations; `seen` holds, of every other stream, what comes before."""

    _numbers = iter(range(1, 1 << 60))

    def __init__(self, device: Any = None, priority: int = 0, **_: Any) -> None:
        self.device = _device(device)
        self.device_type, self.device_index = 1, self.device.index
        self.stream_id = self.cuda_stream = next(Stream._numbers)
        self.priority = priority
        self.clock = 0
        self.seen: dict[Stream, int] = {}
        self.pending: list[tuple[int, Callable[[], None]]] = []

    def __hash__(self) -> int:
        return self.stream_id

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream) and other.stream_id == self.stream_id

    def tick(self) -> int:
        self.clock += 1
        return self.clock

    def knows(self, other: Stream, clock: int) -> bool:
        return other is self or self.seen.get(other, 0) >= clock

    def _learn(self, other: Stream, clock: int, seen: dict[Stream, int]) -> None:
        for stream, its in (*seen.items(), (other, clock)):
            if stream is not self:
                self.seen[stream] = max(self.seen.get(stream, 0), its)

    def wait_stream(self, other: Stream) -> None:
        self._learn(other, other.clock, other.seen)

    def wait_event(self, event: Event) -> None:
        if event.at is not None:
            self._learn(*event.at)

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        card().wait(f"{self!r}.synchronize()")
        card().host_learns(self, self.clock, self.seen)

    def __enter__(self) -> Stream:
        self._context = use_stream(self)
        self._context.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._context.__exit__(*error)

    def __repr__(self) -> str:
        return f"<stream {self.stream_id} of {self.device}>"


class ExternalStream(Stream):
    def __init__(self, stream_ptr: int, device: Any = None, **_: Any) -> None:
        raise NotImplementedError("streams of others are not simulated")


class Event:
    def __init__(self, enable_timing: bool = False, blocking: bool = False, **_: Any) -> None:
        self.timed = enable_timing
        self.at: tuple[Stream, int, dict[Stream, int]] | None = None
        self._when = 0

    def record(self, stream: Stream | None = None) -> None:
        stream = stream or card().stream
        self.at = (stream, stream.clock, dict(stream.seen))
        self._when = card().operations

    def wait(self, stream: Stream | None = None) -> None:
        (stream or card().stream).wait_event(self)

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        if self.at is not None:
            if card().capture is not None:
                raise _cuda_error("operation not permitted when stream is capturing")
            card().host_learns(*self.at)  # not a wait for all of the device

    def elapsed_time(self, end: Event) -> float:
        """Operations between them, as microseconds."""
        if not (self.timed and end.timed):
            raise ValueError("Both events must be created with argument 'enable_timing=True'.")
        if self.at is None or end.at is None:
            raise ValueError("Both events must be recorded before calculating elapsed time.")
        return (end._when - self._when + 1) / 1000


class OnCard(torch.Tensor):
    """A tensor on the card. `inner` is the CPU tensor with its numbers, of the same sizes and strides."""

    inner: torch.Tensor
    memory: _Memory

    @staticmethod
    def __new__(cls, inner: torch.Tensor, device: torch.device, memory: _Memory) -> OnCard:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=device,
            requires_grad=False,
        )
        made.inner, made.memory = inner, memory
        return made

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"OnCard({self.inner!r}, device={self.device})"

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def untyped_storage(self) -> Any:
        return self.inner.untyped_storage()

    def numpy(self, *_: Any, **__: Any) -> Any:  # type: ignore[override]
        raise TypeError(f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() first.")

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __array__(self, *_: Any) -> Any:  # type: ignore[override]
        return self.numpy()

    def record_stream(self, stream: Stream) -> None:  # type: ignore[override]
        self.memory.recorded.add(stream)

    def __deepcopy__(self, memo: dict[int, Any]) -> OnCard:
        with torch.no_grad():
            copied = self.detach().clone()
        if self.requires_grad:
            copied.requires_grad_()
        copied.__dict__.update(
            {key: value for key, value in self.__dict__.items() if key not in ("inner", "memory")}
        )
        memo[id(self)] = copied
        return copied

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


class Capture:
    """What is recorded of a CUDA graph. Nothing that is recorded happens; it did here, to learn the sizes, so it is undone."""

    def __init__(self, stream: Stream, pool: Any) -> None:
        self.stream = stream
        self.streams = {stream}
        self.pool = pool
        self.steps: list[tuple[Any, Any, Any, Any]] = []
        self.outside: dict[int, weakref.ref[_Memory]] = {}
        self.mine: set[int] = set()  # memories that were allocated while recording
        self.own: dict[int, torch.UntypedStorage] = {}
        self.before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}
        self.generators: list[Any] = []

    def note(self, func: Any, args: Any, kwargs: Any, given: list[OnCard], out: Any) -> None:
        self.steps.append((func, args, kwargs, out))
        for tensor in given:
            if id(tensor.memory) not in self.mine:
                self.outside[id(tensor.memory)] = weakref.ref(tensor.memory)

    def keep(self, tensor: OnCard) -> None:
        """Before the first write to what existed before."""
        storage = tensor.inner.untyped_storage()
        if id(tensor.memory) not in self.mine and storage._cdata not in self.before:
            self.before[storage._cdata] = (storage, storage.clone())

    def undo(self) -> None:
        for storage, kept in self.before.values():
            storage.copy_(kept)
        for _, _, _, out in self.steps:
            for tensor in _tensors(out):
                if tensor.untyped_storage()._cdata in self.own:
                    _spoil(tensor)
        self.before.clear()


class CUDAGraph:
    def __init__(self, keep_graph: bool = False) -> None:
        self.made: Capture | None = None
        self._pool: Any = None

    def capture_begin(self, pool: Any = None, capture_error_mode: str = "global") -> None:
        stream = card().stream
        if stream is card().default(stream.device):
            raise _cuda_error("CUDA graphs must be captured on a non-default stream.")
        if card().capture is not None:
            raise _cuda_error("another capture is under way")
        self._pool = pool or graph_pool_handle()
        card().capture = Capture(stream, self._pool)
        card().capturing_thread = threading.get_ident()

    def capture_end(self) -> None:
        made, card().capture = card().capture, None
        if made is None or card().broken:
            card().broken = False
            raise _cuda_error("operation failed due to a previous error during capture")
        with _apart():
            made.undo()
        self.made = made
        card().graphs += 1

    def replay(self) -> None:
        if self.made is None:
            raise RuntimeError("Called CUDAGraph::replay without a preceding successful capture.")
        if card().capture is not None:
            raise _cuda_error("a graph is replayed while another one is recorded")
        stream = card().stream
        for reference in self.made.outside.values():
            memory = reference()
            if memory is None:
                raise Hazard("a graph reads or writes memory that was freed after it was recorded")
            _check_read(memory, stream)
        clock = stream.tick()
        with _apart():
            for func, args, kwargs, out in self.made.steps:
                again = func(*args, **kwargs)
                for one, held in zip(_tensors(again), _tensors(out), strict=True):
                    if one is not held and one.data_ptr() != held.data_ptr():
                        held.copy_(one)
        for reference in self.made.outside.values():
            memory = reference()
            if memory is not None:
                memory.written = (stream, clock)
        card().replays += 1
        card().operations += 1

    def reset(self) -> None:
        self.made = None

    def pool(self) -> Any:
        return self._pool

    def instantiate(self) -> None:
        return


class _Card:
    def __init__(self, count: int) -> None:
        self.count = count
        self.allocated: Counter[int] = Counter()
        self.held = 0
        self.peak = 0
        self.capture: Capture | None = None
        self.capturing_thread = 0
        self.broken = False
        self.waits: list[str] = []
        self.hazards: list[str] = []
        self.compiled: list[Any] = []
        self.launches: Counter[str] = Counter()
        self.operations = self.graphs = self.replays = 0
        self.debug = 0
        self.local = threading.local()
        self.defaults: dict[int, Stream] = {}
        self.host: dict[Stream, int] = {}
        self.implementations: dict[str, Callable[..., Any]] = {}
        self.pinned: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
        self.lock = threading.RLock()

    def default(self, device: torch.device) -> Stream:
        return self.defaults.setdefault(device.index, Stream(device))

    @property
    def index(self) -> int:
        return getattr(self.local, "index", 0)

    @index.setter
    def index(self, value: int) -> None:
        self.local.index = value

    @property
    def stream(self) -> Stream:
        own: Stream | None = getattr(self.local, "streams", {}).get(self.index)
        return own or self.default(torch.device("cuda", self.index))

    def set_stream(self, stream: Stream) -> None:
        if not hasattr(self.local, "streams"):
            self.local.streams = {}
        self.local.streams[stream.device.index] = stream
        self.index = stream.device.index

    def allocate(self, size: int) -> None:
        with self.lock:
            self.held += size
            self.peak = max(self.peak, self.held)

    def release(self, memory: _Memory) -> None:
        with self.lock:
            self.held -= memory.size
        if memory.pool is not None:
            return
        uses = [*memory.read.items(), *([memory.written] if memory.written else [])]
        for stream, clock in uses:
            known = memory.home.knows(stream, clock) or self.host.get(stream, 0) >= clock
            if not known and stream not in memory.recorded:
                self.hazards.append(
                    f"memory of {memory.home} was freed while {stream} may use it, and record_stream was not called"
                )

    def wait(self, why: str) -> None:
        """The host waits for the device."""
        if self.capture is not None and threading.get_ident() == self.capturing_thread:
            self.broken = True
            raise _cuda_error(f"operation not permitted when stream is capturing ({why})")
        self.waits.append(why)
        if self.debug == 1:
            warnings.warn(f"called a synchronizing CUDA operation ({why})", stacklevel=3)
        if self.debug == 2:
            raise RuntimeError(f"called a synchronizing CUDA operation ({why})")

    def host_learns(self, stream: Stream, clock: int, seen: dict[Stream, int]) -> None:
        for one, its in (*seen.items(), (stream, clock)):
            self.host[one] = max(self.host.get(one, 0), its)
            late = [step for step in one.pending if step[0] <= its]
            one.pending = [step for step in one.pending if step[0] > its]
            for _, happen in late:
                happen()


_card: _Card | None = None


def card() -> _Card:
    assert _card is not None, "call install() first"
    return _card


def _device(device: Any = None) -> torch.device:
    if device is None:
        return torch.device("cuda", card().index)
    device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    if device.type != "cuda":
        raise ValueError(f"Expected a cuda device, but got: {device}")
    index = card().index if device.index is None else device.index
    if not 0 <= index < card().count:
        raise _cuda_error("invalid device ordinal")
    return torch.device("cuda", index)


def _cuda_error(text: str) -> RuntimeError:
    return getattr(torch, "AcceleratorError", RuntimeError)(f"CUDA error: {text}")


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_flatten(value)[0] if isinstance(leaf, torch.Tensor)]


def _spoil(tensor: torch.Tensor) -> None:
    """Numbers nobody should read."""
    if tensor.is_floating_point() or tensor.is_complex():
        tensor.fill_(float("nan"))
    elif tensor.dtype == torch.bool:
        tensor.fill_(True)
    else:
        tensor.fill_(min(GARBAGE, torch.iinfo(tensor.dtype).max))


@contextlib.contextmanager
def _apart() -> Iterator[None]:
    """Plain torch, below the simulation."""
    with torch._C._DisableTorchDispatch(), torch.no_grad():
        yield


def _check_read(memory: _Memory, stream: Stream) -> None:
    if memory.written is not None:
        writer, clock = memory.written
        if not stream.knows(writer, clock) and card().host.get(writer, 0) < clock:
            raise Hazard(f"{stream} reads what {writer} may still write: no event is between them")


def _check_write(memory: _Memory, stream: Stream) -> None:
    _check_read(memory, stream)
    for reader, clock in memory.read.items():
        if not stream.knows(reader, clock) and card().host.get(reader, 0) < clock:
            raise Hazard(f"{stream} writes what {reader} may still read: no event is between them")


aten = torch.ops.aten
# Takes tensors of two devices, or a CPU tensor beside the card's.
COPIES = {aten._to_copy.default, aten.copy_.default, aten._foreach_copy_.default, aten.set_.source_Tensor}
# CPU indices are moved, which waits.
INDEXING = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}
WAITS = {
    aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.equal.default,
    aten.is_nonzero.default, aten._unique2.default, aten.unique_dim.default, aten.unique_consecutive.default,
    aten.repeat_interleave.Tensor, aten.argwhere.default,
}  # fmt: skip
QUESTIONS = {"is_pinned", "_fused_sdp_choice", "is_same_size", "_has_compatible_shallow_copy_type"}


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """One operator, with everything checked that a card checks."""
    if _card is None:
        raise RuntimeError("the simulation was not installed")
    flat, _ = tree_flatten((args, kwargs))
    given = [leaf for leaf in flat if isinstance(leaf, OnCard)]
    name = func._schema.name.split("::")
    if name[1] == "is_pinned":
        return not given and args[0].untyped_storage()._cdata in card().pinned
    if name[1] in ("_pin_memory", "pin_memory"):
        with _apart():
            return _pinned(args[0].clone())
    if name[1] == "_fused_sdp_choice":
        return 0  # the plain way: of the others' limits nothing is known here
    if name[1] == "record_stream":
        return None
    target = next((leaf for leaf in flat if isinstance(leaf, torch.device)), None)
    if not given and (target is None or target.type != "cuda"):
        if kwargs.get("pin_memory"):
            with _apart():
                return _pinned(func(*args, **{**kwargs, "pin_memory": False}))
        if card().capture is not None and threading.get_ident() == card().capturing_thread and target is not None:
            pass  # host work is allowed while recording
        _check_host(func, flat)
        with _apart():
            return func(*args, **kwargs)
    if func is aten.scaled_dot_product_attention.default:
        return _on_card(func, args, kwargs, flat, given, None)
    if not func._schema.name.startswith("hotpath::") and _is_composite(func):
        with Simulation():  # in inference mode they come whole
            return func.decompose(*args, **kwargs)
    return _on_card(func, args, kwargs, flat, given, target)


@functools.cache
def _is_composite(func: Any) -> bool:
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"))


def _pinned(tensor: torch.Tensor) -> torch.Tensor:
    storage = tensor.untyped_storage()
    card().pinned[storage._cdata] = storage
    _lasting[storage._cdata] = storage
    return tensor


_lasting: dict[int, Any] = {}  # pinned memory; a test makes little of it
_arriving: dict[int, tuple[Stream, int]] = {}  # host storages a copy is on its way to
_leaving: dict[int, list[tuple[Stream, int]]] = {}  # host storages a copy is on its way from


def _check_host(func: Any, flat: list[Any]) -> None:
    """Host memory that a copy is on its way to may not be read, and what is copied from may not be changed."""
    if not _arriving and not _leaving:
        return
    written = [a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments]
    for place, leaf in enumerate(flat):
        if not isinstance(leaf, torch.Tensor):
            continue
        if func._schema.name in VIEWS:
            continue
        at = leaf.untyped_storage()._cdata
        if at in _arriving:
            stream, clock = _arriving[at]
            if card().host.get(stream, 0) < clock:
                raise Hazard(f"the host uses memory that {stream} may still copy to: nobody waited for it")
            del _arriving[at]
        if at in _leaving and place < len(written) and written[place]:
            left = [(s, c) for s, c in _leaving[at] if card().host.get(s, 0) < c]
            if left:
                raise Hazard(f"the host changes memory that {left[0][0]} may still copy from")
            del _leaving[at]


VIEWS = {
    "aten::detach", "aten::view", "aten::slice", "aten::select", "aten::as_strided", "aten::alias", "aten::permute",
    "aten::transpose", "aten::unsqueeze", "aten::squeeze", "aten::expand", "aten::t", "aten::_reshape_alias",
    "aten::_unsafe_view", "aten::split", "aten::unbind", "aten::narrow", "aten::split_with_sizes", "aten::unfold",
}  # fmt: skip


def _on_card(
    func: Any, args: Any, kwargs: dict[str, Any], flat: list[Any], given: list[OnCard], target: torch.device | None
) -> Any:
    name = func._schema.name
    here = card()
    devices = {tensor.device for tensor in given}
    hosts = [leaf for leaf in flat if isinstance(leaf, torch.Tensor) and not isinstance(leaf, OnCard)]
    if func not in COPIES:
        if len(devices) > 1:
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found at least two devices, "
                f"{' and '.join(map(str, sorted(devices, key=str)))}! ({name})"
            )
        wrong = [tensor for tensor in hosts if tensor.dim() > 0]
        if wrong and given and func in INDEXING and isinstance(args[0], OnCard):
            here.wait(f"{name} with indices on the CPU")
        elif wrong and given:
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found at least two devices, "
                f"{next(iter(devices))} and cpu! ({name})"
            )
    if func in WAITS or (
        func in INDEXING and any(isinstance(i, torch.Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1])
    ):
        here.wait(name)
    device = _device(target) if target is not None and target.type == "cuda" else next(iter(devices), None)
    if target is not None and target.type == "cpu":
        device = None
    if name.startswith("hotpath::") and name in here.implementations:
        return here.implementations[name](*args, **kwargs)
    if func in COPIES and (hosts or target is not None):
        return _copy(func, args, kwargs, given, hosts, device)
    kwargs = dict(kwargs)
    if "device" in kwargs:
        kwargs["device"] = torch.device("cpu")
    if kwargs.get("pin_memory"):
        raise RuntimeError("Only dense CPU tensors can be pinned")
    generator = kwargs.get("generator")
    if generator is not None and here.capture is not None:
        raise _cuda_error("a generator that is not registered with the graph is used while recording")
    stream = here.stream if device is None or device.index == here.index else here.default(device)
    return _execute(func, args, kwargs, given, device, stream)


def _execute(func: Any, args: Any, kwargs: Any, given: list[OnCard], device: torch.device | None, stream: Stream) -> Any:
    here = card()
    capture = here.capture if here.capture is not None and stream in here.capture.streams else None
    writes = _written(func, args, kwargs)
    is_view = func._schema.name in VIEWS or func.is_view
    if not is_view:
        for tensor in given:
            _check_read(tensor.memory, stream)
        for tensor in writes:
            _check_write(tensor.memory, stream)
            if capture is not None:
                capture.keep(tensor)
    inner_args, inner_kwargs = tree_map(_inner, (args, kwargs))
    with _apart():
        if func is aten.scaled_dot_product_attention.default:  # which kernels are allowed is said for the card
            with sdpa_kernel([SDPBackend.MATH]):
                out = func(*inner_args, **inner_kwargs)
        else:
            out = func(*inner_args, **inner_kwargs)
    if capture is not None:
        capture.note(func, inner_args, inner_kwargs, given, out)
    if not is_view:
        clock = stream.tick()
        here.operations += 1
        here.launches[func._schema.name] += 1
        for tensor in given:
            tensor.memory.read[stream] = clock
        for tensor in writes:
            tensor.memory.written = (stream, clock)
            tensor.memory.read.clear()
    held = {tensor.inner.untyped_storage()._cdata: tensor.memory for tensor in given}
    same = {id(tensor.inner): tensor for tensor in given}

    def wrap(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or device is None:
            return value
        if id(value) in same:
            return same[id(value)]
        if is_view and not given[0].is_inference() and torch.is_inference_mode_enabled():
            with torch.inference_mode(False):  # a view is of the kind its base is
                return _wrapped(value, device, stream, held, capture, None)
        return _wrapped(value, device, stream, held, capture, None if is_view else stream.clock)

    return tree_map(wrap, out)


def _wrapped(
    value: torch.Tensor,
    device: torch.device,
    stream: Stream,
    held: dict[int, _Memory],
    capture: Capture | None,
    clock: int | None,
) -> OnCard:
    at = value.untyped_storage()._cdata
    memory = held.get(at)
    if memory is None:
        memory = _Memory(value.untyped_storage().nbytes(), stream, capture.pool if capture else None)
        held[at] = memory
        if capture is not None:
            capture.mine.add(id(memory))
            capture.own[at] = value.untyped_storage()
        if clock is not None:
            memory.written = (stream, clock)
    return OnCard(value, device, memory)


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, OnCard) else value


def _written(func: Any, args: Any, kwargs: Any) -> list[OnCard]:
    found: list[OnCard] = []
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = args[place] if place < len(args) else kwargs.get(argument.name)
        found += [leaf for leaf in tree_flatten(value)[0] if isinstance(leaf, OnCard)]
    return found


def _copy(
    func: Any, args: Any, kwargs: dict[str, Any], given: list[OnCard], hosts: list[Any], device: torch.device | None
) -> Any:
    """Copies between host and card, or cards: at once or on their way."""
    here = card()
    if func is aten._foreach_copy_.default:
        for one, other in zip(args[0], args[1], strict=True):
            run(aten.copy_.default, (one, other), {"non_blocking": bool(kwargs.get("non_blocking", False))})
        return args[0]
    later = bool(kwargs.get("non_blocking", False))
    if func is aten.copy_.default:
        later = bool(args[2]) if len(args) > 2 else later
        target, source = args[0], args[1]
        if isinstance(target, OnCard) and isinstance(source, OnCard):
            return _between(func, args, kwargs, given, target)
        if isinstance(target, OnCard):
            _upload(source, target, later)
        else:
            _download(source, target, later)
        return target
    (source,) = args
    options = {key: value for key, value in kwargs.items() if key not in ("device", "non_blocking", "pin_memory")}
    if isinstance(source, OnCard) and device is not None:
        return _between(func, args, {**options, "device": torch.device("cpu")}, given, device)
    if isinstance(source, OnCard):
        with _apart():
            target = source.inner.to(copy=True, **_plain(options))
        _download(source, target, later, arrives=True)
        return target
    assert device is not None
    with _apart():
        made = source.to(copy=True, **_plain(options))
    target = _wrapped(made, device, _stream_for(device), {}, here.capture, None)
    _upload(source, target, later)
    return target


def _plain(options: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key in ("dtype", "memory_format") and value is not None}


def _stream_for(device: torch.device) -> Stream:
    return card().stream if device.index == card().index else card().default(device)


def _between(func: Any, args: Any, kwargs: Any, given: list[OnCard], target: Any) -> Any:
    device = target if isinstance(target, torch.device) else target.device
    stream = _stream_for(device)
    for tensor in given:
        if tensor.device != device:  # torch lets the streams of both devices wait for each other
            other = _stream_for(tensor.device)
            stream.wait_stream(other)
            other.wait_stream(stream)
    return _execute(func, args, kwargs, given, device, stream)


def _is_pinned(tensor: torch.Tensor) -> bool:
    return tensor.untyped_storage()._cdata in card().pinned


def _upload(source: torch.Tensor, target: OnCard, later: bool) -> None:
    """Host to card."""
    here = card()
    stream = _stream_for(target.device)
    _check_host(aten.add.Tensor, [source])
    _check_write(target.memory, stream)
    if here.capture is not None and stream in here.capture.streams:
        if source.dim() == 0 or not _is_pinned(source):
            here.broken = True
            raise _cuda_error("operation not permitted when stream is capturing (copy from pageable memory)")
    with _apart():
        target.inner.copy_(source)
        if here.capture is not None and stream in here.capture.streams:
            here.capture.note(aten.copy_.default, (target.inner, source), {}, [target], target.inner)
    clock = stream.tick()
    here.operations += 1
    here.launches["copy to the card"] += 1
    target.memory.written = (stream, clock)
    target.memory.read.clear()
    if later and _is_pinned(source):
        _leaving.setdefault(source.untyped_storage()._cdata, []).append((stream, clock))
    elif not later:
        here.wait("copy to the card")
        here.host_learns(stream, clock, stream.seen)


def _download(source: OnCard, target: torch.Tensor, later: bool, arrives: bool = False) -> None:
    """Card to host. A copy on its way leaves garbage until it is waited for."""
    here = card()
    stream = _stream_for(source.device)
    _check_read(source.memory, stream)
    if not arrives:
        _check_host(aten.copy_.default, [target])
    clock = stream.tick()
    here.operations += 1
    here.launches["copy to the host"] += 1
    source.memory.read[stream] = clock
    if not later or not (arrives or _is_pinned(target)):
        here.wait("copy to the host")
        here.host_learns(stream, clock, stream.seen)
        with _apart():
            target.copy_(source.inner)
        return
    if here.capture is not None:
        raise NotImplementedError("copies to the host in a capture are not simulated")
    with _apart():
        numbers = source.inner.clone()
        _spoil(target)

    def happen() -> None:
        with _apart():
            target.copy_(numbers)
        _arriving.pop(target.untyped_storage()._cdata, None)

    stream.pending.append((clock, happen))
    _arriving[target.untyped_storage()._cdata] = (stream, clock)


class Simulation(TorchDispatchMode):
    """Catches what makes tensors on the card, and what the host does meanwhile."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


@contextlib.contextmanager
def use_stream(stream: Stream | None) -> Iterator[None]:
    if stream is None:
        yield
        return
    index, before = card().index, card().stream
    own = getattr(card().local, "streams", {}).get(stream.device.index)
    card().set_stream(stream)
    try:
        yield
    finally:
        card().local.streams.pop(stream.device.index, None)
        if own is not None:
            card().local.streams[stream.device.index] = own
        card().index = index
        assert before is not None


class use_device:  # noqa: N801 - stands for torch.cuda.device
    def __init__(self, device: Any) -> None:
        self.index = card().index if device is None or device == -1 else _device(device).index

    def __enter__(self) -> None:
        self.before, card().index = card().index, self.index

    def __exit__(self, *_: Any) -> None:
        card().index = self.before


def graph_pool_handle() -> tuple[int, int]:
    return (0, next(Stream._numbers))


class Generator(torch.Generator):
    """A generator of the card, which draws as the CPU's does."""

    def __new__(cls, device: Any = "cpu") -> Any:
        return super().__new__(cls, "cpu")

    def __init__(self, device: Any = "cpu") -> None:
        self._where = torch.device(device)

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self._where if self._where.type != "cuda" else _device(self._where)


def _properties(device: Any = None) -> Any:
    return types.SimpleNamespace(
        name="Simulated H200", major=9, minor=0, total_memory=TOTAL, multi_processor_count=132, warp_size=32,
        max_threads_per_multi_processor=2048, regs_per_multiprocessor=65536, shared_memory_per_multiprocessor=233472,
        shared_memory_per_block_optin=232448, L2_cache_size=50 << 20, gcnArchName="", uuid="simulated", is_integrated=0,
    )  # fmt: skip


def _synchronize(device: Any = None) -> None:
    card().wait("torch.cuda.synchronize()")
    for stream in [*card().defaults.values(), *_streams]:
        card().host_learns(stream, stream.clock, stream.seen)


_streams: weakref.WeakSet[Stream] = weakref.WeakSet()


def install(devices: int = 1) -> None:
    """Put the card into this process and every thread of it that starts from now on."""
    global _card
    if _card is not None:
        return
    if torch.cuda.is_available():
        raise RuntimeError("there is a real card: no need to simulate one")
    os.environ["TRITON_INTERPRET"] = "1"
    from torch._dynamo import trace_rules  # it lists torch.cuda's functions when it is imported; those are to be torch's own

    trace_rules.get_torch_obj_rule_map()
    _card = _Card(devices)
    torch._C._ensureCUDADeviceGuardSet()
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") comes here as a copy
    made = Stream.__init__

    def noted(self: Stream, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        _streams.add(self)

    Stream.__init__ = noted  # type: ignore[method-assign]
    cuda: Any = torch.cuda
    for name, value in _replacements().items():
        setattr(cuda, name, value)
    cuda.memory.mem_get_info = cuda.mem_get_info
    cuda.graphs.CUDAGraph = cuda.graphs._CUDAGraph = CUDAGraph
    torch.Generator = Generator  # type: ignore[misc]
    torch.compile = _compile
    torch.nn.Module.compile = lambda self, *args, **kwargs: card().compiled.append(self)  # type: ignore[method-assign]
    _watch_libraries()
    _watch_triton()
    _watch_data()
    _watch_numbers()
    _leave_tracing_alone()
    _watch_attention()
    _watch_threads()
    Simulation().__enter__()


def _compile(function: Any = None, **options: Any) -> Any:
    if function is None:
        return lambda given: _compile(given, **options)
    card().compiled.append(function)
    return function


def _replacements() -> dict[str, Any]:
    here = card()

    def memory_stats(device: Any = None) -> dict[str, int]:
        made = {}
        for kind in ("active_bytes", "reserved_bytes", "allocated_bytes"):
            made |= {f"{kind}.all.current": here.held, f"{kind}.all.peak": here.peak}
        return {**made, "num_alloc_retries": 0, "num_ooms": 0}

    def set_debug(mode: int | str) -> None:
        here.debug = {"default": 0, "warn": 1, "error": 2}.get(mode, mode) if isinstance(mode, str) else mode

    def reset_peak(device: Any = None) -> None:
        here.peak = here.held

    def nothing(*_: Any, **__: Any) -> None:
        return

    cudart = types.SimpleNamespace(
        cudaHostRegister=lambda *_: 0, cudaHostUnregister=lambda *_: 0, cudaGetErrorString=lambda code: str(code),
        cudaError=types.SimpleNamespace(success=0),
    )  # fmt: skip
    return {
        "_lazy_init": nothing,
        "_lazy_call": nothing,
        "init": nothing,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_is_in_bad_fork": lambda: False,
        "is_bf16_supported": lambda *_, **__: True,
        "device_count": lambda: here.count,
        "current_device": lambda: here.index,
        "set_device": lambda device: setattr(here, "index", _device(device).index),
        "get_device_name": lambda device=None: "Simulated H200",
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_properties": _properties,
        "get_arch_list": lambda: ["sm_80", "sm_90"],
        "mem_get_info": lambda device=None: (TOTAL - here.held, TOTAL),
        "memory_allocated": lambda device=None: here.held,
        "memory_reserved": lambda device=None: here.held,
        "max_memory_allocated": lambda device=None: here.peak,
        "max_memory_reserved": lambda device=None: here.peak,
        "reset_peak_memory_stats": reset_peak,
        "memory_stats": memory_stats,
        "empty_cache": nothing,
        "ipc_collect": nothing,
        "synchronize": _synchronize,
        "manual_seed": nothing,
        "manual_seed_all": nothing,
        "seed_all": nothing,
        "get_rng_state": lambda device=None: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": nothing,
        "get_rng_state_all": lambda: [],
        "set_rng_state_all": nothing,
        "Stream": Stream,
        "ExternalStream": ExternalStream,
        "Event": Event,
        "stream": use_stream,
        "StreamContext": use_stream,
        "set_stream": here.set_stream,
        "current_stream": lambda device=None: here.stream if device is None else _stream_for(_device(device)),
        "default_stream": lambda device=None: here.default(_device(device)),
        "device": use_device,
        "device_of": lambda tensor: use_device(tensor.device if tensor.is_cuda else None),
        "CUDAGraph": CUDAGraph,
        "graph_pool_handle": graph_pool_handle,
        "is_current_stream_capturing": lambda: here.capture is not None and here.stream in here.capture.streams,
        "set_sync_debug_mode": set_debug,
        "get_sync_debug_mode": lambda: here.debug,
        "get_allocator_backend": lambda: "native",
        "cudart": lambda: cudart,
        "_sleep": nothing,
        "utilization": lambda device=None: 0,
    }


def _watch_libraries() -> None:
    """Operators of the pack are run with the card's tensors, so that they choose as on a card."""
    implement = torch.library.Library.impl

    def watched(self: Any, op_name: Any, fn: Any, dispatch_key: str = "", **options: Any) -> Any:
        if self.ns == "hotpath" and isinstance(op_name, str):
            card().implementations[f"hotpath::{op_name.split('::')[-1]}"] = fn
        return implement(self, op_name, fn, dispatch_key, **options)

    torch.library.Library.impl = watched  # type: ignore[method-assign]


def _watch_triton() -> None:
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    launch = interpreter.GridExecutor.__call__

    def watched(self: Any, *args: Any, **kwargs: Any) -> None:
        given = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, torch.Tensor)]
        wrong = [tensor for tensor in given if not isinstance(tensor, OnCard)]
        if wrong and len(wrong) < len(given):
            raise ValueError("Pointer argument cannot be accessed from Triton (cpu tensor?)")
        on_card: list[Any] = [tensor for tensor in given if isinstance(tensor, OnCard)]
        here = card()
        stream = here.stream
        capture = here.capture if here.capture is not None and stream in here.capture.streams else None
        for tensor in on_card:
            _check_read(tensor.memory, stream)
            if capture is not None:
                capture.keep(tensor)
        plain_args, plain_kwargs = tree_map(_inner, (args, kwargs))

        def kernel(*again: Any, **more: Any) -> None:
            launch(self, *again, **more)

        with _apart():
            kernel(*plain_args, **plain_kwargs)
        if capture is not None:
            capture.note(kernel, plain_args, plain_kwargs, on_card, None)
        clock = stream.tick()
        here.operations += 1
        here.launches[f"triton::{getattr(self.fn, '__name__', 'kernel')}"] += 1
        for tensor in on_card:  # which of them it writes is not known: those nobody else touches meanwhile
            tensor.memory.read[stream] = clock

    interpreter.GridExecutor.__call__ = watched


def _watch_attention() -> None:
    """Attention comes whole: torch would ask the absent driver which of its kernels to take."""
    plain = torch.nn.functional.scaled_dot_product_attention

    def attend(query: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(query, OnCard):
            return run(aten.scaled_dot_product_attention.default, (query, *args), kwargs)
        return plain(query, *args, **kwargs)

    torch.nn.functional.scaled_dot_product_attention = torch._C._nn.scaled_dot_product_attention = attend


def _leave_tracing_alone() -> None:
    """Models of the host's are exported by torch's tracer, which does not know modes."""
    import torch.onnx

    for where, name in ((torch.onnx, "export"), (torch.jit, "trace")):
        plain = getattr(where, name)

        def apart(*args: Any, plain: Any = plain, **kwargs: Any) -> Any:
            with _disable_current_modes():
                return plain(*args, **kwargs)

        setattr(where, name, apart)


def _watch_numbers() -> None:
    """`torch.tensor` of a list that holds tensors of the card: one wait each."""
    plain = torch.tensor

    def tensor(data: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(data, (list, tuple)):
            data = tree_map(lambda leaf: leaf.tolist() if isinstance(leaf, OnCard) else leaf, data)
        return plain(data, *args, **kwargs)

    torch.tensor = tensor


def _watch_data() -> None:
    """`parameter.data = tensor` changes sides: the object stays, what it is changes."""
    plain: Any = torch._C.TensorBase.data

    def get(self: Any) -> Any:
        return plain.__get__(self)

    def put(self: Any, value: Any) -> None:
        if not isinstance(value, OnCard) and not isinstance(self, OnCard):
            plain.__set__(self, value)
            return
        with torch.no_grad():
            made: Any = value.detach()
        made.requires_grad_(self.requires_grad)
        if isinstance(self, torch.nn.Parameter):
            made = torch.nn.Parameter(made, self.requires_grad)
        kept = {name: held for name, held in self.__dict__.items() if name not in ("inner", "memory", "_is_param")}
        self.__dict__.clear()
        self.__dict__.update({**kept, **made.__dict__})
        self.__class__ = type(made)
        torch._C._swap_tensor_impl(self, made)

    torch.Tensor.data = property(get, put)


def _watch_threads() -> None:
    """A mode is a thread's own: every thread gets one."""
    run_thread = threading.Thread.run

    def watched(self: threading.Thread) -> None:
        with Simulation():
            run_thread(self)

    threading.Thread.run = watched  # type: ignore[method-assign]
