"""Which files that are not whole yet nobody will finish."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from hotpath.host import held as locks
from hotpath.host import unfinished, whole_files
from hotpath.host.held import is_held
from hotpath.host.whole_files import whole_file

WRITES = """
import runpy, sys
from pathlib import Path
with runpy.run_path(sys.argv[1])["held"](Path(sys.argv[2])):
    Path(sys.argv[3]).write_text("half")
    print("writes", flush=True)
    sys.stdin.read()
"""
OTHER = "0123456789abcdef" * 2


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where is written, on a machine of its own."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    ends: list[Callable[[], None]] = []
    monkeypatch.setattr(unfinished.atexit, "register", ends.append)
    for known in (unfinished._writer, unfinished._place):
        known.cache_clear()
    yield tmp_path / "out"
    for end in ends:
        end()
    for known in (unfinished._writer, unfinished._place):
        known.cache_clear()


def write(folder: Path) -> None:
    """As a process does that begins to write there."""
    whole_files._swept.discard(folder)
    with whole_file(folder / "a") as path:
        path.write_text("whole")


def place() -> Path:
    found = unfinished._place()
    assert found is not None
    return found


def test_what_a_killed_writer_left_goes_at_once_and_what_a_living_one_writes_stays(folder: Path) -> None:
    folder.mkdir()
    left = folder / f"{unfinished.WRITING}{OTHER}-x.png"
    command = [sys.executable, "-c", WRITES, locks.__file__, str(place() / OTHER), str(left)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None and writer.stdout.readline() == b"writes\n"
        os.utime(left, (time.time() - 3600,) * 2)
        with whole_file(folder / "b") as mine:
            mine.write_text("half")
            write(folder)
            assert mine.exists() and left.exists()
        writer.kill()
    write(folder)
    assert {path.name for path in folder.iterdir()} == {"a", "b"}


def test_of_a_writer_elsewhere_nobody_knows_whether_it_lives(folder: Path) -> None:
    folder.mkdir()
    names = [folder / f"{unfinished.WRITING}{name}" for name in (f"{OTHER}-x", "x", f"{OTHER}-y")]
    for name in names:
        name.write_text("half")
    os.utime(names[2], (time.time() - unfinished.ABANDONED - 60,) * 2)
    write(folder)
    assert [name.exists() for name in names] == [True, True, False]


@pytest.mark.skipif(os.name != "posix", reason="locks and modes as POSIX has them")
@pytest.mark.parametrize("fault", ["no locks", "locks that hold nothing", "another's folder", "no folder"])
def test_where_nothing_is_sure_everything_stays_for_a_day(
    folder: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    folder.mkdir()
    (place() / OTHER).touch()
    left = folder / f"{unfinished.WRITING}{OTHER}-x"
    left.write_text("half")

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    def accept(*_: object) -> None:
        pass

    if "locks" in fault:
        lock = refuse if fault == "no locks" else accept
        monkeypatch.setattr(locks, "fcntl", SimpleNamespace(**vars(locks.fcntl) | {"flock": lock, "fcntl": lock}))
    elif fault == "another's folder":
        place().chmod(0o777)
    else:
        monkeypatch.setattr(tempfile, "tempdir", str(folder / "absent" / "tmp"))
    unfinished._place.cache_clear()
    write(folder)
    assert left.exists()
    os.utime(left, (1, 1))
    write(folder)
    assert not left.exists()


def test_of_processes_that_were_killed_nothing_is_kept_for_long(folder: Path) -> None:
    for name, age in (("old", 2 * unfinished.ABANDONED), ("young", 60)):
        (place() / name).touch()
        os.utime(place() / name, (time.time() - age,) * 2)
    write(folder)
    (mine,) = {path.name for path in place().iterdir()} - {"young"}
    assert is_held(place() / mine) and unfinished.unfinished_name(".png").startswith(f"{unfinished.WRITING}{mine}-")
