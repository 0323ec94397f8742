"""Where results go: staged by workers in a folder of their own, moved to their names by the run, listed in order.

An item that gives one file becomes `<label>.<suffix>`, more files go into the folder `<label>`, and one that gives only
text becomes `<label>.txt`. Files that were in the output folder before are never touched: the label gets a number.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..cache import content_key
from ..host.errors import is_full
from ..host.whole_files import put_in_place, sync
from .jobs import BadMap, Job
from .manifest import COMMITTING, DONE, FAILED, RUNNING, ItemRecord, JobRecord, Manifest, sync_folder

log = logging.getLogger("hotpath.distributed")

WORK = ".hotpath-map"
LIST = "results.jsonl"
UNFINISHED = "copy.part"
OUTPUT, TEMP = "output", "temp"  # what a worker finds below its staging folder
ROOM = 16  # MiB that a disk with room for results can hold
# What is wrong with one name and not with the disk.
BAD_NAME = frozenset(
    getattr(errno, name)
    for name in ("EACCES", "EEXIST", "EINVAL", "EISDIR", "ENAMETOOLONG", "ENOTDIR", "ENOTEMPTY", "EPERM")
)
TOO_LONG = (3, 206)  # what Windows says of a path of 260 letters and more: not found, or a name that is too long


class CannotKeep(RuntimeError):
    """A result cannot have its name; the message says why. Others can have theirs."""


class ResultStore:
    """The output folder of one run, and the manifest in it."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder.resolve()
        self.manifest = manifest
        self.work = self.folder / WORK
        self._run = secrets.token_hex(4)
        self._recover()

    @staticmethod
    def manifest_path(folder: Path) -> Path:
        return folder.resolve() / WORK / "manifest.sqlite"

    def staging(self, job: Job, attempt: int) -> Path:
        """A folder for one attempt. Attempts and runs differ, as a worker that was given up may still be writing: one on
        a machine that was cut off learns only after a minute that its run is over."""
        return self.work / "staging" / f"{job.id}-{self._run}-{attempt}"

    def place(self, name: str) -> Path:
        """The file `name` of the folder. Raises BadMap for one that lies elsewhere: whoever can put files into the folder can
        put a record there, too, and nothing outside is read, moved or deleted for that."""
        path = self.folder / name
        if not leads_inside(self.folder, name):
            raise BadMap(
                f"The record of the work, {self.manifest.path}, names {name!r}, which lies outside {self.folder}; delete that "
                "record to start anew."
            )
        return path

    def discard(self, staging: Path) -> None:
        shutil.rmtree(staging, ignore_errors=True)

    def done(self, job: Job) -> bool:
        """Whether the item's result is here already; a job that was done under another name is copied to this one. Raises
        CannotKeep when that is refused."""
        record = self.manifest.job(job.id)
        if record is None or record.state != DONE:
            return False
        label = self.label(job)
        name = self.manifest.name(label)
        if name is not None and name[0] == job.id and self._whole(name[1], record):
            return True
        source = next((a for a in self.manifest.name_of_job(job.id) if self._whole(a, record)), None)
        if source is None:
            self.manifest.forget(job.id)
            return False
        try:
            actual = self._make_way(label, record.tails)
            # Named first: after a crash the copies that were made are known for what they are.
            self.manifest.set_name(label, job.id, actual)
            for tail in record.tails:
                self._copy(self.place(source + tail), self.place(actual + tail))
        except OSError as error:
            if not _is_of_the_name(error):
                raise
            raise self._refusal(job, error) from error
        return True

    def keep(
        self, job: Job, staging: Path, texts: Sequence[tuple[bool, str]], seconds: float, attempts: int
    ) -> list[Path]:
        """Make final what a worker staged and has put on disk; returns the files.

        texts: (from where the workflow ends, text). Raises CannotKeep.
        """
        try:
            return self._keep(job, staging, texts, seconds, attempts)
        except OSError as error:
            if not _is_of_the_name(error):
                raise
            raise self._refusal(job, error) from error

    def _refusal(self, job: Job, error: OSError) -> CannotKeep:
        why = "its path is too long" if getattr(error, "winerror", None) in TOO_LONG else error.strerror or error
        return CannotKeep(f"The result {job.item.label} cannot be put into {self.folder}: {why}.")

    def _keep(
        self, job: Job, staging: Path, texts: Sequence[tuple[bool, str]], seconds: float, attempts: int
    ) -> list[Path]:
        label = self.label(job)
        made = staging / OUTPUT
        names = sorted(p.relative_to(made).as_posix() for p in made.rglob("*") if p.is_file()) if made.is_dir() else []
        shown = [text for final, text in texts if final] or [text for _, text in texts]
        if not names and shown:
            made.mkdir(parents=True, exist_ok=True)
            (made / "text.txt").write_text("\n\n".join(shown) + "\n", encoding="utf-8")
            sync(made / "text.txt")
            names = ["text.txt"]
        if not names:
            raise CannotKeep(
                f"The workflow gave neither a file nor a text for {job.item.label}: end it in a node that does, such as "
                "SaveImage."
            )
        tails = [Path(names[0]).suffix] if len(names) == 1 else [f"/{name}" for name in names]
        actual = self._make_way(label, tails)
        base = made.relative_to(self.folder).as_posix()
        moves = [(f"{base}/{name}", actual + tail) for name, tail in zip(names, tails, strict=True)]
        record = JobRecord(job.id, COMMITTING, attempts, seconds, None, shown, tails)
        self.manifest.begin_commit(record, label, actual, moves)
        self._move(moves)
        self.manifest.end_commit(job.id)
        self.discard(staging)
        return [self.folder / target for _, target in moves]

    def fail(self, job: Job, error: str, attempts: int, seconds: float = 0.0) -> None:
        before = self.manifest.job(job.id)
        tails = before.tails if before is not None else []
        self.manifest.fail(JobRecord(job.id, FAILED, attempts, seconds, error, [], tails))

    def refuse(self, job: Job, error: str, attempts: int, seconds: float = 0.0) -> None:
        """Record what `CannotKeep` said of an item. Others with the same content may have their results, so that it is
        noted under an id of its own."""
        before, label = self.manifest.job(job.id), self.label(job)
        # Some of its files may have their names already.
        tails = before.tails if before is not None else []
        own = content_key(job.id, label)
        self.manifest.refuse(job.id, label, JobRecord(own, FAILED, attempts, seconds, error, [], tails))

    def deaths(self, job: Job) -> int:
        """How often in a row a run in one process has died while it ran this."""
        record = self.manifest.job(job.id)
        return record.attempts if record is not None and record.state == RUNNING else 0

    def export(self) -> Path:
        """Write results.jsonl, a line per item of this run in their order; whole or not at all."""
        target = self.folder / LIST
        unfinished = target.with_name(f".{LIST}.part")
        try:
            with unfinished.open("w", encoding="utf-8") as file:
                for item in self.manifest.items():
                    file.write(json.dumps(_line(item), ensure_ascii=False) + "\n")
            put_in_place(unfinished, target)
        finally:
            unfinished.unlink(missing_ok=True)
        return target

    def full(self) -> bool:
        """Whether there is no room for results; found out by writing, as quotas are seen in no other way."""
        probe = self.work / f"probe-{self._run}"
        try:
            with probe.open("wb") as file:
                for _ in range(ROOM):
                    file.write(os.urandom(1 << 20))
            sync(probe)
        except OSError as error:
            if not is_full(error):
                raise
            return True
        finally:
            probe.unlink(missing_ok=True)
        return False

    @staticmethod
    def label(job: Job) -> str:
        """What the files of a job are called by, before a number is needed."""
        return f"{WORK}/parts/{job.item.label}" if job.hidden else job.item.label

    def _whole(self, actual: str, record: JobRecord) -> bool:
        return all(self.place(actual + tail).is_file() for tail in record.tails)

    def _make_way(self, label: str, tails: Sequence[str]) -> str:
        """The actual label for files with these tails. Files of an older result of this item are gone when it returns: one
        that is found there after a crash is new."""
        if not leads_inside(self.folder, label):
            raise ValueError(f"{label!r} leads out of {self.folder}, so nothing is written there.")
        mine: set[str] = set()
        name = self.manifest.name(label)
        if name is not None:
            old = self.manifest.job(name[0])
            mine = {name[1] + tail for tail in (old.tails if old is not None else tails)}
        for actual in _numbered(label if name is None else name[1]):
            others = self.manifest.taken(actual) and (name is None or name[1] != actual)
            wanted = {actual + tail for tail in tails}
            if not others and not any(_is_there(self.place(path)) for path in wanted - mine):
                break
        stale = [path for path in map(self.place, mine) if path.is_file()]
        for path in stale:
            path.unlink()
        for folder in {path.parent for path in stale}:
            sync_folder(folder)
        return actual

    def _recover(self) -> None:
        """Complete the moves that the last run wrote down and could not confirm."""
        for job_id, moves in self.manifest.committing():
            whole = all(self.place(s).exists() or self.place(t).exists() for s, t in moves)
            try:
                if whole:
                    self._move(moves)
                    self.manifest.end_commit(job_id)
                    continue
            except OSError as error:
                if not _is_of_the_name(error):
                    raise
            self.manifest.forget(job_id)
        # What is left there belongs to attempts that a killed run left half made.
        self.clean()
        for left in (*self.work.glob("beacon-*"), *self.work.glob("probe-*")):
            left.unlink(missing_ok=True)

    def clean(self) -> None:
        """Remove what unfinished attempts left; no worker may be running."""
        shutil.rmtree(self.work / "staging", ignore_errors=True)
        (self.work / UNFINISHED).unlink(missing_ok=True)

    def _move(self, moves: Sequence[tuple[str, str]]) -> None:
        folders = set()
        for source, target in moves:
            if (begun := self.place(source)).exists():
                path = self.place(target)
                path.parent.mkdir(parents=True, exist_ok=True)
                put_in_place(begun, path)
                folders.add(path.parent)
        for folder in folders:
            sync_folder(folder)

    def _copy(self, source: Path, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        # Not beside the target, whose name may be as long as a name can be.
        unfinished = self.work / UNFINISHED
        shutil.copyfile(source, unfinished)
        # What is recorded next must not name a file that a power cut leaves empty.
        sync(unfinished)
        put_in_place(unfinished, target)
        sync_folder(target.parent)


def _line(item: ItemRecord) -> dict[str, Any]:
    job = item.job
    name = item.label.removeprefix(f"{WORK}/parts/")
    line: dict[str, Any] = {"item": item.shown, "name": name, "status": job.state if job else "waiting"}
    if job is not None:
        # The parts of a film are gone when it is whole.
        line.update({"film": item.film} if item.film else {"files": item.files()})
        line.update({"texts": job.texts, "attempts": job.attempts})
        line["seconds"] = round(job.seconds, 3)
        if job.error:
            line["error"] = job.error
    return line


def _numbered(label: str) -> Iterator[str]:
    yield label
    number = 2
    while True:
        yield f"{label}-{number}"
        number += 1


def _is_of_the_name(error: OSError) -> bool:
    """Whether it is the name that a file cannot have, and not the disk that takes none."""
    return error.errno in BAD_NAME or getattr(error, "winerror", None) in TOO_LONG


def _is_there(path: Path) -> bool:
    """As Path.exists, which from Python 3.14 on tells of a name that no file can have that it is free."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def leads_inside(folder: Path, name: str) -> bool:
    """Whether `name` is that of a file below `folder`, which is resolved."""
    if "\0" in name:
        return False
    path = (folder / name).resolve()
    return path != folder and path.is_relative_to(folder)
