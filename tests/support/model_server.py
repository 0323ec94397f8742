"""A server of model files that misbehaves on request, and what is asked of it."""

from __future__ import annotations

import contextlib
import hashlib
import zipfile
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, ClassVar

from hotpath.host.downloads import DownloadStopped, fetch

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


def get(server: str, folder: Path, **options: Any) -> Path:
    return fetch(f"{server}/model.bin", folder / "m" / "model.bin", **options)


def stop(done: int, total: int | None) -> None:
    raise DownloadStopped("stopped")


def leftovers(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.rglob("*") if p.is_file())


def archive(path: Path, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as out:
        for name, content in members.items():
            out.writestr(name, content)
    return path
