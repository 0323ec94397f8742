"""Parts of a coloured film on disk, and whether a container will hold them."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..host.frame_pixels import RGB
from ..host.system_errors import sentence
from ..host.whole_files import remove
from .video_assembly import assemble
from .video_file import VideoError, VideoFacts, open_video, read_facts, video_stream
from .video_frames import timed_frames

STRAYING = Fraction(2, 1000)  # seconds by which a container may round a frame's time
MPEG_RANGE = 1


class PartWriter:
    """One part of the coloured film: a NUT file, which keeps absolute times of any time base."""

    def __init__(self, path: Path, facts: VideoFacts, codec: str, quality: int) -> None:
        import av

        self._facts = facts
        self._matrix, primaries, transfer = facts.written_colours
        fields = facts.written_fields(codec)
        self._container = av.open(str(path), "w", format="nut")
        # Without reordered frames, packets of several parts can be put in a row with no times to invent.
        options = {"crf": str(quality), "bf": "0"}
        if fields:
            options["flags"] = "+ildct+ilme"
        stream: Any = self._container.add_stream(codec, rate=facts.rate, options=options)
        stream.height, stream.width = facts.height, facts.width
        even = facts.height % 2 == 0 and facts.width % 2 == 0
        stream.pix_fmt = "yuv420p" if even else "yuv444p"
        stream.codec_context.time_base = facts.time_base
        stream.codec_context.colorspace = self._matrix
        stream.codec_context.color_primaries = primaries
        stream.codec_context.color_trc = transfer
        stream.codec_context.color_range = MPEG_RANGE
        if facts.pixel_aspect:
            stream.codec_context.sample_aspect_ratio = facts.pixel_aspect
        self._stream = stream
        self._marking = _field_marks(fields, facts) if fields else None

    def write(self, pictures: Tensor, times: Sequence[int]) -> None:
        """pictures: [T, H, W, 3] uint8."""
        import av

        for picture, time in zip(pictures, times, strict=True):
            frame = av.VideoFrame.from_ndarray(picture.numpy(), format="rgb24")
            if self._marking is not None:
                self._marking.push(frame)
                frame = self._marking.pull()
            # PyAV 17 knows no BT.2020 among the matrices that it can be asked for, but takes the frame's own.
            frame.colorspace = self._matrix
            frame = frame.reformat(format=self._stream.pix_fmt, src_colorspace=RGB, dst_colorspace=self._matrix)
            frame.pts, frame.time_base = time, self._facts.time_base
            self._container.mux(self._stream.encode(frame))

    def close(self) -> None:
        try:
            self._container.mux(self._stream.encode())
        finally:
            self._container.close()


def _field_marks(fields: str, facts: VideoFacts) -> Any:
    """A graph that marks frames as interlaced, which PyAV's frames cannot be told. fields: tff or bff."""
    import av

    graph = av.filter.Graph()
    form = av.VideoFormat("rgb24", facts.width, facts.height)
    graph.link_nodes(
        graph.add_buffer(width=facts.width, height=facts.height, format=form, time_base=facts.time_base),
        graph.add("setfield", fields),
        graph.add("buffersink"),
    ).configure()
    return graph


def check_container(source: Path, output: Path, folder: Path, facts: VideoFacts, codec: str, quality: int) -> None:
    """Put a film of three grey frames together as `output` will be, in `folder`, and read it: whether its container holds
    such pictures and keeps their times and rate is better known before the film is coloured.

    Raises VideoError when it does not.
    """
    import av

    try:
        av.Codec(codec, "w")
    except ValueError:  # as in one that was built against an FFmpeg without x264
        raise VideoError(
            f"PyAV has no encoder {codec} here: install the one of PyPI, `pip install --force-reinstall av`."
        ) from None
    part, made = folder / "trial.nut", folder / f"trial{output.suffix}"
    times = [0, facts.step, 3 * facts.step]
    try:
        writer = PartWriter(part, facts, codec, quality)
        writer.write(torch.full((3, facts.height, facts.width, 3), 128, dtype=torch.uint8), times)
        writer.close()
        assemble([part], source, made, complete=False)
        found = read_facts(made)
        kept = [time * found.time_base for time, _ in timed_frames(made, found)]
        wanted = [time * facts.time_base for time in times]
        whole = len(kept) == 3 and (found.height, found.width) == (facts.height, facts.width)
        if not whole or any(abs(a - kept[0] - b) > STRAYING for a, b in zip(kept, wanted, strict=True)):
            raise VideoError("frames or their times were lost in a trial")
        with open_video(made) as container:
            stated = video_stream(container, made).average_rate
        # Where a container does not state it, three frames tell little, and where it does, it may be their mean.
        if stated and not facts.rate / 2 < stated < facts.rate * 2:
            raise VideoError(f"{float(facts.rate):g} frames a second became {float(stated):g} in a trial")
    except (OSError, ValueError, av.error.FFmpegError) as error:
        if sentence(error) or sentence(error.__cause__ or error):  # it is the disk that refuses
            raise
        ending = f"A {output.suffix} file" if output.suffix else "A file without an ending"
        raise VideoError(
            f"{ending} cannot hold this film as {codec} ({error}). Choose another ending, such as .mp4 or .mkv."
        ) from error
    finally:
        remove(part)
        remove(made)
