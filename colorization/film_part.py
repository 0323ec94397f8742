"""A part of a film, to try settings on a few seconds of it: which frames those are, and their numbers in the film."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from .. import host
from .shots import SHORTEST, ShotDetector
from .video_clock import frames_before, is_regular
from .video_file import Irregularities, VideoError, VideoFacts
from .video_frames import timed_frames, to_rgb

HALF_A_MILLISECOND = Fraction(1, 2000)
# Frames before a part in which cuts are looked for, so that one right behind its beginning is found as in the whole film.
LOOKED_BACK = 4 * SHORTEST


@dataclass(frozen=True)
class Extent:
    """start: seconds from a film's first frame on; seconds: how long, 0 for all that follows. Both to the millisecond."""

    start: float = 0.0
    seconds: float = 0.0

    def __post_init__(self) -> None:
        for name, value in (("start_seconds", self.start), ("seconds", self.seconds)):
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} must be 0 or more, not {value}.")

    @property
    def begins(self) -> Fraction:
        return Fraction(round(1000 * self.start), 1000)

    @property
    def ends(self) -> Fraction | None:
        length = Fraction(round(1000 * self.seconds), 1000)
        return self.begins + length if length else None

    @property
    def whole(self) -> bool:
        return not self.begins and self.ends is None

    def __str__(self) -> str:
        return f"{_plain(self.begins)}s-{'end' if self.ends is None else f'{_plain(self.ends)}s'}"

    def named(self, film: Path) -> Path:
        """Where this much of `film` goes: a part never to the place of the whole, nor of another part."""
        return film if self.whole else film.with_name(f"{film.stem}.{self}{film.suffix}")

    def ticks(self, path: Path, facts: VideoFacts) -> tuple[int, int | None]:
        """The times between which its frames are, in ticks of the film's clock; None for all that follow. A frame's second
        is rounded to the millisecond, too, as people read it off."""
        with closing(timed_frames(path, facts)) as frames:
            origin = next((time for time, _ in frames), 0)

        def tick(second: Fraction) -> int:
            return origin + math.ceil((second - HALF_A_MILLISECOND) / facts.time_base)

        return tick(self.begins), None if self.ends is None else tick(self.ends)


@dataclass(frozen=True)
class PartStart:
    """time: of the first frame of a part, in ticks of the film's clock. frame, shot: the numbers of it and of the shot that
    it is in, unless it begins one, from 0 in the whole film. detector: as it left what comes before."""

    time: int
    frame: int
    shot: int
    detector: ShotDetector | None


def find_start(
    path: Path,
    facts: VideoFacts,
    extent: Extent,
    numbered: bool,
    threshold: float | None,
    counted_shots: bool,
    status: Callable[[str], None],
) -> PartStart:
    """numbered: whether colours depend on the number of its first frame; threshold: of the detector, None without one;
    counted_shots: whether colours depend on the number of its shot. What is counted is decoded from the film's first frame
    on; of any other film only what lies right before the part.

    Raises VideoError when the part has no frame.
    """
    begin, stop = extent.ticks(path, facts)
    lead: int | None = None
    if not numbered and not counted_shots and is_regular(path, facts):
        lead = begin - (0 if threshold is None else LOOKED_BACK * facts.step)
    frame = 0 if lead is None else frames_before(path, facts, lead)
    detector = None if threshold is None else ShotDetector(threshold, frame)
    shot, told, found = 0, time.monotonic(), Irregularities()
    with closing(timed_frames(path, facts, lead)) as frames:
        for at, picture in frames:
            host.current().check_interrupt()
            if stop is not None and at >= stop:
                break
            if at >= begin:
                return PartStart(at, frame, shot if counted_shots else 0, detector)
            if detector is not None:
                shot += len(detector.cuts(to_rgb(picture, facts, found)[None]))
            frame += 1
            if time.monotonic() - told > 1:
                told = time.monotonic()
                status(f"looking for second {_plain(extent.begins)} of {path.name}, {frame} frames before it so far")
        else:
            raise VideoError(
                f"{path.name} has no frame at or after second {_plain(extent.begins)}: choose a smaller start_seconds."
            )
    raise VideoError(f"{path.name} has no frame in {extent}: choose more seconds.")


def _plain(second: Fraction) -> str:
    return f"{float(second):.3f}".rstrip("0").rstrip(".")
