"""What is held by one process at a time, and let go of however that ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from hotpath.host import held as module
from hotpath.host.held import held, opened_alone

HOLDS = """
import runpy, sys, time
from pathlib import Path
with runpy.run_path(sys.argv[1])["held"](Path(sys.argv[2])):
    print("holds", flush=True)
    time.sleep(100)
"""


def test_one_at_a_time_and_nothing_is_left(tmp_path: Path) -> None:
    path = tmp_path / "made" / "at-work"
    with held(path) as first, held(path) as second:
        assert first is not None and second is None and path.exists()
    assert not path.exists()
    path.touch()  # a killed one's
    with held(path) as again:
        assert again is not None


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="kills as POSIX does")
def test_the_system_lets_go_for_who_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "at-work"
    other = subprocess.Popen([sys.executable, "-c", HOLDS, module.__file__, str(path)], stdout=subprocess.PIPE)
    assert other.stdout is not None and other.stdout.readline() == b"holds\n"
    with held(path) as ours:
        assert ours is None
    other.kill()
    other.wait()
    with held(path) as ours:
        assert ours is not None


@pytest.mark.skipif(os.name != "posix", reason="locks as POSIX has them")
def test_a_disk_without_locks_holds_nobody_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    names = {"F_WRLCK": 1, "F_OFD_SETLK": 37, "LOCK_EX": 2, "LOCK_NB": 4}
    monkeypatch.setattr(module, "fcntl", SimpleNamespace(fcntl=refuse, flock=refuse, **names))
    with held(tmp_path / "a") as first, held(tmp_path / "a") as second:
        assert first is not None and second is not None


@pytest.mark.skipif(os.name != "posix", reason="on Windows nobody replaces a file that is open")
def test_who_waits_gets_the_file_that_is_there_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "list"

    def add() -> None:
        with opened_alone(path) as file:
            file.write(b"added")

    with opened_alone(path):
        thread = threading.Thread(target=add)
        thread.start()
        (tmp_path / "new").write_bytes(b"new ")
        (tmp_path / "new").replace(path)
    thread.join()
    assert path.read_bytes() == b"new added"
    with opened_alone(path) as file:
        forked = os.dup(file.fileno())  # as a process has it that is forked meanwhile
    begun = time.monotonic()
    add()
    os.close(forked)
    assert time.monotonic() - begun < module.PATIENCE / 2
    monkeypatch.setattr(module, "PATIENCE", 0.02)
    with opened_alone(path):  # by one that was halted
        add()
    assert path.read_bytes() == b"new addedaddedadded"
