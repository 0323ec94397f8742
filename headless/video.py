"""Video values, read and written with PyAV, with the methods that ComfyUI's VIDEO objects have.

`VideoFile` is a file that is decoded when its frames are asked for; `VideoFrames` holds pictures, sound and a rate.
Both answer `get_components()`, `get_dimensions()`, `get_frame_rate()` and `save_to()`, so a node that takes a VIDEO
works the same with them and inside ComfyUI.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import host

log = logging.getLogger("hotpath.headless")

ENCODERS = {"h264": "libx264", "av1": "libsvtav1"}
SUFFIXES = {"auto": ".mp4", "mp4": ".mp4", "mkv": ".mkv", "webm": ".webm"}
MAX_RATE_DENOMINATOR = 65535
AUDIO_BLOCK = 1024


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
        import av

        with av.open(str(self.path)) as container:
            stream = _video_stream(container, self.path)
            turned = next((frame.rotation // 90 % 2 for frame in container.decode(stream)), 0)
            size = (stream.width, stream.height)
        return (size[1], size[0]) if turned else size

    def get_frame_count(self) -> int:
        import av

        with av.open(str(self.path)) as container:
            stream = _video_stream(container, self.path)
            return stream.frames or sum(1 for _ in container.decode(stream))

    def get_frame_rate(self) -> Fraction:
        import av

        with av.open(str(self.path)) as container:
            return _rate(_video_stream(container, self.path))

    def get_duration(self) -> float:
        """Seconds."""
        return float(self.get_frame_count() / self.get_frame_rate())

    def get_bit_depth(self) -> int:
        import av

        with av.open(str(self.path)) as container:
            return _bit_depth(_video_stream(container, self.path))

    def get_color_space(self) -> str:
        """sRGB, HDR (HLG), HDR PQ, or auto when the file does not say."""
        import av

        with av.open(str(self.path)) as container:
            transfer = int(_video_stream(container, self.path).codec_context.color_trc or 0)
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
        """Copy the streams when nothing asks for an encoding, else decode and encode."""
        target = Path(path)
        if codec == "auto" and crf is None and self.path.suffix.lower() == target.suffix.lower():
            copy_video(self.path, target, metadata)
        else:
            write_video(target, self.get_components(), format, codec, metadata, crf, self.get_bit_depth())


def read_video(path: Path) -> VideoComponents:
    """Decode all frames, turned upright, and the first sound track. Raises ValueError for a file without pictures."""
    import av

    with av.open(str(path)) as container:
        stream = _video_stream(container, path)
        stream.thread_type = "AUTO"
        deep = _bit_depth(stream) > 8
        frames: list[Tensor] = []
        rate = _rate(stream)
        metadata = {str(key): str(value) for key, value in container.metadata.items()}
        for frame in container.decode(stream):
            host.current().check_interrupt()
            pixels = frame.to_ndarray(format="rgb48le" if deep else "rgb24")
            if frame.rotation:
                pixels = np.rot90(pixels, k=round(frame.rotation / 90)).copy()
            scale = 65535.0 if deep else 255.0
            frames.append(torch.from_numpy(pixels.astype(np.float32) / scale))
    if not frames:
        raise ValueError(f"{path.name} holds no picture that can be decoded.")
    return VideoComponents(torch.stack(frames), rate, _read_audio(path), metadata)


def _read_audio(path: Path) -> dict[str, Any] | None:
    import av

    with av.open(str(path)) as container:
        stream = next((s for s in container.streams.audio if s.codec_context is not None), None)
        if stream is None:
            return None
        resampler = av.AudioResampler(format="fltp")
        blocks = [block.to_ndarray() for frame in container.decode(stream) for block in resampler.resample(frame)]
        rate = stream.rate
    if not blocks:
        return None
    return {"waveform": torch.from_numpy(np.concatenate(blocks, axis=1))[None], "sample_rate": rate}


def write_video(
    path: Path,
    components: VideoComponents,
    format: str = "auto",
    codec: str = "auto",
    metadata: dict[str, Any] | None = None,
    crf: float | None = None,
    bit_depth: int = 8,
) -> None:
    """Encode pictures and sound; an odd side gets one more row or column, because the codecs need even ones."""
    import av

    webm = path.suffix.lower() == ".webm"
    if codec == "auto":
        codec = "av1" if webm else "h264"
    if codec not in ENCODERS:
        raise ValueError(f"There is no video codec {codec!r} here; choose one of: auto, {', '.join(ENCODERS)}.")
    if webm and codec != "av1":
        raise ValueError("A webm file holds AV1 video; choose the codec av1 or auto.")
    images = components.images
    height, width = images.shape[1:3]
    even_height, even_width = height + height % 2, width + width % 2
    if (even_height, even_width) != (height, width):
        log.info("%s: %dx%d becomes %dx%d; video needs even sides.", path.name, width, height, even_width, even_height)
    rate = components.frame_rate.limit_denominator(MAX_RATE_DENOMINATOR)
    with av.open(str(path), "w", options=_container_options(path)) as out:
        _set_metadata(out, components.metadata, metadata)
        stream: Any = out.add_stream(ENCODERS[codec], rate=rate)
        stream.width, stream.height = even_width, even_height
        stream.pix_fmt = "yuv420p10le" if bit_depth > 8 else "yuv420p"
        # BT.709 and narrow range, by their numbers in ITU-T H.273.
        stream.codec_context.color_primaries = stream.codec_context.colorspace = 1
        stream.codec_context.color_trc, stream.codec_context.color_range = 13, 1
        if crf is not None:
            stream.options = {"crf": str(crf)}
        sound: Any = None
        if components.audio is not None:
            channels = components.audio["waveform"].shape[1]
            sound = out.add_stream("libopus" if webm else "aac", rate=int(components.audio["sample_rate"]))
            sound.layout = "mono" if channels == 1 else "stereo"
        for image in images:
            host.current().check_interrupt()
            frame = _frame(image, even_height, even_width, bit_depth)
            for packet in stream.encode(frame):
                out.mux(packet)
        for packet in stream.encode():
            out.mux(packet)
        if sound is not None:
            _write_audio(out, sound, components.audio or {})


def _frame(image: Tensor, height: int, width: int, bit_depth: int) -> Any:
    import av

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


def _write_audio(out: Any, stream: Any, audio: dict[str, Any]) -> None:
    import av

    wave = audio["waveform"][0].detach().float().cpu()
    wave = wave if wave.shape[0] <= 2 else wave[:2]
    layout = "mono" if wave.shape[0] == 1 else "stereo"
    samples = np.ascontiguousarray(wave.numpy())
    for start in range(0, samples.shape[1], AUDIO_BLOCK):
        block = np.ascontiguousarray(samples[:, start : start + AUDIO_BLOCK])
        frame = av.AudioFrame.from_ndarray(block, format="fltp", layout=layout)
        frame.sample_rate = int(audio["sample_rate"])
        frame.pts = start
        for packet in stream.encode(frame):
            out.mux(packet)
    for packet in stream.encode():
        out.mux(packet)


def copy_video(source: Path, target: Path, metadata: dict[str, Any] | None) -> None:
    """Copy video and sound packets unchanged into a new file, with `metadata` added."""
    import av

    with av.open(str(source)) as container, av.open(str(target), "w", options=_container_options(target)) as out:
        _set_metadata(out, {str(k): str(v) for k, v in container.metadata.items()}, metadata)
        copies = {
            stream.index: out.add_stream_from_template(stream, opaque=True)
            for stream in (*container.streams.video, *container.streams.audio)
            if stream.codec_context is not None
        }
        for packet in container.demux():
            if packet.dts is not None and packet.stream.index in copies:
                packet.stream = copies[packet.stream.index]
                out.mux(packet)


def _container_options(path: Path) -> dict[str, str]:
    # MP4 drops keys it does not know, such as "prompt", unless it is told to keep them.
    return {"movflags": "use_metadata_tags+faststart"} if path.suffix.lower() in (".mp4", ".mov") else {}


def _set_metadata(container: Any, old: dict[str, str] | None, new: dict[str, Any] | None) -> None:
    for key, value in {**(old or {}), **(new or {})}.items():
        container.metadata[key] = value if isinstance(value, str) else json.dumps(value)


def _video_stream(container: Any, path: Path) -> Any:
    if not container.streams.video:
        raise ValueError(f"{path.name} holds no video.")
    return container.streams.video[0]


def _rate(stream: Any) -> Fraction:
    return Fraction(stream.average_rate or stream.guessed_rate or 1)


def _bit_depth(stream: Any) -> int:
    components = stream.format.components if stream.format is not None else ()
    return max((component.bits for component in components), default=8)
