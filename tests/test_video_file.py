"""Video files that are damaged, put in a row or of strange clocks: no frame is lost, doubled or out of step."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import av
import pytest
import torch
from hotpath.colorization import video_assembly, video_clock, video_parts
from hotpath.colorization.video_file import Irregularities, VideoError, read_facts
from hotpath.vision_language.pictures import read_clip
from odd_films import gaps, numbers, packets, read, through, write


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


@pytest.mark.parametrize("tag", [None, "NUMBER_OF_FRAMES-eng"])
def test_frames_are_not_counted_by_a_longer_sound(tmp_path: Path, tag: str | None) -> None:
    """Nor is the time that is left."""
    write(tmp_path / "short.mkv")
    write(tmp_path / "long.mkv", 99, sound=True)
    with (
        av.open(str(tmp_path / "in.mkv"), "w") as target,
        av.open(str(tmp_path / "short.mkv")) as film,
        av.open(str(tmp_path / "long.mkv")) as heard,
    ):
        made = [target.add_stream_from_template(each) for each in (film.streams.video[0], heard.streams.audio[0])]
        if tag is not None:
            made[0].metadata[tag] = "24"
        for stream, packets_of in zip(made, (film.demux(video=0), heard.demux(audio=0)), strict=True):
            for packet in packets_of:
                if packet.size:
                    packet.stream = stream
                    target.mux(packet)
    assert read_facts(tmp_path / "in.mkv").frames == 24


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
    with pytest.raises(VideoError, match="PyAV has no encoder libx999 here: install the one of PyPI"):
        video_parts.check_container(source, tmp_path / "out.mp4", tmp_path, facts, "libx999", 4)


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
    assert len(read_clip(source, 25).frames) >= 20, "a model looks at the others, too"


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


@pytest.mark.parametrize(
    ("ending", "codec", "bframes", "keys"), [(".mkv", "mpeg4", "2", "12"), (".avi", "ffv1", "0", "4")]
)
def test_a_place_among_uneven_frames_is_found_again(
    tmp_path: Path, ending: str, codec: str, bframes: str, keys: str
) -> None:
    """Behind a key frame come those that are shown before it, and an AVI counts dropped frames otherwise after a seek."""
    uneven = [0, 1, 8, 10, 11, 12, 14, 15, 16, 17, 18, 25, 26, 33, 34, 35, 42, 49, 50, 52, 53, 54, 61, 63, 64, 71, 72]
    source = write(tmp_path / f"in{ending}", 27, codec=codec, times=uneven, bf=bframes, g=keys, rate=12, sound=True)
    _, pictures, times, _ = read(source)
    for first in range(12, 26, 2):
        _, rest, later, _ = read(source, times[first])
        assert later == times[first:] and torch.equal(rest, pictures[first:])


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


def sound_shifts(monkeypatch: pytest.MonkeyPatch, order: list[tuple[str, int]]) -> list[float]:
    """Seconds by which each packet of sound is moved. order: stream and milliseconds of packets, of 40 ms of the film and of
    20 ms of sound."""
    streams = {
        kind: SimpleNamespace(index=index, type=kind, time_base=Fraction(1, 1000))
        for index, kind in enumerate(("video", "audio"))
    }
    given = [
        SimpleNamespace(
            stream=streams[kind], pts=time, dts=time, duration=40 if kind == "video" else 20, is_discard=False
        )
        for kind, time in order
    ]
    monkeypatch.setattr(video_clock, "demuxed", lambda *_: iter(given))
    container = SimpleNamespace(format=SimpleNamespace(name="mpegts", flags=0))
    facts = SimpleNamespace(time_base=Fraction(1, 1000), lead=0, step=40)
    told = list(video_clock.beside(container, streams["video"], [streams["audio"]], facts, Irregularities()))
    assert [packet for packet, _ in told] == [packet for packet in given if packet.stream is streams["audio"]]
    return [float(shift) for _, shift in told]


@pytest.mark.parametrize(
    ("late", "moved"),
    [((), 0), ((920, 940, 960), 0), ((920, *range(940, 2480, 20)), 52)],
    ids=["its sound leaps with it", "sound of before comes late", "its sound does not leap"],
)
def test_sound_of_before_a_leap_stays_where_it_was(
    monkeypatch: pytest.MonkeyPatch, late: tuple[int, ...], moved: int
) -> None:
    """The film's clock starts again after 25 frames; sound comes after its leap."""
    after = [("video", time) for time in range(0, 4000, 40)]
    for index, time in enumerate((*late, 0, 20, 40)):
        after.insert(2 * index + 1, ("audio", time))
    before = [*(("audio", time) for time in range(0, 920, 20)), *(("video", time) for time in range(0, 1000, 40))]
    stays = 46 + len(late) - moved
    assert sound_shifts(monkeypatch, before + after) == [0.0] * stays + [1.0] * (moved + 3)


@pytest.mark.parametrize("follows", [True, False])
def test_sound_that_leaps_first_waits_for_the_film(monkeypatch: pytest.MonkeyPatch, follows: bool) -> None:
    """For some frames; leaps of its own mean nothing."""
    before = [(kind, time) for time in range(0, 6000, 40) for kind in ("video", "audio")]
    film = range(6000, 6080, 40) if follows else range(6000, 12000, 40)
    after = [("audio", 0), ("audio", 20), *(("video", time) for time in film)]
    if follows:
        after += [("video", 0), ("audio", 40)]
    shifts = sound_shifts(monkeypatch, before + after)
    assert shifts == [0.0] * 150 + ([6.08] * 3 if follows else [0.0] * 2)


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
