"""Is a model file what its name says and whole? Checked by the file's own structure.

Nothing is unpickled and no tensor is read.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

CHUNK = 1 << 22
MAX_HEADER = 100 << 20  # bytes of JSON that a safetensors file may begin with
# What JSON of any other shape than the one that is meant can end in.
MISSHAPEN = (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError)

Status = Literal["unverified", "damaged"]


@dataclass(frozen=True)
class Verdict:
    """unverified: whole as far as its structure tells. damaged: it is not."""

    status: Status
    detail: str


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def verify(path: Path) -> Verdict:
    """Look at the structure of a model file, or folder."""
    if path.is_dir():
        return _folder(path)
    if (problem := structure_problem(path)) is not None:
        return Verdict("damaged", problem)
    return Verdict("unverified", f"{path.stat().st_size} bytes, whole as far as its structure tells")


def impostor(path: Path) -> str | None:
    """What lies in the place of a model file, and how to get the file; None when it is none of the usual things."""
    with path.open("rb") as file:
        start = file.read(16)
    if not start:
        return "it is empty."
    if start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "it is a web page that was saved under this name; download the file itself."
    if start.startswith(b"version https://"):
        return "it is a git-lfs pointer and not the file; fetch it with `git lfs pull`."
    return None


def holds_safetensors(path: Path) -> bool:
    """Whether a file of weights is read as safetensors. What it begins with decides before its name: people rename them."""
    with path.open("rb") as file:
        start = file.read(9)
    if start.startswith((b"PK", b"\x80")):
        return False
    return start[8:] == b"{" or path.suffix.lower() in (".safetensors", ".sft")


def structure_problem(path: Path, suffix: str | None = None) -> str | None:
    """Why the file cannot be whole; None when nothing speaks against it. suffix: of the name it is to get, if another."""
    if (problem := impostor(path)) is not None:
        return problem
    match (path.suffix if suffix is None else suffix).lower():
        case ".safetensors" | ".sft":
            return _safetensors_problem(path)
        case ".pth" | ".pt" | ".bin" | ".ckpt":
            return _safetensors_problem(path) if holds_safetensors(path) else _torch_problem(path)
        case ".onnx":
            return _onnx_problem(path)
        case _:
            return None


def _safetensors_problem(path: Path) -> str | None:
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if not 2 <= length <= min(MAX_HEADER, size):
            return "it does not begin like a safetensors file."
        try:
            header = json.loads(file.read(length))
            ends = [int(entry["data_offsets"][1]) for name, entry in header.items() if name != "__metadata__"]
        except MISSHAPEN:
            return "the list of its tensors cannot be read."
    needed = 8 + length + max(ends, default=0)
    return None if needed == size else f"it has {size} bytes and its own list of tensors needs {needed}."


def _torch_problem(path: Path) -> str | None:
    with path.open("rb") as file:
        start = file.read(2)
    if start.startswith(b"PK"):
        # The directory is at the end, so a file that was cut off has none.
        return None if zipfile.is_zipfile(path) else "its end is missing; the download was cut off."
    # Before torch 1.6 a checkpoint was a plain pickle, which does not tell its own length.
    return None if start.startswith(b"\x80") else "it does not begin like a torch checkpoint."


def _onnx_problem(path: Path) -> str | None:
    import onnx

    try:
        graph = onnx.load_model(str(path), load_external_data=False).graph
    except Exception as error:
        return f"it cannot be read as ONNX ({type(error).__name__}); the download was probably cut off."
    return None if graph.node else "it holds no network."


def _folder(path: Path) -> Verdict:
    index = path / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            missing = [name for name in names if not (path / name).is_file()]
        except MISSHAPEN:
            return Verdict("damaged", f"{index.name} cannot be read.")
    else:
        names = sorted(p.name for p in path.glob("*.safetensors"))
        missing = []
    if not (path / "config.json").is_file():
        return Verdict("damaged", "there is no config.json in it.")
    if not names:
        return Verdict("damaged", "there are no weights (*.safetensors) in it.")
    if missing:
        return Verdict("damaged", f"{len(missing)} of {len(names)} weight files are missing: {', '.join(missing[:3])}.")
    for name in names:
        if (problem := structure_problem(path / name)) is not None:
            return Verdict("damaged", f"{name}: {problem}")
    return Verdict("unverified", f"{len(names)} weight files, whole by their own lists")
