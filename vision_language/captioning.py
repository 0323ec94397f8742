"""Captions for a folder of pictures: left-padded batches, a text file beside each picture, resumed where it stopped.

While one batch is written the next one is read and resized. A picture that fails is recorded with its reason and the
others go on; what is written is whole, so an interrupted run loses one batch at most.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from pathlib import Path

from .. import host
from ..host.whole_files import whole_file
from .answering import AnswerOptions, answer
from .embeddings import EmbeddingCache, VisualItem, look_up
from .interruption import is_stop
from .loaded_model import LoadedModel
from .pictures import Picture, read_picture
from .prompts import Question
from .sampling import Sampling
from .timing import Timing

log = logging.getLogger("hotpath.vision_language")

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")
LIST_NAME = "captions.jsonl"
FORMATS = ("txt", "jsonl", "both")


@dataclass(frozen=True)
class CaptionJob:
    """What is captioned and where the captions go.

    output: txt (one file beside each picture), jsonl (one line a picture in captions.jsonl) or both. overwrite=False
    skips pictures that have their caption. before, after: written around every caption, such as a trigger word.
    target: where the captions go, with the same sub-folders; None is beside the pictures. pattern: only files whose
    name fits it, such as "portrait_*"; "" is all.
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

    @property
    def captions(self) -> Path:
        return self.target if self.target is not None else self.folder

    def text_file(self, picture: Path) -> Path:
        return (self.captions / picture.relative_to(self.folder)).with_suffix(".txt")


@dataclass
class CaptionSummary:
    """What came of a job. captions: the text of each picture done now; failed: picture and reason."""

    captions: dict[Path, str] = field(default_factory=dict)
    skipped: int = 0
    failed: dict[Path, str] = field(default_factory=dict)
    seconds: float = 0.0
    notes: str = ""

    def report(self) -> str:
        rate = f", {len(self.captions) / self.seconds * 60:.1f} a minute" if self.captions and self.seconds else ""
        lines = [
            f"{len(self.captions)} captioned in {self.seconds:.1f} s{rate}, {self.skipped} skipped because they have a "
            f"caption, {len(self.failed)} failed"
        ]
        lines += [f"{path.name}: {why}" for path, why in self.failed.items()]
        return "\n".join([*lines, self.notes] if self.notes else lines)


def place(base: Path, name: str) -> Path:
    """The folder `name` means: absolute as it is, else inside `base`. Raises ValueError for one that leaves `base`."""
    folder = Path(name.strip())
    if not folder.is_absolute() and ".." in folder.parts:
        raise ValueError(f"{name!r} leads out of {base}: give a folder inside it, or the whole path.")
    return base / folder


def pictures_in(folder: Path, recursive: bool, pattern: str = "") -> list[Path]:
    """Picture files whose name fits `pattern`, sorted by path; hidden files are left out."""
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}: give the folder of the pictures.")
    found = folder.rglob("*") if recursive else folder.iterdir()
    return sorted(
        path
        for path in found
        if path.suffix.lower() in PICTURE_SUFFIXES
        and fnmatch(path.name, pattern or "*")
        and path.is_file()
        and not path.name.startswith(".")
    )


def already_listed(folder: Path) -> set[str]:
    """Pictures that captions.jsonl has a caption for; a line that was cut off is ignored."""
    done: set[str] = set()
    path = folder / LIST_NAME
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if isinstance(entry, dict) and entry.get("caption"):
                done.add(str(entry.get("file")))
    return done


def compact(path: Path) -> None:
    """One line for each picture of a captions.jsonl: its last caption, or its last error when it has none."""
    if not path.is_file():
        return
    last: dict[str, dict[str, str]] = {}
    count = 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if not isinstance(entry, dict):
            continue
        count += 1
        name = str(entry.get("file"))
        if "caption" in entry or "caption" not in last.get(name, {}):
            last.pop(name, None)
            last[name] = entry
    if len(last) < count:
        write_whole(path, "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in last.values()))


def write_whole(path: Path, text: str) -> None:
    """Write `text`; what is at `path` stays until all of it is there."""
    with whole_file(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


class FolderCaptioner:
    """Captions the pictures of one job with one model."""

    def __init__(self, model: LoadedModel, job: CaptionJob, sampling: Sampling, options: AnswerOptions) -> None:
        if job.output not in FORMATS:
            raise ValueError(f"{job.output!r} is no output: choose {', '.join(FORMATS)}.")
        if job.batch_size < 1:
            raise ValueError("The batch size must be at least 1.")
        if not job.prompt.strip():
            raise ValueError("The prompt is empty: say what the captions should tell.")
        self.model, self.job, self.sampling = model, job, sampling
        self.options = replace(options, answers=1, stream=False, encode_jointly=True, reuse_prefix=False)

    def waiting(self, summary: CaptionSummary) -> list[Path]:
        """The pictures that need a caption; counts the others."""
        job = self.job
        listed = already_listed(job.captions) if job.output != "txt" else set()
        targets: dict[Path, Path] = {}
        waiting: list[Path] = []
        for path in pictures_in(job.folder, job.recursive, job.pattern.strip()):
            target = job.text_file(path)
            if job.output != "jsonl" and target in targets:
                summary.failed[path] = f"{targets[target].name} has the same caption file {target.name}"
                continue
            targets[target] = path
            has_text = target.is_file() and bool(target.read_text(encoding="utf-8", errors="replace").strip())
            has_line = path.relative_to(job.folder).as_posix() in listed
            done = {"txt": has_text, "jsonl": has_line, "both": has_text and has_line}[job.output]
            if done and not job.overwrite:
                summary.skipped += 1
            else:
                waiting.append(path)
        return waiting

    def question(self, picture: Picture) -> Question:
        return Question(self.job.prompt, self.job.system, (picture,))

    def _prepare(self, paths: Sequence[Path]) -> tuple[dict[Path, tuple[Question, list[VisualItem]]], dict[Path, str]]:
        """Read and look up a batch, beside the batch that is being written."""
        ready: dict[Path, tuple[Question, list[VisualItem]]] = {}
        failed: dict[Path, str] = {}
        cache = EmbeddingCache(self.options.cache_images, self.options.cache_on_disk)
        for path in paths:
            try:
                picture = read_picture(path)
                items = look_up(self.model, [picture], [], self.options.budget, cache, Timing(self.model.device))
            except Exception as error:  # whatever an image library or a processor finds wrong with one file
                failed[path] = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            else:
                ready[path] = (self.question(picture), items)
        return ready, failed

    def _batches(
        self, paths: list[Path]
    ) -> Iterator[Future[tuple[dict[Path, tuple[Question, list[VisualItem]]], dict[Path, str]]]]:
        """Prepared batches, one ahead."""
        parts = [paths[i : i + self.job.batch_size] for i in range(0, len(paths), self.job.batch_size)]
        with ThreadPoolExecutor(1, thread_name_prefix="hotpath-captions") as pool:
            ahead = pool.submit(self._prepare, parts[0]) if parts else None
            for index in range(len(parts)):
                current = ahead
                ahead = pool.submit(self._prepare, parts[index + 1]) if index + 1 < len(parts) else None
                assert current is not None
                yield current

    def run(self) -> CaptionSummary:
        """Caption everything that waits. Raises only for an interrupt and for a job that cannot start."""
        summary = CaptionSummary()
        start = time.perf_counter()
        waiting = self.waiting(summary)
        if not (waiting or summary.skipped or summary.failed):
            fitting = f" whose name fits {self.job.pattern.strip()}" if self.job.pattern.strip() else ""
            deeper = "" if self.job.recursive else ", folders in it not counted"
            summary.notes = f"No picture{fitting} was found in {self.job.folder}{deeper}."
        with host.tracked(host.current(), len(waiting), "captions") as bar:
            for batch in self._batches(waiting):
                ready, failed = batch.result()
                summary.failed.update(failed)
                for path, caption in self._caption(ready, summary):
                    self._write(path, caption, summary)
                for path, why in failed.items():
                    self._record_failure(path, why)
                bar.update(len(ready) + len(failed))
                summary.seconds = time.perf_counter() - start
                host.current().show_text(summary.report(), self.options.node_id)
        if self.job.output != "txt":
            compact(self.job.captions / LIST_NAME)
        summary.seconds = time.perf_counter() - start
        return summary

    def _caption(
        self, ready: dict[Path, tuple[Question, list[VisualItem]]], summary: CaptionSummary
    ) -> list[tuple[Path, str]]:
        """Captions of one batch; when the batch fails as a whole, of its pictures one by one."""
        if not ready:
            return []
        paths = list(ready)
        made, failure = None, ""
        try:
            made = answer(
                self.model,
                [ready[path][0] for path in paths],
                self.sampling,
                self.options,
                [ready[path][1] for path in paths],
            )
        except Exception as error:
            if is_stop(error):
                raise
            failure = f"{type(error).__name__}: {error}"
        if made is None and len(paths) == 1:
            summary.failed[paths[0]] = failure
            self._record_failure(paths[0], failure)
            return []
        if made is None:
            log.warning("captions: a batch of %d failed (%s); its pictures are tried one by one", len(paths), failure)
            # Out of the handler first: the traceback held what the batch had on the device.
            self.model.drop_device_state()
            return [pair for path in paths for pair in self._caption({path: ready[path]}, summary)]
        summary.notes = made[0].report
        return [(path, found.text) for path, found in zip(paths, made, strict=True)]

    def _write(self, path: Path, caption: str, summary: CaptionSummary) -> None:
        if not caption:
            summary.failed[path] = "the model answered nothing"
            self._record_failure(path, summary.failed[path])
            return
        text = f"{self.job.before}{caption}{self.job.after}"
        if self.job.output != "jsonl":
            write_whole(self.job.text_file(path), text)
        if self.job.output != "txt":
            self._append({"file": path.relative_to(self.job.folder).as_posix(), "caption": text})
        summary.captions[path] = text

    def _record_failure(self, path: Path, why: str) -> None:
        if self.job.output != "txt":
            self._append({"file": path.relative_to(self.job.folder).as_posix(), "error": why})

    def _append(self, entry: dict[str, str]) -> None:
        self.job.captions.mkdir(parents=True, exist_ok=True)
        with (self.job.captions / LIST_NAME).open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")
