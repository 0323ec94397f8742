"""Video values, read and written with PyAV, with the methods that ComfyUI's VIDEO objects have.

`VideoFile` is a file that is decoded when its frames are asked for; `VideoFrames` holds pictures, sound and a rate.
Both answer `get_components()`, `get_dimensions()`, `get_frame_rate()` and `save_to()`, so a node that takes a VIDEO
works the same with them and inside ComfyUI.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import host
from ..host.frame_pixels import rgb_of
from ..host.video_opening import decoded, opened
from .video_encoding import write_video
from .video_saving import save_video
from .video_sound import last_track, waveform
from .video_streams import bit_depth, frame_rate, video_stream

UNLIKELY = 256  # pictures that a file may announce without saying how long it is


@dataclass
class VideoComponents:
    """images: [N, H, W, 3] float in 0..1; audio: {"waveform": [1, C, samples], "sample_rate": Hz} or None."""

    images: Tensor
    frame_rate: Fraction
    audio: dict[str, Any] | None = None
    metadata: dict[str, str] | None = None


class VideoFrames:
    """A video made of pictures; `bit_depth` (8 or 10) is what it is encoded with."""

    def __init__(self, components: VideoComponents, bit_depth: int = 8) -> None:
        if components.images.ndim != 4 or not len(components.images):
            raise ValueError("A video needs at least one picture.")
        self._components = components
        self._bit_depth = bit_depth

    def get_components(self) -> VideoComponents:
        return self._components

    def get_dimensions(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self._components.images.shape[2], self._components.images.shape[1]

    def get_frame_count(self) -> int:
        return int(self._components.images.shape[0])

    def get_frame_rate(self) -> Fraction:
        return self._components.frame_rate

    def get_duration(self) -> float:
        """Seconds."""
        return float(self.get_frame_count() / self.get_frame_rate())

    def get_bit_depth(self) -> int:
        return self._bit_depth

    def get_color_space(self) -> str:
        return "sRGB"

    def save_to(
        self,
        path: str | Path,
        format: str = "auto",
        codec: str = "auto",
        metadata: dict[str, Any] | None = None,
        crf: float | None = None,
    ) -> None:
        """Encode to `path`. Raises ValueError for a container that cannot hold the codec."""
        write_video(Path(path), self._components, format, codec, metadata, crf, self._bit_depth)


class VideoFile:
    """A video file. Nothing is decoded before its frames are asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def get_stream_source(self) -> str:
        return str(self.path)

    def get_components(self) -> VideoComponents:
        return read_video(self.path)

    def get_dimensions(self) -> tuple[int, int]:
        """Width and height in pixels as shown, with the rotation that phones store applied."""

        with opened(self.path) as container:
            stream = video_stream(container, self.path)
            turned = next((frame.rotation // 90 % 2 for frame in container.decode(stream)), 0)
            size = (stream.width, stream.height)
        return (size[1], size[0]) if turned else size

    def get_frame_count(self) -> int:

        with opened(self.path) as container:
            stream = video_stream(container, self.path)
            return stream.frames or sum(1 for _ in decoded(container, stream))

    def get_frame_rate(self) -> Fraction:

        with opened(self.path) as container:
            return frame_rate(video_stream(container, self.path))

    def get_duration(self) -> float:
        """Seconds."""
        return float(self.get_frame_count() / self.get_frame_rate())

    def get_bit_depth(self) -> int:

        with opened(self.path) as container:
            return bit_depth(video_stream(container, self.path))

    def get_color_space(self) -> str:
        """sRGB, HDR (HLG), HDR PQ, or auto when the file does not say."""

        with opened(self.path) as container:
            transfer = int(video_stream(container, self.path).codec_context.color_trc or 0)
        # ITU-T H.273 transfer characteristics: 1 BT.709, 13 sRGB, 16 PQ, 18 HLG.
        return {1: "sRGB", 13: "sRGB", 16: "HDR PQ", 18: "HDR"}.get(transfer, "auto")

    def save_to(
        self,
        path: str | Path,
        format: str = "auto",
        codec: str = "auto",
        metadata: dict[str, Any] | None = None,
        crf: float | None = None,
    ) -> None:
        """Copy the streams when nothing asks for an encoding, else decode and encode, picture by picture."""
        save_video(self.path, Path(path), format, codec, metadata, crf)


def read_video(path: Path) -> VideoComponents:
    """Decode all frames, turned upright, and the last sound track. Raises ValueError for a file without pictures."""

    with opened(path) as container:
        stream = video_stream(container, path)
        stream.thread_type = "AUTO"
        rate = frame_rate(stream)
        metadata = {str(key): str(value) for key, value in container.metadata.items()}
        images = _pictures(container, stream, rate)
    if images is None:
        raise ValueError(f"{path.name} holds no picture that can be decoded.")
    return VideoComponents(images, rate, _read_audio(path), metadata)


def _pictures(container: Any, stream: Any, rate: Fraction) -> Tensor | None:
    """All pictures [N, H, W, 3] in 0..1; None when there is none."""
    deep = bit_depth(stream) > 8
    images: Tensor | None = None
    count = 0
    for frame in decoded(container, stream):
        host.current().check_interrupt()
        pixels = rgb_of(frame, frame.width, frame.height, deep=deep)
        if frame.rotation:
            pixels = np.rot90(pixels, k=round(frame.rotation / 90))
        if images is None:
            images = torch.empty(_announced(stream, rate), *pixels.shape)
        elif images.shape[1:] != pixels.shape:
            was, now = (f"{shape[1]}x{shape[0]}" for shape in (images.shape[1:], pixels.shape))
            raise ValueError(f"The film changes its size from {was} to {now}: scale it first.")
        if count == len(images):
            images = torch.cat((images, torch.empty_like(images[: max(1, count // 4)])))
        images[count] = torch.from_numpy(pixels.astype(np.float32) / (65535.0 if deep else 255.0))
        count += 1
    return images[:count] if images is not None else None


def _announced(stream: Any, rate: Fraction) -> int:
    """How many pictures to have room for, so that they need not be held twice: what the file says, if that can be."""
    likely = int(stream.duration * stream.time_base * rate) + 1 if stream.duration else 0
    said = stream.frames or likely
    return max(1, min(said, 2 * likely) if likely else min(said, UNLIKELY))


def _read_audio(path: Path) -> dict[str, Any] | None:

    with opened(path) as container:
        track = last_track(container)
        return waveform(decoded(container, track)) if track is not None else None
