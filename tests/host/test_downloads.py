"""Downloads that break off and go on, are refused, or come in an archive."""

from __future__ import annotations

import errno
import os
import socket
import threading
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from hotpath.host import downloads, model_store
from hotpath.host.downloads import DownloadError, DownloadStopped, fetch, safe_target, unpack
from hotpath.host.headless import HeadlessHost
from hotpath.host.known_models import KnownModel, WebFile, ZipMember
from hotpath.host.model_store import obtain
from model_server import CONTENT, SHA, Handler, archive, get, leftovers, stop


def test_a_file_arrives_whole(server, tmp_path):
    steps: list[tuple[int, int | None]] = []
    path = get(server, tmp_path, size=len(CONTENT), sha256=SHA, progress=lambda *s: steps.append(s))
    assert path.read_bytes() == CONTENT
    assert leftovers(tmp_path) == ["model.bin"]
    assert steps[-1] == (len(CONTENT), len(CONTENT))


def test_a_broken_transfer_is_continued_where_it_stopped(server, tmp_path):
    Handler.behaviour["cut_after"] = [300_000, 200_000]
    assert get(server, tmp_path, sha256=SHA).read_bytes() == CONTENT
    assert [r.get("Range") for r in Handler.requests] == [None, "bytes=300000-", "bytes=500000-"]
    assert Handler.requests[1]["If-Range"] == '"v1"'
    assert leftovers(tmp_path) == ["model.bin"]


@pytest.mark.parametrize("etag", ["", 'W/"v1"'])
def test_a_tag_that_does_not_tell_bytes_apart_is_not_sent_back(server, tmp_path, etag):
    Handler.behaviour.update(cut_after=[300_000], etag='"v1"')
    with pytest.raises(DownloadStopped):
        get(server, tmp_path, progress=stop)
    Handler.behaviour.update(cut_after=[300_000], etag=etag, no_ranges=True)
    assert get(server, tmp_path, sha256=SHA).read_bytes() == CONTENT
    assert "If-Range" not in Handler.requests[-1] and Handler.requests[-1]["Range"].startswith("bytes=3")


@pytest.mark.parametrize("length", [None, "unknown"])
def test_a_server_that_does_not_say_how_much_comes(server, tmp_path, length):
    Handler.behaviour["length"] = length
    steps: list[tuple[int, int | None]] = []
    assert get(server, tmp_path, progress=lambda *s: steps.append(s)).read_bytes() == CONTENT
    assert steps[-1] == (len(CONTENT), None)
    Handler.behaviour["cut_after"] = [300_000]
    assert get(server, tmp_path, size=len(CONTENT)).read_bytes() == CONTENT


def test_a_part_that_begins_elsewhere_is_not_appended(server, tmp_path):
    Handler.behaviour.update(cut_after=[300_000], starts_at=0)
    assert get(server, tmp_path, sha256=SHA).read_bytes() == CONTENT


def test_a_later_command_goes_on(server, tmp_path):
    Handler.behaviour["cut_after"] = [100_000] * downloads.ATTEMPTS
    with pytest.raises(DownloadError, match=r"500000 bytes are kept in model\.bin\.part; run the same command again"):
        get(server, tmp_path)
    assert not (tmp_path / "m" / "model.bin").exists()
    Handler.requests.clear()
    assert get(server, tmp_path, sha256=SHA).read_bytes() == CONTENT
    assert [r.get("Range") for r in Handler.requests] == ["bytes=500000-"]


def test_a_file_that_changed_meanwhile_starts_anew(server, tmp_path):
    Handler.behaviour["cut_after"] = [100_000] * downloads.ATTEMPTS
    with pytest.raises(DownloadError):
        get(server, tmp_path)
    other = CONTENT[::-1]
    Handler.files["/model.bin"] = other
    Handler.behaviour.update(etag='"v2"')
    assert get(server, tmp_path).read_bytes() == other


def test_a_server_without_ranges(server, tmp_path):
    Handler.behaviour.update(no_ranges=True, cut_after=[300_000])
    steps: list[tuple[int, int | None]] = []
    path = get(server, tmp_path, size=len(CONTENT), sha256=SHA, progress=lambda *s: steps.append(s))
    assert path.read_bytes() == CONTENT and steps[-1] == (len(CONTENT), len(CONTENT))


def test_everything_was_there_but_the_name(server, tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "model.bin.part").write_bytes(CONTENT)
    assert get(server, tmp_path, sha256=SHA).read_bytes() == CONTENT


def test_a_part_longer_than_the_file_is_dropped(server, tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "model.bin.part").write_bytes(CONTENT + b"x")
    assert get(server, tmp_path, sha256=SHA).read_bytes() == CONTENT


@pytest.mark.parametrize("code", [429, 500, 503])
def test_a_server_that_is_busy_is_asked_again(server, tmp_path, code):
    Handler.behaviour.update(errors=2, code=code)
    assert get(server, tmp_path).read_bytes() == CONTENT


def test_a_server_that_stays_busy(server, tmp_path, monkeypatch):
    Handler.behaviour["errors"] = 99
    waits: list[float] = []
    monkeypatch.setattr(downloads, "PAUSE", 1)
    monkeypatch.setattr(downloads.time, "sleep", waits.append)
    with pytest.raises(DownloadError, match="503"):
        fetch(f"{server}/model.bin", tmp_path / "model.bin")
    assert waits == [1, 2, 4, 8]


def test_a_server_that_is_silent_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(downloads, "TIMEOUT", 0.05)
    monkeypatch.setattr(downloads, "ATTEMPTS", 1)
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(DownloadError, match="timed out"):
        fetch(f"http://127.0.0.1:{silent.getsockname()[1]}/a", tmp_path / "a")


def test_a_wrong_checksum_leaves_nothing(server, tmp_path):
    with pytest.raises(DownloadError, match=f"checksum {SHA[:8]} instead of 01234567"):
        get(server, tmp_path, sha256="01234567")
    assert leftovers(tmp_path) == []


def test_the_first_digits_of_a_checksum_are_enough(server, tmp_path):
    assert get(server, tmp_path, sha256=SHA[:8].upper()).is_file()


def test_a_wrong_size_leaves_nothing(server, tmp_path):
    with pytest.raises(DownloadError, match="1048576 bytes instead of 5"):
        get(server, tmp_path, size=5)
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "answer", "problem"),
    [
        ("model.bin", b"<!DOCTYPE html><html>Sign in to the network</html>", "a web page"),
        ("model.pth", b"nothing that torch writes", "does not begin like a torch checkpoint"),
        ("model.safetensors", b"an error in plain words", "does not begin like a safetensors file"),
    ],
)
def test_what_is_no_model_gets_no_models_name(server, tmp_path, name, answer, problem):
    """Where neither size nor checksum is known, as of the colour models' weights."""
    Handler.files[f"/{name}"] = answer
    with pytest.raises(
        DownloadError, match=f"something else than {name}: it .*{problem}.* removed; if the network asks"
    ):
        obtain(
            [KnownModel("m", "one", "one", name, WebFile(f"{server}/{name}"), "MIT", "a file")],
            HeadlessHost(models=tmp_path, device="cpu"),
        )
    assert leftovers(tmp_path) == []


def test_what_comes_in_one_archive_is_fetched_once(server, tmp_path, monkeypatch):
    packed, other = WebFile(f"{server}/pack.zip"), WebFile(f"{server}/other.zip")
    Handler.files["/pack.zip"] = archive(tmp_path / "a.zip", **{"x.onnx": b"x", "y.onnx": b"y"}).read_bytes()
    (tmp_path / "a.zip").unlink()
    x, y, z = (
        KnownModel(name, "one", "one", f"{name}.onnx", ZipMember(source, f"{name}.onnx"), "MIT", "a file")
        for name, source in (("x", packed), ("y", packed), ("z", other))
    )
    alone = KnownModel("alone", "one", "one", "alone.pth", WebFile(f"{server}/alone.pth"), "MIT", "a file")
    monkeypatch.setattr(model_store.known_models, "KNOWN_MODELS", (x, alone, y, z))
    assert model_store.jobs([x, alone, y, z]) == [[alone], [x, y], [z]]
    here = HeadlessHost(models=tmp_path, device="cpu")
    assert model_store.archive_mates(alone, here) == [alone] and model_store.archive_mates(z, here) == [z]
    assert model_store.archive_mates(y, here) == [x, y]
    half = tmp_path / "one" / downloads.STAGING / "other.zip.part"
    half.parent.mkdir(parents=True)
    half.write_bytes(b"half")
    assert obtain([x], here) == [tmp_path / "one" / "x.onnx"] and half.exists()
    assert model_store.archive_mates(y, here) == [y] and model_store.archive_mates(x, here) == [x, y]
    half.unlink()
    obtain([y], here)
    assert leftovers(tmp_path) == ["x.onnx", "y.onnx"] and not half.parent.exists()
    for stranger in (z, alone):
        with pytest.raises(DownloadError, match=f"{stranger.name} is not in the archive"):
            obtain([x, stranger], here)


def test_what_is_not_there(server, tmp_path):
    with pytest.raises(DownloadError, match="404"):
        fetch(f"{server}/other.bin", tmp_path / "other.bin")
    assert len(Handler.requests) == 1  # asking again would not help
    assert leftovers(tmp_path) == []


def test_nobody_answers(tmp_path):
    with pytest.raises(DownloadError, match="run the same command again"):
        fetch("http://127.0.0.1:9/x", tmp_path / "x")


def test_too_little_space_is_seen_before(server, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(downloads.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(DownloadError, match="Free some space"):
        get(server, tmp_path)
    assert leftovers(tmp_path) == []


class FullDisk:
    """A file that takes 1000 bytes and then says that the disk is full."""

    def __init__(self, file: Any) -> None:
        self.file = file

    def write(self, data: bytes) -> int:
        self.file.write(data[:1000])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def __enter__(self):
        return self

    def __exit__(self, *_: Any) -> None:
        self.file.close()


def test_a_disk_that_fills_up_keeps_what_came(server, tmp_path, monkeypatch):
    opened = Path.open

    def open_full(self, mode="r", *args, **kwargs):
        file = opened(self, mode, *args, **kwargs)
        return FullDisk(file) if self.suffix == ".part" and mode in ("wb", "ab") else file

    monkeypatch.setattr(Path, "open", open_full)
    with pytest.raises(DownloadError, match=r"is full\. 1000 bytes of model\.bin are kept"):
        get(server, tmp_path)
    monkeypatch.setattr(Path, "open", opened)
    assert get(server, tmp_path, sha256=SHA).read_bytes() == CONTENT
    assert Handler.requests[-1]["Range"] == "bytes=1000-"


def test_a_disk_that_fills_up_while_an_archive_is_unpacked_keeps_nothing_half(tmp_path, monkeypatch):
    packed, opened = archive(tmp_path / "a.zip", model=b"abcdefgh" * 1000), Path.open

    def open_full(self, mode="r", *args, **kwargs):
        file = opened(self, mode, *args, **kwargs)
        return FullDisk(file) if mode == "wb" else file

    monkeypatch.setattr(Path, "open", open_full)
    with pytest.raises(DownloadError, match=r"^The disk with .* is full, so model was not written: free some space"):
        unpack(packed, {"model": tmp_path / "models" / "model"})
    assert leftovers(tmp_path) == ["a.zip"]


@pytest.mark.parametrize("url", ["http://example.com/a", "ftp://127.0.0.1/a", "file:///etc/passwd", "example.com/a"])
def test_only_https(url, tmp_path):
    with pytest.raises(DownloadError, match="https"):
        fetch(url, tmp_path / "a")


@pytest.mark.parametrize(
    ("address", "why"),
    [("http://example.com/a", "not an https address"), ("http://[::1", "leads to an address that is none")],
)
def test_a_redirect_to_plain_http_or_nowhere_is_refused(server, tmp_path, address, why):
    Handler.behaviour["redirect"] = address
    with pytest.raises(DownloadError, match=why):
        get(server, tmp_path)


@pytest.mark.parametrize(
    ("asked", "named"),
    [("https://example.com/a", "https://cdn.example.com/b"), ("http://127.0.0.1:80/a", "http://localhost/b")],
)
def test_a_redirect_to_where_one_may_go_is_followed(asked, named):
    request = urllib.request.Request(asked)
    followed = downloads._SecureRedirects().redirect_request(request, None, 302, "", {}, named)
    assert followed.full_url == named


def test_a_server_cannot_have_this_machine_asked():
    request = urllib.request.Request("https://example.com/a")
    with pytest.raises(DownloadError, match="not followed"):
        downloads._SecureRedirects().redirect_request(request, None, 302, "", {}, "http://127.0.0.1:8188/free")


def test_more_than_the_stated_size_is_not_read(server, tmp_path, monkeypatch):
    monkeypatch.setattr(downloads, "CHUNK", 1000)
    steps: list[int] = []
    with pytest.raises(DownloadError, match="gave 3000 bytes instead of 2500"):
        get(server, tmp_path, size=2500, progress=lambda done, _: steps.append(done))
    assert steps == [1000, 2000] and len(Handler.requests) == 1
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("name", ["../a", "/a", "a/../../b", "..\\a", "C:a", "C:\\a", "", "a\0b"])
def test_names_that_leave_the_folder(name, tmp_path):
    with pytest.raises(DownloadError, match="nothing is written"):
        safe_target(tmp_path, name)


def test_a_link_that_leaves_the_folder(tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "out").symlink_to(tmp_path)
    with pytest.raises(DownloadError, match="through a link"):
        safe_target(tmp_path / "models", "out/a")


def test_members_are_found_in_whatever_folder(tmp_path):
    members = {"antelopev2/antelopev2/x.onnx": b"x", "../../y.onnx": b"y", "z": b"z", "x.onnx/": b""}
    packed, folder = archive(tmp_path / "a.zip", **members), tmp_path / "models" / "m"
    unpack(packed, {"x.onnx": folder / "x.onnx", "y.onnx": folder / "y.onnx"})
    assert (folder / "x.onnx").read_bytes() == b"x"
    assert leftovers(tmp_path) == ["a.zip", "x.onnx", "y.onnx"]


def test_archives_that_cannot_be_used(tmp_path):
    packed = archive(tmp_path / "a.zip", other=b"x")
    with pytest.raises(DownloadError, match=r"does not hold x\.onnx; it has: other"):
        unpack(packed, {"x.onnx": tmp_path / "x.onnx"})
    packed.write_bytes(packed.read_bytes()[:-30])
    with pytest.raises(DownloadError, match="damaged"):
        unpack(packed, {"other": tmp_path / "other"})


def test_a_damaged_member_does_not_get_its_name(tmp_path):
    packed = archive(tmp_path / "a.zip", model=b"abcdefgh" * 100)
    data = bytearray(packed.read_bytes())
    data[100] ^= 1
    packed.write_bytes(bytes(data))
    with pytest.raises(DownloadError, match="damaged"):
        unpack(packed, {"model": tmp_path / "model"})
    assert leftovers(tmp_path) == ["a.zip"]


def test_a_download_can_be_stopped_and_goes_on(server, tmp_path):
    with pytest.raises(DownloadStopped):
        get(server, tmp_path, progress=stop)
    assert leftovers(tmp_path) == ["model.bin.part", "model.bin.part.etag"]
    assert get(server, tmp_path, sha256=SHA).read_bytes() == CONTENT


@pytest.mark.skipif(os.name != "posix", reason="locks as POSIX has them")
def test_two_processes_fetch_one_file_once(server, tmp_path, monkeypatch):
    """Both would write into one half file, which then is neither's."""
    monkeypatch.setattr(downloads, "PAUSE", 0.01)
    begun, waits = threading.Event(), threading.Event()

    def slowly(done: int, total: int | None) -> None:
        begun.set()
        assert waits.wait(5)

    first = threading.Thread(target=get, args=(server, tmp_path), kwargs={"size": len(CONTENT), "progress": slowly})
    first.start()
    assert begun.wait(5)
    with pytest.raises(DownloadStopped):
        get(server, tmp_path, size=len(CONTENT), progress=stop)
    path = get(server, tmp_path, size=len(CONTENT), progress=lambda *_: waits.set())
    first.join()
    assert path.read_bytes() == CONTENT and leftovers(tmp_path) == ["model.bin"] and len(Handler.requests) == 1
