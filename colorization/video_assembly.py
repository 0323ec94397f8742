"""A coloured film from its parts and what the source has beside its pictures: sound, subtitles, chapters, names."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

from ..host.whole_files import put_in_place, remove
from .video_clock import beside
from .video_file import (
    Irregularities,
    average_rate,
    demuxed,
    disposition_of,
    is_cover,
    open_video,
    read_facts,
    video_stream,
)

# What a container says of itself and of the encoder, and what mkvmerge counted in the grey film's packets
OWN_TAGS = ("major_brand", "minor_version", "compatible_brands", "encoder")
COUNTED_TAGS = ("bps", "duration", "number_of_frames", "number_of_bytes", "_statistics", "rotate")
# Sound and subtitles that are found in a transport stream; it takes any.
TRANSPORTED = (
    "aac", "aac_latm", "ac3", "eac3", "dts", "mp2", "mp3", "mp1", "opus", "truehd", "s302m",
    "dvb_subtitle", "hdmv_pgs_subtitle",
)  # fmt: skip
# Of ComfyUI: what its front end opens when a file is dropped on it
WORKFLOW_TAGS = ("prompt", "workflow")
QUICKTIME = ("mp4", "mov", "ipod")  # drop a tag they do not know, unless they are told to keep it
TAGGED = (*QUICKTIME, "matroska", "webm")
USUAL_LAYOUTS = {1: "mono", 2: "stereo", 3: "2.1", 4: "quad", 5: "5.0", 6: "5.1", 7: "6.1", 8: "7.1"}
INTERLEAVED = 10  # seconds in which a file has the packets of one time
CHAPTERED = ("mp4", "mov", "ipod", "matroska", "webm", "nut")


@dataclass
class _Sink:
    """A stream of the new file. strict: whether each of its packets must be later than the one before."""

    stream: Any
    strict: bool
    last: int | None = None

    def take(self, target: Any, packet: Any, shift: Fraction = Fraction(0)) -> None:
        """shift: seconds to add to the packet's times. One that lies wholly before what is there already is left out."""
        time_base = self.stream.time_base
        scale = packet.time_base / time_base
        up, down = scale.numerator, scale.denominator
        added = round(shift / time_base) if shift else 0

        def ticks(time: int) -> int:
            return (2 * up * time + down) // (2 * down) + added

        dts = ticks(packet.dts if packet.dts is not None else packet.pts)
        pts = dts if packet.pts is None else ticks(packet.pts)
        length = (2 * up * (packet.duration or 0) + down) // (2 * down)
        if self.last is not None and dts < self.last + self.strict:
            if self.stream.type == "audio" and dts + length <= self.last:
                return
            dts = self.last + self.strict
        self.last = dts
        packet.dts, packet.pts, packet.duration, packet.time_base = dts, max(pts, dts), length, time_base
        packet.stream = self.stream
        target.mux(packet)


def assemble(
    parts: Sequence[Path],
    source: Path,
    output: Path,
    complete: bool = True,
    workflow: Mapping[str, str] | None = None,
    part_end: float | None = None,
) -> list[str]:
    """Put the parts' packets in a row, with the source's sound and subtitles beside them as they are; of a film that is not
    complete, as much of them as there are pictures.

    workflow: texts by name, such as "prompt" and "workflow", that tell how the film was made. part_end: of a part of the
    film, the second of its clock at which it ends; sound and subtitles are those of the part, and its first picture is at 0.

    A file called `output` stays whole until the new one is. Returns a sentence for everything of the source that the new
    file lacks.
    """
    unfinished = output.with_name(f"{output.stem}.unfinished{output.suffix}")
    if unfinished.exists() and unfinished.samefile(source):
        unfinished = output.with_name(f"{output.stem}.unfinished-2{output.suffix}")
    try:
        lost = _written(parts, source, unfinished, output.suffix, complete, workflow or {}, part_end)
        put_in_place(unfinished, output)
        return lost
    finally:
        remove(unfinished)


def _written(
    parts: Sequence[Path],
    source: Path,
    path: Path,
    suffix: str,
    complete: bool,
    workflow: Mapping[str, str],
    part_end: float | None,
) -> list[str]:
    import av

    facts, found = read_facts(source), Irregularities()
    with ExitStack() as files:
        target = files.enter_context(av.open(str(path), "w"))
        keeps = target.format.name in TAGGED
        if workflow and target.format.name in QUICKTIME:
            # The second brings the tags before the pictures, for the front end reads the beginning of a file only.
            target.container_options["movflags"] = "use_metadata_tags+faststart"
        original, first = files.enter_context(open_video(source)), files.enter_context(open_video(parts[0]))
        film = video_stream(original, source)
        # The encoder's own time base is taken for the rate otherwise.
        video = target.add_stream_from_template(video_stream(first, parts[0]), rate=average_rate(film))
        _name_alike(video, film, (*OWN_TAGS, *COUNTED_TAGS))
        strict = not target.format.flags & av.format.Flags.ts_nonstrict.value
        sinks: dict[int, _Sink] = {}
        lost: list[str] = []
        for stream in original.streams:
            if stream.index == film.index:
                continue
            made = _same(target, stream)
            if made is None and not (stream.type == "data" and original.format.name.startswith("mov,mp4")):
                lost.append(_left_out(stream, suffix))  # an MP4's chapters are data, too
            elif made is not None and stream.type in ("audio", "subtitle"):
                sinks[stream.index] = _Sink(made, strict)
        # Those of a workflow that made the grey film would be opened instead.
        target.metadata.update(_tags(original, (*OWN_TAGS, *WORKFLOW_TAGS) if workflow else OWN_TAGS))
        if workflow and keeps:
            target.metadata.update(workflow)
        elif workflow:
            lost.append(f"{suffix} cannot hold the workflow, which is left out; choose another ending, such as .mp4.")
        lost += _chapters(target, original, suffix, complete and part_end is None)
        target.start_encoding()
        pictures = _Sink(video, strict)
        arriving = files.enter_context(
            closing(beside(original, film, [original.streams[index] for index in sinks], facts, found))
        )
        earlier, beside_it = Fraction(0), cast(Iterator[tuple[Any, Fraction]], arriving)
        if part_end is not None:
            earlier = next((-packet.pts * packet.time_base for packet in _packets(parts[:1])), Fraction(0))
            beside_it = _of_part(arriving, float(-earlier), part_end)
        waiting = next(beside_it, None)
        begins = 0.0 if waiting is None else _begins(*waiting)

        def pass_on_until(end: float) -> None:
            nonlocal waiting, begins
            while waiting is not None and begins <= end:
                _pass_on(target, sinks, found, waiting[0], waiting[1] + earlier)
                waiting = next(beside_it, None)
                begins = 0.0 if waiting is None else _begins(*waiting)

        for packet in _packets(parts):
            pass_on_until(_begins(packet))
            pictures.take(target, packet, earlier)
        if complete:
            pass_on_until(math.inf)
    return lost + found.notes(source.name)


def _of_part(arriving: Iterator[tuple[Any, Fraction]], first: float, end: float) -> Iterator[tuple[Any, Fraction]]:
    """What begins in a part of the film; the rest of the file need not be read."""
    for packet, shift in arriving:
        begins = _begins(packet, shift)
        if begins >= end + INTERLEAVED:
            return
        if first <= begins < end:
            yield packet, shift


def _begins(packet: Any, shift: Fraction = Fraction(0)) -> float:
    """In seconds; without a time a packet is left out, whenever."""
    time = packet.dts if packet.dts is not None else packet.pts
    return 0.0 if time is None else time * float(packet.time_base) + float(shift)


def _pass_on(target: Any, sinks: dict[int, _Sink], found: Irregularities, packet: Any, shift: Fraction) -> None:
    import av

    sink = sinks[packet.stream.index]
    # Subtitles have one time only; sound without one belongs nowhere.
    if packet.dts is None and (packet.pts is None or sink.stream.type != "subtitle"):
        return
    try:
        sink.take(target, packet, shift)
    except av.error.FFmpegError as error:
        if isinstance(error, (OSError, MemoryError)):
            raise
        found.unheard += 1  # what turns broadcast sound into a file's looks into it, and cannot read this


def _packets(parts: Sequence[Path]) -> Iterator[Any]:
    for part in parts:
        with open_video(part) as container:
            for packet in demuxed(container, [video_stream(container, part)], Irregularities()):
                packet.dts = packet.pts
                yield packet


def _same(target: Any, stream: Any) -> Any:
    """A stream of `target` for packets of `stream`, called as that one is; None when there can be none."""
    attached = stream.type == "attachment" and target.format.name == "matroska" and hasattr(target, "add_attachment")
    if not attached and (stream.type not in ("audio", "subtitle") or stream.codec_context is None):
        return None
    if stream.type == "audio" and not stream.codec_context.sample_rate:
        return None  # announced, as broadcasts do, and never sent; no file can be begun with it
    if target.format.name == "mpegts" and stream.codec.canonical_name not in TRANSPORTED:
        return None
    if not _begins_a_file(target.format.name, stream):
        return None
    try:
        made = target.add_stream_from_template(stream)
    except (ValueError, OSError):
        return None
    _name_alike(made, stream)
    if stream.type == "audio":
        _say_where_sound_comes_from(made)
    return made


def _begins_a_file(container: str, stream: Any) -> bool:
    """Whether a file of this container can be begun with such a stream; some are refused there and not before."""
    import av

    trial = av.open(io.BytesIO(), "w", format=container)
    try:
        made = trial.add_stream_from_template(stream)
        if stream.type == "audio":
            _say_where_sound_comes_from(made)
        trial.start_encoding()
    except (ValueError, OSError):
        return False
    finally:
        with suppress(ValueError, OSError):  # nothing is in it
            trial.close()
    return True


def _say_where_sound_comes_from(stream: Any) -> None:
    """AVI and Matroska count the channels of uncompressed sound and no more, and MP4 wants to know which they are."""
    context = stream.codec_context
    if context is not None and context.layout.name == f"{context.layout.nb_channels} channels":
        with suppress(KeyError, ValueError, AttributeError):
            context.layout = USUAL_LAYOUTS[context.layout.nb_channels]


def _name_alike(made: Any, stream: Any, without: tuple[str, ...] = ()) -> None:
    """Language, title and what the stream is for (forced, for the deaf, ...)."""
    made.metadata.update(_tags(stream, without))
    with suppress(AttributeError):  # PyAV before it could be set
        made.disposition = disposition_of(stream)


def _tags(thing: Any, without: tuple[str, ...]) -> dict[str, str]:
    return {name: value for name, value in thing.metadata.items() if not name.lower().startswith(without)}


def _chapters(target: Any, original: Any, suffix: str, complete: bool) -> list[str]:
    """Copy them, into a film that is complete: others may lie behind its end."""
    if not hasattr(original, "chapters"):  # PyAV before it knew of them
        return []
    found = original.chapters()
    if not found or not complete:
        return []
    if target.format.name not in CHAPTERED or not hasattr(target, "set_chapters"):
        return [f"{suffix} cannot hold the film's chapters, which are left out; choose another ending, such as .mkv."]
    target.set_chapters(found)
    return []


def _codec_name(stream: Any) -> str:
    """Of sound, the name of its kind and not of the decoder that was chosen."""
    name: str = stream.codec.canonical_name if stream.type == "audio" else stream.codec_context.name
    return name


def _left_out(stream: Any, suffix: str) -> str:
    """A sentence about a stream that the new file lacks."""
    if stream.type == "video":
        return f"The film's {'cover picture' if is_cover(stream) else 'further video stream'} is left out."
    coded = "" if stream.codec_context is None else f"{_codec_name(stream)} "
    spoken = stream.metadata.get("language", "")
    spoken = f" ({spoken})" if spoken not in ("", "und") else ""
    if stream.type == "audio" and stream.codec_context is not None and not stream.codec_context.sample_rate:
        return f"The film's {coded}sound{spoken} begins late or never, and is left out."
    if stream.type == "audio":
        return f"{suffix} cannot hold the film's {coded}sound{spoken}, which is left out; choose another ending, such as .mkv."
    if stream.type == "subtitle":
        return (
            f"{suffix} cannot hold the film's {coded}subtitles{spoken}, which are left out; choose another ending, such as "
            ".mkv."
        )
    return f"The film's {stream.type} stream {stream.index} is left out."
