"""Model folders on disk: the search that both hosts share."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath

from .interface import ModelNotFound
from .known_models import KNOWN_MODELS
from .name_limits import can_be_a_name


def list_files(folders: Iterable[Path], suffixes: Sequence[str]) -> list[str]:
    """Names of the files below `folders`, relative, with forward slashes, sorted, each once; links are followed."""
    wanted = tuple(s.lower() for s in suffixes)
    found = {
        file.relative_to(folder).as_posix()
        for folder in folders
        for file in _walk(folder, frozenset())
        if not wanted or file.name.lower().endswith(wanted)
    }
    return sorted(found, key=lambda name: (name.lower(), name))


def _walk(folder: Path, above: frozenset[str]) -> Iterator[Path]:
    """The files below `folder` that are not hidden. above: real paths of the folders it was reached through."""
    real = os.path.realpath(folder)
    if real in above:  # a link that points upwards
        return
    try:
        entries = list(os.scandir(folder))
    except OSError:  # missing, or not ours to read
        return
    for entry in entries:
        if entry.name.startswith("."):
            continue
        try:
            is_folder, is_file = entry.is_dir(), entry.is_file()
        except OSError:  # a link to itself, or into a place that is closed to us
            continue
        if is_folder:
            yield from _walk(folder / entry.name, above | {real})
        elif is_file:
            yield folder / entry.name


def find_file(kind: str, folders: Sequence[Path], name: str) -> Path:
    """The first `folder/name` that exists. A name that would leave the folder is refused."""
    if not name or not name.strip():
        raise ModelNotFound(f"No {kind} model is chosen: pick a file, or put one into {folders[0]} and press R.")
    # Whichever system the workflow was saved on.
    parts = PureWindowsPath(name).parts if "\\" in name else PurePosixPath(name).parts
    if PureWindowsPath(name).drive or name.startswith(("/", "\\")) or ".." in parts:
        raise ModelNotFound(f"{name!r} is not a file name inside the {kind} folders, so it is not opened.")
    for folder in folders if all(map(can_be_a_name, parts)) else ():
        candidate = folder.joinpath(*parts)
        if candidate.is_file():
            return candidate
    looked = ", ".join(str(f) for f in folders)
    last = "".join(parts[-1:]).lower()
    elsewhere = [one for one in list_files(folders, ()) if PurePosixPath(one).name.lower() == last]
    if elsewhere:  # not taken by itself: many models are called diffusion_pytorch_model.safetensors
        raise ModelNotFound(f"The {kind} model {name!r} was not found, but {elsewhere[0]!r} is there: choose that one.")
    known = kind in {model.kind for model in KNOWN_MODELS}
    source = "; the panel Hotpath in the sidebar, or `hotpath models`, says where each file comes from" if known else ""
    raise ModelNotFound(
        f"The {kind} model {name!r} was not found. Looked in: {looked}. Put the file there and press R to refresh{source}."
    )
