"""captions.jsonl: one line a picture. Lines of other tools, and what was written by hand, stay as they are."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ..host.held import opened_alone
from ..host.whole_files import refusal_told, whole_file

LIST_NAME = "captions.jsonl"
BEGINNING = '{"file": "'  # of each line of ours


def entry_of(line: str) -> dict[str, Any] | None:
    """What a line says of a picture, when it is one of ours: a file with its caption, or with the error there was."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(entry, dict) or not isinstance(entry.get("file"), str):
        return None
    return entry if "caption" in entry or "error" in entry else None


def lines_of(path: Path) -> list[str]:
    """The lines of a list, each to be written back as it was; none where there is no list."""
    if not path.is_file():
        return []
    # Not splitlines: a caption may hold a separator that JSON does not escape.
    lines = path.read_bytes().decode("utf-8", "surrogateescape").split("\n")
    return lines if lines[-1] else lines[:-1]


def listed(folder: Path) -> dict[str, str]:
    """The last caption of every picture that the list in `folder` has one for."""
    entries = (entry_of(line) for line in lines_of(folder / LIST_NAME))
    return {entry["file"]: str(entry["caption"]) for entry in entries if entry is not None and entry.get("caption")}


def append(folder: Path, entry: dict[str, Any]) -> None:
    """Add a line to the list in `folder`; one that was cut off before it stays a line of its own."""
    path = folder / LIST_NAME
    with refusal_told(path), opened_alone(path) as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write((json.dumps(entry, ensure_ascii=False) + "\n").encode("utf-8", "replace"))


def compact(path: Path) -> None:
    """Leave one line of ours for each picture: its last caption, or its last error when it has none. Lines of ours that were
    cut off go."""
    if not path.is_file():
        return
    with opened_alone(path):  # what another run adds meanwhile would be lost
        _compact(path)


def _compact(path: Path) -> None:
    lines = lines_of(path)
    last: dict[str, int] = {}
    captioned: set[str] = set()
    ours: set[int] = set()
    for index, line in enumerate(lines):
        entry = entry_of(line)
        if entry is None:
            if line.startswith(BEGINNING) and not line.rstrip().endswith("}"):
                ours.add(index)
            continue
        ours.add(index)
        name = entry["file"]
        if "caption" in entry or name not in captioned:
            last[name] = index
        if "caption" in entry:
            captioned.add(name)
    kept = set(last.values())
    if len(kept) == len(ours):
        return
    with whole_file(path) as unfinished:
        left = [line for index, line in enumerate(lines) if index not in ours or index in kept]
        unfinished.write_bytes("".join(f"{line}\n" for line in left).encode("utf-8", "surrogateescape"))
