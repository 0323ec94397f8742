"""Finds a ComfyUI on this machine and the Python that runs it."""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
from pathlib import Path

log = logging.getLogger("hotpath.headless")

PACK = Path(__file__).resolve().parent.parent
# What ComfyUI's main.py cannot start without; enough to tell an environment made for it.
NEEDED = ("torch", "aiohttp", "yaml", "safetensors", "sqlalchemy", "alembic", "comfyui_frontend_package")

# Kinds of models that ComfyUI has renamed; the old names still hold in configurations, and the folders are still searched.
RENAMED = {"unet": "diffusion_models", "clip": "text_encoders"}


def is_comfyui(folder: Path) -> bool:
    # os.path, for which a folder that is closed to this user holds nothing.
    return os.path.isfile(folder / "main.py") and os.path.isdir(folder / "comfy_api")  # noqa: PTH112, PTH113


def find_comfyui(explicit: Path | None = None) -> Path | None:
    """`explicit`, else COMFYUI_PATH, else the folders above this checkout, else the current folder and those above it,
    else ~/ComfyUI; None when there is none.

    COMFYUI_PATH=none means that none is to be used.
    Raises FileNotFoundError when a folder was named, here or in COMFYUI_PATH, and is not a ComfyUI.
    """
    named = os.environ.get("COMFYUI_PATH", "")
    if explicit is None and named == "none":
        return None
    configured = explicit or (Path(named) if named else None)
    if configured is not None:
        folder = configured.expanduser().resolve()
        if not is_comfyui(folder):
            raise FileNotFoundError(f"{folder} is not a ComfyUI folder: there is no main.py beside a comfy_api folder.")
        return folder
    # Also as it was called: custom_nodes/<pack> is often a symbolic link.
    called = Path(__file__).absolute().parent.parent
    at_home = Path(os.path.expanduser("~/ComfyUI"))  # noqa: PTH111 - a user of a container may have no home: as is
    places = [*PACK.parents, *called.parents, Path.cwd(), *Path.cwd().parents, at_home]
    return next((place for place in places if is_comfyui(place)), None)


def python_for(comfyui: Path) -> tuple[Path, str | None]:
    """The Python to start `comfyui` with, and what it lacks (None when nothing is known to be missing).

    COMFYUI_PYTHON decides; else this Python when it has what ComfyUI needs; else the environment beside ComfyUI.
    """
    if configured := os.environ.get("COMFYUI_PYTHON"):
        return Path(configured), None
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if not missing:
        return Path(sys.executable), None
    for place in (
        comfyui / ".venv/bin/python",
        comfyui / "venv/bin/python",
        comfyui / ".venv/Scripts/python.exe",
        comfyui / "venv/Scripts/python.exe",
        comfyui.parent / "python_embeded/python.exe",
    ):
        if place.is_file():
            return place, None
    return Path(sys.executable), ", ".join(missing)


def carries_pack(comfyui: Path) -> bool:
    """Whether this checkout already lies in, or is linked into, the custom_nodes of `comfyui`."""
    folder = comfyui / "custom_nodes"
    return folder.is_dir() and any(entry.resolve() == PACK for entry in folder.iterdir())


def model_folders(comfyui: Path) -> tuple[Path, dict[str, list[Path]]]:
    """The models folder of `comfyui`, and by kind the folders it searches in its order, where that is not the one of the
    kind's name alone: those that its extra_model_paths.yaml names, and of a kind that was renamed the earlier one."""
    import yaml

    config = comfyui / "extra_model_paths.yaml"
    models = comfyui / "models"
    # In ComfyUI's order.
    kinds = {
        "diffusion_models": [models / "unet", models / "diffusion_models"],
        "text_encoders": [models / "text_encoders", models / "clip"],
    }
    try:
        sections = yaml.safe_load(config.read_text(encoding="utf-8")) if config.is_file() else None
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:  # ValueError: of a date that there is not
        log.warning("%s cannot be read, so the folders it names are not searched: %s", config, error)
        sections = None
    for section in sections.values() if isinstance(sections, dict) else ():
        if not isinstance(section, dict):
            continue
        base = os.path.expandvars(os.path.expanduser(str(section.get("base_path", ""))))  # noqa: PTH111 - no such user: as is
        for named, folders in section.items():
            if named in ("base_path", "is_default", "custom_nodes") or not isinstance(folders, str):
                continue
            kind = RENAMED.get(str(named), str(named))
            known = kinds.setdefault(kind, [models / kind])
            for line in folders.split("\n"):
                if not line:
                    continue
                # Relative folders start at base_path, and that at the file.
                folder = Path(os.path.normpath(comfyui / base / line))
                first = bool(section.get("is_default"))
                if folder in known and first:
                    known.remove(folder)
                if folder not in known:
                    known.insert(0 if first else len(known), folder)
    return models, kinds
