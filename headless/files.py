"""File names in workflows: inputs with an optional "[output]" mark, and numbered outputs, as ComfyUI names them."""

from __future__ import annotations

import itertools
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .. import host
from ..host.name_limits import refuse_on_windows

FRESH = 2.0  # seconds
_listed: dict[tuple[str, ...], tuple[Path, int, list[str]]] = {}  # by endings, of which there are two kinds
INPUT, OUTPUT, TEMP = FOLDERS = ("input", "output", "temp")


def input_file(name: str) -> Path:
    """The file a workflow names: in the input folder, or the one named in a mark such as "me.png [output]".

    Raises ValueError for a name outside the folder and FileNotFoundError for a file that is not there.
    """
    here = host.current()
    name, kind = unmarked(name)
    folder = {INPUT: here.input_folder, OUTPUT: here.output_folder, TEMP: here.temp_folder}[kind]()
    path = inside(folder, name)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {name!r} in {folder}; choose the folder with --input-folder.")
    return path


def unmarked(name: str) -> tuple[str, str]:
    """The name without its mark, and the kind of folder that the mark names, else input."""
    for kind in FOLDERS:
        if name.endswith(mark := f"[{kind}]"):
            return name.removesuffix(mark).rstrip(), kind
    return name, INPUT


def inside(folder: Path, name: str) -> Path:
    """`folder/name`, resolved; ValueError when that lies outside `folder`, also through a symbolic link."""
    if not name.strip() or "\0" in name:
        raise ValueError("No file is named.")
    base = folder.resolve()
    path = (base / name.replace("\\", "/")).resolve()
    if not path.is_relative_to(base) or path == base:
        raise ValueError(f"{name!r} lies outside the folder {folder}, so it is not touched.")
    refuse_on_windows(path.relative_to(base).parts)
    return path


def listed(suffixes: tuple[str, ...]) -> list[str]:
    """Files right in the input folder that end in one of `suffixes`, sorted.

    Asked for several times in every run, so a folder that has not changed is not gone through again.
    """
    folder = host.current().input_folder()
    try:
        changed = folder.stat().st_mtime_ns
        if (known := _listed.get(suffixes)) is not None and known[:2] == (folder, changed):
            return known[2]
        with os.scandir(folder) as entries:
            names = sorted(e.name for e in entries if e.name.lower().endswith(suffixes) and e.is_file())
    except OSError:
        return []
    # Within the same tick of its clock a folder may change once more.
    if abs(time.time() - changed / 1e9) > FRESH:
        _listed[suffixes] = folder, changed, names
    return names


@dataclass(frozen=True)
class OutputName:
    """Where a numbered output goes: folder/stem_00001_.suffix and so on."""

    folder: Path
    subfolder: str
    stem: str
    counter: int

    def paths(self, suffix: str, offset: int = 0) -> Iterator[Path]:
        """The name that is free, as far as is known, of the picture `offset` of a batch, and those after it."""
        stem = self.stem.replace("%batch_num%", str(offset))
        for number in itertools.count(self.counter + offset):
            yield self.folder / f"{stem}_{number:05}_{suffix}"


def output_name(root: Path, prefix: str, width: int, height: int) -> OutputName:
    """The next free number for `prefix`, which may name a subfolder and hold %width%, %height%, %year% ... %second%.

    Makes the folder. Raises ValueError for a prefix that leaves `root`.
    """
    now = time.localtime()
    for mark, value in {
        "%width%": str(width),
        "%height%": str(height),
        "%year%": str(now.tm_year),
        "%month%": f"{now.tm_mon:02}",
        "%day%": f"{now.tm_mday:02}",
        "%hour%": f"{now.tm_hour:02}",
        "%minute%": f"{now.tm_min:02}",
        "%second%": f"{now.tm_sec:02}",
    }.items():
        prefix = prefix.replace(mark, value)
    root.mkdir(parents=True, exist_ok=True)
    path = inside(root, prefix)
    path.parent.mkdir(parents=True, exist_ok=True)
    numbered = re.compile(re.escape(path.name).replace(r"%batch_num%", r"\d+") + r"_(\d+)_?\.[^.]+$", re.IGNORECASE)
    taken = [int(m[1]) for p in path.parent.iterdir() if (m := numbered.match(p.name))]
    subfolder = path.parent.relative_to(root.resolve()).as_posix()
    return OutputName(path.parent, "" if subfolder == "." else subfolder, path.name, max(taken, default=0) + 1)
