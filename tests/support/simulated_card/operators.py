"""Tensors on the card, and every operator on them: done by the CPU, with what a card would check."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from .arguments import leaves, mapped
from .graphs import Capture, below, spoil
from .streams import Hazard, Memory, Stream, card, cuda_error, device_of, is_made

aten = torch.ops.aten
ATTENTION = aten.scaled_dot_product_attention.default
COPIES = {aten._to_copy.default, aten.copy_.default, aten._foreach_copy_.default, aten.set_.source_Tensor}
INDEXING = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}
# Their result's size, or the result itself, is a number for the host.
WAITING = {
    aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.equal.default,
    aten.is_nonzero.default, aten._unique2.default, aten.unique_dim.default, aten.unique_consecutive.default,
    aten.repeat_interleave.Tensor, aten.argwhere.default,
}  # fmt: skip

implementations: dict[str, Callable[..., Any]] = {}  # of the pack's own operators, by name
_on_the_way_in: dict[int, tuple[Stream, int]] = {}  # pinned memory that a copy is on its way to
_on_the_way_out: dict[int, list[tuple[Stream, int]]] = {}  # and from


class OnCard(torch.Tensor):
    """A tensor on the card. inner: the CPU tensor with its numbers, of the same sizes and strides."""

    inner: torch.Tensor
    memory: Memory

    @staticmethod
    def __new__(cls, inner: torch.Tensor, device: torch.device, memory: Memory) -> OnCard:
        made: OnCard = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            layout=inner.layout, device=device, requires_grad=False,
        )  # fmt: skip
        made.inner, made.memory = inner, memory
        return made

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"OnCard({self.inner!r}, device={self.device})"

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.inner.untyped_storage()

    def numpy(self, *_: Any, **__: Any) -> Any:  # type: ignore[override]
        raise TypeError(f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() first.")

    def __array__(self, *_: Any) -> Any:  # type: ignore[override]
        return self.numpy()

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def record_stream(self, stream: Any) -> None:
        self.memory.recorded.add(stream)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        with torch.no_grad():
            copied: Any = self.detach().clone()
        if isinstance(self, torch.nn.Parameter):
            copied = torch.nn.Parameter(copied, self.requires_grad)
        memo[id(self)] = copied
        return copied

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


class Simulation(TorchDispatchMode):
    """Catches what makes tensors on the card, and what the host does meanwhile. A thread's own."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def inner_of(value: Any) -> Any:
    return value.inner if isinstance(value, OnCard) else value


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """One operator."""
    assert is_made()
    name = func._schema.name.split("::")
    flat = leaves((args, kwargs))
    given = [leaf for leaf in flat if isinstance(leaf, OnCard)]
    if name[1] == "is_pinned":
        return not given and _is_pinned(args[0])
    if name[1] in ("_pin_memory", "pin_memory"):
        with below():
            return _pinned(args[0].clone())
    if name[1] == "record_stream":
        return None
    target = next((leaf for leaf in flat if isinstance(leaf, torch.device)), None)
    if not given and (target is None or target.type != "cuda"):
        return _on_host(func, args, kwargs, flat)
    if name[0] == "hotpath":
        with Simulation():  # in them, too, tensors are made on the card
            return implementations[func._schema.name](*args, **kwargs)
    if func is not ATTENTION and _is_composite(func):
        with Simulation():  # in inference mode these come whole
            return func.decompose(*args, **kwargs)
    return _on_card(func, args, kwargs, flat, given, target)


@functools.cache
def _is_composite(func: Any) -> bool:
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"))


# The host


def _on_host(func: Any, args: Any, kwargs: dict[str, Any], flat: Sequence[Any]) -> Any:
    _check_host(func, flat)
    with below():
        if kwargs.get("pin_memory"):
            return _pinned(func(*args, **{**kwargs, "pin_memory": False}))
        return func(*args, **kwargs)


def _pinned(tensor: torch.Tensor) -> torch.Tensor:
    storage = tensor.untyped_storage()
    card().pinned[storage._cdata] = storage
    return tensor


def _is_pinned(tensor: torch.Tensor) -> bool:
    if tensor.layout is not torch.strided:
        return False
    storage = tensor.untyped_storage()
    return storage._cdata in card().pinned or card().registered.get(storage.data_ptr(), 0) >= storage.nbytes() > 0


def _check_host(func: Any, flat: Sequence[Any]) -> None:
    """Memory that a copy is on its way to may not be used, and what is copied from may not be changed."""
    if not (_on_the_way_in or _on_the_way_out) or func.is_view or func is aten.detach.default:
        return
    arguments = func._schema.arguments
    for place, leaf in enumerate(flat):
        if not isinstance(leaf, torch.Tensor) or not _is_pinned(leaf):
            continue
        at = leaf.untyped_storage()._cdata
        coming = _on_the_way_in.get(at)
        if coming is not None and card().host.get(coming[0], 0) < coming[1]:
            raise Hazard(f"the host uses memory that {coming[0]} may still copy to: nobody waited for it")
        alias = arguments[place].alias_info if place < len(arguments) else None
        if alias is not None and alias.is_write:
            for stream, clock in _on_the_way_out.pop(at, []):
                if card().host.get(stream, 0) < clock:
                    raise Hazard(f"the host changes memory that {stream} may still copy from")


# The card


def _on_card(
    func: Any,
    args: Any,
    kwargs: dict[str, Any],
    flat: Sequence[Any],
    given: Sequence[OnCard],
    target: torch.device | None,
) -> Any:
    name = func._schema.name
    here = card()
    hosts = [leaf for leaf in flat if isinstance(leaf, torch.Tensor) and not isinstance(leaf, OnCard)]
    if func in COPIES and (hosts or target is not None):
        return _copy(func, args, kwargs, given, target)
    places = sorted({str(tensor.device) for tensor in given})
    if given and any(tensor.dim() > 0 for tensor in hosts):
        if func in INDEXING and isinstance(args[0], OnCard):
            here.wait(f"{name} with indices on the CPU")
        else:
            places.append("cpu")
    if len(places) > 1 and func not in COPIES:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, {' and '.join(places)}! ({name})"
        )
    if func in WAITING or (func in INDEXING and any(_is_mask(index) for index in args[1])):
        here.wait(name)
    if kwargs.get("pin_memory"):
        raise RuntimeError("Only dense CPU tensors can be pinned")
    if kwargs.get("generator") is not None and here.captures_here():
        raise cuda_error("a generator that is not registered with the graph is used while recording")
    device = given[0].device if target is None else device_of(target) if target.type == "cuda" else None
    if "device" in kwargs:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    return execute(func, args, kwargs, given, device, here.stream if device is None else here.stream_of(device))


def _is_mask(index: Any) -> bool:
    return isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8)


def execute(
    func: Any, args: Any, kwargs: Any, given: Sequence[OnCard], device: torch.device | None, stream: Stream
) -> Any:
    """Run `func` on `stream`; tensors in its result are on `device`, or the host's where that is None."""
    capture = card().capture_on(stream)
    view = func.is_view or func is aten.detach.default
    written = [] if view else _written(func, args, kwargs)
    function = _attend if func is ATTENTION else func
    out = _perform(function, args, kwargs, given, written, written, None if view else stream)
    clock = None if view else _count(func._schema.name, stream, given, written)
    known = {tensor.inner.untyped_storage()._cdata: tensor.memory for tensor in given if _has_storage(tensor.inner)}
    same = {id(tensor.inner): tensor for tensor in given}

    def wrap(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or device is None:
            return value
        if id(value) in same:
            return same[id(value)]
        if view and torch.is_inference_mode_enabled() and not given[0].is_inference():
            with torch.inference_mode(False):  # a view is of the kind its base is
                return wrapped(value, device, stream, known, capture, clock)
        return wrapped(value, device, stream, known, capture, clock)

    return mapped(wrap, out)


def _has_storage(tensor: torch.Tensor) -> bool:
    return tensor.layout is torch.strided


def _count(name: str, stream: Stream, given: Sequence[OnCard], written: Sequence[OnCard]) -> int:
    here = card()
    clock = stream.tick()
    here.operations += 1
    here.launches[name] += 1
    for tensor in given:
        tensor.memory.reads(stream, clock)
    for tensor in written:
        tensor.memory.writes(stream, clock)
    return clock


def _perform(
    function: Callable[..., Any],
    args: Any,
    kwargs: Any,
    given: Sequence[OnCard],
    written: Sequence[OnCard],
    may_write: Sequence[OnCard],
    stream: Stream | None,
) -> Any:
    """`function` of the CPU tensors: in its turn on `stream`, or at any time where that is None, and recorded if somebody does.

    may_write: what a recording has to put back.
    """
    capture = card().capture_on(stream or card().stream)
    if stream is not None:
        for tensor in given:
            tensor.memory.check_read(stream)
        for tensor in written:
            tensor.memory.check_write(stream)
        for tensor in may_write if capture is not None else ():
            capture.will_write(tensor)
    inner_args, inner_kwargs = mapped(inner_of, (args, kwargs))
    with below():
        out = function(*inner_args, **inner_kwargs)
    if capture is not None:
        capture.note(function, inner_args, inner_kwargs, given, out)
    return out


def _attend(*args: Any, **kwargs: Any) -> torch.Tensor:
    """Which kernels are allowed was said for the card."""
    with sdpa_kernel([SDPBackend.MATH]):
        made: torch.Tensor = torch.ops.aten.scaled_dot_product_attention(*args, **kwargs)
        return made


def wrapped(
    value: torch.Tensor,
    device: torch.device,
    stream: Stream,
    known: dict[int, Memory],
    capture: Capture | None,
    clock: int | None,
) -> OnCard:
    """known: the memories it may be in, by storage. clock: when it was written; None for a view."""
    storage = value.untyped_storage()
    memory = known.get(storage._cdata)
    if memory is None:
        memory = known[storage._cdata] = Memory(storage.nbytes(), stream, capture.pool if capture else None)
        if capture is not None:
            capture.allocated(storage, memory)
        if clock is not None:
            memory.writes(stream, clock)
    return OnCard(value, device, memory)


def _written(func: Any, args: Any, kwargs: Any) -> list[OnCard]:
    found: list[OnCard] = []
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            found += [leaf for leaf in leaves(value) if isinstance(leaf, OnCard)]
    return found


def launched(name: str, kernel: Callable[..., Any], args: Any, kwargs: Any) -> None:
    """A Triton kernel, whose arguments on the card have become CPU tensors when it runs. Which it writes is not known."""
    given = [leaf for leaf in leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    on_card = [tensor for tensor in given if isinstance(tensor, OnCard)]
    if on_card and len(on_card) < len(given):
        raise ValueError("Pointer argument cannot be accessed from Triton (cpu tensor?)")
    stream = card().stream
    _perform(kernel, args, kwargs, on_card, [], on_card, stream)
    _count(f"triton::{name}", stream, on_card, [])


# Between them


def _copy(func: Any, args: Any, kwargs: dict[str, Any], given: Sequence[OnCard], target: torch.device | None) -> Any:
    later = bool(kwargs.get("non_blocking", False))
    if func is aten._foreach_copy_.default:
        for one, other in zip(args[0], args[1], strict=True):
            run(aten.copy_.default, (one, other), {"non_blocking": later})
        return args[0]
    if func is aten.copy_.default:
        to, source = args[0], args[1]
        later = bool(args[2]) if len(args) > 2 else later
        if isinstance(to, OnCard) and isinstance(source, OnCard):
            return _between_cards(func, args, kwargs, given, to.device)
        if isinstance(to, OnCard):
            _to_card(source, to, later)
        else:
            _to_host(source, to, later, fresh=False)
        return to
    if func is not aten._to_copy.default:
        raise NotImplementedError(f"{func} between the host and the card is not simulated")
    (source,) = args
    plain = {key: kwargs[key] for key in ("dtype", "memory_format") if kwargs.get(key) is not None}
    to_card = target is not None and target.type == "cuda"
    if isinstance(source, OnCard) and (to_card or target is None):
        device = source.device if target is None else device_of(target)
        return _between_cards(func, args, {**plain, "device": torch.device("cpu")}, given, device)
    with below():
        made = inner_of(source).to(copy=True, **plain)
    if isinstance(source, OnCard):
        # torch pins the result of a copy that does not wait.
        _to_host(source, _pinned(made) if later else made, later, fresh=True)
        return made
    device = device_of(target)
    stream = card().stream_of(device)
    placed = wrapped(made, device, stream, {}, card().capture_on(stream), None)
    _to_card(source, placed, later)
    return placed


def _between_cards(func: Any, args: Any, kwargs: Any, given: Sequence[OnCard], device: torch.device) -> Any:
    stream = card().stream_of(device)
    for tensor in given:
        if tensor.device != device:  # the streams of both wait for each other
            other = card().stream_of(tensor.device)
            stream.wait_stream(other)
            other.wait_stream(stream)
    return execute(func, args, kwargs, given, device, stream)


def _to_card(source: torch.Tensor, to: OnCard, later: bool) -> None:
    here = card()
    stream = here.stream_of(to.device)
    capture = here.capture_on(stream)
    _check_host(aten.add.Tensor, [source])
    to.memory.check_write(stream)
    if capture is not None:
        if not _is_pinned(source):
            here.broken = True
            raise cuda_error("operation not permitted when stream is capturing (copy from pageable memory)")
        capture.will_write(to)
    with below():
        to.inner.copy_(source)
    if capture is not None:
        capture.note(aten.copy_.default, (to.inner, source), {}, [to], to.inner)
    clock = _count("copy to the card", stream, [], [to])
    if later and _is_pinned(source):
        _on_the_way_out.setdefault(source.untyped_storage()._cdata, []).append((stream, clock))
    elif not later:
        here.wait("copy to the card")
        here.host_waits_for(stream, clock, stream.seen)


def _to_host(source: OnCard, to: torch.Tensor, later: bool, fresh: bool) -> None:
    """A copy that does not wait leaves nonsense until somebody waits for it. fresh: nobody had `to` before."""
    here = card()
    stream = here.stream_of(source.device)
    source.memory.check_read(stream)
    if not fresh:
        _check_host(aten.copy_.default, [to])
    clock = _count("copy to the host", stream, [source], [])
    if not later or not _is_pinned(to):
        here.wait("copy to the host")
        here.host_waits_for(stream, clock, stream.seen)
        with below():
            to.copy_(source.inner)
        return
    if here.capture_on(stream) is not None:
        raise NotImplementedError("copies to the host within a graph are not simulated")
    at = to.untyped_storage()._cdata
    with below():
        numbers = source.inner.clone()
        spoil(to)

    def happen() -> None:
        with below(), torch.inference_mode():  # whichever mode the waiting thread is in
            to.copy_(numbers)
        if _on_the_way_in.get(at) == (stream, clock):
            del _on_the_way_in[at]

    stream.copies_out.append((clock, happen))
    _on_the_way_in[at] = (stream, clock)
