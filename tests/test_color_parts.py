"""A part of a film for a trial: its frames, times, sound, numbers and shots, and that it is never taken for the whole."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from counted_films import RATE, counted, crash_at_the_third_segment, numbers, read_film, read_pictures
from film_files import frames, write_film
from hotpath.colorization import clip_job, file_job, film_part
from hotpath.colorization.film import FilmSession
from hotpath.colorization.film_options import FilmOptions, Reference, outside, read_references
from hotpath.colorization.film_part import Extent
from hotpath.colorization.video_file import VideoError, read_facts
from hotpath.colorization.video_frames import read_portions
from odd_films import packets, read, write

pytestmark = pytest.mark.usefixtures("colour_host")


def quiet(line: str) -> None:
    pass


def part_of(path: Path, extent: Extent, numbered: bool = False) -> tuple[film_part.PartStart, torch.Tensor, list[int]]:
    """Where a part begins, its pictures and its times."""
    facts = read_facts(path)
    start = film_part.find_start(path, facts, extent, numbered, None, False, quiet)
    _, stop = extent.ticks(path, facts)
    portions = list(read_portions(path, facts, 5, start.time, stop=stop))
    return start, torch.cat([each.frames for each in portions]), [time for each in portions for time in each.times]


def a_kind_of_film(folder: Path, kind: str) -> Path:
    if kind == "in a row":
        one, two = (
            write(folder / "a.ts", 30, sound=True, bf="2"),
            write(folder / "b.ts", 20, sound=True, first=5, bf="0"),
        )
        (folder / "in.ts").write_bytes(one.read_bytes() + two.read_bytes())
        return folder / "in.ts"
    path = folder / f"in{kind.partition(' ')[0]}"
    if path.suffix == ".mpg":
        return write(path, 40, codec="mpeg2video", bf="2", g="6")
    if path.suffix == ".avi":
        return write(path, 40, bf="3", g="12")
    uneven = [*range(12), *range(20, 60, 3), *range(61, 76)] if "uneven" in kind else None
    twice = [*range(20), *range(19, 39)] if "twice" in kind else uneven
    return write(path, 40, times=twice, bf="0" if twice else "2", g="7", sound=True)


KINDS = (".mp4", ".mkv", ".mov", ".ts", ".mp4 uneven", ".mkv uneven", ".mkv twice", ".avi", ".mpg", "in a row")


@pytest.mark.parametrize("kind", KINDS)
def test_a_part_is_the_frames_of_the_film_at_that_time(tmp_path: Path, kind: str) -> None:
    path = a_kind_of_film(tmp_path, kind)
    facts, pictures, times, _ = read(path)
    seconds = [(time - times[0]) * facts.time_base for time in times]
    for first, stop, numbered in ((0, 9, False), (13, 14, True), (17, 33, False), (26, len(times), False)):
        begin, end = (
            round(float(second), 3) for second in ([*seconds, Fraction(1000)][place] for place in (first, stop))
        )
        start, shown, at = part_of(path, Extent(begin, end - begin), numbered)
        chosen = [n for n, second in enumerate(seconds) if begin <= round(float(second), 3) < end]
        assert chosen and at == [times[n] for n in chosen]
        assert torch.equal(shown, pictures[chosen]) and start.frame == chosen[0]


def task(folder: Path, extent: Extent, frame: str = "", **changes: Any) -> tuple[file_job.FileJob, list[Reference]]:
    job = file_job.FileJob(
        folder / "in.mp4",
        extent.named(folder / "out.mp4"),
        FilmOptions(colour_size=32, **changes),
        quality=4,
        extent=extent,
    )
    return job, read_references([*counted(1)], frame)


def stopped(monkeypatch: pytest.MonkeyPatch, job: file_job.FileJob, references: list[Reference]) -> None:
    with monkeypatch.context() as crashing:
        crash_at_the_third_segment(crashing)
        with pytest.raises(RuntimeError, match="went away"):
            file_job.colorize_file(job, references)


def test_a_trial_leaves_the_whole_film_and_its_parts_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_job, "PART_FRAMES", 10)
    monkeypatch.setattr(clip_job, "PORTIONS", (10,))
    write_film(tmp_path / "in.mp4", counted(80), rate=RATE, crf=4)
    whole, references = task(tmp_path, Extent())
    stopped(monkeypatch, whole, references)
    left = {path.name: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert "out.mp4" in left and "00002.nut" in left

    trial, _ = task(tmp_path, Extent(1.5, 3))  # frames 18 to 53
    assert trial.output.name == "out.1.5s-4.5s.mp4"
    stopped(monkeypatch, trial, references)
    part = read_film(trial.output)
    assert numbers(part[0]) == list(range(18, 38)) and part[1][0] == 0
    report = file_job.colorize_file(trial, references)
    assert "continued: after 20 frames that were finished before" in report
    assert "part: 1.5s-4.5s, frames 18 to 53 of in.mp4" in report and "was an example" not in report
    pictures, times, sound = read_film(trial.output)
    _, all_times, all_sound = read_film(whole.source)
    assert numbers(pictures) == list(range(18, 54)) and times == [time - all_times[18] for time in all_times[18:54]]
    # Sound begins with the first packet of the part: of 64 ms, the first of which the decoder cannot know.
    behind = round(16000 * float(packets(trial.output)[1][0][2]))
    assert 0 <= behind < 1024 and abs(behind + sound.shape[1] - 3 * 16000) <= 1024
    heard, given = sound[0, 2048:], all_sound[0, 24000 + behind + 2048 :][: sound.shape[1] - 2048]
    assert (heard - given).abs().max() < 0.05
    now = {path.name: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path != trial.output}
    assert now == left
    assert "continued: after 21 frames" in file_job.colorize_file(whole, references)
    assert numbers(read_pictures(whole.output)) == list(range(80)) and trial.output.exists()


def test_a_part_from_the_beginning_is_the_whole_film_s(tmp_path: Path) -> None:
    write_film(tmp_path / "in.mp4", counted(30), rate=RATE, crf=4, sound=False)
    whole, references = task(tmp_path, Extent())
    trial, _ = task(tmp_path, Extent(0, 1))
    for job in (whole, trial):
        file_job.colorize_file(job, references)
    one, other = read_pictures(whole.output)[:12], read_pictures(trial.output)
    assert len(other) == 12 and (one.float() - other.float()).abs().mean() < 1


def shots_film(path: Path) -> None:
    """Shots of 30, 17, 25 and 20 frames."""
    shots = (counted(30), counted(17, 30, 0.45), counted(25, 47), counted(20, 72, 0.45))
    write_film(path, torch.cat(shots), rate=RATE, crf=4, sound=False)


def test_cuts_and_shots_of_a_part_are_those_of_the_film(tmp_path: Path) -> None:
    """Also a cut right behind its beginning, where a film that began there would have none yet."""
    pytest.importorskip("scenedetect")
    shots_film(tmp_path / "in.mp4")
    facts = read_facts(tmp_path / "in.mp4")
    for first, shot, cuts in ((42, 1, [47, 72]), (47, 1, [47, 72]), (48, 2, [72])):
        for from_the_first in (False, True):
            extent = Extent(round(first / RATE, 3))
            start = film_part.find_start(tmp_path / "in.mp4", facts, extent, False, 27.0, from_the_first, quiet)
            assert (start.frame, start.shot) == (first, shot if from_the_first else 0) and start.detector is not None
            (portion,) = read_portions(tmp_path / "in.mp4", facts, 99, start.time)
            assert [first + cut for cut in start.detector.cuts(portion.frames)] == cuts


def test_a_part_that_was_stopped_right_behind_its_beginning_finds_the_cuts_of_the_film(tmp_path: Path) -> None:
    pytest.importorskip("scenedetect")
    shots_film(tmp_path / "in.mp4")
    facts = read_facts(tmp_path / "in.mp4")
    start = film_part.find_start(tmp_path / "in.mp4", facts, Extent(3.5), False, 27.0, False, quiet)
    (portion,) = read_portions(tmp_path / "in.mp4", facts, 99, start.time)
    options = FilmOptions(colour_size=16, shots="reset")
    loaded = clip_job.load_method(options)
    with loaded.resident() as network:
        stopped, again = (
            FilmSession(network, loaded, options, read_references([*counted(1)]), 40, 56) for _ in range(2)
        )
        stopped.start_at(start.frame, start.shot, start.detector)
        stopped.colorize(portion.frames[:2])
        again.load(stopped.state())
        again.colorize(portion.frames[2:])
    assert again.cuts == [47, 72]


def test_references_of_a_part_are_frames_of_the_film(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("scenedetect")
    shots_film(tmp_path / "in.mp4")
    references = read_references([*frames(3, seed=5)], "0, 50, 91")
    job, _ = task(tmp_path, Extent(4, 2), shots="reference per shot")  # frames 48 to 71, of the third shot
    seen: list[Any] = []
    known = FilmSession._known
    monkeypatch.setattr(FilmSession, "_known", lambda self, *asked: seen.append(known(self, *asked)) or seen[-1])
    assert "shots: 3; cuts at" not in (report := file_job.colorize_file(job, references)) and "shots: 3" in report
    # The third reference is the third shot's, and none of this part's frames.
    assert not any(seen) and "Reference 3 is frame 91, counted from 0, and this part has the frames 48 to 71" in report
    seen.clear()
    references = read_references([*frames(3, seed=5)], "0, 91, 50")
    report = file_job.colorize_file(job, references)
    assert [(place, reference.frame) for found in seen for place, reference in found.items()][:1] == [(2, 50)]
    assert "Reference 1 is frame 0" in report and "Reference 3 is" not in report
    assert len(outside(references, 48, 60, "Deep Exemplar")) == 1


@pytest.mark.parametrize(
    ("extent", "says"),
    [
        ((9, 1), r"in\.mp4 has no frame at or after second 9: choose a smaller start_seconds\."),
        ((0.01, 0.02), r"in\.mp4 has no frame in 0\.01s-0\.03s: choose more seconds\."),
    ],
)
def test_a_part_without_frames_is_refused(tmp_path: Path, extent: tuple[float, float], says: str) -> None:
    write_film(tmp_path / "in.mp4", counted(6), rate=RATE, sound=False)
    job, references = task(tmp_path, Extent(*extent))
    with pytest.raises(VideoError, match=says):
        file_job.colorize_file(job, references)
    assert [path.name for path in tmp_path.iterdir()] == ["in.mp4"]


def test_what_is_no_time_is_refused() -> None:
    for values, name in (((-1, 0), "start_seconds"), ((0, math.nan), "seconds"), ((math.inf, 1), "start_seconds")):
        with pytest.raises(ValueError, match=f"^{name} must be 0 or more"):
            Extent(*values)
    assert Extent(0, 0.0004).whole and str(Extent(0.1, 0.2)) == "0.1s-0.3s" and str(Extent(7200.125)) == "7200.125s-end"
