"""GGUF files by their names: found on the disk, or fetched from the hub with the tower that lets the model see."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from . import folders
from .folders import ModelFolder, revision_folder
from .gguf import models
from .gguf.file import parts_of
from .gguf.known import Origin, origin
from .unusable import UnusableModel

Choose = Callable[[list[str]], list[str]]  # of a repository's files those that are wanted
Fetch = Callable[[str, Path, str, Choose], None]  # a repository, into a folder, of a revision

log = logging.getLogger("hotpath.vision_language")


def is_meant(name: str) -> bool:
    """Whether a name that means no folder here means a GGUF file, or a repository of such files."""
    return models.is_name(name) or "gguf" in name.lower() or origin(name) is not None


def revision_file(name: str, revision: str) -> str:
    """Where the file of a named revision lies below the folder of all models; "" when `name` means no GGUF file."""
    if not models.is_name(name) or (found := origin(name)) is None:
        return ""
    return f"{revision_folder(found.folder, revision)}/{found.file}"


def locate(name: str, local: ModelFolder | None, revision: str, must_see: bool, fetch: Fetch) -> ModelFolder:
    """The whole, checked file for a widget value; what is missing of it is fetched where its name says from where.

    Raises UnusableModel.
    """
    try:
        came_from = origin(name)
    except UnusableModel:
        if local is None:
            raise
        came_from = None  # it is here, whatever it is called
    if local is not None:
        lacks_tower = must_see and local.gguf is not None and local.gguf.tower is None
        if came_from is None or not (folders.missing_files(local) or (lacks_tower and came_from.tower)):
            return folders.check(local, must_see)
    if came_from is None:
        raise UnusableModel(
            f"There is no GGUF file {models.file_name(name)!r} under {folders.roots()[0]}: put it there, or name it with its "
            "repository, as owner/repository/file.gguf, so that it is fetched."
        )
    target = folders.roots()[0] / came_from.folder
    if revision:
        target = target.with_name(revision_folder(target.name, revision))
    if local is not None:
        # Beside what is there of it.
        inside = local.path.parent
        came_from = replace(came_from, file=came_from.file.rsplit("/", 1)[-1]) if inside != target else came_from
        target = inside
    try:
        fetch(came_from.repository, target, revision, wanted(came_from))
    except UnusableModel as error:
        if local is None:
            raise
        return folders.check_unfetched(local, must_see, error)
    found = models.of(target / came_from.file)
    root = next((root for root in folders.roots() if found.files[0].is_relative_to(root)), found.files[0].parent)
    return folders.check(folders.of_gguf(found, root), must_see)


def wanted(came_from: Origin) -> Choose:
    """Chooses of a repository's files those of a model: all its parts, and its tower if there is one."""

    def choose(names: list[str]) -> list[str]:
        files = [file.as_posix() for file in parts_of(Path(came_from.file))]
        by_name = {name.lower(): name for name in names}
        if absent := [file for file in files if file.lower() not in by_name]:
            others = [n for n in names if n.lower().endswith(models.SUFFIX) and models.TOWER not in n.lower()]
            listed = f" It has {', '.join(others[:6])}." if others else ""
            raise UnusableModel(
                f"The repository {came_from.repository} has no file {absent[0]}: check the name.{listed}"
            )
        towers = [name for name in names if models.TOWER in name.lower() and name.lower().endswith(models.SUFFIX)]
        if came_from.tower in towers:
            towers = [came_from.tower]
        # The tower has to lie beside the model.
        beside = [name for name in towers if Path(name).parent == Path(came_from.file).parent]
        best = sorted(beside, key=lambda name: models.rank(name, came_from.file))[:1]
        return [by_name[file.lower()] for file in files] + best

    return choose
