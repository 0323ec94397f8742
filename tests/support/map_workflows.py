"""Workflows and pictures for the tests of `hotpath map`, and what a run left behind."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

COPY = {
    "1": {"class_type": "LoadImage", "inputs": {"image": "x.png"}},
    "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "copy"}},
}


def picture(path: Path, seed: int, side: int = 24) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (side, side + 2, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, compress_level=1)
    return path


def made(folder: Path) -> dict[str, bytes]:
    """Every result by its name; the record of the work and the list of results aside. Also while a run writes there."""
    found = {}
    for where, folders, names in os.walk(folder):
        if ".hotpath-map" in folders:
            folders.remove(".hotpath-map")  # what is in there comes and goes
        for name in names:
            if name != "results.jsonl":
                path = Path(where) / name
                found[path.relative_to(folder).as_posix()] = path.read_bytes()
    return dict(sorted(found.items()))


def listed(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text("utf-8").splitlines()]
