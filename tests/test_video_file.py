"""Video files as people have them: damaged, put in a row, interlaced, mirrored, HDR, with chapters and subtitles."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from hotpath.colorization import video_assembly, video_frames, video_parts
from hotpath.colorization.video_file import Irregularities, VideoError, VideoFacts, open_video, read_facts
from hotpath.headless.video import read_video
from hotpath.vision_language.pictures import read_clip
from PIL import Image
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


def test_a_source_called_as_what_is_unfinished_is_not_written_over(tmp_path: Path) -> None:
    source = write(tmp_path / "film.unfinished.mp4")
    before = source.read_bytes()
    assert through(source, tmp_path / "film.mp4") == []
    assert source.read_bytes() == before and len(read(tmp_path / "film.mp4")[1]) == 24
    assert {path.name for path in tmp_path.iterdir()} >= {"film.unfinished.mp4", "film.mp4"}
    assert not list(tmp_path.glob("*unfinished-2*"))


@pytest.mark.parametrize("rate", [25, Fraction(24000, 1001)])
@pytest.mark.parametrize("ending", [".mkv", ".mp4"])
def test_the_rate_stays(tmp_path: Path, rate: Fraction | int, ending: str) -> None:
    source = write(tmp_path / "in.mkv", rate=rate)
    assert through(source, tmp_path / f"out{ending}") == []
    facts = read_facts(tmp_path / f"out{ending}")
    # Times in Matroska are whole milliseconds.
    assert abs(facts.rate / rate - 1) < 0.001 and abs(facts.frames - 24) <= 1


def test_a_container_that_changes_the_rate_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "in.mkv")
    monkeypatch.setattr(video_assembly, "average_rate", lambda stream: Fraction(1000))
    facts = read_facts(source)
    if not through_states_rates(tmp_path):
        pytest.skip("this PyAV does not write the rate into Matroska")
    with pytest.raises(VideoError, match=r"\.mkv file cannot hold .*25 frames a second became 1000 in a trial"):
        video_parts.check_container(source, tmp_path / "out.mkv", tmp_path, facts, "libx264", 4)


def through_states_rates(folder: Path) -> bool:
    """From PyAV 18 on a copied stream's rate is written."""
    part = write(folder / "part.nut", 3)
    with av.open(str(part)) as first, av.open(str(folder / "stated.mkv"), "w") as target:
        made = target.add_stream_from_template(first.streams.video[0], rate=Fraction(7))
        for packet in first.demux(video=0):
            if packet.size:
                packet.stream = made
                target.mux(packet)
    with av.open(str(folder / "stated.mkv")) as container:
        return container.streams.video[0].average_rate == 7


def test_a_film_that_the_encoder_cannot_take_is_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "in.mp4", 3)
    facts = replace(read_facts(source), height=16, width=20000)
    with pytest.raises(VideoError, match="cannot hold this film as libx264"):
        video_parts.check_container(source, tmp_path / "out.mp4", tmp_path, facts, "libx264", 4)


@pytest.mark.parametrize("place", [10, 22])
def test_a_damaged_packet_costs_its_frame(tmp_path: Path, place: int) -> None:
    """Also among the last ones, which a decoder on several threads holds when the file ends."""
    source = write(tmp_path / "in.mp4", bf="0", g="4")
    position, size, _ = packets(source)[0][place]
    data = bytearray(source.read_bytes())
    data[position : position + size] = bytes(size)
    source.write_bytes(data)
    facts, _, times, found = read(source)
    assert [round(time / facts.step) for time in times] == [number for number in range(24) if number != place]
    assert "in.mp4 is damaged: 1 frame was left out that could not be decoded." in found.notes(source.name)
    assert through(source, tmp_path / "out.mp4") and len(read(tmp_path / "out.mp4")[1]) == 23


def test_a_film_whose_end_is_damaged_goes_on_without_a_frame_twice(tmp_path: Path) -> None:
    source = write(tmp_path / "in.mp4", bf="2")
    position, size, _ = packets(source)[0][22]
    data = bytearray(source.read_bytes())
    data[position : position + size] = bytes(size)
    source.write_bytes(data)
    times = read(source)[2]
    assert read(source, times[-1])[2] == times[-1:]


def test_a_place_in_a_program_stream_is_found_again(tmp_path: Path) -> None:
    source = write(tmp_path / "in.mpg", 40, codec="mpeg2video", bf="2", g="6")
    _, pictures, times, _ = read(source)
    _, rest, later, _ = read(source, times[31])
    assert later == times[31:] and torch.equal(rest, pictures[31:])


def test_broken_sound_costs_no_film(tmp_path: Path) -> None:
    source = write(tmp_path / "in.ts", sound=True)
    data = bytearray(source.read_bytes())
    heads = [place for place in range(len(data) - 4) if data[place : place + 3] == b"\xff\xf1\x60"]
    assert len(heads) > 5
    # A checksum and two blocks, which nothing takes apart.
    data[heads[4] + 1] &= 0xFE
    data[heads[4] + 6] |= 1
    source.write_bytes(data)
    notes = through(source, tmp_path / "out.mkv")
    assert any("packets of its sound or subtitles were left out" in note for note in notes)
    assert numbers(read(tmp_path / "out.mkv")[1]) == list(range(24))


def test_nothing_that_decodes_is_named(tmp_path: Path) -> None:
    source = write(tmp_path / "in.mp4", 8)
    data = bytearray(source.read_bytes())
    for position, size, _ in packets(source)[0]:
        data[position : position + size] = bytes(size)
    source.write_bytes(data)
    with pytest.raises(VideoError, match=r"in\.mp4 has no frame that can be decoded: it is damaged"):
        read_facts(source)


def test_two_frames_of_one_time_follow_each_other(tmp_path: Path) -> None:
    source = write(tmp_path / "in.mkv", times=[*range(10), *range(9, 23)], bf="0")
    facts, pictures, times, found = read(source)
    assert numbers(pictures) == list(range(24)) and found.lifted == 1
    assert times[10] == times[9] + 1 and (times[11] - times[9]) * facts.time_base == Fraction(1, 25)
    assert "in.mkv repeats times: 1 frame was moved behind the one before." in through(source, tmp_path / "out.mkv")
    assert numbers(read(tmp_path / "out.mkv")[1]) == list(range(24))


@pytest.mark.parametrize("pyramid", ["none", "normal"])
def test_frames_of_an_avi_are_as_far_apart_as_they_were(tmp_path: Path, pyramid: str) -> None:
    """It has the times of decoding only; with B-frames that is another order."""
    source = write(tmp_path / "in.avi", **{"b-pyramid": pyramid, "bf": "3", "g": "12"})
    facts, pictures, times, found = read(source)
    assert numbers(pictures) == list(range(24)) and not found.lifted
    assert {later - time for time, later in pairwise(times)} == {facts.step}
    for first in (5, 13, 23):
        _, rest, later, _ = read(source, times[first])
        assert later == times[first:] and torch.equal(rest, pictures[first:])


def in_a_row(folder: Path) -> Path:
    """Two transport streams of 30 and 20 frames, one after the other; the second one's clock starts again."""
    one = write(folder / "a.ts", 30, sound=True, first=0, bf="2")
    two = write(folder / "b.ts", 20, sound=True, first=5, bf="0")
    (folder / "in.ts").write_bytes(one.read_bytes() + two.read_bytes())
    return folder / "in.ts"


@pytest.mark.parametrize("ending", [".mp4", ".mkv"])
def test_files_in_a_row_have_one_clock_for_pictures_and_sound(tmp_path: Path, ending: str) -> None:
    source = in_a_row(tmp_path)
    alone = packets(tmp_path / "b.ts")
    notes = through(source, tmp_path / f"out{ending}")
    assert any("The clock of in.ts leaps" in note for note in notes)
    _, pictures, _, _ = read(tmp_path / f"out{ending}")
    assert numbers(pictures) == [*range(30), *range(5, 25)]
    made = packets(tmp_path / f"out{ending}")
    seen, heard = ([time for _, _, time in made[index]] for index in (0, 1))
    assert gaps(seen) < 0.09 and gaps(heard) < 0.2
    # The second file's sound is beside its pictures as it was.
    apart = max(time for *_, time in alone[1]) - max(time for *_, time in alone[0])
    assert max(heard) - max(seen) == pytest.approx(apart, abs=0.002)


def test_a_place_in_files_in_a_row_is_found_again(tmp_path: Path) -> None:
    source = in_a_row(tmp_path)
    _, pictures, times, _ = read(source)
    for first in (12, 30, 41):
        _, rest, later, _ = read(source, times[first])
        assert later == times[first:] and torch.equal(rest, pictures[first:])


def test_a_recording_that_goes_on_hours_later_has_no_gap(tmp_path: Path) -> None:
    """In a container whose clock may leap; elsewhere a long gap is a picture that stands."""
    source = write(tmp_path / "in.ts", times=[*range(12), *range(90000, 90012)], bf="0")
    assert gaps([time * read_facts(source).time_base for time in read(source)[2]]) < 0.05
    still = write(tmp_path / "still.mkv", times=[*range(12), *range(900, 912)], bf="0")
    facts, _, times, found = read(still)
    assert gaps([time * facts.time_base for time in times]) > 35 and not found.notes("still.mkv")


def test_a_film_that_begins_before_0_stays_in_step(tmp_path: Path) -> None:
    """As a broadcast whose clock starts again after some frames; parts know no times before 0."""
    source = tmp_path / "in.ts"
    with (
        av.open(str(write(tmp_path / "whole.mp4", sound=True, g="5"))) as whole,
        av.open(str(source), "w", options={"avoid_negative_ts": "disabled"}) as target,
    ):
        streams = [target.add_stream_from_template(stream) for stream in whole.streams]
        for packet in whole.demux():
            if packet.size:
                later = Fraction(2, 5) / packet.time_base
                packet.pts, packet.dts = round(packet.pts - later), round(packet.dts - later)
                packet.stream = streams[packet.stream.index]
                target.mux(packet)
    _, pictures, times, _ = read(source)
    assert times[0] == 0
    _, rest, later_on, _ = read(source, times[13])
    assert later_on == times[13:] and torch.equal(rest, pictures[13:])
    through(source, tmp_path / "out.mkv")
    given, made = packets(source), packets(tmp_path / "out.mkv")
    assert gaps([time for *_, time in made[0]]) < 0.05
    apart, kept = (max(time for *_, time in found[1]) - max(time for *_, time in found[0]) for found in (given, made))
    assert kept == pytest.approx(apart, abs=0.002)


def test_a_coarse_clock_can_tell_frames_apart(tmp_path: Path) -> None:
    """An AVI's clock ticks once a frame: moving frames by whole ticks would part them from the sound."""
    source = write(tmp_path / "in.avi", codec="mpeg4")
    assert read_facts(source).time_base < Fraction(1, 1000)


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
