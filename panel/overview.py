"""What the panel shows at a glance, as plain data. Touches the disk, so it is called in a thread."""

from __future__ import annotations

import functools
import os
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from .. import host, nodes
from ..cache import all_statistics
from ..host.interface import Host
from ..host.known_models import KNOWN_MODELS, HubRepository, KnownModel
from ..host.model_files import verify
from ..host.model_store import describe, find, free_space
from ..host.shadowed import shadowed

DOCUMENTATION = "https://github.com/hotpath-nodes/comfyui-hotpath/tree/main/docs"


def overview(version: str) -> dict[str, Any]:
    """Versions, caches, node families and model files. Names, sentences and byte counts; nothing that is a secret."""
    here = host.current()
    return {
        "versions": versions(version, here),
        "documentation": DOCUMENTATION,
        "caches": caches(),
        "nodes": len(nodes.NODE_CLASS_MAPPINGS),
        "failed_families": dict(nodes.FAILED_FAMILIES),
        "shadowed": shadowed(nodes.NODE_CLASS_MAPPINGS),
        "models": [model_entry(model, here) for model in KNOWN_MODELS],
    }


def versions(version: str, here: Host) -> dict[str, str]:
    device = here.device()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "Hotpath": version,
        "Host": here.name,
        "torch": torch.__version__,
        "Python": platform.python_version(),
        "Device": f"{device} ({name})",
    }


def caches() -> list[dict[str, Any]]:
    """Each cache with bytes, limit, hits and misses since the start or the last clear."""
    return [
        asdict(seen) | {"hit_rate": seen.hit_rate if seen.hits + seen.misses else None} for seen in all_statistics()
    ]


def folder_problem(path: Path) -> str | None:
    """What is wrong with a model folder by its lists and headers; a checksum of 65 GB is for `hotpath models verify`.

    Looked at again when a file in it has changed: the panel asks every few seconds.
    """
    try:
        with os.scandir(path) as entries:
            state = frozenset((e.name, (s := e.stat()).st_size, s.st_mtime_ns) for e in entries)
    except OSError as error:
        return f"it cannot be read: {error}."
    return _folder_problem(path, state)


@functools.lru_cache(maxsize=256)
def _folder_problem(path: Path, state: frozenset[tuple[str, int, int]]) -> str | None:
    try:
        verdict = verify(path)
    except OSError as error:
        return f"it cannot be read: {error}."
    return verdict.detail if verdict.status == "damaged" else None


def model_entry(model: KnownModel, here: Host) -> dict[str, Any]:
    """One known model: where it is or belongs, what is wrong with it, and the room on the disk it would go to."""
    path = find(model, here)
    problem = folder_problem(path) if path is not None and isinstance(model.source, HubRepository) else None
    free = free_space(model, here) if path is None else None
    return {
        **describe(model, here),
        "place": model.place,
        "problem": problem,
        # To 10 MB, so that the panel is not drawn anew for every byte that is written somewhere.
        "free": free // 10**7 * 10**7 if free is not None else None,
    }
