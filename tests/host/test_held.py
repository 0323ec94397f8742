"""What is held by one process at a time, and let go of however that ends."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hotpath.host import held as module
from hotpath.host.held import delete, held, is_held, opened_alone

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


FOR_A_CLIENT = """
import fcntl, sys
file = open(sys.argv[1], "r+b")
fcntl.lockf(file, fcntl.LOCK_EX)
print("holds", flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="locks as Linux has them")
def test_what_a_server_holds_for_its_clients_is_held(tmp_path: Path) -> None:
    """NFS and SMB servers hold POSIX's own locks for them, which flock on the server itself does not see."""
    path = tmp_path / "at-work"
    path.touch()
    command = [sys.executable, "-c", FOR_A_CLIENT, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as server:
        assert server.stdout is not None and server.stdout.readline() == b"holds\n"
        with held(path) as ours:
            assert ours is None and is_held(path)
        server.communicate()
    assert is_held(path) is False and path.exists()
    with held(path) as ours:
        assert ours is not None and is_held(path)
    assert is_held(path) is None


@pytest.mark.parametrize("known", [False, True])
def test_a_system_without_such_locks_has_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, known: bool) -> None:
    flock = pytest.importorskip("fcntl")

    def refuse(*_: object) -> None:
        raise OSError(22, "Invalid argument")  # as sandboxes do, and kernels before 3.15

    without = {name: value for name, value in vars(flock).items() if known or not name.startswith("F_OFD")}
    monkeypatch.setattr(module, "fcntl", SimpleNamespace(**without | {"fcntl": refuse}))
    with held(tmp_path / "a") as first, held(tmp_path / "a") as second:
        assert first is not None and second is None
    with opened_alone(tmp_path / "b") as file:
        assert is_held(tmp_path / "b")
        delete(tmp_path / "b", file)
    assert not list(tmp_path.iterdir())


def test_on_windows_a_byte_behind_the_end_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is held there nobody else can read; two who added to a list at once wrote over each other."""
    path, taken, waits = tmp_path / "list", set(), []

    def busy(opens: Any, times: list[int]) -> Any:
        def open_later(*asked: Any, **how: Any) -> Any:
            if times[0]:
                times[0] -= 1
                raise PermissionError(13, "Permission denied")
            return opens(*asked, **how)

        return open_later

    def locking(number: int, mode: int, count: int) -> None:
        place = os.fstat(number).st_ino, os.lseek(number, 0, os.SEEK_CUR)
        assert count == 1 and place[1] == module.FAR
        if mode == fake.LK_UNLCK:
            taken.remove(place)
        elif place in taken:
            raise PermissionError(13, "Permission denied")
        else:
            taken.add(place)

    fake = SimpleNamespace(locking=locking, LK_NBLCK=2, LK_UNLCK=0)
    monkeypatch.setattr(module, "msvcrt", fake, raising=False)
    monkeypatch.setattr(module, "sys", SimpleNamespace(platform="win32"))

    def add() -> None:
        with opened_alone(path) as file:
            file.write(b"b")

    thread = threading.Thread(target=add)
    with opened_alone(path) as file:
        thread.start()
        thread.join(0.05)
        assert thread.is_alive() and path.read_bytes() == b""
        file.write(b"a")
    thread.join()
    assert path.read_bytes() == b"ab" and not taken
    monkeypatch.setattr(Path, "open", busy(Path.open, times := [3]))
    monkeypatch.setattr(module.time, "sleep", waits.append)
    with opened_alone(path) as file:
        delete(path, file)
        assert file.closed
    assert not times[0] and waits == list(module.WAITS[:3])
    assert not list(tmp_path.iterdir()) and not taken


@pytest.mark.skipif(os.name != "posix", reason="locks as POSIX has them")
def test_a_disk_without_locks_holds_nobody_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    names = {"F_WRLCK": 1, "F_OFD_SETLK": 37, "LOCK_EX": 2, "LOCK_NB": 4}
    monkeypatch.setattr(module, "fcntl", SimpleNamespace(fcntl=refuse, flock=refuse, **names))
    with held(tmp_path / "a") as first, held(tmp_path / "a") as second:
        assert first is not None and second is not None
        assert is_held(tmp_path / "a") is None


@pytest.mark.skipif(os.name != "posix", reason="on Windows nobody deletes a file that is open")
def test_what_another_machine_has_deleted_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, stats = tmp_path / "list", []

    def stale(file: Any, look: Any = os.fstat) -> Any:
        stats.append(file)
        if len(stats) == 1:
            path.unlink()
            raise OSError(errno.ESTALE, "Stale file handle")  # as NFS says of what is open
        return look(file)

    monkeypatch.setattr(module.os, "fstat", stale)
    with opened_alone(path) as file:
        file.write(b"x")
    assert path.read_bytes() == b"x" and len(stats) == 2


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
