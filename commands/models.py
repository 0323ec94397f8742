"""`hotpath models`: what files there are, whether those here are whole, and downloads."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable

from ..host.downloads import DownloadError
from ..host.headless import HeadlessHost
from ..host.known_models import KNOWN_MODELS, KnownModel, select
from ..host.model_files import verify
from ..host.model_store import describe, find, jobs, obtain
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
        verdict = verify(path)
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
    return FAILED if sum(not _attempt(group, host) for group in jobs(wanted)) else 0


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


def _attempt(models: list[KnownModel], host: HeadlessHost) -> bool:
    names = ", ".join(model.name for model in models)
    note(f"{names}: {models[0].source}")
    try:
        with Bar(names) as bar:
            paths = obtain(models, host, bar.update)
    except DownloadError as error:
        complain(f"{names}: {error}")
        return False
    for path in paths:
        say(str(path))
    return True


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
