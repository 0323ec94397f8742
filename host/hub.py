"""Files and model repositories of the Hugging Face hub, by the pack's own downloader.

The hub is asked for names, sizes and checksums only. What is then fetched is continued when it breaks off, compared with
those, and gets its name last, as every other download.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .downloads import STAGING, TIMEOUT, DownloadError, ProgressCallback, alone, check_space, fetch, safe_target
from .errors import first_line
from .whole_files import put_in_place

REVISION = ".hotpath-revision"  # which one a half folder is of
# What a model folder needs; not the same weights again in another format, and no code.
REPOSITORY_FILES = ("*.safetensors", "*.json", "*.txt", "*.jinja", "*.model", "LICENSE*")

TOKEN_REFUSED = (
    "the hub refuses the token that this machine is logged in with, also for what is public: log in again with "
    "`hf auth login`, or log out with `hf auth logout` and leave HF_TOKEN unset."
)


def refuses_token(error: Exception) -> bool:
    """Whether the hub answered that a token has expired, or never was one (ComfyUI #7517)."""
    return any("Invalid credentials" in str(told) for told in (error, error.__cause__))


def fetch_from_hub(repo: str, path: str, target: Path, progress: ProgressCallback | None = None) -> Path:
    """Download one file of a repository and compare it with the size and checksum that the hub states."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    url = hf_hub_url(repo, path)
    with _hub_errors(f"{repo}/{path}"):
        stated = get_hf_file_metadata(url)
    # A file in large-file storage has its SHA-256 as tag; a small one has a git hash, which says nothing here. Nor does the size
    # then: of a mirror that leads elsewhere the library may tell the length of that answer (huggingface_hub #4698).
    digest = stated.etag if stated.etag is not None and len(stated.etag) == 64 else None
    return fetch(url, target, stated.size if digest is not None else None, digest, progress, model=True)


def fetch_repository(
    repo: str, target: Path, patterns: Iterable[str] = REPOSITORY_FILES, progress: ProgressCallback | None = None
) -> Path:
    """Download a model repository into the folder `target`, which gets its name only when all of it is there.

    progress: told the bytes of all files together. Where another process fetches the same, that is waited for. Raises
    DownloadError.
    """
    with alone(target, progress) as waited:
        if not (waited and target.is_dir()):
            _fetch_repository(repo, target, patterns, progress)
    return target


def _fetch_repository(repo: str, target: Path, patterns: Iterable[str], progress: ProgressCallback | None) -> None:
    from huggingface_hub import HfApi, hf_hub_url
    from huggingface_hub.utils import filter_repo_objects

    if target.exists():
        raise DownloadError(f"{target} is there already; move it away to download {repo} again.")
    with _hub_errors(repo):
        stated = HfApi().model_info(repo, files_metadata=True, timeout=TIMEOUT)
    siblings = {file.rfilename: file for file in stated.siblings or ()}
    wanted = list(filter_repo_objects(siblings, allow_patterns=list(patterns)))
    if not wanted:
        raise DownloadError(f"{repo} holds none of the files a model folder needs ({', '.join(patterns)}).")
    staging = target.parent / STAGING / target.name
    revision, now = staging / REVISION, stated.sha or ""
    if staging.exists() and (not revision.is_file() or revision.read_text(encoding="utf-8") != now):
        shutil.rmtree(staging)  # begun as another revision; sizes alone do not tell its files apart
    staging.mkdir(parents=True, exist_ok=True)
    revision.write_text(now, encoding="utf-8")
    total = sum(siblings[name].size or 0 for name in wanted)
    here = sum(file.stat().st_size for file in staging.rglob("*") if file.is_file())
    check_space(staging, max(0, total - here), target.name)
    before = 0
    for name in wanted:
        file = siblings[name]
        path = safe_target(staging, name)
        if not (path.is_file() and path.stat().st_size == file.size):

            def report(done: int, _: int | None, before: int = before) -> None:
                if progress is not None:
                    progress(before + done, total)

            url = hf_hub_url(repo, name, revision=stated.sha)
            fetch(url, path, file.size, file.lfs.sha256 if file.lfs is not None else None, report)
        before += file.size or 0
    put_in_place(staging, target)
    (target / REVISION).unlink(missing_ok=True)
    if not any(staging.parent.iterdir()):
        staging.parent.rmdir()


@contextmanager
def _hub_errors(what: str) -> Iterator[None]:
    """Turns what huggingface_hub raises into a DownloadError with a cure."""
    from huggingface_hub.errors import GatedRepoError

    try:
        yield
    except GatedRepoError:
        raise DownloadError(
            f"{what} is behind a licence on huggingface.co: accept it there, log in with `hf auth login`, fetch it with "
            "`hf download` and put it where it belongs."
        ) from None
    # Which library speaks HTTP for the hub, and with it the errors of a machine that is offline, changed twice.
    except Exception as error:
        if refuses_token(error):
            raise DownloadError(f"{what} could not be downloaded: {TOKEN_REFUSED}") from error
        raise DownloadError(
            f"{what} could not be downloaded: {first_line(error)}. Connect and try again; it goes on where it stopped. Where the "
            "hub cannot be reached, set HF_ENDPOINT to a mirror before ComfyUI starts."
        ) from error
