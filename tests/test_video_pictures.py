"""Pictures in video files: sizes, ranges, fields, HDR, turned and mirrored; and titles, subtitles and covers beside them."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from hotpath.colorization.video_file import VideoFacts, open_video, read_facts
from hotpath.headless.video import read_video
from hotpath.vision_language.pictures import read_clip
from odd_films import HEIGHT, WIDTH, numbers, picture, read, through, write
from PIL import Image


def test_a_size_that_changes_is_scaled(tmp_path: Path) -> None:
    write(tmp_path / "a.ts", 10)
    write(tmp_path / "b.ts", 10, size=(64, 96), times=list(range(10, 20)), bf="0", first=10)
    source = tmp_path / "in.ts"
    source.write_bytes((tmp_path / "a.ts").read_bytes() + (tmp_path / "b.ts").read_bytes())
    _, pictures, _, found = read(source)
    assert pictures.shape == (20, HEIGHT, WIDTH, 3) and numbers(pictures) == list(range(20))
    assert "in.ts changes its size: 10 frames were scaled to that of the first one." in found.notes(source.name)


@pytest.mark.parametrize(("form", "deep"), [("gray", 0), ("gray10le", 2), ("gray16le", 8)])
@pytest.mark.parametrize("limited", [True, False])
def test_grey_of_limited_range_is_expanded(tmp_path: Path, form: str, deep: int, limited: bool) -> None:
    source = tmp_path / "in.mkv"
    levels = (np.arange(WIDTH) * 255 // (WIDTH - 1)).astype(np.uint16)
    with av.open(str(source), "w") as container:
        stream: Any = container.add_stream("ffv1", rate=25)
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, form
        stream.codec_context.color_range = 1 if limited else 2
        frame = av.VideoFrame(WIDTH, HEIGHT, form)
        kind = np.uint8 if deep == 0 else np.uint16
        rows = np.zeros((HEIGHT, frame.planes[0].line_size // np.dtype(kind).itemsize), kind)
        rows[:, :WIDTH] = (levels << deep).astype(kind)
        frame.planes[0].update(rows.tobytes())
        frame.color_range, frame.pts = 1 if limited else 2, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    _, pictures, _, _ = read(source)
    wanted = np.clip((levels.astype(float) - 16) * 255 / 219, 0, 255) if limited else levels.astype(float)
    assert np.abs(pictures[0, 5, :, 1].numpy() - wanted).max() <= 1


def rich(path: Path) -> Path:
    """Two tracks of sound in two languages, subtitles, chapters and a title."""
    path.with_suffix(".srt").write_text("1\n00:00:00,100 --> 00:00:00,500\nGood evening.\n\n", encoding="utf-8")
    plain = write(path.with_name("plain.mkv"), sound=True)
    with (
        av.open(str(plain)) as film,
        av.open(str(path.with_suffix(".srt"))) as words,
        av.open(str(path), "w") as target,
    ):
        pairs = {
            ("film", 0): target.add_stream_from_template(film.streams.video[0]),
            ("film", 1): target.add_stream_from_template(film.streams.audio[0]),
            ("again", 1): target.add_stream_from_template(film.streams.audio[0]),
            ("words", 0): target.add_stream_from_template(words.streams.subtitles[0]),
        }
        for made, language, title in zip(
            pairs.values(), ("", "eng", "fra", "deu"), ("", "one", "two", ""), strict=True
        ):
            made.metadata.update({"language": language, "title": title} if language else {})
        target.metadata["title"] = "A film"
        if hasattr(target, "set_chapters"):
            pairs["again", 1].disposition = 1 << 2 | 1 << 7  # original, hearing impaired
            second = {"id": 2, "start": 500, "end": 960, "time_base": Fraction(1, 1000), "metadata": {"title": "Two"}}
            target.set_chapters([{**second, "id": 1, "start": 0, "end": 500, "metadata": {"title": "One"}}, second])
        for name, container in (("words", words), ("film", film)):
            for packet in container.demux():
                if packet.size:
                    packet.stream = pairs[name, packet.stream.index]
                    target.mux(packet)
        with av.open(str(plain)) as again:
            for packet in again.demux(audio=0):
                if packet.size:
                    packet.stream = pairs["again", 1]
                    target.mux(packet)
    return path


@pytest.mark.parametrize("newer", [False, True])
def test_titles_in_any_encoding_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, newer: bool) -> None:
    plain = av.open
    with plain(str(tmp_path / "in.mkv"), "w") as target:
        stream: Any = target.add_stream("mpeg4", rate=25)
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        target.metadata["title"] = "A film" if newer else "A f__m"
        target.mux(stream.encode(av.VideoFrame(WIDTH, HEIGHT, "yuv420p")))
        target.mux(stream.encode())
    content = (tmp_path / "in.mkv").read_bytes().replace(b"A f__m", b"A f\xefm ")
    (tmp_path / "in.mkv").write_bytes(content)
    if newer:  # PyAV 19 has no argument for it
        monkeypatch.setattr(av, "open", lambda path, mode="r": plain(path, mode))
    with open_video(tmp_path / "in.mkv") as container:
        assert container.metadata["title"].startswith("A f")
    assert read_clip(tmp_path / "in.mkv").frames.shape == (1, HEIGHT, WIDTH, 3)
    assert read_video(tmp_path / "in.mkv").images.shape == (1, HEIGHT, WIDTH, 3)


def test_subtitles_chapters_languages_and_titles_stay(tmp_path: Path) -> None:
    assert through(rich(tmp_path / "in.mkv"), tmp_path / "out.mkv") == []
    with av.open(str(tmp_path / "in.mkv")) as source, av.open(str(tmp_path / "out.mkv")) as made:
        assert [stream.type for stream in made.streams] == ["video", "audio", "audio", "subtitle"]
        for one, other in zip(source.streams, made.streams, strict=True):
            assert [one.metadata.get(name) for name in ("language", "title")] == [
                other.metadata.get(name) for name in ("language", "title")
            ]
            assert getattr(one, "disposition", 0) == getattr(other, "disposition", 0)
        assert made.metadata["title"] == "A film"
        if hasattr(made, "chapters"):
            assert [chapter["metadata"]["title"] for chapter in made.chapters()] == ["One", "Two"]
        assert [bytes(p) for p in made.demux(subtitles=0) if p.size] == [b"Good evening."]


@pytest.mark.parametrize("ending", [".mp4", ".ts"])
def test_what_a_container_cannot_hold_is_named(tmp_path: Path, ending: str) -> None:
    notes = through(rich(tmp_path / "in.mkv"), tmp_path / f"out{ending}")
    lost = "cannot hold the film's srt subtitles (deu), which are left out; choose another ending, such as .mkv."
    assert f"{ending} {lost}" in notes
    chapters = hasattr(av.container.OutputContainer, "set_chapters") and ending == ".ts"
    assert any("the film's chapters" in note for note in notes) == chapters and len(notes) == 1 + chapters


@pytest.mark.parametrize(
    ("codec", "ending", "kept"),
    [
        ("pcm_s16le", ".mp4", True),  # whose header wants to know which channels they are
        ("opus", ".mov", False),  # refused with the header
        ("pcm_s16le", ".ts", False),  # taken as data that nobody could find again
        ("mp3", ".ts", True),
        ("mp3", ".m4v", False),
    ],
)
def test_sound_that_a_container_cannot_hold_costs_no_film(tmp_path: Path, codec: str, ending: str, kept: bool) -> None:
    with av.open(str(tmp_path / "in.mkv"), "w") as film:
        stream: Any = film.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        voice: Any = film.add_stream("libopus" if codec == "opus" else codec, rate=48000, layout="stereo")
        wave = (np.sin(np.arange(19200) / 6) * 9000).astype(np.int16)[None]
        heard = av.AudioFrame.from_ndarray(wave, format="s16", layout="stereo")
        heard.sample_rate, heard.pts, heard.time_base = 48000, 0, Fraction(1, 48000)
        for track, contents in (
            (stream, [av.VideoFrame(WIDTH, HEIGHT, "yuv420p") for _ in range(8)]),
            (voice, [heard]),
        ):
            for content in (*contents, None):
                film.mux(track.encode(content))
    notes = through(tmp_path / "in.mkv", tmp_path / f"out{ending}")
    with av.open(str(tmp_path / f"out{ending}")) as made:
        assert len(made.streams.audio) == kept
    lost = f"{ending} cannot hold the film's {codec} sound, which is left out; choose another ending, such as .mkv."
    assert notes == ([] if kept else [lost])


def test_covers_are_no_films_and_fonts_stay(tmp_path: Path) -> None:
    if not hasattr(av.container.OutputContainer, "add_attachment"):
        pytest.skip("this PyAV cannot attach files")
    plain = write(tmp_path / "plain.mkv", 9)
    Image.fromarray(picture(0, 80, 80)).save(tmp_path / "cover.jpg")
    with av.open(str(plain)) as film, av.open(str(tmp_path / "in.mkv"), "w") as target:
        target.add_attachment("cover.jpg", "image/jpeg", (tmp_path / "cover.jpg").read_bytes())
        target.add_attachment("a.ttf", "font/ttf", b"a font")
        made = target.add_stream_from_template(film.streams.video[0])
        for packet in film.demux(video=0):
            if packet.size:
                packet.stream = made
                target.mux(packet)
    assert through(tmp_path / "in.mkv", tmp_path / "out.mkv") == ["The film's cover picture is left out."]
    assert read_facts(tmp_path / "out.mkv").height == HEIGHT
    with av.open(str(tmp_path / "out.mkv")) as container:
        assert [(each.name, each.data) for each in container.streams.attachments] == [("a.ttf", b"a font")]


def test_sound_that_is_announced_and_not_sent_costs_no_film(tmp_path: Path) -> None:
    source = write(tmp_path / "in.ts", 300, sound=True, sound_from=9, size=(16, 64), bf="0")
    assert through(source, tmp_path / "out.mp4") == ["The film's aac sound begins late or never, and is left out."]


@pytest.mark.parametrize("fields", ["tff", "bff", ""])
@pytest.mark.parametrize("ending", [".mkv", ".mp4"])
def test_an_interlaced_film_stays_so(tmp_path: Path, fields: str, ending: str) -> None:
    flags = {"flags": "+ildct+ilme"} if fields else {}
    source = write(tmp_path / "in.mpg", codec="mpeg2video", container="vob", fields=fields, **flags)
    notes = through(source, tmp_path / f"out{ending}")
    assert read_facts(source).fields == read_facts(tmp_path / f"out{ending}").fields == fields
    assert any("in.mpg is interlaced, and so is the coloured film" in note for note in notes) == bool(fields)


def test_an_encoder_without_fields_is_told(tmp_path: Path) -> None:
    facts = VideoFacts(48, 64, 9, Fraction(25), Fraction(1, 1000), 5, 0, fields="tff")
    assert "is interlaced and the coloured film is marked as progressive" in facts.notes("in.mpg", "libx265")[0]


def hdr(path: Path, transfer: int, matrix: int, code: int) -> Path:
    """A film of one level of 10 bits, in FFV1, which keeps tags."""
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("ffv1", rate=25)
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p10le"
        context = stream.codec_context
        context.color_primaries, context.color_trc, context.colorspace, context.color_range = 9, transfer, matrix, 1
        for time in range(9):
            frame = av.VideoFrame(WIDTH, HEIGHT, "yuv420p10le")
            for plane, level in zip(frame.planes, (code, 512, 512), strict=True):
                plane.update(np.full(plane.buffer_size // 2, level, np.uint16).tobytes())
            frame.pts, frame.colorspace, frame.color_range = time, matrix, 1
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def test_hdr_becomes_sdr_and_says_so(tmp_path: Path) -> None:
    from hotpath.colorization import video_hdr
    from hotpath.colorization.video_hdr import to_sdr

    source = hdr(tmp_path / "in.mkv", 16, 9, 509)  # PQ of 100 cd/m²
    notes = through(source, tmp_path / "out.mkv")
    assert any("in.mkv is HDR (PQ); the coloured film is SDR" in note for note in notes)
    made = read_facts(tmp_path / "out.mkv")
    assert (made.matrix, made.primaries, made.transfer, made.hdr) == (1, 1, 1, False)
    # 100 cd/m² are a little over half of SDR's white; 10 lie below the knee and stay what they are.
    assert 180 < read(source)[1][0].float().mean() < 230
    codes = np.array([[[0] * 3, [19641] * 3, [49271] * 3, [65535] * 3]], np.uint16)  # 0, 10, 1000 and 10000 cd/m²
    assert to_sdr(codes, 16)[0, :, 0].tolist() == [0, pytest.approx(255 * 0.1 ** (1 / 2.4), abs=1), 255, 255]
    assert np.allclose(
        video_hdr._scene_light(np.array([0, 0.25, 0.5, 0.5 + 1e-9, 1])), [0, 1 / 48, 1 / 12, 1 / 12, 1], atol=1e-6
    )
    nits = np.array([0.0, 1, 100, 1000, 10000])
    assert np.allclose(video_hdr._from_pq(video_hdr._to_pq(nits)), nits, atol=1e-6)
    levels = to_sdr(np.arange(0, 65536, 64, dtype=np.uint16)[None, :, None].repeat(3, 2), 18)[0]
    assert (np.diff(levels[:, 0].astype(int)) >= 0).all() and levels[0, 0] == 0 and levels[-1, 0] == 255
    assert (levels[:, 0] == levels[:, 1]).all() and (levels[:, 0] == levels[:, 2]).all()


def test_colours_of_sdr_are_told_as_they_were(tmp_path: Path) -> None:
    source = hdr(tmp_path / "in.mkv", 14, 9, 502)
    assert through(source, tmp_path / "out.mkv") == []
    one, other = read_facts(source), read_facts(tmp_path / "out.mkv")
    wanted = (9, 9, 14)
    assert (one.matrix, one.primaries, one.transfer) == (other.matrix, other.primaries, other.transfer) == wanted
    assert (read(source)[1].float() - read(tmp_path / "out.mkv")[1].float()).abs().max() <= 2


@pytest.mark.parametrize(
    ("matrix", "shown"),
    [
        ((1, 0, 0, 1), lambda x: x),
        ((0, 1, -1, 0), lambda x: torch.rot90(x, 3, (1, 2))),
        ((-1, 0, 0, -1), lambda x: torch.rot90(x, 2, (1, 2))),
        ((0, -1, 1, 0), lambda x: torch.rot90(x, 1, (1, 2))),
        ((-1, 0, 0, 1), lambda x: x.flip(2)),
        ((1, 0, 0, -1), lambda x: x.flip(1)),
        ((0, 1, 1, 0), lambda x: x.transpose(1, 2)),
        ((0, -1, -1, 0), lambda x: torch.rot90(x, 2, (1, 2)).transpose(1, 2)),
    ],
)
def test_turned_and_mirrored_films_come_out_as_they_are_shown(
    tmp_path: Path, matrix: tuple[int, ...], shown: Any
) -> None:
    source = write(tmp_path / "in.mp4", 6)
    plain = read(source)[1]
    data = bytearray(source.read_bytes())
    place = data.find(b"tkhd") + 4 + 4 + 4 * 5 + 8 + 2 * 4
    a, b, c, d = (value << 16 for value in matrix)
    data[place : place + 36] = b"".join(
        value.to_bytes(4, "big", signed=True) for value in (a, b, 0, c, d, 0, 0, 0, 1 << 30)
    )
    source.write_bytes(data)
    facts, pictures, _, _ = read(source)
    assert torch.equal(pictures, shown(plain)) and (facts.height, facts.width) == pictures.shape[1:3]
