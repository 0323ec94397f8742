"""Films into files: pictures of a workflow encoded, and films encoded again, picture by picture.

What is encoded again keeps its times and colours, as in ComfyUI. Memory does not grow with the length of a film.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .. import host
from ..host.frame_pixels import without_light
from ..host.video_opening import decoded, opened
from ..host.whole_files import whole_file
from . import video_sound
from .video_sound import Sound
from .video_streams import bit_depth, frame_rate, video_stream

if TYPE_CHECKING:
    from .video import VideoComponents

log = logging.getLogger("hotpath.headless")

ENCODERS = {"h264": "libx264", "av1": "libsvtav1"}
MUXERS = {"mp4": "mp4", "mkv": "matroska", "webm": "webm"}  # by the name of a container
SUFFIXES = {"auto": ".mp4", "mp4": ".mp4", "mkv": ".mkv", "webm": ".webm"}
MAX_RATE_DENOMINATOR = 65535
# Numbers of ITU-T H.273.
BT709, SRGB, NARROW, FULL = 1, 13, 1, 2
COLOUR_FIELDS = ("color_primaries", "color_trc", "colorspace", "color_range")
TOLD_TRANSFERS, HDR_TRANSFERS = (1, 13, 16, 18), (16, 18)
TURNS = {1: (("transpose", "cclock"),), 2: (("hflip", None), ("vflip", None)), 3: (("transpose", "clock"),)}


class FilmWriter:
    """A film on its way into a file. size: width and height, even. clock: seconds of one unit of the pictures' times."""

    def __init__(
        self,
        out: Any,
        size: tuple[int, int],
        rate: Fraction,
        clock: Fraction,
        codec: str,
        crf: float | None,
        deep: bool,
        sound: Sound | None,
    ) -> None:
        self.out, self.clock, self.sound = out, clock, sound
        self.pixel_format = "yuv420p10le" if deep else "yuv420p"
        self.pictures: Any = out.add_stream(ENCODERS[codec], rate=rate)
        self.pictures.width, self.pictures.height = size
        self.pictures.pix_fmt = self.pixel_format
        self.pictures.codec_context.time_base = clock
        if crf is not None:
            # Of SVT-AV1, crf 0 is only the best that is lossy.
            self.pictures.options = (
                {"svtav1-params": "lossless=1"} if codec == "av1" and crf == 0 else {"crf": str(crf)}
            )
        self._track = None
        if sound is not None:
            self._track = out.add_stream(sound.codec, rate=sound.rate, layout=sound.layout)
        self._lengths: dict[int, int] = {}
        self._end = Fraction(0)

    def picture(self, frame: Any, pts: int, length: int) -> None:
        """A picture in the writer's pixel format, shown from `pts` for `length` units of the clock."""
        frame.pts, frame.time_base = pts, self.clock
        frame.pict_type = 0  # of the source's, an encoder would take over which are key frames
        self._lengths[pts] = length
        self._end = (pts + length) * self.clock
        self._mux(self.pictures.encode(frame))
        self._hear()

    def finish(self) -> None:
        if self.sound is not None:
            self.sound.add(None)
        self._hear(last=True)
        self._mux(self.pictures.encode())
        if self._track is not None:
            self.out.mux(self._track.encode())

    def _mux(self, packets: Any) -> None:
        for packet in packets:
            if packet.pts in self._lengths:  # else a container gives the last picture an average length
                packet.duration = self._lengths.pop(packet.pts)
            self.out.mux(packet)

    def _hear(self, last: bool = False) -> None:
        if self.sound is not None and self._track is not None:
            for block in self.sound.ready(self._end, last):
                self.out.mux(self._track.encode(block))


def write_video(
    path: Path,
    components: VideoComponents,
    format: str = "auto",
    codec: str = "auto",
    metadata: dict[str, Any] | None = None,
    crf: float | None = None,
    bit_depth: int = 8,
) -> None:
    """Encode pictures and sound; an odd side gets one more row or column, because the codecs need even ones.

    format: the container, one of SUFFIXES; auto is what the ending of `path` says.
    """
    codec, webm = choose_codec(path, codec, format), is_webm(path, format)
    images, audio = components.images, components.audio
    height, width = images.shape[1:3]
    size = even(width, height, path)
    rate = components.frame_rate.limit_denominator(MAX_RATE_DENOMINATOR)
    sound = None if audio is None else Sound(audio["waveform"].shape[1], int(audio["sample_rate"]), webm)
    heard = iter(()) if audio is None else video_sound.blocks(audio)
    with written(path, components.metadata, metadata, format) as out:
        writer = FilmWriter(out, size, rate, 1 / rate, codec, crf, bit_depth > 8, sound)
        _tell_colours(writer.pictures.codec_context)
        samples = 0
        for number, image in enumerate(images):
            host.current().check_interrupt()
            # Side by side, as a container holds back the one until the other comes.
            while audio is not None and samples <= (number + 1) / rate * audio["sample_rate"]:
                if (block := next(heard, None)) is None:
                    break
                samples += block.samples
                writer.sound.add(block)  # type: ignore[union-attr]
            writer.picture(_frame(image, size, bit_depth), number, 1)
        writer.finish()


def reencode_video(
    source: Path,
    target: Path,
    codec: str = "auto",
    metadata: dict[str, Any] | None = None,
    crf: float | None = None,
    format: str = "auto",
) -> None:
    """Decode and encode picture by picture, upright, each at its time. Raises ValueError for a file without pictures and for
    one whose pictures change their size."""
    import av

    codec, webm = choose_codec(target, codec, format), is_webm(target, format)
    with opened(source) as container:
        stream, track = video_stream(container, source), video_sound.last_track(container)
        stream.thread_type = "AUTO"
        rate = frame_rate(stream).limit_denominator(MAX_RATE_DENOMINATOR)
        clock = Fraction(stream.time_base)
        step = max(1, round(1 / rate / clock))
        transfer = int(stream.codec_context.color_trc or 0)
        deep = bit_depth(stream) > 8 or transfer in HDR_TRANSFERS
        sound, heard_from = None, None
        if track is not None and (facts := _sound_facts(source, track)) is not None:
            sound = Sound(*facts, webm)
        writer: FilmWriter | None = None
        upright = Upright(clock)
        first, last = 0, -1
        was: tuple[int, int] | None = None
        old = {str(key): str(value) for key, value in container.metadata.items()}
        with written(target, old, metadata, format) as out:
            for frame in decoded(container, *([stream] if sound is None else [stream, track])):
                if isinstance(frame, av.AudioFrame):
                    assert sound is not None
                    if heard_from is None:
                        heard_from = Fraction(0) if frame.pts is None else frame.pts * frame.time_base
                        if writer is not None:
                            sound.begin(float(heard_from - first * clock))
                    sound.add(frame)
                    continue
                host.current().check_interrupt()
                length, pts = frame.duration or step, frame.pts
                now = (frame.width, frame.height)
                if now != (was := was or now):
                    raise ValueError(
                        f"{source.name} changes its size from {was[0]}x{was[1]} to {now[0]}x{now[1]}: scale it first."
                    )
                frame = upright(frame)
                if writer is None:
                    first = pts or 0
                    size = even(*upright.size, target)
                    writer = FilmWriter(out, size, rate, clock, codec, crf, deep, sound)
                    # Reordered pictures take their lengths from the order they are decoded in.
                    writer.pictures.codec_context.max_b_frames = 0
                    if sound is not None and heard_from is not None:
                        sound.begin(float(heard_from - first * clock))
                frame = _recoloured(frame, stream, writer, transfer, begin=last < 0)
                # Damaged sources give times that go back, or none.
                last = (last + step if last >= 0 else 0) if pts is None or pts - first <= last else pts - first
                writer.picture(frame, last, length)
            if writer is None:
                raise ValueError(f"{source.name} holds no picture that can be decoded.")
            writer.finish()


def is_webm(path: Path, format: str = "auto") -> bool:
    return SUFFIXES[format] == ".webm" if format in MUXERS else path.suffix.lower() == ".webm"


def choose_codec(path: Path, codec: str, format: str = "auto") -> str:
    """The codec that pictures are encoded with. Raises ValueError for one that the container cannot hold."""
    if codec == "auto":
        return "av1" if is_webm(path, format) else "h264"
    if codec not in ENCODERS:
        raise ValueError(f"There is no video codec {codec!r} here; choose one of: auto, {', '.join(ENCODERS)}.")
    if is_webm(path, format) and codec != "av1":
        raise ValueError("A webm file holds AV1 video; choose the codec av1 or auto.")
    return codec


def even(width: int, height: int, path: Path) -> tuple[int, int]:
    size = (width + width % 2, height + height % 2)
    if size != (width, height):
        log.info("%s: %dx%d becomes %dx%d; video needs even sides.", path.name, width, height, *size)
    return size


class Upright:
    """Pictures turned as they are to be shown, with even sides. size: width and height before the sides are even."""

    def __init__(self, clock: Fraction) -> None:
        self._clock = clock
        self._graph: tuple[Any, Any, Any] | None = None
        self.size = (0, 0)

    def __call__(self, frame: Any) -> Any:
        turns = round(frame.rotation / 90) % 4 if frame.rotation else 0
        width, height = self.size = (frame.height, frame.width) if turns % 2 else (frame.width, frame.height)
        if not turns and not width % 2 and not height % 2:
            return frame
        if self._graph is None:
            self._graph = self._made(frame, turns, width, height)
        self._graph[1].push(frame)
        return self._graph[2].pull()

    def _made(self, frame: Any, turns: int, width: int, height: int) -> tuple[Any, Any, Any]:
        import av

        graph = av.filter.Graph()
        source = at = graph.add_buffer(
            width=frame.width, height=frame.height, format=frame.format.name, time_base=self._clock
        )
        steps = list(TURNS.get(turns, ()))
        if width % 2 or height % 2:
            steps.append(("pad", f"{width + width % 2}:{height + height % 2}:0:0"))
            steps.append(("fillborders", f"left=0:top=0:right={width % 2}:bottom={height % 2}:mode=smear"))
        for name, arguments in steps:
            step = graph.add(name, arguments)
            at.link_to(step)
            at = step
        sink = graph.add("buffersink")
        at.link_to(sink)
        graph.configure()
        return graph, source, sink  # a graph goes when nobody holds it


def _recoloured(frame: Any, stream: Any, writer: FilmWriter, transfer: int, begin: bool) -> Any:
    """The frame in the writer's pixel format, with the colours told as its source tells them."""
    context, frame = writer.pictures.codec_context, without_light(frame)
    if frame.format.is_rgb or frame.format.name == "pal8":
        frame = frame.reformat(format=writer.pixel_format, dst_colorspace="ITU709", dst_color_range="MPEG")
        if begin:
            _tell_colours(context)
        return frame
    told = transfer in TOLD_TRANSFERS
    # Up to PyAV 16 the formats with a J become narrow, whatever is asked for, and other 4:2:0 is copied.
    narrow_anyway, older = frame.format.name.startswith("yuvj"), not hasattr(frame, "color_trc")
    narrowed = int(frame.color_range) == FULL and (not told or narrow_anyway)
    ranges = {"src_color_range": "JPEG", "dst_color_range": "MPEG"} if narrowed else {}
    if narrowed and older and not narrow_anyway:
        frame, ranges = frame.reformat(format="yuv444p16le", **ranges), {}
    frame = frame.reformat(format=writer.pixel_format, **ranges)
    for name in COLOUR_FIELDS if told else ():
        value = NARROW if narrowed and name == "color_range" else getattr(stream.codec_context, name)
        if hasattr(frame, name):  # before PyAV 17 a frame has two of them
            setattr(frame, name, value)
        if begin:
            setattr(context, name, value)
    return frame


def _tell_colours(context: Any) -> None:
    context.color_primaries = context.colorspace = BT709
    context.color_trc, context.color_range = SRGB, NARROW


def _frame(image: Tensor, size: tuple[int, int], bit_depth: int) -> Any:
    import av

    width, height = size
    pixels = image[..., :3].detach().float().cpu()
    if pixels.shape[:2] != (height, width):
        pad = (0, width - pixels.shape[1], 0, height - pixels.shape[0])
        pixels = torch.nn.functional.pad(pixels.movedim(-1, 0)[None], pad, mode="replicate")[0].movedim(0, -1)
    peak, kind, layout = (65535, np.uint16, "rgb48le") if bit_depth > 8 else (255, np.uint8, "rgb24")
    values = (pixels.clamp(0, 1) * peak).round().numpy().astype(kind)
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(values), format=layout)
    return frame.reformat(
        format="yuv420p10le" if bit_depth > 8 else "yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG"
    )


def _sound_facts(source: Path, track: Any) -> tuple[int, int] | None:
    """Channels and rate of a sound track; None for one that gives no sound. Some containers tell only with the first frame."""

    if track.codec_context.sample_rate:
        return track.codec_context.channels, track.codec_context.sample_rate
    with opened(source) as container:
        frame = next(decoded(container, container.streams[track.index]), None)
    return None if frame is None else (frame.layout.nb_channels, frame.sample_rate)


@contextmanager
def written(path: Path, old: dict[str, str] | None, new: dict[str, Any] | None, format: str = "auto") -> Iterator[Any]:
    """The file, open for writing, with what is said of it; it has its name when that is brought to an end."""
    import av

    # MP4 drops keys it does not know, such as "prompt", unless it is told to keep them.
    ending = SUFFIXES[format] if format in MUXERS else path.suffix.lower()
    options = {"movflags": "use_metadata_tags+faststart"} if ending in (".mp4", ".mov") else {}
    with (
        whole_file(path, path.suffix) as unfinished,
        av.open(str(unfinished), "w", format=MUXERS.get(format), options=options) as out,
    ):
        for key, value in {**(old or {}), **(new or {})}.items():
            out.metadata[key] = value if isinstance(value, str) else json.dumps(value)
        yield out
