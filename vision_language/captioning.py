"""Captions for a folder of pictures or videos: left-padded batches, a text file beside each, resumed where it stopped.

While one batch is written the next one is read and resized. A picture that fails is recorded with its reason and the
others go on; what is written is whole, so an interrupted run loses one batch at most. Several runs share a folder.
"""

from __future__ import annotations

import errno
import logging
import math
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from .. import host
from ..host.errors import first_line, is_full
from ..host.interruption import is_stop
from ..host.letters import readable
from ..host.system_errors import FAILING
from ..host.whole_files import whole_file
from . import caption_list
from .answering import Answer, AnswerOptions, BatchSize, answer
from .caption_job import VIDEO_SUFFIXES, CaptionJob, CaptionSummary, begin
from .caption_sharing import Shares, finish, taking_part, tidy
from .embeddings import EmbeddingCache, VisualItem, look_up
from .loaded_model import LoadedModel
from .pictures import Clip, Picture, read_clip, read_picture
from .prompts import Question
from .sampling import Sampling
from .timing import Timing

log = logging.getLogger("hotpath.vision_language")

FRAMES_A_SECOND = 2.0  # of a video, as Qwen's models were trained
LOOK = 0.5  # seconds between two looks at what other runs do
PATIENCE = 300.0  # seconds after which they are spoken of

# What can be asked of pictures that were read, and why others cannot be.
Prepared = tuple[dict[Path, tuple[Question, list[VisualItem]]], dict[Path, str]]


def write_whole(path: Path, text: str) -> None:
    """Write `text`; what is at `path` stays until all of it is there."""
    with whole_file(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


class FolderCaptioner:
    """Captions the pictures of one job with one model."""

    def __init__(self, model: LoadedModel, job: CaptionJob, sampling: Sampling, options: AnswerOptions) -> None:
        job.check()
        self.model, self.job, self.sampling = model, job, sampling
        self.options = replace(options, answers=1, stream=False, encode_jointly=True, reuse_prefix=False)
        self._fitting = BatchSize()

    def read(self, path: Path) -> tuple[tuple[Picture, ...], tuple[Clip, ...]]:
        if path.suffix.lower() in VIDEO_SUFFIXES:
            return (), (read_clip(path, FRAMES_A_SECOND, self.job.max_frames),)
        return (read_picture(path),), ()

    def _prepare(self, paths: Sequence[Path]) -> Prepared:
        """Read and look up a batch, beside the batch that is being written."""
        ready: dict[Path, tuple[Question, list[VisualItem]]] = {}
        failed: dict[Path, str] = {}
        cache = EmbeddingCache(self.options.cache_images, self.options.cache_on_disk)
        for path in paths:
            try:
                pictures, clips = self.read(path)
                items = look_up(self.model, pictures, clips, self.options.budget, cache, Timing(self.model.device))
            except Exception as error:  # whatever an image library or a processor finds wrong with one file
                failed[path] = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            else:
                ready[path] = (Question(self.job.prompt, self.job.system, pictures, clips, self.job.thinking), items)
        return ready, failed

    def _batches(self, shares: Shares, summary: CaptionSummary) -> Iterator[Prepared]:
        """Prepared batches, one ahead; in the end an empty one at each look at what other runs still have to do."""
        since = time.monotonic()
        with ThreadPoolExecutor(1, thread_name_prefix="hotpath-captions") as pool:

            def begun(ahead: bool) -> Future[Prepared] | None:
                paths = shares.take(self.job.batch_size, ahead)
                return pool.submit(self._prepare, paths) if paths else None

            current = begun(False)
            while current is not None or shares.left:
                if current is not None:
                    ahead = begun(True)
                    yield current.result()
                    current, since = ahead or begun(False), time.monotonic()
                    continue
                if summary.awaited != (left := shares.left):
                    summary.awaited, since = left, time.monotonic()
                    yield {}, {}
                if time.monotonic() - since > PATIENCE:
                    since = math.inf
                    log.warning(
                        "captions: another run in %s has been busy with %d pictures for long, such as %s. If it was halted, end "
                        "it: its pictures are described here then.",
                        self.job.folder,
                        len(left),
                        left[0].name,
                    )
                time.sleep(LOOK)
                host.current().check_interrupt()
                current = begun(False)
            summary.awaited = []

    def run(self, shares: Shares | None = None) -> CaptionSummary:
        """Caption everything that waits, together with other runs in the folder. shares: for a caller that takes part in it
        already. Raises only for an interrupt and for a job that cannot start."""
        start = time.perf_counter()
        summary, waiting = begin(self.job)
        if shares is None and not waiting:
            tidy(self.job, summary)
        elif shares is None:
            self.job.check_target()
            with taking_part(self.job) as shares:
                self._share(shares, waiting, summary, start)
        else:
            self._share(shares, waiting, summary, start)
        summary.seconds = time.perf_counter() - start
        return summary

    def _share(self, shares: Shares, waiting: list[Path], summary: CaptionSummary, start: float) -> None:
        shares.wait_for(waiting)
        with host.tracked(host.current(), len(waiting), "captions") as bar:
            for ready, failed in self._batches(shares, summary):
                summary.failed.update(failed)
                for path, found in self._caption(ready, summary):
                    try:
                        self._write(path, found, summary)
                    except OSError as error:
                        if is_full(error) or error.errno in (errno.EROFS, *FAILING):  # what one meets, all others will
                            raise
                        summary.failed[path] = f"its caption could not be written: {first_line(error)}"
                        self._record_failure(path, summary.failed[path])
                    if path in summary.captions or not found.text:
                        shares.done(path, summary.failed.get(path, ""))
                for path, why in failed.items():
                    self._record_failure(path, why)
                shares.leave([*ready, *failed])
                bar.update(len(ready) + len(failed) + shares.note_in(summary))
                summary.seconds = time.perf_counter() - start
                host.current().show_text(summary.report(), self.options.node_id)
        finish(shares, summary)

    def _caption(
        self, ready: dict[Path, tuple[Question, list[VisualItem]]], summary: CaptionSummary
    ) -> list[tuple[Path, Answer]]:
        """Answers of one batch; when the batch fails as a whole, of its pictures one by one."""
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
                self._fitting,
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
        summary.notes = made[-1].report
        summary.remarks = list(dict.fromkeys([*summary.remarks, *(note for part in made for note in part.notes)]))
        return list(zip(paths, made, strict=True))

    def _write(self, path: Path, found: Answer, summary: CaptionSummary) -> None:
        if not found.text:
            why = "the model answered nothing"
            if found.thoughts and not found.finished:
                why = f"its thoughts did not end within {found.tokens:,} tokens: raise max_new_tokens, or switch thinking off"
            summary.failed[path] = why
            self._record_failure(path, why)
            return
        text = readable(f"{self.job.before}{found.text}{self.job.after}")
        if self.job.output != "jsonl":
            write_whole(self.job.text_file(path), text)
        if self.job.output != "txt":
            entry: dict[str, Any] = {"file": self.job.name_of(path), "caption": text}
            caption_list.append(self.job.captions, entry if found.finished else entry | {"cut_off": True})
        summary.captions[path] = text
        if not found.finished:
            summary.unfinished.append(path)

    def _record_failure(self, path: Path, why: str) -> None:
        if self.job.output == "txt":
            return
        try:
            caption_list.append(self.job.captions, {"file": self.job.name_of(path), "error": why})
        except OSError as error:
            log.warning("captions: %s is not in %s, because %s", path.name, caption_list.LIST_NAME, error)
