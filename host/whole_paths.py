"""Whole paths in a prompt: anywhere where only this machine reaches the server, else in folders that its owner names.

Few inputs take one; every other name lies in one of the host's folders. Who can queue a prompt could otherwise have files
written and read all over the machine.
"""

from __future__ import annotations

import os
from pathlib import Path

from . import current

FOLDERS = "HOTPATH_FOLDERS"  # set by who runs the server, also to nothing: then the limit holds whoever reaches it


def named_folders() -> list[Path] | None:
    """The folders in HOTPATH_FOLDERS, parted as in PATH; None where that is not set."""
    named = os.environ.get(FOLDERS)
    return None if named is None else [Path(folder) for folder in named.split(os.pathsep) if folder.strip()]


def allowed(path: Path) -> Path:
    """`path` itself. Raises ValueError where the host does not let a prompt go there."""
    here = current()
    further = here.open_folders()
    if further is None:
        return path
    real = os.path.realpath(path)
    folders = (here.input_folder(), here.output_folder(), here.temp_folder(), *further)
    if not any(Path(real).is_relative_to(os.path.realpath(folder)) for folder in folders):
        raise ValueError(
            f"{path} lies outside the input, output and temp folders, and others can reach this server: choose a folder in "
            f"those, or let whoever runs the server name it in {FOLDERS}."
        )
    return path
