"""Film files while something breaks: crashes, full disks, broken films; no frame is lost or doubled."""

from __future__ import annotations

import errno
import json
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from counted_films import (
    RATE,
    counted,
    crash_at_the_third_segment,
    file_task,
    finished_before,
    numbers,
    read_film,
    read_pictures,
    read_times,
    sound_packets,
)
from film_files import write_film
from hotpath.colorization import file_job, shot_job, video_file
from hotpath.colorization.film_options import FilmOptions
from hotpath.colorization.playable_part import finished_so_far
from hotpath.colorization.video_file import VideoError
from hotpath.colorization.video_parts import PartWriter

pytestmark = pytest.mark.usefixtures("colour_host")


def test_crash_costs_one_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(file_job, "PART_FRAMES", 20)
    write_film(tmp_path / "in.mp4", counted(66), rate=RATE, crf=4)
    job, references = file_task(tmp_path)
    calls = crash_at_the_third_segment(monkeypatch)
    with pytest.raises(RuntimeError, match="went away"):
        file_job.colorize_file(job, references)
    found = json.loads((tmp_path / "out.mp4.parts" / "manifest.json").read_text())
    assert [part["stop"] for part in found["parts"]] == [21, 41]
    assert numbers(read_film(job.output)[0]) == list(range(41))
    # The way the same is computed, and options of the other method, may be others by now.
    same, _ = file_task(tmp_path, local_attention="banded", propagate=False, shot_threshold=99.0)
    report = file_job.colorize_file(same, references)
    assert "continued: after 41 frames" in report and "starts anew" not in caplog.text
    assert numbers(read_film(job.output)[0]) == list(range(66))
    # Other options: nothing of the old work may be used.
    calls[0] = 1
    with pytest.raises(RuntimeError, match="went away"):
        file_job.colorize_file(file_task(tmp_path)[0], references)
    changed, _ = file_task(tmp_path, strength=0.0)
    assert "continued" not in file_job.colorize_file(changed, references)
    assert "out.mp4.parts holds 21 frames of another film, reference, option" in caplog.text
    assert read_film(job.output)[0].float().std(-1).mean() < 3


def test_a_stop_leaves_the_whole_film_of_an_earlier_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_job, "PART_FRAMES", 20)
    job, references, partial = finished_before(tmp_path)
    whole, said = job.output.read_bytes(), list[str]()
    calls = crash_at_the_third_segment(monkeypatch)
    for done in (41, 61):
        with pytest.raises(RuntimeError, match="went away"):
            file_job.colorize_file(job, references, said.append)
        assert job.output.read_bytes() == whole and finished_so_far(job.output) == partial
        assert numbers(read_film(partial)[0]) == list(range(done))
        assert f"the {done} frames that are finished are in out.partial.mp4, because out.mp4 was there" in said[-1]
        calls[0] = 1
    # Not the film any more: what is finished may have its name.
    job.output.unlink()
    calls[0] = 2
    with pytest.raises(RuntimeError, match="went away"):
        file_job.colorize_file(job, references, said.append)
    assert finished_so_far(job.output) == job.output and not partial.exists() and "because" not in said[-1]
    assert "continued: after 61 frames" in file_job.colorize_file(job, references)
    assert numbers(read_film(job.output)[0]) == list(range(66))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.mp4", "out.mp4"]


@pytest.mark.long
def test_what_a_stop_left_goes_when_the_film_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_job, "PART_FRAMES", 20)
    job, references, partial = finished_before(tmp_path)
    partial.write_bytes(b"somebody's")
    whole = job.output.read_bytes()
    crash_at_the_third_segment(monkeypatch)
    with pytest.raises(RuntimeError, match="went away"):
        file_job.colorize_file(job, references)
    assert job.output.read_bytes() == whole and partial.read_bytes() == b"somebody's"
    assert finished_so_far(job.output) == tmp_path / "out.mp4.parts"
    partial.unlink()
    with monkeypatch.context() as broken:
        crash_at_the_third_segment(broken)
        with pytest.raises(RuntimeError, match="went away"):
            file_job.colorize_file(file_task(tmp_path, strength=0.25)[0], references)
    assert numbers(read_film(partial)[0]) == list(range(41))
    file_job.colorize_file(job, references)
    assert job.output.read_bytes() != whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.mp4", "out.mp4"]


def test_parts_that_no_video_could_be_made_of_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_job, "PART_FRAMES", 20)
    write_film(tmp_path / "in.mp4", counted(66), rate=RATE, crf=4)
    job, references = file_task(tmp_path)
    assert finished_so_far(job.output) is None
    calls = crash_at_the_third_segment(monkeypatch)
    with pytest.raises(RuntimeError, match="went away"):
        file_job.colorize_file(job, references)
    assert finished_so_far(job.output) == job.output
    calls[0] = 1

    def full(*_: Any, **__: Any) -> list[str]:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(file_job, "assemble", full)
    with pytest.raises(RuntimeError, match="went away"):
        file_job.colorize_file(job, references)
    # The video there is the one of the first stop, and has fewer frames.
    assert numbers(read_film(job.output)[0]) == list(range(41))
    assert finished_so_far(job.output) == tmp_path / "out.mp4.parts"


@pytest.mark.parametrize("ending", [".ts", ".h264"])
def test_streams_that_cannot_be_sought_lose_no_frame(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    """A transport stream is sought too far, a raw one not at all."""
    monkeypatch.setattr(file_job, "PART_FRAMES", 20)
    write_film(tmp_path / f"in{ending}", counted(60), sound=ending == ".ts", rate=RATE, crf=4)
    _, references = file_task(tmp_path)
    job = file_job.FileJob(tmp_path / f"in{ending}", tmp_path / "out.mp4", FilmOptions(colour_size=32), quality=4)
    crash_at_the_third_segment(monkeypatch)
    with pytest.raises(RuntimeError, match="went away"):
        file_job.colorize_file(job, references)
    assert "continued: after 41 frames" in file_job.colorize_file(job, references)
    assert numbers(read_pictures(job.output)) == list(range(60))


@pytest.mark.parametrize("place", [35, pytest.param(50, marks=pytest.mark.long)])
def test_a_broken_film_goes_on_as_if_never_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: int) -> None:
    """Two transport streams in a row, the second one's clock starting again, before or after the film stops; a packet of
    each is lost."""
    monkeypatch.setattr(file_job, "PART_FRAMES", 20)
    data = b""
    for name, first, count in (("a", 0, place), ("b", place, 70 - place)):
        write_film(tmp_path / f"{name}.ts", counted(count, first), rate=RATE, crf=4)
        packets = bytearray((tmp_path / f"{name}.ts").read_bytes())
        middle = len(packets) // 188 // 2 * 188
        data += packets[:middle] + packets[middle + 188 :]
    (tmp_path / "in.ts").write_bytes(data)
    _, references = file_task(tmp_path)
    job = file_job.FileJob(tmp_path / "in.ts", tmp_path / "out.mp4", FilmOptions(colour_size=32), quality=4)
    assert "The clock of in.ts leaps" in file_job.colorize_file(job, references)
    whole, heard = read_times(job.output), sound_packets(job.output)
    job.output.unlink()
    with monkeypatch.context() as broken:
        crash_at_the_third_segment(broken)
        with pytest.raises(RuntimeError, match="went away"):
            file_job.colorize_file(job, references)
    assert numbers(read_pictures(job.output))[:10] == list(range(10))
    assert "continued: after 41 frames" in file_job.colorize_file(job, references)
    resumed = read_times(job.output)
    assert resumed[1] == whole[1] and len(whole[1]) >= 68 and torch.equal(resumed[0], whole[0])
    assert max(b - a for a, b in pairwise(whole[1])) < 4 / RATE
    assert sound_packets(job.output) == heard


@pytest.mark.parametrize("failing", [2, pytest.param(4, marks=pytest.mark.long)])
def test_a_disk_that_fills_loses_no_frame(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int) -> None:
    """Whatever is queued behind the frames that were not written must not count."""
    monkeypatch.setattr(file_job, "PART_FRAMES", 20)
    write_film(tmp_path / "in.mp4", counted(120), rate=RATE, crf=4)
    job, references = file_task(tmp_path)
    write, calls = PartWriter.write, [0]

    def full(self: PartWriter, *parts: Any) -> None:
        calls[0] += 1
        time.sleep(0.02)
        if calls[0] == failing:
            raise OSError(28, "No space left on device")
        write(self, *parts)

    with monkeypatch.context() as small:
        small.setattr(file_job, "check_container", lambda *_: None)
        small.setattr(PartWriter, "write", full)
        with pytest.raises(OSError, match="No space left"):
            file_job.colorize_file(job, references)
    done = 1 + 20 * (failing - 1)
    assert numbers(read_film(job.output)[0]) == list(range(done))
    assert f"continued: after {done} frames" in file_job.colorize_file(job, references)
    assert numbers(read_film(job.output)[0]) == list(range(120))


def test_a_shot_on_a_disk_that_fills_leaves_nothing_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_film(tmp_path / "in.mp4", counted(4), rate=RATE, crf=4)
    job, references = file_task(tmp_path, shots="reset")
    job = replace(job, output=tmp_path / "shot.nut")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def fails(self: PartWriter) -> None:
        self._container.close()
        raise RuntimeError("closing failed as well")

    with monkeypatch.context() as small:
        small.setattr(PartWriter, "write", full)
        small.setattr(PartWriter, "close", fails)
        with pytest.raises(OSError, match="No space left"):
            shot_job.colorize_shot(job, references, shot_job.Shot(0, 4))
    with pytest.raises(ValueError, match="ends at frame 4, before frame 9"):
        shot_job.colorize_shot(job, references, shot_job.Shot(0, 9))
    with monkeypatch.context() as flushing:
        flushing.setattr(PartWriter, "close", fails)
        with pytest.raises(RuntimeError, match="closing failed"):
            shot_job.colorize_shot(job, references, shot_job.Shot(0, 4))
    assert [path.name for path in tmp_path.iterdir()] == ["in.mp4"]
    shot_job.colorize_shot(job, references, shot_job.Shot(0, 4))
    assert numbers(read_pictures(job.output)) == list(range(4))


def test_a_crash_while_the_film_is_put_together_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_film(tmp_path / "in.mp4", counted(30), rate=RATE, crf=4)
    job, references = file_task(tmp_path)
    assemble = file_job.assemble

    def full(*_: Any, **__: Any) -> list[str]:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(file_job, "assemble", full)
    with pytest.raises(OSError, match="No space left"):
        file_job.colorize_file(job, references)
    monkeypatch.setattr(file_job, "assemble", assemble)
    assert "continued: after 30 frames that were finished before" in file_job.colorize_file(job, references)
    assert numbers(read_film(job.output)[0]) == list(range(30))


def test_two_runs_do_not_work_on_one_film(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second would write over the parts of the first, or take them for another job's and delete them."""
    write_film(tmp_path / "in.mp4", counted(4), rate=RATE, sound=False)
    job, references = file_task(tmp_path)
    second = file_task(tmp_path, strength=0.5)[0]
    refused: list[str] = []

    def begun() -> None:
        with pytest.raises(VideoError) as told:
            file_job.colorize_file(second, references)
        refused.append(str(told.value))

    parts = tmp_path / "out.mp4.parts"
    parts.mkdir()
    (parts / "at-work").touch()  # of a run that was killed
    file_job.colorize_file(job, references, begun=begun)
    assert refused == [
        "Another run works on out.mp4 at this moment: wait for it, stop it, or choose another output name."
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.mp4", "out.mp4"]
    file_job.colorize_file(second, references)


def test_a_disk_that_fails_is_not_taken_for_a_container_that_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_film(tmp_path / "in.mp4", counted(4), rate=RATE, sound=False)
    job, references = file_task(tmp_path)

    opened = video_file.opened

    def fail(path: Any, *_: Any) -> Any:
        if isinstance(path, Path) and path.name == "in.mp4":
            return opened(path)
        raise OSError(errno.EIO, "Input/output error", str(tmp_path))

    for place, name in ((PartWriter, "write"), (video_file, "opened")):
        with monkeypatch.context() as patched, pytest.raises((OSError, VideoError), match="Input/output error") as told:
            patched.setattr(place, name, fail)
            file_job.colorize_file(job, references)
        assert "another ending" not in str(told.value)
    assert [path.name for path in tmp_path.iterdir()] == ["in.mp4"]
