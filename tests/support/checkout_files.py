"""The files of this checkout, without going through the environment in it, which holds a hundred times as many."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def files(name: str) -> list[Path]:
    """Those that the pattern `name` fits, at every depth, but for folders of the root whose names begin with a dot."""
    folders = [path for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")]
    return sorted([*ROOT.glob(name), *(path for folder in folders for path in folder.rglob(name))])
