"""The user who runs this: in a container often a number without a name, without a home."""

from __future__ import annotations

import getpass
import os
import tempfile
from pathlib import Path


def give_a_name() -> None:
    """Let a user without a name have one in this process: torch before 2.15 asks for it as its compiler is loaded, and
    fails, and with it diffusers."""
    try:
        getpass.getuser()
    except (KeyError, OSError, ImportError):
        os.environ["LOGNAME"] = _number()


def data_folder() -> Path:
    """Where this user's programs keep what they need; of one without a home, the folder this runs in."""
    return _folder("user_data_dir") or Path.cwd()


def cache_folder() -> Path:
    """Where this user's programs keep what can be made again; of one without a home, a folder for temporary files."""
    return _folder("user_cache_dir") or Path(tempfile.gettempdir()) / f"hotpath-{_number()}"


def _folder(kind: str) -> Path | None:
    import platformdirs

    try:
        found = Path(getattr(platformdirs, kind)("hotpath", appauthor=False))
    except RuntimeError:  # newer releases: there is no home
        return None
    return found if found.is_absolute() else None  # older ones: the `~` stays


def _number() -> str:
    return f"uid_{os.getuid()}" if hasattr(os, "getuid") else "unknown_user"
