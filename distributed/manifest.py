"""What is done, on disk: one SQLite file that survives a power cut, is resumed from, and is used by one run at a time.

A result becomes final in two steps, so that it is neither lost nor made twice: the moves of its files are written down
first (`committing`), then made, then confirmed. A run that starts completes what the last one could not confirm.
Only the run itself opens this file, never a worker, so shared storage needs no locks that reach over machines.
"""

from __future__ import annotations

import errno
import json
import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..host.errors import first_line, is_full
from ..host.system_errors import SystemRefused
from ..host.whole_files import sync
from .jobs import BadMap

FORMAT = "1"
DONE, FAILED, COMMITTING = "done", "failed", "committing"
RUNNING = "running"  # in the run's own process, which may die of it
FORGOTTEN = "forgotten"  # known for the files it left, which a new result replaces
SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS jobs (
    id TEXT PRIMARY KEY, state TEXT NOT NULL, attempts INTEGER NOT NULL, seconds REAL, error TEXT,
    texts TEXT NOT NULL DEFAULT '[]', tails TEXT NOT NULL DEFAULT '[]', moves TEXT NOT NULL DEFAULT '[]'
);
CREATE TABLE IF NOT EXISTS names (label TEXT PRIMARY KEY, job TEXT NOT NULL, actual TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS names_by_job ON names (job);
CREATE INDEX IF NOT EXISTS names_by_actual ON names (actual);
CREATE TABLE IF NOT EXISTS items (
    position INTEGER PRIMARY KEY, label TEXT NOT NULL, shown TEXT NOT NULL, job TEXT NOT NULL, film TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS items_by_label ON items (label);
CREATE TABLE IF NOT EXISTS digests (path TEXT PRIMARY KEY, stamp TEXT NOT NULL, digest TEXT NOT NULL);
"""


class ManifestInUse(BadMap):
    """Another run works in the same output folder."""


@dataclass(frozen=True)
class JobRecord:
    """tails: what follows the label in the names of the files, such as ".png" or "/a.png". error: of a failed job."""

    id: str
    state: str
    attempts: int
    seconds: float
    error: str | None
    texts: list[str]
    tails: list[str]


@dataclass(frozen=True)
class ItemRecord:
    """An item of the present run in its place, and its job when that has ended. actual: the label its files have."""

    position: int
    label: str
    shown: str
    job_id: str
    film: str
    actual: str | None
    job: JobRecord | None

    def files(self) -> list[str]:
        """Relative to the output folder."""
        if self.job is None or self.job.state != DONE or self.actual is None:
            return []
        return [self.actual + tail for tail in self.job.tails]


class Manifest:
    """Open it with `Manifest.open`. All calls come from one thread."""

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self.path = path
        self._db = connection

    @classmethod
    @contextmanager
    def open(cls, path: Path, workflow_key: str, restart: bool = False) -> Iterator[Manifest]:
        """The manifest at `path`, made when it is not there, for this process alone until the block ends.

        restart: forget the results of before; their files are replaced one by one as new ones come.
        Raises ManifestInUse, and BadMap for a damaged file, one that belongs to another workflow, or a folder that cannot
        be written.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            db = sqlite3.connect(path, timeout=0, isolation_level=None)
        except (OSError, sqlite3.OperationalError) as error:
            if is_full(error):
                raise
            raise BadMap(f"Nothing can be written to {path.parent.parent}: {error}.") from None
        with _damage_told(path):
            try:
                try:
                    # Set before the first access: the lock is then held, by the system, until the connection or the process ends.
                    db.execute("PRAGMA locking_mode=EXCLUSIVE")
                    db.execute("PRAGMA journal_mode=WAL")
                    db.execute("PRAGMA synchronous=FULL")
                    db.execute("BEGIN EXCLUSIVE")
                    # A file from elsewhere may bring statements of its own, which would run with ours.
                    if (
                        db.execute("SELECT 1 FROM sqlite_master WHERE type IN ('view', 'trigger')").fetchone()
                        is not None
                    ):
                        raise sqlite3.DatabaseError("it holds more than tables")
                    for statement in filter(str.strip, SCHEMA.split(";")):
                        db.execute(statement)
                    manifest = cls(path, db)
                    manifest._belongs_to(workflow_key, restart)
                    db.execute("DELETE FROM items")
                    db.execute("COMMIT")
                except sqlite3.OperationalError as error:
                    if "locked" in str(error):
                        raise ManifestInUse(
                            f"Another run works in {path.parent.parent} at this moment; wait for it, or choose another "
                            "output folder."
                        ) from None
                    raise BadMap(f"The record of the work in {path} cannot be written: {error}.") from None
                except UnicodeDecodeError as error:  # of what SQLite says about a damaged statement
                    raise sqlite3.DatabaseError(str(error)) from None
                yield manifest
            finally:
                try:
                    if db.in_transaction:
                        db.execute("COMMIT")
                finally:
                    db.close()
        sync_folder(path.parent)

    def _belongs_to(self, workflow_key: str, restart: bool) -> None:
        found = self.meta("format")
        if found is not None and found != FORMAT:
            raise BadMap(f"{self.path} was written by another version of Hotpath; delete it to start anew.")
        before = self.meta("workflow")
        if restart:
            self._db.execute("UPDATE jobs SET state = ?", (FORGOTTEN,))
            # Which films are ours is still known, so that new ones take their places.
            self._db.execute("DELETE FROM meta WHERE key NOT LIKE 'film %'")
        elif before not in (None, workflow_key) and self._db.execute("SELECT 1 FROM names").fetchone() is not None:
            raise BadMap(
                f"{self.path.parent.parent} holds results of another workflow, other values in it, or another input for "
                "the items. Choose another output folder, or replace those results with --restart."
            )
        self._set_meta("format", FORMAT)
        self._set_meta("workflow", workflow_key)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """Everything inside is on disk when the block ends, or none of it is."""
        if not self._db.in_transaction:
            self._db.execute("BEGIN")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    def meta(self, key: str) -> str | None:
        row = self._db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return None if row is None else str(row[0])

    def record(self, key: str, value: str) -> None:
        """A fact, on disk when this returns."""
        with self._transaction():
            self._set_meta(key, value)

    def _set_meta(self, key: str, value: str) -> None:
        self._db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))

    def list_item(self, position: int, label: str, shown: str, job_id: str, film: str = "") -> None:
        """Note an item of this run; on disk with the next result, as another run lists its items itself."""
        if not self._db.in_transaction:
            self._db.execute("BEGIN")
        self._db.execute("INSERT INTO items VALUES (?, ?, ?, ?, ?)", (position, label, shown, job_id, film))

    def lists_another(self, label: str, job_id: str) -> bool:
        """Whether another job's result goes by this label in this run."""
        row = self._db.execute("SELECT 1 FROM items WHERE label = ? AND job != ?", (label, job_id)).fetchone()
        return row is not None

    def digest(self, path: str, stamp: str) -> str | None:
        """What the content of a file was when it had this stamp."""
        row = self._db.execute("SELECT digest FROM digests WHERE path = ? AND stamp = ?", (path, stamp)).fetchone()
        return None if row is None else str(row[0])

    def keep_digest(self, path: str, stamp: str, digest: str) -> None:
        """On disk with the next result."""
        if not self._db.in_transaction:
            self._db.execute("BEGIN")
        self._db.execute("INSERT OR REPLACE INTO digests VALUES (?, ?, ?)", (path, stamp, digest))

    def job(self, job_id: str) -> JobRecord | None:
        row = self._db.execute(f"SELECT {COLUMNS} FROM jobs WHERE id = ?", (job_id,)).fetchone()
        return None if row is None else _record(row)

    def name(self, label: str) -> tuple[str, str] | None:
        """(job id, actual label) of what goes by this label."""
        row = self._db.execute("SELECT job, actual FROM names WHERE label = ?", (label,)).fetchone()
        return None if row is None else (str(row[0]), str(row[1]))

    def name_of_job(self, job_id: str) -> list[str]:
        """Every actual label that files of this job have."""
        return [str(row[0]) for row in self._db.execute("SELECT actual FROM names WHERE job = ?", (job_id,))]

    def taken(self, actual: str) -> bool:
        """Whether some item's files have this actual label."""
        return self._db.execute("SELECT 1 FROM names WHERE actual = ?", (actual,)).fetchone() is not None

    def set_name(self, label: str, job_id: str, actual: str) -> None:
        with self._transaction():
            self._db.execute("INSERT OR REPLACE INTO names VALUES (?, ?, ?)", (label, job_id, actual))

    def begin(self, job_id: str, attempt: int) -> None:
        """A job runs in this process from now on: should that die, the next run knows of what."""
        row = (job_id, RUNNING, attempt)
        with self._transaction():
            self._db.execute(
                "INSERT INTO jobs (id, state, attempts) VALUES (?, ?, ?) "
                "ON CONFLICT (id) DO UPDATE SET state = excluded.state, attempts = excluded.attempts",
                row,
            )

    def none_runs(self) -> None:
        """The run ends as it should, and what it stops is not to blame."""
        with self._transaction():
            self._db.execute("UPDATE jobs SET state = ? WHERE state = ?", (FORGOTTEN, RUNNING))

    def begin_commit(self, record: JobRecord, label: str, actual: str, moves: Sequence[tuple[str, str]]) -> None:
        """moves: (from, to), both relative to the output folder."""
        with self._transaction():
            self._write(record, COMMITTING, moves)
            self._db.execute("INSERT OR REPLACE INTO names VALUES (?, ?, ?)", (label, record.id, actual))

    def end_commit(self, job_id: str) -> None:
        """The moves are made. On disk with the next result: lost in a crash, it is found out from the files."""
        if not self._db.in_transaction:
            self._db.execute("BEGIN")
        self._db.execute("UPDATE jobs SET state = ?, moves = '[]' WHERE id = ?", (DONE, job_id))

    def fail(self, record: JobRecord) -> None:
        with self._transaction():
            self._write(record, FAILED, ())

    def refuse(self, job_id: str, label: str, record: JobRecord) -> None:
        """One item of a job gets this record for itself."""
        with self._transaction():
            self._write(record, FAILED, ())
            for table in ("items", "names"):
                self._db.execute(f"UPDATE {table} SET job = ? WHERE label = ? AND job = ?", (record.id, label, job_id))
            # Neither is true of it any more, nor a failure.
            left = (FORGOTTEN, job_id, COMMITTING, RUNNING)
            self._db.execute("UPDATE jobs SET state = ? WHERE id = ? AND state IN (?, ?)", left)

    def forget(self, job_id: str) -> None:
        """As if it had never run."""
        with self._transaction():
            self._db.execute("DELETE FROM jobs WHERE id = ?", (job_id,))

    def committing(self) -> list[tuple[str, list[tuple[str, str]]]]:
        """(job id, moves) of what the last run could not confirm; no more than it had workers."""
        rows = self._db.execute("SELECT id, moves FROM jobs WHERE state = ?", (COMMITTING,)).fetchall()
        return [(str(row[0]), [(str(a), str(b)) for a, b in _read(row[1])]) for row in rows]

    def items(self, film: str | None = None) -> Iterator[ItemRecord]:
        """The items of this run in order; of one film only, if it is named."""
        columns = ", ".join(f"jobs.{column}" for column in COLUMNS.split(", "))
        chosen = "" if film is None else "WHERE items.film = :film"
        query = f"""SELECT items.position, items.label, items.shown, items.job, items.film, names.actual, {columns}
            FROM items LEFT JOIN jobs ON jobs.id = items.job AND jobs.state != '{FORGOTTEN}'
            LEFT JOIN names ON names.label = items.label AND names.job = items.job {chosen} ORDER BY items.position"""
        for row in self._db.execute(query, {"film": film}):
            job = _record(row[6:]) if row[6] is not None else None
            yield ItemRecord(row[0], row[1], row[2], row[3], row[4], row[5], job)

    def _write(self, record: JobRecord, state: str, moves: Sequence[tuple[str, str]]) -> None:
        self._db.execute(
            "INSERT OR REPLACE INTO jobs VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (
                record.id, state, record.attempts, record.seconds, record.error,
                json.dumps(record.texts, ensure_ascii=False), json.dumps(record.tails, ensure_ascii=False),
                json.dumps([list(move) for move in moves], ensure_ascii=False),
            ),
        )  # fmt: skip


COLUMNS = "id, state, attempts, seconds, error, texts, tails"


@contextmanager
def _damage_told(path: Path) -> Iterator[None]:
    """Most of a damaged file is found out long after it was opened."""
    try:
        yield
    except sqlite3.DatabaseError as error:
        if is_full(error):
            raise
        if isinstance(error, sqlite3.OperationalError) and "decode" not in str(error):
            raise SystemRefused(
                errno.EIO,
                f"The record of the work, {path}, cannot be written ({first_line(error)}): see whether its disk is connected and "
                "sound, and run the same again; what is finished is kept.",
            ) from error
        raise BadMap(
            f"The record of the work, {path}, is damaged ({first_line(error)}); delete it to start anew."
        ) from None


def _read(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise sqlite3.DatabaseError(f"in it is no JSON: {error}") from None


def _record(row: Sequence[Any]) -> JobRecord:
    job_id, state, attempts, seconds, error, texts, tails = row
    return JobRecord(job_id, state, attempts, seconds or 0.0, error, _read(texts), _read(tails))


def sync_folder(folder: Path) -> None:
    """Make names in a folder durable. Windows does it by itself and cannot be asked; some network file systems refuse."""
    if os.name == "posix":
        sync(folder)
