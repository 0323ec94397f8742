"""A film from video file to video file, never whole in memory: parts on disk with the state after each, so that a
crash costs the shot that was under way, an interrupt leaves a playable file, and the same call goes on where it stopped.
A whole film that was there before stays until the new one is whole.
"""

from __future__ import annotations

import logging
import math
import shutil
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from .. import host
from ..cache import content_key, file_fingerprint
from ..host.errors import first_line
from ..host.picture_files import open_picture
from .clip_job import finish_report, load_method, portion_frames, preview_of, room_for, start_report
from .film import FilmSession, PreparedFrames, Snapshot
from .film_options import FilmOptions, Reference, outside, read_references, unreached
from .film_part import Extent, PartStart, find_start
from .film_state import load_state
from .manifest import Manifest, read_manifest
from .networks import AUTOMATIC, LoadedNetwork
from .part_recorder import PartRecorder
from .playable_part import AT_WORK, drop_left, finished_frames, note_left, parts_held, place_for
from .playable_part import FILE as PLAYABLE
from .shots import Segment
from .video_assembly import assemble
from .video_file import Irregularities, VideoError, VideoFacts, read_facts
from .video_frames import read_portions
from .video_parts import check_container

log = logging.getLogger("hotpath.colorization")

Result = TypeVar("Result")

PART_FRAMES = 240  # a longer shot is split: about ten seconds are what a crash costs at most
AHEAD = 2  # portions decoded ahead of the device, and portions behind it that are not encoded yet
PATIENCE = 0.1  # seconds between two looks at the interrupt while another thread is waited for


@dataclass(frozen=True)
class FileJob:
    """source: the video. output: where the coloured one goes; beside it, `<output>.parts` holds the work so far.

    quality: the encoder's constant rate factor, lower is better. codec: any of PyAV's encoders that knows crf. workflow:
    texts that are put into the film, as `assemble` takes them; they do not decide whether a film may be gone on with.
    extent: how much of the film; `extent.named` gives an output that is not the whole film's.
    """

    source: Path
    output: Path
    options: FilmOptions
    quality: int = 16
    codec: str = "libx264"
    checkpoint: str = AUTOMATIC
    precision: str = AUTOMATIC
    resume: bool = True
    workflow: Mapping[str, str] = field(default_factory=dict)
    extent: Extent = field(default_factory=Extent)

    def __post_init__(self) -> None:
        if self.codec == "libx264" and not 0 <= self.quality <= 51:
            raise ValueError(f"quality is x264's rate factor, from 0 to 51, not {self.quality}.")
        if self.output.resolve() == self.source.resolve() or (self.output.exists() and _same_file(self)):
            raise ValueError(f"{self.output.name} is the film itself, which would be lost: choose another output name.")


def _same_file(job: FileJob) -> bool:
    """Also under two names, as links have."""
    return job.source.exists() and job.output.samefile(job.source)


def colorize_file(
    job: FileJob,
    references: Sequence[Reference],
    status: Callable[[str], None] | None = None,
    begun: Callable[[], None] | None = None,
) -> str:
    """Colour `job.source` into `job.output` and return the report. `status` gets a line about once a second. `begun` is
    called once, when nothing is left that could be refused.

    Raises what stopped it: the host's interrupt, OSError for a full disk. The output, or a file beside it where there was
    one before, then holds all finished frames, and the same call goes on after them.
    """
    facts = read_facts(job.source)
    loaded = load_method(job.options, job.checkpoint, job.precision)
    with parts_held(job.output) as folder:
        return _colorize(job, references, facts, loaded, folder, status or _unheard, begun)


def _colorize(
    job: FileJob,
    references: Sequence[Reference],
    facts: VideoFacts,
    loaded: LoadedNetwork,
    folder: Path,
    status: Callable[[str], None],
    begun: Callable[[], None] | None,
) -> str:
    manifest = _manifest(job, references, loaded, folder)
    check_container(job.source, job.output, folder, facts, job.codec, job.quality)
    start = None if job.extent.whole or manifest.parts else _start(job, references, facts, status)
    report = start_report(loaded, references, job.options, facts.height, facts.width)
    report.fact("file", f"{job.source.name} to {job.output.name}, {job.codec} crf {job.quality}")
    for note in facts.notes(job.source.name, job.codec):
        report.note(note)
    before = manifest.frames
    if before:
        report.fact("continued", f"after {before} frames that were finished before")
    room = room_for(loaded, job.options, facts.height, facts.width, len(references), bytes_per_number=1)
    with loaded.resident(room) as network:
        film = FilmSession(network, loaded, job.options, references, facts.height, facts.width)
        if manifest.parts:
            film.load(load_state(manifest.state_file(folder, len(manifest.parts))))
            film.cuts = [film.frame - manifest.frames + cut for cut in manifest.cuts(film.shot)]
        elif start is not None:
            film.start_at(start.frame, start.shot, start.detector)
        if begun is not None:
            begun()
        running = _FileRun(job, facts, film, folder, manifest, status, start)
        try:
            running.run()
        except BaseException:
            _leave_playable(job, folder, manifest, status, running.end)
            raise
    for note in running.found.notes(job.source.name):
        report.note(note)
    for lost in assemble(
        manifest.part_files(folder), job.source, job.output, workflow=job.workflow, part_end=running.end
    ):
        report.note(lost)
    drop_left(job.output)
    shutil.rmtree(folder, ignore_errors=True)
    finish_report(report, film, manifest.frames - before)
    first = film.frame - manifest.frames
    if job.extent.whole:
        left = unreached(references, manifest.frames)
    else:
        report.fact("part", f"{job.extent}, frames {first} to {film.frame - 1} of {job.source.name}")
        left = outside(references, first, film.frame, job.options.method)
    for note in left:
        report.note(note)
    return report.text(film.times, film.engines(), film.notes())


def colorize_file_by_path(
    source: Path,
    output: Path,
    references: Sequence[Path],
    options: FilmOptions,
    reference_frames: str = "",
    status: Callable[[str], None] | None = None,
    begun: Callable[[], None] | None = None,
    **settings: Any,
) -> str:
    """The same from paths alone, for the command line. settings: further fields of FileJob."""
    from PIL import UnidentifiedImageError

    from .pictures import from_pil

    pictures = []
    for path in references:
        if not path.is_file():
            raise FileNotFoundError(f"There is no reference picture {path}.")
        try:
            with open_picture(path) as image:
                pictures.append(from_pil(image))
        except UnidentifiedImageError:
            raise ValueError(
                f"{path} is no picture that can be read: a reference is a PNG, a JPEG or the like."
            ) from None
        except Exception as error:  # Pillow has many words for damage
            if isinstance(error, MemoryError) or getattr(error, "errno", None) is not None:
                raise
            raise ValueError(f"{path} is damaged ({first_line(error)}): take another copy of this picture.") from error
    job = FileJob(source, output, options, **settings)
    return colorize_file(job, read_references(pictures, reference_frames), status, begun)


class _FileRun:
    """One call. This thread queues work for the device and never waits for it; one thread decodes and sends frames there,
    one takes pictures from there and encodes them, and AHEAD bounds what lies between them."""

    def __init__(
        self,
        job: FileJob,
        facts: VideoFacts,
        film: FilmSession,
        folder: Path,
        manifest: Manifest,
        status: Callable[[str], None],
        start: PartStart | None,
    ) -> None:
        self.film, self.status = film, status
        expected, stop = facts.frames, None
        # In seconds of the film's clock: where the part ends, None for a whole film
        self.end: float | None = None
        if not job.extent.whole:
            begin, stop = job.extent.ticks(job.source, facts)
            self.end = math.inf if stop is None else float(stop * facts.time_base)
            left = facts.frames - film.frame + manifest.frames if facts.frames else 0
            asked = left if stop is None else -(-(stop - begin) // facts.step)
            expected = min(asked, left) if left > 0 else asked
        self.total, self.done = max(expected, manifest.frames), manifest.frames
        self.recorder = PartRecorder(folder, manifest, facts, job.codec, job.quality, film.times)
        self.name = job.source.name
        size = portion_frames(facts.height, facts.width, 1)
        self.found = Irregularities()
        going_on = manifest.next_time if start is None else start.time
        self.portions = read_portions(job.source, facts, size, going_on, self.found, stop)
        self.encoding: deque[Future[Any]] = deque()
        self.in_part = 0
        self.part_shot = 0
        # Where the film stands behind the last segment that was queued whole.
        self.reached: tuple[Snapshot, int] | None = None

    def run(self) -> None:
        clock = _Clock(self.total, self.done, self.status)
        with (
            closing(self.portions),
            ThreadPoolExecutor(1, "decode") as decoder,
            ThreadPoolExecutor(1, "encode") as encoder,
            host.tracked(host.current(), self.total, self.name) as bar,
        ):

            def told(most: int) -> None:
                """Wait until at most `most` jobs of the encoder are left, and say what became of the others."""
                while len(self.encoding) > most:
                    preview = _result(self.encoding[0])
                    self.encoding.popleft()
                    if preview is not None:
                        count, picture = preview
                        clock.tick(count)
                        bar.update(count, preview_of(picture))

            if self.done:
                bar.update(self.done)
            decoding = deque(decoder.submit(self._decode) for _ in range(AHEAD))
            try:
                while (arrived := _result(decoding.popleft())) is not None:
                    decoding.append(decoder.submit(self._decode))
                    times, prepared = arrived
                    for segment in prepared.segments:
                        if segment.cut:
                            self.film.begin_shot()
                            self.reached = self.film.snapshot(), times[segment.first]
                            self._end_part(encoder, ends_shot=True)
                        elif self.in_part >= PART_FRAMES:
                            self._end_part(encoder, ends_shot=False)
                        self._colour(encoder, prepared, segment, times[segment.first : segment.stop])
                        told(AHEAD)
                self._end_part(encoder, ends_shot=True)
                told(0)
            except BaseException:
                decoder.shutdown(wait=False, cancel_futures=True)
                self._stop(encoder)
                raise

    def _decode(self) -> tuple[list[int], PreparedFrames] | None:
        """The next portion, on its way to the device; in the decoder's thread."""
        with self.film.times.beside("decoding, beside it"):
            portion = next(self.portions, None)
            if portion is None:
                return None
            return portion.times, self.film.prepare(portion.frames)

    def _colour(
        self, encoder: ThreadPoolExecutor, prepared: PreparedFrames, segment: Segment, times: list[int]
    ) -> None:
        queued = self.film.colour(prepared, segment)
        self.encoding.append(encoder.submit(self.recorder.write, queued, times))
        self.in_part += len(times)
        self.part_shot = self.film.shot
        self.reached = self.film.snapshot(), times[-1] + 1

    def _end_part(self, encoder: ThreadPoolExecutor, ends_shot: bool) -> None:
        if self.in_part and self.reached is not None:
            snapshot, time = self.reached
            job = encoder.submit(self.recorder.finish, snapshot.for_any_thread(), time, self.part_shot, ends_shot)
            self.encoding.append(job)
            self.in_part = 0

    def _stop(self, encoder: ThreadPoolExecutor) -> None:
        """Something was raised: keep what is whole. What fails here too is logged, not raised over the cause."""
        try:
            for future in self.encoding:
                future.result()
            self._end_part(encoder, ends_shot=False)
            for future in self.encoding:
                future.result()
        except Exception as error:
            log.warning("The last part of %s is lost: %s", self.name, error)
        encoder.submit(self.recorder.abandon).result()


def _result(future: Future[Result]) -> Result:
    """What another thread computes. The interrupt is looked for meanwhile."""
    while not wait([future], PATIENCE).done:
        host.current().check_interrupt()
    return future.result()


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


def _manifest(job: FileJob, references: Sequence[Reference], loaded: LoadedNetwork, folder: Path) -> Manifest:
    """Where the work stands; anew when the parts belong to another film, reference, option or checkpoint."""
    key = content_key(
        file_fingerprint(job.source),
        job.options.deciding(),
        [(reference.lab, reference.frame) for reference in references],
        [file_fingerprint(path) for path in loaded.files],
        loaded.precision.dtype,
        [job.quality, job.codec, *([] if job.extent.whole else [str(job.extent)])],
    )
    found = read_manifest(folder, key) if job.resume else None
    if found is not None:
        return found
    if job.resume and (lost := finished_frames(folder)):
        log.warning(
            "%s holds %d frames of another film, reference, option or checkpoint, or not all of its files: the film starts anew.",
            folder.name,
            lost,
        )
    for file in folder.iterdir():
        # What a stop left as a playable file may be replaced by this job's, too.
        if file.name not in (PLAYABLE, AT_WORK):
            file.unlink()
    return Manifest(key)


def _start(
    job: FileJob, references: Sequence[Reference], facts: VideoFacts, status: Callable[[str], None]
) -> PartStart:
    shots = job.options.shots
    return find_start(
        job.source,
        facts,
        job.extent,
        numbered=any(reference.frame for reference in references),
        threshold=None if shots == "off" else job.options.shot_threshold,
        counted_shots=shots == "reference per shot",
        status=status,
    )


def _leave_playable(
    job: FileJob, folder: Path, manifest: Manifest, status: Callable[[str], None], part_end: float | None
) -> None:
    """What is finished as a video, which never takes the place of a file that was there before."""
    if not manifest.parts:
        return
    try:
        place = place_for(job.output)
        if place is None:
            raise VideoError(f"{job.output.name} and the name beside it belong to other files")
        parts = manifest.part_files(folder)
        assemble(parts, job.source, place, complete=False, workflow=job.workflow, part_end=part_end)
        note_left(job.output, place, manifest.frames)
        beside = "" if place == job.output else f", because {job.output.name} was there before"
        status(
            f"Stopped: the {manifest.frames} frames that are finished are in {place.name}{beside}. Run the same again to go on."
        )
    except Exception as error:
        log.warning("The finished parts of %s stay in %s: %s", job.output.name, folder, error)


def _unheard(line: str) -> None:
    log.debug("%s", line)
