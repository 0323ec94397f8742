"""The frames of a video file in portions, as RGB with their times. Only what is asked for is decoded or held."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..host.frame_pixels import rgb_of
from .video_clock import FilmClock, is_regular
from .video_file import Irregularities, VideoFacts, decoded, open_video, video_stream
from .video_hdr import to_sdr

LIMITED = 1  # ffmpeg's number of the range 16..235


@dataclass(frozen=True)
class FramePortion:
    """frames: [T, H, W, 3] uint8; times: of each frame in ticks of the film's clock, each after the one before."""

    frames: Tensor
    times: list[int]


def read_portions(
    path: Path,
    facts: VideoFacts,
    size: int,
    start: int | None = None,
    found: Irregularities | None = None,
    stop: int | None = None,
) -> Generator[FramePortion, None, None]:
    """`size` frames at a time, the first portion with one more; from the first frame at or after time `start` on, and those
    before time `stop`.

    found: gets what was wrong with the file.
    """
    found = Irregularities() if found is None else found
    frames: list[Tensor] = []
    times: list[int] = []
    target = size + (start is None)
    with closing(timed_frames(path, facts, start, found)) as arriving:
        for time, frame in arriving:
            if stop is not None and time >= stop:
                break
            frames.append(to_rgb(frame, facts, found))
            times.append(time)
            if len(frames) == target:
                yield FramePortion(torch.stack(frames), times)
                frames, times, target = [], [], size
    if frames:
        yield FramePortion(torch.stack(frames), times)


def timed_frames(
    path: Path, facts: VideoFacts, start: int | None = None, found: Irregularities | None = None
) -> Generator[tuple[int, Any], None, None]:
    """Decoded frames with their times, from the first one at or after `start` on."""
    found = Irregularities() if found is None else found
    last, reached = yield from _run(path, facts, start, found, "AUTO")
    if reached is not None and (last is None or reached > last):
        # A decoder on several threads that meets a damaged packet among the last ones keeps what comes behind it.
        later = [time for time in (start, None if last is None else last + 1) if time is not None]
        yield from _run(path, facts, max(later, default=None), Irregularities(), "SLICE")


def _run(path: Path, facts: VideoFacts, start: int | None, found: Irregularities, threads: str) -> Any:
    """As `timed_frames`. Returns the last time that there was, and the last one of a packet."""
    with ExitStack() as open_files:

        def begun(regular: bool = False) -> tuple[Any, Any, FilmClock]:
            container = open_files.enter_context(open_video(path))
            stream = video_stream(container, path)
            stream.thread_type = threads
            return container, stream, FilmClock(container, stream, facts, regular)

        def frames_of(container: Any, stream: Any, clock: FilmClock) -> Any:
            return open_files.enter_context(closing(decoded(container, stream, found, clock)))

        # Times that are put right depend on all that comes before, which is then decoded and left out.
        regular = start is not None and is_regular(path, facts)
        container, stream, clock = begun(regular)
        frames = None
        if start is not None and regular:
            frames = _sought(container, stream, clock, start, frames_of)
            if frames is None:  # Transport streams may seek too far.
                container, stream, clock = begun()
        if frames is None:
            frames = frames_of(container, stream, clock)
        last: int | None = None
        following = 0
        for frame in frames:
            time = frame.pts
            if facts.delay is not None and last is not None:  # both clocks agree on the first frame
                time = None if frame.dts is None else frame.dts - facts.delay
            # Some containers leave frames without a time; they follow one another at the average rate.
            time = following if time is None else time
            if last is not None and time <= last:
                time = last + 1
                found.lifted += 1
            last, following = time, time + facts.step
            if start is None or time >= start:
                yield time, frame
        found.breaks = max(found.breaks, clock.breaks)
        return last, clock.latest


def _sought(container: Any, stream: Any, clock: FilmClock, start: int, frames_of: Any) -> Iterator[Any] | None:
    """Frames from a place at or before `start` on; None where that cannot be found without decoding all."""
    try:
        container.seek(clock.in_file(start), stream=stream, backward=True)
        frames = frames_of(container, stream, clock)
        first = next(frames)
    except (StopIteration, OSError, ValueError):
        return None
    return chain([first], frames) if first.pts is not None and first.pts <= start else None


def to_rgb(frame: Any, facts: VideoFacts, found: Irregularities) -> Tensor:
    """A decoded frame as it is shown, [H, W, 3] uint8."""
    height, width = facts.coded_size
    if (frame.height, frame.width) != (height, width):
        found.scaled += 1
    if frame.format.name.startswith("gray") and frame.format.components[0].bits <= 16:
        frame = _plain_grey(frame)
    picture = rgb_of(frame, width, height, facts.matrix, deep=facts.hdr)
    if facts.hdr:
        picture = to_sdr(picture, facts.transfer)
    if facts.mirrored:
        picture = picture[:, ::-1]
    return torch.from_numpy(np.ascontiguousarray(np.rot90(picture, facts.rotation)))


def _plain_grey(frame: Any) -> Any:
    """A grey frame with the levels 0..255, 8 bits. swscale takes every grey picture for one of full range, or, where it is
    older, every deep one for one of limited range."""
    import av

    plane, bits = frame.planes[0], frame.format.components[0].bits
    kind = np.dtype("u1" if bits <= 8 else ">u2" if frame.format.name.endswith("be") else "<u2")
    rows = np.frombuffer(plane, kind).reshape(frame.height, plane.line_size // kind.itemsize)[:, : frame.width]
    levels = _levels(bits, int(frame.color_range) == LIMITED)
    return av.VideoFrame.from_ndarray(levels[np.minimum(rows, len(levels) - 1)], format="gray")


@lru_cache(maxsize=8)
def _levels(bits: int, limited: bool) -> np.ndarray[Any, Any]:
    """[2**bits] the level in 0..255 of each."""
    values = np.arange(1 << bits)
    shown = (values / (1 << (bits - 8)) - 16) / 219 if limited else values / (len(values) - 1)
    return np.clip(np.round(255 * shown), 0, 255).astype(np.uint8)
