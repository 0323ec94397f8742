"""Fetching a model folder from the hub: resumed when interrupted, stopped on request, local files when offline."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from .. import host
from ..host.errors import first_line
from . import folders
from .folders import ModelFolder, UnusableModel

log = logging.getLogger("hotpath.vision_language")

# Code of a repository is never fetched, so it can never run.
WANTED = ["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model", "merges.txt"]


def locate(name: str, revision: str = "", must_see: bool = True) -> ModelFolder:
    """The whole, checked folder for a widget value; fetched from the hub when it is not on the disk.

    revision: branch, tag or commit for a fetch. A named revision has its own folder, so that a local folder of another
    revision never answers for it. Raises UnusableModel.
    """
    local = folders.find(revision_folder(name, revision) if revision else name)
    if local is not None and not folders.missing_weights(local.path):
        return folders.check(local, must_see)
    repository = folders.repository(name)
    target = local.path if local is not None else target_folder(name, revision)
    try:
        fetch(repository, target, revision)
    except UnusableModel as error:
        if local is not None:
            # Say what is missing on the disk and why it could not be completed.
            try:
                return folders.check(local, must_see)
            except UnusableModel as incomplete:
                raise UnusableModel(f"{incomplete} Fetching them failed: {error}") from error
        raise
    config = folders.read_config(target)
    if config is None:
        raise UnusableModel(f"{repository} was fetched to {target}, but it has no config.json of a model.")
    return folders.check(ModelFolder(target, target.name, config), must_see)


def revision_folder(name: str, revision: str) -> str:
    safe = "".join(c if c.isalnum() or c in "-._" else "-" for c in revision)
    return f"{name.strip().rstrip('/')}@{safe}"


def target_folder(name: str, revision: str) -> Path:
    named = revision_folder(name, revision) if revision else name.strip()
    return folders.roots()[0] / named.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1]


def fetch(repository: str, target: Path, revision: str = "") -> None:
    """Fetch `repository` into `target`; files that are there are kept, half files are continued.

    Raises UnusableModel when the hub cannot be reached, does not have the repository, or asks for a licence.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
    from tqdm import tqdm

    here = host.current()

    class StoppableBar(tqdm):  # type: ignore[type-arg,unused-ignore]
        """The hub's own bars, asked for an interrupt whenever they move."""

        def update(self, n: Any = 1) -> Any:
            here.check_interrupt()
            return super().update(n)

    log.info("fetching %s into %s", repository, target)
    here.show_text(f"Fetching {repository} ...")
    try:
        snapshot_download(
            repository, revision=revision or None, local_dir=target, allow_patterns=WANTED, tqdm_class=StoppableBar
        )
    except GatedRepoError as error:
        raise UnusableModel(
            f"{repository} asks to accept its licence: accept it on its page and run `hf auth login`."
        ) from error
    except RepositoryNotFoundError as error:
        raise UnusableModel(
            f"There is no model folder {target.name!r} under {folders.roots()[0]} and no repository {repository}: "
            "check the name, or put the folder there."
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        raise UnusableModel(
            f"There is no whole model folder {target.name!r} under {folders.roots()[0]}, and {repository} could not be "
            f"fetched ({first_line(error)}): check the name, connect and run again, which continues where it stopped, "
            "or put the folder there."
        ) from error
