"""Model folders on disk: the search that both hosts share."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath

from .interface import ModelNotFound


def list_files(folders: Iterable[Path], suffixes: Sequence[str]) -> list[str]:
    """Names of the files below `folders`, relative, with forward slashes, sorted, each once; links are followed."""
    wanted = tuple(s.lower() for s in suffixes)
    found: set[str] = set()
    for folder in folders:
        seen: set[str] = set()
        for where, subfolders, names in os.walk(folder, followlinks=True):
            real = os.path.realpath(where)
            if real in seen:  # a link that points upwards
                subfolders.clear()
                continue
            seen.add(real)
            subfolders[:] = [s for s in subfolders if not s.startswith(".")]
            for name in names:
                if name.startswith(".") or (wanted and not name.lower().endswith(wanted)):
                    continue
                found.add((Path(where) / name).relative_to(folder).as_posix())
    return sorted(found, key=str.lower)


def find_file(kind: str, folders: Sequence[Path], name: str) -> Path:
    """The first `folder/name` that exists. A name that would leave the folder is refused."""
    if not name or not name.strip():
        raise ModelNotFound(f"No {kind} model is chosen: pick a file, or put one into {folders[0]} and press R.")
    # Whichever system the workflow was saved on.
    parts = PureWindowsPath(name).parts if "\\" in name else PurePosixPath(name).parts
    if PureWindowsPath(name).drive or name.startswith(("/", "\\")) or ".." in parts:
        raise ModelNotFound(f"{name!r} is not a file name inside the {kind} folders, so it is not opened.")
    for folder in folders:
        candidate = folder.joinpath(*parts)
        if candidate.is_file():
            return candidate
    looked = ", ".join(str(f) for f in folders)
    raise ModelNotFound(
        f"The {kind} model {name!r} was not found. Looked in: {looked}. Put the file there and press R to refresh; "
        "`hotpath models` lists where each file comes from."
    )
