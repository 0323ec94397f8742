"""Which of the known model files are here, and how a missing one is obtained: for the command line and the panel."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from . import known_models
from .downloads import STAGING, DownloadError, ProgressCallback, alone, fetch, safe_target, unpack
from .hub import fetch_from_hub, fetch_repository
from .interface import Host
from .known_models import HubFile, HubRepository, KnownModel, WebFile, ZipMember


def find(model: KnownModel, host: Host) -> Path | None:
    """Where the file or folder is, in the folders that nodes search; None when it is missing."""
    for folder in host.model_folders(model.kind):
        path = folder / model.file
        if path.is_dir() if isinstance(model.source, HubRepository) else path.is_file():
            return path
        if isinstance(model.source, HubRepository):
            # Other packs keep theirs one folder down: LLM/Qwen-VL/<name>, LLM/<owner>/<name>.
            deeper = next((p.parent for p in folder.glob(f"*/{model.file}/config.json")), None)
            if deeper is not None:
                return deeper
    return None


def belongs(model: KnownModel, host: Host) -> Path:
    """Where a download puts it. Raises DownloadError where a link leads out of the folder."""
    return safe_target(host.model_folders(model.kind)[0], model.file)


def place_of(model: KnownModel, host: Host) -> Path:
    """Where it belongs, to be shown: what is there already may well be a link out of the folder, to another disk."""
    return host.model_folders(model.kind)[0] / model.file


def describe(model: KnownModel, host: Host) -> dict[str, Any]:
    """One model as plain data, for `list --json`, `doctor` and the panel."""
    found = find(model, host)
    return {
        "name": model.name,
        "family": model.family,
        "found": str(found) if found is not None else None,
        "belongs": str(place_of(model, host)),
        "source": str(model.source),
        "licence": model.licence,
        "non_commercial": model.non_commercial,
        "about": model.about,
    }


def free_space(model: KnownModel, host: Host) -> int | None:
    """Bytes free on the disk that a download of `model` goes to; None where that disk is away."""
    folder = place_of(model, host).parent
    try:
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        return shutil.disk_usage(folder).free
    except OSError:
        return None


def jobs(models: Sequence[KnownModel]) -> list[list[KnownModel]]:
    """The models in groups that one download brings: members of one archive together, every other one alone."""
    archives: dict[WebFile, list[KnownModel]] = {}
    alone: list[list[KnownModel]] = []
    for model in models:
        if isinstance(model.source, ZipMember):
            archives.setdefault(model.source.archive, []).append(model)
        else:
            alone.append([model])
    return [*alone, *archives.values()]


def archive_mates(model: KnownModel, host: Host) -> list[KnownModel]:
    """`model` and what else is missing of the archive it comes in."""
    if not isinstance(model.source, ZipMember):
        return [model]
    return [
        other
        for other in known_models.KNOWN_MODELS
        if other == model
        or (
            isinstance(other.source, ZipMember)
            and other.source.archive == model.source.archive
            and find(other, host) is None
        )
    ]


def obtain(models: Sequence[KnownModel], host: Host, progress: ProgressCallback | None = None) -> list[Path]:
    """Download one of the groups of `jobs` to where it belongs. Raises DownloadError."""
    first = models[0]
    if isinstance(first.source, ZipMember):
        return _from_archive(first.source.archive, models, host, progress)
    target = belongs(first, host)
    match first.source:
        case HubFile(repo, path):
            return [fetch_from_hub(repo, path, target, progress)]
        case HubRepository(repo):
            return [fetch_repository(repo, target, progress=progress)]
        case WebFile(url, size, sha256):
            return [fetch(url, target, size, sha256, progress, model=True)]


def _from_archive(
    archive: WebFile, models: Sequence[KnownModel], host: Host, progress: ProgressCallback | None
) -> list[Path]:
    wanted: dict[str, Path] = {}
    for model in models:
        if not isinstance(model.source, ZipMember) or model.source.archive != archive:
            raise DownloadError(f"{model.name} is not in the archive {archive.url}.")
        wanted[model.source.name] = belongs(model, host)
    staging = host.model_folders(models[0].kind)[0] / STAGING
    packed = safe_target(staging, archive.url.rpartition("/")[2])
    with alone(staging / "archive", progress) as waited:
        if not (waited and all(path.is_file() for path in wanted.values())):
            fetch(archive.url, packed, archive.size, archive.sha256, progress, model=True)
            unpack(packed, wanted)
            packed.unlink()
    with suppress(OSError):  # it holds the half file of another one
        staging.rmdir()
    return list(wanted.values())
