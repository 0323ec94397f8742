"""Film files that are stopped and killed: by shots, with no frame lost or doubled, and with their sound."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from counted_films import RATE, counted, file_task, numbers, read_film, read_pictures, save_reference
from film_files import write_film
from hotpath import host
from hotpath.colorization import file_job, film
from hotpath.colorization.film_options import FilmOptions
from hotpath.colorization.manifest import FinishedPart, Manifest, read_manifest
from hotpath.colorization.shots import ShotDetector
from hotpath.colorization.video_parts import PartWriter
from torch import Tensor

# A film in another process, with short parts, which waits in the middle to be killed.
KILLED = """
import sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from hotpath import host
from hotpath.colorization import file_job, film
from hotpath.colorization.film_options import FilmOptions
from hotpath.host.headless import HeadlessHost
host.use(HeadlessHost(models=Path(sys.argv[1]), device="cpu", show_progress=False))
file_job.PART_FRAMES = 20
colour = film.FilmSession.colour
def slowly(self, *parts):
    while len(list(folder.glob("*/*.nut"))) > 4:
        time.sleep(0.1)
    time.sleep(0.3)
    return colour(self, *parts)
film.FilmSession.colour = slowly
folder = Path(sys.argv[2])
file_job.colorize_file_by_path(
    folder / "in.mp4", folder / "out.mp4", [folder / "r.png"], FilmOptions(colour_size=32), quality=4
)
"""


pytestmark = pytest.mark.usefixtures("colour_host")


@pytest.mark.long
def test_a_killed_process_costs_one_part_and_no_frame(
    tmp_path: Path, colorizer_files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_film(tmp_path / "in.mp4", counted(130), rate=RATE, crf=4)
    save_reference(tmp_path)
    folder, output = tmp_path / "out.mp4.parts", tmp_path / "out.mp4"
    running = subprocess.Popen([sys.executable, "-c", KILLED, str(colorizer_files), str(tmp_path)])
    try:
        deadline = time.monotonic() + 60
        while running.poll() is None and time.monotonic() < deadline:
            named = folder / "manifest.json"
            if named.is_file() and len(json.loads(named.read_text())["parts"]) >= 2:
                break
            time.sleep(0.02)
        assert running.poll() is None, "the film was done before it could be killed"
    finally:
        running.send_signal(signal.SIGKILL)
        running.wait()
    found = json.loads((folder / "manifest.json").read_text())["parts"]
    assert 41 <= found[-1]["stop"] < 130 and not output.exists()
    # What the crash left half done is there, and counts for nothing.
    (folder / f"{len(found) + 1:05d}.nut").write_bytes(b"half a part")

    monkeypatch.setattr(file_job, "PART_FRAMES", 20)
    again = (tmp_path / "in.mp4", output, [tmp_path / "r.png"], FilmOptions(colour_size=32))
    report = file_job.colorize_file_by_path(*again, quality=4)
    assert f"continued: after {found[-1]['stop']} frames that were finished before" in report
    resumed = read_film(output)
    output.unlink()
    file_job.colorize_file_by_path(*again, quality=4)
    whole, source = read_film(output), read_film(tmp_path / "in.mp4")
    assert numbers(resumed[0]) == list(range(130))
    assert resumed[1] == whole[1] == source[1]
    assert torch.equal(resumed[2], source[2])
    assert torch.equal(resumed[0], whole[0])


def shots_film(path: Path) -> None:
    """Three shots of 30, 45 and 25 frames."""
    parts = (counted(30), counted(45, 30, 0.45), counted(25, 75))
    write_film(path, torch.cat(parts), rate=RATE, crf=4)


def test_parts_are_shots_and_long_shots_are_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("scenedetect")
    monkeypatch.setattr(file_job, "PART_FRAMES", 40)
    shots_film(tmp_path / "in.mp4")
    job, references = file_task(tmp_path, shots="reset")
    seen: list[FinishedPart] = []
    add = Manifest.add

    def noted(self: Manifest, folder: Path, part: FinishedPart, next_time: int | None) -> None:
        seen.append(part)
        add(self, folder, part, next_time)

    monkeypatch.setattr(Manifest, "add", noted)
    report = file_job.colorize_file(job, references)
    assert "shots: 3; cuts at 30, 75" in report
    assert [(p.first, p.stop, p.shot, p.ends_shot) for p in seen] == [
        (0, 30, 0, True), (30, 75, 1, True), (75, 100, 2, True)
    ]  # fmt: skip
    whole = read_film(job.output)
    assert numbers(whole[0]) == list(range(100))
    seen.clear()
    monkeypatch.setattr(file_job, "PART_FRAMES", 15)
    file_job.colorize_file(job, references)
    assert [(p.first, p.stop, p.shot, p.ends_shot) for p in seen] == [
        (0, 21, 0, False), (21, 30, 0, True), (30, 61, 1, False), (61, 75, 1, True), (75, 100, 2, True)
    ]  # fmt: skip
    assert Manifest("", seen).cuts(2) == [30, 75] and Manifest("", seen[:2]).cuts(1) == [30]
    # Where a long shot is split shows nowhere: only the encoder starts anew.
    split = read_film(job.output)
    assert split[1] == whole[1] and (split[0].float() - whole[0].float()).abs().mean() < 0.6


@pytest.mark.long
@pytest.mark.parametrize("stop", [2, 4])
def test_resume_begins_with_the_shot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int) -> None:
    pytest.importorskip("scenedetect")
    shots_film(tmp_path / "in.mp4")
    job, references = file_task(tmp_path, shots="reset", temporal_smoothing=0.5)
    file_job.colorize_file(job, references)
    whole = read_film(job.output)
    job.output.unlink()
    colour = film.FilmSession.colour
    calls = [0]

    def crash(self: film.FilmSession, *parts: Any) -> Any:
        calls[0] += 1
        if calls[0] == stop:
            raise MemoryError("the machine went away")
        return colour(self, *parts)

    with monkeypatch.context() as broken:
        broken.setattr(film.FilmSession, "colour", crash)
        broken.setattr(file_job._FileRun, "_stop", lambda *_: None)  # as if killed
        with pytest.raises(MemoryError):
            file_job.colorize_file(job, references)
    if stop == 4:
        # Segments are 21, 9, 11, 20, ... frames: one shot is finished, the next one was under way.
        part = read_film(job.output)
        assert numbers(part[0]) == list(range(30))
        assert part[2].shape[1] / 16000 <= 30 / RATE + 0.2
    else:
        assert not job.output.exists()
    resumed_report = file_job.colorize_file(job, references)
    assert ("continued: after 30 frames that were finished before" in resumed_report) == (stop == 4)
    assert "shots: 3; cuts at 30, 75" in resumed_report
    resumed = read_film(job.output)
    assert resumed[1] == whole[1] and numbers(resumed[0]) == list(range(100))
    assert torch.equal(resumed[2], whole[2])
    assert (resumed[0].float() - whole[0].float()).abs().mean() < 0.1


@pytest.mark.parametrize("place", [1, 30, 31, 41, 42, 52])
def test_detection_goes_on_where_it_stopped(place: int) -> None:
    """Also right at a cut, and so near behind one that a second cut is held back."""
    pytest.importorskip("scenedetect")
    frames = torch.cat((counted(30), counted(11, 0, 0.45), counted(11), counted(20, 0, 0.45)))
    whole = ShotDetector()
    cuts = whole.cuts(frames)
    assert cuts == [30, 52]
    first, second = ShotDetector(), ShotDetector()
    seen = first.segments(frames[:place])[-1].seen
    assert seen is not None
    second.go_on(place, max([cut for cut in cuts if cut < place], default=0), seen)
    assert [place + cut for cut in second.cuts(frames[place:])] == [cut for cut in cuts if cut >= place]
    if place in cuts:
        # The shot was begun before the film stopped: it is not begun again.
        third = ShotDetector()
        third.go_on(place, place, seen)
        assert [place + cut for cut in third.cuts(frames[place:])] == [cut for cut in cuts if cut > place]


def test_interrupt_keeps_what_is_done_and_comes_within_a_second(
    tmp_path: Path, colour_host: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While frames take 60 ms each: it is looked for between two frames, not between two portions."""
    from hotpath.colorization.colormnet import session

    write_film(tmp_path / "in.mp4", counted(60), rate=RATE, crf=4)
    job, references = file_task(tmp_path)
    decode = session.ColorMNetEngine.near

    def slow(self: Any, *tensors: Tensor) -> Tensor:
        time.sleep(0.06 * len(tensors[0]))
        return decode(self, *tensors)

    monkeypatch.setattr(session.ColorMNetEngine, "near", slow)
    asked = [0.0]

    def stop() -> None:
        asked[0] = time.monotonic()
        colour_host.stop()

    # In the second portion: one is finished.
    colour, calls = film.FilmSession.colour, [0]

    def timed(self: film.FilmSession, *parts: Any) -> Any:
        calls[0] += 1
        if calls[0] == 2:
            threading.Timer(0.2, stop).start()
        return colour(self, *parts)

    monkeypatch.setattr(film.FilmSession, "colour", timed)
    with pytest.raises(host.Interrupted):
        file_job.colorize_file(job, references)
    assert asked[0] > 0 and time.monotonic() - asked[0] < 1.0
    part = read_film(job.output)
    assert numbers(part[0]) == list(range(21))
    monkeypatch.setattr(session.ColorMNetEngine, "near", decode)
    monkeypatch.setattr(film.FilmSession, "colour", colour)
    assert "continued: after 21 frames" in file_job.colorize_file(job, references)
    assert numbers(read_film(job.output)[0]) == list(range(60))


def test_an_interrupt_while_a_part_is_closed_costs_nothing(
    tmp_path: Path, colour_host: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_job, "PART_FRAMES", 20)
    write_film(tmp_path / "in.mp4", counted(60), rate=RATE, crf=4)
    job, references = file_task(tmp_path)
    close, closed = PartWriter.close, []

    def slowly(self: PartWriter) -> None:
        if not closed:  # a stop that nobody meets any more would be the next run's
            colour_host.stop()
        closed.append(self)
        time.sleep(0.3)
        close(self)

    with monkeypatch.context() as flushing:
        flushing.setattr(file_job, "check_container", lambda *_: None)
        flushing.setattr(PartWriter, "close", slowly)
        with pytest.raises(host.Interrupted):
            file_job.colorize_file(job, references)
    done = numbers(read_pictures(job.output))
    assert done == list(range(len(done))) and len(done) >= 21
    assert f"continued: after {len(done)} frames" in file_job.colorize_file(job, references)
    assert numbers(read_pictures(job.output)) == list(range(60))


def test_manifest_names_only_what_is_there(tmp_path: Path) -> None:
    manifest = Manifest("this film")
    for number in (1, 2):
        manifest.part_file(tmp_path, number).write_bytes(b"part")
        manifest.state_file(tmp_path, number).write_bytes(b"state")
        manifest.add(tmp_path, FinishedPart(10 * number - 10, 10 * number, 0, False), 10 * number)
    again = read_manifest(tmp_path, "this film")
    assert again == manifest and again.frames == 20 and again.next_time == 20
    assert not manifest.state_file(tmp_path, 1).exists()
    assert read_manifest(tmp_path, "another film") is None
    manifest.part_file(tmp_path, 1).unlink()
    assert read_manifest(tmp_path, "this film") is None
    (tmp_path / "manifest.json").write_text('{"key": "this film", "parts": [{"first"')
    assert read_manifest(tmp_path, "this film") is None


def test_sound_that_does_not_fit_is_named(tmp_path: Path) -> None:
    write_film(tmp_path / "in.mp4", counted(3), rate=RATE, crf=4)
    job, references = file_task(tmp_path)
    webm = file_job.FileJob(job.source, tmp_path / "out.webm", job.options, codec="libvpx-vp9", quality=30)
    try:
        report = file_job.colorize_file(webm, references)
    except Exception as error:  # this build of ffmpeg has no VP9
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))
    assert ".webm cannot hold the film's aac sound" in report
