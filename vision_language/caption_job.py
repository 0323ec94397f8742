"""What is captioned, where the captions go, which pictures have theirs already, and what came of it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

from .. import host
from ..host.errors import first_line
from ..host.name_limits import can_be_a_name
from ..host.unfinished import unfinished_name
from . import caption_list

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".jfif")
VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".mov", ".avi", ".m4v", ".mpg", ".mpeg", ".wmv", ".ogv", ".ts")
MEDIA = {
    "pictures": PICTURE_SUFFIXES,
    "videos": VIDEO_SUFFIXES,
    "pictures and videos": PICTURE_SUFFIXES + VIDEO_SUFFIXES,
}
FORMATS = ("txt", "jsonl", "both")
LONGEST_PATTERN = 1000
NAMED = 20  # pictures of one kind that a report names


@dataclass(frozen=True)
class CaptionJob:
    """What is captioned and where the captions go.

    output: txt (one file beside each picture), jsonl (one line a picture in captions.jsonl) or both. overwrite=False
    skips pictures that have their caption. before, after: written around every caption, such as a trigger word.
    target: where the captions go, with the same sub-folders; None is beside the pictures. pattern: only files whose
    name fits it, such as "portrait_*"; "" is all. thinking: as `prompts.Question` has it; thoughts are no part of a caption.
    media: of MEDIA; a video has one caption. max_frames: how many of its frames are looked at, two a second at most.
    """

    folder: Path
    prompt: str
    system: str = ""
    output: str = "txt"
    recursive: bool = False
    overwrite: bool = False
    batch_size: int = 8
    before: str = ""
    after: str = ""
    target: Path | None = None
    pattern: str = ""
    thinking: bool | None = False
    media: str = "pictures"
    max_frames: int = 16

    @property
    def captions(self) -> Path:
        return self.target if self.target is not None else self.folder

    def text_file(self, picture: Path) -> Path:
        return (self.captions / picture.relative_to(self.folder)).with_suffix(".txt")

    def name_of(self, picture: Path) -> str:
        """What the list calls a picture: bytes of its name that are no letters are written out, as JSON has to be UTF-8."""
        return picture.relative_to(self.folder).as_posix().encode("utf-8", "backslashreplace").decode("utf-8")

    def caption_of(self, picture: Path, lines: Mapping[str, str]) -> str:
        """The caption that `picture` has, by its file or by the `lines` of the list; "" where one of them is missing."""
        line = lines.get(self.name_of(picture), "")
        text = _text_in(self.text_file(picture)) if self.output != "jsonl" else line
        return text if text.strip() and (self.output != "both" or line) else ""

    @property
    def work(self) -> str:
        """What runs in one folder may share: captions where there are none, whoever writes them; of those that are to be
        written anew, only what was asked in the same way."""
        if not self.overwrite:
            return self.output
        asked = (self.prompt, self.system, self.before, self.after, self.thinking, self.max_frames)
        return f"{self.output} {hashlib.md5(repr(asked).encode(), usedforsecurity=False).hexdigest()}"

    def check(self) -> None:
        """Raises ValueError for what no model could do anything with."""
        if self.output not in FORMATS:
            raise ValueError(f"{self.output!r} is no output: choose {', '.join(FORMATS)}.")
        if self.media not in MEDIA:
            raise ValueError(f"{self.media!r} is nothing to caption: choose {', '.join(MEDIA)}.")
        if self.batch_size < 1 or self.max_frames < 1:
            raise ValueError("The batch size and the frames of a video must be at least 1.")
        if len(self.pattern) > LONGEST_PATTERN:
            raise ValueError(f"The pattern is longer than {LONGEST_PATTERN} letters: give one such as portrait_*.")
        if not self.prompt.strip():
            raise ValueError("The prompt is empty: say what the captions should tell.")

    def check_target(self) -> None:
        """Raises ValueError when no caption can be written. Captions are dear, so this is asked before the first."""
        try:
            self.captions.mkdir(parents=True, exist_ok=True)
            # Not one of `tempfile`: where Windows or a guard of it refuses, older Pythons try names for hours.
            probe = self.captions / unfinished_name()
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise ValueError(
                f"No caption can be written into {self.captions} ({first_line(error)}): choose another folder for them."
            ) from error


@dataclass
class CaptionSummary:
    """What came of a job. captions: the text of each picture done now; elsewhere: of each that other runs in the folder did
    meanwhile; present: of each that had one; failed: picture and reason; unfinished: pictures whose caption the token limit
    cut off; remarks: what was not done as asked, and why; awaited: pictures that other runs still describe."""

    captions: dict[Path, str] = field(default_factory=dict)
    elsewhere: dict[Path, str] = field(default_factory=dict)
    present: dict[Path, str] = field(default_factory=dict)
    failed: dict[Path, str] = field(default_factory=dict)
    unfinished: list[Path] = field(default_factory=list)
    seconds: float = 0.0
    remarks: list[str] = field(default_factory=list)
    awaited: list[Path] = field(default_factory=list)
    notes: str = ""

    @property
    def skipped(self) -> int:
        return len(self.present)

    def all_captions(self) -> dict[Path, str]:
        """The captions of all pictures that have one, sorted by path."""
        return dict(sorted((self.present | self.elsewhere | self.captions).items()))

    def report(self) -> str:
        rate = f", {len(self.captions) / self.seconds * 60:.1f} a minute" if self.captions and self.seconds else ""
        others = f"{len(self.elsewhere)} captioned by other runs meanwhile, " if self.elsewhere else ""
        lines = [
            f"{len(self.captions)} captioned in {self.seconds:.1f} s{rate}, {others}{self.skipped} skipped because they have "
            f"a caption, {len(self.failed)} failed"
        ]
        if self.awaited:
            lines.append(f"waiting for {len(self.awaited)} that other runs have begun: {_names(self.awaited)}")
        lines += [f"{path.name}: {why}" for path, why in self.failed.items()]
        if self.unfinished:
            lines.append(f"{len(self.unfinished)} cut off at max_new_tokens: {_names(self.unfinished)}")
        lines += [remark for remark in self.remarks if remark not in self.notes]
        return "\n".join([*lines, self.notes] if self.notes else lines)


def _names(pictures: Sequence[Path]) -> str:
    more = f" and {len(pictures) - NAMED} more" if len(pictures) > NAMED else ""
    return ", ".join(path.name for path in pictures[:NAMED]) + more


def place(base: Path, name: str) -> Path:
    """The folder `name` means: absolute as it is, else inside `base`. Raises ValueError for one that leaves `base`."""
    folder = Path(name.strip())
    if not all(map(can_be_a_name, folder.parts)):
        raise ValueError(f"{name[:80]!r} is no name that a folder can have: give another one.")
    if not folder.is_absolute() and ".." in folder.parts:
        raise ValueError(f"{name!r} leads out of {base}: give a folder inside it, or the whole path.")
    return base / folder


def files_in(folder: Path, recursive: bool, pattern: str = "", media: str = "pictures") -> list[Path]:
    """Files of `media` whose name fits `pattern`, sorted by path; hidden files and folders are left out."""
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}: give the folder of the {media}.")
    found = _below(folder) if recursive else folder.iterdir()
    return sorted(
        path
        for path in found
        if path.suffix.lower() in MEDIA[media]
        and fnmatch(path.name, pattern or "*")
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.is_file()
    )


def _below(folder: Path) -> Iterator[Path]:
    """The files below `folder`; links to other folders and what cannot be read are left out. It may be a whole disk."""
    for where, folders, names in os.walk(folder):
        host.current().check_interrupt()
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(where, name) for name in names)


def begin(job: CaptionJob) -> tuple[CaptionSummary, list[Path]]:
    """A summary with what is there already, and the pictures that need a caption.

    Raises ValueError or FileNotFoundError for a job that cannot start.
    """
    job.check()
    summary = CaptionSummary()
    lines = caption_list.listed(job.captions) if job.output != "txt" else {}
    targets: dict[Path, Path] = {}
    waiting: list[Path] = []
    for path in files_in(job.folder, job.recursive, job.pattern.strip(), job.media):
        target = job.text_file(path)
        if job.output != "jsonl" and target in targets:
            summary.failed[path] = f"{targets[target].name} has the same caption file {target.name}"
            continue
        targets[target] = path
        text = job.caption_of(path, lines)
        if job.overwrite or not text:
            waiting.append(path)
        else:
            summary.present[path] = text
    if not (waiting or summary.skipped or summary.failed):
        fitting = f" whose name fits {job.pattern.strip()}" if job.pattern.strip() else ""
        deeper = "" if job.recursive else ", folders in it not counted"
        wanted = job.media.replace("pictures and videos", "picture or video").removesuffix("s")
        summary.notes = f"No {wanted}{fitting} was found in {job.folder}{deeper}."
    return summary, waiting


def _text_in(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:  # there is none; one that may not be read may not be written either, which is told then
        return ""
