"""Files that are there whole or not at all."""

from __future__ import annotations

import errno
import os
import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hotpath import cli
from hotpath.headless.core_nodes import SaveImage
from hotpath.host import whole_files
from hotpath.host.system_errors import SystemRefused, sentence
from hotpath.host.whole_files import whole_file
from hotpath.nodes import NODE_CLASS_MAPPINGS
from PIL import Image


def test_a_file_is_there_when_its_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "made" / "with it" / "a.txt"
    with whole_file(path) as unfinished:
        unfinished.write_text("half")
        assert not path.exists() and unfinished.parent == path.parent and unfinished.suffix == ""
        unfinished.write_text("whole")
    assert path.read_text() == "whole" and list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("stop", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_what_was_there_stays_when_it_does_not(tmp_path: Path, stop: BaseException) -> None:
    path = tmp_path / "a.txt"
    path.write_text("before")
    with pytest.raises(type(stop)), whole_file(path) as unfinished:
        unfinished.write_text("half")
        raise stop
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_told_with_its_cure_whoever_found_it(tmp_path: Path) -> None:
    said = "Error while serializing: I/O error: No space left on device (os error 28)"  # as safetensors does
    for found in (OSError(28, "No space left on device"), RuntimeError(said)):
        sentence = r"is full, so a\.txt was not written: free some space"
        with pytest.raises(OSError, match=sentence) as told, whole_file(tmp_path / "a.txt"):
            raise found
        assert told.value.errno == 28 and str(told.value).startswith("The disk with"), "no number before it"
    with pytest.raises(RuntimeError, match="os error 2"), whole_file(tmp_path / "a.txt"):
        raise RuntimeError("No such file or directory (os error 2)")


def test_what_the_disk_refuses_is_told_of_the_file_that_was_to_be(tmp_path: Path) -> None:
    """Of what is open the system names nothing, and of what is not whole yet a name that nobody knows."""
    for named in ([], [str(tmp_path / f"{whole_files.WRITING}x")]):
        with pytest.raises(SystemRefused, match=r"a\.txt does not work as it should"), whole_file(tmp_path / "a.txt"):
            raise OSError(errno.EIO, "Input/output error", *named)
    with pytest.raises(OSError, match="other"), whole_file(tmp_path / "a.txt"):
        raise OSError(errno.EIO, "Input/output error", "other")


def test_a_disk_on_which_nothing_goes_any_more_hides_no_cause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system", "another")

    monkeypatch.setattr(Path, "unlink", fail)
    with (
        pytest.raises(SystemRefused, match=r"a\.txt does not work as it should"),
        whole_file(tmp_path / "a.txt") as path,
    ):
        path.touch()
        raise OSError(errno.EIO, "Input/output error")


def test_what_killed_writers_left_goes_and_what_others_write_stays(tmp_path: Path) -> None:
    names = [tmp_path / f"{whole_files.WRITING}{name}" for name in ("old", "young", "ahead")]
    for name, hours in zip(names, (-25, -1, 25), strict=True):
        name.write_text("half")
        os.utime(name, (time.time() + hours * 3600,) * 2)
    for name in ("a", "b"):
        with whole_file(tmp_path / name) as unfinished:
            unfinished.write_text("whole")
        assert [path.exists() for path in names] == [False, True, True]
        os.utime(names[1], (1, 1))  # in a folder that has been looked into
    assert names[1].exists()


def test_it_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a power cut would leave an empty file of that name, and what it was made of may be gone."""
    steps: list[str] = []
    fsync, move = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (steps.append("on the disk"), fsync(handle)))
    monkeypatch.setattr(Path, "replace", lambda old, new: (steps.append(new.name), move(old, new)))
    with whole_file(tmp_path / "a") as unfinished:
        unfinished.write_text("whole")
    assert steps == ["on the disk", "a"]


@pytest.mark.parametrize("links", [True, False])
def test_a_new_file_takes_nobodys_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    """Two runs into one folder number their pictures at the same time; the later one replaced the other's."""

    def refuse(*_: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    for text in ("first", "second"):

        def write(path: Path, text: str = text) -> None:
            path.write_text(text)
            (tmp_path / "1.png").write_text("another's")

        path = whole_files.new_file((tmp_path / f"{n}.png" for n in range(1, 9)), write, ".png")
        assert path.read_text() == text
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {
        "1.png": "another's",
        "2.png": "first",
        "3.png": "second",
    }


def test_two_writers_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with whole_file(path) as first, whole_file(path) as second:
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first"


@pytest.mark.skipif(os.name != "posix", reason="modes of POSIX")
def test_who_may_read_it_is_the_umasks_affair(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with whole_file(tmp_path / "a") as unfinished:
            unfinished.write_text("")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def test_windows_is_waited_for_when_another_program_holds_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    move = Path.replace

    def held(self: Path, target: Path) -> Path:
        if len(waits) < 2:
            raise PermissionError(13, "it is used by another process")
        return move(self, target)

    monkeypatch.setattr(Path, "replace", held)
    monkeypatch.setattr(whole_files.time, "sleep", waits.append)
    with pytest.raises(SystemRefused, match="a is closed to the user"), whole_file(tmp_path / "a"):
        pass
    assert not waits, "only Windows lets go by itself"
    monkeypatch.setattr(whole_files, "os", SimpleNamespace(**vars(os) | {"name": "nt"}))
    with whole_file(tmp_path / "a") as unfinished:
        unfinished.write_text("whole")
    assert (tmp_path / "a").read_text() == "whole" and waits == list(whole_files.HELD[:2])


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.ENOSPC, "^The disk with a/b is full: free some space on it"),
        (errno.EACCES, "^a/b is closed to the user who runs this: give that user the right"),
        (errno.EROFS, "^a/b is on a disk that can only be read: choose another place"),
        (errno.ENAMETOOLONG, "^a/b is too long a name"),
        (errno.ENOTDIR, "^There is a file where a/b needs a folder"),
        (
            errno.EIO,
            "^The disk with a/b does not work as it should \\(Input/output error\\): see whether it is connected",
        ),
        (errno.ESTALE, "^The disk with a/b does not work as it should"),
        (errno.EMFILE, "^This process may open no more files: .*ulimit -n"),
    ],
)
def test_what_the_system_refuses_is_told_with_its_cure_by_nodes_and_commands(
    number: int, said: str, headless_host: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number), "a/b")

    monkeypatch.setattr("hotpath.nodes.cache.clear_all", refuse)
    with pytest.raises(OSError, match=said) as told:
        NODE_CLASS_MAPPINGS["HotpathCache"]().manage("all")
    assert told.value.errno == number and isinstance(told.value.__cause__, OSError)
    assert re.search(said, sentence(told.value)), "told once"
    monkeypatch.setattr("hotpath.commands.doctor.run", refuse)
    assert cli.main(["doctor"]) == 1
    assert re.search(said, capsys.readouterr().err.removeprefix("hotpath: "))


def test_on_windows_a_closed_file_may_be_one_that_another_program_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    error = PermissionError(errno.EACCES, "Permission denied", "a/b")
    monkeypatch.setattr("hotpath.host.system_errors.os", SimpleNamespace(name="nt"))
    assert sentence(error).startswith("a/b is closed to the user who runs this, or open in another program: close that")


def test_of_a_full_disk_no_half_picture_is_left(headless_host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def half(self: Image.Image, path: Path, *_: Any, **__: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", half)
    with pytest.raises(OSError, match=r"is full, so a_00001_\.png was not written"):
        SaveImage().save_images(torch.zeros(1, 2, 2, 3), "a")
    assert not list(headless_host.output_folder().iterdir())
