"""Colours of decoded and of encoded frames, by the formulas of their matrices, with the PyAV that is installed and older."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
import torch
from hotpath.colorization import video_parts
from hotpath.colorization.video_file import VideoFacts
from hotpath.colorization.video_frames import to_rgb
from hotpath.colorization.video_hdr import to_sdr
from hotpath.headless import video_encoding
from hotpath.host.frame_pixels import rgb_of
from hotpath.vision_language.pictures import read_clip
from odd_films import read
from older_frames import Frame16, Frame17
from packaging.version import Version

WEIGHTS = {
    1: (0.2126, 0.0722),
    4: (0.30, 0.11),
    5: (0.299, 0.114),
    6: (0.299, 0.114),
    7: (0.212, 0.087),
    9: (0.2627, 0.0593),
}
HEIGHT, WIDTH = 48, 64
LEVELS = (120, 150, 90)
# Older PyAV is played by the one that is installed, where that is none itself.
PLAYED = {"16": Frame16, "17": Frame17} if Version(av.__version__) >= Version("18") else {}
RELEASES = [
    pytest.param(lambda frame: frame, id="installed"),
    *(pytest.param(kind, id=name) for name, kind in PLAYED.items()),
]


def frame_of(form: str, matrix: int, limited: bool, levels: tuple[int, ...] = LEVELS) -> Any:
    frame = av.VideoFrame(WIDTH, HEIGHT, form)
    deep = frame.format.components[0].bits - 8
    kind = np.uint16 if deep else np.uint8
    for plane, level in zip(frame.planes, levels, strict=True):
        plane.update(np.full(plane.buffer_size // np.dtype(kind).itemsize, level << deep, kind).tobytes())
    frame.colorspace, frame.color_range = matrix, 1 if limited else 2
    return frame


def facts(matrix: int, **more: Any) -> VideoFacts:
    return VideoFacts(HEIGHT, WIDTH, 1, Fraction(25), Fraction(1, 25), matrix=matrix, rotation=0, **more)


def shown(levels: tuple[int, ...], matrix: int, limited: bool) -> np.ndarray[Any, Any]:
    """Red, green and blue in 0..255."""
    red, blue = WEIGHTS[matrix]
    black, y_range, range_ = (16, 219, 224) if limited else (0, 255, 255)
    y, u, v = (levels[0] - black) / y_range, (levels[1] - 128) / range_, (levels[2] - 128) / range_
    r, b = y + 2 * (1 - red) * v, y + 2 * (1 - blue) * u
    return np.clip([r, (y - red * r - blue * b) / (1 - red - blue), b], 0, 1) * 255


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("form", ["yuv420p", "yuv444p", "yuvj420p", "yuv420p10le"])
@pytest.mark.parametrize("limited", [True, False])
def test_colours_are_those_of_the_matrix_and_the_range(release: Any, form: str, limited: bool) -> None:
    for matrix in WEIGHTS:
        frame = release(frame_of(form, matrix, limited))
        wanted = shown(LEVELS, matrix, limited and form != "yuvj420p")
        picture = to_rgb(frame, facts(matrix), SimpleNamespace())  # type: ignore[arg-type]
        assert np.abs(picture[20, 20].numpy() - wanted).max() < 3, matrix
        pixels = rgb_of(frame, WIDTH, HEIGHT, deep=True)
        assert pixels.shape == (HEIGHT, WIDTH, 3) and pixels.dtype == np.uint16
        assert np.abs(pixels[20, 20] / 257 - wanted).max() < 3, matrix


@pytest.mark.parametrize("release", RELEASES)
def test_hdr_keeps_its_colours(release: Any) -> None:
    codes = np.round(shown(LEVELS, 9, True) * 257).astype(np.uint16)[None, None]
    picture = to_rgb(release(frame_of("yuv420p10le", 9, True)), facts(9, transfer=16), SimpleNamespace())  # type: ignore[arg-type]
    assert np.abs(picture[20, 20].numpy().astype(int) - to_sdr(codes, 16)[0, 0]).max() < 5


@pytest.mark.parametrize("release", RELEASES)
def test_a_film_that_says_nothing_has_the_matrix_that_it_is_taken_for(release: Any) -> None:
    picture = to_rgb(release(frame_of("yuv420p", 2, True)), facts(1), SimpleNamespace())  # type: ignore[arg-type]
    assert (picture[20, 20] - torch.from_numpy(shown(LEVELS, 1, True))).abs().max() < 3


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("light", [0, 3, 9, 10, 22])
def test_light_that_nobody_knows_does_not_count(release: Any, light: int) -> None:
    plain = frame_of("yuv420p", 1, True)
    if not hasattr(plain, "color_trc"):
        pytest.skip("frames of this PyAV say nothing of light")
    plain.color_primaries = plain.color_trc = light
    assert np.abs(rgb_of(release(plain), WIDTH, HEIGHT)[20, 20] - shown(LEVELS, 1, True)).max() < 3


def test_reserved_light_of_a_broadcast_is_read(tmp_path: Path) -> None:
    path = tmp_path / "in.ts"
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("mpeg2video", rate=25, options={"qmax": "2"})
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        context = stream.codec_context
        context.color_primaries, context.color_trc, context.colorspace = 3, 3, 1
        for time in range(9):
            frame = frame_of("yuv420p", 1, True)
            frame.pts = time
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    told, pictures, _, _ = read(path)
    assert (told.primaries, told.transfer, len(pictures)) == (3, 3, 9)
    for picture in (pictures[4].numpy(), read_clip(path).frames[0]):
        assert np.abs(picture[20, 20] - shown(LEVELS, 1, True)).max() < 5


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("matrix", WEIGHTS)
def test_a_part_is_written_in_the_matrix_that_it_is_said_to_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, release: Any, matrix: int
) -> None:
    writer = video_parts.PartWriter(tmp_path / "a.nut", facts(matrix), "libx264", 1)
    written: list[Any] = []
    monkeypatch.setattr(
        writer, "_stream", SimpleNamespace(pix_fmt="yuv444p", encode=lambda frame=None: written.append(frame))
    )
    monkeypatch.setattr(writer, "_container", SimpleNamespace(mux=lambda _: None, close=lambda: None))
    made = av.VideoFrame.from_ndarray
    monkeypatch.setattr(av, "VideoFrame", SimpleNamespace(from_ndarray=lambda *a, **k: release(made(*a, **k))))
    colour = (180, 60, 90)
    writer.write(torch.tensor(colour, dtype=torch.uint8).expand(1, HEIGHT, WIDTH, 3).contiguous(), [0])
    levels = tuple(bytes(plane)[0] for plane in written[0].planes)
    assert np.abs(shown(levels, matrix, True) - colour).max() < 4


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("form", ["yuv420p", "yuvj420p"])
def test_colours_that_a_source_tells_are_told_again(release: Any, form: str) -> None:
    context = SimpleNamespace(color_primaries=1, color_trc=1, colorspace=1, color_range=2 if form == "yuvj420p" else 1)
    writer = SimpleNamespace(pixel_format="yuv420p", pictures=SimpleNamespace(codec_context=SimpleNamespace()))
    frame = release(frame_of(form, 1, form == "yuv420p"))
    made = video_encoding._recoloured(frame, SimpleNamespace(codec_context=context), writer, 1, begin=True)  # type: ignore[arg-type]
    told = writer.pictures.codec_context
    assert (told.color_primaries, told.color_trc, told.colorspace) == (1, 1, 1)
    assert told.color_range == int(made.color_range)
    pixels = rgb_of(made, WIDTH, HEIGHT)
    assert np.abs(pixels[20, 20] - shown(LEVELS, 1, form == "yuv420p")).max() < 4


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("form", ["yuv420p", "yuvj420p", "yuv422p"])
def test_a_full_range_that_is_not_told_becomes_narrow(release: Any, form: str) -> None:
    context = SimpleNamespace(color_primaries=2, color_trc=2, colorspace=2, color_range=2)
    writer = SimpleNamespace(pixel_format="yuv420p", pictures=SimpleNamespace(codec_context=SimpleNamespace()))
    frame = release(frame_of(form, 5, False))
    made = video_encoding._recoloured(frame, SimpleNamespace(codec_context=context), writer, 2, begin=True)  # type: ignore[arg-type]
    made.color_range = 1
    assert np.abs(rgb_of(made, WIDTH, HEIGHT, 5)[20, 20] - shown(LEVELS, 5, False)).max() < 4
