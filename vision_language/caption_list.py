"""captions.jsonl: one line a picture. Lines of other tools, and what was written by hand, stay as they are."""

from __future__ import annotations

import json
import os
from pathlib import Path, PurePath
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


def lines_in(content: bytes) -> list[str]:
    """The lines of a list, each to be written back as it was."""
    # Not splitlines: a caption may hold a separator that JSON does not escape.
    lines = content.decode("utf-8", "surrogateescape").split("\n")
    return lines if lines[-1] else lines[:-1]


def listed(folder: Path) -> dict[str, str]:
    """The last caption of every picture that the list in `folder` has one for."""
    path = folder / LIST_NAME
    entries = (entry_of(line) for line in lines_in(path.read_bytes() if path.is_file() else b""))
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
    """Leave one line of ours for each picture: its last caption, or its last error when it has none; in the folder's order,
    as several runs add to a list. Lines of ours that were cut off go."""
    if not path.is_file():
        return
    with opened_alone(path) as file:  # what another run adds meanwhile would be lost
        file.seek(0)
        lines = lines_in(file.read())
        if (left := _left(lines)) == lines:
            return
        if os.name == "nt":  # where nobody replaces a file that is open
            file.close()
        with whole_file(path) as unfinished:
            unfinished.write_bytes("".join(f"{line}\n" for line in left).encode("utf-8", "surrogateescape"))


def _left(lines: list[str]) -> list[str]:
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
    in_order = iter([lines[last[name]] for name in sorted(last, key=PurePath)])
    # Lines of others stay where they are.
    return [
        next(in_order) if index in kept else line
        for index, line in enumerate(lines)
        if index not in ours or index in kept
    ]
