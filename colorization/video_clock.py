"""One clock for a whole film, where timestamps repeat or start again, and the same for what runs beside it.

Files put in a row (`cat a.ts b.ts`), edited recordings and broken ones have times that go back. The film's own packets, in
the order of the file, say where: both reading its frames and copying its sound follow them, so both get the same offsets.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any

from .video_file import Irregularities, VideoFacts, demuxed, open_video, video_stream

BACK = Fraction(1, 4)  # seconds; less is a wrong timestamp, and frames there are shown as soon as may be
AHEAD = 10  # seconds; more is another recording, where the container is one that may leap
PATIENCE = 100  # packets of the film that its sound waits for when it leaps first
STRAGGLING = 25  # of them in which sound of before may still come
REORDERED = 64  # more frames than any codec shows in another order
PROGRAM_STREAM = "mpeg"  # ffmpeg's name for it: DVDs, .mpg, .vob


class FilmClock:
    """Ticks of `facts.time_base` for the packets of `stream`, in the order of the file. regular: the film is known to have no
    breaks. Behind a place that was sought it may look as if there were one, at frames shown before the one that was found."""

    def __init__(self, container: Any, stream: Any, facts: VideoFacts, regular: bool = False) -> None:
        self.time_base = facts.time_base
        self.offset = facts.lead  # ticks
        self.breaks = 0
        self.seen = 0  # packets
        self.broke_at = 0  # how many of them before the last break
        self.latest: int | None = None  # time of a frame
        self._end: int = -sys.maxsize  # where the next one would be
        # Ticks of this clock in one of the stream's; whole, as `read_facts` chose them.
        self._scale = max(1, round(Fraction(stream.time_base or facts.time_base) / facts.time_base))
        self._lead = facts.lead
        self._step = facts.step
        self._last: int | None = None
        self._leaps, self._regular = leaps_ahead(container), regular
        self._back, self._ahead = int(BACK / facts.time_base), int(AHEAD / facts.time_base)

    def correct(self, packet: Any) -> None:
        """Put the times of one packet right."""
        self.seen += 1
        pts, dts = (None if time is None else time * self._scale for time in (packet.pts, packet.dts))
        if dts is not None:
            back = self._last is not None and dts < self._last - self._back
            ahead = self._leaps and self._last is not None and dts > self._last + self._ahead
            if (back or ahead) and not self._regular:
                self.offset = self._end - (dts if pts is None else pts)
                self.breaks += 1
                self.broke_at = self.seen
            self._last = dts
        shown = pts if pts is not None else dts
        if shown is not None:
            self._end = max(self._end, shown + self.offset + self._step)
        if pts is not None:
            packet.pts = pts + self.offset
            if not packet.is_discard:
                self.latest = packet.pts if self.latest is None else max(self.latest, packet.pts)
        packet.dts = None if dts is None else dts + self.offset

    def in_file(self, time: int) -> int:
        """A time of this clock in the stream's own ticks, before any break."""
        return (time - self._lead) // self._scale


def leaps_ahead(container: Any) -> bool:
    """Whether times in such a container may leap and mean nothing by it."""
    import av

    return bool(container.format.flags & av.format.Flags.ts_discont.value)


@dataclass
class _Track:
    """One stream beside the film. shift: seconds that the film's clock adds to its times; end: where the last packet ends
    by the file's own, in the stream's ticks; back, ahead: leaps, in those; waiting: packets that leapt before the film did;
    leapt_at: how many of the film's were seen then."""

    continuous: bool
    back: float
    ahead: float
    shift: Fraction = Fraction(0)
    breaks: int = 0
    end: int | None = None
    waiting: list[Any] = field(default_factory=list)
    leapt_at: int = 0

    def follow(self, clock: FilmClock) -> None:
        self.shift, self.breaks = clock.offset * clock.time_base, clock.breaks


def beside(
    container: Any, film: Any, streams: list[Any], facts: VideoFacts, found: Irregularities
) -> Generator[tuple[Any, Fraction], None, None]:
    """Packets of `streams`, and the seconds to add to their times so that they stay in step with the film's frames."""
    if not streams:
        return
    if container.format.name.startswith("mov,mp4"):
        # Times there are sums of durations and cannot leap, so that the pictures need not be read.
        lead = facts.lead * facts.time_base
        yield from ((packet, lead) for packet in demuxed(container, streams, found))
        return
    clock = FilmClock(container, film, facts)
    leaps = leaps_ahead(container)
    tracks = {
        stream.index: _Track(
            stream.type == "audio",
            float(BACK / stream.time_base),
            float(AHEAD / stream.time_base) if leaps else float("inf"),
            facts.lead * facts.time_base,
        )
        for stream in streams
    }
    for packet in demuxed(container, [film, *streams], found):
        if packet.stream.index == film.index:
            clock.correct(packet)
            for track in tracks.values():
                if track.waiting and (track.breaks < clock.breaks or clock.seen - track.leapt_at > PATIENCE):
                    track.follow(clock)
                    yield from ((held, track.shift) for held in track.waiting)
                    track.waiting.clear()
            continue
        track, time = tracks[packet.stream.index], packet.dts if packet.dts is not None else packet.pts
        if time is None:
            continue
        apart = 0 if track.end is None else time - track.end
        track.end = time + (packet.duration or 0)
        if track.breaks < clock.breaks:
            # Sound of before the break may come a little later than the film's first packet after it.
            late = clock.seen - clock.broke_at <= STRAGGLING
            straggles = late and track.continuous and abs(apart) < track.back / 4
            if not straggles:
                track.follow(clock)
        elif not track.waiting and track.continuous and (apart < -track.back or apart > track.ahead):
            track.leapt_at = clock.seen
            track.waiting.append(packet)
            continue
        if track.waiting:
            track.waiting.append(packet)
        else:
            yield packet, track.shift
    for track in tracks.values():
        yield from ((held, track.shift) for held in track.waiting)


def is_regular(path: Path, facts: VideoFacts) -> bool:
    """Whether every packet of the film has a time of its own and none goes back, so that a place can be sought by time.
    A program stream's small packets have none; they are counted on from others, which are other ones after a seek. An AVI's are
    counted, and counted otherwise after a seek where frames were dropped.

    Reads the file once, without decoding; the answer is remembered.
    """
    stat = path.stat()
    return _regular(path.resolve(), stat.st_size, stat.st_mtime_ns, facts)


@lru_cache(maxsize=64)
def _regular(path: Path, size: int, modified: int, facts: VideoFacts) -> bool:
    found = Irregularities()
    with open_video(path) as container:
        if container.format.name == PROGRAM_STREAM:
            return False
        stream = video_stream(container, path)
        clock = FilmClock(container, stream, facts)
        recent: deque[int] = deque(maxlen=REORDERED)
        counted, last = container.format.name == "avi", None
        with closing(demuxed(container, [stream], found)) as packets:
            for packet in packets:
                dropped = counted and last is not None and packet.dts != last + 1
                last = packet.dts
                clock.correct(packet)
                if clock.breaks or packet.pts is None or packet.pts in recent or dropped:
                    return False
                recent.append(packet.pts)
    return not found.cut_off


def frames_before(path: Path, facts: VideoFacts, time: int) -> int:
    """How many frames of a regular film are shown before `time`, by its packets: without decoding."""
    count = 0
    with open_video(path) as container:
        stream = video_stream(container, path)
        clock = FilmClock(container, stream, facts)
        with closing(demuxed(container, [stream], Irregularities())) as packets:
            for packet in packets:
                clock.correct(packet)
                if packet.dts is not None and packet.dts >= time:
                    break
                count += packet.pts is not None and packet.pts < time and not packet.is_discard
    return count
