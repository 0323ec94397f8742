"""Names from workflows as files inside a folder, and never outside of it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath

from ..host.name_limits import can_be_a_name, refuse_on_windows

VIDEO_SUFFIXES = (".mp4", ".mkv", ".mov", ".webm", ".avi", ".m4v", ".mpg", ".mpeg", ".ts", ".mxf", ".nut")


def inside(folder: Path, name: str, suffixes: Sequence[str] = ()) -> Path:
    """`folder / name`; raises ValueError for names that are empty, absolute, lead outside, also through a link, as ComfyUI's
    own nodes refuse it, or end in another suffix."""
    parts = PureWindowsPath(name).parts if "\\" in name else PurePosixPath(name).parts
    outside = PureWindowsPath(name).drive or name.startswith(("/", "\\")) or ".." in parts
    named = bool(name.strip() and parts) and all(map(can_be_a_name, parts))
    if not named or outside or not _below(folder, folder.joinpath(*parts)):
        raise ValueError(f"{name!r} is not a file name inside {folder}.")
    refuse_on_windows(parts)
    if suffixes and Path(parts[-1]).suffix.lower() not in suffixes:
        raise ValueError(f"{name!r} must end in one of {', '.join(suffixes)}.")
    return folder.joinpath(*parts)


def _below(folder: Path, path: Path) -> bool:
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def videos_in(folder: Path) -> list[str]:
    """Names of the video files directly in `folder`, sorted."""
    if not folder.is_dir():
        return []
    return sorted((p.name for p in folder.iterdir() if p.suffix.lower() in VIDEO_SUFFIXES), key=str.lower)
