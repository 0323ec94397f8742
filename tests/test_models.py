"""Model files: the table, downloads that break off and go on, checks of what is there, the command line over it."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import socket
import struct
import threading
import urllib.request
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hotpath import cli
from hotpath.host import downloads, hub, model_store
from hotpath.host.downloads import DownloadError, DownloadStopped, fetch, safe_target, unpack
from hotpath.host.headless import HeadlessHost
from hotpath.host.known_models import KNOWN_MODELS, HubFile, HubRepository, KnownModel, WebFile, ZipMember, select
from hotpath.host.model_files import verify
from hotpath.host.model_store import obtain
from safetensors.torch import save_file

CONTENT = bytes(range(256)) * 4096  # 1 MiB
SHA = hashlib.sha256(CONTENT).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """Serves `files`; `behaviour` says what goes wrong."""

    files: ClassVar[dict[str, bytes]] = {}
    behaviour: ClassVar[dict[str, Any]] = {}
    requests: ClassVar[list[dict[str, str]]] = []

    def do_GET(self):
        Handler.requests.append(dict(self.headers))
        behaviour = Handler.behaviour
        if redirect := behaviour.get("redirect"):
            self.send_response(302)
            self.send_header("Location", redirect)
            self.end_headers()
            return
        if behaviour.get("errors", 0) > 0:
            behaviour["errors"] -= 1
            self.send_error(behaviour.get("code", 503))
            return
        content = Handler.files.get(self.path)
        if content is None:
            self.send_error(404)
            return
        start, etag = 0, behaviour.get("etag", '"v1"')
        wanted = self.headers.get("Range")
        if wanted and not behaviour.get("no_ranges") and self.headers.get("If-Range", etag) == etag:
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
            if start >= len(content):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(content)}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            start = behaviour.get("starts_at", start)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        if "length" not in behaviour or behaviour["length"] is not None:
            self.send_header("Content-Length", behaviour.get("length", str(len(content) - start)))
        if etag:
            self.send_header("ETag", etag)
        self.end_headers()
        cuts = behaviour.get("cut_after", [])
        stop = cuts.pop(0) if cuts else len(content)
        with contextlib.suppress(OSError):  # a download that was stopped is not read to its end
            self.wfile.write(content[start : start + stop])
        if start + stop < len(content):
            self.wfile.flush()
            self.connection.close()

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def server():
    Handler.files, Handler.behaviour, Handler.requests = {"/model.bin": CONTENT}, {}, []
    web = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=web.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{web.server_port}"
    web.shutdown()
    web.server_close()


def get(server: str, folder: Path, **options: Any) -> Path:
    return fetch(f"{server}/model.bin", folder / "m" / "model.bin", pause=0, **options)


def stop(done: int, total: int | None) -> None:
    raise DownloadStopped("stopped")


def leftovers(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.rglob("*") if p.is_file())


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
        fetch(f"{server}/other.bin", tmp_path / "other.bin", pause=0)
    assert len(Handler.requests) == 1  # asking again would not help
    assert leftovers(tmp_path) == []


def test_nobody_answers(tmp_path):
    with pytest.raises(DownloadError, match="run the same command again"):
        fetch("http://127.0.0.1:9/x", tmp_path / "x", pause=0)


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


def archive(path: Path, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as out:
        for name, content in members.items():
            out.writestr(name, content)
    return path


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
    assert not (tmp_path / "model").exists()


@pytest.fixture
def a_hub(server, monkeypatch):
    """huggingface_hub's answers about the repository a/Tiny, whose files are on the local server."""
    import huggingface_hub

    files = {"config.json": b"{}", "model.safetensors": CONTENT, "run.py": b"print()", "sub/tokenizer.json": b"[]"}

    def sibling(name: str) -> Any:
        whole = files[name]
        lfs = type("Lfs", (), {"sha256": hashlib.sha256(whole).hexdigest()}) if name.endswith("safetensors") else None
        return type("Sibling", (), {"rfilename": name, "size": len(whole), "lfs": lfs})

    def info(self: Any, repo: str, files_metadata: bool, timeout: float) -> Any:
        assert repo == "a/Tiny" and files_metadata and timeout < 120
        return type("Info", (), {"sha": "abc", "siblings": [sibling(name) for name in files]})

    Handler.files = {f"/a/Tiny/{name}": content for name, content in files.items()}

    def url(repo: str, name: str, revision: str | None = None) -> str:
        Handler.behaviour.setdefault("revisions", []).append(revision)
        return f"{server}/{repo}/{name}"

    monkeypatch.setattr(huggingface_hub, "hf_hub_url", url)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", info)
    monkeypatch.setattr(downloads, "PAUSE", 0)
    return files


def test_a_hub_file_is_compared_with_the_hubs_own_checksum(a_hub, tmp_path, monkeypatch):
    import huggingface_hub

    stated = type("Metadata", (), {"etag": SHA, "size": len(CONTENT)})
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda url: stated)
    target = tmp_path / "controlnet" / "instantid" / "model.safetensors"
    assert hub.fetch_from_hub("a/Tiny", "model.safetensors", target).read_bytes() == CONTENT
    assert leftovers(tmp_path) == ["model.safetensors"]
    stated.etag = "0" * 64
    target.unlink()
    with pytest.raises(DownloadError, match="checksum"):
        hub.fetch_from_hub("a/Tiny", "model.safetensors", target)
    assert not target.exists()
    for nothing in (None, "0" * 40):  # what a small file has says nothing of its bytes
        stated.etag = nothing
        assert hub.fetch_from_hub("a/Tiny", "model.safetensors", target).is_file()
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda url: 1 / 0)
    with pytest.raises(DownloadError, match=r"a/Tiny/model\.safetensors could not be downloaded: division"):
        hub.fetch_from_hub("a/Tiny", "model.safetensors", target)


def test_a_repository_gets_its_name_when_all_of_it_is_there(a_hub, tmp_path):
    target = tmp_path / "LLM" / "Tiny"
    Handler.behaviour["cut_after"] = [2, *[100_000] * downloads.ATTEMPTS]
    with pytest.raises(DownloadError, match="to go on"):
        hub.fetch_repository("a/Tiny", target)
    assert not target.exists()
    Handler.requests.clear()
    steps: list[tuple[int, int | None]] = []
    assert hub.fetch_repository("a/Tiny", target, progress=lambda *step: steps.append(step)) == target
    assert not (target.parent / downloads.STAGING).exists() and set(Handler.behaviour["revisions"]) == {"abc"}
    assert leftovers(tmp_path) == ["config.json", "model.safetensors", "tokenizer.json"]  # and no code
    assert (target / "model.safetensors").read_bytes() == CONTENT and (target / "sub" / "tokenizer.json").is_file()
    assert [r.get("Range") for r in Handler.requests] == ["bytes=500000-", None]  # config.json was there
    whole = len(CONTENT) + 4
    assert steps[-1][0] == whole and {total for _, total in steps} == {whole}
    assert [done for done, _ in steps] == sorted(done for done, _ in steps)
    with pytest.raises(DownloadError, match="there already"):
        hub.fetch_repository("a/Tiny", target)
    with pytest.raises(DownloadError, match=r"a/Tiny holds none of the files .*\(\*\.gguf\)"):
        hub.fetch_repository("a/Tiny", tmp_path / "LLM" / "Other", ["*.gguf"])


def test_a_repository_is_of_one_revision(a_hub, tmp_path, monkeypatch):
    """What came before the repository changed is not kept beside what comes after it."""
    import huggingface_hub

    target, stated = tmp_path / "LLM" / "Tiny", huggingface_hub.HfApi().model_info
    Handler.behaviour["cut_after"] = [2, *[100_000] * downloads.ATTEMPTS]
    with pytest.raises(DownloadError, match="to go on"):
        hub.fetch_repository("a/Tiny", target)

    def later(self: Any, *args: Any, **options: Any) -> Any:
        found = stated(*args, **options)
        found.sha = "def"
        return found

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", later)
    Handler.files["/a/Tiny/config.json"] = b"[]"
    (target.parent / downloads.STAGING / "Another").mkdir()
    hub.fetch_repository("a/Tiny", target)
    assert (target / "config.json").read_bytes() == b"[]"
    assert [half.name for half in (target.parent / downloads.STAGING).iterdir()] == ["Another"]
    assert leftovers(tmp_path) == ["config.json", "model.safetensors", "tokenizer.json"]


def test_a_repository_with_a_file_that_was_changed_on_the_way(a_hub, tmp_path):
    Handler.files["/a/Tiny/model.safetensors"] = CONTENT[::-1]
    with pytest.raises(DownloadError, match="checksum"):
        hub.fetch_repository("a/Tiny", tmp_path / "LLM" / "Tiny")
    assert not (tmp_path / "LLM" / "Tiny").exists()


def test_a_repository_that_does_not_fit_is_seen_before(a_hub, tmp_path, monkeypatch):
    monkeypatch.setattr(downloads.shutil, "disk_usage", lambda path: type("Usage", (), {"free": len(CONTENT)}))
    with pytest.raises(DownloadError, match="Free some space"):
        hub.fetch_repository("a/Tiny", tmp_path / "LLM" / "Tiny")
    assert Handler.requests == []
    # What came before needs no room again.
    half = tmp_path / "LLM" / downloads.STAGING / "Tiny" / "model.safetensors.part"
    half.write_bytes(CONTENT[:1000])
    hub.fetch_repository("a/Tiny", tmp_path / "LLM" / "Tiny")
    assert Handler.requests[1]["Range"] == "bytes=1000-" and leftovers(tmp_path)[1] == "model.safetensors"


def test_a_hub_that_cannot_be_reached(tmp_path, monkeypatch):
    import huggingface_hub

    def gone(self: Any, *_: Any, **__: Any) -> Any:
        raise RuntimeError("Name or service not known")

    def gated(self: Any, *_: Any, **__: Any) -> Any:
        error = huggingface_hub.errors.GatedRepoError
        raise error.__new__(error)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", gone)
    with pytest.raises(DownloadError, match=r"a/Tiny could not be downloaded: Name .* Connect and try again"):
        hub.fetch_repository("a/Tiny", tmp_path / "Tiny")
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", gated)
    with pytest.raises(DownloadError, match="a/Tiny is behind a licence"):
        hub.fetch_repository("a/Tiny", tmp_path / "Tiny")


def test_a_download_can_be_stopped_and_goes_on(server, tmp_path):
    with pytest.raises(DownloadStopped):
        get(server, tmp_path, progress=stop)
    assert leftovers(tmp_path) == ["model.bin.part", "model.bin.part.etag"]
    assert get(server, tmp_path, sha256=SHA).read_bytes() == CONTENT


def test_structures(tmp_path):
    save_file({"a": torch.zeros(4)}, tmp_path / "good.safetensors")
    torch.save({"a": torch.zeros(4)}, tmp_path / "good.pth")
    torch.save({"a": torch.zeros(4)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    for name in ("good.safetensors", "good.pth", "old.pth"):
        assert verify(tmp_path / name).status == "unverified", name
        data = (tmp_path / name).read_bytes()
        assert verify(tmp_path / name, size=len(data)).status == "verified"
        assert verify(tmp_path / name, sha256=hashlib.sha256(data).hexdigest()[:8]).status == "verified"
        assert verify(tmp_path / name, sha256="00000000").status == "damaged"
        assert verify(tmp_path / name, size=len(data) + 1).status == "damaged"
    save_file({}, tmp_path / "empty.safetensors", metadata={"format": "pt"})
    assert verify(tmp_path / "empty.safetensors").status == "unverified"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.bin", b"", "empty"),
        ("a.bin", b"<!DOCTYPE html><html>", "web page"),
        ("a.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "git-lfs"),
        ("a.safetensors", b"\x01", "does not begin"),
        ("a.safetensors", struct.pack("<Q", 10) + b"not json!!", "cannot be read"),
        ("a.pth", b"hello", "does not begin"),
        ("a.onnx", b"\x08\x07\x12garbage", "ONNX|no network"),
    ],
)
def test_damaged_files(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    verdict = verify(tmp_path / name)
    assert verdict.status == "damaged"
    assert any(word in verdict.detail for word in words.split("|"))


def test_files_that_were_cut_off(tmp_path):
    save_file({"a": torch.zeros(4000)}, tmp_path / "a.safetensors")
    torch.save({"a": torch.zeros(4000)}, tmp_path / "a.pth")
    for path in list(tmp_path.iterdir()):
        path.write_bytes(path.read_bytes()[:-100])
        assert verify(path).status == "damaged", path.name


def test_model_folders(tmp_path):
    assert verify(tmp_path).status == "damaged"
    (tmp_path / "config.json").write_text("{}")
    assert "no weights" in verify(tmp_path).detail
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({"a": torch.zeros(4)}, tmp_path / "one.safetensors")
    assert "1 of 2 weight files are missing: two.safetensors" in verify(tmp_path).detail
    save_file({"b": torch.zeros(4)}, tmp_path / "two.safetensors")
    assert verify(tmp_path).status == "unverified"
    (tmp_path / "two.safetensors").write_bytes((tmp_path / "two.safetensors").read_bytes()[:-4])
    cut = verify(tmp_path)
    assert cut.status == "damaged" and cut.detail.startswith("two.safetensors: it has")
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    assert "model.safetensors.index.json cannot be read" in verify(tmp_path).detail


def test_the_table_is_sound(tmp_path):
    assert len({m.name for m in KNOWN_MODELS}) == len(KNOWN_MODELS)
    for model in KNOWN_MODELS:
        safe_target(tmp_path / model.kind, model.file)
        assert str(model.source).startswith("https://"), model.name
        assert model.licence and model.about
        assert model.sha256 is None or len(model.sha256) >= 8
        if "non-commercial" in model.licence.lower():
            assert model.non_commercial, f"{model.name} must ask before it is downloaded"
        if isinstance(model.source, HubRepository):
            assert model.file == model.source.repo.partition("/")[2]
        if isinstance(model.source, HubFile | WebFile | ZipMember):
            assert Path(model.file).suffix


def test_selection_by_name_and_family():
    assert [m.name for m in select(["INSTANTID"])] == ["instantid-adapter", "instantid-controlnet"]
    assert [m.name for m in select(["colormnet", "colormnet"])] == ["colormnet"]
    assert select(["deep-exemplar"]) == select(["deep_exemplar"]) and len(select(["deep-exemplar"])) == 3
    with pytest.raises(KeyError, match="no model called 'x'"):
        select(["x"])


@pytest.fixture
def small_table(server, monkeypatch):
    """Three small models on the local server, in place of the real table."""
    from hotpath.commands import models
    from hotpath.host import known_models

    packed = WebFile(f"{server}/pack.zip")
    table = (
        KnownModel("free", "one", "one", "sub/model.bin", WebFile(f"{server}/model.bin", sha256=SHA), "MIT", "a file"),
        KnownModel(
            "bound", "two", "two", "x.onnx", ZipMember(packed, "x.onnx"), "non-commercial", "a", non_commercial=True
        ),
        KnownModel("gone", "three", "three", "y.bin", WebFile(f"{server}/nothing"), "MIT", "not there"),
    )
    monkeypatch.setattr(known_models, "KNOWN_MODELS", table)
    monkeypatch.setattr(models, "KNOWN_MODELS", table)
    monkeypatch.setattr(downloads, "PAUSE", 0)
    return table


def command(capsys, tmp_path: Path, *words: str) -> tuple[int, str, str]:
    code = cli.main(["models", *words, "--models", str(tmp_path / "models")])
    out, err = capsys.readouterr()
    return code, out, err


def test_a_download_from_the_command_line(small_table, capsys, tmp_path):
    code, out, _ = command(capsys, tmp_path, "download", "free")
    path = tmp_path / "models" / "one" / "sub" / "model.bin"
    assert code == 0 and out.strip() == str(path) and path.read_bytes() == CONTENT
    Handler.requests.clear()
    code, _, err = command(capsys, tmp_path, "download", "free")
    assert code == 0 and "here already" in err and Handler.requests == []


def test_a_dry_run_does_nothing(small_table, capsys, tmp_path):
    code, out, _ = command(capsys, tmp_path, "download", "free", "bound", "--dry-run")
    assert code == 0 and "pack.zip" in out and str(tmp_path / "models" / "two" / "x.onnx") in out
    assert "; licence: non-commercial" in out
    assert Handler.requests == [] and not (tmp_path / "models").exists()


def test_a_bar_takes_the_sum_so_far(monkeypatch):
    import tqdm
    from hotpath.commands.models import Bar

    class Counted:
        total, n, closed = None, 0, False

        def update(self, further: int) -> None:
            self.n += further

        def close(self) -> None:
            self.closed = True

    counted = Counted()
    monkeypatch.setattr(tqdm, "tqdm", lambda **_: counted)
    with Bar("a model") as bar:
        for done in (10, 25, 40):
            bar.update(done, 100)
            assert (counted.n, counted.total, counted.closed) == (done, 100, False)
    assert counted.closed


def test_a_licence_must_be_accepted(small_table, capsys, tmp_path, monkeypatch):
    import io

    Handler.files["/pack.zip"] = archive(tmp_path / "p.zip", **{"inner/x.onnx": b"model"}).read_bytes()
    code, _, err = command(capsys, tmp_path, "download", "two")
    assert code == 2 and "--accept-licence" in err and "non-commercial" in err and Handler.requests == []

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr("sys.stdin", Terminal("n\n"))
    assert command(capsys, tmp_path, "download", "two")[0] == 2 and Handler.requests == []
    monkeypatch.setattr("sys.stdin", Terminal("yes\n"))
    code, out, _ = command(capsys, tmp_path, "download", "two")
    path = tmp_path / "models" / "two" / "x.onnx"
    assert code == 0 and out.strip() == str(path) and path.read_bytes() == b"model"
    assert leftovers(tmp_path / "models") == ["x.onnx"]  # the archive is gone
    path.unlink()
    assert command(capsys, tmp_path, "download", "two", "--accept-licence")[0] == 0


def test_one_failure_does_not_stop_the_others(small_table, capsys, tmp_path):
    code, out, err = command(capsys, tmp_path, "download", "gone", "free")
    assert code == 1 and "gone: " in err and "404" in err and "model.bin" in out


def test_unknown_names(small_table, capsys, tmp_path):
    code, _, err = command(capsys, tmp_path, "download", "nonsense")
    assert code == 2 and "families are: one, two, three" in err


def test_list_and_verify(small_table, capsys, tmp_path):
    command(capsys, tmp_path, "download", "free")
    entries = json.loads(command(capsys, tmp_path, "list", "--json")[1])
    assert [bool(e["found"]) for e in entries] == [True, False, False]
    assert entries[1]["belongs"] == str(tmp_path / "models" / "two" / "x.onnx")
    assert cli.main(["models"]) == 0  # lists, too
    assert "free" in capsys.readouterr().out
    _, out, _ = command(capsys, tmp_path, "list")
    assert "free   here" in out and "bound  missing" in out
    assert command(capsys, tmp_path, "verify")[0] == 1  # bytes that are no torch file
    code, out, _ = command(capsys, tmp_path, "verify", "bound")
    assert code == 1 and "missing" in out


def test_verify_with_nothing_there(small_table, capsys, tmp_path):
    code, _, err = command(capsys, tmp_path, "verify")
    assert code == 0 and "None of the known model files" in err
