"""Video files through PyAV: frames in portions, parts of a film on disk, and their assembly with the sound.

Only what is asked for is decoded or held; times stay exact in the stream's own time base, constant frame rate or not.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

STRAYING = Fraction(2, 1000)  # seconds by which a container may round a frame's time

ITU601, ITU709 = 5, 1  # ffmpeg's numbers for the colour matrices; 2 is "not said"
HD_ROWS = 720  # from here on an untagged video is taken for ITU-R 709, as players do


class VideoError(ValueError):
    """A video file cannot be read or written; the message names it and says why."""


@dataclass(frozen=True)
class VideoFacts:
    """height and width as shown; frames: how many, exact or estimated, 0 when unknown; rate: average per second;
    matrix: ffmpeg's number of its colour matrix; rotation: quarter turns to the left that show it upright; pixel_aspect:
    width of a pixel over its height, 0 when unknown."""

    height: int
    width: int
    frames: int
    rate: Fraction
    time_base: Fraction
    matrix: int
    rotation: int
    pixel_aspect: Fraction = Fraction(0)


@dataclass(frozen=True)
class FramePortion:
    """frames: [T, H, W, 3] uint8; times: of each frame in the stream's time base."""

    frames: Tensor
    times: list[int]


def read_facts(path: Path) -> VideoFacts:
    with _open(path) as container:
        stream = _video_stream(container, path)
        try:
            frame = next(container.decode(stream))
        except (StopIteration, OSError, ValueError) as error:
            raise VideoError(f"{path.name} has no frame that can be decoded ({type(error).__name__}).") from error
        rate = Fraction(stream.average_rate or stream.guessed_rate or 25)
        frames = stream.frames or 0
        if not frames and stream.duration and stream.time_base:
            frames = round(float(stream.duration * stream.time_base * rate))
        elif not frames and container.duration:
            frames = round(container.duration / 1e6 * float(rate))
        said = int(frame.colorspace)
        matrix = said if said in (ITU601, ITU709, 6) else (ITU709 if frame.height >= HD_ROWS else ITU601)
        turns = round(getattr(frame, "rotation", 0) / 90) % 4
        height, width, aspect = frame.height, frame.width, Fraction(stream.sample_aspect_ratio or 0)
        if turns % 2:
            height, width, aspect = width, height, 1 / aspect if aspect else aspect
        return VideoFacts(height, width, frames, rate, Fraction(stream.time_base or 1 / rate), matrix, turns, aspect)


def read_portions(path: Path, facts: VideoFacts, size: int, start: int | None = None) -> Iterator[FramePortion]:
    """`size` frames at a time, the first portion with one more; from the first frame at or after time `start` on."""
    frames: list[Tensor] = []
    times: list[int] = []
    target = size + (start is None)
    for time, frame in _timed_frames(path, facts, start):
        frames.append(_to_rgb(frame, facts))
        times.append(time)
        if len(frames) == target:
            yield FramePortion(torch.stack(frames), times)
            frames, times, target = [], [], size
    if frames:
        yield FramePortion(torch.stack(frames), times)


def _timed_frames(path: Path, facts: VideoFacts, start: int | None) -> Iterator[tuple[int, Any]]:
    """Decoded frames with their times, from the first one at or after `start` on."""
    with ExitStack() as open_files:
        container = open_files.enter_context(_open(path))
        decoded = None if start is None else _sought(container, _video_stream(container, path), start)
        if decoded is None:
            # Transport streams may seek too far, and raw ones not at all: what comes before is decoded and left out.
            container = open_files.enter_context(_open(path)) if start is not None else container
            stream = _video_stream(container, path)
            stream.thread_type = "AUTO"
            decoded = container.decode(stream)
        step = max(1, round(1 / facts.rate / facts.time_base))
        following = 0
        for frame in decoded:
            # Some containers leave frames without a time; they follow one another at the average rate.
            time = frame.pts if frame.pts is not None else following
            following = time + step
            if start is None or time >= start:
                yield time, frame


def _sought(container: Any, stream: Any, start: int) -> Iterator[Any] | None:
    """Frames from a place at or before `start` on; None where that cannot be found without decoding all."""
    stream.thread_type = "AUTO"
    try:
        container.seek(start, stream=stream, backward=True)
        frames = container.decode(stream)
        first = next(frames)
    except (StopIteration, OSError, ValueError):
        return None
    return chain([first], frames) if first.pts is not None and first.pts <= start else None


def _to_rgb(frame: Any, facts: VideoFacts) -> Tensor:
    picture = frame.to_ndarray(format="rgb24", src_colorspace=facts.matrix)
    return torch.from_numpy(np.ascontiguousarray(np.rot90(picture, facts.rotation)))


class PartWriter:
    """One part of the coloured film: a NUT file, which keeps absolute times of any time base."""

    def __init__(self, path: Path, facts: VideoFacts, codec: str, quality: int) -> None:
        import av

        self._facts = facts
        self._container = av.open(str(path), "w", format="nut")
        # Without reordered frames, packets of several parts can be put in a row with no times to invent.
        options = {"crf": str(quality), "bf": "0"}
        stream: Any = self._container.add_stream(codec, rate=facts.rate, options=options)
        stream.height, stream.width = facts.height, facts.width
        even = facts.height % 2 == 0 and facts.width % 2 == 0
        stream.pix_fmt = "yuv420p" if even else "yuv444p"
        stream.codec_context.time_base = facts.time_base
        stream.codec_context.colorspace = facts.matrix
        stream.codec_context.color_range = 1
        if facts.pixel_aspect:
            stream.codec_context.sample_aspect_ratio = facts.pixel_aspect
        self._stream = stream

    def write(self, pictures: Tensor, times: Sequence[int]) -> None:
        """pictures: [T, H, W, 3] uint8."""
        import av

        for picture, time in zip(pictures, times, strict=True):
            frame = av.VideoFrame.from_ndarray(picture.numpy(), format="rgb24")
            frame = frame.reformat(format=self._stream.pix_fmt, dst_colorspace=self._facts.matrix)
            frame.pts, frame.time_base = time, self._facts.time_base
            self._container.mux(self._stream.encode(frame))

    def close(self) -> None:
        try:
            self._container.mux(self._stream.encode())
        finally:
            self._container.close()


def check_container(source: Path, output: Path, folder: Path, facts: VideoFacts, codec: str, quality: int) -> None:
    """Put a film of three grey frames together as `output` will be, in `folder`, and read it: whether its container holds
    such pictures and keeps their times is better known before the film is coloured.

    Raises VideoError when it does not.
    """
    part, made = folder / "trial.nut", folder / f"trial{output.suffix}"
    step = max(1, round(1 / facts.rate / facts.time_base))
    times = [0, step, 3 * step]
    try:
        writer = PartWriter(part, facts, codec, quality)
        writer.write(torch.full((3, facts.height, facts.width, 3), 128, dtype=torch.uint8), times)
        writer.close()
        assemble([part], source, made, complete=False)
        found = read_facts(made)
        kept = [time * found.time_base for time, _ in _timed_frames(made, found, None)]
        wanted = [time * facts.time_base for time in times]
        whole = len(kept) == 3 and (found.height, found.width) == (facts.height, facts.width)
        if not whole or any(abs(a - kept[0] - b) > STRAYING for a, b in zip(kept, wanted, strict=True)):
            raise VideoError("frames or their times were lost in a trial")
    except (VideoError, OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        ending = f"A {output.suffix} file" if output.suffix else "A file without an ending"
        raise VideoError(
            f"{ending} cannot hold this film as {codec} ({error}). Choose another ending, such as .mp4 or .mkv."
        ) from error
    finally:
        part.unlink(missing_ok=True)
        made.unlink(missing_ok=True)


def assemble(parts: Sequence[Path], source: Path, output: Path, complete: bool = True) -> list[str]:
    """Put the parts' packets in a row, with the source's sound beside them as it is; of a film that is not complete,
    as much sound as there are pictures.

    A file called `output` stays whole until the new one is. Returns a sentence for every sound track that its container
    cannot hold.
    """
    import av

    unfinished = output.with_name(f"{output.stem}.unfinished{output.suffix}")
    try:
        with av.open(str(unfinished), "w") as target, _open(source) as original, _open(parts[0]) as first:
            video = target.add_stream_from_template(_video_stream(first, parts[0]))
            sounds = {stream.index: _same_sound(target, stream) for stream in original.streams.audio}
            lost = [
                f"{output.suffix} cannot hold the film's {original.streams[index].codec_context.name} sound, which is left "
                "out; choose another ending, such as .mkv."
                for index, stream in sounds.items()
                if stream is None
            ]
            sounds = {index: stream for index, stream in sounds.items() if stream is not None}
            heard = original.demux([original.streams[index] for index in sounds]) if sounds else iter(())
            waiting: Any = next(heard, None)
            for packet in _packets(parts):
                now = packet.pts * packet.time_base
                while waiting is not None and (waiting.dts is None or waiting.dts * waiting.time_base <= now):
                    _mux(target, waiting, sounds)
                    waiting = next(heard, None)
                packet.stream = video
                target.mux(packet)
            while complete and waiting is not None:
                _mux(target, waiting, sounds)
                waiting = next(heard, None)
        unfinished.replace(output)
        return lost
    finally:
        unfinished.unlink(missing_ok=True)


def _packets(parts: Sequence[Path]) -> Iterator[Any]:
    for part in parts:
        with _open(part) as container:
            for packet in container.demux(_video_stream(container, part)):
                if packet.size:
                    packet.dts = packet.pts
                    yield packet


def _same_sound(target: Any, stream: Any) -> Any:
    """A stream of `target` for packets of `stream`; None when its container cannot hold the codec."""
    try:
        return target.add_stream_from_template(stream)
    except (ValueError, OSError):
        return None


def _mux(target: Any, packet: Any, sounds: dict[int, Any]) -> None:
    if packet.size and packet.dts is not None:
        packet.stream = sounds[packet.stream.index]
        target.mux(packet)


def _open(path: Path) -> Any:
    import av

    if not path.is_file():
        raise FileNotFoundError(f"There is no video {path}.")
    try:
        return av.open(str(path))
    except (OSError, ValueError) as error:
        raise VideoError(f"{path.name} cannot be opened as a video ({error}).") from error


def _video_stream(container: Any, path: Path) -> Any:
    if not container.streams.video:
        raise VideoError(f"{path.name} has no video stream.")
    return container.streams.video[0]
