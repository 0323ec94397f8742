"""Which run describes which pictures, where several caption one folder, on one machine or many: each is described once.

A hidden file beside the captions says what every run has begun and what is done; runs read it and add to it one at a time.
Each run also holds a file of its own, of which the system lets go however its process ends: what it had begun is free then.
The last run to end removes them all. On a disk without locks, as some shares are, a run takes the others for ended: several
may describe the same pictures, but each is described.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO
from uuid import uuid4

from ..host.errors import first_line
from ..host.held import delete, held, is_held, opened_alone
from ..host.unfinished import sweep
from ..host.whole_files import refusal_told, remove
from . import caption_list
from .caption_job import CaptionJob, CaptionSummary

RECORD = ".captioning"  # what the runs tell each other; `<RECORD>-<run>` is held by that run
A_RUN = "[0-9a-f]" * 32


class Shares:
    """What this run and the others have of the pictures that wait. Open it with `taking_part`."""

    def __init__(self, job: CaptionJob) -> None:
        self.job = job
        self._elsewhere: dict[Path, str] = {}  # what other runs are through with: why there is no caption, or ""
        self._present: dict[Path, str] = {}  # captions that are there by now, by whomever
        self._run = uuid4().hex
        self._record = job.captions / RECORD
        self._read = 0  # bytes of the record
        self._runs: dict[str, str] = {}  # those that have not ended, and what they do
        self._lists = False  # whether any run adds to a list
        self._waiting: dict[str, Path] = {}
        self._begun: dict[str, str] = {}  # of those that wait, by which other run
        self._tried: dict[str, Path] = {}  # in vain, and left to others
        self._lines: dict[str, str] = {}
        self._news: dict[str, Any] = {}

    # what a run does

    def wait_for(self, waiting: list[Path]) -> None:
        """What is to be shared, in its order."""
        self._waiting = {self.job.name_of(path): path for path in waiting}
        with self._alone() as file:
            self._read = 0  # what others had begun before it was known what waits here
            self._catch_up(file)
        self._read_list()

    def take(self, most: int, ahead: bool = False) -> list[Path]:
        """The next pictures that are this run's alone, at most so many; none where others have begun all that are left.

        ahead: while it has others to do, so none where another run may come for them before that.
        """
        with self._alone() as file:
            self._catch_up(file)
            if self._free < most * self._sharing:
                self._look_who_lives()
            taken: dict[str, Path] = {}
            if not ahead or self._sharing == 1 or self._free >= most * self._sharing:
                taken = self._next(min(most, -(-self._free // self._sharing)))
            self._tell(file, takes=list(taken))
        return list(taken.values())

    def done(self, path: Path, why: str = "") -> None:
        """`path` has its caption; or the model has none for it, and why."""
        self._news.setdefault("done", {})[self.job.name_of(path)] = why

    def leave(self, paths: list[Path]) -> None:
        """What was taken and is not done is for others to try."""
        names = {self.job.name_of(path): path for path in paths}
        left = {name: path for name, path in names.items() if name not in self._news.get("done", ())}
        self._tried |= left
        self._news.setdefault("leaves", []).extend(left)

    @property
    def left(self) -> list[Path]:
        """What is neither this run's nor done."""
        return list(self._waiting.values())

    def end(self, tidy: Callable[[], None] | None = None) -> None:
        """This run is through. tidy: done with the list of captions by the last run that is, with nobody else at it."""
        if self._run not in self._runs:
            return
        with self._alone() as file:
            self._catch_up(file)
            self._tell(file, ends=True)
            self._ended(self._run)
            self._look_who_lives()
            if self._runs:
                return
            try:
                if tidy is not None and self._lists:
                    tidy()
            finally:
                with suppress(OSError):  # what runs that were killed left
                    for mark in self._record.parent.glob(f"{RECORD}-{A_RUN}"):
                        self._lives(mark.name.removeprefix(f"{RECORD}-"))
                    sweep(self._record.parent, os.fstat(file.fileno()).st_mtime)
                delete(self._record, file)

    def note_in(self, summary: CaptionSummary) -> int:
        """Put into `summary` what others did meanwhile; returns of how many pictures nothing was known before."""
        fresh = len(self._present)
        summary.present |= self._present
        for path, why in self._elsewhere.items():
            fresh += summary.failed.pop(path, None) is None  # else it was tried here, too
            if why:
                summary.failed[path] = f"{why} (in another run)"
            else:
                summary.elsewhere[path] = ""
        self._present, self._elsewhere = {}, {}
        return fresh

    # what the record says

    @contextmanager
    def _alone(self) -> Iterator[BinaryIO]:
        with refusal_told(self._record), opened_alone(self._record) as file:
            yield file

    def _begin(self) -> None:
        with self._alone() as file:
            self._catch_up(file)
            self._look_who_lives()
            if not self._runs:  # it was left by runs that were killed
                file.truncate(0)
                self._read = 0
            self._runs[self._run] = self.job.work
            self._lists |= self.job.output != "txt"
            self._tell(file, begins=True)

    def _tell(self, file: BinaryIO, **news: Any) -> None:
        """Add a line on this run, with what is new since the last one."""
        told = {what: said for what, said in (self._news | news).items() if said}
        self._news = {}
        if not told:
            return
        # A line that was cut off before it stays a line of its own.
        file.write(b"\n" + json.dumps({"run": self._run, "work": self.job.work, **told}).encode() + b"\n")

    def _catch_up(self, file: BinaryIO) -> None:
        """Read what was added since the last time."""
        if file.seek(0, os.SEEK_END) < self._read:  # on a disk without locks others begin it anew
            self._read = 0
        file.seek(self._read)
        added = file.read()
        self._read += len(added)
        for line in added.split(b"\n"):
            self._hear(line)

    def _hear(self, line: bytes) -> None:
        try:
            told = json.loads(line)
            run, work = str(told["run"]), str(told["work"])
            if run == self._run or re.fullmatch(A_RUN, run) is None:
                return
            if "begins" in told:
                self._runs[run] = work
                self._lists |= not work.startswith("txt")
            if "ends" in told:
                self._ended(run)
            if work != self.job.work:
                return
            for name in told.get("takes", ()):
                if name in self._waiting:
                    self._begun[name] = run
            for name in told.get("leaves", ()):
                self._begun.pop(name, None)
            for name, why in told.get("done", {}).items():
                self._begun.pop(name, None)
                path = self._waiting.pop(name, None) or self._tried.pop(name, None)
                if path is not None:
                    self._elsewhere[path] = str(why)
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError):  # cut off, or none of ours
            return

    def _ended(self, run: str) -> None:
        self._runs.pop(run, None)
        self._begun = {name: by for name, by in self._begun.items() if by != run}

    def _look_who_lives(self) -> None:
        ended = [run for run in {*self._runs, *self._begun.values()} - {self._run} if not self._lives(run)]
        for run in ended:
            self._ended(run)
        if ended:  # they may have written captions that they had no time to tell of
            self._read_list()

    def _mark(self, run: str) -> Path:
        return self._record.with_name(f"{RECORD}-{run}")

    def _lives(self, run: str) -> bool:
        mark = self._mark(run)
        if not (lives := bool(is_held(mark))):
            remove(mark)
        return lives

    def _read_list(self) -> None:
        if self.job.output != "txt" and not self.job.overwrite:
            self._lines = caption_list.listed(self.job.captions)

    @property
    def _sharing(self) -> int:
        """Runs that do the same work, this one included."""
        return max(1, sum(work == self.job.work for work in self._runs.values()))

    @property
    def _free(self) -> int:
        return len(self._waiting) - len(self._begun)

    def _next(self, most: int) -> dict[str, Path]:
        taken: dict[str, Path] = {}
        gone: list[str] = []
        for name, path in self._waiting.items():
            if len(taken) == most:
                break
            if name in self._begun:
                continue
            gone.append(name)
            if not self.job.overwrite and (text := self.job.caption_of(path, self._lines)):
                self._present[path] = text
            else:
                taken[name] = path
        for name in gone:
            del self._waiting[name]
        return taken


@contextmanager
def taking_part(job: CaptionJob) -> Iterator[Shares]:
    """Share the pictures of `job` with other runs in its folder until the block ends."""
    shares = Shares(job)
    with held(shares._mark(shares._run)):
        shares._begin()
        try:
            yield shares
        finally:
            with suppress(OSError):
                shares.end()


def finish(shares: Shares, summary: CaptionSummary) -> None:
    """This run is through: what the others did goes into `summary`, and the last one leaves the list in order."""
    job = shares.job

    def not_in_order(error: OSError) -> None:  # it is only longer than it need be
        if job.output != "txt":
            summary.remarks.append(f"{caption_list.LIST_NAME} keeps older lines too ({first_line(error)})")

    def put_in_order() -> None:
        try:
            caption_list.compact(job.captions / caption_list.LIST_NAME)
        except OSError as error:
            not_in_order(error)

    try:
        shares.end(put_in_order)
    except OSError as error:
        not_in_order(error)
    shares.note_in(summary)
    lines = caption_list.listed(job.captions) if summary.elsewhere and job.output != "txt" else {}
    summary.elsewhere = {path: text for path in summary.elsewhere if (text := job.caption_of(path, lines))}


def tidy(job: CaptionJob, summary: CaptionSummary) -> None:
    """Where nothing waits: leave the list in order, and nothing of runs that were killed."""
    listing = job.output != "txt" and (job.captions / caption_list.LIST_NAME).is_file()
    if not listing and not any(job.captions.glob(f"{RECORD}*")):
        return
    try:
        with taking_part(job) as shares:
            finish(shares, summary)
    except OSError as error:
        if listing:
            summary.remarks.append(f"{caption_list.LIST_NAME} keeps older lines too ({first_line(error)})")
