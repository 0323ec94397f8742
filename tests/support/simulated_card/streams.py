"""The card's queues, events and memory, and what has to happen before what.

Every stream counts its operations. It knows of other streams how far they were when it last waited for them, and so does the
host; what is within that is before, anything else may be going on (vector clocks; Fidge 1988, Mattern 1988).
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .graphs import Capture

TOTAL = 141 << 30  # bytes an H200 has, about


class Hazard(AssertionError):
    """Something that goes wrong on a card now and then."""


class Stream:
    """A queue of the card. clock: how many operations it was given. seen: how far others are whom it has waited for."""

    def __init__(self, device: Any = None, priority: int = 0, **_: Any) -> None:
        here = card()
        self.device = device_of(device)
        self.device_type, self.device_index, self.priority = 1, self.device.index, priority
        self.stream_id = self.cuda_stream = here.new_number()
        self.clock = 0
        self.seen: dict[Stream, int] = {}
        self.copies_out: list[tuple[int, Callable[[], None]]] = []
        here.streams.add(self)

    def __hash__(self) -> int:
        return self.stream_id

    def __eq__(self, other: object) -> bool:
        return self is other

    def __repr__(self) -> str:
        return f"stream {self.stream_id} of {self.device}"

    def tick(self) -> int:
        self.clock += 1
        return self.clock

    def is_after(self, other: Stream, clock: int) -> bool:
        return other is self or max(self.seen.get(other, 0), card().host.get(other, 0)) >= clock

    def learn(self, other: Stream, clock: int, seen: Mapping[Stream, int]) -> None:
        for stream, its in (*seen.items(), (other, clock)):
            if stream is not self:
                self.seen[stream] = max(self.seen.get(stream, 0), its)

    def wait_stream(self, other: Stream) -> None:
        self.learn(other, other.clock, other.seen)

    def wait_event(self, event: Event) -> None:
        if event.at is not None:
            self.learn(*event.at)

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def query(self) -> bool:
        return card().host.get(self, 0) >= self.clock

    def synchronize(self) -> None:
        card().wait(f"synchronize() of {self}")
        card().host_waits_for(self, self.clock, self.seen)

    def __enter__(self) -> Stream:
        self._use = on_stream(self)
        self._use.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._use.__exit__(*error)


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
        """Not in `card.waits`: others go on meanwhile, and torch does not count it either."""
        if self.at is not None:
            if card().captures_here():
                raise cuda_error("operation not permitted when stream is capturing")
            card().host_waits_for(*self.at)

    def elapsed_time(self, end: Event) -> float:
        """As if every operation took a microsecond, in ms."""
        if not (self.timed and end.timed):
            raise ValueError("Both events must be created with argument 'enable_timing=True'.")
        if self.at is None or end.at is None:
            raise ValueError("Both events must be recorded before calculating elapsed time.")
        return (end._when - self._when + 1) / 1000


class Memory:
    """One allocation on the card: where it is from, who wrote it last, and who has read it since.

    pool: the graph's whose recording allocated it, which nobody else is given.
    """

    def __init__(self, size: int, home: Stream, pool: Any = None) -> None:
        self.size, self.home, self.pool = size, home, pool
        self.written: tuple[Stream, int] | None = None
        self.read: dict[Stream, int] = {}
        self.recorded: set[Stream] = set()
        card().allocated(size)

    def __del__(self) -> None:
        if _card is not None:
            _card.freed(self)

    def reads(self, stream: Stream, clock: int) -> None:
        self.read[stream] = clock

    def writes(self, stream: Stream, clock: int) -> None:
        self.written = (stream, clock)
        self.read.clear()

    def check_read(self, stream: Stream) -> None:
        if self.written is not None and not stream.is_after(*self.written):
            raise Hazard(f"{stream} uses what {self.written[0]} may still write: no event is between them")

    def check_write(self, stream: Stream) -> None:
        self.check_read(stream)
        for reader, clock in self.read.items():
            if not stream.is_after(reader, clock):
                raise Hazard(f"{stream} writes what {reader} may still read: no event is between them")

    def used_by_others(self) -> Stream | None:
        """Who may use it when its own stream's next allocation takes its place."""
        for stream, clock in (*self.read.items(), *([self.written] if self.written else [])):
            if not self.home.is_after(stream, clock) and stream not in self.recorded:
                return stream
        return None


class Card:
    """waits: why the host waited, each time. launches: operators and kernels by name. held, peak: bytes."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.waits: list[str] = []
        self.hazards: list[str] = []
        self.launches: Counter[str] = Counter()
        self.compiled: list[Any] = []
        self.held = self.peak = 0
        self.operations = self.graphs = self.replays = 0
        self.capture: Capture | None = None
        self.captures_into: Any = None  # the pool that the allocator takes from while a capture is under way
        self.broken = False
        self.debug = 0
        self.host: dict[Stream, int] = {}  # how far streams are whom the host has waited for
        self.streams: weakref.WeakSet[Stream] = weakref.WeakSet()
        self.pinned: dict[int, torch.UntypedStorage] = {}  # kept, as torch keeps pinned blocks
        self.registered: dict[int, int] = {}  # bytes of memory of others that the card may read, by where it begins
        self._thread = threading.local()
        self._defaults: dict[int, Stream] = {}
        self._numbers = iter(range(1, 1 << 60))
        self._lock = threading.RLock()

    def new_number(self) -> int:
        return next(self._numbers)

    def default(self, device: torch.device) -> Stream:
        if device.index not in self._defaults:
            self._defaults[device.index] = Stream(device)
        return self._defaults[device.index]

    @property
    def index(self) -> int:
        return getattr(self._thread, "index", 0)

    @index.setter
    def index(self, value: int) -> None:
        self._thread.index = value

    @property
    def stream(self) -> Stream:
        return self.stream_of(torch.device("cuda", self.index))

    def stream_of(self, device: torch.device) -> Stream:
        """The one this thread uses there."""
        own: Stream | None = self.own_streams.get(device.index)
        return own or self.default(device)

    @property
    def own_streams(self) -> dict[int, Stream]:
        if not hasattr(self._thread, "streams"):
            self._thread.streams = {}
        streams: dict[int, Stream] = self._thread.streams
        return streams

    def allocated(self, size: int) -> None:
        with self._lock:
            self.held += size
            self.peak = max(self.peak, self.held)

    def freed(self, memory: Memory) -> None:
        with self._lock:
            self.held -= memory.size
        user = None if memory.pool is not None else memory.used_by_others()
        if user is not None:
            self.hazards.append(f"memory of {memory.home} was freed while {user} may use it, without record_stream")

    def captures_here(self) -> bool:
        """Whether this thread is recording."""
        return self.capture is not None and self.capture.thread == threading.get_ident()

    def capture_on(self, stream: Stream) -> Capture | None:
        return self.capture if self.capture is not None and self.capture.stream is stream else None

    def wait(self, why: str) -> None:
        """The host waits for the device."""
        if self.captures_here():
            self.broken = True
            raise cuda_error(f"operation not permitted when stream is capturing ({why})")
        self.waits.append(why)
        if self.debug == 1:
            warnings.warn(f"called a synchronizing CUDA operation ({why})", stacklevel=3)
        if self.debug == 2:
            raise RuntimeError(f"called a synchronizing CUDA operation ({why})")

    def host_waits_for(self, stream: Stream, clock: int, seen: Mapping[Stream, int]) -> None:
        for one, its in (*seen.items(), (stream, clock)):
            self.host[one] = max(self.host.get(one, 0), its)
            due = [copy for copy in one.copies_out if copy[0] <= its]
            one.copies_out = [copy for copy in one.copies_out if copy[0] > its]
            for _, happen in due:
                happen()

    def host_waits_for_all(self) -> None:
        for stream in list(self.streams):
            self.host_waits_for(stream, stream.clock, stream.seen)


_card: Card | None = None


def card() -> Card:
    assert _card is not None, "call install() first"
    return _card


def make_card(count: int) -> Card:
    global _card
    _card = Card(count)
    return _card


def is_made() -> bool:
    return _card is not None


def device_of(device: Any = None) -> torch.device:
    """What torch.cuda makes of it: None is the current one."""
    if device is None:
        return torch.device("cuda", card().index)
    device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    if device.type != "cuda":
        raise ValueError(f"Expected a cuda device, but got: {device}")
    index = card().index if device.index is None else device.index
    if not 0 <= index < card().count:
        raise cuda_error("invalid device ordinal")
    return torch.device("cuda", index)


def cuda_error(text: str) -> RuntimeError:
    made: RuntimeError = torch.AcceleratorError(f"CUDA error: {text}")
    return made


class on_stream:  # stands for torch.cuda.stream
    """Left behind by whoever does not leave it, as torch's is."""

    def __init__(self, stream: Stream | None) -> None:
        self.stream = stream

    def __enter__(self) -> None:
        if self.stream is not None:
            here, place = card(), self.stream.device.index
            self._before = here.index, here.own_streams.get(place)
            here.own_streams[place] = self.stream
            here.index = place

    def __exit__(self, *_: Any) -> None:
        if self.stream is not None:
            here, place = card(), self.stream.device.index
            here.index, own = self._before
            here.own_streams.pop(place, None)
            if own is not None:
                here.own_streams[place] = own


class on_device:  # stands for torch.cuda.device
    def __init__(self, device: Any) -> None:
        self.index = card().index if device is None or device == -1 else device_of(device).index

    def __enter__(self) -> None:
        self.before, card().index = card().index, self.index

    def __exit__(self, *_: Any) -> None:
        card().index = self.before
