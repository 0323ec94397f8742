"""Reads what `torch.save` wrote, under any name. Nothing in the file is executed."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch


def read_torch_file(path: Path, *, mapped: bool = False) -> Any:
    """What the file holds, on the CPU. mapped: tensors stay on the disk until they are used, where the format allows it.
    Raises what torch raises: UnpicklingError for code, and anything for a file that is damaged."""
    if path.suffix == ".safetensors":
        with path.open("rb") as file:  # of a path torch 2.15 believes the name, and it cannot map an open file
            return torch.load(file, map_location="cpu", weights_only=True)
    # Files from before torch 1.6 are plain pickles, which cannot be mapped.
    return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped and zipfile.is_zipfile(path))
