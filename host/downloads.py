"""Downloads over HTTPS that can be continued: to `<name>.part`, checked, then renamed into place.

A name never reaches outside its folder, nothing unchecked gets a model's name, and what the server sends instead of
the file (an error page, another length) is not taken for it.
"""

from __future__ import annotations

import http.client
import ipaddress
import shutil
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any
from urllib.parse import urlsplit

from .errors import first_line, is_full
from .held import held
from .model_files import sha256_of, structure_problem
from .whole_files import put_in_place, whole_file

CHUNK = 1 << 20
TIMEOUT = 30.0
ATTEMPTS = 5
PAUSE = 1.0  # seconds before the second attempt, doubled for each further one
STAGING = ".hotpath-download"
AGENT = "hotpath"

ProgressCallback = Callable[[int, int | None], None]


class DownloadError(RuntimeError):
    """The file was not downloaded; the message says why and what to do."""


class DownloadStopped(DownloadError):
    """Raised by a `progress` callback to stop; what has come is kept, and the next download goes on from there."""


def safe_target(folder: Path, name: str) -> Path:
    """`folder/name`. Raises DownloadError for a name that is absolute, climbs up, or hides a drive or a backslash."""
    parts = PurePosixPath(name).parts
    if (
        not parts
        or name.startswith("/")
        or ".." in parts
        or "\\" in name
        or "\0" in name
        or PureWindowsPath(name).drive
    ):
        raise DownloadError(f"{name!r} is not a file name inside {folder}, so nothing is written there.")
    target = folder.joinpath(*parts)
    if not target.resolve().is_relative_to(folder.resolve()):
        raise DownloadError(f"{name!r} leads out of {folder} through a link, so nothing is written there.")
    return target


def fetch(
    url: str,
    target: Path,
    size: int | None = None,
    sha256: str | None = None,
    progress: ProgressCallback | None = None,
    model: bool = False,
) -> Path:
    """Download `url` to `target`, going on where an earlier attempt stopped.

    size: exact bytes, sha256: hex digits, all or the first few; both are checked before the file gets its name.
    progress: called with bytes so far and bytes in all. model: without a checksum, it must be built as a model file of its name
    is, or be no web page at least. Where another process fetches the same, that is waited for. Raises DownloadError.
    """
    _check_address(url)
    with alone(target, progress) as waited:
        if waited and target.is_file() and size in (None, target.stat().st_size):
            return target
        return _fetch(url, target, size, sha256, progress, model)


@contextmanager
def alone(target: Path, progress: ProgressCallback | None = None) -> Iterator[bool]:
    """Whether another process was waited for that fetched `target`, which is likely there now: into one half file both would
    write. progress: called meanwhile."""
    part = _part_of(target)
    waited = False
    while True:
        with held(part.with_name(part.name + ".held")) as ours:
            if ours is not None:
                yield waited
                return
        waited = True
        if progress is not None:
            progress(part.stat().st_size if part.is_file() else 0, None)
        time.sleep(PAUSE)


def _fetch(
    url: str, target: Path, size: int | None, sha256: str | None, progress: ProgressCallback | None, model: bool
) -> Path:
    part = _part_of(target)
    for attempt in range(ATTEMPTS):
        try:
            if _receive(url, part, size, progress):
                break
            reason = "the connection ended early"
        except urllib.error.HTTPError as error:
            if error.code < 500 and error.code != 429:
                raise DownloadError(f"{url} answers {error.code} {error.reason}; the file is not there.") from None
            reason = f"{error.code} {error.reason}"
        except OSError as error:
            if is_full(error):
                raise DownloadError(_disk_full(part, target)) from None
            reason = str(getattr(error, "reason", error)) or type(error).__name__
        except http.client.HTTPException as error:
            reason = first_line(error)  # the server's own words
        if attempt + 1 < ATTEMPTS:
            time.sleep(PAUSE * 2**attempt)
    else:
        kept = f" {part.stat().st_size} bytes are kept in {part.name};" if part.is_file() else ""
        raise DownloadError(f"{url}: {reason}.{kept} run the same command again to go on.")
    check(part, url, size, sha256)
    if model and sha256 is None and (problem := structure_problem(part, target.suffix)) is not None:
        # A network that asks to sign in answers with its page, as if that were the file.
        _discard(part)
        raise DownloadError(
            f"{url} gave something else than {target.name}: {problem} It was removed; if the network asks you to sign in, do "
            "so and try again."
        )
    put_in_place(part, target)
    _tag_of(part).unlink(missing_ok=True)
    return target


def check(path: Path, source: str, size: int | None, sha256: str | None) -> None:
    """Compare with what is known; a file that differs is removed. Raises DownloadError."""
    found = path.stat().st_size
    if size is not None and found != size:
        _discard(path)
        raise DownloadError(f"{source} gave {found} bytes instead of {size}; it was removed. Try again later.")
    if sha256 is not None and not (digest := sha256_of(path)).startswith(sha256.lower()):
        _discard(path)
        raise DownloadError(
            f"{source} has the checksum {digest[: len(sha256)]} instead of {sha256}; it was removed, because it is "
            "damaged or not the file it should be."
        )


def _receive(url: str, part: Path, size: int | None, progress: ProgressCallback | None) -> bool:
    """Append to `part` what is missing; True when all is there."""
    have = part.stat().st_size if part.is_file() else 0
    tag = _tag_of(part)
    headers = {"User-Agent": AGENT, "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
        if tag.is_file():
            # Without the same tag the server sends the whole file: ours began as another version of it.
            headers["If-Range"] = tag.read_text(encoding="ascii", errors="replace").strip()
    opener = urllib.request.build_opener(_SecureRedirects)
    try:
        answer = opener.open(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise
        total = (error.headers.get("Content-Range") or "").rpartition("/")[2]
        if total == str(have):
            return True
        _discard(part)
        return False
    except ValueError as error:  # raised for half an address that a server leads to
        raise DownloadError(f"{url} leads to an address that is none ({error}), so it is not followed.") from None
    with answer:
        resumed = answer.status == http.HTTPStatus.PARTIAL_CONTENT and _starts_at(answer.headers, have)
        if not resumed:
            have = 0
        length = answer.headers.get("Content-Length")
        total_bytes = have + int(length) if length is not None and length.isdecimal() else size
        check_space(part.parent, (total_bytes or 0) - have, part.name.removesuffix(".part"))
        etag = answer.headers.get("ETag")
        if etag and not etag.startswith("W/"):
            tag.write_text(etag, encoding="ascii", errors="replace")
        else:
            tag.unlink(missing_ok=True)
        with part.open("ab" if resumed else "wb") as file:
            while chunk := answer.read(CHUNK):
                file.write(chunk)
                have += len(chunk)
                if size is not None and have > size:
                    return True  # not the file, as `check` will say; a stream without end must not fill the disk
                if progress is not None:
                    progress(have, total_bytes)
    return total_bytes is None or have >= total_bytes


def _starts_at(headers: Mapping[str, str], offset: int) -> bool:
    return (headers.get("Content-Range") or "").startswith(f"bytes {offset}-")


def _part_of(target: Path) -> Path:
    return target.with_name(target.name + ".part")


def _tag_of(part: Path) -> Path:
    return part.with_name(part.name + ".etag")


def _discard(path: Path) -> None:
    path.unlink(missing_ok=True)
    _tag_of(path).unlink(missing_ok=True)


def check_space(folder: Path, needed: int, name: str) -> None:
    """Raises DownloadError when the disk with `folder`, which must exist, has fewer than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DownloadError(
            f"{folder} has {free / 1e9:.2f} GB free, and {needed / 1e9:.2f} GB are needed for {name}. "
            "Free some space, or choose another folder with --models."
        )


def _disk_full(part: Path, target: Path) -> str:
    kept = part.stat().st_size if part.is_file() else 0
    return (
        f"The disk with {part.parent} is full. {kept} bytes of {target.name} are kept in {part.name}; free some space "
        "and run the same command again to go on, or delete that file."
    )


def _check_address(url: str) -> None:
    address = urlsplit(url)
    if address.scheme == "https" or (address.scheme == "http" and is_loopback(address.hostname or "")):
        return
    raise DownloadError(f"{url} is not an https address, so it is not downloaded.")


def is_loopback(name: str) -> bool:
    """Whether a host's name or address is that of this machine alone."""
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost"


class _SecureRedirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to https only (and, from this machine, to this machine)."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        _check_address(newurl)
        if urlsplit(newurl).scheme != "https" and not is_loopback(urlsplit(req.full_url).hostname or ""):
            # Else a server could have this machine's own services asked, ComfyUI among them.
            raise DownloadError(
                f"{req.full_url} leads to {newurl}, which is not an https address, so it is not followed."
            )
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def unpack(archive: Path, wanted: Mapping[str, Path]) -> list[Path]:
    """Take the members called `wanted` (by their last name) out of a zip. Raises DownloadError when one is missing."""
    try:
        with zipfile.ZipFile(archive) as opened:
            members = {PurePosixPath(m.filename).name: m for m in opened.infolist() if not m.is_dir()}
            if missing := [name for name in wanted if name not in members]:
                raise DownloadError(f"{archive.name} does not hold {', '.join(missing)}; it has: {', '.join(members)}.")
            for name, target in wanted.items():
                # Reading to the end also compares the member's own checksum.
                with whole_file(target) as part, opened.open(members[name]) as source, part.open("wb") as file:
                    shutil.copyfileobj(source, file, CHUNK)
    except zipfile.BadZipFile as error:
        raise DownloadError(f"{archive.name} is damaged ({error}); delete it and download it again.") from None
    except OSError as error:
        if is_full(error):
            raise DownloadError(str(error.strerror)) from None
        raise
    return list(wanted.values())
