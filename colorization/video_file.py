"""Video files through PyAV: what one says about itself, its packets and its decoded frames."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any

from ..host.display_matrix import turned
from ..host.frame_pixels import without_light
from ..host.video_opening import decodable, opened, packets

# ffmpeg's numbers for colour matrices, primaries and transfers; 2 is "not said"
ITU709, UNSAID, ITU601, BT2020 = 1, 2, 5, 9
MATRICES = (ITU709, 4, ITU601, 6, 7, BT2020)  # the ones swscale knows
HDR_TRANSFERS = {16: "PQ", 18: "HLG"}
HD_ROWS = 720  # from here on an untagged video is taken for ITU-R 709, as players do
COARSEST_TICK = Fraction(1, 1000)  # seconds; a clock of whole frames could not tell two frames of one time apart
LOOKED_AT = 5  # first frames that say whether a film is interlaced
ATTACHED_PICTURE = 1 << 10  # among ffmpeg's dispositions
INTERLACED_CODECS = ("libx264",)  # the encoders that keep fields apart
# In an AVI, which says when a packet is decoded and no more, ffmpeg does not know when their frames are shown.
SHOWN_LATER = ("h264", "hevc")


class VideoError(ValueError):
    """A video file cannot be read or written; the message names it and says why."""


@dataclass(frozen=True)
class VideoFacts:
    """height and width as shown; frames: how many, exact or estimated, 0 when unknown; rate: average per second;
    time_base: seconds of a tick of the film's clock, the stream's own or a fraction of it; matrix, primaries, transfer:
    ffmpeg's numbers of its colours; rotation: quarter turns to the left that show it upright, after its left and right
    were changed over if it is mirrored; pixel_aspect: width of a pixel over its height, 0 when unknown; fields: tff or
    bff when it is interlaced, by the field that is shown first; delay: ticks from when a frame is shown to when its
    decoder gives it, of a film that tells the latter only; lead: ticks by which it begins before 0, as broadcasts do whose
    clock starts again soon. Parts and other files know no times before 0, so all of this film's are later by them."""

    height: int
    width: int
    frames: int
    rate: Fraction
    time_base: Fraction
    matrix: int
    rotation: int
    pixel_aspect: Fraction = Fraction(0)
    mirrored: bool = False
    primaries: int = UNSAID
    transfer: int = UNSAID
    fields: str = ""
    delay: int | None = None
    lead: int = 0

    @property
    def hdr(self) -> bool:
        return self.transfer in HDR_TRANSFERS

    @property
    def coded_size(self) -> tuple[int, int]:
        """Height and width before turning."""
        return (self.width, self.height) if self.rotation % 2 else (self.height, self.width)

    @property
    def step(self) -> int:
        """Ticks from frame to frame at the average rate."""
        return max(1, round(1 / self.rate / self.time_base))

    @property
    def written_colours(self) -> tuple[int, int, int]:
        """Matrix, primaries and transfer of the coloured film."""
        return (ITU709, ITU709, ITU709) if self.hdr else (self.matrix, self.primaries, self.transfer)

    def written_fields(self, codec: str) -> str:
        """tff or bff where the coloured film is interlaced, too."""
        # 4:2:0 has a row of chroma for two rows of each field.
        kept = codec in INTERLACED_CODECS and self.rotation == 0 and self.height % 4 == 0 and self.width % 2 == 0
        return self.fields if kept else ""

    def notes(self, name: str, codec: str) -> list[str]:
        """What becomes of this film's kind, a sentence each. name: of the file."""
        said = []
        if self.hdr:
            said.append(
                f"{name} is HDR ({HDR_TRANSFERS[self.transfer]}); the coloured film is SDR, its brightness is mapped from "
                "1,000 to 100 cd/m² as in ITU-R BT.2390."
            )
        if self.fields and self.written_fields(codec):
            said.append(
                f"{name} is interlaced, and so is the coloured film; colours are better on one that was deinterlaced first."
            )
        elif self.fields:
            said.append(
                f"{name} is interlaced and the coloured film is marked as progressive, with combs where things move; "
                "deinterlace it first."
            )
        return said


@dataclass
class Irregularities:
    """What was found on the way through a file. damaged: packets that could not be decoded; cut_off: it could not be read
    to its end; unheard: packets of sound or subtitles that are broken; scaled: frames of another size; lifted: frames whose
    time was not after the one before; breaks: places where its clock starts again."""

    damaged: int = 0
    cut_off: bool = False
    unheard: int = 0
    scaled: int = 0
    lifted: int = 0
    breaks: int = 0

    def notes(self, name: str) -> list[str]:
        """A sentence for each kind. name: of the file."""
        found = [
            (self.damaged, f"{name} is damaged: {_frames(self.damaged)} left out that could not be decoded."),
            (self.cut_off, f"{name} is damaged: it could not be read to its end."),
            (self.unheard, f"{name} is damaged: {self.unheard} packets of its sound or subtitles were left out."),
            (self.scaled, f"{name} changes its size: {_frames(self.scaled)} scaled to that of the first one."),
            (self.lifted, f"{name} repeats times: {_frames(self.lifted)} moved behind the one before."),
            (self.breaks, f"The clock of {name} leaps, as in files put in a row; it goes on without a gap now."),
        ]
        return [sentence for count, sentence in found if count]


def _frames(count: int) -> str:
    return "1 frame was" if count == 1 else f"{count} frames were"


def read_facts(path: Path) -> VideoFacts:
    """Raises VideoError when no frame can be decoded."""
    with open_video(path) as container:
        stream = video_stream(container, path)
        with closing(decoded(container, stream, Irregularities())) as found:
            try:
                first = list(islice(found, LOOKED_AT))
            except (OSError, ValueError) as error:
                raise VideoError(f"{path.name} has no frame that can be decoded ({type(error).__name__}).") from error
        if not first:
            raise VideoError(f"{path.name} has no frame that can be decoded: it is damaged, or not all of it is there.")
        frame, context = first[0], stream.codec_context
        rate = average_rate(stream)
        frames = stream.frames or _tagged_frames(stream, rate)
        if not frames and stream.duration and stream.time_base:
            frames = round(float(stream.duration * stream.time_base * rate))
        elif not frames and container.duration:
            frames = round(container.duration / 1e6 * float(rate))
        said = int(frame.colorspace)
        matrix = said if said in MATRICES else (ITU709 if frame.height >= HD_ROWS else ITU601)
        mirrored, turns = turned(frame)
        height, width, aspect = frame.height, frame.width, Fraction(stream.sample_aspect_ratio or 0)
        if turns % 2:
            height, width, aspect = width, height, 1 / aspect if aspect else aspect
        tick = Fraction(stream.time_base or 1 / rate)
        while tick > COARSEST_TICK:
            tick /= 2
        # Older PyAV has these two at the decoder only.
        primaries, transfer = (
            int(getattr(frame, name, 0) or getattr(context, name)) for name in ("color_primaries", "color_trc")
        )
        interlaced = [each for each in first if each.interlaced_frame]
        return VideoFacts(
            height,
            width,
            frames,
            rate,
            tick,
            matrix,
            turns,
            aspect,
            mirrored,
            primaries or UNSAID,
            transfer or UNSAID,
            _first_field(interlaced[0]) if 2 * len(interlaced) > len(first) else "",
            _delay(container, stream, frame, tick),
            max(0, round(-(frame.pts or 0) * stream.time_base / tick)) if stream.time_base else 0,
        )


def _tagged_frames(stream: Any, rate: Fraction) -> int:
    """From the tags that Matroska's writers leave; 0 without any. The file's own length is that of its longest stream."""
    tags = {name.partition("-")[0].lower(): value for name, value in stream.metadata.items()}
    try:
        if "number_of_frames" in tags:
            return int(tags["number_of_frames"])
        hours, minutes, seconds = tags["duration"].split(":")
        return round(float(rate) * (60 * (60 * int(hours) + int(minutes)) + float(seconds)))
    except (KeyError, ValueError, OverflowError):
        return 0


def _delay(container: Any, stream: Any, first: Any, tick: Fraction) -> int | None:
    context = stream.codec_context
    if container.format.name != "avi" or context.name not in SHOWN_LATER or not context.has_b_frames:
        return None
    if first.pts is None or first.dts is None:
        return None
    return round((first.dts - first.pts) * stream.time_base / tick)


def average_rate(stream: Any) -> Fraction:
    return Fraction(stream.average_rate or stream.guessed_rate or 25)


def _first_field(frame: Any) -> str:
    """tff or bff. PyAV does not say, but the filter that separates fields gives the first one first."""
    import av

    small = without_light(frame).reformat(width=16, height=32, format="gray")
    plane = small.planes[0]
    plane.update((bytes(plane.line_size) + b"\xff" * plane.line_size) * (plane.height // 2))
    graph = av.filter.Graph()
    graph.link_nodes(
        graph.add_buffer(width=16, height=32, format=small.format, time_base=Fraction(1, 25)),
        graph.add("separatefields"),
        graph.add("buffersink"),
    ).configure()
    graph.push(small)
    return "tff" if bytes(graph.pull().planes[0])[0] == 0 else "bff"


def decoded(container: Any, stream: Any, found: Irregularities, clock: Any = None) -> Generator[Any, None, None]:
    """Frames as they are shown. clock: puts the times of packets right. What a damaged packet costs is counted."""
    import av

    def pictures(packet: Any) -> list[Any]:
        try:
            return list(stream.decode(packet))
        except av.error.FFmpegError as error:
            if isinstance(error, MemoryError):
                raise
            if not isinstance(error, EOFError):
                found.damaged += 1
            return []

    try:
        for packet in demuxed(container, [stream], found):
            if clock is not None:
                clock.correct(packet)
            yield from pictures(packet)
        yield from pictures(None)
    finally:
        # A decoder's threads may wait for Python's lock to log something, and freeing the decoder waits for them with
        # that lock held. Flushing waits for them without it.
        stream.codec_context.flush_buffers()


def demuxed(container: Any, streams: list[Any], found: Irregularities) -> Generator[Any, None, None]:
    """Packets in the order of the file, none without content: those would end a decoder's work."""
    import av

    try:
        for packet in packets(container, *streams):
            if packet.size:
                yield packet
    except av.error.InvalidDataError:
        found.cut_off = True


def open_video(path: Path) -> AbstractContextManager[Any]:
    if not path.is_file():
        raise FileNotFoundError(f"There is no video {path}.")
    try:
        return opened(path)
    except (OSError, ValueError) as error:
        raise VideoError(f"{path.name} cannot be opened as a video ({error}).") from error


def video_stream(container: Any, path: Path) -> Any:
    """The film, not a cover picture beside it."""
    if not container.streams.video:
        raise VideoError(f"{path.name} has no video stream.")
    moving = [stream for stream in container.streams.video if not is_cover(stream)]
    try:
        return decodable((moving or container.streams.video)[0], path)
    except ValueError as error:
        raise VideoError(str(error)) from None


def is_cover(stream: Any) -> bool:
    return bool(disposition_of(stream) & ATTACHED_PICTURE)


def disposition_of(stream: Any) -> int:
    """What a stream is for, in ffmpeg's bits; 0 where PyAV does not tell."""
    found = getattr(stream, "disposition", 0)
    return int(getattr(found, "value", found))
