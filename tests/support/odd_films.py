"""Video files as people have them, and what is read back of them."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from hotpath.colorization import video_assembly, video_frames, video_parts
from hotpath.colorization.video_file import Irregularities, VideoFacts, read_facts
from torch import Tensor

HEIGHT, WIDTH = 48, 64
TOLD = 6  # levels from frame to frame


def picture(number: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray[Any, Any]:
    """A slope on the left; the right half's level tells the number."""
    rows = np.broadcast_to(np.linspace(0, 255, height)[:, None], (height, width)).astype(np.uint8).copy()
    rows[:, width // 2 :] = 16 + TOLD * number % 232
    return np.repeat(rows[..., None], 3, axis=2)


def numbers(pictures: Tensor) -> list[int]:
    levels = pictures[:, :, WIDTH // 2 + 4 :].float().mean(dim=(1, 2, 3))
    return [round((level - 16) / TOLD) for level in levels.tolist()]


def write(
    path: Path,
    count: int = 24,
    *,
    codec: str = "libx264",
    form: str = "yuv420p",
    rate: Fraction | int = 25,
    times: list[int] | None = None,
    first: int = 0,
    sound: bool = False,
    sound_from: int = 0,
    size: tuple[int, int] = (HEIGHT, WIDTH),
    container: str | None = None,
    fields: str = "",
    **options: str,
) -> Path:
    """times: in units of 1 / rate. sound_from: in seconds. options: of the encoder."""
    with av.open(str(path), "w", format=container) as target:
        quality = {"crf": "4"} if codec == "libx264" else {"qmax": "2"}
        stream: Any = target.add_stream(codec, rate=rate, options={**quality, **options})
        (stream.height, stream.width), stream.pix_fmt = size, form
        voice: Any = target.add_stream("aac", rate=16000) if sound else None
        marks = None
        if fields:
            marks = av.filter.Graph()
            buffer = marks.add_buffer(
                width=size[1], height=size[0], format=av.VideoFormat(form), time_base=Fraction(1, 25)
            )
            marks.link_nodes(buffer, marks.add("setfield", fields), marks.add("buffersink")).configure()
        for index in range(count):
            frame = av.VideoFrame.from_ndarray(picture(first + index, *size), format="rgb24").reformat(format=form)
            if marks is not None:
                marks.push(frame)
                frame = marks.pull()
            frame.pts, frame.time_base = index if times is None else times[index], 1 / Fraction(rate)
            target.mux(stream.encode(frame))
        target.mux(stream.encode())
        if voice is not None:
            wave = np.sin(np.arange(int(16000 * count / rate)) / 6).astype(np.float32)[None]
            heard = av.AudioFrame.from_ndarray(wave, format="fltp", layout="mono")
            heard.sample_rate, heard.pts, heard.time_base = 16000, 16000 * sound_from, Fraction(1, 16000)
            for part in (heard, None):
                target.mux(voice.encode(part))
    return path


def read(path: Path, start: int | None = None) -> tuple[VideoFacts, Tensor, list[int], Irregularities]:
    facts, found = read_facts(path), Irregularities()
    portions = list(video_frames.read_portions(path, facts, 5, start, found))
    return (
        facts,
        torch.cat([portion.frames for portion in portions]),
        [time for portion in portions for time in portion.times],
        found,
    )


def through(source: Path, output: Path, codec: str = "libx264") -> list[str]:
    """The film as it is, in two parts. Returns what the report would say of it."""
    facts, pictures, times, found = read(source)
    video_parts.check_container(source, output, output.parent, facts, codec, 4)
    parts = []
    for index, rows in enumerate((slice(0, 7), slice(7, None))):
        parts.append(output.with_name(f"part{index}.nut"))
        writer = video_parts.PartWriter(parts[-1], facts, codec, 4)
        writer.write(pictures[rows], times[rows])
        writer.close()
    lost = video_assembly.assemble(parts, source, output)
    return facts.notes(source.name, codec) + found.notes(source.name) + lost


def packets(path: Path) -> dict[int, list[tuple[int, int, float]]]:
    """Of each stream: place in the file, bytes, and the time in seconds."""
    found: dict[int, list[tuple[int, int, float]]] = {}
    with av.open(str(path)) as container:
        for packet in container.demux():
            if packet.size:
                where = (packet.pos or 0, packet.size, float(packet.pts * packet.time_base))
                found.setdefault(packet.stream.index, []).append(where)
    return found


def gaps(times: list[float]) -> float:
    ordered = sorted(times)
    return max(b - a for a, b in pairwise(ordered))
