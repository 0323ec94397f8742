"""A film saved as another file: its packets copied where that gives what is asked for, else encoded again.

The rules are ComfyUI's: packets are copied when neither the container nor the codec nor a quality asks for anything else.
"""

from __future__ import annotations

import logging
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any

from .. import host
from ..host.errors import first_line
from ..host.video_opening import opened, packets
from .video_encoding import MUXERS, choose_codec, is_webm, reencode_video, written
from .video_streams import video_stream

log = logging.getLogger("hotpath.headless")

WEBM_CODECS = {"video": ("av1", "vp8", "vp9"), "audio": ("opus", "vorbis"), "subtitle": ("webvtt",)}


def copy_video(source: Path, target: Path, metadata: dict[str, Any] | None, format: str = "auto") -> None:
    """Copy video and sound packets unchanged into a new file, with `metadata` added; subtitles too where the containers are
    of one kind."""

    with opened(source) as container:
        streams = [*container.streams.video, *container.streams.audio]
        if source.suffix.lower() == target.suffix.lower():
            streams += container.streams.subtitles
        old = {str(k): str(v) for k, v in container.metadata.items()}
        with written(target, old, metadata, format) as out:
            copies = {
                stream.index: out.add_stream_from_template(stream, opaque=True)
                for stream in streams
                if stream.codec_context is not None
            }
            for packet in _with_decoding_times(packets(container), copies):
                host.current().check_interrupt()
                packet.stream = copies[packet.stream.index]
                out.mux(packet)


def _with_decoding_times(packets: Iterator[Any], streams: Container[int]) -> Iterator[Any]:
    """The packets of some streams, each with a time to be decoded at: Matroska leaves out those of the first ones where
    pictures are reordered, and the very first is a key frame."""
    first: dict[int, list[Any]] = {}
    begun: set[int] = set()
    for packet in packets:
        index = packet.stream.index
        if index not in streams or not packet.size:
            continue
        if packet.dts is None:
            if index not in begun:
                first.setdefault(index, []).append(packet)
            continue
        begun.add(index)
        dts = packet.dts
        for early in reversed(held := first.pop(index, [])):
            early.dts = dts = dts - max(1, early.duration or 0)
        yield from held
        yield packet
    for packet in (packet for held in first.values() for packet in held if packet.pts is not None):
        packet.dts = packet.pts
        yield packet


def save_video(
    source: Path,
    target: Path,
    format: str = "auto",
    codec: str = "auto",
    metadata: dict[str, Any] | None = None,
    crf: float | None = None,
) -> None:
    """Copy a film's packets where that gives what is asked for, else encode it again."""
    import av

    choose_codec(target, codec, format)
    reason = why_encoded(source, target, format, codec, crf)
    if reason is None:
        try:
            copy_video(source, target, metadata, format)
            log.info("%s: its packets are copied to %s", source.name, target.name)
            return
        except (av.error.FFmpegError, ValueError) as error:
            reason = f"{target.suffix} cannot hold its streams ({first_line(error)})"
    log.info("%s is encoded again for %s: %s", source.name, target.name, reason)
    reencode_video(source, target, codec, metadata, crf, format)


def why_encoded(source: Path, target: Path, format: str, codec: str, crf: float | None) -> str | None:
    """Why a film cannot be copied into `target`; None when it can. format, codec: as Save Video has them."""

    if crf is not None:
        return f"a crf of {crf:g} is asked for"
    with opened(source) as container:
        found = video_stream(container, source).codec.canonical_name
        if codec not in ("auto", found):
            return f"the codec {codec} is asked for, and it is {found}"
        if format in MUXERS and MUXERS[format] not in container.format.name.split(","):
            return f"the container {format} is asked for, and it is {container.format.name}"
        if is_webm(target, format):
            for stream in container.streams:
                known = WEBM_CODECS.get(stream.type)
                if known and stream.codec_context is not None and stream.codec.canonical_name not in known:
                    return f"a webm file holds no {stream.codec.canonical_name}"
    return None
