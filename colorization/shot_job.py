"""One shot of a film, for films that are coloured shot by shot in several places at a time.

With shots on, colouring forgets everything at a cut, so a shot comes out as it does in the whole film. It is written as a
part without sound; `merge_shots` puts parts in a row and the film's sound beside them.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

from .. import host
from ..host.whole_files import put_in_place, remove
from .clip_job import finish_report, load_method, portion_frames, preview_of, room_for, start_report
from .file_job import FileJob
from .film import FilmSession
from .film_options import Reference
from .shots import ShotDetector
from .video_assembly import assemble
from .video_file import Irregularities, VideoFacts, read_facts
from .video_frames import FramePortion, read_portions
from .video_parts import PartWriter

WRITTEN = re.compile(r"(\d+):(\d+)(?:@(-?\d+))?(?:#(\d+))?")
PART_SUFFIX = ".nut"


@dataclass(frozen=True)
class Shot:
    """Frames first..stop-1 of a film. time: of the first of them, in the stream's time base. number: from 0."""

    first: int
    stop: int
    time: int | None = None
    number: int = 0

    @classmethod
    def parse(cls, text: str) -> Shot:
        """FIRST:STOP, with @TIME and #NUMBER where they are known."""
        found = WRITTEN.fullmatch(text.strip())
        if found is None or int(found[1]) >= int(found[2]):
            raise ValueError(
                f"{text!r} is no range of frames: write FIRST:STOP, such as 0:240, the last one not included."
            )
        return cls(int(found[1]), int(found[2]), int(found[3]) if found[3] is not None else None, int(found[4] or 0))

    def __str__(self) -> str:
        time = "" if self.time is None else f"@{self.time}"
        return f"{self.first}:{self.stop}{time}#{self.number}"


def find_shots(path: Path, threshold: float) -> Iterator[Shot]:
    """The shots of a film in order, each as soon as the next cut is seen. A portion of frames is held at a time."""
    detector = ShotDetector(threshold)
    frame = number = start = 0
    time: int | None = None
    facts = read_facts(path)
    with closing(read_portions(path, facts, portion_frames(facts.height, facts.width, 1))) as portions:
        for portion in portions:
            host.current().check_interrupt()
            if time is None:
                time = portion.times[0]
            for cut in detector.cuts(portion.frames):
                yield Shot(start, frame + cut, time, number)
                start, time, number = frame + cut, portion.times[cut], number + 1
            frame += len(portion.times)
    if frame > start:
        yield Shot(start, frame, time, number)


def colorize_shot(job: FileJob, references: Sequence[Reference], shot: Shot) -> str:
    """Colour one shot of `job.source` into the part `job.output` and return the report."""
    if job.output.suffix.lower() != PART_SUFFIX:
        raise ValueError(f"A shot is written as a part: {job.output.name!r} must end in {PART_SUFFIX}.")
    if job.options.shots == "off":
        raise ValueError(
            "A film that is one shot cannot be done shot by shot: set shots to reset or reference per shot."
        )
    facts = read_facts(job.source)
    loaded = load_method(job.options, job.checkpoint, job.precision)
    report = start_report(loaded, references, job.options, facts.height, facts.width)
    report.fact("shot", f"{shot.number + 1}, frames {shot.first} to {shot.stop - 1} of {job.source.name}")
    for note in facts.notes(job.source.name, job.codec):
        report.note(note)
    found = Irregularities()
    job.output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = job.output.with_name(f".{job.output.name}.part")
    room = room_for(loaded, job.options, facts.height, facts.width, len(references), shot.stop - shot.first, 1)
    with loaded.resident(room) as network:
        film = FilmSession(network, loaded, job.options, references, facts.height, facts.width)
        film.start_at(shot.first, shot.number)
        writer: PartWriter | None = None
        try:
            writer = PartWriter(unfinished, facts, job.codec, job.quality)
            with (
                closing(_portions_of(job.source, facts, shot, found)) as portions,
                host.tracked(host.current(), shot.stop - shot.first, job.source.name) as bar,
            ):
                for portion in portions:
                    done = film.colorize(portion.frames)
                    writer.write(done.pictures, portion.times)
                    bar.update(len(portion.times), preview_of(done.pictures[-1]))
            if film.frame < shot.stop:
                raise ValueError(
                    f"{job.source.name} ends at frame {film.frame}, before frame {shot.stop} of this shot."
                )
            writer.close()
        except BaseException:
            if writer is not None:
                # On a full disk this fails, too, and must neither hide why nor leave the file there.
                with suppress(Exception):
                    writer.close()
            remove(unfinished)
            raise
    put_in_place(unfinished, job.output)
    for note in found.notes(job.source.name):
        report.note(note)
    finish_report(report, film, shot.stop - shot.first)
    return report.text(film.times, film.engines(), film.notes())


def merge_shots(
    parts: Sequence[Path], source: Path, output: Path, workflow: Mapping[str, str] | None = None
) -> list[str]:
    """Parts in the order of the film, with its sound, into `output`, which appears whole or not at all. workflow: as
    `assemble` takes it. Returns a sentence for everything that its container cannot hold."""
    output.parent.mkdir(parents=True, exist_ok=True)
    return assemble(parts, source, output, workflow=workflow)


def _portions_of(
    path: Path, facts: VideoFacts, shot: Shot, found: Irregularities
) -> Generator[FramePortion, None, None]:
    """The frames of a shot, a portion at a time; without a time they are counted from the start of the film."""
    frame = 0 if shot.time is None else shot.first
    size = portion_frames(facts.height, facts.width, 1)
    with closing(read_portions(path, facts, size, shot.time, found)) as arriving:
        for portion in arriving:
            begin, end = max(0, shot.first - frame), min(len(portion.times), shot.stop - frame)
            if begin < end:
                yield FramePortion(portion.frames[begin:end], portion.times[begin:end])
            frame += len(portion.times)
            if frame >= shot.stop:
                return
