"""A film from video file to video file, never whole in memory: parts on disk with the state after each, so that a
crash costs one part, an interrupt leaves a playable file, and the same call goes on where it stopped.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .. import host
from ..cache import content_key, file_fingerprint
from .clip_job import PORTION, finish_report, load_method, preview_of, room_for, start_report
from .film import FilmOptions, FilmSession, Reference, read_references
from .film_state import FilmState, load_state, save_state
from .networks import AUTOMATIC, LoadedNetwork
from .video_file import PartWriter, VideoFacts, assemble, read_facts, read_portions

log = logging.getLogger("hotpath.colorization")

PART_FRAMES = 240  # about ten seconds: what a crash costs at most
PLAN = "plan.json"


@dataclass(frozen=True)
class FileJob:
    """source: the video. output: where the coloured one goes; beside it, `<output>.parts` holds the work so far.

    quality: the encoder's constant rate factor, lower is better. codec: any of PyAV's encoders that knows crf.
    """

    source: Path
    output: Path
    options: FilmOptions
    quality: int = 16
    codec: str = "libx264"
    checkpoint: str = AUTOMATIC
    precision: str = AUTOMATIC
    resume: bool = True


@dataclass
class Progress:
    """The plan file: what the parts so far belong to, and where the next one starts."""

    key: str
    parts: int = 0
    frames: int = 0
    next_time: int | None = None

    def save(self, folder: Path) -> None:
        unfinished = folder / (PLAN + ".part")
        unfinished.write_text(json.dumps(asdict(self)))
        unfinished.replace(folder / PLAN)


def colorize_file(job: FileJob, references: Sequence[Reference], status: Callable[[str], None] | None = None) -> str:
    """Colour `job.source` into `job.output` and return the report. `status` gets a line about once a second.

    Raises what stopped it: the host's interrupt, OSError for a full disk. The output then holds all finished frames,
    and the same call goes on after them.
    """
    facts = read_facts(job.source)
    loaded = load_method(job.options, job.checkpoint, job.precision)
    folder = job.output.with_name(job.output.name + ".parts")
    folder.mkdir(parents=True, exist_ok=True)
    progress = _progress(job, references, loaded, folder)
    report = start_report(loaded, references, job.options, facts.height, facts.width)
    report.fact("file", f"{job.source.name} to {job.output.name}, {job.codec} crf {job.quality}")
    if progress.frames:
        report.fact("continued", f"after {progress.frames} frames that were finished before")
    before = progress.frames
    with loaded.resident(room_for(loaded, job.options, facts.height, facts.width)) as network:
        film = FilmSession(network, loaded, job.options, references, facts.height, facts.width)
        if progress.parts:
            film.load(_state_after(folder, progress.parts))
        try:
            _FileRun(job, facts, film, folder, progress, status or _unheard).run()
        except BaseException:
            _leave_playable(job, folder, progress)
            raise
    assemble(_parts(folder, progress.parts), job.source, job.output)
    shutil.rmtree(folder, ignore_errors=True)
    finish_report(report, film, progress.frames - before)
    return report.text(film.times, film.engines(), film.notes())


def colorize_file_by_path(
    source: Path,
    output: Path,
    references: Sequence[Path],
    options: FilmOptions,
    reference_frames: str = "",
    status: Callable[[str], None] | None = None,
    **settings: Any,
) -> str:
    """The same from paths alone, for the command line. settings: further fields of FileJob."""
    from PIL import Image

    from .pictures import from_pil

    pictures = []
    for path in references:
        if not path.is_file():
            raise FileNotFoundError(f"There is no reference picture {path}.")
        with Image.open(path) as image:
            pictures.append(from_pil(image))
    job = FileJob(source, output, options, **settings)
    return colorize_file(job, read_references(pictures, reference_frames), status)


class _FileRun:
    """Decoding, colouring and encoding of one call, each in its own thread, a portion apart."""

    def __init__(
        self,
        job: FileJob,
        facts: VideoFacts,
        film: FilmSession,
        folder: Path,
        progress: Progress,
        status: Callable[[str], None],
    ) -> None:
        self.job, self.facts, self.film = job, facts, film
        self.folder, self.progress, self.status = folder, progress, status
        self.writer: PartWriter | None = None
        self.in_part = 0
        self.next_time = progress.next_time
        self.whole = True  # whether the film's state is that after a whole portion
        self.encoding: Future[None] | None = None

    def run(self) -> None:
        portions = read_portions(self.job.source, self.facts, PORTION, self.progress.next_time)
        total = max(self.facts.frames, self.progress.frames)
        clock = _Clock(total, self.progress.frames, self.status)
        with (
            ThreadPoolExecutor(1, "decode") as decoder,
            ThreadPoolExecutor(1, "encode") as encoder,
            host.tracked(host.current(), total, self.job.source.name) as bar,
        ):
            if self.progress.frames:
                bar.update(self.progress.frames)
            try:
                upcoming = decoder.submit(next, portions, None)
                while (portion := upcoming.result()) is not None:
                    upcoming = decoder.submit(next, portions, None)
                    self.whole = False
                    done = self.film.colorize(portion.frames)
                    self._settle()
                    self.encoding = encoder.submit(self._write, done.pictures, portion.times)
                    self.next_time = portion.times[-1] + 1
                    self.in_part += len(portion.times)
                    self.whole = True
                    clock.tick(len(portion.times))
                    if self.in_part >= PART_FRAMES:
                        self._finish_part()
                    bar.update(len(portion.times), preview_of(done.pictures[-1]))
                self._finish_part()
            except BaseException:
                self._stop()
                raise

    def _write(self, pictures: Any, times: list[int]) -> None:
        if self.writer is None:
            path = _part(self.folder, self.progress.parts + 1)
            self.writer = PartWriter(path, self.facts, self.job.codec, self.job.quality)
        self.writer.write(pictures, times)

    def _settle(self) -> None:
        """Wait for the encoder, and raise what it raised."""
        if self.encoding is not None:
            encoding, self.encoding = self.encoding, None
            encoding.result()

    def _finish_part(self) -> None:
        self._settle()
        if self.writer is None:
            return
        writer, self.writer = self.writer, None
        writer.close()
        number = self.progress.parts + 1
        save_state(self.film.state(), _state(self.folder, number))
        self.progress.parts = number
        self.progress.frames += self.in_part
        self.progress.next_time = self.next_time
        self.progress.save(self.folder)
        _state(self.folder, number - 1).unlink(missing_ok=True)
        self.in_part = 0

    def _stop(self) -> None:
        """Something was raised: keep what is whole. What fails here too is logged, not raised over the cause."""
        try:
            if self.whole:
                self._finish_part()
            elif self.writer is not None:
                self._settle()
        except Exception as error:
            log.warning("The last part of %s is lost: %s", self.job.output.name, error)
        finally:
            if self.writer is not None:
                writer, self.writer = self.writer, None
                try:
                    writer.close()
                except Exception as error:
                    log.debug("closing an unfinished part: %s", error)


class _Clock:
    """Frames per second and remaining time, as a line about once a second."""

    def __init__(self, total: int, done: int, status: Callable[[str], None]) -> None:
        self.total, self.done, self.status = total, done, status
        self.started_with = done
        self.start = self.told = time.monotonic()

    def tick(self, frames: int) -> None:
        self.done += frames
        now = time.monotonic()
        if now - self.told < 1 and self.done < self.total:
            return
        self.told = now
        rate = (self.done - self.started_with) / max(now - self.start, 1e-9)
        left = max(0, self.total - self.done) / max(rate, 1e-9)
        self.status(
            f"frame {self.done} of {max(self.total, self.done)}, {rate:.1f} fps, {left // 60:.0f}:{left % 60:02.0f} left"
        )


def _progress(job: FileJob, references: Sequence[Reference], loaded: LoadedNetwork, folder: Path) -> Progress:
    """Where the work stands; anew when the parts belong to another film, reference, option or checkpoint."""
    key = content_key(
        file_fingerprint(job.source),
        asdict(job.options),
        [(reference.lab, reference.frame) for reference in references],
        [file_fingerprint(path) for path in loaded.files],
        loaded.precision.dtype,
        [job.quality, job.codec],
    )
    try:
        found = Progress(**json.loads((folder / PLAN).read_text()))
        if job.resume and found.key == key and all(part.is_file() for part in _parts(folder, found.parts)):
            return found
        log.info("%s belongs to another job and is replaced.", folder.name)
    except (OSError, ValueError, TypeError):
        pass
    for file in folder.iterdir():
        file.unlink()
    return Progress(key)


def _leave_playable(job: FileJob, folder: Path, progress: Progress) -> None:
    if not progress.parts:
        return
    try:
        assemble(_parts(folder, progress.parts), job.source, job.output, complete=False)
    except Exception as error:
        log.warning("The finished parts of %s stay in %s: %s", job.output.name, folder, error)


def _part(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.nut"


def _parts(folder: Path, count: int) -> list[Path]:
    return [_part(folder, number) for number in range(1, count + 1)]


def _state(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.safetensors"


def _state_after(folder: Path, number: int) -> FilmState:
    return load_state(_state(folder, number))


def _unheard(line: str) -> None:
    log.debug("%s", line)
