"""What a workflow is mapped over: the files of a folder, the lines of a list, the objects of a JSON Lines file.

A source is walked one item at a time: of a folder of a million pictures only the names are held, of a list nothing.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from ..cache import file_fingerprint
from ..host.letters import readable

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")
VIDEOS = (".mp4", ".mkv", ".webm", ".mov", ".avi", ".m4v", ".mpg", ".mpeg", ".wmv", ".ogv", ".ts")
BLOCK = 1 << 20
FRESH = 2.0  # seconds
SLUG = 48  # letters of a line that go into the name of its results
# Neither UTF-8 nor the record of the work can hold it.
BROKEN_TEXT = "is not Unicode: it holds a surrogate, \\ud800 to \\udfff, without its other half"


class BadItems(ValueError):
    """What was given as --over cannot be mapped over; the message is a sentence for the person who gave it."""


@dataclass(frozen=True)
class Item:
    """One thing to run the workflow on.

    label: where its results go, relative and without a suffix. content: hex digest of what the item is, whatever it is
    called. value: what goes into the mapped input. inputs: further inputs, as {"NODE.INPUT": value}. file: what a worker
    must be able to read. group: the film a shot belongs to. problem: why it cannot be run, when that is known already.
    """

    label: str
    content: str
    value: Any = None
    inputs: Mapping[str, Any] = field(default_factory=dict)
    file: Path | None = None
    group: str = ""
    problem: str | None = None


class ItemSource(Protocol):
    """Items in a fixed order. `kind` says what they are: picture, video or text."""

    kind: str

    def __iter__(self) -> Iterator[Item]: ...

    def count(self) -> int | None:
        """How many there are, when that costs little to know."""


class KnownDigests(Protocol):
    """Digests of files by their names and stamps; the manifest keeps them."""

    def digest(self, path: str, stamp: str) -> str | None: ...
    def keep_digest(self, path: str, stamp: str, digest: str) -> None: ...


class FolderItems:
    """The files of a folder that end in one of `suffixes`, folder by folder, each in the order of names.

    Names go into the workflow relative to `input_folder`, which `folder` must lie in. Hidden files, links out of the
    folder, and what lies below `without` (the output folder, usually) are left out.
    """

    def __init__(
        self,
        folder: Path,
        input_folder: Path,
        suffixes: tuple[str, ...] = PICTURES,
        recursive: bool = False,
        without: Path | None = None,
    ) -> None:
        self.folder, self.input_folder = folder.resolve(), input_folder.resolve()
        if not self.folder.is_dir():
            raise BadItems(f"There is no folder {folder}.")
        if not self.folder.is_relative_to(self.input_folder):
            raise BadItems(f"{folder} lies outside the input folder {input_folder}: give one that holds it.")
        self.suffixes, self.recursive = suffixes, recursive
        self.without = without.resolve() if without is not None else None
        self.kind = "video" if suffixes == VIDEOS else "picture"
        self.known: KnownDigests | None = None

    def knowing(self, known: KnownDigests) -> FolderItems:
        """The same; files that are unchanged since `known` was told their content are not read."""
        made = copy.copy(self)
        made.known = known
        return made

    def __iter__(self) -> Iterator[Item]:
        for folder, names in self._folders(self.folder):
            stems = [os.path.splitext(name)[0] for name in names]  # noqa: PTH122 - of a hundred thousand names
            alike = Counter(stems)
            for name, stem in zip(names, stems, strict=True):
                # Beside a.png, a.jpg must not get the same name for its results.
                own = name.replace(".", "_") if alike[stem] > 1 else stem
                label = (folder.relative_to(self.folder) / own).as_posix()
                yield file_item(folder / name, self.input_folder, label, self.known)

    def count(self) -> int:
        return sum(len(names) for _, names in self._folders(self.folder))

    def _folders(self, folder: Path) -> Iterator[tuple[Path, list[str]]]:
        names: list[str] = []
        below: list[str] = []
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    if entry.is_dir(follow_symlinks=False):
                        below.append(entry.name)
                    elif entry.name.lower().endswith(self.suffixes) and self._inside(entry):
                        names.append(entry.name)
        except OSError as error:
            raise _unreadable(f"The folder {folder}", error) from None
        if names:
            yield folder, sorted(names)
        if self.recursive:
            for name in sorted(below):
                if folder / name != self.without:
                    yield from self._folders(folder / name)

    def _inside(self, entry: os.DirEntry[str]) -> bool:
        try:
            if not entry.is_file():
                return False
            return not entry.is_symlink() or Path(entry.path).resolve().is_relative_to(self.input_folder)
        except OSError:  # a link to itself, or into a place that is closed to us
            return False


class ListItems:
    """The lines of a text; empty ones and those that begin with # are left out."""

    kind = "text"

    def __init__(self, text: str | None = None, file: Path | None = None) -> None:
        self.text, self.file = text, file
        if file is not None and not file.is_file():
            raise BadItems(f"There is no list {file}, nor a folder of that name.")

    def _lines(self) -> Iterator[str]:
        if self.file is None:
            yield from (self.text or "").splitlines()
            return
        try:
            with self.file.open(encoding="utf-8-sig") as lines:
                yield from lines
        except UnicodeDecodeError as error:
            raise BadItems(f"{self.file.name} is not text in UTF-8: {error}.") from None
        except OSError as error:
            raise _unreadable(str(self.file), error) from None

    def __iter__(self) -> Iterator[Item]:
        for line in self._lines():
            value = line.strip()
            if value and not value.startswith("#"):
                yield text_item(value)

    def count(self) -> int:
        return sum(1 for line in self._lines() if line.strip() and not line.lstrip().startswith("#"))


class JsonLinesItems:
    """A JSON Lines file: a string or number per line goes into the mapped input, an object sets several inputs.

    In an object every key is NODE.INPUT, save `name`, which names the results, and `item`, which goes into the mapped
    input. A line that is neither becomes an item with a problem, so that the others run.
    """

    kind = "text"

    def __init__(self, file: Path) -> None:
        self.file = file
        if not file.is_file():
            raise BadItems(f"There is no list {file}.")

    def _lines(self) -> Iterator[tuple[int, str]]:
        try:
            with self.file.open(encoding="utf-8-sig", errors="replace") as lines:
                yield from ((number, line) for number, line in enumerate(lines, 1) if line.strip())
        except OSError as error:
            raise _unreadable(str(self.file), error) from None

    def __iter__(self) -> Iterator[Item]:
        for number, line in self._lines():
            yield self._item(line, number)

    def count(self) -> int:
        return sum(1 for _ in self._lines())

    def _item(self, line: str, number: int) -> Item:
        try:
            data = json.loads(line)
            json.dumps(data, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            return self._broken(line, number, BROKEN_TEXT)
        except (ValueError, RecursionError) as error:
            return self._broken(line, number, f"is not JSON: {error}")
        if isinstance(data, str | int | float):
            return text_item(data)
        if not isinstance(data, dict):
            return self._broken(line, number, "is neither a value nor an object")
        inputs = {key: value for key, value in data.items() if key not in ("name", "item")}
        wrong = [key for key in inputs if "." not in key.strip(".")]
        if wrong:
            return self._broken(line, number, f"has the key {wrong[0]!r}, which is not NODE.INPUT, name or item")
        lists = [key for key, value in inputs.items() if isinstance(value, list | dict)]
        if lists:
            return self._broken(line, number, f"gives {lists[0]!r} a list or an object; only plain values can be set")
        content = digest(json.dumps([inputs, data.get("item")], sort_keys=True, ensure_ascii=False).encode())
        shown = str(data.get("name") or data.get("item") or next(iter(inputs.values()), "item"))
        return Item(_label(shown, content), content, data.get("item"), inputs)

    def _broken(self, line: str, number: int, why: str) -> Item:
        content = digest(line.encode("utf-8", "replace"))
        return Item(_label(f"line {number}", content), content, problem=f"{self.file.name}, line {number} {why}.")


def open_items(over: str, input_folder: Path) -> ItemSource:
    """The source that the file `over` is: a .jsonl file, a text file of lines, or a single picture or video."""
    path = Path(over).expanduser()
    if path.suffix.lower() in (*PICTURES, *VIDEOS):
        return OneFile(path, input_folder)
    if path.suffix.lower() in (".jsonl", ".ndjson"):
        return JsonLinesItems(path)
    return ListItems(file=path)


class OneFile:
    """A single picture or video."""

    def __init__(self, path: Path, input_folder: Path) -> None:
        self.path, self.input_folder = path.resolve(), input_folder.resolve()
        if not self.path.is_file():
            raise BadItems(f"There is no file {path}.")
        if not self.path.is_relative_to(self.input_folder):
            raise BadItems(f"{path} lies outside the input folder {input_folder}: give one that holds it.")
        self.kind = "video" if path.suffix.lower() in VIDEOS else "picture"

    def __iter__(self) -> Iterator[Item]:
        yield file_item(self.path, self.input_folder, self.path.stem)

    def count(self) -> int:
        return 1


class Repeated:
    """Every item of a source several times in a row, for seeds of its own each time. The first time it is as it was, so that
    its result of an earlier run without repeats is the same one."""

    def __init__(self, source: ItemSource, times: int) -> None:
        self.source, self.times, self.kind = source, times, source.kind

    def __iter__(self) -> Iterator[Item]:
        for item in self.source:
            yield item
            for number in range(2, self.times + 1):
                content = digest(f"{item.content}/{number}".encode())
                yield replace(item, label=f"{item.label}-v{number}", content=content)

    def count(self) -> int | None:
        once = self.source.count()
        return None if once is None else once * self.times


def _unreadable(what: str, error: OSError) -> BadItems:
    return BadItems(f"{what} cannot be read: {error.strerror or error}.")


def file_item(path: Path, input_folder: Path, label: str, known: KnownDigests | None = None) -> Item:
    """The file at `path` as an item; one that cannot be read gets a problem."""
    name = path.relative_to(input_folder).as_posix()
    if (shown := readable(name)) != name:
        why = f"{shown} has a name that is not Unicode: rename it."
        return Item(readable(label), digest(os.fsencode(name)), shown, problem=why)
    try:
        # A film is long to read whole, and is asked for more than once.
        film = path.suffix.lower() in VIDEOS
        content = file_fingerprint(path) if film else _digest_of(path, name, known)
        problem = None
    except OSError as error:
        content, problem = digest(name.encode()), f"{name} cannot be read: {error.strerror or error}."
    # Two pictures with the same bytes are one job; what they are called goes with the results.
    return Item(label, content, name, file=path, problem=problem)


def _digest_of(path: Path, name: str, known: KnownDigests | None) -> str:
    if known is None:
        return file_digest(path)
    facts = path.stat()
    # The last one changes with the content whatever becomes of the others (on Windows it is the time of creation).
    stamp = f"{facts.st_size} {facts.st_mtime_ns} {facts.st_ino} {facts.st_ctime_ns}"
    if (found := known.digest(name, stamp)) is None:
        found = file_digest(path)
        # A file that is only just written may be written once more within the same tick of its clock.
        if abs(time.time() - max(facts.st_mtime, facts.st_ctime)) > FRESH:
            known.keep_digest(name, stamp, found)
    return found


def text_item(value: str | int | float) -> Item:
    content = digest(json.dumps(value).encode())
    if isinstance(value, str) and (shown := readable(value)) != value:
        return Item(_label(shown, content), content, shown, problem=f"{shown} {BROKEN_TEXT}.")
    return Item(_label(str(value), content), content, value)


def _label(shown: str, content: str) -> str:
    """A name out of a text: letters and digits of any script, and a part of the digest so that no two are equal."""
    slug = re.sub(r"[^\w]+", "-", shown, flags=re.UNICODE).strip("-_").lower()[:SLUG].rstrip("-_")
    return f"{slug}-{content[:8]}" if slug else content[:16]


def digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def file_digest(path: Path) -> str:
    """Digest of the whole content, read in blocks."""
    found = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            found.update(block)
    return found.hexdigest()
