"""What of a film is finished, on disk: the parts in order, and where the next one starts.

A part ends at a cut, or, in a long shot, at a portion's end, with the state of the film beside it. A part counts from the
moment the manifest names it: everything else in the folder is what a crash left. So a process may be killed anywhere.
"""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path

from ..host.whole_files import put_in_place, sync

FILE = "manifest.json"


@dataclass(frozen=True)
class FinishedPart:
    """Frames first..stop-1 of what is to be coloured, all of shot `shot`. ends_shot: whether that shot ends here."""

    first: int
    stop: int
    shot: int
    ends_shot: bool


@dataclass
class Manifest:
    """key: of the film, references, options and checkpoint that the parts belong to. next_time: where to go on, in the
    stream's time base."""

    key: str
    parts: list[FinishedPart] = field(default_factory=list)
    next_time: int | None = None

    @property
    def frames(self) -> int:
        return self.parts[-1].stop if self.parts else 0

    def cuts(self, shot: int) -> list[int]:
        """Where the shots after the first begin, if the frame behind the parts is of shot number `shot`."""
        begun = [*((part.first, part.shot) for part in self.parts), (self.frames, shot)]
        return [first for (_, before), (first, now) in pairwise(begun) if now != before]

    def part_file(self, folder: Path, number: int) -> Path:
        """Of part `number`, from 1."""
        return folder / f"{number:05d}.nut"

    def part_files(self, folder: Path) -> list[Path]:
        return [self.part_file(folder, number) for number in range(1, len(self.parts) + 1)]

    def state_file(self, folder: Path, number: int) -> Path:
        """The state after part `number`."""
        return folder / f"{number:05d}.safetensors"

    def add(self, folder: Path, part: FinishedPart, next_time: int | None) -> None:
        """Name a part whose file and state are written. The state before it is not needed any more."""
        number = len(self.parts) + 1
        for file in (self.part_file(folder, number), self.state_file(folder, number)):
            sync(file)
        longer = Manifest(self.key, [*self.parts, part], next_time)
        unfinished = folder / f"{FILE}.part"
        unfinished.write_text(json.dumps(asdict(longer), indent=1), encoding="utf-8")
        put_in_place(unfinished, folder / FILE)
        self.parts, self.next_time = longer.parts, next_time
        with suppress(OSError):  # a program that holds it does not stop the film: it goes with the folder
            self.state_file(folder, number - 1).unlink(missing_ok=True)


def read_manifest(folder: Path, key: str) -> Manifest | None:
    """The manifest in `folder`, if it belongs to `key` and all that it names is there."""
    try:
        found = json.loads((folder / FILE).read_text(encoding="utf-8"))
        manifest = Manifest(found["key"], [FinishedPart(**part) for part in found["parts"]], found["next_time"])
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None
    needed = [*manifest.part_files(folder), manifest.state_file(folder, len(manifest.parts))]
    if manifest.key != key or not all(file.is_file() for file in needed):
        return None
    return manifest
