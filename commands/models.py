"""`hotpath models`: what files there are, whether those here are whole, and downloads."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from ..host.downloads import STAGING, DownloadError, fetch, fetch_from_hub, fetch_repository, safe_target, unpack
from ..host.headless import HeadlessHost
from ..host.known_models import KNOWN_MODELS, HubFile, HubRepository, KnownModel, WebFile, ZipMember, select
from ..host.model_files import verify
from .console import complain, note, say, table
from .models_folder import headless_host

FAILED, REFUSED = 1, 2


def run(options: argparse.Namespace) -> int:
    """Exit code: 0 all right, 1 a file is damaged or did not come, 2 an unknown name or a licence not accepted."""
    host = headless_host(options.models)
    action = options.action or "list"
    actions: dict[str, Callable[[HeadlessHost, argparse.Namespace], int]] = {
        "list": _list,
        "verify": _verify,
        "download": _download,
    }
    try:
        return actions[action](host, options)
    except KeyError as error:
        complain(str(error.args[0]))
        return REFUSED


def find(model: KnownModel, host: HeadlessHost) -> Path | None:
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


def describe(model: KnownModel, host: HeadlessHost) -> dict[str, Any]:
    """One model as plain data, for `list --json` and `doctor`."""
    found = find(model, host)
    return {
        "name": model.name,
        "family": model.family,
        "found": str(found) if found is not None else None,
        "belongs": str(host.model_folders(model.kind)[0] / model.file),
        "source": str(model.source),
        "licence": model.licence,
        "non_commercial": model.non_commercial,
        "about": model.about,
    }


def _list(host: HeadlessHost, options: argparse.Namespace) -> int:
    entries = [describe(model, host) for model in KNOWN_MODELS]
    if options.json:
        say(json.dumps(entries, indent=2))
        return 0
    rows = [
        (e["name"], "here" if e["found"] else "missing", m.place) for e, m in zip(entries, KNOWN_MODELS, strict=True)
    ]
    say(table(rows, ("name", "state", "place")))
    say()
    for model in KNOWN_MODELS:
        say(f"{model.name}: {model.about}")
        say(f"  from {model.source}", "dim")
        say(f"  licence: {model.licence}", "dim")
    note(f"The models folder is {host.model_folders('')[0]}", "dim")
    return 0


def _verify(host: HeadlessHost, options: argparse.Namespace) -> int:
    asked = select(options.names) if options.names else list(KNOWN_MODELS)
    rows, damaged = [], 0
    for model in asked:
        path = find(model, host)
        if path is None:
            if options.names:
                rows.append((model.name, "missing", f"belongs at {host.model_folders(model.kind)[0] / model.file}"))
                damaged += 1
            continue
        verdict = verify(path, model.size, model.sha256)
        damaged += verdict.status == "damaged"
        rows.append((model.name, verdict.status, f"{path}: {verdict.detail}"))
    if not rows:
        note(f"None of the known model files is in {host.model_folders('')[0]}; see `hotpath models list`.")
        return 0
    say(table(rows, ("name", "state", "file")))
    return FAILED if damaged else 0


def _download(host: HeadlessHost, options: argparse.Namespace) -> int:
    wanted = [model for model in select(options.names) if find(model, host) is None]
    for model in select(options.names):
        if model not in wanted:
            note(f"{model.name} is here already: {find(model, host)}")
    if options.dry_run:
        for model in wanted:
            say(f"{model.name}: {model.about}; licence: {model.licence}")
            say(f"  from {model.source}")
            say(f"  to   {host.model_folders(model.kind)[0] / model.file}")
        return 0
    if not _licences_accepted(wanted, options.accept_licence):
        return REFUSED
    failed = 0
    archives: dict[WebFile, list[KnownModel]] = {}
    for model in wanted:
        if isinstance(model.source, ZipMember):
            archives.setdefault(model.source.archive, []).append(model)
    for model in wanted:
        if not isinstance(model.source, ZipMember):
            failed += not _attempt(model.name, partial(_single, model, host))
    for archive, models in archives.items():
        failed += not _attempt(", ".join(m.name for m in models), partial(_from_archive, archive, models, host))
    return FAILED if failed else 0


def _licences_accepted(models: list[KnownModel], accepted: bool) -> bool:
    bound = [model for model in models if model.non_commercial]
    if not bound or accepted:
        return True
    note("These files may not be used commercially:", "bold")
    for model in bound:
        note(f"  {model.name}: {model.licence}")
        note(f"    {model.source}", "dim")
    if not sys.stdin.isatty():
        complain("add --accept-licence to accept these licences and download the files.")
        return False
    sys.stderr.write("Accept these licences and download? [y/N] ")
    sys.stderr.flush()
    if sys.stdin.readline().strip().lower() in ("y", "yes"):
        return True
    note("Nothing was downloaded.")
    return False


def _attempt(name: str, download: Callable[[], list[Path]]) -> bool:
    try:
        for path in download():
            say(str(path))
        return True
    except DownloadError as error:
        complain(f"{name}: {error}")
        return False


def _single(model: KnownModel, host: HeadlessHost) -> list[Path]:
    target = safe_target(host.model_folders(model.kind)[0], model.file)
    note(f"{model.name}: {model.source}")
    match model.source:
        case HubFile(repo, path):
            return [fetch_from_hub(repo, path, target)]
        case HubRepository(repo):
            return [fetch_repository(repo, target)]
        case WebFile(url, size, sha256):
            with Bar(target.name) as bar:
                return [fetch(url, target, size, sha256, bar.update)]
        case ZipMember():
            raise AssertionError("members of an archive are taken out together")


def _from_archive(archive: WebFile, models: list[KnownModel], host: HeadlessHost) -> list[Path]:
    wanted: dict[str, Path] = {}
    for model in models:
        assert isinstance(model.source, ZipMember)
        wanted[model.source.name] = safe_target(host.model_folders(model.kind)[0], model.file)
    staging = host.model_folders(models[0].kind)[0] / STAGING
    name = archive.url.rpartition("/")[2]
    note(f"{name}: {archive.url}")
    with Bar(name) as bar:
        packed = fetch(archive.url, safe_target(staging, name), archive.size, archive.sha256, bar.update)
    paths = unpack(packed, wanted)
    packed.unlink()
    if not any(staging.iterdir()):
        staging.rmdir()
    return paths


class Bar:
    """A tqdm bar of bytes, for a callback that tells the sum so far."""

    def __init__(self, name: str) -> None:
        from tqdm import tqdm

        self._bar = tqdm(desc=name, unit="B", unit_scale=True, unit_divisor=1000, disable=None, leave=False)

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def update(self, done: int, total: int | None) -> None:
        self._bar.total = total
        self._bar.update(done - self._bar.n)
